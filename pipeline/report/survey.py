"""One look at the indexes: image sizes and formats, images that share a group, where given bytes lie.

Comes in: a snapshot, SHA-256 digests to look for. Goes out: a ``Survey``. Guarantees: one index is held at a time, and
16 bytes an image; beyond MAX_SHARDS a spread of shards is read, and ``num_images`` says of how many images it speaks.
Shards are filled by keyed hashes, so a spread of them is a fair sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.ingest.units import index_digests, index_keys
from pipeline.schema import INDEXES, FileRef, index_path
from pipeline.snapshot import Snapshot

MAX_SHARDS = 512
"""Some 130 MB of indexes and a million images."""

IntArray = NDArray[np.int64]

SIDE_BOUNDS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Pixels of the longer side."""


@dataclass(frozen=True, order=True)
class Place:
    """Where an image lies."""

    shard: int
    row: int


@dataclass(frozen=True)
class Relatives:
    """Images of one group: near-duplicates, or what the source's group column joins."""

    members: tuple[Place, ...]  # the first few
    num_members: int
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the indexes say of ``num_images`` images."""

    num_images: int
    num_shards: int
    is_whole: bool
    sides: tuple[tuple[str, int], ...]  # longer side in pixels -> images
    formats: tuple[tuple[str, int], ...]
    modes: tuple[tuple[str, int], ...]
    median_side: int
    median_bytes: int
    largest_bytes: int
    smallest_side: int  # shortest shorter side
    num_groups: int  # of two images or more
    num_grouped: int
    num_mixed: int  # groups with more than one class
    relatives: tuple[Relatives, ...]
    found: dict[bytes, Place]  # by SHA-256


class _Tally:
    def __init__(self, wanted: frozenset[bytes]) -> None:
        self._wanted = np.array(sorted({int.from_bytes(digest[:8], "big") for digest in wanted}), np.uint64)
        self._digests = wanted
        self.found: dict[bytes, Place] = {}
        self.formats: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.long: list[NDArray[np.uint32]] = []
        self.sizes: list[NDArray[np.uint32]] = []
        self.shortest = 1 << 32
        self.groups: list[tuple[NDArray[np.uint64], IntArray, IntArray]] = []  # group, class, shard << 32 | row

    def add(self, shard: int, index: pa.Table) -> None:
        width, height = index["width"].to_numpy(), index["height"].to_numpy()
        self.long.append(np.maximum(width, height))
        self.sizes.append(index["size"].to_numpy())
        self.shortest = min(self.shortest, int(np.minimum(width, height).min(initial=1 << 31)))
        for counter, name in ((self.formats, "format"), (self.modes, "mode")):
            counts = index[name].combine_chunks().value_counts()
            counter.update(
                dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))
            )
        self._note_groups(shard, index)
        self._look_for(shard, index)

    def _note_groups(self, shard: int, index: pa.Table) -> None:
        group = index["group"].to_numpy()
        rows = np.arange(len(group), dtype=np.int64)
        if not np.array_equal(group, index_keys(index)):  # a group of its own is named by its key
            self.groups.append((group, index["class_id"].to_numpy().astype(np.int64), shard << 32 | rows))

    def _look_for(self, shard: int, index: pa.Table) -> None:
        if not len(self._wanted):
            return
        for row in np.flatnonzero(np.isin(index_digests(index)[:, 0], self._wanted)).tolist():
            digest = index["sha256"][row].as_py()
            if digest in self._digests:
                self.found[digest] = Place(shard, row)


Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""


def survey(
    snapshot: Snapshot, wanted: Iterable[bytes] = (), num_relatives: int = 12, progress: Progress | None = None
) -> Survey:
    """Read the indexes of ``snapshot``; ``wanted`` are digests to be found."""
    rows = snapshot.shards.to_pylist()
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_SHARDS)).round().astype(int)).tolist()
    tally = _Tally(frozenset(wanted))
    for done, shard in enumerate(chosen if rows else [], 1):
        tally.add(shard, _index(snapshot, rows[shard]))
        if progress is not None:
            progress("survey", done, len(chosen))
    long = np.concatenate(tally.long) if tally.long else np.zeros(0, np.uint32)
    sizes = np.concatenate(tally.sizes) if tally.sizes else np.zeros(0, np.uint32)
    groups = _Groups.of(tally.groups)
    return Survey(
        num_images=len(long),
        num_shards=len(chosen) if rows else 0,
        is_whole=len(chosen) == len(rows) or not rows,
        sides=_sides(long),
        formats=tuple(tally.formats.most_common()),
        modes=tuple(tally.modes.most_common()),
        median_side=int(np.median(long)) if len(long) else 0,
        median_bytes=int(np.median(sizes)) if len(sizes) else 0,
        largest_bytes=int(sizes.max(initial=0)),
        smallest_side=tally.shortest if len(long) else 0,
        num_groups=groups.num_groups,
        num_grouped=groups.num_images,
        num_mixed=groups.num_mixed,
        relatives=groups.examples(num_relatives),
        found=tally.found,
    )


def _index(snapshot: Snapshot, row: dict[str, Any]) -> pa.Table:
    """Unlike ``Snapshot.index``, nothing is kept."""
    ref = FileRef(sha256=row["index_sha256"], size=row["index_size"], num_rows=row["num_samples"])
    return snapshot.table(ref, INDEXES, index_path(ref.sha256))


def _sides(long: NDArray[np.uint32]) -> tuple[tuple[str, int], ...]:
    """From the first bound that holds an image to the last."""
    counts = np.bincount(np.searchsorted(SIDE_BOUNDS, long, side="left"), minlength=len(SIDE_BOUNDS) + 1).tolist()
    labels = [
        f"up to {SIDE_BOUNDS[0]}",
        *(f"{low + 1:,} to {high:,}" for low, high in pairwise(SIDE_BOUNDS)),
        f"over {SIDE_BOUNDS[-1]:,}",
    ]
    there = [place for place, count in enumerate(counts) if count]
    return tuple(zip(labels, counts, strict=True))[min(there) : max(there) + 1] if there else ()


class _Groups:
    """Groups of two images or more; those of several classes come first, as they deserve a look."""

    def __init__(self, class_id: IntArray, place: IntArray, first: IntArray, size: IntArray, mixed: IntArray) -> None:
        self._class_id, self._place, self._first, self._size, self._mixed = class_id, place, first, size, mixed
        self.num_groups = len(size)
        self.num_images = int(size.sum())
        self.num_mixed = int(np.count_nonzero(mixed > 1))

    @classmethod
    def of(cls, parts: list[tuple[NDArray[np.uint64], IntArray, IntArray]]) -> _Groups:
        empty = (np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))
        group, class_id, place = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
        order = np.lexsort((place, class_id, group))
        group, class_id, place = group[order], class_id[order], place[order]
        first = np.flatnonzero(np.concatenate([np.ones(min(len(group), 1), bool), group[1:] != group[:-1]]))
        size = np.diff(np.append(first, len(group)))
        turns = np.concatenate([np.zeros(min(len(group), 1), bool), class_id[1:] != class_id[:-1]])
        turns[first] = True
        mixed = np.add.reduceat(turns, first, dtype=np.int64) if len(first) else np.zeros(0, np.int64)
        several = size > 1
        return cls(class_id, place, first[several], size[several], mixed[several])

    def examples(self, num: int) -> tuple[Relatives, ...]:
        order = np.lexsort((-self._size, -(self._mixed > 1).astype(np.int64)))[:num].tolist()
        return tuple(Relatives(tuple(self._members(one)), int(self._size[one]), int(self._mixed[one])) for one in order)

    def _members(self, one: int, num: int = 4) -> Iterable[Place]:
        """A few, of as many classes as there are."""
        begin, end = int(self._first[one]), int(self._first[one] + self._size[one])
        ids = self._class_id[begin:end]
        fresh = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
        rest = np.setdiff1d(np.arange(end - begin), fresh)
        for row in sorted(np.concatenate([fresh, rest])[:num].tolist()):
            code = int(self._place[begin + row])
            yield Place(code >> 32, code & 0xFFFFFFFF)
