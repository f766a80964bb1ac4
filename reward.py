"""Stage 2, the reward: a model that is not the teacher scores both answers of every row. It catches rewrites that are no better.

    synthetic.jsonl  {"id", "prompt", "rejected", "chosen", ...}
    scored.jsonl     + "score_rejected", "score_chosen": numbers, higher is better, or null; "judge": {model, task, the raw replies}

    python reward.py --task tasks/sycophancy.toml --data synthetic.jsonl --out scored.jsonl --base_url URL --model NAME
    python reward.py --endpoint /classify --data synthetic.jsonl --out scored.jsonl --base_url URL --model NAME

With --task an LLM judges by the task's [judge] section, at temperature 0. With --endpoint a reward model gives one number per text:
vLLM's /classify, /score or /pooling, or /predict of text-embeddings-inference; URL is then such as http://127.0.0.1:8000. What
happens after a crash or a failure is as in teacher.py.

A judge's reply without a verdict is asked for again (--verdict_retries: at temperature 0.7 and with other seeds, for at temperature 0
it would only repeat itself). Then the score is null, and the raw replies are kept under `judge`. The same command does not ask for a
null score again: take the row's line out of --out, and it does.
"""
import argparse
import dataclasses
import math
import os
import re
import statistics
import sys
from collections import Counter

from behaviour import load_task
from data import check_pair, printable, run, show_gaps, stream_rows
from teacher import Client, RowFailed, add_flags, at_least, chat, check_prompt, digest, run_rows

ADDED = ("score_rejected", "score_chosen", "judge")

# ------------------------------------------------------------------------------------------------- a judge's verdict

NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"


def parse_verdict(text, judge, finish="stop"):
    """The number of a judge's verdict, or None where there is none that counts.

    Only the last line counts, whatever stands above it, and only if it is the judge's label and a number within the scale, sign
    and fraction included. Around it may stand Markdown, "/5" or "out of 5" (if 5 is the top of the scale) and a full stop. A reply
    that was cut (finish is "length") has no verdict: the cut may have gone through the number.
    """
    lines = [line for line in text.splitlines() if re.search(r"[^\W_]", line)]  # not empty ones, rulers and code fences
    if not lines or finish == "length":
        return None
    line, label = (re.sub(r"[*_`#>]", "", text).replace("\N{MINUS SIGN}", "-").strip() for text in (lines[-1], judge.verdict))
    label = re.escape(label.rstrip(": "))
    match = re.fullmatch(rf"(?:- )?{label}\s*[:=]?\s*({NUMBER})(?:\s*(?:/|out of)\s*({NUMBER}))?\s*\.?", line, re.IGNORECASE)
    if not match or match[2] and float(match[2]) != judge.highest:
        return None
    verdict = float(match[1])
    return verdict if judge.lowest <= verdict <= judge.highest else None


def better(verdict, good):
    """The verdict as a score, of which higher is always better. good says which verdicts are best: "high", "low" or "zero"."""
    return {"high": verdict, "low": -verdict, "zero": -abs(verdict)}[good] + 0.0  # + 0.0 makes a plain 0 of -0.0


def ask(client, judge, args, template, texts, read):
    """(score or None, attempts) of what the judge is asked by a template; an attempt is {"verdict", "finish", "reply"}.

    read(reply) gives a reply's (verdict, score), the score None where it has none. The score is the mean of --samples scores, or None
    if one of them could not be had: no mean is made of fewer.
    """
    # One pass over the template, so that "{answer}" in a question stays what it is: text.
    request = re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)
    messages = [{"role": "system", "content": judge.instruction}, {"role": "user", "content": request}]
    attempts, scores = [], []
    for sample in range(args.samples):
        for attempt in range(args.verdict_retries + 1):
            if args.samples == 1 and attempt == 0:
                reply = chat(client, messages, args.model, args.max_tokens, temperature=0)
            else:
                reply = chat(client, messages, args.model, args.max_tokens, temperature=0.7, seed=sample + args.samples * attempt)
            verdict, score = read(reply)
            attempts.append({"verdict": verdict, "finish": reply.finish, "reply": reply.text})
            if score is not None:
                scores.append(score)
                break
    return (statistics.fmean(scores) if len(scores) == args.samples else None), attempts


def ask_judge(client, judge, args, question, answer):
    """(score or None, attempts) of an answer by a judge, as of `ask`."""
    def read(reply):
        verdict = parse_verdict(reply.text, judge, reply.finish)
        return verdict, None if verdict is None else better(verdict, judge.good)

    return ask(client, judge, args, judge.template, {"question": question, "answer": answer}, read)


def ask_which(client, judge, args, question, first, second):
    """(win of the first answer or None, attempts), as of `ask`: 1 if the judge calls it better, 0 if the second, 1/2 if neither."""
    verdicts = dataclasses.replace(judge, verdict="Better:", lowest=0, highest=2)

    def read(reply):
        verdict = parse_verdict(reply.text, verdicts, reply.finish)
        return verdict, {1: 1.0, 2: 0.0, 0: 0.5}.get(verdict)

    return ask(client, judge, args, judge.pairwise, {"question": question, "first": first, "second": second}, read)


# --------------------------------------------------------------------------------------------------- a reward model


def pooled(answer):
    """The number of a /pooling reply. A model that gives one for each token means the last, which has read the whole text."""
    numbers = answer["data"][0]["data"]
    return numbers[-1] if isinstance(numbers[-1], list) else numbers


def chat_of(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# By address: the body to send for a question and an answer, and where in the reply the numbers stand. All ask for the raw number,
# not squeezed into 0..1. The first two put the texts into the model's chat template; the others send them as a pair.
ENDPOINTS = {
    "/classify": (lambda question, answer: chat_of(question, answer) | {"use_activation": False},
                  lambda reply: reply["data"][0]["probs"]),
    "/pooling": (lambda question, answer: chat_of(question, answer) | {"use_activation": False}, pooled),
    "/score": (lambda question, answer: {"text_1": question, "text_2": answer, "use_activation": False},
               lambda reply: [reply["data"][0]["score"]]),
    "/predict": (lambda question, answer: {"inputs": [question, answer], "raw_scores": True},
                 lambda reply: [label["score"] for label in reply]),
}


def ask_reward_model(client, args, question, answer):
    """The number that a reward model gives to an answer. RowFailed where it gives several: that is no reward model."""
    body, numbers_of = ENDPOINTS[args.endpoint]

    def read(reply):
        numbers = numbers_of(reply)
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("not a number")
        usage = isinstance(reply, dict) and reply.get("usage") or {}  # not every server counts tokens
        client.count(tokens_in=usage.get("prompt_tokens") or 0)
        return numbers

    numbers = client.post(client.base_url.removesuffix("/v1") + args.endpoint, {"model": args.model} | body(question, answer), read)
    if len(numbers) != 1:
        raise RowFailed(f"{args.endpoint} gave {len(numbers)} numbers for one text; a reward model gives one (a single label)")
    return numbers[0]


# ---------------------------------------------------------------------------------------------------------- the rows


def check_row(row, where):
    """BadInput unless a row has a prompt and both answers."""
    check_prompt(row, where)
    check_pair(row, where, needs_scores=False)


def question_of(row):
    """What the judge sees: the row's question, else its prompt; of a longer conversation all turns, each after its role."""
    if "question" in row or isinstance(row["prompt"], str):
        return row.get("question", row["prompt"])
    if len(row["prompt"]) == 1:
        return row["prompt"][0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in row["prompt"])


def judge_name(task, args):
    """What scores are made with, as their rows keep it: no file mixes the scores of two judges."""
    return {"model": args.model} | ({"endpoint": args.endpoint} if args.endpoint else {"task": digest(dataclasses.asdict(task.judge), ())})


def score_answer(client, task, args, row, answer):
    """(score or None, what was said) of an answer to a row's question: by the reward model at --endpoint, else by the task's judge."""
    if args.endpoint:
        score = ask_reward_model(client, args, question_of(row), answer)
        return score, score
    return ask_judge(client, task.judge, args, question_of(row), answer)


def score_row(client, task, args, row):
    """The row with both scores and what the judge said."""
    scores, said = {}, {}
    for name in ("rejected", "chosen"):
        answer = row[name] if isinstance(row[name], str) else row[name][0]["content"]
        scores["score_" + name], said[name] = score_answer(client, task, args, row, answer)
    return row | scores | {"judge": said}


def show_row(row):
    """Prints a finished row: the question, and both answers with what was said of them."""
    print(f"======== {printable(str(row['id']))}\n-------- question\n{printable(question_of(row))}")
    for name in ("rejected", "chosen"):
        said = row["judge"][name]
        print(f"-------- {name}, score {row['score_' + name]}\n{printable(str(row[name]))}")
        for attempt in said if isinstance(said, list) else []:
            print(f"-------- the judge, finish {attempt['finish']}, verdict {attempt['verdict']}\n{printable(attempt['reply'].strip())}")


def report(path):
    """Prints what the scores in a file look like, all runs that wrote it taken together; returns how many there are."""
    gaps, counts, spreads = [], Counter(), []
    for _, row in stream_rows(path):
        scores = [row["score_chosen"], row["score_rejected"]]
        counts.update(rows=1, scores=2, read=2 - scores.count(None))
        if None not in scores:
            gaps.append(scores[0] - scores[1])
        for said in (row["judge"]["rejected"], row["judge"]["chosen"]):
            if isinstance(said, list):
                verdicts = [attempt["verdict"] for attempt in said if attempt["verdict"] is not None]
                counts.update(no_verdict=len(said) - len(verdicts), cut=sum(attempt["finish"] == "length" for attempt in said))
                spreads += [statistics.pstdev(verdicts)] if len(verdicts) > 1 else []
    print(f"{counts['read']} of {counts['scores']} answers have a score ({100 * counts['read'] / counts['scores']:.1f} %); "
          f"{counts['no_verdict']} replies had no verdict, {counts['cut']} of them for being cut by --max_tokens; "
          f"{counts['rows'] - len(gaps)} rows lack a score")
    if spreads:
        print(f"repeated verdicts: all the same on {100 * sum(spread == 0 for spread in spreads) / len(spreads):.1f} % of the answers, "
              f"standard deviation {statistics.fmean(spreads):.2f} on average")
    if gaps:
        show_gaps(gaps, "rows")
    return counts["read"]


def add_judge_flags(parser):
    """The flags of whoever has answers judged: this stage, and eval.py."""
    parser.add_argument("--verdict_retries", type=at_least(0), default=2, help="how often a judge is asked again whose reply has no verdict")
    parser.add_argument("--samples", type=at_least(1), default=1, help="verdicts per answer, at temperature 0.7, averaged (default: one, at 0)")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Stage 2: a judge or a reward model scores both answers of every row.")
    rewarder = parser.add_mutually_exclusive_group(required=True)
    rewarder.add_argument("--task", help="an LLM judges, by the [judge] section of this file")
    rewarder.add_argument("--endpoint", choices=ENDPOINTS, help="a reward model judges, at this address of --base_url")
    parser.add_argument("--data", required=True, help="rows with a prompt, chosen and rejected")
    add_flags(parser, max_tokens=512)
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    task, client = load_task(args.task) if args.task else None, Client(args)
    failed = run_rows(client, args, args.data, ADDED, judge_name(task, args), check_row,
                      lambda row: score_row(client, task, args, row), show_row)
    if os.path.getsize(args.out) and not report(args.out):  # an empty file: no row was ever finished
        print(f"error: no reply of {args.model} had a verdict; {args.out} has what it said: do --task and --data match, is --max_tokens large "
              "enough? Remove that file to have it judged again", file=sys.stderr)
        failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
