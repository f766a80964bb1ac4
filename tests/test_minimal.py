"""minimal.py, the slow and obvious trainer, beside train.py."""
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_metrics
from safetensors.torch import load_file

import train
from infra.models import TOY_STUDENT, load_model

STEPS = 5


@pytest.fixture
def minimal(tmp_path, toy_rows, write_rows):
    """(path of the rows, printed losses, saved weights, output) of minimal.py on a few rows."""
    path = write_rows(toy_rows[:16 * STEPS - 5])
    process = subprocess.run([sys.executable, "minimal.py", str(path), str(tmp_path / "minimal")],
                             cwd=ROOT, capture_output=True, text=True, check=True)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", process.stdout)]
    return path, losses, load_file(tmp_path / "minimal" / "model.safetensors"), process.stdout


def trained_alike(minimal, run_train, out_dir, eval_path):
    """Whether train.py has the same losses, step by step, and close weights."""
    path, losses, weights, _ = minimal
    code, _, err = run_train("--data", path, "--eval_data", eval_path, "--out_dir", out_dir,
                             "--save_dtype", "float32")
    assert code == 0, err
    steps, _ = read_metrics(out_dir)
    assert len(steps) == len(losses) == STEPS
    others, start = load_file(out_dir / "model.safetensors"), dict(
        load_model(TOY_STUDENT).named_parameters())
    assert weights.keys() == others.keys()
    apart, moved = (torch.cat([(weights[name] - to[name]).detach().flatten() for name in weights])
                    for to in (others, start))
    return (all(abs(step["loss"] - loss) < 1e-5 for step, loss in zip(steps, losses))
            and apart.norm() < 0.01 * moved.norm())


def test_minimal_has_the_losses_of_train_and_with_tau_1_it_has_not(
        minimal, run_train, toy_rows, write_rows, tmp_path, monkeypatch):
    assert "before: " in minimal[3] and "after:  " in minimal[3]
    eval_path = write_rows(toy_rows[200:210], "eval.jsonl")
    assert trained_alike(minimal, run_train, tmp_path / "same", eval_path)
    monkeypatch.setattr(train, "judged_tau", lambda gaps, *_: torch.ones_like(gaps))
    assert not trained_alike(minimal, run_train, tmp_path / "other", eval_path)
