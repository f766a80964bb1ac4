"""The HTTP client of both stages and of eval.py: OpenAI's chat protocol, retries, the key.

A key comes from an environment variable. It is sent in one header, and never printed or stored.
Nothing that a server sends may hang the run, fill the memory or bring the key into a file.
"""
import argparse
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
from infra.refusals import adapted, is_about_the_row, refused_in
from infra.replies import BROKEN, CUT, no_text, parts_of, refusal_in, written
from infra.resumable import RowFailed
from infra.rows import FINISHED
from infra.thinking import split_thinking

# http(s)://host[:port][/path], and no query, user name or password in it
URL = re.compile(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d*)?(/[^\s?#]*)?", re.IGNORECASE)
REPLY_BYTES = 16 * 2**20  # the longest reply that is read
BUSY = (408, 409, 425, 429, 498)  # and 5xx: another try may succeed

# --------------------------------------------------------------------------------- what is asked


@dataclass
class Reply:
    text: str  # the answer, "" if there is none
    finish: str | None  # one of rows.FINISHED, or else why it is incomplete: "length", ...
    tokens: int  # written, thinking included
    thinking: str  # what the model wrote before the answer, "" if nothing
    problem: str  # why there is no answer and what to do, "" if there is one
    logprobs: list  # [(token, {a token in its place: its log-probability})], [] if not given
    refused: bool  # whether the model or a filter refused this text: others may pass
    served: str  # the model by the server's account, "" if it is the one asked for, or not said
    left_out: list  # what the server refuses of the parameters that shape an answer


def chat(client, messages, model, max_tokens, temperature, **others):
    """The model's Reply to messages. Raises the errors of Client.post.

    others are parameters of the protocol, such as seed; None is not sent. A reply without text, or
    one that the server broke off, is asked for again if the next one may be whole.
    """
    def read(answer):
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        finish = finish and finish.lower()  # Gemini: STOP
        content = message.get("content") or ""
        thinking, text = split_thinking(parts_of(content, "text"))
        unclosed = thinking and not text
        if not thinking:  # the server may have taken it out itself
            thinking = (message.get("reasoning_content") or message.get("reasoning")
                        or parts_of(content, "thinking"))
        text = text.lstrip("\n") if thinking else text  # vLLM leaves what stood before the answer
        tokens, cut = written(usage), finish in CUT
        served = one_line(str(answer.get("model") or model))[:200]
        client.count(tokens_in=usage.get("prompt_tokens") or 0, tokens_out=tokens, cut=cut,
                     unfinished=not cut and finish not in FINISHED, thinking=bool(thinking))
        if finish in BROKEN or choice.get("error"):
            raise ValueError("broken off")
        problem = "" if text.strip() else no_text(message, finish, unclosed)
        left_out = [name for name in ("temperature", "seed", "response_format")
                    if name in body and name in client.refused]
        return Reply(text, finish, tokens, thinking, problem, token_logprobs(choice),
                     bool(refusal_in(message, finish)), served if served != model else "", left_out)

    body = {"model": model, "messages": messages,
            "max_tokens": max_tokens, "temperature": temperature} | others | client.extra_body
    body = {name: value for name, value in body.items() if value is not None}
    return client.post(f"{client.base_url}/chat/completions", body, read)


def token_logprobs(choice):
    """Reply.logprobs of a choice. Other forms than OpenAI's count as none."""
    try:
        return [(item["token"], {other["token"]: float(other["logprob"])
                                 for other in item["top_logprobs"]})
                for item in choice["logprobs"]["content"]]
    except (LookupError, TypeError, ValueError):
        return []


# ------------------------------------------------------------------------------------ the exchange


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
    def __init__(self, url, key):
        self.adapter, self.session = Adapter(), requests.Session()  # keeps a connection open
        self.session.mount("http://", self.adapter)
        self.session.mount("https://", self.adapter)
        # Proxies and certificates: requests would search the environment at each request.
        settings = self.session.merge_environment_settings(url, {}, True, None, None)
        vars(self.session).update(settings, trust_env=False)  # nor is ~/.netrc read
        self.session.headers["Accept-Encoding"] = "identity"  # a small one can unpack to gigabytes
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"
        # A redirect would carry the text to another host.
        self.session.get_redirect_target = lambda response: None


class Client:
    """A server: its address and key, when to give up, and counts of all requests.

    args has base_url, key_env, timeout, retries, extra_body and no_logprobs. BadInput if they
    cannot be right.
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
        self.secret = re.compile("".join(  # the key, also where JSON escapes it
            rf"(?:\\{{0,3}}{re.escape(c)}|\\{{1,3}}u00(?i:{ord(c):02x}))" for c in self.key))
        self.timeout, self.retries = args.timeout, args.retries
        self.extra_body = args.extra_body
        self.threads = PerThread(self.base_url, self.key)
        self.lock, self.counts = threading.Lock(), Counter()
        self.first_long_wait = threading.Lock()  # its thread takes it for good, and says so
        # What this server does not take, as in refusals.OPTIONAL
        self.refused = dict.fromkeys(("logprobs", "top_logprobs")) if args.no_logprobs else {}

    def count(self, **numbers):
        with self.lock:
            self.counts.update(numbers)

    def post(self, url, body, read):
        """Send `body` and return read(the JSON reply). Retry with growing waits after failures.

        Transient failures are: no reply, a status in BUSY or 5xx, and a reply that `read` cannot
        read. RowFailed after the last retry, or at once if the server refuses this request.
        BadInput if it would refuse all requests, or has never replied.
        """
        start, wait, failed = time.monotonic(), 0.0, set()
        for attempt in range(self.retries + 1):
            if wait > 60 and self.first_long_wait.acquire(blocking=False):
                warn(f"{reason}; waiting {wait:.0f} s (said once)")
            if attempt > 0:
                time.sleep(wait)
            self.count(retries=int(attempt > 0))
            wait = min(2 ** attempt / 2, 60) * random.uniform(0.5, 1.5)
            try:
                status, headers, reply = self.negotiate(url, body, failed)
            except NoReply as error:
                reason = (f"no whole reply from {url} ({error}); check that the server runs, "
                          "--base_url, --timeout and --concurrency")
                continue
            self.count(answered=1)
            if status == 200:
                try:
                    result = read(reply)
                except (ValueError, LookupError, TypeError, AttributeError):
                    reason = f"{url} sent an unexpected reply: {server_message(reply)}"
                    continue
                self.count(read=1)
                return result
            reason = f"{url} answered {status}: {server_message(reply)}"
            would_last = status in (401, 404) or 300 <= status < 400
            if would_last and not self.counts["read"]:
                raise BadInput(f"{reason}; check the key (--key_env), --model and --base_url")
            if status < 500 and status not in BUSY:  # a retry would fail alike
                raise RowFailed(reason, is_own=status == 413 or is_about_the_row(reply))
            # The factor keeps the threads from returning all at once.
            wait = max(wait, retry_after(headers.get("Retry-After", "")) * random.uniform(1, 1.1))
        reason += f" (asked {self.retries + 1} times in {time.monotonic() - start:.0f} s)"
        raise RowFailed(reason) if self.counts["answered"] else BadInput(reason)

    def negotiate(self, url, body, failed):
        """The exchange(), again while the server refuses a parameter that can be left out.

        What a request succeeds without is not sent again in this run. A status of 5xx is a refusal
        only if an earlier attempt `failed` by the same names: a busy server may repeat the request.
        """
        refused, messages = dict(self.refused), []
        while True:
            status, headers, reply = self.exchange(url, adapted(body, refused))
            names = status >= 400 and status not in BUSY and refused_in(reply, body, refused)
            if not names or status >= 500 and not names.keys() <= failed:
                failed.update(names or ())
                break
            refused |= names
            messages.append((names, server_message(reply)))
        for names, message in messages if status == 200 else ():
            with self.lock:
                is_new = not names.keys() <= self.refused.keys()
                self.refused |= names
            if is_new:
                [instead] = set(names.values())
                how = f"sent as {instead}" if instead else "left out"
                warn(f"the server does not take `{'`, `'.join(names)}`, now {how}: {message}")
        return status, headers, reply

    def exchange(self, url, body):
        """(status, headers, JSON value or text) of one request, in --timeout seconds at most.

        NoReply if there is no whole reply in that time, or one above REPLY_BYTES.
        """
        self.count(requests=1)
        content, end = bytearray(), time.monotonic() + self.timeout
        timer = threading.Timer(self.timeout, self.threads.adapter.hang_up)
        timer.start()
        try:
            with self.threads.session.post(
                    url, json=body, timeout=(min(10, self.timeout), self.timeout)) as response:
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
        status, error = response.status_code, isinstance(reply, dict) and reply.get("error")
        if status == 200 and error:  # OpenRouter: the status of the server behind it
            code = isinstance(error, dict) and error.get("code")
            status = code if code in range(400, 600) else 500
        return status, response.headers, reply

    def clean(self, value):
        """A JSON value whose strings hold neither the key nor lone surrogates.

        Some servers repeat the key in a message. A lone surrogate cannot be written as UTF-8.
        """
        if isinstance(value, dict):
            return {self.clean(name): self.clean(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.clean(item) for item in value]
        if isinstance(value, str):
            value = self.secret.sub("[key]", value) if self.key else value
            value, replaced = re.subn("[\ud800-\udfff]", "\ufffd", value)
            if replaced:
                self.count(replaced=replaced)
        return value


def server_message(reply):
    """The error message in a reply, a JSON value or text, as one short printable line."""
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    message = error.get("message", error) if isinstance(error, dict) else error
    if isinstance(error, dict) and isinstance(error.get("metadata"), dict):  # OpenRouter
        message = f"{message} {error['metadata'].get('raw', '')}"
    text = message if isinstance(message, str) else json.dumps(message)
    return one_line(text)[:200] or "an empty reply"


def retry_after(header):
    """Seconds to wait by a Retry-After header, a number or a date: an hour at most, 0 if none."""
    with contextlib.suppress(InvalidHeader, ValueError, OverflowError):
        return min(Retry().parse_retry_after(header), 3600)
    return 0


# --------------------------------------------------------------------------------------- the flags


def json_object(text):
    """An argparse type."""
    with contextlib.suppress(RecursionError, ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f'must be an object such as {{"top_p": 0.9}}, not {text:.40}')


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
    parser.add_argument("--extra_body", type=json_object, default={},
                        help="JSON object that is added to every chat request")
    parser.add_argument("--no_logprobs", action="store_true",
                        help="do not ask for log-probabilities")
    parser.add_argument("--timeout", type=between(0.1, 86400, float), default=120,
                        help="seconds for a whole reply")
    parser.add_argument("--retries", type=between(0, 100), default=6,
                        help="per request; 6 take 30 s")
