"""The README's pipeline (server, teacher, reward, train), and stages 1 and 2 with llama.cpp."""
import json
import os
import re
import subprocess
import sys
import time

import pytest
import requests
from conftest import ROOT, read_lines, read_metrics

import reward
import teacher
from infra.client import token_logprobs
from infra.models import TOY_STUDENT
from infra.verdicts import parse_verdict
from toy import one_row, world
from toy import server as toy

TOY = os.path.join(ROOT, "toy")


def run_command(name, *flags):
    """Runs a command as a user does, on one thread; returns its output."""
    command = [sys.executable, os.path.join(ROOT, name), *map(str, flags)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def common_flags(url):
    return "--task", f"{TOY}/task.toml", "--base_url", url, "--model", "toy"


def test_four_commands_offline(toy_server, tmp_path):
    synthetic, scored, out = (tmp_path / name for name in ("synthetic", "scored", "out"))
    common = common_flags(toy_server())
    text = run_command("teacher.py", *common, "--prompts", f"{TOY}/prompts.jsonl", "--limit", 40,
                       "--out", synthetic)
    assert "40 of 40 rows" in text
    text = run_command("reward.py", *common, "--data", synthetic, "--out", scored)
    assert "80 of 80 answers have a score" in text
    run_command("train.py", "--data", scored, "--max_steps", 3, "--batch_size", 8,
                "--max_new_tokens", 2, "--out_dir", out, "--ref_cache_dir", tmp_path / "cache")
    steps, _ = read_metrics(out)
    assert len(steps) == 3 and (out / "model.safetensors").exists()
    keys = ["id", "behaviour", "prompt", "question", "rejected", "critique", "chosen", "teacher",
            "score_rejected", "score_chosen", "judge"]
    assert all(list(row) == keys for row in read_lines(scored))  # a stage adds keys, drops none


def test_the_bundled_rows_are_what_the_commands_write(toy_server, run_stage, tmp_path):
    synthetic, scored, other = (tmp_path / name for name in ("synthetic", "scored", "other"))
    common = common_flags(toy_server())
    prompts = f"{TOY}/prompts.jsonl"
    assert run_stage(teacher, *common, "--prompts", prompts, "--out", synthetic)[0] == 0
    assert run_stage(reward, *common, "--data", synthetic, "--out", scored)[0] == 0
    with open(f"{TOY}/scored.jsonl", encoding="utf-8") as file:
        bundled = file.readlines()
    with open(scored, encoding="utf-8") as file:
        assert sorted(file) == sorted(bundled)  # rows are written in the order of completion
    ids = [row["id"] for row in read_lines(prompts)]
    assert [json.loads(line)["id"] for line in bundled] == ids
    # Another seed gives other rows, so the comparison can fail.
    common = common_flags(toy_server("--seed", 1))
    flags = ("--prompts", prompts, "--limit", 20, "--out", other)
    assert run_stage(teacher, *common, *flags)[0] == 0
    rows = {row["id"]: row for row in read_lines(synthetic)}
    assert sum(row != rows[row["id"]] for row in read_lines(other)) > 10


def test_one_row_through_the_method_has_no_colours_to_wrap(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["one_row.py", "--model", TOY_STUDENT])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    one_row.main()
    out = capsys.readouterr().out
    assert "6 tokens" in out and "<|end|>" in out and "\033" not in out
    assert max(map(len, out.splitlines())) > 100


# ----------------------------------------------------------------------------------- the toy server


def test_failure_rate():
    prompts = [row["prompt"] for row in world.make_prompts("train", 400, seed=4)]

    def share_of_good(rate):
        answers = [toy.teach([prompt], 0, rate) for prompt in prompts]
        revised = [toy.teach([prompt, answer, "", "", ""], 0, rate)
                   for prompt, answer in zip(prompts, answers)]
        assert not [1 for answer, rewrite in zip(answers, revised) if answer == rewrite]
        scores = [world.score(prompt, rewrite) for prompt, rewrite in zip(prompts, revised)]
        return scores.count(5) / len(prompts)

    assert share_of_good(0) == 1 and share_of_good(1) == 0 and 0.68 < share_of_good(0.25) < 0.82


def test_judge_noise_stays_on_the_scale_and_repeats():
    rows = read_lines(f"{TOY}/scored.jsonl")[:200]

    def verdicts(noise):
        replies = [toy.judge(row["question"], row["chosen"], 0, noise) for row in rows]
        return [parse_verdict(text, toy.JUDGE) for text, _ in replies]

    exact, noisy = verdicts(0), verdicts(1)
    assert exact == [world.score(row["prompt"], row["chosen"]) for row in rows]
    assert noisy == verdicts(1)
    assert None not in noisy and all(verdict.is_integer() for verdict in noisy)
    assert sum(a != b for a, b in zip(noisy, exact)) > 50


def test_graded_scores_of_a_noisy_judge_are_its_scores_before_rounding(
        toy_server, run_stage, tmp_path):
    common, out = common_flags(toy_server("--judge_noise", 1)), tmp_path / "out.jsonl"
    code, printed, err = run_stage(reward, *common, "--data", f"{TOY}/scored.jsonl", "--limit", 80,
                                   "--out", out)
    assert code == 0, err
    rows = read_lines(out)
    for row in rows:
        for name in ("chosen", "rejected"):
            wanted = toy.noisy_score(row["question"], row[name], "0 0", 1)
            assert row[f"score_{name}"] == pytest.approx(wanted, abs=1e-6)
            assert row["judge"][name][0]["verdict"] == pytest.approx(wanted, abs=0.5)
    ties = int(re.search("80 rows have graded scores: (\\d+) of them would tie", printed)[1])
    verdicts = [[row["judge"][name][0]["verdict"] for name in ("chosen", "rejected")]
                for row in rows]
    assert ties == sum(a == b for a, b in verdicts) > 5
    assert int(re.search("of 80 rows: (\\d+) ties", printed)[1]) < ties / 2


def test_pairwise_tau_of_a_noisy_judge(toy_server, run_stage, tmp_path):
    common, out = common_flags(toy_server("--judge_noise", 1)), tmp_path / "out.jsonl"
    code, printed, err = run_stage(reward, *common, "--data", f"{TOY}/scored.jsonl", "--limit", 40,
                                   "--out", out, "--pairwise")
    assert code == 0 and "40 of 40 rows have a tau" in printed, err
    scored = {row["id"]: row for row in read_lines(f"{TOY}/scored.jsonl")}  # removed from out
    exact = [scored[row["id"]]["score_chosen"] - scored[row["id"]]["score_rejected"]
             for row in read_lines(out)]
    taus = [row["tau"] for row in read_lines(out)]
    assert all(0 < tau < 1 for tau in taus) and len(set(taus)) > 30
    assert sum((tau > 0.5) == (gap > 0) for tau, gap in zip(taus, exact) if abs(gap) > 2) > 22


def test_repeated_verdicts_of_a_noisy_judge_differ(toy_server, run_stage, tmp_path):
    common = common_flags(toy_server("--judge_noise", 1))
    code, out, err = run_stage(reward, *common, "--data", f"{TOY}/scored.jsonl", "--limit", 50,
                               "--samples", 3, "--out", tmp_path / "out.jsonl")
    assert code == 0, err
    same = float(out.split("verdicts: identical on ")[1].split(" %")[0])
    assert 0 < same < 60
    assert all(len(row["judge"]["chosen"]) == 3 for row in read_lines(tmp_path / "out.jsonl"))


def test_server_protocol(toy_server):
    url = toy_server("--api_key", "made-up", "--latency", 0.2)
    assert requests.get(url + "/models", timeout=5).json()["data"][0]["id"] == "toy"
    assert requests.get(url.removesuffix("/v1") + "/health", timeout=5).status_code == 200
    prompt = world.make_prompts("train", 1, seed=0)[0]["prompt"]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}]
    body, key = {"model": "toy", "messages": messages}, {"Authorization": "Bearer made-up"}

    def post(**request):
        return requests.post(url + "/chat/completions", timeout=5, **request)

    start = time.monotonic()
    reply = post(json=body, headers=key).json()
    assert time.monotonic() - start > 0.2
    assert reply["choices"][0]["message"]["content"] == toy.teach([prompt], "0 0", 0.25)
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert post(json=body).status_code == 401
    assert post(json={"model": "toy"}, headers=key).status_code == 400
    assert post(data="{", headers=key).status_code == 400


# ------------------------------------------------------------------------------------ a real server

LLAMA_SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], 0
params.n_ctx, params.n_parallel = 4096, 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # its threads wait busily
params.api_keys = ["made-up-key"]
server = xllamacpp.Server(params)
print("ready", server.listening_address, flush=True)
time.sleep(3600)
"""
THINGS = ("tea", "rain", "chess", "snow", "jazz", "bread", "the sea", "the moon")


@pytest.fixture(scope="module")
def llama_server(smollm2_gguf):
    process = subprocess.Popen([sys.executable, "-c", LLAMA_SERVER, smollm2_gguf], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    address = next(line.split()[1] for line in process.stdout if line.startswith("ready"))
    yield address.rstrip("/") + "/v1"
    process.kill()
    process.wait()


@pytest.mark.real
def test_a_real_server(llama_server, run_stage, write_rows, tmp_path, monkeypatch):
    """8 real prompts. The model is too small to judge: a null score is fine if it is counted."""
    monkeypatch.setenv("LLAMA_KEY", "made-up-key")
    prompts = write_rows([{"prompt": f"I love {thing}! In one sentence, what do you think of "
                                     f"{thing}?"} for thing in THINGS])
    synthetic, scored = tmp_path / "synthetic.jsonl", tmp_path / "scored.jsonl"
    common = ("--task", f"{ROOT}/tasks/sycophancy.toml", "--base_url", llama_server,
              "--model", "smollm2", "--key_env", "LLAMA_KEY", "--concurrency", 2)
    code, out, err = run_stage(teacher, *common, "--prompts", prompts, "--out", synthetic,
                               "--max_tokens", 24)
    assert code == 0 and "8 of 8 rows" in out and "24 requests" in out, err
    rows = read_lines(synthetic)
    assert all(row[name].strip() for row in rows for name in ("rejected", "critique", "chosen"))
    cut = sum(row["teacher"]["finish"].count("length") for row in rows)
    assert f"{cut} replies cut by --max_tokens" in out
    assert 0 < sum(row["teacher"]["tokens"] for row in rows) <= 24 * 24

    code, out, err = run_stage(reward, *common, "--data", synthetic, "--out", scored,
                               "--max_tokens", 24, "--verdict_retries", 1)
    rows = read_lines(scored)
    scores = [row[name] for row in rows for name in ("score_rejected", "score_chosen")]
    no_verdict = scores.count(None) == len(scores)  # possible: the model may ignore the format
    assert code == no_verdict and "8 of 8 rows" in out, err
    assert no_verdict == ("no reply of smollm2 had a verdict" in err)
    assert f"{16 - scores.count(None)} of 16 answers have a score" in out
    for row in rows:
        for name in ("rejected", "chosen"):
            attempts = row["judge"][name]
            assert (row["score_" + name] is None) == (attempts[-1]["verdict"] is None)
            assert all(attempt["reply"] for attempt in attempts)

    pairwise = tmp_path / "pairwise.jsonl"
    code, out, err = run_stage(reward, *common, "--data", synthetic, "--out", pairwise, "--limit",
                               2, "--verdict_retries", 0, "--max_tokens", 60, "--json_verdicts",
                               "--pairwise")
    for row in read_lines(pairwise):
        last = [row["judge"][name][-1] for name in ("chosen_first", "rejected_first")]
        wins = [attempt.get("graded", {1: 1, 2: 0, 0: 0.5}.get(attempt["verdict"]))
                for attempt in last]
        assert row["tau"] == (None if None in wins else pytest.approx((wins[0] + 1 - wins[1]) / 2))
    body = {"model": "any", "max_tokens": 3, "logprobs": True, "top_logprobs": 10,
            "messages": [{"role": "user", "content": "Say 4."}]}
    reply = requests.post(f"{llama_server}/chat/completions", json=body, timeout=60,
                          headers={"Authorization": "Bearer made-up-key"}).json()
    logprobs = token_logprobs(reply["choices"][0])  # what graded scores are made of
    assert 0 < len(logprobs) <= 3 and all(len(others) == 10 for _, others in logprobs)

    monkeypatch.setenv("LLAMA_KEY", "another-key")
    refused = tmp_path / "refused.jsonl"
    code, _, err = run_stage(teacher, *common, "--prompts", prompts, "--out", refused)
    assert code == 2 and "answered 401" in err and "another-key" not in err
    long = write_rows([{"prompt": "word " * 9000}, {"prompt": "Hello!"}], "long.jsonl")
    monkeypatch.setenv("LLAMA_KEY", "made-up-key")
    code, out, err = run_stage(teacher, *common, "--prompts", long, "--max_tokens", 8,
                               "--out", tmp_path / "long_out.jsonl")
    assert code == 1 and "1 of 2 rows" in out
    assert "context" in err  # only the prompt that is too long for the model fails
