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
ABOVE, BELOW = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1])
                for n in (9, 8))
LEVELS = torch.cat([-BELOW, torch.zeros(1), ABOVE.flip(0)]).div(ABOVE[0]).float()  # (16,)
TABLE = torch.cartesian_prod(LEVELS, LEVELS)  # (256, 2): the levels of each byte's two codes


def quantise(weight):
    """A matrix (out, in) as codes (out, in / 2) uint8, two in a byte; scales (out, in / 64) uint8;
    steps (out, 1) float32. Rows are padded with 0 to whole blocks."""
    blocks = F.pad(weight.float(), (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(2)  # (out, in / 64)
    steps = (largest.amax(1, keepdim=True) / 255).clamp(min=1e-30)  # not 0, for a row of zeros
    scales = (largest / steps).round().clamp(min=1)  # (out, in / 64)
    middles = (LEVELS[1:] + LEVELS[:-1]).to(weight.device) / 2  # (15,)
    codes = torch.bucketize(blocks / (scales * steps)[..., None], middles, out_int32=True)
    codes = codes.flatten(1).to(torch.uint8)  # (out, in)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales.to(torch.uint8), steps


def parts_of(linear):
    """The tensors that `dense` makes a layer's matrix from."""
    if not isinstance(linear, FrozenLinear) or not linear.quantised:
        return (linear.weight,)
    return linear.codes, linear.scales, linear.steps, linear.table


def dense(parts, like, width):
    """The matrix (out, width), with the dtype and on the device of `like`."""
    if len(parts) == 1:
        return parts[0].to(like)
    codes, scales, steps, table = parts
    weights = table.to(like).index_select(0, codes.flatten().int())  # (out * in / 2, 2)
    scales = (scales * steps).to(like)[..., None]  # (out, in / 64, 1)
    return weights.view(*scales.shape[:2], BLOCK).mul_(scales).flatten(1)[:, :width]


class FrozenProduct(torch.autograd.Function):
    """x W^T + bias, and with an adapter + low B^T as one product, which in 16 bits rounds once.

    Two products are rounded twice: x W^T already lies on the 16-bit grid, and what the adapter
    adds is lost wherever it is less than half a step of that grid. The gradients of x have no such
    fault: there only the adapter's own share of them is small.
    """

    @staticmethod
    def forward(ctx, x, low, bias, B, *parts):  # (..., in), (..., rank), (out,), (out, rank)
        ctx.save_for_backward(low, B, *parts)  # not the matrix that they make
        ctx.width = x.shape[-1]
        weight = dense(parts, x, ctx.width)  # (out, in)
        if low is not None:
            pad = (0, -low.shape[-1] % 8)  # GPUs want rows of 16 bytes
            x = torch.cat([x, F.pad(low, pad)], -1)  # (..., in + rank)
            weight = torch.cat([weight, F.pad(B, pad)], 1)  # (out, in + rank)
        return F.linear(x, weight, bias)  # (..., out)

    @staticmethod
    def backward(ctx, grad):  # (..., out)
        low, B, *parts = ctx.saved_tensors  # read once: checkpointing allows no more
        grad_x, grad_low, grad_B = grad @ dense(parts, grad, ctx.width), None, None  # (..., in)
        if low is not None:
            grad_low = grad @ B  # (..., rank)
            grad_B = grad.flatten(0, -2).T @ low.flatten(0, -2)  # (out, rank)
        return grad_x, grad_low, None, grad_B, *[None] * len(parts)


class FrozenLinear(nn.Linear):
    """A layer whose weight is in 4 bits, or without `device` sent from the host for each product.

    `weight` is no parameter: it does not move with the model. As transformers loads it, it is a
    view of the model's file, without memory of its own.
    """

    def __init__(self, linear, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.detach().cpu(), linear.bias
        self.quantised = device is not None
        if self.quantised:
            parts = *quantise(self.weight.to(device)), TABLE.to(device)
            self.codes, self.scales, self.steps, self.table = map(nn.Buffer, parts)

    def forward(self, x):  # (..., in) -> (..., out)
        return FrozenProduct.apply(x, None, self.bias, None, *parts_of(self))


def freeze_linears(model, device=None):
    """Make every nn.Linear of the decoder a FrozenLinear. Embeddings and output head stay."""
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, FrozenLinear(child, device))


def frozen_layers(model):
    return [module for module in model.modules() if isinstance(module, FrozenLinear)]


@torch.no_grad()
def compare(model, pairs, logps):
    """Print how far the quantised model is from the stored one; logps(pair) are of its answers."""
    tokens, means = sum(len(ids) for pair in pairs for ids in pair.answers), []
    for quantised in (False, True):
        for layer in frozen_layers(model):
            layer.quantised = quantised
        means.append(sum(logps(pair).sum().item() for pair in pairs) / tokens)
    count = sum(layer.weight.numel() for layer in frozen_layers(model))
    print(f"base: {count:,} weights in 4 bits; mean log-probability of a token {means[1]:.4f}, as "
          f"stored {means[0]:.4f} ({len(pairs)} validation pairs)")
