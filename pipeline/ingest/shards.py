"""References -> deterministic tar + Arrow index, in one pass over the bytes.

Comes in: the samples of one shard, from the source or from older shards. Goes out: one USTAR tar, one Arrow index, both
stored under the hash of their bytes, and a small record of them. Guarantees: the bytes depend on the set of samples
alone (members sorted, mtime, uid and gid 0); no sample is dropped without a reject; image bytes never leave the task.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import threading
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.images import Facts, ImageRejected, Inspection, Inspector
from pipeline.ingest.source_reader import SourceReader
from pipeline.ingest.tar_writer import TarWriter, tar_header
from pipeline.ingest.trie import Leaf, leaves, shard_hash
from pipeline.ingest.units import Pack, Repack, Unit, UnitRecord, index_keys, put_unit_record, read_index
from pipeline.schema import HASHED_INDEX, INDEX, FileRef, Reason, index_path, tar_path
from pipeline.store import ShardReader, Store, read_image, table_to_ipc

__all__ = [
    "Leaf",
    "Packer",
    "ShardWriter",
    "TarWriter",
    "key_column",
    "leaves",
    "pack_source",
    "repack",
    "shard_hash",
    "tar_header",
]

TELL_EVERY_S = 0.25
"""How often a task tells of the images it has done; telling of each hundred cost the driver as much as all the rest."""


def pack_source(
    root: str, unit: Unit, reader: SourceReader, inspection: Inspection, *, attempt: int
) -> Iterator[int | UnitRecord]:
    """Read the members of ``unit`` from the source once: hash, check, write."""
    store, members = Store.open(root), unit.members
    with ShardWriter(store) as writer, inspection.open(attempt=attempt) as inspector:
        packer = Packer(writer, inspector)
        columns = [members.column(name).to_pylist() for name in ("path", "key", "class_id", "size")]
        packed: list[int] = []
        told, next_s = 0, time.monotonic() + TELL_EVERY_S
        for row, (path, key, class_id, size, data) in enumerate(
            zip(*columns, reader.read_all(columns[0], columns[3]), strict=True)
        ):
            if packer.take(path, key, class_id, data, size):
                packed.append(row)
            if (now_s := time.monotonic()) >= next_s:
                yield row + 1 - told
                told, next_s = row + 1, now_s + TELL_EVERY_S
        taken = members.take(pa.array(packed, pa.int64()))
        split = pa.repeat(pa.scalar(unit.split), len(packed))
        tar, index = writer.finish(packer.index(taken["path"], taken["class_id"], split, taken["group"]))
    yield unit.num_members - told
    yield put_unit_record(store, packer.record(unit.digest, tar, index))


class Packer:
    """Takes images into a shard one by one, in the order of their keys: each becomes a row, or a reject."""

    def __init__(self, writer: ShardWriter, inspector: Inspector) -> None:
        self._writer, self._inspector = writer, inspector
        self._schema = HASHED_INDEX if inspector.hashed else INDEX
        self._keys, self._offsets, self._sizes, self._checksums = array("Q"), array("Q"), array("I"), array("Q")
        self._digests: list[bytes] = []
        self._facts: list[Facts] = []
        self._num_images = self._num_bytes = 0
        self.rejects: list[tuple[str, str, str, str]] = []
        """(path, reason, detail, sha256 as hex) of each"""

    @property
    def num_images(self) -> int:
        """Read so far, good or bad."""
        return self._num_images

    def take(self, path: str, key: int, class_id: int, data: bytes | ImageRejected, size: int) -> bool:
        """Whether the image was accepted. ``size`` is what the listing said of it."""
        digest = b""
        try:
            if not isinstance(data, bytes):
                raise data
            self._num_images += 1
            self._num_bytes += len(data)
            digest = hashlib.sha256(data).digest()
            if len(data) != size:
                raise ImageRejected(Reason.CHANGED, f"listed with {size} bytes, read {len(data)}")
            facts = self._inspector.inspect(data, path)
        except ImageRejected as rejected:
            self.rejects.append((path, str(rejected.reason), rejected.detail, digest.hex()))
            return False
        self._offsets.append(self._writer.add(key, class_id, facts.format, data))
        self._checksums.append(xxhash.xxh3_64_intdigest(data))
        self._keys.append(key)
        self._sizes.append(size)
        self._digests.append(digest)
        self._facts.append(facts)
        return True

    def index(
        self, path: pa.ChunkedArray, class_id: pa.ChunkedArray, split: pa.Array, group: pa.ChunkedArray
    ) -> pa.Table:
        """INDEX, or HASHED_INDEX, of what was accepted; the columns given are of the same images, in the same order."""
        width, height, extension, mode, phash = zip(*self._facts, strict=True) if self._facts else ((),) * 5
        columns = {
            "key": key_column(np.frombuffer(self._keys, np.uint64)),
            "path": path,
            "class_id": class_id,
            "split": split,
            "offset": pa.array(np.frombuffer(self._offsets, np.uint64)),
            "size": pa.array(np.frombuffer(self._sizes, np.uint32)),
            "checksum": pa.array(np.frombuffer(self._checksums, np.uint64)),
            "width": pa.array(width, pa.uint32()),
            "height": pa.array(height, pa.uint32()),
            "format": pa.array(extension, pa.string()),
            "mode": pa.array(mode, pa.string()),
            "sha256": pa.array(self._digests, pa.binary(32)),
            "group": group,
            "phash": pa.array(phash, pa.uint64()),
        }
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema).combine_chunks()

    def record(
        self, digest: str, tar: FileRef | None, index: FileRef | None, contents: Mapping[str, Any] | None = None
    ) -> UnitRecord:
        """What came of a unit."""
        return UnitRecord(
            digest=digest,
            tar=tar,
            index=index,
            rejects=tuple(self.rejects),
            num_images=self._num_images,
            num_bytes=self._num_bytes,
            contents=contents or {},
        )


def key_column(keys: NDArray[np.uint64]) -> pa.Array:
    """Keys as INDEX spells them, 16 hexadecimal digits each."""
    text = keys.astype(">u8").tobytes().hex().encode()
    offsets = np.arange(0, len(text) + 1, 16, dtype=np.int32)
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(offsets), pa.py_buffer(text))


def repack(root: str, unit: Repack, *, attempt: int) -> Iterator[int | UnitRecord]:
    """Write a shard from members of older tars, checksums verified; no image is decoded."""
    del attempt
    store = Store.open(root)
    rows, tars = _rows_of(unit, store)
    with ShardWriter(store) as writer:
        columns = [rows[name].to_pylist() for name in ("key", "class_id", "format", "offset", "size", "checksum")]
        reader = ShardReader(store)
        offsets = np.empty(rows.num_rows, np.uint64)
        for number, (key, class_id, extension, offset, size, checksum) in enumerate(zip(*columns, strict=True)):
            data = read_image(reader, tars[number], offset, size, checksum, key)
            offsets[number] = writer.add(int(key, 16), class_id, extension, data)
        tar, index = writer.finish(_with_column(rows, "offset", pa.array(offsets)))
    yield unit.num_members
    yield put_unit_record(store, UnitRecord(digest=unit.digest, tar=tar, index=index))


def _rows_of(unit: Repack, store: Store) -> tuple[pa.Table, list[str]]:
    """The index rows of a shard, sorted by key, as they are to be but for their offsets; and each one's tar."""
    columns = (HASHED_INDEX if unit.hashed else INDEX).names
    parts = (_KEPT.read(store, part.pack).select(columns).take(pa.array(part.rows)) for part in unit.parts)
    table = pa.concat_tables(parts)
    tars = [tar_path(part.pack.tar.sha256) for part in unit.parts for _ in range(len(part.rows))]
    table = _with_column(table, "class_id", pa.array(unit.class_id))
    table = _with_column(table, "group", pa.array(unit.group))
    table = _with_column(table, "split", pa.repeat(pa.scalar(unit.split), table.num_rows))
    order = np.argsort(index_keys(table))
    return table.take(pa.array(order)), [tars[place] for place in order.tolist()]


class KeptIndexes:
    """Large indexes that this process has read and checked, up to ``max_bytes``.

    A container of 100,000 images becomes rows of all final shards, so every shard would read its whole index again:
    four fifths of what it takes to write them (docs/LOG.md). Small ones cost little to read again. Shards go through
    all containers in turn, where throwing out the oldest would find nothing: any goes.
    """

    def __init__(self, max_bytes: int = 128 << 20, min_bytes: int = 1 << 20) -> None:
        self._max_bytes, self._min_bytes = max_bytes, min_bytes
        self._tables: dict[tuple[str, str], pa.Table] = {}
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._used

    def read(self, store: Store, pack: Pack) -> pa.Table:
        """``read_index``."""
        key = store.url, pack.index.sha256
        if (found := self._tables.get(key)) is not None:
            return found
        table = read_index(store, pack)
        size = int(table.nbytes)
        if self._min_bytes <= size <= self._max_bytes:
            with self._lock:
                while self._used + size > self._max_bytes:
                    other = random.choice(list(self._tables))
                    self._used -= int(self._tables.pop(other).nbytes)
                if key not in self._tables:
                    self._tables[key] = table
                    self._used += size
        return table


_KEPT = KeptIndexes()


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(INDEX.get_field_index(name), INDEX.field(name), values)


class ShardWriter:
    """Tar and index of one shard. Samples come sorted by key; nothing is stored before ``finish``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.staging_dir()
        self._path = os.path.join(self._folder, "unit.tar")
        self._stream = open(self._path, "xb", buffering=1 << 20)  # noqa: SIM115 - closed by finish and __exit__
        self._tar = TarWriter(self._stream)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # on a full disk it tries, and fails, once more; what failed first is told
            self._stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, key: int, class_id: int, extension: str, data: bytes) -> int:
        """Append an image and its label; returns the offset of the image bytes."""
        try:
            return self._tar.add_sample(key, class_id, extension, data)
        except OSError as error:  # a context manager around every image would cost more
            self._explain(error)

    def finish(self, rows: pa.Table) -> tuple[FileRef | None, FileRef | None]:
        """Store both files under their hashes; (None, None) when there was no sample."""
        try:
            digest = self._tar.close()
            self._stream.close()
        except OSError as error:
            self._explain(error)
        if not rows.num_rows:
            return None, None
        self._store.put_file(tar_path(digest), self._path)
        index = table_to_ipc(rows)
        index_ref = FileRef(sha256=hashlib.sha256(index).hexdigest(), size=len(index), num_rows=rows.num_rows)
        self._store.put(index_path(index_ref.sha256), index)
        return FileRef(sha256=digest, size=self._tar.size, num_rows=rows.num_rows), index_ref

    def _explain(self, error: OSError) -> NoReturn:
        with self._store.explained("write", f"staging/{os.path.basename(self._folder)}/{os.path.basename(self._path)}"):
            raise error
