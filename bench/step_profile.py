"""Where the time of an optimizer step goes; on CUDA also the model FLOPs utilisation (MFU).

    python bench/step_profile.py [--model DIR] [--batch_size 4] [--tokens_per_batch 2048] \\
        [--data rows.jsonl --max_length 512] [--gradient_checkpointing]

Random token ids of one length, or the rows of --data as they are. A step is train.py's, in the
compute dtype that it takes on the machine: forward, backward, clipping, AdamW on the float32
masters and, in 16 bits, their rounding. Counted FLOPs are those that the layout needs: each prompt
once, the output head for answer tokens only, attention for the pairs of tokens that see each other;
2 per multiply-add forward, 4 backward. MFU is against the dense bfloat16 peak of an H100.

"Matrix products alone" is the time of the step's products (mm, addmm, bmm), of the same shapes and
strides on other memory, one after the other: what no trainer in PyTorch can do without. (A file
named profile.py would hide Python's own from PyTorch.)
"""
import math
import os
import re
import sys
import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOY_ROWS = os.path.join(ROOT, "toy", "scored.jsonl")
sys.path.insert(0, ROOT)

import infra.distributed as ranks  # noqa: E402
import train  # noqa: E402
from data import Pair, batch_tokens, collate, load_pairs  # noqa: E402
from infra.command import Parser, run  # noqa: E402
from infra.models import cast_weights, load_model, load_tokenizer  # noqa: E402
from infra.packing import longest_row  # noqa: E402
from infra.policy import place  # noqa: E402
from infra.rounding import Masters  # noqa: E402
from rdpo import preference_probability, sequence_logps  # noqa: E402

PEAK = 989e12  # FLOP/s, dense bfloat16, H100 and H200
KINDS = {"matrix products": "mm|addmm_?|bmm",
         "attention": "_scaled_dot_product.*|_flash.*|_efficient.*|_cudnn.*",
         "AdamW": "_fused_adamw_",
         "gradient norm": "linalg_vector_norm|_foreach_norm",
         "zeros and copies": "fill_|zero_|copy_|cat"}  # names of aten operations
PARTS = {"TokenLogps": "head, forward", "TokenLogpsBackward": "head, backward",
         "rounding": "rounding of the masters"}
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


def make_pairs(vocab, args):
    if args.data:
        pairs, _ = load_pairs(args.data, load_tokenizer(args.model), 10**6, needs_scores=False)
        return [pair for pair in pairs if longest_row(pair) <= args.max_length][:args.batch_size]
    return equal_pairs(args.batch_size, vocab, args.prompt_tokens, args.answer_tokens)


def equal_pairs(count, vocab, prompt, answer):
    """Pairs of random ids, all of the same lengths."""
    return [Pair(f"equal:{i}", "", *(torch.randint(vocab, (length,)).tolist()
                                     for length in (prompt, answer, answer)), score_gap=2.0)
            for i in range(count)]


def make_data(pairs, vocab):
    """A train.Dataset whose reference gives every token the probability 1 / vocab."""
    gaps = torch.tensor([pair.score_gap for pair in pairs]).nan_to_num()  # (P,), no scores: a tie
    reference = [[-len(ids) * math.log(vocab) for ids in pair.answers] for pair in pairs]
    return train.Dataset(pairs, True, *torch.tensor(reference).T, preference_probability(gaps),
                         gaps, torch.ones(len(pairs)))


class Step:
    """One optimizer step after the other, as train.py takes them."""

    def __init__(self, model, args, loss_scale=2.0**16):
        self.model, self.args, self.taken = model, args, 0
        dtype = getattr(torch, args.dtype)
        self.masters = Masters(model, dtype, args.seed)
        self.optimizer = torch.optim.AdamW(self.masters.parameters(), lr=args.learning_rate,
                                           weight_decay=args.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(model.device.type, init_scale=loss_scale,
                                           enabled=dtype == torch.float16)
        self.masters.round(0)

    def backward(self, data):
        loss, _, values = train.forward_all(self.model, data, self.args,
                                            lambda loss: self.scaler.scale(loss).backward())
        self.masters.collect_gradients()
        return loss, values

    def update(self):
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.masters.parameters(), self.args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def round(self):
        self.taken += 1
        with torch.profiler.record_function("rounding"):
            self.masters.round(self.taken)

    def __call__(self, data):
        """(loss, gradient norm)"""
        loss = train.mean_metrics(*self.backward(data))["loss"]  # train.py waits for the GPU here
        norm = self.update().item()
        self.round()
        return loss, norm


def timed(function, *args):
    """Seconds of a call, its kernels included."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*args)
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
            total += count * min(timed(function, *inputs) for _ in range(3))
        return total


def print_shares(profile):
    """Print the shares of the head, of rounding and of each kind of operation in the time."""
    # On CUDA, a CPU event includes the time of the kernels that it starts.
    events = [event for event in profile.key_averages()
              if event.device_type == torch.autograd.DeviceType.CPU]
    self_time = {event.key: event.self_device_time_total if CUDA else event.self_cpu_time_total
                 for event in events}  # microseconds, without the operations called inside
    total = sum(self_time.values())
    for event in events:
        if event.key in PARTS:
            spent = event.device_time_total if CUDA else event.cpu_time_total
            print(f"{PARTS[event.key]:30s} {spent / total:6.1%}")
    print("\nby kind of operation, these included")
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
    train_args = train.get_args(
        ["--data", TOY_ROWS, "--device", "cuda" if CUDA else "cpu", "--tokens_per_batch",
         str(args.tokens_per_batch), *["--gradient_checkpointing"] * args.gradient_checkpointing,
         *["--compile"] * args.compile])
    device, dtype = ranks.setup(train_args)
    model = load_model(args.model)
    cast_weights(model, dtype)
    place(model, train_args, device, dtype, sequence_logps)
    vocab = model.config.get_text_config().vocab_size
    pairs = make_pairs(vocab, args)
    data, step = make_data(pairs, vocab), Step(model, train_args)

    step(data)  # warm up
    with Products() as products:
        step(data)
    alone = products.seconds(device)
    seconds = min(timed(step, data) for _ in range(args.steps))
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * CUDA
    with torch.profiler.profile(activities=activities) as profile:
        timed(step, data)

    batches = train.rank_batches(pairs, range(len(pairs)), True, train_args)
    real = sum(batch_tokens(pair, True) for pair in pairs)
    computed = sum(collate([pairs[i] for i in indices], True).input_ids.numel()
                   for indices, _ in batches)
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
