"""The files of a training run, one function at a time. Whole runs are in test_train.py."""
import copy
import json
import os
import pickle

import pytest
import torch
from conftest import random_pairs, read_lines, tiny_model

import train
from infra import checkpoint
from infra.command import BadInput
from infra.lora import add_lora
from infra.models import sample_weights
from infra.rounding import Masters


def args_of(folder, *flags):
    return train.get_args(["--data", "none", "--out_dir", str(folder), *map(str, flags)])


@pytest.mark.parametrize("content, flags, message", [
    ([], [], None), (["args.json"], ["--resume"], None), (["args.json"], ["--overwrite"], None),
    (None, ["--resume"], None), (None, ["--overwrite"], None), ([], ["--resume"], None),
    (["args.json"], [], "holds an earlier run"), (["letter"], [], "holds no run"),
    (["letter"], ["--resume"], "holds no run"), (["letter"], ["--overwrite"], "holds no run"),
    (["args.json"], ["--resume", "--beta", 0.3], "--beta is 0.3, but the run in .* has 0.1"),
    (["args.json"], ["--resume", "--seed", 1, "--warmup_ratio", 0, "--beta", 0.3, "--epochs", 2,
                     "--batch_size", 3, "--save_every", 3], "--batch_size is 3"),
    ("a file", ["--overwrite"], "holds no run"),
    (["args.json"], ["--resume", "--save_every", 3, "--ref_cache_dir", "c", "--skip_saved_check"],
     None),
    (["args.json"], ["--overwrite", "--beta", 0.3], None)], ids=str)
def test_out_dir_is_new_or_holds_the_run_to_continue_or_to_delete(
        tmp_path, content, flags, message):
    folder = tmp_path / "out"
    if content == "a file":
        folder.write_text(content)
    elif content is not None:
        folder.mkdir()
        for name in content:
            (folder / name).write_text(json.dumps(vars(args_of(folder)) | {"older": 1}))
    if message:
        with pytest.raises(BadInput, match=message):
            checkpoint.check_out_dir(args_of(folder, *flags))
    else:
        checkpoint.check_out_dir(args_of(folder, *flags))
    if folder.is_dir():
        assert os.listdir(folder) == (content or [])


@pytest.mark.parametrize("is_there", [False, True])
def test_a_run_that_fails_early_leaves_no_folder_behind_but_the_users_own(tmp_path, is_there):
    folder = tmp_path / "out"
    if is_there:
        folder.mkdir()
    with pytest.raises(RuntimeError), checkpoint.only_run_in(args_of(folder)):
        raise RuntimeError
    assert folder.exists() == is_there


def test_out_dir_is_not_the_students_own(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for out_dir in (tmp_path, tmp_path / "link"):
        with pytest.raises(BadInput, match="--model's own folder"):
            checkpoint.check_out_dir(args_of(out_dir, "--model", tmp_path))


def run_in(folder, *flags, parts=(None, None, None), data=None):
    """The Run of an out_dir, with (masters, optimizer, scaler)."""
    data = data or train.Dataset(random_pairs(3), True, *torch.ones(5, 3))
    return checkpoint.Run(args_of(folder, *flags), *parts, data, "these weights")


def test_metrics_go_on_after_the_step_that_was_saved(tmp_path, monkeypatch):
    def steps(first_step, *flags):
        """The steps in the log after a run that begins at first_step has logged one."""
        run = run_in(tmp_path, *flags)
        monkeypatch.setattr(run, "load", lambda: first_step)
        assert run.begin() == (first_step if "--resume" in flags else 0)
        run.log(step=first_step + 1)
        return [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")]

    assert steps(2, "--resume") == [3]  # somebody has deleted the files
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}}}\n' for i in range(6)) + '{"s')
    assert steps(3, "--resume") == [0, 1, 2, 3, 4]
    (tmp_path / "curves.png").write_text("")
    assert steps(0, "--resume") == [1] and (tmp_path / "curves.png").exists()
    assert steps(0, "--overwrite") == [1] and not (tmp_path / "curves.png").exists()
    (tmp_path / "new").mkdir()
    run_in(tmp_path / "new", "--overwrite").begin()
    written = json.loads((tmp_path / "args.json").read_text())
    assert written["overwrite"] is True and written["torch"] == torch.__version__


def student_of(model, dtype):
    return checkpoint.student_weights(model, Masters(model, torch.float32, 0), dtype, seed=0)


def test_the_largest_number_of_a_dtype_can_be_saved_and_no_larger_one():
    model, top = tiny_model(), torch.finfo(torch.float16).max
    weight = model.base_model.norm.weight
    weight.data[0] = top
    assert student_of(model, torch.float16)["model.norm.weight"][0] == top
    weight.data[0] = 2 * top
    with pytest.raises(BadInput, match="float16 cannot hold the weights of model.norm.weight;"):
        student_of(model, torch.float16)


def test_buffers_are_saved_as_they_are():
    model = tiny_model()
    model.register_buffer("bound", torch.tensor([float("inf"), 1 / 3]))
    saved = student_of(model, torch.float16)["bound"]
    assert saved.dtype == torch.float32 and torch.equal(saved, model.bound)


@pytest.mark.parametrize("flags", [[], ["--lora_rank", 2, "--save_adapter"]], ids=str)
def test_an_export_leaves_out_what_a_killed_one_left(tmp_path, toy_tokenizer, flags):
    args, model = args_of(tmp_path, *flags), tiny_model()
    if flags:
        add_lora(model, 2, 4.0)
    (tmp_path / "saving.tmp").mkdir()
    (tmp_path / "saving.tmp" / "half").write_text("half")
    checkpoint.export(model, Masters(model, torch.float32, 0), toy_tokenizer, torch.float32,
                      sample_weights(dict(model.named_parameters())), args)
    name = "adapter_model.safetensors" if flags else "model.safetensors"
    assert name in os.listdir(tmp_path) and "half" not in os.listdir(tmp_path)
    assert "saving.tmp" not in os.listdir(tmp_path)


def test_a_state_takes_the_place_of_older_and_of_half_written_ones(tmp_path):
    def parts():
        masters = torch.nn.Linear(3, 2)
        return masters, torch.optim.AdamW(masters.parameters()), torch.amp.GradScaler("cpu")

    masters, optimizer, scaler = parts()
    masters(torch.ones(3)).sum().backward()
    optimizer.step()
    scaler.load_state_dict(scaler.state_dict() | {"scale": 8.0})
    state = tmp_path / "state"
    for name in [f"step-{i:08d}" for i in range(9, 0, -1)] + ["step-00000010.tmp"]:
        (state / name).mkdir(parents=True)
        (state / name / "junk").write_text("half")
    assert checkpoint.newest_state(state) == os.path.join(state, "step-00000009")
    run_in(tmp_path, parts=(masters, optimizer, scaler)).save(10)
    assert os.listdir(state) == ["step-00000010"]
    assert sorted(os.listdir(state / "step-00000010")) == ["model.safetensors", "training.pt"]
    other = parts()
    assert run_in(tmp_path, parts=other).load() == 10
    assert torch.equal(other[0].weight, masters.weight) and other[2].get_scale() == 8
    moments = [each.state_dict()["state"][0]["exp_avg"] for each in (optimizer, other[1])]
    assert torch.equal(*moments) and moments[0].any()
    with pytest.raises(BadInput, match="other rows"):
        run_in(tmp_path, parts=parts(), data=train.Dataset(
            random_pairs(2), True, *torch.ones(5, 2))).load()
    assert run_in(tmp_path / "missing", parts=parts()).load() == 0


class Evil:
    """Pickled, it is a call of mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_state_is_data_and_never_runs_code(tmp_path):
    state, run = tmp_path / "state" / "step-00000001", run_in(tmp_path)
    state.mkdir(parents=True)
    torch.save({"data": run.data_hash, "step": Evil(tmp_path / "run")}, state / "training.pt")
    with pytest.raises((BadInput, pickle.UnpicklingError)):
        run.load()
    assert not (tmp_path / "run").exists()


def test_the_hash_of_a_runs_data_changes_with_each_of_its_parts():
    def data(change=lambda pair: None, tau=0.25, weight=1.0, reference=-9.0):
        pairs = copy.deepcopy(random_pairs(3))
        change(pairs[1])
        logps, ones = torch.full((3,), reference), torch.ones(3)
        return train.Dataset(pairs, True, logps, logps, torch.tensor([0.5, tau, 1.0]), ones,
                             weight * ones)

    others = [data(tau=0.26), data(weight=0.5)]
    others += [data(lambda pair, name=name: getattr(pair, name).append(5))
               for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    hashes = [checkpoint.content_hash(other, "weights") for other in [data(), *others]]
    assert len({*hashes, checkpoint.content_hash(data(), "other weights")}) == 7
    # The reference's numbers, which another machine may round otherwise, have its name.
    assert checkpoint.content_hash(data(reference=-9.1), "weights") == hashes[0]
