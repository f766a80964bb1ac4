"""Stage 2, the reward: another model scores both answers of every row. Bad rewrites show here.

    synthetic.jsonl  {"id", "prompt", "rejected", "chosen", ...}
    scored.jsonl     + "score_rejected", "score_chosen": higher is better, null if there is none,
                       "judge": {model, task, behaviour, flags, scale: [lowest, highest], replies}

    python reward.py --task tasks/sycophancy.toml --data synthetic.jsonl --out scored.jsonl \\
        --base_url URL --model NAME
    python reward.py --endpoint /classify --data ... --out ... --base_url URL --model NAME

--task: an LLM judges, as the task's [judge] section says. With --pairwise it compares the two
answers, and the row gets "tau" in place of scores. --endpoint: a reward model's server gives one
number per text (URL such as http://127.0.0.1:8000). --reward_model FOLDER_OR_HUB_ID: the reward
model runs in this process. Crashes and failures are handled as in teacher.py.

A reply without a verdict is asked for again at temperature 0.7, because at 0 it would repeat. After
--verdict_retries the score is null. To judge a row again, remove its line from --out.
"""
import dataclasses
import functools
import os
import re
import statistics
import sys

from infra.client import Client, add_stage_flags, chat
from infra.command import BadInput, Parser, at_least, run
from infra.endpoints import ENDPOINTS, ask_reward_model
from infra.formats import remove_judgement
from infra.judgements import asked_with, report, show_row
from infra.resumable import RowFailed, Stage, run_rows
from infra.rows import as_answer, check_pair, check_prompt, question_of
from infra.task import load_task
from infra.verdicts import COMPARES, better, read_reply, score_range, verdict_form

# ----------------------------------------------------------------------------- an LLM as the judge


def ask(client, judge, args, template, texts, score_of):
    """The judge's attempts, what the row keeps of each reply, until --samples have a verdict.

    texts fill the template's slots. score_of(verdict) gives the score of one verdict, or None.
    """
    # One pass over the template: a "{answer}" inside a question stays as it is.
    request = re.sub(r"\{(\w+)\}", lambda slot: texts.get(slot[1], slot[0]), template)
    messages = [{"role": "system", "content": judge.instruction},
                {"role": "user", "content": request}]
    form = verdict_form(judge) if args.json_verdicts else None
    attempts = []
    for sample in range(args.samples):
        for retry in range(args.verdict_retries + 1):
            greedy = args.samples == 1 and retry == 0
            reply = chat(client, messages, args.model, args.max_tokens,
                         temperature=0 if greedy else 0.7,
                         seed=None if greedy else sample + args.samples * retry,
                         response_format=form, logprobs=True, top_logprobs=10)
            attempts.append(read_reply(reply, judge, score_of))
            if attempts[-1]["verdict"] is not None:
                break
    return attempts


def verdicts_of(client, judge, args, template, texts, score_of):
    """([the mean of --samples scores, or None if one is missing], [attempts]), for each of texts.

    All scores are graded or none is: the whole verdict 4 may be 2.8, graded.
    """
    judged = [ask(client, judge, args, template, each, score_of) for each in texts]
    known = [[one for one in attempts if one["verdict"] is not None] for attempts in judged]
    if not all("graded" in one for one in sum(known, [])):
        for one in sum(known, []):
            one.pop("graded", None)
    return [statistics.fmean(one.get("graded", score_of(one["verdict"])) for one in attempts)
            if len(attempts) == args.samples else None for attempts in known], judged


def compare(client, judge, args, question, answer, other):
    """(P(answer is better than other) or None, attempts in both orders).

    In each order the verdict is 1, 2 or 0 for neither: a win is 1, 0 or 1/2, or graded. The mean
    of both orders cancels position bias: a judge that sees only the position gives 1/2.
    """
    which = dataclasses.replace(judge, verdict=COMPARES, lowest=0, highest=2)
    texts = [{"question": question, "first": a, "second": b}
             for a, b in ((answer, other), (other, answer))]
    (first, second), attempts = verdicts_of(client, which, args, judge.pairwise, texts,
                                            {1: 1.0, 2: 0.0, 0: 0.5}.get)
    return None if None in (first, second) else (first + 1 - second) / 2, attempts


# ------------------------------------------------------------------------------------------ rows


def score_answers(client, task, args, row, *answers):
    """([score or None], [raw replies]) for answers to a row's question, from an LLM."""
    texts = [{"question": question_of(row), "answer": answer} for answer in answers]
    return verdicts_of(client, task.judge, args, task.judge.template, texts,
                       lambda verdict: better(verdict, task.judge.good))


def score_answer(client, task, args, row, answer):
    """(score or None, raw reply) for one answer, from either kind of judge. For eval.py."""
    if args.endpoint:
        [score] = ask_reward_model(client, args, [(row.get("question", row["prompt"]), answer)])
        return score, score
    [score], [replies] = score_answers(client, task, args, row, answer)
    return score, replies


def score_row(client, task, args, row):
    """The row with an LLM's score of both answers and its raw replies added."""
    (rejected, chosen), (replies, more) = score_answers(
        client, task, args, row, as_answer(row["rejected"]), as_answer(row["chosen"]))
    return row | {"score_rejected": rejected, "score_chosen": chosen,
                  "judge": {"rejected": replies, "chosen": more}}


def score_rows(scores_of, rows):
    """Yield each row with a reward model's scores, or a RowFailed, from scores_of(its answers)."""
    scores = scores_of([(row.get("question", row["prompt"]), as_answer(row[name]))
                        for row in rows for name in ("rejected", "chosen")])
    for row, rejected, chosen in zip(rows, scores[::2], scores[1::2]):
        failed = [score for score in (rejected, chosen) if isinstance(score, RowFailed)]
        yield failed[0] if failed else row | {
            "score_rejected": rejected, "score_chosen": chosen,
            "judge": {"rejected": rejected, "chosen": chosen}}


def compare_row(client, task, args, row):
    """The row with tau, the judge's P(chosen is better than rejected), and its raw replies."""
    chosen, rejected = as_answer(row["chosen"]), as_answer(row["rejected"])
    tau, attempts = compare(client, task.judge, args, question_of(row), chosen, rejected)
    return row | {"tau": tau, "judge": dict(zip(("chosen_first", "rejected_first"), attempts))}


def provenance(task, args):
    """The judge's identity, kept in each row: one file never mixes the scores of two judges."""
    if args.endpoint:
        return {"model": args.model, "endpoint": args.endpoint}
    who = asked_with(args, dataclasses.asdict(task.judge), "samples", "max_tokens",
                     "json_verdicts", "extra_body", "no_logprobs") | {"behaviour": task.name}
    return who if args.pairwise else who | {"scale": score_range(task.judge)}


def check_row(row, where):
    check_prompt(remove_judgement(row), where)  # what another judge said of it
    check_pair(row, where, needs_scores=False)


# ------------------------------------------------------------------------------------- the command


def add_judge_flags(parser):
    """The flags of every command that judges answers: this stage, and eval.py."""
    parser.add_argument("--verdict_retries", type=at_least(0), default=2,
                        help="retries after a judge's reply without a verdict")
    parser.add_argument("--samples", type=at_least(1), default=1,
                        help="verdicts per answer, averaged; if above 1, at temperature 0.7")
    parser.add_argument("--json_verdicts", action="store_true",
                        help="ask the server to hold the judge to JSON (response_format)")
    parser.add_argument("--pairwise", action="store_true",
                        help="the judge compares two answers, in both orders")


def check_pairwise(args, task):
    """BadInput if --pairwise has no LLM to ask, or no text to ask with."""
    if args.pairwise and not task:
        raise BadInput("--pairwise needs --task, an LLM as the judge")
    if args.pairwise and not task.judge.pairwise:
        raise BadInput(f"{args.task}: no `judge.pairwise`, which --pairwise needs; see "
                       "tasks/sycophancy.toml")


def main(argv=None):
    parser = Parser("Stage 2: a judge or a reward model scores both answers of every row.")
    judges = parser.add_mutually_exclusive_group(required=True)
    judges.add_argument("--task", help="an LLM judges by the [judge] section of this file")
    judges.add_argument("--endpoint", choices=ENDPOINTS,
                        help="a reward model judges, at this address of --base_url")
    judges.add_argument("--reward_model", help="a reward model's folder or hub id: no server")
    parser.add_argument("--data", required=True, help="rows with prompt, chosen and rejected")
    add_stage_flags(parser, max_tokens=512, needs_server=False)
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    if not args.reward_model and not (args.base_url and args.model):
        raise BadInput("--task and --endpoint need --base_url and --model")
    task = load_task(args.task) if args.task else None
    check_pairwise(args, task)
    client = None if args.reward_model else Client(args)
    if args.reward_model:
        from infra.reward_model import RewardModel  # imports torch; the other judges need none
        args.model, args.endpoint = args.reward_model, "transformers"
        work, batch_size = functools.partial(score_rows, RewardModel(args.model).scores), 32
    elif args.endpoint:
        scores_of = functools.partial(ask_reward_model, client, args)
        work, batch_size = functools.partial(score_rows, scores_of), ENDPOINTS[args.endpoint][0]
    else:
        work_on, batch_size = compare_row if args.pairwise else score_row, 0
        work = functools.partial(work_on, client, task, args)
    adds = ("tau",) if args.pairwise else ("score_rejected", "score_chosen")
    stage = Stage(adds=(*adds, "judge"), provenance_key="judge", check=check_row, work=work,
                  provenance=provenance(task, args), show=show_row, batch_size=batch_size)
    failed = run_rows(stage, args.data, args, client and client.counts)
    is_empty = os.path.getsize(args.out) == 0  # if no row was ever finished
    if not is_empty and not report(args.out, adds, task.judge.good if task else "high"):
        print(f"error: no reply of {args.model} had a verdict; read the replies in {args.out}. "
              "Does --task match --data? Is --max_tokens large enough? Remove the file to judge "
              "again", file=sys.stderr)
        failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
