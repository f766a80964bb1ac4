"""One row through the whole method, step by step: what each stage makes of it, down to the numbers of the loss.

    python train.py --data toy/scored.jsonl && python toy/one_row.py --model out
"""
import argparse
import math
import os
import sys
import textwrap

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import TOY_STUDENT, load_pairs, load_tokenizer, printable_tokens, read_rows, run  # noqa: E402
from eval import pair_logps  # noqa: E402
from generate import load_model  # noqa: E402
from rdpo import preference_probability, rdpo_loss  # noqa: E402

BETA, TEMPERATURE = 0.1, 1.0


def show(step, text):
    print(textwrap.fill(f"{step:20s}{text}", 120, subsequent_indent=" " * 20))


def main():
    parser = argparse.ArgumentParser(description="One row of scored pairs through the seven steps of the method.")
    parser.add_argument("--data", default=os.path.join(ROOT, "toy", "scored.jsonl"))
    parser.add_argument("--row", type=int, default=4, help="which of the usable rows, from 1")
    parser.add_argument("--model", required=True, help="the student after training")
    args = parser.parse_args()
    tokenizer = load_tokenizer(TOY_STUDENT)
    pairs, _ = load_pairs(args.data, tokenizer, 1024, needs_scores=True)
    pair = pairs[args.row - 1]
    row = dict(read_rows(args.data))[pair.where]

    show("1 prompt", row["prompt"])
    show("2 rejected", row["rejected"])
    show("3 critique", row["critique"])
    show("4 chosen", row["chosen"])
    tau = preference_probability(torch.tensor([pair.score_chosen]), torch.tensor([pair.score_rejected]), TEMPERATURE)
    show("5 scores", f"rejected {pair.score_rejected:g}, chosen {pair.score_chosen:g}, so tau = sigmoid(({pair.score_chosen:g} - {pair.score_rejected:g}) / "
         f"{TEMPERATURE:g}) = {tau.item():.3f}")
    show("6 tokens", f"{len(pair.prompt_ids)} of the prompt; {len(pair.rejected_ids)} of rejected; {len(pair.chosen_ids)} of chosen: "
         + "|".join(printable_tokens(tokenizer, pair.chosen_ids)))
    reference = pair_logps(load_model(TOY_STUDENT), [pair])  # (1, 2): chosen, rejected
    show("", f"log ref(rejected) = {reference[0, 1]:.2f}, log ref(chosen) = {reference[0, 0]:.2f}, summed over the tokens")
    policy = pair_logps(load_model(args.model), [pair])  # (1, 2)
    for step, logps in (("7 before training", reference), ("  after training", policy)):
        losses, chosen_rewards, rejected_rewards = rdpo_loss(logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1], tau, BETA)
        margin = (chosen_rewards - rejected_rewards).item()
        show(step, f"log pi(rejected) = {logps[0, 1]:.2f}, log pi(chosen) = {logps[0, 0]:.2f}; margin m = {margin:+.2f}, "
             f"p = sigmoid(m) = {1 / (1 + math.exp(-margin)):.3f}, loss {losses.item():.3f}, gradient p - tau = {1 / (1 + math.exp(-margin)) - tau.item():+.3f}")


if __name__ == "__main__":
    run(main)
