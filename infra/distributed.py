"""Devices and ranks: one process, or several that torchrun started to train one student.

    DDP             every rank holds the whole model, computes its share of a step's pairs, and
                    the gradients are summed
    FSDP2 (--fsdp)  every rank keeps 1/N of each weight, gradient and moment; a layer's weights
                    are gathered for its turn (Zhao et al. 2023, arXiv:2304.11277)

A loss is divided by the totals of the whole step, so sums over ranks equal what one process
computes. Without torchrun there is one rank, 0 of 1, and every function here does nothing.
"""
import math
import os
import signal
import sys
import time
import types

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, init_device_mesh

from infra.command import BadInput


def best_device():
    """Where to compute: "cuda", "mps" (Apple's GPU) or "cpu", the first that PyTorch finds."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def setup(args):
    """Resolve what args leaves to the machine, and join torchrun's ranks. Returns (device, dtype).

    Seeds torch. Only rank 0 prints. BadInput if the machine lacks what the flags ask for.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if args.device == "auto":
        args.device = best_device()
    if args.dtype == "auto":
        has_bfloat16 = has_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = ("float32" if args.device != "cuda"
                      else "bfloat16" if has_bfloat16 else "float16")
    if args.tokens_per_batch is None and args.device != "cuda":  # see models.tokens_that_fit
        args.tokens_per_batch = 1024 if args.device == "cpu" else 2048
    if not {"cuda": has_cuda, "mps": has_mps, "cpu": True}[args.device]:
        raise BadInput(f"--device {args.device}: PyTorch finds none on this machine; take --device "
                       "cpu")
    if args.dtype == "float16" and args.device != "cuda":
        raise BadInput(f"--dtype float16 needs --device cuda, not {args.device}; take float32 or "
                       "bfloat16")
    if args.fsdp and not dist.is_torchelastic_launched():
        raise BadInput("--fsdp needs torchrun, such as torchrun --nproc_per_node=8 train.py --fsdp")
    if args.fsdp and args.dtype == "float16":
        raise BadInput("--fsdp does not support float16; take float32 or bfloat16")
    # Until the loop catches SIGTERM itself, leave through every `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    if dist.is_torchelastic_launched():
        if args.device == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device, getattr(torch, args.dtype)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def cleanup():
    """Leave the process group after all ranks arrive. Not after an error: NCCL would hang."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # gloo's threads may still free tensors, with Python's lock. One that waits for that lock
        # while Python ends would abort the process (github.com/pytorch/pytorch/pull/179291).
        time.sleep(0.5)


def broadcast(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Reduce a tensor over all ranks, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def all_gather(values):
    """The ranks' lists, joined, on every rank."""
    lists = [values] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(lists, values)
    return sum(lists, [])


def maximum(number):
    """The largest of the ranks' integers."""
    return all_reduce(torch.tensor(number), dist.ReduceOp.MAX).item()


def send(tensor, device):
    """Copy a CPU tensor to the device; to a GPU asynchronously, from pinned memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# -------------------------------------------------------------------------------------- gradients


def flat_gradients(masters):
    """DDP: one buffer that every weight.grad is a view of, so that one all_reduce sums them all.

    None for one process, and under FSDP, which sums gradients in its backward pass. A weight
    that no pair of a step uses (an idle expert) gets a gradient of 0 here, not none.
    """
    weights = list(masters.parameters())
    if not dist.is_initialized() or is_sharded(masters):
        return None
    sizes = [weight.numel() for weight in weights]
    buffer = torch.zeros(sum(sizes), device=weights[0].device)
    for weight, view in zip(weights, buffer.split(sizes)):
        weight.grad = view.view_as(weight)
    return buffer


def sum_gradients(buffer):
    """Sum flat_gradients' buffer over the ranks."""
    if buffer is not None:
        dist.all_reduce(buffer)


def is_sharded(model):
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def local_shard(weight):
    """(this rank's part of a weight, the index of its first element in the whole weight)."""
    if not isinstance(weight, DTensor):
        return weight, 0
    rows, row_size = len(weight), weight.numel() // len(weight)  # FSDP2 shards dimension 0
    return weight.to_local(), min(rank() * math.ceil(rows / world_size()), rows) * row_size


def gradient_ranks(model):
    """FSDP averages gradients over ranks where they must be summed: multiply the loss by this."""
    return world_size() if is_sharded(model) else 1


def full_tensor(tensor):
    """A tensor as one process would have it, sharded or not."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------- FSDP2


def shard(model, layers, device, dtype, forward):
    """Shard a CPU model over the ranks' devices: one group per layer, one for the rest.

    Trained weights are kept in float32 and gathered in dtype, the compute dtype. They are
    converted layer by layer, so that a whole float32 copy never exists. FSDP gathers weights
    around forward methods only; forward(model, batch) becomes one, as model.sequence_logps.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*layers, model):
        for weight in module.parameters():
            if weight.requires_grad and not isinstance(weight, DTensor):
                weight.data = weight.data.float()
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    model.sequence_logps = types.MethodType(forward, model)
    register_fsdp_forward_method(model, "sequence_logps")


def full_state_dict(model):
    """{name: tensor} of all weights and buffers; under FSDP on rank 0's CPU, {} elsewhere."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def save_shards(folder, masters, optimizer):
    """Every rank writes its shards of the master weights and moments."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    weights, moments = get_state_dict(masters, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def load_shards(folder, masters, optimizer):
    """Load what save_shards wrote, on the same number of ranks or another."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    weights, moments = get_state_dict(masters, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(masters, optimizer, model_state_dict=weights, optim_state_dict=moments)
