"""The HTTP client of both stages and of eval.py: OpenAI's chat protocol, retries, the key.

A key comes from an environment variable. It is sent in one header, and never printed or stored.
"""
import json
import os
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from infra.command import BadInput, above_0, at_least, one_line, refuse
from infra.resumable import RowFailed

# http(s)://host[:port][/path], and no user name or password in it
URL = re.compile(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d*)?(/\S*)?", re.IGNORECASE)


@dataclass
class Reply:
    text: str
    finish: str  # "stop", or "length" if max_tokens cut it
    tokens: int


def chat(client, messages, model, max_tokens, temperature, seed=None):
    """The model's Reply to messages. Raises the errors of Client.post; no text is a failure."""
    def read(answer):
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        if not text.strip():
            raise ValueError("no text")
        tokens = usage.get("completion_tokens") or 0
        client.count(tokens_in=usage.get("prompt_tokens") or 0, tokens_out=tokens,
                     cut=int(finish == "length"))
        return Reply(text, finish, tokens)

    body = {"model": model, "messages": messages,
            "max_tokens": max_tokens, "temperature": temperature}
    if seed is not None:
        body["seed"] = seed
    return client.post(f"{client.base_url}/chat/completions", body, read)


class PerThread(threading.local):
    def __init__(self):
        self.session = requests.Session()  # keeps this thread's connection open


class Client:
    """A server: its address and key, when to give up, and counts of all requests.

    args has base_url, key_env, timeout and retries. BadInput if they cannot be right.
    """

    def __init__(self, args):
        key = os.environ.get(args.key_env or "", "").strip()
        refuse("",
               (not URL.fullmatch(args.base_url), "--base_url: must look like "
                "http://127.0.0.1:8000/v1, without a user name or password"),
               (args.key_env and not key, f"--key_env {args.key_env}: no key in that environment "
                                          f"variable; export {args.key_env}=... first"),
               (not re.fullmatch("[!-~]*", key), f"--key_env {args.key_env}: the key in that "
                                                 "variable must be one line of plain characters"))
        self.base_url, self.key = args.base_url.rstrip("/"), key
        self.timeout, self.retries = args.timeout, args.retries
        self.threads, self.lock, self.counts = PerThread(), threading.Lock(), Counter()

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
            self.count(requests=1, retries=int(attempt > 0))
            wait = min(2 ** attempt / 2, 60) * random.uniform(0.5, 1.5)
            try:
                response = self.threads.session.post(
                    url, json=body, auth=self.authorize, timeout=(10, self.timeout),
                    allow_redirects=False)  # a redirect would carry the text to another host
            except requests.RequestException as error:
                reason = (f"no whole reply from {url} ({type(error).__name__}); check that the "
                          "server runs, --base_url and --timeout")
                continue
            self.count(answered=1)
            # Some servers repeat the key in an error message. From here on, nothing holds it.
            content = response.content
            if self.key:
                content = content.replace(self.key.encode(), b"[key]")
            status = response.status_code
            if status == 200:
                try:
                    return read(json.loads(content))
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    reason = f"{url} sent an unexpected reply: {server_message(content)}"
                    continue
            reason = f"{url} answered {status}: {server_message(content)}"
            if status in (401, 404) or 300 <= status < 400:  # any other request would fail alike
                raise BadInput(f"{reason}; check the key (--key_env), --model and --base_url")
            if status == 403:  # run_rows stops if all rows fail
                reason += "; moderation refuses this text, or the key (--key_env) is wrong"
            if status < 500 and status not in (408, 409, 429):  # a retry would fail alike
                raise RowFailed(reason)
            wait = retry_after(response.headers.get("Retry-After", ""), wait)
            wait *= random.uniform(1, 1.1)  # so that the threads do not all return at once
        reason += f" (asked {self.retries + 1} times in {time.monotonic() - start:.0f} s)"
        raise RowFailed(reason) if self.counts["answered"] else BadInput(reason)


def server_message(content):
    """The error message in the body of a reply, as one short printable line."""
    text = content.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError, RecursionError):
        pass  # not OpenAI's error format: show the body itself
    return one_line(str(text))[:200] or "an empty reply"


def retry_after(header, default):
    """Seconds to wait by a Retry-After header, a number or a date; at most an hour."""
    try:
        return min(Retry().parse_retry_after(header), 3600)
    except (InvalidHeader, ValueError):
        return default


def add_stage_flags(parser, max_tokens):
    """The flags of both stages."""
    parser.add_argument("--out", required=True, help="output rows; an existing file is continued")
    parser.add_argument("--base_url", required=True, help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="the model's name on that server")
    add_client_flags(parser, max_tokens)
    parser.add_argument("--limit", type=at_least(1), help="read only the first N rows")
    parser.add_argument("--show", action="store_true", help="print each finished row")


def add_client_flags(parser, max_tokens):
    """The flags of every command that asks a server: both stages, and eval.py."""
    parser.add_argument("--key_env", help="environment variable with the key (default: no key)")
    parser.add_argument("--concurrency", type=at_least(1), default=8, help="rows in work at once")
    parser.add_argument("--max_tokens", type=at_least(1), default=max_tokens, help="per reply")
    parser.add_argument("--timeout", type=above_0(), default=120, help="seconds to wait per reply")
    parser.add_argument("--retries", type=at_least(0), default=6, help="per request; 6 take 30 s")
