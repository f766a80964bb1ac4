"""The correctness checks of gpu.py: a device against float64, and train.py against a CPU.

Each takes gpu.py's Bench and returns {figure: value}. bench.expect counts a wrong result;
bench.control asserts that the same bound refuses a computation that was made wrong on purpose.
"""
import collections
import contextlib
import copy
import functools
import gc
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
import warnings
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import rdpo
import train
from bench.step_profile import ROOT, Step, make_data
from data import Pair, collate
from infra import models, rounding
from infra.command import BadInput
from infra.packing import micro_batches
from infra.lora import add_lora
from infra.runlog import compile_note

TOY_ROWS = os.path.join(ROOT, "toy", "scored.jsonl")
CPU, VOCAB = torch.device("cpu"), 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIXTEEN_BITS = {name: DTYPES[name] for name in ("bfloat16", "float16")}

# --------------------------------------------------------------------------------- models and rows


def small_model(name, tiny):
    """A model on the CPU in float32, its weights on bfloat16's grid: exact in all three dtypes."""
    if name == "toy student":
        return models.load_model(models.TOY_STUDENT)
    sizes = dict(hidden_size=64 if tiny else 256, intermediate_size=96 if tiny else 512,
                 num_hidden_layers=2 if tiny else 4, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=VOCAB, initializer_range=0.1)
    config = (LlamaConfig(**sizes) if name == "llama"
              else MistralConfig(**sizes, sliding_window=48))
    torch.manual_seed(0)
    return to_grid(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval())


def to_grid(model):
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
                          score_gap=rng.uniform(-5, 5)))
    return pairs


def small_data(count, median, highest, seed):
    return make_data(ragged_pairs(count, VOCAB, median, 24, highest, seed), VOCAB)


def train_args(device, dtype, tokens, *flags):
    return train.get_args(["--data", TOY_ROWS, "--device", device.type, "--dtype", dtype,
                           "--tokens_per_batch", str(tokens), *flags])


def small_step(bench, dtype, **options):
    model = cast(small_model("llama", bench.tiny), DTYPES[dtype], bench.device)
    return Step(model, train_args(bench.device, dtype, 1500), **options)


def relative_error(result, exact):
    return ((result.double().cpu() - exact).norm() / exact.norm()).item()


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


# -------------------------------------------------------------------------------------- the pieces


def check_start(bench):
    """The first kernels, and what products are set to."""
    x = torch.randn(256, 256, device=bench.device)
    bench.expect(relative_error(x @ x, x.double().cpu() @ x.double().cpu()) < 1e-5,
                 "float32 products are not float32")
    return {"float32 products": torch.get_float32_matmul_precision()}


def attend(tensors, attention):
    """[output, dq, dk, dv] of attention(q, k, v) for q, k, v and the output's gradient."""
    *inputs, grad = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def masked(mask):
    return functools.partial(scaled_dot_product_attention, attn_mask=mask)


def mask_rows(rows, width):
    """A Batch of rows of up to `width` tokens: the first is full, wide ones hold two pairs."""
    pairs, of_rows = [], []
    for total in range(width, width - 3 * rows, -3):
        sizes = [total // 2, total - total // 2] if width > 100 else [total]
        of_rows.append([len(pairs) + i for i in range(len(sizes))])
        for size in sizes:
            prompt, chosen = size // 2, size // 4
            pairs.append(Pair("", "", [1] * prompt, [1] * chosen, [1] * (size - prompt - chosen)))
    return collate(pairs, share_prefix=True, rows=of_rows)


def mask_of(batch, dtype, device):
    """attention_mask (R, 1, T, T) of a Batch, with what it asks a model for."""
    weight = torch.empty(1, 1, dtype=dtype, device=device)
    stub = types.SimpleNamespace(
        config=LlamaConfig(), dtype=dtype, device=device,
        get_input_embeddings=lambda: types.SimpleNamespace(weight=weight))
    return rdpo.attention_mask(stub, batch.to(device))


def check_masks(bench):
    """rdpo's mask in fused attention, forward and backward, against float64."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as models.load_model does
    worst, controls, used = collections.defaultdict(lambda: (0.0, 0.0)), [], set()
    shapes = [(1, 40), (3, 129), (2, 192), (4, 704), (1, 1000)][:2 if bench.tiny else 5]
    for rows, width in shapes:
        batch = mask_rows(rows, width)
        for head_dim in (24, 64, 128)[:1 if bench.tiny else 3]:
            torch.manual_seed(width + head_dim)
            tensors = torch.randn(4, rows, 2, width, head_dim).bfloat16()
            visible = mask_of(batch, torch.float32, CPU) == 0  # (R, 1, T, T)
            exact = attend(tensors.double(), masked(visible))
            for name, dtype in DTYPES.items():
                inputs = tensors.to(bench.device, dtype)
                mask = mask_of(batch, dtype, bench.device)
                fused = attend(inputs, masked(mask))
                with sdpa_kernel(SDPBackend.MATH):
                    plain = attend(inputs, masked(mask))
                for i, (mine, theirs, right) in enumerate(zip(fused, plain, exact)):
                    error, of_math = (relative_error(x, right) for x in (mine, theirs))
                    kind = f"{name} {'backward' if i else 'forward'}"
                    worst[kind] = max(worst[kind], (error, of_math))
                    # float32 kernels sum in another order; 16-bit ones round the weights as well.
                    bench.expect(error < (4 if i else 2) * of_math + 1e-5,
                                 f"{kind} at {rows, width, head_dim}: {error:.1e}")
                shifted = attend(inputs, masked(mask.roll(1, dims=2)))
                controls.append(relative_error(shifted[0], exact[0]))
                bench.expect(mask.stride(2) % 8 == 0, "attention would copy the mask")
                choice = torch._fused_sdp_choice(*inputs[:3].requires_grad_(), attn_mask=mask)
                used.add(SDPBackend(choice).name)
    bench.expect(used == {"EFFICIENT_ATTENTION"} or not bench.cuda, "another kernel")
    return {kind: f"{error:.1e} (math {of_math:.1e})" for kind, (error, of_math) in worst.items()
            } | {"kernels": " ".join(used)} | bench.control(min(controls) > 0.05)


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
    figures, controls = {}, []
    for name in ("llama", "mistral", "toy student")[:2 if bench.tiny else 3]:
        model = small_model(name, bench.tiny)
        pairs = ragged_pairs(4 if bench.tiny else 16, model.config.vocab_size, 100, 24, 250)
        tokens = torch.tensor([len(pair.chosen_ids) for pair in pairs]
                              + [len(pair.rejected_ids) for pair in pairs])  # (2B,)
        exact = exact_logps(cast(model, torch.float64, CPU), pairs)  # (2B,)
        layouts = [collate(pairs, True), collate(pairs, False)]

        def errors(dtype, device, batch):
            logps = rdpo.sequence_logps(cast(model, dtype, device), batch.to(device))
            return (logps.double().cpu() - exact).abs()  # (2B,)

        def noise(*run):
            return (errors(*run).square() / tokens).mean().sqrt().item()  # nats per token

        def largest(batch):
            return (errors(torch.float32, bench.device, batch) / tokens).max().item()

        error = max(map(largest, layouts))
        bench.expect(error < 1e-4, f"{name}, float32: {error:.1e} per token")
        figures[f"{name} float32"] = f"{error:.1e}"
        for short, dtype in SIXTEEN_BITS.items():
            mine = max(noise(dtype, bench.device, batch) for batch in layouts)
            cpu = noise(dtype, CPU, layouts[0])
            bench.expect(mine < 2 * cpu, f"{name}, {short}: {mine:.1e}, on a CPU {cpu:.1e}")
            figures[f"{name} {short}"] = f"{mine:.1e} (CPU {cpu:.1e})"
        layouts[0].position_ids.add_(layouts[0].segments % 3 == 1)
        controls.append(largest(layouts[0]))
    return figures | bench.control(min(controls) > 1e-4)


def step_gradients(model, dtype, device, data, checkpointing=False, head_bytes=2**25):
    """{name: gradient} of one step on a copy of a model, as the masters get it."""
    model = cast(model, dtype, device)
    if checkpointing:
        models.checkpoint_layers(model)
    step = Step(model, train_args(device, str(dtype)[6:], 10**6), loss_scale=2.0**10)
    with mock.patch.dict(rdpo.HEAD_BYTES, {device.type: head_bytes}):
        step.backward(data)
    return {name.replace("/", "."): master.grad.double().cpu() / step.scaler.get_scale()
            for name, master in step.masters.named_parameters()}


def exact_gradients(model, data, beta=0.1):
    """{name: gradient} of the step's loss in float64, from the formula."""
    model = cast(model, torch.float64, CPU)
    chosen, rejected = exact_logps(model, data.pairs).chunk(2)
    ref_chosen, ref_rejected, tau = (tensor.double() for tensor in data[2:5])
    margins = beta * (chosen - ref_chosen - rejected + ref_rejected)
    (-tau * F.logsigmoid(margins) - (1 - tau) * F.logsigmoid(-margins)).mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def check_gradients(bench):
    """The gradients of a step's loss, weight by weight, against float64 on the CPU."""
    data, figures = small_data(4 if bench.tiny else 8, 120, 300, seed=1), {}
    full = small_model("llama", bench.tiny)
    adapted = copy.deepcopy(full)
    add_lora(adapted, 8, 16)
    torch.manual_seed(2)
    for name, weight in adapted.named_parameters():
        if name.endswith(".B"):  # at 0 it would hide A's gradient
            weight.data.normal_(std=0.02)
    to_grid(adapted)
    models_ = {"full": full, "LoRA": adapted}
    exact = {kind: exact_gradients(model, data) for kind, model in models_.items()}
    on_cpu = {kind: step_gradients(model, torch.bfloat16, CPU, data)
              for kind, model in models_.items()}

    def compare(name, dtype, kind="full", **options):
        mine = step_gradients(models_[kind], dtype, bench.device, data, **options)
        right = exact[kind]
        errors = {weight: relative_error(mine[weight], right[weight]) for weight in right}
        figures[name] = f"{max(errors.values()):.1e}"
        if dtype == torch.float32:
            bench.expect(max(errors.values()) < 1e-4, f"{name}: {figures[name]}")
            return
        ratio = max(error / max(relative_error(on_cpu[kind][weight], right[weight]), 1e-3)
                    for weight, error in errors.items())
        cosine = F.cosine_similarity(flat(mine), flat(right), dim=0).item()
        figures[name] += f" ({ratio:.2f} of CPU, cosine {cosine:.5f})"
        bench.expect(ratio < 3 and cosine > 0.99, f"{name}: {figures[name]}")

    compare("float32", torch.float32)
    compare("float32 checkpointing", torch.float32, checkpointing=True)
    compare("bf16", torch.bfloat16)
    compare("fp16", torch.float16)
    compare("bf16 checkpointing", torch.bfloat16, checkpointing=True)
    compare("bf16 LoRA", torch.bfloat16, "LoRA")
    compare("bf16 head 2^18", torch.bfloat16, head_bytes=2**18)
    swapped = data._replace(tau=1 - data.tau)
    wrong = step_gradients(full, torch.float32, bench.device, swapped)
    return figures | bench.control(relative_error(flat(wrong), flat(exact["full"])) > 0.1)


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
    on_device, figures = x.to(bench.device), {"elements": count}

    def differences(rounded, expected):
        rounded = rounded.cpu()
        same = rounded.view(torch.int16) == expected.view(torch.int16)
        return (~(same | rounded.isnan() & expected.isnan())).sum().item()

    for short, dtype in SIXTEEN_BITS.items():
        expected = rounding.stochastic_round(x, dtype, 7, 3)
        for kind in ("eager", "compiled")[:1 if bench.tiny else 2]:
            with mock.patch.object(rounding, "worth_compiling", lambda x: kind == "compiled"):
                wrong = differences(rounding.stochastic_round(on_device, dtype, 7, 3), expected)
            bench.expect(wrong == 0, f"{kind}, {dtype}: {wrong} elements differ")
            figures[f"{short} {kind}"] = f"{wrong} differ"
    other_seed = rounding.stochastic_round(on_device, torch.float16, 8, 3)
    return figures | bench.control(differences(other_seed, expected) > 0)


# ---------------------------------------------------------------------------------- train.py itself


def run_flags(bench, name, device, *flags):
    rows, steps = bench.path("rows.jsonl"), 3 if bench.tiny else 12
    if not os.path.exists(rows):
        with open(TOY_ROWS, encoding="utf-8") as source, open(rows, "w", encoding="utf-8") as file:
            file.writelines(source.readlines()[:16 if bench.tiny else None])
    return ["--data", rows, "--device", device.type, "--out_dir", bench.path(name),
            "--ref_cache_dir", bench.path(f"cache-{device.type}{name[:3]}"), "--max_steps",
            str(steps), "--batch_size", "4" if bench.tiny else "16", "--eval_every", "100",
            "--max_new_tokens", "2", "--tokens_per_batch", "2048", *map(str, flags)]


def run_train(bench, name, *flags):
    """(output, [loss of each step]) of train.py on the device, in this process."""
    text = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (contextlib.redirect_stdout(text), contextlib.redirect_stderr(text),
              mock.patch.object(train, "have_matplotlib", lambda: False)):
            train.main(run_flags(bench, name, bench.device, *flags))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return text.getvalue(), step_losses(bench.path(name))


def step_losses(folder):
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [line["loss"] for line in lines if "loss" in line]


BF16, LORA = ("--dtype", "bfloat16"), ("--lora_rank", 8)
MODES = {  # name -> (flags, the float32 run on the CPU to compare with, largest difference)
    "bf16": (BF16, "full", 0.03),
    "bf16 LoRA checkpointing": ((*BF16, *LORA, "--gradient_checkpointing"), "lora", 0.03),
    "float32": (("--dtype", "float32"), "full", 0.01),
    "fp16": (("--dtype", "float16"), "full", 0.06),  # its first step may be skipped
    "bf16 LoRA": ((*BF16, *LORA), "lora", 0.03),
    "bf16 LoRA save_adapter": ((*BF16, *LORA, "--save_adapter"), "lora", 0.03),
}


def start_cpu_runs(bench):
    """Start the float32 runs on the CPU that the modes are compared with: {name: future}."""
    def run(name, *flags):
        command = [sys.executable, os.path.join(ROOT, "train.py"),
                   *run_flags(bench, f"cpu-{name}", CPU, "--dtype", "float32", *flags)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "",
                                    "OMP_NUM_THREADS": "1" if bench.tiny else "4"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return step_losses(bench.path(f"cpu-{name}"))

    return {"full": bench.pool.submit(run, "full"), "lora": bench.pool.submit(run, "lora", *LORA)}


def check_mode(bench, mode):
    flags, compared, bound = MODES[mode]
    expected = bench.cpu_runs[compared].result()
    output, losses = run_train(bench, "run-" + mode.replace(" ", "-"), *flags)
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    bench.expect(difference < bound, f"losses differ by {difference:.4f}")
    skipped = "skipped: its gradients overflow"  # the scale that float16 begins with is too high
    warned = [line for line in output.split("\n")
              if line.startswith("warning") and skipped not in line]
    bench.expect(not warned, f"{warned}")
    figures = {"loss": f"{losses[0]:.4f} to {losses[-1]:.4f}",
               "largest difference": f"{difference:.4f}"}
    if "--save_adapter" not in flags:  # which leaves no student to check
        figures["margin as saved"] = re.search(r"as saved: margin (\S+ of \S+)", output)[1]
    return figures


def check_gate(bench):
    """A cached reference that is another model's must stop the run at step 0."""
    cache = bench.path("cache-wrong")
    run_train(bench, "gate-right", *BF16, "--max_steps", 1, "--skip_saved_check", "--ref_cache_dir",
              cache)
    for entry in os.scandir(cache):
        tensors = load_file(entry.path)
        tensors["logps"] -= 30.0
        save_file(tensors, entry.path)
    try:
        run_train(bench, "gate", *BF16, "--ref_cache_dir", cache)
    except BadInput as error:
        found = re.search("at step 0[^;]*", str(error))
        return {"message": found[0]} | bench.control(True)
    return bench.control(False)


def check_resume(bench):
    """Six steps at once, twice, and with a stop after the third: equal to the bit?"""
    order, figures = train.learning_rate, {}

    def stopping(step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return order(step, *rest)

    def masters_of(name):
        return load_file(bench.path(name, "state", "step-00000006", "model.safetensors"))

    def difference(*names):
        first, second = map(masters_of, names)
        return max((first[name] - second[name]).abs().max().item() for name in first)

    kinds = ["bfloat16", "float32", "bfloat16 deterministic", "float32 deterministic"]
    for kind in kinds[:1 if bench.tiny else 4]:
        dtype, strict = kind.split()[0], "deterministic" in kind
        once, again, stopped = (f"resume-{kind}-{number}" for number in range(3))
        flags = "--dtype", dtype, "--max_steps", 6, "--skip_saved_check"
        torch.use_deterministic_algorithms(strict)
        try:
            run_train(bench, once, *flags)
            run_train(bench, again, *flags)
            with (mock.patch.object(train, "learning_rate", stopping),
                  contextlib.suppress(SystemExit)):
                run_train(bench, stopped, *flags)
            saved = os.listdir(bench.path(stopped, "state"))
            bench.expect(saved == ["step-00000003"], f"stopped with {saved}")
            run_train(bench, stopped, *flags, "--resume")
        finally:
            torch.use_deterministic_algorithms(False)
        others = difference(once, again), difference(once, stopped)
        figures[kind] = "again {:.1e}, resumed {:.1e}".format(*others)
        # Without deterministic kernels runs differ by the order of sums, which Adam widens to
        # the size of an update at most; under bfloat16 rounded copies then differ too.
        bench.expect(max(others) <= (0 if strict or not bench.cuda else 5e-3),
                     f"{kind}: {figures[kind]}")
    return figures


def check_compile(bench):
    """--compile: graphs, breaks and limits over ragged batches, and the same numbers as eager."""
    from torch._dynamo.utils import counters
    model = small_model("llama", bench.tiny)
    data = small_data(8 if bench.tiny else 48, 150, 600, seed=2)
    args = train_args(bench.device, "bfloat16", 600 if bench.tiny else 1500)
    torch._dynamo.reset()
    counters.clear()
    backend = "inductor" if bench.cuda else "eager"  # a CPU may have no C++ compiler
    logps, gradients = [], []
    for compiled in (False, True):
        policy = cast(model, torch.bfloat16, bench.device)
        if compiled:
            with mock.patch.object(torch, "compile",
                                   functools.partial(torch.compile, backend=backend)):
                models.compile_layers(policy)
        _, pairs, values = train.evaluate(policy, data, args)  # no gradients: as the reference
        step = Step(policy, args)
        step.backward(data)
        both = torch.stack([values["logps/chosen"], values["logps/rejected"]], 1).cpu()  # (P, 2)
        logps.append(both)
        gradients.append(torch.cat([master.grad.flatten() for master in step.masters.parameters()]))
    batches = len(micro_batches(data.pairs, range(len(data.pairs)), args.tokens_per_batch, True))
    breaks, limit = sum(counters["graph_break"].values()), compile_note()
    bench.expect(not limit and not breaks, f"{breaks} graph breaks; {limit}")
    tokens = torch.tensor([[*map(len, pair.answers)] for pair in pairs])  # (P, 2)
    noise = ((logps[1] - logps[0]).square() / tokens).mean().sqrt().item()
    cosine = F.cosine_similarity(*gradients, dim=0).item()
    bench.expect(noise < 0.1, f"log-probabilities differ by {noise:.1e} per token")
    bench.expect(cosine > 0.99, f"gradients have a cosine of {cosine:.4f}")
    return {"batches": batches, "graphs": counters["stats"]["unique_graphs"], "breaks": breaks,
            "noise per token": f"{noise:.1e}", "cosine of gradients": f"{cosine:.5f}"}


def check_leaks(bench):
    """Which lines of a step wait for the GPU; whether memory grows from step to step."""
    data, sizes, left = small_data(4 if bench.tiny else 16, 150, 600, seed=3), [], []
    step = small_step(bench, "bfloat16")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(10):
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("warn" if 3 <= number < 6 else "default")
            step(data)
            sizes.append(torch.cuda.memory_allocated())  # 0 on a CPU
    waits = collections.Counter(f"{os.path.relpath(each.filename, ROOT)}:{each.lineno}"
                                for each in caught if "synchroniz" in str(each.message))
    bench.expect(sizes[2] == sizes[9], "memory grows")
    bench.expect(all(where.startswith("bench/step_profile.py") for where in waits), "other waits")
    del step
    bench.free()
    before = torch.cuda.memory_allocated()

    def look(*_):  # what is left of policy, masters and optimizer when the student is loaded
        gc.collect()
        left.append(torch.cuda.memory_allocated() - before)
        return ""

    with mock.patch.object(train, "check_saved", look):
        run_train(bench, "leaks", *BF16)
    weights = sum(weight.nbytes for weight in models.load_model(models.TOY_STUDENT).parameters())
    bench.expect(left[0] < weights / 4, f"{left[0]} bytes are left before the saved check")
    return {"waits in 3 steps": " ".join(f"{where} x{n}" for where, n in waits.items()),
            "bytes after steps 3, 10": f"{sizes[2]}, {sizes[9]}",
            "bytes before the saved check": left[0], "bytes of the student": weights}


def check_overflow(bench):
    """float16 gradients that overflow: the step is skipped, the scale lowered, later ones taken."""
    data = small_data(4, 60, 120, seed=4)
    step, taken = small_step(bench, "float16", loss_scale=2.0**40), 0
    for _ in range(40):
        masters = step.masters.flat[0][0]
        before = masters.clone()
        _, norm = step(data)
        changed = not masters.equal(before)
        bench.expect(changed == math.isfinite(norm), "a step that overflowed was taken, or none")
        taken += changed
    scale = step.scaler.get_scale()
    bench.expect(0 < taken < 40 and scale < 2.0**40, "nothing was skipped, or everything")
    figures = {"skipped": 40 - taken, "taken": taken, "scale": f"{scale:g}"}
    if bench.cuda:
        scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**36)
        with mock.patch.object(torch.amp, "GradScaler", scaler):
            output, _ = run_train(bench, "overflow", "--dtype", "float16", "--max_steps", 30)
        warned = output.count("skipped: its gradients overflow")
        bench.expect(0 < warned < 30, f"train.py skipped {warned} of 30 steps")
        figures["skipped by train.py"] = warned
    return figures
