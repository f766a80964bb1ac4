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

import numpy as np

from infra.command import one_line, printable, warn
from infra.rows import as_messages, canonical, read_text, stream_rows

# ------------------------------------------------------------------------------------- score gaps


def histogram(values, width=40):
    """Lines of a text histogram, in a few bins centred on round numbers, one of them 0."""
    spread = max(values) - min(values)
    sizes = (digit * 10**power for power in range(-6, 12) for digit in (1, 2, 5))
    size = next(size for size in sizes if spread <= 7 * size)
    counts = Counter(round(value / size) for value in values)
    most = max(counts.values())
    return [f"{bin * size:+9.4g} {counts[bin]:6d} {'#' * math.ceil(width * counts[bin] / most)}"
            for bin in range(min(counts), max(counts) + 1)]


def show_gaps(gaps, what):
    """Print the number of ties and inversions, and a histogram. `what` names the rows."""
    ties, inversions = sum(gap == 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    print(f"score gap, chosen minus rejected, of {len(gaps)} {what}: {ties} ties, "
          f"{inversions} inversions (the original scored higher)")
    print("\n".join(histogram(gaps)))


# ----------------------------------------------------------------------------------------- tokens


def printable_tokens(tokenizer, ids):
    """Token ids as texts. The vocabulary's marks for space and newline become readable."""
    readable = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\u23ce"})
    return [printable(token.translate(readable)) for token in tokenizer.convert_ids_to_tokens(ids)]


def show_tokens(tokenizer, ids, colour):
    """Tokens with bars between them, in an ANSI colour if stdout is a terminal."""
    form = f"\033[{colour}m{{}}\033[0m" if sys.stdout.isatty() else "{}"
    return "|".join(map(form.format, printable_tokens(tokenizer, ids)))


def show_report(path, pairs, counts, tokenizer):
    """Print the report of `python data.py FILE`: rows, lengths, score gaps, one pair in tokens."""
    print(f"{path}: {counts.rows} rows, {len(pairs)} usable pairs")
    for line in counts.lines():
        print(line)
    print("\ntokens      least  median    most")
    for name in ("prompt", "chosen", "rejected"):
        lengths = [len(getattr(pair, name + "_ids")) for pair in pairs]
        median = int(statistics.median(lengths))
        print(f"{name:9s} {min(lengths):7d} {median:7d} {max(lengths):7d}")
    gaps = [pair.gap for pair in pairs if not math.isnan(pair.gap)]
    print()
    if gaps:
        show_gaps(gaps, "scored pairs")
    else:
        print("no scores: --loss dpo and sft can use these rows, rdpo and dsc cannot")
    pair = pairs[0]
    print(f"\none pair, token by token ({pair.where}); "
          "the loss counts the tokens of the two answers, not the prompt's")
    for name, ids, colour in (("prompt", pair.prompt_ids, 2), ("chosen", pair.chosen_ids, 32),
                              ("rejected", pair.rejected_ids, 31)):
        print(f"{name + ':':10s}{show_tokens(tokenizer, ids, colour)}")


# ---------------------------------------------------------------------------------------- answers


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


def examples(scores, count, seed):
    """Indices of N rows worth reading, from scores (S, N) of S systems, nan if unknown.

    First the rows with the largest differences, at most `count`, then `count` random others.
    """
    spread = np.where(np.isnan(scores).any(0), 0, scores.max(0) - scores.min(0))  # (N,)
    differ = [int(i) for i in np.argsort(-spread, kind="stable")[:count] if spread[i] > 0]
    order = np.random.default_rng(seed).permutation(len(spread)).tolist()
    return differ + [i for i in order if i not in differ][:count]


def warn_of_overlap(folder, path, prompts):
    """Warn if the training data that a run's args.json names holds prompts of the file `path`."""
    args = os.path.join(folder, "args.json")
    if not os.path.exists(args):
        return
    source = json.loads(read_text(args, "a run's args.json")).get("data", "")
    if not os.path.exists(source):
        return
    rows = stream_rows(source, on_bad=lambda error: None)
    seen = {json.dumps(as_messages(canonical(row).get("prompt"))) for _, row in rows}
    count = sum(json.dumps(as_messages(prompt)) in seen for prompt in prompts)
    if count:
        warn(f"{count} of {len(prompts)} prompts of {path} are in {source}, the data that {folder} "
             "was trained on (and validated with): they say little about new prompts")


# ----------------------------------------------------------------------------------------- tables


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


def indented(text):
    """Text as a Markdown code block: four spaces before each line, so that it stays text."""
    return textwrap.indent(printable(text), "    ")
