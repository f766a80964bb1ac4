"""Plain DPO here and in Hugging Face TRL, step by step: the same model, rows, order, learning rates and optimizer, fp32 on the CPU.

    python bench/parity.py --model DIR --data rows.jsonl --trl_python VENV/bin/python [--steps 10]

where VENV has had `pip install torch==2.13.0 trl` of its own. Prints both losses of every step and the largest difference;
exits with 1 where it is above 1e-3.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import epoch_order, load_pairs  # noqa: E402
from infra.models import load_tokenizer  # noqa: E402

parser = argparse.ArgumentParser(description="The losses of plain DPO, here and in TRL.")
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--trl_python", required=True, help="the Python of a virtual environment that has TRL")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--max_length", type=int, default=512)
parser.add_argument("--learning_rate", type=float, default=1e-5)
parser.add_argument("--beta", type=float, default=0.1)
args = parser.parse_args()

# Rows that fit without truncation, as text that already carries the chat template: TRL then adds the end-of-turn token only.
tokenizer = load_tokenizer(args.model)
pairs, _ = load_pairs(args.data, tokenizer, 10**6, needs_scores=False)
pairs = [pair for pair in pairs if len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= args.max_length]
pairs = pairs[:args.steps * args.batch_size]
end = tokenizer.eos_token
rows = [{"prompt": tokenizer.decode(pair.prompt_ids), "chosen": tokenizer.decode(pair.chosen_ids).removesuffix(end),
         "rejected": tokenizer.decode(pair.rejected_ids).removesuffix(end)} for pair in pairs]

with tempfile.TemporaryDirectory() as folder:
    data, held_out, out = (os.path.join(folder, name) for name in ("rows.jsonl", "held_out.jsonl", "out"))
    with open(args.data, encoding="utf-8") as file:
        wanted = {int(pair.where.rsplit(":", 1)[1]) for pair in pairs}
        lines = [line for number, line in enumerate(file, 1) if number in wanted]
    with open(data, "w", encoding="utf-8") as file:
        file.writelines(lines)
    with open(held_out, "w", encoding="utf-8") as file:
        file.write(lines[0])
    subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), "--data", data, "--eval_data", held_out, "--model", args.model, "--loss", "dpo",
                    "--max_steps", str(args.steps), "--batch_size", str(args.batch_size), "--max_length", str(args.max_length),
                    "--learning_rate", str(args.learning_rate), "--beta", str(args.beta), "--device", "cpu", "--eval_every", "1000000",
                    "--max_new_tokens", "1", "--out_dir", out], check=True, stdout=sys.stderr)
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as file:
        steps = [line for line in map(json.loads, file) if "loss" in line]
    job = {"model": args.model, "rows": [rows[i] for i in epoch_order(len(rows), 0, 0)], "learning_rates": [line["lr"] for line in steps],
           "batch_size": args.batch_size, "beta": args.beta, "max_length": args.max_length, "config": {"gradient_checkpointing": False}}
    path = os.path.join(folder, "job.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(job, file)
    theirs = subprocess.run([args.trl_python, os.path.join(ROOT, "bench", "trl_dpo.py"), path], check=True, stdout=subprocess.PIPE, text=True)

answer = json.loads(theirs.stdout.strip().splitlines()[-1])
print(f"step    lr         rdpo    trl {answer['trl']}   difference")
for line, loss in zip(steps, answer["losses"], strict=True):
    print(f"{line['step']:4d}    {line['lr']:.2e}   {line['loss']:.5f}   {loss:.5f}      {line['loss'] - loss:+.1e}")
largest = max(abs(line["loss"] - loss) for line, loss in zip(steps, answer["losses"]))
print(f"largest difference {largest:.1e}")
sys.exit(largest > 1e-3)
