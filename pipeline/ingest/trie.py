"""Which shard a sample belongs to: the leaves of a binary trie over keyed hashes.

Comes in: keys and sizes. Goes out: leaves. Guarantees: a pure function of the set, so history leaves no trace, and one
sample more or less changes, splits or merges one leaf.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.keyed import derive, keyed_hash, seed_key
from pipeline.schema import SPLITS

_TAG_SHARD = 18


def shard_hash(key: NDArray[np.uint64], *, split: str, seed: int) -> NDArray[np.uint64]:
    """The keyed hash that places a sample in its split's trie and orders it inside its class; uint64 like ``key``."""
    return keyed_hash(derive(seed_key(seed), _TAG_SHARD, SPLITS.index(split)), key)


@dataclass(frozen=True)
class Leaf:
    """A shard-to-be: rows ``[start, stop)`` of the samples sorted by hash, and the bits they share."""

    prefix: str
    start: int
    stop: int


def leaves(
    hashes: NDArray[np.uint64], size_bytes: NDArray[np.int64], *, max_samples: int, max_bytes: int
) -> list[Leaf]:
    """Leaves of the binary trie over sorted ``hashes``: a node with too many samples or image bytes is divided.

    A pure function of the set: history leaves no trace, and one sample more or less changes, splits or merges one leaf.
    """
    cumulative = np.concatenate([[0], np.cumsum(size_bytes)])
    result: list[Leaf] = []
    stack = [("", 0, len(hashes), 0)]
    while stack:
        prefix, start, stop, low = stack.pop()
        if start == stop:
            continue
        fits = stop - start <= max_samples and int(cumulative[stop] - cumulative[start]) <= max_bytes
        if fits or stop - start == 1 or len(prefix) == 64:
            result.append(Leaf(prefix, start, stop))
            continue
        middle = low | (1 << (63 - len(prefix)))
        cut = start + int(np.searchsorted(hashes[start:stop], np.uint64(middle)))
        stack.append((prefix + "1", cut, stop, middle))
        stack.append((prefix + "0", start, cut, low))
    return result
