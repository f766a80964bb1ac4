"""The HTTP client against servers that misbehave, reasoning models, and refused parameters."""
import base64
import gzip
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import says

from infra.client import Client, chat, split_thinking
from infra.command import BadInput
from infra.resumable import RowFailed

KEY = "sk-se/cret-0123456789"
OK = json.dumps(says("fine")).encode()


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
    given = dict(base_url=url, key_env=None, timeout=1, retries=0) | others
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
    *(base64.b64encode(b"x" * n + KEY.encode() + b"yz").decode() for n in range(3)),
    base64.urlsafe_b64encode(f"Bearer {KEY}".encode()).decode()])
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


@pytest.mark.parametrize("text, wanted", [
    ("<think>a</think>\n\nb", ("a", "b")), ("\n<think>\na\n</think>b", ("a", "b")),
    ("[THINK]a[/THINK]b", ("a", "b")), ("<think>a", ("<think>a", "")),
    ("a\n</think>\n\nb", ("a", "b")), ("b <think>a</think>", ("", "b <think>a</think>")),
    ("The tag </think> ends it.", ("", "The tag </think> ends it.")), ("", ("", ""))])
def test_split_thinking(text, wanted):
    assert split_thinking(text) == wanted


def replies(scripted, message, finish="stop"):
    choice = {"message": message, "finish_reason": finish}
    return scripted(lambda path, request: {"choices": [choice],
                                           "usage": {"completion_tokens": 7}})


@pytest.mark.parametrize("message, finish, part", [
    ({"content": None, "reasoning_content": "hm"}, "length", "spent --max_tokens on thinking"),
    ({"content": ""}, "max_tokens", "spent --max_tokens on thinking"),
    ({"content": "<think>hm"}, "stop", "spent --max_tokens on thinking"),
    ({"content": None, "refusal": "I won't."}, "stop", "the model refused: I won't."),
    ({"content": None, "tool_calls": [{}]}, "tool_calls", "called a tool"),
    ({"content": None}, "content_filter", "content filter")])
def test_a_reply_without_text_says_why_and_is_asked_for_once(message, finish, part, scripted):
    server = replies(scripted, message, finish)
    client = make_client(server.url, retries=3)
    reply = ask(client)
    assert part in reply.problem and reply.text == "" and len(server.requests) == 1
    assert client.counts["tokens_out"] == 7


def test_content_in_parts_and_thinking_apart(scripted):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    reply = ask(make_client(replies(scripted, {"content": parts, "reasoning": "hm"}).url))
    assert (reply.text, reply.thinking, reply.problem) == ("ab", "hm", "")


def test_refused_parameters_are_switched_once(serve, capsys):
    seen = []

    class Strict(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(request)
            error = None
            if "max_tokens" in request:
                error = {"param": "max_tokens", "message": "Unsupported parameter: 'max_tokens' is "
                         "not supported with this model. Use 'max_completion_tokens' instead."}
            elif "temperature" in request:
                error = {"message": "Unsupported value: 'temperature' does not support 0.7 with "
                                    "this model. Only the default (1) value is supported."}
            content = json.dumps({"error": error}).encode() if error else OK
            self.send_response(400 if error else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    client = make_client(serve(ThreadingHTTPServer(("127.0.0.1", 0), Strict)).url)
    assert [ask(client).text for _ in range(3)] == ["fine"] * 3
    assert len(seen) == 5 and client.counts["retries"] == 0
    assert "max_tokens" not in seen[-1] and seen[-1]["max_completion_tokens"] == 9
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2 and "`temperature`, now left out" in err


def test_max_tokens_that_are_too_many_are_not_switched(raw):
    error = json.dumps({"error": {"message": "'max_tokens' is too large: 9."}}).encode()
    client = make_client(raw(lambda connection: connection.sendall(whole(400, error))))
    with pytest.raises(RowFailed, match="too large"):
        ask(client)
    assert not client.refused
