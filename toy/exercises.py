"""The exercises of the README, solved: each is a change of a line or two, made in a copy of the code and run on the toy rows.

    python toy/exercises.py        a quarter of a minute each
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

TAU = "return torch.sigmoid((score_chosen - score_rejected) / temperature)"
LOSSES = "losses = -tau * F.logsigmoid(margins) - (1 - tau) * F.logsigmoid(-margins)"
# what it is, [(the text in rdpo.py, what takes its place)], flags
EXERCISES = [
    ("as it is", [], []),
    ("tau from the sign of the gap", [(TAU, "return ((score_chosen - score_rejected).sign() + 1) / 2")], []),
    ("never quite sure: 0.1 to 0.9", [(TAU, TAU + ".clamp(0.1, 0.9)")], []),
    ("IPO", [(LOSSES, "losses = (margins / beta - (2 * tau - 1) / (2 * beta)) ** 2")], []),
    ("mean log-probability per token", [("answer.sum() for answer in", "answer.mean() for answer in"), (")[len(prompt_ids) - 1:].sum())", ")[len(prompt_ids) - 1:].mean())")],
     ["--beta", "2"]),
]


def main():
    print(f"{'':30s} {'safety':>7s} {'benign':>7s} {'roleplay':>9s} {'sycophancy':>11s} {'well formed':>12s} {'logp chosen':>12s}")
    for name, changes, flags in tqdm(EXERCISES, disable=None, leave=False):
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", "out*", ".venv*", "__pycache__"))
            path = os.path.join(copy, "rdpo.py")
            with open(path, encoding="utf-8") as file:
                text = file.read()
            for old, new in changes:
                assert text.count(old) == 1, f"rdpo.py has changed: it should hold once {old!r}"
                text = text.replace(old, new)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            # The cache is the copy's own: where log-probabilities mean something else, others' are wrong.
            output = subprocess.run([sys.executable, "train.py", "--data", "toy/scored.jsonl", "--cache_dir", "cache", *flags], cwd=copy,
                                    capture_output=True, text=True, check=True).stdout
        rates = [re.search(rf"^{rate} +\S+ +(\S+)$", output, re.MULTILINE)[1] for rate in ("safety", "benign", "roleplay", "sycophancy", "well_formed")]
        last = [line for line in output.splitlines() if re.match(r" +\d+ .*\|", line)][-1].split()
        print("{:30s} {:>7s} {:>7s} {:>9s} {:>11s} {:>12s} {:>12s}".format(name, *rates, last[-2]), flush=True)


if __name__ == "__main__":
    main()
