"""Where T comes from: a person says which of two answers is better, and T makes tau fit that.

    python data.py scored.jsonl --label labels.jsonl         a session in the terminal
    python data.py scored.jsonl --calibrate labels.jsonl     T, its interval, and how far they agree

    labels.jsonl    {"prompt", "chosen", "rejected", "preferred": "chosen", "rejected" or "tie"}
"""
import json
import math
import os
import random
import shutil
import sys
import textwrap
from types import SimpleNamespace

import numpy as np

from infra.command import BadInput, printable, warn
from infra.files import atomic_write, only_writer
from infra.formats import as_messages, canonical
from infra.report import by_fifths, table
from infra.rows import check_judges, check_pair, is_cut, judge_of, question_of, stream_rows

SHARE = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}  # what a label says about chosen
KEYS = "1 or 2; 0: neither; s: skip; u: undo the last label; q: stop and continue later"


def pairs_of(path):
    """Yield ("file:line", key, row, its scores, its own tau) for the usable rows of a file."""
    for where, row in stream_rows(path):
        row = canonical(row)
        prompt, chosen, rejected, scores, tau = check_pair(row, where, needs_scores=False)
        yield where, json.dumps([as_messages(prompt), chosen, rejected]), row, scores, tau


def read_labels(path):
    """[(key, label row)] of a file of labels. BadInput for a line that is none."""
    labels = []
    for where, key, row, *_ in pairs_of(path):
        if row.get("preferred") not in SHARE:
            raise BadInput(f'{where}: `preferred` must be "chosen", "rejected" or "tie"')
        labels.append((key, row))
    return labels


# ----------------------------------------------------------------------------------------- session


def label(path, out, count, seed):
    """Ask a person about pairs of a file, in random order, until `out` has `count` labels.

    Both answers are shown blind: which comes first is random too. Each label is saved at once.
    """
    with only_writer(out):
        # An empty file is what undoing the only label leaves.
        labels = read_labels(out) if os.path.exists(out) and os.path.getsize(out) else []
        known = {key for key, _ in labels}
        rows = {key: row for _, key, row, *_ in pairs_of(path) if not is_cut(row)}
        waiting = [key for key in rows if key not in known]
        random.Random(seed).shuffle(waiting)
        print(f"Which answer is better? {KEYS}")
        while waiting and len(labels) < count:
            key = waiting.pop()
            row, names = rows[key], ["chosen", "rejected"]
            random.Random(f"{seed} {key}").shuffle(names)
            show(f"{len(labels) + 1} of {count}", question_of(row), *(row[name] for name in names))
            said = ask()
            if said == "q":
                break
            if said == "s":
                continue
            if said == "u":
                waiting.append(key)
                if not labels or labels[-1][0] not in rows:
                    print("no label of this file to undo")
                    continue
                waiting.append(labels.pop()[0])
            else:
                preferred = {"1": names[0], "2": names[1], "0": "tie"}[said]
                labels.append((key, {name: row[name] for name in ("prompt", "chosen", "rejected")}
                               | {"preferred": preferred}))
            atomic_write(out, "".join(json.dumps(row) + "\n" for _, row in labels))
    print(f"\n{len(labels)} labels in {out}"
          + ("" if len(labels) >= count else "; the same command continues"))


def show(title, question, first, second):
    """Print a question and two answers, wrapped to the terminal."""
    width = min(shutil.get_terminal_size().columns, 100)
    bold = "\033[1m{}\033[0m" if sys.stdout.isatty() else "{}"
    print("\n" + f" {title} ".center(width, "\u2500"))
    for name, text in (("question", question), ("1", first), ("2", second)):
        text = text if isinstance(text, str) else text[0]["content"]
        print(bold.format(name))
        for line in printable(text.strip()).split("\n"):
            print(textwrap.fill(line, width, initial_indent="  ", subsequent_indent="  "))


def ask():
    """"1", "2", "0", "s", "u" or "q", as typed; the end of input, or Ctrl-C, is "q"."""
    while True:
        try:
            said = input("better: ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            return "q"
        if said in ("1", "2", "0", "s", "u", "q"):
            return said
        print(KEYS)


# -------------------------------------------------------------------------------------- calibration


def cross_entropy(slopes, gaps, shares):
    """rDPO's loss (mean, nats) with tau = sigmoid(slope * gap) as the guess of people's labels.

    slopes is (S, 1), for S losses, or one number.
    """
    logits = slopes * gaps  # (S, N)
    return (np.logaddexp(0, logits) - shares * logits).mean(-1)  # (S,)


def fit_temperature(gaps, shares):
    """(T, low, high): the T whose tau fits labels best, and its 95 % interval.

    Maximum likelihood of sigmoid(gap / T), a tie counting as half a label for each side. The
    interval holds every T whose likelihood ratio to the best is above exp(-1.92) (Wilks). T is inf
    if the scores say nothing, and high is inf if that cannot be excluded; low is 0 if no T is too
    small. T is read off a grid with steps of 0.5 %, from 1/1000 to 1000 typical gaps.
    """
    typical = np.median(np.abs(gaps[gaps != 0]))
    slopes = np.append(0, np.geomspace(1e-3, 1e3, 3000) / typical)  # (S,), 1 / T
    losses = cross_entropy(slopes[:, None], gaps, shares)  # (S,)
    within = slopes[(losses - losses.min()) * len(gaps) <= 1.92]
    best, low, high = slopes[losses.argmin()], within[-1], within[0]
    return (1 / best if best > slopes[1] else math.inf, 1 / low if low < slopes[-1] else 0.0,
            1 / high if high else math.inf)


def kappa(ours, theirs):
    """Cohen's kappa of two lists of categories: agreement beyond that of their shares alone."""
    agreement = np.mean([a == b for a, b in zip(ours, theirs)])
    chance = sum(ours.count(kind) * theirs.count(kind) for kind in {*ours}) / len(ours) ** 2
    return math.nan if chance == 1 else (agreement - chance) / (1 - chance)


def calibrate(path, labels_path, score_gap):
    """Print how judge and person agree, and the T to train with. Returns it and its interval.

    score_gap is rdpo.score_gap. For a row with its own tau, the gap is its log-odds. BadInput if
    train.py would refuse to mix the judges of the rows.
    """
    gap_of, judged = {}, []
    for where, key, row, scores, tau in pairs_of(path):
        _, judge, scale = judge_of(row, where)
        if not math.isnan(tau):
            bounded = min(max(tau, 1e-6), 1 - 1e-6)
            gap_of[key] = math.log(bounded / (1 - bounded))
        elif None not in scores:
            gap_of[key] = score_gap(*scores, scale)
        else:
            continue
        judged.append(SimpleNamespace(where=where, judge=judge, scale=scale, lean=gap_of[key]))
    check_judges(judged)
    labels = read_labels(labels_path)
    known = [(gap_of[key], row["preferred"]) for key, row in labels if key in gap_of]
    if not any(gap for gap, _ in known):
        raise BadInput(f"{labels_path}: none of its {len(labels)} labels is of a pair of {path} "
                       "whose scores differ")
    gaps, said = np.array([gap for gap, _ in known]), [preferred for _, preferred in known]
    shares = np.array([SHARE[preferred] for preferred in said])  # (N,)
    scored = [{1: "chosen", 0: "tie", -1: "rejected"}[np.sign(gap)] for gap in gaps]
    decided = [a == b for a, b in zip(scored, said) if "tie" not in (a, b)]
    best, low, high = fit_temperature(gaps, shares)

    print(f"{len(known)} of {len(labels)} labels are of scored pairs; the person calls "
          f"{said.count('tie')} a tie, the judge {scored.count('tie')}")
    print(f"where both decide they agree on {sum(decided)} of {len(decided)}; Cohen's kappa "
          f"{kappa(scored, said):.2f} (chosen, rejected, tie)")
    fit, shown = f"T {best:.2g}, 95 % interval {low:.2g} to {high:.2g}", best
    if not low or math.isinf(best):  # no T fits best: show the default
        fit, shown = f"T {f'above {low:.2g}' if low else f'below {high:.2g}'} (95 %)", 1.0
    print(f"{fit}; loss per label {cross_entropy(1 / best, gaps, shares):.3f}, at T 1 "
          f"{cross_entropy(1.0, gaps, shares):.3f}, by chance 0.693\n")
    tau = np.exp(-np.logaddexp(0, -gaps / shown))  # (N,), sigmoid
    cells = by_fifths(tau, {"mean tau": tau, "person prefers chosen": shares})
    print(table({f"tau at T {shown:.2g}": cells}) + "\n")
    if math.isinf(best):
        warn("the scores say nothing about what the person prefers, and no T mends that: read the "
             "judge's replies, or judge with another model")
    elif low:
        print(f"train.py --tau_temperature {best:.2g}")
    elif math.isinf(high):
        print("too few labels to say anything of T: label more pairs")
    else:
        take = f"take train.py --tau_temperature {high:.2g}" if high < 1 else "keep the default T 1"
        print("no label contradicts the scores by much, so they only say that T is below "
              f"{high:.2g}: {take}, or label pairs with closer scores")
    return best, low, high
