"""What a second process costs: CPU time per step of torchrun with two processes against one process, one thread each.

    python bench/processes.py [--model DIR] [--fsdp]

Both train the same steps on rows of toy/scored.jsonl, on the CPU, in turn. A run of several steps less a run of one leaves the CPU time, user and
system, of all processes, that the later steps took: what starting up and saving take is in both.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import read_rows  # noqa: E402

parser = argparse.ArgumentParser(description="CPU time of two processes against one.")
parser.add_argument("--model", default=os.path.expanduser("~/.cache/rdpo/smollm2-135m"))
parser.add_argument("--fsdp", action="store_true")
parser.add_argument("--batch_size", type=int, default=16)
parser.add_argument("--steps", type=int, default=4, help="steps after the first")
args = parser.parse_args()


def train(folder, processes, steps):
    """(CPU seconds of all processes, the steps' metrics) of a run of train.py."""
    out_dir = f"{folder}/out-{processes}-{steps}"
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = ["--fsdp"] if args.fsdp and processes > 1 else []
    command = [*launcher, f"{ROOT}/train.py", "--data", f"{folder}/rows.jsonl", "--eval_data", f"{folder}/held_out.jsonl", "--model", args.model, "--device", "cpu",
               "--batch_size", str(args.batch_size), "--max_steps", str(steps), "--eval_every", "1000000", "--save_every", "1000000", "--max_new_tokens", "1",
               "--cache_dir", f"{folder}/cache", "--out_dir", out_dir, "--overwrite", *flags]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    with open(f"{out_dir}/metrics.jsonl", encoding="utf-8") as file:
        return usage.ru_utime + usage.ru_stime, [line for line in map(json.loads, file) if "loss" in line]


with tempfile.TemporaryDirectory() as folder:
    rows = [row for _, row in read_rows(f"{ROOT}/toy/scored.jsonl")][:args.batch_size * (1 + args.steps)]
    for name, some in (("rows", rows), ("held_out", rows[:1])):
        with open(f"{folder}/{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in some)
    print("processes   CPU seconds/step   CPU ms/token   seconds/step   losses")
    costs, losses = [], []
    train(folder, 1, 1)  # fills the reference's cache
    for processes in (1, 2):
        (short, _), (long, steps) = train(folder, processes, 1), train(folder, processes, 1 + args.steps)
        tokens, losses = sum(step["tokens"] for step in steps[1:]), losses + [[step["loss"] for step in steps]]
        costs.append(long - short)
        print(f"{processes:9d}   {costs[-1] / args.steps:16.2f}   {1e3 * costs[-1] / tokens:12.2f}   "
              f"{sum(step['step_seconds'] for step in steps[1:]) / args.steps:12.2f}   {' '.join(f'{loss:.5f}' for loss in losses[-1])}")
    print(f"CPU time of two over one: {costs[1] / costs[0]:.3f}; largest difference between two losses "
          f"{max(abs(one - other) for one, other in zip(*losses)):.1e}")
