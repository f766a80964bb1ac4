"""One writer per output, and a full disk: each ends in one line, and nothing is lost."""
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_one_line, read_lines

import eval as evaluation
import teacher
from infra.command import BadInput
from infra.files import only_writer
from toy import world

PROMPTS = world.make_prompts("train", 12, seed=5)
TASK = os.path.join(ROOT, "toy", "task.toml")


def teacher_command(url, prompts, out):
    return ["--task", TASK, "--prompts", prompts, "--out", str(out), "--base_url", url,
            "--model", "toy", "--concurrency", "1"]


def start(*command, **options):
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "teacher.py"), *command],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(path):
    end = time.monotonic() + 20
    while not os.path.exists(path) or not os.path.getsize(path):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_run_on_the_same_file_says_who_holds_it(
        toy_server, write_rows, tmp_path, run_stage):
    out, url = tmp_path / "out.jsonl", toy_server("--latency", 0.03)
    command = teacher_command(url, write_rows(PROMPTS), out)
    first = start(*command)
    wait_for(out)
    assert_one_line(run_stage(teacher, *command), out, f"process {first.pid} on")
    printed, _ = first.communicate(timeout=30)
    assert "12 of 12 rows" in printed
    assert sorted(row["id"] for row in read_lines(out)) == sorted(row["id"] for row in PROMPTS)
    assert set(os.listdir(tmp_path)) == {"out.jsonl", "rows.jsonl"}  # no lock stays


def test_the_lock_of_a_killed_run_is_free(toy_server, write_rows, tmp_path, run_stage):
    out, url = tmp_path / "out.jsonl", toy_server("--latency", 0.03)
    command = teacher_command(url, write_rows(PROMPTS), out)
    first = start(*command)
    wait_for(out)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (tmp_path / "out.jsonl.lock").exists()
    code, printed, err = run_stage(teacher, *command)
    assert code == 0 and "12 of 12 rows" in printed, err
    assert len(read_lines(out)) == 12 and not (tmp_path / "out.jsonl.lock").exists()


def test_a_lock_that_its_holder_removed_in_between_is_not_taken(tmp_path, monkeypatch):
    """Another process may open the file, which its holder then removes, before it locks it."""
    path = str(tmp_path / "out")
    lock = "infra.files.fcntl.flock"
    monkeypatch.setattr(lock, lambda *_: os.remove(path + ".lock"))
    with pytest.raises(BadInput, match="writes to it"), only_writer(path):
        pass


def test_train_and_eval_leave_what_another_run_writes_alone(
        run_train, run_stage, tmp_path, toy_rows, write_rows):
    rows, out = write_rows(toy_rows[:24]), tmp_path / "out"
    with only_writer_of(tmp_path / "out" / "run"):
        assert_one_line(run_train("--data", rows), out, "process", "writes to it")
        assert os.listdir(out) == ["run.lock"]
    assert run_train("--data", rows, "--max_steps", 1)[0] == 0
    before = {name: os.stat(out / name).st_mtime_ns for name in os.listdir(out)}
    assert "run.lock" not in before
    for flag in ("--resume", "--overwrite"):
        with only_writer_of(out / "run"):
            assert_one_line(run_train("--data", rows, "--max_steps", 1, flag), "writes to it")
    assert before == {name: os.stat(out / name).st_mtime_ns for name in os.listdir(out)}
    with only_writer_of(tmp_path / "eval" / "answers.jsonl"):
        result = run_stage(evaluation, "--model", out, "--prompts", write_rows(PROMPTS, "p.jsonl"),
                           "--out_dir", tmp_path / "eval", "--max_new_tokens", 1)
        assert_one_line(result, "answers.jsonl", "writes to it")


def only_writer_of(path):
    path.parent.mkdir(exist_ok=True)
    return only_writer(str(path))


def test_a_refused_run_leaves_no_folder(run_train, tmp_path, write_rows):
    assert_one_line(run_train("--data", write_rows([{"prompt": 3}])), "rows.jsonl:1")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()  # the user's own, maybe mounted there
    assert_one_line(run_train("--data", write_rows([{"prompt": 3}])), "rows.jsonl:1")
    assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_keeps_the_finished_rows(toy_server, write_rows, tmp_path, run_stage):
    out = tmp_path / "out.jsonl"
    command = teacher_command(toy_server(), write_rows(PROMPTS), out)
    limited = start(*command, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (3000, 3000)))
    _, err = limited.communicate(timeout=30)
    assert limited.returncode == 1 and "Traceback" not in err
    assert err == "error: File too large; make room, then give the same command again " \
                  "(train.py: with --resume)\n"
    finished = out.read_bytes().count(b"\n")
    assert 0 < finished < 12
    code, printed, err = run_stage(teacher, *command)
    assert code == 0 and f"12 of 12 rows ({finished} from before)" in printed, err
    assert len(read_lines(out)) == 12
