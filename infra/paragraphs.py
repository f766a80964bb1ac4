"""Ordinary text, cut into lists of token ids that a model can read."""
import re

from infra.command import BadInput
from infra.rows import read_text


def load_paragraphs(path, tokenizer, max_length):
    """A text file's paragraphs, between empty lines: each a list of chunks, lists of token ids.

    A chunk has at most max_length tokens, bos first if this tokenizer begins texts with it. The
    tokens behind a chunk's first are predicted; a chunk without any is left out.
    """
    bos = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
    size, paragraphs = max_length - len(bos), []
    for text in re.split(r"\n\s*\n", read_text(path, "a file of plain text")):
        ids = tokenizer(text.strip(), add_special_tokens=False, verbose=False).input_ids
        chunks = [bos + ids[start:start + size] for start in range(0, len(ids), size)]
        paragraphs.append([chunk for chunk in chunks if len(chunk) > 1])
    paragraphs = [chunks for chunks in paragraphs if chunks]
    if not paragraphs:
        raise BadInput(f"{path}: no text of two tokens or more; give a file of plain text")
    return paragraphs
