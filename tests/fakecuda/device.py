"""A pretended CUDA device: tensors that say cuda:0, hold CPU values, and refuse what CUDA refuses.

It shows, on a machine without a GPU, that a program's whole CUDA path runs, and where it would

    fail        an operation on tensors of both devices, an attention mask of another dtype
    wait        the CPU for the GPU: .item(), .tolist(), .cpu(), nonzero, ...
    copy        from pageable memory to the GPU, for which the CPU waits too; an attention mask

It shows nothing about speed, memory or what a GPU computes: every kernel is the CPU's. What it
knows about CUDA is in the tables of this file.

    python device.py GUARD REPORT '[["train.py", "--data", ...], ["eval.py", ...]]' [PATCH]

runs commands one after the other. GUARD is guard.cpp, compiled; REPORT gets what was seen; PATCH
is Python to run before. A process that has loaded this module pretends until it ends, so the tests
start one for each run.
"""
import collections
import ctypes
import importlib
import importlib.util
import json
import os
import sys

TORCH = os.path.dirname(importlib.util.find_spec("torch").origin)
for library in ("libgomp.so.1", "libc10.so", "libtorch_cpu.so"):  # what the guard needs
    ctypes.CDLL(os.path.join(TORCH, "lib", library), ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[1])

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401, which subclasses torch.Generator: before pretend()
import torch.nn.functional as F  # noqa: E402
from torch.utils._foreach_utils import _foreach_supported_types  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")

# ------------------------------------------------------------------------------------ the report

faults = []  # what CUDA would refuse, or copy
waits = collections.Counter()  # (stage, what, where): how often
counts = collections.Counter()  # of optimizer steps, and of tokens that were generated in turn
stage = "elsewhere"


def where():
    """Innermost function of the project and what it called, such as "rdpo.py:9 f > clip.py:7 g"."""
    frame, called = sys._getframe(2), ""
    while frame:
        path, function = frame.f_code.co_filename, f"{frame.f_lineno} {frame.f_code.co_name}"
        if path.startswith(ROOT) and path != __file__:
            return f"{os.path.relpath(path, ROOT)}:{function}{called}"
        if "transformers" in path:
            called = called or f" > {os.path.basename(path)}:{function}"
        frame = frame.f_back
    return "the backward pass" + called  # its thread has only the frames of Python functions


def wait(what):
    waits[stage, what, where()] += 1


def fault(message):
    """Also of a fault that the project catches, as when it tries a layout."""
    faults.append(f"{message}, in {where()}")
    raise RuntimeError(faults[-1])


# ------------------------------------------------------------------------------------ the tensors


class OnGPU(torch.Tensor):
    """A tensor on the pretended device. `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=GPU)

    def __init__(self, held):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.held = other.held

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):  # safetensors looks for shared memory
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol):  # torch.save writes the values
        return self.held.detach().__reduce_ex__(protocol)

    # nn.Module.to keeps the identity of a parameter (two may be tied) if its class has these.
    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGPU(inner["held"])


class Pretend(TorchDispatchMode):
    """Sees the operations that have no tensor on the GPU yet: factories and copies to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


# The CPU waits for their result, whose value or shape it must know.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
           "unique_consecutive", "bincount", "is_nonzero"}


def dispatch(func, args, kwargs):
    """One operation: what CUDA would say to it, then the CPU's kernel on the held values."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnGPU)]
    target = kwargs.get("device")
    to_gpu = bool(on_gpu) if target is None else torch.device(target).type == "cuda"
    if name == "is_pinned":
        return getattr(args[0], "pinned", False)
    if name == "_pin_memory":
        out = args[0].clone()
        out.pinned = True
        return out
    if not on_gpu and not to_gpu:
        return func(*args, **kwargs)

    if name in ("_to_copy", "copy_"):
        copies = name == "copy_"  # into args[0], whatever there is
        source, to_gpu = args[int(copies)], isinstance(args[0], OnGPU) if copies else to_gpu
        if isinstance(source, OnGPU) and not to_gpu:
            wait("a copy to the CPU")
        elif to_gpu and not isinstance(source, OnGPU) and source.numel():
            if not getattr(source, "pinned", False):
                wait("a copy from pageable memory")
            elif not kwargs.get("non_blocking") and args[2:] != (True,):
                wait("a copy that blocks")
    elif on_gpu and on_cpu:
        check_devices(func, name, args, on_cpu)
    is_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices(name, args))
    # CUDA sets one value everywhere without knowing where.
    fills = name != "index" and is_mask and args[2].numel() == 1
    if name in WAITING or (is_mask and not fills) or str(func) == "aten.repeat_interleave.Tensor":
        wait(name)
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in Generator.on_gpu) != to_gpu:
        fault(f"a generator of another device than the tensor's in {name}")

    if target is not None:
        kwargs = kwargs | {"device": CPU}
    kwargs.pop("pin_memory", None)
    args, kwargs = tree_map(held, (args, kwargs))
    mine = {id(held(tensor)): tensor for tensor in tensors}  # what works in place returns itself

    def wrap(value):
        if id(value) in mine:
            return mine[id(value)]
        return OnGPU(value) if to_gpu and isinstance(value, torch.Tensor) else value

    return tree_map(wrap, func(*args, **kwargs))


def held(value):
    return value.held if isinstance(value, OnGPU) else value


def indices(name, args):
    """The index tensors of x[...] and x[...] = y."""
    is_index = name in ("index", "index_put", "index_put_", "_index_put_impl_")
    return [index for index in args[1] if index is not None] if is_index else []


def check_devices(func, name, args, on_cpu):
    """RuntimeError as CUDA's for tensors of both devices, but for what CUDA takes."""
    if indices(name, args) and isinstance(args[0], OnGPU):
        own = {id(index) for index in indices(name, args)}
        if any(id(tensor) in own for tensor in on_cpu):
            wait("a copy from pageable memory")  # of the indices
        on_cpu = [tensor for tensor in on_cpu if id(tensor) not in own and tensor.dim()]
    elif torch.Tag.pointwise in func.tags:
        on_cpu = [tensor for tensor in on_cpu if tensor.dim()]  # a number is a kernel's argument
    if on_cpu:
        fault("Expected all tensors to be on the same device, but found cuda:0 and cpu: "
              f"{name} with a CPU tensor {tuple(on_cpu[0].shape)}")


# ----------------------------------------------------------------------------------- the patches


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """F.scaled_dot_product_attention by its definition, once CUDA's kernels would take the mask."""
    if attn_mask is not None and isinstance(q, OnGPU):
        if attn_mask.dtype not in (torch.bool, q.dtype):
            fault(f"an attention mask of {attn_mask.dtype} where q has {q.dtype}")
        *strides, last = attn_mask.stride()
        if stage != "generation" and (last != 1 or any(stride % 8 for stride in strides)):
            fault(f"an attention mask whose strides {attn_mask.stride()} make CUDA copy it")
    return torch.ops.aten._scaled_dot_product_attention_math(
        q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]


class Generator(torch.Generator):
    """torch.Generator("cuda"), with the CPU's numbers."""
    on_gpu = set()  # addresses: operations see another Python object for the same generator

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        if torch.device(device).type == "cuda":
            self.on_gpu.add(self._cdata)


def pretend():
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies afterwards
    _foreach_supported_types.append(OnGPU)  # clip_grad_norm_ and optimizers: as for CUDA tensors
    for name, value in (("_lazy_init", None), ("is_available", True), ("device_count", 1),
                        ("current_device", 0), ("is_bf16_supported", True),
                        ("max_memory_allocated", 2**30), ("reset_peak_memory_stats", None),
                        ("mem_get_info", (2**36, 2**36))):
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    F.scaled_dot_product_attention = attention
    torch.Generator = Generator


def staged(owner, name, during, after, when=lambda args: True):
    """Let the stage be `during` while a function runs, and `after` when it has returned.

    Only in calls whose positional arguments are such that when(args).
    """
    function = getattr(owner, name)

    def call(*args, **kwargs):
        global stage
        if not when(args):
            return function(*args, **kwargs)
        before, stage = stage, during or stage
        try:
            out = function(*args, **kwargs)
        finally:
            stage = after or before
        if during == "generation":
            counts["tokens"] += out.shape[1] - kwargs["input_ids"].shape[1]
        counts["steps"] += during == "step"
        return out

    setattr(owner, name, call)


def main():
    report, commands, patch = (sys.argv + [""])[2:5]
    pretend()
    sys.path.insert(0, ROOT)
    import train
    from infra.command import run
    from infra.rounding import Masters
    from transformers import GenerationMixin
    train.have_matplotlib = lambda: False  # nothing to see, and slow
    staged(train, "forward_all", "step", "step", lambda args: len(args) == 4)  # with backward
    staged(Masters, "round", None, "elsewhere")
    staged(GenerationMixin, "generate", "generation", None)
    exec(patch, {})
    try:
        with Pretend():
            for script, *words in json.loads(commands):
                module = importlib.import_module(script.removesuffix(".py"))
                try:
                    run(lambda: module.main(words))
                except SystemExit as end:
                    if end.code:
                        raise
    finally:
        with open(report, "w", encoding="utf-8") as file:
            json.dump(counts | {"faults": faults, "waits": [
                {"stage": stage, "what": what, "where": where, "count": count}
                for (stage, what, where), count in sorted(waits.items())]}, file)


if __name__ == "__main__":
    main()
