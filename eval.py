"""Evaluation: the answers of a base model and its students to new prompts, judged and compared.

    python eval.py --task tasks/safety.toml --prompts held_out.jsonl --model out [out2 ...] \\
        --base_model DIR --base_url URL --judge_model NAME
    python eval.py --prompts toy/held_out.jsonl --model out    no judge: lengths, faults, answers
    ... --temperature 1    sampled answers, and from them the KL divergence from the base
    ... --pairwise         the judge also compares with the base's answer, in both orders
    ... --self_refine      adds a baseline: the base criticises and rewrites its own answer
    ... --bare_question    adds a goal: the base answers the question without its persona
    python eval.py --data scored.jsonl --model out    margins and accuracy on scored pairs
    python eval.py --text FILE --model out            what training did to ordinary text
    python eval.py --curves out [out2 ...]            draws training runs into eval/curves.png

--out_dir gets answers.jsonl, eval.jsonl (scores and the judge's raw replies), pairwise.jsonl and
report.md; asked-eval.jsonl and asked-pairwise.jsonl are the judge's input. With --self_refine
refined.jsonl has rows that reward.py can score, for another round. The same command continues a
stopped run. An answer that could not be judged has score null, and is in no mean.
"""
import json
import os
import re
import sys
import zlib
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import TemplateError

from data import Pair, collate, encode_prompt, load_pairs, longest_row, micro_batches, token_ids
from infra.client import Client, add_client_flags
from infra.command import BadInput, Parser, at_least, one_line, refuse, run
from infra.disk import make_folder
from infra.distributed import best_device
from infra.generate import Answer, generate
from infra.intervals import cell, equal_length, mean, ratio
from infra.models import TOY_STUDENT, load_model, load_tokenizer, position_limit
from infra.plots import draw_curves
from infra.report import indented, side_by_side, table, warn_of_overlap
from infra.resumable import Stage, checked_rows, run_batches, run_rows
from infra.rows import (as_messages, atomic_write, check_prompt, question_of, read_text,
                        stream_rows)
from infra.task import load_task
from rdpo import logit_scaling, logits_in_chunks, reference_fingerprint, sequence_logps
from reward import (ENDPOINTS, add_judge_flags, check_pairwise, compare, provenance,
                    score_answer)

# ---------------------------------------------------------------------------------------- answers

BARE, REFINED = "base, bare question", "base + self-refine"


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
    refuse(tokenizer.name_or_path, (
        isinstance(prompt, list) and not tokenizer.chat_template,
        "its tokenizer has no chat template, which --self_refine and prompts that are lists of "
        "messages need; give an instruct model, or plain-text prompts"))
    try:
        return encode_prompt(tokenizer, prompt)
    except TemplateError as error:
        raise BadInput(f"{tokenizer.name_or_path}: its chat template refuses the prompt of row "
                       f"{row['row']!r:.40}: {error}") from error


def answer_rows(path, system, model, tokenizer, rows, task, args):
    """Append a system's missing answers to `path`; return all its rows, in the order of `rows`.

    With a task the rewrite is the answer. BadInput if `path` holds answers by other settings.
    """
    settings = {"weights": reference_fingerprint(model, str(model.dtype)),
                "temperature": args.temperature, "seed": args.seed,
                "max_new_tokens": args.max_new_tokens}
    settings |= {"asked": [task.critique, task.revision]} if task else {}
    keys = ("behaviour", "prompt", "question")
    rows = [{"id": f"{system}/{row['id']}", "row": row["id"], "system": system,
             "made_with": settings} | {key: row[key] for key in keys if key in row}
            for row in rows]

    def answer(batch):
        for row, *turns in zip(batch, *generate_turns(model, tokenizer, batch, task, args)):
            last = turns[-1]
            yield row | {"turns": [turn.text for turn in turns[:-1]], "answer": last.text,
                         "finishes": [turn.finish for turn in turns], "finish": last.finish,
                         "prompt_ids": last.prompt_ids, "ids": last.ids}

    by_length = sorted(rows, key=lambda row: len(str(row["prompt"])))
    adds = ("turns", "answer", "finishes", "finish", "prompt_ids", "ids")
    answers = run_batches(path, by_length, adds, answer, args.batch_size, system)
    return [answers[row["id"]] for row in rows]


def refined_rows(rows, model):
    """Rows of stage 1 for reward.py, from those that a model refined by itself."""
    keys = ("behaviour", "prompt", "question")
    return [{"id": row["row"]} | {key: row[key] for key in keys if key in row}
            | {"rejected": row["turns"][0], "critique": row["turns"][1], "chosen": row["answer"],
               "teacher": {"model": model, "finish": row["finishes"]}} for row in rows]


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
    for indices in micro_batches(pairs, range(len(pairs)), TOKENS_PER_BATCH, False):
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


# ---------------------------------------------------------------------------------- ordinary text


def load_paragraphs(path, tokenizer, max_length):
    """A text file's paragraphs, between empty lines: each a list of chunks, lists of token ids.

    A chunk has at most max_length tokens, bos first if this tokenizer begins texts with it. The
    tokens behind a chunk's first are predicted; a chunk without any is left out.
    """
    bos = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
    size, paragraphs = max_length - len(bos), []
    for text in re.split(r"\n\s*\n", read_text(path, "a file of plain text")):
        ids = token_ids(tokenizer, text.strip())
        chunks = [bos + ids[start:start + size] for start in range(0, len(ids), size)]
        paragraphs.append([chunk for chunk in chunks if len(chunk) > 1])
    paragraphs = [chunks for chunks in paragraphs if chunks]
    refuse(path, (not paragraphs, "no text of two tokens or more; give a file of plain text"))
    return paragraphs


@torch.no_grad()
def text_states(model, paragraphs):
    """(hidden states (N, D) before each predicted token, *head): what its logits are made of.

    They wait on the CPU for the other model: much smaller than N x V logits, and as exact.
    """
    hidden = [model.base_model(input_ids=torch.tensor([ids], device=model.device),
                               use_cache=False).last_hidden_state[0, :-1].cpu()  # (T - 1, D)
              for chunks in paragraphs for ids in chunks]
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.cpu()
    return torch.cat(hidden), head.weight.cpu(), bias, *logit_scaling(model)


@torch.no_grad()
def text_nats(states, paragraphs, device):
    """{model: (3, P)}: per paragraph, the sums of -log pi(token) and of KL(base || model) in nats,
    and the number of tokens. The KL at a position is exact: a sum over the vocabulary.
    """
    targets = torch.tensor([token for chunks in paragraphs for ids in chunks for token in ids[1:]],
                           device=device)  # (N,)

    def logps(hidden, weight, bias, scale, cap):
        # In bfloat16 the rounding of a logit would pass for a divergence.
        hidden, weight = hidden.to(device, torch.float32), weight.to(device, torch.float32)
        for chunk, logits in logits_in_chunks(hidden, weight, bias, scale, cap):
            yield chunk, logits.log_softmax(1)  # (n, V)

    sizes, sums = [sum(len(ids) - 1 for ids in chunks) for chunks in paragraphs], {}
    for name in states:
        refuse(f"--model {name}", (
            len(states[name][1]) != len(states["base"][1]),
            "its output head has another size than that of --base_model; leave out --text"))
        nats = torch.ones(3, len(targets), device=device)  # (3, N)
        for (chunk, base), (_, own) in zip(logps(*states["base"]), logps(*states[name])):
            nats[0, chunk] = F.nll_loss(own, targets[chunk], reduction="none")
            nats[1, chunk] = F.kl_div(own, base, reduction="none", log_target=True).sum(1)
        sums[name] = torch.stack([part.sum(1) for part in nats.split(sizes, 1)], 1).cpu()
    return sums


# -------------------------------------------------------------------------------------- the judge


def judge_rows(args, task, rows, name, key):
    """Add the score or win, as `key` says, to rows, as reward.py does, and write out_dir/`name`.

    Returns ({id: number or None}, number of failed rows).
    """
    args.out, source = os.path.join(args.out_dir, name), os.path.join(args.out_dir, f"asked-{name}")
    atomic_write(source, "".join(json.dumps(row) + "\n" for row in rows))
    client = Client(args)

    def work(row):
        if key == "win":
            number, replies = compare(client, task.judge, args, question_of(row),
                                      row["answer"], row["base"])
        else:
            number, replies = score_answer(client, task, args, row, row["answer"])
        return row | {key: number, "judge": {"said": replies}}

    stage = Stage(adds=(key, "judge"), provenance_key="judge", provenance=provenance(task, args),
                  check=check_prompt, work=work)
    failed = run_rows(stage, source, args, client.counts)
    # The file is empty if no row was ever finished.
    judged = stream_rows(args.out) if os.path.getsize(args.out) else []
    return {row["id"]: row[key] for _, row in judged}, failed


# -------------------------------------------------------------------------------------- the table


def answer_cells(args, rows, base_rows, scores, wins, kl):
    """{measurement: cell} of one system's answers. A new measurement goes here.

    scores, wins and kl map the id of a row to a number; one that is missing or None is unknown.
    """
    def column(numbers, rows):  # (N,), nan is unknown
        return np.array([numbers.get(row["id"]) for row in rows], dtype=float)

    lengths = {row["id"]: len(row["ids"]) for row in rows + base_rows}
    score, tokens = column(scores, rows), column(lengths, rows)
    # The base has no gain over itself.
    gap = score - (np.nan if rows == base_rows else column(scores, base_rows))
    longer = tokens - column(lengths, base_rows)
    lengths_differ = len(set(longer[~np.isnan(gap)])) > 1
    win = column(wins, rows) if args.pairwise else (1 + np.sign(gap)) / 2  # a tie is half a win
    return {"judged": f"{np.isfinite(score).sum()}/{len(rows)}" if args.base_url else "-",
            "score (higher is better)": cell(".2f", mean, score),
            "win over base %": cell(".0f", mean, 100 * win),
            "score gain at equal length":
                cell("+.2f", equal_length, gap, longer) if lengths_differ else "-",
            "tokens": f"{tokens.mean():.1f}",
            "degenerate %": f"{100 * np.mean([fault(row) != '' for row in rows]):.1f}",
            "KL from base, nats": cell(".2f", mean, column(kl, rows))}


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
            "log-ratio margin, nats": cell("+.2f", mean, margins),
            "logp chosen, nats": cell(".2f", mean, chosen),
            "logp rejected, nats": cell(".2f", mean, rejected)}


def text_cells(nats, base_nats):
    """{measurement: cell} of a model on ordinary text, from its and the base's text_nats."""
    nll, kl, tokens = nats.double().numpy()  # (P,) each
    more = nll - base_nats[0].numpy()
    if nats is base_nats:
        more, kl = more * np.nan, kl * np.nan  # the base has no distance from itself
    return {"nll per token, nats": cell(".3f", ratio, nll, tokens),
            "nll above the base's": cell("+.3f", ratio, more, tokens),
            "KL from base, nats per token": cell(".4f", ratio, kl, tokens)}


def notes_on(args, answers, scores, wins):
    """The notes below the table, one sentence per line."""
    lines = ["[low, high]: 95 % bootstrap interval over prompts, pairs or paragraphs"]
    for name, rows in answers.items():
        for verb, asked, numbers in (("judge", args.base_url, scores),
                                     ("compare", args.pairwise and name != "base", wins)):
            unknown = sum(numbers.get(row["id"]) is None for row in rows)
            if asked and unknown:
                lines.append(f"could not {verb} {unknown} of {len(rows)} answers of {name}")
        kinds = Counter(filter(None, map(fault, rows)))
        if kinds:
            text = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            limit = " (cut by --max_new_tokens)" if kinds["cut"] else ""
            lines.append(f"degenerate answers of {name}: {text}{limit}")
    if answers and args.temperature != 1:
        lines.append("KL: only from answers that are sampled at --temperature 1")
    return lines


# ------------------------------------------------------------------------------------ the command


def get_args(argv):
    parser = Parser("Judge and compare the answers of a base model and of its students.")
    flag = parser.add_argument
    flag("--curves", nargs="+", metavar="DIR", help="only draw the curves of these training runs")
    flag("--model", dest="students", nargs="+", default=[], help="model folders or hub ids")
    flag("--base_model", default=TOY_STUDENT, help="the reference (default: the toy student)")
    flag("--prompts", help="held-out rows with a prompt")
    flag("--data", help="held-out rows with chosen, rejected and, maybe, scores")
    flag("--text", help="ordinary text, UTF-8, paragraphs between empty lines")
    flag("--max_length", type=at_least(2), default=1024,
         help="of --data: prompt + one answer; of --text: tokens read at a time")
    flag("--out_dir", default="eval", help="where all files go (default: eval)")
    # the answers
    flag("--max_new_tokens", type=at_least(1), default=256, help="limit of an answer")
    flag("--temperature", type=at_least(0, float), default=0.0, help="0: greedy; 1: also gives KL")
    flag("--seed", type=at_least(0), default=0)
    flag("--batch_size", type=at_least(1), default=64, help="answers at a time: memory and speed")
    flag("--self_refine", action="store_true", help="also the base's own rewrites of its answers")
    flag("--bare_question", action="store_true", help="also the base's answers to `question` alone")
    # the judge; args.model is its name, as in reward.py
    flag("--task", help="the behaviour, a file such as tasks/sycophancy.toml")
    flag("--base_url", help="the judge's server, http://127.0.0.1:8000/v1 (default: no judge)")
    flag("--judge_model", dest="model", help="the judge's name on that server")
    flag("--endpoint", choices=ENDPOINTS, help="the judge is a reward model, as in reward.py")
    add_client_flags(parser, max_tokens=512)
    add_judge_flags(parser)
    parser.set_defaults(limit=None, show=False)  # run_rows judges all rows, silently
    args = parser.parse_args(argv)
    args.students = [folder.rstrip("/") for folder in args.students]
    refuse(
        "",
        (not args.curves and not (args.students and (args.prompts or args.data or args.text)),
         "give --model with --prompts, --data or --text, or --curves"),
        (args.base_url and not (args.prompts and args.model and (args.task or args.endpoint)),
         "--base_url needs --task or --endpoint, with --prompts and --judge_model"),
        (args.pairwise and (not args.base_url or args.endpoint),
         "--pairwise needs --base_url with an LLM as the judge, not --endpoint"),
        (args.self_refine and not (args.task and args.prompts),
         "--self_refine needs --task and --prompts"),
        (args.bare_question and not args.prompts, "--bare_question needs --prompts"),
        (len({"base", *args.students}) <= len(args.students),
         "--model names a folder twice, or one called base; give each once, under another name"),
        (os.path.exists(args.out_dir) and not os.path.isdir(args.out_dir),
         f"--out_dir {args.out_dir}: is a file; give a folder"))
    return args


def load_inputs(args):
    """(task, rows, pairs, paragraphs, {folder: tokenizer}, notes), all checked at the start."""
    task = load_task(args.task) if args.task else None
    check_pairwise(args, task)
    if args.base_url:
        Client(args)  # raises for a wrong address or a missing key
    rows, pairs, paragraphs, notes = [], [], [], []
    if args.prompts:
        rows = [row for _, row in checked_rows(args.prompts, None, check_prompt, ())]
    same = all(row.get("question", row["prompt"]) == row["prompt"] for row in rows)
    refuse(args.prompts, (args.bare_question and same, "no row has a `question` other than its "
                          "prompt, which --bare_question needs"))
    tokenizers = {folder: load_tokenizer(folder) for folder in (args.base_model, *args.students)}
    base = tokenizers[args.base_model]
    for folder in args.students:
        refuse(f"--model {folder}", (
            tokenizers[folder].get_vocab() != base.get_vocab(),
            f"its vocabulary is not that of --base_model {args.base_model}; give the model that "
            "it was trained from"))
    # train.py --template_kwargs changes a student's template: ask the base in the same way.
    base.chat_template = tokenizers[args.students[0]].chat_template or base.chat_template
    if args.data:
        pairs, counts = load_pairs(args.data, base, args.max_length, needs_scores=False)
        notes = counts.lines()
    if args.text:
        paragraphs = load_paragraphs(args.text, base, args.max_length)
    for folder in args.students:
        warn_of_overlap(folder, args.prompts, [row["prompt"] for row in rows])
        warn_of_overlap(folder, args.data, [pair.prompt for pair in pairs])
    return task, rows, pairs, paragraphs, tokenizers, notes


def run_models(args, task, rows, pairs, paragraphs, tokenizers):
    """Four dicts: {system: rows of answers.jsonl}, {row id: log-ratio to the base}, {model:
    pair_logps}, {model: its text_nats}."""
    path = os.path.join(args.out_dir, "answers.jsonl")
    device = best_device()
    longest = max([0, *map(longest_row, pairs), *(len(chunks[0]) for chunks in paragraphs)])
    answers, sampled, kl, logps, states = {}, {}, {}, {}, {}
    # One model in memory at a time. The base is last: KL needs its view of the students' answers.
    for name, folder in [*zip(args.students, args.students), ("base", args.base_model)]:
        model = None  # frees the one before
        model = load_model(folder, "auto" if device == "cuda" else torch.float32).to(device)
        limit = position_limit(model)
        refuse(f"--max_length {args.max_length}", (
            longest > limit,
            f"--data or --text has a row of {longest} tokens, but {folder} takes {limit}"))
        logps[name] = pair_logps(model, pairs)
        if paragraphs:
            states[name] = text_states(model, paragraphs)
        if rows:
            answers[name] = answer_rows(path, name, model, tokenizers[folder], rows, None, args)
        if rows and args.temperature == 1 and name != "base":
            texts = [Answer(row["answer"], row["finish"], row["prompt_ids"], row["ids"])
                     for row in answers[name]]
            sampled[name] = texts, answer_logps(model, texts)
    base_tokenizer = tokenizers[args.base_model]  # and model is the base, the last of the loop
    for name, (texts, student_logps) in sampled.items():
        log_ratios = student_logps - answer_logps(model, texts)
        kl |= zip((row["id"] for row in answers[name]), log_ratios.tolist())
    if args.bare_question:
        bare = [row | {"prompt": row.get("question", row["prompt"])} for row in rows]
        answers[BARE] = answer_rows(path, BARE, model, base_tokenizer, bare, None, args)
    if args.self_refine:
        answers[REFINED] = answer_rows(path, REFINED, model, base_tokenizer, rows, task, args)
        refined = refined_rows(answers[REFINED], args.base_model)
        atomic_write(os.path.join(args.out_dir, "refined.jsonl"),
                     "".join(json.dumps(row) + "\n" for row in refined))
    return answers, kl, logps, text_nats(states, paragraphs, device) if paragraphs else {}


def main(argv=None):
    args = get_args(argv)
    if args.curves:
        make_folder("--out_dir", args.out_dir)
        path = os.path.join(args.out_dir, "curves.png")
        draw_curves(args.curves, path)
        return print(path)
    task, rows, pairs, paragraphs, tokenizers, data_notes = load_inputs(args)
    make_folder("--out_dir", args.out_dir)
    answers, kl, logps, nats = run_models(args, task, rows, pairs, paragraphs, tokenizers)

    # The judge: a score per answer and, with --pairwise, whether it wins over the base's.
    scores, wins, failed = {}, {}, 0
    if args.base_url:
        asked = [row for own in answers.values() for row in own]
        scores, failed = judge_rows(args, task, asked, "eval.jsonl", "score")
    if args.pairwise:
        keys = ("id", "row", "system", "prompt", "question", "answer")
        asked = [{key: row[key] for key in keys if key in row} | {"base": base["answer"]}
                 for name, own in answers.items() if name != "base"
                 for row, base in zip(own, answers["base"])]
        wins, failed_pairs = judge_rows(args, task, asked, "pairwise.jsonl", "win")
        failed += failed_pairs

    # The table: a block per behaviour, one for all of them, one for pairs, one for text.
    answers = {name: answers[name] for name in ("base", BARE, REFINED, *args.students)
               if name in answers}
    groups, blocks = {}, {}  # behaviour -> indices of its rows
    for i, row in enumerate(rows):
        behaviour = str(row.get("behaviour", task.name if task else "answers"))
        groups.setdefault(one_line(behaviour), []).append(i)
    if len(groups) > 1:
        groups["all"] = range(len(rows))
    for behaviour, indices in groups.items():
        chosen = {name: [own[i] for i in indices] for name, own in answers.items()}
        blocks[f"{behaviour}, {len(indices)} prompts"] = {
            name: answer_cells(args, own, chosen["base"], scores, wins, kl)
            for name, own in chosen.items()}
    models = ("base", *args.students)
    if pairs:
        blocks[f"validation pairs of {args.data}"] = {
            name: pair_cells(pairs, logps[name], logps["base"]) for name in models}
    if paragraphs:
        heading = f"text of {args.text}, {nats['base'][2].sum():.0f} tokens in {len(paragraphs)}"
        blocks[f"{heading} paragraphs"] = {
            name: text_cells(nats[name], nats["base"]) for name in models}
    text = "\n".join([table(blocks), "", *notes_on(args, answers, scores, wins), *data_notes])
    print("\n" + text)

    # The report shows the four prompts whose scores differ most, then four random ones.
    report = f"# Evaluation\n\n{indented(text)}\n"
    if rows:
        numbers = np.array([[scores.get(row["id"]) for row in own] for own in answers.values()],
                           dtype=float)  # (systems, N), nan is unknown
        spread = np.nan_to_num(np.ptp(numbers, axis=0))  # (N,)
        order = np.random.default_rng(args.seed).permutation(len(rows))
        shown = dict.fromkeys([*order[np.argsort(-spread[order], kind="stable")][:4], *order[:4]])
        sides = side_by_side(
            [rows[i]["prompt"] for i in shown],
            {name: [own[i]["answer"] for i in shown] for name, own in answers.items()})
        if not args.base_url:
            print("\n" + sides)
        report += f"\n## Answers side by side\n\n{indented(sides)}"
    atomic_write(os.path.join(args.out_dir, "report.md"), report)
    if scores and np.isnan(numbers).all():
        print(f"error: no reply of {args.model} had a verdict; {args.out_dir}/eval.jsonl has the "
              "replies: do --task and --prompts match, is --max_tokens large enough?",
              file=sys.stderr)
        failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
