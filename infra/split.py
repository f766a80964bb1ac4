"""The split of pairs into training and validation: what belongs together stays together."""
import math
import os

import numpy as np

from infra.command import one_line


def split_train_val(pairs, share, seed, at_most=256):
    """(training pairs, validation pairs): siblings (see Pair.names) stay on one side.

    Validation gets a share of the families of siblings, at most `at_most` of them.
    """
    family_of, smallest = families([pair.names for pair in pairs]), {}
    for pair, family in zip(pairs, family_of):
        ids = tuple(pair.prompt_ids)
        smallest[family] = min(ids, smallest.get(family, ids))
    ordered = sorted(smallest, key=smallest.get)  # whatever the order of the rows
    count = min(math.ceil(len(ordered) * share), at_most) if len(ordered) > 1 else 0
    order = np.random.default_rng(seed).permutation(len(ordered))
    val = {ordered[i] for i in order[:count]}
    return ([pair for pair, family in zip(pairs, family_of) if family not in val],
            [pair for pair, family in zip(pairs, family_of) if family in val])


def families(items):
    """A label for each item, a list of names. Items that share a name have the same label."""
    parent = {}  # name -> a name of the same family; a root is its own parent

    def root(name):
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for first, *others in items:
        for other in others:
            parent[root(other)] = root(first)
    return [root(first) for first, *_ in items]


def parts_of(pairs, by_file):
    """{name: indices}: the parts that are evaluated apart, behaviours or files of the pairs."""
    paths, indices = {pair.path for pair in pairs}, {}
    short = len({*map(os.path.basename, paths)}) == len(paths)
    for i, pair in enumerate(pairs):
        file = os.path.basename(pair.path) if short else pair.path
        indices.setdefault(one_line(file if by_file else pair.behaviour) or "other", []).append(i)
    return indices
