"""DPO and rDPO on real text: a 135 M model, scored reviews, a teacher that fails at 0 or 40 %.

    python bench/real_noise.py --model SMOLLM2_135M_INSTRUCT --data sentiment_scored.json \\
        --out_dir out-real

The rows are sentiments/results_sentiment_review.json of
github.com/vicgalle/distilled-self-critique. Asked for negative film reviews, a teacher rewrote
them into positive ones, and a reward model scored both. A quarter of the films is held out. A
failing pair has its two reviews exchanged and the scores stay with the texts: the rewrite is the
negative one, and its score says so.

Measured on held-out films: the share of pairs in which the student ranks the review with the
higher score first, and the sentiment (-1 to 1) of reviews that it writes. The sentiment comes from
another kind of scorer, the word list of vaderSentiment. OUT_DIR/runs.jsonl keeps finished runs;
the same command continues from there.
"""
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import sys
import time

import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from data import encode_prompt  # noqa: E402
from eval import answer_logps  # noqa: E402
from infra.command import Parser, run  # noqa: E402
from infra.files import atomic_write  # noqa: E402
from infra.formats import canonical  # noqa: E402
from infra.generate import generate  # noqa: E402
from infra.intervals import bootstrap, mean  # noqa: E402
from infra.models import load_model, load_tokenizer  # noqa: E402
from infra.rows import read_rows  # noqa: E402

FAILURES = (0.0, 0.4)
METHODS = ("dpo", "rdpo")


def title_of(row):
    return re.search(r"movie (.*?)(?:\. Be negative)?$", row["prompt"].strip())[1]


def split(rows, seed):
    """(training rows, held-out rows): a quarter of the films are held out."""
    titles = sorted({title_of(row) for row in rows})
    held_out = set(random.Random(seed).sample(titles, len(titles) // 4))
    return ([row for row in rows if title_of(row) not in held_out],
            [row for row in rows if title_of(row) in held_out])


def exchange(row):
    """The pair of a failing teacher: the texts change places, and each keeps its score."""
    return row | {"chosen": row["rejected"], "rejected": row["chosen"],
                  "score_chosen": row["score_rejected"], "score_rejected": row["score_chosen"]}


def write_reviews(model, tokenizer, rows, args):
    """Sampled reviews of the held-out films, two per prompt."""
    prompt_ids = [encode_prompt(tokenizer, row["prompt"]) for row in rows for _ in range(2)]
    return generate(model, tokenizer, prompt_ids, args.max_new_tokens, temperature=1.0,
                    batch_size=32)


def sentiment(answers):
    """(mean, low, high) of the answers' sentiment, with a 95 % bootstrap interval."""
    analyzer = SentimentIntensityAnalyzer()
    return bootstrap(mean, [analyzer.polarity_scores(answer.text)["compound"]
                            for answer in answers])


def untrained(job, rows, args):
    """Results of the base model."""
    held_out = split(rows, job["seed"])[1]
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    reviews = write_reviews(model, tokenizer, held_out, args)
    return {"sentiment": sentiment(reviews), "reviews": [review.text for review in reviews[:4]]}


def one_run(job, rows, args):
    """Train one student and measure it. Returns a dict of results."""
    training, held_out = split(rows, job["seed"])
    rng = random.Random(job["seed"])
    failing = set(rng.sample(range(len(training)), round(job["failures"] * len(training))))
    training = [exchange(row) if i in failing else row for i, row in enumerate(training)]
    folder = os.path.join(args.out_dir, "run")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for name, part in (("train", training), ("held_out", held_out)):
        atomic_write(f"{folder}/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    with open(f"{folder}/log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        train.main([
            "--data", f"{folder}/train.jsonl", "--eval_data", f"{folder}/held_out.jsonl",
            "--model", args.model, "--loss", job["method"], "--batch_size", "8",
            "--max_length", str(args.max_length), "--learning_rate", str(args.learning_rate),
            "--seed", str(job["seed"]), "--eval_every", "1000", "--save_every", "1000",
            "--max_new_tokens", "1", "--out_dir", f"{folder}/out"])
    with open(f"{folder}/out/metrics.jsonl", encoding="utf-8") as file:
        last = json.loads(file.readlines()[-1])
    model, tokenizer = load_model(f"{folder}/out"), load_tokenizer(args.model)
    reviews = write_reviews(model, tokenizer, held_out, args)
    log_ratios = answer_logps(model, reviews) - answer_logps(load_model(args.model), reviews)
    shutil.rmtree(folder)
    return {"ranked": last["eval/rewards/score_agreement"], "margin": last["eval/rewards/margins"],
            "held_out": len(held_out), "kl": log_ratios.mean().item(),
            "sentiment": sentiment(reviews), "reviews": [review.text for review in reviews[:4]]}


def of_seeds(values, form):
    return " ".join(format(value, form) for value in values)


def table(finished):
    """A Markdown table of the finished runs, {job as JSON: result}; one number per seed."""
    lines = ["| failing pairs | method | held-out pairs ranked by their scores | margin "
             "| sentiment of sampled reviews | KL, nats per review |", "| --- " * 6 + "|"]
    for share, method in [(None, "base"), *((share, method) for share in FAILURES
                                            for method in METHODS)]:
        results = [result for job, result in finished.items()
                   if json.loads(job)["method"] == method
                   and json.loads(job).get("failures") == share]
        feelings = [result["sentiment"][0] for result in results]
        feeling = f"{of_seeds(feelings, '+.2f')} (mean {statistics.fmean(feelings):+.2f})"
        if method == "base":
            lines.append(f"| | base | | | {feeling} | |")
            continue
        ranked = [result["ranked"] for result in results]
        margins = of_seeds([result["margin"] for result in results], "+.2f")
        kls = of_seeds([result["kl"] for result in results], ".1f")
        lines.append(f"| {share:.0%} | {method} | {of_seeds(ranked, '.2f')} "
                     f"(mean {statistics.fmean(ranked):.2f}) | {margins} | {feeling} | {kls} |")
    return "\n".join(lines)


def main():
    parser = Parser("DPO and rDPO on real scored reviews, with 0 and 40 % of the pairs exchanged.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out_dir", default="out-real")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--max_length", type=int, default=96)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    args = parser.parse_args()
    os.makedirs(args.out_dir, exist_ok=True)
    rows = [canonical(row) for _, row in read_rows(args.data)]
    path, finished = os.path.join(args.out_dir, "runs.jsonl"), {}
    if os.path.exists(path):
        finished = {json.dumps(line["job"]): line["result"] for _, line in read_rows(path)}
    for seed in args.seeds:
        jobs = [{"method": "base", "seed": seed}]
        jobs += [{"method": method, "failures": share, "seed": seed}
                 for share in FAILURES for method in METHODS]
        for job in jobs:
            if json.dumps(job) in finished:
                continue
            began = time.monotonic()
            measure = untrained if job["method"] == "base" else one_run
            result = finished[json.dumps(job)] = measure(job, rows, args)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"job": job, "result": result}) + "\n")
            print(f"{job}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(table(finished))
    version = torch.__version__.split("+")[0]
    print(f"\n{time.strftime('%Y-%m-%d')}, torch {version}; one number a seed")


if __name__ == "__main__":
    run(main)
