"""Which shard holds whom: units to be read, and final shards, most of them files that exist already.

Comes in: references and their splits, or settled samples and the packs that hold them. Goes out: units of work.
Guarantees: a final shard is a leaf of the trie over the images of its split, wherever they came from;
one that is row by row an existing pack keeps its files; nothing is read from the source again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.ingest.known import Known
from pipeline.ingest.past import Past
from pipeline.ingest.scratch import Scratch
from pipeline.ingest.settle import Samples, Settlement
from pipeline.ingest.trie import leaves, shard_hash
from pipeline.ingest.units import (
    Hashing,
    Pack,
    Part,
    Repack,
    Unit,
    UnitRecord,
    index_digests,
    index_hashes,
    index_keys,
    read_index,
)
from pipeline.schema import SPLIT_UNSET, SPLITS
from pipeline.store import Store


@dataclass(frozen=True)
class ShardRule:
    """When a trie node is divided; ``seed`` keys its hashes."""

    max_samples: int
    max_bytes: int
    seed: int

    def divide(
        self, split: NDArray[np.int8], key: NDArray[np.uint64], size: NDArray[np.int64]
    ) -> Iterator[tuple[str, str, NDArray[np.int64]]]:
        """Split, trie prefix and members (ascending) of each leaf, in order; those without a split are in none."""
        for code, name in enumerate(SPLITS):
            members = np.flatnonzero(split == code)
            hashes = shard_hash(key[members], split=name, seed=self.seed)
            order = np.argsort(hashes)
            members = members[order]
            for leaf in leaves(hashes[order], size[members], max_samples=self.max_samples, max_bytes=self.max_bytes):
                yield name, leaf.prefix, np.sort(members[leaf.start : leaf.stop])


def reading_units(references: pa.Table, split: NDArray[np.int8], rule: ShardRule) -> Iterator[Unit]:
    """Units that read the references that have a split (int8 [rows], ``SPLIT_UNSET`` for those left out).

    On a first build these are the final shards, as far as names and sizes can tell.
    """
    for name, prefix, rows in rule.divide(split, references["key"].to_numpy(), references["size"].to_numpy()):
        # take() copies just these rows: a slice would be pickled with all of the table behind it.
        members = references.take(pa.array(rows)).combine_chunks()
        yield Unit(name=f"{name}-{prefix or 'all'}", split=name, members=members)


def gather(
    store: Store, references: pa.Table, known: Known, past: Past, records: Sequence[UnitRecord], scratch: Scratch
) -> tuple[Samples, tuple[Pack, ...]]:
    """All images whose bytes are known, and the packs that hold them: those of the past, then those read now."""
    old, out = np.flatnonzero(known.row >= 0), np.flatnonzero(known.expelled)
    read = [record.pack for record in records if record.pack is not None]
    packs = (*past.packs, *read)
    num = len(old) + len(out) + sum(pack.index.num_rows for pack in read)
    reference = scratch.zeros(num, np.int32)
    samples = Samples(
        reference=reference,
        digest=scratch.zeros((num, 4), np.uint64),
        pack=scratch.zeros(num, np.int32),
        row=scratch.zeros(num, np.int32),
        held_class=scratch.zeros(num, np.int32),
        held_split=scratch.zeros(num, np.int8),
        held_group=scratch.zeros(num, np.uint64),
        phash=scratch.zeros(num, np.uint64),
        hashing=scratch.zeros(num, np.int8),
        # Known when it is known which references these are:
        key=scratch.zeros(num, np.uint64),
        class_id=scratch.zeros(num, np.int32),
        given=scratch.zeros(num, np.int8),
        group=scratch.zeros(num, np.uint64),
        size=scratch.zeros(num, np.int64),
    )
    part, row = slice(0, len(old)), known.row[old]
    reference[part], samples.digest[part] = old, past.digest[row]
    samples.pack[part], samples.row[part] = past.pack[row], past.row[row]
    samples.held_class[part], samples.held_split[part] = past.class_id[row], past.split[row]
    samples.held_group[part] = past.group[row]
    samples.phash[part], samples.hashing[part] = past.phash[row], past.hashing[row]
    part = slice(len(old), len(old) + len(out))
    reference[part], samples.digest[part] = out, known.digest[out]
    samples.pack[part] = samples.row[part] = samples.held_class[part] = samples.held_split[part] = -1
    samples.phash[part], samples.hashing[part] = known.phash[out], known.hashing[out]
    keys = references["key"].to_numpy()
    start = len(old) + len(out)
    for number, pack in enumerate(read, len(past.packs)):
        index = read_index(store, pack)
        part = slice(start, start := start + index.num_rows)
        first = index["split"][0].as_py()  # '' in what a container became: it is no shard of any split
        samples.held_split[part] = SPLITS.index(first) if first else SPLIT_UNSET
        samples.pack[part], samples.row[part] = number, np.arange(index.num_rows)
        samples.held_class[part], samples.held_group[part] = index["class_id"].to_numpy(), index["group"].to_numpy()
        reference[part], samples.digest[part] = np.searchsorted(keys, index_keys(index)), index_digests(index)
        if "phash" in index.column_names:  # else zeros, which were never written, take no memory
            samples.phash[part], samples.hashing[part] = index_hashes(index)
    scratch.rest()
    for name, column in (("given", "split"), ("key", "key"), ("class_id", "class_id"), ("group", "group")):
        np.take(references[column].to_numpy(), reference, out=getattr(samples, name), mode="clip")
    np.take(references["size"].to_numpy(), reference, out=samples.size, mode="clip")  # clip: without a copy
    scratch.rest()
    return samples, packs


@dataclass(frozen=True)
class FinalShard:
    """One shard of the snapshot: ``pack`` if its files are there, else it is still to be written by ``repack``.

    ``hashed``: its index carries perceptual hashes.
    """

    split: str
    prefix: str
    members: NDArray[np.int64]  # sample numbers
    pack: Pack | None
    hashed: bool = False


def final_shards(
    samples: Samples, settled: Settlement, packs: Sequence[Pack], rule: ShardRule, *, hashed: bool
) -> Iterator[FinalShard]:
    """Divide every split's images; a leaf that is row by row one existing pack keeps its files."""
    unchanged = (
        (samples.held_class == samples.class_id)
        & (samples.held_split == settled.split)
        & (samples.held_group == settled.group)
        & ((samples.hashing != Hashing.UNKNOWN) == hashed)
    )
    for split, prefix, members in rule.divide(settled.split, samples.key, samples.size):
        number = samples.pack[members]
        pack = packs[int(number[0])]
        whole = len(members) == pack.index.num_rows and bool(np.all((number == number[0]) & unchanged[members]))
        yield FinalShard(split, prefix, members, pack if whole else None, hashed)


def repack_unit(samples: Samples, settled: Settlement, packs: Sequence[Pack], shard: FinalShard) -> Repack:
    """The unit that writes ``shard`` from the packs its members are in now."""
    members = shard.members[np.lexsort((samples.row[shard.members], samples.pack[shard.members]))]
    number = samples.pack[members]
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    parts = tuple(
        Part(packs[int(number[start])], samples.row[members[start:stop]])
        for start, stop in zip(starts, [*starts[1:], len(members)], strict=True)
    )
    return Repack(
        name=f"{shard.split}-{shard.prefix or 'all'}",
        split=shard.split,
        parts=parts,
        class_id=samples.class_id[members],
        group=settled.group[members],
        hashed=shard.hashed,
    ).with_digest()


def to_fetch(samples: Samples, settled: Settlement, num_references: int) -> NDArray[np.int8]:
    """A split for every reference whose image stays, or must be seen to be settled, and whose bytes are not at hand."""
    split = np.full(num_references, SPLIT_UNSET, np.int8)
    missing = ((settled.split != SPLIT_UNSET) | settled.unseen) & (samples.pack < 0)
    split[samples.reference[missing]] = np.maximum(settled.split[missing], 0)  # of a leak, any: it is read to be seen
    return split
