"""A scripted teacher and judge behind the OpenAI-compatible HTTP protocol: no model, no key.

    python toy/server.py --port 8090

Then, in another terminal, the same commands as for a real server (toy/make_rows.sh runs all three):

    common="--task toy/task.toml --base_url http://127.0.0.1:8090/v1 --model toy"
    python teacher.py $common --prompts toy/prompts.jsonl --out toy-synthetic.jsonl
    python reward.py $common --data toy-synthetic.jsonl --out toy-scored.jsonl

toy/world.py writes the texts. As with real models, the first answer mostly yields to pressure, and
the rewrite sometimes fails. A reply depends only on --seed and the conversation, not on the order
of requests.
"""
import argparse
import hmac
import json
import math
import os
import random
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from infra.command import BadInput, run  # noqa: E402
from infra.task import load_task  # noqa: E402
from toy import world  # noqa: E402

JUDGE = load_task(os.path.join(ROOT, "toy", "task.toml")).judge
# A request that matches one of the task's templates is for the judge, any other for the teacher.
JUDGE_REQUEST, PAIRWISE_REQUEST = (
    re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.*?)", re.escape(template)), re.DOTALL)
    for template in (JUDGE.template, JUDGE.pairwise))


def teach(texts, seed, failure_rate):
    """The teacher's next turn after the turns in texts: an answer, then critiques and rewrites.

    A critique is of the last answer or rewrite. A rewrite always differs from what it rewrites.
    """
    prompt = texts[0]
    if len(texts) == 1:
        return world.original(prompt, random.Random(f"teacher {seed} {texts}"))
    if len(texts) % 4 == 3:
        return world.critique(prompt, texts[-2])
    rng, answer = random.Random(f"teacher {seed} {texts[:-3]}"), texts[-4]
    failures = {kind: weight for kind, weight in world.REVISIONS.items() if kind != "good"}
    failed = rng.random() < failure_rate
    kind = rng.choices(list(failures), failures.values())[0] if failed else "good"
    revised = answer
    while revised == answer:
        revised = world.revise(prompt, rng, kind)
    return revised


def noisy_score(question, answer, seed, noise):
    """The exact score, or world.flawed_score with noise: the same texts give the same score."""
    if not noise:
        return world.score(question, answer)
    rng = random.Random(f"judge {seed} {question} {answer}")
    return world.flawed_score(question, answer, rng, noise, bias=0, step=0)


# A judge's reply is its text and {digit: probability} at the place of its verdict. A judge with
# noise is a judge in doubt: it writes the most probable digit. The exact one has no doubts, so {}.


def judge(question, answer, seed, noise):
    """The judge's reply about one answer. The expected digit is the score."""
    score = noisy_score(question, answer, seed, noise)
    if not noise:
        return f"{JUDGE.verdict} {score:g}", {}
    low = min(int(score), JUDGE.highest - 1)
    digits = {low: 1 - (score - low), low + 1: score - low}
    return f"{JUDGE.verdict} {max(digits, key=digits.get)}", digits


def compare(question, first, second, seed, noise):
    """The judge's reply about two answers: the number of the one with the higher score, or 0."""
    score_1 = noisy_score(question, first, f"{seed} 0", noise)
    score_2 = noisy_score(question, second, f"{seed} 1", noise)
    digits = {}
    if noise:
        win = 1 / (1 + math.exp(score_2 - score_1))
        digits = {1: win, 2: 1 - win}
    return f"Better: {0 if score_1 == score_2 else 1 if score_1 > score_2 else 2}", digits


def token_logprobs(words, digits):
    """OpenAI's `logprobs` of a reply whose last word is the verdict, where it is in doubt."""
    tokens = [{"token": f" {word}", "logprob": 0.0, "top_logprobs": []} for word in words]
    tokens[-1]["top_logprobs"] = [{"token": f" {digit}", "logprob": math.log(max(p, 1e-9))}
                                  for digit, p in digits.items()]
    return {"content": tokens} if digits else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    wbufsize = -1  # send head and body in one packet
    disable_nagle_algorithm = True
    due = 0.0  # the earliest time of the reply

    def do_GET(self):
        if self.path == "/health":
            self.send(200, {"status": "ok"})
        elif self.path == "/v1/models":
            model = {"id": "toy", "object": "model", "created": 0, "owned_by": "toy"}
            self.send(200, {"object": "list", "data": [model]})
        else:
            self.refuse(404, f"no such address: {self.path}")

    def do_POST(self):
        args = self.server.args
        self.due = time.monotonic() + args.latency
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = self.headers.get("Authorization", "").encode()
        if args.api_key and not hmac.compare_digest(key, f"Bearer {args.api_key}".encode()):
            return self.refuse(401, "Incorrect API key provided")
        if self.path != "/v1/chat/completions":
            return self.refuse(404, f"no such address: {self.path}")
        try:
            request = json.loads(content)
            if request["model"] != "toy":
                return self.refuse(404, "the only model here is called toy")
            texts = [message["content"] for message in request["messages"]
                     if message["role"] != "system"]
            seed = f"{args.seed} {request.get('seed', 0)}"
            digits = {}
            if asked := JUDGE_REQUEST.fullmatch(texts[-1]):
                text, digits = judge(**asked.groupdict(), seed=seed, noise=args.judge_noise)
            elif asked := PAIRWISE_REQUEST.fullmatch(texts[-1]):
                text, digits = compare(**asked.groupdict(), seed=seed, noise=args.judge_noise)
            else:
                text = teach(texts, seed, args.failure_rate)
        except (ValueError, LookupError, TypeError) as error:
            return self.refuse(400, f"{type(error).__name__}: {error}")
        words = text.split(" ")  # words count as tokens here
        cut = len(words) > request.get("max_tokens", len(words))
        if cut:
            words = words[:request["max_tokens"]]
        read, written = sum(len(text.split(" ")) for text in texts), len(words)
        logprobs = token_logprobs(words, digits) if request.get("logprobs") and not cut else None
        self.send(200, {
            "id": "toy", "object": "chat.completion", "created": 0, "model": "toy",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": " ".join(words)},
                         "finish_reason": "length" if cut else "stop", "logprobs": logprobs}],
            "usage": {"prompt_tokens": read, "completion_tokens": written,
                      "total_tokens": read + written}})

    def send(self, status, answer):
        content = json.dumps(answer).encode()
        time.sleep(max(self.due - time.monotonic(), 0))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status, message):
        error = {"message": message, "type": "invalid_request_error", "code": status}
        self.send(status, {"error": error})

    def log_message(self, *_):
        pass  # no line per request


class Server(ThreadingHTTPServer):
    request_queue_size = 256  # connections that may wait to be accepted

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # not an error: the client left
            super().handle_error(request, client_address)


def main():
    parser = argparse.ArgumentParser(description="The toy world's teacher and judge, for this "
                                                 "machine only.")
    parser.add_argument("--port", type=int, default=8090, help="0 takes any free port")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failure_rate", type=float, default=1 - world.REVISIONS["good"] / 100,
                        help="share of rewrites that are only partly right, no better, or worse")
    parser.add_argument("--judge_noise", type=float, default=0.0,
                        help="standard deviation of the judge's error")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds per reply")
    parser.add_argument("--api_key", help="a made-up key to require")
    args = parser.parse_args()
    try:
        server = Server(("127.0.0.1", args.port), Handler)
    except OSError as error:
        raise BadInput(f"--port {args.port}: {error.strerror}; "
                       "give another port, or 0 for any free one") from error
    with server:
        server.args = args
        print(f"serving http://127.0.0.1:{server.server_port}/v1, model toy; Ctrl-C ends it",
              flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run(main)
