"""audit.jsonl: what the student makes of each pair, and the pairs on which the judge may be wrong.

    {"step", "split", "pair": "file:line", "tau", "gap", "p", "margin", "logp_chosen",
     "logp_rejected"}

A validation pair has a line per evaluation. A training pair has one per epoch, from the forward
pass of its step: before the student learnt from it, so it costs nothing and is no echo of the row.
"""
import itertools
import math
import os
import textwrap

from infra.command import refuse
from infra.report import side_by_side, table
from infra.rows import as_answer, canonical, read_flags, stream_rows

SHOWN = 500  # characters of an answer


def log_pairs(file, step, split, data, log_ratios, args):
    """Append the lines of a Dataset's pairs; log_ratios maps a pair to its two log pi - log ref."""
    for pair, (ref_chosen, ref_rejected, tau, gap) in zip(data.pairs, data.columns.T.tolist()):
        chosen, rejected = log_ratios[pair.where]
        margin = args.beta * (chosen - rejected)
        numbers = {"tau": tau, "gap": None if math.isnan(gap) else gap, "margin": margin,
                   "p": (1 + math.tanh(margin / 2)) / 2, "logp_chosen": ref_chosen + chosen,
                   "logp_rejected": ref_rejected + rejected}
        file.log(step=step, split=split, pair=pair.where,
                 **{name: number and round(number, 6) for name, number in numbers.items()})


def last_lines(path):
    """{pair: its last line} of an audit.jsonl. BadInput if it is missing, or not one."""
    lines = {}
    for where, line in stream_rows(path):
        refuse(where, (not {"step", "split", "pair", "tau", "gap", "p", "margin"} <= line.keys(),
                       "no line of an audit.jsonl; give the out_dir of a train.py run"))
        lines[line["pair"]] = line
    return lines


def suspects(lines):
    """The lines of pairs that the student orders otherwise than the judge, the clearest first.

    By gap * margin: a large gap is hard to get by chance, a large margin is what all other pairs
    taught. A pair without scores counts as a gap of 1.
    """
    def agreement(line):
        return (1 if line["gap"] is None else line["gap"]) * line["margin"]

    return sorted((line for line in lines if agreement(line) < 0), key=agreement)


def show_audit(out_dir, shown=10):
    """Print the student's p against tau, and the first suspects with their texts."""
    lines = last_lines(os.path.join(out_dir, "audit.jsonl"))
    flags, blocks = read_flags(out_dir), {}
    edges = [i / 5 for i in range(6)]
    for split in ("training", "validation"):
        own = [line for line in lines.values() if line["split"] == split]
        cells = {}
        for low, high in itertools.pairwise(edges):
            there = [line for line in own if low <= line["tau"] < high or line["tau"] == high == 1]
            if there:
                cells[f"{low:.1f} to {high:.1f}"] = {
                    "pairs": str(len(there)),
                    **{f"mean {name}": f"{sum(line[name] for line in there) / len(there):.2f}"
                       for name in ("tau", "p")}}
        blocks[f"{split}, {len(own)} pairs, by tau"] = cells
    print(f"the student of {out_dir}: p, its own preference for chosen, and the target tau")
    print(table(blocks))
    found = suspects(lines.values())
    print(f"\n{len(found)} of {len(lines)} pairs are on the other side than their scores. A wrong "
          "score or a mixed-up row is\nmost likely among the first:\n")
    texts = texts_of([*flags["data"], *(flags["eval_data"] or [])],
                     {line["pair"] for line in found[:shown]})
    for line in found[:shown]:
        gap = "no scores" if line["gap"] is None else f"score gap {line['gap']:+.2f}"
        print(f"{line['pair']} ({line['split']}): {gap}, tau {line['tau']:.2f}, but p "
              f"{line['p']:.2f}")
        print(texts.get(line["pair"], "(its file is not here any more)\n"))


def texts_of(paths, names):
    """{name: prompt and both answers, as text} of the rows of some files with these names."""
    texts = {}
    for path in filter(os.path.exists, paths):
        for where, row in stream_rows(path, on_bad=lambda error: None):
            if where in names:
                row = canonical(row)
                answers = {name: [textwrap.shorten(as_answer(row[name]), SHOWN, placeholder=" ...")]
                           for name in ("chosen", "rejected")}
                texts[where] = side_by_side([row["prompt"]], answers)
    return texts
