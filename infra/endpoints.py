"""Reward models behind a server: one number per text, as vLLM and text-embeddings-inference do.

A new address is an entry of ENDPOINTS.
"""
from infra.command import BadInput
from infra.formats import as_messages
from infra.resumable import RowFailed
from infra.rows import question_of


RAW = {"use_activation": False, "activation": False}  # the second for older versions of vLLM


def chat_body(texts):
    [(question, answer)] = texts
    return {"messages": as_messages(question) + [{"role": "assistant", "content": answer}],
            **RAW}


def pair(texts):
    [(question, answer)] = texts  # no conversation can be sent: its turns as text
    return question_of({"prompt": question}), answer


def classified(reply):
    """The numbers of vLLM's /classify reply. BadInput for SGLang's, which is a list."""
    if isinstance(reply, list):
        raise BadInput("--endpoint /classify: the server answers as SGLang does, which applies no "
                       "chat template to a conversation; serve the model with vLLM, or give "
                       "--reward_model")
    return [reply["data"][0]["probs"]]


def pooled(reply):
    """The numbers of a /pooling reply: one, or one per token; the last token saw the whole text."""
    numbers = reply["data"][0]["data"]
    return [numbers[-1] if isinstance(numbers[-1], list) else numbers]


# Address -> (texts per request, body of a request for [(question, answer)], numbers of each text in
# the reply). A question is text or chat messages. All ask for the raw score, not one squeezed into
# 0..1. The first two apply the chat template; the others send a pair of texts. A server that takes
# a list of texts gets as many as said here.
ENDPOINTS = {
    "/classify": (1, chat_body, classified),
    "/pooling": (1, chat_body, pooled),
    "/score": (1, lambda texts: dict(zip(("text_1", "text_2"), pair(texts))) | RAW,
               lambda reply: [[reply["data"][0]["score"]]]),
    "/predict": (1, lambda texts: {"inputs": list(pair(texts)), "raw_scores": True},
                 lambda reply: [[label["score"] for label in reply]]),
}


def ask_reward_model(client, args, texts):
    """Scores of [(question, answer)]. RowFailed if a text gets several numbers: a classifier."""
    at_once, body_of, numbers_of = ENDPOINTS[args.endpoint]
    url, scores = client.base_url.removesuffix("/v1") + args.endpoint, []
    for start in range(0, len(texts), at_once):
        part = texts[start:start + at_once]

        def read(reply):
            found = numbers_of(reply)
            if len(found) != len(part) or not all(
                    type(number) in (int, float) and abs(number) < 1e300  # nan is not
                    for numbers in found for number in numbers):
                raise ValueError("not a finite number for each text")
            usage = isinstance(reply, dict) and reply.get("usage") or {}  # optional
            client.count(tokens_in=usage.get("prompt_tokens") or 0)
            return found

        for numbers in client.post(url, {"model": args.model} | body_of(part), read):
            if len(numbers) != 1:
                raise RowFailed(f"{args.endpoint} gave {len(numbers)} numbers for one text; "
                                "a reward model gives one (a single label)")
            scores += numbers
    return scores
