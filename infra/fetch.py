"""Public prompts for a task: fetch, filter, draw, wrap in templates, split.

    python data.py --task tasks/safety.toml --out prompts.jsonl

[prompts] of the task file (infra.task.Source) describes the public rows. They become two files,
for training and held out: {"id", "prompt": for the models, "question": for the judge}.
"""
import csv
import hashlib
import io
import json
import os
import re
from collections import Counter

import numpy as np
import requests
from requests.adapters import HTTPAdapter, Retry

from infra.command import BadInput
from infra.files import atomic_write
from infra.formats import SYSTEM
from infra.rows import decode, parse_rows, read_text
from infra.task import load_task


def make_prompts(args):
    """Write a task's prompts to --out and --held_out, and print a summary.

    args has task, out, held_out, source, templates, seed and limit. BadInput as the first error.
    """
    task = load_task(args.task)
    held_out_path = args.held_out or "{}.held_out{}".format(*os.path.splitext(args.out))
    paths = (args.out, held_out_path, args.task, args.source, args.templates)
    files = [os.path.realpath(path) for path in paths if path]
    if not task.prompts:
        raise BadInput(f"{args.task}: no [prompts]; add it as in tasks/sycophancy.toml, or write "
                       "your own rows with a `prompt`")
    if len(set(files)) < len(files):
        raise BadInput("--out, --held_out and all input files must be different files: "
                       + ", ".join(files))
    templates = read_templates(args.templates) if args.templates else task.prompts.templates
    rows = public_rows(task.prompts, args.task, args.source)
    training, held_out, skipped = draw_prompts(rows, task.prompts, templates, args.seed, args.limit)
    reasons = ", ".join(f"{count} because {reason}" for reason, count in skipped.items()) or "none"
    if not training:
        raise BadInput(f"{args.source or task.prompts.url}: {len(rows)} rows, too few for training "
                       f"and held-out prompts, left out {reasons}; check [prompts] in {args.task}")
    for path, part in ((held_out_path, held_out), (args.out, training)):
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in part))
    print(f"{task.name}: {len(rows)} rows, left out {reasons}")
    print(f"{len(training)} prompts in {args.out}, {len(held_out)} held out in {held_out_path} "
          f"(seed {args.seed})")


# --------------------------------------------------------------------------- from rows to prompts


HELD_OUT = 100  # prompts, if the source has them: a rate is then known to 10 points either way


def draw_prompts(rows, source, templates, seed, limit):
    """(training rows, held-out rows, Counter of reasons for skipped rows). The seed fixes all.

    Held out: a share of the drawn rows, topped up to HELD_OUT with rows that were not drawn. Rows
    of one group stay together, so no question is on both sides of the split.
    """
    candidates, skipped = {}, Counter()  # (prompt, system message) -> (question, group)
    for row in rows:
        question = text_at(row, source.question)
        prompt = "\n".join(filter(None, [text_at(row, source.persona), question]))
        system = "" if SYSTEM.fullmatch(source.persona) else next(
            filter(None, (text_at(row, name) for name in row if SYSTEM.fullmatch(name))), "")
        reason = reason_to_skip(row, source)
        if not reason and (prompt, system) in candidates:
            reason = "the same prompt again"
        if reason:
            skipped[reason] += 1
        else:
            candidates[prompt, system] = question, text_at(row, source.group) or question
    rng, candidates = np.random.default_rng(seed), list(candidates.items())
    shuffled = []  # (group, row)
    for i in rng.permutation(len(candidates))[:limit]:
        (prompt, system), (question, group) = candidates[i]
        if templates:
            prompt = templates[rng.integers(len(templates))].replace("{request}", prompt)
        texts = {"prompt": prompt, "question": question} | ({"system": system} if system else {})
        row_id = hashlib.sha256(json.dumps([*texts.values()]).encode()).hexdigest()[:16]
        shuffled.append((group, {"id": row_id} | texts))
    drawn = shuffled[:source.draw or None]
    trained_on, held_out_count = set(), 0
    for group, size in Counter(group for group, _ in drawn).items():
        if held_out_count < max(1, round(source.held_out * len(drawn))):
            held_out_count += size
        else:
            trained_on.add(group)
    training = [row for group, row in drawn if group in trained_on]
    held_out = [row for group, row in shuffled if group not in trained_on]
    return training, held_out[:max(held_out_count, HELD_OUT)], skipped


def reason_to_skip(row, source):
    """The reason to skip a public row: a filter, or no question or persona in it. Else None."""
    needed = list(filter(None, [*source.keep_filled, source.question, source.persona]))
    others = (source.group, *source.keep_equal, *source.drop_containing)
    for path in (*needed, *filter(None, others), *filter(SYSTEM.fullmatch, row)):
        if path.split(".")[0] in (row.get("truncated_cells") or ()):
            return f"`{path}` is cut by the rows API; download the whole rows and use --source"
    for path, wanted in source.keep_equal.items():
        if text_at(row, path) != wanted:
            return f"`{path}` is not {wanted}"
    for path in needed:
        if not text_at(row, path).strip():
            return f"`{path}` is empty"
    for path, unwanted in source.drop_containing.items():
        if unwanted in text_at(row, path):
            return f"`{path}` has {unwanted}"
    return None


def text_at(row, path):
    """The text at a path such as "prompt.0.content", or "" if the row has none there."""
    try:
        for key in path.split("."):
            row = row[int(key) if isinstance(row, list) else key]
    except (LookupError, TypeError, ValueError):
        return ""
    return row if isinstance(row, str) else ""


def read_templates(path):
    """Templates from a text file, separated by lines of three dashes."""
    text = read_text(path, "a file of templates")
    templates = [template.strip() for template in re.split(r"(?m)^---\s*$", text)]
    for number, template in enumerate(templates, 1):
        if "{request}" not in template:
            raise BadInput(f"{path}: template {number} has no {{request}}, the place of the "
                           "request; separate templates by a line of ---")
    return templates


# -------------------------------------------------------------------------- from a source to rows


def public_rows(source, task_path, file):
    """The public rows of a Source: from `file` if given, else from source.url."""
    name = file or source.url
    if source.format == "rows" and not file:
        return fetch_pages(name, task_path)
    text = read_text(file, "a file of public prompts") if file else fetch(name, task_path)
    if source.format == "rows":
        return parse_pages(text, name)[0]
    if source.format == "csv":
        return parse_csv(text, name)
    return [row for _, row in parse_rows(io.BytesIO(text.encode()), name)]


def fetch_pages(url, task_path):
    """All rows of a rows API."""
    rows, total = [], 1
    while len(rows) < total:
        name = f"{url} from row {len(rows)} on"
        page = fetch(url, task_path, offset=len(rows), length=100)  # the most that it gives
        page, total = parse_pages(page, name)
        if not page:
            raise BadInput(f"{name}: no more rows, though there should be {total}; try again "
                           "later, or use --source")
        rows += page
    return rows


def fetch(url, task_path, **parameters):
    """The text at an address. Tries four times; BadInput if that fails."""
    retry = Retry(3, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504),
                  raise_on_status=False)
    try:
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=retry))
            session.mount("https://", HTTPAdapter(max_retries=retry))
            response = session.get(url, params=parameters, timeout=30)
        response.raise_for_status()
    except requests.RequestException as error:
        reason = type(error).__name__
        if error.response is not None:
            reason = f"{error.response.status_code} {error.response.reason}"
        raise BadInput(f"{url}: cannot be fetched ({reason}); check the network and `prompts.url` "
                       f"in {task_path}, or download it and use --source") from error
    return decode(response.content, url)


def parse_csv(text, name):
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    try:
        for row in reader:
            if None in row or None in row.values():  # DictReader's marks for a wrong field count
                columns = ", ".join(reader.fieldnames)
                raise csv.Error(f"its fields are not those of the first line, {columns}")
            rows.append(row)
    except csv.Error as error:
        raise BadInput(f"{name}:{reader.line_num}: not CSV ({error}); "
                       "the file must be whole") from error
    return rows


def parse_pages(text, name):
    """(rows, total) from a rows API's pages: {"rows": [{"row": {...}}], "num_rows_total": 1000}.

    Pages may span lines, and follow each other with or without white space.
    """
    text, position, rows = text.rstrip(", \t\r\n"), 0, []
    try:
        while True:
            start = re.compile(r"[\s,]*").match(text, position).end()
            page, position = json.JSONDecoder().raw_decode(text, start)
            for item in page["rows"]:
                cut = item.get("truncated_cells")
                rows.append(item["row"] | ({"truncated_cells": cut} if cut else {}))
            total = int(page["num_rows_total"])
            if page.get("partial"):
                raise BadInput(f"{name}: a part of its dataset; download all and use --source")
            if position == len(text):
                return rows, total
    except json.JSONDecodeError as error:
        raise BadInput(f"{name}:{error.lineno}: not JSON ({error.msg}); "
                       "the file must be whole") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{name}: not a page of a rows API; it must hold `rows`, each with a `row`, "
                       "and `num_rows_total`") from error
