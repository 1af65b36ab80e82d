"""Files by reference: there, whole, unchanged; else a finding and None."""

from __future__ import annotations

import hashlib
import re

import pyarrow as pa

from pipeline.errors import EvenshardError, IntegrityError, NotFoundError
from pipeline.schema import FileRef, table_path
from pipeline.store import Store, block_digests, ipc_to_table
from pipeline.verify.findings import Code, Findings

RESTORE = "restore the file from a copy of this ROOT, or build from the source into an empty one"


class Files:
    """Reads what a snapshot names, and counts what it read."""

    def __init__(self, store: Store, findings: Findings) -> None:
        self._store = store
        self._findings = findings
        self._seen: set[str] = set()
        self.num_bytes = 0

    @property
    def num_files(self) -> int:
        return len(self._seen)

    def read(self, path: str, sha256: str, size: int) -> bytes | None:
        """The bytes of ``path``, if they are the ones that the reference means."""
        data = self.read_any(path)
        return data if data is not None and self.is_same(path, data, sha256, size) else None

    def is_same(self, path: str, data: bytes, sha256: str, size: int) -> bool:
        """Whether ``data``, read from ``path``, is what the reference means."""
        found = hashlib.sha256(data).hexdigest()
        same = (found, len(data)) == (sha256, size)
        if not same:
            self._findings.add(
                Code.DAMAGED,
                path,
                f"expected {size:,} bytes with SHA-256 {sha256}, found {len(data):,} bytes with {found}; {RESTORE}",
            )
        return same

    def read_any(self, path: str) -> bytes | None:
        """The bytes of ``path``, whatever they are."""
        self._seen.add(path)
        try:
            data = self._store.read(path)
        except EvenshardError as error:
            self._report(path, error)
            return None
        self.num_bytes += len(data)
        return data

    def read_part(self, path: str, start: int, stop: int) -> bytes | None:
        """The bytes from ``start`` to ``stop`` of ``path``, whatever they are."""
        try:
            data = self._store.read_range(path, start, stop - start)
        except EvenshardError as error:
            self._report(path, error)
            return None
        self.num_bytes += len(data)
        return data

    def expect(self, path: str, size: int) -> bool:
        """Whether the file is there and has this size; its bytes are not read."""
        self._seen.add(path)
        try:
            found = self._store.size(path)
        except EvenshardError as error:
            self._report(path, error)
            return False
        if found != size:
            self._findings.add(Code.DAMAGED, path, f"expected {size:,} bytes, found {found:,}; {RESTORE}")
        return found == size

    def was_seen(self, path: str) -> bool:
        """Whether this file was looked at already."""
        return path in self._seen

    def table(self, ref: FileRef, schema: pa.Schema | tuple[pa.Schema, ...], path: str = "") -> pa.Table | None:
        """The table that ``ref`` names, in tables/ unless ``path`` says otherwise."""
        path = path or table_path(ref.sha256)
        data = self.read(path, ref.sha256, ref.size)
        if data is None:
            return None
        if ref.blocks and ref.blocks != block_digests(data):
            self._findings.add(
                Code.RECORD, path, f"the file is whole, but the block digests recorded for it are of others; {RESTORE}"
            )
        try:
            table = ipc_to_table(data, schema, path)
        except IntegrityError as error:
            self._findings.add(Code.TABLE, path, str(error).removeprefix(f"{path}: "))
            return None
        if table.num_rows != ref.num_rows:
            self._findings.add(Code.TABLE, path, f"expected {ref.num_rows:,} rows, found {table.num_rows:,}; {RESTORE}")
            return None
        return table

    def is_name(self, where: str, *names: str) -> bool:
        """Whether all ``names`` are file names as this project gives them: hex SHA-256."""
        wrong = [name for name in names if not re.fullmatch(r"[0-9a-f]{64}", name)]
        for name in wrong:
            self._findings.add(
                Code.TABLE, where, f"expected a SHA-256 in hex as a file's name, found {name!r}; {RESTORE}"
            )
        return not wrong

    def _report(self, path: str, error: EvenshardError) -> None:
        if isinstance(error, NotFoundError):
            self._findings.add(Code.MISSING, path, f"the snapshot names this file, and it is not there; {RESTORE}")
        else:
            self._findings.add(Code.DAMAGED, path, f"cannot be read: {error}")
