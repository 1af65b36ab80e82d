"""Train / val / test: duplicates and groups stay together, nobody moves, singletons are safe.

Comes in: arrays over all samples, and the splits that some of them have already. Goes out: a split code per sample, and
which samples must leave the snapshot. Guarantees: no group straddles splits; a sample that has a split keeps it or
leaves; new groups fill the free places of val and test; every class that has a sample has one in train, unless the
source chose the splits, or all that the class has was held out before; the order of samples changes nothing.
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
    digest: NDArray[np.uint64],
    key: NDArray[np.uint64],
    class_id: NDArray[np.int32],
    split: NDArray[np.int8],
    incumbent: NDArray[np.bool_],
) -> Duplicates:
    """Group samples by the SHA-256 of their bytes (``digest``: uint64 [n, 4]) and judge each group.

    One class: the copy in the first split (train, val, test, ``SPLIT_UNSET``) stays; of several, the one that was in
    the snapshot before (``incumbent``), else the one with the smallest key. A copy with another split leaks.
    """
    num = len(key)
    conflict, leak, duplicate = (np.zeros(num, dtype=bool) for _ in range(3))
    keeper = np.full(num, -1, dtype=np.int64)
    suspects = _repeated(digest[:, 0])
    if not len(suspects):
        return Duplicates(conflict, leak, duplicate, keeper)
    place = _ranked(split)
    preference = (key[suspects], ~incumbent[suspects], place[suspects])
    order = suspects[np.lexsort((*preference, *digest[suspects].T[::-1]))]
    ranked = digest[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = np.any(ranked[1:] != ranked[:-1], axis=1)
    run = np.cumsum(starts) - 1  # which group of equal digests, in sorted order
    first = order[np.flatnonzero(starts)][run]
    conflicted = np.bincount(run, weights=class_id[order] != class_id[first])[run] > 0
    second = order[np.minimum(np.flatnonzero(starts)[run] + 1, len(order) - 1)]
    later = ~starts & ~conflicted
    elsewhere = (place[order] != place[first]) & (split[order] != SPLIT_UNSET)
    conflict[order] = conflicted
    leak[order] = later & elsewhere
    duplicate[order] = later & ~elsewhere
    # A conflict's first copy names the second, so that every row of the table leads to another file.
    keeper[order] = np.where(conflicted | later, np.where(order == first, second, first), -1)
    return Duplicates(conflict, leak, duplicate, keeper)


def _ranked(split: NDArray[np.int8]) -> NDArray[np.int8]:
    """Splits in their order, those that are open last."""
    return np.where(split == SPLIT_UNSET, len(SPLITS), split).astype(np.int8)


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


def number_groups(group: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """The distinct ids, ascending, and the number of each sample's among them: `numpy.unique` in half the memory."""
    if np.all(group[1:] > group[:-1]):  # a listing that nobody groups
        return group, np.arange(len(group), dtype=np.int32)
    order = np.argsort(group)
    ranked = group[order]
    starts = np.ones(len(group), np.bool_)
    np.not_equal(ranked[1:], ranked[:-1], out=starts[1:])
    groups = ranked[starts]
    del ranked
    inverse = np.empty(len(group), np.int32)
    inverse[order] = np.cumsum(starts, dtype=np.int32) - np.int32(1)
    return groups, inverse


def straddlers(group: NDArray[np.uint64], split: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Samples whose group has a member in an earlier split: keeping them would leak. Open ones (unset) never do."""
    groups, inverse = number_groups(group)
    place = _ranked(split)
    if len(groups) == len(group):  # nobody shares one
        return np.zeros(len(group), np.bool_)
    earliest = np.full(len(groups), len(SPLITS), dtype=np.int8)
    np.minimum.at(earliest, inverse, place)
    return (split != SPLIT_UNSET) & (place != earliest[inverse])


def assign(
    class_id: NDArray[np.int32], group: NDArray[np.uint64], fixed: NDArray[np.int8], *, num_classes: int, seed: int
) -> NDArray[np.int8]:
    """A split for every sample. ``fixed`` (``SPLIT_UNSET`` where open) is kept, and holds for the whole group.

    Of the G groups of a class, t = min(20, max(1, floor(G/10))) belong in val and as many in test; of two groups, one
    is held out; one alone trains. Groups without a split fill what is free of these places, in the order of their keyed
    hash; the rest train. Nothing that has a split moves, so a class may hold more than its places, or fewer for a time.
    A class without a group in train gets its first new one there. A group of several classes counts for the one with
    the fewest groups.
    """
    groups, inverse = number_groups(group)
    known = np.full(len(groups), len(SPLITS), dtype=np.int8)
    np.minimum.at(known, inverse, _ranked(fixed))
    is_open = known == len(SPLITS)
    if not is_open.any():
        return known[inverse]
    home = _home_classes(inverse, class_id, len(groups), num_classes)
    rank_key = keyed_hash(derive(seed_key(seed), _TAG_GROUP), groups)
    free = _free_places(home, known, num_classes, seed)
    chosen = known.copy()
    chosen[is_open] = _fill(home[is_open], rank_key[is_open], free)
    _return_to_train(chosen, is_open, inverse, class_id, rank_key)
    return chosen[inverse]


def _home_classes(
    inverse: NDArray[np.int32], class_id: NDArray[np.int32], num_groups: int, num_classes: int
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


def _free_places(
    home: NDArray[np.int32], known: NDArray[np.int8], num_classes: int, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How many open groups of each class go to val, and how many to test: int32 [num_classes] each."""
    total = np.bincount(home, minlength=num_classes)
    taken = [np.bincount(home[known == code], minlength=num_classes) for code in range(len(SPLITS))]
    held = np.minimum(MAX_HELD_OUT_GROUPS, np.maximum(1, total // 10))
    val, test = held - taken[VAL], held - taken[TEST]
    # Of two groups one is held out: for val or for test, by a hash of the class, so that both get their share.
    class_key = keyed_hash(derive(seed_key(seed), _TAG_CLASS), np.arange(num_classes, dtype=np.uint64))
    for_test = (class_key & np.uint64(1)).astype(bool)
    pair, pair_free = total == 2, taken[VAL] + taken[TEST] == 0
    val = np.where(pair, pair_free & ~for_test, val)
    test = np.where(pair, pair_free & for_test, test)
    # One group alone trains, and a class that has nothing in train gets its first new group there.
    spare = np.bincount(home[known == len(SPLITS)], minlength=num_classes) - (taken[TRAIN] == 0)
    val = np.clip(val, 0, np.maximum(spare, 0))
    test = np.clip(test, 0, np.maximum(spare - val, 0))
    alone = total == 1
    return np.where(alone, 0, val).astype(np.int32), np.where(alone, 0, test).astype(np.int32)


def _fill(
    home: NDArray[np.int32], rank_key: NDArray[np.uint64], free: tuple[NDArray[np.int32], NDArray[np.int32]]
) -> NDArray[np.int8]:
    order = np.lexsort((rank_key, home))
    place = home[order]
    first = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(free[0])))[:-1]]).astype(np.int32)
    rank = np.arange(len(home), dtype=np.int32)
    rank -= first[place]
    split = np.full(len(home), TRAIN, dtype=np.int8)
    split[rank < (free[0] + free[1])[place]] = TEST
    split[rank < free[0][place]] = VAL
    result = np.empty(len(home), dtype=np.int8)
    result[order] = split
    return result


def _return_to_train(
    chosen: NDArray[np.int8],
    is_open: NDArray[np.bool_],
    inverse: NDArray[np.int32],
    class_id: NDArray[np.int32],
    rank_key: NDArray[np.uint64],
) -> None:
    """Groups of several classes can hold out all that one class has: such a class gets its first open group back."""
    num_classes = int(class_id.max(initial=-1)) + 1
    in_train = np.bincount(class_id[chosen[inverse] == TRAIN], minlength=num_classes)
    bare = (np.bincount(class_id, minlength=num_classes) > 0) & (in_train == 0)
    member = np.flatnonzero(bare[class_id] & is_open[inverse])
    order = member[np.lexsort((rank_key[inverse[member]], class_id[member]))]
    _, first = np.unique(class_id[order], return_index=True)
    chosen[inverse[order[first]]] = TRAIN
