"""Train / val / test: duplicates and groups stay together, singletons are safe.

Comes in: arrays over all samples. Goes out: a split code per sample, and which samples must leave the snapshot.
Guarantees: no group straddles splits; every class that has a sample has one in train, unless the source chose the
splits itself; the answer depends on the set of samples, never on their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.keyed import derive, keyed_hash, seed_key
from pipeline.schema import SPLIT_UNSET, SPLITS

TRAIN, VAL, TEST = range(len(SPLITS))
_TAG_GROUP, _TAG_CLASS = 16, 17  # purposes 1 to 3 belong to the epoch function
MAX_HELD_OUT_GROUPS = 20
"""Per class and evaluation split: beyond this an estimate of one class's recall gains little and train loses images."""


@dataclass(frozen=True)
class Duplicates:
    """What identical bytes decide. All arrays run over samples; ``keeper`` is a sample number, or -1."""

    conflict: NDArray[np.bool_]  # the same bytes under two labels: every copy leaves
    leak: NDArray[np.bool_]  # a copy in a later split than another copy's
    duplicate: NDArray[np.bool_]  # a further copy of one kept sample
    keeper: NDArray[np.int64]  # for each of the above: the sample to name in its reject row


def find_duplicates(
    digest: NDArray[np.uint64], key: NDArray[np.uint64], class_id: NDArray[np.int32], split: NDArray[np.int8]
) -> Duplicates:
    """Group samples by the SHA-256 of their bytes (``digest``: uint64 [n, 4]) and judge each group.

    One class: the copy with the smallest key in the first split (train, val, test) stays. ``split`` may be all
    ``SPLIT_UNSET``: then no copy can leak.
    """
    num = len(key)
    conflict, leak, duplicate = (np.zeros(num, dtype=bool) for _ in range(3))
    keeper = np.full(num, -1, dtype=np.int64)
    suspects = _repeated(digest[:, 0])
    if not len(suspects):
        return Duplicates(conflict, leak, duplicate, keeper)
    order = suspects[np.lexsort((key[suspects], split[suspects], *digest[suspects].T[::-1]))]
    ranked = digest[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = np.any(ranked[1:] != ranked[:-1], axis=1)
    run = np.cumsum(starts) - 1  # which group of equal digests, in sorted order
    first = order[np.flatnonzero(starts)][run]
    conflicted = np.bincount(run, weights=class_id[order] != class_id[first])[run] > 0
    second = order[np.minimum(np.flatnonzero(starts)[run] + 1, len(order) - 1)]
    later = ~starts & ~conflicted
    conflict[order] = conflicted
    leak[order] = later & (split[order] != split[first])
    duplicate[order] = later & (split[order] == split[first])
    # A conflict's first copy names the second, so that every row of the table leads to another file.
    keeper[order] = np.where(conflicted | later, np.where(order == first, second, first), -1)
    return Duplicates(conflict, leak, duplicate, keeper)


def _repeated(word: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where ``word`` holds a value that occurs more than once: of millions of digests, few share even 8 bytes."""
    ranked = np.sort(word)
    values = np.unique(ranked[1:][ranked[1:] == ranked[:-1]])
    if not len(values):
        return np.empty(0, dtype=np.int64)
    place = np.minimum(np.searchsorted(values, word), len(values) - 1)
    return np.flatnonzero(values[place] == word)


def join_groups(group: NDArray[np.uint64], first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Union ``first[i]`` with ``second[i]`` for all i; each id in ``group`` becomes the smallest of its component."""
    parent: dict[int, int] = {}

    def root(value: int) -> int:
        while (above := parent.get(value, value)) != value:
            parent[value] = value = parent.get(above, above)
        return value

    for one, two in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((root(one), root(two)))
        parent[high] = low
    if not parent:
        return group
    old = np.array(sorted(parent), dtype=np.uint64)
    new = np.array([root(int(value)) for value in old], dtype=np.uint64)
    place = np.minimum(np.searchsorted(old, group), len(old) - 1)
    return np.where(old[place] == group, new[place], group)


def straddlers(group: NDArray[np.uint64], split: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Samples whose group already has a member in an earlier split: keeping them would leak. ``split`` is fully set."""
    _, inverse = np.unique(group, return_inverse=True)
    earliest = np.full(inverse.max(initial=-1) + 1, len(SPLITS), dtype=np.int8)
    np.minimum.at(earliest, inverse, split)
    return split != earliest[inverse]


def assign(
    class_id: NDArray[np.int32], group: NDArray[np.uint64], given: NDArray[np.int8], *, num_classes: int, seed: int
) -> NDArray[np.int8]:
    """A split for every sample; ``given`` (``SPLIT_UNSET`` where open) takes precedence, for a whole group.

    A class with one group is train only; with two, one is held out; from three, min(20, max(1, floor(G/10))) groups go
    to val and as many to test. A group of several classes counts for the class with the fewest groups.
    """
    groups, inverse = np.unique(group, return_inverse=True)
    fixed = np.full(len(groups), len(SPLITS), dtype=np.int8)
    known = given != SPLIT_UNSET
    np.minimum.at(fixed, inverse[known], given[known])
    chosen = np.where(fixed < len(SPLITS), fixed, TRAIN).astype(np.int8)
    open_groups = np.flatnonzero(fixed == len(SPLITS))
    if len(open_groups):
        home = _home_classes(inverse, class_id, len(groups), num_classes)
        rank_key = keyed_hash(derive(seed_key(seed), _TAG_GROUP), groups)
        chosen[open_groups] = _hold_out(home[open_groups], rank_key[open_groups], num_classes, seed)
        _return_to_train(chosen, fixed, inverse, class_id, rank_key, num_classes)
    return chosen[inverse]


def _home_classes(
    inverse: NDArray[np.int64], class_id: NDArray[np.int32], num_groups: int, num_classes: int
) -> NDArray[np.int32]:
    """For each group, its class with the fewest groups (ties: the smaller id)."""
    if num_groups == len(class_id):  # the usual case, nothing is grouped
        home = np.empty(num_groups, dtype=np.int32)
        home[inverse] = class_id
        return home
    pairs = np.unique(inverse.astype(np.int64) * num_classes + class_id)
    of_group, of_class = np.divmod(pairs, num_classes)
    groups_of_class = np.bincount(of_class, minlength=num_classes)
    order = np.lexsort((of_class, groups_of_class[of_class], of_group))
    first = np.searchsorted(of_group[order], np.arange(num_groups))
    return of_class[order][first].astype(np.int32)


def _hold_out(home: NDArray[np.int32], rank_key: NDArray[np.uint64], num_classes: int, seed: int) -> NDArray[np.int8]:
    order = np.lexsort((rank_key, home))
    count = np.bincount(home, minlength=num_classes).astype(np.int32)
    place = home[order]
    rank = np.arange(len(home), dtype=np.int32) - (np.cumsum(count, dtype=np.int32) - count)[place]
    held = np.minimum(MAX_HELD_OUT_GROUPS, np.maximum(1, count // 10)).astype(np.int32)
    held[count == 1] = 0
    first, second = rank < held[place], rank < 2 * held[place]
    # Of two groups one is held out: for val or for test, by a hash of the class, so that both get their share.
    class_key = keyed_hash(derive(seed_key(seed), _TAG_CLASS), np.arange(num_classes, dtype=np.uint64))
    of_two = np.where(class_key & np.uint64(1), TEST, VAL).astype(np.int8)[place]
    pair = count[place] == 2
    split = np.full(len(home), TRAIN, dtype=np.int8)
    split[second & ~pair] = TEST
    split[first] = VAL
    split[first & pair] = of_two[first & pair]
    result = np.empty(len(home), dtype=np.int8)
    result[order] = split
    return result


def _return_to_train(
    chosen: NDArray[np.int8],
    fixed: NDArray[np.int8],
    inverse: NDArray[np.int64],
    class_id: NDArray[np.int32],
    rank_key: NDArray[np.uint64],
    num_classes: int,
) -> None:
    """Groups of several classes can hold out all that one class has: such a class gets its first open group back."""
    in_train = np.bincount(class_id[chosen[inverse] == TRAIN], minlength=num_classes)
    bare = (np.bincount(class_id, minlength=num_classes) > 0) & (in_train == 0)
    member = np.flatnonzero(bare[class_id] & (fixed[inverse] == len(SPLITS)))
    order = member[np.lexsort((rank_key[inverse[member]], class_id[member]))]
    _, first = np.unique(class_id[order], return_index=True)
    chosen[inverse[order[first]]] = TRAIN
