"""What a server refuses of a request: parameters that can be left out, or the text of one row."""
import json
import re

# Bounds in a response_format's schema may be refused without the rest of it.
BOUNDS = {"minimum": None, "maximum": None}
NAMES_BOUNDS = re.compile(r"(?:['\"`]|propert.{0,9})m(?:in|ax)imum\b|invalid schema", re.IGNORECASE)
# (how a refusal names it, {what is refused: what is sent instead, or None}). `system` is the role.
OPTIONAL = [
    (r"log[_ ]?probs|log.probabilit|top_n_tokens", {"logprobs": None, "top_logprobs": None}),
    (r"\bseed\b", {"seed": None}),
    (r"response_?(?:format|schema)|json[_ ]?(?:schema|mode)|structured.output|output.format|"
     r"grammar|guided.(?:decod|json)|property (?:key|name)s?\b", {"response_format": None}),
    (r"\btemperature\b|sampling param", {"temperature": None}),
    (r"\bmax_?tokens\b", {"max_tokens": "max_completion_tokens"}),
    (r"\bsystem.{0,3}(?:role|message|prompt|instruction|角色)|role.{0,60}\bsystem\b|"
     r"developer instruction|roles must alternate|messages\W{1,4}0\W{1,4}role|"
     r"only user and assistant|(?:start|first message).{0,20}\buser\b", {"system": "user"}),
]
REFUSES = re.compile(
    r"\b(?:no|not|only|must|should|invalid|than|unsupported|unknown|unexpected)\b|n't\b|cannot|"
    r"unrecogni[sz]|unavailab|deprecat|instead|forbid|disab|disallow|illegal|reject|exceed|range|"
    r"at most|at least|maximum is|out of bounds|extraneous|[不非无]|只能", re.IGNORECASE | re.ASCII)
# Without one of these, a refusal of max_tokens is about its value.
RENAMED = re.compile(r"unsupported|not support|n't support|unrecogni[sz]|unknown|unexpected|"
                     r"not permitted|not allowed|deprecat|instead", re.IGNORECASE)
# "param": "seed" or "loc": ["body", "seed"], also in JSON that is a text of JSON
NAMED = re.compile(r'"(?:params?|loc)\\*":\s*(\[[^\]]{0,200}|\\*"[^"\\]{0,200})')
ABOUT_THE_ROW = re.compile(r"content|context|length|moderat|safety|policy|flagged|"
                           r"too (?:long|large|many)", re.IGNORECASE)


def adapted(body, refused):
    """A request without what the server refuses, as in OPTIONAL."""
    sent = {refused.get(name, name): value for name, value in body.items()
            if refused.get(name, name)}
    if "minimum" in refused and "response_format" in sent:
        sent["response_format"] = json.loads(
            json.dumps(sent["response_format"]), object_hook=lambda fields: {
                name: value for name, value in fields.items() if name not in refused})
    roles = [message["role"] for message in body.get("messages", ())]
    if "system" in refused and roles[:2] == ["system", "user"]:
        system, first, *rest = body["messages"]
        content = f"{system['content']}\n\n{first['content']}"
        sent["messages"] = [first | {"content": content}, *rest]
    return sent


def refused_in(reply, body, refused):
    """The {name: name instead, or None} of OPTIONAL that a refusal is about; None: another cause.

    Fields that name a parameter count first, then sentences that refuse, then the whole text. What
    the request lacks, or was refused before, is passed over.
    """
    text = json.dumps(reply, ensure_ascii=False)
    refusing = " ".join(filter(REFUSES.search, re.split(r"[.;]|\\n", text)))
    candidates = [BOUNDS] if NAMES_BOUNDS.search(refusing) else []
    for part in (" ".join(NAMED.findall(text)), refusing, text if refusing else ""):
        found = [(match.start(), names) for words, names in OPTIONAL
                 if (match := re.search(words, part, re.IGNORECASE | re.ASCII))]
        candidates += [names for _, names in sorted(found, key=lambda pair: pair[0])]
    if "requested parameters" in text:  # OpenRouter names none of them: each in turn
        candidates += [names for _, names in OPTIONAL]
    for names in candidates:
        is_value = "max_tokens" in names and not RENAMED.search(text)
        if not is_value and adapted(body, refused | names) != adapted(body, refused):
            return names
    return None


def is_about_the_row(reply):
    """Whether a refusal is about the text of one row, such as its length: others may pass."""
    return bool(ABOUT_THE_ROW.search(json.dumps(reply)))
