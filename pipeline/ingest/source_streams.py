"""One file of a source, opened: read front to back or by range, in bounded memory, wherever it lies.

Comes in: a place, a path below it, and what the listing said of that file. Goes out: a seekable file. Guarantees: the
bytes are those of the file that was listed, or a `SourceError` says that it changed or cannot be read; a short body is
never taken for the end of the file; nothing outside the place is opened.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, Protocol

from pipeline.errors import SourceError
from pipeline.images import ImageRejected
from pipeline.ingest.source_files import Place, fetch_range, local_copy, look_at
from pipeline.ingest.source_local import open_within
from pipeline.ingest.source_trouble import NoRangesError
from pipeline.store import redact

BLOCK_BYTES = 4 << 20
NUM_BLOCKS = 4
"""How many blocks of a remote file are held: Parquet is read at as many places as it has columns."""

_GZIP = 31  # zlib's word for a gzip header and checksum
_DEFLATED_BYTES = 1 << 14
"""Read at a time: a bomb makes at most 16 MiB of it."""


class Listed(NamedTuple):
    """A file as the listing found it."""

    path: str
    size: int
    fingerprint: int


@contextmanager
def open_listed(place: Place, listed: Listed) -> Generator[BinaryIO]:
    """The file, seekable. It is compared with the listing before and after: a mixture of two states is never used."""
    where = f"{place.shown.rstrip('/')}/{listed.path}" if listed.path else place.shown
    _check_unchanged(place, listed, where)
    with _open_local(place, listed.path, where) if place.is_local else _open_remote(place, listed, where) as file:
        yield file
    _check_unchanged(place, listed, where)


def _check_unchanged(place: Place, listed: Listed, where: str) -> None:
    found = look_at(place, listed.path)
    if found.problem is not None:
        raise SourceError(f"{where} was listed, and now cannot be opened ({found.detail}); run again")
    if (found.size, found.fingerprint) != (listed.size, listed.fingerprint):
        raise SourceError(
            f"{where} changed while it was read ({listed.size} bytes were listed, it has {found.size}); run again when "
            "nothing writes to it"
        )


@contextmanager
def _open_local(place: Place, path: str, where: str) -> Generator[BinaryIO]:
    try:
        file = open_within(place.path, path)
    except (ImageRejected, OSError) as error:
        raise SourceError(f"{where} cannot be opened: {_why(error)}; run again when it can") from error
    with file:
        yield file


def _why(error: Exception) -> str:
    if isinstance(error, ImageRejected):
        return error.detail
    return redact(getattr(error, "strerror", None) or str(error))


@contextmanager
def _open_remote(place: Place, listed: Listed, where: str) -> Generator[BinaryIO]:
    if _has_ranges(place, listed, where):
        with ThreadPoolExecutor(1) as pool:
            yield io.BufferedReader(RangeFile(place, listed, where, pool), buffer_size=1 << 16)
        return
    with tempfile.TemporaryFile(prefix="evenshard-") as copy:
        _download(place, listed, where, copy)
        yield copy  # pyright: ignore[reportReturnType]


def _has_ranges(place: Place, listed: Listed, where: str) -> bool:
    """Asked once, with one byte: a server that ignores ranges would send the whole file for each block."""
    if not place.is_web or listed.size <= BLOCK_BYTES:
        return True
    try:
        _fetch(place, listed.path, where, (1, 2))
    except NoRangesError:
        return False
    return True


def _fetch(place: Place, path: str, where: str, span: tuple[int, int]) -> bytes:
    try:
        return fetch_range(place, path, *span)
    except ImageRejected as error:
        raise SourceError(
            f"{where} cannot be read at byte {span[0]}: {error.detail}; check the network and the server, then run "
            "again: finished parts are kept"
        ) from error


class RangeFile(io.RawIOBase):
    """A remote file, a few blocks of it in memory; the block after the last one read is fetched in the background."""

    def __init__(self, place: Place, listed: Listed, where: str, pool: ThreadPoolExecutor) -> None:
        self._place, self._listed, self._where, self._pool = place, listed, where, pool
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._ahead: tuple[int, Future[bytes]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._listed.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= self._listed.size or not len(view):
            return 0
        number, start = divmod(self._position, BLOCK_BYTES)
        part = self._block(number)[start : start + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _block(self, number: int) -> bytes:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == number:
            block = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            block = self._read(number)
        if number - 1 in self._blocks and (number + 1) * BLOCK_BYTES < self._listed.size:
            self._ahead = (number + 1, self._pool.submit(self._read, number + 1))
        self._blocks[number] = block
        if len(self._blocks) > NUM_BLOCKS:
            self._blocks.popitem(last=False)
        return block

    def _read(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        span = (start, min(start + BLOCK_BYTES, self._listed.size))
        return _fetch(self._place, self._listed.path, self._where, span)


def _download(place: Place, listed: Listed, where: str, copy: Any) -> None:
    whole = place if not listed.path else Place(place.protocol, place.join(listed.path))
    with local_copy(whole) as path, open(path, "rb") as file:
        shutil.copyfileobj(file, copy, BLOCK_BYTES)
    if copy.tell() != listed.size:
        raise SourceError(f"{where}: {copy.tell()} of {listed.size} bytes came; run again")
    copy.seek(0)


class Readable(Protocol):
    """Anything to read from, front to back."""

    def read(self, size: int = -1, /) -> bytes: ...


class Inflated:
    """The contents of a gzip file, front to back. Damage ends it like the end of the file; ``problem`` says so."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._inflate = zlib.decompressobj(wbits=_GZIP)
        self._waiting = memoryview(b"")
        self._begun = False
        self.problem = ""

    def read(self, size: int = -1, /) -> bytes:
        while not self._waiting and not self.problem and (data := self._file.read(_DEFLATED_BYTES)):
            self._waiting = memoryview(self._feed(data))
        if not self._waiting and self._begun and not self._inflate.eof:
            self.problem = self.problem or "the gzip data is cut off"
        stop = len(self._waiting) if size < 0 else size
        part, self._waiting = self._waiting[:stop], self._waiting[stop:]
        return bytes(part)

    def _feed(self, data: bytes) -> bytes:
        result = b""
        while data and not self.problem:
            if self._inflate.eof:  # one gzip file after another; zeros between them are padding
                if not (data := data.lstrip(b"\0")):
                    break
                self._inflate = zlib.decompressobj(wbits=_GZIP)
            try:
                result += self._inflate.decompress(data)
            except zlib.error:
                self.problem = "the gzip data is damaged, or its checksum is wrong"
            self._begun = True
            data = self._inflate.unused_data if self._inflate.eof else b""
        return result
