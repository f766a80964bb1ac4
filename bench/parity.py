"""The losses of plain DPO here and in Hugging Face TRL, step by step, in float32 on the CPU.

    python bench/parity.py --model DIR --data rows.jsonl --trl_python VENV/bin/python [--steps 10]

Both train the same model on the same rows, with the same order, learning rates and optimizer. VENV
is a virtual environment of its own, after `pip install torch==2.13.0 trl`. Exits with 1 if the
largest difference between two losses is above 1e-3.
"""
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import epoch_order, load_pairs  # noqa: E402
from infra.command import Parser, run  # noqa: E402
from infra.models import load_tokenizer  # noqa: E402
from infra.packing import longest_row  # noqa: E402
from infra.rows import read_rows  # noqa: E402

TRL_SCRIPT = os.path.join(ROOT, "bench", "trl_dpo.py")


def write_rows(folder, rows):
    """Write rows.jsonl, and held_out.jsonl with the first row only: evaluation stays cheap."""
    for name, some in (("rows", rows), ("held_out", rows[:1])):
        with open(f"{folder}/{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in some)


def train_flags(folder, out_dir):
    """Flags of train.py for these files. The run does little besides its steps."""
    return ["--data", f"{folder}/rows.jsonl", "--eval_data", f"{folder}/held_out.jsonl",
            "--device", "cpu", "--max_new_tokens", "1", "--eval_every", "1000000",
            "--save_every", "1000000", "--ref_cache_dir", f"{folder}/cache", "--out_dir", out_dir]


def read_steps(out_dir):
    """The logged metrics of each optimizer step."""
    return [row for _, row in read_rows(f"{out_dir}/metrics.jsonl") if "loss" in row]


def write_trl_job(path, pairs, tokenizer, **settings):
    """Write the input of trl_dpo.py: the settings, and the pairs in the order train.py takes them.

    The texts already carry the chat template, so TRL adds the end-of-turn token only.
    """
    def text(ids):
        return tokenizer.decode(ids).removesuffix(tokenizer.eos_token)

    ordered = [pairs[i] for i in epoch_order(len(pairs), 0, 0)]
    rows = [{"prompt": tokenizer.decode(pair.prompt_ids), "chosen": text(pair.chosen_ids),
             "rejected": text(pair.rejected_ids)} for pair in ordered]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"rows": rows, **settings}, file)


def read_trl_answer(output):
    return json.loads(output.strip().splitlines()[-1])


def main():
    parser = Parser("Compare the losses of plain DPO here and in TRL.")
    add = parser.add_argument
    add("--model", required=True, help="a model folder")
    add("--data", required=True, help="preference rows")
    add("--trl_python", required=True, help="Python of a virtual environment with TRL")
    add("--steps", type=int, default=10)
    add("--batch_size", type=int, default=4, help="pairs per step")
    add("--max_length", type=int, default=512, help="longer rows are left out, not truncated")
    add("--learning_rate", type=float, default=1e-5)
    add("--beta", type=float, default=0.1)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    pairs, _ = load_pairs(args.data, tokenizer, 10**6, needs_scores=False)
    pairs = [pair for pair in pairs if longest_row(pair) <= args.max_length]
    pairs = pairs[:args.steps * args.batch_size]

    with tempfile.TemporaryDirectory() as folder:
        rows = dict(read_rows(args.data))
        write_rows(folder, [rows[pair.where] for pair in pairs])
        flags = {"--model": args.model, "--loss": "dpo", "--max_steps": args.steps,
                 "--batch_size": args.batch_size, "--max_length": args.max_length,
                 "--learning_rate": args.learning_rate, "--beta": args.beta}
        command = [sys.executable, f"{ROOT}/train.py", *train_flags(folder, f"{folder}/out")]
        command += [str(item) for flag in flags.items() for item in flag]
        subprocess.run(command, check=True, stdout=sys.stderr)
        steps = read_steps(f"{folder}/out")
        job = f"{folder}/job.json"
        write_trl_job(job, pairs, tokenizer, model=args.model, batch_size=args.batch_size,
                      beta=args.beta, max_length=args.max_length,
                      learning_rates=[step["lr"] for step in steps],
                      config={"gradient_checkpointing": False})
        trl = subprocess.run([args.trl_python, TRL_SCRIPT, job], check=True,
                             stdout=subprocess.PIPE, text=True)

    answer = read_trl_answer(trl.stdout)
    print(f"step    lr         rdpo    trl {answer['trl']}   difference")
    differences = []
    for step, trl_loss in zip(steps, answer["losses"], strict=True):
        differences.append(step["loss"] - trl_loss)
        print(f"{step['step']:4d}    {step['lr']:.2e}   {step['loss']:.5f}   {trl_loss:.5f}      "
              f"{differences[-1]:+.1e}")
    largest = max(map(abs, differences))
    print(f"largest difference {largest:.1e}")
    sys.exit(largest > 1e-3)


if __name__ == "__main__":
    run(main)
