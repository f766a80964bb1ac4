"""What a training run prints: the plan, the table, peaks of memory."""
import math
import os
import sys

import torch

import infra.distributed as ranks
from infra.models import TOY_STUDENT
from infra.nf4 import frozen_layers

try:
    import resource
except ImportError:  # Windows
    resource = None

COLUMNS = (  # of the table: title, metric of the validation pairs, form
    ("validation: loss", "loss", ".4f"), ("accuracy", "rewards/accuracies", ".2f"),
    ("agrees with scores", "rewards/score_agreement", ".2f"), ("margin", "rewards/margins", "+.2f"),
    ("logp chosen", "logps/chosen", ".1f"), ("rejected", "logps/rejected", ".1f"))
TABLE_HEAD = "  step    loss | " + "  ".join(title for title, _, _ in COLUMNS)


def print_plan(args, policy, train, val, cache, first_step, total_steps, weights, dtype):
    """Print what is trained on what, and the head of the table.

    weights are samples {name: tensor} of the student's, dtype is what they are computed with or
    saved in: under 16 bits a line has the step of its grid beside the learning rate.
    """
    sizes = [(weight.numel(), weight.requires_grad) for weight in policy.parameters()]
    sizes += [(layer.weight.numel(), False) for layer in frozen_layers(policy)]
    total, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
    name = args.model or f"{os.path.relpath(TOY_STUDENT)}, bundled (or --model FOLDER_OR_HUB_ID)"
    if args.lora_rank:
        name += (f", LoRA rank {args.lora_rank}: {trained:,} of {total:,} parameters are trained, "
                 f"{100 * trained / total:.2f} %")
    where = args.device if ranks.world_size() == 1 else f"{ranks.world_size()} x {args.device}"
    where += ", sharded" if args.fsdp else ""
    temperature = f", T {args.tau_temperature:g}" if args.loss == "rdpo" else ""
    start = f", from step {first_step}" if first_step else ""
    print(f"student: {name}\n"
          f"data: {' '.join(args.data)}, {len(train.pairs)} pairs to train on, {len(val.pairs)} "
          f"for validation; reference computed for {cache.computed} in {cache.seconds:.1f} s\n"
          f"{args.loss}: {total_steps} steps of {args.batch_size} pairs on {where} in "
          f"{args.dtype}, learning rate {args.learning_rate:g}, beta {args.beta:g}"
          f"{temperature}{start}")
    if dtype != torch.float32:
        typical = torch.cat([sample.float().abs() for sample in weights.values()]).median().item()
        step = torch.finfo(dtype).eps * 2 ** math.floor(math.log2(typical))
        updates = step / args.learning_rate if args.learning_rate else math.inf
        print(f"grid: near a typical weight, {typical:.2g}, {str(dtype)[6:]} has steps of "
              f"{step:.2g}: {updates:{'.0f' if updates >= 10 else '.2g'}} updates at this rate")
    print("\n" + TABLE_HEAD)


def table_line(label, metrics, val_metrics):
    """One evaluation for a person: the last step's loss, then the validation pairs.

    label is the step or, for a part of the pairs, its behaviour.
    """
    first = f"{label:6d} {metrics['loss']:7.4f}" if metrics else f"{label:>6}".ljust(14)
    cells = []
    for title, name, form in COLUMNS:
        value = val_metrics.get(f"eval/{name}")  # no agreement without scores
        # Rounded first: + 0.0 turns -0.0 into 0.0.
        cell = "-" if value is None else format(float(format(value, form)) + 0.0, form)
        cells.append(cell.rjust(len(title)))
    return f"{first:.14s} | {'  '.join(cells)}"


def print_parts(val_metrics):
    """A line of the table for each part of the validation pairs."""
    parts = dict.fromkeys(name.split("/", 1)[1].rpartition("/loss")[0] for name in val_metrics
                          if name.endswith("/loss"))
    for part in filter(None, parts):
        own = {f"eval/{name}": val_metrics.get(f"eval/{part}/{name}") for _, name, _ in COLUMNS}
        print(table_line(part, {}, own))


def peak_memory_mib(device):
    """Peak memory of this process in MiB: the GPU's, or what was resident; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class StagePeaks:
    """The GPU's peak memory in each stage of a run; nothing on other devices."""

    def __init__(self, device):
        self.device, self.gigabytes = device, {}

    def end(self, stage):
        if self.device.type == "cuda":
            self.gigabytes[stage] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()

    def line(self):
        peaks = ", ".join(f"{stage} {peak:.2f}" for stage, peak in self.gigabytes.items())
        return f"peak memory, GB: {peaks}\n" if peaks else ""


def compile_note():
    """A line if torch.compile met its limit of graphs, after which it leaves code uncompiled."""
    limits = [reason for reason in torch._dynamo.utils.counters["unimplemented"]
              if "recompile limit" in reason.lower()]
    return "compile: met the limit of graphs; later shapes ran uncompiled\n" if limits else ""
