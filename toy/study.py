"""The study: does the reward model's score make training robust to a teacher that fails? Seven methods in the toy world.

    python toy/study.py --quick        DPO beside rDPO, two worlds, three seeds: two minutes on two cores
    python toy/study.py                everything: assets/noise.png, assets/kl.png and toy/RESULTS.md

A teacher that never fails turns a bad answer into a good one. One that fails leaves it as bad as it was, or turns a good answer into
a bad one, half the time each. What keeps the comparison fair:

    the answers           half the first answers are sampled from the student, and so are many good rewrites; some are good only in part
    two separate judges   a flawed scorer (noise, and a taste for charm and length) scores the training pairs; world.score, which is exact, judges results
    three sets of prompts to train on; to choose each method's learning rate by; and to test on, with slot values that no other set has
    two kinds of failure  at random, which slows a method down; and always on the same half of the prompt types, which misleads it
    the distance moved    each result has its KL from the student before training, so that a slow method is not taken for a robust one

Each run is one call of train.py's own main, in a process of its own with one thread. Finished runs stand in OUT_DIR/runs.jsonl: the
same command after a crash or Ctrl-C goes on from there, and does those again that other code of rdpo.py, train.py or saving.py made.
All is seeded.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import train  # noqa: E402
from behaviour import load_task  # noqa: E402
from data import TOY_STUDENT, load_tokenizer, run, write_whole  # noqa: E402
from eval import answer_logps, converse  # noqa: E402
from generate import generate, load_model  # noqa: E402
from toy import world  # noqa: E402

# ------------------------------------------------------------------------------------------------- what is compared

METHODS = {
    "SFT": ("--loss", "sft"),
    "dSC": ("--loss", "dsc"),
    "DPO": ("--loss", "dpo"),
    "cDPO": ("--loss", "dpo", "--label_smoothing", "0.2"),
    "rDPO": ("--loss", "rdpo", "--temperature", "1"),
    "rDPO, T 0.3": ("--loss", "rdpo", "--temperature", "0.3"),
    "rDPO, T 3": ("--loss", "rdpo", "--temperature", "3"),
}
COMPARED = list(METHODS)[:5]  # the others show what the temperature does, at rDPO's learning rate
LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4)


@dataclass(frozen=True)
class World:
    """How teacher and scorer fail: the share of bad rewrites, where they fall, and the scorer's error in points (world.flawed_score)."""
    failures: float = 0.0
    systematic: bool = False  # all failures on every second frame of the prompts, twice as often there
    noise: float = 1.0
    bias: float = 0.5


RANDOM = [World(failures=rate) for rate in (0.0, 0.2, 0.4, 0.5)]
SYSTEMATIC = World(failures=0.4, systematic=True)
SCORERS = [World(failures=0.4, noise=0.0, bias=0.0), World(failures=0.4, noise=3.0), World(failures=0.4, bias=2.0), World(failures=0.4, bias=4.0)]
TUNED = (RANDOM[0], RANDOM[2], SYSTEMATIC)  # where learning rates are chosen; the other worlds take over that of the nearest
TUNING_SEED = 100

TRAINING, VALIDATION, TEST = 640, 120, 240  # prompts


def tuned_at(conditions):
    """The world in TUNED whose learning rates a world takes over."""
    if conditions.systematic:
        return SYSTEMATIC
    return RANDOM[0] if conditions.failures < 0.3 else RANDOM[2]


@dataclass(frozen=True)
class Run:
    method: str
    conditions: World
    learning_rate: float
    seed: int
    split: str  # of the prompts that the result is measured on: "validation" or "test"


# ----------------------------------------------------------------------------------------------------------- pairs


def prompts_of(split, seed):
    """The rows of a split. Training and validation share slot values but no prompt; the test's slot values are its own."""
    if split == "test":
        return world.make_prompts("held_out", TEST, seed)
    rows = world.make_prompts("train", TRAINING + VALIDATION, seed)
    return rows[:TRAINING] if split == "training" else rows[TRAINING:]


def make_pair(prompt, drafts, fails, rng):
    """(rejected, chosen) for a prompt, from the student's drafts and the scripted teacher."""
    good_drafts = [draft for draft in drafts[1:] if world.score(prompt, draft) >= world.WANTED_SCORE]
    if good_drafts and rng.random() < 0.5:
        rewrite = good_drafts[0]
    else:
        rewrite = world.revise(prompt, rng, "partial" if rng.random() < 0.2 else "good")
    original = drafts[0] if rng.random() < 0.5 else world.original(prompt, rng)
    if not fails:
        return original, rewrite
    if rng.random() < 0.5:
        return rewrite, original  # the teacher spoils a good answer
    return original, next(draft for draft in (*drafts[1:], world.revise(prompt, rng, "tie"), rewrite) if draft != original)  # no better


def training_rows(rows, drafts, conditions, seed):
    """Scored pairs for prompts and the student's drafts; which rewrites fail, and each score's error, hang on the seed alone."""
    scored = []
    for row in rows:
        rng = random.Random(f"{row['prompt']} {seed}")
        chance = conditions.failures
        if conditions.systematic:
            chance *= 2 * (world.parse(row["prompt"])["frame"] % 2)
        rejected, chosen = make_pair(row["prompt"], drafts[row["prompt"]], rng.random() < chance, rng)
        scores = {f"score_{name}": world.flawed_score(row["question"], answer, rng, conditions.noise, conditions.bias)
                  for name, answer in (("rejected", rejected), ("chosen", chosen))}
        scored.append(row | {"rejected": rejected, "chosen": chosen} | scores)
    return scored


def test_rows(rows, drafts, seed):
    """Pairs of a good and a poor answer with exact scores: what a student should rank rightly."""
    pairs = []
    for row in rows:
        rejected, chosen = make_pair(row["prompt"], drafts[row["prompt"]], False, random.Random(f"{row['prompt']} {seed}"))
        scores = {"score_rejected": world.score(row["prompt"], rejected), "score_chosen": world.score(row["prompt"], chosen)}
        pairs += [row | {"rejected": rejected, "chosen": chosen} | scores]
    return pairs


MAX_NEW_TOKENS = 64


def sample(model, tokenizer, prompts, seed):
    """Answers sampled at temperature 1, each with a seed of its own, none of which two of the study's seeds share."""
    return generate(model, tokenizer, prompts, MAX_NEW_TOKENS, temperature=1.0, seeds=range(10_000 * seed, 10_000 * seed + len(prompts)), batch_size=128)


def make_drafts(seed, path):
    """Writes {prompt: answers sampled from the student} for all prompts of a seed: three to train on, one to rank."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(TOY_STUDENT), load_tokenizer(TOY_STUDENT)
    counts = {row["prompt"]: 3 if split == "training" else 1 for split in ("training", "validation", "test") for row in prompts_of(split, seed)}
    answers = sample(model, tokenizer, [prompt for prompt, count in counts.items() for _ in range(count)], seed)
    texts = iter(answer.text for answer in answers)
    write_whole(path, json.dumps({prompt: list(itertools.islice(texts, count)) for prompt, count in counts.items()}))


# ------------------------------------------------------------------------------------------------------------ runs

def measure(model, tokenizer, rows, seed, reference):
    """What the exact judge says of sampled answers, and their KL from the reference, in nats per answer."""
    prompts = [row["prompt"] for row in rows]
    answers = sample(model, tokenizer, prompts, seed)
    kl = (answer_logps(model, answers) - answer_logps(reference, answers)).mean().item()
    return judge(rows, [answer.text for answer in answers]) | {"kl": kl}


def judge(rows, texts):
    return {"score": statistics.fmean(map(world.score, (row["prompt"] for row in rows), texts))} | world.rates(rows, texts)


def train_and_measure(job, out_dir):
    """One run: pairs, train.py, sampled answers. Returns its results, a dict of numbers."""
    torch.set_num_threads(1)  # so that as many runs as there are cores go on side by side
    train.have_matplotlib = lambda: False  # the curves of a run would take a tenth of its time
    began = time.process_time()
    with open(os.path.join(out_dir, f"drafts-{job.seed}.json"), encoding="utf-8") as file:
        drafts = json.load(file)
    rows = prompts_of(job.split, job.seed)
    folder = os.path.join(out_dir, f"run-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for name, pairs in (("pairs", training_rows(prompts_of("training", job.seed), drafts, job.conditions, job.seed)),
                        ("test", test_rows(rows, drafts, job.seed))):
        write_whole(f"{folder}/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in pairs))
    with open(f"{folder}/log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        train.main(["--data", f"{folder}/pairs.jsonl", "--eval_data", f"{folder}/test.jsonl", "--model", TOY_STUDENT, *METHODS[job.method],
                    "--learning_rate", str(job.learning_rate), "--seed", str(job.seed), "--eval_every", "1000", "--max_new_tokens", "1", "--out_dir", f"{folder}/out",
                    "--cache_dir", os.path.join(out_dir, "cache")])
        model, tokenizer, reference = load_model(f"{folder}/out"), load_tokenizer(TOY_STUDENT), load_model(TOY_STUDENT)
        results = measure(model, tokenizer, rows, job.seed, reference)
    with open(f"{folder}/out/metrics.jsonl", encoding="utf-8") as file:
        last = json.loads(file.readlines()[-1])
    shutil.rmtree(folder)
    return results | {"ranked": last["eval/rewards/score_agreement"], "cpu_seconds": time.process_time() - began}


def untrained(seed):
    """The base student and SR, its self-refinement: they learn nothing, so one measurement a seed serves all conditions."""
    torch.set_num_threads(1)
    model, tokenizer, task = load_model(TOY_STUDENT), load_tokenizer(TOY_STUDENT), load_task(os.path.join(ROOT, "toy", "task.toml"))
    rows = prompts_of("test", seed)
    settings = argparse.Namespace(seed=seed, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, batch_size=128)
    answers, _, rewrites = converse(model, tokenizer, [row | {"row": row["id"]} for row in rows], task, settings)
    return {name: judge(rows, [answer.text for answer in texts]) for name, texts in (("base", answers), ("SR", rewrites))}


CODE = hashlib.sha256(b"".join(Path(ROOT, name).read_bytes() for name in ("rdpo.py", "train.py", "saving.py"))).hexdigest()[:12]


def finished_runs(path):
    """{job: result} of the runs in the file that this very code made. A last line that a kill left torn is cut off."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return {json.dumps(line["job"]): line["result"] for line in lines if line.get("code") == CODE}


def finish(jobs, finished, path, work, out_dir, pool):
    """Has the pool run the jobs that are not among the finished; each result is appended to the file at once."""
    waiting = [job for job in dict.fromkeys(jobs) if json.dumps(asdict(job)) not in finished]
    with open(path, "a", encoding="utf-8") as file:
        futures = {pool.submit(work, job, out_dir): job for job in waiting}
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs", unit="run", disable=None, leave=False):
            name = json.dumps(asdict(futures[future]))
            finished[name] = future.result()
            file.write(json.dumps({"code": CODE, "job": json.loads(name), "result": finished[name]}) + "\n")
            file.flush()
    return {job: finished[json.dumps(asdict(job))] for job in jobs}


# ----------------------------------------------------------------------------------------------- tables and figures

T_95 = {3: 4.303, 5: 2.776}  # Student's t for a 95 % interval of the mean of so many seeds


def interval(values):
    """(mean, half the width of its 95 % interval) over the seeds."""
    return statistics.fmean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def cell(values, digits=2):
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(header, lines):
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def column_name(conditions):
    return f"{conditions.failures:.0%}, systematic" if conditions.systematic else f"{conditions.failures:.0%}"


class Results:
    """The finished runs of the study: a list of one number per seed, by method, world and quantity."""

    def __init__(self, runs, baselines):
        self.runs, self.baselines = {}, baselines
        for job, result in runs.items():
            self.runs.setdefault((job.method, job.conditions), []).append(result)

    def of(self, method, conditions, quantity):
        results = [one[method] for one in self.baselines] if method in ("base", "SR") else self.runs[method, conditions]
        return [result[quantity] for result in results]


def table_of(results, quantity, methods, worlds, digits=2):
    """A Markdown table of one quantity: one line per method, one column per world."""
    lines = [[method, *(cell(results.of(method, conditions, quantity), digits) for conditions in worlds)] for method in methods]
    return table(["", *map(column_name, worlds)], lines)


COLOURS = {"SFT": "C1", "dSC": "C2", "DPO": "C3", "cDPO": "C4", "rDPO": "C0"}


def draw_noise(results, path):
    """Behaviour and ranking against the teacher's failures, with 95 % intervals over the seeds."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained", gridspec_kw={"width_ratios": (3, 3, 2)})
    failures = [100 * conditions.failures for conditions in RANDOM]
    for axis, quantity, title in ((axes[0], "score", "Behaviour: score of sampled answers, 0 to 5"), (axes[1], "ranked", "Test pairs ranked rightly")):
        for number, (method, colour) in enumerate(COLOURS.items()):
            means, halves = zip(*(interval(results.of(method, conditions, quantity)) for conditions in RANDOM))
            places = [failure + 0.5 * (number - 2) for failure in failures]  # side by side, so that no bar hides another
            axis.errorbar(places, means, halves, color=colour, label=method, marker="o", capsize=3, linewidth=3 if method == "rDPO" else 1.5)
        axis.set(title=title, xlabel="failing rewrites, % (at random)")
    axes[0].axhline(statistics.fmean(results.of("base", None, "score")), color="grey", linestyle=":", label="untrained")
    axes[0].legend(loc="lower left", ncols=2)
    for place, (method, colour) in enumerate(COLOURS.items()):
        axes[2].errorbar(place, *interval(results.of(method, SYSTEMATIC, "score")), color=colour, marker="o", markersize=9, capsize=5, linewidth=3)
    axes[2].set(title="Score, 40 % failing, all of it\non half of the prompt types", xlim=(-0.5, len(COLOURS) - 0.5), ylim=axes[0].get_ylim())
    axes[2].set_xticks(range(len(COLOURS)), COLOURS)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_kl(tuning, path):
    """Behaviour against KL, one dot per learning rate: a slow method moves along its curve, a misled one is on a lower curve."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(TUNED), figsize=(14, 4.6), layout="constrained", sharey=True)
    for axis, conditions in zip(axes, TUNED):
        for method, colour in COLOURS.items():
            runs = [tuning[Run(method, conditions, rate, TUNING_SEED, "validation")] for rate in LEARNING_RATES]
            axis.plot([one["kl"] for one in runs], [one["score"] for one in runs], color=colour, marker="o", label=method,
                      linewidth=3 if method == "rDPO" else 1.5)
        axis.set(title=f"failing rewrites: {column_name(conditions)}", xlabel="KL from the student before training, nats per answer", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score of sampled answers, 0 to 5")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def best_rates(tuning):
    """{(method, world): the learning rate with the highest score on the validation prompts}."""
    return {(method, conditions): max(LEARNING_RATES, key=lambda rate: tuning[Run(method, conditions, rate, TUNING_SEED, "validation")]["score"])
            for method in COMPARED for conditions in TUNED}


def machine():
    return (f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, "
            f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}")


def report(results, tuning, rates, seeds):
    """The text of RESULTS.md."""
    runs = [*tuning.values(), *itertools.chain(*results.runs.values())]
    cpu_minutes = sum(one["cpu_seconds"] for one in runs) / 60
    main_worlds, methods, difference = [*RANDOM, SYSTEMATIC], COMPARED, {}
    for conditions in main_worlds:
        gaps = [ours - other for ours, other in zip(results.of("rDPO", conditions, "score"), results.of("DPO", conditions, "score"))]
        difference[conditions] = cell(gaps)
    behaviours = [*world.BEHAVIOURS, "well_formed"]
    scorers = [RANDOM[2], *SCORERS]
    parts = [
        "# Results of the study\n\nWritten by `python toy/study.py`; what is compared, and how, stands at its top.\n",
        f"{machine()}; {len(runs)} training runs, {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), {cpu_minutes:.0f} CPU minutes in all. "
        f"Numbers are means over the seeds ± half of a 95 % interval (Student's t). A column is a share of failing rewrites.\n",
        "## Behaviour: score of sampled answers to unseen prompts, 0 to 5\n\n" + table_of(results, "score", ["base", "SR", *methods], main_worlds)
        + "\nrDPO minus DPO, seed by seed: " + ", ".join(f"{column_name(conditions)}: {text}" for conditions, text in difference.items()) + ".\n",
        "## Test pairs ranked rightly\n\n" + table_of(results, "ranked", methods, main_worlds),
        "## KL from the student before training, nats per answer\n\n" + table_of(results, "kl", methods, main_worlds, 1),
        "## Harmless requests that are answered\n\n" + table_of(results, "benign", ["base", "SR", *methods], main_worlds),
        "## Temperature of rDPO\n\n" + table_of(results, "score", [method for method in METHODS if method.startswith("rDPO")], TUNED),
        "## Behaviour by behaviour, 40 % failing at random: share of wanted answers\n\n"
        + table(["", *behaviours], [[method, *(cell(results.of(method, RANDOM[2], name)) for name in behaviours)] for method in ["base", "SR", *methods]]),
        "## A worse scorer, 40 % failing at random: score\n\n"
        + table(["scorer", "rDPO", "dSC", "DPO (asks no scorer)"],
                [[f"noise {one.noise:g}, bias {one.bias:g}", cell(results.of("rDPO", one, "score")), cell(results.of("dSC", one, "score")),
                  cell(results.of("DPO", RANDOM[2], "score"))] for one in scorers]),
        "## Learning rates: score on the validation prompts, and the choice\n\n"
        + table(["", "failing", *(f"{rate:g}" for rate in LEARNING_RATES), "chosen"],
                [[method, column_name(conditions), *(f"{tuning[Run(method, conditions, rate, TUNING_SEED, 'validation')]['score']:.2f}" for rate in LEARNING_RATES),
                  f"{rates[method, conditions]:g}"] for method in COMPARED for conditions in TUNED]),
    ]
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------------------------ main

QUICK_RATE = 4e-4


def main():
    parser = argparse.ArgumentParser(description="Seven methods in the toy world, with a teacher and a scorer that fail.")
    parser.add_argument("--quick", action="store_true", help="DPO and rDPO only, with no failing rewrites and with 40 %% on half of the prompt types, three seeds")
    parser.add_argument("--out_dir", default="out-study", help="finished runs, to go on from")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    args = parser.parse_args()
    began, seeds = time.monotonic(), range(3 if args.quick else 5)
    os.makedirs(args.out_dir, exist_ok=True)
    path = os.path.join(args.out_dir, "runs.jsonl")
    finished = finished_runs(path)

    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        paths = {seed: os.path.join(args.out_dir, f"drafts-{seed}.json") for seed in [*seeds, *([] if args.quick else [TUNING_SEED])]}
        drafts = [pool.submit(make_drafts, seed, path) for seed, path in paths.items() if not os.path.exists(path)]
        baselines = pool.map(untrained, [] if args.quick else seeds)
        for draft in drafts:
            draft.result()
        baselines = list(baselines)

        if args.quick:
            worlds = [RANDOM[0], SYSTEMATIC]
            jobs = [Run(method, conditions, QUICK_RATE, seed, "test") for method in ("DPO", "rDPO") for conditions in worlds for seed in seeds]
            results = Results(finish(jobs, finished, path, train_and_measure, args.out_dir, pool), baselines)
            print("score of sampled answers to unseen prompts, 0 to 5, by the share of failing rewrites (95 % intervals over 3 seeds)\n")
            print(table_of(results, "score", ["DPO", "rDPO"], worlds))
            print("test pairs ranked rightly\n\n" + table_of(results, "ranked", ["DPO", "rDPO"], worlds))
            print(f"{machine()}; {time.monotonic() - began:.0f} s")
            return

        tuning_jobs = [Run(method, conditions, rate, TUNING_SEED, "validation") for method in COMPARED for conditions in TUNED for rate in LEARNING_RATES]
        tuning = finish(tuning_jobs, finished, path, train_and_measure, args.out_dir, pool)
        rates = best_rates(tuning)
        wanted = [(method, conditions) for method in COMPARED for conditions in (*RANDOM, SYSTEMATIC)]
        wanted += [(method, conditions) for method in METHODS if method not in COMPARED for conditions in TUNED]
        wanted += [(method, conditions) for method in ("rDPO", "dSC") for conditions in SCORERS]
        jobs = [Run(method, conditions, rates[method.split(",")[0], tuned_at(conditions)], seed, "test") for method, conditions in wanted for seed in seeds]
        results = Results(finish(jobs, finished, path, train_and_measure, args.out_dir, pool), baselines)
        os.makedirs(os.path.join(ROOT, "assets"), exist_ok=True)
        draw_noise(results, os.path.join(ROOT, "assets", "noise.png"))
        draw_kl(tuning, os.path.join(ROOT, "assets", "kl.png"))
        text = report(results, tuning, rates, seeds)
        write_whole(os.path.join(ROOT, "toy", "RESULTS.md"), text)
        print(text)


if __name__ == "__main__":
    run(main)
