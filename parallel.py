"""Many processes that train one student, started by torchrun: who computes which pairs, and who keeps which weights.

Data parallel, as DDP does it    every process holds the whole model and computes its share of a step's pairs; then the gradients are added up
Fully sharded, FSDP2 (--fsdp)    every process keeps 1/N of each weight, gradient and moment; a layer's weights are gathered for its turn
                                 and dropped, its gradients are added up and dealt out again (Zhao et al. 2023, arXiv:2304.11277)

A pair's loss is divided by what the whole step holds, on whichever process it is computed, so that sums over processes are what
one process would have computed, however the pairs were dealt out. Without torchrun there is one process, number 0 of 1.
"""
import itertools
import os
import sys
import types

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, init_device_mesh

from data import batch_tokens, split_by_tokens
from rdpo import sequence_logps

# ------------------------------------------------------------------------------------------------------- processes


def start(kind):
    """Joins the processes that torchrun started, if it did. Returns this one's device, of a kind such as "cuda". Only process 0 prints."""
    if not dist.is_torchelastic_launched():
        return torch.device(kind)
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def process():
    """(number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def leave():
    """Leaves the other processes, once all have come here. Not for errors: on GPUs it would wait for processes that wait for this one."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def largest(number):
    """The largest of the whole numbers that the processes call this with."""
    tensor = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def from_process_0(value):
    """What process 0 calls this with, in every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


# ----------------------------------------------------------------------------------------------------------- pairs


def deal(pairs, indices, tokens_per_batch, shared):
    """The micro-batches (lists of indices) of every process: deal(...)[number][round].

    Pairs are dealt out in turn by their length, so that all processes get their share of long ones. All get the same number of rounds,
    for under FSDP a forward pass is a joint one; who has run out of pairs gets empty micro-batches.
    """
    _, count = process()
    by_length = sorted(indices, key=lambda i: (batch_tokens(pairs[i], shared), i))
    shares = [split_by_tokens(pairs, by_length[number::count], tokens_per_batch, shared) for number in range(count)]
    rounds = itertools.zip_longest(*shares, fillvalue=[])
    return [list(share) for share in zip(*rounds)]


def gather(table, counts):
    """The tables (columns, pairs) of all processes side by side, in every process; counts says how many pairs each of them has."""
    number, count = process()
    if count == 1:
        return table
    whole = torch.zeros(len(table), sum(counts), dtype=table.dtype, device=table.device)
    start = sum(counts[:number])
    whole[:, start:start + counts[number]] = table
    dist.all_reduce(whole)  # elsewhere the others have zeros
    return whole


# --------------------------------------------------------------------------------------------------------- weights


def joint_gradients(model):
    """Data parallel: one tensor of which every weight.grad is a part, so that one sum over the processes adds up all of them at once.

    None where there is nothing to add up: one process, or FSDP, which adds gradients up in its backward pass. A weight that no pair of a
    step reaches, such as that of an idle expert, has a gradient of 0 here, where it would have none, and AdamW no step, with one process.
    """
    if not dist.is_initialized() or isinstance(model, FSDPModule):
        return None
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    joint = torch.zeros(sum(weight.numel() for weight in trained), device=model.device)
    for weight, part in zip(trained, joint.split([weight.numel() for weight in trained])):
        weight.grad = part.view_as(weight)
    return joint


def shard(model, layers, device, dtype):
    """FSDP2: a model on the CPU becomes one whose weights lie in shards on the processes' devices.

    Each of the layers is a group, gathered for its own turn; what stands outside of them, embeddings and output head, is one more.
    Trained weights are kept in float32 and gathered in dtype, the compute dtype. Converted layer by layer, so that the float32 copy never
    exists whole.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*layers, model):
        for weight in module.parameters():
            if weight.requires_grad and not isinstance(weight, DTensor):
                weight.data = weight.data.float()
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)  # so that in between only shards exist
    # FSDP gathers weights when forward() is called; sequence_logps calls parts of the model, so it must count as another forward().
    model.sequence_logps = types.MethodType(sequence_logps, model)
    register_fsdp_forward_method(model, "sequence_logps")


def policy_logps(model, batch):
    """sequence_logps(model, batch), sharded or not."""
    return model.sequence_logps(batch) if isinstance(model, FSDPModule) else sequence_logps(model, batch)


def whole(tensor):
    """A tensor as one process would have it, whether it is in shards or not."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_weights(model):
    """{name: tensor} of the trained weights, whole and on the CPU: in process 0, the others get {}."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True))


def save_shards(folder, model, optimizer):
    """Every process writes its shards of the trained weights and moments into a folder."""
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def load_shards(folder, model, optimizer):
    """Loads what save_shards wrote, with as many processes or with another number of them."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights, moments = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
