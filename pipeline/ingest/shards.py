"""References -> deterministic tar + Arrow index, in one pass over the bytes.

Comes in: the samples of one shard, from the source or from older shards. Goes out: one USTAR tar, one Arrow index, both
stored under the hash of their bytes, and a small record of them. Guarantees: the bytes depend on the set of samples
alone (members sorted, mtime, uid and gid 0); no sample is dropped without a reject; image bytes never leave the task.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.errors import AlreadyExistsError, EngineError
from pipeline.images import Check, Facts, ImageRejected, Limits, inspect
from pipeline.ingest.source import SourceReader
from pipeline.keyed import derive, keyed_hash, seed_key
from pipeline.schema import (
    INDEX,
    REFERENCES,
    SPLITS,
    UNIT_FORMAT_VERSION,
    FileRef,
    Reason,
    index_path,
    tar_path,
)
from pipeline.store import ShardReader, Store, ipc_to_table, read_checked, read_image, table_to_ipc

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_TAG_SHARD = 18
# Everything of a USTAR header that never varies: mode 0644, uid, gid, mtime 0, regular file, no owner names.
_HEAD = b"0000644\0" + b"0000000\0" * 2
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 155 + 12)
_FIXED_SUM = sum(_HEAD) + sum(_TAIL) + 8 * ord(" ")
_MTIME = b"00000000000\0"


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte POSIX.1-1988 (USTAR) header of a regular file; ``name`` is ASCII, at most 100 bytes."""
    encoded = name.encode("ascii")
    if len(encoded) > 100 or size >= 8**11:
        raise ValueError(f"a USTAR member has a name of at most 100 bytes and under 8 GiB: {name!r}, {size} bytes")
    octal = b"%011o\0" % size
    checksum = _FIXED_SUM + sum(encoded) + sum(octal) + sum(_MTIME)
    return encoded.ljust(100, b"\0") + _HEAD + octal + _MTIME + b"%06o\0 " % checksum + _TAIL


class TarWriter:
    """A deterministic USTAR stream: same members, same bytes. Knows its offset, size and running SHA-256."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.size = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data."""
        self._write(tar_header(name, len(data)))
        offset = self.size
        self._write(data)
        if rest := -len(data) % _BLOCK:
            self._write(_ZEROS[:rest])
        return offset

    def close(self) -> str:
        """Write the end of the archive (not the stream's); returns the hex SHA-256 of everything written."""
        self._write(_ZEROS * 2)
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self.size += len(data)


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


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What a task needs to write one shard: members of one split, from the source or (``origins``) from older tars."""

    name: str  # split and trie prefix, for messages
    split: str
    members: pa.Table  # REFERENCES, or INDEX when origins are given
    origins: tuple[str, ...] = ()  # tar SHA-256 of each member
    digest: str = ""

    def with_digest(self, settings: Mapping[str, Any]) -> Unit:
        """The same unit, named by everything that decides its bytes; an equal digest means the work is done already."""
        head = json.dumps([UNIT_FORMAT_VERSION, self.split, dict(settings), self.origins], sort_keys=True)
        digest = hashlib.sha256(head.encode() + b"\0" + table_to_ipc(self.members)).hexdigest()
        return Unit(name=self.name, split=self.split, members=self.members, origins=self.origins, digest=digest)


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What came of a unit. ``tar`` and ``index`` are None when no member survived."""

    digest: str
    tar: FileRef | None
    index: FileRef | None
    rejects: tuple[tuple[str, str, str, str], ...] = ()  # (path, reason, detail, sha256)
    num_images: int = 0  # read, good or bad
    num_bytes: int = 0
    reused: bool = field(default=False, compare=False)


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
    }
    return json.dumps(body, indent=0, sort_keys=True).encode()


def find_unit_record(store: Store, digest: str) -> UnitRecord | None:
    """The record of a unit that was finished before, if it and its files are there; else None."""
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
            reused=True,
        )
    except (ValueError, KeyError, TypeError):
        return None  # unreadable notes about past work only cost doing it again
    return record if record.digest == digest and _files_present(store, record) else None


def _files_present(store: Store, record: UnitRecord) -> bool:
    if record.tar is None or record.index is None:
        return record.tar is record.index
    files = ((tar_path(record.tar.sha256), record.tar.size), (index_path(record.index.sha256), record.index.size))
    return all(store.exists(path) and store.size(path) == size for path, size in files)


UnitFunction = Callable[..., Iterator["int | UnitRecord"]]
"""What a Ray task runs: yields how many images it has done since it last yielded, then the record."""

_TELL_EVERY = 100


def pack_source(
    root: str, unit: Unit, reader: SourceReader, check: Check, limits: Limits
) -> Iterator[int | UnitRecord]:
    """Read the members of ``unit`` from the source once: hash, check, write."""
    store, intake = Store.open(root), _Intake()
    with _ShardWriter(store) as writer:
        for number, sample in enumerate(intake.samples(unit, reader, check, limits), 1):
            if sample is not None:
                writer.add(sample)
            if number % _TELL_EVERY == 0:
                yield _TELL_EVERY
        tar, index = writer.finish()
    yield unit.members.num_rows % _TELL_EVERY
    yield _record(
        store,
        UnitRecord(
            digest=unit.digest,
            tar=tar,
            index=index,
            rejects=tuple(intake.rejects),
            num_images=intake.num_images,
            num_bytes=intake.num_bytes,
        ),
    )


def repack(root: str, unit: Unit) -> Iterator[int | UnitRecord]:
    """Write a shard from members of older tars (``unit.origins``), checksums verified."""
    store = Store.open(root)
    with _ShardWriter(store) as writer:
        for sample in _from_tars(unit, store):
            writer.add(sample)
        tar, index = writer.finish()
    yield unit.members.num_rows
    yield _record(store, UnitRecord(digest=unit.digest, tar=tar, index=index))


def read_index(store: Store, record: UnitRecord) -> pa.Table:
    """The checked index of a finished unit; empty if no member survived."""
    if record.index is None:
        return INDEX.empty_table()
    path = index_path(record.index.sha256)
    return ipc_to_table(read_checked(store, path, record.index), INDEX, path)


_PLACE = ("offset", "size", "checksum")
_ROW = tuple(name for name in INDEX.names if name not in _PLACE)


@dataclass(frozen=True)
class _Sample:
    row: tuple[Any, ...]  # INDEX without offset, size and checksum
    extension: str
    data: bytes
    checksum: int


@dataclass
class _Intake:
    """What a unit has met in the source so far."""

    rejects: list[tuple[str, str, str, str]] = field(default_factory=list)
    num_images: int = 0
    num_bytes: int = 0

    def samples(self, unit: Unit, reader: SourceReader, check: Check, limits: Limits) -> Iterator[_Sample | None]:
        """One item per member, in order: a sample, or None where a reject was noted."""
        columns = [unit.members.column(name).to_pylist() for name in REFERENCES.names]
        for path, key, class_id, _, group, size, _ in zip(*columns, strict=True):
            digest = b""
            try:
                data = reader.read(path)
                self.num_images += 1
                self.num_bytes += len(data)
                digest = hashlib.sha256(data).digest()
                if len(data) != size:
                    raise ImageRejected(Reason.CHANGED, f"listed with {size} bytes, read {len(data)}")
                facts = inspect(data, check=check, limits=limits)
            except ImageRejected as rejected:
                self.rejects.append((path, str(rejected.reason), rejected.detail, digest.hex()))
                yield None
                continue
            row = _row(key, path, class_id, unit.split, facts, digest, group)
            yield _Sample(row, facts.format, data, xxhash.xxh3_64_intdigest(data))


def _row(key: int, path: str, class_id: int, split: str, facts: Facts, digest: bytes, group: int) -> tuple[Any, ...]:
    name = f"{key:016x}"
    return (name, path, class_id, split, facts.width, facts.height, facts.format, facts.mode, digest, group)


def _from_tars(unit: Unit, store: Store) -> Iterator[_Sample]:
    reader = ShardReader(store)
    for entry, tar in zip(unit.members.to_pylist(), unit.origins, strict=True):
        place = (entry["offset"], entry["size"], entry["checksum"])
        data = read_image(reader, tar_path(tar), *place, entry["key"])
        yield _Sample(tuple(entry[name] for name in _ROW), entry["format"], data, entry["checksum"])


class _ShardWriter:
    """Tar and index of one shard. Samples come sorted by key; nothing is stored before ``finish``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.staging_dir()
        self._path = os.path.join(self._folder, "unit.tar")
        self._stream = open(self._path, "xb", buffering=1 << 20)  # noqa: SIM115 - closed by finish and __exit__
        self._tar = TarWriter(self._stream)
        self._rows: list[tuple[Any, ...]] = []

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, sample: _Sample) -> None:
        key, class_id = sample.row[0], sample.row[2]
        label, image = (f"{key}.cls", b"%d" % class_id), (f"{key}.{sample.extension}", sample.data)
        offsets = {name: self._tar.add(name, data) for name, data in sorted((label, image))}
        self._rows.append((*sample.row, offsets[image[0]], len(sample.data), sample.checksum))

    def finish(self) -> tuple[FileRef | None, FileRef | None]:
        """Store both files under their hashes; (None, None) when there was no sample."""
        digest = self._tar.close()
        self._stream.close()
        if not self._rows:
            return None, None
        self._store.put_file(tar_path(digest), self._path)
        index = table_to_ipc(_index_table(self._rows))
        index_ref = FileRef(sha256=hashlib.sha256(index).hexdigest(), size=len(index), num_rows=len(self._rows))
        self._store.put(index_path(index_ref.sha256), index)
        return FileRef(sha256=digest, size=self._tar.size, num_rows=len(self._rows)), index_ref


def _index_table(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = dict(zip([*_ROW, *_PLACE], zip(*rows, strict=True), strict=True))
    return pa.table([pa.array(columns[item.name], item.type) for item in INDEX], schema=INDEX)


def _record(store: Store, record: UnitRecord) -> UnitRecord:
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
