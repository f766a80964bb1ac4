"""What a 4-bit base costs, and where its adapter should be put: --base_bits 4 beside 0.

    python bench/quantised_base.py --data scored.jsonl [--model DIR] [--steps 12]

The same rows, steps and flags are trained twice. The adapter of the 4-bit run is then put on four
bases, in float32 or merged and rounded stochastically to bfloat16:

    margin    log pi - log ref of the chosen answer minus that of the rejected one, in nats, mean
              over validation pairs. ref is the quantised base, which the run trained against, or
              the stored model
"""
import argparse
import datetime
import os
import sys
import tempfile
import time

import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import train  # noqa: E402
from data import load_pairs  # noqa: E402
from eval import answer_logps  # noqa: E402
from infra import nf4  # noqa: E402
from infra.lora import load_adapter, merged  # noqa: E402
from infra.models import TOY_STUDENT, load_model, load_tokenizer  # noqa: E402
from infra.plots import read_metrics  # noqa: E402
from infra.rounding import stochastic_round  # noqa: E402
from infra.split import split_train_val  # noqa: E402

parser = argparse.ArgumentParser(description="What a 4-bit base costs.")
parser.add_argument("--data", required=True, help="scored rows")
parser.add_argument("--model", default=TOY_STUDENT)
parser.add_argument("--learning_rate", type=float, default=1e-4)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--max_length", type=int, default=128)
args = parser.parse_args()
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
began = time.monotonic()


def run(out_dir, *flags):
    """The validation metrics after the last step of a run."""
    train.main([str(part) for part in (
        "--data", args.data, "--model", args.model, "--max_length", args.max_length, "--max_steps",
        args.steps, "--batch_size", 8, "--learning_rate", args.learning_rate, "--eval_every",
        args.steps, "--eval_share", 0.2, "--lora_rank", 16, "--save_adapter", "--out_dir", out_dir,
        "--max_new_tokens", 1, *flags)])
    return read_metrics(out_dir)[1]


def quantised(model):
    """The plain model with the decoder's matrices quantised and dequantised, in place."""
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            layer = nf4.FrozenLinear(module, "cpu")
            module.weight.data = nf4.dense(nf4.parts_of(layer), module.weight, module.in_features)
    return model


def rounded(model):
    """The plain model with every matrix rounded stochastically to bfloat16, in place."""
    for name, weight in model.named_parameters():
        weight.data = stochastic_round(weight.data, torch.bfloat16, 0, "save", name).float()
    return model


def with_adapter(folder, base):
    """The base, a plain model in float32, with the adapter of a folder merged."""
    adapted = load_adapter(folder, torch.float32)
    weights = adapted.state_dict()
    for name, tensor in base.state_dict().items():
        owner, _, part = name.rpartition(".")
        if f"{owner}.A" in weights:
            weights[f"{owner}.base.{part}"] = tensor
    base.load_state_dict(dict(merged(adapted, weights)))
    return base


with tempfile.TemporaryDirectory() as folder:
    whole, in_4 = os.path.join(folder, "whole"), os.path.join(folder, "in_4")
    runs = {"whole": run(whole), "in 4 bits": run(in_4, "--base_bits", 4)}
    tokenizer = load_tokenizer(args.model)
    pairs, _ = load_pairs(args.data, tokenizer, args.max_length, needs_scores=True)
    _, pairs = split_train_val(pairs, 0.2, 0)
    stored = answer_logps(load_model(args.model), pairs)  # (P, 2)
    reference = answer_logps(quantised(load_model(args.model)), pairs)  # (P, 2)
    answer = torch.tensor([1.0, -1.0])
    students = {
        "(a) adapter on the quantised base": with_adapter(in_4, quantised(load_model(args.model))),
        "(b) adapter on the stored weights": with_adapter(in_4, load_model(args.model)),
        "(c) merged into the stored weights, bfloat16": rounded(
            with_adapter(in_4, load_model(args.model))),
        "(d) merged into the dequantised weights, bfloat16": rounded(
            with_adapter(in_4, quantised(load_model(args.model)))),
        "adapter of the whole base, on it": with_adapter(whole, load_model(args.model))}
    lines = [(name, answer_logps(model, pairs)) for name, model in students.items()]

tokens = sum(len(ids) for pair in pairs for ids in pair.answers)
print(f"\n{os.path.basename(args.model)}, {args.steps} steps, {len(pairs)} validation pairs; "
      f"log-probability per token: stored {stored.sum() / tokens:.4f}, quantised "
      f"{reference.sum() / tokens:.4f}; mean |difference| of an answer "
      f"{(stored - reference).abs().mean():.2f} nats\n")
print("| base | first loss | validation loss | margin, before beta |\n|---|---|---|---|")
for name, evaluations in runs.items():
    last = evaluations[-1]
    print(f"| {name} | {evaluations[0]['eval/loss']:.4f} | {last['eval/loss']:.4f} | "
          f"{last['eval/rewards/margins'] / 0.1:+.2f} |")
print("\n| student | margin to the quantised base | to the stored | log-probability per token |")
print("|---|---|---|---|")
for name, logps in lines:
    margins = [((logps - ref) @ answer).mean().item() for ref in (reference, stored)]
    print(f"| {name} | {margins[0]:+.2f} | {margins[1]:+.2f} | {logps.sum() / tokens:.4f} |")
print(f"\n{datetime.date.today()}, torch {torch.__version__}, transformers "
      f"{transformers.__version__}, {time.monotonic() - began:.0f} s")
