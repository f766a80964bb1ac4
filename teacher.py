"""Stage 1, the teacher: an LLM answers each prompt, criticises its own answer and rewrites it. No human labels anything.

    prompts.jsonl    {"id", "prompt", ...}
    synthetic.jsonl  + "rejected": the first answer, "critique", "chosen": the rewrite, "teacher": {model, task, finish, tokens}

    python teacher.py --task tasks/sycophancy.toml --prompts prompts.jsonl --out synthetic.jsonl --base_url URL --model NAME
    ... --limit 3 --show        only the first three prompts, whole conversations printed: read them before spending money

Any OpenAI-compatible server will do; URL is such as http://127.0.0.1:8000/v1. A row is finished once its whole line stands in --out;
after a crash, a kill or Ctrl-C the same command goes on from there, and another model or task is refused. Rows that failed for good go
to <out>.failed.jsonl, and the next run tries them again. An answer that --max_tokens cut is kept, marked "length" under teacher.finish,
and counted; unless only the critique was cut, train.py leaves the row out.

From top to bottom: the client, the rows (both shared with reward.py), then the teacher itself.
"""
import argparse
import email.utils
import hashlib
import itertools
import json
import os
import queue
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from behaviour import load_task
from data import BadInput, as_messages, canonical, is_chat, printable, run, stream_rows

# ----------------------------------------------------------------------------------------------------- the client


class RowFailed(Exception):
    """A row cannot be finished, for the reason given; the other rows go on."""


class PerThread(threading.local):
    """What each thread has for itself: a session, so that its connection to the server stays open."""
    def __init__(self):
        self.session = requests.Session()


class Client:
    """A server: where it is, its key, how patient to be with it, and (in counts) what was asked of it so far.

    args has base_url, key_env, timeout and retries. BadInput where they cannot be right.
    """

    def __init__(self, args):
        try:
            url = urlsplit(requests.Request("POST", args.base_url).prepare().url)
        except ValueError:  # what requests raises for no address at all is a ValueError
            url = urlsplit("")
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
            raise BadInput("--base_url must look like http://127.0.0.1:8000/v1, and hold no user name or password")
        self.base_url, self.timeout, self.retries = args.base_url.rstrip("/"), args.timeout, args.retries
        self.key = os.environ.get(args.key_env, "").strip() if args.key_env else ""
        if args.key_env and not self.key:
            raise BadInput(f"--key_env {args.key_env}: no key in that environment variable; export {args.key_env}=... first")
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise BadInput(f"--key_env {args.key_env}: a key is one line of plain characters, but what that variable holds is not")
        self.threads, self.lock, self.counts = PerThread(), threading.Lock(), Counter()

    def count(self, **numbers):
        with self.lock:
            self.counts.update(numbers)

    def authorize(self, request):
        """Gives a request the key. As the session's `auth`, it also keeps requests from taking a password from ~/.netrc."""
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def post(self, url, body, read):
        """What `read` makes of the JSON that the server answers to `body`.

        Asks again, waiting longer each time, after what may pass: no answer, 408, 409, 429, 5xx (as long as Retry-After says), and a
        reply that `read` cannot read (cut, not JSON, null). RowFailed once the retries are used up, or at once where the server
        refuses this request (another 4xx). BadInput where it would refuse every one (wrong key, model, address), or never answers.
        A 403 may be moderation of this prompt, or a wrong key: it refuses this request, and run_rows stops where nothing else comes.
        """
        began = time.monotonic()
        for attempt in range(self.retries + 1):
            self.count(requests=1, retries=int(attempt > 0))
            wait = min(2 ** attempt / 2, 60) * random.uniform(0.5, 1.5)
            try:
                response = self.threads.session.post(url, json=body, auth=self.authorize, timeout=(10, self.timeout),
                                                     allow_redirects=False)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError,
                    requests.exceptions.ContentDecodingError) as error:
                reason = (f"no whole answer from {url} ({type(error).__name__}); is the server running, --base_url right, "
                          "--timeout long enough?")
            else:
                # A server may repeat the key in an error message; from here on nothing can hold it.
                content = response.content.replace(self.key.encode(), b"[key]") if self.key else response.content
                self.count(answered=1)
                if response.status_code == 200:
                    try:
                        return read(json.loads(content))
                    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                        reason = f"{url} answered with something else than it should: {server_message(content)}"
                else:
                    reason = f"{url} answered {response.status_code}: {server_message(content)}"
                    if response.status_code in (401, 404) or 300 <= response.status_code < 400:
                        raise BadInput(f"{reason}; check the key (--key_env), --model and --base_url")
                    if response.status_code == 403:
                        raise RowFailed(f"{reason}; the server's moderation refuses this text, or the key (--key_env) is not the right one")
                    if response.status_code < 500 and response.status_code not in (408, 409, 429):
                        raise RowFailed(reason)
                    wait = retry_after(response.headers.get("Retry-After", ""), wait) * random.uniform(1, 1.1)
            if attempt < self.retries:
                time.sleep(wait)
        reason += f" (asked {self.retries + 1} times in {time.monotonic() - began:.0f} s)"
        raise RowFailed(reason) if self.counts["answered"] else BadInput(reason)


def server_message(content):
    """What a server says in the body of a reply, in one short printable line."""
    text = content.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError, RecursionError):
        pass  # not OpenAI's form of an error: the body itself has to do
    return printable(" ".join(str(text).split()))[:200] or "an empty reply"


def retry_after(header, otherwise):
    """The seconds that a Retry-After header asks for, as a number or a date, an hour at most; `otherwise` where it says nothing."""
    if header.isdecimal():
        return min(int(header), 3600)
    try:
        return min(max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0), 3600)
    except ValueError:
        return otherwise


@dataclass
class Reply:
    text: str
    finish: str  # "stop", or "length" where max_tokens cut it
    tokens: int


def chat(client, messages, model, max_tokens, temperature, seed=None):
    """A model's Reply to a conversation, a list of {"role", "content"}. Errors as of Client.post; no text counts as a failure."""
    def read(answer):
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        if not choice["message"]["content"].strip():
            raise ValueError("no text")
        tokens = usage.get("completion_tokens") or 0
        client.count(tokens_in=usage.get("prompt_tokens") or 0, tokens_out=tokens)
        return Reply(choice["message"]["content"], choice.get("finish_reason"), tokens)

    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
    reply = client.post(f"{client.base_url}/chat/completions", body if seed is None else body | {"seed": seed}, read)
    client.count(cut=int(reply.finish == "length"))
    return reply


# ------------------------------------------------------------------------------------------------------- the rows


def digest(row, added):
    """A short name of a row's content, but for its id and the keys that a stage adds: the same before and after the stage."""
    content = {name: value for name, value in row.items() if name not in added and name != "id"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def checked_rows(path, limit, check, added):
    """Each (where, row) of the first `limit` rows, under our names (data.canonical), checked by check(row, where), with an id of its own."""
    places = {}
    for where, row in itertools.islice(stream_rows(path), limit):
        row = canonical(row)
        check(row, where)
        row = {"id": row.get("id", digest(row, added))} | row  # with the id in front, by which read_finished knows a torn line
        if isinstance(row["id"], bool) or not isinstance(row["id"], (str, int)) or row["id"] == "":
            raise BadInput(f"{where}: `id` is {json.dumps(row['id'])[:40]}; it must be text or a whole number, or be left out")
        name = str(row["id"])  # 1 and "1" would be hard to tell apart, and eval.py puts ids into longer ones
        if name in places:
            raise BadInput(f"{where}: the id {json.dumps(row['id'])[:40]} is that of {places[name]} as well; each row needs its own id or prompt")
        places[name] = where
        yield where, row


def read_finished(path, added, made_with):
    """{id: digest} of the rows that stand finished in the file. A last line that a kill left torn is cut off.

    BadInput where the last of the added keys says that a row was made with something else, by another model or task.
    """
    finished, whole = {}, 0
    if not os.path.exists(path):
        return finished
    with open(path, "rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and b'{"id": '.startswith(line[:7]):
                break
            try:
                row = json.loads(line)
            except ValueError:
                row = {}
            if not isinstance(row, dict) or not {"id", *added} <= row.keys():
                raise BadInput(f"{path}:{number}: not a row that this command wrote; write to another file, or remove this one")
            made = row[added[-1]]
            others = [name for name, value in made_with.items() if not isinstance(made, dict) or made.get(name) != value]
            if others:
                raise BadInput(f"{path}:{number}: made with another {' and '.join(others)}; give the same flags as then, or write to another file")
            finished[row["id"]] = digest(canonical(row), added)
            whole += len(line)
        file.truncate(whole)
    return finished


def check_all(args, source, added, made_with, check):
    """(how many rows there are, the ids of those that are finished). BadInput for whatever is wrong, before the first request."""
    folder = os.path.dirname(args.out) or "."
    if not os.access(folder, os.W_OK) or os.path.isdir(args.out):
        raise BadInput(f"{args.out}: it must be a file, in a folder that is there and can be written to; make the folder first")
    if os.path.realpath(args.out) == os.path.realpath(source):
        raise BadInput(f"{args.out}: that is the file to read; write to another one")
    finished, ids = read_finished(args.out, added, made_with), set()
    for where, row in checked_rows(source, args.limit, check, added):
        if finished.get(row["id"], digest(row, added)) != digest(row, added):
            raise BadInput(f"{where}: {args.out} holds the id {json.dumps(row['id'])[:40]} with other content; write to another file")
        ids.add(row["id"])
    return len(ids), ids & finished.keys()


def in_threads(work, rows, threads):
    """(row, work(row) or None, error or None) for each row, in the order in which they get done."""
    tasks, results = queue.Queue(), queue.Queue()

    def worker():
        while True:
            row = tasks.get()
            try:
                results.put((row, work(row), None))
            except Exception as error:  # the caller decides; here it would only end the thread, unheard
                results.put((row, None, error))

    for _ in range(threads):
        threading.Thread(target=worker, daemon=True).start()  # daemons: after Ctrl-C nothing waits for them
    in_flight = 0
    for row in rows:
        tasks.put(row)
        in_flight += 1
        if in_flight == 2 * threads:  # a row for each thread, and the next one ready: memory does not grow with the file
            yield results.get()
            in_flight -= 1
    for _ in range(in_flight):
        yield results.get()


STOP_AFTER = 10  # failed rows with none finished between them: then it is not the rows that are wrong


def run_rows(client, args, source, added, made_with, check, work, show):
    """Finishes the rows of `source` that are not in args.out yet, args.concurrency at a time. What both stages share.

    work(row) returns the row with the keys named in `added`, the last of which is a dict that made_with goes into; check(row, where)
    raises BadInput for a row that cannot be used; show(row) prints a finished one, for --show. Returns how many rows failed; they are
    in <out>.failed.jsonl, with the reason.
    """
    total, finished = check_all(args, source, added, made_with, check)
    unfinished = (row for _, row in checked_rows(source, args.limit, check, added) if row["id"] not in finished)
    failures, done, failed, failed_in_a_row, counts = args.out + ".failed.jsonl", 0, 0, 0, client.counts
    if os.path.exists(failures):
        os.remove(failures)
    progress = tqdm(total=total, initial=len(finished), unit="row", disable=None, leave=False)
    try:
        with open(args.out, "a", encoding="utf-8") as out, progress:
            for row, result, error in in_threads(work, unfinished, args.concurrency):
                if error is None:
                    result[added[-1]] = made_with | result[added[-1]]
                    out.write(json.dumps(result) + "\n")
                    out.flush()
                    done, failed_in_a_row = done + 1, 0
                    if args.show:
                        with progress.external_write_mode():
                            show(result)
                elif isinstance(error, RowFailed):
                    failed, failed_in_a_row, reason = failed + 1, failed_in_a_row + 1, error
                    with open(failures, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row | {"failed": str(reason)}) + "\n")
                    if failed_in_a_row == STOP_AFTER:
                        break
                else:
                    raise error
                progress.set_postfix_str(f"{counts['tokens_in'] + counts['tokens_out']:,} tokens", refresh=False)
                progress.update()
    finally:  # said after Ctrl-C as well
        print(f"{args.out}: {len(finished) + done} of {total} rows ({len(finished)} from before), {failed} failed; "
              f"{counts['requests']:,} requests, {counts['retries']:,} retries, {counts['tokens_in']:,} tokens read, "
              f"{counts['tokens_out']:,} written, {counts['cut']:,} replies cut by --max_tokens", flush=True)
    if failed:
        what = f"stopped after {STOP_AFTER} rows failed one after another" if failed_in_a_row == STOP_AFTER else f"{failed} rows failed"
        print(f"error: {what}, the last because {reason}; {failures} has them, and the same command tries them again", file=sys.stderr)
    return failed


def at_least(lowest, kind=int):
    """A type for argparse: a number that is not below `lowest`."""
    def number(text):
        if not kind(text) >= lowest:
            raise ValueError
        return kind(text)
    number.__name__ = f"number (at least {lowest})"
    return number


def add_flags(parser, max_tokens):
    """The flags that both stages have."""
    parser.add_argument("--out", required=True, help="the rows that come of it; one that is there already is continued")
    parser.add_argument("--base_url", required=True, help="address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="the model's name on that server")
    add_client_flags(parser, max_tokens)
    parser.add_argument("--limit", type=at_least(1), help="only the first so many rows of the file")
    parser.add_argument("--show", action="store_true", help="print each finished row")


def add_client_flags(parser, max_tokens):
    """The flags of whoever asks a server: both stages, and eval.py."""
    parser.add_argument("--key_env", help="environment variable that holds the key, such as OPENAI_API_KEY (default: no key)")
    parser.add_argument("--concurrency", type=at_least(1), default=8, help="rows under way at a time")
    parser.add_argument("--max_tokens", type=at_least(1), default=max_tokens, help="tokens that a reply may have; a longer one is cut")
    parser.add_argument("--timeout", type=at_least(0.001, float), default=120, help="seconds to wait for a reply")
    parser.add_argument("--retries", type=at_least(0), default=6, help="how often a request is repeated; 6 take half a minute")


# ---------------------------------------------------------------------------------------------------- the teacher

ADDED = ("rejected", "critique", "chosen", "teacher")


def check_prompt(row, where):
    """BadInput unless a row has a prompt that can be sent and, if it has a question, one that is text."""
    prompt = row.get("prompt")
    if not (is_chat(prompt) and prompt[-1]["role"] == "user" or isinstance(prompt, str) and prompt.strip()):
        raise BadInput(f"{where}: no `prompt` that can be sent; it must be text, or a list of chat messages that ends with the user's")
    question = row.get("question", "text")
    if not isinstance(question, str) or not question.strip():
        raise BadInput(f"{where}: `question` must be text, or be left out: then the prompt is what the judge sees")


def opening(task, prompt):
    """The messages that the teacher's first answer replies to."""
    messages = as_messages(prompt)
    if task.system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": task.system})
    return messages


def converse(client, task, args, row):
    """The row with the three turns of one growing conversation: the answer, its critique, the rewrite."""
    messages, replies = opening(task, row["prompt"]), []
    for request in (None, task.critique, task.revision):
        if request:
            messages.append({"role": "user", "content": request})
        replies.append(chat(client, messages, args.model, args.max_tokens, args.temperature))
        messages.append({"role": "assistant", "content": replies[-1].text})
    rejected, critique, chosen = (reply.text for reply in replies)
    teacher = {"finish": [reply.finish for reply in replies], "tokens": sum(reply.tokens for reply in replies)}
    return row | {"rejected": rejected, "critique": critique, "chosen": chosen, "teacher": teacher}


def show_conversation(task, row):
    """Prints a finished row as the conversation that it was."""
    turns = [(message["role"], message["content"]) for message in opening(task, row["prompt"])]
    turns += [("assistant, rejected", row["rejected"]), ("user", task.critique), ("assistant, critique", row["critique"]),
              ("user", task.revision), ("assistant, chosen", row["chosen"])]
    print(f"======== {printable(str(row['id']))}, finish {row['teacher']['finish']}")
    for who, text in turns:
        print(f"-------- {who}\n{printable(text.strip())}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Stage 1: a teacher answers, criticises its answer, rewrites it.")
    parser.add_argument("--task", required=True, help="the behaviour, a file such as tasks/sycophancy.toml")
    parser.add_argument("--prompts", required=True, help="rows with a prompt")
    add_flags(parser, max_tokens=512)
    parser.add_argument("--temperature", type=at_least(0, float), default=0.7, help="of the teacher's sampling")
    args = parser.parse_args(argv)
    task, client = load_task(args.task), Client(args)
    made_with = {"model": args.model, "task": digest({"system": task.system, "critique": task.critique, "revision": task.revision}, ())}
    failed = run_rows(client, args, args.prompts, ADDED, made_with, check_prompt,
                      lambda row: converse(client, task, args, row), lambda row: show_conversation(task, row))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
