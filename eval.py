"""Answers: what a model writes to prompts, two models side by side, and the curves of training runs.

    python eval.py --prompts toy/held_out.jsonl --model out [--base_model toy/student]     answers side by side
    python eval.py --curves out [out2 ...]                                               curves.png of one run or of several
"""
import argparse
import importlib.util
import json
import math
import os
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging as transformers_logging

from data import (TOY_STUDENT, BadInput, Pair, check_model_name, collate, first_line, load_tokenizer, printable, prompt_text, read_rows, run,
                  split_by_tokens)
from rdpo import sequence_logps


def load_model(model, dtype=torch.float32):
    """The model of a folder or hub id in eval mode, attention by SDPA if it can. BadInput where it cannot be had."""
    check_model_name(model)
    transformers_logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {model}: cannot be loaded ({first_line(error)}); --model takes a model folder or a hub id") from error


def position_limit(model):
    """How many tokens a model can read, math.inf where its config sets no limit (Bloom, Mamba)."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)


# -------------------------------------------------------------------------------------------------------- answers


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
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config,
                                logits_processor=LogitsProcessorList(noise))[:, width:]  # (B, T_new)
        for i, row in zip(some, output.tolist()):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            row = row if end is None else row[:end + 1]
            answers[i] = Answer(tokenizer.decode(row, skip_special_tokens=True), "length" if end is None else "stop", ids[i], row)
    return answers


TOKENS_PER_BATCH = 4096  # in one forward pass, padding counted: memory only


@torch.no_grad()
def pair_logps(model, pairs):
    """log pi(chosen) and log pi(rejected) of data.Pairs under a model, (P, 2), in nats, summed over each answer's tokens."""
    logps = torch.empty(len(pairs), 2)  # (P, 2)
    for batch in split_by_tokens(pairs, range(len(pairs)), TOKENS_PER_BATCH):
        logps[batch] = sequence_logps(model, collate([pairs[i] for i in batch]).to(model.device)).view(2, -1).T.cpu()
    return logps


def answer_logps(model, answers):
    """log pi(answer) of Answers under a model, (N,), in nats, summed over each answer's tokens, its end-of-turn token included.

    Of answers that a policy wrote at temperature 1, the mean of answer_logps(policy) - answer_logps(reference) estimates
    KL(policy || reference) an answer, in nats.
    """
    # A Pair has two answers: the second is one token long here, and not read.
    return pair_logps(model, [Pair("", "", one.prompt_ids, one.ids, one.ids[:1], None, None) for one in answers])[:, 0]


def side_by_side(prompts, answers_of):
    """A few prompts with what each system answers, for a person to read; answers_of maps a name to texts in the order of prompts."""
    lines, width = [], max(map(len, ["prompt", *answers_of])) + 2
    for place, prompt in enumerate(prompts):
        texts = {"prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"]}
        for name, text in (texts | {name: answers[place] for name, answers in answers_of.items()}).items():
            lines.append(textwrap.fill(f"{name + ':':{width}s}{printable(' '.join(text.split()))}", 110, subsequent_indent=" " * width))
        lines.append("")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- numbers with intervals


def bootstrap(statistic, *columns, resamples=2000, seed=0):
    """(value, low, high): a statistic of columns (N,) and its 95 % percentile interval over resampled rows.

    statistic takes arrays (..., N), one a column, and reduces their last axis, as `mean` does. N is at least 1.
    """
    columns = [np.asarray(column, dtype=float) for column in columns]
    indices = np.random.default_rng(seed).integers(len(columns[0]), size=(resamples, len(columns[0])))  # (resamples, N)
    low, high = np.percentile(statistic(*(column[indices] for column in columns)), (2.5, 97.5))
    return float(statistic(*columns)), float(low), float(high)


def mean(values):
    return values.mean(-1)


def equal_length(gaps, length_gaps):
    """What is left of the score gaps (..., N) between two systems where their answers are equally long.

    The intercept of a straight line through the gaps over the gaps in length; where lengths do not differ, the mean.
    """
    x = length_gaps - length_gaps.mean(-1, keepdims=True)
    slope = (x * gaps).sum(-1) / np.maximum((x * x).sum(-1), 1e-9)
    return gaps.mean(-1) - slope * length_gaps.mean(-1)


# -------------------------------------------------------------------------------------------------------- curves


PANELS = (("loss", "loss"), ("rewards/accuracies", "chosen ranked above rejected"), ("rewards/margins", "margin, beta x log-ratios"),
          ("logps/chosen", "log-probability of chosen, nats"), ("logps/rejected", "log-probability of rejected, nats"), ("grad_norm", "gradient norm"))


def draw_curves(folders, path):
    """Draws metrics.jsonl of each run into one PNG: training as a thin line, held-out pairs as dots."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for number, folder in enumerate(folders):
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        for axis, (name, title) in zip(axes.flat, PANELS):
            for key, style in ((name, {"linewidth": 1, "alpha": 0.7}), ("eval/" + name, {"marker": "o"})):
                points = [(line["step"], line[key]) for line in lines if key in line]
                label = f"{folder}, {'held out' if key.startswith('eval') else 'training'}"
                if points:
                    axis.plot(*zip(*points), color=f"C{number}", label=label, **style)
            axis.set(title=title, xlabel="optimizer step")
            axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def have_matplotlib():
    return importlib.util.find_spec("matplotlib") is not None


def main():
    parser = argparse.ArgumentParser(description="Answers of a student beside its reference's, or the curves of runs.")
    parser.add_argument("--curves", nargs="+", metavar="DIR", help="out_dirs to draw into curves.png, overlaid")
    parser.add_argument("--prompts", help="rows with a prompt")
    parser.add_argument("--model", help="the student's folder")
    parser.add_argument("--base_model", default=TOY_STUDENT, help="the reference (default: the toy student)")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    args = parser.parse_args()
    if args.curves:
        if not have_matplotlib():
            raise BadInput("--curves needs matplotlib: pip install matplotlib")
        draw_curves(args.curves, "curves.png")
        print("curves.png")
        return
    if not args.prompts or not args.model:
        raise BadInput("give --prompts FILE and --model DIR, or --curves DIR")
    rows = read_rows(args.prompts)
    for where, row in rows:
        if not isinstance(row.get("prompt"), (str, list)) or not row["prompt"]:
            raise BadInput(f"{where}: no `prompt`; a row needs a prompt, text or a list of chat messages")
    prompts = [row["prompt"] for _, row in rows]
    answers = {name: [answer.text for answer in generate(load_model(folder), load_tokenizer(folder), prompts, args.max_new_tokens)]
               for name, folder in (("reference", args.base_model), ("student", args.model))}
    print(side_by_side(prompts, answers))


if __name__ == "__main__":
    run(main)
