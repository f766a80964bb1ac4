"""The files of a training run: out_dir, the state to resume from, and the student at the end.

    out_dir/args.json                 the flags; a resumed run must repeat them
    out_dir/metrics.jsonl             one line per step, one per evaluation
    out_dir/state/step-00000100/      float32 weights and moments, written whole or not at all
    out_dir/model.safetensors, ...    the student as a Hugging Face folder, or an adapter
"""
import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
import signal
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException
from transformers import AutoModelForCausalLM

import infra.distributed as ranks
from infra.command import BadInput, first_line
from infra.files import atomic_write, make_folder, only_writer, writing
from infra.lora import merged, save_adapter
from infra.models import TOY_STUDENT, sample_weights, share_changed
from infra.rounding import DROPPED_BITS, stochastic_round
from infra.rows import read_flags
from infra.templates import stop_ids

# ----------------------------------------------------------------------------------------- out_dir

# Flags that a resumed run may change: they change neither the data nor the weights.
FREE_TO_CHANGE = {"resume", "overwrite", "save_every", "save_dtype", "skip_saved_check",
                  "ref_cache_dir", "max_new_tokens"}


@contextlib.contextmanager
def only_run_in(args):
    """Check out_dir, create it and hold its lock. If nothing was written, it is removed again."""
    is_new = not os.path.exists(args.out_dir)
    check_out_dir(args)
    if ranks.rank() > 0:
        yield
        return
    make_folder("--out_dir", args.out_dir)  # or fail now, before anything is computed
    try:
        with only_writer(os.path.join(args.out_dir, "run")):
            yield
    finally:
        if is_new and not os.listdir(args.out_dir):
            os.rmdir(args.out_dir)


def check_out_dir(args):
    """BadInput unless out_dir is new, or holds a run that --resume or --overwrite names."""
    out_dir, path = args.out_dir, os.path.join(args.out_dir, "args.json")
    args.date = datetime.date.today().isoformat()  # for chat templates that write it
    is_new = not os.path.exists(out_dir) or (  # a run that was killed early leaves its lock
        os.path.isdir(out_dir) and set(os.listdir(out_dir)) <= {"run.lock"})
    is_model = args.model and os.path.realpath(args.model) == os.path.realpath(out_dir)
    if is_model:
        raise BadInput(f"--out_dir {out_dir}: that is --model's own folder; give another --out_dir")
    if not is_new and not os.path.exists(path):
        raise BadInput(f"--out_dir {out_dir}: exists and holds no run of train.py; give another "
                       "--out_dir")
    if not is_new and not args.resume and not args.overwrite:
        raise BadInput(f"--out_dir {out_dir}: holds an earlier run; add --resume to continue it or "
                       "--overwrite to delete it")
    if not is_new and args.resume:
        before = read_flags(out_dir, "another --out_dir, or --overwrite to begin again")
        if args.tokens_per_batch is None:  # what fitted then
            args.tokens_per_batch = before.get("tokens_per_batch")
        args.date = before.get("date", args.date)
        for name in sorted(before.keys() & vars(args).keys() - FREE_TO_CHANGE):
            if vars(args)[name] != before[name]:
                raise BadInput(f"--{name} is {vars(args)[name]}, but the run in {out_dir} has "
                               f"{before[name]}; repeat its flags, or give another --out_dir")


def cut_log(path, last_step):
    """Take the lines after a step out of a log: what a killed run did later is computed again."""
    lines = []
    if last_step and os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line for number, line in enumerate(file, 1) if line.endswith("\n")
                     and logged_step(line, f"{path}:{number}") <= last_step]
    atomic_write(path, "".join(lines))


def logged_step(line, where):
    """The step of a line of a log. BadInput if the line is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{where}: damaged ({first_line(error)}); delete this line") from error


# --------------------------------------------------------------------------- the run and its state


class Run:
    """A run's flags, log and states in out_dir: what is needed to continue it."""

    def __init__(self, args, masters, optimizer, scaler, data, reference_name):
        """data is the train.Dataset; a state belongs to it and to the reference of that name."""
        self.args, self.masters, self.optimizer, self.scaler = args, masters, optimizer, scaler
        self.folder = os.path.join(args.out_dir, "state")
        self.data_hash = content_hash(data, reference_name)

    def begin(self):
        """Load the newest state under --resume and open the log. Returns the first step."""
        first_step = self.load() if self.args.resume else 0
        ranks.barrier()  # all ranks have checked out_dir and loaded its state
        path, out_dir = os.devnull, self.args.out_dir
        if ranks.rank() == 0:
            for name in os.listdir(out_dir) if self.args.overwrite else ():
                before = os.path.join(out_dir, name)
                if os.path.isdir(before) and not os.path.islink(before):
                    shutil.rmtree(before)
                elif name != "run.lock":
                    os.remove(before)
            text = json.dumps(vars(self.args) | {"torch": torch.__version__}, indent=1)
            atomic_write(os.path.join(out_dir, "args.json"), text)
            path = os.path.join(out_dir, "metrics.jsonl")
            cut_log(path, first_step)
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # flush whole lines
        return first_step

    def log(self, **values):
        """Write a line to metrics.jsonl. JSON has no inf: a gradient that overflows is null."""
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps(numbers) + "\n")

    def save(self, step):
        """Write a state to folder/step-N, then delete older ones.

        The folder is written under another name, then renamed. Under FSDP each rank writes its own
        shards; otherwise rank 0 writes all.
        """
        name, is_writer = f"step-{step:08d}", ranks.rank() == 0
        temporary = os.path.join(self.folder, f"{name}.tmp")
        state = {"step": step, "scaler": self.scaler.state_dict(), "data": self.data_hash}
        if is_writer:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
        if self.args.fsdp:
            ranks.barrier()
            ranks.save_shards(temporary, self.masters, self.optimizer)
        elif is_writer:
            with writing(temporary):
                save_file(self.masters.state_dict(), os.path.join(temporary, "model.safetensors"))
            state["optimizer"] = self.optimizer.state_dict()
        if is_writer:
            with writing(temporary), open(os.path.join(temporary, "training.pt"), "wb") as file:
                torch.save(state, file)
            os.rename(temporary, os.path.join(self.folder, name))
            for other in os.listdir(self.folder):
                if other != name:
                    shutil.rmtree(os.path.join(self.folder, other))
        ranks.barrier()

    def load(self):
        """Load the newest state in place. Returns its step, 0 if there is none.

        BadInput if it belongs to other rows or another model, or is damaged.
        """
        path = newest_state(self.folder)
        if path is None:
            return 0
        try:
            # map_location: else every rank would load rank 0's GPU tensors onto that GPU.
            state = torch.load(os.path.join(path, "training.pt"), map_location="cpu",
                               weights_only=True)
            if state["data"] != self.data_hash:
                raise BadInput(f"{self.folder}: the saved run had other rows, targets or weights "
                               "of --model; give the same --data and --model, or another --out_dir")
            if self.args.fsdp:
                ranks.load_shards(path, self.masters, self.optimizer)
            else:
                self.masters.load_state_dict(load_file(os.path.join(path, "model.safetensors")))
                self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            return state["step"]
        except torch.OutOfMemoryError:
            raise
        except UNREADABLE as error:
            raise BadInput(f"{path}: damaged ({type(error).__name__}); delete it: --resume then "
                           "begins with the state before it, or with step 0") from error

    def stopped(self, step, signal_number):
        """End the process after a signal, by the usual exit code."""
        print(f"stopped after step {step}, saved; the same command with --resume continues")
        ranks.cleanup()
        raise SystemExit(128 + signal_number)


def content_hash(data, reference_name):
    """Hash of what a resumed run must train on: token ids, what the judge said, the reference.

    Every tensor of the Dataset counts but the reference's log-probabilities, whose name stands for
    them, and which another machine may round otherwise.
    """
    ids = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in data.pairs]
    numbers = [value.tolist() for name, value in data._asdict().items()
               if torch.is_tensor(value) and not name.startswith("ref_")]
    return hashlib.sha256(repr([ids, numbers, reference_name]).encode()).hexdigest()


def newest_state(folder):
    """Path of the newest whole state, or None."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = [name for name in names if not name.endswith(".tmp")]
    return os.path.join(folder, names[-1]) if names else None


# What torch, pickle and safetensors raise for files that are cut, empty, missing or not theirs.
UNREADABLE = (CheckpointException, EOFError, LookupError, OSError, RuntimeError, SafetensorError,
              TypeError, UnpicklingError, ValueError)


class StopSignal:
    """Catches Ctrl-C and SIGTERM, so that the loop ends after its step and saves.

    number is the signal's, 0 before. A second signal ends a single process at once. With several
    ranks it does not: a terminal and torchrun both send the first one.
    """

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, _):
        self.number = number
        if ranks.world_size() == 1:
            signal.signal(number, signal.SIG_DFL)


# ----------------------------------------------------------------------------------------- student


def student_weights(policy, masters, dtype, seed):
    """{name: tensor} of the student as it is saved, in dtype on the CPU; {} on FSDP's other ranks.

    Adapters are merged. 16-bit weights are rounded stochastically; those on the grid stay, as the
    model's do under a 16-bit compute dtype. Buffers keep their dtype. Tied weights appear once.
    BadInput if dtype cannot hold a weight.
    """
    weights, student, too_large = ranks.full_state_dict(policy), {}, []
    if dtype not in DROPPED_BITS:  # wider: the masters, not their rounded copies
        weights |= {name.replace("/", "."): master
                    for name, master in ranks.full_state_dict(masters).items()}
    buffers = {name for name, _ in policy.named_buffers()}
    for name, tensor in merged(policy, weights):
        if name in policy.all_tied_weights_keys:
            continue
        if name not in buffers and not tensor.abs().max() <= torch.finfo(dtype).max:  # or nan
            too_large.append(name)
        if name not in buffers and dtype in DROPPED_BITS and tensor.dtype != dtype:
            tensor = stochastic_round(tensor.float(), dtype, seed, "save", name)
        # Copied, because Masters' weights are views of one tensor, which safetensors refuses.
        student[name] = tensor.to("cpu", None if name in buffers else dtype, copy=True)
    too_large = ranks.broadcast(too_large)  # FSDP's other ranks have no weights to look at
    if too_large:
        raise BadInput(f"--save_dtype: {str(dtype)[6:]} cannot hold the weights of "
                       f"{', '.join(too_large[:3])}; the same command with --resume and a wider "
                       "--save_dtype saves the student")
    return student


def export(policy, masters, tokenizer, dtype, weights_before, args):
    """Save the student in dtype as a Hugging Face folder, or its adapter in PEFT's format.

    Every file is written aside, then moved. Returns the line to print.
    """
    weights = (ranks.full_state_dict(policy) if args.save_adapter
               else student_weights(policy, masters, dtype, args.seed))
    if ranks.rank() > 0:
        return ""
    aside = os.path.join(args.out_dir, "saving.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    if args.save_adapter:
        with writing(aside):
            save_adapter(policy, weights, aside, args.model or TOY_STUDENT)
        report = "adapter saved"
    else:
        changed = 100 * share_changed(weights_before, sample_weights(weights))
        report = f"student saved ({changed:.1f} % of its weights changed)"
        with torch.device("meta"):  # a plain model without storage: no adapters, no shards
            plain = AutoModelForCausalLM.from_config(policy.config, dtype=dtype)
        plain.generation_config = policy.generation_config
        plain.generation_config.eos_token_id = stop_ids(tokenizer, policy.generation_config)
        with writing(aside):
            plain.save_pretrained(aside, state_dict=weights)  # which empties weights
    tokenizer.save_pretrained(aside)
    for name in os.listdir(aside):
        os.replace(os.path.join(aside, name), os.path.join(args.out_dir, name))
    os.rmdir(aside)
    return report
