"""Memory of a training step, computed from shapes alone: no weights, no GPU, no download.

    python bench/memory.py                                      the recipes of docs/scale.md
    python bench/memory.py --shape solar-10.7b --lora_rank 16   one set of flags, as for train.py
    python bench/memory.py --check                              predict, measure, compare (Linux)

Weights, gradients and AdamW's two moments follow from the number of parameters. The rest is found
by taking the step with train.py's own functions on PyTorch's fake tensors, which have shapes and
no content: every operation reports what it allocates and frees. Not counted: CUDA and its
libraries (about 1 GB per GPU), and what the allocator loses between blocks. Leave a tenth.
"""
import argparse
import os
import subprocess
import sys
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import rdpo  # noqa: E402
from data import Pair, batch_tokens, collate  # noqa: E402
from infra.command import run  # noqa: E402
from infra.lora import add_lora  # noqa: E402
from infra.models import checkpoint_layers  # noqa: E402
from infra.rounding import Masters  # noqa: E402

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "7b": (4096, 11008, 32, 32, 32, 32000, False),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
    "solar-10.7b": (4096, 14336, 48, 32, 8, 32000, False),
}
RECIPES = (  # of docs/scale.md
    "--shape smollm2-135m --dtype float32 --tokens_per_batch 1024",
    "--shape smollm2-135m --dtype float32 --tokens_per_batch 1024 --lora_rank 16",
    "--shape 8b --lora_rank 16 --gradient_checkpointing --tokens_per_batch 2048",
    "--shape 8b --lora_rank 16 --gradient_checkpointing --tokens_per_batch 16384",
    "--shape solar-10.7b --lora_rank 16 --gradient_checkpointing --tokens_per_batch 16384",
    "--shape solar-10.7b --lora_rank 16 --tokens_per_batch 8192",
    "--shape solar-10.7b --fsdp 8 --gradient_checkpointing --tokens_per_batch 8192",
)
CHECKS = [f"--shape smollm2-135m --dtype float32 --tokens_per_batch 512 --prompt_length 256 "
          f"--answer_length 128{more}"
          for more in ("", " --gradient_checkpointing", " --lora_rank 16",
                       " --lora_rank 16 --gradient_checkpointing")]


def parse(words):
    parser = argparse.ArgumentParser(description="Memory of a training step, from shapes alone.",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="the student's shape")
    add("--lora_rank", type=int, default=0, help="0: all weights are trained")
    add("--gradient_checkpointing", action="store_true")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype")
    add("--tokens_per_batch", type=int, default=2048)
    add("--prompt_length", type=int, default=512, help="tokens of a prompt")
    add("--answer_length", type=int, default=256, help="tokens of each answer")
    add("--fsdp", type=int, default=1, metavar="GPUS", help="GPUs that share the weights")
    add("--pairs", type=int, default=10_000, help="rows, for the size of the reference cache")
    add("--check", action="store_true", help="compare with measurements on this machine")
    add("--measure", action="store_true", help="take the step and print the bytes it took")
    return parser.parse_args(words)


# ----------------------------------------------------------------------------------------- a step


def build(args):
    """(model, masters, batch) as train.py prepares them. Under FSDP the model is the gathered one,
    in the compute dtype, and masters is None."""
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = SHAPES[args.shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab,
        tie_word_embeddings=tied, max_position_embeddings=4096)
    dtype = getattr(torch, args.dtype)
    as_stored = args.lora_rank or args.fsdp > 1
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype if as_stored else torch.float32, attn_implementation="sdpa").eval()
    if args.lora_rank:
        add_lora(model, args.lora_rank, 2 * args.lora_rank)
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    masters = Masters(model, dtype, seed=0) if args.fsdp == 1 else None
    answer = [1] * args.answer_length
    pair = Pair("", "", [1] * args.prompt_length, answer, answer, None, None)
    count = max(1, args.tokens_per_batch // batch_tokens(pair, True))
    return model, masters, collate([pair] * count, share_prefix=True)


def forward(model, batch, args):
    with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return rdpo.sequence_logps(model, batch).sum()


class LiveBytes(TorchDispatchMode):
    """While it is on: the bytes of all live tensor storages, and their largest sum so far."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                self.add(tensor.untyped_storage())
        return results

    def add(self, storage):
        size = storage.nbytes()
        self.seen.add(storage)
        weakref.finalize(storage, self.forget, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def forget(self, size):
        self.now -= size


def bytes_of(weights):
    return sum(weight.nbytes for weight in weights)


def predict(args):
    """{what: bytes} of a step on each GPU."""
    if args.dtype == "bfloat16":  # stands for a GPU, which takes larger chunks of logits
        rdpo.HEAD_BYTES["cpu"] = rdpo.HEAD_BYTES["cuda"]
    with FakeTensorMode(), LiveBytes() as live:
        model, masters, batch = build(args)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        trained_count = sum(weight.numel() for weight in trained)
        gathered = sent = 0
        if masters is None:  # FSDP
            layers = [list(layer.parameters()) for layer in model.base_model.layers]
            frozen = bytes_of(model.parameters()) - bytes_of(trained)
            copies = 4 * trained_count * (args.dtype == "bfloat16")
            weights = (4 * trained_count + copies + frozen) // args.fsdp
            # Gathered: the layer at work, the next one, and what is outside the layers.
            gathered = bytes_of(model.parameters()) - sum(map(bytes_of, layers))
            gathered += 2 * bytes_of(layers[0])
            # Sent: the next layer as it arrives, this layer's gradients, and those of the layer
            # before in float32, to be summed.
            layer = [weight for weight in layers[0] if weight.requires_grad]
            sent = bytes_of(layers[0]) + bytes_of(layer) + sum(4 * w.numel() for w in layer)
            for weight in trained:  # a layer's gradients leave at once
                weight.register_post_accumulate_grad_hook(drop_gradient)
        else:
            owned = {id(weight): weight for weight in (*model.parameters(), *masters.parameters())}
            weights = bytes_of(owned.values())
            for master in masters.parameters():  # from an earlier micro-batch
                master.grad = torch.zeros_like(master)
            for _, master, copy in masters.pairs:
                if copy.dtype == torch.float32:  # its own gradient until the step's end
                    copy.grad, master.grad = master.grad, None
        before = live.now
        loss = forward(model, batch, args)
        activations = live.now - before
        live.peak = live.now
        loss.backward()
    return {"weights": weights, "gathered": gathered, "sent": sent,
            "gradients": 4 * trained_count // args.fsdp,
            "optimizer": 8 * trained_count // args.fsdp,
            "activations": activations, "backward": live.peak - before - activations}


def drop_gradient(weight):
    weight.grad = None


# -------------------------------------------------------------------------------- against reality


def measure(args):
    """Peak resident bytes of a real step on this CPU, in a process of its own."""
    before = resident("VmRSS")
    model, masters, batch = build(args)
    optimizer = torch.optim.AdamW(masters.parameters(), fused=True)
    forward(model, batch, args).backward()
    optimizer.step()
    forward(model, batch, args).backward()  # with gradients and moments: the peak
    return resident("VmHWM") - before


def resident(field):
    """VmRSS, resident now, or VmHWM, the most so far, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def check():
    print("peak on this CPU, MB                     predicted  measured  predicted / measured")
    for words in CHECKS:
        predicted = sum(predict(parse(words.split())).values())
        # Return freed blocks to the system at once, so that resident memory is live memory.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--measure", *words.split()]
        measured = int(subprocess.run(command, env=environment, check=True, capture_output=True,
                                      text=True).stdout)
        print(f"{words}\n{'':40s} {predicted / 1e6:9.0f} {measured / 1e6:9.0f} "
              f"{predicted / measured:21.2f}")
        if not 0.85 <= predicted / measured <= 1.15:
            raise SystemExit("the prediction is off by more than 15 %")


def show(words):
    args = parse(words.split())
    parts = predict(args)
    sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    cache = 72 * args.pairs / 1e6  # 32 + 4 bytes per answer
    print(f"{words}\n    {sum(parts.values()) / 1e9:.1f} GB"
          f"{' on each GPU' if args.fsdp > 1 else ''}: {sizes}; on disk, reference cache of "
          f"{args.pairs:,} pairs {cache:.1f} MB\n")


def main():
    args = parse(sys.argv[1:])
    if args.measure:
        print(measure(args))
    elif args.check:
        check()
    elif args.shape:
        show(" ".join(sys.argv[1:]))
    else:
        for words in RECIPES:
            show(words)


if __name__ == "__main__":
    run(main)
