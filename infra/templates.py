"""What chat templates and tokenizers do to text that training must know of."""
import functools
import os

from infra.command import BadInput
from infra.formats import as_messages


def template_note(tokenizer, prompt, before):
    """A line about a chat template that renders an answer otherwise than it asks for one, or "".

    Thinking templates do: a finished answer gets an empty block that the student learns to write.
    `before` is data.prompt_text of the prompt.
    """
    if not tokenizer.chat_template:
        return ""
    answer = "An answer."
    whole = tokenizer.apply_chat_template(
        as_messages(prompt) + [{"role": "assistant", "content": answer}], tokenize=False)
    same = len(os.path.commonprefix([before, whole]))
    asked, rendered = before[same:], whole[same:].partition(answer)[0]
    if asked.strip() == rendered.strip():
        return ""
    return (f"template: it writes {rendered!r} before a finished answer, and {asked!r} when it "
            "asks for one; --template_kwargs can make both alike, see docs/pipeline.md")


@functools.cache
def control_tokens(tokenizer):
    """Tokens that ordinary text must not hold: end of turn, beginning of text and the like."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def refuse_control_tokens(tokenizer, prompt, answers, where):
    """BadInput if a text holds a control token: it would end its turn, or begin another one."""
    texts = [("the prompt", message["content"]) for message in as_messages(prompt)]
    for what, text in texts + [("an answer", answer) for answer in answers]:
        found = [token for token in control_tokens(tokenizer) if token in text]
        if found:
            raise BadInput(f"{where}: {what} holds the control token {', '.join(found)}; give the "
                           "bare text without it, or run with --skip_bad_rows")
