"""What a second process costs: CPU time per step of torchrun with two processes against one process, one thread each.

    python bench/processes.py [--model DIR] [--fsdp]

Both train the same steps on the CPU, in turn. Rows of toy/scored.jsonl are short, so --joined of them make a pair of the length of real ones. The
CPU time of a step is that of all processes, user and system; the median of the steps after the first two leaves out starting up, saving, and most
of the first touches of new memory, which are slow.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import train  # noqa: E402
from infra.command import run  # noqa: E402
from infra.rows import read_rows  # noqa: E402


def worker(clock_file, argv):
    """train.py, with the CPU time of this process noted once per step, where it sums the metrics over the ranks."""
    exchange, clock = train.mean_metrics, []

    def noted(*arguments):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        clock.append(usage.ru_utime + usage.ru_stime)
        return exchange(*arguments)

    train.mean_metrics = noted
    train.main(argv)
    with open(f"{clock_file}-{os.environ.get('RANK', 0)}", "w", encoding="utf-8") as file:
        json.dump(clock[1:-1], file)  # without the evaluations before the first step and after the last


def measure(folder, processes, args):
    """(CPU seconds of each step after the first two, the steps' metrics) of a run."""
    clock_file, out_dir = f"{folder}/clock-{processes}", f"{folder}/out-{processes}"
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = ["--fsdp"] if args.fsdp and processes > 1 else []
    subprocess.run([*launcher, __file__, "--worker", clock_file, "--data", f"{folder}/rows.jsonl", "--eval_data", f"{folder}/held_out.jsonl",
                    "--model", args.model, "--device", "cpu", "--batch_size", str(args.batch_size), "--eval_every", "1000000",
                    "--max_new_tokens", "1", "--cache_dir", f"{folder}/cache", "--out_dir", out_dir, *flags],
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)
    clocks = [json.load(open(f"{clock_file}-{number}", encoding="utf-8")) for number in range(processes)]
    at = [sum(together) for together in zip(*clocks)]
    with open(f"{out_dir}/metrics.jsonl", encoding="utf-8") as file:
        return [after - before for before, after in zip(at[1:], at[2:])], [line for line in map(json.loads, file) if "loss" in line]


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description="CPU time of two processes against one.")
    parser.add_argument("--model", default=os.path.expanduser("~/.cache/rdpo/smollm2-135m"))
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--joined", type=int, default=4, help="rows of toy/scored.jsonl in a pair")
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        short = [row for _, row in read_rows(f"{ROOT}/toy/scored.jsonl")][:args.joined * args.batch_size * args.steps]
        rows = [some[0] | {key: " ".join(row[key] for row in some) for key in ("prompt", "chosen", "rejected")} for some in zip(*[iter(short)] * args.joined)]
        for name, some in (("rows", rows), ("held_out", rows[:1])):
            with open(f"{folder}/{name}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in some)
        print(f"CPU seconds per step, median of {args.steps - 2}   all of them")
        medians, losses = [], []
        for processes in (1, 2):
            seconds, steps = measure(folder, processes, args)
            medians.append(statistics.median(seconds))
            losses.append([step["loss"] for step in steps])
            print(f"{processes} process{'es' * (processes > 1):2s} {medians[-1]:27.2f}   {' '.join(f'{one:.2f}' for one in seconds)}")
        tokens = statistics.mean(step["tokens"] for step in steps)
        print(f"two over one: {medians[1] / medians[0]:.3f}, at {tokens:.0f} tokens per step; largest difference between two losses "
              f"{max(abs(one - other) for one, other in zip(*losses)):.1e}")


if __name__ == "__main__":
    run(main)
