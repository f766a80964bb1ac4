"""Evaluation: the answers of a base model and its students to new prompts, judged and compared.

    python eval.py --task tasks/safety.toml --prompts held_out.jsonl --model out [out2 ...] \\
        --base_model DIR --base_url URL --judge_model NAME
    python eval.py --prompts toy/held_out.jsonl --model out    no judge: lengths, faults, answers
    ... --temperature 1    sampled answers, and from them the KL divergence from the base
    ... --pairwise         the judge also compares with the base's answer, in both orders
    ... --self_refine      adds a baseline: the base criticises and rewrites its own answer
    ... --bare_question    adds a goal: the base answers the question without its persona
    python eval.py --data scored.jsonl --model out    margins and accuracy on scored pairs
    ... --suspects         shows the pairs whose scores are most likely wrong
    python eval.py --text FILE --model out            what training did to ordinary text
    python eval.py --curves out [out2 ...]            draws training runs into eval/curves.png

--out_dir gets answers.jsonl, eval.jsonl (scores and the judge's raw replies), pairwise.jsonl and
report.md; asked-eval.jsonl and asked-pairwise.jsonl are the judge's input. With --self_refine
refined.jsonl has rows that reward.py can score, for another round. The same command continues a
stopped run. An answer that could not be judged has score null, and is in no mean.
"""
import json
import os
import sys
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import collate, encode_prompt, load_pairs
from infra.client import Client, add_client_flags
from infra.command import BadInput, Parser, at_least, one_line, run
from infra.distributed import best_device
from infra.files import atomic_write, make_folder
from infra.formats import as_messages
from infra.generate import Answer, fault, generate
from infra.intervals import cell, equal_length, mean, ratio
from infra.models import TOY_STUDENT, check_ids, load_model, load_tokenizer, position_limit
from infra.packing import longest_row, micro_batches
from infra.paragraphs import load_paragraphs
from infra.plots import draw_curves
from infra.reference import fingerprint
from infra.report import indented, side_by_side, table, warn_of_overlap
from infra.resumable import Stage, checked_rows, run_batches, run_rows
from infra.rows import check_prompt, question_of, stream_rows
from infra.suspects import suspects_text, training_flags
from infra.task import load_task
from rdpo import judged_tau, logit_scaling, logits_in_chunks, sequence_logps
from reward import ENDPOINTS, add_judge_flags, check_pairwise, compare, provenance, score_answer

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
        prompt_ids = [encode_prompt(tokenizer, prompt, f"the prompt of row {row['row']!r:.40}")
                      for prompt, row in zip(prompts, rows)]
        # A row has the same seed for all systems: where two of them agree, so do their samples.
        seeds = [zlib.crc32(f"{args.seed} {len(turns)} {row['row']}".encode()) for row in rows]
        turns.append(generate(model, tokenizer, prompt_ids, args.max_new_tokens,
                              args.temperature, seeds, args.batch_size))
    return turns


def answer_rows(path, system, model, tokenizer, rows, task, args):
    """Append a system's missing answers to `path`; return all its rows, in the order of `rows`.

    With a task the rewrite is the answer. BadInput if `path` holds answers by other settings.
    """
    settings = {"weights": fingerprint(model, str(model.dtype)),
                "temperature": args.temperature, "seed": args.seed,
                "max_new_tokens": args.max_new_tokens}
    settings |= {"asked": [task.critique, task.revision]} if task else {}
    keys = ("behaviour", "prompt", "question")
    rows = [{"id": f"{system}/{row['id']}", "row": row["id"], "answered_by": system,
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


def faults_of(rows):
    return [fault(row["answer"], row["finish"]) for row in rows]


# ------------------------------------------------------------------------------ log-probabilities

TOKENS_PER_BATCH = 4096  # in one forward pass, padding included: memory only


@torch.no_grad()
def answer_logps(model, items):
    """(P, n): log pi of the n answers of each item, in nats, summed over its tokens.

    items are data.Pairs (n = 2, chosen and rejected) or generate's Answers (n = 1). For answers
    that a policy sampled at temperature 1, the mean of answer_logps(policy) -
    answer_logps(reference) estimates KL(policy || reference) per answer.
    """
    n = len(items[0].answers) if items else 0
    logps = torch.empty(len(items), n)  # (P, n)
    for indices in micro_batches(items, range(len(items)), TOKENS_PER_BATCH, share_prefix=False):
        batch = collate([items[i] for i in indices]).to(model.device)
        logps[indices] = sequence_logps(model, batch).view(n, -1).T.cpu()  # (B, n)
    return logps


def tau_of(pairs, temperature=1.0):
    """(P,) numpy: the judge's tau of each pair, nan for a pair without scores."""
    return judged_tau(torch.tensor([pair.score_gap for pair in pairs]),
                      torch.tensor([pair.tau for pair in pairs]), temperature).numpy()


# ---------------------------------------------------------------------------------- ordinary text


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
        if len(states[name][1]) != len(states["base"][1]):
            raise BadInput(f"--model {name}: its output head has another size than that of "
                           "--base_model; leave out --text")
        nats = torch.ones(3, len(targets), device=device)  # (3, N)
        for (chunk, base), (_, own) in zip(logps(*states["base"]), logps(*states[name])):
            nats[0, chunk] = F.nll_loss(own, targets[chunk], reduction="none")
            nats[1, chunk] = F.kl_div(own, base, reduction="none", log_target=True).sum(1)
        sums[name] = torch.stack([part.sum(1) for part in nats.split(sizes, 1)], 1).cpu()
    return sums


# -------------------------------------------------------------------------------------- the judge


def ask_judge(args, task, answers):
    """(scores, wins, number of failed rows): {row id: number or None}, {} if not asked for."""
    scores, wins, unscored, uncompared = {}, {}, 0, 0
    if args.base_url:
        asked = [row for rows in answers.values() for row in rows]
        scores, unscored = judge_rows(args, task, asked, "eval.jsonl", "score")
    if args.pairwise:
        keys = ("id", "row", "answered_by", "prompt", "question", "answer")
        asked = [{key: row[key] for key in keys if key in row} | {"base": base["answer"]}
                 for name, rows in answers.items() if name != "base"
                 for row, base in zip(rows, answers["base"])]
        wins, uncompared = judge_rows(args, task, asked, "pairwise.jsonl", "win")
    return scores, wins, unscored + uncompared


def judge_rows(args, task, rows, name, key):
    """Add `key`, a score or a win, to rows, as reward.py does, and write out_dir/`name`.

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
    # The file is empty if no row was ever finished. It may also hold rows of earlier calls.
    judged = stream_rows(args.out) if os.path.getsize(args.out) else []
    numbers = {row["id"]: row[key] for _, row in judged}
    return {row["id"]: numbers.get(row["id"]) for row in rows}, failed


# -------------------------------------------------------------------------------------- the table


def answer_blocks(args, inputs, answers, numbers):
    """{heading: {system: cells}}: a block per behaviour and, if there are several, one for all.

    numbers is {"score", "win", "kl": {row id: number}}; one that is missing or None is unknown.
    """
    behaviours = {}  # {name: indices of its rows}
    for i, row in enumerate(inputs.rows):
        behaviour = row.get("behaviour", inputs.task.name if inputs.task else "answers")
        behaviours.setdefault(one_line(str(behaviour)), []).append(i)
    if len(behaviours) > 1:
        behaviours["all"] = range(len(inputs.rows))
    blocks = {}
    for behaviour, indices in behaviours.items():
        own = {name: [rows[i] for i in indices] for name, rows in answers.items()}
        blocks[f"{behaviour}, {len(indices)} prompts"] = {
            name: answer_cells(args, rows, own["base"], numbers) for name, rows in own.items()}
    return blocks


def answer_cells(args, rows, base_rows, numbers):
    """{measurement: cell} of one system's answers. A new measurement goes here."""
    def column(name, rows):  # (N,), nan is unknown
        return np.array([numbers[name].get(row["id"]) for row in rows], dtype=float)

    score, base_score = column("score", rows), column("score", base_rows)
    gain = score - base_score if rows is not base_rows else np.nan * score  # none over itself
    tokens = np.array([len(row["ids"]) for row in rows])
    longer = tokens - np.array([len(row["ids"]) for row in base_rows])
    lengths_differ = len(set(longer[~np.isnan(gain)])) > 1
    win = column("win", rows) if args.pairwise else (1 + np.sign(gain)) / 2  # a tie: 1/2
    return {"judged": f"{np.isfinite(score).sum()}/{len(rows)}" if args.base_url else "-",
            "score (higher is better)": cell(".2f", mean, score),
            "win over base %": cell(".0f", mean, 100 * win),
            "score gain at equal length":
                cell("+.2f", equal_length, gain, longer) if lengths_differ else "-",
            "tokens": f"{tokens.mean():.1f}",
            "degenerate %": f"{100 * np.mean([kind != '' for kind in faults_of(rows)]):.1f}",
            "KL from base, nats": cell(".2f", mean, column("kl", rows))}


def pair_cells(pairs, logps, base_logps):
    """{measurement: cell} of a model on scored pairs, from its and the base's logps, (P, 2)."""
    margins = margins_of(logps, base_logps)
    if logps is base_logps:
        margins[:] = np.nan  # the base has no preference against itself
    side = np.where(abs(margins) < 1e-3, 0, np.sign(margins))  # 0: no preference, half right
    judged = np.sign([pair.lean or np.nan for pair in pairs])  # (P,), nan for a tie or no score
    chosen, rejected = logps.T.double().numpy()
    return {"pairs": str(len(pairs)),
            "chosen first %": cell(".1f", mean, 50 * (1 + side)),
            "agrees with scores %": cell(".1f", mean, 50 * (1 + side * judged)),
            "log-ratio margin, nats": cell("+.2f", mean, margins),
            "logp chosen, nats": cell(".2f", mean, chosen),
            "logp rejected, nats": cell(".2f", mean, rejected)}


def margins_of(logps, base_logps):
    """(P,): the log-ratio margins of a model in nats, the loss's m / beta."""
    return (logps - base_logps).double().numpy() @ [1, -1]


def text_cells(nats, base_nats):
    """{measurement: cell} of a model on ordinary text, from its and the base's text_nats."""
    nll, kl, tokens = nats.double().numpy()  # (P,) each
    more = nll - base_nats[0].numpy()
    if nats is base_nats:
        more, kl = more * np.nan, kl * np.nan  # the base has no distance from itself
    return {"nll per token, nats": cell(".3f", ratio, nll, tokens),
            "nll above the base's": cell("+.3f", ratio, more, tokens),
            "KL from base, nats per token": cell(".4f", ratio, kl, tokens)}


def notes_on(args, answers, numbers):
    """The notes below the table, one sentence per line."""
    lines = ["[low, high]: 95 % bootstrap interval over prompts, pairs or paragraphs"]
    for name, rows in answers.items():
        for verb, number in (("judge", "score"), ("compare", "win")):
            unknown = sum(numbers[number].get(row["id"], 0) is None for row in rows)
            if unknown:
                lines.append(f"could not {verb} {unknown} of {len(rows)} answers of {name}")
        faults = Counter(filter(None, faults_of(rows)))
        if faults:
            text = ", ".join(f"{count} {kind}" for kind, count in faults.items())
            limit = " (cut by --max_new_tokens)" if faults["cut"] else ""
            lines.append(f"degenerate answers of {name}: {text}{limit}")
    if answers and args.temperature != 1:
        lines.append("KL: only from answers that are sampled at --temperature 1")
    return lines


def shown_answers(args, rows, answers, scores):
    """Text: the answers to the four prompts whose scores differ most, then to four random ones."""
    scores = np.array([[scores.get(row["id"]) for row in own] for own in answers.values()],
                      dtype=float)  # (systems, N), nan is unknown
    spread = np.nan_to_num(np.ptp(scores, axis=0))  # (N,)
    order = np.random.default_rng(args.seed).permutation(len(rows))
    shown = dict.fromkeys([*order[np.argsort(-spread[order], kind="stable")][:4], *order[:4]])
    return side_by_side(
        [rows[i]["prompt"] for i in shown],
        {name: [own[i]["answer"] for i in shown] for name, own in answers.items()})


# ------------------------------------------------------------------------------------ the command


def get_args(argv):
    parser = Parser("Judge and compare the answers of a base model and of its students.")
    flag = parser.add_argument
    flag("--curves", nargs="+", metavar="DIR", help="only draw the curves of these training runs")
    flag("--model", dest="students", nargs="+", default=[], help="model folders or hub ids")
    flag("--base_model", default=TOY_STUDENT, help="the reference (default: the toy student)")
    flag("--prompts", help="held-out rows with a prompt")
    flag("--data", help="held-out rows with chosen, rejected and, optionally, scores")
    flag("--suspects", type=at_least(1), nargs="?", const=10, metavar="N",
         help="show the N pairs of --data (default: 10) whose scores are most likely wrong; among "
              "training rows, it finds fewer of them after several epochs")
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
    if not args.curves and not (args.students and (args.prompts or args.data or args.text)):
        raise BadInput("give --model with --prompts, --data or --text, or --curves")
    if args.base_url and not (args.prompts and args.model and (args.task or args.endpoint)):
        raise BadInput("--base_url needs --task or --endpoint, with --prompts and --judge_model")
    if args.pairwise and (not args.base_url or args.endpoint):
        raise BadInput("--pairwise needs --base_url with an LLM as the judge, not --endpoint")
    if args.self_refine and not (args.task and args.prompts):
        raise BadInput("--self_refine needs --task and --prompts")
    if args.bare_question and not args.prompts:
        raise BadInput("--bare_question needs --prompts")
    if args.suspects and not args.data:
        raise BadInput("--suspects needs --data")
    if len({"base", *args.students}) <= len(args.students):
        raise BadInput("--model names a folder twice, or one called base; give each once, under "
                       "another name")
    if os.path.exists(args.out_dir) and not os.path.isdir(args.out_dir):
        raise BadInput(f"--out_dir {args.out_dir}: is a file; give a folder")
    return args


class Inputs(NamedTuple):
    """What models are measured on. What was not asked for is empty."""
    task: object  # infra.task.Task, or None
    rows: list  # of --prompts
    pairs: list  # of --data
    paragraphs: list  # of --text, see load_paragraphs
    tokenizers: dict  # {folder or hub id: tokenizer}
    notes: list  # on the rows of --data that were left out


def load_inputs(args):
    """The Inputs. Everything that can be wrong is refused here, before a model computes."""
    task = load_task(args.task) if args.task else None
    check_pairwise(args, task)
    if args.base_url:
        Client(args)  # raises for a wrong address or a missing key
    for folder in args.students if args.suspects else ():
        training_flags(folder)
    rows, pairs, paragraphs, notes = [], [], [], []
    if args.prompts:
        rows = [row for _, row in checked_rows(args.prompts, None, check_prompt, ())]
    if args.bare_question and all(row.get("question", row["prompt"]) == row["prompt"]
                                  for row in rows):
        raise BadInput(f"{args.prompts}: no row has a `question` other than its prompt, which "
                       "--bare_question needs")
    tokenizers = {folder: load_tokenizer(folder) for folder in (args.base_model, *args.students)}
    base = tokenizers[args.base_model]
    for folder in args.students:
        if tokenizers[folder].get_vocab() != base.get_vocab():
            raise BadInput(f"--model {folder}: its vocabulary is not that of --base_model "
                           f"{args.base_model}; give the model that it was trained from")
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
    return Inputs(task, rows, pairs, paragraphs, tokenizers, notes)


def run_models(args, inputs):
    """({system: rows of answers.jsonl}, {row id: log-ratio of a sampled answer to the base},
    {model: answer_logps of the pairs}, {model: text_nats}), in the order of the table."""
    rows, pairs, paragraphs = inputs.rows, inputs.pairs, inputs.paragraphs
    path, device = os.path.join(args.out_dir, "answers.jsonl"), best_device()
    longest = max([0, *map(longest_row, pairs), *(len(chunks[0]) for chunks in paragraphs)])
    answers, sampled, kl, logps, states = {}, {}, {}, {}, {}

    def answer(system, folder, rows, task=None):
        return answer_rows(path, system, model, inputs.tokenizers[folder], rows, task, args)

    # One model in memory at a time. The base is last: KL needs its view of the students' answers.
    for name, folder in [*zip(args.students, args.students), ("base", args.base_model)]:
        model = None  # frees the one before
        model = load_model(folder, "auto" if device == "cuda" else torch.float32).to(device)
        if longest > position_limit(model):
            raise BadInput(f"--max_length {args.max_length}: --data or --text has a row of "
                           f"{longest} tokens, but {folder} takes {position_limit(model)}")
        for pair in pairs:
            check_ids(model, sum(pair.answers, pair.prompt_ids), pair.where)
        for chunks in paragraphs:
            check_ids(model, chunks[0], args.text)
        if pairs:
            logps[name] = answer_logps(model, pairs)
        if paragraphs:
            states[name] = text_states(model, paragraphs)
        if rows:
            answers[name] = answer(name, folder, rows)
        if rows and args.temperature == 1 and name != "base":
            texts = [Answer(row["answer"], row["finish"], row["prompt_ids"], row["ids"])
                     for row in answers[name]]
            sampled[name] = texts, answer_logps(model, texts)
    for name, (texts, student_logps) in sampled.items():  # model is the base now
        log_ratios = student_logps - answer_logps(model, texts)  # (N, 1)
        kl |= zip((row["id"] for row in answers[name]), log_ratios[:, 0].tolist())
    if args.bare_question:
        bare = [row | {"prompt": row.get("question", row["prompt"])} for row in rows]
        answers[BARE] = answer(BARE, args.base_model, bare)
    if args.self_refine:
        answers[REFINED] = answer(REFINED, args.base_model, rows, inputs.task)
        refined = refined_rows(answers[REFINED], args.base_model)
        atomic_write(os.path.join(args.out_dir, "refined.jsonl"),
                     "".join(json.dumps(row) + "\n" for row in refined))
    nats = text_nats(states, paragraphs, device) if paragraphs else {}
    columns = ("base", BARE, REFINED, *args.students)
    answers, logps, nats = ({name: part[name] for name in columns if name in part}
                            for part in (answers, logps, nats))
    return answers, kl, logps, nats


def main(argv=None):
    args = get_args(argv)
    if args.curves:
        make_folder("--out_dir", args.out_dir)
        path = os.path.join(args.out_dir, "curves.png")
        draw_curves(args.curves, path)
        return print(path)
    inputs = load_inputs(args)
    make_folder("--out_dir", args.out_dir)
    answers, kl, logps, nats = run_models(args, inputs)
    scores, wins, failed = ask_judge(args, inputs.task, answers)

    numbers = {"score": scores, "win": wins, "kl": kl}
    blocks = answer_blocks(args, inputs, answers, numbers)
    if inputs.pairs:
        blocks[f"pairs of {args.data}"] = {
            name: pair_cells(inputs.pairs, logps[name], logps["base"]) for name in logps}
    if inputs.paragraphs:
        heading = f"text of {args.text}, {nats['base'][2].sum():.0f} tokens in"
        blocks[f"{heading} {len(inputs.paragraphs)} paragraphs"] = {
            name: text_cells(nats[name], nats["base"]) for name in nats}
    text = "\n".join([table(blocks), "", *notes_on(args, answers, numbers), *inputs.notes])
    for folder in args.students if args.suspects else ():
        beta, temperature = training_flags(folder)
        text += "\n\n" + suspects_text(
            folder, inputs.pairs, tau_of(inputs.pairs, temperature),
            beta * margins_of(logps[folder], logps["base"]), inputs.tokenizers[folder],
            args.suspects)
    print("\n" + text)
    report = f"# Evaluation\n\n{indented(text)}\n"
    if inputs.rows:
        sides = shown_answers(args, inputs.rows, answers, scores)
        report += f"\n## Answers side by side\n\n{indented(sides)}"
        if not args.base_url:
            print("\n" + sides)
    atomic_write(os.path.join(args.out_dir, "report.md"), report)
    if scores and set(scores.values()) == {None}:
        print(f"error: no reply of {args.model} had a verdict; {args.out_dir}/eval.jsonl has the "
              "replies: do --task and --prompts match, is --max_tokens large enough?",
              file=sys.stderr)
        failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
