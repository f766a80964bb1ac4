"""What a teacher or judge was asked with; judged rows printed: one row, a file's statistics."""
import statistics

from infra.command import printable
from infra.report import show_gaps
from infra.resumable import digest
from infra.rows import as_answer, question_of, stream_rows
from infra.verdicts import better

DEFAULTS = {"temperature": 0.7, "samples": 1, "max_tokens": 512, "json_verdicts": False,
            "extra_body": {}, "no_logprobs": False}


def asked_with(args, texts, *flags):
    """A stage's provenance: {"model", "task": digest of texts and flags, flags not at default}.

    Flags at their default are not named, so that the rows of older versions can be continued.
    """
    given = {name: vars(args)[name] for name in flags}
    given = {name: value for name, value in given.items() if value not in (None, DEFAULTS[name])}
    return {"model": args.model, "task": digest(texts | given)} | given


def show_row(row):
    """Print a finished row: the question, both answers, what they got and the judge's replies."""
    print(f"======== {printable(str(row['id']))}")
    print(f"-------- question\n{printable(question_of(row))}")
    for name in ("rejected", "chosen"):
        print(f"-------- {name}\n{printable(as_answer(row[name]))}")
    for name, attempts in attempts_in(row):
        for reply in attempts:
            print(f"-------- the judge on {name}, finish {reply['finish']}, verdict "
                  f"{reply['verdict']}\n{printable(reply['reply'].strip())}")
    numbers = {key: row[key] for key in ("score_rejected", "score_chosen", "tau") if key in row}
    print("-------- " + ", ".join(f"{key} {number}" for key, number in numbers.items()))


def attempts_in(row):
    """[(what was judged, the judge's replies about it)] of a row; [] from a reward model."""
    return [(name, attempts) for name, attempts in row["judge"].items()
            if isinstance(attempts, list) and attempts and isinstance(attempts[0], dict)]


def report(path, adds, good):
    """Print statistics of the numbers that were added to a file. Returns how many are not null."""
    numbers, gaps, spreads = [], [], []
    unread, ties = [], []  # why replies without a verdict ended; do whole verdicts tie, per row
    for _, row in stream_rows(path):
        added = [row[key] for key in adds]
        numbers += added
        verdicts = []  # of each answer, or each order
        for _, attempts in attempts_in(row):
            unread += [reply["finish"] for reply in attempts if reply["verdict"] is None]
            verdicts.append([reply["verdict"] for reply in attempts
                             if reply["verdict"] is not None])
        spreads += [statistics.pstdev(several) for several in verdicts if len(several) > 1]
        if None not in added:
            gaps.append(added[0] - 0.5 if len(added) == 1 else added[1] - added[0])
            if any("graded" in attempts[-1] for _, attempts in attempts_in(row)):
                ties.append(1 == len({statistics.fmean(better(verdict, good) for verdict in several)
                                      for several in verdicts}))
    known = len(numbers) - numbers.count(None)
    what, number = ("answers", "a score") if len(adds) > 1 else ("rows", "a tau")
    print(f"{known} of {len(numbers)} {what} have {number} ({100 * known / len(numbers):.1f} %); "
          f"{len(unread)} replies had no verdict, {unread.count('length')} of them cut by "
          f"--max_tokens; {len(numbers) // len(adds) - len(gaps)} rows lack {number}")
    if spreads:
        print(f"repeated verdicts: identical on {100 * spreads.count(0) / len(spreads):.1f} % of "
              f"the answers, mean standard deviation {statistics.fmean(spreads):.2f}")
    if ties:
        print(f"{len(ties)} rows have graded scores: {sum(ties)} of them would tie by whole "
              "verdicts")
    if gaps:
        show_gaps(gaps, "rows" if len(adds) > 1 else "rows (tau - 1/2)")
    return known
