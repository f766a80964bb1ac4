"""What a 16-bit student keeps of its training: train.py's and TRL's, read back from the folder.

    python bench/sixteen_bits.py --data scored.jsonl [--model DIR] [--only ours|trl]

The student is --model rounded to bfloat16, as most students on the hub are stored. A fifth of the
rows is for validation. Each line of the table is a run with the same rows, order and learning
rates. What is saved in float32 is shown a second time, cast to bfloat16 by transformers.

    trained   by the trainer itself, in its compute dtype: the validation loss four times during
              the run (TRL: at its end), and the margin at its end
    saved     by one reader for both trainers: float32 forward passes of the weights in the folder
    margin    log pi - log ref of the chosen answer minus that of the rejected one: nats, before
              beta, mean over the validation pairs
    kept      saved margin / trained margin
    changed   share of the weights that differ from the student's

--emulate is for CPUs without bfloat16 units, which would take hours: bfloat16 products are computed
in float32 and rounded once, as a GPU's are.

TRL has no rDPO, so plain DPO is compared with it. Its virtual environment is made at the first run
in ~/.cache/rdpo/trl, or given with --trl_python.
"""
import argparse
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import epoch_order, load_pairs  # noqa: E402
from infra.models import load_tokenizer  # noqa: E402
from infra.rows import read_rows  # noqa: E402

CACHE, BETA = os.path.expanduser("~/.cache/rdpo"), 0.1
parser = argparse.ArgumentParser(description="What a 16-bit student keeps of its training.")
parser.add_argument("--data", required=True, help="scored rows")
parser.add_argument("--model", default=f"{CACHE}/smollm2-135m",
                    help="a model's folder (default: the one that the tests marked real fetch)")
parser.add_argument("--trl_python", help="Python of an environment that has TRL (default: made)")
parser.add_argument("--steps", type=int, default=12, help="at most one epoch")
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--learning_rate", type=float, default=5e-6, help="10 times that with LoRA")
parser.add_argument("--max_length", type=int, default=128)
parser.add_argument("--only", choices=("ours", "trl"))
parser.add_argument("--emulate", action="store_true", help="of ours: bfloat16 products in float32")
args = parser.parse_args()
transformers.logging.disable_progress_bar()

FP32, BF16 = ["--save_dtype", "float32"], ["--save_dtype", "bfloat16"]
LORA = ["--lora_rank", 16, "--learning_rate", 10 * args.learning_rate]
RDPO_RUNS = {
    "rdpo, float32": FP32,
    "rdpo, float32, saved in bf16": BF16,
    "rdpo, float32, saved in bf16, seed 1": [*BF16, "--seed", 1],
    "rdpo, LoRA, merged in float32": [*LORA, *FP32],
    "rdpo, LoRA, merged into bf16": [*LORA, *BF16],
    "rdpo, --dtype bfloat16, saved in bf16": [*BF16, "--dtype", "bfloat16"],
    "rdpo, LoRA, --dtype bfloat16, saved in bf16": [*LORA, *BF16, "--dtype", "bfloat16"],
    "old way: --dtype bfloat16, to nearest": [*BF16, "--dtype", "bfloat16"]}
DPO_RUNS = {"dpo, float32": ["--loss", "dpo", *FP32],
            "dpo, --dtype bfloat16, saved in bf16": ["--loss", "dpo", *BF16, "--dtype", "bfloat16"]}
TRL_RUNS = {"float32 weights, autocast (default)": "float32", "bf16 weights": "bfloat16"}

# The old way, as a control: compute copies and saved weights are rounded to nearest.
OLD_WAY = """
import sys
sys.path.insert(0, sys.argv[1])
import infra.checkpoint, infra.rounding, train
def nearest(weight, dtype, *seed, start=0, out=None):
    return weight.to(dtype) if out is None else out.copy_(weight.to(dtype))
infra.checkpoint.stochastic_round = infra.rounding.stochastic_round = nearest
"""

EMULATED = """
import sys, torch, torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
linear, attend = F.linear, F.scaled_dot_product_attention
matmul, addmm_ = torch.Tensor.__matmul__, torch.Tensor.addmm_
def wide(tensor):
    return tensor.float() if tensor is not None and tensor.dtype == torch.bfloat16 else tensor
F.linear = lambda x, weight, bias=None: linear(wide(x), wide(weight), wide(bias)).to(x.dtype)
F.scaled_dot_product_attention = lambda q, k, v, attn_mask=None, **options: attend(
    wide(q), wide(k), wide(v), attn_mask=wide(attn_mask), **options).to(q.dtype)
torch.Tensor.__matmul__ = lambda a, b: matmul(wide(a), wide(b)).to(a.dtype)
torch.Tensor.addmm_ = lambda total, a, b: total.copy_(wide(total) + matmul(wide(a), wide(b)))
"""
TRAIN = "import sys; sys.path.insert(0, sys.argv[1]); import train; train.main(sys.argv[2:])"


def run(*command):
    """The output of a process. Ends this one if it fails."""
    command = [str(word) for word in command]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"failed: {' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def cast_to_bf16(source, target):
    """Save the model of a folder in bfloat16, rounded to nearest. Returns the new folder."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    return target


@torch.no_grad()
def read(folder, pairs):
    """(log pi (2, P) of chosen and rejected answers, {name: weight}) of a saved model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logp(prompt_ids, answer_ids):
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0, :-1]  # (T-1, V)
        logps = logits[len(prompt_ids) - 1:].log_softmax(-1)  # (N, V)
        return logps[range(len(answer_ids)), answer_ids].double().sum()

    logps = [(logp(pair.prompt_ids, pair.chosen_ids), logp(pair.prompt_ids, pair.rejected_ids))
             for pair in pairs]
    return torch.tensor(logps).T, dict(model.named_parameters())


def show(name, folder, losses, trained_margin, student, pairs, tau):
    """Print the line of a saved model; if it is float32, also of its bfloat16 cast."""
    (ref_logps, ref_weights), (logps, weights) = student, read(folder, pairs)
    chosen, rejected = logps - ref_logps  # (P,) each
    margins = chosen - rejected  # (P,)
    loss = F.binary_cross_entropy_with_logits(BETA * margins, tau)
    changed = sum((weights[key] != before).sum().item() for key, before in ref_weights.items())
    changed /= sum(weight.numel() for weight in weights.values())
    losses_shown = " ".join(f"{loss:.3f}" for loss in losses)
    print(f"{name:46s}  {losses_shown:>23s}  {trained_margin:+6.2f} | {loss:11.3f}  "
          f"{margins.mean():+6.2f}  {margins.mean() / trained_margin:5.0%}  {changed:7.1%}",
          flush=True)
    if AutoConfig.from_pretrained(folder).dtype == torch.float32:
        show("    the same, cast to bf16", cast_to_bf16(folder, f"{folder}/cast"), losses,
             trained_margin, student, pairs, tau)


def train(folder, name, flags, *shown_with):
    """Run train.py on the files of a folder and show its student. Returns its learning rates."""
    out_dir = f"{folder}/ours"
    program = [OLD_WAY] * name.startswith("old way") + [EMULATED] * args.emulate + [TRAIN]
    program = ["-c", "\n".join(program), ROOT]
    run(sys.executable, *program, "--model", f"{folder}/student", "--data", f"{folder}/train.jsonl",
        "--eval_data", f"{folder}/validation.jsonl", "--ref_cache_dir", f"{folder}/cache",
        "--out_dir", out_dir, "--overwrite", "--device", "cpu", "--max_length", args.max_length,
        "--beta", BETA, "--tau_temperature", 1, "--batch_size", args.batch_size, "--max_steps",
        args.steps, "--learning_rate", args.learning_rate, "--save_every", 10**6, "--eval_every",
        max(args.steps // 4, 1), "--max_new_tokens", 1, "--skip_saved_check", *flags)
    shutil.rmtree(f"{out_dir}/state")
    with open(f"{out_dir}/metrics.jsonl", encoding="utf-8") as file:
        lines = [line for line in map(json.loads, file) if line["step"]]
    evaluations = [line for line in lines if "eval/loss" in line]
    show(name, out_dir, [line["eval/loss"] for line in evaluations],
         evaluations[-1]["eval/rewards/margins"] / BETA, *shown_with)
    return [line["lr"] for line in lines if "lr" in line]


def train_trl(folder, name, weights, rates, train_pairs, pairs, *shown_with):
    """Run TRL's DPOTrainer on the same tokens and show its student."""
    rows, validation = ([{"prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids,
                          "rejected_ids": pair.rejected_ids} for pair in part]
                        for part in (train_pairs, pairs))
    job = {"model": f"{folder}/student", "rows": [rows[i] for i in epoch_order(len(rows), 0, 0)],
           "validation": validation, "learning_rates": rates, "batch_size": args.batch_size,
           "beta": BETA, "max_length": args.max_length, "weights": weights,
           "save": f"{folder}/trl", "config": {"bf16": True, "gradient_checkpointing": False}}
    with open(f"{folder}/job.json", "w", encoding="utf-8") as file:
        json.dump(job, file)
    output = run(args.trl_python or f"{CACHE}/trl/bin/python", f"{ROOT}/bench/trl_dpo.py",
                 f"{folder}/job.json")
    answer = json.loads(output.strip().splitlines()[-1])
    trained = answer["validation"]
    show(f"trl {answer['trl']}, {name}", job["save"], [trained["eval_loss"]],
         trained["eval_rewards/margins"] / BETA, *shown_with)


def main(folder):
    tokenizer = load_tokenizer(args.model)
    tokenizer.save_pretrained(cast_to_bf16(args.model, f"{folder}/student"))
    rows = [row for _, row in read_rows(args.data)]
    random.Random(0).shuffle(rows)
    count, parts = round(len(rows) / 5), {}
    for name, part in (("validation", rows[:count]), ("train", rows[count:])):
        with open(f"{folder}/{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
        parts[name], _ = load_pairs(file.name, tokenizer, args.max_length, needs_scores=True)
    pairs, train_pairs = parts.values()
    if (args.steps - 1) * args.batch_size >= len(train_pairs):
        sys.exit(f"--steps {args.steps}: more than one epoch of {len(train_pairs)} pairs")
    tau = torch.sigmoid(torch.tensor([pair.score_gap for pair in pairs], dtype=torch.double))  # T 1
    student = read(f"{folder}/student", pairs)
    print(f"{os.path.basename(args.model)} rounded to bf16; {len(train_pairs)} pairs to train on, "
          f"{len(pairs)} for validation; {args.steps} steps\nof {args.batch_size}, learning rate "
          f"{args.learning_rate:g}, beta {BETA}, rows of at most {args.max_length} tokens; CPU, "
          f"torch {torch.__version__},\ntransformers {transformers.__version__}, "
          f"{datetime.date.today()}\n\n{'run':46s}  {'trained: loss meanwhile':>23s}  margin | "
          "saved: loss  margin  kept  changed", flush=True)
    if args.only != "trl":
        for name, flags in RDPO_RUNS.items():
            train(folder, name, flags, student, pairs, tau)
    if args.only != "ours":
        if not args.trl_python and not os.path.exists(f"{CACHE}/trl"):
            run(sys.executable, "-m", "venv", f"{CACHE}/trl")
            run(f"{CACHE}/trl/bin/python", "-m", "pip", "install", "torch==2.13.0",
                "transformers>=5.10,<6", "trl")
        for name, flags in DPO_RUNS.items():
            rates = train(folder, name, flags, student, pairs, torch.ones_like(tau))
        for name, weights in TRL_RUNS.items():
            train_trl(folder, name, weights, rates, train_pairs, pairs, student, pairs,
                      torch.ones_like(tau))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
