"""The exercises of toy/EXERCISES.md, solved: each is made in a copy of the code and trained.

    python toy/exercises.py        prints the table of EXERCISES.md, a quarter of a minute per line
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

TAU = "return torch.sigmoid(score_gaps / temperature)"
SIGN = "return (score_gaps.sign() + 1) / 2"
FORM = "return -tau * F.logsigmoid(margins) - (1 - tau) * F.logsigmoid(-margins)"
IPO = "return (margins - (tau - 0.5)) ** 2"
SLOW = "logps[len(prompt_ids) - 1:].sum()"  # in plain_sequence_logps
FAST = "answer.sum() for answer in logps.split"  # in sequence_logps
EXERCISES = [  # name, [(text in rdpo.py, its replacement)], flags
    ("as it is", [], []),
    ("tau from the sign of the gap", [(TAU, SIGN)], []),
    ("never quite sure: 0.1 to 0.9", [(TAU, TAU + ".clamp(0.1, 0.9)")], []),
    ("IPO", [(FORM, IPO)], []),
    ("mean log-probability per token", [(text, text.replace(".sum()", ".mean()"))
                                        for text in (SLOW, FAST)], ["--beta", "2"]),
]
RATES = ("safety", "benign", "roleplay", "sycophancy", "well_formed")


def train_changed(changes, flags):
    """What train.py prints on the toy rows, run in a copy of the code with a changed rdpo.py."""
    with tempfile.TemporaryDirectory() as copy:
        ignored = shutil.ignore_patterns(".git", "out*", ".venv*", "__pycache__")
        shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=ignored)
        path = os.path.join(copy, "rdpo.py")
        with open(path, encoding="utf-8") as file:
            text = file.read()
        for old, new in changes:
            assert text.count(old) == 1, f"rdpo.py has changed: it should hold {old!r} once"
            text = text.replace(old, new)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        # A cache of its own: a change may alter what a cached log-probability means.
        command = [sys.executable, "train.py", "--data", "toy/scored.jsonl",
                   "--ref_cache_dir", "cache"]
        return subprocess.run(command + flags, cwd=copy, check=True, stdout=subprocess.PIPE,
                              text=True).stdout


def main():
    print(f"{'':30s} {'safety':>7s} {'benign':>7s} {'roleplay':>9s} {'sycophancy':>11s} "
          f"{'well formed':>12s} {'logp chosen':>12s}")
    for name, changes, flags in tqdm(EXERCISES, disable=None, leave=False):
        output = train_changed(changes, flags)
        rates = [re.search(rf"^{rate} +\S+ +(\S+)$", output, re.MULTILINE)[1] for rate in RATES]
        last = [line for line in output.splitlines() if re.match(r" +\d+ .*\|", line)][-1].split()
        print("{:30s} {:>7s} {:>7s} {:>9s} {:>11s} {:>12s} {:>12s}".format(
            name, *rates, last[-2]), flush=True)


if __name__ == "__main__":
    main()
