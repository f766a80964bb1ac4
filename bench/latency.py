"""How well stages 1 and 2 keep a slow server busy, and how much memory 100,000 prompts take. All against toy/server.py.

    python bench/latency.py

Rate: a server that takes 0.2 s for each reply, 300 rows, 32 at a time. Ideal are 32 / 0.2 s = 160 requests per second. At most 0.94 of it
can be reached: 300 rows are 9.4 rounds of 32, and the last one is not full. Memory: of teacher.py and reward.py going on with a file
in which all but 500 of 100,000 rows are finished, which is when they hold the most.
"""
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import reward  # noqa: E402
import teacher  # noqa: E402
from toy import world  # noqa: E402

LATENCY, ROWS, CONCURRENCY, MANY, LEFT = 0.2, 300, 32, 100_000, 500


def start_server(*flags):
    command = [sys.executable, os.path.join(ROOT, "toy", "server.py"), "--port", "0", *map(str, flags)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return server, server.stdout.readline().split()[1].rstrip(",")


def write(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def measure_rate(folder):
    server, url = start_server("--latency", LATENCY)
    common = ["--task", f"{ROOT}/toy/task.toml", "--base_url", url, "--model", "toy", "--concurrency", str(CONCURRENCY)]
    prompts, synthetic = write(f"{folder}/prompts.jsonl", world.make_prompts("train", ROWS, 0)), f"{folder}/synthetic.jsonl"
    for stage, requests, files in ((teacher, 3 * ROWS, ["--prompts", prompts, "--out", synthetic]),
                                   (reward, 2 * ROWS, ["--data", synthetic, "--out", f"{folder}/scored.jsonl"])):
        began = time.monotonic()
        try:
            stage.main(common + files)
        except SystemExit as stop:
            assert stop.code == 0
        rate, ideal = requests / (time.monotonic() - began), CONCURRENCY / LATENCY
        print(f"{stage.__name__}: {rate:.1f} of {ideal:.0f} requests per second, {rate / ideal:.3f} of the ideal\n")
    server.kill()


def measure_memory(folder):
    server, url = start_server()
    common = ["--task", f"{ROOT}/toy/task.toml", "--base_url", url, "--model", "toy"]
    some = world.make_prompts("train", 900, 0)
    prompts = [some[i % 900] | {"id": f"row-{i:06d}", "note": "n" * 500} for i in range(MANY)]
    with open(f"{ROOT}/toy/scored.jsonl", encoding="utf-8") as file:
        done = json.loads(file.readline())  # by the same task and model
    answers = {"rejected": "r" * 1000, "critique": "c" * 1000, "chosen": "d" * 1000, "teacher": done["teacher"]}
    scores = {"score_rejected": 1.0, "score_chosen": 4.0, "judge": done["judge"] | {"rejected": [], "chosen": []}}
    many = write(f"{folder}/many.jsonl", prompts)
    synthetic = write(f"{folder}/many_synthetic.jsonl", (row | answers for row in prompts[LEFT:]))
    teacher_flags = ["--prompts", many, "--out", synthetic]
    reward_flags = ["--data", synthetic, "--out", write(f"{folder}/many_scored.jsonl", (row | answers | scores for row in prompts[LEFT:]))]
    del prompts
    for name, flags in (("teacher.py", teacher_flags), ("reward.py", reward_flags)):
        child = os.posix_spawn(sys.executable, [sys.executable, os.path.join(ROOT, name), *common, *flags], os.environ)
        _, status, usage = os.wait4(child, 0)
        assert status == 0
        print(f"{name}: {usage.ru_maxrss / 1024:.0f} MB at most, with {MANY:,} rows of which {LEFT} were left to do\n")
    server.kill()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        measure_rate(folder)
        measure_memory(folder)
