"""Stage 1 with a server that fails in every way, with kill -9, and with bad input; on loopback."""
import bz2
import json
import lzma
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import pytest
import requests
from conftest import ROOT, read_lines, says

import teacher
from infra import client
from infra.client import retry_after
from infra.command import BadInput
from infra.rows import is_cut
from infra.task import load_task
from toy import world
from toy.server import Server, teach

KEY = "sk-secret-0123456789abcdef"
TASK = os.path.join(ROOT, "toy", "task.toml")
PROMPTS = world.make_prompts("train", 60, seed=3)

# -------------------------------------------------------------------------------- a faulty server

BODIES = {
    "not JSON": b"<html>busy</html>",
    "no choices": b'{"object": "error"}',
    "null content": b'{"choices": [{"message": {"content": null}}]}',
    "empty content": b'{"choices": [{"message": {"content": " "}, "finish_reason": "stop"}]}',
    "a list": b"[]",
}
FAULTS = ("reset", "timeout", 408, 409, 429, 500, 503, "cut", *BODIES)


class Faulty(BaseHTTPRequestHandler):
    """Passes requests on to a good server, or acts on the fault that server.fault() returns."""
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        content = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers.get("Authorization", "")
        fault = server.fault()
        with server.lock:
            server.faults[fault] += 1
            server.asked.append((fault, json.loads(content)["messages"]))
            server.keys.add(key)
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "timeout":
            time.sleep(1.5)
            self.close_connection = True
        elif isinstance(fault, int):  # the message repeats the key, as some servers do
            error = {"error": {"message": f"fault {fault}{server.says} for {key}"}}
            self.send(fault, json.dumps(error).encode(), {"Retry-After": server.retry_after})
        elif fault in BODIES:
            self.send(200, BODIES[fault], {})
        else:
            answer = requests.post(server.behind + "/chat/completions", data=content, timeout=30)
            self.send(answer.status_code, answer.content, {}, cut=fault == "cut")

    def send(self, status, content, headers, cut=False):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:len(content) // 2] if cut else content)
        self.close_connection = cut

    def log_message(self, *_):
        pass


@pytest.fixture
def faulty(toy_server, serve):
    """Starts a Faulty server in front of a toy server; a test may set its .fault.

    It has .url, .asked (requests with their faults), .faults (counts) and .keys (what it was sent).
    """
    def start(fault=lambda: None, *toy_flags):
        server = Server(("127.0.0.1", 0), Faulty)
        server.behind, server.fault, server.retry_after = toy_server(*toy_flags), fault, "0"
        server.says = ""  # why, in the message of a fault that is a status
        server.lock, server.faults, server.asked = threading.Lock(), Counter(), []
        server.keys = set()
        return serve(server)

    return start


def command(url, prompts, out, *more):
    flags = ["--task", TASK, "--prompts", prompts, "--out", out, "--base_url", url,
             "--model", "toy", *more]
    return [str(flag) for flag in flags]


def start_teacher(*flags):
    environment = os.environ | {"TEACHER_KEY": KEY}
    script = [sys.executable, os.path.join(ROOT, "teacher.py"), *flags, "--key_env", "TEACHER_KEY"]
    return subprocess.Popen(script, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for_lines(path, count, process):
    while process.poll() is None and (not path.exists()
                                      or path.read_bytes().count(b"\n") < count):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def expected(row):
    """The three texts of the toy server for a row, without HTTP."""
    rejected = teach([row["prompt"]], "0 0", 0.25)
    critique = teach([row["prompt"], rejected, ""], "0 0", 0.25)
    chosen = teach([row["prompt"], rejected, "", critique, ""], "0 0", 0.25)
    return {"rejected": rejected, "critique": critique, "chosen": chosen}


def first_prompts(asked):
    """The prompts that open the conversations in a list of requests, faults included."""
    return {messages[0]["content"] for _, messages in asked}


def test_faults_and_two_kills_lose_nothing(faulty, write_rows, tmp_path):
    rng = random.Random(0)
    server = faulty(lambda: rng.choice(FAULTS) if rng.random() < 0.4 else None, "--latency", 0.02)
    out, texts = tmp_path / "out.jsonl", []
    flags = command(server.url, write_rows(PROMPTS), out,
                    "--concurrency", 20, "--timeout", 1, "--retries", 20)
    finished = set()  # the prompts that must not be asked again
    for lines in (8, 30, None):
        asked_before = len(server.asked)
        process = start_teacher(*flags)
        if lines:
            wait_for_lines(out, lines, process)
            process.send_signal(signal.SIGKILL)
        texts += process.communicate()
        assert process.returncode == (-signal.SIGKILL if lines else 0), texts[-1]
        assert not first_prompts(server.asked[asked_before:]) & finished
        if lines:
            with open(out, "ab") as file:
                whole = out.read_bytes().rpartition(b"\n")[0].splitlines()
                finished = {json.loads(line)["prompt"] for line in whole}
                file.write(b'{"id": "train-safety-0099", "prompt": "torn')  # a kill in mid-line

    rows = {row["id"]: row for row in read_lines(out)}
    assert len(read_lines(out)) == len(rows) == 60
    assert not (tmp_path / "out.jsonl.failed.jsonl").exists()
    for row in PROMPTS:
        assert rows[row["id"]].items() >= (row | expected(row)).items()
        made = rows[row["id"]]["teacher"]
        assert made["model"] == "toy" and made["finish"] == ["stop"] * 3
    # All kinds of faults happened, and the server got the key: but no output holds it.
    assert set(server.faults) == {None, *FAULTS}
    assert 0.3 < 1 - server.faults[None] / server.faults.total() < 0.5
    assert server.keys == {f"Bearer {KEY}"}
    written = [path.read_text() for path in tmp_path.iterdir()]
    assert not any(KEY in text for text in texts + written)
    assert "60 of 60 rows" in texts[-2] and texts[-1] == ""  # no progress bar without a terminal


def test_the_next_run_finishes_the_rows_that_failed_without_retries(faulty, write_rows, tmp_path):
    rng = random.Random(0)
    server = faulty(lambda: rng.choice(FAULTS)
                    if len(server.asked) > 20 and rng.random() < 0.12 else None)
    out, failures = tmp_path / "out.jsonl", tmp_path / "out.jsonl.failed.jsonl"
    flags = command(server.url, write_rows(PROMPTS), out, "--timeout", 1, "--retries", 0)
    process = start_teacher(*flags)
    stdout, stderr = process.communicate()
    failed = read_lines(failures)
    assert process.returncode == 1 and failed and len(failed) + len(read_lines(out)) == 60
    assert len(stderr.splitlines()) == 1
    assert f"{len(failed)} rows failed" in stderr and str(failures) in stderr
    assert all(row["failed"] and "chosen" not in row for row in failed)
    assert KEY not in stdout + stderr + failures.read_text()

    server.fault = lambda: None
    process = start_teacher(*flags)
    stdout, stderr = process.communicate()
    assert process.returncode == 0 and not failures.exists() and "60 of 60 rows" in stdout, stderr
    assert {row["id"] for row in read_lines(out)} == {row["id"] for row in PROMPTS}
    assert len(read_lines(out)) == 60


def test_ctrl_c_keeps_what_is_finished(faulty, write_rows, tmp_path):
    server = faulty(lambda: None, "--latency", 0.05)
    out = tmp_path / "out.jsonl"
    process = start_teacher(*command(server.url, write_rows(PROMPTS), out))
    wait_for_lines(out, 10, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=5)
    assert process.returncode == 130 and stderr == "" and "of 60 rows" in stdout
    assert 10 <= len(read_lines(out)) < 60


# ------------------------------------------------------------------------------------- the client


def test_retry_after_is_honoured(faulty, write_rows, tmp_path, run_stage):
    faults = iter([429])
    server = faulty(lambda: next(faults, None))
    server.retry_after = "2"
    start = time.monotonic()
    flags = command(server.url, write_rows(PROMPTS[:1]), tmp_path / "out")
    code, out, err = run_stage(teacher, *flags)
    assert code == 0 and "4 requests, 1 retries" in out, err
    assert time.monotonic() - start > 1.9  # the first backoff alone is at most 0.75 s


def test_retry_after_header():
    in_10_s, before = (formatdate(time.time() + seconds, usegmt=True) for seconds in (10, -10))
    assert retry_after("7") == 7 and retry_after("99999") == 3600
    assert 8 < retry_after(in_10_s) <= 10
    assert retry_after(before) == 0
    assert [retry_after(text) for text in ("", "soon", "-3")] == [0] * 3


def test_cut_replies_are_kept_marked_and_counted(toy_server, write_rows, tmp_path, run_stage):
    flags = command(toy_server(), write_rows(PROMPTS[:4]), tmp_path / "out", "--max_tokens", 5)
    code, out, err = run_stage(teacher, *flags)
    rows = read_lines(tmp_path / "out")
    assert code == 0 and "12 replies cut by --max_tokens" in out, err
    assert all(row["teacher"]["finish"] == ["length"] * 3 and is_cut(row) for row in rows)
    assert all(len(row["chosen"].split(" ")) == 5 for row in rows)


def test_a_row_is_cut_if_the_original_or_the_final_answer_is():
    stop, cut = "stop", "length"
    for finish, wanted in (([stop, stop, stop], False), ([cut, stop, stop], True),
                           ([stop, cut, stop], False), ([stop, stop, cut], True),
                           ([stop, cut, cut, cut, stop], False),  # two rounds of critique
                           ([stop, stop, stop, stop, cut], True), ([], False), (None, False)):
        assert is_cut({"teacher": {"finish": finish}}) == wanted, finish
    assert not is_cut({}) and not is_cut({"teacher": "a person"})


def test_show_prints_conversations_and_no_control_characters(
        faulty, write_rows, tmp_path, run_stage):
    rows = [row | {"id": f"{row['id']}\x1b[31m"} for row in PROMPTS[:5]]
    flags = command(faulty().url, write_rows(rows), tmp_path / "out", "--limit", 3, "--show")
    code, out, err = run_stage(teacher, *flags)
    assert code == 0 and "3 of 3 rows" in out and "\x1b" not in out, err
    assert out.count("-------- assistant, chosen") == 3
    task = load_task(TASK)
    for row in read_lines(tmp_path / "out"):
        texts = (row["prompt"], row["rejected"], task.critique, row["critique"], task.revision,
                 row["chosen"])
        assert all(text in out for text in texts)


def test_chat_prompts_and_system_messages(faulty, write_rows, tmp_path, run_stage):
    task = tmp_path / "task.toml"
    with open(TASK, encoding="utf-8") as file:
        task.write_text(file.read().replace('system = ""', 'system = "Be kind."'))
    chat = [{"role": "system", "content": "Be brief."},
            {"role": "user", "content": PROMPTS[1]["prompt"]}]
    server = faulty()
    flags = command(server.url, write_rows([PROMPTS[0], {"prompt": chat}]), tmp_path / "out",
                    "--concurrency", 1, "--task", task)
    code, _, err = run_stage(teacher, *flags)
    assert code == 0, err
    conversations = [messages for _, messages in server.asked]
    assert [len(messages) for messages in conversations] == [2, 4, 6, 2, 4, 6]
    first_texts = [messages[0]["content"] for messages in conversations]
    assert first_texts == ["Be kind."] * 3 + ["Be brief."] * 3
    roles = [message["role"] for message in conversations[2]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    given, hashed = read_lines(tmp_path / "out")
    assert given["id"] == PROMPTS[0]["id"] and hashed["prompt"] == chat
    assert len(hashed["id"]) == 16 and hashed["id"].isalnum()


@pytest.mark.parametrize("flags, key, message", [
    ((), KEY + "x", "401: Incorrect API key"),
    ((), "", "no key in that environment variable"),
    ((), "two\nlines", "one line of plain characters"),
    (("--model", "other"), KEY, "404: the only model here is called toy"),
    (("--base_url", "/v2"), KEY, "404: no such address")])
def test_wrong_key_model_or_address_stop_at_once(
        flags, key, message, toy_server, write_rows, tmp_path, run_stage, monkeypatch):
    url = toy_server("--api_key", KEY)
    monkeypatch.setenv("SOME_KEY", key)
    flags = [url.replace("/v1", flag) if flag == "/v2" else flag for flag in flags]
    start = time.monotonic()
    code, out, err = run_stage(teacher, *command(url, write_rows(PROMPTS), tmp_path / "out",
                                                 "--key_env", "SOME_KEY", *flags))
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert time.monotonic() - start < 2
    assert KEY not in out + err and not key or key not in out + err


def test_a_key_reaches_no_other_host(faulty, write_rows, tmp_path, run_stage, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    netrc = write_rows("machine 127.0.0.1 login someone password elses\n", "netrc")
    monkeypatch.setenv("NETRC", netrc)
    server, prompts = faulty(), write_rows(PROMPTS[:1])
    with_key = ("--key_env", "SOME_KEY")
    assert run_stage(teacher, *command(server.url, prompts, tmp_path / "out", *with_key))[0] == 0
    assert run_stage(teacher, *command(server.url, prompts, tmp_path / "second"))[0] == 0
    assert server.keys == {f"Bearer {KEY}", ""}  # and never the password of ~/.netrc
    server.fault = lambda: 307
    code, _, err = run_stage(teacher,
                             *command(server.url, prompts, tmp_path / "third", *with_key))
    assert code == 2 and "answered 307" in err and KEY not in err


def test_a_refused_request_fails_its_row_only(faulty, write_rows, tmp_path, run_stage):
    rows = PROMPTS[:4] + [{"id": "odd", "prompt": "What is tea?"}] + PROMPTS[4:8]
    server = faulty()
    code, out, err = run_stage(teacher, *command(server.url, write_rows(rows), tmp_path / "out"))
    assert code == 1 and "8 of 9 rows" in out
    assert "answered 400: ValueError: not a prompt of the toy world" in err
    assert sum("tea" in messages[0]["content"] for _, messages in server.asked) == 1  # no retry
    assert [row["id"] for row in read_lines(tmp_path / "out.failed.jsonl")] == ["odd"]


def test_a_forbidden_prompt_fails_its_row_only(faulty, write_rows, tmp_path, run_stage):
    server, out_path = faulty(lambda: 403), tmp_path / "out"
    flags = command(server.url, write_rows(PROMPTS), out_path, "--concurrency", 1)
    code, _, err = run_stage(teacher, *flags)
    assert code == 1 and "stopped after 10 rows failed" in err
    assert "answered 403" in err and "--key_env" in err and len(server.asked) < 13
    server = faulty(lambda: 403 if len(server.asked) == 3 else None)  # the second row's first turn
    flags = command(server.url, write_rows(PROMPTS[:4]), out_path, "--concurrency", 1)
    code, out, err = run_stage(teacher, *flags)
    assert code == 1 and "3 of 4 rows" in out and "answered 403" in err
    assert len(server.asked) == 10  # no retry
    failed = read_lines(tmp_path / "out.failed.jsonl")
    assert [row["id"] for row in failed] == [PROMPTS[1]["id"]]


@pytest.mark.parametrize("reason", [
    "This model's maximum context length is 8 tokens", "prompt is too long",
    "The response was filtered by the content management policy", "flagged by moderation"])
def test_refused_rows_at_the_head_do_not_stop_the_run(
        reason, faulty, write_rows, tmp_path, run_stage):
    server = faulty(lambda: 400 if len(server.asked) < 20 else None)
    server.says = f": {reason}"
    code, out, err = run_stage(teacher, *command(
        server.url, write_rows(PROMPTS[:25]), tmp_path / "out", "--concurrency", 1))
    assert code == 1 and "5 of 25 rows" in out and "20 rows failed" in err and reason[:20] in err


def test_prompts_that_the_model_refuses_do_not_stop_the_run(
        scripted, write_rows, tmp_path, run_stage):
    refusal = {"choices": [{"message": {"content": None, "refusal": "No."},
                            "finish_reason": "stop"}]}
    server = scripted(lambda path, request: refusal if len(server.requests) <= 12 else says("a"))
    code, out, err = run_stage(teacher, *command(
        server.url, write_rows(PROMPTS[:15]), tmp_path / "out", "--concurrency", 1))
    assert code == 1 and "3 of 15 rows" in out and "filter refused: No." in err


@pytest.mark.parametrize("status", [404, 498])
def test_a_single_odd_status_between_replies_fails_its_row_only(
        status, faulty, write_rows, tmp_path, run_stage):
    server = faulty(lambda: status if len(server.asked) == 4 else None)
    code, out, err = run_stage(teacher, *command(
        server.url, write_rows(PROMPTS[:3]), tmp_path / "out", "--concurrency", 1,
        "--retries", 0))
    assert code == 1 and "2 of 3 rows" in out and f"answered {status}" in err
    server.fault = lambda: status if len(server.asked) > 25 else None  # for good: a wrong key
    code, out, err = run_stage(teacher, *command(
        server.url, write_rows(PROMPTS), tmp_path / "out", "--concurrency", 1, "--retries", 0))
    assert code == 1 and "stopped after 10 rows failed one after another" in err


@pytest.mark.parametrize("status", [400, 500])
def test_where_nothing_succeeds_the_message_names_model_and_key(
        status, faulty, write_rows, tmp_path, run_stage):
    """A litellm proxy answers 400 to a wrong key or model, `transformers serve` 500."""
    server, hint = faulty(lambda: status), "no row succeeded: check --model, --key_env"
    flags = command(server.url, write_rows(PROMPTS[:3]), tmp_path / "out", "--retries", 0)
    code, _, err = run_stage(teacher, *flags)
    assert code == 1 and f"answered {status}" in err and hint in err, err
    server.fault = lambda: status if len(server.asked) == 5 else None  # one row of three
    code, out, err = run_stage(teacher, *flags, "--concurrency", 1)
    assert code == 1 and "2 of 3 rows" in out and hint not in err, err
    server.fault = lambda: status  # the other two are from before
    code, _, err = run_stage(teacher, *flags)
    assert code == 1 and f"answered {status}" in err and hint not in err, err


def test_a_missing_or_foreign_server_stops_the_run_soon(faulty, write_rows, tmp_path, run_stage):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    flags = (write_rows(PROMPTS), tmp_path / "out", "--retries", 1)
    code, out, err = run_stage(teacher, *command(nowhere, *flags))
    assert code == 2 and len(err.splitlines()) == 1 and "0 of 60 rows" in out
    assert "check that the server runs, --base_url" in err and "asked 2 times in " in err
    server = faulty(lambda: "not JSON")
    code, out, err = run_stage(teacher, *command(server.url, *flags))
    assert code == 1 and len(err.splitlines()) == 1
    assert "sent an unexpected reply: <html>busy</html>" in err
    assert "stopped after 10 rows failed one after another" in err
    assert len(server.asked) < 60  # it did not try all 60 prompts


def test_a_server_that_goes_away_stops_the_run_soon(faulty, write_rows, tmp_path, run_stage):
    server = faulty(lambda: "reset" if len(server.asked) > 12 else None)
    code, out, err = run_stage(teacher, *command(
        server.url, write_rows(PROMPTS), tmp_path / "out", "--retries", 0, "--concurrency", 2))
    assert code == 1 and len(err.splitlines()) == 1
    assert "stopped after 10 rows failed one after another" in err
    assert len(read_lines(tmp_path / "out.failed.jsonl")) >= 10
    assert 1 <= len(read_lines(tmp_path / "out")) <= 4 and len(server.asked) < 30


# -------------------------------------------------------------------------------------- bad input

ROW = {"id": "a", "prompt": "Hello?"}
BAD_PROMPTS = {
    "missing prompt": ([ROW, {"id": "b", "text": "Hi"}], ":2: no `prompt` that"),
    "empty prompt": ([ROW, {"prompt": ""}], ":2: no `prompt` that"),
    "blank prompt": ([ROW, {"prompt": " \n"}], ":2: no `prompt` that"),
    "wrong type": ([ROW, {"prompt": 7}], ":2: no `prompt` that"),
    "null": ([ROW, {"prompt": None}], ":2: no `prompt` that"),
    "chat that ends with the assistant":
        ([{"prompt": [{"role": "assistant", "content": "Hi"}]}], ":1: no `prompt` that"),
    "messages without content": ([{"prompt": [{"role": "user"}]}], ":1: no `prompt` that"),
    "odd question": ([ROW | {"question": ""}], ":1: `question` must be text"),
    "torn line": ('{"id": "a", "prompt": "x"}\n{"id": "b", "pro', ":2: not JSON"),
    "not UTF-8": (b'{"id": "a", "prompt": "\xff"}\n', ":1: not UTF-8"),
    "a number": ("17\n", ":1: a row must be a JSON object"),
    "empty file": ("", "the file is empty"),
    "duplicate id":
        ([ROW, {"id": "b", "prompt": "Hi"}, {"id": "a", "prompt": "Ho"}],
         ':3: the id "a" is already used at '),
    "the same row twice, without ids": ([{"prompt": "Hi"}, {"prompt": "Hi"}], ":2: the id"),
    "the same row twice, in a list": (json.dumps([ROW, ROW]), ", item 2: the id"),
    "ids that look alike":
        ([ROW | {"id": 1}, ROW | {"id": "1"}], ':2: the id "1" is already used at '),
    "id of a wrong type": ([ROW | {"id": ["a"]}], ":1: `id` is"),
    "id is null": ([ROW | {"id": None}], ":1: `id` is null"),
    "empty id": ([ROW | {"id": ""}], ':1: `id` is ""'),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts(case, faulty, write_rows, tmp_path, run_stage):
    rows, message = BAD_PROMPTS[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows) if isinstance(rows, bytes) else write_rows(rows)
    server = faulty()
    code, out, err = run_stage(teacher, *command(server.url, path, tmp_path / "out"))
    assert code == 2 and len(err.splitlines()) == 1 and out == ""
    assert str(path) in err and message in err
    assert not server.asked and not (tmp_path / "out").exists()  # refused before any request


@pytest.mark.parametrize("flag, value, message", [
    ("--prompts", "nowhere.jsonl", "nowhere.jsonl: No such file"),
    ("--task", "nowhere.toml", "nowhere.toml: No such file"),
    ("--out", "nowhere/out.jsonl", "in a folder that exists"),
    ("--out", ROOT, "must be a file"),
    ("--key_env", "UNSET_KEY", "export UNSET_KEY="),
    ("--base_url", "127.0.0.1:8000/v1", "must look like http://"),
    ("--base_url", "http://me:word@127.0.0.1/v1", "a user name or a password"),
    ("--base_url", "http://[::1/v1", "must look like http://"),
    ("--base_url", "http://here:port/v1", "must look like http://"),
    ("--base_url", "ftp://127.0.0.1/v1", "must look like http://"),
    ("--base_url", "", "must look like http://"),
    ("--limit", 0, "--limit: must be 1 or above, not 0; see --help"),
    ("--concurrency", 0, "--concurrency: must be from 1 to 1024, not 0"),
    ("--max_tokens", "many", "--max_tokens: invalid int (1 or above) value: 'many'"),
    ("--retries", -1, "--retries: must be from 0 to 100, not -1"),
    ("--timeout", 0, "--timeout: must be from 0.1 to 86400, not 0"),
    ("--timeout", "inf", "--timeout: must be from 0.1 to 86400, not inf"),
    ("--temperature", -0.1, "--temperature: must be 0 or above, not -0.1"),
    ("--temperature", "nan", "--temperature: must be 0 or above, not nan"),
    ("--temp", 1, "unrecognized arguments: --temp 1")])
def test_bad_flags(flag, value, message, write_rows, tmp_path, run_stage):
    flags = command("http://127.0.0.1:9/v1", write_rows(PROMPTS), tmp_path / "out", flag, value)
    code, out, err = run_stage(teacher, *flags)
    assert code == 2 and message in err and out == "" and "word@" not in err
    assert err.startswith("error: ") and len(err.splitlines()) == 1


def test_out_that_is_no_output_is_left_alone(write_rows, tmp_path, run_stage):
    prompts = write_rows(PROMPTS)
    for name, text in (("notes.txt", "my notes"), ("list.json", '{"a": 1}'), ("rows.jsonl", None)):
        path = tmp_path / name
        if text:
            path.write_text(text)
        before = path.read_bytes()
        code, _, err = run_stage(teacher, *command("http://127.0.0.1:9/v1", prompts, path))
        assert code == 2 and str(path) in err and path.read_bytes() == before


@pytest.mark.parametrize("first, remedy", [
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it: zstd -d '"),
    (lzma.compress(b"{}"), "packed by xz; unpack it: xz -dk '"),
    (bz2.compress(b"{}"), "packed by bzip2; unpack it: bunzip2 -k '"),
    (b"\x04\x22\x4d\x18", "packed by lz4; unpack it: lz4 -d '"),
    (b"PK\x03\x04", "a zip file; unpack it: unzip '"),
    (b"ARROW1\0\0", "an Arrow file; convert it (pip install pandas pyarrow)"),
    (b"\xff\xff\xff\xff\x10", "datasets.Dataset.from_file('"),
    (b"PAR1", "a Parquet file; convert it (pip install pandas pyarrow)")])
def test_files_of_other_kinds_are_named(first, remedy, tmp_path, run_stage):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(first + b"\xff\x00" * 9)
    code, out, err = run_stage(teacher, *command("http://127.0.0.1:9/v1", path, tmp_path / "out"))
    assert code == 2 and len(err.splitlines()) == 1 and "UTF-8" not in err
    assert f"{path}: " in err and remedy in err and err.count(str(path)) == 2


def test_an_id_with_another_prompt_is_refused(faulty, write_rows, tmp_path, run_stage):
    server, out = faulty(), tmp_path / "out"
    assert run_stage(teacher, *command(server.url, write_rows(PROMPTS[:2]), out))[0] == 0
    changed = write_rows([PROMPTS[0], PROMPTS[1] | {"prompt": PROMPTS[5]["prompt"]}])
    code, _, err = run_stage(teacher, *command(server.url, changed, out))
    assert code == 2 and f"{changed}:2" in err and "with other content" in err
    assert len(server.asked) == 6


def test_another_task_or_model_is_refused(faulty, write_rows, tmp_path, run_stage):
    with open(TASK, encoding="utf-8") as file:
        text = file.read()
    server, out, task = faulty(), tmp_path / "out", write_rows(text, "task.toml")
    flags = command(server.url, write_rows(PROMPTS), out, "--limit", 2, "--task", task)
    assert run_stage(teacher, *flags)[0] == 0
    before = out.read_bytes()
    write_rows(text.replace("You rate the answers", "You rate the replies"), "task.toml")
    code, printed, err = run_stage(teacher, *flags, "--model", "other")
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{out}:1: made with another model; give the same flags" in err
    code, printed, err = run_stage(teacher, *flags)  # the judge's words are not the teacher's
    assert code == 0 and "2 of 2 rows (2 from before)" in printed, err
    write_rows(text.replace("Be brief.", "Be kind."), "task.toml")
    code, printed, err = run_stage(teacher, *flags)
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{out}:1: made with another task" in err
    assert out.read_bytes() == before and len(server.asked) == 6


@pytest.mark.parametrize("make", [
    lambda out: os.mkdir(out), lambda out: os.mkfifo(out),
    lambda out: os.symlink("nowhere", out), lambda out: os.symlink("/dev/full", out),
    lambda out: os.mkdir(f"{out}.failed.jsonl")])
def test_an_output_that_is_no_file_is_refused(make, write_rows, tmp_path, run_stage):
    make(tmp_path / "out")
    flags = command("http://127.0.0.1:9/v1", write_rows(PROMPTS), tmp_path / "out")
    code, out, err = run_stage(teacher, *flags)
    assert code == 2 and "must be a file in a folder" in err and len(err.splitlines()) == 1
    assert out == ""


def test_no_torch():
    script = ("import sys, teacher, reward, infra.fetch; "
              "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
    script = script.replace("teacher", "rdpo")  # the check can fail
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 1


def test_backoff_grows(monkeypatch):
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    args = SimpleNamespace(base_url="http://127.0.0.1:9/v1", key_env=None, timeout=1, retries=9,
                           extra_body={}, no_logprobs=False)
    server = client.Client(args)
    with pytest.raises(BadInput, match=r"asked 10 times"):
        server.post(server.base_url, {}, dict)
    assert len(waits) == 9 and max(waits) <= 90
    assert all(2**i / 4 <= wait <= 2**i * 0.75 for i, wait in enumerate(waits[:7]))
