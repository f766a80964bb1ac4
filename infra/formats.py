"""Row formats: the names and shapes that others use for our keys, made ours.

Nothing is refused here: what cannot be read stays as it is, and infra/rows.py names it. Stages 1
and 2 run on machines without a GPU stack, so nothing here imports torch.
"""
import json
import math
import re

# Our name -> what others call it: the files of the method's author, and common hub datasets.
ALIASES = {
    "prompt": ("instruction", "question", "query", "input"),
    # First those that say which answer they are: `response` beside them is another one.
    "chosen": ("chosen_response", "response_chosen", "response_revised", "summary_after"),
    "rejected": ("rejected_response", "response_rejected", "response", "response_persona",
                 "summary_pre"),
    "score_chosen": ("chosen_score", "chosen_rating", "chosen-rating", "score_response_revised",
                     "score_revised", "scores_after"),
    "score_rejected": ("rejected_score", "rejected_rating", "rejected-rating", "score_response",
                       "score_persona", "scores_pre"),
}
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
# Keys that change what the model reads. Rows with one that is not read here are refused.
SYSTEM = re.compile(r"system|sys(tem)?[ _-]?(prompt|message|msg|instructions?)|developer",
                    re.IGNORECASE)  # becomes the prompt's first message
CHATS = ("conversations", "messages", "context", "conversation", "chat_history",
         "conversation_history", "previous_messages")  # may be the prompt, or tell it once more
TOLD = re.compile(r"contexts?|ctxs|documents?|(retrieved_)?passages?|article|paragraphs?|premise|"
                  r"search_results|schema|persona|preamble|instructions|background|options|choices|"
                  r"few_shot|dialog(ue)?s?|turns|past_turns|trajectory|previous_messages"
                  )  # or may stand in the prompt already
IN_ROW = re.compile(r"(image|img|picture|video|audio)s?(_(path|url|file|base64)s?)?|"
                    r"((available_)?tools?|functions?|apis)(_definitions)?|"
                    rf"{TOLD.pattern}|(prompt_)?prefix|suffix|initial_\w*steps|"
                    r"chat_template_kwargs|reasoning_effort|\w+_history")
IN_MESSAGE = re.compile(rf"{IN_ROW.pattern}|tool_calls|tool_call_id|tool_plan|function_calls?|"
                        r"thought|reasoning_content|reasoning|thinking")
EMPTY = (None, False, "", [], {}, "[]", "{}", "null")


def canonical(row, names=None):
    """The row with our keys added where it uses others, and chats split before the answer.

    names, a list, receives what was read as what. A canonical row stays as it is.
    """
    row, names = dict(row), [] if names is None else names
    if "prompt" not in row and is_text(row.get("instruction")) and is_text(row.get("input")):
        row["prompt"] = f"{row['instruction']}\n\n{row['input']}"
        names.append("`instruction`, an empty line and `input` as `prompt`")
    name, ranked = ranked_answers(row)
    if "chosen" not in row and len({rank for rank, _ in ranked}) > 1:
        (_, row["chosen"]), (_, row["rejected"]) = (
            pick(ranked, key=lambda one: one[0]) for pick in (min, max))
        names.append(name)
    for ours, others in ALIASES.items():
        for other in others:
            if ours not in row and other in row:
                row[ours] = row[other]
                names.append(f"`{other}` as `{ours}`")
    for other in CHATS:
        chat = as_chat(row.get(other))
        if "prompt" not in row and is_chat(chat) and chat[-1]["role"] == "user":
            row["prompt"] = chat
            names.append(f"`{other}` as `prompt`")
    if isinstance(row.get("metadata"), dict):
        both = ("score_chosen", "score_rejected")
        for name in both if not row.keys() & {*both} else ():  # never one from each place
            if name in row["metadata"]:
                row[name] = row["metadata"][name]
                names.append(f"`metadata.{name}` as `{name}`")
    join_chats(row, names)
    before, prompt = context_of(row), as_messages(row.get("prompt"))
    if is_chat(before) and is_chat(prompt) and prompt[:len(before)] != before:
        if prompt[0]["role"] == "user":
            said = [turn for turn in before if turn["role"] != "system"]
            if prompt[:len(said)] == said:  # of the two only `system` is missing
                before = before[:len(before) - len(said)]
            row["prompt"] = before + prompt
            names.append("`system` or `history` before `prompt`")
    return row


def ranked_answers(row):
    """(name of the format, [(rank, answer)], the lowest rank for the best) of a row with a list.

    Without ranks to compare the list is empty.
    """
    if {"context", "response1", "response2", "overall_preference"} <= row.keys():
        name = "HelpSteer3: `response1` is `chosen` where `overall_preference` is below 0"
        ranked = [(row["overall_preference"], row["response1"]), (0, row["response2"])]
    elif {"response_0", "response_1", "better_response_id"} <= row.keys():
        name = "PKU-SafeRLHF: the response of `better_response_id` is `chosen`"
        ranked = [(int(row["better_response_id"] != i), row[f"response_{i}"]) for i in range(2)]
    else:
        name = "Nectar: of `answers` the best is `chosen`, the worst `rejected`"
        answers = row["answers"] if isinstance(row.get("answers"), list) else []
        ranked = [(one.get("rank"), one.get("answer")) if isinstance(one, dict) else (None, one)
                  for one in answers]
    return name, ranked if all(type(rank) in (int, float) and math.isfinite(rank)
                               for rank, _ in ranked) else []


def join_chats(row, names):
    """Read chats and transcripts; move what comes before both answers to the prompt."""
    prompt, *chats = (as_chat(row.get(name)) for name in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, list) and prompt[-1:] == [{"role": "assistant", "content": ""}]:
        prompt = prompt[:-1]  # a transcript that ends with "Assistant:"
    if "prompt" in row and prompt != row["prompt"]:
        row["prompt"] = prompt
        names.append("a chat in another form as `prompt`")
    if not all(isinstance(chat, list) for chat in chats) or chats[0][:-1] != chats[1][:-1]:
        return
    before = chats[0][:-1]
    whole = before or prompt if prompt is None or not before else joined(prompt, before)
    if whole is None:
        return
    for name, chat in zip(("chosen", "rejected"), chats):
        row[name] = chat[-1]["content"] if is_transcript(row[name]) else chat[-1:]
    if whole != prompt:
        row["prompt"] = whole
        names.append("messages before both answers as `prompt`, or as its end")


def joined(prompt, before):
    """The prompt that ends with the messages `before`; None if they do not continue it."""
    head = as_messages(prompt)
    if not (is_chat(head) and is_chat(before)):
        return None
    bare, other = ([(turn["role"], turn["content"].strip()) for turn in chat]
                   for chat in (head, before))
    if bare[-len(other):] == other:
        return prompt
    if any(other[i:i + len(bare)] == bare for i in range(len(other))):
        return before
    fits = {bare[-1][0], other[0][0]} == {"user", "assistant"} or (
        bare[-1][0] == "system" and other[0][0] == "user")
    return head + before if fits and other[0] not in bare else None


def context_of(row):
    """The messages that `system` and `history`, [[question, answer], ...], of a row stand for.

    A history of another kind becomes a message without text, which is_chat refuses.
    """
    found = [value for name, value in row.items() if SYSTEM.fullmatch(name) and value not in EMPTY
             and (is_text(value) or not isinstance(value, str))]
    messages = [{"role": "system", "content": text} for i, text in enumerate(found)
                if text not in found[:i]]
    history = row["history"] if row.get("history") not in EMPTY else []
    is_pairs = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 for turn in history)
    for turn in history if is_pairs else [(None, None)]:
        messages += [{"role": role, "content": text}
                     for role, text in zip(("user", "assistant"), turn)]
    return messages


TURN = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")


def is_transcript(value):
    """Whether a value is text in the form of hh-rlhf: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    turns = TURN.findall(value) if isinstance(value, str) and TURN.match(value) else []
    return turns[:1] == ["Human"] and turns[-1] == "Assistant"


def as_chat(value):
    """A chat in another form as a list of {"role", "content"}; any other value as it is.

    The forms: a transcript, one message, JSON text, ShareGPT's names, content in parts of text.
    """
    if is_transcript(value):
        _, *parts = TURN.split(value)  # a name, its text, the next name, ...
        roles = ({"Human": "user", "Assistant": "assistant"}[name] for name in parts[::2])
        return [{"role": role, "content": content.strip()}
                for role, content in zip(roles, parts[1::2])]
    if isinstance(value, str) and value.lstrip().startswith(("[{", '{"')):
        try:
            chat = as_chat(json.loads(value))
        except (RecursionError, ValueError):  # text of another kind
            return value
        return chat if is_chat(chat) else value
    chat = [value] if isinstance(value, dict) else value
    is_list = isinstance(chat, list) and chat and all(isinstance(turn, dict) for turn in chat)
    if is_list and all({"input", "output"} <= turn.keys() for turn in chat):  # Capybara
        chat = [{"role": role, "content": turn[name]} for turn in chat
                for role, name in (("user", "input"), ("assistant", "output"))]
    chat = [as_message(turn) for turn in chat] if is_list else []
    said = [turn for turn in chat if turn["role"] != "system" or turn["content"] not in EMPTY]
    return said or value


def as_message(turn):
    """A message with ShareGPT's `from` and `value`, or with content in parts, as one of ours."""
    role, content = (turn.get(ours, turn.get(theirs))
                     for ours, theirs in (("role", "from"), ("content", "value")))
    if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text"))
            for part in content):
        content = "".join(part["text"] for part in content)
    role = ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": content} | in_message(turn)


def in_message(turn):
    """What a message has beside its text that a chat template may show the model."""
    return {name: value for name, value in turn.items()
            if IN_MESSAGE.fullmatch(str(name)) and value not in EMPTY}


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def is_chat(value):
    """Whether a value is a non-empty list of {"role", "content"} messages, all with text alone."""
    return isinstance(value, list) and len(value) > 0 and all(
        isinstance(turn, dict) and turn.get("role") in ("system", "user", "assistant")
        and is_text(turn.get("content")) and not in_message(turn) for turn in value)


def as_messages(prompt):
    """A prompt, text or message list, as a new list of messages."""
    return list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def remove_judgement(row):
    """The row itself without scores, tau and judge, under any name: they are to be made anew."""
    for old in (row, row.get("metadata")):
        for name in ("score_chosen", "score_rejected", "tau", "judge"):
            for alias in (name, *ALIASES.get(name, ())) if isinstance(old, dict) else ():
                old.pop(alias, None)
    return row
