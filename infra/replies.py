"""The forms that servers give to what a chat reply holds: its text, its end and its tokens."""
import re

from infra.command import one_line
from infra.rows import FINISHED

# Why a reply ended, in lower case. Other reasons than these and rows.FINISHED: it is not whole.
CUT = ("length", "max_tokens", "max_length", "max_output_tokens", "model_length",
       "model_context_window_exceeded")
HELD_BACK = re.compile("filter|safety|refus|recitation|prohibited|blocklist|spii|guardrail|toxic|"
                       "sensitive|moderat")
BROKEN = ("error", "abort", "aborted", "cancelled", "failed", "network_error",
          "insufficient_system_resource")


def parts_of(content, kind):
    """The text of a message's content: of its parts of a kind, "text" or "thinking"."""
    if isinstance(content, list):  # Mistral's thinking has parts itself
        return "".join(part[kind] if isinstance(part[kind], str) else parts_of(part[kind], "text")
                       for part in content if part["type"] == kind)
    return content if kind == "text" else ""


def written(usage):
    """The tokens that the model wrote. Some servers leave thinking out of completion_tokens."""
    tokens, total = usage.get("completion_tokens") or 0, usage.get("total_tokens") or 0
    thinking = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    outside = total == 0 and thinking > tokens
    return max(tokens + outside * thinking, total - (usage.get("prompt_tokens") or 0))


def refusal_in(message, finish):
    """How the model or a filter refused, or a false value."""
    return message.get("refusal") or HELD_BACK.search(finish or "") and finish


def no_text(message, finish, unclosed_thinking):
    """Why a reply has no text, and what to do. ValueError if the next one may have some."""
    if refusal := refusal_in(message, finish):
        return f"the model or the server's content filter refused: {one_line(refusal)[:200]}"
    if message.get("tool_calls"):
        return "the model called a tool instead of answering; serve it without tools"
    if finish not in FINISHED + CUT:
        return f"the server ended the reply without text: {one_line(finish)[:80]}"
    if finish in CUT or unclosed_thinking:
        return "the model spent --max_tokens on thinking: raise it"
    raise ValueError("no text")
