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
