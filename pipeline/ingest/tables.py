"""Finished shards -> the tables of a snapshot: samples per split, classes, shards.

Comes in: final shards in order, and their indexes. Goes out: Arrow tables in the shapes of ``schema``. Guarantees:
class c owns a contiguous range of its split's sample table, in keyed-hash order; row numbers of the shard table are the
shard numbers in the sample tables; columns are numpy arrays throughout, never a Python object per image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.ingest.stats import ClassStats, class_table
from pipeline.ingest.trie import shard_hash
from pipeline.ingest.units import Pack, index_keys, read_index
from pipeline.schema import CLASSES, SAMPLES, SHARDS, SPLITS, FileRef
from pipeline.store import Store, put_table


@dataclass(frozen=True)
class Written:
    """A final shard with its files."""

    split: str
    prefix: str
    pack: Pack


@dataclass(frozen=True)
class Tables:
    """References to the tables of one snapshot, and the counts that its record repeats."""

    classes: FileRef
    shards: FileRef
    samples: Mapping[str, FileRef]
    class_table: pa.Table
    num_images: int


def put_tables(store: Store, shards: Sequence[Written], class_names: Sequence[str], *, seed: int) -> Tables:
    """Write sample, class and shard tables of the given shards (ordered by split, then prefix)."""
    samples: dict[str, FileRef] = {}
    stats = ClassStats.zeros(len(class_names))
    for split in SPLITS:
        numbered = [(number, shard) for number, shard in enumerate(shards) if shard.split == split]
        if not numbered:
            continue
        table, part = _sample_table(store, numbered, split, len(class_names), seed)
        samples[split] = put_table(store, table, SAMPLES)
        stats = stats.merge(part)
    classes = class_table(class_names, stats)
    return Tables(
        classes=put_table(store, classes, CLASSES),
        shards=put_table(store, _shard_table(shards), SHARDS),
        samples=samples,
        class_table=classes,
        num_images=sum(shard.pack.index.num_rows for shard in shards),
    )


def _sample_table(
    store: Store, numbered: Sequence[tuple[int, Written]], split: str, num_classes: int, seed: int
) -> tuple[pa.Table, ClassStats]:
    total = sum(shard.pack.index.num_rows for _, shard in numbered)
    columns: dict[str, NDArray[Any]] = {item.name: np.empty(total, item.type.to_pandas_dtype()) for item in SAMPLES}
    class_id, key = np.empty(total, np.int32), np.empty(total, np.uint64)
    start = 0
    for number, shard in numbered:
        index = read_index(store, shard.pack)
        part = slice(start, start := start + index.num_rows)
        class_id[part], key[part] = index["class_id"].to_numpy(), index_keys(index)
        columns["shard"][part], columns["row"][part] = number, np.arange(index.num_rows)
        for name in ("offset", "size", "checksum"):
            columns[name][part] = index[name].to_numpy()
    stats = ClassStats.of(class_id, np.broadcast_to(SPLITS.index(split), total), columns["size"], num_classes)
    order = np.lexsort((shard_hash(key, split=split, seed=seed), class_id))
    for name in columns:  # one column at a time: the unsorted copy is freed before the next is made
        columns[name] = columns[name][order]
    return pa.table(columns, schema=SAMPLES), stats


def _shard_table(shards: Iterable[Written]) -> pa.Table:
    rows: list[tuple[str, str, int, str, int, str, int]] = []
    for shard in shards:
        tar, index = shard.pack.tar, shard.pack.index
        rows.append((shard.split, shard.prefix, tar.num_rows, tar.sha256, tar.size, index.sha256, index.size))
    return _from_rows(rows, SHARDS)


def _from_rows(rows: Sequence[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[] for _ in schema]
    return pa.table(
        [pa.array(list(column), item.type) for column, item in zip(columns, schema, strict=True)], schema=schema
    )
