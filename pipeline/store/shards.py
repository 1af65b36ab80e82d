"""Image bytes by offset: no tar is parsed, and no byte is returned whose checksum was not verified."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import xxhash

from pipeline.errors import IntegrityError, NotFoundError, UsageError
from pipeline.store.backends import open_regular, read_fully
from pipeline.store.messages import RESTORE
from pipeline.store.root import Store

OPEN_FILES = 256
"""Files a reader keeps open: a quarter of the usual limit of 1,024, and 64 GB of full shards."""

_NUM_PROBES = 4  # of a batch, to see whether its images are in memory: advising the kernel of all costs a third more
_PROBE = bytearray(1)  # what is read into it does not matter

ShardRange = tuple[str, int, int]
"""``(tar_path, offset, size)``: where the bytes of one image lie."""


class ShardReader:
    """Reads ranges of tars; on a local ROOT one read is one pread. Thread-safe; picklable, without its open files."""

    def __init__(self, store: Store, max_open: int = OPEN_FILES) -> None:
        if max_open < 1:
            raise UsageError(f"max_open must be at least 1, not {max_open}")
        self.store = store
        self._max_open = max_open
        # The one opened first is closed first: draws are random, so the least recently used would be no better guess,
        # and knowing it would take a lock around every read.
        self._open: dict[str, OpenFile] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Store, int]]:
        return ShardReader, (self.store, self._max_open)

    def read(self, tar_path: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes, not yet verified."""
        if not self.store.is_local:
            with vanishing(tar_path):
                return self.store.read_range(tar_path, offset, size)
        try:
            descriptor = self._descriptor(tar_path)  # held until it was read: another thread may drop it
            data = read_fully(descriptor.number, offset, size)
        except OSError as error:  # a context manager around every read would cost more than the read
            self._explain(error, tar_path)
        if len(data) != size:
            raise IntegrityError(
                f"{tar_path} in {self.store.url} is cut short: expected {size} bytes at offset {offset}, "
                f"found {len(data)}; {RESTORE}"
            )
        return data

    def read_many(self, requests: Sequence[ShardRange], checksums: Sequence[int] | None = None) -> list[bytes]:
        """``read`` of each. If they are not in memory, the kernel hears of all first, so a disk works on many at once.

        Nothing is verified here; readers that keep what they fetched use ``checksums`` (XXH3-64) on arrival.
        """
        tars = {request[0] for request in requests}
        if not tars or not self.store.is_local or len(tars) > self._max_open:
            return [self.read(*request) for request in requests]
        # One loop without a call of ours in it, which would cost as much as the read. What fails in it, or comes
        # short, is read again by itself, and says what is wrong.
        try:
            held = [self._descriptor(tar) for tar in tars]  # open as long as this list
            numbers = {tar: opened.number for tar, opened in zip(tars, held, strict=True)}
            if any(_is_cold(numbers[tar], offset) for tar, offset, _ in requests[:: -(-len(requests) // _NUM_PROBES)]):
                for tar, offset, size in requests:
                    os.posix_fadvise(numbers[tar], offset, size, os.POSIX_FADV_WILLNEED)
            images = [os.pread(numbers[tar], size, offset) for tar, offset, size in requests]
        except OSError:
            return [self.read(*request) for request in requests]
        if list(map(len, images)) != [size for _, _, size in requests]:
            return [self.read(*request) for request in requests]
        return images

    def _explain(self, error: OSError, tar_path: str) -> NoReturn:
        with vanishing(tar_path), self.store.explained("read", tar_path):
            raise error

    def _descriptor(self, tar_path: str) -> OpenFile:
        """It stays open as long as the caller holds it."""
        found = self._held(tar_path)
        return found or self._hold(tar_path, open_regular(self.store.local_path(tar_path) or tar_path))

    def _held(self, tar_path: str) -> OpenFile | None:
        return self._open.get(tar_path)

    def _hold(self, tar_path: str, descriptor: int) -> OpenFile:
        opened = OpenFile(descriptor)
        with self._lock:
            found = self._open.setdefault(tar_path, opened)
            if len(self._open) > self._max_open:
                del self._open[next(iter(self._open))]
        return found


def _is_cold(descriptor: int, offset: int) -> bool:
    """Whether reading there would wait for the disk."""
    try:
        return not os.preadv(descriptor, [_PROBE], offset, os.RWF_NOWAIT)
    except OSError:  # EAGAIN, or a file system that cannot tell; what else there is, the read will say
        return True


@contextmanager
def vanishing(tar_path: str) -> Generator[None]:
    """A shard that a snapshot names is gone: say how that is kept from happening."""
    try:
        yield
    except NotFoundError as error:
        raise NotFoundError(
            f"{error} (shard {tar_path} vanished while it was in use: if a clean-up removed it, build again, and keep "
            f"snapshots in training with `evenshard pin`)"
        ) from None


class OpenFile:
    """A descriptor, closed with its last reference."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def read_image(
    source: Store | ShardReader, tar_path: str, offset: int, size: int, checksum: int, where: Callable[[], str] | str
) -> bytes:
    """The verified bytes of one image; ``where`` names its key, and is called only if there is an error to tell."""
    read = source.read if isinstance(source, ShardReader) else source.read_range
    return check_image(read(tar_path, offset, size), checksum, tar_path, offset, where)


def check_image(data: bytes, checksum: int, tar_path: str, offset: int, where: Callable[[], str] | str) -> bytes:
    """``data``, if its XXH3-64 is ``checksum``."""
    found = xxhash.xxh3_64_intdigest(data)
    if found != checksum:
        named = where if isinstance(where, str) else where()
        raise IntegrityError(
            f"image {named} in {tar_path} at offset {offset}: expected {len(data)} bytes with XXH3-64 "
            f"{checksum:016x}, found {found:016x}; {RESTORE}"
        )
    return data
