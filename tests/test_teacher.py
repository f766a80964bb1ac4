"""Stage 1 against a server that fails in every way, against kill -9, and with bad input. All on loopback."""
import json
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import requests
from conftest import ROOT, read_lines

import behaviour
import data
import teacher
from toy import world

KEY = "sk-secret-0123456789abcdef"
TASK = os.path.join(ROOT, "toy", "task.toml")
PROMPTS = world.make_prompts("train", 60, seed=3)

# ------------------------------------------------------------------------------------------------- a faulty server

FAULTS = ("reset", "timeout", 408, 409, 429, 500, 503, "cut", "not JSON", "no choices", "null content", "empty content", "a list")
BODIES = {"not JSON": b"<html>busy</html>", "no choices": b'{"object": "error"}', "null content": b'{"choices": [{"message": {"content": null}}]}',
          "empty content": b'{"choices": [{"message": {"content": " "}, "finish_reason": "stop"}]}', "a list": b"[]"}


class Faulty(BaseHTTPRequestHandler):
    """Passes requests on to a good server, or does what server.fault() says; None is no fault."""
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
            self.send(fault, json.dumps({"error": {"message": f"fault {fault} for {key}"}}).encode(), {"Retry-After": server.retry_after})
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
    """Starts a Faulty server before a toy server; its address is .url, what it was asked .asked, and a test may set .fault."""
    def start(fault=lambda: None, *toy_flags):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
        server.behind, server.fault, server.retry_after = toy_server(*toy_flags), fault, "0"
        server.lock, server.faults, server.asked, server.keys = threading.Lock(), Counter(), [], set()
        return serve(server)

    return start


def command(url, prompts, out, *more):
    flags = ["--task", TASK, "--prompts", prompts, "--out", out, "--base_url", url, "--model", "toy", *more]
    return [str(flag) for flag in flags]


def start_teacher(*flags):
    environment = os.environ | {"TEACHER_KEY": KEY}
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "teacher.py"), *flags, "--key_env", "TEACHER_KEY"], env=environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_lines(path, count, process):
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def expected(row):
    """The three texts that the toy server gives to a row, asked directly."""
    from toy.server import teach
    rejected = teach([row["prompt"]], "0 0", 0.25)
    critique = teach([row["prompt"], rejected, ""], "0 0", 0.25)
    return {"rejected": rejected, "critique": critique, "chosen": teach([row["prompt"], rejected, "", critique, ""], "0 0", 0.25)}


def first_prompts(asked):
    """The prompts with which a list of requests opens conversations, faults included."""
    return {messages[0]["content"] for _, messages in asked}


def test_faults_and_two_kills_lose_nothing(faulty, write_rows, tmp_path):
    rng = random.Random(0)
    server = faulty(lambda: rng.choice(FAULTS) if rng.random() < 0.4 else None, "--latency", 0.02)
    out, texts = tmp_path / "out.jsonl", []
    flags = command(server.url, write_rows(PROMPTS), out, "--concurrency", 20, "--timeout", 1, "--retries", 20)
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
                file.write(b'{"id": "train-safety-0099", "prompt": "torn')  # the worst moment for a kill: half a line written

    rows = {row["id"]: row for row in read_lines(out)}
    assert len(read_lines(out)) == len(rows) == 60 and not (tmp_path / "out.jsonl.failed.jsonl").exists()
    for row in PROMPTS:
        assert rows[row["id"]].items() >= (row | expected(row)).items()
        assert rows[row["id"]]["teacher"]["model"] == "toy" and rows[row["id"]]["teacher"]["finish"] == ["stop"] * 3
    # The faults were there, all kinds of them, and so was the key: but nowhere in what was written.
    assert set(server.faults) == {None, *FAULTS} and 0.3 < 1 - server.faults[None] / server.faults.total() < 0.5
    assert server.keys == {f"Bearer {KEY}"}
    assert not any(KEY in text for text in texts + [path.read_text() for path in tmp_path.iterdir()])
    assert "60 of 60 rows" in texts[-2] and texts[-1] == ""  # no progress bar where nobody watches


def test_without_retries_the_same_faults_fail_rows_and_the_next_run_mends_them(faulty, write_rows, tmp_path):
    rng = random.Random(0)
    server = faulty(lambda: rng.choice(FAULTS) if len(server.asked) > 20 and rng.random() < 0.12 else None)
    out, failures = tmp_path / "out.jsonl", tmp_path / "out.jsonl.failed.jsonl"
    flags = command(server.url, write_rows(PROMPTS), out, "--timeout", 1, "--retries", 0)
    process = start_teacher(*flags)
    stdout, stderr = process.communicate()
    failed = read_lines(failures)
    assert process.returncode == 1 and failed and len(failed) + len(read_lines(out)) == 60
    assert len(stderr.splitlines()) == 1 and f"{len(failed)} rows failed" in stderr and str(failures) in stderr
    assert all(row["failed"] and "chosen" not in row for row in failed)
    assert KEY not in stdout + stderr + failures.read_text()

    server.fault = lambda: None
    process = start_teacher(*flags)
    stdout, stderr = process.communicate()
    assert process.returncode == 0 and not failures.exists() and "60 of 60 rows" in stdout, stderr
    assert {row["id"] for row in read_lines(out)} == {row["id"] for row in PROMPTS} and len(read_lines(out)) == 60


def test_ctrl_c_keeps_what_is_finished(faulty, write_rows, tmp_path):
    server = faulty(lambda: None, "--latency", 0.05)
    out = tmp_path / "out.jsonl"
    process = start_teacher(*command(server.url, write_rows(PROMPTS), out))
    wait_for_lines(out, 10, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=5)
    assert process.returncode == 130 and stderr == "" and "of 60 rows" in stdout
    assert 10 <= len(read_lines(out)) < 60


# ----------------------------------------------------------------------------------------------------- the client


def test_retry_after_is_honoured(faulty, write_rows, tmp_path, run_stage):
    faults = iter([429])
    server = faulty(lambda: next(faults, None))
    server.retry_after = "2"
    began = time.monotonic()
    code, out, err = run_stage(teacher, *command(server.url, write_rows(PROMPTS[:1]), tmp_path / "out"))
    assert code == 0 and "4 requests, 1 retries" in out and time.monotonic() - began > 1.9, err  # its own first wait is 0.75 s at most


def test_retry_after_header():
    assert teacher.retry_after("7", 0.5) == 7 and teacher.retry_after("99999", 0.5) == 3600
    assert 8 < teacher.retry_after(formatdate(time.time() + 10, usegmt=True), 0.5) <= 10
    assert teacher.retry_after(formatdate(time.time() - 10, usegmt=True), 0.5) == 0
    assert teacher.retry_after("", 0.5) == teacher.retry_after("soon", 0.5) == teacher.retry_after("-3", 0.5) == 0.5


def test_cut_replies_are_kept_marked_and_counted(toy_server, write_rows, tmp_path, run_stage):
    code, out, err = run_stage(teacher, *command(toy_server(), write_rows(PROMPTS[:4]), tmp_path / "out", "--max_tokens", 5))
    rows = read_lines(tmp_path / "out")
    assert code == 0 and "12 replies cut by --max_tokens" in out, err
    assert all(row["teacher"]["finish"] == ["length"] * 3 and len(row["chosen"].split(" ")) == 5 for row in rows)


def test_show_prints_whole_conversations_and_no_control_characters(faulty, write_rows, tmp_path, run_stage):
    rows = [row | {"id": f"{row['id']}\x1b[31m"} for row in PROMPTS[:5]]
    code, out, err = run_stage(teacher, *command(faulty().url, write_rows(rows), tmp_path / "out", "--limit", 3, "--show"))
    assert code == 0 and "3 of 3 rows" in out and out.count("-------- assistant, chosen") == 3 and "\x1b" not in out, err
    task = behaviour.load_task(TASK)
    for row in read_lines(tmp_path / "out"):
        assert all(text in out for text in (row["prompt"], row["rejected"], task.critique, row["critique"], task.revision, row["chosen"]))


def test_chat_prompts_and_system_messages(faulty, write_rows, tmp_path, run_stage):
    task = tmp_path / "task.toml"
    with open(TASK, encoding="utf-8") as file:
        task.write_text(file.read().replace('system = ""', 'system = "Be kind."'))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[1]["prompt"]}]
    server = faulty()
    flags = command(server.url, write_rows([PROMPTS[0], {"prompt": chat}]), tmp_path / "out", "--concurrency", 1)
    flags[1] = str(task)
    code, _, err = run_stage(teacher, *flags)
    assert code == 0, err
    conversations = [messages for _, messages in server.asked]
    assert [len(messages) for messages in conversations] == [2, 4, 6, 2, 4, 6]
    assert [messages[0]["content"] for messages in conversations] == ["Be kind."] * 3 + ["Be brief."] * 3
    assert [message["role"] for message in conversations[2]] == ["system", "user", "assistant", "user", "assistant", "user"]
    given, hashed = read_lines(tmp_path / "out")
    assert given["id"] == PROMPTS[0]["id"] and hashed["prompt"] == chat and len(hashed["id"]) == 16 and hashed["id"].isalnum()


@pytest.mark.parametrize("flags, key, message", [
    ((), KEY + "x", "401: Incorrect API key"), ((), "", "no key in that environment variable"), ((), "two\nlines", "one line of plain characters"),
    (("--model", "other"), KEY, "404: the only model here is called toy"), (("--base_url", "/v2"), KEY, "404: no such address")])
def test_wrong_key_model_or_address_stop_at_once(flags, key, message, toy_server, write_rows, tmp_path, run_stage, monkeypatch):
    url = toy_server("--api_key", KEY)
    monkeypatch.setenv("SOME_KEY", key)
    flags = [url.replace("/v1", flag) if flag == "/v2" else flag for flag in flags]
    began = time.monotonic()
    code, out, err = run_stage(teacher, *command(url, write_rows(PROMPTS), tmp_path / "out", "--key_env", "SOME_KEY", *flags))
    assert code == 2 and message in err and len(err.splitlines()) == 1 and time.monotonic() - began < 2
    assert KEY not in out + err and not key or key not in out + err


def test_a_key_reaches_no_other_host(faulty, write_rows, tmp_path, run_stage, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.setenv("NETRC", write_rows("machine 127.0.0.1 login someone password elses\n", "netrc"))
    server = faulty()
    assert run_stage(teacher, *command(server.url, write_rows(PROMPTS[:1]), tmp_path / "out", "--key_env", "SOME_KEY"))[0] == 0
    assert run_stage(teacher, *command(server.url, write_rows(PROMPTS[:1]), tmp_path / "second"))[0] == 0
    assert server.keys == {f"Bearer {KEY}", ""}  # and never the password of ~/.netrc
    server.fault = lambda: 307
    code, _, err = run_stage(teacher, *command(server.url, write_rows(PROMPTS[:1]), tmp_path / "third", "--key_env", "SOME_KEY"))
    assert code == 2 and "answered 307" in err and KEY not in err


def test_a_refused_request_fails_its_row_only(faulty, write_rows, tmp_path, run_stage):
    rows = PROMPTS[:4] + [{"id": "odd", "prompt": "What is tea?"}] + PROMPTS[4:8]
    server = faulty()
    code, out, err = run_stage(teacher, *command(server.url, write_rows(rows), tmp_path / "out"))
    assert code == 1 and "8 of 9 rows" in out and "answered 400: ValueError: not a prompt of the toy world" in err
    assert sum("tea" in messages[0]["content"] for _, messages in server.asked) == 1  # no retry
    assert [row["id"] for row in read_lines(tmp_path / "out.failed.jsonl")] == ["odd"]


def test_a_forbidden_prompt_fails_its_row_only(faulty, write_rows, tmp_path, run_stage):
    server = faulty(lambda: 403)
    code, _, err = run_stage(teacher, *command(server.url, write_rows(PROMPTS), tmp_path / "out", "--concurrency", 1))
    assert code == 1 and "stopped after 10 rows failed" in err and "answered 403" in err and "--key_env" in err and len(server.asked) < 13
    server = faulty(lambda: 403 if len(server.asked) == 3 else None)  # the second row's first request
    code, out, err = run_stage(teacher, *command(server.url, write_rows(PROMPTS[:4]), tmp_path / "out", "--concurrency", 1))
    assert code == 1 and "3 of 4 rows" in out and "answered 403" in err and len(server.asked) == 10  # no retry
    assert [row["id"] for row in read_lines(tmp_path / "out.failed.jsonl")] == [PROMPTS[1]["id"]]


def test_a_server_that_is_not_there_or_speaks_something_else_stops_soon(faulty, write_rows, tmp_path, run_stage):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    code, out, err = run_stage(teacher, *command(nowhere, write_rows(PROMPTS), tmp_path / "out", "--retries", 1))
    assert code == 2 and "is the server running" in err and "asked 2 times in " in err and len(err.splitlines()) == 1 and "0 of 60 rows" in out
    server = faulty(lambda: "not JSON")
    code, out, err = run_stage(teacher, *command(server.url, write_rows(PROMPTS), tmp_path / "out", "--retries", 1))
    assert code == 1 and "something else than it should: <html>busy</html>" in err and len(err.splitlines()) == 1
    assert "stopped after 10 rows failed one after another" in err and len(server.asked) < 60  # 60 prompts were not tried one by one


def test_a_server_that_goes_away_stops_the_run_soon(faulty, write_rows, tmp_path, run_stage):
    server = faulty(lambda: "reset" if len(server.asked) > 12 else None)
    code, out, err = run_stage(teacher, *command(server.url, write_rows(PROMPTS), tmp_path / "out", "--retries", 0, "--concurrency", 2))
    assert code == 1 and "stopped after 10 rows failed one after another" in err and len(err.splitlines()) == 1
    assert len(read_lines(tmp_path / "out.failed.jsonl")) >= 10 and 1 <= len(read_lines(tmp_path / "out")) <= 4 and len(server.asked) < 30


# ------------------------------------------------------------------------------------------------------- bad input

ROW = {"id": "a", "prompt": "Hello?"}
BAD_PROMPTS = {
    "missing prompt": ([ROW, {"id": "b", "text": "Hi"}], ":2: no `prompt` that"),
    "empty prompt": ([ROW, {"prompt": ""}], ":2: no `prompt` that"),
    "blank prompt": ([ROW, {"prompt": " \n"}], ":2: no `prompt` that"),
    "wrong type": ([ROW, {"prompt": 7}], ":2: no `prompt` that"),
    "null": ([ROW, {"prompt": None}], ":2: no `prompt` that"),
    "chat that ends with the assistant": ([{"prompt": [{"role": "assistant", "content": "Hi"}]}], ":1: no `prompt` that"),
    "messages without content": ([{"prompt": [{"role": "user"}]}], ":1: no `prompt` that"),
    "odd question": ([ROW | {"question": ""}], ":1: `question` must be text"),
    "torn line": ('{"id": "a", "prompt": "x"}\n{"id": "b", "pro', ":2: not JSON"),
    "not UTF-8": (b'{"id": "a", "prompt": "\xff"}\n', ":1: not UTF-8"),
    "a number": ("17\n", ":1: a row must be a JSON object"),
    "empty file": ("", "the file is empty"),
    "duplicate id": ([ROW, {"id": "b", "prompt": "Hi"}, {"id": "a", "prompt": "Ho"}], ':3: the id "a" is that of'),
    "the same row twice, without ids": ([{"prompt": "Hi"}, {"prompt": "Hi"}], ":2: the id"),
    "the same row twice, in a list on one line": (json.dumps([ROW, ROW]), ":1: the id"),
    "ids that look alike": ([ROW | {"id": 1}, ROW | {"id": "1"}], ':2: the id "1" is that of'),
    "id of a wrong type": ([ROW | {"id": ["a"]}], ":1: `id` is"),
    "id is null": ([ROW | {"id": None}], ":1: `id` is null"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts(case, faulty, write_rows, tmp_path, run_stage):
    rows, message = BAD_PROMPTS[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows) if isinstance(rows, bytes) else write_rows(rows)
    server = faulty()
    code, out, err = run_stage(teacher, *command(server.url, path, tmp_path / "out"))
    assert code == 2 and str(path) in err and message in err and len(err.splitlines()) == 1 and out == ""
    assert not server.asked and not (tmp_path / "out").exists()  # refused before any request


@pytest.mark.parametrize("flag, value, message", [
    ("--prompts", "nowhere.jsonl", "nowhere.jsonl: No such file"), ("--task", "nowhere.toml", "nowhere.toml: No such file"),
    ("--out", "nowhere/out.jsonl", "in a folder that is there"), ("--out", ROOT, "must be a file"), ("--key_env", "UNSET_KEY", "export UNSET_KEY="),
    ("--base_url", "127.0.0.1:8000/v1", "must look like http://"), ("--base_url", "http://me:word@127.0.0.1/v1", "no user name"),
    ("--base_url", "http://[::1/v1", "must look like http://"), ("--base_url", "http://here:port/v1", "must look like http://"),
    ("--base_url", "ftp://127.0.0.1/v1", "must look like http://"), ("--base_url", "", "must look like http://")])
def test_bad_flags(flag, value, message, write_rows, tmp_path, run_stage):
    code, out, err = run_stage(teacher, *command("http://127.0.0.1:9/v1", write_rows(PROMPTS), tmp_path / "out", flag, value))
    assert code == 2 and message in err and len(err.splitlines()) == 1 and out == "" and "word@" not in err


def test_out_that_is_no_output_is_left_alone(write_rows, tmp_path, run_stage):
    prompts = write_rows(PROMPTS)
    for name, text in (("notes.txt", "my notes"), ("list.json", '{"a": 1}'), ("rows.jsonl", None)):
        path = tmp_path / name
        if text:
            path.write_text(text)
        before = path.read_bytes()
        code, _, err = run_stage(teacher, *command("http://127.0.0.1:9/v1", prompts, path))
        assert code == 2 and str(path) in err and path.read_bytes() == before


def test_an_id_with_another_prompt_is_refused(faulty, write_rows, tmp_path, run_stage):
    server = faulty()
    assert run_stage(teacher, *command(server.url, write_rows(PROMPTS[:2]), tmp_path / "out"))[0] == 0
    changed = write_rows([PROMPTS[0], PROMPTS[1] | {"prompt": PROMPTS[5]["prompt"]}])
    code, _, err = run_stage(teacher, *command(server.url, changed, tmp_path / "out"))
    assert code == 2 and f"{changed}:2" in err and "with other content" in err and len(server.asked) == 6


def test_another_task_or_model_is_refused(faulty, write_rows, tmp_path, run_stage):
    server, out = faulty(), tmp_path / "out"
    task = write_rows(open(TASK).read(), "task.toml")
    flags = command(server.url, write_rows(PROMPTS), out, "--limit", 2, "--task", task)
    assert run_stage(teacher, *flags)[0] == 0
    before = out.read_bytes()
    write_rows(open(TASK).read().replace("You rate the answers", "You rate the replies"), "task.toml")
    code, text, err = run_stage(teacher, *flags, "--model", "other")
    assert code == 2 and f"{out}:1: made with another model; give the same flags" in err and len(err.splitlines()) == 1
    code, text, err = run_stage(teacher, *flags)
    assert code == 0 and "2 of 2 rows (2 from before)" in text, err  # the judge's words are not the teacher's
    write_rows(open(TASK).read().replace("Be brief.", "Be kind."), "task.toml")
    code, text, err = run_stage(teacher, *flags)
    assert code == 2 and f"{out}:1: made with another task" in err and len(err.splitlines()) == 1
    assert out.read_bytes() == before and len(server.asked) == 6


def test_no_torch():
    script = "import sys, teacher, reward; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
    assert subprocess.run([sys.executable, "-c", script.replace("teacher", "rdpo")], cwd=ROOT).returncode == 1  # the check can fail


def test_backoff_grows(monkeypatch):
    waits = []
    monkeypatch.setattr(teacher.time, "sleep", waits.append)
    client = teacher.Client(SimpleNamespace(base_url="http://127.0.0.1:9/v1", key_env=None, timeout=1, retries=9))
    with pytest.raises(data.BadInput, match=r"asked 10 times"):
        client.post(client.base_url, {}, dict)
    assert len(waits) == 9 and all(2**i / 4 <= wait <= 2**i * 0.75 for i, wait in enumerate(waits[:7])) and max(waits) <= 90
