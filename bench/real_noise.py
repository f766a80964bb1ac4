"""DPO beside rDPO on real text: a 135 M model, real reviews with real scores, and a teacher that fails at 0 or 40 % of the pairs.

    python bench/real_noise.py --model SMOLLM2_135M_INSTRUCT --data sentiment_scored.json --out_dir out-real

The rows are those of github.com/vicgalle/distilled-self-critique, sentiments/results_sentiment_review.json: asked for negative film
reviews, a teacher rewrote them into positive ones, and a reward model scored both. No film of the held-out rows is trained on. A
failing pair has its two reviews exchanged, its scores stay with the texts: the rewrite is the negative one, and its score says so.

Measured on held-out films: the share of pairs in which the student ranks the review with the higher score first, and the sentiment of
reviews that it writes, from -1 to 1, by a scorer of another kind, the word list of vaderSentiment. Finished runs stand in OUT_DIR/runs.jsonl;
the same command goes on from there.
"""
import argparse
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
from data import canonical, load_tokenizer, read_rows, run, write_whole  # noqa: E402
from eval import answer_logps, bootstrap, mean  # noqa: E402
from generate import generate, load_model  # noqa: E402

FAILURES = (0.0, 0.4)
METHODS = ("dpo", "rdpo")


def title_of(row):
    return re.search(r"movie (.*?)(?:\. Be negative)?$", row["prompt"].strip())[1]


def split(rows, seed):
    """(training rows, held-out rows): a quarter of the films are held out."""
    titles = sorted({title_of(row) for row in rows})
    held_out = set(random.Random(seed).sample(titles, len(titles) // 4))
    return [row for row in rows if title_of(row) not in held_out], [row for row in rows if title_of(row) in held_out]


def exchange(row):
    """The pair as a failing teacher would have made it: the texts change places, and each keeps its score."""
    return row | {"chosen": row["rejected"], "rejected": row["chosen"],
                  "score_chosen": row["score_rejected"], "score_rejected": row["score_chosen"]}


def write_reviews(model, tokenizer, rows, args):
    """Sampled reviews of the held-out films, two a prompt."""
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    return generate(model, tokenizer, prompts, args.max_new_tokens, temperature=1.0, batch_size=32)


def sentiment(answers):
    """(mean, low, high) of the sentiment of the answers, -1 to 1, with a 95 % bootstrap interval."""
    analyzer = SentimentIntensityAnalyzer()
    return bootstrap(mean, [analyzer.polarity_scores(answer.text)["compound"] for answer in answers])


def one_run(job, rows, args):
    """Trains one student and measures it; its results as a dict of numbers."""
    training, held_out = split(rows, job["seed"])
    rng = random.Random(job["seed"])
    failing = set(rng.sample(range(len(training)), round(job["failures"] * len(training))))
    folder = os.path.join(args.out_dir, "run")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    files = {"train": [exchange(row) if i in failing else row for i, row in enumerate(training)], "held_out": held_out}
    for name, part in files.items():
        write_whole(f"{folder}/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    with open(f"{folder}/log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        train.main(["--data", f"{folder}/train.jsonl", "--eval_data", f"{folder}/held_out.jsonl", "--model", args.model, "--loss", job["method"],
                    "--batch_size", "8", "--max_length", str(args.max_length), "--learning_rate", str(args.learning_rate), "--seed", str(job["seed"]),
                    "--eval_every", "1000", "--save_every", "1000", "--max_new_tokens", "1", "--out_dir", f"{folder}/out"])
    with open(f"{folder}/out/metrics.jsonl", encoding="utf-8") as file:
        last = json.loads(file.readlines()[-1])
    model, tokenizer = load_model(f"{folder}/out"), load_tokenizer(args.model)
    reviews = write_reviews(model, tokenizer, held_out, args)
    kl = (answer_logps(model, reviews) - answer_logps(load_model(args.model), reviews)).mean().item()
    shutil.rmtree(folder)
    return {"ranked": last["eval/rewards/score_agreement"], "margin": last["eval/rewards/margins"], "held_out": len(held_out), "kl": kl,
            "sentiment": sentiment(reviews), "reviews": [review.text for review in reviews[:4]]}


def main():
    parser = argparse.ArgumentParser(description="DPO beside rDPO on real scored reviews, with 0 and 40 % of the pairs exchanged.")
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
        with open(path, encoding="utf-8") as file:
            finished = {json.dumps(line["job"]): line["result"] for line in map(json.loads, file)}
    for seed in args.seeds:
        for job in [{"method": "base", "seed": seed}] + [{"method": method, "failures": share, "seed": seed} for share in FAILURES for method in METHODS]:
            if json.dumps(job) in finished:
                continue
            began = time.monotonic()
            if job["method"] == "base":
                reviews = write_reviews(load_model(args.model), load_tokenizer(args.model), split(rows, seed)[1], args)
                result = {"sentiment": sentiment(reviews), "reviews": [review.text for review in reviews[:4]]}
            else:
                result = one_run(job, rows, args)
            finished[json.dumps(job)] = result
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"job": job, "result": result}) + "\n")
            print(f"{job}: {time.monotonic() - began:.0f} s", file=sys.stderr)

    print("| failing pairs | method | held-out pairs ranked by their scores | margin | sentiment of sampled reviews | KL, nats per review |\n" + "| --- " * 6 + "|")
    for share, method in [(None, "base"), *((share, method) for share in FAILURES for method in METHODS)]:
        results = [result for name, result in finished.items() if json.loads(name)["method"] == method and json.loads(name).get("failures") == share]
        of_seeds = lambda values, form: " ".join(format(value, form) for value in values)
        feeling = of_seeds([result["sentiment"][0] for result in results], "+.2f") + f" (mean {statistics.fmean(r['sentiment'][0] for r in results):+.2f})"
        if method == "base":
            print(f"| | base | | | {feeling} | |")
        else:
            ranked = of_seeds([result["ranked"] for result in results], ".2f") + f" (mean {statistics.fmean(result['ranked'] for result in results):.2f})"
            print(f"| {share:.0%} | {method} | {ranked} | {of_seeds([r['margin'] for r in results], '+.2f')} | {feeling} "
                  f"| {of_seeds([r['kl'] for r in results], '.1f')} |")
    print(f"\n{time.strftime('%Y-%m-%d')}, torch {torch.__version__.split('+')[0]}; one number a seed")


if __name__ == "__main__":
    run(main)
