"""Where an optimizer step's time goes, and on CUDA the model FLOPs utilisation against the dense bf16 peak.

    python bench/step_profile.py [--model DIR] [--batch_size 4] [--tokens_per_batch 2048] [--gradient_checkpointing]

(Not called profile.py: beside the other benches that would hide the module of the standard library that PyTorch imports.)

Random ids of the lengths asked for; float32 on a CPU, bfloat16 autocast on CUDA. The FLOPs counted are those the layout needs: each prompt
once, the output head for response tokens only, attention for the pairs of tokens that see each other; 2 a multiply-add forward, 4 backward.
"""
import argparse
import os
import re
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import Pair, collate, micro_batches  # noqa: E402
from infra.models import checkpoint_layers, load_model  # noqa: E402
from rdpo import rdpo_loss, sequence_logps  # noqa: E402

PEAK = 989e12  # FLOP/s, dense bf16, H100 and H200
KINDS = {"matrix products": "mm|addmm_?|bmm", "attention": "_scaled_dot_product.*|_flash.*|_efficient.*|_cudnn.*", "AdamW": "_fused_adamw_",
         "gradient norm": "linalg_vector_norm|_foreach_norm", "zeros and copies": "fill_|zero_|copy_|cat"}

parser = argparse.ArgumentParser(description="Where a step's time goes.")
parser.add_argument("--model", default=os.path.expanduser("~/.cache/rdpo/smollm2-135m"))
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--tokens_per_batch", type=int, default=2048)
parser.add_argument("--prompt_tokens", type=int, default=300)
parser.add_argument("--answer_tokens", type=int, default=150)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--gradient_checkpointing", action="store_true")
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()

cuda = torch.cuda.is_available()
device = torch.device("cuda" if cuda else "cpu")
model = load_model(args.model).to(device)
if args.gradient_checkpointing:
    checkpoint_layers(model)
if args.compile:
    model.base_model.compile(dynamic=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def random_ids(length):
    return torch.randint(len(model.get_input_embeddings().weight), (length,)).tolist()


pairs = [Pair("", "", random_ids(args.prompt_tokens), random_ids(args.answer_tokens), random_ids(args.answer_tokens), None, None)
         for _ in range(args.batch_size)]
batches = [[pairs[i] for i in indices] for indices in micro_batches(pairs, range(len(pairs)), args.tokens_per_batch, True)]


def step():
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            chosen, rejected = sequence_logps(model, collate(batch, share_prefix=True).to(device)).chunk(2)
        losses, _, _ = rdpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), torch.ones_like(chosen), 0.1)
        (losses.sum() / len(pairs)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def seconds():
    began = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


seconds()
taken = min(seconds() for _ in range(args.steps))
activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
with torch.profiler.profile(activities=activities) as profile:
    seconds()
events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]  # on CUDA each has its kernels' time
own = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in events}  # microseconds
whole = sum(own.values())
print(f"{len(pairs)} pairs in {len(batches)} batches: {taken:.3f} s per step, {len(pairs) / taken:.2f} pairs/s\n")
for event in events:
    if event.key in ("TokenLogps", "TokenLogpsBackward"):
        print(f"{'head, ' + ('backward' if 'Backward' in event.key else 'forward'):30s} {(event.device_time_total if cuda else event.cpu_time_total) / whole:6.1%}")
print("\nby kind of operation, the head's included")
for kind, names in KINDS.items():
    found = [key for key in own if re.fullmatch(f"aten::({names})", key)]
    print(f"{kind:30s} {sum(map(own.pop, found)) / whole:6.1%}")
print(f"{'all others':30s} {sum(own.values()) / whole:6.1%}, first of all " + ", ".join(
    f"{key.removeprefix('aten::')} {own[key] / whole:.1%}" for key in sorted(own, key=own.get, reverse=True)[:6]))

config, embedding = model.config.get_text_config(), model.get_input_embeddings().weight.numel()
body = sum(weight.numel() for weight in model.base_model.parameters()) - embedding
prompt, answer = args.prompt_tokens, args.answer_tokens
visible = prompt ** 2 / 2 + 2 * (answer * prompt + answer ** 2 / 2)  # pairs of tokens that see each other
flops = 6 * len(pairs) * (body * (prompt + 2 * answer) + model.get_output_embeddings().weight.numel() * 2 * answer
                          + 2 * config.num_hidden_layers * config.hidden_size * visible)
print(f"\n{flops / 1e12:.2f} TFLOP per step, {flops / taken / 1e12:.3f} TFLOP/s" + (f", {flops / taken / PEAK:.1%} of {PEAK / 1e12:.0f}" if cuda else ""))
