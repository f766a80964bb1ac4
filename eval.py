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

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from data import TOY_STUDENT, BadInput, check_model_name, first_line, load_tokenizer, printable, prompt_text, read_rows, run


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


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, batch_size=64):
    """Greedy answers, as texts, to prompts (texts or message lists), batch_size at a time.

    Prompts of like length go together, padded on the left so that all answers start in the same column; one too long for
    the model is cut from the left.
    """
    ids = [tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=False).input_ids for prompt in prompts]
    room = max(position_limit(model) - max_new_tokens, 1)
    ids = [prompt_ids[-room:] if len(prompt_ids) > room else prompt_ids for prompt_ids in ids]
    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id} | set(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends), pad_token_id=tokenizer.eos_token_id)
    answers = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        some = order[start:start + batch_size]
        width = max(len(ids[i]) for i in some)
        input_ids = torch.tensor([[0] * (width - len(ids[i])) + ids[i] for i in some], device=model.device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in some], device=model.device)  # (B, T)
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)[:, width:]  # (B, T_new)
        for i, row in zip(some, output.tolist()):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def side_by_side(prompts, before, after):
    """A few prompts with the answers of the reference and of the student, for a person to read."""
    lines = []
    for prompt, *answers in zip(prompts, before, after):
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        for name, text in (("prompt", question), ("reference", answers[0]), ("student", answers[1])):
            lines.append(textwrap.fill(f"{name + ':':11s}{printable(' '.join(text.split()))}", 110, subsequent_indent=" " * 11))
        lines.append("")
    return "\n".join(lines)


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
    answers = [generate(load_model(model), load_tokenizer(model), prompts, args.max_new_tokens) for model in (args.base_model, args.model)]
    print(side_by_side(prompts, *answers))


if __name__ == "__main__":
    run(main)
