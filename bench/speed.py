"""Speed and memory of this trainer, beside TRL's DPOTrainer, in float32 on the CPU.

    python bench/speed.py                               all tables, about 25 minutes on two cores
    python bench/speed.py --only trl|vocabulary|rows    one of them

trl         pairs per second, peak memory and losses of plain DPO, beside TRL's: its defaults,
            without gradient checkpointing, with a precomputed reference. The same model, rows,
            order, learning rates and optimizer. Then the number of reference passes that a
            second run with another beta needs.
vocabulary  peak memory beyond weights, gradients and optimizer, at vocabularies of 4,000 and
            152,000: as needed (freed memory returns to the system at once) and as taken (the C
            library keeps some of it)
rows        microseconds per token, with files of 1,000 to 16,000 rows

TRL has a virtual environment of its own, created on the first run unless --trl_python names one.
The rows are made from the texts of --data: its prompts, chosen and rejected answers are each joined
and cut to the lengths asked for. With --ragged they are the rows of --data as they are, but for
those above --max_length. The tokens of a pair count its prompt with each of its answers, however a
trainer computes them. Its time is the median of the steps after the first; the mean of ragged ones.
"""
import os
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from bench.parity import (TRL_SCRIPT, read_steps, read_trl_answer, train_flags,  # noqa: E402
                          write_rows, write_trl_job)
from data import count_tokens, load_pairs, prompt_text  # noqa: E402
from infra.command import Parser, at_least, run  # noqa: E402
from infra.formats import as_messages  # noqa: E402
from infra.models import TOY_STUDENT, load_tokenizer  # noqa: E402
from infra.packing import longest_row  # noqa: E402
from infra.rows import read_rows  # noqa: E402

CACHE = os.path.expanduser("~/.cache/rdpo")
TRL_REQUIREMENTS = ["torch==2.13.0", "transformers>=5.10,<6", "trl"]
REFERENCE_PASS = r"reference computed for (\d+) in ([\d.]+) s"  # printed by train.py


def run_process(command, args, **environment):
    """(standard output, peak resident memory in MiB) of a process. Exits if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)} | environment
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        output.seek(0)
        if status:
            sys.exit(f"failed: {' '.join(command)}")
        return output.read(), usage.ru_maxrss / 1024


def run_train(folder, name, args, *flags):
    """(standard output, metrics of each step, peak memory in MiB) of plain DPO on the rows."""
    out_dir = f"{folder}/{name}"
    command = [sys.executable, f"{ROOT}/train.py", *train_flags(folder, out_dir), "--loss", "dpo"]
    output, peak = run_process([*command, *map(str, flags)], args)
    return output, read_steps(out_dir), peak


# ---------------------------------------------------------------------------------------- the table


OURS = {  # flags of train.py
    "rdpo": [],
    "rdpo, 2,048 tokens a batch": ["--tokens_per_batch", 2048],
    "rdpo, one pair a batch": ["--tokens_per_batch", 1],
    "rdpo, one pair, checkpointing": ["--gradient_checkpointing", "--tokens_per_batch", 1]}
THEIRS = {  # more of TRL's DPOConfig; ragged rows are trained with the first and the last
    "its defaults": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "reference precomputed": {"precompute_ref_log_probs": True},
    "reference precomputed, no checkpointing": {"precompute_ref_log_probs": True,
                                                "gradient_checkpointing": False}}


def compare_with_trl(folder, args):
    python, tokenizer = trl_python(args), load_tokenizer(args.model)
    write_rows(folder, (ragged_rows if args.ragged else make_rows)(tokenizer, args))
    pairs, _ = load_pairs(f"{folder}/rows.jsonl", tokenizer, 10**6, needs_scores=False)
    common = ["--model", args.model, "--batch_size", args.batch_size, "--max_steps", args.steps,
              "--learning_rate", "1e-5"]
    runs = {}  # name -> (losses, seconds of the steps after the first, peak MiB)
    for name, flags in OURS.items():
        output, steps, peak = run_train(folder, f"out{len(runs)}", args, *common, *flags)
        if not runs:  # later runs find the reference in the cache
            reference = float(re.search(REFERENCE_PASS, output)[2])
        seconds = [step["step_seconds"] for step in steps[1:]]
        runs[name] = [step["loss"] for step in steps], seconds, peak
    output, *_ = run_train(folder, "again", args, *common, "--max_steps", 1, "--beta", 0.5)
    computed_again = int(re.search(REFERENCE_PASS, output)[1])

    job = f"{folder}/job.json"
    for name, config in THEIRS.items():
        if args.ragged and name not in ("its defaults", list(THEIRS)[-1]):
            continue
        write_trl_job(job, pairs, tokenizer, model=args.model, batch_size=args.batch_size,
                      beta=0.1, max_length=10**6, config=config,
                      learning_rates=[step["lr"] for step in steps])
        output, peak = run_process([python, TRL_SCRIPT, job], args)
        answer = read_trl_answer(output)
        runs[f"trl {answer['trl']}, {name}"] = answer["losses"], answer["seconds"][1:], peak
    assert sum(answer["tokens"]) == count_tokens(pairs), "the trainers read different tokens"
    print_comparison(runs, pairs, reference, computed_again, args)


def print_comparison(runs, pairs, reference, computed_again, args):
    """Print all runs, then each of ours over each of TRL's. reference: seconds of its pass."""
    pair_tokens, reference_pairs = count_tokens(pairs) / len(pairs), len(pairs) + 1
    sizes = f"{min(map(longest_row, pairs))} to {max(map(longest_row, pairs))} in a conversation, "
    print(f"{len(pairs)} pairs of {pair_tokens:.0f} tokens, {sizes * args.ragged}{args.batch_size} "
          f"per step, {args.threads} threads; {'means' if args.ragged else 'medians'} of "
          f"{args.steps - 1} steps\n\n"
          f"{'trainer':52s} pairs/s  tokens/s  peak MiB  losses")
    pair_seconds = {}
    for name, (losses, seconds, peak) in runs.items():
        average = statistics.fmean if args.ragged else statistics.median
        pair_seconds[name] = average(seconds) / args.batch_size
        rate = 1 / pair_seconds[name]
        print(f"{name:52s} {rate:7.3f}  {rate * pair_tokens:8.1f}  {peak:8.0f}  "
              f"{' '.join(f'{loss:.4f}' for loss in losses)}")
    print(f"\nrdpo's reference: {reference:.1f} s for {reference_pairs} pairs in the first run, "
          f"{computed_again} pairs in a second one with another beta\n\n"
          f"{'rdpo over trl':52s} first epoch, reference included  later epochs  peak memory")
    for ours in [name for name in runs if name.startswith("rdpo")]:
        for theirs in [name for name in runs if name.startswith("trl")]:
            # TRL's precomputing is not in its step times, so only our reference counts.
            first = pair_seconds[theirs] / (pair_seconds[ours] + reference / reference_pairs)
            later = pair_seconds[theirs] / pair_seconds[ours]
            print(f"{ours:30s} {theirs:50s} {first:5.2f} {later:5.2f} "
                  f"{runs[ours][2] / runs[theirs][2]:5.2f}")
    losses_of_steps = zip(*(losses for losses, *_ in runs.values()))
    difference = max(max(losses) - min(losses) for losses in losses_of_steps)
    print(f"largest difference between two losses: {difference:.1e}")


def make_rows(tokenizer, args):
    """--steps * --batch_size rows of --prompt_tokens and --answer_tokens, from the texts of --data.

    Each of the three texts is a piece of all texts of its kind, joined.
    """
    source = [row for _, row in read_rows(args.data)]
    template_tokens = len(tokenizer(prompt_text(tokenizer, ""), add_special_tokens=False).input_ids)
    lengths = {"prompt": args.prompt_tokens - template_tokens,
               "chosen": args.answer_tokens - 1, "rejected": args.answer_tokens - 1}
    rows = [{} for _ in range(args.steps * args.batch_size)]
    for key, length in lengths.items():
        text = "\n".join(as_messages(row[key])[-1]["content"] for row in source)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        for i, row in enumerate(rows):
            start = i * length % (len(ids) - length)
            row[key] = tokenizer.decode(ids[start:start + length])
    return rows


def ragged_rows(tokenizer, args):
    """--steps * --batch_size rows of --data as they are, none above --max_length."""
    pairs, _ = load_pairs(args.data, tokenizer, 10**6, needs_scores=False)
    rows = dict(read_rows(args.data))
    short = [rows[pair.where] for pair in pairs if longest_row(pair) <= args.max_length]
    return short[:args.steps * args.batch_size]


def trl_python(args):
    """The Python of an environment with TRL, created if --trl_python names none."""
    python = args.trl_python or f"{CACHE}/trl/bin/python"
    if not os.path.exists(python):
        subprocess.run([sys.executable, "-m", "venv", f"{CACHE}/trl"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *TRL_REQUIREMENTS], check=True)
    return python


# ---------------------------------------------------------------------------------- the vocabulary

# Run with the repository and the vocabulary size; prints the peak and the memory held, in MiB.
VOCABULARY_SCRIPT = """
import resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sys.path.insert(0, sys.argv[1])
from data import Pair, collate
from infra.packing import micro_batches
from rdpo import sequence_logps
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=int(sys.argv[2]), hidden_size=256, intermediate_size=768, num_hidden_layers=16,
    num_attention_heads=4, tie_word_embeddings=True)).eval()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
texts = [torch.randint(4000, (600,)).split([300, 150, 150]) for _ in range(8)]
pairs = [Pair("", "", *(ids.tolist() for ids in text)) for text in texts]
for _ in range(3):
    for batch in micro_batches(pairs, range(8), 2400, True):
        sequence_logps(model, collate([pairs[i] for i in batch], True)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
weights = sum(weight.numel() for weight in model.parameters())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 16 * weights / 2**20)
"""


def measure_vocabulary(folder, args):
    print("peak MiB beyond weights, gradients and optimizer, by how the C library treats freed "
          "memory\n"
          "vocabulary   weights, gradients, optimizer   gives it back   keeps it (its default)")
    beyond = []  # per vocabulary: (MiB if the C library gives memory back, if it keeps it)
    for size in (4_000, 152_000):
        command = [sys.executable, "-c", VOCABULARY_SCRIPT, ROOT, str(size)]
        outputs = [run_process(command, args, MALLOC_MMAP_THRESHOLD_="65536")[0],
                   run_process(command, args)[0]]
        peaks, (held, _) = zip(*(map(float, output.split()) for output in outputs))
        beyond.append([peak - held for peak in peaks])
        print(f"{size:10d}   {held:29.0f}   {beyond[-1][0]:13.0f}   {beyond[-1][1]:8.0f}")
    print("growth " + " ".join(f"{large / small - 1:+.1%}" for small, large in zip(*beyond)))


# ---------------------------------------------------------------------------------------- the rows


def measure_rows(folder, args):
    print("rows      microseconds per token, median of 30 steps of the toy student")
    rows = [row for _, row in read_rows(f"{ROOT}/toy/scored.jsonl")]
    for count in (1_000, 4_000, 16_000):
        distinct = [rows[i % len(rows)] for i in range(count)]
        write_rows(folder, [row | {"prompt": f"{row['prompt']} ({i // len(rows)})"}
                            for i, row in enumerate(distinct)])
        _, steps, _ = run_train(folder, f"rows{count}", args, "--model", TOY_STUDENT,
                                "--max_steps", 31)
        seconds = statistics.median(step["step_seconds"] / step["tokens"] for step in steps[1:])
        print(f"{count:6d}    {1e6 * seconds:.1f}")


TABLES = {"trl": compare_with_trl, "vocabulary": measure_vocabulary, "rows": measure_rows}


def main():
    parser = Parser("Measure speed and memory, beside TRL's.")
    add = parser.add_argument
    add("--only", choices=TABLES, help="print one table (default: all)")
    add("--model", default=f"{CACHE}/smollm2-135m",
        help="a model folder (default: the one that the tests marked real download)")
    add("--data", default=f"{ROOT}/toy/scored.jsonl", help="rows that supply the texts")
    add("--trl_python", help="Python of an environment with TRL (default: one is created in "
                             "~/.cache/rdpo/trl)")
    add("--steps", type=at_least(2), default=6)
    add("--batch_size", type=int, default=4, help="pairs per step")
    add("--ragged", action="store_true", help="trl: the rows of --data as they are")
    add("--max_length", type=int, default=512, help="of ragged rows: prompt and one answer")
    add("--prompt_tokens", type=int, default=300)
    add("--answer_tokens", type=int, default=150)
    add("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    args = parser.parse_args()
    for name, measure in TABLES.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                measure(folder, args)
                print()


if __name__ == "__main__":
    run(main)
