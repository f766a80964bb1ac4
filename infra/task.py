"""Task files: one TOML file in tasks/ holds everything about one behaviour.

The teacher reads system, critique and revision. The judge reads [judge]. data.py --task fetches
the public prompts that [prompts] names. Rows and code know nothing of the behaviour.
"""
import dataclasses
import json
import math
import tomllib
from dataclasses import MISSING, dataclass, field

from infra.command import BadInput
from infra.formats import is_text
from infra.rows import read_text


@dataclass(kw_only=True)
class Judge:
    """How an LLM scores an answer: its prompts, the form of its verdict, and the scale."""
    instruction: str  # the judge's system message
    template: str  # its user message; {question} and {answer} are replaced
    verdict: str  # the label of its last line; the score follows
    lowest: int | float
    highest: int | float
    good: str  # the best verdicts: "high", "low" or "zero" (nearest to 0)
    pairwise: str = ""  # for --pairwise: asks whether {first} or {second} is better


@dataclass(kw_only=True)
class Source:
    """Where public prompts are and which to take. A field is a path: "prompt.0.content"."""
    url: str
    format: str  # "csv", "jsonl", "json", or "rows" (pages of a dataset hub's rows API)
    question: str  # the field with the bare request, which the judge sees
    persona: str = ""  # the field with text to put before it, on its own line
    templates: list = field(default_factory=list)  # texts; the request replaces {request} in one
    group: str = ""  # rows with the same value stay on one side of the split (default: question)
    keep_equal: dict = field(default_factory=dict)  # field -> the text that it must equal
    keep_filled: list = field(default_factory=list)  # fields that must not be empty
    drop_containing: dict = field(default_factory=dict)  # field -> text that it must not contain
    draw: int = 0  # number of prompts to draw; 0 takes all
    held_out: int | float = 0.1  # share of the drawn prompts kept from training


@dataclass(kw_only=True)
class Task:
    """One behaviour, as its TOML file describes it."""
    name: str
    about: str
    system: str = ""  # the teacher's system message; the student sees the prompt alone
    critique: str  # the user message that asks the teacher to criticise its answer
    revision: str  # the user message that asks for the rewrite
    judge: Judge
    prompts: Source = None  # None: the user brings the prompts


def load_task(path):
    """Read a Task. BadInput names the file, the wrong key and the remedy."""
    text = read_text(path, "a task file such as tasks/sycophancy.toml")
    try:
        task = from_table(Task, tomllib.loads(text), path)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: not TOML ({error}); see tasks/sycophancy.toml") from error
    judge, prompts = task.judge, task.prompts
    label = judge.verdict.strip().rstrip(": ").casefold()
    slots = [slot for slot in ("{question}", "{first}", "{second}") if slot in judge.pairwise]
    if "{question}" not in judge.template or "{answer}" not in judge.template:
        raise BadInput(f"{path}: `judge.template` must hold both {{question}} and {{answer}}")
    if judge.pairwise and len(slots) < 3:
        raise BadInput(f"{path}: `judge.pairwise` must hold {{question}}, {{first}} and {{second}}")
    if label not in judge.template.casefold():
        raise BadInput(f"{path}: `judge.verdict` must be in `judge.template`: tell the judge to "
                       "end with that line")
    if not -math.inf < judge.lowest < judge.highest < math.inf:
        raise BadInput(f"{path}: `judge.lowest` must be below `judge.highest`, {judge.highest}, "
                       "and both finite")
    if judge.good not in ("high", "low", "zero"):
        raise BadInput(f'{path}: `judge.good` must be "high", "low" or "zero"')
    if not prompts:
        return task
    if prompts.format not in ("csv", "jsonl", "json", "rows"):
        raise BadInput(f'{path}: `prompts.format` must be "csv", "jsonl", "json" or "rows"')
    if not all("{request}" in template for template in prompts.templates):
        raise BadInput(f"{path}: `prompts.templates` must each hold {{request}}")
    if prompts.draw < 0:
        raise BadInput(f"{path}: `prompts.draw` must be the number of prompts, or 0 for all")
    if not 0 < prompts.held_out < 1:
        raise BadInput(f"{path}: `prompts.held_out` must be a share between 0 and 1")
    return task


TYPE_NAMES = {str: "some text", int: "a whole number", int | float: "a number",
              list: "a list of texts", dict: "a table of texts",
              Judge: "a table, [judge]", Source: "a table, [prompts]"}


def from_table(kind, table, path, prefix=""):
    """A dataclass from a TOML table. BadInput for an unknown, missing, empty or mistyped key.

    A key with a default may be left out or empty. The prefix names the table in messages.
    """
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            raise BadInput(f"{path}: `{prefix}{key}` is unknown; correct it or take it out (known "
                           f"keys: {', '.join(fields)})")
    for key, item in fields.items():
        required, value = item.default is item.default_factory is MISSING, table.get(key)
        right = is_text(value) if required and item.type is str else has_type(value, item.type)
        found = f"is {json.dumps(value, default=str)[:40]}" if key in table else "is missing"
        if not right and (required or key in table):
            raise BadInput(f"{path}: `{prefix}{key}` {found}; it must be {TYPE_NAMES[item.type]}")
        if key in table and dataclasses.is_dataclass(item.type):
            table[key] = from_table(item.type, value, path, f"{key}.")
    return kind(**table)


def has_type(value, kind):
    """Whether a TOML value has a field's type. The items of lists and tables must be texts."""
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if not isinstance(value, kind) or isinstance(value, bool):  # a bool is an int in Python
        return False
    items = value.values() if kind is dict else value if kind is list else ()
    return all(isinstance(item, str) for item in items)
