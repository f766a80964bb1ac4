"""Rows of JSON: reading files, and what is refused.

Stages 1 and 2 run on machines without a GPU stack, so nothing here imports torch.
"""
import gzip
import itertools
import json
import math
import os
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field

from infra.command import BadInput, first_line, warn
from infra.formats import (CHATS, EMPTY, IN_ROW, TOLD, TURN, as_chat, as_messages, context_of,
                           is_chat, is_text, joined, ranked_answers)

LARGEST_SCORE = 1e38  # the gap of two scores must be finite in float32

# Why a model ended a reply that is finished, in lower case; None: the server does not say. With any
# other reason ("length", "content_filter", ...) the reply is cut.
FINISHED = ("stop", "end", "eos", "eos_token", "end_turn", "end_of_text", "stop_sequence",
            "complete", "completed", "done", "", None)

# ------------------------------------------------------------------------------------------- files

BOM = b"\xef\xbb\xbf"  # the byte-order mark that some editors write before UTF-8
LONGEST_LINE = 2**30  # bytes: neither /dev/zero nor a gzip bomb may fill the memory
CONVERT = "convert it (pip install {}), then give rows.jsonl: python -c \"{}\""
PANDAS = CONVERT.format("pandas pyarrow", "import pandas; pandas.read_{}('{{}}')"
                        ".to_json('rows.jsonl', orient='records', lines=True)")
# First bytes of files that are not read -> what they are, and what to do
NOT_READ = {
    b"PAR1": "a Parquet file; " + PANDAS.format("parquet"),
    b"ARROW1": "an Arrow file; " + PANDAS.format("feather"),
    b"FEA1": "a Feather file; " + PANDAS.format("feather"),
    b"\xff\xff\xff\xff": "an Arrow stream, as datasets keeps it; " + CONVERT.format(
        "datasets", "import datasets; datasets.Dataset.from_file('{}').to_json('rows.jsonl')"),
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it: zstd -d '{}'",
    b"\xfd7zXZ\0": "packed by xz; unpack it: xz -dk '{}'",
    b"BZh": "packed by bzip2; unpack it: bunzip2 -k '{}'",
    b"\x04\x22\x4d\x18": "packed by lz4; unpack it: lz4 -d '{}'",
    b"PK\x03\x04": "a zip file; unpack it: unzip '{}'",
}


def read_text(path, wanted):
    """The text of a UTF-8 file. BadInput if it cannot be read; `wanted` says which file to give."""
    try:
        with open(path, "rb") as file:
            return decode(file.read(), path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give {wanted}") from error


def read_object(path, wanted):
    """The JSON object that a whole file is. BadInput if it is none; `wanted` as in read_text."""
    try:
        with open(path, "rb") as file:
            value = json.load(file)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give {wanted}") from error
    except (RecursionError, ValueError) as error:
        raise BadInput(f"{path}: damaged ({first_line(error)}); give {wanted}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object; give {wanted}")
    return value


def read_flags(out_dir, wanted="the out_dir of a run of train.py"):
    """The flags of a run of train.py. BadInput if out_dir is none; `wanted` as in read_text."""
    path = os.path.join(out_dir, "args.json")
    flags = read_object(path, wanted)
    if not {"beta", "data", "model"} <= flags.keys():
        raise BadInput(f"{path}: not the flags of train.py; give {wanted}")
    return flags


def decode(content, path, line=1):
    """Bytes as text, without a byte-order mark. BadInput names the line that is not UTF-8."""
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise BadInput(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error


# -------------------------------------------------------------------------------------- JSON rows


def read_rows(path):
    """All ("file:line", row) of a file as a list. See stream_rows."""
    return list(stream_rows(path))


def stream_rows(path, on_bad=None):
    """Yield ("file:line", row) from .jsonl, or ("file, item n", row) from one JSON list.

    A .jsonl file is read one line at a time; gzip is unpacked. A file that cannot be read, or a
    line that is no JSON object, raises BadInput; with on_bad, a line's error goes to on_bad(error).
    """
    try:
        with open(path, "rb") as file:
            yield from parse_rows(read_lines(file, path), path, on_bad)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a .jsonl file or a JSON list") from error


def read_lines(file, path):
    """Yield the lines of a binary file, unpacked if it is gzip by its first bytes."""
    first_bytes = file.peek(6)  # a pipe cannot be read twice
    for start, what in NOT_READ.items():
        if first_bytes.startswith(start):
            raise BadInput(f"{path}: {what.format(path)}")
    file = gzip.open(file) if first_bytes.startswith(b"\x1f\x8b") else file
    number = 1
    try:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise BadInput(f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes; give "
                               "one JSON object per line")
            yield line
            number += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path}:{number}: the gzip file is cut or damaged here; "
                       "fetch or pack it again") from error


def parse_rows(lines, path, on_bad=None):
    """Yield the rows of an iterable of lines, as stream_rows; messages call it `path`."""
    numbered = enumerate(lines, 1)
    start, first = next((pair for pair in numbered if pair[1].removeprefix(BOM).strip()), (0, b""))
    if not first:
        raise BadInput(f"{path}: the file is empty; give one JSON object per line")
    is_list = first.removeprefix(BOM).lstrip().startswith(b"[")
    if is_list:
        content = first + b"".join(line for _, line in numbered)
        items = enumerate(parse_json(content, path, start), 1)
    else:
        later = (pair for pair in numbered if pair[1].strip())
        items = itertools.chain([(start, first)], later)
    for number, item in items:
        where = f"{path}, item {number}" if is_list else f"{path}:{number}"
        try:
            row = item if is_list else parse_json(item, path, number)
            check_object(row, where)
        except BadInput as error:
            if not on_bad:
                raise
            on_bad(error)
        else:
            yield where, row


def parse_json(content, path, line):
    """The JSON value of bytes that begin on a line of a file. BadInput names the faulty line."""
    text = decode(content, path, line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{line + error.lineno - 1}: not JSON ({error.msg}); "
                       "give whole JSON objects, one per line or in one list") from error
    except RecursionError as error:
        raise BadInput(f"{path}:{line}: brackets are nested too deep; take them out") from error
    except ValueError as error:  # Python's own bound
        raise BadInput(f"{path}:{line}: a number of more than {sys.get_int_max_str_digits()} "
                       "digits; shorten it, or write it as text") from error


def check_object(row, where):
    """BadInput if a row is no JSON object, or cannot be written again as UTF-8."""
    if not isinstance(row, dict):
        raise BadInput(f"{where}: a row must be a JSON object, not a {type(row).__name__}; see "
                       "data.py")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(error.object[error.start]):x}"
        raise BadInput(f"{where}: {escape} without its other half is no character; replace it, "
                       "or take the row out") from error
    except RecursionError as error:
        raise BadInput(f"{where}: brackets are nested too deep; take them out") from error


@dataclass
class RowCounts:
    """How many rows a file has, how many pairs were cut, which rows were left out and why."""
    rows: int = 0
    truncated: int = 0
    read: Counter = field(default_factory=Counter)  # what was read as what -> rows
    groups: int = 0  # values of `group`
    unscored: list = field(default_factory=list)  # "file:line" without a key for both scores
    dropped: dict = field(default_factory=dict)  # reason -> ["file:line"]

    def drop(self, reason, where):
        self.dropped.setdefault(reason, []).append(where)

    def dropped_count(self):
        return sum(map(len, self.dropped.values()))

    def lines(self):
        """One sentence per fact, with the first rows it applies to."""
        lines = [f"read {what}: {count} of {self.rows} rows" for what, count in self.read.items()]
        counts = {"values of `group`; the split keeps each on one side": self.groups,
                  "pairs were cut to max_length": self.truncated}
        lines += [f"{count} {what}" for what, count in counts.items() if count]
        for reason, names in self.dropped.items():
            lines.append(f"left out {len(names)} of {self.rows} rows, {reason}: {few(names)}")
        return lines

    def report(self):
        """Print the lines; warn if more than a tenth of the rows were left out."""
        print("".join(line + "\n" for line in self.lines()), end="")
        if self.dropped_count() > self.rows / 10:
            warn(f"{self.dropped_count()} of {self.rows} rows were left out")


def few(names):
    """The first names of a list, as text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# --------------------------------------------------------------------------------- what is refused


def check_input(row, where):
    """BadInput if the prompt of a canonical row lacks a part of what the model should read."""
    if row.get("truncated_cells"):
        raise BadInput(f"{where}: a rows API cut its texts (`truncated_cells`); download it whole")
    instruction, given = row.get("instruction"), row.get("input")
    both_text = isinstance(instruction, str) and isinstance(given, str)
    if (instruction is not None and instruction == row.get("prompt")
            and given not in (None, "") and not both_text):
        raise BadInput(f"{where}: `instruction` and `input` cannot be joined; give both as text, "
                       "or a `prompt`")
    before, prompt = context_of(row), as_messages(row.get("prompt"))
    if before and prompt[:len(before)] != before:
        raise BadInput(f"{where}: `system` or `history` cannot be put before the prompt; give the "
                       "whole conversation as `prompt`, and take these keys out")
    for name in row:
        if not in_prompt(name, row):
            raise BadInput(f"{where}: `{name}` changes what a model reads, and is not read here; "
                           "put its text into `prompt`, or take the key out")


def in_prompt(name, row):
    """Whether the prompt of a row holds all that this key of the row may tell the model."""
    value, prompt = row[name], row.get("prompt")
    if value in EMPTY or isinstance(value, (int, float)):
        return True
    if name in CHATS and is_chat(chat := as_chat(value)):
        asked = chat[:-1] if chat[-1]["role"] == "assistant" else chat
        return not asked or joined(prompt, asked) == prompt
    if name in CHATS and not TOLD.fullmatch(name):  # in a form that is not read
        return False
    # `question` beside a `prompt` is what the judge sees.
    is_part = TOLD.fullmatch(name) or name in ("instruction", "query", "input") or (
        name == "question" and {"instruction", "query"} & row.keys())
    parts = value if isinstance(value, list) and TOLD.fullmatch(name) else [value]
    if not is_part or not all(map(is_text, parts)):
        return not IN_ROW.fullmatch(name)
    told = "\n".join(str(turn.get("content")) for turn in as_messages(prompt)
                     if isinstance(turn, dict))
    return all(part.strip() in told for part in parts)


def check_prompt(row, where):
    """BadInput unless a row has a prompt that can be sent and, if any, a question of text."""
    check_input(row, where)
    prompt = row.get("prompt")
    if not is_text(prompt) and not (is_chat(prompt) and prompt[-1]["role"] == "user"):
        raise BadInput(f"{where}: no `prompt` that can be sent; it must be text, or chat messages "
                       "ending with the user's")
    if not is_text(row.get("question", "text")):
        raise BadInput(f"{where}: `question` must be text; leave it out to show the judge the "
                       "prompt")


def check_pair(row, where, needs_scores):
    """A canonical row's (prompt, chosen, rejected, [score_chosen, score_rejected], tau).

    prompt is text or a list of messages, the answers are texts. A score is a float, None if the
    row says null (asked for, but not given) or has none. tau is the row's own, from 0 to 1, or
    nan. BadInput if one of them is of another kind, or needs_scores and the row has neither.
    """
    check_input(row, where)
    are_turns = [isinstance(row.get(name), str) and bool(TURN.match(row[name]))
                 for name in ("chosen", "rejected")]
    if all(are_turns) or are_turns[0] and "prompt" not in row:
        raise BadInput(f"{where}: transcripts (Human: ... Assistant: ...) must be equal up to the "
                       "last Assistant turn, end with it and continue `prompt`; cut them so")
    for name in ("prompt", "chosen", "rejected"):
        value = row.get(name)
        if name not in row and ranked_answers(row)[1]:
            raise BadInput(f"{where}: its answers are equally good; take the row out, or run with "
                           "--skip_bad_rows")
        if name not in row and {"completion", "label"} <= row.keys():
            raise BadInput(f"{where}: one `completion` and its `label` (as for KTO) are no pair; a "
                           "row needs two answers to its prompt")
        if name not in row:
            raise BadInput(f"{where}: no `{name}`; a row needs prompt, chosen (the better answer) "
                           "and rejected")
        if not isinstance(value, (str, list)):
            raise BadInput(f"{where}: `{name}` is a {type(value).__name__}; it must be text or a "
                           "list of chat messages")
        if value == [] or isinstance(value, str) and not is_text(value):
            raise BadInput(f"{where}: `{name}` is empty; take the row out, or run with "
                           "--skip_bad_rows")
        if isinstance(value, list) and not is_chat(value):
            raise BadInput(f'{where}: `{name}` must hold messages like {{"role": "user", '
                           '"content": "text"}}, without images, tool calls or reasoning')
    prompt, answers = row["prompt"], [as_answer(row[name]) for name in ("chosen", "rejected")]
    if isinstance(prompt, list) and prompt[-1]["role"] != "user":
        raise BadInput(f"{where}: the last message of `prompt` must be the user's")
    if None in answers:
        raise BadInput(f"{where}: `chosen` and `rejected` must each be text or one assistant "
                       "message, after the same messages, which continue `prompt`")
    scores = []
    for name in ("score_chosen", "score_rejected"):
        score = row.get(name)
        if needs_scores and name not in row and not has_tau(row):
            raise BadInput(f"{where}: no `{name}`; this loss needs both scores: run reward.py, or "
                           "use --loss dpo or sft")
        if score is not None and not (is_number(score) and abs(score) <= LARGEST_SCORE):
            raise BadInput(f"{where}: `{name}` is {json.dumps(score)[:40]}; a score must be a "
                           "finite number, or null")
        scores.append(None if score is None else float(score))
    tau = row["tau"] if has_tau(row) else None
    if tau is not None and not (is_number(tau) and 0 <= tau <= 1):
        raise BadInput(f"{where}: `tau` is {json.dumps(tau)[:40]}; it must be from 0 to 1, or null")
    return prompt, *answers, scores, math.nan if tau is None else float(tau)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def has_tau(row):
    """Whether a row has `tau`, its target itself, in place of two scores."""
    return "tau" in row and not {"score_chosen", "score_rejected"} & row.keys()


def judge_of(row, where):
    """(behaviour, judge, width of the judge's scale) of a scored row: "", "", None if not said."""
    judge = row["judge"] if isinstance(row.get("judge"), dict) else {"model": row.get("judge")}
    behaviour = row.get("behaviour") or judge.get("behaviour") or ""
    named = [str(judge[key]) for key in ("model", "task", "endpoint") if judge.get(key)]
    scale = judge.get("scale")
    is_scale = isinstance(scale, list) and len(scale) == 2 and all(
        type(end) in (int, float) and abs(end) <= LARGEST_SCORE for end in scale)
    if scale is not None and not (is_scale and scale[0] < scale[1]):
        raise BadInput(f"{where}: `judge.scale` is {json.dumps(scale)[:40]}; it must be [lowest, "
                       "highest] score, or be left out")
    return str(behaviour), " ".join(named), scale and float(scale[1] - scale[0])


def weight_of(row, where):
    """A row's `weight` in the loss: a number above 0, 1 if it has none. BadInput for another."""
    weight = 1.0 if row.get("weight") is None else row["weight"]
    if not (is_number(weight) and 0 < weight <= LARGEST_SCORE):
        raise BadInput(f"{where}: `weight` is {json.dumps(weight)[:40]}; it must be a number above "
                       "0, or be left out")
    return float(weight)


def check_judges(pairs):
    """BadInput if several judges scored the pairs and one of them has no scale.

    A gap of 1 then means different things, which no temperature makes up for.
    """
    of_judge = {(pair.judge, pair.scale): pair for pair in reversed(pairs)
                if not math.isnan(pair.lean)}  # the first pair of each
    for (judge, scale), pair in of_judge.items():
        if scale is None and len(of_judge) > 1:
            raise BadInput(
                f"{pair.where}: scored by {judge or 'an unnamed judge'} on an unknown scale, and "
                'other rows are scored otherwise; add "judge": {"scale": [lowest, highest]} to its '
                "rows, or train on one judge's rows at a time")


def question_of(row):
    """The judge's question: row["question"], else the prompt; long chats with role names."""
    if "question" in row or isinstance(row["prompt"], str):
        return row.get("question", row["prompt"])
    if len(row["prompt"]) == 1:
        return row["prompt"][0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])


def as_answer(value):
    """The text of an answer, given as text or as one assistant message; None if it is neither."""
    if isinstance(value, str):
        return value
    return value[0]["content"] if len(value) == 1 and value[0]["role"] == "assistant" else None


def is_cut(row):
    """Whether the teacher's first turn (rejected) or its last one (chosen) is not finished."""
    teacher = row.get("teacher")
    finish = teacher.get("finish") if isinstance(teacher, dict) else None
    return isinstance(finish, list) and any(
        (reason.lower() if isinstance(reason, str) else reason) not in FINISHED
        for reason in finish[:1] + finish[-1:])
