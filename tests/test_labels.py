"""Labels, the temperature fitted to them, and the audit of a run."""
import io
import json
import math
import os
import random

import numpy as np
import pytest
from conftest import assert_one_line, read_lines

import data
from infra import audit, labels
from toy import world

ROWS = [{"id": i, "prompt": f"game {i}", "question": f"question {i}", "chosen": f"new {i}",
         "rejected": f"old {i}", "score_chosen": float(i % 5), "score_rejected": 2.0}
        for i in range(12)]


# ----------------------------------------------------------------------------------------- session


@pytest.fixture
def session(monkeypatch, run_stage, tmp_path):
    """Runs a session: answer(question, first, second) types, as a person reads the screen."""
    def session(path, answer, *flags):
        screen = []

        def typed(_):
            text = "".join(screen)
            parts = text.rsplit("question\n", 1)[1].split("\n1\n")
            first, second = parts[1].split("\n2\n")
            return answer(parts[0].strip(), first.strip(), second.strip())

        monkeypatch.setattr("builtins.input", typed)
        monkeypatch.setattr(labels, "print", lambda text: screen.append(text + "\n"), raising=False)
        result = run_stage(data, path, "--label", tmp_path / "labels.jsonl", *flags)
        return result, "".join(screen)

    return session


def test_labels_say_what_was_typed_whatever_the_order_on_the_screen(session, write_rows, tmp_path):
    order = []

    def prefers_new(question, first, second):
        assert question.startswith("question") and {first[:3], second[:3]} == {"new", "old"}
        order.append(first[:3])
        return "0" if question.endswith("7") else "1" if first.startswith("new") else "2"

    (code, _, err), screen = session(write_rows(ROWS), prefers_new)
    assert code == 0 and "12 labels in" in screen and "12 of 50" in screen, err
    written = read_lines(tmp_path / "labels.jsonl")
    assert {row["prompt"]: row["preferred"] for row in written} == {
        row["prompt"]: "tie" if row["id"] == 7 else "chosen" for row in ROWS}
    assert written[0].keys() == {"prompt", "chosen", "rejected", "preferred"}
    assert 2 < order.count("new") < 10  # blind: both orders occur
    assert [row["prompt"] for row in written] != [row["prompt"] for row in ROWS]


def test_a_session_stops_skips_and_goes_on(session, write_rows, tmp_path):
    path, typed = write_rows(ROWS), iter(["x", "1", "s", "2", "q"])
    (code, _, _), screen = session(path, lambda *shown: next(typed))
    assert code == 0 and "2 labels in" in screen and "the same command goes on" in screen
    before = read_lines(tmp_path / "labels.jsonl")

    def end(*shown):
        raise EOFError

    (code, _, _), screen = session(path, end)
    assert code == 0 and read_lines(tmp_path / "labels.jsonl") == before
    (code, _, _), screen = session(path, lambda *shown: "1", "--limit", 5)
    assert code == 0 and "5 labels in" in screen and "goes on" not in screen
    after = read_lines(tmp_path / "labels.jsonl")
    assert after[:2] == before and len({row["prompt"] for row in after}) == 5


def test_text_of_a_model_cannot_drive_the_terminal(session, write_rows):
    row = ROWS[0] | {"chosen": "\x1b[2Jnew", "rejected": "old"}
    (code, _, _), screen = session(write_rows([row]), lambda *shown: "1")
    assert code == 0 and "\x1b" not in screen


def test_a_file_that_holds_no_labels_is_refused_and_kept(run_stage, write_rows):
    path, other = write_rows(ROWS), write_rows(ROWS, "other.jsonl")
    for flag in ("--label", "--calibrate"):
        assert_one_line(run_stage(data, path, flag, other), "other.jsonl:1", "`preferred` must be")
    assert read_lines(other) == ROWS


# -------------------------------------------------------------------------------------- calibration


def toy_people(seed, temperature, count=100):
    """(gaps, shares): what people with this T say of pairs of the toy world."""
    rng = random.Random(seed)
    gaps = np.array([rng.choice([-1, 1]) * rng.choice([0, 0.5, 1, 1.5, 2, 2.5, 3, 4])
                     for _ in range(count)])
    return gaps, np.array([float(rng.random() < 1 / (1 + math.exp(-gap / temperature)))
                           for gap in gaps])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_simulated_people_is_in_its_interval(temperature):
    inside, bests = 0, []
    for seed in range(200):
        best, low, high = labels.fit_temperature(*toy_people(seed, temperature))
        assert low <= best <= high
        inside += low <= temperature <= high
        bests.append(best)
    assert 182 <= inside <= 198  # 95 % of 200, within 3 sigma and more
    assert np.median(bests) == pytest.approx(temperature, rel=0.1)


def test_the_fit_is_the_minimum_of_the_loss_that_rdpo_trains_with():
    import torch

    import rdpo
    gaps, shares = toy_people(3, 1.5)
    shares[:10] = 0.5  # ties
    best, low, high = labels.fit_temperature(gaps, shares)

    def loss(temperature):  # labels as the policy's side of rDPO's loss, tau from the scores
        tau = rdpo.preference_probability(torch.tensor(gaps), torch.tensor(0.0), temperature)
        return -(torch.tensor(shares) * tau.log() + torch.tensor(1 - shares) * (1 - tau).log()
                 ).mean().item()

    grid = np.geomspace(best / 5, best * 30, 4000)
    losses = np.array([loss(temperature) for temperature in grid])
    assert loss(best) <= losses.min() + 1e-9
    within = grid[(losses - loss(best)) * len(gaps) <= 1.92]
    assert within[0] == pytest.approx(low, rel=0.01) and within[-1] == pytest.approx(high, rel=0.01)


def test_scores_that_say_nothing_or_everything():
    gaps = np.array([1.0, -2.0, 3.0, -1.0] * 10)
    best, low, high = labels.fit_temperature(gaps, (gaps < 0).astype(float))
    assert best == high == math.inf and low > 3  # the person says the opposite
    best, low, high = labels.fit_temperature(gaps, (gaps > 0).astype(float))
    assert best < 1e-3 and 0.2 < high < 2  # always agrees: only an upper bound
    assert labels.fit_temperature(gaps, np.full(40, 0.5))[2] == math.inf  # nothing but ties


def test_kappa():
    assert labels.kappa(["a", "b", "a", "b"], ["a", "b", "a", "b"]) == 1
    assert labels.kappa(["a", "a", "b", "b"], ["a", "b", "a", "b"]) == 0
    ours, theirs = ["a"] * 25 + ["b"] * 25, ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15
    assert labels.kappa(ours, theirs) == pytest.approx(0.4)  # a textbook's table: 20 5 10 15


def test_the_calibration_command(run_stage, run_train, write_rows, toy_rows):
    rng, said = random.Random(0), []
    for row in toy_rows[:150]:
        gap = world.score(row["prompt"], row["chosen"]) - world.score(row["prompt"],
                                                                      row["rejected"])
        wins = rng.random() < 1 / (1 + math.exp(-gap / 2))
        said.append({name: row[name] for name in ("prompt", "chosen", "rejected")}
                    | {"preferred": "tie" if gap == 0 else "chosen" if wins else "rejected"})
    path = write_rows(toy_rows, "scored.jsonl")
    code, out, err = run_stage(data, path, "--calibrate", write_rows(said[:150], "labels.jsonl"))
    assert code == 0, err
    low, high = map(float, out.split("95 % interval ")[1].split(";")[0].split(" to "))
    temperature = float(out.split("--temperature ")[1])
    assert low <= 2 <= high and low < temperature < high
    assert "150 of 150 labels are of scored pairs" in out and "Cohen's kappa 0." in out
    counts = next(line for line in out.splitlines() if line.startswith("  pairs")).split()[1:]
    assert sum(map(int, counts)) == 150
    other = said[0] | {"chosen": "Other text."}
    assert_one_line(run_stage(data, path, "--calibrate", write_rows([other], "none.jsonl")),
                    "none of its 1 labels is of a pair of")


def test_rows_with_tau_are_calibrated_by_their_log_odds(run_stage, write_rows):
    rng, rows, said = random.Random(1), [], []
    for i in range(300):
        tau = rng.uniform(0.02, 0.98)
        odds = math.log(tau / (1 - tau))
        wins = rng.random() < 1 / (1 + math.exp(-odds / 3))  # people are less sure than tau
        rows.append({"prompt": f"p{i}", "chosen": "new", "rejected": "old", "tau": tau})
        said.append(rows[-1] | {"preferred": "chosen" if wins else "rejected"})
    code, out, _ = run_stage(data, write_rows(rows), "--calibrate", write_rows(said, "labels"))
    low, high = map(float, out.split("95 % interval ")[1].split(";")[0].split(" to "))
    assert code == 0 and low <= 3 <= high and low > 1.5


# ------------------------------------------------------------------------------------------- audit


def corrupted(rows, seed, share=0.05):
    """(rows with the scores of a share of them exchanged, names of those)."""
    rows = [dict(row) for row in rows]
    unequal = [i for i, row in enumerate(rows) if row["score_chosen"] != row["score_rejected"]]
    wrong = random.Random(seed).sample(unequal, round(share * len(rows)))
    for i in wrong:
        rows[i]["score_chosen"], rows[i]["score_rejected"] = (rows[i]["score_rejected"],
                                                             rows[i]["score_chosen"])
    return rows, wrong


def test_the_audit_finds_corrupted_scores(run_train, run_stage, write_rows, toy_rows, tmp_path):
    rows, wrong = corrupted(toy_rows, seed=0)
    path = write_rows(rows)
    code, _, err = run_train("--data", path, "--skip_saved_check")
    assert code == 0, err
    lines = audit.last_lines(tmp_path / "out" / "audit.jsonl")
    assert len(lines) == len(rows)
    names = [f"{path}:{i + 1}" for i in wrong]
    first = audit.suspects(lines.values())[:len(wrong)]
    assert sum(line["pair"] in names for line in first) >= 0.8 * len(wrong)
    by_gap = sorted(lines.values(), key=lambda line: -abs(line["gap"]))[:len(wrong)]
    assert sum(line["pair"] in names for line in by_gap) < 0.3 * len(wrong)  # control
    code, out, err = run_stage(data, "--audit", tmp_path / "out")
    assert code == 0, err
    assert "training, 810 pairs" in out and "validation, 90 pairs" in out
    assert out.count(f"{path}:") == 10 and first[0]["pair"] in out
    assert " ".join(rows[int(first[0]["pair"].rsplit(":", 1)[1]) - 1]["chosen"].split()[:5]) in out


def test_audit_lines_are_what_they_say(run_train, write_rows, toy_rows, tmp_path):
    code, _, err = run_train("--data", write_rows(toy_rows[:40]), "--max_steps", 4,
                             "--batch_size", 8, "--eval_every", 2, "--beta", 0.3,
                             "--temperature", 2)
    assert code == 0, err
    lines = read_lines(tmp_path / "out" / "audit.jsonl")
    logged = read_lines(tmp_path / "out" / "metrics.jsonl")
    for line in lines:
        assert line["tau"] == pytest.approx(1 / (1 + math.exp(-line["gap"] / 2)), abs=1e-5)
        assert line["p"] == pytest.approx(1 / (1 + math.exp(-line["margin"])), abs=1e-5)
    for step in (2, 4):
        own = [line for line in lines if line["split"] == "validation" and line["step"] == step]
        (wanted,) = [m for m in logged if m["step"] == step and "eval/loss" in m]
        for name, key in (("margin", "rewards/margins"), ("logp_chosen", "logps/chosen"),
                          ("logp_rejected", "logps/rejected"), ("tau", "tau/mean")):
            mean = sum(line[name] for line in own) / len(own)
            assert mean == pytest.approx(wanted[f"eval/{key}"], abs=1e-4)
    first = [line for line in lines if line["split"] == "training" and line["step"] == 1]
    assert len(first) == 8 and all(abs(line["margin"]) < 1e-5 for line in first)


def test_an_audit_without_scores_or_without_its_rows(run_train, run_stage, write_rows, tmp_path):
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}
            for i in range(30)]
    path = write_rows(rows)
    assert run_train("--data", path, "--loss", "dpo", "--max_steps", 2)[0] == 0
    os.remove(path)
    code, out, err = run_stage(data, "--audit", tmp_path / "out")
    assert code == 0 and "Traceback" not in err
    assert ("its file is not here any more" in out) == ("no scores" in out)


@pytest.mark.parametrize("content, message", [
    (None, "No such file"), ("{}\n", "audit.jsonl:1: no line of an audit.jsonl"),
    ('{"step": 1}\n{"st', "audit.jsonl:1: no line"), ("", "the file is empty")])
def test_a_folder_that_holds_no_audit(run_stage, tmp_path, content, message):
    if content is not None:
        (tmp_path / "audit.jsonl").write_text(content)
    assert_one_line(run_stage(data, "--audit", tmp_path), message)


@pytest.mark.parametrize("argv, message", [
    (["--label", "l"], "give one of three"), (["--calibrate", "l"], "give one of three"),
    (["rows", "--audit", "out"], "give one of three"),
    (["--audit", "out", "--label", "l"], "need a file of rows")])
def test_flags_that_do_not_go_together(run_stage, argv, message):
    assert_one_line(run_stage(data, *argv), message)
