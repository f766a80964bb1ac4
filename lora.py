"""LoRA: fine-tune a large student by training two small matrices beside each of its linear layers (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + (alpha / rank) * (x A^T) B^T        W (out, in) frozen,  A (rank, in) and B (out, rank) trained

Gradients and AdamW's moments exist for A and B only: under a hundredth of the weights. B starts at 0, so at first the policy IS
the reference; and the reference is always at hand in the same memory: the policy with its adapters off (`without_lora`).

What comes out is either plain weights (`merge`: W + alpha / rank * B A) or the adapter alone, in the file format of the PEFT
library (`save_adapter`), which peft and vLLM load on top of the base model.
"""
import contextlib
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from data import BadInput


class LoRALinear(nn.Module):
    """A frozen nn.Linear with an adapter beside it. Maps (..., in) to (..., out).

    A and B are float32 whatever the dtype of the base, as master weights are: where the base is 16-bit, run it under autocast.
    """

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base, self.rank, self.alpha, self.dropout, self.enabled = base, rank, alpha, dropout, True
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))  # (rank, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))  # (out, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as nn.Linear starts; B = 0 makes the product 0

    def forward(self, x):  # (..., in)
        if not self.enabled:
            return self.base(x)
        # The model is in eval mode throughout (DPO compares likelihoods without noise), so dropout cannot go by that: it acts in the passes
        # that learn, where gradients are recorded, and never in an evaluation, in the reference or in generation.
        dropped = F.dropout(x, self.dropout, training=torch.is_grad_enabled())
        return self.base(x) + self.alpha / self.rank * F.linear(F.linear(dropped, self.A), self.B)  # (..., out)


def add_lora(model, rank, alpha, dropout=0.0):
    """Freezes a model and puts an adapter beside every linear layer of its decoder; not the embeddings, not the output head.

    rank >= 1; alpha scales the adapter by alpha / rank; dropout is the share of an adapter's inputs that a learning pass zeroes.
    BadInput for a decoder that keeps weight matrices elsewhere than in nn.Linear (GPT-2's Conv1D, fused experts): they would be left out.
    """
    model.requires_grad_(False)
    for name, module in list(model.base_model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), leaf, LoRALinear(module, rank, alpha, dropout))
        elif not isinstance(module, nn.Embedding) and any(weight.dim() > 1 for weight in module.parameters(recurse=False)):
            raise BadInput(f"LoRA adapts nn.Linear layers, but this model's {name} is a {type(module).__name__}; train it whole, with --lora_rank 0")


def lora_layers(model):
    """[(name, LoRALinear)] of a model, none where there are no adapters."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


@contextlib.contextmanager
def without_lora(model):
    """Inside it the model computes what it did before add_lora, to the bit: the reference, without a second copy of the weights."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merge(model):
    """Turns the adapted model into a plain one, in place: every W becomes W + alpha / rank * B A, added in float32, kept in W's dtype."""
    for name, layer in lora_layers(model):
        weight = layer.base.weight  # (out, in)
        weight.copy_(weight.float() + layer.alpha / layer.rank * layer.B.float() @ layer.A.float())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)


def save_adapter(model, folder, base_name):
    """Writes adapter_model.safetensors and adapter_config.json of PEFT's format to a folder; base_name is the folder or hub id of the base.

    The format: huggingface.co/docs/peft/developer_guides/checkpoint. Keys are `base_model.model.<layer>.lora_A.weight` (rank, in) and
    `lora_B` (out, rank); target_modules holds the last part of the layers' names.
    """
    layers = lora_layers(model)
    weights = {}
    for name, layer in layers:
        weights[f"base_model.model.{name}.lora_A.weight"] = layer.A.detach().cpu()
        weights[f"base_model.model.{name}.lora_B.weight"] = layer.B.detach().cpu()
    _, one = layers[0]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True, "r": one.rank,
              "lora_alpha": one.alpha, "lora_dropout": one.dropout, "bias": "none", "fan_in_fan_out": False,
              "target_modules": sorted({name.rpartition(".")[2] for name, _ in layers})}
    save_file(weights, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "adapter_config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)
