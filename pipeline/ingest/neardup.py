"""Near duplicates: which of a million 64-bit hashes lie within a few bits of each other, without comparing all pairs.

Comes in: perceptual hashes and a distance. Goes out: clusters. Guarantees: exactly the connected components of the
graph whose edges join hashes at most ``max_distance`` bits apart, whatever the order of the input; memory grows with
the number of hashes, not with the number of pairs.

Multi-index hashing (Norouzi, Punjani and Fleet, 2012), by the pigeonhole: of b bands of bits, two hashes that differ in
d bits agree in at least b - d. So pairs are looked for only among hashes that agree in some b - d bands. Crowded places
(thousands that agree there, as hashes of similar pictures do) are searched by the same rule on the bits that are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

MAX_DISTANCE = 8
"""Beyond it a million hashes take minutes, and photographs of different things begin to join (docs/LOG.md)."""

_FEW = 256
"""So many are compared pair by pair."""
_FEW_BITS = 32
"""A crowd that differs in fewer has been divided before: what is left of it is compared pair by pair."""
_CROWD = 4096
_SORT_NS, _PAIR_NS = 120.0, 8.0  # measured, per hash and table, per pair of one table


def near_clusters(hashes: NDArray[np.uint64], *, max_distance: int) -> NDArray[np.int64]:
    """For each hash the position of the first one of its cluster; int64 [n]. Alone: its own position."""
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance must be from 0 to {MAX_DISTANCE}, not {max_distance}")
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    clusters = _Clusters(len(values))
    if max_distance:
        everything = np.arange(len(values), dtype=np.int64)
        _search(values, everything, ~np.uint64(0), max_distance, clusters)
    # The first position of any member stands for all.
    leader = np.full(len(values), len(hashes), dtype=np.int64)
    np.minimum.at(leader, clusters.label, first)
    return leader[clusters.label][inverse]


class _Clusters:
    """Connected components under union; ``label`` is the smallest member of each."""

    def __init__(self, size: int) -> None:
        self.label = np.arange(size, dtype=np.int64)

    def join(self, one: NDArray[np.int64], two: NDArray[np.int64]) -> None:
        label = self.label
        while True:
            low, high = label[one], label[two]
            apart = low != high
            if not apart.any():
                return
            one, two, low, high = one[apart], two[apart], low[apart], high[apart]
            np.minimum.at(label, np.maximum(low, high), np.minimum(low, high))
            while True:
                above = label[label]
                if np.array_equal(above, label):
                    break
                label[:] = above


def _search(
    values: NDArray[np.uint64], members: NDArray[np.int64], free: np.uint64, distance: int, clusters: _Clusters
) -> None:
    """Join the ``members`` whose ``values`` are within ``distance``; they are distinct, and differ in ``free`` bits."""
    if np.all(clusters.label[members] == clusters.label[members[:1]]):
        return
    # A bit on which all agree cannot tell them apart, and would only make the crowd of its band the same crowd again.
    free = free & np.bitwise_or.reduce(values[members] ^ values[members[0]])
    bits = [np.uint64(1) << np.uint64(place) for place in range(64) if int(free) >> place & 1]
    if len(bits) <= distance:
        clusters.join(members[:-1], members[1:])
        return
    if len(members) <= _FEW or len(bits) < _FEW_BITS:
        _compare(values, members, np.zeros(len(members), dtype=np.int64), distance, clusters)
        return
    for mask in _tables(bits, distance, len(members)):
        key = values[members] & mask
        order = np.argsort(key)
        key = key[order]
        run = np.concatenate([[0], np.cumsum(key[1:] != key[:-1])])
        size = np.bincount(run)
        crowded = size > _CROWD
        for number in np.flatnonzero(crowded).tolist():
            start = int(np.searchsorted(run, number))
            crowd = members[order[start : start + size[number]]]
            _search(values, crowd, free & ~mask, distance, clusters)
        thin = (size[run] > 1) & ~crowded[run]
        _compare(values, members[order[thin]], run[thin], distance, clusters)


def _tables(bits: list[np.uint64], distance: int, size: int) -> Iterator[np.uint64]:
    """Masks of bits: two hashes within ``distance`` agree on all bits of at least one of them."""

    def cost(bands: int) -> float:
        agreeing = bands - distance
        num_pairs = size / 2 ** (len(bits) * agreeing / bands)
        return math.comb(bands, agreeing) * (_SORT_NS * math.log2(size) / 20 + _PAIR_NS * num_pairs)

    best = min(range(distance + 1, min(len(bits), distance + 6) + 1), key=cost)
    # Neighbouring bits say alike things of a picture: spread them, so that no band is nearly constant.
    bands = [np.bitwise_or.reduce(np.array(bits[number::best], dtype=np.uint64)) for number in range(best)]
    for chosen in combinations(bands, best - distance):
        yield np.bitwise_or.reduce(np.array(chosen, dtype=np.uint64))


def _compare(
    values: NDArray[np.uint64],
    members: NDArray[np.int64],
    run: NDArray[np.int64],
    distance: int,
    clusters: _Clusters,
) -> None:
    """Join the ``members`` of a ``run`` (ascending) that are within ``distance``: step by step."""
    own = values[members]
    left = np.arange(len(members))
    step = 1
    while True:
        left = left[left + step < len(members)]
        left = left[run[left] == run[left + step]]
        if not len(left):
            return
        near = left[np.bitwise_count(own[left] ^ own[left + step]) <= distance]
        if len(near):
            clusters.join(members[near], members[near + step])
        step += 1
