"""References -> deterministic tar + Arrow index, in one pass over the bytes.

Comes in: the samples of one shard, from the source or from older shards. Goes out: one USTAR tar, one Arrow index, both
stored under the hash of their bytes, and a small record of them. Guarantees: the bytes depend on the set of samples
alone (members sorted, mtime, uid and gid 0); no sample is dropped without a reject; image bytes never leave the task.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.images import Facts, ImageRejected, Inspection, Inspector
from pipeline.ingest.source import SourceReader
from pipeline.ingest.tar_writer import TarWriter, tar_header
from pipeline.ingest.trie import Leaf, leaves, shard_hash
from pipeline.ingest.units import Repack, Unit, UnitRecord, index_keys, put_unit_record, read_index
from pipeline.schema import HASHED_INDEX, INDEX, FileRef, Reason, index_path, tar_path
from pipeline.store import ShardReader, Store, read_image, table_to_ipc

__all__ = [
    "Leaf",
    "ShardWriter",
    "TarWriter",
    "index_table",
    "leaves",
    "pack_source",
    "repack",
    "shard_hash",
    "tar_header",
]

_TELL_EVERY = 100


def pack_source(
    root: str, unit: Unit, reader: SourceReader, inspection: Inspection, *, attempt: int
) -> Iterator[int | UnitRecord]:
    """Read the members of ``unit`` from the source once: hash, check, write."""
    store, intake = Store.open(root), _Intake()
    with ShardWriter(store) as writer, inspection.open(attempt=attempt) as inspector:
        for number, _ in enumerate(intake.fill(writer, unit, reader, inspector), 1):
            if number % _TELL_EVERY == 0:
                yield _TELL_EVERY
        tar, index = writer.finish(index_table(intake.rows, hashed=inspection.hashed))
    yield unit.num_members % _TELL_EVERY
    yield put_unit_record(
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
            offsets[number] = writer.add(key, class_id, extension, data)
        tar, index = writer.finish(_with_column(rows, "offset", pa.array(offsets)))
    yield unit.num_members
    yield put_unit_record(store, UnitRecord(digest=unit.digest, tar=tar, index=index))


def _rows_of(unit: Repack, store: Store) -> tuple[pa.Table, list[str]]:
    """The index rows of a shard, sorted by key, as they are to be but for their offsets; and each one's tar."""
    columns = (HASHED_INDEX if unit.hashed else INDEX).names
    parts = (read_index(store, part.pack).select(columns).take(pa.array(part.rows)) for part in unit.parts)
    table = pa.concat_tables(parts)
    tars = [tar_path(part.pack.tar.sha256) for part in unit.parts for _ in range(len(part.rows))]
    table = _with_column(table, "class_id", pa.array(unit.class_id))
    table = _with_column(table, "group", pa.array(unit.group))
    table = _with_column(table, "split", pa.repeat(pa.scalar(unit.split), table.num_rows))
    order = np.argsort(index_keys(table))
    return table.take(pa.array(order)), [tars[place] for place in order.tolist()]


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(INDEX.get_field_index(name), INDEX.field(name), values)


@dataclass
class _Intake:
    """What a unit has met in the source so far."""

    rejects: list[tuple[str, str, str, str]] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)  # HASHED_INDEX
    num_images: int = 0
    num_bytes: int = 0

    def fill(self, writer: ShardWriter, unit: Unit, reader: SourceReader, inspector: Inspector) -> Iterator[None]:
        """Take in the members one by one, in order: each becomes a row, or a reject."""
        columns = [unit.members.column(name).to_pylist() for name in ("path", "key", "class_id", "group", "size")]
        for path, number, class_id, group, size in zip(*columns, strict=True):
            digest = b""
            try:
                data = reader.read(path)
                self.num_images += 1
                self.num_bytes += len(data)
                digest = hashlib.sha256(data).digest()
                if len(data) != size:
                    raise ImageRejected(Reason.CHANGED, f"listed with {size} bytes, read {len(data)}")
                facts = inspector.inspect(data, path)
            except ImageRejected as rejected:
                self.rejects.append((path, str(rejected.reason), rejected.detail, digest.hex()))
            else:
                key = f"{number:016x}"
                offset = writer.add(key, class_id, facts.format, data)
                place = (offset, size, xxhash.xxh3_64_intdigest(data))
                self.rows.append((key, path, class_id, unit.split, *place, *_shape(facts), digest, group, facts.phash))
            yield


def _shape(facts: Facts) -> tuple[int, int, str, str]:
    return facts.width, facts.height, facts.format, facts.mode


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

    def add(self, key: str, class_id: int, extension: str, data: bytes) -> int:
        """Append an image and its label; returns the offset of the image bytes."""
        label = b"%d" % class_id
        try:
            if extension < "cls":
                offset = self._tar.add(f"{key}.{extension}", data)
                self._tar.add(f"{key}.cls", label)
                return offset
            self._tar.add(f"{key}.cls", label)
            return self._tar.add(f"{key}.{extension}", data)
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


def index_table(rows: list[tuple[Any, ...]], *, hashed: bool = False) -> pa.Table:
    """INDEX of rows in the column order of HASHED_INDEX; their last column only if ``hashed``."""
    schema = HASHED_INDEX if hashed else INDEX
    columns = list(zip(*rows, strict=True)) if rows else [[] for _ in HASHED_INDEX]
    arrays = [pa.array(values, item.type) for values, item in zip(columns[: len(schema)], schema, strict=True)]
    return pa.table(arrays, schema=schema)
