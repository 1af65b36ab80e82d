"""The files of a source, read: one, or many ahead of whoever wants them.

Comes in: a place and paths below it. Goes out: bytes, or ``ImageRejected``, in the order asked for. Guarantees: those
of `source_files`; at most about ``AHEAD_BYTES`` are held that nobody has asked for yet.

A file that lies in the page cache costs less than handing it from one thread to another; one that must be waited for,
on a cold disk, a network share or a server, is worth a thread of its own: disks reach ten times as many files a second
with 32 requests in flight as with one.
"""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

from pipeline.errors import MissingExtraError
from pipeline.images import ImageRejected
from pipeline.ingest.source_files import Place, filesystem
from pipeline.ingest.source_local import LocalFolder, read_within
from pipeline.ingest.source_trouble import as_rejection, attempt, is_doubtful, is_transient

NUM_READERS = 32
"""Files that are waited for at once."""
AHEAD_BYTES = 32 << 20
PART_FILES, PART_BYTES = 64, 4 << 20
"""What is read in one go: enough files to tell whether they are waited for."""
_PROBE_EVERY = 16
"""Of the parts that are read by threads, one is read without, to see whether that is still worth it."""

Read = bytes | ImageRejected


@dataclass(frozen=True)
class SourceReader:
    """Reads files of one place; travels to workers."""

    place: Place
    max_bytes: int

    def read(self, path: str) -> bytes:
        """The bytes of the file at ``path``, relative to the place; ``ImageRejected`` where it cannot be had."""
        try:
            if self.place.is_local:
                return attempt(lambda: read_within(self.place.path, path, self.max_bytes), is_transient)
            return attempt(lambda: bytes(filesystem(self.place.protocol).cat_file(self.place.join(path))), is_doubtful)
        except (ImageRejected, MissingExtraError, MemoryError):
            raise
        except Exception as error:  # clients of object stores raise what they like; the file is unreadable all the same
            raise as_rejection(error) from error

    def read_all(self, paths: Sequence[str], sizes: Sequence[int]) -> Iterator[Read]:
        """`read` of each of these files, whose sizes were listed; a refusal is returned, not raised."""
        with ExitStack() as stack:
            if self.place.is_local:
                folder = stack.enter_context(LocalFolder(self.place.path))
                yield from _ReadingAhead(stack, self, folder).run(paths, sizes)
            else:
                yield from _ReadingAhead(stack, self, None).run(paths, sizes)


Files = list[tuple[str, int]]


class _ReadingAhead:
    """Parts of a list of files, some of them read before they are asked for."""

    def __init__(self, stack: ExitStack, reader: SourceReader, folder: LocalFolder | None) -> None:
        self._stack, self._reader, self._folder = stack, reader, folder
        self._threads: ThreadPoolExecutor | None = None
        self._waits = folder is None  # whether files are waited for, as far as the last look told

    def run(self, paths: Sequence[str], sizes: Sequence[int]) -> Iterator[Read]:
        parts = _parts(paths, sizes)
        while True:
            if self._waits:
                yield from self._ahead(parts if self._folder is None else islice(parts, _PROBE_EVERY))
            part = next(parts, None)
            if part is None:
                return
            before = _num_waits()
            data = [self._read(path, size) for path, size in part]
            self._waits = _num_waits() - before > len(part) // 4
            yield from data

    def _ahead(self, parts: Iterator[Files]) -> Iterator[Read]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="evenshard-read")
            self._stack.callback(self._threads.shutdown, cancel_futures=True)
        coming: deque[tuple[int, Future[list[Read]]]] = deque()
        num_bytes = 0
        for part in parts:
            # Threads take a few files at a time: handing over each alone would cost more than reading it.
            step = max(1, len(part) // NUM_READERS)
            for start in range(0, len(part), step):
                files = part[start : start + step]
                size = sum(size for _, size in files)
                num_bytes += size
                coming.append((size, self._threads.submit(self._read_files, files)))
                while num_bytes > AHEAD_BYTES or len(coming) > 4 * NUM_READERS:
                    size, done = coming.popleft()
                    num_bytes -= size
                    yield from done.result()
        while coming:
            yield from coming.popleft()[1].result()

    def _read(self, path: str, size: int) -> Read:
        folder = self._folder
        data = folder.read(path, size) if folder is not None and size <= self._reader.max_bytes else None
        if data is not None:
            return data
        try:
            return self._reader.read(path)
        except ImageRejected as rejected:
            return rejected

    def _read_files(self, files: Files) -> list[Read]:
        return [self._read(path, size) for path, size in files]


def _parts(paths: Sequence[str], sizes: Sequence[int]) -> Iterator[Files]:
    part: Files = []
    num_bytes = 0
    for path, size in zip(paths, sizes, strict=True):
        part.append((path, size))
        num_bytes += size
        if len(part) == PART_FILES or num_bytes >= PART_BYTES:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def _num_waits() -> int:
    """How often this thread has waited for anything so far: never, while files come from the page cache."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
