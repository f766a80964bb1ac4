"""The study's parts, and its claim on a small scale: with a teacher that fails, the score's sign is what keeps rDPO right."""
import dataclasses
import json
import random
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest

import rdpo
import train
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
    study.make_drafts(0, str(path / "drafts-0.json"))
    return path


@pytest.fixture(scope="module")
def drafts(folder):
    return json.loads((folder / "drafts-0.json").read_text())


def gap(row):
    """How much better the rewrite really is."""
    return world.score(row["prompt"], row["chosen"]) - world.score(row["prompt"], row["rejected"])


def test_no_prompt_stands_in_two_splits_and_the_test_has_slot_values_of_its_own():
    splits = {split: {row["prompt"] for row in study.prompts_of(split, 3)} for split in ("training", "validation", "test")}
    assert not splits["training"] & splits["validation"]
    values = lambda prompts: {value for prompt in prompts for slot, value in world.parse(prompt)["slots"].items()}
    assert not values(splits["test"]) & (values(splits["training"]) | values(splits["validation"]))


def test_failures_come_at_their_rate_and_make_the_rewrite_no_better(drafts):
    rows = study.prompts_of("training", 0)
    perfect = study.training_rows(rows, drafts, study.World(), 0)
    failing = study.training_rows(rows, drafts, study.World(failures=0.4), 0)
    changed = [row for row, before in zip(failing, perfect) if (row["rejected"], row["chosen"]) != (before["rejected"], before["chosen"])]
    assert 0.3 < len(changed) / len(rows) < 0.5
    assert statistics.fmean(map(gap, changed)) < -0.5 < 1 < statistics.fmean(map(gap, perfect))
    assert failing == study.training_rows(rows, drafts, study.World(failures=0.4), 0) != study.training_rows(rows, drafts, study.World(failures=0.4), 1)


def test_systematic_failures_stand_on_every_second_frame_only(drafts):
    rows = study.prompts_of("training", 0)
    conditions = study.World(failures=0.4, noise=0.0, bias=0.0)
    perfect = study.training_rows(rows, drafts, dataclasses.replace(conditions, failures=0.0), 0)
    failing = study.training_rows(rows, drafts, dataclasses.replace(conditions, systematic=True), 0)
    frames = [world.parse(row["prompt"])["frame"] % 2 for row, before in zip(failing, perfect) if row["chosen"] != before["chosen"]]
    assert set(frames) == {1} and 0.3 < len(frames) / len(rows) < 0.5


def test_the_scorer_errs_in_three_ways():
    row = next(row for row in world.make_prompts("train", 200, seed=0) if row["behaviour"] == "roleplay" and world.parse(row["prompt"])["press"] == "role")
    rng = random.Random(0)
    honest, role = world.revise(row["prompt"], rng, "good"), world.revise(row["prompt"], rng, "tie")
    score = lambda answer, noise, bias: world.flawed_score(row["prompt"], answer, random.Random(1), noise, bias)
    assert (score(honest, 0, 0), score(role, 0, 0)) == (5, 1)
    assert score(role, 0, 2) >= 3  # charm
    assert score(role, 0, 6) > score(honest, 0, 6) - 1  # so much of it that the ranking is lost
    noisy = [world.flawed_score(row["prompt"], role, random.Random(seed), 1.0, 0) for seed in range(400)]
    assert 0.7 < statistics.stdev(noisy) < 1.1 and all(0 <= value <= 5 and value * 2 == int(value * 2) for value in noisy)


def test_scores_stay_with_their_texts_and_test_scores_are_exact(drafts):
    conditions = study.World(failures=0.4, noise=0.0, bias=0.0)
    for row in study.training_rows(study.prompts_of("training", 0), drafts, conditions, 0):
        exact = [min(max(round(2 * world.score(row["question"], row[name])) / 2, 0), 5) for name in ("chosen", "rejected")]
        assert [row["score_chosen"], row["score_rejected"]] == exact
    for row in study.test_rows(study.prompts_of("test", 0), drafts, 0):
        assert row["score_chosen"] == world.score(row["prompt"], row["chosen"])


def test_interval_is_students():
    mean, half = study.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.9633, abs=1e-3)  # 2.776 * 1.5811 / sqrt(5)


def test_finished_runs_are_not_run_again(tmp_path):
    path = tmp_path / "runs.jsonl"
    jobs = [study.Run("DPO", study.World(), 1e-4, seed, "test") for seed in (0, 1)]
    finished = {json.dumps(dataclasses.asdict(job)): {"score": 3.0} for job in jobs}
    assert study.finish(jobs, finished, path, None, str(tmp_path), None) == {job: {"score": 3.0} for job in jobs}  # None cannot be called


def test_runs_of_other_code_are_run_again(tmp_path, monkeypatch):
    path, job = str(tmp_path / "runs.jsonl"), study.Run("DPO", study.World(), 1e-4, 0, "test")
    with ThreadPoolExecutor(1) as pool:
        study.finish([job], {}, path, lambda job, out_dir: {"score": 3.0}, str(tmp_path), pool)
    with open(path, "a") as file:
        file.write('{"code": "torn')
    assert study.finished_runs(path) == {json.dumps(dataclasses.asdict(job)): {"score": 3.0}}
    monkeypatch.setattr(study, "CODE", "as it is after an edit of rdpo.py")
    assert study.finished_runs(path) == {} and len(open(path).readlines()) == 1 and study.finished_runs(path + ".none") == {}


def test_rdpo_withstands_a_teacher_that_misleads_dpo_and_a_wrong_sign_does_not(folder, monkeypatch):
    monkeypatch.setattr(train, "have_matplotlib", train.have_matplotlib)  # which a run of the study changes: it is put back afterwards
    jobs = {method: study.Run(method, study.SYSTEMATIC, 8e-4, 0, "test") for method in ("DPO", "rDPO")}
    results = {method: study.train_and_measure(job, str(folder)) for method, job in jobs.items()}
    right = lambda result: result["rDPO"]["score"] - result["DPO"]["score"] > 0.3 and result["rDPO"]["ranked"] - result["DPO"]["ranked"] > 0.05
    assert right(results), results
    monkeypatch.setattr(train, "preference_probability", lambda *scores_and_temperature: 1 - rdpo.preference_probability(*scores_and_temperature))
    wrong = study.train_and_measure(jobs["rDPO"], str(folder))
    assert not right(results | {"rDPO": wrong}), wrong
