"""16-bit weights that learn: float32 masters, and copies of them by stochastic rounding.

bfloat16 has 8 significant bits: near 0.05 its neighbours are 0.00024 apart. Rounded to nearest, a
weight that moves less than half of that is still the old weight, in the forward pass and in the
saved file. Stochastic rounding goes to the upper neighbour with the probability of the place
between the two. The expectation of every weight is exact, and over millions of weights the sum is
what counts. docs/sixteen_bits.md draws it.
"""
import hashlib

import torch
import torch.nn as nn

import infra.distributed as dist

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's 23 bits of mantissa
CHUNK = {"cpu": 2**18, "cuda": 2**26, "mps": 2**24}  # weights at a time: bounds the temporaries


def stochastic_round(weight, dtype, *seed, start=0):
    """A float32 tensor with each value rounded to a neighbour on dtype's grid, still float32.

    Unbiased: the mean over many seeds is the weight. Values on the grid, inf and nan stay. An
    element's bits follow from `seed` and its index, counted from `start`: a resumed run, every
    rank and every shard of a weight draw the same.
    """
    key = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:4], "little", signed=True)
    flat, rounded = weight.flatten(), torch.empty(weight.shape, device=weight.device)
    size = CHUNK[weight.device.type]
    for i in range(0, len(flat), size):
        x = flat[i:i + size]
        noise = random_bits(start + i, len(x), key, x.device)
        rounded.view(-1)[i:i + size] = round_by(x, noise, dtype)
    return rounded


def random_bits(start, count, key, device):
    """32 random bits (count,) int32 for each index from start on: a hash of the index and a key.

    The finalizer of MurmurHash3. int32 products wrap around; `&` makes the shifts unsigned.
    """
    h = torch.arange(start, start + count, dtype=torch.int64, device=device).to(torch.int32)
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

    Under float32 they are the model's own. Under a 16-bit compute dtype the model holds copies,
    which `round` makes once per step:

    - The decoder's linear layers, most of a model, hold real 16-bit weights, so that autocast
      casts nothing. A hook adds their gradients to the masters' in float32.
    - Other weights (embeddings, norms, head, adapters, FSDP's shards) stay float32 tensors with
      values on the 16-bit grid. Autocast computes with some of them in float32, and sums the
      gradients of all of them in float32.
    """

    def __init__(self, model, dtype, seed):
        super().__init__()
        self.dtype, self.seed, self.pairs = dtype, seed, []  # (name, master, copy)
        linear = {module.weight for module in model.base_model.modules()
                  if isinstance(module, nn.Linear) and not dist.is_sharded(model)}
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            master = weight
            if dtype != torch.float32:
                master = nn.Parameter(weight.detach().clone())
                self.pairs.append((name, master, weight))
                if weight in linear:
                    weight.data = weight.data.to(dtype)
                    weight.register_post_accumulate_grad_hook(
                        lambda copy, master=master: move_gradient(copy, master))
            self.register_parameter(name.replace(".", "/"), master)

    def collect_gradients(self):
        """Move the gradients that no hook has moved. Call it after the last backward pass."""
        for _, master, copy in self.pairs:
            if copy.grad is not None:
                move_gradient(copy, master)

    @torch.no_grad()
    def round(self, step):
        """Set the model's weights to rounded copies of the masters, with new bits per step."""
        for name, master, copy in self.pairs:
            local, start = dist.local_shard(master)
            rounded = stochastic_round(local, self.dtype, self.seed, step, name, start=start)
            dist.local_shard(copy)[0].copy_(rounded)


def move_gradient(copy, master):
    if master.grad is None:
        master.grad = copy.grad.float()
    else:
        master.grad += copy.grad
    copy.grad = None
