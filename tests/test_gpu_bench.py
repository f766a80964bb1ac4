"""bench/gpu.py: the whole script on a CPU with tiny models, and how it counts and skips."""
import argparse
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from bench import gpu


def make_bench(folder, seconds=1e6):
    return gpu.Bench(argparse.Namespace(device="cpu", tiny=True, out_dir=str(folder),
                                        seconds=seconds))


def test_a_failed_check_is_counted_and_the_next_one_runs(tmp_path, capsys):
    def breaks(bench):
        raise ValueError("broken\non purpose")

    def measures_a_wrong_number(bench):
        bench.expect(False, "1 is not 2")
        return {"figure": 1}

    def catches_its_control(bench):
        return bench.control(True)

    def cannot(bench):
        raise gpu.Skip("no card")

    bench = make_bench(tmp_path)
    for function in (breaks, measures_a_wrong_number, catches_its_control, cannot):
        bench.run(gpu.Check("correctness", function.__name__, function))
    bench.args.seconds = 0
    bench.run(gpu.Check("correctness", "late", breaks))
    assert bench.failed == 2
    lines = [json.loads(line) for line in
             (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    results = [line["result"] for line in lines]
    assert results[:4] == ["failed: ValueError: broken", "failed: 1 is not 2", "passed",
                           "skipped: no card"]
    assert results[4].startswith("skipped: takes about 15 s")
    output = capsys.readouterr()
    assert "measures_a_wrong_number: failed" in output.out and "on purpose" in output.err
    assert [line.get("figure") for line in lines] == [None, 1, None, None, None]
    assert "| catches_its_control | 0.0 | passed | control caught |" in (
        tmp_path / "GPU.md").read_text(encoding="utf-8")


def test_a_control_that_is_not_caught_fails_the_check(tmp_path):
    bench = make_bench(tmp_path)
    bench.run(gpu.Check("correctness", "blind", lambda bench: bench.control(False)))
    assert bench.failed == 1 and "control NOT CAUGHT" in (tmp_path / "GPU.md").read_text()


def test_only_selects_by_the_beginning_of_a_check_or_section():
    checks = gpu.all_checks(tiny=False, cuda=True)
    assert len({(check.section, check.name) for check in checks}) == len(checks)
    assert [check.name for check in gpu.selected(checks, "masks,logps")] == ["masks", "logps"]
    assert {check.section for check in gpu.selected(checks, "throughput")} == {"throughput"}
    assert gpu.selected(checks, None) == checks


def test_a_prediction_is_memory_s_by_stage(tmp_path, monkeypatch):
    def printed(command, **_):
        assert command[1:] == [gpu.memory.__file__, "--shape", "8b", "--tokens_per_batch", "2048",
                               "--lora_rank", "16", "--gradient_checkpointing"]
        lines = ("--shape 8b", "    start 17.1, step 18.2, export 17.7, check 16.7: 18.2 GB",
                 "    step: weights 16.1")
        return subprocess.CompletedProcess(command, 0, "\n".join(lines))

    monkeypatch.setattr(subprocess, "run", printed)
    assert make_bench(tmp_path).predict(gpu.SMALL_CARD).result() == {
        "start": 17.1, "training": 18.2, "export": 17.7, "check": 16.7}


def test_ragged_pairs_are_fixed_by_the_seed_and_clipped():
    pairs = gpu.ragged_pairs(200, 50)
    totals = [gpu.batch_tokens(pair, True) for pair in pairs]
    assert pairs == gpu.ragged_pairs(200, 50) and pairs != gpu.ragged_pairs(200, 50, seed=1)
    assert 32 <= min(totals) and max(totals) <= 1024 and 250 < sorted(totals)[100] < 350
    assert all(pair.chosen_ids and pair.rejected_ids for pair in pairs)


@pytest.mark.slow
def test_the_script_passes_on_a_cpu(tmp_path):
    command = [sys.executable, os.path.join(ROOT, "bench", "gpu.py"), "--device", "cpu", "--tiny",
               "--seconds", "3600", "--out_dir", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-5000:]
    table = (tmp_path / "GPU.md").read_text(encoding="utf-8")
    assert table in process.stdout and "NOT CAUGHT" not in process.stdout
    lines = [json.loads(line) for line in
             (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    caught = {line["check"] for line in lines if line.get("control") == "caught"}
    assert caught == {"masks", "logps", "gradients", "rounding", "step-0 gate", "NF4"}
    assert {line["section"] for line in lines} == {"correctness", "throughput", "trl", "memory",
                                                     "4 bits"}
