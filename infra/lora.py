"""LoRA: train two small matrices beside each linear layer (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + (alpha / rank) * (x A^T) B^T     W (out, in) frozen; A (rank, in), B (out, rank)

Only A and B have gradients and AdamW moments: under 1 % of the weights. B starts at 0, so the
policy starts as the reference. The reference stays in the same memory: the policy with its
adapters off (`without_lora`).

The result is a plain model (`merge`), or the adapter alone in PEFT's file format
(`save_adapter`), which peft and vLLM load on top of the base model.
"""
import contextlib
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from infra.command import refuse


class LoRALinear(nn.Module):
    """A frozen nn.Linear with an adapter beside it: (..., in) -> (..., out).

    A and B are float32 whatever the base's dtype is. Run a 16-bit base under autocast.
    """

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.rank, self.alpha, self.enabled = base, rank, alpha, True
        options = {"dtype": torch.float32, "device": base.weight.device}
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **options))  # (rank, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **options))  # (out, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as nn.Linear does

    def forward(self, x):  # (..., in)
        if not self.enabled:
            return self.base(x)
        low = self.alpha / self.rank * F.linear(x, self.A)  # (..., rank): scale the narrow side
        return self.base(x) + F.linear(low, self.B)  # (..., out)


def add_lora(model, rank, alpha):
    """Freeze a model and put an adapter beside every nn.Linear of its decoder.

    Embeddings and output head get none. BadInput if the decoder keeps weight matrices outside
    nn.Linear (GPT-2's Conv1D, fused experts), because they would stay untrained, and if the rank
    is larger than any of the layers can use.
    """
    model.requires_grad_(False)
    most = max((min(module.weight.shape) for module in model.base_model.modules()
                if isinstance(module, nn.Linear)), default=rank)
    refuse("--lora_rank", (rank > most, f"{rank} is more than the rank of this model's largest "
                                        f"layer, {most}; give less"))
    for name, module in list(model.base_model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            parent = model.base_model.get_submodule(parent)
            setattr(parent, leaf, LoRALinear(module, rank, alpha))
        elif not isinstance(module, nn.Embedding):
            has_matrix = any(weight.dim() > 1 for weight in module.parameters(recurse=False))
            refuse("--lora_rank", (
                has_matrix, f"LoRA adapts nn.Linear layers, but this model's {name} is a "
                            f"{type(module).__name__}; train it whole, with --lora_rank 0"))


def lora_layers(model):
    """[(name, LoRALinear)] of a model."""
    return [(name, module) for name, module in model.named_modules()
            if isinstance(module, LoRALinear)]


@contextlib.contextmanager
def without_lora(model):
    """Turn the adapters off: the model computes the same bits as before add_lora."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merged(model, weights):
    """Yield the plain model's (name, tensor): W + alpha / rank * B A in float32, layer by layer.

    weights is the full {name: tensor} of the adapted model.
    """
    layers = dict(lora_layers(model))
    for name, tensor in weights.items():
        owner, _, part = name.rpartition(".")
        layer = layers.get(owner.removesuffix(".base"))
        if layer and part in ("A", "B"):
            continue  # merged into the base's weight
        if layer:
            owner = owner.removesuffix(".base")
            name = f"{owner}.{part}"
        if layer and part == "weight":
            A, B = weights[f"{owner}.A"], weights[f"{owner}.B"]  # (rank, in), (out, rank)
            tensor = tensor.float() + layer.alpha / layer.rank * B @ A  # (out, in)
        yield name, tensor


def save_adapter(model, weights, folder, base_name):
    """Write the adapter in PEFT's format; base_name is the base's folder or hub id.

    weights is the full {name: tensor} of the adapted model.
    Format: huggingface.co/docs/peft/developer_guides/checkpoint. `lora_A` is (rank, in), `lora_B`
    (out, rank); target_modules lists the last part of the layers' names.
    """
    layers, tensors = lora_layers(model), {}
    for name, _ in layers:
        for matrix in "AB":
            key = f"base_model.model.{name}.lora_{matrix}.weight"
            tensors[key] = weights[f"{name}.{matrix}"].cpu()
    first = layers[0][1]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
        "inference_mode": True, "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in layers})}
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"),
              metadata={"format": "pt"})
    with open(os.path.join(folder, "adapter_config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)
