"""Rows in, tokens out: reading, checking, chat template, truncation, batches; a report on a file of rows. No model in here.

A row is one JSON object (a line of .jsonl, or an item of one JSON list) that grows from stage to stage of the pipeline:

    prompts.jsonl     {"id", "prompt": text or [chat messages], "question": what the judge sees}
    synthetic.jsonl   + "rejected": the original y_o, "critique", "chosen": the revision y_r
    scored.jsonl      + "score_rejected": s_o, "score_chosen": s_r

    python data.py scored.jsonl [--model DIR]      a report on the rows, and one pair token by token
    python data.py --task tasks/safety.toml --out prompts.jsonl      fetches the public prompts of a behaviour
"""
import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from jinja2 import TemplateError

# torch and transformers are imported where they are used: stages 1 and 2 read rows without them.

TOY_STUDENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy", "student")


class BadInput(Exception):
    """Something the user gave cannot be used: one line that says what, where (file:line) and the remedy. Exit code 2."""


# ------------------------------------------------------------------------------------------------------- rows in

# Our name, then the names others use for the same thing: the files of the method's author, and common hub datasets.
ALIASES = {
    "prompt": ("instruction",),
    "chosen": ("response_revised", "summary_after", "chosen_response"),
    "rejected": ("response", "response_persona", "summary_pre", "rejected_response"),
    "score_chosen": ("score_response_revised", "score_revised", "scores_after", "chosen_score", "chosen_rating", "chosen-rating"),
    "score_rejected": ("score_response", "score_persona", "scores_pre", "rejected_score", "rejected_rating", "rejected-rating"),
}


def stop_at(error):
    raise error


def read_rows(path, on_bad=stop_at):
    """All rows of a file at once, as of stream_rows."""
    return list(stream_rows(path, on_bad))


def stream_rows(path, on_bad=stop_at):
    """Each ("file:line", row) of a .jsonl file, one line in memory at a time, or of one JSON list, which is read whole.

    What is no JSON object goes to on_bad(BadInput), which raises or counts; a file that cannot be read raises BadInput.
    """
    try:
        with open(path, "rb") as file:
            yield from parse_rows((decode(line, path, number) for number, line in enumerate(file, 1)), path, on_bad)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give the path of a .jsonl file or of a JSON list") from error


def read_text(path, wanted):
    """The text of a UTF-8 file. BadInput says which file is wanted where there is none to read."""
    try:
        with open(path, "rb") as file:
            return decode(file.read(), path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give {wanted}") from error


def decode(content, path, line=1):
    """The text of bytes that begin on a line of a file. BadInput names the line that is not UTF-8."""
    try:
        return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")  # without the byte-order mark that some editors write
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise BadInput(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error


def parse_rows(lines, path, on_bad=stop_at):
    """stream_rows of an iterable of lines; path is what messages call it."""
    numbered = enumerate(lines, 1)
    number, first = next(((number, line) for number, line in numbered if line.strip()), (0, ""))
    if not first:
        raise BadInput(f"{path}: the file is empty; give a file with one JSON object per line")
    if first.lstrip().startswith("["):
        values = parse_list(first + "".join(line for _, line in numbered), path, number)
    else:
        values = parse_lines(itertools.chain([(number, first)], numbered), path, on_bad)
    for where, row in values:
        if isinstance(row, dict):
            yield where, row
        else:
            on_bad(BadInput(f"{where}: a row must be a JSON object, not a {type(row).__name__}; see data.py for its keys"))


def parse_lines(numbered, path, on_bad):
    """Each ("file:line", value) of numbered lines that are not blank; one that is not JSON goes to on_bad."""
    for number, line in numbered:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            on_bad(not_json(f"{path}:{number}", error))
        else:
            yield f"{path}:{number}", value


def parse_list(text, path, line):
    """Each ("file:line", value) of a JSON list whose text begins on a line of a file."""
    decoder, between, position, counted = json.JSONDecoder(), re.compile(r"[\s,]*"), text.index("[") + 1, 0
    while (position := between.match(text, position).end()) < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise not_json(f"{path}:{line}", error) from error
        yield f"{path}:{line}", value
    if position == len(text):
        raise BadInput(f"{path}: the JSON list has no end; the file must be whole")


def not_json(where, error):
    reason = str(error).split(": line ")[0]  # json counts from the value on: the line is in `where`
    return BadInput(f"{where}: not JSON ({reason}); each row must be one whole JSON object, on one line unless it stands in a list")


def canonical(row):
    """The row with our names added where it uses others (ALIASES, or `metadata`), and chat lists split at the answer."""
    row = dict(row)
    for name, others in ALIASES.items():
        for other in others:
            if name not in row and other in row:
                row[name] = row[other]
    if isinstance(row.get("metadata"), dict):
        for name in ("score_chosen", "score_rejected"):
            if name not in row and name in row["metadata"]:
                row[name] = row["metadata"][name]
    # Many hub datasets repeat the prompt inside both answers: [user, assistant]. The answer is the last message.
    if is_chat(row.get("chosen")) and is_chat(row.get("rejected")):
        before = row["chosen"][:-1]
        if before and before == row["rejected"][:-1]:
            row.setdefault("prompt", before)
            row["chosen"], row["rejected"] = row["chosen"][-1:], row["rejected"][-1:]
    return row


def is_chat(value):
    """Whether a value is a non-empty list of {"role", "content"} messages with text in them."""
    return isinstance(value, list) and len(value) > 0 and all(
        isinstance(message, dict) and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str) and message["content"].strip() for message in value)


def as_messages(prompt):
    """A prompt as a new list of chat messages, whichever of its two forms it has."""
    return list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def check_pair(row, where, needs_scores):
    """A canonical row's (prompt, chosen, rejected, score_chosen, score_rejected), or BadInput.

    prompt is text or a list of messages, the answers are texts, a score is a float, or None where the row says null
    (tried, but not scored) or where needs_scores is false and it has none.
    """
    for name in ("prompt", "chosen", "rejected"):
        if name not in row:
            raise BadInput(f"{where}: no `{name}`; a row needs prompt, chosen (the better answer) and rejected")
        value = row[name]
        if not isinstance(value, (str, list)):
            raise BadInput(f"{where}: `{name}` is a {type(value).__name__}; it must be text or a list of chat messages")
        if not value or isinstance(value, str) and not value.strip():
            raise BadInput(f"{where}: `{name}` is empty; take the row out, or run with --skip_bad_rows")
        if isinstance(value, list) and not is_chat(value):
            raise BadInput(f"{where}: `{name}` must hold messages like {{\"role\": \"user\", \"content\": \"text\"}}")
    prompt = row["prompt"]
    if isinstance(prompt, list) and prompt[-1]["role"] != "user":
        raise BadInput(f"{where}: the last message of `prompt` must be the user's, not the {prompt[-1]['role']}'s")
    answers = []
    for name in ("chosen", "rejected"):
        answer = row[name]
        if isinstance(answer, list):
            if len(answer) != 1 or answer[0]["role"] != "assistant":
                raise BadInput(f"{where}: `{name}` must be one assistant message, after the same messages as the other answer")
            answer = answer[0]["content"]
        answers.append(answer)
    return prompt, *answers, *(check_score(row, name, where, needs_scores) for name in ("score_chosen", "score_rejected"))


def check_score(row, name, where, needed):
    score = row.get(name)
    if score is None:
        if needed and name not in row:
            raise BadInput(f"{where}: no `{name}`; this loss needs both scores: run reward.py first, or use --loss dpo or sft")
        return None
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise BadInput(f"{where}: `{name}` is {json.dumps(score)[:40]}; a score must be a finite number, or null for none")
    return float(score)


# --------------------------------------------------------------------------------------------------------- tokens


def load_tokenizer(model):
    """The tokenizer of a model folder or hub id. BadInput where it cannot be had or has no end-of-sequence token."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoTokenizer
    hub_logging.set_verbosity_error()  # no line for each attempt to reach a hub: what comes of them is said once
    check_model_name(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {model}: no tokenizer to be had ({first_line(error)}); --model takes a model folder or a hub id") from error
    if tokenizer.eos_token_id is None:
        raise BadInput(f"--model {model}: its tokenizer has no eos token, so no answer could end; set eos_token in tokenizer_config.json")
    return tokenizer


def check_model_name(model):
    """BadInput for a folder that is not there; what reads like owner/name is left to the hub."""
    if not os.path.isdir(model) and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise BadInput(f"--model {model}: no such folder; --model takes a model folder or a hub id such as owner/name")


def first_line(error):
    return str(error).strip().split("\n")[0]


@dataclass
class Pair:
    """One training example: the ids of a prompt and of two answers to it, each answer ending in its end-of-turn token."""
    where: str  # file:line, the row's name in messages
    prompt: str | list
    prompt_ids: list
    chosen_ids: list
    rejected_ids: list
    score_chosen: float | None
    score_rejected: float | None

    @property
    def gap(self):
        """By how much the chosen answer scores higher, nan where a score is missing."""
        return math.nan if None in (self.score_chosen, self.score_rejected) else self.score_chosen - self.score_rejected


def prompt_text(tokenizer, prompt):
    """What the model reads before it answers: by the tokenizer's chat template, else `<bos>prompt` and an empty line."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(as_messages(prompt), tokenize=False, add_generation_prompt=True)
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("").input_ids
    return (tokenizer.bos_token if starts_with_bos else "") + prompt + "\n\n"


def answer_text(tokenizer, prompt, before, answer):
    """The text that follows `before` (see prompt_text): the answer and exactly one end-of-turn token.

    The end-of-turn token is the control token that the chat template puts after an assistant's message; the newline or
    anything else that the template writes behind it is no part of the answer. Without one, it is the tokenizer's eos.
    """
    after = answer
    if tokenizer.chat_template:
        whole = tokenizer.apply_chat_template(as_messages(prompt) + [{"role": "assistant", "content": answer}], tokenize=False)
        # A template that renders a finished turn unlike an open one (thinking blocks) falls back to answer + eos.
        if whole.startswith(before) and answer.strip() in whole[len(before):]:
            after = whole[len(before):]
    end = after.index(answer.strip()) + len(answer.strip())
    found = [(place, control) for control in control_tokens(tokenizer) if (place := after.find(control, end)) >= 0]
    if not found:
        return after.rstrip() + tokenizer.eos_token
    place, control = min(found)
    return after[:place] + control


@functools.cache
def control_tokens(tokenizer):
    """The tokens that no ordinary text may hold: end of turn, beginning of text and their like."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def encode_answer(tokenizer, prompt, before, prompt_ids, answer, where):
    """The ids of an answer, end-of-turn token included, such that prompt_ids + answer ids is what the model reads.

    BadInput where the answer itself holds a control token: it would end the turn, or open another, in its middle.
    """
    for control in control_tokens(tokenizer):
        if control in answer:
            raise BadInput(f"{where}: an answer holds the control token {control}; take it out of the text")
    after = answer_text(tokenizer, prompt, before, answer)
    whole_ids = tokenizer(before + after, add_special_tokens=False).input_ids
    if whole_ids[:len(prompt_ids)] == prompt_ids:
        return whole_ids[len(prompt_ids):]
    # The tokenizer merged the end of the prompt with the start of the answer: tokenise the answer on its own.
    return tokenizer(after, add_special_tokens=False).input_ids


PROMPT_FLOOR = 64  # tokens of the prompt that truncation leaves, before it turns to the answers


def truncate(prompt_ids, chosen_ids, rejected_ids, max_length):
    """Cuts a pair to max_length tokens per row: the prompt from the left down to PROMPT_FLOOR, then the answers from the right.

    Both answers keep the same prompt. A cut answer loses its end-of-turn token: nothing teaches the student to stop there.
    """
    room = max_length - max(len(chosen_ids), len(rejected_ids))
    keep = min(len(prompt_ids), max(room, PROMPT_FLOOR))
    room = max(max_length - keep, 0)
    return prompt_ids[len(prompt_ids) - keep:], chosen_ids[:room], rejected_ids[:room]


@dataclass
class Report:
    """What became of the rows of a file: how many there were, were cut, and were left out for which reason (by name)."""
    rows: int = 0
    truncated: int = 0
    dropped: dict = field(default_factory=dict)  # reason -> [where]

    def drop(self, reason, where):
        self.dropped.setdefault(reason, []).append(where)

    def dropped_count(self):
        return sum(map(len, self.dropped.values()))

    def lines(self):
        """Plain sentences for a person, each reason with the first rows it struck."""
        lines = [f"{self.truncated} pairs were cut to max_length"] if self.truncated else []
        for reason, places in self.dropped.items():
            names = ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
            lines.append(f"left out {len(places)} of {self.rows} rows, {reason}: {names}")
        return lines


def load_pairs(path, tokenizer, max_length, needs_scores, skip_bad_rows=False):
    """(pairs, report) of a file of preference rows: read, checked, tokenised, truncated.

    A bad row raises BadInput, or is counted with skip_bad_rows. Left out and counted in any case: a chosen answer equal to
    the rejected one, an answer that the teacher did not finish, a row with a null score where needs_scores, a row whose answer
    has no token left after truncation.
    """
    report, pairs = Report(), []

    def on_bad(error):
        if not skip_bad_rows:
            raise error
        report.rows += 1
        report.drop("bad row", str(error))

    for where, row in stream_rows(path, on_bad):
        try:
            pair = encode_pair(canonical(row), where, tokenizer, max_length, needs_scores, report)
        except BadInput as error:
            on_bad(error)
            continue
        report.rows += 1
        if pair:
            pairs.append(pair)
    if not pairs:
        reasons = "; ".join(report.lines()) or "it has no rows"
        raise BadInput(f"{path}: no row left to use: {reasons}. --max_length is {max_length}")
    return pairs, report


def encode_pair(row, where, tokenizer, max_length, needs_scores, report):
    """The Pair of a canonical row, or None where the report says why it is left out."""
    prompt, chosen, rejected, score_chosen, score_rejected = check_pair(row, where, needs_scores)
    if isinstance(prompt, list) and not tokenizer.chat_template:
        raise BadInput(f"{where}: `prompt` is a list of chat messages, but the tokenizer of {tokenizer.name_or_path} has no "
                       "chat template; give --model an instruct model, or plain-text prompts")
    if needs_scores and (score_chosen is None or score_rejected is None):
        return report.drop("no score", where)
    # The end-of-turn token that every answer gets would teach the student to stop in mid-sentence.
    finish = row["teacher"].get("finish") if isinstance(row.get("teacher"), dict) else None  # of the answer, its critique, the rewrite
    if isinstance(finish, list) and len(finish) == 3 and "length" in (finish[0], finish[2]):
        return report.drop("an answer was cut by the teacher's --max_tokens", where)
    if chosen == rejected:
        return report.drop("chosen equals rejected", where)
    try:
        before = prompt_text(tokenizer, prompt)
        prompt_ids = tokenizer(before, add_special_tokens=False).input_ids
        chosen_ids = encode_answer(tokenizer, prompt, before, prompt_ids, chosen, where)
        rejected_ids = encode_answer(tokenizer, prompt, before, prompt_ids, rejected, where)
    except TemplateError as error:
        raise BadInput(f"{where}: the chat template of {tokenizer.name_or_path} refuses this row: {error}") from error
    cut = truncate(prompt_ids, chosen_ids, rejected_ids, max_length)
    report.truncated += cut != (prompt_ids, chosen_ids, rejected_ids)
    prompt_ids, chosen_ids, rejected_ids = cut
    if not chosen_ids:
        return report.drop("no response token left after truncation", where)
    if chosen_ids == rejected_ids:
        return report.drop("chosen equals rejected after truncation", where)
    return Pair(where, prompt, prompt_ids, chosen_ids, rejected_ids, score_chosen, score_rejected)


# -------------------------------------------------------------------------------------------------------- batches


PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, -1  # the segments of a row


@dataclass
class Batch:
    """B pairs as R rows of T tokens, padded on the right, in one of collate's two layouts; N response tokens in all."""
    shared: bool  # each prompt once; else one answer per row
    input_ids: "torch.Tensor"  # (R, T)
    segments: "torch.Tensor"  # (R, T) PROMPT, CHOSEN, REJECTED or PADDING
    position_ids: "torch.Tensor"  # (R, T) where a token stands in its own conversation, prompt + one answer
    states: "torch.Tensor"  # (N,) where, in the R * T places, the hidden state lies that predicts a response token
    targets: "torch.Tensor"  # (N,) that token: of the B chosen answers, then of the B rejected ones
    response_lengths: list  # 2B numbers that add up to N

    def to(self, device):
        tensors = ("input_ids", "segments", "position_ids", "states", "targets")
        return dataclasses.replace(self, **{name: send(getattr(self, name), device) for name in tensors})


def send(tensor, device):
    """A CPU tensor on the device. A GPU copies it out of pinned memory while this process goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def collate(pairs, shared=False):
    """A Batch of pairs. Places come from lengths, never from ids: a pad id that equals the eos id hides nothing.

    shared=False   one answer per row, R = 2B    [prompt | chosen] of every pair, then [prompt | rejected] of every pair
    shared=True    each prompt once, R = B       [prompt | chosen | rejected]; both answers go on where the prompt ended,
                                                 so the prompt's last state predicts the first token of both
    """
    import torch
    if shared:
        rows = [(pair.prompt_ids, {CHOSEN: pair.chosen_ids, REJECTED: pair.rejected_ids}) for pair in pairs]
    else:
        rows = [(pair.prompt_ids, {CHOSEN: pair.chosen_ids}) for pair in pairs] + [(pair.prompt_ids, {REJECTED: pair.rejected_ids}) for pair in pairs]
    width = max(len(prompt_ids) + sum(map(len, answers.values())) for prompt_ids, answers in rows)  # T
    input_ids, position_ids = torch.zeros(2, len(rows), width, dtype=torch.long)  # each (R, T)
    segments = torch.full_like(input_ids, PADDING)  # (R, T)
    found = {CHOSEN: [], REJECTED: []}  # of each answer: the places of its predicting states, its tokens
    for r, (prompt_ids, answers) in enumerate(rows):
        start = len(prompt_ids)
        input_ids[r, :start] = torch.tensor(prompt_ids)
        position_ids[r, :start] = torch.arange(start)
        segments[r, :start] = PROMPT
        for segment, ids in answers.items():
            place = slice(start, start + len(ids))
            input_ids[r, place] = targets = torch.tensor(ids)
            position_ids[r, place] = len(prompt_ids) + torch.arange(len(ids))
            segments[r, place] = segment
            states = torch.arange(start - 1, start - 1 + len(ids))  # the state at t-1 predicts the token at t
            states[0] = len(prompt_ids) - 1
            found[segment].append((r * width + states, targets))
            start += len(ids)
    states, targets = zip(*found[CHOSEN], *found[REJECTED])
    return Batch(shared, input_ids, segments, position_ids, torch.cat(states), torch.cat(targets), [len(ids) for ids in targets])


def longest_row(pair):
    """Tokens of a pair's longer conversation: the prompt and one answer."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def batch_tokens(pair, shared):
    """Tokens that a pair alone takes in a batch of either layout, padding counted."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) if shared else 2 * longest_row(pair)


def split_by_tokens(pairs, indices, tokens_per_batch, shared=False):
    """Splits indices into micro-batches of pairs of like length, none above tokens_per_batch tokens, padding counted.

    A pair that is longer than that on its own gets a micro-batch of its own. shared is the layout, as for collate.
    """
    def size(i):
        return batch_tokens(pairs[i], shared)

    batches = []
    for i in sorted(indices, key=lambda i: (size(i), i)):  # so the newest index has the longest rows
        if batches and size(i) * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def epoch_order(count, seed, epoch):
    """The order of an epoch: a permutation of range(count) that seed and epoch fix, so that a resumed run repeats it."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


def split_held_out(pairs, share, seed, at_most=256):
    """(training pairs, held-out pairs): whole prompts are held out, so no prompt stands on both sides."""
    prompts = sorted({tuple(pair.prompt_ids) for pair in pairs})
    count = min(math.ceil(len(prompts) * share), at_most) if len(prompts) > 1 else 0
    held_out = {prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:count]}
    return ([pair for pair in pairs if tuple(pair.prompt_ids) not in held_out],
            [pair for pair in pairs if tuple(pair.prompt_ids) in held_out])


# ------------------------------------------------------------------------------------------------------ files out


def write_whole(path, text):
    """Writes a text file whole or not at all. BadInput where it cannot be written."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a file in a folder that is there and can be written to") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ------------------------------------------------------------------------------------------------ report on a file


def histogram(values, width=40):
    """Lines of a text histogram of numbers, in a few bins centred on round numbers (one of them 0)."""
    spread = max(values) - min(values)
    size = next(step for power in range(-6, 12) for step in (10**power, 2 * 10**power, 5 * 10**power) if spread <= 7 * step)
    counts = Counter(round(value / size) for value in values)
    most = max(counts.values())
    return [f"{bin * size:+9.4g} {counts[bin]:6d} {'#' * math.ceil(width * counts[bin] / most)}" for bin in range(min(counts), max(counts) + 1)]


def show_gaps(gaps, what):
    """Prints how often the rewrite scored as its original did, or below it, and a histogram; what is it that has the gaps."""
    ties, inversions = sum(gap == 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    print(f"score gap, chosen minus rejected, of {len(gaps)} {what}: {ties} ties, {inversions} inversions (the original scored higher)")
    print("\n".join(histogram(gaps)))


def printable(text):
    """Text from a model, safe to print: control characters, which could steer a terminal, become a question mark."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def printable_tokens(tokenizer, ids):
    return [printable(token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\u23ce"))
            for token in tokenizer.convert_ids_to_tokens(ids)]


def show_tokens(tokenizer, ids, colour):
    return "|".join(f"\033[{colour}m{token}\033[0m" if sys.stdout.isatty() else token for token in printable_tokens(tokenizer, ids))


def show_report(path, pairs, report, tokenizer):
    """Prints what a person wants to know of a file before training on it."""
    print(f"{path}: {report.rows} rows, {len(pairs)} usable pairs")
    for line in report.lines():
        print(line)
    print("\ntokens      least  median    most")
    for name, lengths in (("prompt", [len(pair.prompt_ids) for pair in pairs]), ("chosen", [len(pair.chosen_ids) for pair in pairs]),
                          ("rejected", [len(pair.rejected_ids) for pair in pairs])):
        print(f"{name:9s} {min(lengths):7d} {int(np.median(lengths)):7d} {max(lengths):7d}")
    gaps = [pair.gap for pair in pairs if not math.isnan(pair.gap)]
    if gaps:
        print()
        show_gaps(gaps, "scored pairs")
    else:
        print("\nno scores: --loss dpo and sft can use these rows, rdpo and dsc cannot")
    pair = pairs[0]
    print(f"\none pair, token by token ({pair.where}); the loss counts the tokens of the two answers, not the prompt's")
    print("prompt:   " + show_tokens(tokenizer, pair.prompt_ids, 2))
    print("chosen:   " + show_tokens(tokenizer, pair.chosen_ids, 32))
    print("rejected: " + show_tokens(tokenizer, pair.rejected_ids, 31))


def main(argv=None):
    parser = argparse.ArgumentParser(description="A report on a file of preference rows, or (--task) a behaviour's public prompts.")
    parser.add_argument("file", nargs="?", help="rows with prompt, chosen, rejected and, maybe, scores")
    parser.add_argument("--model", default=TOY_STUDENT, help="folder or hub id whose tokenizer counts (default: the toy student)")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens that a prompt and an answer may have together")
    parser.add_argument("--task", help="the behaviour's task file: makes prompts instead of a report")
    parser.add_argument("--out", help="where the prompts to train on go")
    parser.add_argument("--held_out", help="where the held-out prompts go (default: next to --out, as NAME.held_out.jsonl)")
    parser.add_argument("--source", help="read the public prompts from this file, not from the task's address")
    parser.add_argument("--templates", help="put each request into a template of this file, at {request}; --- between two")
    parser.add_argument("--seed", type=int, default=0, help="fixes which prompts are drawn, wrapped how, and held out")
    parser.add_argument("--limit", type=int, help="draw at most this many prompts, held-out ones included")
    args = parser.parse_args(argv)
    if bool(args.file) == bool(args.task):
        raise BadInput("give one of two: a file of rows for a report, or --task and --out to make prompts")
    if args.file:
        tokenizer = load_tokenizer(args.model)
        show_report(args.file, *load_pairs(args.file, tokenizer, args.max_length, needs_scores=False, skip_bad_rows=True), tokenizer)
        return
    if not args.out:
        raise BadInput("--task needs --out, the file to write the prompts to")
    if args.seed < 0 or args.limit is not None and args.limit < 2:
        raise BadInput("--seed must be 0 or above, and --limit 2 or above: one prompt to train on, one held out")
    from behaviour import make_prompts  # which itself reads rows by this file
    make_prompts(args)


def run(main):
    """Runs a command's main. Bad input ends it with one line on stderr and exit code 2, Ctrl-C with 130: no traceback."""
    try:
        main()
    except BadInput as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # one of torchrun's processes: the first one says it, unless it has no such error
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    import data  # under this name the other files know it: their BadInput is data.BadInput, not __main__.BadInput
    data.run(data.main)
