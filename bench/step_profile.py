"""Where the time of an optimizer step goes; on CUDA also the model FLOPs utilisation (MFU).

    python bench/step_profile.py [--model DIR] [--batch_size 4] [--tokens_per_batch 2048] \\
        [--data rows.jsonl --max_length 512] [--gradient_checkpointing]

Random token ids of one length, or the rows of --data as they are; float32 on a CPU, bfloat16
autocast on CUDA. Counted FLOPs are those that the layout needs: each prompt once, the output head
for answer tokens only, attention for the pairs of tokens that see each other; 2 per multiply-add
forward, 4 backward. MFU is against the dense bfloat16 peak of an H100.

"Matrix products alone" is the time of the step's products (mm, addmm, bmm), of the same shapes and
strides on other memory, one after the other: what no trainer in PyTorch can do without. (A file
named profile.py would hide Python's own from PyTorch.)
"""
import os
import re
import sys
import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import Pair, batch_tokens, collate, load_pairs, longest_row, micro_batches  # noqa: E402
from infra.command import Parser, run  # noqa: E402
from infra.models import checkpoint_layers, load_model, load_tokenizer  # noqa: E402
from rdpo import rdpo_loss, sequence_logps  # noqa: E402

PEAK = 989e12  # FLOP/s, dense bfloat16, H100 and H200
KINDS = {"matrix products": "mm|addmm_?|bmm",
         "attention": "_scaled_dot_product.*|_flash.*|_efficient.*|_cudnn.*",
         "AdamW": "_fused_adamw_",
         "gradient norm": "linalg_vector_norm|_foreach_norm",
         "zeros and copies": "fill_|zero_|copy_|cat"}  # names of aten operations
CUDA = torch.cuda.is_available()


def get_args():
    parser = Parser("Show where the time of an optimizer step goes.")
    add = parser.add_argument
    add("--model", default=os.path.expanduser("~/.cache/rdpo/smollm2-135m"), help="a model folder")
    add("--batch_size", type=int, default=4, help="pairs per step")
    add("--tokens_per_batch", type=int, default=2048, help="most tokens per forward pass")
    add("--data", help="rows of real lengths (default: random ones of equal length)")
    add("--max_length", type=int, default=512, help="longer rows of --data are left out")
    add("--prompt_tokens", type=int, default=300)
    add("--answer_tokens", type=int, default=150)
    add("--steps", type=int, default=3, help="the fastest of these steps is reported")
    add("--gradient_checkpointing", action="store_true")
    add("--compile", action="store_true")
    return parser.parse_args()


def make_pairs(model, args):
    if args.data:
        pairs, _ = load_pairs(args.data, load_tokenizer(args.model), 10**6, needs_scores=False)
        return [pair for pair in pairs if longest_row(pair) <= args.max_length][:args.batch_size]

    def ids(length):
        return torch.randint(len(model.get_input_embeddings().weight), (length,)).tolist()

    return [Pair("", "", ids(args.prompt_tokens), ids(args.answer_tokens), ids(args.answer_tokens),
                 None, None) for _ in range(args.batch_size)]


def train_step(model, optimizer, batches, pair_count):
    """One optimizer step over all micro-batches; returns its seconds."""
    start = time.perf_counter()
    for pairs in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=CUDA):
            batch = collate(pairs, share_prefix=True).to(model.device)
            chosen, rejected = sequence_logps(model, batch).chunk(2)  # (B,) each
        losses, _, _ = rdpo_loss(chosen, rejected, chosen.detach(), rejected.detach(),
                                 torch.ones_like(chosen), 0.1)
        (losses.sum() / pair_count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside, by operation, shapes and strides."""
    KINDS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "addmm_", "bmm")}

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.KINDS:
            tensors = tuple((tuple(each.shape), each.stride(), each.dtype) for each in args)
            self.counts[function, tensors] += 1
        return function(*args, **kwargs or {})

    def seconds(self, device):
        """Of all of them alone: the fastest of three, times their number."""
        total = 0.0
        for (function, tensors), count in self.counts.items():
            inputs = [torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
                      for shape, stride, dtype in tensors]
            times = []
            for _ in range(3):
                start = time.perf_counter()
                function(*inputs)
                if CUDA:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            total += count * min(times)
        return total


def print_shares(profile):
    """Print the share of the output head and of each kind of operation in the profiled time."""
    # On CUDA, a CPU event includes the time of the kernels that it starts.
    events = [event for event in profile.key_averages()
              if event.device_type == torch.autograd.DeviceType.CPU]
    self_time = {event.key: event.self_device_time_total if CUDA else event.self_cpu_time_total
                 for event in events}  # microseconds, without the operations called inside
    total = sum(self_time.values())
    for event in events:
        if event.key in ("TokenLogps", "TokenLogpsBackward"):
            name = "head, backward" if "Backward" in event.key else "head, forward"
            spent = event.device_time_total if CUDA else event.cpu_time_total
            print(f"{name:30s} {spent / total:6.1%}")
    print("\nby kind of operation, the head's included")
    for kind, names in KINDS.items():
        matching = [key for key in self_time if re.fullmatch(f"aten::({names})", key)]
        print(f"{kind:30s} {sum(map(self_time.pop, matching)) / total:6.1%}")
    largest = sorted(self_time, key=self_time.get, reverse=True)[:6]
    shares = [f"{key.removeprefix('aten::')} {self_time[key] / total:.1%}" for key in largest]
    print(f"{'all others':30s} {sum(self_time.values()) / total:6.1%}, first of all "
          f"{', '.join(shares)}")


def count_flops(model, pairs):
    """FLOPs of one step, forward and backward."""
    config, embedding = model.config.get_text_config(), model.get_input_embeddings().weight.numel()
    body = sum(weight.numel() for weight in model.base_model.parameters()) - embedding
    head = model.get_output_embeddings().weight.numel()
    flops = 0
    for pair in pairs:
        prompt, answers = len(pair.prompt_ids), (len(pair.chosen_ids), len(pair.rejected_ids))
        visible = prompt ** 2 / 2 + sum(n * prompt + n ** 2 / 2 for n in answers)  # pairs of tokens
        attention = 2 * config.num_hidden_layers * config.hidden_size * visible
        flops += 6 * (body * (prompt + sum(answers)) + head * sum(answers) + attention)
    return flops


def main():
    args = get_args()
    model = load_model(args.model).to("cuda" if CUDA else "cpu")
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    if args.compile:
        model.base_model.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    pairs = make_pairs(model, args)
    batches = [[pairs[i] for i in indices] for indices in
               micro_batches(pairs, range(len(pairs)), args.tokens_per_batch, share_prefix=True)]

    train_step(model, optimizer, batches, len(pairs))  # warm up
    with Products() as products:
        train_step(model, optimizer, batches, len(pairs))
    alone = products.seconds(model.device)
    seconds = min(train_step(model, optimizer, batches, len(pairs)) for _ in range(args.steps))
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * CUDA
    with torch.profiler.profile(activities=activities) as profile:
        train_step(model, optimizer, batches, len(pairs))

    real = sum(batch_tokens(pair, True) for pair in pairs)
    computed = sum(collate(batch, True).input_ids.numel() for batch in batches)
    print(f"{len(pairs)} pairs in {len(batches)} batches: {seconds:.3f} s per step, "
          f"{len(pairs) / seconds:.2f} pairs/s, {real / seconds:.0f} tokens/s; {real} tokens, "
          f"{real / computed:.3f} of those that are computed\n"
          f"matrix products alone: {alone:.3f} s, {alone / seconds:.2f} of the step\n")
    print_shares(profile)
    flops = count_flops(model, pairs)
    mfu = f", {flops / seconds / PEAK:.1%} of {PEAK / 1e12:.0f}" if CUDA else ""
    print(f"\n{flops / 1e12:.2f} TFLOP per step, {flops / seconds / 1e12:.3f} TFLOP/s{mfu}")


if __name__ == "__main__":
    run(main)
