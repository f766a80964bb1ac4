"""Answers of a model to prompts, in batches: greedy, or sampled with one generator per prompt."""
from collections import Counter
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer

from infra.distributed import send
from infra.models import check_ids, position_limit
from infra.templates import cut_left, stop_ids


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


def fault(text, finish):
    """Why an answer is degenerate: "empty", "cut" by max_new_tokens, "repetitive", or "".

    Repetitive: the same four words (split at spaces) occur three times or more.
    """
    words = text.split()
    fours = Counter(zip(words, words[1:], words[2:], words[3:]))
    if not words:
        return "empty"
    if finish == "length":
        return "cut"
    return "repetitive" if max(fours.values(), default=0) >= 3 else ""


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


class TextPieces(TextStreamer):
    """Call show(piece) with each piece by which the text of one answer grows.

    A character of several tokens is shown when it is whole, a symbol at the next space.
    """

    def __init__(self, tokenizer, show):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text, stream_end=False):
        if text:
            self.show(text)


@torch.no_grad()
def generate(model, tokenizer, prompt_ids, max_new_tokens, temperature=0.0, seeds=None,
             batch_size=64, show=None):
    """One Answer per prompt, given as lists of token ids. Greedy at temperature 0, else sampled.

    The model's own sampling settings (top-k, penalties) are ignored. `seeds` has one number per
    prompt (default: its index). A prompt too long for the model is cut from the left. With a
    single prompt, show(piece) receives the answer's text as it grows.
    """
    room = max(position_limit(model) - max_new_tokens, 1)
    prompt_ids = [cut_left(tokenizer, ids, room) for ids in prompt_ids]
    for ids in prompt_ids:
        check_ids(model, ids, "the prompt")
    end_ids = stop_ids(tokenizer, model.generation_config)
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end_ids,
                              pad_token_id=tokenizer.eos_token_id)
    seeds = range(len(prompt_ids)) if seeds is None else seeds
    answers = [None] * len(prompt_ids)
    by_length = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start:start + batch_size]
        # Pad on the left, so that all answers begin in the same column.
        rows = [torch.tensor(prompt_ids[i]) for i in batch]
        input_ids, mask = (pad_sequence(tensors, batch_first=True, padding_side="left")  # (B, T)
                           for tensors in (rows, [torch.ones_like(row) for row in rows]))
        noise = [GumbelNoise(temperature, [seeds[i] for i in batch], model.device)]
        # generate() would take what config lacks from generation_config.json.
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            output = model.generate(
                input_ids=send(input_ids, model.device), attention_mask=send(mask, model.device),
                generation_config=config, synced_gpus=isinstance(model, FSDPModule),
                streamer=TextPieces(tokenizer, show) if show else None,
                logits_processor=LogitsProcessorList(noise if temperature else []))  # (B, T+T_new)
        finally:
            model.generation_config = own
        for i, row in zip(batch, output[:, input_ids.shape[1]:].tolist()):
            end = next((n for n, token in enumerate(row) if token in end_ids), None)
            ids = row if end is None else row[:end + 1]
            answers[i] = Answer(tokenizer.decode(ids, skip_special_tokens=True),
                                "length" if end is None else "stop", prompt_ids[i], ids)
    return answers
