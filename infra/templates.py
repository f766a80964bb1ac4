"""What chat templates and tokenizers do to text that training must know of."""
import contextlib
import datetime
import functools
import json
import os
import re

from jinja2 import TemplateError

from infra.command import BadInput
from infra.formats import as_messages

MARK = "\ue000"  # a character in the place of a text; no template changes it


def render(tokenizer, messages, ask=False):
    """The text of messages; with `ask`, up to where the model answers.

    jinja2.TemplateError if the chat template refuses them, or leaves one of them out.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # in its expressions
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    lost = lost_role(tokenizer, tuple(message["role"] for message in messages), ask)
    if lost:
        raise TemplateError(f"it leaves out the {lost}'s message")
    return text


@functools.cache
def lost_role(tokenizer, roles, ask):
    """The first of these roles whose message a chat template leaves out, or None."""
    marks = [f"{MARK}{i}{MARK}" for i in range(len(roles))]
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": mark} for role, mark in zip(roles, marks)],
        tokenize=False, add_generation_prompt=ask)
    return next((role for role, mark in zip(roles, marks) if mark not in text), None)


def pin_date(tokenizer, day):
    """Let the chat template write this day ("2026-01-31"): a resumed run repeats its prompts.

    Only this object does so: the template that is saved with the student asks for the date again.
    """
    if tokenizer.chat_template:
        template = re.sub(
            r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(.*?)\1\s*\)""",
            lambda call: json.dumps(datetime.date.fromisoformat(day).strftime(call[2])),
            tokenizer.get_chat_template())
        tokenizer.apply_chat_template = functools.partial(
            tokenizer.apply_chat_template, chat_template=template)


@functools.cache
def added_tokens(tokenizer):
    """A regular expression for any token that was added to the vocabulary, but line breaks."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()
              if token.content.strip()]
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


@functools.cache
def end_of_turn(tokenizer):
    """What the chat template writes behind an answer: up to its first control token, or to eos if
    that follows at once (Cohere's END_RESPONSE, then eos). Without a control token: eos.
    """
    eos = tokenizer.eos_token
    if not tokenizer.chat_template:
        return eos
    text = render(tokenizer, as_messages("Hi.") + [{"role": "assistant", "content": MARK}])
    token, last = f"(?:{added_tokens(tokenizer)})", re.escape(eos)
    found = re.match(f".*?(?:{last}|{token}(?:{token}*?{last})?)", text.partition(MARK)[2], re.S)
    return found[0] if found else eos


def stop_ids(tokenizer, generation_config):
    """Ids of the tokens at which a model stops: its own, eos, and the last one of a turn's end."""
    own = generation_config.eos_token_id
    end = tokenizer(end_of_turn(tokenizer), add_special_tokens=False).input_ids[-1]
    own = own if isinstance(own, list) else [own]
    return sorted({*own, tokenizer.eos_token_id, end} - {None})


def cut_left(tokenizer, prompt_ids, keep):
    """The last `keep` token ids of a prompt; a bos token at its start stays there."""
    if keep >= len(prompt_ids):
        return prompt_ids
    bos = [token for token in prompt_ids[:1] if token == tokenizer.bos_token_id and keep > 1]
    return bos + prompt_ids[len(prompt_ids) - keep + len(bos):]


def prompt_text(tokenizer, prompt):
    """The text the model reads before it answers: chat template, or `<bos>prompt` + empty line."""
    if tokenizer.chat_template:
        return render(tokenizer, as_messages(prompt), ask=True)
    ids = tokenizer("").input_ids  # holds bos if this tokenizer starts every text with it
    bos = tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""
    return bos + prompt + "\n\n"


def answer_text(tokenizer, prompt, before, answer):
    """The text that follows prompt_text (`before`): the answer and the end of its turn.

    A template may write something before the answer, or shape its thoughts. Whatever it writes
    behind the end of the turn is no part of the answer.
    """
    end, text = end_of_turn(tokenizer), answer.rstrip()
    if tokenizer.chat_template:
        turn, ended, _ = finished_turn(tokenizer, prompt, before, answer).partition(end)
        turn = turn if ended else turn.rstrip()
        *thoughts, said = re.split("</?think>", answer)
        opened_again = turn.count("<think>") > max(1, answer.count("<think>"))
        # Some templates render a finished turn differently: then the answer stays as it is.
        if turn.rstrip().endswith(said.strip()) and not opened_again and all(
                thought.strip() in turn for thought in thoughts):
            text = turn
        elif before.rstrip().endswith("<think>"):  # the prompt has opened the thoughts already
            text = text.lstrip().removeprefix("<think>").lstrip()
            if "</think>" not in text:  # it would be a thought that never ends
                text = "\n</think>\n\n" + text
    return text + end


def finished_turn(tokenizer, prompt, before, answer):
    """What the chat template writes behind `before` if the answer is there; "" if it changes that.

    Mistral's leaves out a system message then. The turn is the same after another question.
    """
    said = {"role": "assistant", "content": answer}
    for messages in (as_messages(prompt), as_messages("Hi.")):
        with contextlib.suppress(TemplateError):
            asked = before if messages == as_messages(prompt) else render(tokenizer, messages, True)
            whole = render(tokenizer, [*messages, said])
            if whole.startswith(asked):
                return whole.removeprefix(asked)
    return ""


def template_note(tokenizer):
    """A line about a chat template that renders an answer otherwise than it asks for one, or "".

    Thinking templates do: a finished answer gets an empty block that the student learns to write.
    """
    if not tokenizer.chat_template:
        return "template: the tokenizer has none; an empty line ends a prompt, eos an answer"
    # No row's prompt: Mistral's leaves out a system message of a finished turn.
    answer, before = "An answer.", prompt_text(tokenizer, "Hi.")
    whole = render(tokenizer, as_messages("Hi.") + [{"role": "assistant", "content": answer}])
    same = len(os.path.commonprefix([before, whole]))
    asked, rendered = before[same:], whole[same:].partition(answer)[0]
    if asked.strip() == rendered.strip():
        return ""
    return (f"template: it writes {rendered!r} before a finished answer, and {asked!r} when it "
            "asks for one; --template_kwargs can make both alike, see docs/pipeline.md")


@functools.cache
def control_tokens(tokenizer):
    """Tokens that ordinary text must not hold: end of turn, beginning of text and the like."""
    written = ""  # its tokens may not be marked as special; those of thoughts are for answers
    if tokenizer.chat_template:
        written = end_of_turn(tokenizer) + render(tokenizer, as_messages(MARK), ask=True)
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special
            or token.content.strip() and token.content in re.sub("</?think>", "", written)]


# How other models' templates begin. Text that was rendered already would be rendered twice.
RENDERED = re.compile(r"\s*(<s>|<bos>|<\|begin_of_text\|>)?\s*(\[INST\]|<\|im_start\|>|"
                      r"<\|start_header_id\|>|<start_of_turn>|<\|(system|user|prompter)\|>)")
CUE = re.compile(r"(### ?(Assistant|Response)|\n(Assistant|Bot)|\bASSISTANT):\s*$")
ENDED = re.compile(r"(<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|</s>)\s*$")


def refuse_control_tokens(tokenizer, prompt, answers, where):
    """BadInput if a text holds a control token: it would end its turn, or begin another one."""
    texts = [("the prompt", message["content"]) for message in as_messages(prompt)]
    for what, text in texts + [("an answer", answer) for answer in answers]:
        found = [token for token in control_tokens(tokenizer) if token in text]
        if found:
            raise BadInput(f"{where}: {what} holds the control token {', '.join(found)}; give the "
                           "bare text without it, or run with --skip_bad_rows")
    if tokenizer.chat_template and (
            any(RENDERED.match(text) or CUE.search(text) for _, text in texts)
            or any(map(ENDED.search, answers))):
        raise BadInput(f"{where}: a text is in a chat template already; give messages, or run with "
                       "--skip_bad_rows")
