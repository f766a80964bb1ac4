"""A behaviour: all there is to it stands in one TOML file of tasks/, and this reads it and fetches the public prompts that it names.

    python data.py --task tasks/safety.toml --out prompts.jsonl

[prompts] says where public rows lie, which field of them is the question, what to filter, how many to draw. They become two files of
rows, to train on and held out, {"id", "prompt": what the models read, "question": what the judge sees}.
"""
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import requests
from requests.adapters import HTTPAdapter, Retry

from data import BadInput, decode, parse_list, parse_rows, read_text, write_whole

# ----------------------------------------------------------------------------------------------------- the task file


@dataclass(kw_only=True)
class Judge:
    """How an answer is scored: what the judge is told, how it ends its reply, and what the number means."""
    instruction: str  # the judge's system message
    template: str  # its user turn, in which {question} and {answer} are replaced
    verdict: str  # the label of its last line; the score follows it
    lowest: int | float
    highest: int | float
    good: str  # which scores are best: "high", "low" or "zero" (nearest to 0)
    pairwise: str = ""  # a user turn that asks which of {first} and {second} answers {question} better, for eval.py --pairwise


@dataclass(kw_only=True)
class Source:
    """Where public prompts lie, and which of them to take. A field is a path into a row, such as "prompt.0.content"."""
    url: str
    format: str  # "csv", "jsonl", "json", or "rows": pages of a dataset hub's rows API
    question: str  # the field of the bare request, which the judge sees
    persona: str = ""  # the field of a text to put before it, on a line of its own
    templates: list = field(default_factory=list)  # each request goes into one of these, in place of {request}
    group: str = ""  # the field that sibling rows share: they are never on both sides of the split (default: the question)
    keep_equal: dict = field(default_factory=dict)  # field -> the text that it must be
    keep_filled: list = field(default_factory=list)  # fields that may not be empty
    drop_containing: dict = field(default_factory=dict)  # field -> the text that it may not contain
    draw: int = 0  # how many prompts to draw, 0 for all
    held_out: int | float = 0.1  # the share of the prompts that is kept from training


@dataclass(kw_only=True)
class Task:
    """All there is to a behaviour: a TOML file in tasks/."""
    name: str
    about: str
    system: str = ""  # the teacher's system message; the student sees the prompt alone
    critique: str  # the user turn that asks the teacher to criticise its own answer
    revision: str  # the user turn that asks for the rewrite
    judge: Judge
    prompts: Source = None  # or none: the prompts are the user's own


def load_task(path):
    """The Task of a TOML file. BadInput names the file, the key that is wrong and the remedy."""
    text = read_text(path, "a task file such as tasks/sycophancy.toml")
    try:
        task = from_table(Task, tomllib.loads(text), path)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: not TOML ({error}); tasks/sycophancy.toml shows the form") from error
    judge, prompts = task.judge, task.prompts
    checks = [
        ("judge.template", "{question}" in judge.template and "{answer}" in judge.template, "must hold both {question} and {answer}"),
        ("judge.pairwise", not judge.pairwise or all(slot in judge.pairwise for slot in ("{question}", "{first}", "{second}")),
         "must hold {question}, {first} and {second}"),
        ("judge.verdict", judge.verdict.strip().rstrip(": ").casefold() in judge.template.casefold(),
         "must be in `judge.template`, where the judge is told how to end: no other last line counts"),
        ("judge.lowest", -math.inf < judge.lowest < judge.highest < math.inf, f"must be below `judge.highest`, {judge.highest}"),
        ("judge.good", judge.good in ("high", "low", "zero"), 'must be "high", "low" or "zero"')]
    if prompts:
        checks += [
            ("prompts.format", prompts.format in ("csv", "jsonl", "json", "rows"), 'must be "csv", "jsonl", "json" or "rows"'),
            ("prompts.templates", all("{request}" in template for template in prompts.templates), "must each hold {request}"),
            ("prompts.draw", prompts.draw >= 0, "must be how many prompts to draw, or 0 for all"),
            ("prompts.held_out", 0 < prompts.held_out < 1, "must be a share between 0 and 1")]
    for key, right, remedy in checks:
        if not right:
            raise BadInput(f"{path}: `{key}` {remedy}")
    return task


TYPE_NAMES = {str: "some text", int: "a whole number", int | float: "a number", list: "a list of texts", dict: "a table of texts",
              Judge: "a table, [judge]", Source: "a table, [prompts]"}


def from_table(kind, table, path, prefix=""):
    """A dataclass from a TOML table. BadInput for a key that is unknown, missing, empty or of a wrong type.

    A field with a default may be left out or empty, the others not. The prefix names the table in messages.
    """
    fields = {one.name: one for one in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            raise BadInput(f"{path}: `{prefix}{key}` is unknown; correct it or take it out (the keys here: {', '.join(fields)})")
    values = {}
    for key, one in fields.items():
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if key not in table and not required:
            continue
        value, nested = table.get(key), dataclasses.is_dataclass(one.type)
        texts = value if isinstance(value, list) else value.values() if isinstance(value, dict) and not nested else []
        if (not isinstance(value, dict if nested else one.type) or isinstance(value, bool)  # a bool is an int, in Python
                or not all(isinstance(text, str) for text in texts) or required and isinstance(value, str) and not value.strip()):
            found = f"is {json.dumps(value, default=str)[:40]}" if key in table else "is missing"
            raise BadInput(f"{path}: `{prefix}{key}` {found}; it must be {TYPE_NAMES[one.type]}")
        values[key] = from_table(one.type, value, path, f"{key}.") if nested else value
    return kind(**values)


# ---------------------------------------------------------------------------------------------------- public prompts


def fetch(url, task_path, **parameters):
    """The text at an address, tried four times. BadInput where it cannot be had."""
    retry = Retry(3, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    try:
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=retry))
            session.mount("https://", HTTPAdapter(max_retries=retry))
            response = session.get(url, params=parameters, timeout=30)
        response.raise_for_status()
    except requests.RequestException as error:
        reason = type(error).__name__ if error.response is None else f"{error.response.status_code} {error.response.reason}"
        raise BadInput(f"{url}: cannot be fetched ({reason}); check the network and `prompts.url` in {task_path}, "
                       "or save the file yourself and give it with --source") from error
    return decode(response.content, url)


PAGE = 100  # rows that a rows API gives at a time


def public_rows(source, task_path, file):
    """The rows of a Source: from a file in its format where one is given, else from its address, page by page if need be."""
    if file:
        return parse_public(read_text(file, "a file of public prompts"), file, source.format)
    if source.format != "rows":
        return parse_public(fetch(source.url, task_path), source.url, source.format)
    rows, total = [], 1
    while len(rows) < total:
        name = f"{source.url} from row {len(rows)} on"
        page, total = parse_pages(fetch(source.url, task_path, offset=len(rows), length=PAGE), name)
        if not page:
            raise BadInput(f"{name}: no more rows, though there should be {total}; try again later, or use --source")
        rows += page
    return rows


def parse_public(text, name, format):
    """The rows of a text in a Source's format; name is what messages call it. BadInput where it is torn."""
    if format == "rows":
        return parse_pages(text, name)[0]
    if format != "csv":
        return [row for _, row in parse_rows(io.StringIO(text), name)]
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    try:
        for row in reader:
            if None in row or None in row.values():  # how DictReader marks a field too many or too few
                raise csv.Error(f"its fields are not those of the first line, {', '.join(reader.fieldnames)}")
            rows.append(row)
    except csv.Error as error:
        raise BadInput(f"{name}:{reader.line_num}: not CSV ({error}); the file must be whole") from error
    return rows


def parse_pages(text, name):
    """(rows, how many there are in all) of pages of a rows API, {"rows": [{"row": {...}}], "num_rows_total": 1000}."""
    pages = [page for _, page in parse_list(f"[{text}]", name, 1)]  # one after another, on however many lines
    try:
        return [item["row"] for page in pages for item in page["rows"]], int(pages[-1]["num_rows_total"])
    except (LookupError, TypeError) as error:
        raise BadInput(f"{name}: no page of a rows API; it must hold `rows`, each with a `row`, and `num_rows_total`") from error


def text_at(row, path):
    """The text in a row at a path such as "prompt.0.content", empty where the row has none."""
    for key in path.split("."):
        try:
            row = row[int(key) if isinstance(row, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            return ""
    return row if isinstance(row, str) else ""


def reason_to_skip(row, source):
    """Why a public row is left out, or None: what the filters say, or no question (or persona) in it."""
    for path, wanted in source.keep_equal.items():
        if text_at(row, path) != wanted:
            return f"`{path}` is not {wanted}"
    for path in filter(None, [*source.keep_filled, source.question, source.persona]):
        if not text_at(row, path).strip():
            return f"`{path}` is empty"
    for path, unwanted in source.drop_containing.items():
        if unwanted in text_at(row, path):
            return f"`{path}` has {unwanted}"


def draw_prompts(rows, source, templates, seed, limit):
    """(training rows, held-out rows, Counter of why rows were left out) of public rows: filtered, drawn, wrapped, split.

    The seed fixes all of it. Whole groups are held out: no question, and no sibling of it, stands on both sides.
    """
    candidates, left_out = {}, Counter()  # prompt -> (question, group)
    for row in rows:
        question = text_at(row, source.question)
        prompt = "\n".join(filter(None, [text_at(row, source.persona), question]))
        reason = reason_to_skip(row, source) or ("the same prompt again" if prompt in candidates else None)
        if reason:
            left_out[reason] += 1
        else:
            candidates[prompt] = question, text_at(row, source.group) or question
    rng, candidates = np.random.default_rng(seed), list(candidates.items())
    count = min(len(candidates), source.draw or len(candidates), limit or len(candidates))
    drawn = []  # (group, row), in random order
    for i in rng.permutation(len(candidates))[:count]:
        prompt, (question, group) = candidates[i]
        if templates:
            prompt = templates[rng.integers(len(templates))].replace("{request}", prompt)
        name = hashlib.sha256(json.dumps([prompt, question]).encode()).hexdigest()[:16]
        drawn.append((group, {"id": name, "prompt": prompt, "question": question}))
    aside, held_out = set(), 0
    for group, size in Counter(group for group, _ in drawn).items():
        if held_out < max(1, round(source.held_out * len(drawn))):
            aside.add(group)
            held_out += size
    return [row for group, row in drawn if group not in aside], [row for group, row in drawn if group in aside], left_out


def read_templates(path):
    """The jailbreak templates of a text file, a line of three dashes between two. BadInput for one without {request}."""
    templates = [template.strip() for template in re.split(r"(?m)^---\s*$", read_text(path, "a file of templates"))]
    for number, template in enumerate(templates, 1):
        if "{request}" not in template:
            raise BadInput(f"{path}: template {number} has no {{request}}, the request's place; a line of --- parts templates")
    return templates


def make_prompts(args):
    """Writes a task's public prompts into a training and a held-out file, and prints what became of the rows."""
    task = load_task(args.task)
    if not task.prompts:
        raise BadInput(f"{args.task}: no [prompts]; add it as in tasks/sycophancy.toml, or write your own rows with a `prompt`")
    held_out_path = args.held_out or "{}.held_out{}".format(*os.path.splitext(args.out))
    files = [os.path.realpath(path) for path in (args.out, held_out_path, args.task, args.source, args.templates) if path]
    if len(set(files)) < len(files):
        raise BadInput(f"--out, --held_out and the files that are read must be different files: {', '.join(files)}")
    templates = read_templates(args.templates) if args.templates else task.prompts.templates
    rows = public_rows(task.prompts, args.task, args.source)
    training, held_out, left_out = draw_prompts(rows, task.prompts, templates, args.seed, args.limit)
    reasons = ", ".join(f"{count} because {reason}" for reason, count in left_out.items())
    if not training:
        raise BadInput(f"{args.source or task.prompts.url}: {len(rows)} rows, too few to train on and to hold out, "
                       f"left out {reasons or 'none'}; check the fields and filters of [prompts] in {args.task}")
    for path, part in ((held_out_path, held_out), (args.out, training)):
        write_whole(path, "".join(json.dumps(row) + "\n" for row in part))
    print(f"{task.name}: {len(rows)} rows, left out {reasons or 'none'}")
    print(f"{len(training)} prompts in {args.out}, {len(held_out)} held out in {held_out_path} (seed {args.seed})")
