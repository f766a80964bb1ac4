"""Stage 2: the verdict in a reply, scores from verdicts, and the four kinds of reward models."""
import json
import math
import re
import time
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import ROOT, Scripted, assert_one_line, read_lines, says

import reward
import teacher
from infra import formats, judgements, verdicts
from infra.client import token_logprobs
from infra.endpoints import ENDPOINTS
from infra.resumable import RowFailed, Stage, outcomes

TASK = f"{ROOT}/toy/task.toml"


def test_higher_is_always_better():
    assert [verdicts.better(verdict, "high") for verdict in (1.0, 4.0)] == [1, 4]
    assert [verdicts.better(verdict, "low") for verdict in (0.0, 4.0)] == [0, -4]
    assert [verdicts.better(verdict, "zero") for verdict in (-3.0, 0.0, 2.0)] == [-3, 0, -2]
    assert "-0.0" not in str([verdicts.better(0.0, good) for good in ("low", "zero")])


ROWS = [{"id": f"r{i}", "prompt": f"prompt {i}", "question": f"question {i}",
         "rejected": f"first {i}", "chosen": f"second {i}"} for i in range(6)]


def flags(server, path, out, **others):
    given = {"data": path, "out": out, "base_url": server.url, "model": "m"} | others
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def test_a_reply_without_a_verdict_is_asked_again_then_the_score_is_null(
        scripted, run_stage, write_rows, tmp_path):
    def script(path, request):
        text = request["messages"][-1]["content"]
        if "second 3" in text:
            return says("I give it 4 of 5 points.")
        if "first 4" in text:
            return says("Final score: 4", "length")
        if "second 5" in text and request["temperature"] == 0:
            return says("Well, 5?")
        return says(f"There are 3 points to make.\nFinal score: {4 if 'second' in text else 1}")

    server = scripted(script)
    code, out, err = run_stage(reward, *flags(server, write_rows(ROWS), tmp_path / "out",
                                              task=TASK, concurrency=1))
    rows = {row["id"]: row for row in read_lines(tmp_path / "out")}
    assert code == 0 and list(rows) == [row["id"] for row in ROWS], err
    assert [rows[f"r{i}"]["score_chosen"] for i in range(6)] == [4, 4, 4, None, 4, 4]
    assert [rows[f"r{i}"]["score_rejected"] for i in range(6)] == [1, 1, 1, 1, None, 1]
    no_verdict = {"verdict": None, "finish": "stop", "reply": "I give it 4 of 5 points."}
    assert rows["r3"]["judge"]["chosen"] == [no_verdict] * 3
    assert [attempt["verdict"] for attempt in rows["r5"]["judge"]["chosen"]] == [None, 4]
    assert "10 of 12 answers have a score (83.3 %)" in out
    assert "7 replies had no verdict, 3 of them cut by --max_tokens; 2 rows lack a score" in out
    assert "score gap, chosen minus rejected, of 4 rows: 0 ties, 0 inversions" in out
    again = [(request["temperature"], request.get("seed")) for request in server.requests
             if "second 3" in request["messages"][-1]["content"]]
    assert again == [(0, None), (0.7, 1), (0.7, 2)]
    text = server.requests[0]["messages"][1]["content"]
    assert "Question:\nquestion 0\n" in text  # the question, not the prompt


def test_samples_are_averaged_or_null(scripted, run_stage, write_rows, tmp_path):
    def script(path, request):
        text = request["messages"][-1]["content"]
        if "first 1" in text and request["seed"] % 3 == 2:
            return says("no idea")
        return says(f"Final score: {request['seed'] % 3 + 2 if 'second' in text else 1}")

    code, out, err = run_stage(reward, *flags(scripted(script), write_rows(ROWS[:2]),
                                              tmp_path / "out", task=TASK, samples=3))
    rows = {row["id"]: row for row in read_lines(tmp_path / "out")}
    assert code == 0, err
    assert (rows["r0"]["score_rejected"], rows["r0"]["score_chosen"]) == (1, 3)
    assert rows["r1"]["score_rejected"] is None and rows["r1"]["score_chosen"] == 3
    assert [attempt["verdict"] for attempt in rows["r0"]["judge"]["chosen"]] == [2, 3, 4]
    assert ("repeated verdicts: identical on 50.0 % of the answers, "
            "mean standard deviation 0.41") in out


def test_text_in_braces_stays_text(scripted, run_stage, write_rows, tmp_path):
    odd = [{"prompt": "What do {answer}, {question} and {0} mean?",
            "rejected": "{question} %s {", "chosen": "\\1 $& {answer}"}]
    server = scripted(lambda path, request: says("Final score: 3"))
    code, _, err = run_stage(reward,
                             *flags(server, write_rows(odd), tmp_path / "out", task=TASK))
    assert code == 0, err
    contents = [request["messages"][-1]["content"] for request in server.requests]
    assert all(f"Question:\n{odd[0]['prompt']}\n" in content for content in contents)
    assert f"Reply:\n{odd[0]['rejected']}\n" in contents[0]
    assert f"Reply:\n{odd[0]['chosen']}\n" in contents[1]


def test_chat_rows_are_judged_and_shown_as_text(scripted, run_stage, write_rows, tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
             {"role": "user", "content": "Why\x1b[31m?"}]
    row = {"prompt": turns, "rejected": [{"role": "assistant", "content": "Because."}],
           "chosen": [{"role": "assistant", "content": "No idea."}]}
    server = scripted(lambda path, request: says("Final score: 3"))
    code, out, err = run_stage(reward, *flags(server, write_rows([row]), tmp_path / "out",
                                              task=TASK), "--show")
    assert code == 0 and "-------- rejected\nBecause.\n" in out, err
    assert "\x1b" not in out and out.count("finish stop, verdict 3.0") == 2
    first, second = (request["messages"][1]["content"] for request in server.requests)
    assert "Question:\nuser: Hi\n\nassistant: Yes?\n\nuser: Why\x1b[31m?\n\nReply:" in first
    assert "Reply:\nBecause.\n" in first and "Reply:\nNo idea.\n" in second
    written = read_lines(tmp_path / "out")[0]
    assert written["prompt"] == turns and written["chosen"] == row["chosen"]


USAGE = {"usage": {"prompt_tokens": 7}}
FORMS = {
    "/classify": lambda score: USAGE | {
        "data": [{"index": 0, "label": "LABEL_0", "probs": [score], "num_classes": 1}]},
    "/pooling": lambda score: USAGE | {
        "data": [{"index": 0, "object": "pooling", "data": [[9.0], [8.0], [score]]}]},
    "/score": lambda score: USAGE | {"data": [{"index": 0, "object": "score", "score": score}]},
    "/predict": lambda score: [{"score": score, "label": "LABEL_0"}],
}


@pytest.mark.parametrize("endpoint", FORMS)
def test_reward_model(endpoint, scripted, run_stage, write_rows, tmp_path):
    def script(path, request):
        assert path == endpoint  # not under /v1
        return FORMS[endpoint](-1.25 if "first" in json.dumps(request) else 3.5)

    server = scripted(script)
    code, out, err = run_stage(reward, *flags(server, write_rows(ROWS), tmp_path / "out",
                                              endpoint=endpoint, concurrency=1))
    assert code == 0 and "12 of 12 answers have a score" in out, err
    for row in read_lines(tmp_path / "out"):
        assert (row["score_rejected"], row["score_chosen"]) == (-1.25, 3.5)
        provenance = {"model": "m", "endpoint": endpoint}
        assert row["judge"] == provenance | {"rejected": -1.25, "chosen": 3.5}
    request = json.dumps(server.requests[0])
    assert "question 0" in request and "first 0" in request


def test_a_reward_model_gets_the_conversation_and_no_squeezing(
        scripted, run_stage, write_rows, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
             {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]
    rows = [{"id": "a", "prompt": turns, "rejected": "No.", "chosen": "Because."}]
    for endpoint in FORMS:
        server = scripted(lambda path, request: FORMS[endpoint](1.5))
        code, _, err = run_stage(reward, *flags(server, write_rows(rows), tmp_path / endpoint[1:],
                                                endpoint=endpoint))
        assert code == 0, err
        request, _ = server.requests
        if "messages" in request:
            assert request["messages"] == turns + [{"role": "assistant", "content": "No."}]
        else:  # no conversation can be sent
            text = "system: Be brief.\n\nuser: Hi\n\nassistant: Yes?\n\nuser: Why?"
            assert json.dumps(text)[1:-1] in json.dumps(request)
        if endpoint != "/predict":  # the second name: vLLM before use_activation
            assert request["use_activation"] is request["activation"] is False


def test_the_classify_of_sglang_is_refused(scripted, run_stage, write_rows, tmp_path):
    server = scripted(lambda path, request: [{"embedding": [1.5], "meta_info": {"id": "a"}}])
    assert_one_line(run_stage(reward, *flags(server, write_rows(ROWS), tmp_path / "out",
                                             endpoint="/classify", concurrency=1)), "SGLang")
    assert len(server.requests) <= 2


@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize("poison", [None, "second 2"])
def test_an_endpoint_that_takes_a_list_of_texts(
        at_once, poison, scripted, run_stage, write_rows, tmp_path, monkeypatch):
    """One entry of ENDPOINTS is all. A text that the server refuses fails its own row alone."""
    def script(path, request):
        assert path == "/rank" and len(request["texts"]) <= at_once
        if poison in request["texts"]:
            return {"oops": "too long"}
        return {"rewards": [-1.25 if "first" in text else float(text[-1])
                            for text in request["texts"]]}

    monkeypatch.setitem(ENDPOINTS, "/rank", (
        at_once, lambda texts: {"texts": [answer for _, answer in texts]},
        lambda reply: [[number] for number in reply["rewards"]]))
    server, out = scripted(script), tmp_path / "out"
    code, printed, err = run_stage(reward, *flags(server, write_rows(ROWS), out, endpoint="/rank",
                                                  concurrency=2, retries=0))
    rows = {row["id"]: row for row in read_lines(out)}
    wanted = {row["id"]: (-1.25, float(row["id"][1:])) for row in ROWS
              if row["chosen"] != poison}
    assert code == (poison is not None), err
    assert {name: (row["score_rejected"], row["score_chosen"])
            for name, row in rows.items()} == wanted
    if poison:
        (failed,) = read_lines(f"{out}.failed.jsonl")
        assert failed["id"] == "r2" and "sent an unexpected reply" in failed["failed"]
    else:
        assert len(server.requests) == {1: 12, 3: 4, 8: 2}[at_once]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("size", [0, 1, 4])
def test_work_that_fails_is_treated_alike_in_threads_and_batches(threads, size):
    def one(row):
        if row["n"] % 5 == 3:
            raise RowFailed(f"bad {row['n']}")
        return row | {"done": True}

    stage = Stage(adds=(), provenance_key="", provenance={}, check=None, batch_size=size,
                  work=(lambda rows: [one(row) for row in rows]) if size else one)
    rows = [{"n": n} for n in range(10)]
    found = {row["n"]: result for row, result in outcomes(stage, iter(rows), threads)}
    assert len(found) == 10
    for n, result in found.items():
        assert str(result) == f"bad {n}" if n in (3, 8) else result == {"n": n, "done": True}
    stage.work = lambda given: 1 / 0  # not the rows' fault: every row has it, and the run stops
    assert {type(result) for _, result in outcomes(stage, iter(rows), threads)} == {
        ZeroDivisionError}


def test_a_reward_model_need_not_count_tokens(scripted, run_stage, write_rows, tmp_path):
    for number, usage in enumerate(({}, {"usage": None}, {"usage": {}})):
        server = scripted(lambda path, request: {"data": [{"score": 1.5}]} | usage)
        code, out, err = run_stage(reward, *flags(
            server, write_rows(ROWS), tmp_path / f"out{number}", endpoint="/score"))
        assert code == 0 and "6 of 6 rows" in out and "0 tokens read" in out, err


def test_no_score_at_all_is_an_error_and_a_null_is_not_asked_for_again(
        scripted, run_stage, write_rows, tmp_path):
    replies, path = iter(["Nice."] * 4), write_rows(ROWS[:2])
    server = scripted(lambda path, request: says(next(replies, "Final score: 3")))
    common = flags(server, path, tmp_path / "out", task=TASK, verdict_retries=0)
    for _ in range(2):
        code, out, err = run_stage(reward, *common)
        assert code == 1 and "0 of 4 answers have a score" in out and len(server.requests) == 4
        assert "no reply of m had a verdict" in err and str(tmp_path / "out") in err
        assert len(err.splitlines()) == 1
    first = (tmp_path / "out").read_text().splitlines(keepends=True)[0]
    (tmp_path / "out").write_text(first)  # the remedy
    code, out, _ = run_stage(reward, *common)
    assert code == 0 and "2 of 4 answers have a score" in out and len(server.requests) == 6


def test_a_model_of_two_labels_is_no_reward_model(scripted, run_stage, write_rows, tmp_path):
    server = scripted(lambda path, request: {"data": [{"probs": [0.1, 0.9]}]} | USAGE)
    code, _, err = run_stage(reward, *flags(server, write_rows(ROWS), tmp_path / "out",
                                            endpoint="/classify"))
    assert code == 1 and "gave 2 numbers for one text" in err and len(err.splitlines()) == 1
    assert len(read_lines(tmp_path / "out.failed.jsonl")) == 6
    assert read_lines(tmp_path / "out") == []


def test_resumes_and_refuses_other_content(scripted, run_stage, write_rows, tmp_path):
    server = scripted(lambda path, request: says("Final score: 3"))
    path = write_rows(ROWS)
    common = flags(server, path, tmp_path / "out", task=TASK)
    assert run_stage(reward, *common, "--limit", 2)[0] == 0 and len(server.requests) == 4
    code, out, _ = run_stage(reward, *common)
    assert code == 0 and len(server.requests) == 12 and "6 of 6 rows (2 from before)" in out
    write_rows([row | {"chosen": "another rewrite"} for row in ROWS])  # the teacher ran again
    code, _, err = run_stage(reward, *common)
    assert code == 2 and "with other content" in err and len(server.requests) == 12


def test_scores_of_two_judges_do_not_go_into_one_file(scripted, run_stage, write_rows, tmp_path):
    server = scripted(lambda path, request: says("Final score: 3"))
    path, out = write_rows(ROWS), tmp_path / "out"
    assert run_stage(reward, *flags(server, path, out, task=TASK, limit=2))[0] == 0
    for others, what in (({"task": f"{ROOT}/tasks/safety.toml"}, "task"),
                         ({"task": TASK, "model": "n"}, "model"),
                         ({"endpoint": "/score"}, "endpoint")):
        code, _, err = run_stage(reward, *flags(server, path, out, **others))
        assert code == 2 and len(err.splitlines()) == 1
        assert f"{out}:1: made with another {what}" in err and "give the same flags" in err
    assert len(server.requests) == 4 and len(read_lines(out)) == 2
    for foreign in ("m", {}):  # a row that another program made
        write_rows([row | {"judge": foreign} for row in read_lines(out)], "foreign")
        code, _, err = run_stage(reward, *flags(server, path, tmp_path / "foreign", task=TASK))
        assert code == 2 and "foreign:1: made with another model and task" in err


@pytest.mark.parametrize("stage, flag, change", [
    (reward, "--data", ["--samples", 2]), (reward, "--data", ["--max_tokens", 99]),
    (reward, "--data", ["--json_verdicts"]), (teacher, "--prompts", ["--temperature", 0.1]),
    (teacher, "--prompts", ["--max_tokens", 99])], ids=lambda value: str(value)[-15:])
@pytest.mark.parametrize("changed_first", [False, True])
def test_rows_asked_for_in_two_ways_do_not_go_into_one_file(
        changed_first, stage, flag, change, scripted, run_stage, write_rows, tmp_path):
    """The replies to other requests are other replies: as with another model."""
    server, out = scripted(lambda path, request: says("Final score: 3")), tmp_path / "out"
    common = ["--task", TASK, flag, write_rows(ROWS), "--out", out, "--base_url", server.url,
              "--model", "m"]
    first, second = (change, []) if changed_first else ([], change)
    code, _, err = run_stage(stage, *common, *first, "--limit", 2)
    assert code == 0, err
    before = out.read_text()
    message = "made with another task" + ("" if changed_first else f" and {change[0][2:]}") + ";"
    assert_one_line(run_stage(stage, *common, *second), message)
    assert out.read_text() == before
    assert run_stage(stage, *common, *first)[0] == 0 and len(read_lines(out)) == len(ROWS)
    made = read_lines(out)[0]["teacher" if stage is teacher else "judge"]
    value = (change[1:] or [True])[0]
    assert made.get(change[0][2:]) == (value if changed_first else None)  # None: the default


def test_another_system_text_is_another_task(scripted, run_stage, write_rows, tmp_path):
    server, out = scripted(lambda path, request: says("Hello.")), tmp_path / "out"
    with open(TASK, encoding="utf-8") as file:
        text = file.read()
    for name, system in (("a.toml", 'system = ""'), ("b.toml", 'system = "Be brief."')):
        (tmp_path / name).write_text(text.replace('system = ""', system))
    common = ["--prompts", write_rows(ROWS), "--out", out, "--base_url", server.url, "--model", "m"]
    assert run_stage(teacher, "--task", tmp_path / "a.toml", *common, "--limit", 2)[0] == 0
    assert_one_line(run_stage(teacher, "--task", tmp_path / "b.toml", *common), "another task;")


OLD = {"score_chosen": 1, "score_rejected": 5, "tau": 0.1, "judge": {"model": "old"}}
OLDER = {"score_response_revised": 1, "chosen_score": 1, "chosen-rating": 1, "score_response": 5,
         "scores_pre": 5, "rejected_rating": 5,
         "metadata": {"score_chosen": 1, "score_rejected": 5, "tau": 0.1, "kept": True}}


@pytest.mark.parametrize("old", [OLD, OLDER, OLD | OLDER, OLD | {"metadata": "none"},
                                 OLD | {"score_chosen": "not asked for"}], ids=range(5))
@pytest.mark.parametrize("how", ["scores", "pairwise", "teacher"])
def test_a_new_judgement_or_text_leaves_no_older_one(
        how, old, scripted, run_stage, write_rows, tmp_path):
    """train.py would use the old scores where the judge gave tau, and data.py another's gap."""
    def script(path, request):
        text = request["messages"][-1]["content"]
        if how == "pairwise":
            return says("Better: " + ("1" if text.index("second") < text.index("first 0") else "2"))
        return says("Final score: 4" if "second" in text else "Final score: 1")

    row = {"id": "a", "prompt": "q", "rejected": "first 0", "chosen": "second 0", "note": 1} | old
    server, out, path = scripted(script), tmp_path / "out", write_rows([row])
    stage, flag = (teacher, "--prompts") if how == "teacher" else (reward, "--data")
    common = ["--task", TASK, flag, path, "--out", out, "--base_url", server.url, "--model", "m",
              *(["--pairwise"] if how == "pairwise" else [])]
    code, _, err = run_stage(stage, *common)
    assert code == 0, err
    (made,) = read_lines(out)
    canon = formats.canonical(made)
    found = {name: canon.get(name) for name in ("score_chosen", "score_rejected", "tau")}
    assert found == {
        "scores": {"score_chosen": 4, "score_rejected": 1, "tau": None},
        "pairwise": {"score_chosen": None, "score_rejected": None, "tau": 1},
        "teacher": dict.fromkeys(("score_chosen", "score_rejected", "tau"))}[how]
    assert "old" not in json.dumps(made) and made["note"] == 1
    assert made.get("metadata") in (None, "none", {"kept": True})
    asked = len(server.requests)
    assert run_stage(stage, *common)[0] == 0 and len(server.requests) == asked  # nothing to do


@pytest.mark.parametrize("change, message", [
    ({"rejected": ""}, "`rejected` is empty"), ({"chosen": None}, "`chosen` is a NoneType"),
    ({"question": 5}, "`question` must be text"), ({"prompt": ""}, "no `prompt` that can be sent"),
    ({"id": "r0"}, 'the id "r0" is already used at '), ({"id": 1.5}, "`id` is 1.5")])
def test_bad_rows_are_refused_before_any_request(
        change, message, scripted, run_stage, write_rows, tmp_path):
    server = scripted(lambda path, request: says("Final score: 3"))
    path = write_rows(ROWS[:3] + [ROWS[3] | change])
    code, out, err = run_stage(reward, *flags(server, path, tmp_path / "out", task=TASK))
    assert code == 2 and f"{path}:4" in err and message in err and out == ""
    assert len(err.splitlines()) == 1
    assert not server.requests and not (tmp_path / "out").exists()


@pytest.mark.parametrize("others, message", [
    ({}, "one of the arguments --task --endpoint --reward_model is required; see --help"),
    ({"task": TASK, "endpoint": "/score"}, "not allowed with argument"),
    ({"endpoint": "/embed"}, "--endpoint: invalid choice: '/embed'"),
    ({"task": TASK, "samples": 0}, "--samples: must be 1 or above, not 0"),
    ({"task": TASK, "verdict_retries": -1}, "--verdict_retries: must be 0 or above, not -1")])
def test_bad_flags(others, message, scripted, run_stage, write_rows, tmp_path):
    server = scripted(lambda path, request: says("Final score: 3"))
    code, out, err = run_stage(reward, *flags(server, write_rows(ROWS), tmp_path / "out", **others))
    assert code == 2 and message in err and len(err.splitlines()) == 1 and out == ""
    assert not server.requests


# ---------------------------------------------------------------------- JSON verdicts and scales


@pytest.fixture
def judge_that_refuses(serve):
    """Starts a scripted server that answers 400 where a request has a parameter (None: never)."""
    class Judge(Scripted):
        def send_response(self, code):
            refused = self.server.parameter in self.server.requests[-1]
            super().send_response(400 if refused else code)

    def start(parameter, script):
        server = serve(ThreadingHTTPServer(("127.0.0.1", 0), Judge))
        server.parameter, server.script, server.requests = parameter, script, []
        return server

    return start


@pytest.mark.parametrize("refused", [False, True])
def test_json_verdicts_ask_for_a_form_and_do_without_it_if_the_server_must(
        refused, judge_that_refuses, run_stage, write_rows, tmp_path):
    """The form holds a reply to the verdict's scale; the rows say by what they were judged."""
    def script(path, request):
        if refused and "response_format" in request:
            return {"error": {"message": "response_format type 'json_schema' is unavailable"}}
        verdict = '{"reasons": "It said: 1 is low.", "Final score": 4}'
        return says("Fine. Final score: 3" if refused else verdict)

    server = judge_that_refuses("response_format" if refused else None, script)
    rows, out = write_rows([*ROWS[:2]]), tmp_path / "out.jsonl"
    flags = ["--task", TASK, "--data", rows, "--out", out, "--base_url", server.url, "--model",
             "judge", "--concurrency", 1]
    code, _, err = run_stage(reward, *flags, "--json_verdicts")
    assert code == 0, err
    assert [row["score_chosen"] for row in read_lines(out)] == [3.0 if refused else 4.0] * 2
    asked = [request.get("response_format") for request in server.requests]
    assert len(asked) == (5 if refused else 4) and asked.count(None) == (4 if refused else 0)
    assert err.count("does not take `response_format`") == refused
    schema = asked[0]["json_schema"]["schema"]
    assert schema["required"] == ["reasons", "Final score"]
    assert schema["properties"]["Final score"] == {"type": "integer", "minimum": 0, "maximum": 5}
    assert_one_line(run_stage(reward, *flags), "made with another task")  # judged otherwise


def test_rows_name_behaviour_and_scale(scripted, run_stage, write_rows, tmp_path):
    server = scripted(lambda *_: says("Final score: 1"))
    rows = write_rows([ROWS[0]])
    for name, scale in (("safety", [0, 1]), ("sycophancy", [0, 5]),
                        ("sycophancy_sentiment", [-5, 0])):
        out = tmp_path / name
        run_stage(reward, "--task", f"{ROOT}/tasks/{name}.toml", "--data", rows, "--out", out,
                  "--base_url", server.url, "--model", "judge")
        judge = read_lines(out)[0]["judge"]
        assert judge["scale"] == scale and judge["behaviour"] == name


@pytest.mark.parametrize("lowest, highest, good, wanted", [
    (0, 5, "high", [0, 5]), (1, 10, "low", [-10, -1]), (-5, 5, "zero", [-5, 0]),
    (2, 4, "zero", [-4, -2])])
def test_score_range(lowest, highest, good, wanted):
    """By trying all verdicts."""
    judge = SimpleNamespace(lowest=lowest, highest=highest, good=good)
    scores = [verdicts.better(verdict, good) for verdict in range(lowest, highest + 1)]
    assert verdicts.score_range(judge) == [min(scores), max(scores)] == wanted


# ----------------------------------------------------------------------------------- graded scores

FIVE = SimpleNamespace(verdict="Final score:", lowest=0, highest=5, good="high")


def tokens(text, place=None, **others):
    """Log-probabilities in a Reply's form: a token per word, at `place` also others (digit=p)."""
    words = re.findall(r"\s*\S+", text)
    return [(word, {name.strip("_"): math.log(p) for name, p in others.items()}
             if i == place else {word: 0.0}) for i, word in enumerate(words)]


@pytest.mark.parametrize("text, place, others, verdict, wanted", [
    ("Good. Final score: 4", 3, dict(_4=0.6, _5=0.3, _1=0.1), 4, 0.6 * 4 + 0.3 * 5 + 0.1),
    ("Final score: 4 because 3 of 5", 2, dict(_4=0.5, _3=0.25), 4, (2 + 0.75) / 0.75),
    ("3 faults. Final score: 4", 4, dict(_4=0.5, _3=0.5, four=0.7, _9=0.9), 4, 3.5),
    ("Final score: 4", 2, dict(_4=0.3, _5=0.6), 4, None),  # another digit was more probable
    ("Final score: 4.5", 2, dict(_4=0.6, _5=0.3), 4.5, None),  # not one digit
    ("Final score: 4", None, {}, 4, 4.0)])
def test_a_graded_score_is_the_expectation_at_the_place_of_the_verdict(
        text, place, others, verdict, wanted):
    assert verdicts.parse_verdict(text, FIVE) == verdict
    for good, sign in (("high", 1), ("low", -1), ("zero", -1)):
        graded = verdicts.graded_score(tokens(text, place, **others), text, FIVE,
                                     lambda digit: verdicts.better(digit, good))
        assert graded == (None if wanted is None else pytest.approx(sign * wanted))


def pieces(text):
    """Log-probabilities of a text, a token per character: a digit is one more at .001.

    "4!" stands for a 4 in doubt, which is 1 at .49.
    """
    found = []
    for part in re.findall(r"[0-9]!?|[^0-9]", text):
        digit = int(part[0]) if part[0].isdigit() else None
        if digit is None:
            found.append((part, {part: 0.0}))
        else:
            other, p = (1, 0.49) if part.endswith("!") else (digit + 1, 0.001)
            found.append((part[0], {str(digit): math.log(1 - p), str(other): math.log(p)}))
    return found


@pytest.mark.parametrize("written, answer, wanted", [
    ("<think>Hm. Final score: 4!\n</think>\nFinal score: 4", "Final score: 4", 4.001),
    ("Hm.\nFinal score: 4!\n\nFinal score: 4", "Final score: 4", 4.001),  # tags are no tokens
    ("Hm. Final score: 4!</think>Final score: 4<|im_end|>", "Final score: 4", 4.001),
    ('{"criteria":[{"score":4!}],"Final score":4}', None, 4.001),
    ('{"Final score":4,"criteria":[{"score":4!}]}', None, 4.001),
    ("Draft final score: 4!\nFinal score: 4", None, 4.001),
    ("4! slips, but\nFinal score: 4!\nSo:\nFinal score: 4", None, 4.001),
    ("It said \"Final score: 4!\", so:\nFinal score: 4", None, 4.001),
    ("~~Final score: 3~~ Final score: 4", None, None),  # which digit is not certain
    ("**Final score: 4** because 4! of 4! facts are right", None, 4.001),
    ("Final score: \uff14", None, None),
    ("Final score: 4 and more", "Final score: 4", 4.001),
    ("Something else with 4!", "Final score: 4", None),
    ("", "Final score: 4", None)])
def test_a_score_is_graded_where_the_verdict_stands(written, answer, wanted):
    answer = written.replace("!", "") if answer is None else answer
    assert verdicts.parse_verdict(answer, FIVE) == 4
    graded = verdicts.graded_score(pieces(written), answer, FIVE, float)
    assert graded == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize("four, five, wanted", [
    (math.log(0.75), math.log(0.25), 4.25), (math.log(0.75), -9999, 4), (0.0, -math.inf, 4),
    (-9999, -9999, None), (-math.inf, -math.inf, None), (math.nan, -1.0, None),
    (-0.1, math.nan, None), (1000, -1.0, None), (-0.1, 1000, None), (math.inf, -1, None)])
def test_what_are_no_probabilities_give_no_graded_score(four, five, wanted):
    logprobs = [("Final score: ", {}), ("4", {"4": four, "5": five})]
    assert verdicts.graded_score(logprobs, "Final score: 4", FIVE, float) == (
        None if wanted is None else pytest.approx(wanted))


def test_a_long_reply_is_graded_in_linear_time():
    text, start = "4 " * 100_000 + "\nFinal score: 4", time.process_time()
    assert verdicts.graded_score(pieces(text), text, FIVE, float) == pytest.approx(4.001)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("lowest, highest", [(-5, 5), (0, 10)])
def test_scales_of_more_than_one_digit_are_not_graded(lowest, highest):
    judge = SimpleNamespace(**vars(FIVE) | {"lowest": lowest, "highest": highest})
    assert verdicts.graded_score(tokens("Final score: 4", 2, _4=1.0), "Final score: 4",
                                 judge, float) is None


@pytest.mark.parametrize("refused", [False, True])
def test_rows_keep_verdict_and_graded_score_at_no_extra_request(
        refused, judge_that_refuses, run_stage, write_rows, tmp_path):
    def script(path, request):
        if refused and "logprobs" in request:
            return {"error": {"message": "This model does not support `logprobs`."}}
        reply = says("Final score: 4")
        if "logprobs" in request:
            digits = [{"token": "4", "logprob": math.log(0.75)},
                      {"token": "5", "logprob": math.log(0.25)}]
            reply["choices"][0]["logprobs"] = {"content": [
                {"token": "Final score:", "logprob": 0, "top_logprobs": []},
                {"token": " ", "logprob": 0, "top_logprobs": []},
                {"token": "4", "logprob": -0.29, "top_logprobs": digits}]}
        return reply

    server = judge_that_refuses("logprobs" if refused else None, script)
    out = tmp_path / "out"
    code, _, err = run_stage(reward, *flags(server, write_rows(ROWS[:3]), out, task=TASK,
                                            concurrency=1))
    assert code == 0 and len(server.requests) == 6 + refused
    assert err.count("does not take `logprobs`, `top_logprobs`, now left out") == refused
    for row in read_lines(out):
        (attempt,) = row["judge"]["chosen"]
        assert attempt["verdict"] == 4.0
        assert row["score_chosen"] == pytest.approx(4 if refused else 4.25, abs=1e-6)
        assert ("graded" in attempt) == (not refused)


def test_the_statistics_take_rows_whose_replies_were_taken_out(write_rows, capsys):
    judged = {"model": "m", "scale": [0, 5], "rejected": [], "chosen": []}
    path = write_rows([{"id": "a", "score_rejected": 1.0, "score_chosen": 4.0, "judge": judged}])
    assert judgements.report(path, ("score_rejected", "score_chosen"), "high") == 2
    assert "2 of 2 answers have a score" in capsys.readouterr().out


@pytest.mark.parametrize("logprobs", [
    None, [], {}, {"content": None}, {"content": [{"token": "4"}]}, {"tokens": ["4"]}, "4",
    {"content": [{"token": "4", "top_logprobs": [{"token": "4", "logprob": None}]}]}])
def test_log_probabilities_in_another_form_count_as_none(logprobs):
    assert token_logprobs({"logprobs": logprobs}) == token_logprobs({}) == []


@pytest.mark.parametrize("whole", ["first", "second", None])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_row_is_graded_for_both_answers_or_for_neither(
        samples, whole, scripted, run_stage, write_rows, tmp_path):
    """One reply without log-probabilities: 2.8 and 4 would be the same verdict."""
    def script(path, request):
        reply = says("Final score: 4")
        if not whole or whole not in request["messages"][-1]["content"] or (
                samples == 2 and request["seed"] == 0):
            reply["choices"][0]["logprobs"] = {"content": [
                {"token": "Final score: ", "top_logprobs": []},
                {"token": "4", "top_logprobs": [{"token": "4", "logprob": math.log(0.6)},
                                                {"token": "1", "logprob": math.log(0.4)}]}]}
        return reply

    code, out, err = run_stage(reward, *flags(scripted(script), write_rows(ROWS), tmp_path / "out",
                                              task=TASK, samples=samples))
    assert code == 0 and ("rows have graded scores" in out) == (whole is None), err
    for row in read_lines(tmp_path / "out"):
        wanted = pytest.approx(4 if whole else 2.8)
        assert [row["score_chosen"], row["score_rejected"]] == [wanted, wanted]
        assert ("graded" in json.dumps(row)) == (whole is None)


# ----------------------------------------------------------------------------------- in pairs


def pairwise_server(scripted, win_of, with_logprobs=True):
    """Asks win_of(first reply, second reply) for P(the first is better)."""
    def script(path, request):
        text = request["messages"][-1]["content"]
        replies = text.split("First reply:\n")[1].split("\n\nWhich")[0]
        win = win_of(*replies.split("\n\nSecond reply:\n"))
        if win is None:
            return says("I like both.")
        reply = says(f"Better: {1 if win > 0.5 else 2}")
        top = [{"token": "1", "logprob": math.log(win)},
               {"token": "2", "logprob": math.log(1 - win)}]
        if with_logprobs:
            reply["choices"][0]["logprobs"] = {"content": [
                {"token": "Better:", "logprob": 0, "top_logprobs": []},
                {"token": " " + reply["choices"][0]["message"]["content"][-1], "logprob": 0,
                 "top_logprobs": top}]}
        return reply
    return scripted(script)


@pytest.mark.parametrize("win_of, with_logprobs, wanted", [
    (lambda first, second: 0.9, True, 0.5),  # sees only the place
    (lambda first, second: 0.9, False, 0.5),
    (lambda first, second: 0.8 if "second" in first else 0.4, True, 0.7),
    (lambda first, second: 0.8 if "second" in first else 0.4, False, 1.0),
    (lambda first, second: 0.2 if "second" in first else 0.7, True, 0.25),
    (lambda first, second: 0.2 if "second" in first else None, True, None)])
def test_tau_is_the_mean_probability_of_both_orders(
        win_of, with_logprobs, wanted, scripted, run_stage, run_train, write_rows, tmp_path):
    out, server = tmp_path / "out", pairwise_server(scripted, win_of, with_logprobs)
    data = write_rows(ROWS)
    code, printed, err = run_stage(reward, *flags(server, data, out, task=TASK,
                                                  verdict_retries=0), "--pairwise", "--show")
    assert code == (1 if wanted is None else 0), err
    assert len(server.requests) == 2 * len(ROWS)
    for row in read_lines(out):
        assert row["tau"] == (None if wanted is None else pytest.approx(wanted, abs=1e-6))
        assert "score_chosen" not in row and "scale" not in row["judge"]
        assert {"chosen_first", "rejected_first"} <= row["judge"].keys()
    assert "no reply of m had a verdict" in err if wanted is None else (
        "6 of 6 rows have a tau" in printed and "-------- the judge on chosen_first" in printed)


def test_pairwise_needs_a_judge_that_compares(scripted, run_stage, write_rows, tmp_path):
    server, data = scripted(lambda path, request: says("Better: 1")), write_rows(ROWS)
    with open(TASK, encoding="utf-8") as file:
        without = write_rows(file.read().split("pairwise =")[0], "task.toml")
    for more, message in ((["--endpoint", "/score"], "--pairwise needs --task"),
                          (["--task", without], "no `judge.pairwise`")):
        result = run_stage(reward, *flags(server, data, tmp_path / "out"), "--pairwise", *more)
        assert_one_line(result, message)
    assert not server.requests


