"""What the bytes reveal settles who is in: duplicates, conflicts, leaks, then splits, then the final shards.

Comes in: the indexes of the units written from the listing. Goes out: final shards, most of them the units as they are,
and rejects. Guarantees: the outcome depends on the set of samples alone; nothing is read from the source again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.ingest.shards import Unit, UnitRecord, leaves, read_index, shard_hash
from pipeline.ingest.splits import assign, find_duplicates, join_groups, straddlers
from pipeline.schema import INDEX, SPLIT_UNSET, SPLITS, Reason
from pipeline.store import Store


@dataclass(frozen=True)
class Samples:
    """Readable samples of all units, as arrays of one length; ``digest`` is SHA-256 as uint64 [n, 4]."""

    key: NDArray[np.uint64]
    class_id: NDArray[np.int32]
    split: NDArray[np.int8]
    group: NDArray[np.uint64]
    size: NDArray[np.int64]
    digest: NDArray[np.uint64]
    unit: NDArray[np.int32]
    row: NDArray[np.int32]


@dataclass(frozen=True)
class Expelled:
    """Samples whose bytes were readable and that still may not stay, with the sample each one collides with."""

    sample: NDArray[np.int64]
    other: NDArray[np.int64]  # -1: none to name
    reason: tuple[Reason, ...]


@dataclass(frozen=True)
class FinalShard:
    """One shard of the snapshot: ``record`` if a finished unit is it already, else it is still to be repacked."""

    split: str
    prefix: str
    record: UnitRecord | None
    members: NDArray[np.int64]  # sample numbers, ascending, so grouped by unit

    @property
    def name(self) -> str:
        return f"{self.split}-{self.prefix or 'all'}"


def gather(store: Store, records: Sequence[UnitRecord]) -> Samples:
    """Load the few columns that settling needs from every unit's index."""
    counts = [record.index.num_rows if record.index else 0 for record in records]
    total = sum(counts)
    samples = Samples(
        key=np.empty(total, np.uint64),
        class_id=np.empty(total, np.int32),
        split=np.empty(total, np.int8),
        group=np.empty(total, np.uint64),
        size=np.empty(total, np.int64),
        digest=np.empty((total, 4), np.uint64),
        unit=np.repeat(np.arange(len(records), dtype=np.int32), counts),
        row=np.empty(total, np.int32),
    )
    start = 0
    for record, count in zip(records, counts, strict=True):
        if not count:
            continue
        index, part = read_index(store, record), slice(start, start + count)
        samples.key[part] = index_keys(index)
        samples.class_id[part] = index["class_id"].to_numpy()
        samples.split[part] = SPLITS.index(index["split"][0].as_py())
        samples.group[part] = index["group"].to_numpy()
        samples.size[part] = index["size"].to_numpy()
        samples.digest[part] = _binary_words(index["sha256"])
        samples.row[part] = np.arange(count)
        start += count
    return samples


def index_keys(index: pa.Table) -> NDArray[np.uint64]:
    """The keys of an index as uint64 [rows]."""
    text = b"".join(key.encode() for key in index["key"].to_pylist())
    return np.frombuffer(bytes.fromhex(text.decode()), dtype=">u8").astype(np.uint64)


def _binary_words(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    data = b"".join(column.to_pylist())
    return np.frombuffer(data, dtype=">u8").reshape(-1, 4).astype(np.uint64)


def settle(
    samples: Samples, *, splits_given: bool, num_classes: int, seed: int
) -> tuple[NDArray[np.int8], NDArray[np.uint64], Expelled]:
    """Final split (``SPLIT_UNSET`` for the expelled) and group of every sample, and who was expelled.

    ``splits_given``: the source chose the splits, so copies and groups that straddle them leak; otherwise splits are
    assigned here, over what is left, and cannot leak.
    """
    before = samples.split if splits_given else np.full(len(samples.key), SPLIT_UNSET, np.int8)
    found = find_duplicates(samples.digest, samples.key, samples.class_id, before)
    out = found.conflict | found.leak | found.duplicate
    copies = np.flatnonzero(found.duplicate | found.leak)
    group = join_groups(samples.group, samples.group[copies], samples.group[found.keeper[copies]])
    leak = found.leak.copy()
    stay = np.flatnonzero(~out)
    final = np.full(len(samples.key), SPLIT_UNSET, np.int8)
    if splits_given:
        straddling = straddlers(group[stay], samples.split[stay])
        leak[stay[straddling]] = True
        out = out | leak
        stay = stay[~straddling]
        final[stay] = samples.split[stay]
    else:
        final[stay] = assign(samples.class_id[stay], group[stay], before[stay], num_classes=num_classes, seed=seed)
    gone = np.flatnonzero(out)
    reason = tuple(
        Reason.LABEL_CONFLICT if found.conflict[i] else Reason.LEAK if leak[i] else Reason.DUPLICATE_OF for i in gone
    )
    return final, group, Expelled(gone, found.keeper[gone], reason)


@dataclass(frozen=True)
class ShardLimits:
    """When a trie node is divided."""

    max_samples: int
    max_bytes: int


def final_shards(
    samples: Samples,
    placed: tuple[NDArray[np.int8], NDArray[np.uint64]],
    records: Sequence[UnitRecord],
    *,
    limits: ShardLimits,
    seed: int,
) -> list[FinalShard]:
    """Divide every split's survivors; a leaf that is exactly one finished unit keeps its files, others are repacked."""
    split, group = placed
    shards: list[FinalShard] = []
    for code, name in enumerate(SPLITS):
        members = np.flatnonzero(split == code)
        hashes = shard_hash(samples.key[members], split=name, seed=seed)
        order = np.argsort(hashes)
        members = members[order]
        for leaf in leaves(
            hashes[order], samples.size[members], max_samples=limits.max_samples, max_bytes=limits.max_bytes
        ):
            own = np.sort(members[leaf.start : leaf.stop])
            shards.append(FinalShard(name, leaf.prefix, _whole_unit(samples, own, code, group, records), own))
    return shards


def _whole_unit(
    samples: Samples,
    own: NDArray[np.int64],
    code: int,
    group: NDArray[np.uint64],
    records: Sequence[UnitRecord],
) -> UnitRecord | None:
    unit = samples.unit[own]
    record = records[int(unit[0])]
    unchanged = (
        bool(np.all(unit == unit[0]))
        and record.index is not None
        and record.index.num_rows == len(own)
        and bool(np.all(samples.split[own] == code))
        and bool(np.all(group[own] == samples.group[own]))
    )
    return record if unchanged else None


def repack_unit(
    store: Store, samples: Samples, shard: FinalShard, group: NDArray[np.uint64], records: Sequence[UnitRecord]
) -> Unit:
    """The unit that writes ``shard`` from the tars of the units its members are in now."""
    own = shard.members
    parts: list[pa.Table] = []
    origins: list[str] = []
    for number in np.unique(samples.unit[own]).tolist():
        record = records[number]
        rows = samples.row[own[samples.unit[own] == number]]
        parts.append(read_index(store, record).take(pa.array(rows)))
        assert record.tar is not None  # it has rows
        origins += [record.tar.sha256] * len(rows)
    settled = {"group": pa.array(group[own]), "split": pa.array([shard.split] * len(own), pa.string())}
    table = pa.concat_tables(parts)
    for column, values in settled.items():
        table = table.set_column(INDEX.get_field_index(column), INDEX.field(column), values)
    order = np.argsort(samples.key[own])
    unit = Unit(
        name=shard.name,
        split=shard.split,
        members=table.take(pa.array(order)).cast(INDEX),
        origins=tuple(origins[i] for i in order.tolist()),
    )
    return unit.with_digest({})
