"""What a training run prints and logs: the table, the answers before and after."""
import math
import os
import resource
import sys

import torch

import infra.distributed as dist
from infra.models import TOY_STUDENT
from infra.report import side_by_side
from infra.rows import read_rows

TABLE_HEAD = ("  step    loss | validation: loss  accuracy  agrees with scores  margin  "
              "logp chosen  rejected")


def print_plan(args, policy, train_count, val_count, reference, first_step, total_steps):
    """Print what is trained on what."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in policy.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
    name = args.model or f"{os.path.relpath(TOY_STUDENT)}, bundled (or --model FOLDER_OR_HUB_ID)"
    if args.lora_rank:
        name += (f", LoRA rank {args.lora_rank}: {trained:,} of {total:,} parameters are trained, "
                 f"{100 * trained / total:.2f} %")
    if args.reference:
        name += f"\nreference: {args.reference}"
    where = args.device if dist.world_size() == 1 else f"{dist.world_size()} x {args.device}"
    where += ", sharded" if args.fsdp else ""
    temperature = f", T {args.temperature:g}" if args.loss == "rdpo" else ""
    start = f", from step {first_step}" if first_step else ""
    print(f"student: {name}\n"
          f"data: {' '.join(args.data)}, {train_count} pairs to train on, {val_count} for "
          f"validation; reference computed for {reference}\n"
          f"{args.loss}: {total_steps} steps of {args.batch_size} pairs on {where} in "
          f"{args.dtype}, learning rate {args.learning_rate:g}, beta {args.beta:g}"
          f"{temperature}{start}")


def print_grid(weights, dtype, args):
    """Print the step of a 16-bit grid beside the learning rate; nothing under float32.

    weights are {name: sample} of the student's; dtype is what they are computed with or saved in.
    """
    if dtype == torch.float32:
        return
    typical = torch.cat([sample.float().abs() for sample in weights.values()]).median().item()
    step = torch.finfo(dtype).eps * 2 ** math.floor(math.log2(typical))
    updates = step / args.learning_rate if args.learning_rate else math.inf
    print(f"grid: near a typical weight, {typical:.2g}, {str(dtype)[6:]} has steps of {step:.1g}: "
          f"{updates:{'.0f' if updates >= 10 else '.2g'}} updates at this learning rate")


def table_line(label, metrics, val_metrics):
    """One evaluation for a person: the last step's loss, then the validation pairs.

    label is the step or, for a part of the pairs, its behaviour.
    """
    value = {name.removeprefix("eval/"): number for name, number in val_metrics.items()}
    first = f"{label:6d} {metrics['loss']:7.4f}" if metrics else f"{label:>6}".ljust(14)
    agreement = (f"{value['rewards/score_agreement']:.2f}"
                 if "rewards/score_agreement" in value else "-")
    margin = round(value["rewards/margins"], 2) + 0.0  # turns -0.0 into 0.0
    return (f"{first:.14s} | {value['loss']:16.4f}  {value['rewards/accuracies']:8.2f}  "
            f"{agreement:>18}  {margin:+6.2f}  {value['logps/chosen']:11.1f}  "
            f"{value['logps/rejected']:8.1f}")


class SampleAnswers:
    """Prompts whose answers are printed at the end, as the reference and the student give them.

    For the toy student: held-out prompts, on which its world computes what is right. Else the
    first validation prompts.
    """

    def __init__(self, is_toy, val_pairs):
        if is_toy:
            path = os.path.join(os.path.dirname(TOY_STUDENT), "held_out.jsonl")
            self.rows = [row for _, row in read_rows(path)]
            self.prompts = [row["prompt"] for row in self.rows]
            self.shown = slice(4, 7)  # a harmful, a harmless and a role-play request
        else:
            by_ids = {tuple(pair.prompt_ids): pair.prompt for pair in val_pairs}
            self.rows, self.prompts, self.shown = None, list(by_ids.values())[:3], slice(0, 3)

    def report(self, before, after):
        """Text: three prompts with both answers; for the toy, the share of right answers."""
        shown = {"reference": before[self.shown], "student": after[self.shown]}
        text = side_by_side(self.prompts[self.shown], shown)
        if self.rows is None:
            return text
        from toy import world
        before, after = world.rates(self.rows, before), world.rates(self.rows, after)
        lines = [f"right answers to {len(self.rows)} held-out prompts  reference  student"]
        lines += [f"{name:37s}  {before[name]:9.2f}  {after[name]:7.2f}" for name in before]
        return "\n".join([text, *lines])


def peak_memory_mib(device):
    """Peak memory of this process in MiB: the GPU's, or what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
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
