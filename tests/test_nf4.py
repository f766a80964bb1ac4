"""infra/nf4.py against plain Python and float64, and train.py --base_bits 4."""
import copy
import math
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_one_line, random_pairs, read_metrics, tiny_model
from safetensors.torch import load_file

import train
from data import collate
from infra import nf4
from infra.lora import add_lora, lora_layers
from infra.models import TOY_STUDENT, checkpoint_layers, load_model
from infra.reference import fingerprint
from rdpo import sequence_logps

LEVELS = nf4.LEVELS.tolist()


def single(number):
    """A Python float as float32 has it."""
    return torch.tensor(number, dtype=torch.float32).item()


def plain_quantise(row):
    """(levels, scales, step) of one row of floats, in plain Python: see quantise."""
    blocks = [row[i:i + 64] + [0.0] * (64 - len(row[i:i + 64])) for i in range(0, len(row), 64)]
    largest = [max(map(abs, block)) for block in blocks]
    step = max(single(max(largest) / 255), single(1e-30))
    scales = [max(1, round(single(most / step))) for most in largest]
    levels = [[min(range(16), key=lambda n: abs(single(x / single(scale * step)) - LEVELS[n]))
               for x in block] for block, scale in zip(blocks, scales)]
    return sum(levels, []), scales, step


def rows_to_try():
    """Rows of three blocks, the last one of 22: random ones, zeros, one large weight, all equal."""
    rng = random.Random(0)
    rows = [[rng.gauss(0, 0.05) for _ in range(150)] for _ in range(6)]
    rows += [[0.0] * 150, [0.0] * 64 + rows[0][64:], [5.0] + [1e-4] * 149, [0.3] * 150,
             [-0.02] * 150]
    return torch.tensor(rows)  # (11, 150)


def quantised_matrix(weight, bias=None):
    """A FrozenLinear of a matrix, in 4 bits."""
    linear = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None).to(weight.dtype)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    return nf4.FrozenLinear(linear.requires_grad_(False), "cpu")


def whole(layer, dtype=torch.float64):
    return nf4.dense(nf4.parts_of(layer), torch.zeros((), dtype=dtype), layer.in_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_weights_are_those_of_plain_python(dtype):
    weight = rows_to_try().to(dtype)
    codes, scales, steps = nf4.quantise(weight)
    assert codes.shape == (11, 96) and scales.shape == (11, 3) and steps.shape == (11, 1)
    assert codes.dtype == scales.dtype == torch.uint8
    dense = nf4.dense((codes, scales, steps, nf4.TABLE), torch.zeros(()), 150)
    assert dense.shape == (11, 150)
    for row, own, scale, step, values in zip(weight.float().tolist(), codes.tolist(),
                                             scales.tolist(), steps[:, 0].tolist(), dense):
        levels, right_scales, right_step = plain_quantise(row)
        assert (scale, step) == (right_scales, pytest.approx(right_step, rel=1e-6))
        assert [n for byte in own for n in (byte >> 4, byte & 15)] == levels
        right = [LEVELS[n] * step * scale[i // 64] for i, n in enumerate(levels)][:150]
        assert torch.allclose(values, torch.tensor(right), rtol=1e-6, atol=0)
    zeros = weight == 0
    assert zeros[6].all() and zeros.sum() > 150 and not dense[zeros].any()
    swapped = codes << 4 | codes >> 4  # control: two nibbles exchanged
    wrong = nf4.dense((swapped, scales, steps, nf4.TABLE), torch.zeros(()), 150)
    assert (wrong - dense).abs().max() > 0.01


def test_every_level_and_its_neighbours():
    """A weight on a level keeps it; just past the middle between two it goes to the nearer one."""
    row = [level * 0.5 for level in LEVELS]
    middles = [(a + b) / 2 for a, b in zip(LEVELS, LEVELS[1:])]
    row += [0.5 * (middle + way * 1e-5) for middle in middles for way in (-1, 1)]  # 46 so far
    weight = torch.tensor([row + [0.0] * 18])
    codes, scales, _ = nf4.quantise(weight)
    levels = [n for byte in codes[0].tolist() for n in (byte >> 4, byte & 15)]
    assert scales.tolist() == [[255]]
    assert levels[:46] == [*range(16), *sum(([n, n + 1] for n in range(15)), [])]
    dense = nf4.dense((codes, *nf4.quantise(weight)[1:], nf4.TABLE), weight, 64)
    assert torch.allclose(dense[0, :16], weight[0, :16], rtol=1e-6)


def test_scales_in_8_bits_cost_little_and_a_matrix_takes_4_13_bits_a_weight():
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(64, 4096)
    layer = quantised_matrix(weight)
    size = sum(part.nbytes for part in nf4.parts_of(layer)[:3])
    assert 8 * size / weight.numel() == 4 + 8 / 64 + 32 / 4096
    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    middles = (nf4.LEVELS[1:] + nf4.LEVELS[:-1]) / 2
    best = (nf4.LEVELS[torch.bucketize(blocks / largest, middles)] * largest).view_as(weight)
    errors = [(each - weight).norm() / weight.norm() for each in (whole(layer).float(), best)]
    assert errors[0] < 1.005 * errors[1] and 0.08 < errors[1] < 0.1


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2),
                                          (torch.float16, 3e-3)])
@pytest.mark.parametrize("width", [128, 150])
def test_product_and_gradient_against_float64_on_the_dequantised_weight(dtype, bound, width):
    torch.manual_seed(0)
    layer = quantised_matrix(0.05 * torch.randn(40, width), torch.randn(40).to(dtype))
    x = torch.randn(2, 7, width, dtype=dtype, requires_grad=True)
    factors = torch.randn(2, 7, 40)
    y = layer(x)
    (y * factors).sum().backward()
    exact = x.detach().double().requires_grad_()
    right = exact @ whole(layer).T + layer.bias.double()
    (right * factors).sum().backward()

    def error(found, right):
        return ((found.double() - right).norm() / right.norm()).item()

    assert y.dtype == x.grad.dtype == dtype
    assert error(y, right) < bound and error(x.grad, exact.grad) < bound
    layer.codes = layer.codes << 4 | layer.codes >> 4  # control
    assert error(layer(x), right) > 0.1


def test_nothing_of_the_matrix_is_kept_for_backward():
    layer, saved = quantised_matrix(0.05 * torch.randn(40, 128)), []
    x = torch.randn(5, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {id(part) for part in saved} == {id(part) for part in nf4.parts_of(layer)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi"])
def test_lora_with_checkpointing_against_plain_linears_on_dequantised_weights(name, dtype):
    """Log-probabilities and all gradients; in float32 the step from policy to reference is 0."""
    model = tiny_model(name).to(dtype)
    plain = copy.deepcopy(model)
    nf4.freeze_linears(model, "cpu")
    layers = nf4.frozen_layers(model)
    linear = [module for module in plain.base_model.modules()
              if isinstance(module, torch.nn.Linear)]
    for layer, other in zip(layers, linear, strict=True):
        other.weight.data = whole(layer, dtype)
    batch, gradients, logps = collate(random_pairs(4)), [], []
    for each in (model, plain):
        torch.manual_seed(1)
        add_lora(each, 3, 6)
        for _, layer in lora_layers(each):
            assert layer.A.dtype == dtype
            layer.B.data.normal_(std=0.05)
    checkpoint_layers(model)
    for each in (model, plain):
        logps.append(sequence_logps(each, batch))
        logps[-1].sum().backward()
        gradients.append({key: weight.grad for key, weight in each.named_parameters()
                          if weight.requires_grad})
    assert torch.equal(*logps)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 16
    for key, gradient in gradients[0].items():
        assert gradient.any() and torch.equal(gradient, gradients[1][key]), key
    with torch.no_grad():  # control
        layers[0].codes.copy_(layers[0].codes << 4 | layers[0].codes >> 4)
        assert not torch.allclose(sequence_logps(model, batch), logps[1], atol=1e-2)


def test_the_quantised_reference_has_a_name_of_its_own():
    model = load_model(TOY_STUDENT)
    names = [fingerprint(model, "float32")]
    nf4.freeze_linears(model, "cpu")
    names.append(fingerprint(model, "float32"))
    nf4.frozen_layers(model)[0].codes[0, 0] += 1
    names.append(fingerprint(model, "float32"))
    assert len({*names}) == 3


# ---------------------------------------------------------------------------------------- train.py


FLAGS = "--batch_size", 8, "--lora_rank", 4, "--eval_every", 3


@pytest.fixture
def rows(toy_rows, write_rows):
    return write_rows(toy_rows[:60])


def test_the_toy_student_follows_the_whole_base(run_train, rows, tmp_path):
    losses = []
    for bits in (0, 4):
        code, out, err = run_train("--data", rows, *FLAGS, "--max_steps", 9, "--base_bits", bits,
                                   "--out_dir", tmp_path / str(bits))
        assert code == 0, err
        steps, evaluations = read_metrics(tmp_path / str(bits))
        assert evaluations[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
        losses.append([line["loss"] for line in steps])
    assert losses[0][-1] < 0.68
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and losses[0] != losses[1]
    base = next(line for line in out.split("\n") if line.startswith("base: "))
    assert base.startswith("base: 442,368 weights in 4 bits; mean log-probability of a token ")
    quantised, stored = (float(base.split(before)[1].split()[0].strip(","))
                         for before in ("token ", "as stored "))
    assert 0 < abs(quantised - stored) < 0.05
    # What is saved: an ordinary model, the adapter merged into what the quantised base computes.
    assert "of 542,016 parameters" in out
    saved, before = (load_file(os.path.join(folder, "model.safetensors"))
                     for folder in (tmp_path / "4", TOY_STUDENT))
    assert saved.keys() == before.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    base = whole(quantised_matrix(before[name]), torch.float32)
    far, near = ((saved[name].float() - other.float()).norm() / base.norm()
                 for other in (before[name], base))
    assert 0 < near < 0.02 and 0.07 < far < 0.12, (near, far)
    margin, trained = re.search(r"as saved: margin (\S+) of (\S+)", out).groups()
    assert float(margin) == pytest.approx(float(trained), abs=0.02)
    assert torch.equal(saved["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.real
def test_a_real_student_trains_and_follows_the_whole_base(smollm2, run_train, write_rows, tmp_path):
    prompts, steps = ("tea", "rain", "chess", "the moon"), {}
    rows = [{"prompt": f"Write about {prompt}.", "chosen": f"I like {prompt}.",
             "rejected": f"{prompt} is bad.", "score_chosen": 5, "score_rejected": 1}
            for prompt in prompts]
    path, same = write_rows(rows), write_rows(rows, "same.jsonl")
    for bits in (0, 4):
        code, _, err = run_train(
            "--data", path, "--eval_data", same,
            "--model", smollm2, "--batch_size", 4, "--max_steps", 3, "--lora_rank", 4,
            "--gradient_checkpointing", "--base_bits", bits, "--save_adapter", "--out_dir",
            tmp_path / str(bits), "--eval_every", 3)
        assert code == 0, err
        steps[bits] = [line["loss"] for line in read_metrics(tmp_path / str(bits))[0]]
        assert steps[bits][0] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[4] == pytest.approx(steps[0], abs=0.1) and steps[4][-1] < steps[4][0]


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(run_train, rows, tmp_path, monkeypatch):
    def state(name):
        return load_file(tmp_path / name / "state" / "step-00000006" / "model.safetensors")

    flags = "--data", rows, *FLAGS, "--max_steps", 6, "--base_bits", 4, "--dtype", "bfloat16"
    assert run_train(*flags, "--out_dir", tmp_path / "once")[0] == 0
    order = train.learning_rate

    def stopping(step, *rest):
        if step == 2:
            os.kill(os.getpid(), 15)
        return order(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stopping)
        assert run_train(*flags, "--out_dir", tmp_path / "twice")[0] == 143
    result = run_train("--data", rows, *FLAGS, "--max_steps", 6, "--dtype", "bfloat16",
                       "--out_dir", tmp_path / "twice", "--resume")
    assert_one_line(result, "--base_bits is 0, but the run", "has 4")
    assert run_train(*flags, "--out_dir", tmp_path / "twice", "--resume")[0] == 0
    once, twice = state("once"), state("twice")
    assert all(torch.equal(once[name], twice[name]) for name in once)
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_an_adapter_is_saved_for_the_base(run_train, rows, tmp_path):
    code, out, err = run_train("--data", rows, *FLAGS, "--max_steps", 3, "--base_bits", 4,
                               "--save_adapter")
    assert code == 0, err
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert len(names) == 56 and all(name.endswith(("lora_A.weight", "lora_B.weight"))
                                    for name in names)


@pytest.mark.parametrize("flags", [("--base_bits", 4), ("--base_bits", 4, "--lora_rank", 4,
                                                        "--fsdp")])
def test_flags_that_do_not_fit_are_refused_in_one_line(run_train, rows, flags):
    assert_one_line(run_train("--data", rows, *flags), "--base_bits", "--lora_rank", "--fsdp")


@pytest.mark.slow
def test_two_processes_follow_one(rows, tmp_path):
    losses = []
    for start in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2"]):
        out = str(tmp_path / f"out{len(losses)}")
        subprocess.run([sys.executable, *start, os.path.join(ROOT, "train.py"), "--data", rows,
                        *map(str, FLAGS), "--max_steps", "3", "--base_bits", "4", "--out_dir", out,
                        "--ref_cache_dir", str(tmp_path / "cache"), "--device", "cpu",
                        "--max_new_tokens", "1"], check=True, capture_output=True)
        losses.append([line["loss"] for line in read_metrics(out)[0]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
