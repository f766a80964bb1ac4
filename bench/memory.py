"""Memory of a training run, computed from shapes alone: no weights, no GPU, no download.

    python bench/memory.py                                      the recipes of docs/scale.md
    python bench/memory.py --shape solar-10.7b --lora_rank 16   one set of flags, as for train.py
    python bench/memory.py --check                              predict, measure, compare (Linux)

The stages of train.py are taken with the project's own functions on PyTorch's fake tensors, which
have shapes and no content: every operation reports what it allocates and frees.

    start       the student, loaded, and the choice of a layout, which needs plain logits
    reference   a batch without gradients
    step        forward and backward with the gradients of an earlier micro-batch, then rounding
    export      a student of 16 bits for the host, merged and rounded one weight at a time
    check       nothing but that student, and a batch; with --base_bits 4 the student stays on the
                host, as where its 16 bits do not fit, and sends one matrix at a time

--dtype float32 stands for a CPU, which is its own host; bfloat16 for a GPU. Where PyTorch lacks
CUDA, "cuda" tensors have no gradients. So a GPU's are on "meta", and attention is CUDA's kernel.
Not counted: CUDA and its libraries (about 1 GB per GPU), the sample answers, and what the
allocator loses between blocks. Leave a tenth.
"""
import argparse
import contextlib
import gc
import os
import subprocess
import sys
import weakref
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import Pair, batch_tokens, collate  # noqa: E402
from infra.checkpoint import student_weights  # noqa: E402
from infra.command import run  # noqa: E402
from infra.lora import add_lora, without_lora  # noqa: E402
from infra.models import checkpoint_layers  # noqa: E402
from infra.nf4 import freeze_linears, frozen_layers  # noqa: E402
from infra.rounding import CHUNK, Masters  # noqa: E402
from rdpo import HEAD_BYTES, plain_sequence_logps, sequence_logps  # noqa: E402

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
    "--shape smollm2-135m --tokens_per_batch 8192",
    "--shape 1b --tokens_per_batch 8192",
    "--shape 8b --lora_rank 16 --gradient_checkpointing --tokens_per_batch 2048",
    "--shape 8b --lora_rank 16 --gradient_checkpointing --tokens_per_batch 16384",
    "--shape 8b --lora_rank 16 --base_bits 4 --gradient_checkpointing --tokens_per_batch 2048",
    "--shape solar-10.7b --lora_rank 16 --base_bits 4 --gradient_checkpointing "
    "--tokens_per_batch 2048",
    "--shape solar-10.7b --lora_rank 16 --base_bits 4 --gradient_checkpointing "
    "--tokens_per_batch 8192",
    "--shape solar-10.7b --lora_rank 16 --gradient_checkpointing --tokens_per_batch 16384",
    "--shape solar-10.7b --lora_rank 16 --tokens_per_batch 8192",
    "--shape solar-10.7b --fsdp 8 --gradient_checkpointing --tokens_per_batch 8192",
)
CHECKS = [f"--shape smollm2-135m --dtype float32 --tokens_per_batch 512 --prompt_length 256 "
          f"--answer_length 128{more}"
          for more in ("", " --gradient_checkpointing", " --lora_rank 16",
                       " --lora_rank 16 --gradient_checkpointing",
                       " --lora_rank 16 --base_bits 4 --gradient_checkpointing")]


def parse(words):
    parser = argparse.ArgumentParser(description="Memory of a training run, from shapes alone.",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="the student's shape")
    add("--lora_rank", type=int, default=0, help="0: all weights are trained")
    add("--base_bits", type=int, choices=(0, 4), default=0, help="4: frozen weights in NF4")
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


# ------------------------------------------------------------------------- a run, stage by stage


def build(args, device, adapted=True):
    """A model as train.py loads it and, if `adapted`, prepares it for training."""
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = SHAPES[args.shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab,
        tie_word_embeddings=tied, max_position_embeddings=4096)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, args.dtype), attn_implementation="sdpa").eval()
    if args.base_bits and (adapted or device.type == "meta"):
        freeze_linears(model, device if adapted else None)
        for layer in frozen_layers(model):  # a view of a file: no memory here
            layer.weight = layer.weight.to("cpu" if device.type == "meta" else "meta")
    if args.lora_rank and adapted:
        add_lora(model, args.lora_rank, 2 * args.lora_rank)
    if args.gradient_checkpointing and adapted:
        checkpoint_layers(model)
    return model


def full_batch(args):
    """The pairs of the largest micro-batch."""
    answer = [1] * args.answer_length
    pair = Pair("", "", [1] * args.prompt_length, answer, answer)
    return [pair] * max(1, args.tokens_per_batch // batch_tokens(pair, True))


def forward(model, pairs):
    batch = collate(pairs, share_prefix=True).to(model.device)
    return sequence_logps(model, batch).sum()


@torch.no_grad()
def choose_layout(model, pairs):
    plain_sequence_logps(model, pairs[:1])
    forward(model, 2 * pairs[:1])


@torch.no_grad()
def reference(model, pairs):
    with without_lora(model):
        forward(model, pairs)


@contextlib.contextmanager
def cuda_rules():
    """Compute with tensors on "meta" as with a GPU's."""
    with patch.dict(HEAD_BYTES, meta=HEAD_BYTES["cuda"]), patch.dict(CHUNK, meta=CHUNK["cuda"]), \
            patch.object(F, "scaled_dot_product_attention", cuda_attention):
        yield


def cuda_attention(query, key, value, attn_mask=None, scale=None, is_causal=False, **_):
    """The kernel that CUDA takes for 16 bits: neither keeps a tensor of (heads, T, T)."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, is_causal=is_causal, scale=scale)[0]
    mask = attn_mask.expand(*query.shape[:3], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, scale=scale)[0]


INNER = {  # bytes that an operation allocates and frees within, where no fake tensor shows them
    torch.ops.aten.logsumexp.default: lambda x, *_: x.nbytes,  # its distance from the maximum
    # The gradient of the queries is summed in float32.
    torch.ops.aten._scaled_dot_product_efficient_attention_backward.default:
        lambda grad, query, *_: 4 * query.numel(),
}


class LiveBytes(TorchDispatchMode):
    """While it is on: the bytes of a device's live tensor storages, and their largest sum."""

    def __init__(self, device):
        super().__init__()
        self.device, self.now, self.peak, self.seen = device, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1  # no content: all that an `if` asks of a tensor is true
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if (isinstance(tensor, torch.Tensor) and tensor.device.type == self.device
                    and tensor.untyped_storage() not in self.seen):
                self.add(tensor.untyped_storage())
        if function in INNER:
            self.peak = max(self.peak, self.now + INNER[function](*args))
        return results

    def add(self, storage):
        size = storage.nbytes()
        self.seen.add(storage)
        weakref.finalize(storage, self.forget, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def forget(self, size):
        self.now -= size

    def lap(self):
        """The largest sum since the last call."""
        peak, self.peak = self.peak, self.now
        return peak


def bytes_of(weights):
    return sum(weight.nbytes for weight in weights)


def predict(args):
    """{stage: the most bytes held at once}, on each GPU. The names are at the top of this file."""
    return simulate(args)[0]


def simulate(args):
    """(predict's {stage: bytes}, {part: bytes} of the step)."""
    is_cpu, pairs = args.dtype == "float32", full_batch(args)
    device = torch.device("cpu" if is_cpu else "meta")
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(device.type) as live, (
            contextlib.nullcontext() if is_cpu else cuda_rules()):
        stages, parts = (train if args.fsdp == 1 else train_sharded)(args, pairs, device, live)
        parts["backward"] = stages["step"] - sum(parts.values())
        gc.collect()  # checkpointed layers are reference cycles
        student = build(args, device, adapted=False)
        live.lap()
        with torch.no_grad():
            forward(student, pairs)
        stages["check"] = live.lap()
    return stages, parts


def train(args, pairs, device, live):
    """(stages, parts) from start to export."""
    stages, model = {}, build(args, device)
    live.lap()  # made from its config, a model passes through tensors that a file's does not
    choose_layout(model, pairs)
    stages["start"] = live.lap()
    reference(model, pairs)
    stages["reference"] = live.lap()
    masters = Masters(model, getattr(torch, args.dtype), seed=0)
    trained = sum(master.numel() for master in masters.parameters())
    parts = {"weights": live.now, "gradients": 4 * trained, "optimizer": 8 * trained}
    # AdamW's moments. Its fused kernel needs nothing else.
    moments = [torch.zeros_like(master) for master in (*masters.parameters(),) * 2]
    for master in masters.parameters():  # from an earlier micro-batch
        master.grad = torch.zeros_like(master)
    parts["activations"] = backward(model, pairs, live)
    for master in masters.parameters():
        master.grad = None
    masters.round(1)
    stages["step"] = live.lap()
    student_weights(model, masters, torch.bfloat16, seed=0)
    stages["export"] = live.lap()
    del moments
    return stages, parts


def train_sharded(args, pairs, device, live):
    """The same for each of FSDP's ranks. The model is the gathered one."""
    def hold(*sizes):
        return [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]

    stages, model = {}, build(args, device)
    whole, layers = bytes_of(model.parameters()), model.base_model.layers
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    count, layer = sum(map(torch.numel, trained)), list(layers[0].parameters())
    shard = (4 * count + whole - bytes_of(trained)) // args.fsdp
    copies = 4 * count * (args.dtype != "float32") // args.fsdp
    # Gathered: the layer at work, the next one, and what is outside the layers.
    gathered = whole - bytes_of(layers.parameters()) + 2 * bytes_of(layer)
    live.now -= whole  # the parts of it that are there at a time are held instead
    live.lap()
    held = hold(shard, gathered, bytes_of(layer))  # the last: the next layer as it arrives
    choose_layout(model, pairs)
    stages["start"] = live.lap()
    reference(model, pairs)
    stages["reference"] = live.lap()
    # Sent: the next layer as it arrives, this layer's gradients, and those of the layer before in
    # float32, to be summed.
    layer_trained = [weight for weight in layer if weight.requires_grad]
    sent = bytes_of(layer) + bytes_of(layer_trained) + 4 * sum(map(torch.numel, layer_trained))
    parts = {"weights": shard + copies, "gathered": gathered, "sent": sent,
             "gradients": 4 * count // args.fsdp, "optimizer": 8 * count // args.fsdp}
    held.clear()
    held += hold(*parts.values())
    for weight in trained:  # a layer's gradients leave at once
        weight.register_post_accumulate_grad_hook(drop_gradient)
    parts["activations"] = backward(model, pairs, live)
    stages["step"] = live.lap()
    # Rank 0 sends one whole weight after the other to the host, and merges and rounds them there.
    held.clear()
    live.lap()
    held += hold(parts["weights"], parts["optimizer"], 4 * max(map(torch.numel, trained)))
    stages["export"] = live.lap()
    live.now += whole
    return stages, parts


def backward(model, pairs, live):
    """Go forward and backward through a micro-batch; returns the bytes of its activations."""
    before = live.now
    loss = forward(model, pairs)
    activations = live.now - before
    loss.backward()
    return activations


def drop_gradient(weight):
    weight.grad = None


# -------------------------------------------------------------------------------- against reality


def measure(args):
    """Peak resident bytes of a real step on this CPU, in a process of its own."""
    before, pairs = resident("VmRSS"), full_batch(args)
    model = build(args, torch.device("cpu"))
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # forgets VmHWM: a 4-bit base was made from one that a file would hold
    masters = Masters(model, getattr(torch, args.dtype), seed=0)
    optimizer = torch.optim.AdamW(masters.parameters(), fused=True)
    forward(model, pairs).backward()
    optimizer.step()
    forward(model, pairs).backward()  # with gradients and moments: the peak
    return resident("VmHWM") - before


def resident(field):
    """VmRSS, resident now, or VmHWM, the most so far, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def check():
    print("peak on this CPU, MB                     predicted  measured  predicted / measured")
    for words in CHECKS:
        predicted = predict(parse(words.split()))["step"]
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
    stages, parts = simulate(args)
    cache = 72 * args.pairs / 1e6  # 32 + 4 bytes per answer
    print(f"{words}\n    {gigabytes(stages)}: {max(stages.values()) / 1e9:.1f} GB"
          f"{' on each GPU' if args.fsdp > 1 else ''}\n    step: {gigabytes(parts)}\n    on disk: "
          f"reference cache of {args.pairs:,} pairs, {cache:.1f} MB\n", flush=True)


def gigabytes(sizes):
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sizes.items())


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
