"""Two rounds in the toy world: the student becomes its own teacher. Prints a table.

    python toy/rounds.py [--seeds 0 1 2]

Round 1 trains on toy/scored.jsonl. In round 2 the student answers the training prompts, criticises
and rewrites its answers (eval.py --self_refine), the judge scores them (reward.py), and the student
is trained again. Its reference stays the first one (train.py --reference). Two controls: round 2
against its own start as the reference, and round 1's rows once more instead of new ones.
"""
import contextlib
import os
import statistics
import sys
import tempfile
import threading
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import eval as evaluation  # noqa: E402
import reward  # noqa: E402
import train  # noqa: E402
from infra.command import Parser, run  # noqa: E402
from infra.models import TOY_STUDENT, load_model, load_tokenizer  # noqa: E402
from infra.rows import read_rows  # noqa: E402
from toy import server, study  # noqa: E402

TOY, TASK = os.path.join(ROOT, "toy"), os.path.join(ROOT, "toy", "task.toml")
RATE = "3e-4"  # the toy student's own default, for both rounds


def call(command, *flags):
    """Run a command's main() silently. It may end with exit code 0."""
    with open(os.devnull, "w", encoding="utf-8") as null, contextlib.redirect_stdout(null), \
            contextlib.redirect_stderr(null):
        try:
            command.main([str(flag) for flag in flags])
        except SystemExit as stop:
            if stop.code:
                raise


def train_on(data, out, seed, *flags):
    call(train, "--data", data, "--out_dir", out, "--seed", seed, "--learning_rate", RATE,
         "--max_new_tokens", 1, "--skip_saved_check", "--ref_cache_dir", f"{out}.cache", *flags)
    return out


def score(folder, seed):
    """(mean score by the exact judge, KL from the first student) of sampled held-out answers."""
    rows = [row for _, row in read_rows(os.path.join(TOY, "held_out.jsonl"))]
    found = study.measure(load_model(folder), load_tokenizer(TOY_STUDENT), rows, seed,
                          reference=load_model(TOY_STUDENT))
    return found["score"], found["kl"]


def rounds(seed, url, folder):
    """{what was trained: (score, KL)} for one seed."""
    first = train_on(f"{TOY}/scored.jsonl", f"{folder}/first", seed)
    call(evaluation, "--task", TASK, "--prompts", f"{TOY}/prompts.jsonl", "--self_refine",
         "--base_model", first, "--model", first, "--temperature", 1, "--seed", seed,
         "--max_new_tokens", 64, "--out_dir", f"{folder}/eval")
    data = f"{folder}/scored2.jsonl"
    call(reward, "--task", TASK, "--data", f"{folder}/eval/refined.jsonl", "--out", data,
         "--base_url", url, "--model", "toy")
    runs = {"round 1": first,
            "round 2, first reference": train_on(data, f"{folder}/second", seed, "--model", first,
                                                 "--reference", TOY_STUDENT),
            "round 2, its own reference": train_on(data, f"{folder}/own", seed, "--model", first),
            "round 1's rows again": train_on(f"{TOY}/scored.jsonl", f"{folder}/again", seed,
                                             "--model", first, "--reference", TOY_STUDENT)}
    return {"untrained": score(TOY_STUDENT, seed)} | {name: score(out, seed)
                                                     for name, out in runs.items()}


def main():
    parser = Parser("Two rounds in the toy world.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    train.have_matplotlib = lambda: False
    judge = server.Server(("127.0.0.1", 0), server.Handler)
    judge.args = SimpleNamespace(seed=0, judge_noise=1.0, failure_rate=0.0, latency=0.0,
                                 api_key=None)
    threading.Thread(target=judge.serve_forever, daemon=True).start()
    results = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            results.append(rounds(seed, f"http://127.0.0.1:{judge.server_port}/v1", folder))
    print("| | score of sampled held-out answers, 0 to 5 | KL from the first student, nats |")
    print("|---|---|---|")
    for name in results[0]:
        scores, distances = zip(*(result[name] for result in results))
        print(f"| {name} | {', '.join(f'{number:.2f}' for number in scores)} "
              f"(mean {statistics.fmean(scores):.2f}) | {statistics.fmean(distances):.1f} |")
    print(f"\n{study.machine()}; a column has a number per seed ({args.seeds})")


if __name__ == "__main__":
    run(main)
