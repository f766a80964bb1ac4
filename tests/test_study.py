"""The study's parts, and its claim on a small scale: the sign of the score keeps rDPO right."""
import dataclasses
import io
import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import rdpo
import train
from infra import plots
from infra.command import BadInput
from toy import study, world


@pytest.fixture(scope="module")
def small():
    """The study on fewer prompts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("TRAINING", 320), ("VALIDATION", 40), ("TEST", 80)):
            patch.setattr(study, name, count)
        yield


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    study.make_drafts(0, str(path))
    return path


@pytest.fixture(scope="module")
def drafts(folder):
    return json.loads((folder / "drafts-0.json").read_text())


def gap(row):
    """The rewrite's true advantage."""
    return world.score(row["prompt"], row["chosen"]) - world.score(row["prompt"], row["rejected"])


def test_splits_share_no_prompt_and_the_test_has_its_own_slot_values():
    splits = {split: {row["prompt"] for row in study.prompts_of(split, 3)}
              for split in ("training", "validation", "test")}
    assert not splits["training"] & splits["validation"]

    def values(prompts):
        return {value for prompt in prompts for value in world.parse(prompt)["slots"].values()}

    assert not values(splits["test"]) & values(splits["training"] | splits["validation"])


def test_failures_come_at_their_rate_and_make_the_rewrite_no_better(drafts):
    rows, failures = study.prompts_of("training", 0), study.World(failures=0.4)
    perfect = study.training_rows(rows, drafts, study.World(), 0)
    failing = study.training_rows(rows, drafts, failures, 0)
    changed = [row for row, before in zip(failing, perfect)
               if (row["rejected"], row["chosen"]) != (before["rejected"], before["chosen"])]
    assert 0.3 < len(changed) / len(rows) < 0.5
    assert statistics.fmean(map(gap, changed)) < -0.5 < 1 < statistics.fmean(map(gap, perfect))
    assert failing == study.training_rows(rows, drafts, failures, 0)
    assert failing != study.training_rows(rows, drafts, failures, 1)


def test_systematic_failures_are_on_every_second_frame_only(drafts):
    rows = study.prompts_of("training", 0)
    none = study.World(noise=0.0, bias=0.0)
    systematic = dataclasses.replace(none, failures=0.4, systematic=True)
    perfect = study.training_rows(rows, drafts, none, 0)
    failing = study.training_rows(rows, drafts, systematic, 0)
    frames = [world.parse(row["prompt"])["frame"] % 2 for row, before in zip(failing, perfect)
              if row["chosen"] != before["chosen"]]
    assert set(frames) == {1} and 0.3 < len(frames) / len(rows) < 0.5


def test_the_scorer_errs_in_three_ways():
    row = next(row for row in world.make_prompts("train", 200, seed=0)
               if row["behaviour"] == "roleplay" and world.parse(row["prompt"])["press"] == "role")
    rng = random.Random(0)
    honest, role = (world.revise(row["prompt"], rng, kind) for kind in ("good", "tie"))

    def score(answer, noise, bias, seed=1):
        return world.flawed_score(row["prompt"], answer, random.Random(seed), noise, bias)

    assert (score(honest, 0, 0), score(role, 0, 0)) == (5, 1)
    assert score(role, 0, 2) >= 3  # charm
    assert score(role, 0, 6) > score(honest, 0, 6) - 1  # so much of it that the ranking is lost
    noisy = [score(role, 1.0, 0, seed) for seed in range(400)]
    assert 0.7 < statistics.stdev(noisy) < 1.1
    assert all(0 <= value <= 5 and value * 2 == int(value * 2) for value in noisy)


def test_scores_stay_with_their_texts_and_test_scores_are_exact(drafts):
    conditions = study.World(failures=0.4, noise=0.0, bias=0.0)
    for row in study.training_rows(study.prompts_of("training", 0), drafts, conditions, 0):
        for name in ("chosen", "rejected"):
            exact = round(2 * world.score(row["question"], row[name])) / 2
            assert row[f"score_{name}"] == min(max(exact, 0), 5)
    for row in study.test_rows(study.prompts_of("test", 0), drafts, 0):
        assert row["score_chosen"] == world.score(row["prompt"], row["chosen"])


def test_interval_is_students():
    mean, half = study.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.9633, abs=1e-3)  # 2.776 * 1.5811 / sqrt(5)


def test_finished_runs_are_not_run_again(tmp_path):
    jobs = [study.Run("DPO", study.World(), 1e-4, seed, "test") for seed in (0, 1)]
    lines = [{"code": study.CODE, "job": dataclasses.asdict(job), "result": {"score": 3.0}}
             for job in jobs]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = study.finish(jobs, str(tmp_path), None, work=None)  # None: not called
    assert results == {job: {"score": 3.0} for job in jobs}


def test_each_finished_run_is_printed_before_the_next_one_ends(tmp_path, monkeypatch):
    written = io.BytesIO()  # has only what was flushed
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    jobs = [study.Run("rDPO", study.SYSTEMATIC, 4e-4, seed, "test") for seed in (0, 1, 2)]
    seen = []

    def work(job, out_dir):
        end = time.monotonic() + 5
        while written.getvalue().count(b"\n") < job.seed and time.monotonic() < end:
            time.sleep(0.01)
        seen.append(written.getvalue().decode().count("\n"))
        return {"score": 3.0 + job.seed / 4}

    with ThreadPoolExecutor(1) as pool:
        study.finish(jobs, str(tmp_path), pool, work)
    assert seen == [0, 1, 2]
    assert written.getvalue().decode().splitlines() == [
        f"run {n} of 3: rDPO, failing 40%, systematic, learning rate 0.0004, seed {n - 1}: "
        f"score {score}" for n, score in ((1, "3.00"), (2, "3.25"), (3, "3.50"))]


def test_runs_of_other_code_are_run_again(tmp_path, monkeypatch):
    path = str(tmp_path / "runs.jsonl")
    job = study.Run("DPO", study.World(), 1e-4, 0, "test")
    with ThreadPoolExecutor(1) as pool:
        study.finish([job], str(tmp_path), pool, lambda job, out_dir: {"score": 3.0})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"code": "torn')
    assert study.finished_runs(path) == {json.dumps(dataclasses.asdict(job)): {"score": 3.0}}
    monkeypatch.setattr(study, "CODE", "the hash after an edit of rdpo.py")
    assert study.finished_runs(path) == {} == study.finished_runs(path + ".none")
    with open(path, encoding="utf-8") as file:
        assert len(file.readlines()) == 1


@pytest.mark.slow
def test_rdpo_withstands_a_misleading_teacher_and_a_wrong_sign_does_not(folder, monkeypatch):
    monkeypatch.setattr(train, "have_matplotlib", train.have_matplotlib)  # the study changes it
    jobs = {method: study.Run(method, study.SYSTEMATIC, 8e-4, 0, "test")
            for method in ("DPO", "rDPO")}
    results = {method: study.train_and_measure(job, str(folder)) for method, job in jobs.items()}

    def right(results):
        better = {name: results["rDPO"][name] - results["DPO"][name] for name in results["DPO"]}
        return better["score"] > 0.3 and better["ranked"] > 0.05

    assert right(results), results
    monkeypatch.setattr(train, "judged_tau", lambda *judged: 1 - rdpo.judged_tau(*judged))
    wrong = study.train_and_measure(jobs["rDPO"], str(folder))
    assert not right(results | {"rDPO": wrong}), wrong


def test_rows_with_the_better_answer_first_and_a_fitted_temperature(drafts):
    from toy import tau_study
    rows = study.training_rows(study.prompts_of("training", 0), drafts,
                               study.World(failures=0.4, step=0.0), 0)
    turned = tau_study.better_first(rows)
    assert all(tau_study.gap(row) >= 0 for row in turned)
    for row, other in zip(rows, turned):
        assert {row["chosen"], row["rejected"]} == {other["chosen"], other["rejected"]}
        assert abs(tau_study.gap(row)) == abs(tau_study.gap(other))
    assert turned != rows and 0 < len(tau_study.decided(rows)) <= len(rows)
    whole = study.training_rows(study.prompts_of("training", 0), drafts, study.World(step=1.0), 0)
    assert len(tau_study.decided(whole)) < len(tau_study.decided(rows))
    (*_, temperature), same = tau_study.calibrated(rows, 0)
    assert same is rows and 0.3 < float(temperature) < 5


# ------------------------------------------------------------------------------- curves of a run


def test_curves_are_named_and_without_matplotlib_the_remedy_is(tmp_path, monkeypatch):
    (tmp_path / "args.json").write_text('{"beta": 0.1, "data": [], "model": null}')
    metrics = dict.fromkeys(("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen",
                             "rewards/rejected", "logps/chosen", "logps/rejected"), 0.5)
    lines = [{"step": 1} | metrics, {"step": 1} | {"eval/" + name: 0.5 for name in metrics}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "curves.png"
    assert plots.draw_curves([str(tmp_path)], str(path)) == f"curves in {path}"
    assert path.stat().st_size > 10_000
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="^curves need matplotlib: pip install matplotlib$"):
        plots.draw_curves([str(tmp_path)], str(path))
    assert plots.NO_CURVES == "curves need matplotlib: pip install matplotlib"
