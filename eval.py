"""After training: what the base and the students answer to held-out prompts, judged, compared and reported; and the curves of runs.

    python eval.py --task tasks/sycophancy.toml --prompts held_out.jsonl --model out [out2 ...] --base_model DIR --base_url URL --judge_model NAME
    python eval.py --task toy/task.toml --prompts toy/held_out.jsonl --model out --base_url http://127.0.0.1:8090/v1 --judge_model toy
    python eval.py --prompts toy/held_out.jsonl --model out       no judge: answers side by side, their lengths and faults
    ... --temperature 1                                           sampled answers, and from them the KL divergence from the base
    ... --pairwise                                                the judge also compares with the base's answer, in both orders
    ... --self_refine                                             adds the SR baseline: the base criticises and rewrites its own answer
    python eval.py --data held_out_scored.jsonl --model out       scored rows kept from training: accuracy, margins, log-probabilities
    python eval.py --curves out [out2 ...]                        eval/curves.png of one training run or of several

--out_dir gets answers.jsonl (every answer), eval.jsonl (with its score and the judge's raw reply), pairwise.jsonl and report.md, beside what
the judge is asked, asked-eval.jsonl and asked-pairwise.jsonl; with --curves it gets curves.png only.
The same command goes on where a stopped one ended. What could not be judged is null, counted, and in no mean.
"""
import argparse
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter

import numpy as np
import torch
from jinja2 import TemplateError
from tqdm import tqdm

from behaviour import load_task
from curves import draw_curves
from data import (TOY_STUDENT, BadInput, Pair, as_messages, canonical, check_model_name, collate, load_pairs, load_tokenizer, longest_row,
                  printable, read_text, run, split_by_tokens, stream_rows, write_whole)
from generate import Answer, generate, load_model, position_limit, side_by_side
from rdpo import reference_fingerprint, sequence_logps
from reward import ENDPOINTS, add_judge_flags, ask_which, better, judge_name, question_of, score_answer
from teacher import Client, add_client_flags, at_least, check_prompt, checked_rows, digest, read_finished, run_rows


TOKENS_PER_BATCH = 4096  # in one forward pass, padding counted: memory only


@torch.no_grad()
def pair_logps(model, pairs):
    """log pi(chosen) and log pi(rejected) of data.Pairs under a model, (P, 2), in nats, summed over each answer's tokens."""
    logps = torch.empty(len(pairs), 2)  # (P, 2)
    for batch in split_by_tokens(pairs, range(len(pairs)), TOKENS_PER_BATCH):
        logps[batch] = sequence_logps(model, collate([pairs[i] for i in batch]).to(model.device)).view(2, -1).T.cpu()
    return logps


def answer_logps(model, answers):
    """log pi(answer) of Answers under a model, (N,), in nats, summed over each answer's tokens, its end-of-turn token included.

    Of answers that a policy wrote at temperature 1, the mean of answer_logps(policy) - answer_logps(reference) estimates
    KL(policy || reference) an answer, in nats.
    """
    # A Pair has two answers: the second is one token long here, and not read.
    return pair_logps(model, [Pair("", "", one.prompt_ids, one.ids, one.ids[:1], None, None) for one in answers])[:, 0]


def read_answers(rows):
    """The Answers in rows of answers.jsonl."""
    return [Answer(row["answer"], row["finish"], row["prompt_ids"], row["ids"]) for row in rows]


# ------------------------------------------------------------------------------------------------ what each system answers

REFINED = "base + self-refine"
ANSWERED = ("turns", "answer", "finish", "prompt_ids", "ids")


def converse(model, tokenizer, rows, task, args):
    """A list of Answers for each turn: one turn; or with a task three, as of a teacher: the answer, its critique, the rewrite."""
    prompts, turns = [row["prompt"] for row in rows], []
    for turn, request in enumerate((None, task.critique, task.revision) if task else (None,)):
        if request:
            prompts = [as_messages(prompt) + [{"role": "assistant", "content": answer.text}, {"role": "user", "content": request}]
                       for prompt, answer in zip(prompts, turns[-1])]
        # The same random numbers for all systems: where two of them think alike, they also say the same.
        seeds = [zlib.crc32(f"{args.seed} {turn} {row['row']}".encode()) for row in rows]
        turns.append(generate(model, tokenizer, prompts, args.max_new_tokens, args.temperature, seeds, args.batch_size))
    return turns


def answer_rows(path, system, model, tokenizer, rows, task, args):
    """Appends a system's answers to the rows to `path`, those left out that stand there; returns all of them, in the order of rows.

    With a task the model refines its own answer, and the rewrite is what counts. BadInput where other settings made what stands there.
    """
    if not tokenizer.chat_template and (task or any(isinstance(row["prompt"], list) for row in rows)):
        raise BadInput(f"{system}: its tokenizer has no chat template, which --self_refine and prompts that are lists of messages need; "
                       "give an instruct model, or plain-text prompts")
    made_with = {"weights": reference_fingerprint(model, str(model.dtype)), "temperature": args.temperature, "seed": args.seed,
                 "max_new_tokens": args.max_new_tokens} | ({"asked": [task.critique, task.revision]} if task else {})
    rows = [{"id": f"{system}/{row['id']}", "row": row["id"], "system": system, "made_with": made_with}
            | {name: row[name] for name in ("behaviour", "prompt", "question") if name in row} for row in rows]
    finished = read_finished(path, ANSWERED, {})
    for row in rows:
        if finished.get(row["id"], digest(row, ANSWERED)) != digest(row, ANSWERED):
            raise BadInput(f"{path}: holds {json.dumps(row['id'])[:60]} by other weights, settings or prompt; give another --out_dir")
    missing = sorted((row for row in rows if row["id"] not in finished), key=lambda row: len(str(row["prompt"])))
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(missing), desc=system, unit="answer", disable=None, leave=False) as progress:
        for start in range(0, len(missing), args.batch_size):
            some = missing[start:start + args.batch_size]
            try:
                turns = converse(model, tokenizer, some, task, args)
            except TemplateError as error:
                raise BadInput(f"{system}: its chat template refuses a prompt from {json.dumps(some[0]['row'])[:40]} on: {error}") from error
            for row, *replies in zip(some, *turns):
                last = replies[-1]
                file.write(json.dumps(row | {"turns": [reply.text for reply in replies[:-1]], "answer": last.text, "finish": last.finish,
                                             "prompt_ids": last.prompt_ids, "ids": last.ids}) + "\n")
            file.flush()
            progress.update(len(some))
    answers = {row["id"]: row for _, row in stream_rows(path)}
    return [answers[row["id"]] for row in rows]


def fault(row):
    """What is wrong with an answer by its form alone: "empty", "cut" at --max_new_tokens, "repetitive", or "" where nothing is.

    Repetitive: some four words in a row (words are what spaces part) stand there three times or more.
    """
    words = row["answer"].split()
    fours = Counter(zip(words, words[1:], words[2:], words[3:]))
    return "empty" if not words else "cut" if row["finish"] == "length" else "repetitive" if max(fours.values(), default=0) >= 3 else ""


def warn_of_overlap(folder, path, prompts):
    """Says on stderr how many prompts of a file the student in a folder of train.py has seen, if what it learned from is still there."""
    own = os.path.join(folder, "args.json")
    source = json.loads(read_text(own, "the args.json of train.py")).get("data", "") if os.path.exists(own) else ""
    if not os.path.exists(source):
        return

    def name(prompt):
        return json.dumps(as_messages(prompt))

    seen = {name(canonical(row).get("prompt")) for _, row in stream_rows(source, on_bad=lambda error: None)}
    count = sum(name(prompt) in seen for prompt in prompts)
    if count:
        print(f"warning: {count} of {len(prompts)} prompts of {path} are in {source}, which {folder} was trained on "
              "(or, of the few that train.py held out, chosen by): they say little about new prompts", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- judging


def judge_rows(args, task, rows, name, key, ask):
    """({id: row} with what the judge made of each row, how many rows failed), by reward.py's own way, into out_dir/name.

    ask(client, task, args, row) gives the number to keep under `key`, or None, and what was said.
    """
    path, source = os.path.join(args.out_dir, name), os.path.join(args.out_dir, f"asked-{name}")
    write_whole(source, "".join(json.dumps(row) + "\n" for row in rows))
    args = argparse.Namespace(**vars(args) | {"model": args.judge_model, "out": path, "limit": None, "show": False})
    client = Client(args)

    def work(row):
        number, said = ask(client, task, args, row)
        return row | {key: number, "judge": {"said": said}}

    failed = run_rows(client, args, source, (key, "judge"), judge_name(task, args), check_prompt, work, None)
    return {row["id"]: row for _, row in stream_rows(path)} if os.path.getsize(path) else {}, failed


def win_over_base(client, task, args, row):
    """(win or None, what was said): 1 where the judge likes the answer better than the base's, 0 where less, averaged over both orders.

    A judge that only goes by the order contradicts itself: 1/2.
    """
    first, said_first = ask_which(client, task.judge, args, question_of(row), row["answer"], row["base"])
    second, said_second = ask_which(client, task.judge, args, question_of(row), row["base"], row["answer"])
    return None if None in (first, second) else (first + 1 - second) / 2, [said_first, said_second]


# ----------------------------------------------------------------------------------------------- numbers with intervals


def bootstrap(statistic, *columns, resamples=2000, seed=0):
    """(value, low, high): a statistic of columns (N,) and its 95 % percentile interval over resampled rows.

    statistic takes arrays (..., N), one per column, and reduces their last axis, as `mean` does. N is at least 1.
    """
    columns = [np.asarray(column, dtype=float) for column in columns]
    indices = np.random.default_rng(seed).integers(len(columns[0]), size=(resamples, len(columns[0])))  # (resamples, N)
    low, high = np.percentile(statistic(*(column[indices] for column in columns)), (2.5, 97.5))
    return float(statistic(*columns)), float(low), float(high)


def mean(values):
    return values.mean(-1)


def equal_length(gaps, length_gaps):
    """What is left of the score gaps (..., N) between two systems where their answers are equally long.

    The intercept of a straight line through the gaps over the gaps in length; where lengths do not differ, the mean.
    """
    x = length_gaps - length_gaps.mean(-1, keepdims=True)
    slope = (x * gaps).sum(-1) / np.maximum((x * x).sum(-1), 1e-9)
    return gaps.mean(-1) - slope * length_gaps.mean(-1)


# ------------------------------------------------------------------------------------------------- tables and report

HEAD = ("system", "judged", "score", "rate %", "win %", "at equal length", "tokens", "degenerate %", "KL, nats")
PAIR_HEAD = ("model", "pairs", "chosen first %", "agrees with scores %", "log-ratio margin", "logp chosen", "logp rejected")


def numbers(judged, answers, key):
    """A column (N,) of what the judge made of the answers, nan where there is none."""
    return np.array([judged.get(row["id"], {}).get(key) for row in answers], dtype=float)


def behaviours(rows, task):
    """{behaviour: places of its rows}, and all of them where there are several."""
    groups = {}
    for place, row in enumerate(rows):
        name = str(row.get("behaviour", task.name if task else "answers"))
        groups.setdefault(printable(" ".join(name.split())), []).append(place)
    return groups | ({"all": list(range(len(rows)))} if len(groups) > 1 else {})


def cell(form, statistic, *columns):
    """A statistic and its interval as text, of the rows on which all columns (N,) are known (not nan); "-" where there is none."""
    known = ~np.isnan(sum(columns))  # (N,)
    if not known.any():
        return "-"
    value, *interval = (format(number, form) for number in bootstrap(statistic, *(column[known] for column in columns)))
    return f"{value} [{', '.join(interval)}]"


def passing_score(judge):
    """The score that counts as good for the rate: four fifths of the way from the worst score of the judge's scale to its best."""
    nearest_to_0 = min(max(judge.lowest, 0), judge.highest)
    scores = [better(verdict, judge.good) for verdict in (judge.lowest, nearest_to_0, judge.highest)]
    return min(scores) + 0.8 * (max(scores) - min(scores))


def table_row(name, own, base, bar):
    """The cells of a system from its columns and the base's, dicts of (N,) arrays: score, win, tokens, fault, kl."""
    score, gaps, longer = own["score"], own["score"] - base["score"], own["tokens"] - base["tokens"]
    wins = own["win"] if "win" in own else (1 + np.sign(gaps)) / 2
    lengths_differ = len(set(longer[~np.isnan(gaps)])) > 1
    return (name, f"{np.isfinite(score).sum()}/{len(score)}", cell(".2f", mean, score),
            "-" if bar is None else cell(".0f", mean, np.where(np.isnan(score), np.nan, 100.0 * (score >= bar))),
            "-" if own is base else cell(".0f", mean, 100 * wins),
            "-" if own is base or not lengths_differ else cell("+.2f", equal_length, gaps, longer),
            f"{own['tokens'].mean():.1f}", f"{100 * own['fault'].mean():.1f}", cell(".2f", mean, own["kl"]))


def pair_row(name, logps, reference, pairs):
    """The cells of a model on scored pairs, from its log-probabilities and the base's, (P, 2) each: chosen, rejected."""
    columns = [cell(".2f", mean, side) for side in logps.T.double().numpy()]
    if logps is reference:
        return (name, str(len(pairs)), "-", "-", "-", *columns)
    margins = (logps - reference).double().numpy() @ [1, -1]  # (P,) the margin of the loss before beta
    side = np.where(abs(margins) < 1e-3, 0, np.sign(margins))  # 0: no preference yet, counted as half right
    gaps = np.array([pair.gap for pair in pairs])
    agrees = 50 * (1 + side * np.where(gaps == 0, np.nan, np.sign(gaps)))  # nan: no score, or a tie
    return (name, str(len(pairs)), cell(".1f", mean, 50 * (1 + side)), cell(".1f", mean, agrees), cell("+.2f", mean, margins), *columns)


def notes_on(args, bar, answers, columns):
    """What a reader of the tables has to know, one sentence per line."""
    lines = ["[low, high]: 95 % bootstrap interval over prompts or pairs; tokens: mean length of an answer"]
    if args.data:
        lines.append("log-ratio margin: the loss's margin before beta, nats; logp: log-probability of an answer, nats")
    if args.base_url:
        lines.append("score: higher is better" + ("" if bar is None else f"; rate: share of answers with a score of {bar:g} or more") + "; win: "
                     + ("the judge prefers the answer to the base's, mean of both orders" if args.pairwise
                        else "share of prompts that score above the base, ties half"))
        lines.append("at equal length: score minus the base's score, where both answers are equally long (linear regression)")
        lines += [f"could not judge {np.isnan(own['score']).sum()} of {len(own['score'])} answers of {name}"
                  for name, own in columns.items() if np.isnan(own["score"]).any()]
        lines += [f"could not compare {np.isnan(own['win']).sum()} of {len(own['win'])} answers of {name}"
                  for name, own in columns.items() if args.pairwise and name != "base" and np.isnan(own["win"]).any()]
    for name, own in answers.items():
        counts = Counter(filter(None, map(fault, own)))
        lines.append(f"degenerate answers of {name}: " + (", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none")
                     + (f" (cut at --max_new_tokens {args.max_new_tokens})" if counts["cut"] else ""))
    return lines + ([] if args.temperature == 1 or not answers else ["KL: only from answers that are sampled at --temperature 1"])


def plain_tables(tables):
    """Text for a terminal of tables (title, head, rows); a column is equally wide in all tables with the same head."""
    blocks = []
    for title, head, rows in tables:
        like = [row for _, other, more in tables if other is head for row in (head, *more)]
        widths = [max(map(len, column)) for column in zip(*like)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows)]
        blocks.append("\n".join([title, *lines]))
    return "\n\n".join(blocks)


def markdown(text):
    """Text as Markdown that shows just that text, in one line."""
    return re.sub(r"([\\`*_\[\]<>#|&!~])", r"\\\1", printable(" ".join(text.split())))


def markdown_table(title, head, rows):
    lines = [f"## {markdown(title)}", ""]
    for number, row in enumerate((head, *rows)):
        lines.append("| " + " | ".join(map(markdown, row)) + " |")
        if number == 0:
            lines.append("|---|" + "---:|" * (len(head) - 1))
    return lines + [""]


def examples(columns, count, seed):
    """Places of rows worth reading: up to `count` on which the systems' scores differ most, then as many drawn at random."""
    scores = np.stack([own["score"] for own in columns.values()])  # (S, N) of S systems
    spread = np.where(np.isnan(scores).any(0), 0, scores.max(0) - scores.min(0))  # (N,)
    differ = [int(i) for i in np.argsort(-spread, kind="stable")[:count] if spread[i] > 0]
    others = [int(i) for i in np.random.default_rng(seed).permutation(len(spread)) if i not in differ]
    return differ + others[:count]


# ------------------------------------------------------------------------------------------------------- the command


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Judges and compares the answers of a base model and of its students.", allow_abbrev=False)
    parser.add_argument("--curves", nargs="+", metavar="DIR", help="only draw the curves of these out_dirs of train.py, into --out_dir/curves.png")
    parser.add_argument("--model", nargs="+", default=[], help="the students: model folders or hub ids")
    parser.add_argument("--base_model", default=TOY_STUDENT, help="what they were before training, the reference (default: the toy student)")
    parser.add_argument("--prompts", help="held-out rows with a prompt")
    parser.add_argument("--data", help="held-out rows with chosen, rejected and, maybe, scores")
    parser.add_argument("--max_length", type=at_least(1), default=1024, help="tokens that a prompt and an answer of --data may have together")
    parser.add_argument("--out_dir", default="eval", help="all that is written goes there (default: eval)")
    # the answers
    parser.add_argument("--max_new_tokens", type=at_least(1), default=256, help="tokens that an answer may have")
    parser.add_argument("--temperature", type=at_least(0, float), default=0.0, help="of sampling; 0 is greedy, 1 also gives the KL divergence")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="answers written at a time: memory and speed only")
    parser.add_argument("--self_refine", action="store_true", help="also the base's own rewrites of its answers, by the task's critique and revision")
    # the judge
    parser.add_argument("--task", help="the behaviour, a file such as tasks/sycophancy.toml")
    parser.add_argument("--base_url", help="the judge's server, such as http://127.0.0.1:8000/v1 (default: no judge)")
    parser.add_argument("--judge_model", help="the judge's name on that server")
    parser.add_argument("--endpoint", choices=ENDPOINTS, help="a reward model judges, at this address of --base_url, as in reward.py")
    parser.add_argument("--pairwise", action="store_true", help="win rates from comparing answers with the base's, in both orders")
    add_client_flags(parser, max_tokens=512)
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    args.model = [folder.rstrip("/") for folder in args.model]
    names = ["base", *args.model]
    for wrong, remedy in (
            (not args.curves and not (args.model and (args.prompts or args.data)), "give --model with --prompts or --data, or --curves"),
            (args.base_url and not (args.prompts and args.judge_model), "--base_url needs --prompts and --judge_model"),
            (args.base_url and not (args.task or args.endpoint), "--base_url needs --task, whose [judge] it asks, or --endpoint"),
            (args.pairwise and (not args.base_url or args.endpoint), "--pairwise needs --base_url with an LLM as the judge, not --endpoint"),
            ((args.self_refine or args.pairwise) and not (args.task and args.prompts), "--self_refine and --pairwise need --task and --prompts"),
            (len(set(names)) < len(names), "--model names a folder twice, or one called base; give each folder once, under another name"),
            (os.path.exists(args.out_dir) and not os.path.isdir(args.out_dir), f"--out_dir {args.out_dir}: is a file; give a folder")):
        if wrong:
            raise BadInput(remedy)
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.curves:
        path = os.path.join(args.out_dir, "curves.png")
        os.makedirs(args.out_dir, exist_ok=True)
        draw_curves(args.curves, path)
        print(path)
        return

    # Everything is checked before anything is computed.
    task = load_task(args.task) if args.task else None
    if args.pairwise and not task.judge.pairwise:
        raise BadInput(f"{args.task}: no `judge.pairwise`, which --pairwise needs; add it as in tasks/sycophancy.toml")
    if args.base_url:
        Client(args)  # a wrong address or a missing key shows now, not after the answers
    for folder in (args.base_model, *args.model):
        check_model_name(folder)
    rows = [row for _, row in checked_rows(args.prompts, None, check_prompt, ())] if args.prompts else []
    tokenizer = load_tokenizer(args.base_model)
    vocabulary = tokenizer.get_vocab()
    pairs, report = load_pairs(args.data, tokenizer, args.max_length, needs_scores=False) if args.data else ([], None)
    for folder in args.model:
        warn_of_overlap(folder, args.prompts, [row["prompt"] for row in rows])
        warn_of_overlap(folder, args.data, [pair.prompt for pair in pairs])
    os.makedirs(args.out_dir, exist_ok=True)

    # The models, one after another, the base last: it also gives the reference log-probabilities of what the others wrote.
    path, device = os.path.join(args.out_dir, "answers.jsonl"), "cuda" if torch.cuda.is_available() else "cpu"
    answers, answers_logps, kl, pairs_logps = {}, {}, {}, {}
    for name, folder in [*zip(args.model, args.model), ("base", args.base_model)]:
        model, tokenizer = load_model(folder, torch.float32 if device == "cpu" else "auto").to(device), load_tokenizer(folder)
        if tokenizer.get_vocab() != vocabulary:
            raise BadInput(f"--model {folder}: its vocabulary is not that of --base_model {args.base_model}; give the model that it was trained from")
        longest = max(map(longest_row, pairs), default=0)
        if longest > position_limit(model):
            raise BadInput(f"--max_length {args.max_length}: {args.data} has a row of {longest} tokens, but {folder} takes {position_limit(model)}")
        pairs_logps[name] = pair_logps(model, pairs)
        if rows:
            answers[name] = answer_rows(path, name, model, tokenizer, rows, None, args)
        if args.self_refine and name == "base":
            answers[REFINED] = answer_rows(path, REFINED, model, tokenizer, rows, task, args)
        if rows and args.temperature == 1:
            if name == "base":
                kl = {student: (logps - answer_logps(model, read_answers(answers[student]))).double().numpy()
                      for student, logps in answers_logps.items()}
            else:
                answers_logps[name] = answer_logps(model, read_answers(answers[name]))
        del model

    # The judge, by the way of stage 2.
    judged, compared, failed = {}, {}, 0
    if args.base_url:
        judged, failed = judge_rows(args, task, itertools.chain(*answers.values()), "eval.jsonl", "score",
                                    lambda client, task, args, row: score_answer(client, task, args, row, row["answer"]))
    if args.pairwise:
        both = [{name: row[name] for name in ("id", "row", "system", "prompt", "question", "answer") if name in row} | {"base": base["answer"]}
                for name, own in answers.items() if name != "base" for row, base in zip(own, answers["base"])]
        compared, more = judge_rows(args, task, both, "pairwise.jsonl", "win", win_over_base)
        failed += more

    # Columns of numbers, one table per behaviour, a report.
    answers = {name: answers[name] for name in ("base", REFINED, *args.model) if name in answers}
    columns = {name: {"score": numbers(judged, answers[name], "score"), "kl": kl.get(name, np.full(len(rows), np.nan)),
                      "tokens": np.array([float(len(row["ids"])) for row in answers[name]]),
                      "fault": np.array([bool(fault(row)) for row in answers[name]])}
               | ({"win": numbers(compared, answers[name], "win")} if args.pairwise else {}) for name in answers}
    bar = passing_score(task.judge) if args.base_url and not args.endpoint else None
    tables = []
    for behaviour, places in behaviours(rows, task).items():
        part = {name: {key: column[places] for key, column in own.items()} for name, own in columns.items()}
        tables.append((f"{behaviour}, {len(places)} prompts", HEAD, [table_row(name, own, part["base"], bar) for name, own in part.items()]))
    if pairs:
        tables.append((f"held-out pairs of {args.data}", PAIR_HEAD, [pair_row(name, pairs_logps[name], pairs_logps["base"], pairs)
                                                                       for name in ("base", *args.model)]))
    notes = notes_on(args, bar, answers, columns) + (report.lines() if pairs else [])
    shown = examples(columns, 4, args.seed) if rows else []
    sides = side_by_side([rows[i]["prompt"] for i in shown], {name: [own[i]["answer"] for i in shown] for name, own in answers.items()})
    print("\n" + plain_tables(tables) + "\n\n" + "\n".join(notes))
    if rows and not args.base_url:
        print("\n" + sides)
    blocks = [*(markdown_table(*table) for table in tables), [f"- {markdown(note)}" for note in notes] + [""],
              ["## Answers side by side", "", *(("    " + line).rstrip() for line in sides.splitlines())] if rows else []]
    write_whole(os.path.join(args.out_dir, "report.md"), "# Evaluation\n\n" + "\n".join(line for block in blocks for line in block) + "\n")
    if judged and all(np.isnan(own["score"]).all() for own in columns.values()):
        print(f"error: no reply of {args.judge_model} had a verdict; {args.out_dir}/eval.jsonl has what it said: do --task and --prompts match, "
              "is --max_tokens large enough?", file=sys.stderr)
        sys.exit(1)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
