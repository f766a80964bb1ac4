"""LoRA against W + alpha / rank * B A written out, and its files against the peft library."""
import copy
import json
import os
import subprocess
import venv

import pytest
import torch
from conftest import ARCHITECTURES, SMALL, random_pairs, tiny_model
from safetensors.torch import load_file
from transformers import GemmaConfig, GemmaForCausalLM, Phi3Config, Phi3ForCausalLM

import train
from data import TOY_STUDENT, BadInput, collate, load_tokenizer
from generate import load_model
from lora import LoRALinear, add_lora, lora_layers, merge, save_adapter, without_lora
from rdpo import sequence_logps

MORE = {
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(vocab_size=97, num_key_value_heads=2, head_dim=8, **SMALL)),
    "phi3_fused_qkv": lambda: Phi3ForCausalLM(Phi3Config(vocab_size=97, num_key_value_heads=2, **SMALL)),
}
NAMES = [name for name in ARCHITECTURES if name != "gpt2"] + list(MORE)


def model_of(name):
    torch.manual_seed(0)
    return MORE[name]().eval() if name in MORE else tiny_model(name)


def trained(model, rank=3, alpha=6, dropout=0.0):
    """The model with adapters whose B is no longer 0."""
    add_lora(model, rank, alpha, dropout)
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
    layer = LoRALinear(base.requires_grad_(False), rank=2, alpha=3, dropout=0.0).double()
    torch.nn.init.normal_(layer.B)
    weight = (base.weight + 3 / 2 * layer.B @ layer.A).detach().requires_grad_()
    expected = x @ weight.T + base.bias
    assert torch.allclose(layer(x), expected, atol=1e-14)
    assert not torch.allclose(layer(x), x @ (base.weight + 2 / 3 * layer.B @ layer.A).T + base.bias, atol=1e-3)  # control: rank / alpha
    # By the chain rule dL/dB = alpha / rank * dL/dW A^T, and dL/dA = alpha / rank * B^T dL/dW.
    layer(x).pow(2).sum().backward()
    expected.pow(2).sum().backward()
    assert torch.allclose(layer.B.grad, 3 / 2 * weight.grad @ layer.A.T) and torch.allclose(layer.A.grad, 3 / 2 * layer.B.T @ weight.grad)
    assert base.weight.grad is None and base.bias.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_at_first_and_with_adapters_off_it_is_the_reference_to_the_bit(name):
    model = model_of(name)
    before = logits_of(model)
    add_lora(model, 4, 8)
    assert torch.equal(logits_of(model), before)
    trained(model := model_of(name))
    assert not torch.allclose(logits_of(model), before, atol=1e-2)
    with without_lora(model):
        assert torch.equal(logits_of(model), before)
    assert not torch.allclose(logits_of(model), before, atol=1e-2)  # and on again


@pytest.mark.parametrize("name", NAMES)
def test_only_adapters_get_gradients_and_every_linear_layer_of_the_decoder_has_one(name):
    model = trained(model_of(name))
    sequence_logps(model, collate(random_pairs(3))).sum().backward()
    for parameter, weight in model.named_parameters():
        is_adapter = parameter.endswith((".A", ".B"))
        assert weight.requires_grad == is_adapter and (weight.grad is not None and weight.grad.any().item()) == is_adapter, parameter
    linear = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == len(lora_layers(model)) >= 8
    assert not isinstance(model.get_output_embeddings(), LoRALinear)


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_compute_what_the_adapters_did(name):
    model = trained(model_of(name))
    adapted, names = logits_of(model), set(model_of(name).state_dict())
    merge(model)
    assert set(model.state_dict()) == names  # a plain model again
    assert torch.allclose(logits_of(model), adapted, atol=1e-5)
    assert not torch.allclose(logits_of(model_of(name)), adapted, atol=1e-2)  # control: the base alone


def test_a_16_bit_base_stays_as_it_is_and_adapters_are_float32():
    model = model_of("llama").to(torch.bfloat16)
    weights = copy.deepcopy(model.state_dict())
    trained(model)
    assert {layer.A.dtype for _, layer in lora_layers(model)} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sequence_logps(model, collate(random_pairs(3))).sum().backward()
    assert all(torch.equal(layer.base.weight, weights[f"{name}.weight"]) for name, layer in lora_layers(model))


def test_a_16_bit_run_rounds_neither_rotary_frequencies_nor_the_weights_that_it_saves(run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    base = load_model(TOY_STUDENT)  # its bfloat16 weights as float32
    with torch.no_grad():
        for weight in base.parameters():
            weight *= 1.001  # which bfloat16 does not hold
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(TOY_STUDENT).save_pretrained(tmp_path / "base")
    frequencies, end = [], train.save_model_folder

    def save(model, *rest):
        frequencies.append(model.base_model.rotary_emb.inv_freq.clone())
        end(model, *rest)

    forward = train.forward
    monkeypatch.setattr(train, "save_model_folder", save)
    monkeypatch.setattr(train, "forward", lambda model, *rest: (frequencies.append(model.base_model.rotary_emb.inv_freq.clone()), forward(model, *rest))[1])
    code, _, err = run_train("--data", write_rows(toy_rows[:16]), "--model", tmp_path / "base", "--dtype", "bfloat16", "--lora_rank", 2, "--max_steps", 1,
                             "--batch_size", 4, "--max_new_tokens", 2, "--learning_rate", 1e-6)
    assert code == 0, err
    right = base.base_model.rotary_emb.inv_freq
    assert not torch.equal(right, right.bfloat16().float()) and all(torch.equal(one, right) for one in frequencies) and len(frequencies) > 1
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.float32 and not torch.equal(before[name], before[name].bfloat16().float())
    assert 0 < (after[name] - before[name]).abs().max() < 1e-5  # one step of 1e-6; bfloat16 would round by up to 1e-3


def test_dropout_acts_in_learning_passes_only():
    model, batch = trained(model_of("llama"), dropout=0.5), collate(random_pairs(3))
    with torch.no_grad():
        assert torch.equal(sequence_logps(model, batch), sequence_logps(model, batch))
    assert not torch.equal(sequence_logps(model, batch), sequence_logps(model, batch))
    # The adapter's input is scaled up by what is dropped, so its mean output stays: over many draws the noise averages out.
    layer, x = lora_layers(model)[0][1], torch.randn(1, 32)
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    layer.dropout = 0.0
    assert torch.allclose(mean, layer(x), atol=0.1)


def test_a_model_without_linear_layers_is_refused_in_one_line():
    with pytest.raises(BadInput, match="Conv1D; train it whole"):
        add_lora(model_of("gpt2"), 4, 8)


# -------------------------------------------------------------------------------------------- the peft library

PEFT_LOGITS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    for adapter in sys.argv[2:]:
        model = PeftModel.from_pretrained(base, adapter).eval()
        torch.save(model(input_ids=torch.arange(40).view(2, 20)).logits, f"{adapter}/logits.pt")
        base = model.unload()
"""


@pytest.fixture(scope="session")
def peft_python():
    """A Python that has peft, which this project neither needs nor lists: a virtual environment of its own, made once."""
    folder = os.path.expanduser("~/.cache/rdpo/peft")
    if not os.path.exists(folder):
        venv.create(folder + ".tmp", with_pip=True, clear=True)
        subprocess.run([folder + ".tmp/bin/python", "-m", "pip", "install", "-q", f"torch=={torch.__version__.partition('+')[0]}",
                        "transformers>=5.10,<6", "peft"], check=True)
        os.rename(folder + ".tmp", folder)
    return os.path.join(folder, "bin", "python")


@pytest.mark.real
@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "gpt_neox", "phi3_fused_qkv"])
def test_peft_loads_the_adapter_and_computes_the_same_logits(name, tmp_path, peft_python):
    base, right, wrong = tmp_path / "base", tmp_path / "right", tmp_path / "wrong"
    model_of(name).save_pretrained(base)
    model = trained(model_of(name))
    for folder in (right, wrong):
        folder.mkdir()
        save_adapter(model, folder, str(base))
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    subprocess.run([peft_python, "-c", PEFT_LOGITS, str(base), str(right), str(wrong)], check=True, capture_output=True)
    assert torch.allclose(torch.load(right / "logits.pt"), logits_of(model), atol=1e-5)
    assert not torch.allclose(torch.load(wrong / "logits.pt"), logits_of(model), atol=1e-2)
