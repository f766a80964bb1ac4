"""Several ranks against one: torchrun with gloo on the CPU, a death, a signal, a full disk."""
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, read_lines, read_metrics
from safetensors.torch import load_file
from test_train import wait_for_step, without_clock

from infra import checkpoint

# 58 pairs, 9 a step: an epoch's last step has 4, so with 3 ranks one of them may have 1.
FLAGS = ["--max_steps", "8", "--batch_size", "9", "--save_every", "3", "--eval_every", "4",
         "--tokens_per_batch", "150", "--max_new_tokens", "2", "--learning_rate", "1e-4"]


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory, toy_rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in toy_rows[:64]), encoding="utf-8")
    return str(path)


@pytest.fixture
def start(tmp_path, rows_path):
    """Starts train.py on a number of ranks; out_dir is a name in tmp_path. Dies with the test."""
    running = []

    def start(ranks, out, *flags):
        command = ["train.py", "--data", rows_path, "--out_dir", str(tmp_path / out),
                   "--ref_cache_dir", str(tmp_path / f"cache-{out}"), *FLAGS, *flags]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        running.append(subprocess.Popen(
            [sys.executable, *(torchrun if ranks > 1 else []), *command], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()  # torchrun ends its processes
            process.communicate()


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def workers(process):
    """The process ids of torchrun's processes."""
    listing = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(line) for line in listing.stdout.split()]


def equal_runs(one, other):
    """Whether two runs have equal metrics, line by line, and close final weights."""
    lines = list(zip(without_clock(one), without_clock(other), strict=True))
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    return (all(line == pytest.approx(same, abs=1e-5, rel=1e-5) for line, same in lines)
            and weights.keys() == others.keys()
            and all((weights[name].float() - others[name].float()).abs().max()
                    <= 1e-3 + 0.01 * others[name].float().abs().max() for name in weights))


@pytest.mark.parametrize("flags, ranks_after", [
    ([], 3), (["--fsdp", "--lora_rank", "4"], 2),
    pytest.param(["--fsdp"], 3, marks=pytest.mark.slow)], ids=["ddp", "fsdp_lora", "fsdp"])
def test_two_ranks_one_dies_and_the_resumed_run_equals_one_process(
        start, tmp_path, flags, ranks_after):
    alone = start(1, "alone", *[flag for flag in flags if flag != "--fsdp"])
    process = start(2, "several", *flags)
    wait_for_step(tmp_path / "several", 4, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "SIGKILL" in err
    assert not (tmp_path / "several" / "model.safetensors").exists()
    out = finish(start(ranks_after, "several", *flags, "--resume"))
    assert "from step" in out and out.count("student saved") == 1  # only rank 0 prints
    finish(alone)
    assert equal_runs(tmp_path / "alone", tmp_path / "several")
    # Control: the run learned something.
    lines = without_clock(tmp_path / "several")
    assert lines[1]["loss"] == pytest.approx(0.6931, abs=1e-4) and lines[-2]["loss"] < 0.6925


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--learning_rate", "1e-3"], ["--lora_rank", "4", "--learning_rate", "1e-2"]],
    ids=["fsdp", "fsdp_lora"])
def test_sharded_in_16_bits_learns_as_one_process_does(start, tmp_path, flags):
    finish(start(1, "alone", "--dtype", "bfloat16", *flags))
    finish(start(2, "several", "--dtype", "bfloat16", "--fsdp", *flags))
    (steps, evals), (others, other_evals) = map(read_metrics, (tmp_path / "alone",
                                                               tmp_path / "several"))
    assert [step["loss"] for step in steps] == pytest.approx(
        [step["loss"] for step in others], abs=0.01)
    assert evals[-1]["eval/loss"] == pytest.approx(other_evals[-1]["eval/loss"], abs=0.01)
    assert evals[0]["eval/loss"] - evals[-1]["eval/loss"] > 0.02  # control: it learned


@pytest.mark.slow
def test_lora_on_two_sharded_ranks_leaves_an_adapter(start, tmp_path):
    out = finish(start(2, "out", "--fsdp", "--lora_rank", "4", "--save_adapter",
                       "--gradient_checkpointing"))
    assert "29,184 of 542,016 parameters are trained, 5.38 %" in out and "adapter saved" in out
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(weights) == 2 * 4 * 7 and all(weight.any() for weight in weights.values())
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("target", [
    "torchrun", pytest.param("one rank", marks=pytest.mark.slow)])
def test_sigterm_saves_and_stops_all_ranks_after_the_same_step(start, tmp_path, target):
    process = start(2, "out", "--fsdp", "--save_every", "1000", "--max_steps", "5000")
    wait_for_step(tmp_path / "out", 5, process)
    os.kill(process.pid if target == "torchrun" else workers(process)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    step = read_lines(tmp_path / "out" / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {step}, saved" in out
    assert os.listdir(tmp_path / "out" / "state") == [f"step-{step:08d}"]
    assert target == "torchrun" or "exitcode  : 143" in err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_a_student_that_is_not_finite_stops_all_ranks(start, tmp_path, flags):
    process = start(2, "out", *flags, "--lora_rank", "2", "--learning_rate", "1e37",
                    "--save_every", "1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count("error: step") == 1
    # Its weights are finite, and saved; the next step's loss is not.
    assert "error: step 2: loss nan" in err and "lower --learning_rate" in err
    assert f"delete {tmp_path}/out/state/step-00000001" in err


@pytest.mark.slow
def test_bad_input_is_said_once(start):
    _, err = start(2, "out", "--beta", "-1").communicate(timeout=60)
    assert err.count("error: --beta: must be above 0") == 1




@pytest.mark.parametrize("function, call, limit, left", [
    ("save", 2, 1_000_000, 2),  # safetensors fails, while it writes the weights
    ("save", 2, 3_000_000, 2),  # torch.save fails, while it writes the moments
    ("export", 1, 1_000_000, 6)], ids=["weights", "moments", "student"])
def test_a_full_disk_leaves_the_state_before_whole(
        run_train, tmp_path, rows_path, monkeypatch, function, call, limit, left):
    flags = ["--data", rows_path, "--max_steps", 6, "--save_every", 2]
    run_train(*flags, "--out_dir", tmp_path / "straight")
    owner = checkpoint.Run if function == "save" else checkpoint
    save, limits = getattr(owner, function), resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        return save(*arguments)

    monkeypatch.setattr(owner, function, full)
    try:
        code, _, err = run_train(*flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert code == 1 and err.startswith("error: File too large; make room") and err.count("\n") == 1
    states = os.listdir(tmp_path / "out" / "state")
    assert [name for name in states if not name.endswith(".tmp")] == [f"step-{left:08d}"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    code, out, _ = run_train(*flags, "--resume")
    assert code == 0 and f"from step {left}" in out
    assert not (tmp_path / "out" / "saving.tmp").exists()
    assert without_clock(tmp_path / "out") == without_clock(tmp_path / "straight")


@pytest.mark.slow
def test_a_full_disk_on_one_rank_ends_all_and_leaves_the_state_before_whole(start, tmp_path):
    flags = ["--fsdp", "--max_steps", "5000", "--save_every", "20"]
    process = start(2, "out", *flags)
    wait_for_step(tmp_path / "out", 25, process)
    resource.prlimit(workers(process)[1], resource.RLIMIT_FSIZE, (1000, 1000))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "File too large" in err
    states = os.listdir(tmp_path / "out" / "state")
    (whole,) = (name for name in states if not name.endswith(".tmp"))
    last = read_lines(tmp_path / "out" / "metrics.jsonl")[-1]["step"]
    assert whole == f"step-{last - 20:08d}"
    process = start(2, "out", *flags, "--resume")
    wait_for_step(tmp_path / "out", last + 5, process)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert f"from step {last - 20}" in out
