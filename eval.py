"""Evaluation: the answers of a base model and its students to new prompts, judged and compared.

    python eval.py --task tasks/safety.toml --prompts held_out.jsonl --model out [out2 ...] \\
        --base_model DIR --base_url URL --judge_model NAME
    python eval.py --prompts toy/held_out.jsonl --model out    no judge: lengths, faults, answers
    ... --temperature 1    sampled answers, and from them the KL divergence from the base
    ... --pairwise         the judge also compares with the base's answer, in both orders
    ... --self_refine      adds a baseline: the base criticises and rewrites its own answer
    python eval.py --data scored.jsonl --model out    margins and accuracy on scored pairs
    python eval.py --curves out [out2 ...]            draws training runs into eval/curves.png

--out_dir gets answers.jsonl, eval.jsonl (scores and the judge's raw replies), pairwise.jsonl and
report.md; asked-eval.jsonl and asked-pairwise.jsonl are the judge's input. The same command
continues a stopped run. An answer that could not be judged has score null, and is in no mean.
"""
import argparse
import itertools
import json
import os
import sys
import zlib
from collections import Counter

import numpy as np
import torch
from jinja2 import TemplateError

from data import Pair, collate, encode_prompt, load_pairs, longest_row, micro_batches
from infra.client import Client, add_client_flags
from infra.command import BadInput, Parser, at_least, one_line, refuse, run
from infra.generate import Answer, generate
from infra.models import (TOY_STUDENT, check_model_name, load_model, load_tokenizer,
                          position_limit)
from infra.plots import draw_curves
from infra.report import examples, indented, side_by_side, table, warn_of_overlap
from infra.resumable import Stage, checked_rows, run_batches, run_rows
from infra.rows import as_messages, atomic_write, check_prompt, stream_rows
from infra.task import load_task
from rdpo import reference_fingerprint, sequence_logps
from reward import ENDPOINTS, add_judge_flags, ask_which, provenance, question_of, score_answer

# ---------------------------------------------------------------------------------------- answers

REFINED = "base + self-refine"
ANSWER_KEYS = ("turns", "answer", "finish", "prompt_ids", "ids")


def generate_turns(model, tokenizer, rows, task, args):
    """A list of Answers per turn: [answers], or with a task [answers, critiques, rewrites].

    With a task the model does what a teacher does: it criticises and rewrites its own answer.
    """
    prompts, turns = [row["prompt"] for row in rows], []
    for request in (None, task.critique, task.revision) if task else (None,):
        if request:
            prompts = [as_messages(prompt) + [{"role": "assistant", "content": answer.text},
                                              {"role": "user", "content": request}]
                       for prompt, answer in zip(prompts, turns[-1])]
        prompt_ids = [encode(tokenizer, prompt, row) for prompt, row in zip(prompts, rows)]
        # A row has the same seed for all systems: where two of them agree, so do their samples.
        seeds = [zlib.crc32(f"{args.seed} {len(turns)} {row['row']}".encode()) for row in rows]
        turns.append(generate(model, tokenizer, prompt_ids, args.max_new_tokens,
                              args.temperature, seeds, args.batch_size))
    return turns


def encode(tokenizer, prompt, row):
    try:
        return encode_prompt(tokenizer, prompt)
    except TemplateError as error:
        raise BadInput(f"{tokenizer.name_or_path}: its chat template refuses the prompt of row "
                       f"{json.dumps(row['row'])[:40]}: {error}") from error


def answer_rows(path, system, model, tokenizer, rows, task, args):
    """Append a system's missing answers to `path`; return all its rows, in the order of `rows`.

    With a task the rewrite is the answer. BadInput if `path` holds answers by other settings.
    """
    needs_chat = task or any(isinstance(row["prompt"], list) for row in rows)
    refuse(system, (
        needs_chat and not tokenizer.chat_template,
        "its tokenizer has no chat template, which --self_refine and prompts that are lists of "
        "messages need; give an instruct model, or plain-text prompts"))
    settings = {"weights": reference_fingerprint(model, str(model.dtype)),
                "temperature": args.temperature, "seed": args.seed,
                "max_new_tokens": args.max_new_tokens}
    settings |= {"asked": [task.critique, task.revision]} if task else {}
    rows = [{"id": f"{system}/{row['id']}", "row": row["id"], "system": system,
             "made_with": settings}
            | {key: row[key] for key in ("behaviour", "prompt", "question") if key in row}
            for row in rows]

    def answer(batch):
        for row, *turns in zip(batch, *generate_turns(model, tokenizer, batch, task, args)):
            last = turns[-1]
            yield row | {"turns": [turn.text for turn in turns[:-1]], "answer": last.text,
                         "finish": last.finish, "prompt_ids": last.prompt_ids, "ids": last.ids}

    by_length = sorted(rows, key=lambda row: len(str(row["prompt"])))
    answers = run_batches(path, by_length, ANSWER_KEYS, answer, args.batch_size, system)
    return [answers[row["id"]] for row in rows]


def fault(row):
    """Why an answer is degenerate: "empty", "cut" by --max_new_tokens, "repetitive", or "".

    Repetitive: the same four words (split at spaces) occur three times or more.
    """
    words = row["answer"].split()
    fours = Counter(zip(words, words[1:], words[2:], words[3:]))
    if not words:
        return "empty"
    if row["finish"] == "length":
        return "cut"
    return "repetitive" if max(fours.values(), default=0) >= 3 else ""


# ------------------------------------------------------------------------------ log-probabilities

TOKENS_PER_BATCH = 4096  # in one forward pass, padding included: memory only


@torch.no_grad()
def pair_logps(model, pairs):
    """(P, 2): log pi(chosen) and log pi(rejected) of data.Pairs in nats, summed over tokens."""
    logps = torch.empty(len(pairs), 2)  # (P, 2)
    for indices in micro_batches(pairs, range(len(pairs)), TOKENS_PER_BATCH):
        batch = collate([pairs[i] for i in indices]).to(model.device)
        logps[indices] = sequence_logps(model, batch).view(2, -1).T.cpu()
    return logps


def answer_logps(model, answers):
    """(N,): log pi(answer) of Answers in nats, summed over tokens, end-of-turn token included.

    For answers that a policy sampled at temperature 1, the mean of
    answer_logps(policy) - answer_logps(reference) estimates KL(policy || reference) per answer.
    """
    # A Pair needs a second answer: one token, not read.
    pairs = [Pair("", "", answer.prompt_ids, answer.ids, answer.ids[:1], None, None)
             for answer in answers]
    return pair_logps(model, pairs)[:, 0]


def row_logps(model, rows):
    """(N,): answer_logps of rows of answers.jsonl."""
    return answer_logps(model, [Answer(row["answer"], row["finish"], row["prompt_ids"], row["ids"])
                                for row in rows])


# -------------------------------------------------------------------------------------- the judge


def judge_rows(args, task, rows, name, key, ask):
    """Judge rows as reward.py does, into out_dir/name; return ({id: number}, failed rows).

    ask(client, task, args, row) returns the number to store under `key`, or None, and the replies.
    """
    path, source = os.path.join(args.out_dir, name), os.path.join(args.out_dir, f"asked-{name}")
    atomic_write(source, "".join(json.dumps(row) + "\n" for row in rows))
    args = argparse.Namespace(**vars(args) | {"model": args.judge_model, "out": path,
                                              "limit": None, "show": False})
    client = Client(args)

    def work(row):
        value, replies = ask(client, task, args, row)
        return row | {key: value, "judge": {"said": replies}}

    stage = Stage(adds=(key, "judge"), provenance_key="judge", provenance=provenance(task, args),
                  check=check_prompt, work=work, show=None)
    failed = run_rows(stage, source, args, client.counts)
    # No row was ever finished in an empty file.
    judged = stream_rows(path) if os.path.getsize(path) else []
    return {row["id"]: row[key] for _, row in judged}, failed


def score_of(client, task, args, row):
    """(score or None, replies) of an answer."""
    return score_answer(client, task, args, row, row["answer"])


def win_over_base(client, task, args, row):
    """(win or None, replies): 1 if the judge prefers the answer to the base's, 0 if not.

    The mean of both orders: a judge that goes by the order alone contradicts itself, 1/2.
    """
    question, answer, base = question_of(row), row["answer"], row["base"]
    first, replies_first = ask_which(client, task.judge, args, question, answer, base)
    second, replies_second = ask_which(client, task.judge, args, question, base, answer)
    win = None if None in (first, second) else (first + 1 - second) / 2
    return win, [replies_first, replies_second]


# ------------------------------------------------------------------------- numbers with intervals


def bootstrap(statistic, *columns, resamples=2000, seed=0):
    """(value, low, high): a statistic of columns (N,), N >= 1, and its 95 % bootstrap interval.

    statistic takes one array (..., N) per column and reduces the last axis, as `mean` does.
    """
    columns = [np.asarray(column, dtype=float) for column in columns]
    count = len(columns[0])
    indices = np.random.default_rng(seed).integers(count, size=(resamples, count))
    low, high = np.percentile(statistic(*(column[indices] for column in columns)), (2.5, 97.5))
    return float(statistic(*columns)), float(low), float(high)


def mean(values):
    return values.mean(-1)


def equal_length(gaps, length_gaps):
    """The score gap (..., N) -> (...) between two systems whose answers are equally long.

    The intercept of a linear regression of gaps on length gaps; the mean if all lengths agree.
    """
    x = length_gaps - length_gaps.mean(-1, keepdims=True)
    slope = (x * gaps).sum(-1) / np.maximum((x * x).sum(-1), 1e-9)
    return gaps.mean(-1) - slope * length_gaps.mean(-1)


def cell(form, statistic, *columns):
    """A statistic and its interval as text, over rows without nan; "-" if there is no such row."""
    known = ~np.isnan(sum(columns))  # (N,)
    if not known.any():
        return "-"
    numbers = bootstrap(statistic, *(column[known] for column in columns))
    value, low, high = (format(number, form) for number in numbers)
    return f"{value} [{low}, {high}]"


# -------------------------------------------------------------------------------------- the table


def columns_of(rows, scores, wins, kl):
    """{measurement: (N,)} of a system's answers; nan is unknown."""
    return {"score": np.array([scores.get(row["id"]) for row in rows], dtype=float),
            "win": np.array([wins.get(row["id"]) for row in rows], dtype=float),
            "tokens": np.array([len(row["ids"]) for row in rows], dtype=float),
            "degenerate": np.array([bool(fault(row)) for row in rows]),
            "kl": kl}


def answer_cells(args, columns, system, indices):
    """{measurement: cell} of a system on some prompts. A new measurement goes here."""
    own, base = ({key: column[indices] for key, column in columns[name].items()}
                 for name in (system, "base"))
    gaps = own["score"] - (np.nan if system == "base" else base["score"])
    longer = own["tokens"] - base["tokens"]
    lengths_differ = len(set(longer[~np.isnan(gaps)])) > 1
    wins = own["win"] if args.pairwise else (1 + np.sign(gaps)) / 2  # a tie is half a win
    judged = f"{np.isfinite(own['score']).sum()}/{len(gaps)}"
    return {"judged": judged if args.base_url else "-",
            "score": cell(".2f", mean, own["score"]),
            "win %": cell(".0f", mean, 100 * wins),
            "at equal length": cell("+.2f", equal_length, gaps, longer) if lengths_differ else "-",
            "tokens": f"{own['tokens'].mean():.1f}",
            "degenerate %": f"{100 * own['degenerate'].mean():.1f}",
            "KL, nats": cell(".2f", mean, own["kl"])}


def pair_cells(pairs, logps, reference):
    """{measurement: cell} of a model on scored pairs, from its and the base's logps, (P, 2)."""
    margins = (logps - reference).double().numpy() @ [1, -1]  # (P,): the loss's m / beta
    if logps is reference:
        margins[:] = np.nan  # the base has no preference against itself
    side = np.where(abs(margins) < 1e-3, 0, np.sign(margins))  # 0: no preference, half right
    signs = np.sign([pair.gap or np.nan for pair in pairs])  # (P,): nan for a tie or no score
    chosen, rejected = logps.T.double().numpy()
    return {"pairs": str(len(pairs)),
            "chosen first %": cell(".1f", mean, 50 * (1 + side)),
            "agrees with scores %": cell(".1f", mean, 50 * (1 + side * signs)),
            "log-ratio margin": cell("+.2f", mean, margins),
            "logp chosen": cell(".2f", mean, chosen),
            "logp rejected": cell(".2f", mean, rejected)}


def behaviours(rows, task):
    """{behaviour: indices of its rows}, and all rows if there are several behaviours."""
    groups = {}
    for i, row in enumerate(rows):
        name = str(row.get("behaviour", task.name if task else "answers"))
        groups.setdefault(one_line(name), []).append(i)
    return groups | ({"all": list(range(len(rows)))} if len(groups) > 1 else {})


def notes_on(args, answers, columns):
    """The notes below the table, one sentence per line."""
    lines = ["[low, high]: 95 % bootstrap interval over prompts or pairs; "
             "tokens: mean length of an answer"]
    if args.data:
        lines.append("log-ratio margin: the loss's margin before beta, nats; "
                     "logp: log-probability of an answer, nats")
    if args.base_url:
        win = ("the judge prefers the answer to the base's, mean of both orders" if args.pairwise
               else "share of prompts that score above the base, ties half")
        lines += [f"score: higher is better; win: {win}",
                  "at equal length: score minus the base's score, where both answers are equally "
                  "long (linear regression)"]
    for name, rows in answers.items():
        unjudged, not_compared = (np.isnan(columns[name][key]).sum() for key in ("score", "win"))
        if args.base_url and unjudged:
            lines.append(f"could not judge {unjudged} of {len(rows)} answers of {name}")
        if args.pairwise and name != "base" and not_compared:
            lines.append(f"could not compare {not_compared} of {len(rows)} answers of {name}")
        counts = Counter(filter(None, map(fault, rows)))
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
        limit = f" (cut at --max_new_tokens {args.max_new_tokens})" if counts["cut"] else ""
        lines.append(f"degenerate answers of {name}: {kinds}{limit}")
    if answers and args.temperature != 1:
        lines.append("KL: only from answers that are sampled at --temperature 1")
    return lines


# ------------------------------------------------------------------------------------ the command


def get_args(argv):
    parser = Parser("Judge and compare the answers of a base model and of its students.")
    flag = parser.add_argument
    flag("--curves", nargs="+", metavar="DIR", help="only draw the curves of these training runs")
    flag("--model", nargs="+", default=[], help="the students: model folders or hub ids")
    flag("--base_model", default=TOY_STUDENT, help="the reference (default: the toy student)")
    flag("--prompts", help="held-out rows with a prompt")
    flag("--data", help="held-out rows with chosen, rejected and, maybe, scores")
    flag("--max_length", type=at_least(1), default=1024, help="of --data: prompt + one answer")
    flag("--out_dir", default="eval", help="where all files go (default: eval)")
    # the answers
    flag("--max_new_tokens", type=at_least(1), default=256, help="limit of an answer")
    flag("--temperature", type=at_least(0, float), default=0.0, help="0: greedy; 1: also gives KL")
    flag("--seed", type=at_least(0), default=0)
    flag("--batch_size", type=at_least(1), default=64, help="answers at a time: memory and speed")
    flag("--self_refine", action="store_true", help="also the base's own rewrites of its answers")
    # the judge
    flag("--task", help="the behaviour, a file such as tasks/sycophancy.toml")
    flag("--base_url", help="the judge's server, http://127.0.0.1:8000/v1 (default: no judge)")
    flag("--judge_model", help="the judge's name on that server")
    flag("--endpoint", choices=ENDPOINTS, help="the judge is a reward model, as in reward.py")
    flag("--pairwise", action="store_true", help="win rates from comparisons, in both orders")
    add_client_flags(parser, max_tokens=512)
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    args.model = [folder.rstrip("/") for folder in args.model]
    names = ["base", *args.model]
    refuse(
        "",
        (not args.curves and not (args.model and (args.prompts or args.data)),
         "give --model with --prompts or --data, or --curves"),
        (args.base_url and not (args.prompts and args.judge_model),
         "--base_url needs --prompts and --judge_model"),
        (args.base_url and not (args.task or args.endpoint),
         "--base_url needs --task, whose [judge] it asks, or --endpoint"),
        (args.pairwise and (not args.base_url or args.endpoint),
         "--pairwise needs --base_url with an LLM as the judge, not --endpoint"),
        ((args.self_refine or args.pairwise) and not (args.task and args.prompts),
         "--self_refine and --pairwise need --task and --prompts"),
        (len(set(names)) < len(names),
         "--model names a folder twice, or one called base; give each once, under another name"),
        (os.path.exists(args.out_dir) and not os.path.isdir(args.out_dir),
         f"--out_dir {args.out_dir}: is a file; give a folder"))
    return args


def load_inputs(args):
    """(task, rows, pairs, their counts, vocabulary), all checked before anything is computed."""
    task = load_task(args.task) if args.task else None
    refuse(args.task, (args.pairwise and not task.judge.pairwise,
                       "no `judge.pairwise`, which --pairwise needs; see tasks/sycophancy.toml"))
    if args.base_url:
        Client(args)  # raises for a wrong address or a missing key
    for folder in (args.base_model, *args.model):
        check_model_name(folder)
    rows, pairs, counts = [], [], None
    if args.prompts:
        rows = [row for _, row in checked_rows(args.prompts, None, check_prompt, ())]
    tokenizer = load_tokenizer(args.base_model)
    if args.data:
        pairs, counts = load_pairs(args.data, tokenizer, args.max_length, needs_scores=False)
    for folder in args.model:
        warn_of_overlap(folder, args.prompts, [row["prompt"] for row in rows])
        warn_of_overlap(folder, args.data, [pair.prompt for pair in pairs])
    return task, rows, pairs, counts, tokenizer.get_vocab()


def load_system(folder, vocabulary, pairs, args):
    """(model, tokenizer) of a folder. BadInput if it cannot be compared with the base."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, "auto" if device == "cuda" else torch.float32).to(device)
    tokenizer, limit = load_tokenizer(folder), position_limit(model)
    longest = max(map(longest_row, pairs), default=0)
    refuse(
        "",
        (tokenizer.get_vocab() != vocabulary,
         f"--model {folder}: its vocabulary is not that of --base_model {args.base_model}; give "
         "the model that it was trained from"),
        (longest > limit,
         f"--max_length {args.max_length}: {args.data} has a row of {longest} tokens, but "
         f"{folder} takes {limit}"))
    return model, tokenizer


def main(argv=None):
    args = get_args(argv)
    if args.curves:
        os.makedirs(args.out_dir, exist_ok=True)
        path = os.path.join(args.out_dir, "curves.png")
        draw_curves(args.curves, path)
        return print(path)
    task, rows, pairs, counts, vocabulary = load_inputs(args)
    os.makedirs(args.out_dir, exist_ok=True)

    # One model in memory at a time. The base is last: KL needs its view of the students' answers.
    path = os.path.join(args.out_dir, "answers.jsonl")
    answers, policy_logps, pairs_logps = {}, {}, {}
    for name, folder in [*zip(args.model, args.model), ("base", args.base_model)]:
        model = None  # frees the one before
        model, tokenizer = load_system(folder, vocabulary, pairs, args)
        pairs_logps[name] = pair_logps(model, pairs)
        if rows:
            answers[name] = answer_rows(path, name, model, tokenizer, rows, None, args)
        if rows and args.temperature == 1 and name != "base":
            policy_logps[name] = row_logps(model, answers[name])
    if args.self_refine:
        answers[REFINED] = answer_rows(path, REFINED, model, tokenizer, rows, task, args)
    kl = {name: (logps - row_logps(model, answers[name])).double().numpy()
          for name, logps in policy_logps.items()}

    # The judge: a score per answer and, with --pairwise, whether it wins over the base's.
    scores, wins, failed = {}, {}, 0
    if args.base_url:
        scores, failed = judge_rows(args, task, itertools.chain(*answers.values()),
                                    "eval.jsonl", "score", score_of)
    if args.pairwise:
        keys = ("id", "row", "system", "prompt", "question", "answer")
        both = [{key: row[key] for key in keys if key in row} | {"base": base["answer"]}
                for name, own in answers.items() if name != "base"
                for row, base in zip(own, answers["base"])]
        wins, failed_pairs = judge_rows(args, task, both, "pairwise.jsonl", "win", win_over_base)
        failed += failed_pairs

    # The table and the report.
    systems = ["base", REFINED, *args.model]
    answers = {name: answers[name] for name in systems if name in answers}
    unknown = np.full(len(rows), np.nan)
    columns = {name: columns_of(own, scores, wins, kl.get(name, unknown))
               for name, own in answers.items()}
    blocks = {f"{behaviour}, {len(indices)} prompts": {
                  system: answer_cells(args, columns, system, indices) for system in columns}
              for behaviour, indices in behaviours(rows, task).items()}
    notes = notes_on(args, answers, columns)
    if pairs:
        notes += counts.lines()
        blocks[f"validation pairs of {args.data}"] = {
            name: pair_cells(pairs, pairs_logps[name], pairs_logps["base"])
            for name in ("base", *args.model)}
    text = table(blocks) + "\n\n" + "\n".join(notes)
    print("\n" + text)
    report = f"# Evaluation\n\n{indented(text)}\n"
    if rows:
        shown = examples(np.stack([own["score"] for own in columns.values()]), 4, args.seed)
        sides = side_by_side(
            [rows[i]["prompt"] for i in shown],
            {name: [own[i]["answer"] for i in shown] for name, own in answers.items()})
        if not args.base_url:
            print("\n" + sides)
        report += f"\n## Answers side by side\n\n{indented(sides)}"
    atomic_write(os.path.join(args.out_dir, "report.md"), report)
    if scores and all(np.isnan(own["score"]).all() for own in columns.values()):
        print(f"error: no reply of {args.judge_model} had a verdict; {args.out_dir}/eval.jsonl has "
              "the replies: do --task and --prompts match, is --max_tokens large enough?",
              file=sys.stderr)
        failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
