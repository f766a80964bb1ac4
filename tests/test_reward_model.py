"""A reward model in this process, against the same model asked one text at a time."""
import json
import math
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import GROUPED, ROOT, SMALL, assert_one_line, read_lines, tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import reward
from infra.models import TOY_STUDENT
from infra.reward_model import RewardModel

ROWS = [{"id": f"r{i}", "prompt": f"How do I draw {i * 'a very '}large kite?",
         "rejected": "No." * (1 + i % 4), "chosen": "Gladly, " * (1 + i % 5) + "so."}
        for i in range(40)]


VISION = {
    "Gemma3": dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                   image_size=28, patch_size=14),
    "Qwen3_5": dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2,
                    out_hidden_size=GROUPED["hidden_size"])}
TEXT = {"Gemma3": dict(head_dim=8, sliding_window=64),
        "Qwen3_5": dict(head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
                        linear_key_head_dim=8, linear_value_head_dim=8,
                        layer_types=["linear_attention", "full_attention"])}


@pytest.fixture
def folder(tmp_path, toy_tokenizer):
    """folder(kind, pad, template): a random reward model with the toy's tokenizer."""
    def make(kind="Llama", pad=None, template=True, labels=1):
        torch.manual_seed(0)
        small = dict(vocab_size=len(toy_tokenizer), **(SMALL if kind == "Bert" else GROUPED) | {
            "pad_token_id": pad, "eos_token_id": toy_tokenizer.eos_token_id})
        if kind in VISION:  # a text model inside
            small = dict(text_config=small | TEXT[kind], vision_config=VISION[kind])
        config = getattr(transformers, f"{kind}Config")(num_labels=labels, **small)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=0.2)
        path = tmp_path / "model"
        model.save_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(TOY_STUDENT)
        tokenizer.chat_template = tokenizer.chat_template if template else None
        tokenizer.save_pretrained(path)
        return path
    return make


def one_by_one(path, row, name):
    """The score of a row's answer, without our code."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template:
        prompt = row["prompt"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        inputs = tokenizer(tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": row[name]}], tokenize=False),
            return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(row["prompt"], row[name], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.item()


@pytest.mark.parametrize("kind, pad, template", [
    ("Llama", None, True), ("Llama", 5, True), ("Llama", "eos", True), ("Bert", 0, False)],
    ids=str)
def test_batches_give_what_a_loop_of_one_gives(
        folder, run_stage, write_rows, toy_tokenizer, tmp_path, monkeypatch, kind, pad, template):
    path = folder(kind, toy_tokenizer.eos_token_id if pad == "eos" else pad, template)
    monkeypatch.setattr("infra.reward_model.TOKENS_PER_BATCH", 700)
    out = tmp_path / "out"
    code, printed, err = run_stage(reward, "--reward_model", path, "--data", write_rows(ROWS),
                                   "--out", out)
    assert code == 0 and "40 of 40 rows (0 from before), 0 failed\n" in printed, err
    assert "80 of 80 answers have a score" in printed
    rows = read_lines(out)
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    for row in rows[::5]:
        for name in ("chosen", "rejected"):
            assert row[f"score_{name}"] == row["judge"][name] == pytest.approx(
                one_by_one(path, row, name), abs=1e-5)
        assert row["judge"]["model"] == str(path) and row["judge"]["endpoint"] == "transformers"
    assert len({round(row["score_chosen"], 4) for row in rows}) > 20  # control: they differ


@pytest.mark.parametrize("place", ["text", "top", "both", "differ", "None", "unset"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma3", "Qwen3_5"])
def test_padding_is_found_wherever_the_config_names_it(folder, toy_tokenizer, kind, place):
    """Each text alone, by transformers as it is, against a batch."""
    path, eos = folder(kind), toy_tokenizer.eos_token_id
    config = json.loads((path / "config.json").read_text())
    text = config.get("text_config", config)
    for each, pad in ((config, {"top": eos, "both": eos, "differ": 7}.get(place)),
                      (text, {"text": eos, "both": eos, "differ": eos}.get(place))):
        each["pad_token_id"] = pad
    if place == "unset":
        del text["pad_token_id"]
        config.pop("pad_token_id", None)
    (path / "config.json").write_text(json.dumps(config))
    found = RewardModel(str(path)).scores([(row["prompt"], row["chosen"]) for row in ROWS[:8]])
    wanted = [one_by_one(path, row, "chosen") for row in ROWS[:8]]
    assert found == pytest.approx(wanted, abs=1e-4) and len({*found}) == 8


def test_a_model_whose_batches_differ_is_refused(folder, run_stage, write_rows, tmp_path,
                                                 monkeypatch):
    right = RewardModel.forward
    monkeypatch.setattr(RewardModel, "forward", lambda self, rows: right(self, [
        {name: ids + ids[:1] * (len(rows[-1]["input_ids"]) - len(ids)) for name, ids in row.items()}
        for row in rows]))  # the control: padding counts as text
    assert_one_line(run_stage(reward, "--reward_model", folder(), "--data", write_rows(ROWS),
                              "--out", tmp_path / "out"), "in a batch, but")


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]


def test_a_conversation_reaches_the_model_as_one(folder, run_stage, write_rows, tmp_path):
    row = {"id": "a", "prompt": CHAT, "chosen": "Because.", "rejected": "No."}
    path, out = folder(), tmp_path / "out"
    code, _, err = run_stage(reward, "--reward_model", path, "--data",
                             write_rows([row, row | {"id": "b", "question": "Why is it?"}]),
                             "--out", out)
    assert code == 0, err
    first, second = read_lines(out)
    for name in ("chosen", "rejected"):
        assert first[f"score_{name}"] == pytest.approx(one_by_one(path, row, name), abs=1e-5)
        bare = row | {"prompt": "Why is it?"}  # `question` is what any judge sees
        assert second[f"score_{name}"] == pytest.approx(one_by_one(path, bare, name), abs=1e-5)
        as_text = row | {"prompt": "\n\n".join(f"{turn['role']}: {turn['content']}"
                                              for turn in CHAT)}
        assert abs(first[f"score_{name}"] - one_by_one(path, as_text, name)) > 1e-3  # control


def test_a_stopped_run_goes_on_and_a_long_text_fails_alone(
        folder, run_stage, write_rows, tmp_path):
    path, out = folder(), tmp_path / "out"
    long = ROWS[0] | {"id": "long", "chosen": "Gladly. " * 300}
    data = write_rows(ROWS[:3] + [long] + ROWS[3:5])
    flags = "--reward_model", path, "--data", data, "--out", out
    assert run_stage(reward, *flags, "--limit", 2)[0] == 0
    before = out.read_text()
    code, printed, err = run_stage(reward, *flags)
    assert code == 1 and out.read_text().startswith(before)
    assert "5 of 6 rows (2 from before), 1 failed" in printed
    assert "tokens, but the reward model takes 256" in err
    (failed,) = read_lines(f"{out}.failed.jsonl")
    assert failed["id"] == "long"


def test_what_is_no_reward_model_is_refused(folder, run_stage, write_rows, tmp_path):
    def result(*flags):
        return run_stage(reward, *flags, "--data", write_rows(ROWS), "--out", tmp_path / "out")

    assert_one_line(result("--reward_model", folder(labels=3)), "a classifier of 3 labels")
    tiny_model().save_pretrained(tmp_path / "lm")  # its head would be made up at random
    assert_one_line(result("--reward_model", tmp_path / "lm"), "its files lack", "score.weight")
    assert_one_line(result("--reward_model", tmp_path / "none"), "--reward_model", "no such folder")
    assert_one_line(result("--endpoint", "/score"), "need --base_url and --model")
    assert_one_line(result("--reward_model", folder(), "--pairwise"), "--pairwise needs --task")


def test_scores_that_are_not_finite_fail(folder):
    model = RewardModel(str(folder()))
    model.forward = lambda rows: torch.tensor([math.nan, 1.0])
    first, second = model.scores([("q", "a"), ("q", "a")])
    assert "gave nan" in str(first) and second == 1.0


def test_the_other_judges_import_no_torch():
    code = ("import sys, reward\ntry: reward.main(['--task', 'none'])\n"
            "except Exception: pass\nassert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
