"""A real small model, SmolLM2-135M-Instruct: log-probabilities, and train.py to the end."""
import math

import pytest
import torch
from conftest import read_metrics
from transformers import AutoModelForCausalLM

from data import collate, load_pairs
from infra.models import load_model, load_tokenizer
from rdpo import sequence_logps

pytestmark = pytest.mark.real

THINGS = ("tea", "rain", "chess", "the moon")
ROWS = [{"prompt": f"Write one sentence about {thing}.",
         "rejected": f"{thing.capitalize()} is the worst thing in the world and so are you.",
         "chosen": f"{thing.capitalize()} is liked by many people, though not by everyone.",
         "score_rejected": 1, "score_chosen": 4 + i % 2} for i, thing in enumerate(THINGS)]


def test_logps_equal_transformers_own_loss(smollm2, write_rows):
    tokenizer = load_tokenizer(smollm2)
    # The trap: masking by pad id would hide the end of the turn.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    pairs, _ = load_pairs(write_rows(ROWS[:3]), tokenizer, 256, True)
    model = load_model(smollm2)
    with torch.no_grad():
        logps = sequence_logps(model, collate(pairs))
        for i, pair in enumerate(pairs):
            start, length = len(pair.prompt_ids), len(pair.chosen_ids)
            ids = torch.tensor([pair.prompt_ids + pair.chosen_ids])
            labels = ids.clone()
            labels[:, :start] = -100
            output = model(input_ids=ids, labels=labels)
            # transformers' softmax over 49,152 logits is float32. In float64 sums agree to 1e-4.
            logps_64 = output.logits[0, start - 1:-1].double().log_softmax(-1)  # (length, V)
            exact = logps_64.gather(1, ids[0, start:, None]).sum().item()
            assert logps[i].item() == pytest.approx(exact, abs=1e-4)
            assert logps[i].item() == pytest.approx(-output.loss.item() * length,
                                                    abs=5e-5 * length)
            assert pair.chosen_ids[-1] == tokenizer.eos_token_id
            assert pair.chosen_ids.count(tokenizer.eos_token_id) == 1


def test_train_on_it(smollm2, run_train, write_rows, tmp_path):
    flags = ["--data", write_rows(ROWS), "--eval_data", write_rows(ROWS, "the_same.jsonl"),
             "--model", smollm2, "--batch_size", 2]
    code, out, err = run_train(*flags, "--eval_every", 2)
    assert code == 0, err
    steps, evaluations = read_metrics(tmp_path / "out")
    assert len(steps) == 2 and len(evaluations) == 2
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]
    assert evaluations[-1]["eval/rewards/accuracies"] == 1.0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 134e6
    # Another run finds the reference in the cache. Without its adapters it is the same model.
    code, out, err = run_train(*flags, "--max_steps", 1, "--beta", 0.5, "--out_dir",
                               tmp_path / "second", "--lora_rank", 2, "--save_adapter")
    assert code == 0, err
    assert "reference computed for 0 in" in out
    assert read_metrics(tmp_path / "second")[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
