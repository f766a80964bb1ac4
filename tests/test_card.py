"""The model card in out_dir: its metadata as a hub reads it, and its numbers against the run's."""
import contextlib
import hashlib
import io
import json
import os
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, read_metrics
from huggingface_hub import ModelCard

import train
from data import load_pairs
from infra import runlog
from infra.card import write_card
from infra.generate import generate
from infra.models import TOY_STUDENT, load_model, load_tokenizer


SHORT = "--max_steps", 2, "--batch_size", 4
BREAKERS = ("\n---\nlicense: mit\n", "\n# Head `code` <b>*x*</b>", "\n```\n", ": [", "\x1b[2J{x}")


def card_of(folder):
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def test_a_card_has_the_runs_values(run_train, tmp_path, toy_rows, write_rows):
    paths = [write_rows(toy_rows[:40]), write_rows(toy_rows[40:52], "rows.jsonl2")]
    code, out, err = run_train("--data", *paths, *SHORT, "--beta", 0.25)
    assert (code, err) == (0, "")
    metadata, text = card_of(tmp_path / "out")
    assert metadata == {"library_name": "transformers", "pipeline_tag": "text-generation",
                        "tags": ["rdpo", "dpo"]}  # the bundled student has no hub id
    assert "no hub has" in text and "--beta=0.25" in text and "--max_steps=2" in text
    for path, rows in zip(paths, (40, 12)):
        with open(path, "rb") as file:
            sha256 = hashlib.sha256(file.read()).hexdigest()
        assert f"data: {os.path.basename(path)}, {rows} rows, sha256 {sha256}\n" in text
    counts = [[int(word) for word in line.split() if word.isdigit()]
              for line in text.splitlines() if "pairs to train on" in line]  # per file
    assert [sum(both) for both in counts] == [40, 12]
    train_count, val_count = map(sum, zip(*counts))
    assert f"{train_count} pairs to train on, {val_count} for validation" in out
    assert f"judge: {toy_rows[0]['judge']['model']}" in text and "52 pairs" in text
    head, before, *_, after = re.findall(r"^  step  .*|^     \d .* \| .*", out, re.M)
    (as_saved,) = re.findall("^as saved.*", out, re.M)
    assert before.split()[0] == "0" and after.split()[0] == "2" and before != after
    block = "\n".join(f"    {line}" for line in (head, before, after, as_saved))
    assert f"in nats:\n\n{block}\n\n## Use" in text
    assert str(tmp_path) not in text and ROOT not in text


@pytest.mark.parametrize("template", [True, False])
def test_the_cards_program_loads_the_student_and_prints_its_answer(
        template, run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    base = tmp_path / "base"
    tokenizer = load_tokenizer(TOY_STUDENT)
    prompt = "<|user|>Hello<|end|><|assistant|>"
    if not template:
        tokenizer.chat_template, prompt = None, "Hello\n\n"
    tokenizer.save_pretrained(base)
    load_model(TOY_STUDENT, "auto").save_pretrained(base)
    assert run_train("--data", write_rows(toy_rows[:20]), *SHORT, "--model", base)[0] == 0
    _, text = card_of(tmp_path / "out")
    program = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    student = load_model(str(tmp_path / "out"), "auto")
    [answer] = generate(student, tokenizer, [ids], 256)
    assert printed.getvalue() == answer.text + "\n"
    assert "`base`" in text and "a local folder of that name" in text


def test_text_of_rows_and_names_stays_text(run_train, tmp_path, toy_rows, write_rows):
    judges = [f"Judge {i}{breaker} /home/me/judge.gguf" for i, breaker in enumerate(BREAKERS)]
    rows = [row | {"judge": {"model": judges[i % len(judges)], "scale": [1, 6]}}
            for i, row in enumerate(toy_rows[:40])]
    name = "rows ``` # [x](y) {0} \n---.jsonl"
    base = tmp_path / "a `base` {1} \n# x"
    load_model(TOY_STUDENT, "auto").save_pretrained(base)
    load_tokenizer(TOY_STUDENT).save_pretrained(base)
    out = tmp_path / "out ```' \n--- {2}"
    code, _, err = run_train("--data", write_rows(rows, name), *SHORT, "--model", base,
                             "--out_dir", out)
    assert code == 0, err
    metadata, text = card_of(out)
    assert metadata.keys() == {"library_name", "pipeline_tag", "tags"}
    lines = text.splitlines()
    assert sum(line.startswith("    judge: Judge ") for line in lines) == len(BREAKERS)
    assert not {"---", "license: mit", "```"} & {line.strip() for line in lines if line[:1] == " "}
    assert "\x1b" not in text and "/home" not in text and "judge.gguf" in text
    assert [line for line in lines if line.startswith(("#", "---"))] == [
        "# A student of `a 'base' {1} # x`", "## Training", "## Use"]
    assert sum(line.startswith("```") for line in lines) == 4  # two blocks
    assert str(tmp_path) not in text


def test_an_adapter_a_hub_id_and_other_losses(run_train, tmp_path, toy_rows, write_rows):
    path = write_rows(toy_rows[:20])
    code, _, err = run_train("--data", path, *SHORT, "--loss", "dpo", "--lora_rank", 3,
                             "--save_adapter")
    assert code == 0, err
    metadata, text = card_of(tmp_path / "out")
    assert metadata == {"library_name": "peft", "pipeline_tag": "text-generation",
                        "tags": ["rdpo", "dpo"]}
    assert "PeftModel.from_pretrained(base, 'out')" in text and "as saved" not in text
    assert "--max-lora-rank 8 --lora-modules student=out" in text and "--lora_rank=3" in text

    # Whatever --model was: a hub id is told, in metadata and commands.
    flags = json.loads((tmp_path / "out" / "args.json").read_text())
    tokenizer = load_tokenizer(TOY_STUDENT)
    pairs, _ = load_pairs(path, tokenizer, 1024, needs_scores=False)
    args = SimpleNamespace(**flags | {"model": "owner/name", "loss": "sft", "lora_rank": 17})
    write_card(args, tokenizer, pairs[4:], pairs[:4], ["# one", "`two` \x1b"])
    metadata, text = card_of(tmp_path / "out")
    assert metadata["base_model"] == "owner/name" and metadata["tags"] == ["rdpo", "sft"]
    assert "vllm serve owner/name --enable-lora --max-lora-rank 32" in text
    assert "\n\n    # one\n    `two` \ufffd\n\n" in text and str(tmp_path) not in text
    assert "16 pairs to train on, 4 for validation" in text

    # A file that changed since the run began, or a pipe, is not described.
    later = os.path.getmtime(tmp_path / "out" / "args.json") + 5
    os.utime(path, (later, later))
    write_card(args, tokenizer, pairs[4:], pairs[:4], [])
    assert "data: rows.jsonl, not kept\n" in card_of(tmp_path / "out")[1]


def test_a_killed_run_leaves_no_half_card(run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", lambda *paths, replace=os.replace: (
        killed() if str(paths[1]).endswith("out/README.md") and "saving.tmp" not in str(paths[0])
        else replace(*paths)))
    assert run_train("--data", write_rows(toy_rows[:20]), *SHORT)[0] == 130
    assert not [name for name in os.listdir(tmp_path / "out") if "README" in name]
    assert "model.safetensors" in os.listdir(tmp_path / "out")
