"""The study of tau: what it should be, how it is measured, and where rDPO loses to SFT.

    python toy/tau_study.py        writes toy/TAU.md; see the top of toy/study.py for the world

1. Readings of the paper's equation 2: which function of the scores is tau?
2. Whole, half and graded scores, with T = 1 or T calibrated on 50 labels of simulated people.
3. Systematic failures, where distilled self-critique (dSC) beats rDPO: what helps?
4. Suspects: 5 % of the scores of toy/scored.jsonl are exchanged. Are they the first suspects of
   `eval.py --suspects`?

Nothing is tuned here: five seeds, and the learning rates stand in the tables.
"""
import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

import train  # noqa: E402
from data import load_pairs  # noqa: E402
from eval import answer_logps, margins_of, tau_of  # noqa: E402
from infra.command import Parser, run  # noqa: E402
from infra.files import atomic_write  # noqa: E402
from infra.labels import fit_temperature  # noqa: E402
from infra.models import TOY_STUDENT, load_model, load_tokenizer  # noqa: E402
from infra.rows import read_rows  # noqa: E402
from infra.suspects import suspects  # noqa: E402
from rdpo import LOSSES, judged_tau  # noqa: E402
from toy import study, world  # noqa: E402
from toy.study import RANDOM, SYSTEMATIC, Run, World, cell, column_name, table  # noqa: E402

SEEDS = range(5)

# ------------------------------------------------------------------------------ what is compared

# A reading in which the teacher has a vote of its own: half of the weight, and always for chosen.
LOSSES["voting"] = LOSSES["rdpo"]._replace(target=lambda judged: (1 + judged) / 2)

READINGS = {
    "sigmoid(gap / T), T 1: rDPO": ("--loss", "rdpo"),
    "the sign of the gap: T near 0": ("--loss", "rdpo", "--tau_temperature", "1e-6"),
    "half teacher, half sigmoid(gap)": ("--loss", "voting"),
    "1, the teacher alone: DPO": ("--loss", "dpo"),
}
FAILURES = {"0%": RANDOM[0], "40%": RANDOM[2], "40%, systematic": SYSTEMATIC,
            "40%, judge with bias 2": World(failures=0.4, bias=2.0)}
STEPS = {"whole scores": 1.0, "half points": 0.5, "graded scores": 0.0}


def gap(row):
    return row["score_chosen"] - row["score_rejected"]


def calibrated(rows, seed):
    """Flags with T fitted to what simulated people say of 50 pairs. They see the exact scores."""
    rng, gaps, shares = random.Random(f"people {seed}"), [], []
    for row in rng.sample(rows, 50):
        exact = (world.score(row["prompt"], row["chosen"])
                 - world.score(row["prompt"], row["rejected"]))
        wins = rng.random() < 1 / (1 + math.exp(-exact))
        gaps.append(gap(row))
        shares.append(0.5 if exact == 0 else float(wins))
    temperature, _, _ = fit_temperature(np.array(gaps), np.array(shares))
    return ("--loss", "rdpo", "--tau_temperature", str(min(temperature, 100.0))), rows


def better_first(rows):
    """The rows with the answer that scored higher as chosen. rDPO does not see a difference."""
    swap = {"chosen": "rejected", "rejected": "chosen", "score_chosen": "score_rejected",
            "score_rejected": "score_chosen"}
    return [row | {name: row[swap[name]] for name in swap} if gap(row) < 0 else row
            for row in rows]


def decided(rows):
    return [row for row in rows if gap(row) != 0]


HELP = {
    "dSC": ("--loss", "dsc"),
    "rDPO": ("--loss", "rdpo"),
    "rDPO, ties left out": lambda rows, seed: (("--loss", "rdpo"), decided(rows)),
    "rDPO, gaps below 1 left out": lambda rows, seed: (
        ("--loss", "rdpo"), [row for row in rows if abs(gap(row)) >= 1]),
    "rDPO, 2 epochs": ("--loss", "rdpo", "--epochs", "2"),
    "rDPO, beta 0.3": ("--loss", "rdpo", "--beta", "0.3"),
    "SFT on the better answer": lambda rows, seed: (("--loss", "sft"), better_first(decided(rows))),
    "rDPO + 0.3 SFT on the better answer": lambda rows, seed: (
        ("--loss", "rdpo", "--sft_weight", "0.3"), better_first(rows)),
}
study.METHODS |= {"calibrated": calibrated, **READINGS, **HELP}


def work(job, out_dir):
    """study's own, in a process that has imported this file."""
    return study.train_and_measure(job, out_dir)


# ---------------------------------------------------------------------------------------- suspects


def precision(seed):
    """Share of exchanged rows among a student's first suspects, as many as were exchanged."""
    torch.set_num_threads(1)
    train.have_matplotlib = lambda: False
    rows = [row for _, row in read_rows(os.path.join(ROOT, "toy", "scored.jsonl"))]
    rng, count = random.Random(seed), round(0.05 * len(rows))
    unequal = [i for i, row in enumerate(rows) if gap(row) != 0]
    wrong = set(rng.sample(unequal, count))
    for i in wrong:
        rows[i]["score_chosen"], rows[i]["score_rejected"] = (rows[i]["score_rejected"],
                                                             rows[i]["score_chosen"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        path = os.path.join(folder, "rows.jsonl")
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        train.main(["--data", path, "--out_dir", f"{folder}/out", "--ref_cache_dir", folder,
                    "--seed", str(seed), "--max_new_tokens", "1", "--skip_saved_check"])
        pairs, _ = load_pairs(path, load_tokenizer(TOY_STUDENT), 1024, needs_scores=True)
        logps, base_logps = (answer_logps(load_model(name), pairs)
                             for name in (f"{folder}/out", TOY_STUDENT))
    first = suspects(tau_of(pairs), margins_of(logps, base_logps))[:count]
    return len(wrong & set(first)) / count


# ------------------------------------------------------------------------------------------ tables


def scores_of(runs, method, conditions, rate):
    return [runs[Run(method, conditions, rate, seed, "test")]["score"] for seed in SEEDS]


def jobs_of(methods, worlds, rates):
    return [Run(method, conditions, rate, seed, "test") for method in methods
            for conditions in worlds for rate in rates for seed in SEEDS]


def pairs_in(conditions, seed, out_dir):
    with open(study.drafts_path(seed, out_dir), encoding="utf-8") as file:
        drafts = json.load(file)
    return study.training_rows(study.prompts_of("training", seed), drafts, conditions, seed)


def steps_table(runs, worlds, out_dir):
    lines = []
    for name, step in STEPS.items():
        of_world = [World(failures=each.failures, systematic=each.systematic, step=step)
                    for each in worlds]
        pairs = [pairs_in(of_world[1], seed, out_dir) for seed in SEEDS]
        ties = statistics.fmean(gap(row) == 0 for rows in pairs for row in rows)
        for method, label in ((list(READINGS)[0], "1"), ("calibrated", "calibrated")):
            fitted = [float(calibrated(rows, seed)[0][-1]) for rows, seed in zip(pairs, SEEDS)]
            lines.append([name, f"{100 * ties:.0f} %",
                          label + (f", {min(fitted):.2f} to {max(fitted):.2f}"
                                   if method == "calibrated" else ""),
                          *(cell(scores_of(runs, method, conditions, 4e-4))
                            for conditions in of_world)])
    return table(["", "ties", "T", *map(column_name, worlds)], lines)


def main():
    parser = Parser("The study of tau in the toy world.")
    parser.add_argument("--out_dir", default="out-tau", help="where finished runs are kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="runs side by side, one thread each")
    args = parser.parse_args()
    os.makedirs(args.out_dir, exist_ok=True)
    worlds = [RANDOM[0], RANDOM[2], SYSTEMATIC]
    stepped = [World(failures=each.failures, systematic=each.systematic, step=step)
               for each in worlds for step in STEPS.values()]
    rates = (2e-4, 4e-4)
    jobs = [*jobs_of(READINGS, FAILURES.values(), [4e-4]),
            *jobs_of([list(READINGS)[0], "calibrated"], stepped, [4e-4]),
            *jobs_of(HELP, [SYSTEMATIC], rates), *jobs_of(HELP, [RANDOM[0], RANDOM[2]], [4e-4])]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(study.make_drafts, SEEDS, [args.out_dir] * len(SEEDS)))
        runs = study.finish(jobs, args.out_dir, pool, work)
        found = list(pool.map(precision, SEEDS))
    readings = table(["tau", *FAILURES], [
        [name, *(cell(scores_of(runs, name, conditions, 4e-4)) for conditions in FAILURES.values())]
        for name in READINGS])
    helping = table(
        ["", *(f"systematic, {rate:g}" for rate in rates), "0%, 0.0004", "40%, 0.0004"],
        [[name, *(cell(scores_of(runs, name, SYSTEMATIC, rate)) for rate in rates),
          *(cell(scores_of(runs, name, conditions, 4e-4)) for conditions in worlds[:2])]
         for name in HELP])
    text = "\n".join([
        "# The study of tau\n\nWritten by `python toy/tau_study.py`; what is compared, and how, "
        "stands at its top.\n",
        f"{study.machine()}; {len(runs)} training runs, 5 seeds. Score of sampled answers to "
        "unseen prompts, 0 to 5: means ± half of a 95 % interval (Student's t).\n",
        "## Readings of equation 2 (learning rate 0.0004)\n\n" + readings,
        "## Whole, half and graded scores, T guessed and calibrated (learning rate 0.0004)\n\n"
        + steps_table(runs, worlds, args.out_dir),
        "## Systematic failures: what helps\n\n" + helping,
        "## Suspects: precision at 5 %, 5 % of the scores exchanged\n\n"
        f"{', '.join(f'{share:.2f}' for share in found)} (mean {statistics.fmean(found):.2f})\n"])
    atomic_write(os.path.join(ROOT, "toy", "TAU.md"), text)
    print(text)


if __name__ == "__main__":
    run(main)
