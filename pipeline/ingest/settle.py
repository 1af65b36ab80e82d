"""What the bytes reveal settles who is in: duplicates, conflicts, leaks, look-alikes, then splits.

Comes in: every listed image whose bytes are known: read now, or known from the newest snapshot. Goes out: a split and
a group for each one that stays, and who leaves. Guarantees: the outcome depends on the set of images and the newest
snapshot alone; whoever has a split keeps it or leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.ingest.lookalikes import join_lookalikes
from pipeline.ingest.past import Past
from pipeline.ingest.splits import assign, find_duplicates, join_groups, straddlers
from pipeline.ingest.units import Hashing
from pipeline.schema import SPLIT_UNSET, Reason


@dataclass(frozen=True)
class Samples:
    """Images whose bytes are known, as arrays of one length. ``digest`` is SHA-256 as uint64 [n, 4].

    The bytes lie in row ``row`` of pack ``pack``, whose index says ``held_*`` of them; where ``pack`` is -1 they are
    not at hand: the newest snapshot rejected the image, and only their hash was kept.
    """

    reference: NDArray[np.int32]  # row of REFERENCES
    key: NDArray[np.uint64]
    class_id: NDArray[np.int32]
    given: NDArray[np.int8]  # split that the source chose, or SPLIT_UNSET
    group: NDArray[np.uint64]  # as listed
    size: NDArray[np.int64]
    digest: NDArray[np.uint64]
    pack: NDArray[np.int32]
    row: NDArray[np.int32]
    held_class: NDArray[np.int32]
    held_split: NDArray[np.int8]
    held_group: NDArray[np.uint64]
    phash: NDArray[np.uint64]
    hashing: NDArray[np.int8]  # Hashing


@dataclass(frozen=True)
class Expelled:
    """Samples that may not stay, with the sample each one collides with."""

    sample: NDArray[np.int64]
    other: NDArray[np.int64]  # -1: none to name
    reason: tuple[Reason, ...]
    near: NDArray[np.bool_]  # a leak because it, or its group, looks like another


@dataclass(frozen=True)
class Settlement:
    """Split (``SPLIT_UNSET``: expelled) and group of every sample.

    ``alike``: who stays and has a near duplicate in its group. ``unseen``: whose hash is asked for and not known; then
    this is not the last word.
    """

    split: NDArray[np.int8]
    group: NDArray[np.uint64]
    expelled: Expelled
    alike: NDArray[np.bool_]
    unseen: NDArray[np.bool_]


def settle(samples: Samples, past: Past, *, num_classes: int, seed: int, near: int | None = None) -> Settlement:
    """Decide who stays, and where.

    The split that the source gives comes first, then the one that the content, then the one that the key had before.
    Copies and groups that these splits tear apart leak: the members in the first split stay. The rest is assigned.

    Then, if asked, the groups of those whose hashes are within ``near`` bits are joined. Only who has stayed so far is
    compared, so that what joins two groups is never something that only one of two builds knows of.
    """
    before = np.where(samples.given == SPLIT_UNSET, past.split_of(samples.key, samples.digest), samples.given)
    before = before.astype(np.int8)
    found = find_duplicates(samples.digest, samples.key, samples.class_id, before, _incumbents(samples, past))
    copies = np.flatnonzero(found.duplicate | found.leak)
    group = join_groups(samples.group, samples.group[copies], samples.group[found.keeper[copies]])
    stay = np.flatnonzero(~(found.conflict | found.leak | found.duplicate)).astype(np.int32)
    straddling = straddlers(group[stay], before[stay])
    leak = found.leak.copy()
    leak[stay[straddling]] = True
    stay = stay[~straddling]
    near_leak, alike, unseen = (np.zeros(len(group), np.bool_) for _ in range(3))
    if near is not None:
        unseen[stay] = samples.hashing[stay] == Hashing.UNKNOWN
        group, alike = join_lookalikes(samples.phash, samples.hashing, group, stay, max_distance=near)
        straddling = straddlers(group[stay], before[stay])
        near_leak[stay[straddling]] = True
        stay = stay[~straddling]
        leak |= near_leak
    of_leaking = found.duplicate & leak[found.keeper]  # copies of what may not stay may not take its place
    leak |= of_leaking
    split = np.full(len(samples.key), SPLIT_UNSET, np.int8)
    split[stay] = assign(samples.class_id[stay], group[stay], before[stay], num_classes=num_classes, seed=seed)
    gone = np.flatnonzero(split == SPLIT_UNSET)
    reason = tuple(
        Reason.LABEL_CONFLICT if found.conflict[i] else Reason.LEAK if leak[i] else Reason.DUPLICATE_OF for i in gone
    )
    expelled = Expelled(gone, found.keeper[gone], reason, near_leak[gone])
    return Settlement(split, group, expelled, alike & (split != SPLIT_UNSET), unseen)


def _incumbents(samples: Samples, past: Past) -> NDArray[np.bool_]:
    """Who was in the newest snapshot, under the same key and with the same bytes."""
    row = past.find(samples.key)
    same = np.zeros(len(row), np.bool_)
    known = np.flatnonzero(row >= 0)
    same[known] = np.all(past.digest[row[known]] == samples.digest[known], axis=1)
    return same
