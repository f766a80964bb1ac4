"""Every command to its end without the modules that Windows lacks: see windows.py."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, read_lines

TASK = os.path.join(ROOT, "toy", "task.toml")


def as_windows(*command, text=None):
    result = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "windows.py"),
                             *map(str, command)], capture_output=True, input=text,
                            cwd=ROOT, encoding="cp1252")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_all_commands_run_without_unix(tmp_path, toy_server, toy_rows, write_rows):
    url = toy_server()
    server = ("--base_url", url, "--model", "toy")
    prompts = write_rows([{key: row[key] for key in ("id", "prompt", "question")}
                          for row in toy_rows[:20]], "prompts.jsonl")
    answers, scored = tmp_path / "synthetic.jsonl", tmp_path / "scored.jsonl"
    as_windows("teacher.py", "--task", TASK, "--prompts", prompts, "--out", answers, *server)
    as_windows("reward.py", "--task", TASK, "--data", answers, "--out", scored, *server)
    assert len(read_lines(scored)) == 20
    assert "20 rows" in as_windows("data.py", scored)
    out = tmp_path / "out"
    flags = ("--data", scored, "--out_dir", out, "--ref_cache_dir", tmp_path / "cache",
             "--save_every", 1)
    assert "student saved" in as_windows("train.py", *flags, "--max_steps", 2)
    steps = [line for line in read_lines(out / "metrics.jsonl") if "loss" in line]
    assert len(steps) == 2 and steps[0]["peak_memory_mib"] is None
    as_windows("train.py", *flags, "--max_steps", 2, "--resume")
    as_windows("train.py", *flags, "--max_steps", 1, "--overwrite")
    as_windows("eval.py", "--prompts", prompts, "--model", out, "--out_dir", tmp_path / "eval",
               "--task", TASK, "--base_url", url, "--judge_model", "toy")
    as_windows("eval.py", "--data", scored, "--model", out, "--out_dir", tmp_path / "pairs")
    prompt = json.loads(open(prompts, encoding="utf-8").readline())["prompt"]
    assert as_windows("sample.py", "--model", out, "--prompt", prompt).strip()
    # The console cannot show this character; the answer comes all the same.
    assert as_windows("sample.py", "--model", out, text="Tea \u2013 or coffee?\n/new\n")


@pytest.mark.slow
def test_a_second_writer_is_refused_without_unix(tmp_path, toy_server, toy_rows, write_rows):
    prompts = write_rows([{"id": row["id"], "prompt": row["prompt"]} for row in toy_rows[:20]])
    command = [sys.executable, os.path.join(ROOT, "tests", "windows.py"), "teacher.py", "--task",
               TASK, "--prompts", prompts, "--out", str(tmp_path / "out.jsonl"), "--base_url",
               toy_server("--latency", 0.3), "--model", "toy", "--concurrency", "1"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lock = tmp_path / "out.jsonl.lock"
    while first.poll() is None and not (lock.exists() and lock.read_text()):
        pass
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2, second.stderr
    assert f"process {first.pid} on" in second.stderr and len(second.stderr.splitlines()) == 1
    first.communicate()
    assert first.returncode == 0
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
