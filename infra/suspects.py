"""Pairs that a student orders otherwise than the judge: their scores are most likely wrong.

They may be training pairs. From those the student has learnt, wrong scores included, so after
several epochs it agrees with more of them: the sign is weaker than on held-out pairs.
"""
import textwrap

import numpy as np

from infra.command import BadInput
from infra.report import by_fifths, side_by_side, table
from infra.rows import read_flags

SHOWN = 500  # characters of an answer


def training_flags(folder):
    """(beta, T) that a student was trained with. BadInput if the folder holds no run."""
    flags = read_flags(folder)
    if "tau_temperature" not in flags:
        raise BadInput(f"{folder}/args.json: no `tau_temperature`; train again: an older train.py "
                       "wrote it")
    return flags["beta"], flags["tau_temperature"]


def sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2  # cannot overflow


def suspects(tau, margins):
    """Indices of the pairs that the student orders otherwise than the judge, the clearest first.

    The order is by (tau - 1/2) * margin: the judge was sure of one side, and the student, who has
    learnt from all other pairs, is sure of the other.
    """
    agreement = (tau - 0.5) * margins  # (P,)
    return [i for i in np.argsort(agreement, kind="stable").tolist() if agreement[i] < 0]


def suspects_text(folder, pairs, tau, margins, tokenizer, shown):
    """Text: a student's p for each fifth of tau, then its first suspects with their answers.

    tau (P,) is the judge's, nan without scores; margins (P,) are the student's, beta times the
    log-ratio margins.
    """
    p, unscored = sigmoid(margins), np.isnan(tau)  # (P,) each
    tau = np.where(unscored, 1.0, tau)  # (P,), as DPO takes them
    found = suspects(tau, margins)
    cells = by_fifths(tau, {"mean tau": tau, "mean p": p})
    lines = [f"suspects of {folder}: tau is the judge's preference for chosen, p the student's",
             table({f"{len(pairs)} pairs, by tau": cells}),
             f"\nThe student disagrees on {len(found)} of {len(pairs)} pairs. The first are those "
             "most likely to have\na wrong score or mixed-up answers:\n"]
    for i in found[:shown]:
        judged = "no scores" if unscored[i] else f"tau {tau[i]:.2f}"
        lines.append(f"{pairs[i].where}: {judged}, but p {p[i]:.2f}")
        answers = {"chosen": pairs[i].chosen_ids, "rejected": pairs[i].rejected_ids}
        lines.append(side_by_side([pairs[i].prompt], {
            name: [textwrap.shorten(tokenizer.decode(ids, skip_special_tokens=True), SHOWN,
                                    placeholder=" ...")] for name, ids in answers.items()}))
    return "\n".join(lines)
