"""What a model answers: loading it, its answers to prompts, and answers of several models side by side."""
import math
import textwrap
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging as transformers_logging

from data import BadInput, check_model_name, first_line, printable, prompt_text


def load_model(model, dtype=torch.float32):
    """The model of a folder or hub id in eval mode, attention by SDPA if it can. BadInput where it cannot be had."""
    check_model_name(model)
    transformers_logging.disable_progress_bar()
    # Of the attentions that SDPA chooses from, Hopper GPUs prefer cuDNN's, whose backward pass gives nan for some shapes of masked rows
    # (github.com/pytorch/pytorch/issues/196678) and which makes a new plan for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {model}: cannot be loaded ({first_line(error)}); --model takes a model folder or a hub id") from error


def position_limit(model):
    """How many tokens a model can read, math.inf where its config sets no limit (Bloom, Mamba)."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)


@dataclass
class Answer:
    """What a model wrote to a prompt."""
    text: str
    finish: str  # "stop", or "length" where max_new_tokens cut it
    prompt_ids: list
    ids: list  # its tokens, the end-of-turn token included


class GumbelNoise(LogitsProcessor):
    """Turns the largest logit into a sample: argmax (logits / T + Gumbel noise) is distributed as softmax(logits / T).

    Each row draws from a generator of its own, so its answer depends on its seed and not on the other rows of the batch.
    """

    def __init__(self, temperature, seeds, device):
        self.temperature, self.generators = temperature, [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, logits):  # (B, T), (B, V)
        exponential = torch.stack([torch.empty_like(row).exponential_(generator=own) for row, own in zip(logits, self.generators)])  # (B, V)
        return logits / self.temperature - exponential.log()  # (B, V); minus the log of an exponential number is Gumbel noise


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, temperature=0.0, seeds=None, batch_size=64):
    """The Answers of a model to prompts (texts or message lists), batch_size at a time.

    Greedy at temperature 0, else sampled from the whole distribution, with none of the model's own settings (top-k, penalties). seeds
    has a number for each prompt (default: its place), which fixes its answer whatever the batch. Prompts of like length go together,
    padded on the left so that all answers start in one column; one too long for the model is cut from the left.
    jinja2.TemplateError where the chat template refuses a prompt.
    """
    ids = [tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=False).input_ids for prompt in prompts]
    room = max(position_limit(model) - max_new_tokens, 1)
    ids = [prompt_ids[-room:] if len(prompt_ids) > room else prompt_ids for prompt_ids in ids]
    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id} | set(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    # Penalties are named because what is left out here comes from the model's generation_config.json.
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
                              eos_token_id=sorted(ends), pad_token_id=tokenizer.eos_token_id)
    seeds = range(len(prompts)) if seeds is None else seeds
    answers = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        some = order[start:start + batch_size]
        width = max(len(ids[i]) for i in some)
        input_ids = torch.tensor([[0] * (width - len(ids[i])) + ids[i] for i in some], device=model.device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in some], device=model.device)  # (B, T)
        noise = [GumbelNoise(temperature, [seeds[i] for i in some], model.device)] if temperature else []
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList(noise),
                                synced_gpus=isinstance(model, FSDPModule))[:, width:]  # (B, T_new); sharded, all processes go on until all are done
        for i, row in zip(some, output.tolist()):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            row = row if end is None else row[:end + 1]
            answers[i] = Answer(tokenizer.decode(row, skip_special_tokens=True), "length" if end is None else "stop", ids[i], row)
    return answers


def side_by_side(prompts, answers_of):
    """A few prompts with what each system answers, for a person to read; answers_of maps a name to texts in the order of prompts."""
    lines, width = [], max(map(len, ["prompt", *answers_of])) + 2
    for place, prompt in enumerate(prompts):
        texts = {"prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"]}
        for name, text in (texts | {name: answers[place] for name, answers in answers_of.items()}).items():
            lines.append(textwrap.fill(f"{name + ':':{width}s}{printable(' '.join(text.split()))}", 110, subsequent_indent=" " * width))
        lines.append("")
    return "\n".join(lines)
