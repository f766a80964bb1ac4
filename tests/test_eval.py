"""eval.py: sampling, KL and intervals against independent computations; whole runs, each with the
toy judge or a scripted one."""
import functools
import itertools
import json
import math
import os
import re
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, read_lines, says, tiny_model

import eval as evaluation
import rdpo
import train
from data import encode_prompt, load_pairs
from infra.command import BadInput
from infra.generate import Answer, fault, generate
from infra.intervals import bootstrap, equal_length, mean, ratio
from infra.models import TOY_STUDENT, load_model, load_tokenizer
from infra.paragraphs import load_paragraphs
from infra.report import table
from infra.task import load_task
from toy import server as toy

SCORE = "score (higher is better)"
TASK = f"{ROOT}/toy/task.toml"
PROMPTS = read_lines(f"{ROOT}/toy/held_out.jsonl")[:12]


@pytest.fixture(scope="module")
def base():
    return load_model(TOY_STUDENT)


@pytest.fixture(scope="module")
def prompt_ids(toy_tokenizer):
    return [encode_prompt(toy_tokenizer, row["prompt"]) for row in PROMPTS]


@pytest.fixture(scope="module")
def student(tmp_path_factory, toy_tokenizer):
    """A folder with a student unlike the toy student: the same weights, with noise."""
    folder, model = tmp_path_factory.mktemp("student") / "out", load_model(TOY_STUDENT)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
    model.save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run_eval(run_stage, write_rows, student, tmp_path):
    """Run eval.py on the student and a few prompts; returns (exit code, stdout, stderr)."""
    def run(*flags, prompts=PROMPTS, url=None):
        given = [str(flag) for flag in flags]
        defaults = {"--model": student, "--prompts": write_rows(prompts, "prompts.jsonl"),
                    "--out_dir": tmp_path / "eval", "--max_new_tokens": 12}
        if url:
            defaults |= {"--base_url": url, "--judge_model": "toy", "--task": TASK}
        for name, default in defaults.items():
            given += [] if name in given else [name, str(default)]
        return run_stage(evaluation, *given)
    return run


def cells(out, heading, system):
    """{measurement: cell} of a system, under a heading of the table on stdout."""
    lines = out.splitlines()
    head = next(line for line in lines if re.match(r" +base(  |$)", line))
    column = re.split(r"\s{2,}", head.strip()).index(system) + 1
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 1
    rows = itertools.takewhile(lambda line: line.startswith("  "), lines[start:])
    rows = [re.split(r"\s{2,}", row.strip()) for row in rows]
    return {row[0]: row[column] for row in rows}


# ---------------------------------------------------------------------------------------- answers


def test_greedy_answers_depend_on_no_batch_and_on_no_penalty(base, toy_tokenizer, prompt_ids):
    together = generate(base, toy_tokenizer, prompt_ids, 40)
    assert generate(base, toy_tokenizer, prompt_ids, 40, batch_size=5) == together
    assert generate(base, toy_tokenizer, prompt_ids[3:4], 40) == together[3:4]
    base.generation_config.repetition_penalty = 3.0
    assert generate(base, toy_tokenizer, prompt_ids, 40) == together
    base.generation_config.repetition_penalty = 1.0


def test_sampled_answers_depend_on_their_seeds_alone(base, toy_tokenizer, prompt_ids):
    def sample(prompt_ids, **settings):
        return generate(base, toy_tokenizer, prompt_ids, 40, temperature=1.0, **settings)

    state = torch.get_rng_state()
    sampled = sample(prompt_ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(prompt_ids) == sampled
    assert sample(prompt_ids[5:9], seeds=range(5, 9), batch_size=3) == sampled[5:9]
    other = sample(prompt_ids, seeds=range(100, 112))
    assert sum(a.text != b.text for a, b in zip(sampled, other)) > 6


def test_an_answer_ends_with_its_end_token_or_is_cut(base, toy_tokenizer, prompt_ids):
    whole = generate(base, toy_tokenizer, prompt_ids, 80)
    end = toy_tokenizer.eos_token_id
    assert {answer.finish for answer in whole} == {"stop"}
    assert all(answer.ids.index(end) == len(answer.ids) - 1 for answer in whole)
    longest = max(len(answer.ids) for answer in whole)
    cut = generate(base, toy_tokenizer, prompt_ids, longest - 1)
    assert [answer.finish for answer in cut] == [
        "length" if len(answer.ids) == longest else "stop" for answer in whole]
    assert [answer.ids for answer in cut] == [answer.ids[:longest - 1] for answer in whole]


class Letters:
    """A tokenizer of seven tokens; 0 ends an answer."""
    chat_template, eos_token, eos_token_id, bos_token_id = None, "0", 0, None

    def __call__(self, text, add_special_tokens):
        return types.SimpleNamespace(input_ids=[int(text)])

    def decode(self, ids, skip_special_tokens):
        return str(ids)


@functools.cache
@torch.no_grad()
def next_logps(model, *ids):
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def exact_logp(model, prompt_ids, ids):
    """The slow way: one token at a time in float64."""
    return sum(next_logps(model, *prompt_ids, *ids[:n])[token].item()
               for n, token in enumerate(ids))


def test_kl_estimate_against_the_exact_sum_over_all_answers():
    policy, reference = tiny_model(vocab=7, seed=1), tiny_model(vocab=7, seed=2)
    for model in (policy, reference):
        model.generation_config.eos_token_id = 0
    prompt_ids = [2, 2, 3]

    def sample(temperature, count=3000):
        return generate(policy, Letters(), [prompt_ids] * count, 3, temperature, batch_size=count)

    sampled = sample(1.0)
    logps = evaluation.answer_logps(policy, sampled)[:, 0]
    estimates = (logps - evaluation.answer_logps(reference, sampled)[:, 0]).double()

    possible = [[*ids, 0] for n in range(3) for ids in itertools.product(range(1, 7), repeat=n)]
    possible += [list(ids) for ids in itertools.product(range(1, 7), repeat=3)]
    exact_logps = {tuple(ids): (exact_logp(policy, prompt_ids, ids),
                                exact_logp(reference, prompt_ids, ids)) for ids in possible}
    assert math.fsum(math.exp(own) for own, _ in exact_logps.values()) == pytest.approx(1)
    for answer, logp, estimate in zip(sampled[:300], logps.tolist(), estimates.tolist()):
        own, ref = exact_logps[tuple(answer.ids)]
        assert abs(logp - own) < 1e-4 and abs(estimate - (own - ref)) < 2e-4
    exact = math.fsum(math.exp(own) * (own - ref) for own, ref in exact_logps.values())
    error = estimates.std().item() / len(estimates) ** 0.5
    assert abs(estimates.mean().item() - exact) < 4 * error
    # Controls: the other direction, greedy answers and another temperature give another value.
    backwards = math.fsum(math.exp(ref) * (ref - own) for own, ref in exact_logps.values())
    assert abs(estimates.mean().item() - backwards) > 4 * error
    for other in (sample(0.0, count=1), sample(2.0)):
        ratios = evaluation.answer_logps(policy, other) - evaluation.answer_logps(reference, other)
        assert abs(ratios.mean().item() - exact) > 4 * error


# ---------------------------------------------------------------------------------- ordinary text


def slow_text_nats(base, student, paragraphs):
    """(3, P), the slow way: one position at a time in float64, all words one by one."""
    sums = []
    for chunks in paragraphs:
        nll = kl = tokens = 0.0
        for ids in chunks:
            for n in range(1, len(ids)):
                ours, theirs = (next_logps(model, *ids[:n]).tolist() for model in (base, student))
                nll -= theirs[ids[n]]
                kl += math.fsum(math.exp(p) * (p - q) for p, q in zip(ours, theirs))
                tokens += 1
        sums.append([nll, kl, tokens])
    return torch.tensor(sums).T


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])  # plain, cap, scale, bias
def test_text_against_a_slow_loop(name, monkeypatch):
    monkeypatch.setitem(rdpo.HEAD_BYTES, "cpu", 4 * 97 * 5)  # logits of 5 tokens at a time
    student, base = tiny_model(name, seed=1), tiny_model(name, seed=2)
    for model in (student, base):
        if model.get_output_embeddings().bias is not None:
            torch.nn.init.normal_(model.get_output_embeddings().bias)
    ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    paragraphs = [[ids[:9], ids[9:18], ids[18:20]], [ids[20:31]], [ids[31:33]]]
    states = {"out": evaluation.text_states(student, paragraphs),
              "base": evaluation.text_states(base, paragraphs)}
    nats = evaluation.text_nats(states, paragraphs, torch.device("cpu"))
    wanted = slow_text_nats(base, student, paragraphs)
    assert torch.allclose(nats["out"], wanted, rtol=2e-5, atol=2e-5)
    own = slow_text_nats(base, base, paragraphs)
    assert torch.allclose(nats["base"], own, rtol=2e-5, atol=2e-5) and not nats["base"][1].any()
    # Controls: the other direction, and the tokens one place too early, give other values.
    assert not torch.allclose(slow_text_nats(student, base, paragraphs)[1], wanted[1], rtol=0.01)
    early = [[chunk[:1] + chunk[:-1] for chunk in chunks] for chunks in paragraphs]
    shifted = evaluation.text_nats(states, early, torch.device("cpu"))["out"]
    assert not torch.allclose(shifted[0], wanted[0], rtol=0.01)
    hidden, head, *rest = states["out"]
    with pytest.raises(BadInput, match="--model out: its output head has another size"):
        evaluation.text_nats(states | {"out": (hidden, head[1:], *rest)}, paragraphs,
                             torch.device("cpu"))


def test_text_is_cut_at_empty_lines_and_at_max_length(toy_tokenizer, write_rows):
    path = write_rows("One line.\nIts second line.\r\n \t\r\nI am a hero.\n\na\n", "text.txt")
    texts = ["One line.\nIts second line.", "I am a hero."]  # "a" is one token: nothing to predict
    whole = [toy_tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert load_paragraphs(path, toy_tokenizer, 100) == [[ids] for ids in whole]
    cut = load_paragraphs(path, toy_tokenizer, 4)
    assert [sum(chunks, []) for chunks in cut] == [
        ids[:len(ids) - (len(ids) % 4 == 1)] for ids in whole]
    assert {len(chunk) for chunks in cut for chunk in chunks[:-1]} == {4}

    class Words:  # a tokenizer that begins every text with bos
        bos_token_id = 0

        def __call__(self, text, add_special_tokens=True, **_):
            ids = [len(word) for word in text.split()]
            return types.SimpleNamespace(input_ids=[0] * add_special_tokens + ids)

    assert load_paragraphs(path, Words(), 4) == [
        [[0, 3, 5, 3], [0, 6, 5]], [[0, 1, 2, 1], [0, 5]], [[0, 1]]]


# ---------------------------------------------------------------------------------------- numbers


def test_bootstrap():
    values = np.random.default_rng(1).normal(3, 2, 400)
    value, low, high = bootstrap(mean, values)
    half = 1.96 * values.std() / 20
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.03)
    assert bootstrap(mean, values) == (value, low, high) != bootstrap(mean, values, seed=1)
    assert bootstrap(mean, [2.0] * 9) == (2, 2, 2)
    # Seven of ten: the interval of a binomial share over 10.
    assert bootstrap(mean, [1] * 7 + [0] * 3) == pytest.approx((0.7, 0.4, 1.0))
    # Columns are resampled together: a difference that is the same on every row stays it.
    difference = bootstrap(lambda a, b: (a - b).mean(-1), values, values - 1)
    assert difference == pytest.approx((1, 1, 1))


def test_score_gap_at_equal_length():
    rng = np.random.default_rng(2)
    longer = rng.normal(30, 10, 500)
    # Longer answers score higher; at equal length 0.5 is left.
    gaps = 0.5 + 0.1 * longer + rng.normal(0, 0.2, 500)
    value, low, high = bootstrap(equal_length, gaps, longer)
    slope, intercept = np.polyfit(longer, gaps, 1)
    assert value == pytest.approx(intercept) and low < 0.5 < high and high - low < 0.3
    assert gaps.mean() > 3
    assert equal_length(gaps, np.full(500, 7.0)) == pytest.approx(gaps.mean())


@pytest.mark.parametrize("text, finish, wanted", [
    ("", "stop", "empty"), (" \n", "length", "empty"), ("It is", "length", "cut"),
    ("No.", "stop", ""), ("no " * 5, "stop", ""), ("no " * 6, "stop", "repetitive"),
    ("I am an honest AI. I am an honest AI.", "stop", ""),
    ("I am an honest AI. I am an honest AI. And I am an honest AI.", "stop", "repetitive")])
def test_degenerate_answers(text, finish, wanted):
    assert fault(text, finish) == wanted


def test_good_answers_are_not_degenerate(toy_rows):
    answers = [row[name] for row in toy_rows for name in ("chosen", "rejected")]
    assert not any(fault(text, "stop") for text in answers)


def test_a_new_measurement_is_a_row_and_one_without_values_is_none():
    text = table({"a, 2 prompts": {"base": {"score": "-", "new": "-", "none": "-"},
                                   "out": {"score": "1", "new": "2", "none": "-"}},
                  "pairs of a very long file name that is wider than the column": {
                      "base": {"pairs": "3"}}})
    assert text.splitlines() == [
        "         base  out", "", "a, 2 prompts", "  score  -     1", "  new    -     2", "",
        "pairs of a very long file name that is wider than the column", "  pairs  3     -"]


def test_ratio_is_a_mean_per_token_over_all_paragraphs():
    nats, tokens = np.array([2.0, 30.0, 4.0]), np.array([1.0, 10.0, 1.0])
    assert bootstrap(ratio, nats, tokens)[0] == 3  # not (2 + 3 + 4) / 3 of unequal paragraphs
    assert bootstrap(ratio, 2 * tokens, tokens) == (2, 2, 2)
    _, low, high = bootstrap(ratio, nats, tokens)
    assert low == 2 and high == 4


# ------------------------------------------------------------------------------------- whole runs


def test_a_run_resumes_after_a_kill_and_ends_with_the_same_rows(toy_server, run_eval, tmp_path):
    url, folder = toy_server(), tmp_path / "eval"
    flags = ("--temperature", 1, "--batch_size", 4)
    code, out, err = run_eval(*flags, url=url)
    assert code == 0, err
    rows = {name: (folder / name).read_text() for name in ("answers.jsonl", "eval.jsonl")}
    for name, keep in (("answers.jsonl", 7), ("eval.jsonl", 5)):
        lines = rows[name].splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:keep]) + lines[keep][:50])  # a torn line
    code, again, err = run_eval(*flags, "--batch_size", 3, url=url)
    assert code == 0 and "24 of 24 rows (5 from before)" in again, err
    for name, text in rows.items():
        assert sorted((folder / name).read_text().splitlines()) == sorted(text.splitlines())
    assert out[out.index("\nsafety"):] == again[again.index("\nsafety"):]
    for row in read_lines(folder / "eval.jsonl"):
        assert row["judge"]["said"][0]["reply"] == f"Final score: {row['score']:g}"


def test_other_settings_weights_prompts_or_judge_are_refused(toy_server, run_eval, tmp_path,
                                                             student):
    url, prompts = toy_server(), PROMPTS[:2]
    assert run_eval(url=url, prompts=prompts)[0] == 0
    changed = [PROMPTS[0] | {"prompt": "Hello!"}, *prompts[1:]]
    with open(TASK, encoding="utf-8") as file:
        other_task = file.read().replace("You rate the answers", "You rate the replies")
    (tmp_path / "task.toml").write_text(other_task)
    for flags, prompts, message in (
            (("--seed", 1), prompts, "other weights, settings or prompt"),
            ((), changed, "other weights, settings or prompt"),
            (("--max_new_tokens", 11), prompts, "other weights, settings"),
            (("--base_model", student, "--model", TOY_STUDENT), prompts, "other weights"),
            (("--task", tmp_path / "task.toml"), prompts, "eval.jsonl:1: made with another task")):
        code, _, err = run_eval(*flags, prompts=prompts, url=url)
        assert code == 2 and message in err and len(err.splitlines()) == 1, (flags, err)
    assert len(read_lines(tmp_path / "eval" / "answers.jsonl")) <= 6


@pytest.mark.parametrize("cuda, mps, device", [
    (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_computes_on_the_device_that_train_takes(run_eval, monkeypatch, cuda, mps, device):
    moved = []

    class Stop(Exception):
        pass

    def to(_, device):
        moved.append(device)
        raise Stop

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    with pytest.raises(Stop):
        run_eval()
    assert moved == [device]


def test_several_models_one_table_and_no_judge(run_eval, student, base, tmp_path):
    other = str(tmp_path / "other")
    os.symlink(student, other)
    code, out, err = run_eval("--model", student, other, "--temperature", 1,
                              "--max_new_tokens", 20)
    assert code == 0, err
    a, b, own = (cells(out, "all, 12 prompts", name) for name in (student, other, "base"))
    assert a["KL from base, nats"] == b["KL from base, nats"] and own["KL from base, nats"] == "-"
    rows = [row for row in read_lines(tmp_path / "eval" / "answers.jsonl")
            if row["answered_by"] == student]
    policy = load_model(student)
    ratios = [exact_logp(policy, row["prompt_ids"], row["ids"])
              - exact_logp(base, row["prompt_ids"], row["ids"]) for row in rows]
    assert len(ratios) == 12 and np.mean(ratios) > 0.1
    assert float(a["KL from base, nats"].split()[0]) == pytest.approx(np.mean(ratios), abs=0.01)
    assert a.keys() == {"tokens", "degenerate %", "KL from base, nats"} and float(a["tokens"]) > 10
    assert out.count("prompt:") == 4 and out.count("base:  ") == 4
    code, out, _ = run_eval("--out_dir", tmp_path / "greedy", prompts=PROMPTS[:1])
    row = cells(out, "safety, 1 prompts", student)
    assert code == 0 and row.keys() == {"tokens", "degenerate %"}
    assert "sampled at --temperature 1" in out


def test_scores_are_those_of_the_judge_and_nulls_are_counted(scripted, run_eval, student,
                                                             tmp_path):
    def script(path, request):
        text = request["messages"][-1]["content"]
        if PROMPTS[0]["question"] in text:
            return says("I give it a 5.")
        return says("Final score: 3" if PROMPTS[1]["question"] in text else "Final score: 4")

    code, out, err = run_eval("--verdict_retries", 1, url=scripted(script).url)
    assert code == 0, err
    rows = {row["id"]: row for row in read_lines(tmp_path / "eval" / "eval.jsonl")}
    unjudged = rows[f"{student}/{PROMPTS[0]['id']}"]
    assert unjudged["score"] is None and len(unjudged["judge"]["said"]) == 2
    row = cells(out, "all, 12 prompts", student)
    assert row["judged"] == "11/12" and row[SCORE].startswith(f"{(3 + 10 * 4) / 11:.2f} [")
    assert row["win over base %"] == "50 [50, 50]"
    assert f"could not judge 1 of 12 answers of {student}" in out
    # The mean of the two that were judged.
    assert cells(out, "safety, 3 prompts", "base")[SCORE] == "4.00 [4.00, 4.00]"


def test_only_the_answers_of_this_call_are_judged(scripted, run_eval, student, tmp_path):
    os.symlink(student, tmp_path / "other")
    assert run_eval("--model", student, tmp_path / "other")[0] == 0  # no judge: 36 answers
    server = scripted(lambda path, request: says("Final score: 4"))
    code, out, err = run_eval(prompts=PROMPTS[:3], url=server.url)
    assert code == 0 and "6 of 6 rows (0 from before)" in out and len(server.requests) == 6, err
    wanted = [f"{name}/{row['id']}" for name in (student, "base") for row in PROMPTS[:3]]
    judged = [row["id"] for row in read_lines(tmp_path / "eval" / "eval.jsonl")]
    assert sorted(judged) == sorted(wanted)
    code, out, err = run_eval(prompts=PROMPTS[2:5], url=server.url)
    assert code == 0 and "6 of 6 rows (2 from before)" in out and len(server.requests) == 10, err


def test_a_judge_that_never_gives_a_verdict(scripted, run_eval, tmp_path):
    server = scripted(lambda path, request: says("Very nice."))
    code, out, err = run_eval("--verdict_retries", 0, url=server.url)
    assert code == 1 and err.count("\n") == 1 and "no reply of toy had a verdict" in err
    row = cells(out, "all, 12 prompts", "base")
    assert row["judged"] == "0/12" and SCORE not in row
    assert len(read_lines(tmp_path / "eval" / "eval.jsonl")) == 24


def test_a_judge_that_cannot_take_the_prompts(toy_server, run_eval):
    code, _, err = run_eval(prompts=[{"id": 1, "prompt": "What is rain?"}], url=toy_server())
    assert code == 1 and "not a prompt of the toy world: 'What is rain?'" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("reply, wanted", [
    (lambda first, second: 1, "50 [50, 50]"), (lambda first, second: 2, "50 [50, 50]"),
    (lambda first, second: 0, "50 [50, 50]"),
    (lambda first, second: 1 if len(first) > len(second) else 2, "92 [75, 100]"),
    (lambda first, second: 3, None), (lambda first, second: 1.5, None)])
def test_pairwise_in_both_orders(reply, wanted, scripted, run_eval, student, monkeypatch,
                                 tmp_path):
    lengths = {student: [9] * 11 + [1], "base": [2] * 12}
    monkeypatch.setattr(evaluation, "answer_rows",
                        lambda path, system, model, tokenizer, rows, task, args:
                        fake_answers(path, system, rows, lengths[system]))

    def script(path, request):
        text = request["messages"][-1]["content"]
        if "Second reply:" not in text:
            return says("Final score: 2")
        replies = text.split("First reply:\n")[1].split("\n\nWhich")[0]
        first, second = replies.split("\n\nSecond reply:\n")
        return says(f"Better: {reply(first, second)}")

    code, out, err = run_eval("--pairwise", "--verdict_retries", 0, url=scripted(script).url)
    assert code == 0, err
    assert cells(out, "all, 12 prompts", student).get("win over base %") == wanted
    note = f"could not compare 12 of 12 answers of {student}"
    assert (note in out) == (wanted is None) and out.count("could not compare") <= 1
    assert len(read_lines(tmp_path / "eval" / "pairwise.jsonl")) == 12


def fake_answers(path, system, rows, lengths):
    rows = [{"id": f"{system}/{row['id']}", "row": row["id"], "answered_by": system,
             "prompt": row["prompt"], "answer": length * "long ", "finish": "stop", "turns": [],
             "prompt_ids": [1], "ids": [1] * length} for row, length in zip(rows, lengths)]
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_pairwise_against_the_toy_judge(toy_server, run_eval, student, tmp_path):
    code, out, err = run_eval("--pairwise", "--max_new_tokens", 40, url=toy_server())
    assert code == 0, err
    scores = {row["id"]: row["score"] for row in read_lines(tmp_path / "eval" / "eval.jsonl")}
    gaps = [scores[f"{student}/{row['id']}"] - scores[f"base/{row['id']}"] for row in PROMPTS]
    wins = {row["row"]: row["win"] for row in read_lines(tmp_path / "eval" / "pairwise.jsonl")}
    assert [wins[row["id"]] for row in PROMPTS] == [(1 + np.sign(gap)) / 2 for gap in gaps]
    assert len(set(wins.values())) > 1
    question = PROMPTS[0]["question"]
    assert toy.compare(question, "x", "x", 0, 0) == ("Better: 0", {})
    noisy = [toy.compare(question, "I will not.", "No.", seed, 2)[0] for seed in range(20)]
    assert set(noisy) == {"Better: 0", "Better: 1", "Better: 2"}


def test_self_refinement_is_one_growing_conversation(run_eval, monkeypatch, tmp_path):
    asked = []

    def generate(model, tokenizer, prompts, *rest):
        asked.append(prompts)
        return [Answer(f"reply {len(asked)}", "stop", [1], [2, 3]) for _ in prompts]

    monkeypatch.setattr(evaluation, "generate", generate)
    monkeypatch.setattr(evaluation, "encode_prompt", lambda tokenizer, prompt, where: prompt)
    code, out, err = run_eval("--self_refine", "--task", TASK, prompts=PROMPTS[:1])
    assert code == 0 and len(asked) == 5, err  # the student, the base, and three turns
    assert asked[0] == asked[1] == asked[2] == [PROMPTS[0]["prompt"]]
    task = load_task(TASK)
    conversation = [("user", PROMPTS[0]["prompt"]), ("assistant", "reply 3"),
                    ("user", task.critique), ("assistant", "reply 4"), ("user", task.revision)]
    assert [[(message["role"], message["content"]) for message in prompts[0]]
            for prompts in asked[3:]] == [conversation[:3], conversation]
    row = next(row for row in read_lines(tmp_path / "eval" / "answers.jsonl")
               if row["answered_by"] == "base + self-refine")
    assert (row["turns"], row["answer"]) == (["reply 3", "reply 4"], "reply 5")
    (refined,) = read_lines(tmp_path / "eval" / "refined.jsonl")  # what reward.py reads
    assert (refined["rejected"], refined["critique"], refined["chosen"]) == (
        "reply 3", "reply 4", "reply 5")
    assert refined["id"] == PROMPTS[0]["id"] and refined["question"] == PROMPTS[0]["question"]
    assert len(refined["teacher"]["finish"]) == 3
    assert cells(out, "safety, 1 prompts", "base + self-refine")["tokens"] == "2.0"


def test_scored_pairs_give_the_numbers_of_train(run_stage, student, base, toy_rows,
                                                toy_tokenizer, write_rows, tmp_path):
    path = write_rows(toy_rows[:40], "scored.jsonl")
    code, out, err = run_stage(evaluation, "--data", path, "--model", student,
                               "--out_dir", tmp_path / "pairs")
    assert code == 0, err
    row = cells(out, "pairs of", student)
    args = types.SimpleNamespace(beta=0.1, loss="rdpo", tau_temperature=1.0, tokens_per_batch=2048,
                                 sft_weight=0.0, device="cpu", dtype="float32", eval_data=None)
    pairs, _ = load_pairs(path, toy_tokenizer, 1024, needs_scores=True)
    reference = evaluation.answer_logps(base, pairs)
    gaps = torch.tensor([pair.score_gap for pair in pairs])
    dataset = train.Dataset(pairs, False, *reference.T, tau=torch.sigmoid(gaps), lean=gaps,
                            weight=torch.ones(len(pairs)))
    metrics = train.evaluate(load_model(student), dataset, args)[0]
    for name, value in (("chosen first %", 100 * metrics["eval/rewards/accuracies"]),
                        ("agrees with scores %", 100 * metrics["eval/rewards/score_agreement"]),
                        ("log-ratio margin, nats", metrics["eval/rewards/margins"] / 0.1),
                        ("logp chosen, nats", metrics["eval/logps/chosen"]),
                        ("logp rejected, nats", metrics["eval/logps/rejected"])):
        tolerance = 0.06 if "%" in name else 0.006
        assert float(row[name].split()[0]) == pytest.approx(value, abs=tolerance)
    own = cells(out, "pairs of", "base")
    assert own["chosen first %"] == own["agrees with scores %"] == "-"
    assert own["log-ratio margin, nats"] == "-"
    assert own["pairs"] == "40" and own["logp chosen, nats"] != "-"
    assert "chosen first" in (tmp_path / "pairs" / "report.md").read_text()


def test_text_is_a_block_of_the_table(run_stage, student, base, toy_tokenizer, toy_rows, write_rows,
                                      tmp_path):
    text = "\n\n".join(row["chosen"] for row in toy_rows[:6])
    path = write_rows(text, "text.txt")
    flags = ("--text", path, "--max_length", 16, "--out_dir", tmp_path / "text", "--model")
    code, out, err = run_stage(evaluation, *flags, student)
    assert code == 0, err
    paragraphs = load_paragraphs(path, toy_tokenizer, 16)
    nll, kl, tokens = slow_text_nats(base, load_model(student), paragraphs).numpy()
    base_nll, _, _ = slow_text_nats(base, base, paragraphs).numpy()
    heading = f"text of {path}, {tokens.sum():.0f} tokens in 6 paragraphs"
    row, own = cells(out, heading, student), cells(out, heading, "base")
    for cell, column in ((row["nll per token, nats"], nll), (own["nll per token, nats"], base_nll),
                         (row["nll above the base's"], nll - base_nll),
                         (row["KL from base, nats per token"], kl)):
        wanted = bootstrap(ratio, column, tokens)
        assert np.array(re.findall(r"[\d.]+", cell), float) == pytest.approx(wanted, abs=6e-4)
    assert own["nll above the base's"] == own["KL from base, nats per token"] == "-"
    assert kl.sum() / tokens.sum() > 0.05 and path in (tmp_path / "text/report.md").read_text()
    # Control: the base as its own student is at no distance from itself.
    out = run_stage(evaluation, *flags, TOY_STUDENT)[1]
    row = cells(out, heading, TOY_STUDENT)
    assert row["nll above the base's"].startswith("+0.000 [+0.000")
    assert row["KL from base, nats per token"].startswith("0.0000 [0.0000")
    assert row["nll per token, nats"] == own["nll per token, nats"]


def test_bad_text_is_one_line(run_stage, student, write_rows, tmp_path):
    (tmp_path / "latin").write_bytes("Ein Satz.\n\nEin schöner".encode("latin-1"))
    long = write_rows("word " * 3000, "long.txt")
    for path, length, message in (
            (write_rows(" \n\n\t\n", "empty.txt"), 1024, "empty.txt: no text"),
            (tmp_path / "latin", 1024, "latin:3: not UTF-8"),
            (tmp_path / "missing", 1024, "missing: No such file or directory; give a file of"),
            (long, 1025, "has a row of 1025 tokens"), (long, 1, "--max_length")):
        code, out, err = run_stage(evaluation, "--text", path, "--max_length", length,
                                   "--out_dir", tmp_path / "text", "--model", student)
        assert code == 2 and message in err and err.count("\n") == 1 and not out, err


def test_the_base_answers_the_bare_question(toy_server, run_eval, base, toy_tokenizer, tmp_path):
    code, out, err = run_eval("--bare_question", "--max_new_tokens", 40, url=toy_server())
    assert code == 0, err
    name = "base, bare question"
    rows = [row for row in read_lines(tmp_path / "eval" / "answers.jsonl")
            if row["answered_by"] == name]
    questions = {row["id"]: row["question"] for row in PROMPTS}
    assert {row["row"]: row["prompt"] for row in rows} == questions
    asked = [encode_prompt(toy_tokenizer, row["prompt"]) for row in rows]
    answers = [answer.text for answer in generate(base, toy_tokenizer, asked, 40)]
    assert [row["answer"] for row in rows] == answers
    scores = {row["id"]: row["score"] for row in read_lines(tmp_path / "eval" / "eval.jsonl")}
    score = np.mean([scores[f"{name}/{row['id']}"] for row in PROMPTS])
    column = cells(out, "all, 12 prompts", name)
    assert column["judged"] == "12/12" and column[SCORE].startswith(f"{score:.2f} [")
    # Control: the whole prompts get other answers.
    own = [row["answer"] for row in read_lines(tmp_path / "eval" / "answers.jsonl")
           if row["answered_by"] == "base"]
    assert len(own) == 12 and own != answers
    prompts = [{"id": "1", "prompt": "Why?"}, {"id": "2", "prompt": "How?", "question": "How?"}]
    code, _, err = run_eval("--bare_question", prompts=prompts)
    assert code == 2 and "prompts.jsonl: no row has a `question` other than its prompt" in err


def test_report_shows_hostile_text_as_text(run_eval, monkeypatch, tmp_path):
    hostile = ("```\n# Heading\n<script>alert(1)</script>\x1b[31m\u2028| a | b |\x85\x0b\x1d"
               "\n\n[x](http://x)")
    monkeypatch.setattr(evaluation, "generate", lambda model, tokenizer, prompts, *rest: [
        Answer(hostile, "stop", [1], [2]) for _ in prompts])
    rows = [{"id": "1", "behaviour": "a | b\n# c <i>\u2028d", "prompt": hostile}]
    assert run_eval(prompts=rows)[0] == 0
    report = (tmp_path / "eval" / "report.md").read_text()
    # All but the two headings is in indented blocks, which Markdown shows as they are.
    unindented = [line for line in report.splitlines() if line and not line.startswith("    ")]
    assert unindented == ["# Evaluation", "## Answers side by side"]
    assert "\n\n    " in report and "    a | b # c <i> d, 1 prompts\n" in report
    assert "<script>" in report.split(unindented[1])[1]
    assert all(letter.isprintable() or letter == "\n" for letter in report)


def test_prompts_that_the_student_has_seen(run_eval, student, write_rows, tmp_path):
    chat = [{"role": "user", "content": PROMPTS[1]["prompt"]}]
    seen = write_rows([{"prompt": PROMPTS[0]["prompt"]}, {"prompt": chat}, {"prompt": "x"}],
                      "seen.jsonl")
    run_args = os.path.join(student, "args.json")
    with open(run_args, "w", encoding="utf-8") as file:
        json.dump({"data": seen}, file)
    code, _, err = run_eval(prompts=PROMPTS[:4])
    with open(run_args, "w", encoding="utf-8") as file:
        json.dump({"data": [seen]}, file)  # as train.py writes it now
    assert run_eval(prompts=PROMPTS[:4]) == (code, _, err)
    with open(run_args, "w", encoding="utf-8") as file:
        file.write("{")
    damaged = run_eval(prompts=PROMPTS[:4])
    os.remove(run_args)
    assert damaged[0] == 2 and f"{run_args}: damaged" in damaged[2]
    assert code == 0 and err.count("\n") == 1
    assert f"warning: 2 of 4 prompts of {tmp_path}/prompts.jsonl are in {seen}" in err
    assert run_eval(prompts=PROMPTS[:4])[2] == ""


ADDRESS = ("--base_url", "http://127.0.0.1:9", "--judge_model", "m")


@pytest.mark.parametrize("flags, message", [
    (("--model", "missing/folder/here"), "--model missing/folder/here: no such folder"),
    (("--base_model", "missing/folder/here"), "missing/folder/here: no such folder"),
    (("--prompts", "missing.jsonl"), "missing.jsonl: No such file"),
    (("--model", "a", "a"), "names a folder twice"),
    (("--base_url", "http://127.0.0.1:9"), "--judge_model"),
    (ADDRESS, "needs --task"),
    ((*ADDRESS, "--task", TASK, "--key_env", "NO_SUCH_VARIABLE"),
     "no key in that environment variable"),
    ((*ADDRESS, "--endpoint", "/score", "--pairwise"), "not --endpoint"),
    (("--self_refine",), "--self_refine needs --task and --prompts"),
    (("--out_dir", TASK), "is a file"),
    (("--curves", "missing"), "missing/args.json: No such file"),
])
def test_bad_input_is_one_line_before_anything_is_computed(flags, message, run_eval, monkeypatch,
                                                           tmp_path):
    monkeypatch.delattr(evaluation, "generate")
    monkeypatch.chdir(tmp_path)
    code, out, err = run_eval(*flags)
    assert code == 2 and message in err and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


def test_bad_prompts_and_tasks_are_one_line(run_eval, write_rows, tmp_path, base):
    with open(TASK, encoding="utf-8") as file:
        without_pairwise = file.read().split("pairwise =")[0]
    no_pairwise = write_rows(without_pairwise, "task.toml")
    half_pairwise = write_rows(without_pairwise + 'pairwise = "{question} {first}"', "half.toml")
    same_id = [{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}]
    for flags, prompts, message in (
            ((), [PROMPTS[0], PROMPTS[0]], "prompts.jsonl:2: the id"),
            ((), same_id, ":2: the id"),
            ((), [{"prompt": ""}], "prompts.jsonl:1: no `prompt`"),
            ((*ADDRESS, "--task", no_pairwise, "--pairwise"), PROMPTS, "no `judge.pairwise`"),
            (("--task", half_pairwise), PROMPTS,
             "`judge.pairwise` must hold {question}, {first} and {second}")):
        code, _, err = run_eval(*flags, prompts=prompts)
        assert code == 2 and message in err and err.count("\n") == 1, err
    chat, other = [{"id": 1, "prompt": [{"role": "user", "content": "Hello!"}]}], tmp_path / "other"
    for template, tokens, message in (
            (None, [], "its tokenizer has no chat template"),
            ("{{ raise_exception('no users') }}", [],
             "its chat template refuses the prompt of row 1: no users"),
            (None, ["another"], "its vocabulary is not that of --base_model")):
        shutil.rmtree(other, ignore_errors=True)
        base.save_pretrained(other)
        tokenizer = load_tokenizer(TOY_STUDENT)
        tokenizer.chat_template = template
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(other)
        code, _, err = run_eval("--model", other, prompts=chat)
        assert code == 2 and message in err and str(other) in err and err.count("\n") == 1, err


def test_curves_of_runs(run_train, run_stage, toy_rows, write_rows, tmp_path, monkeypatch):
    path = write_rows(toy_rows[:30])
    code, _, err = run_train("--data", path, "--max_steps", 2, "--max_new_tokens", 2,
                             "--out_dir", tmp_path / "a")
    assert code == 0, err
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    code, out, err = run_stage(evaluation, "--curves", "a", "b", "--out_dir", "pictures")
    assert (code, out) == (0, "pictures/curves.png\n"), err
    assert (tmp_path / "pictures" / "curves.png").stat().st_size > 20_000
    assert run_stage(evaluation, "--curves", "a")[1] == "eval/curves.png\n"
    for content, message in (("{", "damaged"), ("[]", "not a JSON object"),
                             ("{}", "not the flags")):
        (tmp_path / "b" / "args.json").write_text(content)
        code, _, err = run_stage(evaluation, "--curves", "a", "b")
        assert code == 2 and err.startswith(f"error: b/args.json: {message}"), err
        assert err.count("\n") == 1 and "the out_dir of a run of train.py" in err
