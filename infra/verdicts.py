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
BEFORE_NUMBER = r"""["'\u201d]?+ \s*+ (?:\((?P<of>[^()\n]{1,12})\))? \s*+
                    (?: (?: is\b:? | of\b | to\b | [:=] ) (?: \s*+ (?:now|then|thus)\b )?+ )?+
                    [\s"'\u201c(\[{}$|]*+ (?: \\boxed\{ | <(?=[^>\n]+>) )?+ \s*+"""
# What would make the number part of another one, or doubtful.
AFTER_NUMBER = r"""(?! [\w%+?\u2044] | [.,\u066b][0-9] | [\s\\]*+ (?: \u00b1 | % | percent\b )
                     | \s*+ (?: \.\. | \u2026 | \(?\? )
                     | [^\S\n]*+ (?: more\b | [=+\u00d7]*+ [^\S\n]*+ [0-9] )
                     | [\s,;(\[\u2013\u2014-]++ (?: or|if|unless|would|might|could|maybe|perhaps
                           | possibly|plus|minus|wait|assuming|is|means?|requires?|ties?|equals?|vs
                           | and\s+ (?:a\b|[0-9]) )\b )"""
VERDICT = re.compile(f"{BEFORE_NUMBER} (?P<number>{NUMBER}) {AFTER_NUMBER}", re.I | re.X)
# Another number in the sentence of a verdict may be the verdict, unless it ...
OTHER = re.compile(rf"(?:(?<![a-z0-9.])|(?<=to)|(?<=von)){NUMBER}(?![a-z0-9]|\.[0-9])", re.I)
COUNTS = re.compile(  # ... counts things ("3 facts"), which these words are not,
    r"\s*+(?!(?:because|since|as|for|out|points?|stars?|marks?|now|instead|and|but|if|or|when|on|in"
    r"|at|to|after|before|overall|otherwise|max|scale|\u5206|\u70b9)\b)[^\W\d]", re.I)
REFUSED = re.compile(  # ... is refused, or is the number of a thing ("reply 2"),
    r"\b(?:not|los\w+|deduct\w*|by|from|was|were|than|instead of|the|reply|response|answer|option"
    r"|claim|steps?|lines?|sections?|examples?|questions?|items?|parts?|paragraphs?|sentences?"
    r"|version)\W*$", re.I)
AT_MOST = re.compile(  # ... is the end of the scale,
    r"(?:/|\b(?:of|von|de|sur|su|di|possible|max\w*|scale|on)|\u6ee1\u5206)\W*(?:an?\s|the\s)?\s*$",
    re.I)
LABELLED = re.compile(r"[^\W\d]\W{0,4}$")  # ... or has its own name in brackets, but not these:
IS_VERDICT = re.compile(
    rf"\b(?:{CHANGED}|total|overall|final|max|of|scale|range|penal\w*|now|or|maybe|perhaps|possibly"
    r"|could|so|edit|actual|new|rounded)\b[^()]{0,12}$", re.I)
CHANGED_NUMBER = re.compile(
    rf"""\b(?:{CHANGED}|actually|now|no|instead|rather|make|wait|should|thoughts?|reflection
             |oops|meant?|edit|hmm|correction|so|penalty)
         [\s:=,"']++ (?: (?:to|it|that|is|be|up|down)\b [\s:=,]++ )*+
         (?P<number>{NUMBER})
         (?! \s*+ (?! (?:because|since|as|for|out|of|points?|stars?|now|instead|and|but|may)\b )
             [^\W\d] )""", re.I | re.X)  # not "corrects 2 mistakes"
# A later "Score: 2", or a line that is a number
LATER = re.compile(rf"""(?: \n [^\w\n]{{0,9}} (?={NUMBER}[^\w\n]*+(?:\n|$))
        | [\n.] [^\w\n]{{0,9}} (?:(?:{CHANGED}|new|actual|final|overall|my|i|give) [ ]++){{0,4}}+
          (?:score|rating|grade)\b [\s:=]*+ (?:(?:is|to|of)\b)?+ ) [\s:=]*+ (?P<number>{NUMBER})""",
                   re.I | re.X)
PLACEHOLDER = re.compile(r"\W*(?:N|X|your)\b")  # the request, repeated
STRUCK_OUT = re.compile(r"~~[^~\n]*+~~|<del>[^<\n]*+</del>|<strike>[^<\n]*+</strike>")


COMPARES = "Better:"  # the label of a judge that compares two replies: 1, 2 or 0


def parse_verdict(text, judge, finish="stop"):
    """The number in a judge's reply, or None unless it has one clear verdict within the scale.

    A verdict is the judge's label (or "score", a key of JSON), then a number. Markdown, words,
    quotes, brackets and end tokens may stand around it. None if two verdicts differ, if one is in
    doubt or on another scale, if another number of its sentence may be meant, and if the reply is
    not finished: the cut may have gone through the number. None costs another request at most, a
    wrong number a wrong pair. Time is linear in the text.
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
    labels = rf"{label}\b" if judge.verdict == COMPARES else rf"{label}\b|{key}"
    for match in re.finditer(labels, text, re.I):
        start, end = match.span()
        depth = max(0, depth + text.count("{", before, start) - text.count("}", before, start))
        before = start
        if depth > 1 and text[start - 1] in "\"'" and text[end:end + 1] in ("'", '"'):
            continue  # the key of a criterion
        lead = text[max(start - 60, 0):start]
        if BEFORE_LABEL.search(lead) or found and CHANGES_LABEL.search(lead):
            number, place = verdict_after(text[end:end + 240], judge)
            if number != "none":
                found[number] = end + place
    verdict, place = found.popitem() if len(found) == 1 else (None, 0)
    if verdict is not None and any(float(later["number"]) != verdict
                                   for later in LATER.finditer(text, place)):
        verdict = None
    in_scale = verdict is not None and judge.lowest <= verdict <= judge.highest
    return verdict if in_scale else None, text, place


def verdict_after(text, judge):
    """(the number behind a label, where): None if it is not clear, "none" if there is none."""
    match = VERDICT.match(text)
    if not match or match.start("number") >= 200:  # so that no window ends inside the number
        line = text.partition("\n")[0]
        has_number = re.match(r"\W*[:=]", line) and re.search("[0-9]", line)
        return None if has_number and not PLACEHOLDER.match(line) else "none", 0
    number, rest = float(match["number"]), text[match.end():]
    is_on_next_line = "\n" in text[:match.start("number")]
    words = ("", "(?:points?|stars?)?", "(?:(?:out )?of)?", rf"(?:{judge.highest:g}\b)?",
             "(?:points?|stars?)?", r"(?:\n|$)")
    if is_on_next_line and not re.match(r"[^\w\n]*+".join(words), rest, re.I):
        return "none", 0  # the first item of a list, or a sentence
    *_, end_of_scale = OTHER.findall(match["of"] or "") or [judge.highest]
    changed = {float(found["number"]) for found in CHANGED_NUMBER.finditer(rest)} - {number}
    if ("%" in (match["of"] or "") or float(end_of_scale) != judge.highest or changed
            or is_doubted(number, re.split(r"\n|[.!]\s+(?=[A-Z])", rest, maxsplit=1)[0], judge)):
        return None, 0
    return number, match.start("number")


def is_doubted(number, line, judge):
    """Whether the sentence behind a verdict has another number that may be the verdict."""
    scale = rf"(?:{judge.lowest:g}|[01])\s*(?:to|-|\u2013|\.\.+)\s*{judge.highest:g}\b"
    line = re.sub(rf"([(\[]|\b(?:scale|range|from|of|the|on a)\b)\W{{0,3}}{scale}", r"\1", line)
    is_json = re.match(r"[\"']?\s*[,}]", line) and re.search(r"[\"']\s*:", line)
    for match in OTHER.finditer(line):
        other, lead = float(match[0]), line[max(match.start() - 40, 0):match.start()]
        if other == number or COUNTS.match(line, match.end()) or REFUSED.search(lead):
            continue
        is_in_brackets = is_json or lead.count("(") > lead.count(")")
        has_name = is_in_brackets and LABELLED.search(lead) and not IS_VERDICT.search(lead)
        # A comparison has no scale: 1/2 is no verdict.
        is_end_of_scale = (other == judge.highest and judge.verdict != COMPARES
                           and AT_MOST.search(lead))
        if not has_name and not is_end_of_scale:
            return True
    return False


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
    attempt |= {name: vars(reply)[name] for name in ("thinking", "served", "left_out")
                if vars(reply)[name]}
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
