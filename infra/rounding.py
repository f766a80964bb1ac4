"""16-bit weights that learn: float32 masters, and copies of them by stochastic rounding.

bfloat16 has 8 significant bits: near 0.05 its neighbours are 0.00024 apart. Rounded to nearest, a
weight that moves less than half of that is still the old weight, in the forward pass and in the
saved file. Stochastic rounding goes to the upper neighbour with the probability of the place
between the two. The expectation of every weight is exact, and over millions of weights the sum is
what counts. docs/sixteen_bits.md draws it.
"""
import functools
import hashlib
import itertools
import shutil

import torch
import torch.nn as nn

import infra.distributed as ranks

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's 23 bits of mantissa
CHUNK = {"cpu": 2**18, "cuda": 2**22, "mps": 2**22}  # weights at a time: bounds the temporaries


def stochastic_round(weight, dtype, *seed, start=0, out=None):
    """A float32 tensor in dtype, each value one of its two neighbours there, written to out or new.

    Unbiased: the mean over many seeds is the weight. Values on the grid, inf and nan stay. An
    element's bits follow from `seed` and its index, counted from `start`: a resumed run, every
    rank and every shard of a weight draw the same, on a CPU and on a GPU.
    """
    key = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:4], "little", signed=True)
    # As tensors, so that one compiled function serves all steps and shards.
    key = torch.full((), key, dtype=torch.int32, device=weight.device)
    start = torch.full((), start, dtype=torch.int64, device=weight.device)
    out = torch.empty_like(weight, dtype=dtype) if out is None else out
    x, rounded = weight.flatten(), out.view(-1)  # (n,) each
    if worth_compiling(x):
        compiled_round_into()(rounded, x, start, key, dtype)
        return out
    size = CHUNK[x.device.type]
    for i in range(0, len(x), size):
        round_into(rounded[i:i + size], x[i:i + size], start + i, key, dtype)
    return out


def worth_compiling(x):
    """Whether so many elements, on a GPU, repay compiling all operations into one pass over them.

    Compiling takes seconds and needs a C compiler.
    """
    return x.is_cuda and len(x) > 2**25 and any(map(shutil.which, ("gcc", "clang")))


@functools.cache
def compiled_round_into():
    return torch.compile(round_into, dynamic=True)


def round_into(rounded, x, start, key, dtype):
    """Write float32 x (n,) on the grid of dtype to rounded (n,). Element start + i has own bits."""
    rounded.copy_(round_by(x, random_bits(start, len(x), key), dtype))


def random_bits(start, count, key):
    """32 random bits (count,) int32 for each index from start on: a hash of the index and a key.

    start is an int64 and key an int32 tensor without dimensions. The finalizer of MurmurHash3:
    int32 products wrap around; `&` makes the shifts unsigned.
    """
    h = (torch.arange(count, device=start.device) + start).to(torch.int32)
    h = h * -1640531535 + key  # 0x9E3779B1
    h = (h ^ (h >> 16 & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    h = (h ^ (h >> 13 & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return h ^ (h >> 16 & 0xFFFF)


def round_by(x, noise, dtype):
    """Float32 x (n,) on the grid of dtype, by random bits (n,) int32."""
    bits = DROPPED_BITS[dtype]
    noise = noise & (1 << bits) - 1
    # float32 is sign and magnitude: adding to the bits that are dropped may carry the rest upwards.
    rounded = (x.view(torch.int32) + noise & -(1 << bits)).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its grid is even, in steps of 2^-24
        steps = torch.floor(x.abs() * 2**24 + noise / 2**bits)
        rounded = torch.where(x.abs() < 2**-14, torch.copysign(steps / 2**24, x), rounded)
    top = torch.finfo(dtype).max
    return torch.where(x.isfinite(), rounded.clamp(-top, top), x)


class Masters(nn.Module):
    """The float32 weights that the optimizer updates.

    Under float32 they are the model's own. Under a 16-bit compute dtype the model holds real
    16-bit copies, which `round` makes once per step. A hook adds each copy's gradient to its
    master's, in float32.

    All masters are views of one tensor, all copies of another: rounding is one pass over them.
    Under FSDP each shard is a tensor of its own, and copies are float32 with values on the 16-bit
    grid, which FSDP casts without loss.
    """

    def __init__(self, model, dtype, seed):
        super().__init__()
        self.dtype, self.seed = dtype, seed
        self.pairs = []  # (master, copy) of each weight
        self.flat = []  # (masters (n,), copies (n,), index of the first among all trained weights)
        weights = {name: weight for name, weight in model.named_parameters()
                   if weight.requires_grad}
        if dtype != torch.float32:
            split = self.split_shards if ranks.is_sharded(model) else self.split
            self.pairs = list(zip(split(list(weights.values())), weights.values()))
        masters = [master for master, _ in self.pairs] or weights.values()
        for name, master in zip(weights, masters):
            self.register_parameter(name.replace(".", "/"), master)

    @torch.no_grad()
    def split(self, weights):
        """Master parameters of the weights, which become their copies."""
        sizes = [weight.numel() for weight in weights]
        copies = torch.empty(sum(sizes), dtype=self.dtype, device=weights[0].device)  # (n,)
        masters = torch.empty_like(copies, dtype=torch.float32)  # (n,)
        self.flat.append((masters, copies, 0))
        parameters = []
        for weight, master, copy in zip(weights, masters.split(sizes), copies.split(sizes)):
            parameters.append(nn.Parameter(master.view_as(weight).copy_(weight)))
            weight.data = copy.view_as(weight).copy_(weight)
            weight.register_post_accumulate_grad_hook(
                functools.partial(move_gradient, parameters[-1]))
        return parameters

    def split_shards(self, weights):
        """The same for FSDP's shards. Their gradients come late: see collect_gradients."""
        starts = itertools.accumulate((weight.numel() for weight in weights), initial=0)
        parameters = [nn.Parameter(weight.detach().clone()) for weight in weights]
        for parameter, weight, start in zip(parameters, weights, starts):
            (master, first), (copy, _) = map(ranks.local_shard, (parameter, weight))
            self.flat.append((master.view(-1), copy.view(-1), start + first))
        return parameters

    def collect_gradients(self):
        """Move the gradients that no hook has moved, after the last backward pass: FSDP's."""
        for master, copy in self.pairs:
            if copy.grad is not None:
                move_gradient(master, copy)

    @torch.no_grad()
    def round(self, step):
        """Set the model's weights to rounded copies of the masters, with new bits per step."""
        for masters, copies, start in self.flat:
            stochastic_round(masters, self.dtype, self.seed, step, start=start, out=copies)


def move_gradient(master, copy):
    if master.grad is None:
        master.grad = copy.grad.float()
    else:
        master.grad += copy.grad
    copy.grad = None
