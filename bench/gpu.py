"""What only a GPU can show, in one command: correctness, speed, memory, and TRL beside it.

    python bench/gpu.py --out_dir gpu                   all checks, about 7 minutes on an H100
    python bench/gpu.py --only masks,rounding           checks or sections whose names begin so
    python bench/gpu.py --device cpu --tiny             the script itself, on a CPU

Each check prints a line and appends it to results.jsonl in --out_dir; GPU.md there is the table.
One that fails prints its traceback, is counted, and the next one starts: the exit code is the
number of failed ones. Checks that would not end within --seconds are skipped. "control caught"
says that the same check refused a computation that was made wrong on purpose.

correctness  the device against float64 on the CPU, train.py against its float32 run on the CPU
throughput   optimizer steps of random models with ragged rows. Tokens are those of the pairs,
             padding not counted. MFU counts the FLOPs that the layout needs, once (see
             step_profile.py), against the dense bfloat16 peak of an H100
memory       peaks of rows of equal length beside memory.py's predictions, and a card of 24 GB,
             imitated by a limit on what PyTorch may allocate
trl          DPO on the same rows, if --trl_python has TRL: pairs per second and peak memory
attention    one layer's attention alone, by kernel
"""
import argparse
import collections
import contextlib
import copy
import functools
import gc
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import NamedTuple
from unittest import mock

START = time.monotonic()
# For the runs that must repeat to the bit. It is the size that cuBLAS takes on an H100 anyway.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import rdpo  # noqa: E402
import train  # noqa: E402
from bench.memory import SHAPES  # noqa: E402
from bench.step_profile import PEAK, count_flops  # noqa: E402
from data import CHOSEN, Pair, batch_tokens, collate, micro_batches  # noqa: E402
from infra import checkpoint, models, rounding  # noqa: E402
from infra.command import BadInput, first_line  # noqa: E402
from infra.lora import add_lora  # noqa: E402
from infra.rounding import Masters  # noqa: E402

SHAPES = SHAPES | {"tiny": (64, 128, 2, 4, 2, 1024, True)}
TOY_ROWS = os.path.join(ROOT, "toy", "scored.jsonl")
TRL_SCRIPT = os.path.join(ROOT, "bench", "trl_dpo.py")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GB = 1e9

# ------------------------------------------------------------------------------ checks and results


class Skip(Exception):
    """This machine cannot run the check. The text says why."""


class Check(NamedTuple):
    section: str
    name: str
    seconds: float  # that it takes on an H100, roughly
    function: Callable  # (bench) -> {figure: value}


class Bench:
    """Runs checks one after the other and keeps their results."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.cuda, self.tiny = args.device == "cuda", args.tiny
        self.results, self.wrong, self.failed = [], [], 0
        self.measured = {}  # name of a throughput case -> its figures
        self.pool = ThreadPoolExecutor(4)  # for what needs the CPU only
        self.head = ""
        os.makedirs(args.out_dir, exist_ok=True)
        self.work = tempfile.mkdtemp(prefix="gpu-bench-")

    def path(self, *names):
        return os.path.join(self.work, *names)

    def left(self):
        return self.args.seconds - (time.monotonic() - START)

    def expect(self, holds, text):
        """Count the check as failed unless this holds. The check goes on, for its figures."""
        if not holds:
            self.wrong.append(text)

    def control(self, is_caught):
        """The figure of a control: a wrong computation, which the check's bound must refuse."""
        self.expect(is_caught, "control not caught")
        return {"control": "caught" if is_caught else "NOT CAUGHT"}

    def run(self, check):
        began, self.wrong, figures = time.monotonic(), [], {}
        if check.seconds > self.left():
            result = f"skipped: takes about {check.seconds:.0f} s, {self.left():.0f} s are left"
        else:
            try:
                figures = check.function(self) or {}
                result = "failed: " + "; ".join(self.wrong) if self.wrong else "passed"
            except Skip as reason:
                result = f"skipped: {reason}"
            except torch.OutOfMemoryError as error:
                # Of a speed it is a measurement: this case does not fit this card.
                result = "out of memory" if check.section != "correctness" else "failed: no memory"
                print(first_line(error))
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                result = f"failed: {type(error).__name__}: {first_line(error)}"
        self.failed += result.startswith("failed")
        self.record(check, result, time.monotonic() - began, figures)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        self.free()

    def free(self):
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def record(self, check, result, seconds, figures):
        line = {"section": check.section, "check": check.name, "seconds": round(seconds, 1),
                "result": result, **figures}
        self.results.append(line)
        with open(os.path.join(self.args.out_dir, "results.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        with open(os.path.join(self.args.out_dir, "GPU.md"), "w", encoding="utf-8") as file:
            file.write(markdown(self.head, self.results))
        shown = ", ".join(f"{name} {value}" for name, value in figures.items())
        print(f"[{time.monotonic() - START:5.0f} s] {check.section}, {check.name}: {result}, "
              f"{seconds:.1f} s; {shown}", flush=True)


def markdown(head, results):
    """The results as Markdown, a table for each section."""
    parts = [head]
    for section in dict.fromkeys(line["section"] for line in results):
        lines = [line for line in results if line["section"] == section]
        parts.append(f"## {section.capitalize()}\n")
        if section == "correctness":
            rows = [[line["check"], f"{line['seconds']:.1f}", line["result"],
                     ", ".join(f"{name} {value}" for name, value in line.items()
                               if name not in ("section", "check", "seconds", "result"))]
                    for line in lines]
            parts.append(table(["check", "seconds", "result", "figures"], rows))
            continue
        names = dict.fromkeys(name for line in lines for name in line
                              if name not in ("section", "kernels"))
        parts.append(table(list(names), [[line.get(name, "") for name in names] for line in lines]))
        kernels = [f"- {line['check']}: {line['kernels']}\n" for line in lines
                   if "kernels" in line]
        if kernels:
            parts.append("Largest kernels, share of the time in kernels:\n\n" + "".join(kernels))
    return "\n".join(parts)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ")
                                     for cell in line) + " |\n" for line in lines)


def machine(bench):
    """(a line on the machine, the Markdown heading)."""
    versions = (f"torch {torch.__version__}, transformers {transformers.__version__}, "
                f"CUDA {torch.version.cuda}")
    if not bench.cuda:
        line = f"CPU, {os.cpu_count()} cores, {versions}"
    else:
        card, driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], check=True,
            capture_output=True, text=True).stdout.split("\n")[0].split(", ")
        free, total = torch.cuda.mem_get_info()
        kernels = [name for name in ("flash", "mem_efficient", "cudnn", "math")
                   if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
        line = (f"{card}, driver {driver}, {versions}, cuDNN {torch.backends.cudnn.version()}, "
                f"{free / GB:.1f} of {total / GB:.1f} GB free, attention kernels "
                f"{' '.join(kernels)}, {os.cpu_count()} CPU cores")
    return line, f"# On a GPU\n\n{line}. {date.today()}. Printed by bench/gpu.py.\n"


# -------------------------------------------------------------------------- models, rows and steps


def build(shape, dtype, device, seed=0):
    """A random model of a shape, made on the device in its dtype, in eval mode."""
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = SHAPES[shape]
    return random_model(LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab,
        tie_word_embeddings=tied, max_position_embeddings=4096), dtype, device, 0.02, seed)


@torch.no_grad()
def random_model(config, dtype, device, std, seed=0):
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=std)
        else:
            weight.fill_(1.0)
    return model.eval()


SMALL = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=1024, max_position_embeddings=4096)


def small_model(name, tiny=False):
    """A model on the CPU in float32, its weights on bfloat16's grid: exact in all three dtypes."""
    if name == "toy student":
        return models.load_model(models.TOY_STUDENT)
    sizes = SMALL | (dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2) if tiny
                     else {})
    config = {"llama": LlamaConfig, "mistral": functools.partial(MistralConfig, sliding_window=48)}
    model = random_model(config[name](**sizes), torch.float32, "cpu", 0.1)
    models.cast_weights(model, torch.bfloat16)
    models.cast_weights(model, torch.float32)
    return model


def cast(model, dtype, device):
    """A copy of a model in dtype on the device."""
    model = copy.deepcopy(model)
    models.cast_weights(model, dtype)
    return model.to(device)


def ragged_pairs(count, vocab, median=300, lowest=32, highest=1024, seed=0):
    """Pairs of random ids: log-normal numbers of tokens, half of them the prompt's."""
    rng = np.random.default_rng(seed)
    totals = np.clip(rng.lognormal(math.log(median), 0.6, count), lowest, highest).astype(int)
    pairs = []
    for i, total in enumerate(totals.tolist()):
        chosen = int(total * rng.uniform(0.15, 0.35))
        sizes = total - total // 2, chosen, total // 2 - chosen
        pairs.append(Pair(f"random:{i}", "", *(rng.integers(vocab, size=n).tolist() for n in sizes),
                          *rng.uniform(0, 5, 2).tolist()))
    return pairs


def equal_pairs(count, vocab, prompt=512, answer=256, seed=0):
    rng = np.random.default_rng(seed)
    return [Pair(f"equal:{i}", "", *(rng.integers(vocab, size=n).tolist()
                                     for n in (prompt, answer, answer)), 4.0, 2.0)
            for i in range(count)]


def make_data(pairs, vocab):
    """A train.Dataset whose reference gives every token the probability 1 / vocab."""
    gaps = torch.tensor([pair.gap for pair in pairs])  # (P,)
    reference = [[-len(ids) * math.log(vocab) for ids in (pair.chosen_ids, pair.rejected_ids)]
                 for pair in pairs]
    return train.Dataset(pairs, True, torch.stack(
        [*torch.tensor(reference).T, rdpo.preference_probability(gaps, 0.0), gaps]))


def train_args(bench, dtype, tokens, *flags):
    return train.get_args(["--data", TOY_ROWS, "--device", bench.args.device, "--dtype", dtype,
                           "--tokens_per_batch", str(tokens), *flags])


class Step:
    """One optimizer step after the other, as train.py takes them."""

    def __init__(self, model, args, device, loss_scale=2.0**16):
        self.model, self.args, self.taken = model, args, 0
        dtype = DTYPES[args.dtype]
        self.masters = Masters(model, dtype, args.seed)
        self.optimizer = torch.optim.AdamW(self.masters.parameters(), lr=args.learning_rate,
                                           weight_decay=args.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=loss_scale,
                                           enabled=dtype == torch.float16)
        self.masters.round(0)

    def backward(self, data):
        sums, _ = train.accumulate_gradients(self.model, data, self.args, self.scaler)
        self.masters.collect_gradients()
        return sums

    def update(self):
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.masters.parameters(), self.args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def round(self):
        self.taken += 1
        self.masters.round(self.taken)

    def __call__(self, data):
        sums = self.backward(data)
        loss = sums.tolist()[0]  # train.py waits for the GPU here
        norm = self.update().item()
        self.round()
        return loss, norm


# ------------------------------------------------------------------------- correctness: the pieces


def relative_error(result, exact):
    return ((result.double().cpu() - exact).norm() / exact.norm()).item()


def attend(q, k, v, mask, grad):
    """[output, dq, dk, dv] of scaled_dot_product_attention."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def mask_rows(rows, width):
    """A Batch of rows of up to `width` tokens: the first is full, wide ones hold two pairs."""
    pairs, of_rows = [], []
    for r in range(rows):
        total, own = width - 3 * r, 1 + (width > 100)
        of_rows.append(list(range(len(pairs), len(pairs) + own)))
        for part in range(own):
            size = total - total // 2 if part else total // own
            prompt, chosen = size // 2, size // 4
            pairs.append(Pair("", "", [1] * prompt, [1] * chosen, [1] * (size - prompt - chosen),
                              None, None))
    return collate(pairs, share_prefix=True, rows=of_rows)


def check_masks(bench):
    """rdpo's mask in fused attention, forward and backward, against float64."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as models.load_model does
    shapes = [(1, 40), (3, 129), (2, 192), (4, 704), (1, 1000)][:2 if bench.tiny else 5]
    worst, worst_math, control, kernels, copies = (collections.defaultdict(float), {}, [],
                                                   {}, set())
    for rows, width in shapes:
        batch = mask_rows(rows, width)
        for head_dim in (24, 64, 128)[:1 if bench.tiny else 3]:
            torch.manual_seed(width + head_dim)
            tensors = [torch.randn(rows, 2, width, head_dim).bfloat16() for _ in range(4)]
            for name, dtype in DTYPES.items():
                stub = stub_model(dtype, bench.device)
                mask = rdpo.attention_mask(stub, batch.to(bench.device))  # (R, 1, T, T)
                exact = attend(*(x.double() for x in tensors[:3]), (mask == 0).cpu(),
                               tensors[3].double())
                *qkv, grad = (x.to(bench.device, dtype) for x in tensors)
                fused = attend(*qkv, mask, grad)
                with sdpa_kernel(SDPBackend.MATH):
                    plain = attend(*qkv, mask, grad)
                for kind, mine, theirs, right in zip("o q k v".split(), fused, plain, exact):
                    error, of_math = (relative_error(x, right) for x in (mine, theirs))
                    key = f"{name} {'forward' if kind == 'o' else 'backward'}"
                    worst[key] = max(worst[key], error)
                    # float32 kernels sum in another order; 16-bit ones round the weights as well.
                    bound = (2 if kind == "o" else 4) * of_math + 1e-5
                    worst_math[key] = max(worst_math.get(key, 0), of_math)
                    bench.expect(error < bound, f"{key} at {rows, width, head_dim}: {error:.1e}, "
                                                f"math {of_math:.1e}")
                shifted = attend(*qkv, mask.roll(1, dims=2), grad)
                control.append(relative_error(shifted[0], exact[0]))
                if bench.cuda and (rows, width, head_dim) in ((3, 129, 64), (4, 704, 128)):
                    names, calls = kernels_of(lambda: attend(*qkv, mask, grad))
                    kernels[name] = sorted({re.sub(r"<.*|\(.*", "", kernel) for kernel in names
                                            if "fmha" in kernel or "flash" in kernel})
                    copies |= {call for call in calls if "pad" in call}
    if bench.cuda:
        bench.expect(all(names and all("fmha_cutlass" in name for name in names)
                         for names in kernels.values()), "another kernel")
        bench.expect(not copies, f"the mask is copied: {copies}")
    used = sorted(set(sum(kernels.values(), [])))
    return {"shapes": len(shapes), **{key: f"{error:.1e} (math {worst_math[key]:.1e})"
                                      for key, error in worst.items()},
            "kernels": " ".join(used) or "CPU"} | bench.control(min(control) > 0.05)


def stub_model(dtype, device):
    """What attention_mask asks a model for."""
    weight = torch.empty(1, 1, dtype=dtype, device=device)
    return types.SimpleNamespace(
        config=LlamaConfig(), dtype=dtype, device=device,
        get_input_embeddings=lambda: types.SimpleNamespace(weight=weight))


def kernels_of(function):
    """(names of the CUDA kernels that a call starts, names of the operations it calls)."""
    function()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    events = profile.key_averages()
    return ([event.key for event in events if is_kernel(event)],
            [event.key for event in events if not is_kernel(event)])


def is_kernel(event):
    return event.device_type == torch.autograd.DeviceType.CUDA


def exact_logps(model, pairs):
    """(2B,) of a float64 model, one answer at a time, from its own logits."""
    answers = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    answers += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    sums = []
    for prompt_ids, response_ids in answers:
        ids = torch.tensor([prompt_ids + response_ids])  # (1, T)
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)  # (T-1, V)
        own = logps.gather(1, ids[0, 1:, None])[:, 0]  # (T-1,)
        sums.append(own[len(prompt_ids) - 1:].sum())
    return torch.stack(sums)


@torch.no_grad()
def check_logps(bench):
    """sequence_logps in both layouts against the model's own logits in float64."""
    count, figures, controls = 6 if bench.tiny else 24, {}, []
    for name in ("llama", "mistral", "toy student")[:2 if bench.tiny else 3]:
        model = small_model(name, bench.tiny)
        vocab = model.config.vocab_size
        pairs = ragged_pairs(count, vocab, 150, 24, 400)
        tokens = torch.tensor([len(pair.chosen_ids) for pair in pairs]
                              + [len(pair.rejected_ids) for pair in pairs])  # (2B,)
        exact = exact_logps(cast(model, torch.float64, "cpu"), pairs)  # (2B,)
        spread = abs(exact.sum() / tokens.sum() / math.log(vocab) + 1).item()
        bench.expect(spread > 1e-3, f"{name}: all tokens are as likely")

        def errors(dtype, device, share_prefix, change=lambda batch: None):
            batch = collate(pairs, share_prefix)
            change(batch)
            logps = rdpo.sequence_logps(cast(model, dtype, device), batch.to(torch.device(device)))
            return (logps.double().cpu() - exact).abs()  # (2B,)

        def noise(error):
            return (error.square() / tokens).mean().sqrt().item()  # nats per token

        def shift(batch):
            batch.position_ids += batch.segments % 3 == CHOSEN

        for share_prefix in (True, False):
            error = (errors(torch.float32, bench.device, share_prefix) / tokens).max().item()
            bench.expect(error < 1e-4, f"{name}, float32: {error:.1e} per token")
            figures[f"{name} float32"] = f"{error:.1e}"
            for dtype in (torch.bfloat16, torch.float16):
                mine, cpu = (noise(errors(dtype, device, share_prefix))
                             for device in (bench.device, "cpu"))
                short = str(dtype)[6:]
                bench.expect(mine < 2 * cpu, f"{name}, {short}: {mine:.1e}, on a CPU {cpu:.1e}")
                figures[f"{name} {short}"] = f"{mine:.1e} (CPU {cpu:.1e})"
        wrong = errors(torch.float32, bench.device, True, shift)
        controls.append((wrong / tokens).max().item())
    return figures | bench.control(min(controls) > 1e-4)


def step_gradients(bench, model, dtype, device, data, **options):
    """{name: gradient} of one step on a copy of a model, as the masters get it."""
    model = cast(model, dtype, device)
    if options.get("checkpointing"):
        models.checkpoint_layers(model)
    args = train_args(bench, str(dtype)[6:], 10**6)
    step = Step(model, args, torch.device(device), loss_scale=2.0**10)
    head = options.get("head_bytes", rdpo.HEAD_BYTES[torch.device(device).type])
    with mock.patch.dict(rdpo.HEAD_BYTES, {torch.device(device).type: head}):
        step.backward(data)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    scale = step.scaler.get_scale()
    return {name: master.grad.double().cpu() / scale
            for name, master in zip(names, step.masters.parameters(), strict=True)}


def exact_gradients(model, data, beta=0.1):
    """{name: gradient} of the step's loss in float64, from the formula."""
    model = cast(model, torch.float64, "cpu")
    chosen, rejected = exact_logps(model, data.pairs).chunk(2)
    ref_chosen, ref_rejected, tau, _ = data.columns.double()
    margins = beta * (chosen - ref_chosen - rejected + ref_rejected)
    (-tau * F.logsigmoid(margins) - (1 - tau) * F.logsigmoid(-margins)).mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def check_gradients(bench):
    """The gradients of a step's loss, weight by weight, against float64 on the CPU."""
    model = small_model("llama", bench.tiny)
    vocab = model.config.vocab_size
    pairs = ragged_pairs(4 if bench.tiny else 8, vocab, 120, 24, 300, seed=1)
    data, figures = make_data(pairs, vocab), {}
    adapted = copy.deepcopy(model)
    add_lora(adapted, 8, 16)
    torch.manual_seed(2)
    for name, weight in adapted.named_parameters():
        if name.endswith(".B"):  # at 0 it would hide A's gradient
            weight.data.normal_(std=0.02)
    models.cast_weights(adapted, torch.bfloat16)
    models.cast_weights(adapted, torch.float32)
    exact = {id(each): exact_gradients(each, data) for each in (model, adapted)}
    on_cpu = {id(each): step_gradients(bench, each, torch.bfloat16, "cpu", data)
              for each in (model, adapted)}

    def compare(name, each, dtype, **options):
        mine = step_gradients(bench, each, dtype, bench.device, data, **options)
        right, cpu = exact[id(each)], on_cpu[id(each)]
        errors = {weight: relative_error(mine[weight], right[weight]) for weight in right}
        if dtype == torch.float32:
            bench.expect(max(errors.values()) < 1e-4, f"{name}: {max(errors.values()):.1e}")
            figures[name] = f"{max(errors.values()):.1e}"
            return
        of_cpu = {weight: relative_error(cpu[weight], right[weight]) for weight in right}
        ratio = max(errors[weight] / max(of_cpu[weight], 1e-3) for weight in right)
        cosine = F.cosine_similarity(flat(mine), flat(right), dim=0).item()
        bench.expect(ratio < 3, f"{name}: {ratio:.1f} times the error of a CPU")
        bench.expect(cosine > 0.99, f"{name}: cosine {cosine:.4f}")
        figures[name] = f"{max(errors.values()):.1e} ({ratio:.2f} of CPU, cosine {cosine:.5f})"

    compare("float32", model, torch.float32)
    compare("float32 checkpointing", model, torch.float32, checkpointing=True)
    compare("bf16", model, torch.bfloat16)
    compare("fp16", model, torch.float16)
    compare("bf16 checkpointing", model, torch.bfloat16, checkpointing=True)
    compare("bf16 LoRA", adapted, torch.bfloat16)
    for power in (18,) if bench.tiny else (18, 28, 30):
        compare(f"bf16 head 2^{power}", model, torch.bfloat16, head_bytes=2**power)
    swapped = data._replace(columns=data.columns.clone())
    swapped.columns[2] = 1 - data.tau
    wrong = step_gradients(bench, model, torch.float32, bench.device, swapped)
    return figures | bench.control(relative_error(flat(wrong), flat(exact[id(model)])) > 0.1)


def check_rounding(bench):
    """stochastic_round on the device is stochastic_round on the CPU, to the bit."""
    count = 2**20 + 3 if bench.tiny else 2**26 + 3  # above what is compiled on CUDA
    rng = torch.Generator().manual_seed(0)
    x = 0.05 * torch.randn(count, generator=rng)
    patterns = torch.randint(-2**31, 2**31, (2**18,), generator=rng)
    x[:2**18] = patterns.to(torch.int32).view(torch.float32)  # huge, subnormal, nan
    x[2**18:2**18 + 4096] *= 1e-6  # where float16 is subnormal
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.0, -65536.0, 3.4e38, 1e-45,
               2.0**-14, 2.0**-24, 2.0**-25]
    x[-len(special):] = torch.tensor(special)
    on_device = x.to(bench.device)
    figures, began = {"elements": count}, time.monotonic()

    def differences(rounded, expected):
        same = rounded.cpu().view(torch.int16) == expected.view(torch.int16)
        return (~(same | rounded.cpu().isnan() & expected.isnan())).sum().item()

    for dtype in (torch.bfloat16, torch.float16):
        expected = rounding.stochastic_round(x, dtype, 7, 3)
        with mock.patch.object(rounding, "worth_compiling", lambda x: False):
            eager = rounding.stochastic_round(on_device, dtype, 7, 3)
        with mock.patch.object(rounding, "worth_compiling", lambda x: not bench.tiny):
            began = time.monotonic()
            fused = rounding.stochastic_round(on_device, dtype, 7, 3)
            seconds = time.monotonic() - began
        for name, rounded in (("eager", eager), ("compiled", fused)):
            wrong = differences(rounded, expected)
            bench.expect(wrong == 0, f"{name}, {dtype}: {wrong} elements differ")
            figures[f"{str(dtype)[6:]} {name}"] = f"{wrong} differ"
        figures[f"{str(dtype)[6:]} compiled in"] = f"{seconds:.1f} s"
    model = small_model("llama", bench.tiny)
    for dtype in (torch.bfloat16, torch.float16):  # a whole model's masters
        copies = []
        for device in ("cpu", bench.device):
            masters = Masters(cast(model, torch.float32, device), dtype, seed=5)
            masters.flat[0][0].mul_(1.001)  # off the grid
            masters.round(9)
            copies.append(masters.flat[0][1])
        bench.expect(differences(copies[1], copies[0]) == 0, f"Masters.round, {dtype}")
    other = rounding.stochastic_round(on_device, torch.bfloat16, 8, 3)
    expected = rounding.stochastic_round(x, torch.bfloat16, 7, 3)
    return figures | bench.control(differences(other, expected) > 0)


# --------------------------------------------------------------------- correctness: train.py itself


@contextlib.contextmanager
def quiet_train(text):
    """train.main in this process: its output goes to text, signal handlers come back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (contextlib.redirect_stdout(text), contextlib.redirect_stderr(text),
              mock.patch.object(train, "have_matplotlib", lambda: False)):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_flags(bench, name, device, *flags):
    steps = 3 if bench.tiny else 12
    cache = "cache-cpu" if name.startswith("cpu-") else "cache"
    return ["--data", toy_rows(bench), "--device", device, "--out_dir", bench.path(name),
            "--cache_dir", bench.path(cache), "--max_steps", str(steps), "--eval_every", "100",
            "--max_new_tokens", "2", "--tokens_per_batch", "2048", *map(str, flags)]


@functools.cache
def toy_rows(bench):
    """The toy's rows; fewer of them for --tiny."""
    if not bench.tiny:
        return TOY_ROWS
    with open(TOY_ROWS, encoding="utf-8") as source, open(bench.path("rows.jsonl"), "w",
                                                          encoding="utf-8") as rows:
        rows.writelines(source.readlines()[:24])
    return rows.name


def run_train(bench, name, *flags):
    """(output, [loss of each step]) of train.py on the device, in this process."""
    text = io.StringIO()
    try:
        with quiet_train(text):
            train.main(run_flags(bench, name, bench.args.device, *flags))
    except Exception:
        print(text.getvalue()[-2000:])
        raise
    return text.getvalue(), step_losses(bench.path(name))


def step_losses(folder):
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [line["loss"] for line in lines if "loss" in line]


MODES = {  # name -> (flags, the float32 run on the CPU to compare with, largest difference)
    "bf16": (["--dtype", "bfloat16"], "full", 0.03),
    "bf16 LoRA checkpointing": (["--dtype", "bfloat16", "--lora_rank", 8,
                                 "--gradient_checkpointing"], "lora", 0.03),
    "float32": (["--dtype", "float32"], "full", 0.01),
    "fp16": (["--dtype", "float16"], "full", 0.06),  # its first step may be skipped
    "bf16 LoRA": (["--dtype", "bfloat16", "--lora_rank", 8], "lora", 0.03),
    "bf16 LoRA save_adapter": (["--dtype", "bfloat16", "--lora_rank", 8, "--save_adapter"],
                               "lora", 0.03),
    "bf16 reference": (["--dtype", "bfloat16", "--reference"], "reference", 0.03),
}


def start_cpu_runs(bench):
    """Start the float32 runs on the CPU that the modes are compared with: {name: future}."""
    def run(name, *flags):
        command = [sys.executable, os.path.join(ROOT, "train.py"),
                   *run_flags(bench, f"cpu-{name}", "cpu", "--dtype", "float32", *flags)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "",
                                    "OMP_NUM_THREADS": "1" if bench.tiny else "4"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return step_losses(bench.path(f"cpu-{name}"))

    def reference(full):
        full.result()
        return run("reference", "--reference", bench.path("cpu-full"))

    full = bench.pool.submit(run, "full")
    return {"full": full, "lora": bench.pool.submit(run, "lora", "--lora_rank", 8),
            "reference": bench.pool.submit(reference, full)}


def check_mode(bench, mode):
    flags, compared, bound = MODES[mode]
    if "float16" in flags and not bench.cuda:
        raise Skip("train.py takes float16 on CUDA only")
    expected = bench.cpu_runs[compared].result()
    if compared == "reference":
        flags = [*flags, bench.path("cpu-full")]
    name = "run-" + mode.replace(" ", "-")
    output, losses = run_train(bench, name, *flags)
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    bench.expect(difference < bound, f"losses differ by {difference:.4f}")
    skipped = "skipped: its gradients overflow"  # the scale that float16 begins with is too high
    warned = [line for line in output.split("\n")
              if line.startswith("warning") and skipped not in line]
    bench.expect(not warned, f"{warned}")
    saved = re.search(r"as saved: margin (\S+) of (\S+)", output)
    bench.expect(saved or "--save_adapter" in flags, "the saved student was not checked")
    figures = {"loss": f"{losses[0]:.4f} to {losses[-1]:.4f}",
               "largest difference": f"{difference:.4f}"}
    if saved:
        figures["margin as saved"] = f"{saved[1]} of {saved[2]}"
    return figures


def check_gate(bench):
    """A cached reference that is another model's must stop the run at step 0."""
    cache = bench.path("cache-wrong")
    if not os.path.isdir(bench.path("cache")):
        raise Skip("needs a run of train.py before it")
    shutil.copytree(bench.path("cache"), cache)
    for entry in os.scandir(cache):
        tensors = load_file(entry.path)
        tensors["logps"] -= 30.0
        save_file(tensors, entry.path)
    text = io.StringIO()
    try:
        with quiet_train(text):
            train.main(run_flags(bench, "gate", bench.args.device, "--dtype", "bfloat16",
                                 "--cache_dir", cache))
    except BadInput as error:
        at = str(error).find("at step 0")
        return {"message": str(error)[at:].partition(";")[0]} | bench.control(at >= 0)
    return bench.control(False)


def check_resume(bench):
    """Six steps at once, twice, and with a stop after the third: equal to the bit?"""
    order = train.learning_rate

    def stopping(step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return order(step, *rest)

    def difference(first, second):
        states = []
        for name in (first, second):
            folder = bench.path(name, "state", "step-00000006")
            state = torch.load(os.path.join(folder, "training.pt"), map_location="cpu")
            moments = {f"{i} {key}": value for i, own in state["optimizer"]["state"].items()
                       for key, value in own.items()}
            states.append(load_file(os.path.join(folder, "model.safetensors")) | moments)
        return max((states[0][name].double() - states[1][name].double()).abs().max().item()
                   for name in states[0])

    figures = {}
    for strict in (False,) if bench.tiny else (False, True):
        for dtype in ("bfloat16",) if bench.tiny else ("bfloat16", "float32"):
            name = f"resume-{dtype}-{strict}"
            flags = "--dtype", dtype, "--max_steps", 6, "--skip_saved_check"
            kind = f"{dtype}{' deterministic' if strict else ''}"
            torch.use_deterministic_algorithms(strict)
            try:
                run_train(bench, name, *flags)
                run_train(bench, f"{name}-again", *flags)
                with mock.patch.object(train, "learning_rate", stopping):
                    with contextlib.suppress(SystemExit):
                        run_train(bench, f"{name}-stopped", *flags)
                stopped = os.listdir(bench.path(f"{name}-stopped", "state"))
                bench.expect(stopped == ["step-00000003"], f"stopped with {stopped}")
                run_train(bench, f"{name}-stopped", *flags, "--resume")
            except RuntimeError as error:
                if not strict:
                    raise
                figures[kind] = "refused: " + first_line(error)[:90]  # an operation that has none
                continue
            finally:
                torch.use_deterministic_algorithms(False)
            again, resumed = (difference(name, f"{name}-{other}") for other in ("again", "stopped"))
            # Without deterministic kernels runs differ by the order of sums, which Adam widens to
            # the size of an update at most; under bfloat16 rounded copies then differ too.
            bench.expect(max(again, resumed) <= (0 if strict or not bench.cuda else 5e-3),
                         f"{kind}: {again:.1e}, resumed {resumed:.1e}")
            figures[kind] = f"again {again:.1e}, resumed {resumed:.1e}"
    return figures


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def compile_backend(bench):
    """On a CPU: no C++ compiler."""
    if bench.cuda:
        return contextlib.nullcontext()
    return mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager"))


def check_compile(bench):
    """--compile: graphs, breaks and limits over ragged batches, and the same numbers as eager."""
    from torch._dynamo.utils import counters
    model = small_model("llama", bench.tiny)
    vocab, dtype = model.config.vocab_size, torch.bfloat16
    data = make_data(ragged_pairs(8 if bench.tiny else 48, vocab, 150, 24, 600, seed=2), vocab)
    args = train_args(bench, "bfloat16", 600 if bench.tiny else 1500)
    torch._dynamo.reset()
    counters.clear()
    messages = Messages()
    logging.getLogger("torch._dynamo").addHandler(messages)
    results, seconds = [], 0.0
    for compiled in (False, True):
        policy = cast(model, dtype, bench.device)
        if compiled:
            with compile_backend(bench):
                models.compile_layers(policy)
        began = time.monotonic()
        metrics, ratios = train.evaluate(policy, data, args)  # no gradients: as the reference
        seconds = time.monotonic() - began
        step = Step(policy, args, bench.device)
        step.backward(data)
        logps = torch.tensor([list(map(float, ratios[pair.where]))
                              for pair in data.pairs])  # (P, 2)
        results.append((logps.double(), torch.cat([master.grad.flatten().double().cpu()
                                                   for master in step.masters.parameters()])))
    train.evaluate(policy, data, args)
    logging.getLogger("torch._dynamo").removeHandler(messages)
    limits = sum("recompile limit" in text.lower().replace("_", " ")
                 for text in [*messages.texts, *counters["unimplemented"]])
    batches = len(micro_batches(data.pairs, range(len(data.pairs)), args.tokens_per_batch, True))
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    bench.expect(limits == 0, f"{limits} hits of the recompile limit")
    bench.expect(breaks == 0, f"{breaks} graph breaks")
    tokens = torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in data.pairs])
    noise = ((results[1][0] - results[0][0]).square() / tokens).mean().sqrt().item()
    cosine = F.cosine_similarity(results[0][1], results[1][1], dim=0).item()
    bench.expect(noise < 0.1, f"log-probabilities differ by {noise:.1e} per token")
    bench.expect(cosine > 0.99, f"gradients have a cosine of {cosine:.4f}")
    return {"batches": batches, "graphs": graphs, "breaks": breaks, "limit hits": limits,
            "seconds of the first pass": f"{seconds:.1f}", "noise per token": f"{noise:.1e}",
            "cosine of gradients": f"{cosine:.5f}"}


def check_leaks(bench):
    """Which lines of a step wait for the GPU; whether memory grows from step to step."""
    model = small_model("llama", bench.tiny)
    vocab = model.config.vocab_size
    data = make_data(ragged_pairs(16, vocab, 150, 24, 600, seed=3), vocab)
    step = Step(cast(model, torch.bfloat16, bench.device),
                train_args(bench, "bfloat16", 1500), bench.device)
    waits, figures, allocated = collections.Counter(), {}, []
    for number in range(10):
        if bench.cuda and number == 3:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(data)
        waits.update(f"{os.path.relpath(each.filename, ROOT)}:{each.lineno}" for each in caught
                     if "synchroniz" in str(each.message))
        if bench.cuda and number == 5:
            torch.cuda.set_sync_debug_mode("default")
        if bench.cuda:
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())
    if bench.cuda:
        figures["waits in 3 steps"] = " ".join(f"{where} x{n}" for where, n in waits.items())
        figures["bytes after steps 3, 10"] = f"{allocated[2]}, {allocated[9]}"
        bench.expect(allocated[2] == allocated[9], "memory grows")
        strangers = [where for where in waits if not where.startswith("bench/gpu.py")]
        bench.expect(not strangers, f"waits outside the loop: {strangers}")
    del step
    bench.free()

    # What is left of policy, masters and optimizer when the saved student is loaded.
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    left = []

    def look(*_):
        gc.collect()
        left.append((torch.cuda.memory_allocated() if bench.cuda else 0) - before)
        return ""

    with mock.patch.object(train, "check_saved", look):
        run_train(bench, "leaks", "--dtype", "bfloat16")
    weights = sum(weight.nbytes for weight in models.load_model(models.TOY_STUDENT).parameters())
    bench.expect(left[0] < weights / 4, f"{left[0]} bytes are left before the saved check")
    return figures | {"bytes before the saved check": left[0], "bytes of the student": weights}


def check_overflow(bench):
    """float16 gradients that overflow: the step is skipped, the scale lowered, later ones taken."""
    model = small_model("llama", bench.tiny)
    vocab = model.config.vocab_size
    data = make_data(ragged_pairs(4, vocab, 60, 24, 120, seed=4), vocab)
    step = Step(cast(model, torch.float16, bench.device),
                train_args(bench, "float16", 1500), bench.device, loss_scale=2.0**40)
    skipped, taken = 0, 0
    for _ in range(40):
        before = flat(dict(step.masters.named_parameters())).detach().clone()
        _, norm = step(data)
        changed = bool((flat(dict(step.masters.named_parameters())) != before).any())
        bench.expect(changed == math.isfinite(norm), "a step that overflowed was taken, or none")
        skipped, taken = skipped + (not changed), taken + changed
    bench.expect(skipped and taken and step.scaler.get_scale() < 2.0**40, "nothing was skipped")
    figures = {"skipped": skipped, "taken": taken, "scale": f"{step.scaler.get_scale():g}"}
    if bench.cuda:
        scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**36)
        with mock.patch.object(torch.amp, "GradScaler", scaler):
            output, losses = run_train(bench, "overflow", "--dtype", "float16", "--max_steps", 30)
        warned = output.count("skipped: its gradients overflow")
        bench.expect(0 < warned < 30, f"train.py skipped {warned} of 30 steps")
        figures["skipped by train.py"] = warned
    return figures


# --------------------------------------------------------------------------------------- throughput


class Case(NamedTuple):
    shape: str
    tokens: int  # --tokens_per_batch
    pairs: int = 32  # per optimizer step
    lora: bool = False
    checkpointing: bool = False
    compile: bool = False
    head_power: int = 28  # rdpo.HEAD_BYTES is 2 to this
    equal: bool = False  # rows of one length

    @property
    def name(self):
        options = [f"head 2^{self.head_power}"] * (self.head_power != 28)
        options += ["LoRA"] * self.lora + ["checkpointing"] * self.checkpointing
        options += ["compiled"] * self.compile + ["equal lengths"] * self.equal
        return " ".join([self.shape, *(options or ["full"]), str(self.tokens)])

    @property
    def memory_flags(self):
        flags = ["--shape", self.shape, "--tokens_per_batch", str(self.tokens)]
        flags += ["--lora_rank", "16"] * self.lora
        return flags + ["--gradient_checkpointing"] * self.checkpointing


FIRST_CASES = [Case("1b", 8192), Case("smollm2-135m", 8192),
               Case("8b", 8192, lora=True, checkpointing=True), Case("8b", 8192, lora=True),
               Case("solar-10.7b", 16384, 48, lora=True, checkpointing=True)]
LATER_CASES = [Case("1b", 8192, compile=True), Case("8b", 8192, 32, lora=True, compile=True),
               Case("smollm2-135m", 8192, compile=True),
               *(Case("1b", 8192, head_power=power) for power in (30, 26)),
               *(Case(shape, tokens) for shape in ("smollm2-135m", "1b") for tokens in (2048, 16384)),
               Case("1b", 8192, equal=True),
               Case("8b", 2048, 32, lora=True, checkpointing=True)]
TINY_CASES = [Case("tiny", 2048, 4), Case("tiny", 2048, 4, lora=True, checkpointing=True)]


def case_seconds(case):
    """Of building and measuring it on an H100, roughly."""
    return {"smollm2-135m": 12, "1b": 12, "8b": 18, "solar-10.7b": 25, "tiny": 2}[case.shape] \
        + 25 * case.compile


def predict_memory(bench, case):
    """memory.py's bytes for a case, in GB, or None."""
    if case.shape == "tiny":
        return None
    command = [sys.executable, os.path.join(ROOT, "bench", "memory.py"), *case.memory_flags]
    process = subprocess.run(command, capture_output=True, text=True,
                             env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    found = re.search(r"([\d.]+) GB", process.stdout)
    if process.returncode or not found:
        print(f"memory.py {' '.join(case.memory_flags)}: {process.stderr[-300:]}")
        return None
    return float(found[1])


def prepare(bench, case, dtype="bfloat16"):
    """(Step, FLOPs of pairs as a function) of a case's random model."""
    model = build(case.shape, DTYPES[dtype], bench.device)
    flops = functools.partial(count_flops, copy_of_sizes(model))
    flags = ["--lora_rank", "16"] * case.lora
    args = train_args(bench, dtype, case.tokens, *flags)
    if case.lora:
        add_lora(model, args.lora_rank, args.lora_alpha)
    if case.compile:
        with compile_backend(bench):
            models.compile_layers(model)
    if case.checkpointing:
        models.checkpoint_layers(model)
    return Step(model, args, bench.device), flops


def copy_of_sizes(model):
    """The same model without memory and adapters, for count_flops."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config)


def synchronize(bench):
    if bench.cuda:
        torch.cuda.synchronize()


def timed(bench, function, *args):
    synchronize(bench)
    began = time.perf_counter()
    function(*args)
    synchronize(bench)
    return time.perf_counter() - began


def measure_case(bench, case, pairs=None):
    """Steps of one case: pairs per second, MFU, where the time goes, peak memory."""
    if bench.cuda and case.shape in ("8b", "solar-10.7b"):
        need = {"8b": 20, "solar-10.7b": 28}[case.shape]
        if torch.cuda.get_device_properties(0).total_memory < need * GB:
            raise Skip(f"needs {need} GB")
    with mock.patch.dict(rdpo.HEAD_BYTES, {"cuda": 2**case.head_power}):
        return measured_case(bench, case, pairs)


def measured_case(bench, case, pairs):
    step, flops_of = prepare(bench, case)
    vocab = step.model.config.vocab_size
    make = equal_pairs if case.equal else ragged_pairs
    shorter = dict(median=80, highest=200) if bench.tiny and not case.equal else {}
    pairs = pairs or make((2 if case.lora else 4) * case.pairs, vocab, **shorter)
    data = make_data(pairs, vocab)
    steps = [data.part(range(i, i + case.pairs)) for i in range(0, len(pairs), case.pairs)]
    warm = [timed(bench, step, part) for part in steps[:2]]
    if case.compile:  # until all graphs are there
        warm += [timed(bench, step, part) for part in steps]
    least = 0.0 if bench.tiny else 3.0
    rounds = max(1, math.ceil(least / (warm[-1] * len(steps))))  # each takes all steps once
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    synchronize(bench)
    began = time.perf_counter()
    for _ in range(rounds):
        for part in steps:
            loss, _ = step(part)
    synchronize(bench)
    seconds = (time.perf_counter() - began) / rounds / len(steps)  # of a step
    bench.expect(math.isfinite(loss), f"loss {loss}")
    real = sum(batch_tokens(pair, True) for pair in pairs) / len(steps)
    flops = flops_of(pairs) / len(steps) * (4 / 6 if case.lora else 1)  # frozen weights: no dW
    figures = {"pairs/s": f"{case.pairs / seconds:.2f}", "tokens/s": f"{real / seconds:.0f}",
               "MFU": f"{flops / seconds / PEAK:.1%}" if bench.cuda else "",
               "ms a step": f"{1e3 * seconds:.0f}"}
    figures |= parts_of(bench, step, steps[0])
    if bench.cuda:
        figures |= {"allocated GB": f"{torch.cuda.max_memory_allocated() / GB:.1f}",
                    "reserved GB": f"{torch.cuda.max_memory_reserved() / GB:.1f}"}
        figures |= profiled(bench, step, steps[0])
    figures["warm-up s"] = f"{sum(warm):.1f}"
    bench.measured[case.name] = figures | {"pairs per second": case.pairs / seconds}
    if bench.cuda and not case.equal and case.head_power == 28 and not case.compile:
        measure_peak(bench, case, step, vocab)
    return figures


def parts_of(bench, step, part):
    """Milliseconds of the parts of a step beside forward and backward."""
    batches = train.rank_batches(part.pairs, range(len(part.pairs)), True, step.args)

    def send_all():
        for batch in batches:
            collate([part.pairs[i] for i in batch], True).to(bench.device)

    sending = timed(bench, send_all)
    step.backward(part)
    updating = timed(bench, step.update)
    rounding_ = timed(bench, step.round)
    computed = sum(collate([part.pairs[i] for i in batch], True).input_ids.numel()
                   for batch in batches)
    real = sum(batch_tokens(pair, True) for pair in part.pairs)
    return {"batches": len(batches), "real/computed": f"{real / computed:.3f}",
            "collate+send ms": f"{1e3 * sending:.1f}", "clip+AdamW ms": f"{1e3 * updating:.1f}",
            "round ms": f"{1e3 * rounding_:.1f}"}


def profiled(bench, step, part):
    """Kernels of one step: their number, share of the time, the five largest."""
    seconds = timed(bench, step, part)  # the profiler itself takes time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed(bench, step, part)
    kernels = [event for event in profile.key_averages() if is_kernel(event)]
    total = sum(event.self_device_time_total for event in kernels)  # microseconds
    largest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:5]
    return {"GPU busy": f"{total / 1e6 / seconds:.0%}",
            "kernels a step": sum(event.count for event in kernels),
            "kernels": "; ".join(f"{event.self_device_time_total / total:.0%} "
                                 f"{event.key[:70]}" for event in largest)}


def measure_peak(bench, case, step, vocab):
    """Record the peak of two full micro-batches of equal rows, as memory.py assumes."""
    began, count = time.monotonic(), 2 * max(1, case.tokens // 1024)
    data = make_data(equal_pairs(count, vocab), vocab)
    step(data)
    torch.cuda.reset_peak_memory_stats()
    step(data)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    predicted = bench.predictions[case.name].result() if case.name in bench.predictions else None
    figures = {"allocated GB": f"{allocated / GB:.2f}", "reserved GB": f"{reserved / GB:.2f}"}
    result = "no prediction"
    if predicted:
        ratio = predicted * GB / allocated
        figures |= {"predicted GB": predicted, "predicted/allocated": f"{ratio:.2f}"}
        within = 0.9 <= ratio <= 1.1
        result = "passed" if within else "failed: off by more than a tenth"
        bench.failed += not within
    bench.record(Check("memory", case.name, 0, None), result, time.monotonic() - began, figures)


# -------------------------------------------------------------------------------------- beside TRL


def check_trl(bench):
    """TRL's DPO on the rows of the throughput cases: the same pairs per step, no wider batches."""
    python = bench.args.trl_python or sys.executable
    look = "import importlib.util as u; assert u.find_spec('trl') and u.find_spec('datasets')"
    if subprocess.run([python, "-c", look], capture_output=True).returncode:
        raise Skip(f"{python} has no trl or no datasets")
    cases = [Case("tiny", 2048, 4)] if bench.tiny else [FIRST_CASES[1], FIRST_CASES[0]]
    jobs, names = [], []
    for case in cases:
        folder = bench.path(f"trl-{case.shape}")
        model = build(case.shape, torch.bfloat16, bench.device)
        vocab = model.config.vocab_size
        tokenizer = models.load_tokenizer(models.TOY_STUDENT)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shorter = dict(median=80, highest=200) if bench.tiny else {}
        pairs = ragged_pairs(4 * case.pairs, vocab, **shorter)
        rows = [{"prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids,
                 "rejected_ids": pair.rejected_ids} for pair in pairs]
        best = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
        if case.name not in bench.measured:
            measure_case(bench, case)
        del model
        bench.free()
        one = min(8, case.pairs)
        for name, config, weights in (("its defaults", {}, "float32"),
                                      ("reference precomputed, no checkpointing", best, "float32"),
                                      ("the same, bf16 weights, no masters", best, "bfloat16")):
            names.append((case, name))
            jobs.append({"model": folder, "rows": rows, "learning_rates": [1e-6] * 4,
                         "batch_size": one, "beta": 0.1, "max_length": 10**6, "weights": weights,
                         "device": bench.args.device,
                         "config": config | {"gradient_accumulation_steps": case.pairs // one,
                                             "bf16": bench.cuda or weights == "bfloat16"}})
    with open(bench.path("jobs.json"), "w", encoding="utf-8") as file:
        json.dump(jobs, file)
    process = subprocess.run([python, TRL_SCRIPT, bench.path("jobs.json")], capture_output=True,
                             text=True, timeout=max(bench.left(), 30),
                             env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    answers = [json.loads(line) for line in process.stdout.split("\n")
               if line.startswith('{"trl"')]
    if process.returncode:
        print(process.stderr[:1500], "...", process.stderr[-1500:])
        bench.expect(False, f"the process ended with {process.returncode}")
    for (case, name), answer in zip(names, answers):
        ours = bench.measured[case.name]
        figures = {}
        if answer.get("out_of_memory"):
            result = "out of memory"
        else:
            seconds = answer["seconds"][1:]  # the first one warms up
            rate = case.pairs * len(seconds) / sum(seconds)
            peak = answer["peak_bytes"] / GB
            result = "measured"
            figures = {"TRL pairs/s": f"{rate:.2f}", "TRL GB": f"{peak:.1f}",
                       "ours pairs/s": ours["pairs/s"], "ours GB": ours.get("allocated GB", ""),
                       "ours/TRL": f"{ours['pairs per second'] / rate:.2f}"}
        bench.record(Check("trl", f"{case.name}, TRL {answer['trl']}, {name}", 0, None), result,
                     sum(answer.get("seconds", [])), figures)
    return {"runs": f"{len(answers)} of {len(jobs)}"}


# ------------------------------------------------------------------------------------- a 24 GB card


def check_small_card(bench):
    """8B LoRA with checkpointing on what a 24 GB card has: steps, export, the saved check."""
    case = Case("tiny" if bench.tiny else "8b", 2048, 4 if bench.tiny else 16, True, True)
    out_dir, need = bench.path("student"), 0.1 if bench.tiny else 17  # GB
    if shutil.disk_usage(bench.work).free < need * GB:
        raise Skip(f"needs {need} GB of disk for the saved student")
    if bench.cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 23 * GB / total))
    figures = {}

    def stage(name):
        if bench.cuda:
            figures[f"{name} GB"] = f"{torch.cuda.max_memory_allocated() / GB:.2f}"
            figures[f"{name} reserved GB"] = f"{torch.cuda.max_memory_reserved() / GB:.2f}"
            torch.cuda.reset_peak_memory_stats()

    try:
        stage("before")
        step, _ = prepare(bench, case)
        step.args.out_dir = out_dir
        os.makedirs(out_dir)
        weights_before = models.sample_weights(dict(step.model.named_parameters()))
        vocab = step.model.config.vocab_size
        shorter = dict(median=80, highest=200) if bench.tiny else {}
        data = make_data(ragged_pairs(2 * case.pairs, vocab, **shorter), vocab)
        val = make_data(ragged_pairs(8, vocab, seed=9, **shorter), vocab)
        stage("start")
        began = time.monotonic()
        for number in range(6):
            step(data.part(range(number % 2 * case.pairs, (number % 2 + 1) * case.pairs)))
        synchronize(bench)
        figures["6 steps s"] = f"{time.monotonic() - began:.1f}"
        metrics, _ = train.evaluate(step.model, val, step.args)
        stage("training")
        began = time.monotonic()
        checkpoint.export(step.model, step.masters, models.load_tokenizer(models.TOY_STUDENT),
                          torch.bfloat16, weights_before, step.args)
        figures["export s"] = f"{time.monotonic() - began:.1f}"
        stage("export")
        args = step.args
        del step
        bench.free()
        text, began = io.StringIO(), time.monotonic()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            line = train.check_saved(val, metrics, args)
        figures["check s"] = f"{time.monotonic() - began:.1f}"
        stage("check")
        figures["margin as saved"] = re.sub(r".*margin (.*?) \(.*", r"\1", line)
        bench.expect("warning" not in text.getvalue(), text.getvalue()[-200:])
    except torch.OutOfMemoryError as error:
        bench.expect(False, f"no memory: {first_line(error)}")
    finally:
        if bench.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
        shutil.rmtree(out_dir, ignore_errors=True)
    return figures


# ---------------------------------------------------------------------------------- attention alone


def check_attention(bench, shape):
    """Milliseconds of one layer's attention, forward and backward, by kernel; rows of one pair."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    heads, head_dim = {"8b": (32, 128), "smollm2-135m": (9, 64)}[shape]
    flex = torch.compile(flex_attention, dynamic=False)
    for width in (512, 1024, 2048):
        rows, began = 8192 // width, time.monotonic()
        batch = mask_rows(rows, width).to(bench.device)
        q, k, v, grad = (torch.randn(rows, heads, width, head_dim, device=bench.device,
                                     dtype=torch.bfloat16) for _ in range(4))
        additive = rdpo.attention_mask(stub_model(torch.bfloat16, bench.device), batch)
        seen, segments = additive == 0, batch.segments

        def visible(b, h, query, key):
            mine, theirs = segments[b, query], segments[b, key]
            return ((query >= key) & (mine // 3 == theirs // 3)
                    & ((theirs % 3 == 0) | (mine == theirs)))

        blocks = create_block_mask(visible, rows, None, width, width, device=bench.device)
        ways = {"additive mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, additive),
                "bool mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen),
                "causal flash": lambda q, k, v: F.scaled_dot_product_attention(q, k, v,
                                                                               is_causal=True),
                "flex": lambda q, k, v: flex(q, k, v, block_mask=blocks)}
        figures = {}
        for name, way in ways.items():
            def both():
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]
                torch.autograd.grad(way(*inputs), inputs, grad)

            for _ in range(3):
                both()
            figures[f"{name} ms"] = f"{1e3 * min(timed(bench, both) for _ in range(10)):.2f}"
        bench.record(Check("attention", f"{shape}, {rows} rows of {width}", 0, None), "measured",
                     time.monotonic() - began, figures)


# ------------------------------------------------------------------------------------------ the day


def check_start(bench):
    """The first kernels, and what attention and products are set to."""
    x = torch.randn(256, 256, device=bench.device)
    bench.expect(relative_error(x @ x, x.double().cpu() @ x.double().cpu()) < 1e-5,
                 "float32 products are not float32")
    return {"float32 products": torch.get_float32_matmul_precision()}


def all_checks(tiny, cuda):
    """Every Check, the most valuable first."""
    correct = functools.partial(Check, "correctness")
    modes = {mode: correct(f"train.py {mode}", 8, functools.partial(check_mode, mode=mode))
             for mode in MODES if not (tiny and mode in ("float32", "bf16 LoRA"))}
    first = ["bf16", "bf16 LoRA checkpointing"]
    cases = [Check("throughput", case.name, case_seconds(case),
                   functools.partial(measure_case, case=case))
             for case in (TINY_CASES if tiny else FIRST_CASES)]
    later = [Check("throughput", case.name, case_seconds(case),
                   functools.partial(measure_case, case=case))
             for case in ([] if tiny else LATER_CASES)]
    attention = [Check("attention", f"kernels of {shape}", 30,
                       functools.partial(check_attention, shape=shape))
                 for shape in ("8b", "smollm2-135m") if cuda and not tiny]
    return [correct("start", 5, check_start), correct("masks", 10, check_masks),
            correct("logps", 10, check_logps), correct("gradients", 12, check_gradients),
            correct("rounding", 15, check_rounding), *(modes[mode] for mode in first),
            correct("step-0 gate", 5, check_gate),
            *(check for mode, check in modes.items() if mode not in first),
            *cases, Check("trl", "runs", 5 if tiny else 75, check_trl),
            Check("memory", "24 GB card, 8b LoRA checkpointing 2048", 60, check_small_card),
            correct("resume", 40, check_resume), correct("compile", 45, check_compile),
            correct("leaks and syncs", 10, check_leaks),
            correct("fp16 overflow", 8, check_overflow), *later, *attention]


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="What only a GPU can show.", allow_abbrev=False)
    add = parser.add_argument
    add("--out_dir", default="gpu", help="results.jsonl and GPU.md go here")
    add("--seconds", type=float, default=440, help="for all, counted from the start")
    add("--only", help="names of checks or sections, or their beginnings: a,b,c")
    add("--trl_python", help="a Python that has TRL (default: this one)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="small models, few rows: tests this script")
    return parser.parse_args(argv)


def selected(checks, only):
    words = only.split(",") if only else [""]
    return [check for check in checks
            if any(name.startswith(word) for word in words for name in (check.name, check.section))]


def main(argv=None):
    args = get_args(argv)
    if args.tiny:
        torch.set_num_threads(1)  # more would wait for each other over such small tensors
    bench = Bench(args)
    line, bench.head = machine(bench)
    print(line, flush=True)
    checks = selected(all_checks(bench.tiny, bench.cuda), args.only)
    wanted = {check.name for check in checks}
    try:
        if any(name.startswith("train.py") for name in wanted):
            bench.cpu_runs = start_cpu_runs(bench)
        bench.predictions = {case.name: bench.pool.submit(predict_memory, bench, case)
                             for case in FIRST_CASES + LATER_CASES
                             if bench.cuda and case.name in wanted}
        for check in checks:
            bench.run(check)
    finally:
        bench.pool.shutdown(cancel_futures=True)
        shutil.rmtree(bench.work, ignore_errors=True)
    print("\n" + markdown(bench.head, bench.results))
    ran = sum(not each["result"].startswith("skipped") for each in bench.results)
    print(f"{ran} results, {bench.failed} failed, {time.monotonic() - START:.0f} s")
    return min(bench.failed, 100)


if __name__ == "__main__":
    sys.exit(main())
