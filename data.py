"""Preference rows in, batches of tokens out. No model in here.

A row is a JSON object that grows from stage to stage of the pipeline:

    prompts.jsonl     {"id", "prompt": text or [chat messages], "question": what the judge sees}
    synthetic.jsonl   + "rejected": the original y_o, "critique", "chosen": the revision y_r
    scored.jsonl      + "score_rejected": s_o, "score_chosen": s_r; or "tau" itself

    row -> prompt_text, answer_text    the chat template
        -> Pair                        token ids, cut to max_length
        -> micro_batches, collate      Batch: tensors

    python data.py scored.jsonl [--model DIR]      report on the rows; one pair token by token
    python data.py scored.jsonl --label labels.jsonl      label pairs; --calibrate: T from labels
    python data.py --audit out      the pairs on which student and judge disagree
    python data.py --task tasks/safety.toml --out prompts.jsonl      fetch a behaviour's prompts
"""
import dataclasses
import functools
import heapq
import json
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from jinja2 import TemplateError

from infra.command import (BadInput, Parser, at_least, one_line, refuse, run,
                           template_kwargs)
from infra.audit import show_audit
from infra.distributed import send
from infra.fetch import make_prompts
from infra.labels import calibrate, label
from infra.models import TOY_STUDENT, load_tokenizer
from infra.report import show_report
from infra.rows import (RowCounts, as_messages, canonical, check_pair, families, has_input,
                        has_tau, is_cut, judge_of, score_gap, stream_rows)

# ---------------------------------------------------------------------------------- text to tokens


def prompt_text(tokenizer, prompt):
    """The text the model reads before it answers: chat template, or `<bos>prompt` + empty line."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            as_messages(prompt), tokenize=False, add_generation_prompt=True)
    ids = tokenizer("").input_ids  # holds bos if this tokenizer starts every text with it
    bos = tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""
    return bos + prompt + "\n\n"


def answer_text(tokenizer, prompt, answer):
    """The text that follows prompt_text: the answer and exactly one end-of-turn token.

    That token is the control token that the chat template writes after an assistant's message,
    or eos if it writes none. Whatever the template writes behind it is no part of the answer.
    """
    after = answer
    if tokenizer.chat_template:
        before = prompt_text(tokenizer, prompt)
        messages = as_messages(prompt) + [{"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        # Some templates render a finished turn differently (thinking blocks): then answer + eos.
        if whole.startswith(before) and answer.strip() in whole[len(before):]:
            after = whole[len(before):]
    end = after.index(answer.strip()) + len(answer.strip())
    found = [(start, token) for token in control_tokens(tokenizer)
             if (start := after.find(token, end)) >= 0]
    if not found:
        return after.rstrip() + tokenizer.eos_token
    start, token = min(found)
    return after[:start] + token


def template_note(tokenizer, prompt):
    """A line about a chat template that renders an answer otherwise than it asks for one, or "".

    Thinking templates do: a finished answer gets an empty block that the student learns to write.
    """
    if not tokenizer.chat_template:
        return ""
    before, answer = prompt_text(tokenizer, prompt), "An answer."
    whole = tokenizer.apply_chat_template(
        as_messages(prompt) + [{"role": "assistant", "content": answer}], tokenize=False)
    same = len(os.path.commonprefix([before, whole]))
    asked, rendered = before[same:], whole[same:].partition(answer)[0]
    if asked.strip() == rendered.strip():
        return ""
    return (f"template: it writes {rendered!r} before a finished answer, and {asked!r} when it "
            "asks for one; --template_kwargs may make both alike, see docs/pipeline.md")


@functools.cache
def control_tokens(tokenizer):
    """Tokens that ordinary text must not hold: end of turn, beginning of text and the like."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def refuse_control_tokens(tokenizer, prompt, answers, where):
    """BadInput if a text holds a control token: it would end its turn, or begin another one."""
    texts = [("the prompt", message["content"]) for message in as_messages(prompt)]
    for what, text in texts + [("an answer", answer) for answer in answers]:
        found = [token for token in control_tokens(tokenizer) if token in text]
        refuse(where, (found, f"{what} holds the control token {', '.join(found)}; give the bare "
                              "text without it, or run with --skip_bad_rows"))


def encode_prompt(tokenizer, prompt):
    """Token ids of prompt_text. jinja2.TemplateError if the chat template refuses the prompt."""
    return token_ids(tokenizer, prompt_text(tokenizer, prompt))


def token_ids(tokenizer, text):
    """Without the tokenizer's warning of a long text: truncate() may still cut it."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def encode_answer(tokenizer, prompt, prompt_ids, answer):
    """Token ids of answer_text, such that prompt_ids + answer ids is what the model reads."""
    before, after = prompt_text(tokenizer, prompt), answer_text(tokenizer, prompt, answer)
    whole_ids = token_ids(tokenizer, before + after)
    if whole_ids[:len(prompt_ids)] == prompt_ids:
        return whole_ids[len(prompt_ids):]
    # The tokenizer merged the prompt's end with the answer's start: tokenize the answer alone.
    return token_ids(tokenizer, after)


MIN_PROMPT = 64  # tokens of the prompt that truncation keeps before it cuts the answers


def truncate(prompt_ids, chosen_ids, rejected_ids, max_length):
    """Cut prompt + answer to max_length: first the prompt's left, down to MIN_PROMPT tokens, then
    the answers' right. Too small a max_length leaves no answer; encode_pair drops the pair.

    Both answers keep the same prompt. A cut answer loses its end-of-turn token, so nothing
    teaches the student to stop in mid-sentence.
    """
    room = max_length - max(len(chosen_ids), len(rejected_ids))
    keep = min(len(prompt_ids), max(room, MIN_PROMPT))
    room = max(max_length - keep, 0)
    return prompt_ids[len(prompt_ids) - keep:], chosen_ids[:room], rejected_ids[:room]


# ----------------------------------------------------------------------------------- rows to pairs


@dataclass
class Pair:
    """One training example: token ids of a prompt and of two answers, end-of-turn included."""
    where: str  # "file:line" or "file, item n": the pair's name in messages
    prompt: str | list
    prompt_ids: list
    chosen_ids: list
    rejected_ids: list
    score_chosen: float | None
    score_rejected: float | None
    group: str | None = None  # the row's `group` as JSON
    behaviour: str = ""
    judge: str = ""  # who gave the scores, "" if the row does not say
    scale: float | None = None  # width of the judge's scale, None if the row does not say

    @property
    def names(self):
        """Names of this pair, any of which its siblings share: ids, uncut prompt, group."""
        names = tuple(self.prompt_ids), json.dumps(as_messages(self.prompt)), self.group
        return [name for name in names if name is not None]

    @property
    def gap(self):
        """score_chosen - score_rejected in points of a scale of 5; nan if a score is missing."""
        scores = self.score_chosen, self.score_rejected
        return math.nan if None in scores else score_gap(*scores, self.scale)


def load_pairs(path, tokenizer, max_length, needs_scores, skip_bad_rows=False):
    """(pairs, RowCounts) of a file of preference rows. See encode_pair for rows left out.

    A bad row raises BadInput; with skip_bad_rows it is counted. BadInput if no pair is left.
    """
    counts, pairs = RowCounts(), []

    def on_bad(error):
        if not skip_bad_rows:
            raise error
        counts.rows += 1
        counts.drop("bad row", str(error))

    for where, row in stream_rows(path, on_bad):
        try:
            pair = encode_pair(canonical(row), where, tokenizer, max_length, needs_scores, counts)
        except BadInput as error:
            on_bad(error)
            continue
        counts.rows += 1
        if pair:
            pairs.append(pair)
            counts.joined += has_input(row)
    reasons = "; ".join(counts.lines()) or "it has no rows"
    refuse(path, (not pairs, f"no row left to use: {reasons}"))
    counts.groups = len({pair.group for pair in pairs} - {None})
    return pairs, counts


def encode_pair(row, where, tokenizer, max_length, needs_scores, counts):
    """The Pair of a canonical row; None if the row is left out, which drop() counts."""
    prompt, chosen, rejected, score_chosen, score_rejected = check_pair(row, where, needs_scores)
    if not has_tau(row) and not {"score_chosen", "score_rejected"} <= row.keys():
        counts.unscored.append(where)
    name = tokenizer.name_or_path
    refuse(where, (isinstance(prompt, list) and not tokenizer.chat_template,
                   f"the prompt is chat messages or a transcript, but the tokenizer of {name} has "
                   "no chat template; give --model an instruct model, or plain-text prompts"))
    if is_cut(row):  # its end-of-turn token would teach the student to stop in mid-sentence
        return counts.drop("the teacher did not finish an answer (see teacher.finish)", where)
    if chosen == rejected:
        return counts.drop("chosen equals rejected", where)
    refuse_control_tokens(tokenizer, prompt, (chosen, rejected), where)
    try:
        prompt_ids = encode_prompt(tokenizer, prompt)
        chosen_ids = encode_answer(tokenizer, prompt, prompt_ids, chosen)
        rejected_ids = encode_answer(tokenizer, prompt, prompt_ids, rejected)
    except TemplateError as error:
        raise BadInput(f"{where}: the chat template of {name} refuses this row: "
                       f"{one_line(str(error))}") from error
    if needs_scores and None in (score_chosen, score_rejected):
        return counts.drop("no score", where)
    cut = truncate(prompt_ids, chosen_ids, rejected_ids, max_length)
    counts.truncated += cut != (prompt_ids, chosen_ids, rejected_ids)
    prompt_ids, chosen_ids, rejected_ids = cut
    if not chosen_ids:
        return counts.drop(f"no response token left after truncation, --max_length is {max_length}",
                           where)
    if chosen_ids == rejected_ids:
        return counts.drop("chosen equals rejected after truncation", where)
    group = None if row.get("group") is None else json.dumps(row["group"], sort_keys=True)
    return Pair(where, prompt, *cut, score_chosen, score_rejected, group, *judge_of(row, where))


def check_judges(pairs):
    """BadInput if several judges scored the pairs and one of them has no scale.

    A gap of 1 then means different things, which no temperature makes up for.
    """
    of_judge = {(pair.judge, pair.scale): pair for pair in reversed(pairs)
                if not math.isnan(pair.gap)}  # the first pair of each
    for (judge, scale), pair in of_judge.items():
        refuse(pair.where, (
            scale is None and len(of_judge) > 1,
            f"scored by {judge or 'an unnamed judge'} on an unknown scale, and other rows are "
            'scored otherwise; add "judge": {"scale": [lowest, highest]} to its rows, or train on '
            "one judge's rows at a time"))


def split_train_val(pairs, share, seed, at_most=256):
    """(training pairs, validation pairs): siblings (see Pair.names) stay on one side.

    Validation gets a share of the families of siblings, at most `at_most` of them.
    """
    family_of, smallest = families([pair.names for pair in pairs]), {}
    for pair, family in zip(pairs, family_of):
        ids = tuple(pair.prompt_ids)
        smallest[family] = min(ids, smallest.get(family, ids))
    ordered = sorted(smallest, key=smallest.get)  # whatever the order of the rows
    count = min(math.ceil(len(ordered) * share), at_most) if len(ordered) > 1 else 0
    order = np.random.default_rng(seed).permutation(len(ordered))
    val = {ordered[i] for i in order[:count]}
    return ([pair for pair, family in zip(pairs, family_of) if family not in val],
            [pair for pair, family in zip(pairs, family_of) if family in val])


def epoch_order(count, seed, epoch):
    """A permutation of range(count), fixed by seed and epoch, so that a resumed run repeats it."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


# -------------------------------------------------------------------------------- pairs to batches


PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, -1  # the segments of a pair; of the rest of a row


@dataclass
class Batch:
    """B pairs as R rows of T tokens, padded on the right; N response tokens in all."""
    share_prefix: bool  # a row holds whole pairs; else one answer
    input_ids: torch.Tensor  # (R, T)
    segments: torch.Tensor  # (R, T) 3 * number of the pair + its segment, or PADDING
    position_ids: torch.Tensor  # (R, T) position in the token's own conversation
    hidden_index: torch.Tensor  # (N,) 0 to R * T - 1: the state that predicts each target
    targets: torch.Tensor  # (N,) response tokens: all chosen answers, then all rejected ones
    response_lengths: list  # 2B lengths that add up to N

    def to(self, device):
        return dataclasses.replace(self, **{
            name: send(value, device) for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)})


def collate(pairs, share_prefix=False, rows=None):
    """A Batch of pairs, padded with 0. Lengths tell what is padding, as 0 is a token id too.

    share_prefix=False   R = 2B: [prompt | chosen] of every pair, then [prompt | rejected]
    share_prefix=True    R <= B: [prompt | chosen | rejected] of one pair, or of several as `rows`
                         or pack say. Both answers continue the prompt, so the prompt's last state
                         predicts the first token of both.
    """
    answers = [{CHOSEN: pair.chosen_ids, REJECTED: pair.rejected_ids} for pair in pairs]
    if share_prefix:  # a row is a list of (number of a pair, {segment: ids})
        rows = rows or pack([batch_tokens(pair, True) for pair in pairs])
        rows = [[(i, answers[i]) for i in row] for row in rows]
    else:
        rows = [[(i, {segment: answers[i][segment]})]
                for segment in (CHOSEN, REJECTED) for i in range(len(pairs))]
    width = max(sum(len(pairs[i].prompt_ids) + sum(map(len, own.values())) for i, own in row)
                for row in rows)
    input_ids, position_ids = torch.zeros(2, len(rows), width, dtype=torch.long)  # each (R, T)
    segments = torch.full_like(input_ids, PADDING)  # (R, T)
    responses = {}  # (segment, pair) -> hidden_index, targets

    for r, row in enumerate(rows):
        end = 0
        for i, own in row:
            prompt_ids = pairs[i].prompt_ids
            start, end = end, end + len(prompt_ids)
            prompt_end = end
            input_ids[r, start:end] = torch.tensor(prompt_ids)
            position_ids[r, start:end] = torch.arange(len(prompt_ids))
            segments[r, start:end] = 3 * i + PROMPT
            for segment, ids in own.items():
                start, end = end, end + len(ids)
                tokens = torch.tensor(ids)
                input_ids[r, start:end] = tokens
                position_ids[r, start:end] = len(prompt_ids) + torch.arange(len(ids))
                segments[r, start:end] = 3 * i + segment
                # The state before a token predicts it. Before an answer stands the prompt's last.
                column = torch.tensor([prompt_end - 1, *range(start, end - 1)])
                responses[segment, i] = r * width + column, tokens
    hidden_index, targets = zip(*(responses[segment, i] for segment in (CHOSEN, REJECTED)
                                  for i in range(len(pairs))))
    return Batch(share_prefix, input_ids, segments, position_ids, torch.cat(hidden_index),
                 torch.cat(targets), [len(ids) for ids in targets])


# Tokens of a row at which attention costs as much as the layers' matrices: 6 * hidden size, here
# that of a model of 8 B parameters. Where rows are short, a smaller one changes nothing.
ATTENTION_WIDTH = 24576


def pack(sizes):
    """Rows of a batch, lists of indices, for pairs of these sizes in tokens: the least work.

    Padding costs work, and so do wide rows, because attention grows with the square. The longest
    pair first, each goes into the shortest row. All numbers of rows are tried, up to rows that are
    four times as wide as the longest pair.
    """
    def rows_of(count):
        rows, by_length = [[] for _ in range(count)], [(0, r) for r in range(count)]  # a heap
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            length, r = heapq.heappop(by_length)
            rows[r].append(i)
            heapq.heappush(by_length, (length + sizes[i], r))
        width = max(by_length)[0]
        return count * width * (1 + width / ATTENTION_WIDTH), rows

    fewest = math.ceil(sum(sizes) / (4 * max(sizes)))
    return min(map(rows_of, range(fewest, len(sizes) + 1)))[1]


def longest_row(pair):
    """Tokens of the pair's longer conversation: the prompt and one answer."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def count_chosen(pairs):
    """Tokens of the chosen answers."""
    return sum(len(pair.chosen_ids) for pair in pairs)


def count_tokens(pairs):
    """Tokens of both conversations of each pair: each answer with its own prompt."""
    return count_chosen(pairs) + sum(2 * len(pair.prompt_ids) + len(pair.rejected_ids)
                                     for pair in pairs)


def batch_tokens(pair, share_prefix):
    """Tokens that a pair alone takes in a Batch, padding counted."""
    if share_prefix:
        return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
    return 2 * longest_row(pair)


def micro_batches(pairs, indices, tokens_per_batch, share_prefix, rank=0, world_size=1):
    """Split the pairs at `indices` into one rank's micro-batches: lists of indices.

    A micro-batch holds pairs of similar length, at most tokens_per_batch tokens (one answer per
    row: with their padding); a longer pair gets one of its own. Ranks take turns by length, so
    that each gets its share of long pairs. All ranks get the same number of micro-batches: under
    FSDP every forward pass needs all ranks, or they wait for ever. A rank with fewer gets empty
    ones at the end.
    """
    def size(i):
        return batch_tokens(pairs[i], share_prefix)

    by_length = sorted(indices, key=lambda i: (size(i), i))
    of_ranks = [[] for _ in range(world_size)]
    for r, batches in enumerate(of_ranks):
        for i in by_length[r::world_size]:  # ascending, so the newest pair is the longest
            more = [*batches[-1], i] if batches else []
            tokens = sum(map(size, more)) if share_prefix else size(i) * len(more)
            if batches and tokens <= tokens_per_batch:
                batches[-1].append(i)
            else:
                batches.append([i])
    most = max(map(len, of_ranks))
    return of_ranks[rank] + [[]] * (most - len(of_ranks[rank]))


# ------------------------------------------------------------------------------------- the command


def main(argv=None):
    parser = Parser("A report on preference rows, or (--task) a behaviour's public prompts.")
    parser.add_argument("file", nargs="?", help="rows with prompt, chosen, rejected, maybe scores")
    parser.add_argument("--model", default=TOY_STUDENT, help="whose tokenizer (default: the toy's)")
    parser.add_argument("--max_length", type=at_least(1), default=1024, help="prompt + one answer")
    parser.add_argument("--template_kwargs", type=template_kwargs, help="as train.py's")
    parser.add_argument("--label", help="ask a person which answers are better; labels go here")
    parser.add_argument("--calibrate", help="fit T to this file of labels")
    parser.add_argument("--audit", help="out_dir of a train.py run: which rows may be wrong?")
    parser.add_argument("--task", help="fetch the prompts that this behaviour's file names")
    parser.add_argument("--out", help="where the prompts to train on go")
    parser.add_argument("--held_out", help="where held-out prompts go (default: next to --out)")
    parser.add_argument("--source", help="read public prompts from this file, not from the network")
    parser.add_argument("--templates", help="file of templates with {request}; --- between two")
    parser.add_argument("--seed", type=at_least(0), default=0, help="fixes draw and split")
    parser.add_argument("--limit", type=at_least(2),
                        help="at most this many prompts in all, or labels (default: 50)")
    args = parser.parse_args(argv)
    refuse("", (sum(map(bool, (args.file, args.task, args.audit))) != 1,
                "give one of three: a file of rows for a report, --task and --out for prompts, or "
                "--audit and the out_dir of a run"),
           (args.task and not args.out, "--task needs --out, the file to write the prompts to"),
           ((args.label or args.calibrate) and not args.file,
            "--label and --calibrate need a file of rows"))
    if args.task:
        return make_prompts(args)
    if args.audit:
        return show_audit(args.audit)
    if args.label:
        return label(args.file, args.label, args.limit or 50, args.seed)
    if args.calibrate:
        return calibrate(args.file, args.calibrate)
    tokenizer = load_tokenizer(args.model, args.template_kwargs)
    pairs, counts = load_pairs(args.file, tokenizer, args.max_length, needs_scores=False,
                               skip_bad_rows=True)
    scored = [pair for pair in pairs if not math.isnan(pair.gap)]
    _, held_out = split_train_val(scored or pairs, share=0.1, seed=0)  # as train.py by default
    show_report(args.file, pairs, len(held_out), counts, tokenizer)
    try:
        check_judges(pairs)
    except BadInput as error:
        print(f"\nwith --loss rdpo or dsc train.py would stop at {error}")
    note = template_note(tokenizer, pairs[0].prompt)
    if note:
        print("\n" + note)


if __name__ == "__main__":
    run(main)
