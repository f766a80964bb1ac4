"""sample.py against infra/generate.py, the chat template and a merged student; a terminal."""
import contextlib
import fcntl
import io
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import types

import pytest
import torch
from conftest import ROOT, assert_one_line, tiny_model
from transformers import PreTrainedTokenizerFast

import sample
from infra.generate import Answer, TextPieces, generate
from infra.lora import without_lora
from infra.models import TOY_STUDENT, load_model, load_tokenizer
from infra.report import side_by_side
from toy import world

PROMPT = "Act as a vampire. Is it true that you have fed a goat in Iceland?"


@pytest.fixture(scope="module")
def out(tmp_path_factory, toy_tokenizer):
    """An out_dir: a student that is not the toy, trained from the toy."""
    folder = tmp_path_factory.mktemp("sample") / "out"
    student = load_model(TOY_STUDENT)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.1 * weight.std() * torch.randn_like(weight)
    student.save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    (folder / "args.json").write_text('{"model": null, "data": [], "beta": 0.1}')
    return folder


def answer_of(folder, prompt, max_new_tokens=256, **options):
    """What infra/generate.py alone answers to a text or to messages."""
    tokenizer = load_tokenizer(str(folder))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return generate(load_model(str(folder)), tokenizer, [ids], max_new_tokens, **options)[0].text


@pytest.fixture
def run_chat(run_stage, monkeypatch):
    """Runs a chat with lines of input; returns (exit code, answers by the prompt, stderr)."""
    def run_chat(lines, *flags):
        content = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        code, text, err = run_stage(sample, *flags)
        return code, [part.removesuffix("\n") for part in text.split("> ")[1:]], err
    return run_chat


@pytest.fixture
def scripted_model(monkeypatch):
    """Answers by pieces(text of the prompt), an iterator; returns the list of what was asked."""
    def script(pieces, tokenizer):
        asked = []

        def generate(model, tokenizer, prompt_ids, max_new_tokens, *_, show):
            asked.append(prompt_ids[0])
            said = []
            for piece in pieces(tokenizer.decode(prompt_ids[0])):
                said.append(piece)
                show(piece)
            return [Answer("".join(said), "stop", prompt_ids[0], [])]

        monkeypatch.setattr(sample, "generate", generate)
        return asked
    return script


# ---------------------------------------------------------------------------------------- streaming


def byte_level_tokenizer():
    """The other way to write any byte: GPT-2's, beside the toy's byte tokens."""
    from tokenizers import ByteLevelBPETokenizer
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["plain words, and more plain words"], vocab_size=270)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="</s>")


@pytest.mark.parametrize("kind", ["toy", "byte level"])
def test_pieces_make_the_whole_text_and_hold_no_half_character(kind, toy_tokenizer):
    tokenizer = toy_tokenizer if kind == "toy" else byte_level_tokenizer()
    for text in ("Plain words, and more.", "é 😀😀 ¿niño?\n\n日本語, done",
                 "ภาษาไทยไม่มีช่องว่าง これはペンです。", "  two spaces  ", ""):
        pieces = []
        streamer = TextPieces(tokenizer, pieces.append)
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        streamer.put(torch.tensor([[5, 6, 7]]))  # the prompt
        shown = []
        for token in ids:
            streamer.put(torch.tensor([token]))
            shown.append("".join(pieces))
        streamer.end()
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces).strip() == text.strip()
        assert "" not in pieces and not any("\ufffd" in piece for piece in pieces)
        assert all(text.strip().startswith(part.strip()) for part in shown)
        assert len(pieces) >= len(text.split())  # piece by piece, not all at the end
    # Cut in the middle of a character: the end shows what the whole text has.
    pieces, half = [], tokenizer("x 😀", add_special_tokens=False).input_ids[:-1]
    streamer = TextPieces(tokenizer, pieces.append)
    for ids in ([[5]], *([token] for token in half)):
        streamer.put(torch.tensor(ids))
    assert "\ufffd" not in "".join(pieces)
    streamer.end()
    assert "".join(pieces) == tokenizer.decode(half) and "\ufffd" in "".join(pieces)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_streamed_answer_is_the_one_that_generate_returns(temperature, out, toy_tokenizer):
    pieces, model = [], load_model(str(out))
    ids = [toy_tokenizer.encode("Tell me about goats")]
    [answer] = generate(model, toy_tokenizer, ids, 40, temperature, [3], show=pieces.append)
    assert "".join(pieces) == answer.text and len(pieces) > 5
    assert [answer] == generate(model, toy_tokenizer, ids, 40, temperature, [3])


# --------------------------------------------------------------------------------------- one prompt


def test_one_prompt_gets_generates_answer_and_compare_the_references_too(run_stage, out):
    student, reference = answer_of(out, PROMPT), answer_of(TOY_STUDENT, PROMPT)
    assert student != reference
    code, text, err = run_stage(sample, "--model", out, "--prompt", PROMPT)
    assert (code, text, err) == (0, student + "\n", "")
    code, text, err = run_stage(sample, "--model", out, "--prompt", PROMPT, "--compare")
    both = {"reference": [reference], "student": [student]}
    assert (code, text, err) == (0, side_by_side([PROMPT], both), "")


def test_the_reference_is_the_runs_own(run_stage, out, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(TOY_STUDENT, folder)
    (folder / "args.json").write_text(json.dumps({"model": str(out), "data": [], "beta": 0.1}))
    both = {"reference": [answer_of(out, PROMPT)], "student": [answer_of(TOY_STUDENT, PROMPT)]}
    result = run_stage(sample, "--model", folder, "--prompt", PROMPT, "--compare")
    assert result == (0, side_by_side([PROMPT], both), "")


def test_temperature_seed_and_length(run_stage, out):
    flags = "--model", out, "--prompt", PROMPT, "--temperature", 1.5, "--seed"
    first, second = (run_stage(sample, *flags, seed) for seed in (3, 4))
    assert first[1] == answer_of(out, PROMPT, temperature=1.5, seeds=[3]) + "\n" != second[1]
    code, text, err = run_stage(sample, *flags[:4], "--max_new_tokens", 3)
    assert (code, text) == (0, answer_of(out, PROMPT, 3) + "\n")
    assert err == "warning: cut after 3 tokens\n"


def test_a_prompt_that_fills_the_model_is_refused_and_one_token_less_is_answered(
        run_stage, tmp_path, toy_tokenizer):
    folder = tmp_path / "small"
    tiny_model(vocab=len(toy_tokenizer)).save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    words = "a " * 300
    asked = [{"role": "user", "content": words}]
    own = len(toy_tokenizer.apply_chat_template(asked, add_generation_prompt=True).input_ids)
    limit = 256
    full = words[:2 * (300 - own + limit)]
    result = run_stage(sample, "--model", folder, "--prompt", full)
    assert_one_line(result, f"the prompt has {limit} tokens", f"reads {limit}", "shorter")
    code, text, _ = run_stage(sample, "--model", folder, "--prompt", full[:-2])
    assert (code, text) == (0, answer_of(folder, full[:-2], max_new_tokens=1) + "\n")


# ------------------------------------------------------------------------------------------ a chat


def test_a_chat_asks_with_its_history_and_base_asks_the_same(run_chat, out):
    code, said, err = run_chat([PROMPT, "/base", "Are you sure?", "/new", "", "Are you sure?"],
                               "--model", out)
    history = [{"role": "user", "content": PROMPT},
               {"role": "assistant", "content": answer_of(out, PROMPT)},
               {"role": "user", "content": "Are you sure?"}]
    assert (code, err) == (0, "a new conversation\n")
    assert said == [answer_of(out, PROMPT), answer_of(TOY_STUDENT, PROMPT),
                    answer_of(out, history), "", "", answer_of(out, "Are you sure?"), ""]
    assert said[2] != said[5]  # the history matters


def test_each_question_draws_anew_and_base_draws_alike(run_chat, out):
    code, said, _ = run_chat(["Hello", "/base", "/new", "Hello"], "--model", out,
                             "--temperature", 1.5, "--seed", 3)
    assert code == 0
    assert said[:4] == [answer_of(folder, "Hello", temperature=1.5, seeds=[seed])
                        if folder else "" for folder, seed in (
                            (out, 4), (TOY_STUDENT, 4), (None, 0), (out, 5))]


def test_what_the_template_gets(run_chat, scripted_model, out, toy_tokenizer):
    asked = scripted_model(lambda prompt: iter(["Yes", ", I did."]), toy_tokenizer)
    assert run_chat(["one", "two", "/base", "three"], "--model", out)[0] == 0
    turns = [turn for line in ("one", "two", "three") for turn in (
        {"role": "user", "content": line}, {"role": "assistant", "content": "Yes, I did."})]
    expected = [toy_tokenizer.apply_chat_template(turns[:n], add_generation_prompt=True).input_ids
                for n in (1, 3, 3, 5)]
    assert asked == expected


COMMANDS = ("/base: the reference answers your last question; /new: a new conversation; /help: "
            "this line; Ctrl-D ends the chat")


def test_commands_are_never_sent_and_what_they_print_is_no_answer(
        run_chat, scripted_model, out, toy_tokenizer):
    asked = scripted_model(lambda prompt: iter(["Yes."]), toy_tokenizer)
    lines = ["/help", "/quit", "/", "/New", "/base please", "one", "/new", "/etc/hosts holds what?",
             "3 / 4 is?"]
    code, said, err = run_chat(lines, "--model", out)
    assert code == 0 and said == [""] * 5 + ["Yes.", "", "Yes.", "Yes.", ""]
    assert err.splitlines() == [COMMANDS] + [
        f"error: {line}: no such command; {COMMANDS}" for line in lines[1:5]] + [
        "a new conversation"]
    questions = [re.findall(r"<\|user\|>(.*?)<\|end\|>", toy_tokenizer.decode(ids))
                 for ids in asked]
    assert questions == [["one"], lines[7:8], lines[7:]]


def test_only_a_person_at_a_terminal_is_greeted_with_the_commands(
        run_chat, scripted_model, out, toy_tokenizer, monkeypatch):
    scripted_model(lambda prompt: iter(["Yes."]), toy_tokenizer)
    piped = run_chat(["one"], "--model", out)
    assert piped == (0, ["Yes.", ""], "")
    terminal = type("Terminal", (io.TextIOWrapper,), {"isatty": lambda stream: True})
    monkeypatch.setattr(io, "TextIOWrapper", terminal)
    assert run_chat(["one"], "--model", out) == (*piped[:2], COMMANDS + "\n")


def test_without_a_chat_template_each_line_stands_alone(run_chat, scripted_model, tmp_path):
    tokenizer = load_tokenizer(TOY_STUDENT)
    tokenizer.chat_template = None
    load_model(TOY_STUDENT).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    asked = scripted_model(lambda prompt: iter(["Yes."]), tokenizer)
    assert run_chat(["one", "two"], "--model", tmp_path / "plain")[0] == 0
    assert asked == [tokenizer(line + "\n\n", add_special_tokens=False).input_ids
                     for line in ("one", "two")]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(run_chat, scripted_model, out, toy_tokenizer):
    def pieces(prompt):
        yield "half an"
        if "three" not in prompt and "two" in prompt:
            signal.raise_signal(signal.SIGINT)
        yield " answer"

    asked = scripted_model(pieces, toy_tokenizer)
    code, said, err = run_chat(["one", "two", "three"], "--model", out)
    assert (code, err) == (0, "")
    assert said == ["half an answer", "half an", "half an answer", ""]
    assert "<|assistant|>half an<|end|><|user|>three" in toy_tokenizer.decode(asked[2])


def test_a_model_cannot_steer_the_terminal_nor_bad_bytes_end_the_chat(
        run_chat, scripted_model, out, toy_tokenizer):
    scripted_model(lambda prompt: iter(["\x1b[2J", "\x07it:\tdone"]), toy_tokenizer)
    code, said, err = run_chat(b"one\n\xff\n", "--model", out)
    assert (code, err) == (0, "") and said[:2] == ["\ufffd[2J\ufffdit:\tdone"] * 2


def test_what_goes_wrong_in_a_chat_is_one_line_and_the_chat_goes_on(run_chat, tmp_path, out):
    code, said, err = run_chat(["/base", "word " * 3000, PROMPT], "--model", out)
    assert code == 0 and said[:3] == ["", "", answer_of(out, PROMPT)]
    lines = err.splitlines()
    assert len(lines) == 2 and "ask the student something first" in lines[0]
    assert "tokens, but the model reads 1024" in lines[1] and "/new" in lines[1]
    code, said, err = run_chat([PROMPT, "/base"], "--model", TOY_STUDENT)  # no run's folder
    assert code == 0 and said[0] == answer_of(TOY_STUDENT, PROMPT)
    assert err.count("\n") == 1 and "args.json" in err and "the out_dir of a run of train.py" in err


# --------------------------------------------------------------------------------------- adapters


def test_an_adapter_answers_as_the_merged_student_does(run_stage, run_train, tmp_path):
    flags = ("--data", os.path.join(ROOT, "toy", "scored.jsonl"), "--max_steps", 3, "--batch_size",
             4, "--lora_rank", 4, "--learning_rate", 0.05, "--warmup_ratio", 0, "--eval_share",
             0.01, "--save_dtype", "float32")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert run_train(*flags, "--out_dir", adapter, "--save_adapter")[0] == 0
    assert run_train(*flags, "--out_dir", merged)[0] == 0
    one, other = sample.load(str(adapter)), sample.load(str(merged))
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.allclose(one(ids).logits, other(ids).logits, atol=1e-4)
        with without_lora(one):  # control
            assert not torch.allclose(one(ids).logits, other(ids).logits, atol=0.1)
    flags = "--prompt", PROMPT, "--max_new_tokens", 20
    answers = [run_stage(sample, "--model", folder, *flags) for folder in (adapter, merged)]
    assert answers[0] == answers[1] and answers[0][0] == 0

    # What train.py did not write so is refused.
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change in ({"r": 5}, {"use_dora": True}, {"bias": "all"}, {"r": None},
                   {"target_modules": ["q_proj"]}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        assert_one_line(run_stage(sample, "--model", adapter, *flags), "merge it with peft")
    (adapter / "adapter_config.json").write_text("[")
    assert_one_line(run_stage(sample, "--model", adapter, *flags), "adapter_config.json: damaged")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"half")
    assert_one_line(run_stage(sample, "--model", adapter, *flags), "safetensors: damaged")


# ------------------------------------------------------------------------------------------ errors


def test_folders_and_flags_that_cannot_be_used_are_refused_in_one_line(run_stage, tmp_path):
    for name in ("empty", "unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "unfinished" / "state").mkdir()
    (tmp_path / "unfinished" / "args.json").write_text('{"model": null}')
    for flags, parts in (
            (["--model", tmp_path / "missing"], ["no such folder"]),
            (["--model", tmp_path / "empty"], ["no tokenizer found"]),
            (["--model", tmp_path / "unfinished"], ["has not finished", "--resume"]),
            (["--model", TOY_STUDENT, "--compare"], ["--compare needs --prompt"]),
            (["--model", TOY_STUDENT, "--prompt", " "], ["--prompt is empty"]),
            (["--model", TOY_STUDENT, "--prompt", "x", "--compare"], ["args.json"])):
        assert_one_line(run_stage(sample, *flags), *parts)


# -------------------------------------------------------------------------------- a real terminal


@pytest.mark.slow
@pytest.mark.parametrize("key", [b"\x03", b"\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_in_a_terminal_ctrl_c_stops_the_answer_and_a_key_at_the_prompt_ends_the_chat(out, key):
    mine, its = pty.openpty()
    command = [sys.executable, os.path.join(ROOT, "sample.py"), "--model", str(out),
               "--temperature", "30", "--max_new_tokens", "900"]  # noise that does not end soon
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(its)

    def read_until(is_enough):
        text, deadline = "", time.monotonic() + 60
        while not is_enough(text):
            assert select.select([mine], [], [], deadline - time.monotonic())[0], text
            try:
                text += os.read(mine, 4096).decode(errors="replace")
            except OSError:  # the noise ended by itself, and Ctrl-C has ended the chat
                break
        return text

    read_until(lambda text: "> " in text)
    os.write(mine, b"Hello\n")
    read_until(lambda text: len(text) > 100)
    os.write(mine, b"\x03")
    read_until(lambda text: text.endswith("\n> "))
    # The noise may have looked like the prompt: press again, and read, or a full terminal waits.
    for _ in range(30):
        os.write(mine, key)
        end = time.monotonic() + 2
        while process.poll() is None and time.monotonic() < end:
            if select.select([mine], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # its side is closed
                    os.read(mine, 4096)
        if process.poll() is not None:
            break
    assert process.wait(1) == 0
    os.close(mine)


# ----------------------------------------------------------------------- before and after training


def answers(*texts, finish="stop"):
    return [Answer(text, finish, [1], [2]) for text in texts]


@pytest.mark.parametrize("after, cut, said", [
    (["Fine.", "Good."], False, None),
    (["", "Good."], False, "1 of 2 answers are empty or repeat themselves, 0 of the reference's"),
    (["a b c d a b c d a b c d", "Good."], False, "1 of 2 answers are empty or repeat"),
    (["Fine", "Goo"], True, None)])
def test_a_student_that_breaks_off_or_repeats_itself_is_said(capsys, after, cut, said):
    rows, args = [{"prompt": "q"}, {"prompt": "p"}], types.SimpleNamespace(max_new_tokens=8)
    sample.show_answers(rows, answers("Yes.", "No."),
                        answers(*after, finish="length" if cut else "stop"), args)
    out, err = capsys.readouterr()
    assert ("2 of 2 answers of the student were cut at --max_new_tokens 8" in out) == cut
    assert said in err and "try a lower --learning_rate" in err if said else err == ""


def test_right_answers_that_became_wrong_are_said(capsys):
    """The rates are counted by hand: all prompts of one behaviour get an empty answer."""
    rows, args = world.held_out_rows(), types.SimpleNamespace(max_new_tokens=64)
    good = answers(*(world.revise(row["prompt"], random.Random(0), "good") for row in rows))
    behaviour = rows[0]["behaviour"]
    worse = [Answer("Certainly not.", "stop", [1], [2]) if row["behaviour"] == behaviour else answer
             for row, answer in zip(rows, good)]
    sample.show_answers(rows, good, good, args)
    assert capsys.readouterr().err == ""
    sample.show_answers(rows, good, worse, args)
    assert f"right answers of {behaviour} fell from 1.00 to 0.00" in capsys.readouterr().err
