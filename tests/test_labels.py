"""Labels, the temperature fitted to them, and the suspects of a student."""
import io
import json
import math
import os
import random
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, read_lines

import data
import eval as evaluation
from infra import labels
from infra.models import TOY_STUDENT, load_model
from infra.report import histogram
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


def test_a_session_stops_skips_and_continues(session, write_rows, tmp_path):
    path, typed = write_rows(ROWS), iter(["x", "1", "s", "2", "q"])
    (code, _, _), screen = session(path, lambda *shown: next(typed))
    assert code == 0 and "2 labels in" in screen and "the same command continues" in screen
    before = read_lines(tmp_path / "labels.jsonl")

    def end(*shown):
        raise EOFError

    (code, _, _), screen = session(path, end)
    assert code == 0 and read_lines(tmp_path / "labels.jsonl") == before
    (code, _, _), screen = session(path, lambda *shown: "1", "--limit", 5)
    assert code == 0 and "5 labels in" in screen and "continues" not in screen
    after = read_lines(tmp_path / "labels.jsonl")
    assert after[:2] == before and len({row["prompt"] for row in after}) == 5


def test_undo_takes_the_last_label_back_also_from_the_file_and_asks_again(
        session, write_rows, tmp_path):
    path, out, asked, on_disk = write_rows(ROWS), tmp_path / "labels.jsonl", [], []

    def type_keys(*keys):
        keys = iter(keys)

        def answer(question, first, second):
            asked.append((question, first, second))
            on_disk.append(out.read_text().count("\n") if out.exists() else 0)
            return next(keys)

        return session(path, answer)[1]

    type_keys("s", "u", "q")
    assert not out.exists()
    asked.clear(), on_disk.clear()
    screen = type_keys("u", "1", "u", "q")  # before any label; then the only one
    assert asked[0] == asked[1] == asked[3] != asked[2] and on_disk == [0, 0, 1, 0]
    assert screen.count("no label of this file to undo\n") == 1 and "0 labels in" in screen
    asked.clear(), on_disk.clear()
    type_keys("1", "2", "s", "u", "0", "q")  # 2 becomes 0; the skipped pair stays skipped
    assert asked[4] == asked[1] and asked[5] == asked[3] and on_disk == [0, 1, 2, 2, 1, 2]
    assert [row["preferred"] for row in read_lines(out)][1] == "tie"
    type_keys("u", "2", "q")  # a label of an earlier session
    assert asked[7] == asked[1] and on_disk[-3:] == [2, 1, 2]
    first, second = read_lines(out)
    assert [row["prompt"] for row in (first, second)] == [
        shown[0].replace("question", "game") for shown in asked[:2]]
    assert second[second["preferred"]] == asked[1][2] and first[first["preferred"]] == asked[0][1]


def test_an_unknown_key_is_told_the_keys(session, write_rows, monkeypatch):
    typed = iter(["x", "", "3", "q"])
    screen = session(write_rows(ROWS), lambda *shown: next(typed))[1]
    keys = "1 or 2; 0: neither; s: skip; u: undo the last label; q: stop and continue later\n"
    assert screen.startswith("Which answer is better? " + keys) and screen.count(keys) == 4
    assert screen.count("1 of 50") == 1


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
        tau = rdpo.preference_probability(torch.tensor(gaps), temperature)
        return -(torch.tensor(shares) * tau.log() + torch.tensor(1 - shares) * (1 - tau).log()
                 ).mean().item()

    grid = np.geomspace(best / 5, best * 30, 4000)
    losses = np.array([loss(temperature) for temperature in grid])
    assert loss(best) <= losses.min() + 1e-5
    within = grid[(losses - loss(best)) * len(gaps) <= 1.92]
    assert within[0] == pytest.approx(low, rel=0.01) and within[-1] == pytest.approx(high, rel=0.01)


def test_scores_that_say_nothing_or_everything():
    gaps = np.array([1.0, -2.0, 3.0, -1.0] * 10)
    best, low, high = labels.fit_temperature(gaps, (gaps < 0).astype(float))
    assert best == high == math.inf and low > 3  # the person says the opposite
    best, low, high = labels.fit_temperature(gaps, (gaps > 0).astype(float))
    assert best < 0.01 and 0.2 < high < 2  # always agrees: only an upper bound
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
    temperature = float(out.split("--tau_temperature ")[1])
    assert low <= 2 <= high and low < temperature < high
    assert "150 of 150 labels are of scored pairs" in out and "Cohen's kappa 0." in out
    counts = next(line for line in out.splitlines() if line.startswith("  pairs")).split()[1:]
    assert sum(map(int, counts)) == 150
    other = said[0] | {"chosen": "Other text."}
    assert_one_line(run_stage(data, path, "--calibrate", write_rows([other], "none.jsonl")),
                    "none of its 1 labels is of a pair of")


def labelled(gaps, said):
    """(scored rows, labels) of pairs with these score gaps, and what a person says of them."""
    rows = [{"prompt": f"p{i}", "chosen": "new", "rejected": "old", "score_chosen": gap,
             "score_rejected": 0} for i, gap in enumerate(gaps)]
    return rows, [row | {"preferred": word} for row, word in zip(rows, said)]


@pytest.mark.parametrize("sizes, bound, advice", [
    ([4] * 40, 1.328, "keep the default T 1"), ([4] * 40 + [0.003], 1.153, "keep the default T 1"),
    ([1] * 40, 0.332, "take train.py --tau_temperature 0.33"),
    ([0.01] * 20, 0.00436, "take train.py --tau_temperature 0.0044"), ([1] * 2, math.inf, None)])
def test_labels_that_all_agree_give_no_temperature_but_a_bound(
        run_stage, write_rows, sizes, bound, advice):
    gaps = [size * (-1) ** i for i, size in enumerate(sizes)]
    rows, said = labelled(gaps, ["chosen" if gap > 0 else "rejected" for gap in gaps])
    code, out, err = run_stage(data, write_rows(rows), "--calibrate", write_rows(said, "labels"))
    assert code == 0 and not err and f"they agree on {len(gaps)} of {len(gaps)}" in out
    assert f"\nT below {bound:.2g} (95 %); loss per label 0.0" in out
    assert "tau at T 1\n" in out and not re.search(r"\de-\d", out)
    if not advice:
        assert out.endswith("too few labels to say anything of T: label more pairs\n")
        return
    assert f"only say that T is below {bound:.2g}: {advice}, or label pairs with closer" in out
    losses = (math.log1p(math.exp(-size / bound)) for size in sizes)  # at T near 0 they are 0
    assert sum(losses) == pytest.approx(1.92, rel=0.01)


def test_scores_that_say_nothing_give_no_temperature(run_stage, write_rows):
    gaps = [1, -2, 3, -1] * 10
    for said in (["rejected" if gap > 0 else "chosen" for gap in gaps], ["tie"] * 40):
        rows, said = labelled(gaps, said)
        paths = write_rows(rows), "--calibrate", write_rows(said, "labels")
        code, out, err = run_stage(data, *paths)
        assert code == 0 and "inf" not in out and "tau_temperature" not in out
        assert re.search(r"\nT above [\d.]+ \(95 %\); loss per label 0.693, at T 1 ", out)
        assert err.startswith("warning: the scores say nothing") and "the judge's replies" in err
    # All ties: the loss is the mean of log cosh(gap / 2T) above that of chance.
    bound = float(out.split("T above ")[1].split()[0])
    excess = sum(math.log(math.cosh(gap / 2 / bound)) for gap in gaps)
    assert excess == pytest.approx(1.92, rel=0.1)


def test_a_temperature_beyond_the_grid_is_none():
    gaps = np.array([1.0, -1.0] * 10_000)  # the person agrees with 5002 of 10000: T 2500
    agrees = np.arange(20_000) % 10_000 < 5_002
    assert labels.fit_temperature(gaps, np.where(agrees, gaps > 0, gaps < 0).astype(float))[::2] \
        == (math.inf, math.inf)
    agrees = np.arange(20_000) % 10_000 < 5_050  # T = 1 / log(5050 / 4950)
    best = labels.fit_temperature(gaps, np.where(agrees, gaps > 0, gaps < 0).astype(float))[0]
    assert best == pytest.approx(1 / math.log(5050 / 4950), rel=0.01)


def test_judges_that_train_py_does_not_mix_are_not_calibrated(run_stage, run_train, write_rows):
    rows, said = labelled([1.0, -1.0] * 10, ["chosen", "tie"] * 10)
    scaled = [row | {"judge": {"model": "m", "scale": [0, 1]}} for row in rows[:10]]
    labels_path = write_rows(said, "labels")
    mixed = write_rows(scaled + rows[10:], "mixed.jsonl")
    refused = run_train("--data", mixed)
    assert_one_line(refused, "scored by an unnamed judge on an unknown scale")
    code, out, err = run_stage(data, mixed, "--calibrate", labels_path)
    assert (code, out, err) == (2, "", refused[2].splitlines(keepends=True)[-1])
    unscored = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows[10:]]
    other_scale = [row | {"judge": {"model": "n", "scale": [0, 9]}} for row in rows[10:]]
    for others in (unscored, other_scale):
        path = write_rows(scaled + others, "fine.jsonl")
        assert run_stage(data, path, "--calibrate", labels_path)[0] == 0


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


# ------------------------------------------------------------------------------- bars of score gaps


def bars(out):
    """{number or "ties": rows} of the histogram that data.py printed."""
    found = re.findall(r"^ +(ties|[+-][\d.e+-]+) +(\d+) #*$", out, re.M)
    return {name if name == "ties" else float(name): int(count) for name, count in found}


def test_the_bars_of_the_toys_gaps_agree_with_their_heading(run_stage, toy_rows):
    gaps = [row["score_chosen"] - row["score_rejected"] for row in toy_rows]
    code, out, err = run_stage(data, f"{ROOT}/toy/scored.jsonl")
    assert code == 0, err
    expected = {"ties": gaps.count(0)}
    for n in range(1, 6):
        expected |= {n: sum(n - 1 < gap <= n for gap in gaps),
                     -n: sum(-n <= gap < 1 - n for gap in gaps)}
    assert bars(out) == expected
    assert f"{gaps.count(0)} ties, {sum(gap < 0 for gap in gaps)} inversions" in out


@pytest.mark.parametrize("gaps, expected", [
    ([0, 0, 0.01, -0.01, 0.04], {"ties": 2, 0.01: 1, 0.02: 0, 0.03: 0, 0.04: 1, -0.01: 1}),
    ([0.3, 0.6, 0.7, 1.1, 2.1, -0.0], {"ties": 1, 0.5: 1, 1: 2, 1.5: 1, 2: 0, 2.5: 1}),
    ([0.1, 0.2, 0.3, 0.4, 0.5, 1e-12], {0.1: 2, 0.2: 1, 0.3: 1, 0.4: 1, 0.5: 1}),
    ([0.2, 0.4, 0.6, 0.8, -0.6], {-0.6: 1, -0.4: 0, -0.2: 0, "ties": 0, 0.2: 1, 0.4: 1, 0.6: 1,
                                  0.8: 1}),
    ([0, 0], {"ties": 2}), ([-7, 12], {-10: 1, -5: 0, "ties": 0, 5: 0, 10: 0, 15: 1})])
def test_a_gap_that_is_no_tie_is_in_no_bar_of_ties(gaps, expected):
    lines = histogram(gaps)
    assert bars("\n".join(lines)) == expected and len(lines) == len(expected)
    assert max(line.count("#") for line in lines) == 40


# ---------------------------------------------------------------------------------------- suspects


def corrupted(rows, seed, share=0.1):
    """(rows with the scores of a share of them exchanged, the indices of those)."""
    rows = [dict(row) for row in rows]
    unequal = [i for i, row in enumerate(rows) if row["score_chosen"] != row["score_rejected"]]
    wrong = random.Random(seed).sample(unequal, round(share * len(rows)))
    for i in wrong:
        rows[i]["score_chosen"], rows[i]["score_rejected"] = (rows[i]["score_rejected"],
                                                             rows[i]["score_chosen"])
    return rows, set(wrong)


def line_number(where):
    return int(where.rsplit(":", 1)[1])


def suspects_in(out):
    """[(file:line, tau or None, p)] of the suspects that eval.py printed."""
    found = re.findall(r"^(\S+:\d+): (?:tau ([\d.]+)|no scores), but p ([\d.]+)$", out, re.M)
    return [(where, float(tau) if tau else None, float(p)) for where, tau, p in found]


@pytest.mark.slow
def test_corrupted_scores_are_the_first_suspects(run_train, run_stage, write_rows, toy_rows,
                                                 tmp_path):
    (rows, wrong), (held_out, wrong_held_out) = (corrupted(toy_rows[:720], 0),
                                                 corrupted(toy_rows[720:], 1))
    path = write_rows(rows)
    code, _, err = run_train("--data", path, "--skip_saved_check")
    assert code == 0, err
    for path, rows, wrong, least in ((path, rows, wrong, 0.8),
                                     (write_rows(held_out, "new.jsonl"), held_out, wrong_held_out,
                                      0.7)):
        code, out, err = run_stage(evaluation, "--data", path, "--model", tmp_path / "out",
                                   "--suspects", len(wrong), "--out_dir", tmp_path / "eval")
        assert code == 0 and f"{len(rows)} pairs, by tau" in out, err
        found = [line_number(where) - 1 for where, _, _ in suspects_in(out)]
        assert len(found) <= len(wrong) and len(wrong & set(found)) >= least * len(wrong)
        # Control: the surest scores alone do not tell.
        gaps = [abs(row["score_chosen"] - row["score_rejected"]) for row in rows]
        by_gap = sorted(range(len(rows)), key=lambda i: -gaps[i])[:len(wrong)]
        assert len(wrong & set(by_gap)) < 0.3 * len(wrong)
        for name in ("prompt", "chosen", "rejected"):  # the texts of the first one
            text = " ".join(rows[found[0]][name].split()[:5])
            assert f"\n{name + ':':10s}{text}" in out.split("are those most likely")[1]
        assert "suspects of" in (tmp_path / "eval" / "report.md").read_text()


def test_suspects_against_plain_python(run_train, run_stage, write_rows, toy_rows, toy_tokenizer,
                                       tmp_path):
    code, _, err = run_train("--data", write_rows(toy_rows[:40]), "--epochs", 2, "--batch_size", 8,
                             "--beta", 0.3, "--tau_temperature", 2)
    assert code == 0, err
    rows, _ = corrupted(toy_rows[40:80], 0, share=0.2)
    path = write_rows(rows, "new.jsonl")
    code, out, err = run_stage(evaluation, "--data", path, "--model", tmp_path / "out",
                               "--suspects", 40, "--out_dir", tmp_path / "eval")
    assert code == 0, err

    @torch.no_grad()
    def logp(model, row, name):
        prompt = toy_tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}],
                                                   tokenize=False, add_generation_prompt=True)
        start, ids = (toy_tokenizer(text, add_special_tokens=False).input_ids
                      for text in (prompt, f"{prompt}{row[name]}<|end|>"))
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(logps[n - 1, ids[n]].item() for n in range(len(start), len(ids)))

    student, base = (load_model(folder) for folder in (tmp_path / "out", TOY_STUDENT))
    wanted = []
    for i, row in enumerate(rows):
        chosen, rejected = (logp(student, row, name) - logp(base, row, name)
                            for name in ("chosen", "rejected"))
        tau = 1 / (1 + math.exp((row["score_rejected"] - row["score_chosen"]) / 2))
        p = 1 / (1 + math.exp(-0.3 * (chosen - rejected)))
        wanted.append(((tau - 0.5) * (chosen - rejected), f"{path}:{i + 1}", tau, p))
    disagree = sorted(line for line in wanted if line[0] < 0)
    found = suspects_in(out)
    assert 3 < len(found) < 20 and f"disagrees on {len(found)} of 40 pairs" in out
    assert [where for where, _, _ in found] == [where for _, where, _, _ in disagree]
    for (_, tau, p), (_, _, wanted_tau, wanted_p) in zip(found, disagree):
        assert (tau, p) == pytest.approx((wanted_tau, wanted_p), abs=0.006)
    high = [(tau, p) for _, _, tau, p in wanted if tau >= 0.8]
    block = [line.split() for line in out.split("40 pairs, by tau")[1].splitlines()[1:4]]
    assert [float(line[-1]) for line in block] == pytest.approx(
        [len(high), *(sum(column) / len(high) for column in zip(*high))], abs=0.006)


def test_suspects_without_scores_and_of_no_run(run_train, run_stage, write_rows, tmp_path):
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}
            for i in range(30)]
    path = write_rows(rows)
    assert run_train("--data", path, "--loss", "dpo", "--max_steps", 2)[0] == 0
    swapped = write_rows([row | {"chosen": row["rejected"], "rejected": row["chosen"]}
                          for row in rows], "swapped.jsonl")
    flags = ("--out_dir", tmp_path / "eval", "--model", tmp_path / "out", "--suspects")
    code, out, err = run_stage(evaluation, "--data", swapped, *flags, 3)
    assert code == 0 and out.count(": no scores, but p 0.") == 3, err
    assert "0.8 to 1.0" in out and "0.4 to 0.6" not in out  # tau is 1
    assert_one_line(run_stage(evaluation, "--text", path, *flags), "--suspects needs --data")
    assert_one_line(run_stage(evaluation, "--data", path, *flags, 0), "--suspects")
    run_flags = tmp_path / "out" / "args.json"
    run_flags.write_text(json.dumps({"beta": 0.1, "data": [path], "model": None}))
    assert_one_line(run_stage(evaluation, "--data", path, *flags), f"{run_flags}: no `tau_temp")
    os.remove(run_flags)
    assert_one_line(run_stage(evaluation, "--data", path, *flags), "args.json: No such file",
                    "the out_dir of a run of train.py")


@pytest.mark.parametrize("argv, message", [
    (["--label", "l"], "give one of two"), (["--calibrate", "l"], "give one of two"),
    (["--label", "l", "--task", "t.toml", "--out", "o"], "need a file of rows")])
def test_flags_that_do_not_go_together(run_stage, argv, message):
    assert_one_line(run_stage(data, *argv), message)
