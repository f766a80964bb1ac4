"""The whole CUDA path, on a machine without a GPU: each run on a pretended device.

tests/fakecuda/device.py says what that can show and what not.
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.cpp_extension import include_paths, library_paths

from infra.models import TOY_STUDENT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    torch.version.cuda is not None, reason="needs PyTorch's CPU build: CUDA's has a guard already")]
HERE = os.path.join(ROOT, "tests", "fakecuda")
WAITS_PER_STEP = 2  # for the metrics and the gradient norm; and one for the check at step 0


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    assert shutil.which("g++"), "the dry run compiles tests/fakecuda/guard.cpp: install g++"
    path = str(tmp_path_factory.mktemp("guard") / "guard.so")
    options = [f"-I{folder}" for folder in include_paths()]
    options += [f"-L{folder}" for folder in library_paths()]
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", os.path.join(HERE, "guard.cpp"),
                    *options, "-lc10", "-ltorch_cpu", "-o", path], check=True)
    return path


@pytest.fixture
def dry_run(guard, tmp_path, toy_rows, write_rows):
    """Runs train.py with flags, then other commands: (exit code, output, report)."""
    data = write_rows(toy_rows[:14])

    def dry_run(flags, *others, patch=""):
        # A model that is named shows 3 answers, the bundled one 160.
        train = ["train.py", "--data", data, "--model", TOY_STUDENT, "--learning_rate", 3e-4,
                 "--batch_size", 4, "--tokens_per_batch", 150, "--max_steps", 3, "--eval_every", 3,
                 "--max_new_tokens", 3, "--out_dir", tmp_path / "out",
                 "--ref_cache_dir", tmp_path / "cache", *flags]
        commands = [list(map(str, command)) for command in (train, *others)]
        report = tmp_path / "report.json"
        done = subprocess.run(
            [sys.executable, os.path.join(HERE, "device.py"), guard, report, json.dumps(commands),
             patch], cwd=ROOT, text=True, input="How do I wreck the ladder?\n",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert report.exists(), done.stdout
        return done.returncode, done.stdout, json.loads(report.read_text())

    return dry_run


def check(result, steps):
    """That a run of so many steps would neither fail on CUDA nor wait more than it must."""
    code, out, report = result
    assert report["faults"] == [], out
    assert code == 0, out
    assert "on cuda in" in out and "one answer per row" not in out
    assert report["steps"] == steps
    in_step = [wait for wait in report["waits"] if wait["stage"] == "step"]
    told = "\n".join(f"{wait['count']} x {wait['what']}: {wait['where']}" for wait in in_step)
    assert not any("pageable" in wait["what"] for wait in in_step), told
    assert 0 < sum(wait["count"] for wait in in_step) <= WAITS_PER_STEP * steps + 1, told
    # transformers waits when a token ends: is any answer unfinished, is anything padded.
    in_generation = [wait for wait in report["waits"] if wait["stage"] == "generation"]
    told = "\n".join(f"{wait['count']} x {wait['what']}: {wait['where']}" for wait in in_generation)
    assert max(wait["count"] for wait in in_generation) <= report["tokens"], told
    assert all(" > " in wait["where"] for wait in in_generation), told  # none of the project's own


@pytest.mark.parametrize("flags", [
    "--dtype float16", "--dtype bfloat16 --lora_rank 4",
    "--dtype bfloat16 --lora_rank 4 --gradient_checkpointing",
    "--dtype bfloat16 --lora_rank 4 --gradient_checkpointing --base_bits 4"])
def test_training(dry_run, flags):
    check(dry_run(flags.split()), 3)


STOPPED = """
import signal, train
rate = train.learning_rate
def stopped(step, *others):
    if step == 1:
        signal.raise_signal(signal.SIGINT)
    return rate(step, *others)
train.learning_rate = stopped
"""


def test_resumed_training_then_answers(dry_run, tmp_path, write_rows):
    code, out, report = dry_run(["--dtype", "bfloat16"], patch=STOPPED)
    assert code == 130 and "stopped after step 2" in out and report["faults"] == [], out
    with open(os.path.join(ROOT, "toy", "held_out.jsonl"), encoding="utf-8") as file:
        prompts = write_rows("".join(file.readlines()[:6]), "prompts.jsonl")
    result = dry_run(
        ["--dtype", "bfloat16", "--resume"],
        ["eval.py", "--prompts", prompts, "--model", tmp_path / "out", "--temperature", 1,
         "--max_new_tokens", 12, "--out_dir", tmp_path / "eval"],
        ["sample.py", "--model", tmp_path / "out", "--max_new_tokens", 12])
    check(result, 1)
    assert "from step 2" in result[1] and "degenerate %" in result[1] and "> " in result[1]


INDEX_STAYS = """
import data
to = data.Batch.to
data.Batch.to = lambda batch, device: data.dataclasses.replace(
    to(batch, device), hidden_index=batch.hidden_index)
"""
WIDE_MASK = """
import rdpo
mask = rdpo.attention_mask
rdpo.attention_mask = lambda *arguments: mask(*arguments).float()
"""
NARROW_MASK = """
import rdpo
mask = rdpo.attention_mask
rdpo.attention_mask = lambda *arguments: mask(*arguments).contiguous()
"""
COPIES = """
import data, infra.distributed
data.send = infra.distributed.send = lambda tensor, device: tensor.to(device)
"""


@pytest.mark.parametrize("patch, message", [
    (INDEX_STAYS, "on the same device, but found cuda:0 and cpu: index_select with a CPU tensor"),
    (WIDE_MASK, "an attention mask of torch.float32 where q has torch.bfloat16"),
    (NARROW_MASK, "make CUDA copy it"), (COPIES, "x a copy from pageable memory: data.py")],
    ids=["index", "wide mask", "narrow mask", "pageable"])
def test_control(dry_run, patch, message):
    result = dry_run(["--dtype", "bfloat16", "--max_steps", 1], patch=patch)
    with pytest.raises(AssertionError) as caught:
        check(result, 1)
    assert message in str(caught.value)
