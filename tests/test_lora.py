"""LoRA against W + alpha / rank * B A written out, and its files against the peft library."""
import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, GROUPED, build, random_pairs, tiny_model
from safetensors.torch import load_file

import train
from data import collate
from infra import checkpoint
from infra.command import BadInput
from infra.lora import LoRALinear, add_lora, lora_layers, merged, save_adapter, without_lora
from infra.models import TOY_STUDENT, load_model, load_tokenizer, sample_weights
from infra.rounding import Masters
from rdpo import sequence_logps

NAMES = [name for name in ARCHITECTURES if name != "gpt2"] + ["gemma"]


def model_of(name):
    if name != "gemma":
        return tiny_model(name)
    torch.manual_seed(0)
    return build("Gemma", head_dim=8, **GROUPED)(97).eval()


def trained(model, rank=3, alpha=6):
    """The model with adapters whose B is no longer 0."""
    add_lora(model, rank, alpha)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.B.normal_(std=0.1)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40).view(2, 20)).logits  # (2, 20, V)


def test_forward_and_gradients_equal_the_formula_in_float64():
    torch.manual_seed(0)
    base, x = torch.nn.Linear(7, 5).double(), torch.randn(4, 7, dtype=torch.float64)
    layer = LoRALinear(base.requires_grad_(False), 2, 3, base.weight).double()
    torch.nn.init.normal_(layer.B)
    weight = (base.weight + 3 / 2 * layer.B @ layer.A).detach().requires_grad_()
    expected = x @ weight.T + base.bias
    assert torch.allclose(layer(x), expected, atol=1e-14)
    wrong = base.weight + 2 / 3 * layer.B @ layer.A  # control: rank / alpha
    assert not torch.allclose(layer(x), x @ wrong.T + base.bias, atol=1e-3)
    # By the chain rule dL/dB = alpha / rank * dL/dW A^T, and dL/dA = alpha / rank * B^T dL/dW.
    layer(x).pow(2).sum().backward()
    expected.pow(2).sum().backward()
    assert torch.allclose(layer.B.grad, 3 / 2 * weight.grad @ layer.A.T)
    assert torch.allclose(layer.A.grad, 3 / 2 * layer.B.T @ weight.grad)
    assert base.weight.grad is None and base.bias.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_new_or_switched_off_adapters_leave_the_reference_to_the_bit(name):
    model = model_of(name)
    before = logits_of(model)
    add_lora(model, 4, 8)
    assert torch.equal(logits_of(model), before)
    model = trained(model_of(name))
    assert not torch.allclose(logits_of(model), before, atol=1e-2)
    with without_lora(model):
        assert torch.equal(logits_of(model), before)
    assert not torch.allclose(logits_of(model), before, atol=1e-2)  # and on again


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_layer_of_the_decoder_has_an_adapter_and_only_those_learn(name):
    model = trained(model_of(name))
    sequence_logps(model, collate(random_pairs(3))).sum().backward()
    for parameter, weight in model.named_parameters():
        is_adapter = parameter.endswith((".A", ".B"))
        has_gradient = weight.grad is not None and weight.grad.any().item()
        assert (weight.requires_grad, has_gradient) == (is_adapter, is_adapter), parameter
    linear = [module for module in model.base_model.modules()
              if isinstance(module, torch.nn.Linear)]
    assert len(linear) == len(lora_layers(model)) >= 8
    assert not isinstance(model.get_output_embeddings(), LoRALinear)


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_compute_what_the_adapters_did(name):
    model, plain = trained(model_of(name)), model_of(name)
    adapted, base = logits_of(model), logits_of(plain)
    weights = dict(merged(model, model.state_dict()))
    assert weights.keys() == plain.state_dict().keys()
    assert torch.equal(logits_of(model), adapted)  # the adapted model stays as it is
    plain.load_state_dict(weights)
    assert torch.allclose(logits_of(plain), adapted, atol=1e-5)
    assert not torch.allclose(base, adapted, atol=1e-2)  # control: the base alone


@pytest.mark.parametrize("name", [*NAMES, "gpt2"])
def test_the_exported_folder_computes_what_the_policy_did(name, tmp_path, toy_tokenizer):
    """Adapters merged, tied weights written once; gpt2 has no adapters."""
    policy, args = model_of(name), SimpleNamespace(out_dir=tmp_path, save_adapter=False, seed=0)
    before, base = sample_weights(dict(policy.named_parameters())), logits_of(policy)
    if name == "gpt2":
        policy.transformer.h[0].mlp.c_fc.weight.data *= 2
    else:
        trained(policy)
    # Another dtype, because it copies tied weights apart. This one is exact.
    masters = Masters(policy, torch.float32, seed=0)
    report = checkpoint.export(policy, masters, toy_tokenizer, torch.float64, before, args)
    share = float(report.split("(")[1].split(" %")[0])
    assert report.startswith("student saved (") and 0 < share < 100, report  # not the embeddings
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float64}
    student = load_model(str(tmp_path))
    assert sum(tensor.numel() for tensor in saved.values()) == student.num_parameters()
    assert torch.allclose(logits_of(student), logits_of(policy), atol=1e-5)
    assert not torch.allclose(logits_of(student), base, atol=1e-2)  # control


def test_a_16_bit_base_stays_as_it_is_and_adapters_start_alike_in_all_dtypes():
    wide, model = model_of("llama"), model_of("llama").bfloat16()
    for each in (wide, model):
        torch.manual_seed(1)
        add_lora(each, 4, 8)
    weights = copy.deepcopy(model.state_dict())
    for (_, layer), (_, other) in zip(lora_layers(model), lora_layers(wide)):
        assert layer.A.dtype == layer.B.dtype == torch.bfloat16
        assert torch.equal(layer.A, other.A.bfloat16()) and not layer.B.any()
        layer.B.data.normal_(std=0.1)
    sequence_logps(model, collate(random_pairs(3))).sum().backward()
    for name, layer in lora_layers(model):
        assert torch.equal(layer.base.weight, weights[f"{name}.base.weight"])
        assert layer.base.weight.grad is None and layer.A.grad.any() and layer.B.grad.any()


@pytest.mark.parametrize("rank, bias", [(16, False), (3, True)])
def test_a_16_bit_adapter_far_below_the_grid_of_the_bases_output_is_not_lost(rank, bias):
    torch.manual_seed(0)
    base = torch.nn.Linear(256, 512, bias=bias).bfloat16().requires_grad_(False)
    layer = LoRALinear(base, rank, 2 * rank, base.weight)
    torch.nn.init.normal_(layer.B, std=2e-4)
    x = torch.randn(4, 50, 256).bfloat16().requires_grad_()
    with torch.no_grad():
        low = 2.0 * F.linear(x, layer.A)
        change = F.linear(low, layer.B).float()  # far less than a step of the output's grid
        assert change.std() < 0.2 * torch.finfo(torch.bfloat16).eps * base(x).float().std()
    output = layer(x)
    seen = (output - base(x)).float()
    twice = (base(x) + F.linear(low, layer.B) - base(x)).float()  # control
    shares = [((each * change).sum() / change.square().sum()).item() for each in (seen, twice)]
    assert 0.95 < shares[0] < 1.05 and shares[1] < 0.8, shares
    # Gradients, beside those of the formula in float64.
    weights = {name: tensor.detach().double().requires_grad_()
               for name, tensor in (("x", x), ("A", layer.A), ("B", layer.B))}
    exact = weights["x"] @ base.weight.double().T + 2 * (
        weights["x"] @ weights["A"].T) @ weights["B"].T
    factors = torch.randn(4, 50, 512)
    (exact * factors).sum().backward()
    (output * factors).sum().backward()
    for name, tensor in (("x", x), ("A", layer.A), ("B", layer.B)):
        right, found = weights[name].grad, tensor.grad.double()
        assert (found - right).norm() < 0.01 * right.norm(), name
    assert base.weight.grad is None


def test_saved_buffers_keep_their_dtype():
    model = tiny_model()
    model.register_buffer("scale", torch.tensor([1.001]))
    masters = Masters(model, torch.float32, seed=0)
    weights = checkpoint.student_weights(model, masters, torch.bfloat16, seed=0)
    assert torch.equal(weights.pop("scale"), model.scale)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_16_bit_run_rounds_neither_rotary_frequencies_nor_saved_weights(
        stored, run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    base = load_model(TOY_STUDENT)
    with torch.no_grad():
        for weight in base.parameters():
            weight *= 1.001  # bfloat16 cannot represent that
    right = base.base_model.rotary_emb.inv_freq.clone()
    assert not torch.equal(right, right.bfloat16().float())  # control: rounding would be seen
    base.to(stored).save_pretrained(tmp_path / "base")
    load_tokenizer(TOY_STUDENT).save_pretrained(tmp_path / "base")
    frequencies = {"forward": [], "export": []}

    def spy(module, name):
        function = getattr(module, name)

        def spied(policy, *rest):
            frequencies[name].append(policy.base_model.rotary_emb.inv_freq.clone())
            return function(policy, *rest)
        monkeypatch.setattr(module, name, spied)

    spy(train, "forward")
    spy(checkpoint, "export")
    code, _, err = run_train(
        "--data", write_rows(toy_rows[:16]), "--model", tmp_path / "base", "--dtype", "bfloat16",
        "--lora_rank", 2, "--max_steps", 1, "--batch_size", 4, "--learning_rate", 1e-6)
    assert code == 0, err
    assert len(frequencies["forward"]) > 1 and len(frequencies["export"]) == 1
    assert all(torch.equal(one, right) for one in sum(frequencies.values(), []))
    before, after = (load_file(tmp_path / folder / "model.safetensors")
                     for folder in ("base", "out"))
    assert {tensor.dtype for tensor in after.values()} == {stored}
    untrained, name = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    policy = {key: tensor.bfloat16().float() for key, tensor in before.items()}
    assert torch.equal(after[untrained].float(), policy[untrained])
    if stored == torch.float32:  # saved without another rounding: one step of 1e-6
        assert 0 < (after[name] - policy[name]).abs().max() < 1e-5


def test_a_model_without_linear_layers_is_refused_in_one_line():
    with pytest.raises(BadInput, match="Conv1D; train it whole"):
        add_lora(model_of("gpt2"), 4, 8)


# --------------------------------------------------------------------------------- the peft library

PEFT_LOGITS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32).eval()
    for adapter in ("right", "wrong"):
        model = PeftModel.from_pretrained(base, f"{folder}/{adapter}").eval()
        with torch.no_grad():
            logits = model(input_ids=torch.arange(40).view(2, 20)).logits
        torch.save(logits, f"{folder}/{adapter}/logits.pt")
        base = model.unload()
"""


@pytest.fixture(scope="session")
def peft_path():
    """A folder with the package peft, fetched once. This project neither needs nor lists it."""
    folder = os.path.expanduser("~/.cache/rdpo/peft")
    if not os.path.exists(os.path.join(folder, "peft")):
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target",
                        folder, "peft"], check=True)
    return folder


@pytest.mark.real
def test_peft_loads_the_adapter_and_computes_the_same_logits(tmp_path, peft_path):
    models = {name: trained(model_of(name)) for name in ("llama_tied", "qwen2", "gpt_neox", "phi3")}
    for name, model in models.items():
        base, right, wrong = (tmp_path / name / part for part in ("base", "right", "wrong"))
        model_of(name).save_pretrained(base)
        for folder in (right, wrong):
            folder.mkdir()
            save_adapter(model, model.state_dict(), folder, str(base))
        config = json.loads((wrong / "adapter_config.json").read_text())
        config["lora_alpha"] *= 2  # control
        (wrong / "adapter_config.json").write_text(json.dumps(config))
    folders = [str(tmp_path / name) for name in models]
    subprocess.run([sys.executable, "-c", PEFT_LOGITS, *folders], check=True, capture_output=True,
                   env=os.environ | {"PYTHONPATH": peft_path})
    for name, model in models.items():
        expected = logits_of(model)
        right, wrong = (torch.load(tmp_path / name / part / "logits.pt")
                        for part in ("right", "wrong"))
        assert torch.allclose(right, expected, atol=1e-5), name
        assert not torch.allclose(wrong, expected, atol=1e-2), name
