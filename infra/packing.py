"""How many tokens a pair takes, and which pairs share a sequence of a batch.

A pair here is anything with prompt_ids and answers: lists of token ids.
"""
import heapq
import math


def longest_row(pair):
    """Tokens of the pair's longest conversation: the prompt and one answer."""
    return len(pair.prompt_ids) + max(map(len, pair.answers))


def batch_tokens(pair, share_prefix):
    """Tokens that a pair alone takes in a data.Batch, padding counted."""
    if share_prefix:
        return len(pair.prompt_ids) + sum(map(len, pair.answers))
    return len(pair.answers) * longest_row(pair)


# Tokens of a row at which attention costs as much as the layers' matrices: 6 * hidden size, here
# that of a model of 8 B parameters. Where rows are short, a smaller one changes nothing.
ATTENTION_WIDTH = 24576


def pack(sizes):
    """Sequences of a batch, lists of indices, for pairs of these sizes in tokens: the least work.

    Padding costs work, and so do wide sequences, because attention grows with the square. The
    longest pair first, each goes into the shortest sequence. All numbers of sequences are tried, up
    to sequences that are four times as wide as the longest pair.
    """
    def rows_of(count):
        rows, by_length = [[] for _ in range(count)], [(0, r) for r in range(count)]  # a heap
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            length, r = heapq.heappop(by_length)
            rows[r].append(i)
            heapq.heappush(by_length, (length + sizes[i], r))
        width = max(by_length)[0]
        return count * width * (1 + width / ATTENTION_WIDTH), rows

    fewest = math.ceil(sum(sizes) / (4 * max(sizes)))
    return min(map(rows_of, range(fewest, len(sizes) + 1)))[1]


def micro_batches(pairs, indices, tokens_per_batch, share_prefix, rank=0, world_size=1):
    """Split the pairs at `indices` into one rank's micro-batches: lists of indices.

    A micro-batch holds pairs of similar length, at most tokens_per_batch tokens (one answer per
    row: with their padding); a longer pair gets one of its own. Ranks take turns by length, so
    that each gets its share of long pairs. All ranks get the same number of micro-batches: under
    FSDP every forward pass needs all ranks, or they wait forever. A rank with fewer gets empty
    ones at the end.
    """
    def size(i):
        return batch_tokens(pairs[i], share_prefix)

    by_length = sorted(indices, key=lambda i: (size(i), i))
    of_ranks = [[] for _ in range(world_size)]
    for r, batches in enumerate(of_ranks):
        for i in by_length[r::world_size]:
            more = [*batches[-1], i] if batches else []
            # With one answer per row all are padded to the newest, which is the longest.
            tokens = sum(map(size, more)) if share_prefix else size(i) * len(more)
            if batches and tokens <= tokens_per_batch:
                batches[-1].append(i)
            else:
                batches.append([i])
    most = max(map(len, of_ranks))
    return of_ranks[rank] + [[]] * (most - len(of_ranks[rank]))
