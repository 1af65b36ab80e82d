"""Files known by their content: references to them, Arrow tables, and columns that are checked as they are touched.

Arrow IPC has no checksum of its own, most single-bit flips pass it unseen: so nothing here is trusted before its hash.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import IntegrityError, UsageError
from pipeline.schema import BLOCK_BYTES, FileRef, table_path
from pipeline.store.backends import open_regular
from pipeline.store.messages import RESTORE
from pipeline.store.root import Store

_BLOCK_SHIFT = BLOCK_BYTES.bit_length() - 1
_MAGIC = b"ARROW1"
_TAIL_BYTES = 4 + len(_MAGIC)  # length of the footer, magic

LARGE_BYTES = 16 << 20
"""From here on a table is written to a temporary file first: in memory it would be there twice."""

# Every option that decides bytes is set here, so that a changed default of pyarrow cannot change a file.
_WRITE_OPTIONS = pa.ipc.IpcWriteOptions(
    metadata_version=pa.ipc.MetadataVersion.V5,
    allow_64bit=False,
    use_legacy_format=False,
    compression=None,
    use_threads=False,
    emit_dictionary_deltas=False,
)


def sha256_file(path: str) -> str:
    """Hex SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def block_digests(data: bytes | mmap.mmap | memoryview) -> tuple[str, ...]:
    """XXH3-64, as 16 hex digits, of each 1 MiB block; the last one may be shorter."""
    with memoryview(data) as view:
        return tuple(_digest(view, block) for block in range(_num_blocks(len(view))))


def make_ref(data: bytes, num_rows: int) -> FileRef:
    """What a record says about a file with these bytes."""
    sha256 = hashlib.sha256(data).hexdigest()
    return FileRef(sha256=sha256, size=len(data), num_rows=num_rows, blocks=block_digests(data))


def read_checked(store: Store, path: str, ref: FileRef) -> bytes:
    """The whole file, if it is the one that ``ref`` means."""
    data = store.read(path)
    found = hashlib.sha256(data).hexdigest()
    if len(data) != ref.size or found != ref.sha256:
        raise IntegrityError(
            f"{path} in {store.url} is damaged: expected {ref.size} bytes with SHA-256 {ref.sha256}, "
            f"found {len(data)} bytes with {found}; {RESTORE}"
        )
    return data


def table_to_ipc(table: pa.Table) -> bytes:
    """An Arrow IPC file of one record batch: equal tables give equal bytes, however they are chunked."""
    sink = pa.BufferOutputStream()
    write_ipc(table, sink)
    return sink.getvalue().to_pybytes()


def write_ipc(table: pa.Table, sink: Any) -> None:
    """``table_to_ipc`` into a file object, which is left open."""
    schema = table.schema.remove_metadata()
    columns = [_canonical(table.column(name)) for name in schema.names]
    with pa.ipc.new_file(sink, schema, options=_WRITE_OPTIONS) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


class HashedSink:
    """A file object that counts and hashes (SHA-256) what is written to it, and passes it on to ``target``."""

    closed = False

    def __init__(self, target: Any = None) -> None:
        self.hash, self.num_bytes = hashlib.sha256(), 0
        self._target = target

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.hash.update(data)
        self.num_bytes += size
        if self._target is not None:
            self._target.write(data)
        return size

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None: ...


def ipc_to_table(data: bytes | memoryview, schema: pa.Schema | tuple[pa.Schema, ...], where: str) -> pa.Table:
    """The table in ``data``; an IntegrityError naming ``where`` unless it is sound and has exactly ``schema``.

    Of several schemas, it must have one.
    """
    schemas: tuple[pa.Schema, ...] = schema if isinstance(schema, tuple) else (schema,)
    try:
        reader = pa.ipc.open_file(pa.py_buffer(data))
        schema = next((one for one in schemas if one.equals(reader.schema, check_metadata=True)), schemas[0])
        _check_schema(reader.schema, schema, where)
        table = reader.read_all()
        table.validate(full=True)  # offsets and UTF-8: a file from elsewhere must not lead outside its buffers
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{where} is not an Arrow IPC file that can be read: {error}; {RESTORE}") from error
    if holed := _holed(table, schema):
        raise IntegrityError(f"{where}: expected no missing value, found some in {', '.join(holed)}")
    return table


def put_table(store: Store, table: pa.Table, schema: pa.Schema) -> FileRef:
    """Write ``table``, cast to ``schema``, under its hash in tables/; a large one by way of a temporary file."""
    if sorted(table.column_names) != sorted(schema.names):
        raise UsageError(f"expected a table with columns {schema.names}, found {table.column_names}")
    if holed := _holed(table, schema):
        raise UsageError(f"expected a table without missing values, found some in {', '.join(holed)}")
    table = table.select(schema.names).cast(schema)
    if table.nbytes < LARGE_BYTES:
        data = table_to_ipc(table)
        ref = make_ref(data, table.num_rows)
        store.put(table_path(ref.sha256), data)
        return ref
    with _written(store, lambda file: write_ipc(table, file)) as path:
        ref = _file_ref(path, table.num_rows)
        store.put_file(table_path(ref.sha256), path)
    return ref


def replace_by(store: Store, path: str, write: Callable[[BinaryIO], None]) -> None:
    """``Store.replace`` by what ``write`` writes, which never lies in memory as a whole."""
    with _written(store, write) as local:
        store.replace_file(path, local)


@contextmanager
def _written(store: Store, write: Callable[[BinaryIO], None]) -> Generator[str]:
    """A temporary file."""
    folder = store.staging_dir()
    try:
        path = f"{folder}/written"
        with store.explained("write", f"staging/{os.path.basename(folder)}/written"), open(path, "xb") as file:
            write(file)
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _file_ref(path: str, num_rows: int) -> FileRef:
    """`make_ref` of a file."""
    whole, blocks, size = hashlib.sha256(), list[str](), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole.update(block)
            blocks.append(xxhash.xxh3_64_hexdigest(block))
            size += len(block)
    return FileRef(sha256=whole.hexdigest(), size=size, num_rows=num_rows, blocks=tuple(blocks))


class CheckedTable:
    """A table of fixed-width columns, memory-mapped; each 1 MiB block is verified before its first value is returned.

    So a table of any size opens in constant time. Verification happens once per block; threads may do it twice, which
    is harmless. Arrays that ``slice`` returns are read-only views of the map.
    """

    def __init__(self, data: bytes | mmap.mmap, ref: FileRef, schema: pa.Schema, where: str) -> None:
        self._data = data
        self._view = memoryview(data)
        self._ref = ref
        self._where = where
        self._verified = np.zeros(_num_blocks(ref.size), dtype=np.bool_)
        self._complete = False
        self._check_size()
        self._check_metadata()
        self._offsets, self._columns = self._lay_out(schema)
        self.num_rows = ref.num_rows

    @classmethod
    def open(cls, store: Store, path: str, ref: FileRef, schema: pa.Schema) -> CheckedTable:
        """Map a local file; read the whole of a remote one. Both are checked in the same way."""
        return cls(_map(store, path, ref), ref, schema, f"{path} in {store.url}")

    def take(self, name: str, rows: ArrayLike) -> NDArray[Any]:
        """Values of column ``name`` at ``rows`` (int64 [n], any order), as a new array [n]."""
        wanted = np.asarray(rows, dtype=np.int64)
        column = self._column(name)
        if wanted.size == 0:
            return column[:0].copy()
        low, high = int(wanted.min()), int(wanted.max())
        if low < 0 or high >= self.num_rows:
            raise IndexError(f"row {low if low < 0 else high} of {self._where}, which has {self.num_rows} rows")
        if not self._complete:
            self._verify((self._offsets[name] + wanted * column.itemsize) >> _BLOCK_SHIFT)
        return column[wanted]

    def slice(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Values of column ``name`` in rows [start, stop), without a copy."""
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows [{start}, {stop}) of {self._where}, which has {self.num_rows} rows")
        column = self._column(name)
        offset = self._offsets[name]
        self._verify_bytes(offset + start * column.itemsize, offset + stop * column.itemsize)
        return column[start:stop]

    def verify_all(self) -> None:
        """Check every block, and that the blocks together are the file that the reference names."""
        self._verify(np.arange(len(self._verified)))
        found = hashlib.sha256(self._view).hexdigest()
        if found != self._ref.sha256:
            raise IntegrityError(f"{self._where}: expected SHA-256 {self._ref.sha256}, found {found}; {RESTORE}")

    def _column(self, name: str) -> NDArray[Any]:
        if name not in self._columns:
            raise UsageError(f"{self._where} has no column {name!r}; columns: {', '.join(self._columns)}")
        return self._columns[name]

    def _verify_bytes(self, start: int, stop: int) -> None:
        if start < stop and not self._complete:
            self._verify(np.arange(start >> _BLOCK_SHIFT, ((stop - 1) >> _BLOCK_SHIFT) + 1))

    def _verify(self, blocks: NDArray[np.int64]) -> None:
        for block in np.unique(blocks[~self._verified[blocks]]).tolist():
            found = _digest(self._view, block)
            if found != self._ref.blocks[block]:
                start = block * BLOCK_BYTES
                raise IntegrityError(
                    f"{self._where} is damaged in bytes [{start}, {min(start + BLOCK_BYTES, self._ref.size)}): "
                    f"expected XXH3-64 {self._ref.blocks[block]}, found {found}; {RESTORE}"
                )
            self._verified[block] = True
        self._complete = bool(self._verified.all())

    def _check_size(self) -> None:
        expected, found = self._ref.size, len(self._view)
        if found != expected or len(self._ref.blocks) != _num_blocks(expected):
            raise IntegrityError(
                f"{self._where}: expected {expected} bytes in {len(self._ref.blocks)} recorded blocks, "
                f"found {found} bytes; {RESTORE}"
            )

    def _check_metadata(self) -> None:
        """Verify the blocks that Arrow reads to lay out the columns: the head, and the footer with its length."""
        size = len(self._view)
        if size < len(_MAGIC) + _TAIL_BYTES:
            raise IntegrityError(f"{self._where}: {size} bytes are no Arrow IPC file; {RESTORE}")
        self._verify_bytes(0, 1)
        footer_size = int.from_bytes(self._view[size - _TAIL_BYTES : size - len(_MAGIC)], "little", signed=True)
        if not 0 < footer_size <= size - _TAIL_BYTES:
            raise IntegrityError(f"{self._where}: a footer of {footer_size} bytes cannot be; {RESTORE}")
        self._verify_bytes(size - _TAIL_BYTES - footer_size, size)

    def _lay_out(self, schema: pa.Schema) -> tuple[dict[str, int], dict[str, NDArray[Any]]]:
        """Offset in the file, and view of the values, of each column; no value is read."""
        whole = pa.py_buffer(self._data)
        batch = self._open_batch(whole, schema)
        offsets = {field.name: self._offset(batch.column(i), whole) for i, field in enumerate(schema)}
        if batch.num_rows and min(offsets.values()) >= BLOCK_BYTES:  # metadata would lie in blocks not yet verified
            raise IntegrityError(f"{self._where}: the columns begin at byte {min(offsets.values())}, beyond one block")
        columns = {
            field.name: np.frombuffer(
                self._view, dtype=field.type.to_pandas_dtype(), count=batch.num_rows, offset=offsets[field.name]
            )
            for field in schema
        }
        return offsets, columns

    def _open_batch(self, whole: pa.Buffer, schema: pa.Schema) -> pa.RecordBatch:
        try:
            reader = pa.ipc.open_file(pa.BufferReader(whole))
            _check_schema(reader.schema, schema, self._where)
            if reader.num_record_batches != 1:
                raise IntegrityError(f"{self._where}: expected 1 record batch, found {reader.num_record_batches}")
            batch = reader.get_batch(0)
        except (pa.ArrowException, OSError) as error:
            raise IntegrityError(f"{self._where} is not an Arrow IPC file that can be read: {error}") from error
        if batch.num_rows != self._ref.num_rows:
            raise IntegrityError(f"{self._where}: expected {self._ref.num_rows} rows, found {batch.num_rows}")
        return batch

    def _offset(self, column: pa.Array, whole: pa.Buffer) -> int:
        validity, values = column.buffers()
        width = column.type.bit_width // 8
        if validity is not None or column.offset or not (pa.types.is_integer(column.type) and width):
            raise IntegrityError(f"{self._where}: expected columns of whole numbers without nulls, found {column.type}")
        if len(column) == 0:
            return 0
        offset = values.address - whole.address
        # Aligned, a value never lies across two blocks.
        if offset % width or not 0 <= offset <= len(self._view) - width * len(column):
            raise IntegrityError(f"{self._where}: a column of {len(column)} values cannot begin at byte {offset}")
        return offset


def _map(store: Store, path: str, ref: FileRef) -> bytes | mmap.mmap:
    local = store.local_path(path)
    if local is None or store.size(path) != ref.size or ref.size == 0:
        return store.read(path)
    with store.explained("map", path), open(open_regular(local), "rb", buffering=0) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _digest(view: memoryview, block: int) -> str:
    return xxhash.xxh3_64_hexdigest(view[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)


def _canonical(column: pa.ChunkedArray) -> pa.Array:
    """One array; in fresh memory unless its bytes are its values and nothing else.

    The unused bits of a column of booleans are then 0, not what was there before.
    """
    if not column.num_chunks:
        return pa.nulls(0, type=column.type)
    first = column.chunk(0)
    if column.num_chunks == 1 and not first.offset and not first.null_count and pa.types.is_integer(first.type):
        return first
    return pa.concat_arrays(column.chunks)


def _check_schema(found: pa.Schema, expected: pa.Schema, where: str) -> None:
    if not found.equals(expected, check_metadata=True):
        raise IntegrityError(
            f"{where}: expected columns {_columns_of(expected)}; found {_columns_of(found)}; "
            f"it was written by another version, or is not the table it is named as"
        )


def _columns_of(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}{'' if not field.nullable else ' or null'}" for field in schema)


def _holed(table: pa.Table, schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if not field.nullable and table.column(field.name).null_count]
