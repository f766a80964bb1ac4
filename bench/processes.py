"""CPU time per step of two processes (torchrun) against one process, one thread each.

    python bench/processes.py [--model DIR] [--fsdp]

Both train the same steps on the CPU, one after the other. Rows of toy/scored.jsonl are short, so
--joined of them make a pair of realistic length. The CPU time of a step is summed over ranks, user
and system. The first two steps are left out: they first touch most of the memory, which is slow.
"""
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
from bench.parity import read_steps, train_flags, write_rows  # noqa: E402
from infra.command import Parser, at_least, run  # noqa: E402
from infra.rows import read_rows  # noqa: E402


def worker(clock_file, argv):
    """Run train.py and note this process's CPU time once per step, in mean_metrics."""
    mean_metrics, clock = train.mean_metrics, []

    def timed_mean_metrics(*args):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        clock.append(usage.ru_utime + usage.ru_stime)
        return mean_metrics(*args)

    train.mean_metrics = timed_mean_metrics
    train.main(argv)
    with open(f"{clock_file}-{os.environ.get('RANK', 0)}", "w", encoding="utf-8") as file:
        json.dump(clock[1:-1], file)  # without the evaluations before and after training


def measure(folder, world_size, args):
    """(CPU seconds of each step after the first two, the metrics of all steps) of a run."""
    clock_file, out_dir = f"{folder}/clock-{world_size}", f"{folder}/out-{world_size}"
    command, flags = [sys.executable], []
    if world_size > 1:
        command += ["-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", str(world_size)]
        flags = ["--fsdp"] * args.fsdp
    command += [__file__, "--worker", clock_file, *train_flags(folder, out_dir), *flags,
                "--model", args.model, "--batch_size", str(args.batch_size)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                   check=True)
    clocks = []
    for rank in range(world_size):
        with open(f"{clock_file}-{rank}", encoding="utf-8") as file:
            clocks.append(json.load(file))
    total = [sum(of_ranks) for of_ranks in zip(*clocks)]
    return [after - before for before, after in zip(total[1:], total[2:])], read_steps(out_dir)


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3:])
    parser = Parser("Compare the CPU time of two processes and one.")
    add = parser.add_argument
    add("--model", default=os.path.expanduser("~/.cache/rdpo/smollm2-135m"), help="a model folder")
    add("--fsdp", action="store_true", help="shard the weights over the two processes")
    add("--batch_size", type=int, default=16, help="pairs per step")
    add("--joined", type=int, default=4, help="rows of toy/scored.jsonl in a pair")
    add("--steps", type=at_least(3), default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        short = [row for _, row in read_rows(f"{ROOT}/toy/scored.jsonl")]
        short = short[:args.joined * args.batch_size * args.steps]
        write_rows(folder, [join(rows) for rows in zip(*[iter(short)] * args.joined)])
        print(f"CPU seconds per step, median of {args.steps - 2}   all of them")
        medians, losses = [], []
        for world_size in (1, 2):
            seconds, steps = measure(folder, world_size, args)
            medians.append(statistics.median(seconds))
            losses.append([step["loss"] for step in steps])
            print(f"{world_size} process{'es' * (world_size > 1):2s} {medians[-1]:27.2f}   "
                  f"{' '.join(f'{step_seconds:.2f}' for step_seconds in seconds)}")
        tokens = statistics.mean(step["tokens"] for step in steps)
        difference = max(abs(one - two) for one, two in zip(*losses))
        print(f"two over one: {medians[1] / medians[0]:.3f}, at {tokens:.0f} tokens per step; "
              f"largest difference between two losses {difference:.1e}")


def join(rows):
    """One long pair of several short rows; the scores are the first row's."""
    return rows[0] | {key: " ".join(row[key] for row in rows)
                      for key in ("prompt", "chosen", "rejected")}


if __name__ == "__main__":
    run(main)
