"""The HTTP client against servers that misbehave, reasoning models, and refused parameters."""
import gzip
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import ROOT, says

import reward
import teacher
from infra.client import Client, add_stage_flags, chat
from infra.command import BadInput, Parser
from infra.resumable import RowFailed
from infra.rows import FINISHED, is_cut
from infra.task import load_task
from infra.thinking import split_thinking
from infra.verdicts import read_reply

KEY = "sk-se/cret-0123456789"


@pytest.fixture
def raw():
    """Starts a server that answers every connection by a function of its socket; its base_url."""
    listeners = []

    def start(answer):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve_one(connection):
            with connection:
                try:
                    connection.recv(2**16)
                    answer(connection)
                except OSError:
                    pass  # the client hung up

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield start
    for listener in listeners:
        listener.close()


def make_client(url, monkeypatch=None, **others):
    given = dict(base_url=url, key_env=None, timeout=1, retries=0, extra_body={},
                 no_logprobs=False) | others
    if monkeypatch:
        monkeypatch.setenv("SOME_KEY", KEY)
        given["key_env"] = "SOME_KEY"
    return Client(SimpleNamespace(**given))


def ask(client, **more):
    return chat(client, [{"role": "user", "content": "Hi"}], "m", 9, 0.7, **more)


def whole(status, content, *headers):
    lines = [f"HTTP/1.1 {status} X", *headers, f"Content-Length: {len(content)}", "", ""]
    return "\r\n".join(lines).encode() + content


def drip(head, byte):
    def answer(connection):
        connection.sendall(head)
        while True:
            connection.sendall(byte)
            time.sleep(0.2)
    return answer


def flood(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SLOW = {"body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" "),
        "body without a length": drip(b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        "chunks": drip(CHUNKED, b"1\r\n \r\n"),
        "headers": drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
        "status": drip(b"", b"H"), "100 for ever": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n")}


@pytest.mark.parametrize("kind", SLOW)
def test_the_timeout_bounds_a_whole_reply(kind, raw):
    start = time.monotonic()
    with pytest.raises(BadInput, match="--timeout 1 is over"):
        ask(make_client(raw(SLOW[kind])))
    assert 0.9 < time.monotonic() - start < 3


def test_an_endless_reply_is_given_up(raw):
    with pytest.raises(BadInput, match="longer than 16 MiB"):
        ask(make_client(raw(flood), timeout=60))


def test_a_compressed_reply_is_not_unpacked(raw):
    bomb = whole(200, gzip.compress(b" " * 10**7), "Content-Encoding: gzip")
    with pytest.raises(BadInput, match="compressed, which was not asked for"):
        ask(make_client(raw(lambda connection: connection.sendall(bomb))))


@pytest.mark.parametrize("head", [
    ("302", "Location: http://[::1"), ("302", "Location: //"),
    ("500", "Retry-After: " + "9" * 5000), ("500", "Retry-After: " + "9" * 4000),
    ("500", "Retry-After: Thu, 1 Jan 99999999 00:00:00 GMT")])
def test_broken_headers_are_no_traceback(head, raw):
    url = raw(lambda connection: connection.sendall(whole(head[0], b"{}", head[1])))
    with pytest.raises((BadInput, RowFailed)):
        ask(make_client(url))


@pytest.mark.parametrize("form", [
    KEY, KEY.replace("/", "\\/"), "".join(f"\\u{ord(c):04x}" for c in KEY),
    KEY.replace("/", r"\\\/"), "".join(f"\\\\u{ord(c):04X}" for c in KEY)])  # JSON in JSON
@pytest.mark.parametrize("status", [200, 400])
def test_no_form_of_the_key_comes_back(form, status, raw, monkeypatch):
    plain = json.loads(f'"{form}"')
    for body in (json.dumps(says("it is @")), '{"error": {"message": "it is @"}}',
                 '{"detail": ["it is @"]}', "<p>it is @</p>"):
        content = body.replace("@", form).encode()
        client = make_client(raw(lambda connection: connection.sendall(whole(status, content))),
                             monkeypatch)
        try:
            text = ask(client).text
        except (BadInput, RowFailed) as error:
            text = str(error)
        assert "it is" in text and form not in text and plain not in text and KEY[8:] not in text


def test_a_lone_surrogate_is_replaced_and_counted(raw):
    content = b'{"choices": [{"message": {"content": "a\\ud800b \\ud83d\\ude00"}}]}'
    client = make_client(raw(lambda connection: connection.sendall(whole(200, content))))
    assert ask(client).text == "a\ufffdb \U0001f600" and client.counts["replaced"] == 1


@pytest.mark.parametrize("url, wanted", [
    ("/chat/completions", "/v1"), ("/", "/v1"), ("/chat/completions/", "/v1")])
def test_a_base_url_that_ends_in_the_endpoint_is_understood(url, wanted):
    assert make_client("http://h/v1" + url).base_url == "http://h" + wanted


@pytest.mark.parametrize("url", ["http://h/v1?key=1", "http://h/v1#x", "http://h?x"])
def test_a_base_url_with_a_query_is_refused(url):
    with pytest.raises(BadInput, match="without a query"):
        make_client(url)


# ------------------------------------------------------------------------------- what models say


FENCED = "Use it:\n```xml\n<thinking>\nplan\n</thinking>\n```\nBye."
HARMONY = ("<|channel|>analysis<|message|>x<|end|><|start|>assistant"
           "<|channel|>final<|message|>ANSWER")
APRIEL = ("Here are my reasoning steps:\nx\n[BEGIN FINAL RESPONSE]\nA\n[END FINAL RESPONSE]\n"
          "<|end|>")


@pytest.mark.parametrize("text, wanted", [
    ("<think>a</think>\n\nb", ("a", "b")), ("\n<think>\na\n</think>b", ("a", "b")),
    ("[THINK]a[/THINK]b", ("a", "b")), ("<think>a", ("<think>a", "")),
    ("<think>\n\n</think>\n\nb", ("", "b")), ("<think>a</think><think>b</think>c", ("a\n\nb", "c")),
    ("a\n</think>\n\nb", ("a", "b")), ("</think>b", ("", "b")), ("", ("", "")),
    # other models
    (HARMONY, ("x", "ANSWER")), (HARMONY + "<|return|>", ("x", "ANSWER")),
    (HARMONY.removeprefix("<|channel|>analysis<|message|>"), ("x", "ANSWER")),
    (HARMONY.partition("<|end|>")[0], ("<|channel|>analysis<|message|>x", "")),
    ("<|channel|>final<|message|>ANSWER", ("", "ANSWER")),
    ("analysisx y.assistantfinalANSWER", ("x y.", "ANSWER")),
    ("<|channel>thought\nx\n<channel|>ANSWER", ("x", "ANSWER")),
    ("<|START_THINKING|>x<|END_THINKING|><|START_RESPONSE|>A<|END_RESPONSE|>", ("x", "A")),
    ("<|START_RESPONSE|>A<|END_RESPONSE|>", ("", "A")), ("◁think▷x◁/think▷A", ("x", "A")),
    ("<think>x</think>\n<|begin_of_box|>A<|end_of_box|>", ("x", "A")),
    ("<think>\nx\n</think>\n<answer>\nA\n</answer>", ("x", "A")),
    ("<think>\nx\n</think>\n<answer>\nA", ("x", "A")), ("<seed:think>x</seed:think>A", ("x", "A")),
    ("Here is my thought process: x\nHere is my response: A", ("x", "A")),
    ("<|begin_of_thought|>\n\nx\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nA\n\n"
     "<|end_of_solution|>", ("x", "A")), ("\ufeff<hy_think>x</hy_think>A", ("x", "A")),
    ("<|think|>x<|end|><|begin|>assistant<|content|>A<|end|>", ("x", "A")),
    (APRIEL, ("x", "A")), (APRIEL.partition("\n")[2], ("x", "A")),
    ("Thinking...\nx\n...done thinking.\n\nA", ("x", "A")), ("\u200b<think>x</think>A", ("x", "A")),
    *(("A" + end, ("", "A")) for end in (
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<turn|>", "<seed:eos>", "<|im_end|>\n", "</s>",
        "\n\n<|eot_id|>", "<｜end▁of▁sentence｜>", "<end_of_turn>")),
    # a tag written twice, a block in a block
    ("<think>\nx\n</think>\n\n</think>\n\nA", ("x", "A")), ("x\n</think>\n</think>\nA", ("x", "A")),
    ("<think>a<think>b</think>c</think>A", ("a<think>b</think>c", "A")),
    ("<think>\n<think>\nx\n</think>\nA", ("<think>\nx", "A")),
    ("<think>a<think>b</think>c\n<think>d</think>", ("a<think>b", "c\n<think>d</think>")),
    # the prompt has the opening tag
    ("I weigh it.</think>It is fair.", ("I weigh it.", "It is fair.")),
    ("I weigh it. </think> It is fair.", ("I weigh it.", "It is fair.")),
    ('He says "so"</think>"Fair."', ('He says "so"', '"Fair."')),
    ('He writes "</think>" here.</think>A', ('He writes "</think>" here.', "A")),
    ("The <think> tag is his.\n</think>\nA", ("The <think> tag is his.", "A")),
    ("So:\n```\nx\n</think>\n\nA\n```\ny\n```", ("So:\n```\nx", "A\n```\ny\n```")),
    # a closing tag that the thoughts quote
    ("<think>He writes `</think>` here.</think>A", ("He writes `</think>` here.", "A")),
    ("<think>He writes </think> here.\n</think>\nA", ("He writes </think> here.", "A")),
    ("<think>\n```\n</think>\n```\nSo.</think>A", ("```\n</think>\n```\nSo.", "A")),
    ("<think>The `</think>` tag", ("<think>The `</think>` tag", "")),
    ("<think>a ` b\n</think>\nuse `x`", ("a ` b", "use `x`")),
    # answers that show the tags
    *((text, ("", text)) for text in (
        FENCED, FENCED + "\n```", FENCED.replace("<thinking>\n", ""),
        FENCED.replace("```xml\n", "").replace("```\n", ""), "b <think>a</think>",
        "The tag </think> ends it.", "Close with `</think>`.", "So: <think>plan</think>. Bye",
        "Like: <thinking>\nplan\n</thinking>\nBye.", "analysis of it", "<answer>A</answer>",
        "Here are my reasoning steps: one", "Thinking... it is A", "It ends <|im_end|> here."))])
def test_split_thinking(text, wanted):
    assert split_thinking(text) == wanted


@pytest.mark.parametrize("unit", ["<think>", "</think>", "<think></think>", " </think>", " ", "`",
                                  "```\n", "\t<think>\n", "<|end|>", "<|channel|>final", '"',
                                  "<think> </think> ", "analysisa assistantfinal", "</s>\n", "<|a",
                                  "<think>a</think>b</think>", "a<think>b\n</think>c",
                                  "Here are my reasoning steps:", "\n</think>x"])
def test_split_thinking_is_linear(unit):
    for before in ("", "<think>", "x"):
        start = time.process_time()
        split_thinking(before + unit * (500_000 // len(unit)) + "x")
        assert time.process_time() - start < 3


def replies(scripted, message, finish="stop"):
    choice = {"message": message, "finish_reason": finish}
    return scripted(lambda path, request: {"choices": [choice],
                                           "usage": {"completion_tokens": 7}})


@pytest.mark.parametrize("message, finish, part", [
    ({"content": None, "reasoning_content": "hm"}, "length", "spent --max_tokens on thinking"),
    ({"content": ""}, "max_tokens", "spent --max_tokens on thinking"),
    ({"content": ""}, "MAX_TOKENS", "spent --max_tokens on thinking"),
    ({"content": "<think>hm"}, "stop", "spent --max_tokens on thinking"),
    ({"content": None, "refusal": "I won't."}, "stop", "filter refused: I won't."),
    ({"content": None, "tool_calls": [{}]}, "tool_calls", "called a tool"),
    ({"content": None}, "content_filter", "filter refused: content_filter"),
    ({"content": ""}, "SAFETY", "filter refused: safety"),
    ({"content": ""}, "refusal", "filter refused: refusal"),
    ({"content": "<think>hm"}, "other", "ended the reply without text: other"),
    ({"content": ""}, "OTHER", "ended the reply without text: other")])
def test_a_reply_without_text_says_why_and_is_asked_for_once(message, finish, part, scripted):
    server = replies(scripted, message, finish)
    client = make_client(server.url, retries=3)
    reply = ask(client)
    assert part in reply.problem and reply.text == "" and len(server.requests) == 1
    assert reply.refused == ("filter refused" in part)
    assert client.counts["tokens_out"] == 7


@pytest.mark.parametrize("finish", ["STOP", "end", "eos", "COMPLETE", None])
def test_a_finished_reply_is_not_cut_and_an_empty_one_is_asked_for_again(finish, scripted):
    reply = ask(make_client(replies(scripted, {"content": "b"}, finish).url))
    assert reply.finish in FINISHED and not is_cut({"teacher": {"finish": [finish]}})
    server = replies(scripted, {"content": ""}, finish)
    with pytest.raises(RowFailed, match="unexpected reply"):
        ask(make_client(server.url, retries=1))
    assert len(server.requests) == 2


@pytest.mark.parametrize("finish", ["SAFETY", "refusal", "content_filter", "length"])
def test_half_a_text_is_kept_and_marked(finish, scripted):
    reply = ask(make_client(replies(scripted, {"content": "half"}, finish).url))
    assert (reply.text, reply.finish, reply.problem) == ("half", finish.lower(), "")
    assert is_cut({"teacher": {"finish": [reply.finish]}})


@pytest.mark.parametrize("finish", ["error", "ERROR", "abort"])
def test_a_reply_that_the_server_broke_off_is_asked_for_again(finish, scripted):
    finishes = iter([finish, "stop"])
    server = scripted(lambda path, request: says("half a text", next(finishes)))
    reply = ask(make_client(server.url, retries=1))
    assert reply.finish == "stop" and len(server.requests) == 2


@pytest.mark.parametrize("finish", ["stop", None])
@pytest.mark.parametrize("place", ["choice", "reply"])
def test_half_a_text_beside_an_error_is_asked_for_again(place, finish, scripted):
    half, error = says("half a text", finish), {"error": {"code": 502, "message": "died"}}
    broken = half | error if place == "reply" else {"choices": [half["choices"][0] | error]}
    answers = iter([broken, says("whole")])
    server = scripted(lambda path, request: next(answers))
    assert ask(make_client(server.url, retries=1)).text == "whole"


@pytest.mark.parametrize("message, text", [
    ({"reasoning_content": "hm", "content": "\n\nA\n"}, "A\n"), ({"content": "\nA"}, "\nA")])
def test_the_lines_before_an_answer_go_with_its_thoughts(message, text, scripted):
    assert ask(make_client(replies(scripted, message).url)).text == text


@pytest.mark.parametrize("usage, wanted", [
    ({"completion_tokens": 7}, 7), ({"completion_tokens": 7, "total_tokens": 12}, 7),
    ({"completion_tokens": 7, "total_tokens": 112}, 107),  # Gemini, Grok
    ({"completion_tokens": 107, "completion_tokens_details": {"reasoning_tokens": 100}}, 107),
    ({"completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 100}}, 107),
    ({"completion_tokens": 7, "completion_tokens_details": None}, 7), (None, 0)])
def test_thinking_outside_completion_tokens_is_counted(usage, wanted, scripted):
    usage = usage and {"prompt_tokens": 5} | usage
    client = make_client(scripted(lambda path, request: says("b") | {"usage": usage}).url)
    assert ask(client).tokens == client.counts["tokens_out"] == wanted


def test_content_in_parts_and_thinking_apart(scripted):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    reply = ask(make_client(replies(scripted, {"content": parts, "reasoning": "hm"}).url))
    assert (reply.text, reply.thinking, reply.problem) == ("ab", "hm", "")
    thoughts = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}  # Magistral
    reply = ask(make_client(replies(scripted, {"content": [thoughts, parts[0]]}).url))
    assert (reply.text, reply.thinking, reply.problem) == ("a", "hm", "")


def test_thoughts_and_the_model_that_answered_stand_in_the_row_per_reply(scripted):
    """The first reply has both, the others neither; no thought is sent back."""
    said = iter([says("<think>\nhm\n</think>\nA") | {"model": "m-2026"}, says("B"), says("C")])
    server = scripted(lambda path, request: next(said))
    task, row = load_task(f"{ROOT}/toy/task.toml"), {"prompt": "q"}
    args = SimpleNamespace(model="m", max_tokens=9, temperature=0.7)
    row = teacher.self_critique(make_client(server.url), task, args, row)
    assert [row[key] for key in ("rejected", "critique", "chosen")] == ["A", "B", "C"]
    assert row["teacher"] == {"finish": ["stop"] * 3, "tokens": row["teacher"]["tokens"],
                              "thinking": ["hm", "", ""], "served": ["m-2026", "", ""]}
    assert "hm" not in json.dumps(server.requests)
    said = iter([says("<think>\nhm\n</think>\nFinal score: 4") | {"model": "m-2026"},
                 says("Final score: 3")])
    first, second = (read_reply(ask(make_client(server.url)), task.judge, float)
                     for _ in range(2))
    assert first == {"verdict": 4, "finish": "stop", "reply": "Final score: 4", "thinking": "hm",
                     "served": "m-2026"}
    assert second == {"verdict": 3, "finish": "stop", "reply": "Final score: 3"}


@pytest.mark.parametrize("named, served", [("m", ""), (None, ""), ("m-2026", "m-2026")])
def test_the_model_that_the_server_names_is_kept_if_it_is_another(named, served, scripted):
    server = scripted(lambda path, request: says("b") | {"model": named})
    assert ask(make_client(server.url)).served == served


def test_an_error_in_a_reply_with_status_200_counts_as_its_code(scripted):
    answers = iter([{"error": {"message": "Provider returned error", "code": 502}}, says("b")])
    server = scripted(lambda path, request: next(answers))
    assert ask(make_client(server.url, retries=1)).text == "b"
    server = scripted(lambda path, request: {"error": {"message": "content is blocked",
                                                       "code": 400}})
    with pytest.raises(RowFailed, match="answered 400: content is blocked"):
        ask(make_client(server.url, retries=3))
    assert len(server.requests) == 1  # it was retried as an unexpected reply
    server = scripted(lambda path, request: {"error": "overloaded"})
    with pytest.raises(RowFailed, match="answered 500: overloaded"):
        ask(make_client(server.url, retries=1))
    assert len(server.requests) == 2


# --------------------------------------------------------------------------- what servers refuse


@pytest.fixture
def refusing(serve):
    """Starts a server that answers "fine", or the (status, JSON) that a function of the request
    gives; returns it with .url and .requests.
    """
    def start(refusal):
        class Refusing(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.server.requests.append(request)
                status, reply = refusal(request) or (200, says("fine"))
                content = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
        server.requests = []
        return serve(server)

    return start


SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"properties": {
    "Final score": {"type": "integer", "minimum": 0, "maximum": 5}}}}}
MESSAGES = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Hm"}]


def ask_all(client):
    """Ask with every parameter that a server may refuse."""
    return chat(client, MESSAGES, "m", 9, 0, seed=1, response_format=SCHEMA, logprobs=True,
                top_logprobs=10)


def error(message, **more):
    return {"error": {"message": message} | more}


LOGPROBS, BOUNDS = {"logprobs", "top_logprobs"}, {"minimum", "maximum"}
OPENROUTER = json.dumps(error("Unsupported parameter: 'seed' is not supported", param="seed"))
REFUSALS = [  # (what is refused, status, reply)
    ({"temperature"}, 400, error("invalid temperature: only 1 is allowed for this model")),
    ({"temperature"}, 400, error("temperature must be strictly positive")),
    ({"temperature"}, 422, {"detail": [{"loc": ["body", "temperature"], "msg": "Input should be "
                                        "greater than 0", "input": 0, "type": "greater_than"}]}),
    ({"temperature"}, 400, error("Unsupported value: 'temperature' does not support 0 with this "
                                 "model. Only the default (1) value is supported.")),
    (LOGPROBS, 400, [error("Logprobs is not enabled for models/gemini-9", code=400,
                           status="INVALID_ARGUMENT")]),
    (LOGPROBS, 403, error("You are not allowed to request logprobs from this model")),
    (LOGPROBS, 400, error("Cannot request more than 5 logprobs.")),
    (LOGPROBS, 404, error("No endpoints found that support `top_logprobs`")),
    (LOGPROBS, 500, error("Unsupported param: logprobs")),
    ({"seed"}, 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"],
                                 "msg": "Extra inputs are not permitted", "input": 1}]}),
    ({"seed"}, 400, error("Provider returned error", metadata={"raw": OPENROUTER})),
    ({"seed"}, 400, error("This is refused. " * 20 + "The parameter seed is not supported")),
    ({"seed"}, 400, error("Unsupported parameter. Supported: temperature, max_tokens, logprobs",
                          param="seed")),
    ({"seed"}, 400, error("Supported are temperature and logprobs. `seed` is not known")),
    ({"seed"}, 400, "Unknown field: seed"),
    (BOUNDS, 400, error("For 'integer' type, property 'minimum' is not supported")),
    (BOUNDS, 400, error("Invalid schema for response_format 'verdict': 'maximum' is not "
                        "permitted.", param="response_format")),
    (BOUNDS | {"response_format"}, 400, error("Invalid schema for response_format 'verdict'")),
    ({"response_format"}, 400, error("This response_format type is unavailable now")),
    ({"response_format"}, 501, error("json_schema is not supported by this server")),
    ({"max_tokens"}, 400, error("Unsupported parameter: 'max_tokens' is not supported with this "
                                "model. Use 'max_completion_tokens' instead.", param="max_tokens")),
    ({"system"}, 400, error("System role not supported")),
    ({"system"}, 400, error("Unsupported value: 'messages[0].role' does not support 'system' with "
                            "this model.", param="messages[0].role")),
    ({"system"}, 400, error("Developer instruction is not enabled for models/gemma-3")),
    ({"system"}, 500, error("Conversation roles must alternate user/assistant/user/assistant")),
    (LOGPROBS, 422, {"error": "Input validation error: `top_n_tokens` must be >= 0 and <= 5. "
                              "Given: 10", "error_type": "validation"}),
    *((LOGPROBS, 400, error(message)) for message in (
        "top_logprobs: maximum is 5, got 10", "topLogprobs out of bounds",
        "Malformed input request: #: extraneous key [top_logprobs]")),
    (LOGPROBS, 404, error("No endpoints found that can handle the requested parameters.")),
    (LOGPROBS | {"seed"}, 404, error("No endpoints found that can handle the requested "
                                     "parameters.")),
    ({"seed"}, 404, error("No endpoints found for the requested parameters: seed")),
    *(({"temperature"}, 400, error(message)) for message in (
        "temperature参数非法。请检查文档。", "参数 temperature 只能为 1", "不支持temperature",
        "This model does not support sampling parameters")),
    *(({"response_format"}, 400, error(message)) for message in (
        "Unknown name \"additionalProperties\" at 'generation_config.response_schema'",
        "JSON schema mode is not supported with this model.", "JSON mode is not enabled",
        "guided decoding is not supported with speculative decoding",
        "'m' does not support output format.",
        "input_schema.properties: Property keys should match pattern '^[a-z]{1,64}$'")),
    ({"max_tokens"}, 400, error("this model is not supported MaxTokens, please use "
                                "MaxCompletionTokens")),
    *(({"system"}, 400, error(message)) for message in (
        "messages.0.role: Input should be 'user' or 'assistant'", "messages 参数非法。不支持system角色",
        "Only user and assistant roles are supported!", "First message must be from user",
        "Conversation must start with a user message")),
    ({"system"}, 422, {"detail": [{"type": "literal_error", "loc": ["body", "messages", 0, "role"],
                                   "msg": "Input should be 'user' or 'assistant'"}]}),
]


@pytest.mark.parametrize("names, status, reply", REFUSALS)
def test_a_refused_parameter_is_left_out_and_nothing_else(names, status, reply, refusing, capsys):
    """A status of 5xx is believed the second time."""
    last = max(names - BOUNDS - LOGPROBS or names, key=len)
    more = status >= 500
    server = refusing(lambda request: (status, reply) if f'"{last}"' in json.dumps(request)
                      else None)
    client = make_client(server.url, retries=1)
    reply = ask_all(client)
    assert reply.text == "fine" and set(client.refused) == names
    assert reply.left_out == sorted(names & {"temperature", "seed", "response_format"})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(server.requests) - 1 - more == (2 if len(names) == 3 else 1)
    assert all("the server does not take `" in line for line in lines)
    assert ask_all(client).text == "fine" and capsys.readouterr().err == ""
    first, sent = server.requests[0], server.requests[-1]
    assert server.requests[-2] == sent and client.counts["retries"] == more  # learned
    for name in first.keys() - names - {"messages", "response_format"}:
        assert sent[name] == first[name]
    if "max_tokens" in names:
        assert sent["max_completion_tokens"] == 9
    joined = [MESSAGES[1] | {"content": "Judge.\n\nHi"}, *MESSAGES[2:]]
    assert sent["messages"] == (joined if "system" in names else MESSAGES)
    bounded = {"type": "integer"} if names >= BOUNDS else {"type": "integer", "minimum": 0,
                                                          "maximum": 5}
    assert "response_format" in names or bounded == sent["response_format"]["json_schema"][
        "schema"]["properties"]["Final score"]


def test_several_refused_parameters_are_left_out_one_at_a_time(refusing, capsys):
    def refusal(request):
        for name in ("max_tokens", "temperature", "seed"):
            if name in request:
                return 400, error(f"Unsupported parameter: '{name}' is not supported", param=name)

    server = refusing(refusal)
    client = make_client(server.url)
    assert [ask_all(client).text for _ in range(3)] == ["fine"] * 3
    assert len(server.requests) == 6 and len(capsys.readouterr().err.splitlines()) == 3
    assert set(client.refused) == {"max_tokens", "temperature", "seed"}


def test_a_busy_server_that_repeats_the_request_refuses_nothing(refusing, capsys):
    busy = error('No healthy upstream; request was: {"temperature": 0, "seed": 1}')
    server = refusing(lambda request: (503, busy) if len(server.requests) == 1 else None)
    client = make_client(server.url, retries=1)
    assert ask_all(client).left_out == [] and client.refused == {}
    assert server.requests[0] == server.requests[1] and capsys.readouterr().err == ""


def test_a_row_says_what_the_server_did_not_take(refusing):
    """Of the teacher's replies and the judge's alike; log-probabilities shape no answer."""
    server = refusing(lambda request: next(
        ((400, error(f"Unsupported parameter: {name}")) for name in ("temperature", "logprobs")
         if name in request), None))
    task, client = load_task(f"{ROOT}/toy/task.toml"), make_client(server.url)
    args = SimpleNamespace(model="m", max_tokens=9, temperature=0.7, samples=2, verdict_retries=0,
                           json_verdicts=False)
    row = teacher.self_critique(client, task, args, {"prompt": "q"})
    assert row["teacher"]["left_out"] == [["temperature"]] * 3
    judge = reward.score_row(client, task, args, row)["judge"]
    assert [reply["left_out"] for reply in sum(judge.values(), [])] == [["temperature"]] * 4


@pytest.mark.parametrize("status, reply, is_own", [
    (400, error("'max_tokens' is too large: 9.", param="max_tokens"), True),
    (400, error("max_tokens is too large: 9. This model supports at most 5 completion tokens",
                param="max_tokens"), True),
    (400, error("This model's maximum context length is 8 tokens. However, you requested 9 in the "
                "messages", code="context_length_exceeded"), True),
    (400, error("The request exceeds the available context size"), True),
    (403, error("Your input was flagged by moderation: `temperature` is not allowed"), True),
    (413, "Payload too big", True), (400, error("No connected db."), False),
    (403, error("Forbidden"), False)])
def test_a_refused_text_is_the_rows_own_failure(status, reply, is_own, refusing, capsys):
    client = make_client(refusing(lambda request: (status, reply)).url)
    with pytest.raises(RowFailed, match=f"answered {status}") as caught:
        ask_all(client)
    assert caught.value.is_own == is_own
    assert not client.refused and capsys.readouterr().err == ""  # not learned: it did not help


@pytest.mark.parametrize("status", [401, 404, 498])
def test_one_refusal_after_replies_is_one_rows_failure(status, refusing):
    server = refusing(lambda request: (status, {}) if len(server.requests) == 2 else None)
    client = make_client(server.url)
    assert ask(client).text == "fine"
    with pytest.raises(RowFailed, match=f"answered {status}") as caught:
        ask(client)
    assert ask(client).text == "fine" and not caught.value.is_own
    with pytest.raises(BadInput if status != 498 else RowFailed):  # before any reply
        ask(make_client(refusing(lambda request: (status, {})).url))


def test_a_long_wait_is_said_once(refusing, monkeypatch, capsys):
    monkeypatch.setattr("infra.client.time.sleep", lambda seconds: None)
    monkeypatch.setattr("infra.client.retry_after", lambda header: 3000)
    client = make_client(refusing(lambda request: (429, "later")).url, retries=2)
    for _ in range(2):
        with pytest.raises(RowFailed, match="answered 429"):
            ask(client)
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch("warning: .* answered 429: later; waiting 3[0-3].. s [(]said once[)]", line)


def test_retry_after_0_keeps_the_own_wait(raw, monkeypatch):
    waits = []
    monkeypatch.setattr("infra.client.time.sleep", waits.append)
    url = raw(lambda connection: connection.sendall(whole(503, b"{}", "Retry-After: 0")))
    with pytest.raises(RowFailed, match="asked 7 times"):
        ask(make_client(url, retries=6))
    assert all(2**i / 4 <= wait <= 2**i * 0.75 for i, wait in enumerate(waits)) and len(waits) == 6


def test_what_cannot_be_learned_has_flags(refusing):
    parser = Parser("")
    add_stage_flags(parser, max_tokens=9)
    server = refusing(lambda request: None)
    flags = ["--out", "o", "--model", "m", "--base_url", server.url]
    given = parser.parse_args([*flags, "--no_logprobs", "--extra_body",
                               '{"chat_template_kwargs": {"enable_thinking": false}, "seed": 5}'])
    ask_all(Client(given))
    ask_all(Client(parser.parse_args(flags)))
    sent, plain = server.requests
    assert sent["chat_template_kwargs"] == {"enable_thinking": False} and sent["seed"] == 5
    assert not LOGPROBS & sent.keys() and sent.keys() | LOGPROBS == plain.keys() | {
        "chat_template_kwargs"}
    for text in ("[1]", "{", "7", ""):
        with pytest.raises(BadInput, match="--extra_body: must be an object"):
            parser.parse_args([*flags, "--extra_body", text])
