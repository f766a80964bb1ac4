"""Text reports for a person: score gaps, tokens, a file of rows, answers side by side, tables.

No torch here: stage 2 prints its score gaps from here too.
"""
import itertools
import json
import math
import os
import statistics
import sys
import textwrap
from collections import Counter

from infra.command import one_line, printable, warn
from infra.formats import as_messages, canonical
from infra.rows import few, read_object, stream_rows


def histogram(values, width=40):
    """Lines of a text histogram: ties alone at 0, at most five bars of a round width per side.

    A bar holds what is above the bar before, counted from 0, and at most its own number.
    """
    largest = max(map(abs, values))
    sizes = (digit * 10**power for power in range(-6, 39) for digit in (1, 2, 5))
    size = next(size for size in sizes if largest <= 5 * size)
    # Rounding: 1.1 / 0.1 is a little above 11.
    counts = Counter(value and math.copysign(max(1, math.ceil(round(abs(value) / size, 9))), value)
                     for value in values)
    most = max(counts.values())
    return [f"{f'{bin * size:+.4g}' if bin else 'ties':>9s} {counts[bin]:6d} "
            + "#" * math.ceil(width * counts[bin] / most)
            for bin in range(int(min(counts)), int(max(counts)) + 1)]


def show_gaps(gaps, what):
    """Print the number of ties and inversions, and a histogram. `what` names the rows."""
    ties, inversions = sum(gap == 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    print(f"score gap, chosen minus rejected, of {len(gaps)} {what}: {ties} ties, "
          f"{inversions} inversions (the original scored higher)")
    print("\n".join(["   up to   rows", *histogram(gaps)]))


def printable_tokens(tokenizer, ids):
    """Token ids as texts. The vocabulary's marks for space and newline become readable."""
    readable = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\u23ce"})
    return [printable(token.translate(readable)) for token in tokenizer.convert_ids_to_tokens(ids)]


def show_report(path, pairs, held_out, counts, tokenizer):
    """Print the report of `python data.py FILE`: rows, lengths, score gaps, one pair in tokens.

    held_out is the number of pairs that train.py would validate on.
    """
    bad = counts.dropped.pop("bad row", [])
    print(f"{path}: {counts.rows} rows, {len(pairs)} usable pairs, {held_out} of them to validate")
    print("".join(line + "\n" for line in counts.lines()), end="")
    for error in bad[:3]:
        print(f"train.py would stop at {error}")
    if bad:
        print(f"{len(bad)} such rows in all: repair them, or leave them out with --skip_bad_rows")
    if counts.unscored:
        print("with --loss rdpo, the default, or dsc train.py would stop at rows without two "
              f"scores, {len(counts.unscored)} in all: {few(counts.unscored)}")
    scored = [pair for pair in pairs if not math.isnan(pair.lean)]
    nulls = {pair.where for pair in pairs} - {pair.where for pair in scored} - {*counts.unscored}
    if nulls:
        print(f"{len(nulls)} pairs have a `null` score: rdpo and dsc leave them out")
    if not held_out:
        print("train.py would stop: one prompt alone cannot be split into training and "
              "validation; give more rows, or --eval_data")
    print("\ntokens      least  median    most")
    for name in ("prompt", "chosen", "rejected"):
        lengths = [len(getattr(pair, name + "_ids")) for pair in pairs]
        median = int(statistics.median(lengths))
        print(f"{name:9s} {min(lengths):7d} {median:7d} {max(lengths):7d}")
    of_judge = {}
    for pair in scored:
        what = f"pairs scored by {pair.judge}" if pair.judge else "scored pairs"
        if not math.isnan(pair.tau):
            what += " (tau - 1/2)"
        elif pair.scale not in (None, 5):
            what += f" (scale of {pair.scale:g} widened to 5)"
        of_judge.setdefault(what, []).append(pair.lean)
    for what, gaps in of_judge.items():
        print()
        show_gaps(gaps, what)
    if not scored:
        print("\nno scores: --loss dpo and sft can use these rows, rdpo and dsc cannot")
    pair = pairs[0]
    print(f"\none pair, token by token ({pair.where}); "
          "the loss counts the tokens of the two answers, not the prompt's")
    for name, colour in (("prompt", 2), ("chosen", 32), ("rejected", 31)):
        form = f"\033[{colour}m{{}}\033[0m" if sys.stdout.isatty() else "{}"
        tokens = printable_tokens(tokenizer, getattr(pair, name + "_ids"))
        print(f"{name + ':':10s}{'|'.join(map(form.format, tokens))}")


def side_by_side(prompts, answers_of):
    """Text that shows each prompt with the answer of every system.

    answers_of maps the name of a system to its answers, texts in the order of the prompts.
    """
    lines, width = [], max(map(len, ["prompt", *answers_of])) + 2
    for i, prompt in enumerate(prompts):
        texts = {"prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"]}
        texts |= {name: answers[i] for name, answers in answers_of.items()}
        for name, text in texts.items():
            lines.append(textwrap.fill(f"{name + ':':{width}s}{one_line(text)}", 110,
                                       subsequent_indent=" " * width))
        lines.append("")
    return "\n".join(lines)


def warn_of_overlap(folder, path, prompts):
    """Warn if prompts of the file `path` are in the data that a student was trained on."""
    args = os.path.join(folder, "args.json")
    flags = read_object(args, "whole flags, or take it away") if os.path.exists(args) else {}
    sources = flags.get("data", [])
    for source in filter(os.path.exists, [sources] if isinstance(sources, str) else sources):
        rows = stream_rows(source, on_bad=lambda error: None)
        seen = {json.dumps(as_messages(canonical(row).get("prompt"))) for _, row in rows}
        count = sum(json.dumps(as_messages(prompt)) in seen for prompt in prompts)
        if count:
            warn(f"{count} of {len(prompts)} prompts of {path} are in {source}, the data of "
                 f"{folder}: they say little about new prompts")


def table(blocks):
    """Text of one table: a column per system, a row per measurement, a heading line per block.

    blocks maps a heading to {system: {measurement: cell}}. A cell is text, "-" if unknown. A
    measurement that no system has is left out.
    """
    systems = list(dict.fromkeys(itertools.chain(*blocks.values())))
    lines = [["", *systems]]
    for heading, cells_of in blocks.items():
        lines.append([heading])
        for name in next(iter(cells_of.values())):
            cells = [cells_of.get(system, {}).get(name, "-") for system in systems]
            lines += [["  " + name, *cells]] if set(cells) != {"-"} else []
    # A heading has one cell and may be wider than its column.
    widths = [max(map(len, column)) for column in zip(*(line for line in lines if len(line) > 1))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() if len(line) > 1
                     else "\n" + line[0] for line in lines)


def by_fifths(tau, columns):
    """Cells of table(): the mean of each of the columns, arrays (N,), for each fifth of tau."""
    fifths, cells = (5 * tau).astype(int).clip(max=4), {}  # (N,), 0 to 4
    for n in sorted({*fifths.tolist()}):
        cells[f"{n / 5:.1f} to {(n + 1) / 5:.1f}"] = {"pairs": str((fifths == n).sum())} | {
            name: f"{values[fifths == n].mean():.2f}" for name, values in columns.items()}
    return cells


def indented(text):
    """Text as a Markdown code block: four spaces before each line, so that it stays text."""
    return textwrap.indent(printable(text), "    ")
