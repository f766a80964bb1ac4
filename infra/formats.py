"""Row formats: the names and shapes that others use for our keys, made ours.

Stages 1 and 2 run on machines without a GPU stack, so nothing here imports torch.
"""
import re

# Our name -> what others call it: the files of the method's author, and common hub datasets.
ALIASES = {
    "prompt": ("instruction",),
    "chosen": ("response_revised", "summary_after", "chosen_response"),
    "rejected": ("response", "response_persona", "summary_pre", "rejected_response"),
    "score_chosen": ("score_response_revised", "score_revised", "scores_after",
                     "chosen_score", "chosen_rating", "chosen-rating"),
    "score_rejected": ("score_response", "score_persona", "scores_pre",
                       "rejected_score", "rejected_rating", "rejected-rating"),
}


def canonical(row):
    """The row with our keys added where it uses others, and chats split before the answer."""
    row = dict(row)
    if has_input(row):
        row["prompt"] = f"{row['instruction']}\n\n{row['input']}"
    for name, others in ALIASES.items():
        for other in others:
            if name not in row and other in row:
                row[name] = row[other]
    if isinstance(row.get("metadata"), dict):
        for name in ("score_chosen", "score_rejected"):
            if name not in row and name in row["metadata"]:
                row[name] = row["metadata"][name]
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" not in row and is_transcript(chosen) and is_transcript(rejected):
        (before, chosen), (other, rejected) = map(split_transcript, (chosen, rejected))
        if before == other:
            row |= {"prompt": before, "chosen": chosen, "rejected": rejected}
    # Many hub datasets repeat the prompt inside both answers: [user, assistant].
    elif is_chat(chosen) and is_chat(rejected) and chosen[:-1] == rejected[:-1] != []:
        before = chosen[:-1]
        if as_messages(row.get("prompt"))[-len(before):] != before:
            row["prompt"] = before  # `prompt` is missing, or only a part
        row["chosen"], row["rejected"] = chosen[-1:], rejected[-1:]
    return row


def has_input(row):
    """Whether the prompt of a row is Alpaca's `instruction` and the text of `input`."""
    return "prompt" not in row and is_text(row.get("instruction")) and is_text(row.get("input"))


TURN = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")


def is_transcript(value):
    """Whether a value is text in the form of hh-rlhf: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    turns = TURN.findall(value) if isinstance(value, str) else []
    return turns[:1] == ["Human"] and turns[-1] == "Assistant"


def split_transcript(text):
    """(chat messages, the last turn) of a transcript."""
    _, *parts = TURN.split(text)  # a name, its text, the next name, ...
    roles = ({"Human": "user", "Assistant": "assistant"}[name] for name in parts[::2])
    *before, last = ({"role": role, "content": content.strip()}
                     for role, content in zip(roles, parts[1::2]))
    return before, last["content"]


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def is_chat(value):
    """Whether a value is a non-empty list of {"role", "content"} messages, all with text."""
    return isinstance(value, list) and len(value) > 0 and all(
        isinstance(message, dict) and message.get("role") in ("system", "user", "assistant")
        and is_text(message.get("content")) for message in value)


def as_messages(prompt):
    """A prompt, text or message list, as a new list of messages."""
    return list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
