"""Units of work and what came of them: what a rerun finds done.

Comes in: the members of one shard. Goes out: a unit named by the hash of everything that decides its bytes, and a
small record of the files it became, in ``runs/units/``. Guarantees: equal digests mean equal bytes; a record that
cannot be read, or whose files are not there, only means that the work is done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import AlreadyExistsError, EngineError
from pipeline.schema import INDEXES, UNIT_FORMAT_VERSION, FileRef, index_path, tar_path
from pipeline.store import Entry, Store, ipc_to_table, read_checked, table_to_ipc


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A shard to be written from the source."""

    name: str  # split and trie prefix, for messages
    split: str
    members: pa.Table  # REFERENCES, sorted by key
    digest: str = ""

    @property
    def num_members(self) -> int:
        return self.members.num_rows

    def with_digest(self, settings: Mapping[str, Any]) -> Unit:
        """The same unit, named by everything that decides its bytes; an equal digest means the work is done already."""
        head = json.dumps([UNIT_FORMAT_VERSION, self.split, dict(settings)], sort_keys=True)
        return replace(self, digest=_digest(head, table_to_ipc(self.members)))


@dataclass(frozen=True)
class Pack:
    """A tar and its index, finished: what a unit became, or a shard of an older snapshot."""

    tar: FileRef
    index: FileRef


@dataclass(frozen=True)
class Part:
    """Rows of a pack, in the order wanted."""

    pack: Pack
    rows: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Repack:
    """A shard to be written from older tars. Arrays run over the rows of all parts, one part after the other."""

    name: str
    split: str
    parts: tuple[Part, ...]
    class_id: NDArray[np.int32]
    group: NDArray[np.uint64]
    hashed: bool = False  # whether its index is to carry perceptual hashes, which those of all parts then do
    digest: str = ""

    @property
    def num_members(self) -> int:
        return len(self.class_id)

    def with_digest(self) -> Repack:
        """The same unit, named by everything that decides its bytes."""
        packs = [(part.pack.tar.sha256, part.pack.index.sha256, len(part.rows)) for part in self.parts]
        head = json.dumps([UNIT_FORMAT_VERSION, self.split, packs, *(["hashed"] if self.hashed else [])])
        rows = (part.rows.astype("<i4").tobytes() for part in self.parts)
        return replace(
            self, digest=_digest(head, *rows, self.class_id.astype("<i4").tobytes(), self.group.astype("<u8").tobytes())
        )


def _digest(head: str, *data: bytes) -> str:
    digest = hashlib.sha256(head.encode() + b"\0")
    for part in data:
        digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What came of a unit. ``tar`` and ``index`` are None when no member survived."""

    digest: str
    tar: FileRef | None
    index: FileRef | None
    rejects: tuple[tuple[str, str, str, str], ...] = ()  # (path, reason, detail, sha256)
    num_images: int = 0  # read, good or bad
    num_bytes: int = 0
    contents: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of a container: `ingest.containers`
    reused: bool = field(default=False, compare=False)

    @property
    def pack(self) -> Pack | None:
        return Pack(self.tar, self.index) if self.tar and self.index else None


UnitFunction = Callable[..., Iterator["int | UnitRecord"]]
"""What a task runs: yields how many images it has done since it last yielded, then the record.

``attempt`` counts from 1; further ones follow a worker that was lost, for whatever reason.
"""


def unit_record_path(digest: str) -> str:
    """Where the record of a finished unit lies below ROOT."""
    return f"runs/units/{digest[:2]}/{digest}.json"


def encode_unit_record(record: UnitRecord) -> bytes:
    """Serialise a record; it lies in ``runs/`` and is created, never overwritten."""
    body = {
        "format": "evenshard-unit",
        "format_version": UNIT_FORMAT_VERSION,
        "digest": record.digest,
        "tar": record.tar.to_json() if record.tar else None,
        "index": record.index.to_json() if record.index else None,
        "rejects": record.rejects,
        "num_images": record.num_images,
        "num_bytes": record.num_bytes,
        **({"contents": record.contents} if record.contents else {}),
    }
    return json.dumps(body, indent=0, sort_keys=True).encode()


@dataclass(frozen=True)
class Reusable:
    """Which files of finished work may be built upon: those that no collection takes before this build is published."""

    kept: frozenset[str]  # that the newest snapshot names
    since_s: float  # others must be younger, by the clock of the storage

    def allows(self, entry: Entry) -> bool:
        """Whether the file will stay."""
        return entry.path in self.kept or (entry.modified_s is not None and entry.modified_s >= self.since_s)


def find_unit_record(store: Store, digest: str, reusable: Reusable | None = None) -> UnitRecord | None:
    """The record of a unit that was finished before, if it and its files are there (and ``reusable``); else None."""
    path = unit_record_path(digest)
    if not store.exists(path):
        return None
    try:
        body = json.loads(store.read(path))
        record = UnitRecord(
            digest=body["digest"],
            tar=FileRef.from_json(body["tar"]) if body["tar"] else None,
            index=FileRef.from_json(body["index"]) if body["index"] else None,
            rejects=tuple((str(a), str(b), str(c), str(d)) for a, b, c, d in body["rejects"]),
            num_images=int(body["num_images"]),
            num_bytes=int(body["num_bytes"]),
            contents=dict(body.get("contents", {})),
            reused=True,
        )
    except (ValueError, KeyError, TypeError):
        return None  # unreadable notes about past work only cost doing it again
    return record if record.digest == digest and _files_present(store, record, reusable) else None


def put_unit_record(store: Store, record: UnitRecord) -> UnitRecord:
    """Note that a unit is finished; EngineError if another attempt has come to other bytes."""
    path = unit_record_path(record.digest)
    try:
        store.create(path, encode_unit_record(record))
    except AlreadyExistsError:
        # A second attempt (Ray may call a node dead that still writes) must have come to the same bytes.
        other = find_unit_record(store, record.digest)
        if other is None:
            store.replace(path, encode_unit_record(record))
        elif (other.tar, other.index) != (record.tar, record.index):
            raise EngineError(
                f"two attempts at unit {record.digest} wrote different shards: {other.tar} and {record.tar}; "
                "the source changed during the build, or the workers run different library versions"
            ) from None
    return record


def read_index(store: Store, pack: Pack) -> pa.Table:
    """The checked index of a pack."""
    path = index_path(pack.index.sha256)
    return ipc_to_table(read_checked(store, path, pack.index), INDEXES, path)


def index_keys(index: pa.Table) -> NDArray[np.uint64]:
    """The keys of an index as uint64 [rows]."""
    text = _joined(index["key"], 16)
    return np.frombuffer(bytes.fromhex(text.decode("ascii")), dtype=">u8").astype(np.uint64)


def index_digests(index: pa.Table) -> NDArray[np.uint64]:
    """The SHA-256 of every row's image bytes as big-endian words, uint64 [rows, 4]."""
    return np.frombuffer(_joined(index["sha256"], 32), dtype=">u8").reshape(-1, 4).astype(np.uint64)


class Hashing:
    """What is known of an image's perceptual hash: int8, smallest first, so that zeros say nothing."""

    UNKNOWN, BLANK, KNOWN = range(3)  # BLANK: it was asked for, and there is nothing to see


def index_hashes(index: pa.Table) -> tuple[NDArray[np.uint64], NDArray[np.int8]]:
    """The perceptual hash of every row, and what is known of it (``Hashing``): uint64 and int8 [rows]."""
    if "phash" not in index.column_names:
        return np.zeros(index.num_rows, np.uint64), np.full(index.num_rows, Hashing.UNKNOWN, np.int8)
    column = index["phash"]
    known = column.is_valid().to_numpy()
    return column.fill_null(0).to_numpy(), np.where(known, Hashing.KNOWN, Hashing.BLANK).astype(np.int8)


def _joined(column: pa.ChunkedArray, width: int) -> bytes:
    """All values, each ``width`` bytes, one after the other, without an object for each."""
    data = column.cast(pa.binary()).combine_chunks() if column.num_chunks != 1 else column.chunk(0).cast(pa.binary())
    offsets = np.frombuffer(data.buffers()[1], np.int32)[data.offset : data.offset + len(data) + 1]
    if len(data) and not np.array_equal(np.diff(offsets), np.full(len(data), width, np.int32)):
        raise ValueError(f"expected values of {width} bytes")
    return memoryview(data.buffers()[2])[offsets[0] : offsets[-1]].tobytes() if len(data) else b""


def _files_present(store: Store, record: UnitRecord, reusable: Reusable | None) -> bool:
    if record.tar is None or record.index is None:
        return record.tar is record.index
    for path, ref in ((tar_path(record.tar.sha256), record.tar), (index_path(record.index.sha256), record.index)):
        entry = store.entry(path)
        if entry is None or entry.size != ref.size or not (reusable is None or reusable.allows(entry)):
            return False
    return True
