"""The study: does the reward model's score make training robust to a teacher that fails?

    python toy/study.py --quick    DPO and rDPO, two worlds, three seeds: two minutes on two cores
    python toy/study.py            everything: assets/noise.png, assets/kl.png, toy/RESULTS.md

Seven methods in the toy world. A perfect teacher turns a bad answer into a good one. A failing
teacher leaves it as bad as it was, or turns a good answer into a bad one, half the time each.
What makes the comparison fair:

    answers          Half of the first answers, and many good rewrites, are sampled from the
                     student. Some rewrites are only partly good.
    two judges       A flawed scorer (noise, a bias for charm and length) scores the training
                     pairs. world.score, which is exact, measures the results.
    three splits     One trains, one chooses the learning rate of each method, one tests. The test
                     prompts have slot values that no other split has.
    two failures     At random, which slows a method down. Or always on the same half of the
                     prompt types, which misleads it.
    distance moved   Each result has its KL from the student before training, so that a slow
                     method does not look robust.

Each run is one call of train.py's main in its own process with one thread. OUT_DIR/runs.jsonl
keeps finished runs: the same command continues after a crash or Ctrl-C. It repeats runs of other
versions of rdpo.py, train.py and infra/checkpoint.py. Everything is seeded.
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
from data import encode_prompt  # noqa: E402
from eval import answer_logps, generate_turns  # noqa: E402
from infra.command import Parser, run  # noqa: E402
from infra.files import atomic_write  # noqa: E402
from infra.generate import generate  # noqa: E402
from infra.models import TOY_STUDENT, load_model, load_tokenizer  # noqa: E402
from infra.task import load_task  # noqa: E402
from toy import world  # noqa: E402

# ------------------------------------------------------------------------------ what is compared

METHODS = {  # flags of train.py, or a function: (rows, seed) -> flags, rows
    "SFT": ("--loss", "sft"),
    "dSC": ("--loss", "dsc"),
    "DPO": ("--loss", "dpo"),
    "cDPO": ("--loss", "dpo", "--label_smoothing", "0.2"),
    "rDPO": ("--loss", "rdpo", "--tau_temperature", "1"),
    "rDPO, T 0.3": ("--loss", "rdpo", "--tau_temperature", "0.3"),
    "rDPO, T 3": ("--loss", "rdpo", "--tau_temperature", "3"),
}
COMPARED = list(METHODS)[:5]  # the others vary the temperature, at rDPO's learning rate
LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)


@dataclass(frozen=True)
class World:
    """How teacher and scorer fail. For noise and bias, in points, see world.flawed_score."""
    failures: float = 0.0  # share of bad rewrites
    systematic: bool = False  # all on every second frame of the prompts, twice as often there
    noise: float = 1.0
    bias: float = 0.5
    step: float = 0.5  # scores are multiples of this, 0: not rounded


RANDOM = [World(failures=rate) for rate in (0.0, 0.2, 0.4, 0.5)]
SYSTEMATIC = World(failures=0.4, systematic=True)
SCORERS = [World(failures=0.4, noise=0.0, bias=0.0), World(failures=0.4, noise=3.0),
           World(failures=0.4, bias=2.0), World(failures=0.4, bias=4.0)]
TUNED = (RANDOM[0], RANDOM[2], SYSTEMATIC)  # learning rates are chosen here: see tuned_at
TUNING_SEEDS = (100, 101, 102)  # one alone chose by differences of 0.03

TRAINING, VALIDATION, TEST = 640, 120, 240  # prompts


def tuned_at(conditions):
    """The world in TUNED whose learning rates a world uses."""
    if conditions.systematic:
        return SYSTEMATIC
    return RANDOM[0] if conditions.failures < 0.3 else RANDOM[2]


@dataclass(frozen=True)
class Run:
    method: str
    conditions: World
    learning_rate: float
    seed: int
    split: str  # measured on: "validation" or "test"


# ----------------------------------------------------------------------------------------- pairs


def prompts_of(split, seed):
    """The rows of a split. Training and validation share slot values but no prompt."""
    if split == "test":
        return world.make_prompts("held_out", TEST, seed)
    rows = world.make_prompts("train", TRAINING + VALIDATION, seed)
    return rows[:TRAINING] if split == "training" else rows[TRAINING:]


def make_pair(prompt, drafts, fails, rng):
    """(rejected, chosen) for a prompt, from the student's drafts and the scripted teacher."""
    good_drafts = [draft for draft in drafts[1:]
                   if world.score(prompt, draft) >= world.WANTED_SCORE]
    if good_drafts and rng.random() < 0.5:
        rewrite = good_drafts[0]
    else:
        rewrite = world.revise(prompt, rng, "partial" if rng.random() < 0.2 else "good")
    original = drafts[0] if rng.random() < 0.5 else world.original(prompt, rng)
    if not fails:
        return original, rewrite
    if rng.random() < 0.5:
        return rewrite, original  # the teacher spoils a good answer
    no_better = (*drafts[1:], world.revise(prompt, rng, "tie"), rewrite)
    return original, next(draft for draft in no_better if draft != original)


def training_rows(rows, drafts, conditions, seed):
    """Scored pairs. The seed alone decides which rewrites fail, and each score's error."""
    scored = []
    for row in rows:
        rng = random.Random(f"{row['prompt']} {seed}")
        chance = conditions.failures
        if conditions.systematic:
            chance *= 2 * (world.parse(row["prompt"])["frame"] % 2)
        fails = rng.random() < chance
        rejected, chosen = make_pair(row["prompt"], drafts[row["prompt"]], fails, rng)
        scores = {f"score_{name}": world.flawed_score(row["question"], answer, rng,
                                                      conditions.noise, conditions.bias,
                                                      conditions.step)
                  for name, answer in (("rejected", rejected), ("chosen", chosen))}
        scored.append(row | {"rejected": rejected, "chosen": chosen} | scores)
    return scored


def test_rows(rows, drafts, seed):
    """Pairs of a good and a poor answer with exact scores: what a student should rank right."""
    pairs = []
    for row in rows:
        prompt = row["prompt"]
        rng = random.Random(f"{prompt} {seed}")
        rejected, chosen = make_pair(prompt, drafts[prompt], False, rng)
        pairs.append(row | {"rejected": rejected, "chosen": chosen,
                            "score_rejected": world.score(prompt, rejected),
                            "score_chosen": world.score(prompt, chosen)})
    return pairs


MAX_NEW_TOKENS = 64


def sample(model, tokenizer, prompts, seed):
    """Answers at temperature 1. No two prompts and no two of the study's seeds share a seed."""
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    seeds = range(10_000 * seed, 10_000 * seed + len(prompts))
    return generate(model, tokenizer, prompt_ids, MAX_NEW_TOKENS, temperature=1.0, seeds=seeds,
                    batch_size=128)


def drafts_path(seed, out_dir):
    return os.path.join(out_dir, f"drafts-{seed}.json")


def make_drafts(seed, out_dir):
    """Write {prompt: sampled answers of the student} of all splits: three to train, one to rank."""
    path = drafts_path(seed, out_dir)
    if os.path.exists(path):
        return
    torch.set_num_threads(1)
    model, tokenizer = load_model(TOY_STUDENT), load_tokenizer(TOY_STUDENT)
    counts = {row["prompt"]: 3 if split == "training" else 1
              for split in ("training", "validation", "test") for row in prompts_of(split, seed)}
    prompts = [prompt for prompt, count in counts.items() for _ in range(count)]
    texts = iter(answer.text for answer in sample(model, tokenizer, prompts, seed))
    drafts = {prompt: list(itertools.islice(texts, count)) for prompt, count in counts.items()}
    atomic_write(path, json.dumps(drafts))


def all_drafts(seeds, out_dir, pool):
    """make_drafts for each seed, side by side."""
    print(f"sampling first answers, {len(seeds)} seeds", flush=True)
    list(tqdm(pool.map(make_drafts, seeds, itertools.repeat(out_dir)), total=len(seeds),
              desc="seeds", unit="seed", disable=None, leave=False))


# ------------------------------------------------------------------------------------------ runs


def measure(model, tokenizer, rows, seed, reference):
    """The exact judge's results on sampled answers, and their KL in nats per answer."""
    answers = sample(model, tokenizer, [row["prompt"] for row in rows], seed)
    kl = (answer_logps(model, answers) - answer_logps(reference, answers)).mean().item()
    return judge(rows, [answer.text for answer in answers]) | {"kl": kl}


def judge(rows, texts):
    scores = map(world.score, (row["prompt"] for row in rows), texts)
    return {"score": statistics.fmean(scores)} | world.rates(rows, texts)


def train_and_measure(job, out_dir):
    """One run: pairs, train.py, sampled answers. Returns its results, a dict of numbers."""
    torch.set_num_threads(1)  # one run per core, side by side
    train.have_matplotlib = lambda: False  # drawing curves would take a tenth of the time
    began = time.process_time()
    with open(drafts_path(job.seed, out_dir), encoding="utf-8") as file:
        drafts = json.load(file)
    rows = prompts_of(job.split, job.seed)
    folder = os.path.join(out_dir, f"run-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    pairs = training_rows(prompts_of("training", job.seed), drafts, job.conditions, job.seed)
    flags = METHODS[job.method]
    if callable(flags):
        flags, pairs = flags(pairs, job.seed)
    files = {"pairs": pairs, "test": test_rows(rows, drafts, job.seed)}
    for name, pairs in files.items():
        atomic_write(f"{folder}/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in pairs))
    with open(f"{folder}/log.txt", "w", encoding="utf-8") as log, \
            contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        train.main([
            "--data", f"{folder}/pairs.jsonl", "--eval_data", f"{folder}/test.jsonl",
            "--model", TOY_STUDENT, *flags, "--seed", str(job.seed),
            "--learning_rate", str(job.learning_rate), "--eval_every", "1000",
            "--max_new_tokens", "1", "--out_dir", f"{folder}/out",
            "--ref_cache_dir", os.path.join(out_dir, "cache")])
        model, tokenizer = load_model(f"{folder}/out"), load_tokenizer(TOY_STUDENT)
        results = measure(model, tokenizer, rows, job.seed, reference=load_model(TOY_STUDENT))
    with open(f"{folder}/out/metrics.jsonl", encoding="utf-8") as file:
        last = json.loads(file.readlines()[-1])
    shutil.rmtree(folder)
    return results | {"ranked": last["eval/rewards/score_agreement"],
                      "cpu_seconds": time.process_time() - began}


def untrained(seed):
    """Results of the base student and of SR, its self-refinement: the same for all conditions."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(TOY_STUDENT), load_tokenizer(TOY_STUDENT)
    task = load_task(os.path.join(ROOT, "toy", "task.toml"))
    rows = prompts_of("test", seed)
    settings = argparse.Namespace(seed=seed, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0,
                                  batch_size=128)
    answers, _, rewrites = generate_turns(
        model, tokenizer, [row | {"row": row["id"]} for row in rows], task, settings)
    return {name: judge(rows, [answer.text for answer in turn])
            for name, turn in (("base", answers), ("SR", rewrites))}


CODE = hashlib.sha256(b"".join(
    Path(ROOT, name).read_bytes() for name in ("rdpo.py", "train.py", "infra/checkpoint.py")
)).hexdigest()[:12]


def finished_runs(path):
    """{job: result} of the runs in a file that this code made. A torn last line is cut off."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))
    return {json.dumps(line["job"]): line["result"] for line in lines if line.get("code") == CODE}


def finish(jobs, out_dir, pool, work=train_and_measure):
    """{job: result}. The pool runs the unfinished jobs; each result is at once kept and printed."""
    path = os.path.join(out_dir, "runs.jsonl")
    finished = finished_runs(path)
    waiting = [job for job in dict.fromkeys(jobs) if json.dumps(asdict(job)) not in finished]
    with open(path, "a", encoding="utf-8") as file:
        futures = {pool.submit(work, job, out_dir): job for job in waiting}
        for number, future in enumerate(tqdm(as_completed(futures), total=len(futures), desc="runs",
                                             unit="run", disable=None, leave=False), 1):
            job = futures[future]
            name = json.dumps(asdict(job))
            finished[name] = future.result()
            line = {"code": CODE, "job": json.loads(name), "result": finished[name]}
            file.write(json.dumps(line) + "\n")
            file.flush()
            tqdm.write(f"run {number} of {len(futures)}: {job.method}, failing "
                       f"{column_name(job.conditions)}, learning rate {job.learning_rate:g}, seed "
                       f"{job.seed}: score {finished[name]['score']:.2f}")
            sys.stdout.flush()  # to a file or a pipe it is buffered
    return {job: finished[json.dumps(asdict(job))] for job in jobs}


# ---------------------------------------------------------------------------- tables and figures

T_95 = {3: 4.303, 5: 2.776}  # number of seeds -> Student's t of a 95 % interval of the mean


def interval(values):
    """(mean, half the width of its 95 % interval) over the seeds."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def cell(values, digits=2):
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(header, lines):
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def column_name(conditions):
    return f"{conditions.failures:.0%}" + (", systematic" if conditions.systematic else "")


class Results:
    """The finished runs: lists of one number per seed, by method, world and quantity."""

    def __init__(self, runs, baselines):
        self.runs, self.baselines = {}, baselines
        for job, result in runs.items():
            self.runs.setdefault((job.method, job.conditions), []).append(result)

    def of(self, method, conditions, quantity):
        if method in ("base", "SR"):
            results = [baseline[method] for baseline in self.baselines]
        else:
            results = self.runs[method, conditions]
        return [result[quantity] for result in results]


def table_of(results, quantity, methods, worlds, digits=2):
    """A Markdown table of one quantity: a line per method, a column per world."""
    lines = [[method, *(cell(results.of(method, conditions, quantity), digits)
                        for conditions in worlds)] for method in methods]
    return table(["", *map(column_name, worlds)], lines)


COLOURS = {"SFT": "C1", "dSC": "C2", "DPO": "C3", "cDPO": "C4", "rDPO": "C0"}


def pyplot():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def draw_noise(results, path):
    """Behaviour and ranking against the teacher's failures, with 95 % intervals over seeds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained",
                                gridspec_kw={"width_ratios": (3, 3, 2)})
    failures = [100 * conditions.failures for conditions in RANDOM]
    for axis, quantity, title in (
            (axes[0], "score", "Behaviour: score of sampled answers, 0 to 5"),
            (axes[1], "ranked", "Test pairs ranked rightly")):
        for number, (method, colour) in enumerate(COLOURS.items()):
            means, halves = zip(*(interval(results.of(method, conditions, quantity))
                                  for conditions in RANDOM))
            # Shifted sideways, so that no bar hides another.
            x = [failure + 0.5 * (number - 2) for failure in failures]
            axis.errorbar(x, means, halves, color=colour, label=method, marker="o", capsize=3,
                          linewidth=3 if method == "rDPO" else 1.5)
        axis.set(title=title, xlabel="failing rewrites, % (at random)")
    axes[0].axhline(statistics.fmean(results.of("base", None, "score")), color="grey",
                    linestyle=":", label="untrained")
    axes[0].legend(loc="lower left", ncols=2)
    for x, (method, colour) in enumerate(COLOURS.items()):
        axes[2].errorbar(x, *interval(results.of(method, SYSTEMATIC, "score")), color=colour,
                         marker="o", markersize=9, capsize=5, linewidth=3)
    axes[2].set(title="Score, 40 % failing, all of it\non half of the prompt types",
                xlim=(-0.5, len(COLOURS) - 0.5), ylim=axes[0].get_ylim())
    axes[2].set_xticks(range(len(COLOURS)), COLOURS)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_kl(tuning, path):
    """Behaviour against KL, a dot per learning rate.

    A slow method moves along its curve; a misled method is on a lower curve.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, len(TUNED), figsize=(14, 4.6), layout="constrained",
                                sharey=True)
    for axis, conditions in zip(axes, TUNED):
        for method, colour in COLOURS.items():
            kl, score = ([tuning_mean(tuning, method, conditions, rate, quantity)
                          for rate in LEARNING_RATES] for quantity in ("kl", "score"))
            axis.plot(kl, score, color=colour, marker="o", label=method,
                      linewidth=3 if method == "rDPO" else 1.5)
        axis.set(title=f"failing rewrites: {column_name(conditions)}", xscale="log",
                 xlabel="KL from the student before training, nats per answer")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score of sampled answers, 0 to 5")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tuning_runs(method, conditions, rate):
    return [Run(method, conditions, rate, seed, "validation") for seed in TUNING_SEEDS]


def tuning_mean(tuning, method, conditions, rate, quantity):
    """The mean of a quantity over the validation seeds."""
    return statistics.fmean(tuning[job][quantity] for job in tuning_runs(method, conditions, rate))


def best_rates(tuning):
    """{(method, world): the learning rate with the highest score on the validation prompts}."""
    return {(method, conditions): max(
                LEARNING_RATES,
                key=lambda rate: tuning_mean(tuning, method, conditions, rate, "score"))
            for method in COMPARED for conditions in TUNED}


def machine():
    return (f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), "
            f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, "
            f"transformers {transformers.__version__}")


def report(results, tuning, rates, seeds):
    """The text of RESULTS.md."""
    runs = [*tuning.values(), *itertools.chain(*results.runs.values())]
    cpu_minutes = sum(run["cpu_seconds"] for run in runs) / 60
    worlds, trained, everyone = [*RANDOM, SYSTEMATIC], COMPARED, ["base", "SR", *COMPARED]
    differences = []
    for conditions in worlds:
        gaps = [ours - other for ours, other in zip(results.of("rDPO", conditions, "score"),
                                                    results.of("DPO", conditions, "score"))]
        differences.append(f"{column_name(conditions)}: {cell(gaps)}")
    behaviours = [*world.BEHAVIOURS, "well_formed"]
    by_behaviour = [[method, *(cell(results.of(method, RANDOM[2], name)) for name in behaviours)]
                    for method in everyone]
    by_scorer = [[f"noise {scorer.noise:g}, bias {scorer.bias:g}",
                  cell(results.of("rDPO", scorer, "score")),
                  cell(results.of("dSC", scorer, "score")),
                  cell(results.of("DPO", RANDOM[2], "score"))] for scorer in (RANDOM[2], *SCORERS)]
    by_rate = [[method, column_name(conditions),
                *(f"{tuning_mean(tuning, method, conditions, rate, 'score'):.2f}"
                  for rate in LEARNING_RATES), f"{rates[method, conditions]:g}"]
               for method in COMPARED for conditions in TUNED]
    return "\n".join([
        "# Results of the study\n\nWritten by `python toy/study.py`; what is compared, and how, "
        "stands at its top.\n",
        f"{machine()}; {len(runs)} training runs, {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), "
        f"{cpu_minutes:.0f} CPU minutes in all. Numbers are means over the seeds ± half of a 95 % "
        "interval (Student's t). A column is a share of failing rewrites.\n",
        "## Behaviour: score of sampled answers to unseen prompts, 0 to 5\n\n"
        + table_of(results, "score", everyone, worlds)
        + f"\nrDPO minus DPO, seed by seed: {', '.join(differences)}.\n",
        "## Test pairs ranked rightly\n\n" + table_of(results, "ranked", trained, worlds),
        "## KL from the student before training, nats per answer\n\n"
        + table_of(results, "kl", trained, worlds, 1),
        "## Harmless requests that are answered\n\n"
        + table_of(results, "benign", everyone, worlds),
        "## Temperature of rDPO\n\n"
        + table_of(results, "score", [name for name in METHODS if name.startswith("rDPO")], TUNED),
        "## Behaviour by behaviour, 40 % failing at random: share of wanted answers\n\n"
        + table(["", *behaviours], by_behaviour),
        "## A worse scorer, 40 % failing at random: score\n\n"
        + table(["scorer", "rDPO", "dSC", "DPO (asks no scorer)"], by_scorer),
        f"## Learning rates: score on the validation prompts of {len(TUNING_SEEDS)} other seeds, "
        "and the choice\n\n"
        + table(["", "failing", *(f"{rate:g}" for rate in LEARNING_RATES), "chosen"], by_rate),
    ])


# ------------------------------------------------------------------------------------------ main


def main():
    parser = Parser("Seven methods in the toy world, with a teacher and a scorer that fail.")
    parser.add_argument("--quick", action="store_true",
                        help="DPO and rDPO only, no failures or 40 %% systematic ones, three seeds")
    parser.add_argument("--out_dir", default="out-study", help="where finished runs are kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="runs side by side, one thread each")
    args = parser.parse_args()
    os.makedirs(args.out_dir, exist_ok=True)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        (quick_study if args.quick else full_study)(args.out_dir, pool)


def quick_study(out_dir, pool):
    began, seeds = time.monotonic(), range(3)
    methods, worlds = ("DPO", "rDPO"), (RANDOM[0], SYSTEMATIC)
    all_drafts(seeds, out_dir, pool)
    jobs = [Run(method, conditions, 4e-4, seed, "test")
            for method in methods for conditions in worlds for seed in seeds]
    results = Results(finish(jobs, out_dir, pool), baselines=[])
    print("score of sampled answers to unseen prompts, 0 to 5, by the share of failing rewrites "
          "(95 % intervals over 3 seeds)\n")
    print(table_of(results, "score", methods, worlds))
    print("test pairs ranked rightly\n\n" + table_of(results, "ranked", methods, worlds))
    print(f"{machine()}; {time.monotonic() - began:.0f} s")


def full_study(out_dir, pool):
    seeds = range(5)
    baselines = pool.map(untrained, seeds)
    all_drafts([*seeds, *TUNING_SEEDS], out_dir, pool)
    tuning = finish([job for method in COMPARED for conditions in TUNED for rate in LEARNING_RATES
                     for job in tuning_runs(method, conditions, rate)], out_dir, pool)
    rates = best_rates(tuning)
    wanted = [(method, conditions) for method in COMPARED for conditions in (*RANDOM, SYSTEMATIC)]
    wanted += [(method, conditions) for method in METHODS if method not in COMPARED
               for conditions in TUNED]
    wanted += [(method, conditions) for method in ("rDPO", "dSC") for conditions in SCORERS]
    jobs = [Run(method, conditions, rates[method.split(",")[0], tuned_at(conditions)], seed, "test")
            for method, conditions in wanted for seed in seeds]
    results = Results(finish(jobs, out_dir, pool), list(baselines))
    os.makedirs(os.path.join(ROOT, "assets"), exist_ok=True)
    draw_noise(results, os.path.join(ROOT, "assets", "noise.png"))
    draw_kl(tuning, os.path.join(ROOT, "assets", "kl.png"))
    text = report(results, tuning, rates, seeds)
    atomic_write(os.path.join(ROOT, "toy", "RESULTS.md"), text)
    print(text)


if __name__ == "__main__":
    run(main)
