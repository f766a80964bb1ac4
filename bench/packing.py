"""How many of the tokens that are computed are real: pairs packed into rows, and one pair a row.

    python bench/packing.py --data rows.jsonl [--model DIR]
"""
import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import batch_tokens, epoch_order, load_pairs  # noqa: E402
from infra.models import load_tokenizer  # noqa: E402
from infra.packing import micro_batches, pack  # noqa: E402

EPOCHS = 2
parser = argparse.ArgumentParser(description="Real over computed tokens.")
parser.add_argument("--data", required=True, help="preference rows")
parser.add_argument("--model", default=os.path.expanduser("~/.cache/rdpo/smollm2-135m"))
parser.add_argument("--max_length", type=int, default=1024)
args = parser.parse_args()
pairs, _ = load_pairs(args.data, load_tokenizer(args.model), args.max_length, False, True)
sizes = [batch_tokens(pair, True) for pair in pairs]


def one_pair_a_row(indices, budget):
    """Micro-batches of pairs of similar length whose padded tokens fit: rows are not shared."""
    batches = []
    for i in sorted(indices, key=sizes.__getitem__):
        if batches and sizes[i] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return [(batch, [[i] for i in range(len(batch))]) for batch in batches]


def packed(indices, budget):
    return [(batch, pack([sizes[i] for i in batch]))
            for batch in micro_batches(pairs, indices, budget, share_prefix=True)]


print(f"{len(pairs)} pairs of {min(sizes)} to {max(sizes)} tokens")
print("batch  tokens_per_batch  one pair a row  packed  mean row, tokens")
for batch_size in (8, 16):
    for budget in (1024, 2048, 16384):
        shares = []
        for split in (one_pair_a_row, packed):
            real = computed = rows_in_all = 0
            for epoch in range(EPOCHS):
                order = epoch_order(len(pairs), 0, epoch)
                for start in range(0, len(order), batch_size):
                    for batch, rows in split(order[start:start + batch_size], budget):
                        width = max(sum(sizes[batch[i]] for i in row) for row in rows)
                        real += sum(sizes[i] for i in batch)
                        computed += width * len(rows)
                        rows_in_all += len(rows)
            shares.append(real / computed)
        print(f"{batch_size:5d}  {budget:16d}  {shares[0]:14.3f}  {shares[1]:6.3f}  "
              f"{computed / rows_in_all:16.0f}")
