"""What only a GPU can show, in one command: correctness, speed, memory, and TRL beside it.

    python bench/gpu.py --out_dir gpu                   all checks, about 7 minutes on an H100
    python bench/gpu.py --only masks,rounding           checks or sections whose names begin so
    python bench/gpu.py --device cpu --tiny             the script itself, on a CPU

Each check prints a line and appends it to results.jsonl in --out_dir; GPU.md there is the table.
One that fails prints its traceback, is counted, and the next one starts: the exit code is the
number of failed ones. Checks that would not end within --seconds are skipped. "control caught"
says that the same check refused a computation that was made wrong on purpose.

correctness  gpu_checks.py
throughput   optimizer steps of random models with ragged rows. Tokens are those of the pairs,
             padding not counted. MFU counts the FLOPs that the layout needs, once (see
             step_profile.py), against the dense bfloat16 peak of an H100
memory       peaks of rows of equal length beside memory.py's predictions, and a card of 24 GB,
             imitated by a limit on what PyTorch may allocate
4 bits       --base_bits 4 on a card of 24 GB, imitated alike, and a 16-bit base without that limit;
             NF4's codes beside the CPU's, and how fast a matrix is dequantised
trl          DPO on the same rows, if --trl_python has TRL: pairs per second and peak memory
attention    one layer's attention alone, by kernel
"""
import argparse
import contextlib
import functools
import gc
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import NamedTuple
from unittest import mock

START = time.monotonic()
# For the runs that must repeat to the bit. It is the size that cuBLAS takes on an H100 anyway.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import rdpo  # noqa: E402
import train  # noqa: E402
from bench import gpu_checks, memory  # noqa: E402
from bench.gpu_checks import ragged_pairs  # noqa: E402
from bench.step_profile import PEAK, Step, count_flops, equal_pairs, make_data, timed  # noqa: E402
from data import batch_tokens, collate  # noqa: E402
from infra import checkpoint, models, nf4  # noqa: E402
from infra.command import first_line  # noqa: E402
from infra.policy import place  # noqa: E402
from infra.runlog import StagePeaks  # noqa: E402

SHAPES = memory.SHAPES
SHAPES["tiny"] = 64, 128, 2, 4, 2, 1024, True
SECONDS = {"correctness": 15, "throughput": 35, "memory": 60, "4 bits": 60, "trl": 110,
           "attention": 20}
GB = 1e9

# ------------------------------------------------------------------------------ checks and results


class Skip(Exception):
    """This machine cannot run the check. The text says why."""


class Check(NamedTuple):
    section: str  # SECONDS says what one of its checks takes on an H100
    name: str
    function: Callable  # (bench) -> {figure: value}


class Bench:
    """Runs checks one after the other and keeps their results."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.cuda, self.tiny = args.device == "cuda", args.tiny
        self.results, self.wrong, self.failed = [], [], 0
        self.measured = {}  # name of a throughput case -> its figures
        self.pool = ThreadPoolExecutor(4)  # for what needs the CPU only
        self.predict = functools.cache(functools.partial(self.pool.submit, predict_memory))
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
        began, self.wrong, figures, result = time.monotonic(), [], {}, "passed"
        try:
            if self.left() < SECONDS[check.section]:
                raise Skip(f"takes about {SECONDS[check.section]} s, {self.left():.0f} s are left")
            figures = check.function(self)
            if self.wrong:
                result = "failed: " + "; ".join(self.wrong)
        except Skip as reason:
            result = f"skipped: {reason}"
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            result = f"failed: {type(error).__name__}: {first_line(error)}"
            # Of a speed it is a measurement: this case does not fit this card.
            if isinstance(error, torch.OutOfMemoryError) and check.section == "throughput":
                result = "out of memory"
        self.record(check.section, check.name, began, result, figures)
        torch._dynamo.reset()
        self.free()

    def free(self):
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.limit_memory(math.inf)

    def limit_memory(self, size):
        if self.cuda:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))

    def record(self, section, name, began, result, figures):
        self.failed += result.startswith("failed")
        common = {"check": name, "seconds": round(time.monotonic() - began, 1), "result": result}
        self.results.append((section, common, figures))
        with open(os.path.join(self.args.out_dir, "results.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"section": section, **common, **figures}) + "\n")
        with open(os.path.join(self.args.out_dir, "GPU.md"), "w", encoding="utf-8") as file:
            file.write(markdown(self.head, self.results))
        print(f"[{time.monotonic() - START:5.0f} s] {section}, {name}: {result}, "
              f"{common['seconds']} s; {in_words(figures)}", flush=True)


def in_words(figures):
    return ", ".join(f"{name} {value}" for name, value in figures.items())


def markdown(head, results):
    """The results as Markdown, a table for each section."""
    parts = [head]
    for section in dict.fromkeys(section for section, *_ in results):
        rows = [common | ({"figures": in_words(figures)} if section == "correctness" else figures)
                for own, common, figures in results if own == section]
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names]
                                                for row in rows)]
        parts.append(f"\n## {section.capitalize()}\n\n")
        parts += ["| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ")
                                    for cell in line) + " |\n" for line in lines]
    return "".join(parts)


def machine(cuda):
    cpu = (f"{os.cpu_count()} CPU cores, torch {torch.__version__}, transformers "
           f"{transformers.__version__}")
    if not cuda:
        return cpu
    card = subprocess.check_output(["nvidia-smi", "--format=csv,noheader", "--query-gpu=name,"
                                    "driver_version,memory.free,memory.total"], text=True)
    return f"{card.splitlines()[0]}, cuDNN {torch.backends.cudnn.version()}, {cpu}"


# --------------------------------------------------------------------------------------- throughput


class Case(NamedTuple):
    shape: str
    tokens: int  # --tokens_per_batch
    pairs: int = 32  # per optimizer step
    lora: bool = False
    checkpointing: bool = False
    compile: bool = False
    bits: int = 0  # --base_bits
    head_power: int = 28  # rdpo.HEAD_BYTES is 2 to this

    @property
    def name(self):
        options = [f"head 2^{self.head_power}"] * (self.head_power != 28)
        options += ["4 bits"] * (self.bits == 4)
        options += ["LoRA"] * self.lora + ["checkpointing"] * self.checkpointing
        options += ["compiled"] * self.compile
        return " ".join([self.shape, *(options or ["full"]), str(self.tokens)])

    @property
    def flags(self):
        return (["--tokens_per_batch", str(self.tokens)] + ["--lora_rank", "16"] * self.lora
                + ["--gradient_checkpointing"] * self.checkpointing
                + ["--base_bits", "4"] * (self.bits == 4))

    @property
    def predictable(self):
        """Whether memory.py knows it."""
        return self.shape != "tiny" and self.head_power == 28 and not self.compile

    @property
    def vocab(self):
        return SHAPES[self.shape][5]

    def data(self, pairs, seed=0):
        lengths = dict(median=80, highest=200) if self.shape == "tiny" else {}
        return make_data(ragged_pairs(pairs, self.vocab, **lengths, seed=seed), self.vocab)


SMALL_CARD = Case("8b", 2048, 16, lora=True, checkpointing=True)
FIRST_CASES = [Case("1b", 8192), Case("smollm2-135m", 8192),
               Case("8b", 8192, lora=True, checkpointing=True), Case("8b", 8192, lora=True),
               Case("solar-10.7b", 16384, 48, lora=True, checkpointing=True)]
LATER_CASES = [Case("1b", 8192, compile=True), Case("8b", 8192, lora=True, compile=True),
               Case("smollm2-135m", 8192, compile=True),
               Case("1b", 8192, head_power=30), Case("1b", 8192, head_power=26),
               Case("smollm2-135m", 2048), Case("1b", 2048),
               Case("smollm2-135m", 16384), Case("1b", 16384),
               SMALL_CARD]
FOUR_BITS = [*(Case("solar-10.7b", tokens, 16, lora=True, checkpointing=True, bits=bits)
               for tokens in (2048, 8192) for bits in (4, 0))]
TINY_FOUR_BITS = [Case("tiny", 2048, 4, lora=True, checkpointing=True, bits=bits)
                  for bits in (4, 0)]
TINY_CASES = [Case("tiny", 2048, 4), Case("tiny", 2048, 4, lora=True, checkpointing=True)]


def build(shape, device):
    """A random model in bfloat16, made on the device."""
    torch.manual_seed(0)
    return memory.build(memory.parse(["--shape", shape]), device)


def take(model, case):
    """A Step of a case's model, which gets the adapters and what else the case asks for."""
    if case.bits:
        nf4.freeze_linears(model, model.device)
    args = gpu_checks.train_args(model.device, "bfloat16", case.tokens, *case.flags,
                                 *["--compile"] * case.compile)
    place(model, args, model.device, torch.bfloat16, rdpo.sequence_logps)
    return Step(model, args)


def measure_case(bench, case):
    """Steps of one case: pairs per second, MFU, where the time goes, peak memory."""
    with mock.patch.dict(rdpo.HEAD_BYTES, cuda=2**case.head_power):
        model = build(case.shape, bench.device)
        data = case.data((2 if case.lora else 4) * case.pairs)
        flops = count_flops(model, data.pairs)
        step = take(model, case)
        if case.bits:
            bench.free()
            bench.limit_memory(23 * GB)
        figures = speed_of(bench, case, step, data, flops)
        bench.measured[case.name] = figures
        if bench.cuda and case.predictable:
            measure_peak(bench, case, step)
    return figures


def speed_of(bench, case, step, data, flops):
    """The figures of optimizer steps over a Dataset. flops are those of all its pairs."""
    count = len(data.pairs) // case.pairs
    parts = [data.part(range(i * case.pairs, (i + 1) * case.pairs)) for i in range(count)]
    # Compiled layers meet all shapes, and so all their graphs, before the clock starts.
    warm = [timed(step, part) for part in parts[:2] + parts * case.compile]
    rounds = 1 if bench.tiny else max(1, math.ceil(3 / (warm[-1] * count)))  # 3 seconds or more
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = sum(timed(step, part) for part in rounds * parts) / rounds / count  # of a step
    batches = [[part.pairs[i] for i in indices] for part in parts for indices, _ in
               train.rank_batches(part.pairs, range(case.pairs), True, step.args)]
    real = sum(batch_tokens(pair, True) for pair in data.pairs)
    computed = sum(collate(batch, True).input_ids.numel() for batch in batches)
    flops *= 4 / 6 if case.lora else 1  # frozen weights: no dW
    loss = step.backward(parts[0])[0].sum().item()  # of preference and imitation
    bench.expect(math.isfinite(loss), f"loss {loss}")
    figures = {"pairs/s": f"{case.pairs / seconds:.2f}",
               "tokens/s": f"{real / count / seconds:.0f}",
               "MFU": f"{flops / count / seconds / PEAK:.1%}", "ms a step": f"{1e3 * seconds:.0f}",
               "batches": f"{len(batches) / count:g}", "real/computed": f"{real / computed:.3f}",
               "clip+AdamW ms": f"{1e3 * timed(step.update):.1f}",
               "round ms": f"{1e3 * timed(step.round):.1f}", "warm-up s": f"{sum(warm):.1f}"}
    if bench.cuda:
        figures["allocated GB"] = f"{torch.cuda.max_memory_allocated() / GB:.1f}"
        figures |= kernels_of(step, parts[0])
    return figures


def kernels_of(step, part):
    """Kernels of one step: their number, share of the time, the five largest."""
    seconds = timed(step, part)  # the profiler itself takes time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed(step, part)
    kernels = sorted((event for event in profile.key_averages()
                      if event.device_type == torch.autograd.DeviceType.CUDA),
                     key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)  # microseconds
    return {"GPU busy": f"{total / 1e6 / seconds:.0%}",
            "kernels a step": sum(event.count for event in kernels),
            "kernels": "; ".join(f"{event.self_device_time_total / total:.0%} {event.key[:50]}"
                                 for event in kernels[:5])}


# ------------------------------------------------------------------------------------------- memory


def predict_memory(case):
    """{stage of a run: GB} by memory.py."""
    command = [sys.executable, memory.__file__, "--shape", case.shape, *case.flags]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    stages = printed.stdout.split("\n")[1].rpartition(":")[0]
    return {name.replace("step", "training"): float(size)
            for name, size in re.findall(r"(\w+) ([\d.]+)", stages)}


def measure_peak(bench, case, step):
    """Record the peak of two full micro-batches of equal rows, as memory.py assumes."""
    began = time.monotonic()
    data = make_data(equal_pairs(2 * case.tokens // 1024, case.vocab, 512, 256), case.vocab)
    torch.cuda.reset_peak_memory_stats()
    step(data)
    allocated = torch.cuda.max_memory_allocated() / GB
    predicted = bench.predict(case).result()["training"]
    ratio = predicted / allocated
    bench.record("memory", case.name, began,
                 "passed" if 0.9 <= ratio <= 1.1 else "failed: off by more than a tenth",
                 {"allocated GB": f"{allocated:.2f}", "predicted GB": predicted,
                  "predicted/allocated": f"{ratio:.2f}"})


def check_small_card(bench):
    """8B LoRA with checkpointing on what a 24 GB card has: steps, export, the saved check."""
    case = TINY_CASES[1] if bench.tiny else SMALL_CARD
    bench.limit_memory(23 * GB)
    peaks, figures = StagePeaks(bench.device), {}
    step = take(build(case.shape, bench.device), case)
    args = step.args
    args.out_dir = bench.path("student")
    os.mkdir(args.out_dir)
    weights_before = models.sample_weights(dict(step.model.named_parameters()))
    data, val = case.data(2 * case.pairs), case.data(8, seed=9)
    halves = data.part(range(case.pairs)), data.part(range(case.pairs, 2 * case.pairs))
    peaks.end("start")
    figures["6 steps s"] = f"{sum(timed(step, part) for part in 3 * halves):.1f}"
    metrics = train.evaluate(step.model, val, args)[0]
    peaks.end("training")
    figures["export s"] = "{:.1f}".format(timed(
        checkpoint.export, step.model, step.masters, models.load_tokenizer(models.TOY_STUDENT),
        torch.bfloat16, weights_before, args))
    peaks.end("export")
    del step
    gc.collect()
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        figures["check s"] = f"{timed(train.check_saved, val, metrics, args):.1f}"
    peaks.end("check")
    figures["margin as saved"] = re.search("margin (.*?) \\(", text.getvalue())[1]
    bench.expect("warning" not in text.getvalue(), text.getvalue())
    for stage, peak in peaks.gigabytes.items():  # on CUDA
        figures[f"{stage} GB"] = f"{peak:.2f}"
        figures[f"predicted {stage} GB"] = bench.predict(case).result()[stage]
    return figures


# ------------------------------------------------------------------------------------------- 4 bits


def check_nf4(bench):
    """The device's NF4 is the CPU's; GB of 16-bit weights dequantised per second."""
    shape = (64, 256) if bench.tiny else (14336, 4096)  # SOLAR's largest
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = nf4.quantise(weight)
    parts = [*nf4.quantise(weight.to(bench.device)), nf4.TABLE.to(bench.device)]
    differ = sum((own.cpu() != right).sum().item() for own, right in zip(parts, expected))
    bench.expect(differ == 0, f"{differ} codes, scales and steps differ")
    like = torch.zeros((), dtype=torch.bfloat16, device=bench.device)

    def error():
        return (nf4.dense(parts, like, shape[1]).cpu() - weight).norm() / weight.norm()

    right = error().item()
    bench.expect(right < 0.1, f"weights are off by {right:.3f}")
    seconds = min(timed(nf4.dense, parts, like, shape[1]) for _ in range(13))
    parts[0] = parts[0] << 4 | parts[0] >> 4  # two nibbles exchanged
    return {"differ": differ, "error": f"{right:.4f}", "dequantise ms": f"{1e3 * seconds:.2f}",
            "GB/s": f"{2 * weight.numel() / seconds / GB:.0f}"} | bench.control(error() > 0.1)


# -------------------------------------------------------------------------------------- beside TRL


TRL_SETTINGS = [  # (name, more of DPOConfig, dtype of the weights)
    ("its defaults", {}, "float32"),
    *((name, {"precompute_ref_log_probs": True, "gradient_checkpointing": False}, dtype)
      for name, dtype in (("reference precomputed, no checkpointing", "float32"),
                          ("the same, bf16 weights, no masters", "bfloat16")))]


def check_trl(bench):
    """TRL's DPO on the rows of the throughput cases: the same pairs per step, no wider batches."""
    python = bench.args.trl_python or sys.executable
    look = "import importlib.util as u; assert u.find_spec('trl') and u.find_spec('datasets')"
    if subprocess.run([python, "-c", look], capture_output=True).returncode:
        raise Skip(f"{python} has no trl or no datasets")
    cases = TINY_CASES[:1] if bench.tiny else [FIRST_CASES[1], FIRST_CASES[0]]
    runs, jobs = list(itertools.product(cases, TRL_SETTINGS)), []
    for case in cases:
        if case.name not in bench.measured:
            measure_case(bench, case)
            bench.free()
        save_for_trl(bench, case)
    for case, (_, config, weights) in runs:
        one = min(8, case.pairs)
        rows = [{name: getattr(pair, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
                for pair in case.data(4 * case.pairs).pairs]
        jobs.append({"model": bench.path(case.shape), "rows": rows, "learning_rates": [1e-6] * 4,
                     "batch_size": one, "beta": 0.1, "max_length": 10**6, "weights": weights,
                     "device": bench.args.device,
                     "config": config | {"gradient_accumulation_steps": case.pairs // one,
                                         "bf16": bench.cuda or weights == "bfloat16"}})
    with open(bench.path("jobs.json"), "w", encoding="utf-8") as file:
        json.dump(jobs, file)
    began = time.monotonic()
    process = subprocess.run([python, os.path.join(ROOT, "bench", "trl_dpo.py"), file.name],
                             stdout=subprocess.PIPE, text=True, timeout=max(bench.left(), 30),
                             env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    bench.expect(process.returncode == 0, f"the process ended with {process.returncode}")
    answers = [json.loads(line) for line in process.stdout.split("\n")
               if line.startswith('{"trl"')]
    for (case, (name, *_)), answer in zip(runs, answers):
        result, figures = "out of memory", {}
        if not answer.get("out_of_memory"):
            seconds, ours = answer["seconds"][1:], bench.measured[case.name]  # the first warms up
            rate = case.pairs * len(seconds) / sum(seconds)
            result = "measured"
            figures = {"TRL pairs/s": f"{rate:.2f}", "TRL GB": f"{answer['peak_bytes'] / GB:.1f}",
                       "ours pairs/s": ours["pairs/s"], "ours GB": ours.get("allocated GB", ""),
                       "ours/TRL": f"{float(ours['pairs/s']) / rate:.2f}"}
        bench.record("trl", f"{case.name}, TRL {answer['trl']}, {name}", began, result, figures)
    return {"runs": f"{len(answers)} of {len(jobs)}"}


def save_for_trl(bench, case):
    model, tokenizer = build(case.shape, bench.device), models.load_tokenizer(models.TOY_STUDENT)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(bench.path(case.shape))
    tokenizer.save_pretrained(bench.path(case.shape))


# ---------------------------------------------------------------------------------- attention alone


def check_attention(bench):
    """Milliseconds of one 8B layer's attention, forward and backward; rows of one pair."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    flex = torch.compile(flex_attention, dynamic=False)
    for width in (512, 1024, 2048):
        rows, began, figures = 8192 // width, time.monotonic(), {}
        tensors = torch.randn(4, rows, 32, width, 128, device=bench.device, dtype=torch.bfloat16)
        batch = gpu_checks.mask_rows(rows, width).to(bench.device)
        additive = gpu_checks.mask_of(batch, torch.bfloat16, bench.device)
        segments = batch.segments

        def visible(b, h, query, key):
            mine, theirs = segments[b, query], segments[b, key]
            return ((query >= key) & (mine // 3 == theirs // 3)
                    & ((theirs % 3 == 0) | (mine == theirs)))

        blocks = create_block_mask(visible, rows, None, width, width, device=bench.device)
        ways = {"additive mask": gpu_checks.masked(additive),
                "bool mask": gpu_checks.masked(additive == 0),
                "causal flash": functools.partial(scaled_dot_product_attention, is_causal=True),
                "flex": functools.partial(flex, block_mask=blocks)}
        for name, way in ways.items():
            seconds = [timed(gpu_checks.attend, tensors, way) for _ in range(13)]
            figures[f"{name} ms"] = f"{1e3 * min(seconds):.2f}"
        bench.record("attention", f"8b, {rows} rows of {width}", began, "measured", figures)
    return {}


# ------------------------------------------------------------------------------------------ the day


def all_checks(tiny, cuda):
    """Every Check, the most valuable first."""
    def correct(name, function, **options):
        return Check("correctness", name, functools.partial(function, **options))

    def speed(cases):
        return [Check("throughput", case.name, functools.partial(measure_case, case=case))
                for case in cases]

    checks = gpu_checks
    left_out = ["float32", "bf16 LoRA"] * tiny + ["fp16"] * (not cuda)  # train.py's is CUDA's only
    modes = [correct(f"train.py {mode}", checks.check_mode, mode=mode)
             for mode in checks.MODES if mode not in left_out]
    return [correct("start", checks.check_start), correct("masks", checks.check_masks),
            correct("logps", checks.check_logps), correct("gradients", checks.check_gradients),
            correct("rounding", checks.check_rounding), *modes[:2],
            correct("step-0 gate", checks.check_gate), *modes[2:],
            *speed(TINY_CASES if tiny else FIRST_CASES), Check("trl", "runs", check_trl),
            Check("memory", f"24 GB card, {SMALL_CARD.name}", check_small_card),
            Check("4 bits", "NF4", check_nf4),
            *[Check("4 bits", case.name, functools.partial(measure_case, case=case))
              for case in (TINY_FOUR_BITS if tiny else FOUR_BITS)],
            correct("resume", checks.check_resume), correct("compile", checks.check_compile),
            correct("leaks and syncs", checks.check_leaks),
            correct("fp16 overflow", checks.check_overflow), *speed([] if tiny else LATER_CASES),
            *[Check("attention", "kernels of 8b", check_attention)] * cuda]


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
    words = tuple(only.split(",")) if only else ""
    return [check for check in checks
            if check.name.startswith(words) or check.section.startswith(words)]


def main(argv=None):
    args = get_args(argv)
    if args.tiny:
        torch.set_num_threads(1)  # more would wait for each other over such small tensors
    bench, line = Bench(args), machine(args.device == "cuda")
    bench.head = f"# On a GPU\n\n{line}. {date.today()}. Printed by bench/gpu.py.\n"
    print(line, flush=True)
    checks = selected(all_checks(bench.tiny, bench.cuda), args.only)
    try:
        if any(check.name.startswith("train.py") for check in checks):
            bench.cpu_runs = gpu_checks.start_cpu_runs(bench)
        for case in FIRST_CASES + FOUR_BITS + LATER_CASES:  # a prediction takes 20 s
            if case.predictable and any(case.name in check.name for check in checks):
                bench.predict(case)
        for check in checks:
            bench.run(check)
    finally:
        bench.pool.shutdown(cancel_futures=True)
        shutil.rmtree(bench.work)
    print("\n" + markdown(bench.head, bench.results))
    print(f"{len(bench.results)} results, {bench.failed} failed, {time.monotonic() - START:.0f} s")
    return min(bench.failed, 100)


if __name__ == "__main__":
    sys.exit(main())
