"""The HTTP client of both stages and of eval.py: OpenAI's chat protocol, retries, the key.

A key comes from an environment variable. It is sent in one header, and never printed or stored.
Nothing that a server sends may hang the run, fill the memory or bring the key into a file.
"""
import base64
import contextlib
import json
import os
import random
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from infra.command import BadInput, at_least, between, one_line, warn
from infra.resumable import RowFailed
from infra.rows import FINISHED

# http(s)://host[:port][/path], and no query, user name or password in it
URL = re.compile(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d*)?(/[^\s?#]*)?", re.IGNORECASE)
REPLY_BYTES = 16 * 2**20  # the longest reply that is read

# --------------------------------------------------------------------------------- what is asked


@dataclass
class Reply:
    text: str  # the answer, "" if there is none
    finish: str | None  # one of rows.FINISHED, or else why it is incomplete: "length", ...
    tokens: int
    thinking: str  # what the model wrote before the answer, "" if nothing
    problem: str  # why there is no answer and what to do, "" if there is one
    logprobs: list  # [(token, {a token in its place: its log-probability})], [] if not given


def chat(client, messages, model, max_tokens, temperature, **others):
    """The model's Reply to messages. Raises the errors of Client.post.

    others are parameters of the protocol, such as seed; None is not sent. A reply without text is
    asked for again if the next one may have some.
    """
    def read(answer):
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        content = message.get("content") or ""
        if isinstance(content, list):  # text in parts
            content = "".join(part["text"] for part in content if part["type"] == "text")
        thinking, text = split_thinking(content)
        if not thinking:  # the server may have taken it out itself
            thinking = message.get("reasoning_content") or message.get("reasoning") or ""
        tokens, cut = usage.get("completion_tokens") or 0, finish in ("length", "max_tokens")
        client.count(tokens_in=usage.get("prompt_tokens") or 0, tokens_out=tokens, cut=cut,
                     unfinished=not cut and finish not in FINISHED, thinking=bool(thinking))
        problem = "" if text.strip() else no_text(message, finish, thinking and content)
        return Reply(text, finish, tokens, thinking, problem, token_logprobs(choice))

    body = {"model": model, "messages": messages,
            "max_tokens": max_tokens, "temperature": temperature}
    body |= {name: value for name, value in others.items() if value is not None}
    return client.post(f"{client.base_url}/chat/completions", body, read)


def token_logprobs(choice):
    """Reply.logprobs of a choice. Other forms than OpenAI's count as none."""
    try:
        return [(item["token"], {other["token"]: float(other["logprob"])
                                 for other in item["top_logprobs"]})
                for item in choice["logprobs"]["content"]]
    except (LookupError, TypeError, ValueError):
        return []


def no_text(message, finish, unclosed_thinking):
    """Why a reply has no text, and what to do. ValueError if the next one may have some."""
    if message.get("refusal"):
        return f"the model refused: {one_line(message['refusal'])[:200]}"
    if message.get("tool_calls"):
        return "the model called a tool instead of answering; serve it without tools"
    if finish == "content_filter":
        return "the server's content filter held the answer back"
    if finish not in FINISHED or unclosed_thinking:
        return "the model spent --max_tokens on thinking: raise it"
    raise ValueError("no text")


THINKING = r"(?:think|thinking|thought|reasoning|seed:think)"
OPENED = re.compile(rf"\s*[<\[]{THINKING}[>\]]", re.IGNORECASE)
CLOSED = re.compile(rf"[<\[]/{THINKING}[>\]]", re.IGNORECASE)
CLOSED_LINE = re.compile(rf"^[ \t]*{CLOSED.pattern}[ \t]*$", re.IGNORECASE | re.MULTILINE)


def split_thinking(text):
    """(thinking, answer): the <think> block at the start of a text, and what follows it.

    A block that never ends leaves no answer: the reply was cut. Some chat templates write the
    opening tag into the prompt; then a closing tag that has a line to itself ends the block.
    """
    opened = OPENED.match(text)
    closed = CLOSED.search(text, opened.end()) if opened else CLOSED_LINE.search(text)
    if not closed:
        return (text, "") if opened else ("", text)
    start = opened.end() if opened else 0
    return text[start:closed.start()].strip(), text[closed.end():].lstrip()


# ------------------------------------------------------------------------------------ the exchange

# What a refusal may name -> {parameter of the request: the name that is taken instead, or None}
INSTEAD = {"max_tokens": {"max_tokens": "max_completion_tokens"},
           "temperature": {"temperature": None},
           "response_format|json_schema": {"response_format": None},
           "logprobs|top_logprobs": {"logprobs": None, "top_logprobs": None}}
REFUSED = re.compile("unsupported|not support|deprecat|instead|unavailable|unrecogni[sz]ed|"
                     "not permitted|may only|only the default|must be one of", re.IGNORECASE)


class NoReply(Exception):
    """No whole reply. The text says why."""


class Adapter(HTTPAdapter):
    """Knows the socket of its thread's connection, so that a timer can end an exchange.

    requests limits each wait for bytes, not the sum of all waits.
    """
    socket = None

    def get_connection_with_tls_context(self, *args, **kwargs):
        pool, adapter = super().get_connection_with_tls_context(*args, **kwargs), self
        if pool.ConnectionCls is type(pool).ConnectionCls:  # a new pool

            class Connection(pool.ConnectionCls):
                def connect(self):
                    super().connect()
                    adapter.socket = self.sock

            pool.ConnectionCls = Connection
        return pool

    def hang_up(self):
        with contextlib.suppress(OSError, TypeError):  # it was not connected, or is closed already
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


class PerThread(threading.local):
    def __init__(self):
        self.adapter, self.session = Adapter(), requests.Session()  # keeps a connection open
        self.session.mount("http://", self.adapter)
        self.session.mount("https://", self.adapter)
        self.session.headers["Accept-Encoding"] = "identity"  # a small one can unpack to gigabytes
        # A redirect would carry the text to another host.
        self.session.get_redirect_target = lambda response: None


class Client:
    """A server: its address and key, when to give up, and counts of all requests.

    args has base_url, key_env, timeout and retries. BadInput if they cannot be right.
    """

    def __init__(self, args):
        self.base_url = args.base_url.rstrip("/").removesuffix("/chat/completions")
        if not URL.fullmatch(args.base_url):
            raise BadInput("--base_url: must look like http://127.0.0.1:8000/v1, without a query, "
                           "a user name or a password")
        self.key = os.environ.get(args.key_env or "", "").strip()
        if args.key_env and not self.key:
            raise BadInput(f"--key_env {args.key_env}: no key in that environment variable; "
                           f"export {args.key_env}=... first")
        if not re.fullmatch("[!-~]*", self.key):
            raise BadInput(f"--key_env {args.key_env}: the key in that variable must be one line "
                           "of plain characters")
        self.secret = secret_pattern(self.key)
        self.timeout, self.retries = args.timeout, args.retries
        self.threads, self.lock, self.counts = PerThread(), threading.Lock(), Counter()
        self.refused = {}  # parameters that this server does not take, as in INSTEAD

    def count(self, **numbers):
        with self.lock:
            self.counts.update(numbers)

    def authorize(self, request):
        """Add the key. As the session's `auth`, this also keeps requests from reading ~/.netrc."""
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def post(self, url, body, read):
        """Send `body` and return read(the JSON reply). Retry with growing waits after failures.

        Transient failures are: no reply, status 408, 409, 429 or 5xx, and a reply that `read`
        cannot read. RowFailed after the last retry, or at once if the server refuses this request.
        BadInput if it would refuse all requests, or has never replied.
        """
        start, wait = time.monotonic(), 0.0
        for attempt in range(self.retries + 1):
            if attempt > 0:
                time.sleep(wait)
            self.count(retries=int(attempt > 0))
            wait = min(2 ** attempt / 2, 60) * random.uniform(0.5, 1.5)
            try:
                status, headers, reply = self.exchange(url, body)
            except NoReply as error:
                reason = (f"no whole reply from {url} ({error}); check that the server runs, "
                          "--base_url, --timeout and --concurrency")
                continue
            self.count(answered=1)
            if status == 200:
                try:
                    return read(reply)
                except (ValueError, LookupError, TypeError, AttributeError):
                    reason = f"{url} sent an unexpected reply: {server_message(reply)}"
                    continue
            reason = f"{url} answered {status}: {server_message(reply)}"
            if status in (401, 404) or 300 <= status < 400:  # any other request would fail alike
                raise BadInput(f"{reason}; check the key (--key_env), --model and --base_url")
            if status == 403:  # run_rows stops if all rows fail
                reason += "; moderation refuses this text, or the key (--key_env) is wrong"
            if status < 500 and status not in (408, 409, 429):  # a retry would fail alike
                raise RowFailed(reason)
            # The factor keeps the threads from returning all at once.
            wait = retry_after(headers.get("Retry-After", ""), wait) * random.uniform(1, 1.1)
        reason += f" (asked {self.retries + 1} times in {time.monotonic() - start:.0f} s)"
        raise RowFailed(reason) if self.counts["answered"] else BadInput(reason)

    def exchange(self, url, body):
        """(status, headers, JSON value or text) of one request, in --timeout seconds at most.

        Asks again if the server refuses a parameter that has another name, or can be left out.
        NoReply if there is no whole reply in that time, or one above REPLY_BYTES.
        """
        self.count(requests=1)
        names = {name: self.refused.get(name, name) for name in body}
        sent = {names[name]: value for name, value in body.items() if names[name]}
        content, end = bytearray(), time.monotonic() + self.timeout
        timer = threading.Timer(self.timeout, self.threads.adapter.hang_up)
        timer.start()
        try:
            with self.threads.session.post(url, json=sent, auth=self.authorize, stream=True,
                                           timeout=(min(10, self.timeout), self.timeout)
                                           ) as response:
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise NoReply("it is compressed, which was not asked for")
                for chunk in response.iter_content(2**16):
                    content += chunk
                    if len(content) > REPLY_BYTES:
                        raise NoReply(f"it is longer than {REPLY_BYTES >> 20} MiB")
            problem = ""
        except requests.RequestException as error:
            problem = type(error).__name__
        finally:
            timer.cancel()
        if time.monotonic() >= end:  # without an error too: the timer may have cut what was read
            problem = f"--timeout {self.timeout:g} is over"
        if problem:
            raise NoReply(problem)
        text = content.decode("utf-8", "replace")
        try:
            reply = self.clean(json.loads(text))
        except (ValueError, RecursionError):
            reply = self.clean(text)
        if response.status_code == 400 and self.learn_from(reply, sent):
            return self.exchange(url, body)
        return response.status_code, response.headers, reply

    def clean(self, value):
        """A JSON value whose strings hold neither the key nor lone surrogates.

        Some servers repeat the key in a message. A lone surrogate cannot be written as UTF-8.
        """
        if isinstance(value, dict):
            return {self.clean(name): self.clean(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.clean(item) for item in value]
        if not isinstance(value, str):
            return value
        text = self.secret.sub("[key]", value) if self.key else value
        text, replaced = re.subn("[\ud800-\udfff]", "\ufffd", text)
        if replaced:
            self.count(replaced=replaced)
        return text

    def learn_from(self, reply, sent):
        """Whether a 400 refuses a parameter of INSTEAD. It is then not sent again in this run."""
        error = reply.get("error") if isinstance(reply, dict) else None
        named = error.get("param") if isinstance(error, dict) else None
        message = server_message(reply)
        for words, names in INSTEAD.items():
            said = re.search(rf"\b(?:{words})\b", f"{named} {message}")
            if names.keys() & sent.keys() and said and REFUSED.search(message):
                with self.lock:
                    is_new = not names.keys() <= self.refused.keys()
                    self.refused |= names
                if is_new:
                    how = ", ".join(f"sent as {new}" if new else "left out"
                                    for new in dict.fromkeys(names.values()))
                    warn(f"the server does not take `{'`, `'.join(names)}`, now {how}: {message}")
                return True
        return False


def secret_pattern(key):
    """What finds a key in text: as it is, escaped as in JSON, or inside base64."""
    forms = ["".join(rf"(?:\\{{0,3}}{re.escape(c)}|\\{{1,3}}u00(?i:{ord(c):02x}))" for c in key)]
    for shift in range(3):  # base64 of a longer text depends on where in it the key begins
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(b"\0" * shift + key.encode()).decode()
            text = text[-(-8 * shift // 6):(8 * (shift + len(key))) // 6]  # the key's own bits
            forms += [re.escape(text)] if len(text) >= 8 else []
    return re.compile("|".join(forms))


def server_message(reply):
    """The error message in a reply, a JSON value or text, as one short printable line."""
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    message = error.get("message", error) if isinstance(error, dict) else error
    text = message if isinstance(message, str) else json.dumps(message)
    return one_line(text)[:200] or "an empty reply"


def retry_after(header, default):
    """Seconds to wait by a Retry-After header, a number or a date; at most an hour."""
    try:
        return min(Retry().parse_retry_after(header), 3600)
    except (InvalidHeader, ValueError, OverflowError):
        return default


# --------------------------------------------------------------------------------------- the flags


def add_stage_flags(parser, max_tokens, needs_server=True):
    """The flags of both stages."""
    parser.add_argument("--out", required=True, help="output rows; an existing file is continued")
    parser.add_argument("--base_url", required=needs_server,
                        help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=needs_server, help="the model's name on that server")
    add_client_flags(parser, max_tokens)
    parser.add_argument("--limit", type=at_least(1), help="read only the first N rows")
    parser.add_argument("--show", action="store_true", help="print each finished row")


def add_client_flags(parser, max_tokens):
    """The flags of every command that asks a server: both stages, and eval.py."""
    parser.add_argument("--key_env", help="environment variable with the key (default: no key)")
    parser.add_argument("--concurrency", type=between(1, 1024), default=8,
                        help="rows processed at once")
    parser.add_argument("--max_tokens", type=at_least(1), default=max_tokens, help="per reply")
    parser.add_argument("--timeout", type=between(0.1, 86400, float), default=120,
                        help="seconds for a whole reply")
    parser.add_argument("--retries", type=between(0, 100), default=6,
                        help="per request; 6 take 30 s")
