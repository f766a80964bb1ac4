"""Preference rows in, batches of tokens out. No model in here.

A row is a JSON object that grows from stage to stage of the pipeline:

    prompts.jsonl     {"id", "prompt": text or [chat messages], "question": what the judge sees}
    synthetic.jsonl   + "rejected": the original y_o, "critique", "chosen": the revision y_r
    scored.jsonl      + "score_rejected": s_o, "score_chosen": s_r; or "tau" itself

    row -> prompt_text, answer_text    the chat template, in infra/templates.py
        -> Pair                        token ids, cut to max_length
        -> collate                     Batch: tensors, whose rows are rows of tokens

Skip infra/ on a first reading.

    python data.py scored.jsonl [--model DIR]      report on the rows; one pair token by token
    python data.py scored.jsonl --label labels.jsonl      label pairs; --calibrate: T from labels
    python data.py --task tasks/safety.toml --out prompts.jsonl      fetch a behaviour's prompts
"""
import dataclasses
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
from jinja2 import TemplateError

from infra.command import BadInput, Parser, at_least, one_line, run, template_kwargs
from infra.distributed import send
from infra.fetch import make_prompts
from infra.formats import as_messages, canonical
from infra.labels import calibrate, label
from infra.models import TOY_STUDENT, load_tokenizer
from infra.packing import batch_tokens, pack
from infra.report import show_report
from infra.rows import (RowCounts, check_judges, check_pair, has_tau, is_cut, judge_of,
                        stream_rows, weight_of)
from infra.split import split_train_val
from infra.templates import (answer_text, cut_left, prompt_text, refuse_control_tokens,
                             template_note)
from rdpo import score_gap

# ---------------------------------------------------------------------------------- text to tokens


def token_ids(tokenizer, text):
    """Token ids of a text, or of each of a list of texts."""
    # verbose=False: no warning of a long text, as truncate() may still cut it.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def encode_prompt(tokenizer, prompt, where="the prompt"):
    """Token ids of prompt_text, to generate from. BadInput if the chat template cannot take it."""
    name = tokenizer.name_or_path
    if isinstance(prompt, list) and not tokenizer.chat_template:
        raise BadInput(f"{name}: its tokenizer has no chat template, which {where} needs; give an "
                       "instruct model, or plain-text prompts")
    try:
        return token_ids(tokenizer, prompt_text(tokenizer, prompt))
    except TemplateError as error:
        raise BadInput(f"{name}: its chat template refuses {where}: {error}") from error


def encode_answers(tokenizer, prompt, answers):
    """(ids of the prompt, [ids of each answer]): one after the other they are what a model reads.

    jinja2.TemplateError if the chat template refuses the prompt or an answer.
    """
    before = prompt_text(tokenizer, prompt)
    after = [answer_text(tokenizer, prompt, before, answer) for answer in answers]
    # Whole texts: an answer by itself may begin with another token than behind its prompt.
    prompt_ids, *whole = token_ids(tokenizer, [before, *(before + text for text in after)])
    size = len(prompt_ids)
    # If the tokenizer merged the prompt's end with the answer's start: the answer by itself. It
    # stands behind a token, as SentencePiece puts a space before the first word of a text.
    return prompt_ids, [ids[size:] if ids[:size] == prompt_ids
                        else token_ids(tokenizer, tokenizer.eos_token + text)[1:]
                        for ids, text in zip(whole, after)]


MIN_PROMPT = 64  # tokens of the prompt that truncation keeps before it cuts the answers


def truncate(tokenizer, prompt_ids, chosen_ids, rejected_ids, max_length):
    """Cut prompt + answer to max_length: first the prompt's left, down to MIN_PROMPT tokens, then
    the answers' right. Too small a max_length leaves no answer; encode_pair drops the pair.

    Both answers keep the same prompt. A cut answer loses its end-of-turn token, so nothing
    teaches the student to stop in mid-sentence.
    """
    for_prompt = max(max_length - max(len(chosen_ids), len(rejected_ids)), MIN_PROMPT)
    keep = min(len(prompt_ids), for_prompt)
    for_answer = max(max_length - keep, 0)
    return (cut_left(tokenizer, prompt_ids, keep), chosen_ids[:for_answer],
            rejected_ids[:for_answer])


# ----------------------------------------------------------------------------------- rows to pairs


@dataclass
class Pair:
    """One training example: token ids of a prompt and of two answers, end-of-turn included."""
    where: str  # "file:line" or "file, item n": the pair's name in messages
    prompt: str | list
    prompt_ids: list
    chosen_ids: list
    rejected_ids: list
    score_gap: float = math.nan  # s_r - s_o on a scale of 0 to 5, nan without both scores
    tau: float = math.nan  # the row's own tau, nan if it has none
    group: str | None = None  # the row's `group` as JSON
    behaviour: str = ""
    judge: str = ""  # who gave the scores, "" if the row does not say
    scale: float | None = None  # width of the judge's scale, None if the row does not say
    weight: float = 1.0  # of its loss
    path: str = ""  # the file of rows

    @property
    def answers(self):
        return self.chosen_ids, self.rejected_ids

    @property
    def names(self):
        """What siblings share, which the split keeps together: prompt, first question or group."""
        asked = next(message["content"] for message in as_messages(self.prompt)
                     if message["role"] == "user")
        names = tuple(self.prompt_ids), (asked.strip().lower(),), self.group
        return [name for name in names if name is not None]

    @property
    def lean(self):
        """Above 0: the judge prefers chosen; below 0: rejected; 0: a tie; nan: not judged."""
        return self.score_gap if math.isnan(self.tau) else self.tau - 0.5


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
            row = canonical(row, read := [])
            pair = encode_pair(row, where, tokenizer, max_length, needs_scores, counts)
        except BadInput as error:
            on_bad(error)
            continue
        counts.rows += 1
        if pair:
            pair.path = path
            pairs.append(pair)
            counts.read.update(read)
    if not pairs:
        raise BadInput(f"{path}: no row left to use: "
                       f"{'; '.join(counts.lines()) or 'it has no rows'}")
    counts.groups = len({pair.group for pair in pairs} - {None})
    return pairs, counts


def encode_pair(row, where, tokenizer, max_length, needs_scores, counts):
    """The Pair of a canonical row. None if it is left out: counts.drop() counts it."""
    prompt, chosen, rejected, scores, tau = check_pair(row, where, needs_scores)
    if not has_tau(row) and not {"score_chosen", "score_rejected"} <= row.keys():
        counts.unscored.append(where)
    name = tokenizer.name_or_path
    if isinstance(prompt, list) and not tokenizer.chat_template:
        raise BadInput(f"{where}: the prompt is chat messages or a transcript, but the tokenizer "
                       f"of {name} has no chat template; give --model an instruct model, or "
                       "plain-text prompts")
    if is_cut(row):  # its end-of-turn token would teach the student to stop in mid-sentence
        return counts.drop("the teacher did not finish an answer (see teacher.finish)", where)
    if chosen == rejected:
        return counts.drop("chosen equals rejected", where)
    try:
        refuse_control_tokens(tokenizer, prompt, (chosen, rejected), where)
        prompt_ids, answers = encode_answers(tokenizer, prompt, (chosen, rejected))
    except TemplateError as error:
        raise BadInput(f"{where}: the chat template of {name} refuses this row: "
                       f"{one_line(str(error))}") from error
    behaviour, judge, scale = judge_of(row, where)
    gap = math.nan if None in scores else score_gap(*scores, scale)
    if needs_scores and math.isnan(gap) and math.isnan(tau):
        return counts.drop("no score", where)
    if answers[0] == answers[1]:
        return counts.drop("chosen equals rejected after the chat template", where)
    cut = truncate(tokenizer, prompt_ids, *answers, max_length)
    counts.truncated += cut != (prompt_ids, *answers)
    prompt_ids, chosen_ids, rejected_ids = cut
    if not chosen_ids:
        return counts.drop(f"no response token left after truncation, --max_length is {max_length}",
                           where)
    if chosen_ids == rejected_ids:
        return counts.drop("chosen equals rejected after truncation", where)
    group = None if row.get("group") is None else json.dumps(row["group"], sort_keys=True)
    return Pair(where, prompt, *cut, gap, tau, group, behaviour, judge, scale,
                weight_of(row, where))


def epoch_order(count, seed, epoch):
    """A permutation of range(count), fixed by seed and epoch, so that a resumed run repeats it."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


# -------------------------------------------------------------------------------- pairs to batches


PADDING = -1  # the segment of the padding at the end of a row


@dataclass
class Batch:
    """B pairs as R rows of L tokens, padded on the right; N tokens of all answers."""
    share_prefix: bool  # a row holds whole pairs; else one prompt and one answer
    input_ids: torch.Tensor  # (R, L)
    segments: torch.Tensor  # (R, L) 3 * pair + 0: prompt, 1: chosen, 2: rejected; or PADDING
    position_ids: torch.Tensor  # (R, L) position in the token's own conversation
    hidden_index: torch.Tensor  # (N,) 0 to R * L - 1: the state that predicts each target
    targets: torch.Tensor  # (N,) tokens of all chosen answers, then of all rejected ones
    answer_lengths: list  # 2B lengths that add up to N

    def to(self, device):
        return dataclasses.replace(self, **{
            name: send(value, device) for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)})


def collate(pairs, share_prefix=False, rows=None):
    """A Batch of pairs, padded with 0. As 0 is a token id too, segments say what is padding.

    share_prefix=False   R = 2B: [prompt | chosen] of every pair, then [prompt | rejected]
    share_prefix=True    R <= B: [prompt | chosen | rejected] of one pair, or of several as `rows`
                         (lists of indices) or pack say. Both answers continue the prompt, so the
                         prompt's last state predicts the first token of both.

    Anything with prompt_ids and as many answers (lists of ids) as the others can be a pair.
    """
    both = range(len(pairs[0].answers))  # 0: chosen, 1: rejected
    # A row of tokens as a list of (pair, which of its answers): [(0, (0, 1)), (3, (0, 1))], say.
    if share_prefix:
        rows = [[(i, both) for i in row]
                for row in rows or pack([batch_tokens(pair, True) for pair in pairs])]
    else:
        rows = [[(i, [a])] for a in both for i in range(len(pairs))]
    width = max(sum(len(pairs[i].prompt_ids) + sum(len(pairs[i].answers[a]) for a in own)
                    for i, own in row) for row in rows)
    input_ids, position_ids = torch.zeros(2, len(rows), width, dtype=torch.long)  # (R, L) each
    segments = torch.full_like(input_ids, PADDING)  # (R, L)
    found = {}  # (answer, pair) -> the states that predict its tokens, the tokens

    for r, row in enumerate(rows):
        end = 0
        for i, own in row:
            start, end = end, end + len(pairs[i].prompt_ids)
            input_ids[r, start:end] = torch.tensor(pairs[i].prompt_ids)
            position_ids[r, start:end] = torch.arange(end - start)
            segments[r, start:end] = 3 * i
            prompt_length, last_of_prompt = end - start, end - 1
            for a in own:
                tokens = torch.tensor(pairs[i].answers[a])
                start, end = end, end + len(tokens)
                input_ids[r, start:end] = tokens
                position_ids[r, start:end] = prompt_length + torch.arange(len(tokens))
                segments[r, start:end] = 3 * i + 1 + a
                # The state before a token predicts it; the prompt's last one predicts the first.
                states = torch.tensor([last_of_prompt, *range(start, end - 1)])
                found[a, i] = r * width + states, tokens
    hidden_index, targets = zip(*(found[a, i] for a in both for i in range(len(pairs))))
    return Batch(share_prefix, input_ids, segments, position_ids, torch.cat(hidden_index),
                 torch.cat(targets), [len(tokens) for tokens in targets])


def count_chosen(pairs):
    """Tokens of the chosen answers."""
    return sum(len(pair.chosen_ids) for pair in pairs)


def count_tokens(pairs):
    """Tokens of both conversations of each pair: each answer with its own prompt."""
    return sum(len(pair.prompt_ids) + len(ids) for pair in pairs for ids in pair.answers)


# ------------------------------------------------------------------------------------- the command


def main(argv=None):
    parser = Parser("A report on preference rows, or (--task) a behaviour's public prompts.")
    flag = parser.add_argument
    flag("file", nargs="?", help="rows with prompt, chosen, rejected and, optionally, scores")
    flag("--model", default=TOY_STUDENT, help="whose tokenizer (default: the toy's)")
    flag("--max_length", type=at_least(1), default=1024, help="prompt + one answer")
    flag("--template_kwargs", type=template_kwargs, help="as train.py's")
    flag("--label", help="ask a person which answers are better; labels go here")
    flag("--calibrate", help="fit T to this file of labels")
    flag("--task", help="fetch the prompts that this behaviour's file names")
    flag("--out", help="where the prompts to train on go")
    flag("--held_out", help="where held-out prompts go (default: next to --out)")
    flag("--source", help="read public prompts from this file, not from the network")
    flag("--templates", help="file of templates with {request}; --- between two")
    flag("--seed", type=at_least(0), default=0, help="fixes draw and split")
    flag("--limit", type=at_least(2), help="at most this many prompts, or labels (default: 50)")
    args = parser.parse_args(argv)
    if bool(args.file) == bool(args.task):
        raise BadInput("give one of two: a file of rows for a report, or --task and --out for "
                       "prompts")
    if args.task and not args.out:
        raise BadInput("--task needs --out, the file to write the prompts to")
    if (args.label or args.calibrate) and not args.file:
        raise BadInput("--label and --calibrate need a file of rows")
    if args.task:
        return make_prompts(args)
    if args.label:
        return label(args.file, args.label, args.limit or 50, args.seed)
    if args.calibrate:
        return calibrate(args.file, args.calibrate, score_gap)
    tokenizer = load_tokenizer(args.model, args.template_kwargs)
    pairs, counts = load_pairs(args.file, tokenizer, args.max_length, needs_scores=False,
                               skip_bad_rows=True)
    scored = [pair for pair in pairs if not math.isnan(pair.lean)]
    _, held_out = split_train_val(scored or pairs, share=0.1, seed=0)  # as train.py by default
    show_report(args.file, pairs, len(held_out), counts, tokenizer)
    try:
        check_judges(pairs)
    except BadInput as error:
        print(f"\nwith --loss rdpo or dsc train.py would stop at {error}")
    note = template_note(tokenizer)
    if note:
        print("\n" + note)


if __name__ == "__main__":
    run(main)
