"""All indexes together: every image once, groups whole, every shard where the trie puts it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.ingest.neardup import MAX_DISTANCE, near_clusters
from pipeline.ingest.shards import shard_hash
from pipeline.ingest.units import Hashing, index_hashes
from pipeline.keyed import text_key
from pipeline.schema import SPLITS, Reason
from pipeline.verify.files import RESTORE
from pipeline.verify.findings import Code, Findings

_ROW_REASONS = frozenset({Reason.DUPLICATE_ROW, Reason.LEAK, Reason.NO_LABEL, Reason.NAME_ENCODING})
"""Reasons that reject a row of a table, whose image another row of that table may bring in."""

COLUMNS = ("key", "class_id", "group", "offset", "size", "checksum", "sha256")
"""What ``collect`` keeps of an index, with ``phash`` where there is one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Every index row as columns of one length, shard after shard: row r of shard s is number ``first[s] + r``."""

    first: NDArray[np.int64]  # [shards + 1]
    split: NDArray[np.int8]  # position in SPLITS
    key: NDArray[np.uint64]
    digest: NDArray[np.uint64]  # SHA-256 as [n, 4]
    class_id: NDArray[np.int32]
    group: NDArray[np.uint64]
    offset: NDArray[np.uint64]
    size: NDArray[np.uint32]
    checksum: NDArray[np.uint64]
    phash: NDArray[np.uint64]
    hashing: NDArray[np.int8]  # Hashing
    open_index: Callable[[int], pa.Table | None]  # to name an image; paths are not kept

    def name(self, row: int) -> str:
        """Key and source path of an image, for messages."""
        shard = int(np.searchsorted(self.first, row, side="right")) - 1
        table = self.open_index(shard)
        path = "" if table is None else f" ({table['path'][row - int(self.first[shard])].as_py()!r})"
        return f"{self.key[row]:016x}{path}"


def check_index(index: pa.Table, split: str, num_classes: int, path: str, findings: Findings) -> bool:
    """One index by itself; False if its rows cannot be used further."""
    keys: list[str] = index["key"].to_pylist()
    paths: list[str] = index["path"].to_pylist()
    expected = [f"{text_key(name):016x}" for name in paths]
    wrong = np.array([one != two for one, two in zip(keys, expected, strict=True)], np.bool_)
    findings.add_rows(
        Code.TABLE,
        path,
        wrong,
        lambda i: f"row {i}: expected key {expected[i]} of {paths[i]!r}, found {keys[i]!r}; {RESTORE}",
    )
    if any(one >= two for one, two in pairwise(keys)):
        findings.add(Code.TABLE, path, f"expected keys to ascend; {RESTORE}")
    if others := set(index["split"].to_pylist()) - {split}:
        findings.add(
            Code.TABLE, path, f"expected split {split!r} as in the shard table, found {sorted(others)}; {RESTORE}"
        )
    class_id = index["class_id"].to_numpy()
    outside = (class_id < 0) | (class_id >= num_classes)
    findings.add_rows(
        Code.TABLE, path, outside, lambda i: f"row {i}: no class {class_id[i]}, there are {num_classes}; {RESTORE}"
    )
    return not outside.any() and all(re.fullmatch("[0-9a-f]{16}", key) for key in keys)


def collect(parts: Sequence[tuple[int, pa.Table]], open_index: Callable[[int], pa.Table | None]) -> Rows:
    """The rows of all shards; ``parts`` are (position in SPLITS, index), one for each shard in order."""
    counts = [index.num_rows for _, index in parts]
    columns: dict[str, Any] = {name: _join([index[name].to_numpy() for _, index in parts]) for name in COLUMNS[1:-1]}
    keys = b"".join(bytes.fromhex("".join(index["key"].to_pylist())) for _, index in parts)
    digests = b"".join(b"".join(index["sha256"].to_pylist()) for _, index in parts)
    looks = [index_hashes(index) for _, index in parts]
    return Rows(
        first=np.cumsum([0, *counts], dtype=np.int64),
        split=np.repeat(np.array([code for code, _ in parts], np.int8), counts),
        key=np.frombuffer(keys, ">u8").astype(np.uint64),
        digest=np.frombuffer(digests, ">u8").reshape(-1, 4).astype(np.uint64),
        phash=_join([phash for phash, _ in looks]).astype(np.uint64),
        hashing=_join([hashing for _, hashing in looks]).astype(np.int8),
        open_index=open_index,
        **columns,
    )


def _join(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def check_once(rows: Rows, where: str, findings: Findings) -> None:
    """No key and no bytes stand in two rows."""
    for column, what in ((rows.key[:, None], "key"), (rows.digest, "bytes")):
        order = np.lexsort(column.T[::-1])
        again = np.zeros(len(order), np.bool_)
        again[1:] = np.all(column[order[1:]] == column[order[:-1]], axis=1)

        def tell(i: int, order: NDArray[np.int64] = order, what: str = what) -> str:
            first, second = rows.name(int(order[i - 1])), rows.name(int(order[i]))
            return f"two rows have the same {what}: {first} and {second}; expected every image once; build again"

        findings.add_rows(Code.ONCE, where, again, tell)


def check_groups(rows: Rows, where: str, findings: Findings) -> None:
    """A group lies in one split, else training sees what evaluation asks."""
    order = np.lexsort((rows.split, rows.group))
    group, split = rows.group[order], rows.split[order]
    torn = np.zeros(len(order), np.bool_)
    torn[1:] = (group[1:] == group[:-1]) & (split[1:] != split[:-1])

    def tell(i: int) -> str:
        one, two = (f"{rows.name(int(row))} in {SPLITS[rows.split[row]]}" for row in order[i - 1 : i + 1])
        return f"group {group[i]:016x} straddles splits: {one}, {two}; build again"

    findings.add_rows(Code.GROUP, where, torn, tell)


def check_lookalikes(rows: Rows, max_distance: object, where: str, findings: Findings) -> None:
    """Images whose perceptual hashes are within ``max_distance`` bits are of one group; None: nobody asked for it."""
    if max_distance is None:
        return
    if not isinstance(max_distance, int) or not 1 <= max_distance <= MAX_DISTANCE:
        findings.add(Code.RECORD, where, f"near_duplicates is {max_distance!r}, expected bits, 1 to {MAX_DISTANCE}")
        return
    unknown = rows.hashing == Hashing.UNKNOWN
    findings.add_rows(
        Code.GROUP, where, unknown, lambda i: f"{rows.name(i)}: its index has no perceptual hashes; build again"
    )
    seen = np.flatnonzero(rows.hashing == Hashing.KNOWN)
    leader = seen[near_clusters(rows.phash[seen], max_distance=max_distance)]

    def tell(i: int) -> str:
        one, two = rows.name(int(leader[i])), rows.name(int(seen[i]))
        return f"{one} and {two} look alike within {max_distance} bits, and are of two groups; build again"

    findings.add_rows(Code.GROUP, where, rows.group[leader] != rows.group[seen], tell)


def check_rejects(rejects: pa.Table, rows: Rows, where: str, findings: Findings) -> None:
    """No image is a row and a reject (B1); of copies, one stayed; of bytes with two labels, none."""
    if not rejects.num_rows:
        return
    known = np.sort(rows.key)
    digests = set(map(bytes, rows.digest.astype(">u8")))
    reasons = set(Reason)
    for number, reject in enumerate(rejects.to_pylist()):
        problem = _reject_problem(reject, known, digests, reasons)
        if problem:
            findings.add(Code.ONCE, where, f"row {number}, {reject['path']!r}: {problem}")


def _reject_problem(
    reject: dict[str, Any], known: NDArray[np.uint64], digests: set[bytes], reasons: set[Reason]
) -> str | None:
    reason, key = reject["reason"], text_key(reject["path"])
    if not re.fullmatch("([0-9a-f]{64})?", reject["sha256"]):
        return f"expected a SHA-256 in hex or nothing, found {reject['sha256']!r}; {RESTORE}"
    digest = bytes.fromhex(reject["sha256"])
    if reason not in reasons:
        return f"expected one of {', '.join(sorted(reasons))} as its reason, found {reason!r}"
    place = int(np.searchsorted(known, np.uint64(key)))
    of_table_row = reason in _ROW_REASONS and reject["detail"].startswith("row ")
    if place < len(known) and int(known[place]) == key and not of_table_row:
        return f"rejected as {reason}, and also an image of a shard, key {key:016x}; build again"
    if reason == Reason.DUPLICATE_OF and digest not in digests:
        return f"rejected as a copy, but no image has its bytes (SHA-256 {digest.hex()}); build again"
    if reason == Reason.LABEL_CONFLICT and digest and digest in digests:
        return "its bytes have two labels, and an image with these bytes is in a shard; build again"
    return None


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A row of the shard table that is to be a leaf of the trie."""

    shard: int
    prefix: str
    path: str  # of its tar


def check_places(rows: Rows, leaves: Sequence[Leaf], code: int, config: Any, findings: Findings, *, seed: int) -> None:
    """Shards of one split are the leaves of its trie: all of a prefix, within limits, and the prefix above is not."""
    member = np.flatnonzero(rows.split == code)
    hashes = shard_hash(rows.key, split=SPLITS[code], seed=seed)
    order = member[np.argsort(hashes[member])]
    trie = _Trie(hashes[order], np.append(0, np.cumsum(rows.size[order], dtype=np.int64)), _limits(config))
    for leaf in leaves:
        own = hashes[rows.first[leaf.shard] : rows.first[leaf.shard + 1]]
        if problem := trie.problem(leaf.prefix, own):
            findings.add(Code.PLACE, leaf.path, f"shard {leaf.shard}, prefix {leaf.prefix!r}: {problem}; build again")


def _limits(config: Any) -> tuple[int, int] | None:
    limits = (config.get("shard_samples"), config.get("shard_bytes"))
    return limits if all(isinstance(limit, int) for limit in limits) else None


@dataclass(frozen=True, eq=False)
class _Trie:
    hashes: NDArray[np.uint64]  # ascending
    total_bytes: NDArray[np.int64]  # of the images before each, and of all
    limits: tuple[int, int] | None  # images and bytes of a leaf; None: the record does not say

    def problem(self, prefix: str, own: NDArray[np.uint64]) -> str | None:
        if len(prefix) > 64 or set(prefix) - {"0", "1"}:
            return "expected up to 64 binary digits"
        start, stop = self._range(prefix)
        if stop - start != len(own) or not np.array_equal(np.sort(own), self.hashes[start:stop]):
            return f"expected the {stop - start} images whose hashes begin so, found {len(own)} images, and others"
        if self.limits is None:
            return None
        if stop - start > 1 and len(prefix) < 64 and not self._fits(start, stop, self.limits):
            return f"{stop - start} images pass the limits {self.limits} of a shard: expected it to be divided"
        if prefix and self._fits(*self._range(prefix[:-1]), self.limits):
            return "expected it to be one shard with its neighbour: together they are within the limits"
        return None

    def _range(self, prefix: str) -> tuple[int, int]:
        free = 64 - len(prefix)
        low = int(prefix or "0", 2) << free if free < 64 else 0
        high = low | ((1 << free) - 1)
        start = np.searchsorted(self.hashes, np.uint64(low))
        return int(start), int(np.searchsorted(self.hashes, np.uint64(high), side="right"))

    def _fits(self, start: int, stop: int, limits: tuple[int, int]) -> bool:
        size = int(self.total_bytes[stop] - self.total_bytes[start])
        return stop - start <= limits[0] and size <= limits[1]
