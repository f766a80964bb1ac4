"""LoRA: train two small matrices beside each linear layer (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + (alpha / rank) * (x A^T) B^T     W (out, in) frozen; A (rank, in), B (out, rank)

Only A and B have gradients and AdamW moments: under 1 % of the weights. B starts at 0, so the
policy starts as the reference. The reference stays in the same memory: the policy with its
adapters off (`without_lora`).

The result is a plain model (`merged`), or the adapter alone in PEFT's file format
(`save_adapter`), which peft, vLLM and `load_adapter` put on top of the base model.
"""
import contextlib
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from infra.command import BadInput, first_line
from infra.models import load_model
from infra.nf4 import FrozenProduct, dense, parts_of
from infra.rows import read_object


class LoRALinear(nn.Module):
    """A frozen nn.Linear with an adapter beside it: (..., in) -> (..., out).

    A and B have the dtype of `like`. In 16 bits they learn from float32 masters: see rounding.py.
    """

    def __init__(self, base, rank, alpha, like):
        super().__init__()
        self.base, self.rank, self.alpha, self.enabled = base, rank, alpha, True
        A = torch.empty(rank, base.in_features, device=like.device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as nn.Linear does; the same in every dtype
        self.A = nn.Parameter(A.to(like))  # (rank, in)
        self.B = nn.Parameter(like.new_zeros(base.out_features, rank))  # (out, rank)

    def forward(self, x):  # (..., in)
        if not self.enabled:
            return self.base(x)
        low = self.alpha / self.rank * F.linear(x, self.A)  # (..., rank): scale the narrow side
        if x.dtype == torch.float32:
            return self.base(x) + F.linear(low, self.B)  # (..., out)
        return FrozenProduct.apply(x, low, self.base.bias, self.B, *parts_of(self.base))


def add_lora(model, rank, alpha):
    """Freeze a model and put an adapter beside every nn.Linear of its decoder.

    Embeddings and output head get none. BadInput if the decoder keeps weight matrices outside
    nn.Linear (GPT-2's Conv1D, fused experts), because they would stay untrained, and if the rank
    is larger than any of the layers can use.
    """
    model.requires_grad_(False)
    most = max((min(module.weight.shape) for module in model.base_model.modules()
                if isinstance(module, nn.Linear)), default=rank)
    if rank > most:
        raise BadInput(f"--lora_rank: {rank} is more than the rank of this model's largest layer, "
                       f"{most}; give less")
    like = model.get_input_embeddings().weight  # codes are of another dtype
    for name, module in list(model.base_model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            parent = model.base_model.get_submodule(parent)
            setattr(parent, leaf, LoRALinear(module, rank, alpha, like))
        elif not isinstance(module, nn.Embedding) and any(
                weight.dim() > 1 for weight in module.parameters(recurse=False)):
            raise BadInput(f"--lora_rank: LoRA adapts nn.Linear layers, but this model's {name} is "
                           f"a {type(module).__name__}; train it whole, with --lora_rank 0")


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
        if layer and part == "codes":  # of a 4-bit base: merged into what it computes with
            part, tensor = "weight", dense(parts_of(layer.base), layer.A, layer.base.in_features)
        if layer and part not in ("weight", "bias"):
            continue  # merged into the base's weight
        if layer:
            owner = owner.removesuffix(".base")
            name = f"{owner}.{part}"
        if layer and part == "weight":
            A, B = (weights[f"{owner}.{part}"].float() for part in "AB")  # (rank, in), (out, rank)
            tensor = tensor.to(A) + layer.alpha / layer.rank * B @ A  # (out, in)
        yield name, tensor


# --------------------------------------------------------------------------------- PEFT's format

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FIXED = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
         "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}


def tensor_name(layer_name, matrix):
    return f"base_model.model.{layer_name}.lora_{matrix}.weight"


def target_modules(model):
    """The last part of the adapted layers' names."""
    return sorted({name.rpartition(".")[2] for name, _ in lora_layers(model)})


def save_adapter(model, weights, folder, base_name):
    """Write the adapter in PEFT's format; base_name is the base's folder or hub id.

    weights is the full {name: tensor} of the adapted model.
    Format: huggingface.co/docs/peft/developer_guides/checkpoint. `lora_A` is (rank, in), `lora_B`
    (out, rank).
    """
    layers = lora_layers(model)
    tensors = {tensor_name(name, matrix): weights[f"{name}.{matrix}"].cpu()
               for name, _ in layers for matrix in "AB"}
    first = layers[0][1]
    config = FIXED | {"base_model_name_or_path": base_name, "r": first.rank,
                      "lora_alpha": first.alpha, "target_modules": target_modules(model)}
    save_file(tensors, os.path.join(folder, TENSORS), metadata={"format": "pt"})
    with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)


def load_adapter(folder, dtype):
    """The base model that an adapter's folder names, in dtype, with that adapter, not merged.

    Not merged, because a 16-bit weight would lose small changes. BadInput unless save_adapter
    wrote the folder.
    """
    path = os.path.join(folder, CONFIG)
    config = read_object(path, "the folder of an adapter")
    rank, alpha, base = (config.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path"))
    not_ours = "no adapter of train.py --save_adapter; merge it with peft, then give that folder"
    if (not FIXED.items() <= config.items() or len(config) != len(FIXED) + 4
            or not isinstance(base, str) or type(rank) is not int or rank < 1
            or type(alpha) not in (int, float)):
        raise BadInput(f"{path}: {not_ours}")
    model = load_model(base, dtype)
    add_lora(model, rank, alpha)
    path = os.path.join(folder, TENSORS)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: damaged ({first_line(error)}); fetch it again") from error
    weights = {tensor_name(name, matrix): getattr(layer, matrix)
               for name, layer in lora_layers(model) for matrix in "AB"}
    if ({name: tensor.shape for name, tensor in tensors.items()}
            != {name: weight.shape for name, weight in weights.items()}
            or config["target_modules"] != target_modules(model)):
        raise BadInput(f"{path}: {not_ours}")
    for name, weight in weights.items():
        weight.data = tensors[name].to(model.dtype)
    return model
