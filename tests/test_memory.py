"""bench/memory.py: predicted bytes and the tracker of live bytes.

Its own --check compares predictions with measured steps.
"""
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, f"{ROOT}/bench")
import memory  # noqa: E402


FLAGS = ("--shape smollm2-135m --dtype float32 --tokens_per_batch 512 --prompt_length 256 "
         "--answer_length 128 ")


def predict(flags):
    return memory.predict(memory.parse((FLAGS + flags).split()))


def test_each_parameter_takes_16_bytes_and_fsdp_divides_them():
    whole, lora, checkpointed, sharded = map(predict, (
        "", "--lora_rank 16", "--gradient_checkpointing", "--fsdp 4"))
    parameters = 134_515_008  # of SmolLM2-135M
    kept = "weights", "gradients", "optimizer"
    assert [whole[name] for name in kept] == [4 * parameters, 4 * parameters, 8 * parameters]
    assert [sharded[name] for name in kept] == [parameters, parameters, 2 * parameters]
    assert lora["gradients"] == 4 * 4_884_480
    assert lora["weights"] == whole["weights"] + lora["gradients"]
    assert checkpointed["activations"] < 0.2 * whole["activations"]
    assert whole["gathered"] == whole["sent"] == 0 < sharded["gathered"] < whole["weights"]
    # A layer's weights as they arrive, its gradients, and those of the layer before.
    assert sharded["sent"] == 3 * 4 * 3_540_096


def test_live_bytes_follow_allocations_and_frees():
    with memory.LiveBytes() as live:
        a = torch.ones(1000)
        b = a + a
        view = b[10:]
        assert live.now == 8000
        del b
        assert live.now == 8000  # the view holds it
        del view
        assert live.now == 4000 and live.peak == 8000


def test_an_unknown_shape_is_refused():
    with pytest.raises(SystemExit):
        memory.parse(["--shape", "none"])
