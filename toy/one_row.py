"""One row through the whole method, from the prompt to the numbers of the loss.

    python train.py --data toy/scored.jsonl && python toy/one_row.py --model out
"""
import os
import sys
import textwrap

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import load_pairs  # noqa: E402
from eval import answer_logps  # noqa: E402
from infra.command import BadInput, Parser, at_least, run  # noqa: E402
from infra.models import TOY_STUDENT, load_model, load_tokenizer  # noqa: E402
from infra.report import printable_tokens  # noqa: E402
from infra.rows import read_rows  # noqa: E402
from rdpo import preference_probability, rdpo_loss  # noqa: E402

BETA, TEMPERATURE = 0.1, 1.0


def show(step, text):
    print(textwrap.fill(f"{step:20s}{text}", 120, subsequent_indent=" " * 20))


def main():
    parser = Parser("One row of scored pairs through the seven steps of the method.")
    parser.add_argument("--data", default=os.path.join(ROOT, "toy", "scored.jsonl"))
    parser.add_argument("--row", type=at_least(1), default=4, help="of the usable rows, from 1")
    parser.add_argument("--model", required=True, help="the student after training")
    args = parser.parse_args()
    tokenizer = load_tokenizer(TOY_STUDENT)
    pairs, _ = load_pairs(args.data, tokenizer, 1024, needs_scores=True)
    if args.row > len(pairs):
        raise BadInput(f"--row {args.row}: {args.data} has {len(pairs)} rows")
    pair = pairs[args.row - 1]
    row = dict(read_rows(args.data))[pair.where]

    show("1 prompt", row["prompt"])
    show("2 rejected", row["rejected"])
    show("3 critique", row["critique"])
    show("4 chosen", row["chosen"])
    tau = preference_probability(torch.tensor([pair.score_gap]), TEMPERATURE)  # (1,)
    show("5 scores", f"rejected {row['score_rejected']:g}, chosen {row['score_chosen']:g}: a gap "
         f"of {pair.score_gap:g} of 5 points, so tau = sigmoid({pair.score_gap:g} / "
         f"{TEMPERATURE:g}) = {tau.item():.3f}")
    tokens = "|".join(printable_tokens(tokenizer, pair.chosen_ids))
    show("6 tokens", f"{len(pair.prompt_ids)} of the prompt; {len(pair.rejected_ids)} of rejected; "
         f"{len(pair.chosen_ids)} of chosen: {tokens}")
    reference = answer_logps(load_model(TOY_STUDENT), [pair])  # (1, 2): chosen, rejected
    show("", f"log ref(rejected) = {reference[0, 1]:.2f}, log ref(chosen) = {reference[0, 0]:.2f}, "
         "summed over the tokens")
    policy = answer_logps(load_model(args.model), [pair])  # (1, 2)
    for step, logps in (("7 before training", reference), ("  after training", policy)):
        losses, chosen_rewards, rejected_rewards = rdpo_loss(*logps.T, *reference.T, tau, BETA)
        margin = chosen_rewards - rejected_rewards  # (1,)
        p = margin.sigmoid().item()
        show(step, f"log pi(rejected) = {logps[0, 1]:.2f}, log pi(chosen) = {logps[0, 0]:.2f}; "
             f"margin m = {margin.item():+.2f}, p = sigmoid(m) = {p:.3f}, "
             f"loss {losses.item():.3f}, gradient p - tau = {p - tau.item():+.3f}")


if __name__ == "__main__":
    run(main)
