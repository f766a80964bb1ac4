"""bench/memory.py: what it counts, and its tracker of live bytes. Its --check compares whole steps with measurements."""
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, f"{ROOT}/bench")
import memory  # noqa: E402


def predict(words):
    return memory.predict(memory.parse(f"--shape smollm2-135m --dtype float32 --tokens_per_batch 512 --prompt_length 256 --answer_length 128 {words}".split()))


def test_weights_gradients_and_moments_take_16_bytes_a_parameter_and_a_share_of_that_under_fsdp():
    whole, lora, checkpointed, sharded = map(predict, ("", "--lora_rank 16", "--gradient_checkpointing", "--fsdp 4"))
    parameters = 134_515_008  # of SmolLM2-135M
    assert [whole[name] for name in ("weights", "gradients", "optimizer")] == [4 * parameters, 4 * parameters, 8 * parameters]
    assert [sharded[name] for name in ("weights", "gradients", "optimizer")] == [parameters, parameters, 2 * parameters]
    assert lora["gradients"] == 4 * 4_884_480 and lora["weights"] == whole["weights"] + lora["gradients"]
    assert checkpointed["activations"] < 0.2 * whole["activations"]
    assert whole["gathered"] == whole["sent"] == 0 < sharded["gathered"] < whole["weights"]
    assert sharded["sent"] == 3 * 4 * 3_540_096  # a layer's weights as they arrive, its gradients, those of the layer before


def test_live_bytes_follow_what_is_allocated_and_freed():
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
