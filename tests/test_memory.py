"""bench/memory.py: predicted bytes and the tracker of live bytes.

Its own --check compares predictions with measured steps.
"""
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, f"{ROOT}/bench")
import memory  # noqa: E402

from infra import models  # noqa: E402
from infra.models import cast_weights  # noqa: E402

# Almost all weights are in two tables: V words of D numbers. A pair has N answer tokens.
D, V, N = 16, 200_000, 16
LAYER = 2 * D * D + 2 * D * D // 2 + 3 * D * 32 + 2 * D
PARAMETERS = 2 * V * D + LAYER + D
TABLE, LOGITS = V * D, N * V
FLAGS = "--shape tiny --prompt_length 4 --answer_length 8 --tokens_per_batch 20 "


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(memory.SHAPES, "tiny", (D, 32, 1, 2, 1, V, False))
    monkeypatch.setitem(memory.CHUNK, "cuda", 2**17)


def simulate(flags=""):
    return memory.simulate(memory.parse((FLAGS + flags).split()))


def about(size):
    return pytest.approx(size, rel=0.01)


def test_stages_of_a_gpu_follow_from_the_shape():
    stages, parts = simulate()
    # Logits and logsumexp's own tensor, both float32; the layout is chosen on two pairs.
    assert stages["start"] == about(2 * PARAMETERS + 8 * 2 * LOGITS)
    assert stages["reference"] == stages["check"] == about(2 * PARAMETERS + 8 * LOGITS)
    # 2 (copy) + 4 (master) + 4 (gradient) + 8 (moments) bytes a parameter.
    assert parts["weights"] == about(6 * PARAMETERS)
    assert (parts["gradients"], parts["optimizer"]) == (4 * PARAMETERS, 8 * PARAMETERS)
    # The head's gradient in 16 bits, its logits in 16 and in 32.
    assert stages["step"] == about(18 * PARAMETERS + 2 * TABLE + 6 * LOGITS)
    assert stages["step"] == sum(parts.values())
    # The largest weight's absolute values.
    assert stages["export"] == about(14 * PARAMETERS + 2 * TABLE)


def test_stages_of_a_cpu_where_the_student_is_made_beside_the_model():
    stages, parts = simulate("--dtype float32")
    assert stages["reference"] == stages["check"] == about(4 * PARAMETERS + 8 * LOGITS)
    assert parts["weights"] == about(4 * PARAMETERS)
    assert stages["step"] == about(16 * PARAMETERS + 4 * TABLE + 4 * LOGITS)
    assert stages["export"] == about(12 * PARAMETERS + 2 * TABLE + 4 * TABLE)


def test_adapters_leave_nothing_behind():
    stages, parts = simulate("--lora_rank 2 --gradient_checkpointing")
    adapters = 2 * (2 * (D + D) + 2 * (D + D // 2) + 3 * (D + 32))
    assert (parts["gradients"], parts["optimizer"]) == (4 * adapters, 8 * adapters)
    assert parts["weights"] == about(2 * PARAMETERS)
    assert stages["export"] == about(2 * PARAMETERS + 2 * TABLE)
    assert stages["check"] == about(2 * PARAMETERS + 8 * LOGITS)


def test_a_base_in_4_bits_takes_a_quarter_and_is_checked_from_the_host():
    wide, parts_16 = simulate("--lora_rank 2 --gradient_checkpointing")
    stages, parts = simulate("--lora_rank 2 --gradient_checkpointing --base_bits 4")
    linear = LAYER - 2 * D
    # Rows of 16 and 32 weights are padded to a block of 64: 32 bytes, a scale and a step each.
    rows = 2 * D + 2 * D // 2 + 2 * 32 + D
    table = 7 * 4 * 512
    assert parts_16["weights"] - parts["weights"] == 2 * linear - 37 * rows - table
    assert wide["check"] - stages["check"] == pytest.approx(2 * linear, abs=2 * 2 * D * D)


def test_fsdp_divides_what_it_keeps():
    stages, parts = simulate("--fsdp 4")
    assert [parts[name] for name in ("weights", "gradients", "optimizer")] == [
        2 * PARAMETERS, PARAMETERS, 2 * PARAMETERS]
    assert parts["gathered"] == 2 * (PARAMETERS + LAYER)
    # A layer's weights as they arrive, its gradients, and those of the layer before in float32.
    assert parts["sent"] == (2 + 2 + 4) * LAYER
    assert stages["reference"] == about((1 + 2) * PARAMETERS + 8 * LOGITS)
    assert stages["export"] == about((2 + 2) * PARAMETERS + 4 * TABLE)
    assert stages["check"] == about(2 * PARAMETERS + 8 * LOGITS)  # rank 0 loads all of it


def test_waste_in_a_stage_is_seen(monkeypatch):
    before, parts = simulate("--prompt_length 2000")

    def wide_student(model, *_, **__):
        return [weight.float() for weight in model.parameters()]

    def wide_model(args, device, adapted=True, build=memory.build):
        model = build(args, device, adapted)
        if not adapted:
            cast_weights(model, torch.float32)
        return model

    def plain_attention(query, key, value, **_):
        return (query @ key.mT).softmax(-1) @ value

    monkeypatch.setattr(memory, "student_weights", wide_student)
    monkeypatch.setattr(memory, "build", wide_model)
    monkeypatch.setattr(memory, "cuda_attention", plain_attention)
    after, more_parts = simulate("--prompt_length 2000")
    assert after["export"] - before["export"] == about((4 * 2 - 2) * TABLE)
    assert after["check"] - before["check"] > 1.9 * PARAMETERS
    # Probabilities of 2 heads in 16 bits, less a mask that this attention does not keep.
    assert more_parts["activations"] - parts["activations"] == about(2 * (2 - 1) * 2016**2)
    monkeypatch.setitem(memory.CHUNK, "cuda", 2**22)  # of rounding, two thirds of this model
    assert simulate()[0]["step"] > 1.05 * before["step"]


def test_live_bytes_follow_allocations_and_frees():
    with memory.LiveBytes("cpu") as live:
        a = torch.ones(1000)
        b = a + a
        view = b[10:]
        assert live.now == 8000
        del b
        assert live.now == 8000  # the view holds it
        del view
        assert live.now == 4000 and live.lap() == 8000 and live.lap() == 4000


def test_an_unknown_shape_is_refused():
    with pytest.raises(SystemExit):
        memory.parse(["--shape", "none"])


@pytest.mark.slow
def test_the_default_tokens_per_batch_is_predicted_to_fit(monkeypatch):
    args, gigabytes = memory.parse(["--shape", "smollm2-135m"]), 8
    model = memory.build(args, torch.device("meta"))
    free = int(gigabytes * 1e9) - memory.bytes_of(model.parameters())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 0))
    args.tokens_per_batch = models.tokens_that_fit(model, args.gradient_checkpointing)
    assert 2048 < args.tokens_per_batch < 8192
    assert 0.6 * gigabytes < memory.predict(args)["step"] / 1e9 < gigabytes
