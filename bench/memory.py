"""How much memory training takes, computed from shapes alone: no weights, no GPU, no download.

    python bench/memory.py                                          the recipes of docs/scale.md
    python bench/memory.py --shape solar-10.7b --lora_rank 16       one set of flags, as for train.py
    python bench/memory.py --check                                  predicts small steps, takes them, and compares (Linux)

Weights, gradients and AdamW's two moments are counted: they follow from the number of parameters. What a forward and backward pass
needs on top is found by taking the step itself, train.py's own functions, on PyTorch's fake tensors: they have shapes and no content,
and every operation reports what it allocates and frees. Not in here: what CUDA and its libraries take (around 1 GB a GPU), and
what the allocator loses between blocks. Leave a tenth.
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

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings; biases and the like are left out
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "7b": (4096, 11008, 32, 32, 32, 32000, False),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
    "solar-10.7b": (4096, 14336, 48, 32, 8, 32000, False),
}
RECIPES = (  # what docs/scale.md states
    "--shape smollm2-135m --dtype float32 --tokens_per_batch 1024",
    "--shape smollm2-135m --dtype float32 --tokens_per_batch 1024 --lora_rank 16",
    "--shape 8b --lora_rank 16 --gradient_checkpointing --tokens_per_batch 2048",
    "--shape 8b --lora_rank 16 --gradient_checkpointing --tokens_per_batch 16384",
    "--shape solar-10.7b --lora_rank 16 --gradient_checkpointing --tokens_per_batch 16384",
    "--shape solar-10.7b --fsdp 8 --gradient_checkpointing --tokens_per_batch 8192",
)
CHECKS = [f"--shape smollm2-135m --dtype float32 --tokens_per_batch 512 --prompt_length 256 --answer_length 128{more}"
          for more in ("", " --gradient_checkpointing", " --lora_rank 16", " --lora_rank 16 --gradient_checkpointing")]


def parse(words):
    parser = argparse.ArgumentParser(description="Memory of a training step, from shapes alone.", allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, help="the student's shape")
    parser.add_argument("--lora_rank", type=int, default=0, help="0: all weights are trained")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype")
    parser.add_argument("--tokens_per_batch", type=int, default=2048)
    parser.add_argument("--prompt_length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--answer_length", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--fsdp", type=int, default=1, metavar="GPUS", help="GPUs that share the weights (default: one that has all)")
    parser.add_argument("--pairs", type=int, default=10_000, help="rows of the run, for the size of the reference cache")
    parser.add_argument("--check", action="store_true", help="compare predictions with measurements on this machine")
    parser.add_argument("--measure", action="store_true", help="take the step for real and print the bytes it took")
    return parser.parse_args(words)


# ----------------------------------------------------------------------------------------------------------- a step


def build(args):
    """A student as train.py prepares it: frozen and in the compute dtype beside adapters, or all float32; and a micro-batch."""
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = SHAPES[args.shape]
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocab,
                         num_key_value_heads=kv_heads, tie_word_embeddings=tied, max_position_embeddings=4096)
    in_compute_dtype = args.lora_rank or args.fsdp > 1  # FSDP gathers its float32 shards in the compute dtype
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype) if in_compute_dtype else torch.float32,
                                             attn_implementation="sdpa").eval()
    if args.lora_rank:
        add_lora(model, args.lora_rank, 2 * args.lora_rank)
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    pair = Pair("", "", [1] * args.prompt_length, [1] * args.answer_length, [1] * args.answer_length, None, None)
    return model, collate([pair] * max(1, args.tokens_per_batch // batch_tokens(pair, True)), share_prefix=True)


def forward(model, batch, args):
    with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return rdpo.sequence_logps(model, batch).sum()


class LiveBytes(TorchDispatchMode):
    """While it is on: the bytes of all tensor storages that live, and the most there ever were."""

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


def predict(args):
    """{what: bytes} of a step on each GPU."""
    if args.dtype == "bfloat16":  # stands for a GPU, which gets larger chunks of logits than the CPU of the fake tensors
        rdpo.HEAD_BYTES["cpu"] = rdpo.HEAD_BYTES["cuda"]
    with FakeTensorMode(), LiveBytes() as live:
        model, batch = build(args)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        count, trained_count = (sum(weight.numel() for weight in weights) for weights in (list(model.parameters()), trained))
        frozen_bytes = 2 if args.dtype == "bfloat16" else 4
        gathered = sent = 0
        if args.fsdp > 1:  # two layers, the one at work and the next one, and what stands outside the layers
            layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in model.base_model.layers]
            gathered = sum(weight.nbytes for weight in model.parameters()) - sum(layers) + 2 * layers[0]
            # The next layer as it arrives, in one piece; the gradients of this one; those of the one before, in float32, to be added up.
            sent = layers[0] + sum(weight.nbytes + 4 * weight.numel() for weight in model.base_model.layers[0].parameters() if weight.requires_grad)
            for weight in trained:  # a layer's gradients leave as soon as they are there
                weight.register_post_accumulate_grad_hook(drop_gradient)
        else:  # there from an earlier micro-batch
            for weight in trained:
                weight.grad = torch.zeros_like(weight)
        before = live.now
        loss = forward(model, batch, args)
        activations = live.now - before
        live.peak = live.now
        loss.backward()
    return {"weights": (4 * trained_count + frozen_bytes * (count - trained_count)) // args.fsdp, "gathered": gathered, "sent": sent,
            "gradients": 4 * trained_count // args.fsdp, "optimizer": 8 * trained_count // args.fsdp,
            "activations": activations, "backward": live.peak - before - activations}


def drop_gradient(weight):
    weight.grad = None


# ---------------------------------------------------------------------------------------------------- against reality


def measure(args):
    """The most bytes of resident memory that it really took, on the CPU of this machine, in a process of its own."""
    before = resident("VmRSS")
    model, batch = build(args)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    forward(model, batch, args).backward()
    optimizer.step()
    forward(model, batch, args).backward()  # with gradients and moments there: the peak
    return resident("VmHWM") - before


def resident(field):
    """VmRSS, what is resident now, or VmHWM, the most that ever was, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def check():
    print("peak on this CPU, MB                     predicted  measured  predicted / measured")
    for words in CHECKS:
        predicted = sum(predict(parse(words.split())).values())
        # Freed blocks go back to the system at once, so that what is resident is what lives.
        command = [sys.executable, __file__, "--measure", *words.split()]
        measured = int(subprocess.run(command, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, check=True, capture_output=True, text=True).stdout)
        print(f"{words}\n{'':40s} {predicted / 1e6:9.0f} {measured / 1e6:9.0f} {predicted / measured:21.2f}")
        if not 0.85 <= predicted / measured <= 1.15:
            raise SystemExit("the prediction is off by more than 15 %")


def show(words):
    args = parse(words.split())
    parts = predict(args)
    print(words)
    print(f"    {sum(parts.values()) / 1e9:.1f} GB" + (" on each GPU" if args.fsdp > 1 else "") + ": "
          + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
          + f"; on disk, reference cache of {args.pairs:,} pairs {72 * args.pairs / 1e6:.1f} MB\n")  # 32 + 4 bytes an answer


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
