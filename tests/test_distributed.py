"""Several processes against one: torchrun with gloo on the CPU, from the start over a death to the resumed finish."""
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_pairs, read_lines, read_metrics
from safetensors.torch import load_file
from test_train import wait_for_step, without_clock

import parallel
import train

# 58 pairs, 9 a step: the last step of an epoch has 4, and with 3 processes one of them may have one. Micro-batches of one or two pairs.
FLAGS = ["--max_steps", "12", "--batch_size", "9", "--save_every", "3", "--eval_every", "4", "--tokens_per_batch", "150", "--max_new_tokens", "4",
         "--learning_rate", "1e-4"]


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory, toy_rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(f"{train.json.dumps(row)}\n" for row in toy_rows[:64]), encoding="utf-8")
    return str(path)


@pytest.fixture
def start(tmp_path, rows_path):
    """Starts train.py with a number of processes; out_dir is a name in tmp_path. It dies with the test."""
    running = []

    def start(processes, out, *flags):
        command = ["train.py", "--data", rows_path, "--out_dir", str(tmp_path / out), "--cache_dir", str(tmp_path / f"cache-{out}"), *FLAGS, *flags]
        launcher = [sys.executable] if processes == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        running.append(subprocess.Popen(launcher + command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True))
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
    return [int(line) for line in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]


def equal_runs(one, other):
    """Whether two runs have the losses, norms and metrics of each other, line by line, and close final weights."""
    lines = list(zip(without_clock(one), without_clock(other), strict=True))
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    return all(line == pytest.approx(same, abs=1e-5, rel=1e-5) for line, same in lines) and weights.keys() == others.keys() and all(
        torch.allclose(weights[name].float(), others[name].float(), atol=1e-3, rtol=0.01) for name in weights)


@pytest.mark.parametrize("flags, processes_after", [([], 3), (["--fsdp"], 3), (["--fsdp", "--lora_rank", "4"], 2)], ids=["ddp", "fsdp", "lora_fsdp"])
def test_two_processes_one_dies_and_the_resumed_run_equals_one_process(start, tmp_path, flags, processes_after):
    alone = start(1, "alone", *[flag for flag in flags if flag != "--fsdp"])
    process = start(2, "several", *flags)
    wait_for_step(tmp_path / "several", 5, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "SIGKILL" in err and "--resume goes on from the last state" in err
    assert not (tmp_path / "several" / "model.safetensors").exists()
    again = start(processes_after, "several", *flags, "--resume")
    out = finish(again)
    assert "from step" in out and out.count("student saved") == 1  # only one process prints
    finish(alone)
    assert equal_runs(tmp_path / "alone", tmp_path / "several")
    # Control: another learning rate is another run.
    lines = without_clock(tmp_path / "several")
    assert lines[1]["loss"] == pytest.approx(0.6931, abs=1e-4) and lines[-2]["loss"] < 0.692


@pytest.mark.parametrize("flags", [["--learning_rate", "1e-3"], ["--lora_rank", "4", "--learning_rate", "1e-2"]], ids=["fsdp", "lora_fsdp"])
def test_sharded_in_16_bits_learns_as_one_process_does(start, tmp_path, flags):
    finish(start(1, "alone", "--dtype", "bfloat16", *flags))
    finish(start(2, "several", "--dtype", "bfloat16", "--fsdp", *flags))
    (steps, held_out), (others, held_out_too) = map(read_metrics, (tmp_path / "alone", tmp_path / "several"))
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in others], abs=0.01)
    assert held_out[-1]["eval/loss"] == pytest.approx(held_out_too[-1]["eval/loss"], abs=0.01)
    assert held_out[0]["eval/loss"] - held_out[-1]["eval/loss"] > 0.02  # control: there was something to learn


def test_lora_on_two_processes_with_dropout_leaves_an_adapter(start, tmp_path):
    out = finish(start(2, "out", "--lora_rank", "4", "--lora_dropout", "0.1", "--save_adapter", "--gradient_checkpointing"))
    assert "29,184 parameters are trained, 5.38 % of 542,016" in out and "adapter saved" in out
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(weights) == 2 * 4 * 7 and all(weight.any() for weight in weights.values())
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("whom", ["torchrun", "one process"])
def test_sigterm_saves_and_stops_all_processes_after_the_same_step(start, tmp_path, whom):
    process = start(2, "out", "--fsdp", "--save_every", "1000", "--max_steps", "5000")
    wait_for_step(tmp_path / "out", 5, process)
    os.kill(process.pid if whom == "torchrun" else workers(process)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    step = read_lines(tmp_path / "out" / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {step}, saved" in out and os.listdir(tmp_path / "out" / "state") == [f"step-{step:08d}"]
    assert whom == "torchrun" or "exitcode  : 143" in err


def test_a_loss_that_is_not_finite_stops_all_processes_and_keeps_the_last_state(start, tmp_path):
    process = start(2, "out", "--learning_rate", "1e30", "--save_every", "1")
    _, err = process.communicate(timeout=60)
    message = next(line for line in err.splitlines() if line.startswith("error: "))
    assert process.returncode == 1 and "rows.jsonl:" in message and "the last good state is in" in message and err.count("error: step") == 1
    failed = int(message.split("step ")[1].split(":")[0])
    assert os.listdir(tmp_path / "out" / "state") == [f"step-{failed - 1:08d}"]


def test_bad_input_is_said_once(start):
    process = start(2, "out", "--beta", "-1")
    _, err = process.communicate(timeout=60)
    assert err.count("error: --beta must be above 0") == 1
    process = start(1, "out", "--fsdp")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.startswith("error: --fsdp needs torchrun") and err.count("\n") == 1


def test_a_full_disk_leaves_the_state_before_whole(run_train, tmp_path, rows_path, monkeypatch):
    flags = ["--data", rows_path, "--max_steps", 6, "--save_every", 2, "--max_new_tokens", 4]
    run_train(*flags, "--out_dir", tmp_path / "straight")
    save, limits = train.save_state, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(folder, step, *rest):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        save(folder, step, *rest)

    monkeypatch.setattr(train, "save_state", full)
    try:
        with pytest.raises(Exception, match="File too large"):
            run_train(*flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert "step-00000002" in os.listdir(tmp_path / "out" / "state") and "step-00000004" not in os.listdir(tmp_path / "out" / "state")
    code, out, _ = run_train(*flags, "--resume")
    assert code == 0 and "from step 2" in out and without_clock(tmp_path / "out") == without_clock(tmp_path / "straight")


def test_a_full_disk_in_one_process_ends_all_and_leaves_the_state_before_whole(start, tmp_path):
    process = start(2, "out", "--fsdp", "--max_steps", "5000", "--save_every", "20")
    wait_for_step(tmp_path / "out", 25, process)
    resource.prlimit(workers(process)[1], resource.RLIMIT_FSIZE, (1000, 1000))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "File too large" in err and "--resume goes on from the last state" in err
    (whole,) = (name for name in os.listdir(tmp_path / "out" / "state") if not name.endswith(".tmp"))
    last = read_lines(tmp_path / "out" / "metrics.jsonl")[-1]["step"]
    assert whole == f"step-{last - 20:08d}"
    process = start(2, "out", "--fsdp", "--max_steps", "5000", "--save_every", "20", "--resume")
    wait_for_step(tmp_path / "out", last + 5, process)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert f"from step {last - 20}" in out


def test_pairs_are_dealt_out_whole_and_evenly(monkeypatch):
    pairs = random_pairs(23)
    for count in (1, 2, 3, 30):
        monkeypatch.setattr(parallel, "process", lambda count=count: (0, count))
        shares = parallel.deal(pairs, range(23), 100, True)
        assert sorted(i for share in shares for batch in share for i in batch) == list(range(23))
        assert len(shares) == count and len({len(share) for share in shares}) == 1  # the same number of rounds
        assert max(map(len, map(lambda share: sum(share, []), shares))) <= 23 // count + 1


@pytest.mark.parametrize("flags", [["--lora_alpha", 8], ["--save_adapter"], ["--lora_rank", -1], ["--lora_rank", 2, "--lora_dropout", 1], ["--fsdp", "--compile"]])
def test_flags_that_do_not_go_together_are_refused(run_train, rows_path, flags):
    code, _, err = run_train("--data", rows_path, *flags)
    assert code == 2 and err.startswith("error: --") and err.count("\n") == 1


def test_a_lora_run_is_resumed_to_the_bit_with_dropout(run_train, tmp_path, rows_path, monkeypatch):
    flags = ["--data", rows_path, "--max_steps", 4, "--save_every", 2, "--lora_rank", 2, "--lora_dropout", 0.2, "--max_new_tokens", 4,
             "--eval_every", 4]
    assert run_train(*flags, "--out_dir", tmp_path / "straight")[0] == 0
    gather, calls = train.of_all_processes, []  # called by the evaluation before the first step, then by each step

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise RuntimeError("died")
        return gather(*arguments)

    monkeypatch.setattr(train, "of_all_processes", dies)
    with pytest.raises(RuntimeError):
        run_train(*flags)
    monkeypatch.undo()
    code, out, _ = run_train(*flags, "--resume")
    assert code == 0 and "from step 2" in out
    assert without_clock(tmp_path / "out") == without_clock(tmp_path / "straight")
    steps, _ = read_metrics(tmp_path / "out")
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
