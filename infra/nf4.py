"""NF4: the frozen weights under LoRA in 4 bits each (Dettmers et al. 2023, arXiv:2305.14314).

    weight ~ level * scale      one of 16 levels, the quantiles of a normal distribution
    scale  = code * step        a scale for 64 weights of a row, in 8 bits; a step for a row

That is 4.13 bits a weight. A matrix is dequantised in the compute dtype for one product at a time
and never kept for the backward pass. The quantised model is policy and reference alike.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

BLOCK = 64
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0])
BYTE = torch.arange(256)
TABLE = torch.stack([LEVELS[BYTE >> 4], LEVELS[BYTE & 15]], 1)  # (256, 2): a byte's two levels


def quantise(weight):
    """A matrix (out, in) as codes (out, in / 2) uint8, two weights each; scales (out, in / 64)
    uint8; steps (out, 1) float32. Rows are padded with 0 to whole blocks."""
    rows = F.pad(weight.float(), (0, -weight.shape[1] % BLOCK))
    blocks = rows.unflatten(1, (-1, BLOCK))  # (out, in / 64, 64)
    largest = blocks.abs().amax(2)  # (out, in / 64)
    steps = (largest.amax(1, keepdim=True) / 255).clamp(min=1e-30)  # a row of zeros has a step too
    scales = (largest / steps).round().clamp(min=1)  # (out, in / 64)
    middles = ((LEVELS[1:] + LEVELS[:-1]) / 2).to(weight.device)
    levels = torch.bucketize(blocks / (scales * steps)[..., None], middles, out_int32=True)
    levels = levels.to(torch.uint8).flatten(1)  # (out, in)
    return levels[:, ::2] << 4 | levels[:, 1::2], scales.to(torch.uint8), steps


def dense(parts, like, width):
    """The matrix (out, width) of FrozenLinear.parts or of an nn.Linear, as `like` is stored."""
    if len(parts) == 1:
        return parts[0].to(like)
    codes, scales, steps, table = parts
    weights = table.to(like).index_select(0, codes.flatten().int())  # (out * in / 2, 2)
    scales = (scales * steps).to(like)[..., None]  # (out, in / 64, 1)
    return weights.view(*scales.shape[:2], BLOCK).mul_(scales).flatten(1)[:, :width]


def parts_of(linear):
    """What `dense` makes the matrix of an nn.Linear or FrozenLinear from."""
    return linear.parts if isinstance(linear, FrozenLinear) else (linear.weight,)


class Product(torch.autograd.Function):
    """x W^T: keeps the parts of W for the backward pass, neither W nor x."""

    @staticmethod
    def forward(ctx, x, *parts):  # (..., in)
        ctx.save_for_backward(*parts)
        ctx.width = x.shape[-1]
        return x @ dense(parts, x, ctx.width).T  # (..., out)

    @staticmethod
    def backward(ctx, grad):  # (..., out)
        parts = ctx.saved_tensors  # unpacked once: checkpointing allows no more
        return grad @ dense(parts, grad, ctx.width), *[None] * len(parts)


class FrozenLinear(nn.Module):
    """A frozen nn.Linear whose weight is sent from host memory for each product, or is in 4 bits.

    `stored` is neither parameter nor buffer: it does not move with the model. As transformers
    loads it, it is a view of the model's file, and takes no memory of its own.
    """

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored, self.bias, self.quantised = linear.weight.detach().cpu(), linear.bias, False

    def quantise(self, device):
        named = zip(("codes", "scales", "steps"), quantise(self.stored.to(device)))
        for name, part in (*named, ("table", TABLE.to(device))):
            self.register_buffer(name, part, persistent=name != "table")
        self.quantised = True

    @property
    def parts(self):
        if not self.quantised:
            return (self.stored,)
        return self.codes, self.scales, self.steps, self.table

    def forward(self, x):  # (..., in) -> (..., out)
        y = Product.apply(x, *self.parts)
        return y if self.bias is None else y + self.bias


def freeze_linears(model):
    """Make every nn.Linear of the decoder a FrozenLinear, not yet quantised; returns them."""
    layers = []
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layers.append(FrozenLinear(child))
                setattr(parent, name, layers[-1])
    return layers


def frozen_layers(model):
    return [module for module in model.modules() if isinstance(module, FrozenLinear)]


@torch.no_grad()
def compare(model, pairs, logps):
    """Print how far the quantised model is from the stored one.

    logps(pair) is the summed log-probability of each of a pair's answers.
    """
    layers, sums = frozen_layers(model), []
    tokens = sum(len(ids) for pair in pairs for ids in pair.answers)
    for quantised in (False, True):
        for layer in layers:
            layer.quantised = quantised
        sums.append(sum(logps(pair).sum().item() for pair in pairs))
    count = sum(layer.stored.numel() for layer in layers)
    size = sum(part.nbytes for layer in layers for part in layer.parts[:3])
    print(f"base: {count:,} weights of {len(layers)} layers in {8 * size / count:.2f} bits each; "
          f"log-probability per token {sums[1] / tokens:.4f}, as stored {sums[0] / tokens:.4f} "
          f"({len(pairs)} validation pairs)")
