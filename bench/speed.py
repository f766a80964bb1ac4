"""This trainer and Hugging Face TRL's DPOTrainer in turn: the same model, rows, order, learning rates, optimizer, batch, fp32 on the CPU.

    python bench/speed.py                               everything; some 25 minutes on two cores
    python bench/speed.py --only trl|vocabulary|rows    one of the three tables

trl         throughput, peak memory and losses of plain DPO beside TRL's, with its defaults, without gradient checkpointing, and with the
            reference's log-probabilities precomputed; then how many reference passes a second run with another beta takes
vocabulary  peak memory beyond weights, gradients and optimizer, for vocabularies of 4,000 and 152,000: what is needed, where freed
            memory goes back to the system at once, and what is taken, where the C library keeps some of it
rows        microseconds per token for files of 1,000 to 16,000 rows

TRL lives in a virtual environment of its own, made at the first run, or given with --trl_python. The rows' texts are those of --data, its
prompts, chosen and rejected answers each joined and cut into pieces of the length asked for. A pair counts as the tokens that its two
answers have, each with its own copy of the prompt, whatever a trainer computes; its time is the median of the steps after the first.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import epoch_order, load_pairs, prompt_text  # noqa: E402
from infra.models import TOY_STUDENT, load_tokenizer  # noqa: E402
from infra.rows import read_rows  # noqa: E402

CACHE = os.path.expanduser("~/.cache/rdpo")
parser = argparse.ArgumentParser(description="Speed and memory, beside TRL's.")
parser.add_argument("--only", choices=("trl", "vocabulary", "rows"))
parser.add_argument("--model", default=f"{CACHE}/smollm2-135m", help="a model's folder (default: the one that the tests marked real fetch)")
parser.add_argument("--data", default=f"{ROOT}/toy/scored.jsonl", help="where the rows' text comes from")
parser.add_argument("--trl_python", help="Python of an environment that has TRL (default: one is made in ~/.cache/rdpo/trl)")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--prompt_tokens", type=int, default=300)
parser.add_argument("--answer_tokens", type=int, default=150)
parser.add_argument("--threads", type=int, default=os.cpu_count())
args = parser.parse_args()


def run(command, **environment):
    """(the output, peak resident memory in MiB) of a process."""
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)} | environment)
        _, status, usage = os.wait4(child.pid, 0)
        output.seek(0)
        if status:
            sys.exit(f"failed: {' '.join(command)}")
        return output.read(), usage.ru_maxrss / 1024


def train(folder, name, *flags):
    """Runs train.py on folder/rows.jsonl: (its output, the metrics of its steps, peak memory in MiB)."""
    out_dir = f"{folder}/{name}"
    output, peak = run([sys.executable, f"{ROOT}/train.py", "--data", f"{folder}/rows.jsonl", "--eval_data", f"{folder}/held_out.jsonl", "--device", "cpu",
                        "--loss", "dpo", "--max_new_tokens", "1", "--eval_every", "1000000", "--save_every", "1000000", "--cache_dir", f"{folder}/cache",
                        "--out_dir", out_dir, *map(str, flags)])
    with open(f"{out_dir}/metrics.jsonl", encoding="utf-8") as file:
        return output, [line for line in map(json.loads, file) if "loss" in line], peak


def write(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_rows(tokenizer, count):
    """Rows of the lengths asked for: the texts of --data, each kind joined, then cut."""
    around = len(tokenizer(prompt_text(tokenizer, ""), add_special_tokens=False).input_ids)  # what the chat template adds
    rows = [{} for _ in range(count)]
    for key, length in (("prompt", args.prompt_tokens - around), ("chosen", args.answer_tokens - 1), ("rejected", args.answer_tokens - 1)):
        texts = [row[key] if isinstance(row[key], str) else row[key][-1]["content"] for _, row in read_rows(args.data)]
        ids = tokenizer("\n".join(texts), add_special_tokens=False).input_ids
        for i, row in enumerate(rows):
            start = i * length % (len(ids) - length)
            row[key] = tokenizer.decode(ids[start:start + length])
    return rows


def beside_trl(folder):
    python = args.trl_python or f"{CACHE}/trl/bin/python"
    if not os.path.exists(python):
        subprocess.run([sys.executable, "-m", "venv", f"{CACHE}/trl"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", "transformers>=5.10,<6", "trl"], check=True)
    tokenizer = load_tokenizer(args.model)
    rows = make_rows(tokenizer, args.steps * args.batch_size)
    write(f"{folder}/rows.jsonl", rows)
    write(f"{folder}/held_out.jsonl", rows[:1])
    pairs, _ = load_pairs(f"{folder}/rows.jsonl", tokenizer, 10**6, needs_scores=False)
    common = ["--model", args.model, "--batch_size", args.batch_size, "--max_steps", args.steps, "--learning_rate", "1e-5"]
    runs = {}  # name: losses, seconds of the steps after the first, peak memory
    for name, flags in (("rdpo", []), ("rdpo, one pair a batch", ["--tokens_per_batch", 1]),
                        ("rdpo, one pair, checkpointing", ["--gradient_checkpointing", "--tokens_per_batch", 1])):
        output, steps, peak = train(folder, f"out{len(runs)}", *common, *flags)
        if not runs:  # the reference is computed by the first run only
            reference = float(re.search(r"reference computed for \d+ in ([\d.]+) s", output)[1])
        runs[name] = [step["loss"] for step in steps], [step["step_seconds"] for step in steps[1:]], peak
    output, *_ = train(folder, "again", *common, "--max_steps", 1, "--beta", 0.5)
    again = int(re.search(r"reference computed for (\d+) in", output)[1])
    job = {"model": args.model, "batch_size": args.batch_size, "beta": 0.1, "max_length": 10**6, "learning_rates": [step["lr"] for step in steps]}
    end = tokenizer.eos_token  # as text that already carries the chat template, TRL adds the end-of-turn token only
    job["rows"] = [{"prompt": tokenizer.decode(pairs[i].prompt_ids), "chosen": tokenizer.decode(pairs[i].chosen_ids).removesuffix(end),
                    "rejected": tokenizer.decode(pairs[i].rejected_ids).removesuffix(end)} for i in epoch_order(len(pairs), 0, 0)]
    for name, config in (("its defaults", {}), ("no checkpointing", {"gradient_checkpointing": False}),
                         ("reference precomputed", {"precompute_ref_log_probs": True}),
                         ("reference precomputed, no checkpointing", {"precompute_ref_log_probs": True, "gradient_checkpointing": False})):
        with open(f"{folder}/job.json", "w", encoding="utf-8") as file:
            json.dump(job | {"config": config}, file)
        output, peak = run([python, f"{ROOT}/bench/trl_dpo.py", f"{folder}/job.json"])
        answer = json.loads(output.strip().splitlines()[-1])
        runs[f"trl {answer['trl']}, {name}"] = answer["losses"], answer["seconds"][1:], peak

    tokens = sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    assert sum(answer["tokens"]) == tokens, "the two trainers do not read the same tokens"
    tokens /= len(pairs)  # of a pair
    print(f"{len(pairs)} pairs of {tokens:.0f} tokens, {args.batch_size} per step, {args.threads} threads; medians of {args.steps - 1} steps\n")
    print("trainer                                              pairs/s  tokens/s  peak MiB  losses")
    for name, (losses, seconds, peak) in runs.items():
        rate = args.batch_size / statistics.median(seconds)
        print(f"{name:52s} {rate:7.3f}  {rate * tokens:8.1f}  {peak:8.0f}  {' '.join(f'{loss:.4f}' for loss in losses)}")

    def pairs_per_second(name, reference=0.0):
        return 1 / (statistics.median(runs[name][1]) / args.batch_size + reference / (len(pairs) + 1))

    print(f"\nrdpo's reference: {reference:.1f} s for {len(pairs) + 1} pairs in the first run, {again} pairs in a second one with another beta")
    print("\nrdpo over trl                                        first epoch, reference included  later epochs  peak memory")
    for ours in [name for name in runs if name.startswith("rdpo")]:
        for theirs in [name for name in runs if name.startswith("trl")]:
            once, then = (pairs_per_second(ours, seconds) / pairs_per_second(theirs) for seconds in (reference, 0.0))
            print(f"{ours:30s} {theirs:50s} {once:5.2f} {then:5.2f} {runs[ours][2] / runs[theirs][2]:5.2f}")
    losses = [run[0] for run in runs.values()]
    print(f"largest difference between two losses: {max(max(step) - min(step) for step in zip(*losses)):.1e}")


VOCABULARY = """
import resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sys.path.insert(0, sys.argv[1])
from data import Pair, collate, micro_batches
from rdpo import sequence_logps
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=int(sys.argv[2]), hidden_size=256, intermediate_size=768, num_hidden_layers=16,
                                     num_attention_heads=4, tie_word_embeddings=True)).eval()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
pairs = [Pair("", "", *torch.randint(4000, (600,)).split([300, 150, 150]), None, None) for _ in range(8)]
pairs = [Pair("", "", *(ids.tolist() for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)), None, None) for pair in pairs]
for _ in range(3):
    for batch in micro_batches(pairs, range(8), 2400, True):
        sequence_logps(model, collate([pairs[i] for i in batch], True)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 16 * sum(weight.numel() for weight in model.parameters()) / 2**20)
"""


def vocabulary():
    print("peak MiB beyond weights, gradients and optimizer, by how the C library treats freed memory")
    print("vocabulary   weights, gradients, optimizer   gives it back   keeps it (its default)")
    beyond = []  # (gives it back, keeps it) of each vocabulary
    for size in (4_000, 152_000):
        command = [sys.executable, "-c", VOCABULARY, ROOT, str(size)]
        outputs = [run(command, MALLOC_MMAP_THRESHOLD_="65536")[0], run(command)[0]]
        peaks, (held, _) = zip(*(map(float, output.split()) for output in outputs))
        beyond.append([peak - held for peak in peaks])
        print(f"{size:10d}   {held:29.0f}   {beyond[-1][0]:13.0f}   {beyond[-1][1]:8.0f}")
    print("growth " + " ".join(f"{large / small - 1:+.1%}" for small, large in zip(*beyond)))


def rows_and_time(folder):
    print("rows      microseconds per token, median of 30 steps of the toy student")
    rows = [row for _, row in read_rows(f"{ROOT}/toy/scored.jsonl")]
    write(f"{folder}/held_out.jsonl", rows[:1])
    for count in (1_000, 4_000, 16_000):
        write(f"{folder}/rows.jsonl", [row | {"prompt": f"{row['prompt']} ({i // len(rows)})"} for i, row in enumerate((rows * 20)[:count])])
        _, steps, _ = train(folder, f"rows{count}", "--model", TOY_STUDENT, "--max_steps", 31)
        print(f"{count:6d}    {1e6 * statistics.median(step['step_seconds'] / step['tokens'] for step in steps[1:]):.1f}")


for name, bench in (("trl", beside_trl), ("vocabulary", lambda _: vocabulary()), ("rows", rows_and_time)):
    if args.only in (None, name):
        with tempfile.TemporaryDirectory() as folder:
            bench(folder)
            print()
