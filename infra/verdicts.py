"""A judge's reply, read: the number that is its verdict, or a graded score."""
import math
import re
import unicodedata
from collections import Counter

from infra.client import split_thinking
from infra.rows import FINISHED

NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
# A label begins a line, a sentence or a JSON key; words such as "So my" may precede it. In the
# middle of a sentence, or behind a quotation mark, it is no verdict.
BEFORE_LABEL = re.compile(
    r"""(?: \n\W* | [{\[,]\s*["'] | [.!?:;,)}|(\[]\s* | \\text\{ )
        (?: (?:so|thus|hence|therefore|overall|and|my|the|a|i|give|it) \s+ )* $""", re.I | re.X)
BEFORE_NUMBER = r"""["'\u201d]? \s* (?:\([^()\n]{1,12}\))? \s* (?: is\b:? | of\b | [:=] )?
                    [\s"'\u201c(\[{}$|]* (?: \\boxed\{ | <(?=[^>\n]+>) )? \s*"""
# What would make the number part of another one, of a range, or doubtful.
AFTER_NUMBER = r"""(?! [\w%+?\u2044] | [.,][0-9]
                     | \s* (?: \.\.+ | [-~\u2013\u2014] | \b(?:to|and|bis) )? \s* [0-9]
                     | \s* \u00b1
                     | [\s,;]+
                       (?: or|if|unless|would|might|maybe|perhaps|plus|minus|and\s+a )\b )"""
SCALE = rf"""(?: [\s("']* (?: / | out\sof | on\sa\sscale\sof | [^\W\d]{{2,3}} ) \s*
                 (?P<scale>{NUMBER}) )?"""
VERDICT = re.compile(f"{BEFORE_NUMBER} (?P<number>{NUMBER}) {AFTER_NUMBER} {SCALE}", re.I | re.X)
PLACEHOLDER = re.compile(r"\W*(?:N|X|your)\b")  # the request, repeated


def parse_verdict(text, judge, finish="stop"):
    """The number in a judge's reply, or None unless it has one clear verdict within the scale.

    A verdict is the judge's label (or "score", a key of JSON), then a number. Markdown, words,
    quotes, brackets and end tokens may stand around it. None if two verdicts differ, if one is a
    range, in doubt or on another scale, and if the reply is not finished: the cut may have gone
    through the number. Time is linear in the text: only a window around each label is looked at.
    """
    if finish not in FINISHED:
        return None
    text = unicodedata.normalize("NFKC", split_thinking(text)[1])  # full-width forms, spaces
    text = "\n" + re.sub("[*`#]", "", text.replace("\N{MINUS SIGN}", "-").replace("_", " "))
    label = r"[^\S\n]*".join(map(re.escape, judge.verdict.rstrip(": ").split()))
    found = set()
    for match in re.finditer(rf"""{label}\b|(?<=["'])score(?=["'])""", text, re.I):
        start, end = match.span()
        if BEFORE_LABEL.search(text[max(start - 60, 0):start]):
            found.add(verdict_after(text[end:end + 200], judge.highest))
    verdict, *others = found - {"none"} or {None}
    in_scale = not others and verdict is not None and judge.lowest <= verdict <= judge.highest
    return verdict if in_scale else None


def verdict_after(text, highest):
    """The number that follows a label; None if it is not clear; "none" if there is none."""
    match = VERDICT.match(text)
    if not match:
        line = text.partition("\n")[0]
        has_number = re.match(r"\W*[:=]", line) and re.search("[0-9]", line)
        return None if has_number and not PLACEHOLDER.match(line) else "none"
    if match["scale"] and float(match["scale"]) != highest:
        return None
    is_on_next_line = "\n" in text[:match.start("number")]
    if is_on_next_line and not re.match(r"\W*(?:\n|$)", text[match.end():]):
        return "none"  # the first item of a list, or a sentence
    return float(match["number"])


def better(verdict, good):
    """The verdict as a score: higher is better. `good` is the best kind: "high", "low", "zero"."""
    score = {"high": verdict, "low": -verdict, "zero": -abs(verdict)}[good]
    return score + 0.0  # turns -0.0 into 0.0


def score_range(judge):
    """[lowest, highest] score that a judge can give."""
    verdicts = [judge.lowest, judge.highest] + [0] * (judge.lowest < 0 < judge.highest)
    scores = [better(verdict, judge.good) for verdict in verdicts]
    return [min(scores), max(scores)]


def graded_score(logprobs, verdict, judge, score_of):
    """The expected score under the judge's own probabilities of the verdict's digit, or None.

    A judge writes whole numbers, so many pairs tie; but where it wrote 4 it may have given 5 the
    probability 0.3. logprobs are a Reply's. None if the server gives none, if the scale needs more
    than one digit, and if another digit than the verdict's was the most probable.
    """
    text, weights = "", Counter()
    for token, others in logprobs if 0 <= judge.lowest and judge.highest <= 9 else ():
        text += token
        if re.search("[0-9]", token) and parse_verdict(text, judge) == verdict:
            for other, logprob in others.items():
                if re.fullmatch("[0-9]", digit := other.strip()):
                    if judge.lowest <= int(digit) <= judge.highest:
                        weights[int(digit)] += math.exp(logprob)
            break
    if not weights or max(weights, key=weights.get) != verdict:
        return None
    return sum(p * score_of(digit) for digit, p in weights.items()) / weights.total()


def verdict_form(judge):
    """A response_format, for --json_verdicts: reasons, then a verdict that parse_verdict reads."""
    whole = all(isinstance(end, int) for end in (judge.lowest, judge.highest))
    verdict = {"type": "integer" if whole else "number",
               "minimum": judge.lowest, "maximum": judge.highest}
    properties = {"reasons": {"type": "string"}, judge.verdict.rstrip(": "): verdict}
    schema = {"type": "object", "properties": properties, "required": list(properties),
              "additionalProperties": False}
    return {"type": "json_schema",
            "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
