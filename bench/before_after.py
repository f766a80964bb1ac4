"""Time per step of train.py beside that of an earlier commit, run in turn.

    python bench/before_after.py COMMIT --rounds 2 --data scored.jsonl --model DIR --dtype bfloat16

All other flags go to train.py, the same to both. Prints the median seconds of a step, the first
step left out, and their ratio, for each round.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from infra.command import Parser, at_least, run  # noqa: E402


def seconds_per_step(checkout, folder, flags):
    """The median time of a step, by metrics.jsonl."""
    subprocess.run([sys.executable, os.path.join(checkout, "train.py"), "--out_dir", folder,
                    "--max_new_tokens", "1", "--save_every", "1000000", *flags],
                   check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        seconds = [line["step_seconds"] for line in map(json.loads, file) if "step_seconds" in line]
    return statistics.median(seconds[1:])


def main():
    parser = Parser("Time per step beside that of an earlier commit.")
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=at_least(1), default=2)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        before = os.path.join(folder, "before")
        subprocess.run(["git", "clone", "--quiet", ROOT, before], check=True)
        subprocess.run(["git", "checkout", "--quiet", args.commit], cwd=before, check=True)
        print(f"seconds per step   {args.commit[:7]:>9s}      now   ratio")
        for number in range(args.rounds):
            old, new = (seconds_per_step(checkout, os.path.join(folder, f"{name}-{number}"), flags)
                        for name, checkout in (("before", before), ("now", ROOT)))
            print(f"round {number + 1}            {old:9.2f}{new:9.2f}{new / old:8.2f}", flush=True)


if __name__ == "__main__":
    run(main)
