"""Answers of a model to prompts, in batches: greedy, or sampled with one generator per prompt."""
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import BaseStreamer

from infra.distributed import send
from infra.models import position_limit


@dataclass
class Answer:
    """One answer of a model."""
    text: str
    finish: str  # "stop", or "length" if max_new_tokens cut it
    prompt_ids: list
    ids: list  # the answer's tokens, its end-of-turn token included

    @property
    def answers(self):
        return [self.ids]  # as a data.Pair has two


class GumbelNoise(LogitsProcessor):
    """Add Gumbel noise: the argmax of logits / T + noise is a sample of softmax(logits / T).

    Each row draws from its own generator, so an answer does not depend on its batch.
    """

    def __init__(self, temperature, seeds, device):
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, logits):  # (B, T), (B, V)
        exponential = torch.stack([
            torch.empty_like(row).exponential_(generator=generator)
            for row, generator in zip(logits, self.generators)])  # (B, V)
        return logits / self.temperature - exponential.log()  # (B, V), -log(exponential) is Gumbel


class TextPieces(BaseStreamer):
    """Call show(piece) with each piece by which the text of one answer grows.

    A character of several tokens is shown when it is whole.
    """

    def __init__(self, tokenizer, show):
        self.tokenizer, self.show, self.ids, self.shown = tokenizer, show, None, 0

    def put(self, ids):  # the prompt (1, T), then each new token (1,)
        if self.ids is None:
            self.ids = []
            return
        self.ids += ids.tolist()
        self.show_from(self.text().rstrip("\ufffd"))  # what half a character decodes to

    def end(self):
        self.show_from(self.text())

    def text(self):
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def show_from(self, text):
        if len(text) > self.shown:
            self.show(text[self.shown:])
            self.shown = len(text)


@torch.no_grad()
def generate(model, tokenizer, prompt_ids, max_new_tokens, temperature=0.0, seeds=None,
             batch_size=64, show=None):
    """One Answer per prompt, given as lists of token ids. Greedy at temperature 0, else sampled.

    The model's own sampling settings (top-k, penalties) are ignored. `seeds` has one number per
    prompt (default: its index). A prompt too long for the model is cut from the left. With a
    single prompt, show(piece) receives the answer's text as it grows.
    """
    room = max(position_limit(model) - max_new_tokens, 1)
    prompt_ids = [ids[-room:] if len(ids) > room else ids for ids in prompt_ids]
    eos = model.generation_config.eos_token_id
    end_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    # Penalties are named because generate() takes what is missing from generation_config.json.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
        no_repeat_ngram_size=0, eos_token_id=sorted(end_ids), pad_token_id=tokenizer.eos_token_id)
    seeds = range(len(prompt_ids)) if seeds is None else seeds
    answers = [None] * len(prompt_ids)
    by_length = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start:start + batch_size]
        # Pad on the left, so that all answers begin in the same column.
        width = max(len(prompt_ids[i]) for i in batch)
        pads = [width - len(prompt_ids[i]) for i in batch]
        rows = [[0] * pad + prompt_ids[i] for i, pad in zip(batch, pads)]
        input_ids = torch.tensor(rows)  # (B, T)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])  # (B, T)
        noise = [GumbelNoise(temperature, [seeds[i] for i in batch], model.device)]
        output = model.generate(
            input_ids=send(input_ids, model.device), attention_mask=send(mask, model.device),
            generation_config=config, synced_gpus=isinstance(model, FSDPModule),
            streamer=TextPieces(tokenizer, show) if show else None,
            logits_processor=LogitsProcessorList(noise if temperature else []))  # (B, T + T_new)
        for i, row in zip(batch, output[:, width:].tolist()):
            end = next((n for n, token in enumerate(row) if token in end_ids), None)
            ids = row if end is None else row[:end + 1]
            answers[i] = Answer(tokenizer.decode(ids, skip_special_tokens=True),
                                "length" if end is None else "stop", prompt_ids[i], ids)
    return answers
