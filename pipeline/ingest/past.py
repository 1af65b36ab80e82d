"""What the newest snapshot holds: where every image is, and which split each one has, or had.

Comes in: a snapshot. Goes out: its index rows as columns, and a memory of splits by content and by key. Guarantees: it
is read from checked files alone, so what a build decides does not depend on notes that may be lost; an image keeps its
split for ever, also when it leaves and comes back, under another name, or with another label.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.ingest.scratch import Scratch
from pipeline.ingest.units import Pack, index_digests, index_hashes, index_keys, read_index
from pipeline.schema import DEPARTED, SPLIT_UNSET, SPLITS, FileRef
from pipeline.snapshot import Snapshot
from pipeline.store import Store


@dataclass(frozen=True)
class Past:
    """The rows of all shards of one snapshot, as arrays of one length. ``digest`` is SHA-256 as uint64 [n, 4]."""

    packs: tuple[Pack, ...]
    key: NDArray[np.uint64]
    class_id: NDArray[np.int32]
    split: NDArray[np.int8]
    group: NDArray[np.uint64]
    digest: NDArray[np.uint64]
    num_pixels: NDArray[np.int64]
    phash: NDArray[np.uint64]
    hashing: NDArray[np.int8]  # Hashing
    pack: NDArray[np.int32]
    row: NDArray[np.int32]
    departed: pa.Table  # DEPARTED

    @cached_property
    def _by_key(self) -> Lookup:
        return Lookup.of(self.key)

    @cached_property
    def _by_content(self) -> Lookup:
        return Lookup.of(self.digest[:, 0])

    @property
    def _is_empty(self) -> bool:
        """That of a first build: nothing is to be looked for, in arrays as long as the listing."""
        return not len(self.key) and not self.departed.num_rows

    def find(self, key: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The row of each key, or -1."""
        return self._by_key.find(key)

    def find_content(self, digest: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The row with each content (uint64 [n, 4]), or -1."""
        row = self._by_content.find(digest[:, 0])
        return np.where((row >= 0) & np.all(self.digest[row] == digest, axis=1), row, -1) if len(self.key) else row

    def split_of_key(self, key: NDArray[np.uint64]) -> NDArray[np.int8]:
        """The split that each key has, or had last; ``SPLIT_UNSET`` for new ones."""
        if self._is_empty:
            return np.full(len(key), SPLIT_UNSET, np.int8)
        gone = _values(Lookup.of(_column(self.departed, "key")), key, _column(self.departed, "split"))
        return _or_else(_values(self._by_key, key, self.split), gone)

    def split_of(self, key: NDArray[np.uint64], digest: NDArray[np.uint64]) -> NDArray[np.int8]:
        """The split of each image: that of its content (uint64 [n, 4]), else that of its key."""
        if self._is_empty:
            return np.full(len(key), SPLIT_UNSET, np.int8)
        word = np.ascontiguousarray(digest[:, 0])
        gone = _values(Lookup.of(_column(self.departed, "content")), word, _column(self.departed, "split"))
        return _or_else(_values(self._by_content, word, self.split), gone, self.split_of_key(key))

    def departures(self, key: NDArray[np.uint64], word: NDArray[np.uint64], stays: NDArray[np.bool_]) -> pa.Table:
        """DEPARTED of a snapshot with those images that stay: whoever was in a split and is in none now.

        ``word`` is the first of each digest.
        """
        if self._is_empty:
            return DEPARTED.empty_table()
        key, word = key[stays], word[stays]
        was: dict[str, NDArray[Any]] = {
            "key": np.concatenate([self.key, _column(self.departed, "key")]),
            "content": np.concatenate([self.digest[:, 0], _column(self.departed, "content")]),
            "split": np.concatenate([self.split, _column(self.departed, "split")]),
        }
        now = Lookup.of(key).find(was["key"])
        here = now >= 0
        here[here] = word[now[here]] == was["content"][here]
        gone = np.flatnonzero(~here)
        gone = gone[np.lexsort((gone, was["content"][gone], was["key"][gone]))]
        again = np.zeros(len(gone), np.bool_)  # the newest entry of each comes first
        again[1:] = np.all([was[name][gone[1:]] == was[name][gone[:-1]] for name in ("key", "content")], axis=0)
        return pa.table({name: values[gone[~again]] for name, values in was.items()}, schema=DEPARTED)


@dataclass(frozen=True)
class Lookup:
    """Where values stand in an array; of several equal ones the first."""

    values: NDArray[np.uint64]  # ascending
    places: NDArray[np.int64]

    @classmethod
    def of(cls, values: NDArray[np.uint64]) -> Lookup:
        order = np.argsort(values, kind="stable")
        return cls(values[order], order)

    def find(self, wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The place of each wanted value, or -1."""
        if not len(self.values):
            return np.full(len(wanted), -1, np.int64)
        near = np.minimum(np.searchsorted(self.values, wanted), len(self.values) - 1)
        return np.where(self.values[near] == wanted, self.places[near], -1)


def load_past(store: Store, parent: Snapshot | None, scratch: Scratch) -> Past:
    """Read the indexes of ``parent``; an empty past where there is none."""
    shards = parent.shards.to_pylist() if parent else []
    total = sum(shard["num_samples"] for shard in shards)
    past = Past(
        packs=tuple(_pack(shard) for shard in shards),
        key=scratch.zeros(total, np.uint64),
        class_id=scratch.zeros(total, np.int32),
        split=scratch.zeros(total, np.int8),
        group=scratch.zeros(total, np.uint64),
        digest=scratch.zeros((total, 4), np.uint64),
        num_pixels=scratch.zeros(total, np.int64),
        phash=scratch.zeros(total, np.uint64),
        hashing=scratch.zeros(total, np.int8),
        pack=scratch.zeros(total, np.int32),
        row=scratch.zeros(total, np.int32),
        departed=_departed(parent),
    )
    start = 0
    for number, (pack, shard) in enumerate(zip(past.packs, shards, strict=True)):
        part = slice(start, start := start + pack.index.num_rows)
        index = read_index(store, pack)
        past.key[part], past.digest[part] = index_keys(index), index_digests(index)
        past.class_id[part], past.group[part] = index["class_id"].to_numpy(), index["group"].to_numpy()
        past.split[part] = SPLITS.index(shard["split"])
        past.num_pixels[part] = index["width"].to_numpy().astype(np.int64) * index["height"].to_numpy()
        if "phash" in index.column_names:
            past.phash[part], past.hashing[part] = index_hashes(index)
        past.pack[part], past.row[part] = number, np.arange(pack.index.num_rows)
    return past


def _pack(shard: dict[str, Any]) -> Pack:
    rows = shard["num_samples"]
    return Pack(
        tar=FileRef(sha256=shard["tar_sha256"], size=shard["tar_size"], num_rows=rows),
        index=FileRef(sha256=shard["index_sha256"], size=shard["index_size"], num_rows=rows),
    )


def _departed(parent: Snapshot | None) -> pa.Table:
    if parent is None or parent.record.departed is None:
        return DEPARTED.empty_table()
    return parent.table(parent.record.departed, DEPARTED)


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    return table[name].to_numpy()


def _values(lookup: Lookup, wanted: NDArray[np.uint64], split: NDArray[np.int8]) -> NDArray[np.int8]:
    place = lookup.find(wanted)
    return (
        np.where(place >= 0, split[place], SPLIT_UNSET).astype(np.int8)
        if len(split)
        else np.full(len(wanted), SPLIT_UNSET, np.int8)
    )


def _or_else(*splits: NDArray[np.int8]) -> NDArray[np.int8]:
    """The first that is set."""
    result = splits[0]
    for other in splits[1:]:
        result = np.where(result == SPLIT_UNSET, other, result)
    return result
