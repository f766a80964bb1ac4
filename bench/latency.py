"""Request rate of stages 1 and 2 with a slow server, and their memory with 100,000 prompts.

    python bench/latency.py

Rate: toy/server.py takes 0.2 s per reply; 300 rows, 32 at a time. The ideal is 32 / 0.2 s = 160
requests per second. At most 0.94 of that is possible: 300 rows are 9.4 rounds of 32, and the last
round is not full. Memory: the peak of teacher.py and reward.py when they continue a file with all
but 500 of 100,000 rows finished, which is when they hold the most; 64 rows in work at once.
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
    script = os.path.join(ROOT, "toy", "server.py")
    command = [sys.executable, script, "--port", "0", *map(str, flags)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return server, server.stdout.readline().split()[1].rstrip(",")


def write(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def measure_rate(folder):
    server, url = start_server("--latency", LATENCY)
    common = ["--task", f"{ROOT}/toy/task.toml", "--base_url", url, "--model", "toy",
              "--concurrency", str(CONCURRENCY)]
    prompts = write(f"{folder}/prompts.jsonl", world.make_prompts("train", ROWS, 0))
    synthetic, scored = f"{folder}/synthetic.jsonl", f"{folder}/scored.jsonl"
    for stage, requests, files in (
            (teacher, 3 * ROWS, ["--prompts", prompts, "--out", synthetic]),
            (reward, 2 * ROWS, ["--data", synthetic, "--out", scored])):
        start = time.monotonic()
        try:
            stage.main(common + files)
        except SystemExit as stop:
            assert stop.code == 0
        rate, ideal = requests / (time.monotonic() - start), CONCURRENCY / LATENCY
        print(f"{stage.__name__}: {rate:.1f} of {ideal:.0f} requests per second, "
              f"{rate / ideal:.3f} of the ideal\n")
    server.kill()


def measure_memory(folder):
    server, url = start_server()
    common = ["--task", f"{ROOT}/toy/task.toml", "--base_url", url, "--model", "toy",
              "--concurrency", "64"]
    distinct = world.make_prompts("train", 900, 0)
    prompts = [distinct[i % 900] | {"id": f"row-{i:06d}", "note": "n" * 500} for i in range(MANY)]
    with open(f"{ROOT}/toy/scored.jsonl", encoding="utf-8") as file:
        finished = json.loads(file.readline())  # its provenance is this task and model
    answers = {"rejected": "r" * 1000, "critique": "c" * 1000, "chosen": "d" * 1000,
               "teacher": finished["teacher"]}
    scores = {"score_rejected": 1.0, "score_chosen": 4.0,
              "judge": finished["judge"] | {"rejected": [], "chosen": []}}
    many = write(f"{folder}/many.jsonl", prompts)
    synthetic = write(f"{folder}/many_synthetic.jsonl", (row | answers for row in prompts[LEFT:]))
    scored = write(f"{folder}/many_scored.jsonl",
                   (row | answers | scores for row in prompts[LEFT:]))
    teacher_flags = ["--prompts", many, "--out", synthetic]
    reward_flags = ["--data", synthetic, "--out", scored]
    del prompts
    for name, flags in (("teacher.py", teacher_flags), ("reward.py", reward_flags)):
        command = [sys.executable, os.path.join(ROOT, name), *common, *flags]
        child = os.posix_spawn(sys.executable, command, os.environ)
        _, status, usage = os.wait4(child, 0)
        if status:
            server.kill()
            sys.exit(f"{name}: exit status {status}")
        print(f"{name}: {usage.ru_maxrss / 1024:.0f} MB peak, {MANY:,} rows, {LEFT} of them "
              "unfinished\n")
    server.kill()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        measure_rate(folder)
        measure_memory(folder)
