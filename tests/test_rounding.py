"""Stochastic rounding and float32 masters: unbiased, reproducible, and worth it."""
import hashlib
import math
import re
import weakref

import pytest
import torch
from conftest import random_pairs, read_metrics, tiny_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from data import collate
from infra import checkpoint, models, rounding
from infra.lora import add_lora, lora_layers, merged
from infra.rounding import Masters, stochastic_round
from rdpo import sequence_logps

DTYPES = [torch.bfloat16, torch.float16]


def draws(x, dtype, count=10_000):
    """(count, n) float32: x rounded with many seeds."""
    rounded = torch.stack([stochastic_round(x, dtype, 0, seed) for seed in range(count)])
    assert rounded.dtype == dtype
    return rounded.float()


def nearest(weight, dtype, *seed, start=0, out=None):
    """What other trainers do: the negative control."""
    return weight.to(dtype) if out is None else out.copy_(weight)


# ------------------------------------------------------------------------------------- the rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_unbiased_value_by_value(dtype):
    x = torch.tensor([0.05, -0.05, 1e-3, -7e-4, 3.001, 6.1e-6, -6.1e-6, 1.7e-7, 1000.3])
    x = x if dtype == torch.float16 else torch.cat([x, torch.tensor([1e-40, -3e-39, 1e30])])
    rounded = draws(x, dtype)  # (10000, n)
    assert all(len(column.unique()) == 2 for column in rounded.T)  # the two neighbours
    below, above = rounded.double().amin(0), rounded.double().amax(0)
    share = (x - below) / (above - below)  # of draws that go up
    sigma = (share * (1 - share) / len(rounded)).sqrt() * (above - below)
    assert ((rounded.double().mean(0) - x).abs() < 4 * sigma).all()
    # Control: to nearest is biased.
    assert ((x.to(dtype).double() - x).abs() > 4 * sigma).float().mean() > 0.8


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_on_the_grid_stay_to_the_bit_and_nothing_overflows(dtype):
    values = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = values[values.isfinite()]
    assert torch.equal(stochastic_round(finite, dtype, 1).float(), finite)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert str(stochastic_round(odd, dtype, 1).tolist()) == str(odd.tolist())
    top = torch.finfo(dtype).max
    above = torch.tensor([top, -top]) * (1 + torch.finfo(dtype).eps / 4)
    assert above.isfinite().all() and draws(above, dtype, 100).abs().unique().tolist() == [top]


def test_dropped_bits_are_those_that_the_dtype_lacks():
    for dtype, bits in rounding.DROPPED_BITS.items():
        assert 2.0 ** (bits - 23) == torch.finfo(dtype).eps


def test_bits_follow_from_seed_and_index_alone(monkeypatch):
    x = torch.randn(5000)
    whole = stochastic_round(x, torch.bfloat16, 0, 3, "name")
    parts = [stochastic_round(x[a:b], torch.bfloat16, 0, 3, "name", start=a)
             for a, b in ((0, 1), (1, 1234), (1234, 5000))]
    assert torch.equal(torch.cat(parts), whole)  # shards draw what one process draws
    on_grid = torch.zeros(5000)  # FSDP's copies are float32
    assert stochastic_round(x, torch.bfloat16, 0, 3, "name", out=on_grid) is on_grid
    assert torch.equal(on_grid, whole.float())
    monkeypatch.setitem(rounding.CHUNK, "cpu", 77)
    assert torch.equal(stochastic_round(x, torch.bfloat16, 0, 3, "name"), whole)
    for seed in ((1, 3, "name"), (0, 4, "name"), (0, 3, "other")):
        other = stochastic_round(x, torch.bfloat16, *seed)
        assert 0.1 < (other != whole).float().mean() < 0.6


def test_bits_are_the_hash_that_they_say_they_are():
    """MurmurHash3's finalizer in Python's integers: a later version must resume with these bits."""
    seed, mask = (0, 3, "model.norm.weight"), 2**32 - 1
    key = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:4], "little")
    bits = []
    for i in range(1000, 1100):
        h = (i * 0x9E3779B1 + key) & mask
        h = (h ^ h >> 16) * 0x85EBCA6B & mask
        h = (h ^ h >> 13) * 0xC2B2AE35 & mask
        bits.append(h ^ h >> 16)
    found = rounding.random_bits(torch.tensor(1000), 100,
                                 torch.tensor(key - (key >> 31 << 32), dtype=torch.int32))
    assert [bit & mask for bit in found.tolist()] == bits
    x = torch.linspace(1, 1.99, 100)  # bfloat16 has steps of 1/128 here, float32 of 2^-23
    expected = [math.floor(value * 2**23 + (bit & 0xFFFF)) >> 16 for value, bit in
                zip(x.double().tolist(), bits)]
    assert stochastic_round(x, torch.bfloat16, *seed, start=1000).mul(128).tolist() == expected


# ------------------------------------------------------------------------------------- the masters


def gradients(model, masters, batch):
    """{name: gradient of the masters} of several backward passes, as micro-batches have."""
    logps = sequence_logps(model, batch)
    for part in logps.split(5):
        (part * torch.arange(len(part))).sum().backward(retain_graph=True)
    masters.collect_gradients()
    return {name: master.grad for name, master in masters.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_gradients_of_16_bit_copies_reach_float32_masters(name, dtype):
    batch = collate(random_pairs(5))
    plain, model = tiny_model(name).to(dtype).float(), tiny_model(name).to(dtype)
    masters = Masters(model, dtype, seed=0)
    right = gradients(plain, Masters(plain, torch.float32, seed=0), batch)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert len({weight.untyped_storage().data_ptr() for weight in model.parameters()}) == 1
    found = gradients(model, masters, batch)
    assert found.keys() == right.keys()
    close = 1 - 4 * torch.finfo(dtype).eps
    for key, gradient in right.items():
        assert found[key].dtype == torch.float32
        if gradient.abs().max() > 1e-3:  # the bias of GPT-2's keys has none
            assert similarity(found[key], gradient) > close, key
    assert all(weight.grad is None for weight in model.parameters())
    # Control: rounded copies of other masters give other gradients.
    with torch.no_grad():
        for master in masters.parameters():
            master += 0.1 * torch.randn_like(master)
    masters.round(1)
    masters.zero_grad()
    other = gradients(model, masters, batch)
    assert not any(similarity(other[key], right[key]) > close for key in right
                   if right[key].abs().max() > 1e-3)


def similarity(a, b):
    """The cosine of two gradients."""
    return (a.double() * b).sum() / (a.double().norm() * b.double().norm())


def test_gradients_are_added_in_float32():
    """Of 256 micro-batches the last would be lost in bfloat16: 1 + 1/256 is 1 there."""
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    model = tiny_model().bfloat16()
    model.model.layers[0].self_attn.q_proj = layer
    masters = Masters(model, torch.bfloat16, seed=0)
    [master] = [master for master, copy in masters.pairs if copy is layer.weight]
    for factor in [1.0] + 256 * [1 / 256]:
        (layer.weight * factor).sum().backward()
    assert master.grad.item() == 2


def test_a_pass_of_rounding_takes_as_many_operations_however_many_weights_there_are():
    """On a GPU each is a kernel: one loop over 300 weights had 26 of them for each."""
    counts = []
    for name in ("llama", "gpt_neox"):
        masters = Masters(tiny_model(name).bfloat16(), torch.bfloat16, seed=0)
        with Operations() as operations:
            masters.round(1)
        counts.append((len(masters.pairs), operations.count))
    (few, one), (many, other) = counts
    assert few < many and one == other < 60
    masters = Masters(tiny_model(), torch.float32, seed=0)
    with Operations() as operations:  # float32 has nothing to round
        masters.round(1)
    assert operations.count == 0


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


def test_under_float32_the_masters_are_the_weights():
    model = tiny_model()
    masters = Masters(model, torch.float32, seed=0)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert [id(a) for a in masters.parameters()] == [id(b) for b in model.parameters()]
    masters.round(1)
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


def test_a_shard_of_the_masters_is_rounded_as_the_whole(monkeypatch):
    """Under FSDP a rank has a part of each weight, and its copies are float32."""
    model = tiny_model().bfloat16()
    masters = Masters(model, torch.bfloat16, seed=0)
    with torch.no_grad():
        for master in masters.parameters():
            master += 1e-3 * torch.randn_like(master)
    masters.round(1)
    for half in (0, 1):
        def part(weight, half=half):
            middle = weight.numel() // 2
            return (weight.view(-1)[middle:] if half else weight.view(-1)[:middle]), half * middle

        monkeypatch.setattr(rounding.ranks, "is_sharded", lambda model: True)
        monkeypatch.setattr(rounding.ranks, "local_shard", part)
        sharded = tiny_model().bfloat16().float()
        before = {name: weight.clone() for name, weight in sharded.named_parameters()}
        shards = Masters(sharded, torch.bfloat16, seed=0)
        shards.load_state_dict(masters.state_dict())
        shards.round(1)
        for name, weight in model.named_parameters():
            right, found = weight.float(), sharded.get_parameter(name)
            assert torch.equal(part(found)[0], part(right)[0])
            assert not torch.equal(found, right) and not torch.equal(found, before[name])


def test_a_student_is_saved_from_the_masters_or_as_it_computed():
    model = tiny_model("llama_tied").bfloat16()
    masters = Masters(model, torch.bfloat16, seed=0)
    with torch.no_grad():
        for master in masters.parameters():
            master += 1e-4 * torch.randn_like(master)
    masters.round(1)
    wide, narrow = (checkpoint.student_weights(model, masters, dtype, seed=0)
                    for dtype in (torch.float32, torch.bfloat16))
    weights = dict(model.named_parameters())
    assert wide.keys() == narrow.keys() == weights.keys()
    for name, master in masters.named_parameters():
        name = name.replace("/", ".")
        assert torch.equal(wide[name], master) and wide[name].dtype == torch.float32
        assert torch.equal(narrow[name], weights[name].bfloat16())
        assert not torch.equal(narrow[name].float(), master)


# ----------------------------------------------------------------------------------- whole runs

SMALL_STEPS = ["--max_steps", 16, "--eval_every", 16, "--learning_rate", 4e-5, "--batch_size", 16]


def saved_and_trained(out):
    """(margin as saved, margin as trained) that a run printed."""
    return [float(part) for part in re.search(r"as saved: margin (\S+) of (\S+)", out).groups()]


def kept(saved, before, delta):
    """The share of a change that a saved weight shows: its projection on the change."""
    return (((saved.float() - before) * delta).sum() / (delta * delta).sum()).item()


@pytest.mark.parametrize("name", ["llama_tied", "phi"])
def test_merging_and_saving_keep_changes_far_below_the_grid(name, monkeypatch):
    model = tiny_model(name).bfloat16().float()
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    add_lora(model, 2, 4)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.B.normal_(std=2e-4)
    masters = Masters(model, torch.float32, seed=0)
    exact = dict(merged(model, model.state_dict()))
    saved = checkpoint.student_weights(model, masters, torch.bfloat16, seed=0)
    other = checkpoint.student_weights(model, masters, torch.bfloat16, seed=1)
    monkeypatch.setattr(checkpoint, "stochastic_round", nearest)
    lost = checkpoint.student_weights(model, masters, torch.bfloat16, seed=0)
    shares = {"stochastic": [], "nearest": []}
    for key in saved:
        assert saved[key].dtype == torch.bfloat16
        delta = exact[key] - before[key]
        if not delta.any():
            assert torch.equal(saved[key].float(), before[key])  # not trained: the same bits
            continue
        assert not torch.equal(saved[key], other[key])
        shares["stochastic"].append(kept(saved[key], before[key], delta))
        shares["nearest"].append(kept(lost[key], before[key], delta))
    mean = {name: sum(values) / len(values) for name, values in shares.items()}
    assert 0.9 < mean["stochastic"] < 1.1 and mean["nearest"] < 0.5, mean


@pytest.mark.slow
def test_the_saved_student_is_the_trained_one_and_to_nearest_it_is_not(
        run_train, toy_rows, write_rows, monkeypatch, tmp_path):
    flags = ["--data", write_rows(toy_rows[:300]), *SMALL_STEPS]
    code, out, err = run_train(*flags)
    saved, trained = saved_and_trained(out)
    assert code == 0 and err == ""
    assert abs(trained) > 0.3 and abs(saved - trained) < 0.03 * abs(trained)
    monkeypatch.setattr(checkpoint, "stochastic_round", nearest)  # control
    code, out, err = run_train(*flags, "--out_dir", tmp_path / "nearest")
    saved, trained = saved_and_trained(out)
    assert abs(saved - trained) > 0.1 * abs(trained)
    assert "warning: the student in" in err and "--save_dtype float32" in err
    code, out, err = run_train(*flags, "--out_dir", tmp_path / "wide", "--save_dtype", "float32")
    saved, trained = saved_and_trained(out)
    assert abs(saved - trained) <= 0.01 and err == ""
    assert load_file(tmp_path / "wide" / "model.safetensors")["model.norm.weight"].dtype == (
        torch.float32)
    code, out, _ = run_train(*flags, "--out_dir", tmp_path / "quick", "--skip_saved_check")
    assert code == 0 and "as saved" not in out


@pytest.mark.slow
def test_a_16_bit_run_follows_the_float32_run_and_to_nearest_it_does_not(
        run_train, toy_rows, write_rows, monkeypatch, tmp_path):
    flags = ["--data", write_rows(toy_rows[:300]), *SMALL_STEPS, "--learning_rate", 2e-5]
    losses = {}
    for name, dtype, function in (("float32", "float32", stochastic_round),
                                  ("stochastic", "bfloat16", stochastic_round),
                                  ("nearest", "bfloat16", nearest)):
        monkeypatch.setattr(rounding, "stochastic_round", function)
        code, out, err = run_train(*flags, "--dtype", dtype, "--out_dir", tmp_path / name)
        assert code == 0, err
        losses[name] = [line["eval/loss"] for line in read_metrics(tmp_path / name)[1]]
        if name == "stochastic":
            # Saved on the grid without a second draw: the same student to the bit.
            saved, trained = saved_and_trained(out)
            assert saved == trained
    first, last = losses["float32"]
    assert first == pytest.approx(0.6931, abs=1e-4) and first - last > 0.01
    assert abs(losses["stochastic"][0] - first) < 1e-4
    assert abs(losses["stochastic"][1] - last) < 0.1 * (first - last)
    assert abs(losses["nearest"][1] - last) > 0.3 * (first - last)  # control


@pytest.mark.slow
def test_a_16_bit_run_is_resumed_to_the_bit(run_train, toy_rows, write_rows, monkeypatch, tmp_path):
    from test_train import run_until, same_weights, weights_of, without_clock
    flags = ["--data", write_rows(toy_rows[:60]), "--max_steps", 5, "--save_every", 2,
             "--eval_every", 5, "--dtype", "bfloat16"]
    assert run_train(*flags, "--out_dir", tmp_path / "straight")[0] == 0
    run_until(run_train, monkeypatch, 4, *flags)
    code, out, _ = run_train(*flags, "--resume")
    assert code == 0 and "from step 2" in out
    assert without_clock(tmp_path / "out") == without_clock(tmp_path / "straight")
    assert same_weights(weights_of(tmp_path / "out"), weights_of(tmp_path / "straight"))


def test_a_float32_student_is_rounded_before_training_in_16_bits(run_train, toy_rows, write_rows,
                                                                 tmp_path, toy_tokenizer):
    """Its reference is what 16 bits hold of it, so that the step-0 gate stays exact."""
    model = tiny_model("llama", len(toy_tokenizer))
    model.save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    rows = [row | {"prompt": row["prompt"][:40]} for row in toy_rows[:40]]
    code, out, err = run_train("--data", write_rows(rows), "--model", tmp_path / "model",
                               "--dtype", "bfloat16", "--max_steps", 1, "--max_length", 200)
    assert code == 0 and "stored in float32, rounded to bfloat16" in out, err
    steps, evaluations = read_metrics(tmp_path / "out")
    assert evaluations[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-3)
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-3)


@pytest.mark.parametrize("flags", [[], ["--lora_rank", 2, "--gradient_checkpointing"]])
def test_nothing_of_the_trained_student_is_left_when_the_saved_one_is_loaded(
        flags, run_train, toy_rows, write_rows, monkeypatch):
    """Both would have to fit into a GPU at once. Views keep the whole tensor: one is too many."""
    alive, tensors = [], []
    split, load = Masters.split, models.load_model

    def spied(masters, weights):
        parameters = split(masters, weights)
        tensors.extend(map(weakref.ref, masters.flat[0][:2]))
        tensors.extend(map(weakref.ref, (*parameters, *weights)))
        return parameters

    def load_model(name, **options):
        model = load(name, **options)
        alive.append(sum(tensor() is not None for tensor in tensors))
        return model

    monkeypatch.setattr(Masters, "split", spied)
    monkeypatch.setattr(models, "load_model", load_model)
    code, out, err = run_train("--data", write_rows(toy_rows[:30]), "--dtype", "bfloat16",
                               "--max_steps", 1, "--batch_size", 4, "--save_dtype", "float32",
                               *flags)
    assert code == 0 and "as saved" in out, err
    assert alive == [0, 0] and len(tensors) > 20
