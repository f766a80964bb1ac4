"""A judge's reply, read: the number that is its verdict, or a graded score."""
import bisect
import itertools
import math
import re
import unicodedata
from collections import Counter

from infra.client import split_thinking
from infra.rows import FINISHED

NUMBER = r"[+-]?(?:[0-9]++(?:\.[0-9]++)?+|\.[0-9]++)"
MINE = r"(?:(?:so|thus|hence|therefore|overall|and|my|the|a|i|give|it|this|new|to)\s++)*"
CHANGED = r"(?:revis|updat|correct|adjust|amend|chang|rais|lower|increas|reduc)\w*+"
# A label begins a line, a sentence or a JSON key; words such as "So my" may precede it. In the
# middle of a sentence, or behind a quotation mark, it is no verdict.
BEFORE_LABEL = re.compile(
    rf"""(?: \n\W*+ | [{{\[,]\s*+["'] | [.!?:;,)}}|(\[]\s*+ | \\text\{{ )
         {MINE} (?: {CHANGED} \s++ )? $""", re.I | re.X)
# "I raise the final score to 4", but not "to raise", which is no verdict.
CHANGES_LABEL = re.compile(rf"\b(?<!to\s)(?<!ould\s)(?<!may\s)(?<!might\s)(?<!can\s)"
                           rf"{CHANGED}\s++{MINE}$", re.I)
# *+, ++ and ?+ never go back over spaces: where several of them meet, that would take minutes.
BEFORE_NUMBER = r"""["'\u201d]?+ \s*+ (?:\([^()\n]{1,12}\))? \s*+
                    (?: (?: is\b:? | of\b | to\b | [:=] ) (?: \s*+ (?:now|then|thus)\b )?+ )?+
                    [\s"'\u201c(\[{}$|]*+ (?: \\boxed\{ | <(?=[^>\n]+>) )?+ \s*+"""
# What would make the number part of another one, of a range or a sum, or doubtful.
AFTER_NUMBER = r"""(?! [\w%+?\u2044] | [.,][0-9] | \s*+ (?: \u00b1 | % | percent\b )
                     | \s*+ (?: [-=]++> | [\u2190-\u21ff\u2794-\u27be\u27f0-\u27ff] )
                       [\s("']*+ [0-9]
                     | \s*+ (?: \.\.+ | [-=~+<>\u2013\u2014\u00d7\u2248\u2260\u2264\u2265]*+
                              | \b(?:to|and|bis) ) \s*+ [0-9]
                     | \s*+ [,&|] \s*+ [0-9]++ (?! \s*+ [^\W\d] )
                     | [\s,;]++ (?: or|if|unless|would|might|maybe|perhaps|plus|minus|wait
                                  | and\s+a )\b )"""
CHANGED_NUMBER = re.compile(
    rf"""\b(?:{CHANGED}|actually|now|no|instead|rather|make|wait|should|thoughts?|reflection)
         [\s:=,"']++ (?: (?:to|it|that|is|be|up|down)\b [\s:=,]++ )*+
         (?P<number>{NUMBER})
         (?! \s*+ (?! (?:because|since|as|for|out|of|points?|stars?|now|instead|and|but)\b )
             [^\W\d] )""", re.I | re.X)  # not "corrects 2 mistakes"
SCALE = rf"""(?: (?: \s*+ (?:points?|stars?|marks?|pts)\b )?+
                 (?: [\s("'\[]*+ (?: / | [^\W\d]{{2,3}} )
                   | [\s("'\[,]*+ (?: out\s+of | (?:on\s+a\s+)?+ scale\s+ (?:(?:of|from)\b)?+ )
                   | [\s(\[]*+ (?= [01] \s*+ [-\u2013] ) )
                 \s*+ (?: [01] \s*+ (?:to\b|[-\u2013]) \s*+ )?+ (?P<scale>{NUMBER}) )?+"""
VERDICT = re.compile(f"{BEFORE_NUMBER} (?P<number>{NUMBER}) {AFTER_NUMBER} {SCALE}", re.I | re.X)
PLACEHOLDER = re.compile(r"\W*(?:N|X|your)\b")  # the request, repeated
STRUCK_OUT = re.compile(r"~~[^~\n]*+~~|<del>[^<\n]*+</del>|<strike>[^<\n]*+</strike>")


def parse_verdict(text, judge, finish="stop"):
    """The number in a judge's reply, or None unless it has one clear verdict within the scale.

    A verdict is the judge's label (or "score", a key of JSON), then a number. Markdown, words,
    quotes, brackets and end tokens may stand around it. None if two verdicts differ, if one is a
    range, in doubt or on another scale, and if the reply is not finished: the cut may have gone
    through the number. Time is linear in the text: only a window around each label is looked at.
    """
    return find_verdict(text, judge)[0] if finish in FINISHED else None


def find_verdict(text, judge):
    """(verdict or None, the answer in plain characters, where in it the number begins)."""
    text = split_thinking(text)[1]
    # Full-width forms and spaces. Long runs of accents take quadratic time, so in pieces.
    text = "".join(unicodedata.normalize("NFKC", text[i:i + 500]) for i in range(0, len(text), 500))
    text = text.replace("\N{MINUS SIGN}", "-").replace("_", " ")
    text = "\n" + re.sub("[*`#]", "", STRUCK_OUT.sub("", text))
    label = r"[^\S\n]*+".join(map(re.escape, judge.verdict.rstrip(": ").split()))
    found, depth, before = {}, 0, 0  # number, or None where it is not clear -> where it begins
    key = rf"""(?<=["'])(?:{CHANGED}\s)?score(?=["'])"""
    for match in re.finditer(rf"{label}\b|{key}", text, re.I):
        start, end = match.span()
        depth = max(0, depth + text.count("{", before, start) - text.count("}", before, start))
        before = start
        if depth > 1 and text[start - 1] in "\"'" and text[end:end + 1] in ("'", '"'):
            continue  # the key of a criterion
        lead = text[max(start - 60, 0):start]
        if BEFORE_LABEL.search(lead) or found and CHANGES_LABEL.search(lead):
            number, place = verdict_after(text[end:end + 240], judge.highest)
            if number != "none":
                found[number] = end + place
    verdict, place = found.popitem() if len(found) == 1 else (None, 0)
    in_scale = verdict is not None and judge.lowest <= verdict <= judge.highest
    return verdict if in_scale else None, text, place


def verdict_after(text, highest):
    """(the number behind a label, where): None if it is not clear, "none" if there is none."""
    match = VERDICT.match(text)
    if not match or match.start("number") >= 200:  # so that no window ends inside the number
        line = text.partition("\n")[0]
        has_number = re.match(r"\W*[:=]", line) and re.search("[0-9]", line)
        return None if has_number and not PLACEHOLDER.match(line) else "none", 0
    number, changed = float(match["number"]), CHANGED_NUMBER.search(text, match.end("number"))
    if match["scale"] and float(match["scale"]) != highest:
        return None, 0
    if changed and float(changed["number"]) != number:
        return None, 0
    is_on_next_line = "\n" in text[:match.start("number")]
    if is_on_next_line and not re.match(r"\W*(?:\n|$)", text[match.end():]):
        return "none", 0  # the first item of a list, or a sentence
    return number, match.start("number")


def better(verdict, good):
    """The verdict as a score: higher is better. `good` is the best kind: "high", "low", "zero"."""
    score = {"high": verdict, "low": -verdict, "zero": -abs(verdict)}[good]
    return score + 0.0  # turns -0.0 into 0.0


def score_range(judge):
    """[lowest, highest] score that a judge can give."""
    verdicts = [judge.lowest, judge.highest] + [0] * (judge.lowest < 0 < judge.highest)
    scores = [better(verdict, judge.good) for verdict in verdicts]
    return [min(scores), max(scores)]


def graded_score(logprobs, text, judge, score_of):
    """The expected score under the judge's own probabilities of the verdict's digit, or None.

    A judge writes whole numbers, so many pairs tie; but where it wrote 4 it may have given 5 the
    probability 0.3. logprobs are a Reply's; they may hold the thinking too, so the place is counted
    from the end of text, the answer. None if the server gives none or they are no probabilities, if
    the scale needs more than one digit, and if another digit than the verdict's was most probable.
    """
    verdict, plain, place = find_verdict(text, judge)
    answer, written = split_thinking(text)[1].rstrip(), "".join(token for token, _ in logprobs)
    digits = list(re.finditer("[0-9]", answer))
    if (verdict is None or judge.lowest < 0 or judge.highest > 9
            or [digit[0] for digit in digits] != re.findall("[0-9]", plain)):
        return None
    digit = digits[len(re.findall("[0-9]", plain[:place]))].start()
    line = answer.rfind("\n", 0, digit) + 1
    start = written.rfind(answer[line:], -100 - len(answer[line:]))  # an end token may follow
    if start < 0:
        return None
    ends = list(itertools.accumulate(len(token) for token, _ in logprobs))
    others = logprobs[bisect.bisect(ends, start + digit - line)][1]
    if not all(logprob < 0.01 for logprob in others.values()):  # rounding; nan is not
        return None
    weights = Counter()
    for other, logprob in others.items():
        if re.fullmatch("[0-9]", other.strip()) and judge.lowest <= int(other) <= judge.highest:
            weights[int(other)] += math.exp(logprob)
    if not weights.total() or max(weights, key=weights.get) != verdict:
        return None
    return sum(p * score_of(digit) for digit, p in weights.items()) / weights.total()


def read_reply(reply, judge, score_of):
    """{"verdict", "finish", "reply", ...} for the row; "graded" if the verdict can be."""
    verdict = parse_verdict(reply.text, judge, reply.finish)
    if verdict is not None and score_of(verdict) is None:
        verdict = None  # which is better: 1.5
    attempt = {"verdict": verdict, "finish": reply.finish, "reply": reply.text or reply.problem}
    attempt |= {name: vars(reply)[name] for name in ("thinking", "served") if vars(reply)[name]}
    graded = graded_score(reply.logprobs, reply.text, judge, score_of)
    return attempt if None in (verdict, graded) else attempt | {"graded": graded}


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
