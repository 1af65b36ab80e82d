"""Ranges of remote tars, through the node cache.

Comes in: ranges of tars on a remote root. Goes out: their bytes, exactly so many. Guarantees: what is in the cache is
not fetched again; a whole shard is fetched at most once per node; what is read beyond what is wanted stays below an
eighth; a failure in the background is raised by the next read.

    the split fits      whole shards, in the background; ranges of them until they are there
    it does not         single images, by concurrent range reads that join neighbours; what repeats stays
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import xxhash

from pipeline.errors import EvenshardError, IntegrityError, UsageError
from pipeline.schema import tar_path
from pipeline.store import OPEN_FILES, ShardRange, ShardReader, Store, read_fully, vanishing
from pipeline.stream.cache import PIECE_BYTES, NodeCache

CONNECTIONS = 16
"""Range reads at once, per process."""

GAP_BYTES = 64 << 10
"""Neighbours further apart are read by themselves; and gaps never make a read longer than 9/8 of what is wanted."""


class CachedReader(ShardReader):
    """Ranges of remote tars through a ``NodeCache``. Thread-safe; picklable, without its connections."""

    def __init__(self, store: Store, cache: NodeCache, sizes: Mapping[str, int], max_open: int = OPEN_FILES) -> None:
        """``sizes``: bytes of every tar that may be asked for, by its path."""
        super().__init__(store, max_open)
        self.cache = cache
        self.keeps_shards = sum(sizes.values()) <= cache.max_bytes
        self._sizes = dict(sizes)
        self._pool_lock = threading.Lock()
        self._start()

    def __reduce__(self) -> tuple[type[CachedReader], tuple[Store, NodeCache, dict[str, int], int]]:  # pyright: ignore
        return CachedReader, (self.store, self.cache, self._sizes, self._max_open)

    def read(self, tar_path: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes, not yet verified."""
        return self.read_many([(tar_path, offset, size)])[0]

    def read_many(self, requests: Sequence[ShardRange], checksums: Sequence[int] | None = None) -> list[bytes]:
        """Each range, in order; with ``checksums`` (XXH3-64) what arrives wrong is asked for once more."""
        if self._process != os.getpid():  # threads do not survive a fork
            self._start()
        wanted = dict(zip(requests, checksums or [None] * len(requests), strict=True))
        found = self._from_shards(list(wanted)) if self.keeps_shards else self._from_images(wanted)
        missing = {request: checksum for request, checksum in wanted.items() if request not in found}
        fetched = self._fetch(missing)
        if not self.keeps_shards:
            for (path, offset, _), data in fetched.items():
                self.cache.keep_image(_sha256(path), offset, data)
        found.update(fetched)
        return [found[request] for request in requests]

    def _start(self) -> None:
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="evenshard-read")
        self._downloads = _Downloads()
        weakref.finalize(self, self._downloads.end)

    # -- whole shards

    def _from_shards(self, requests: list[ShardRange]) -> dict[ShardRange, bytes]:
        """What is here, after waiting for the shards that cost little more than the ranges of them."""
        self._downloads.raise_failure()
        by_tar: dict[str, list[ShardRange]] = {}
        for request in requests:
            by_tar.setdefault(request[0], []).append(request)
        absent = [path for path in by_tar if not self._is_here(path)]
        at_once = [path for path in absent if self._is_worth_waiting(path, by_tar[path])]
        for path in set(absent) - set(at_once):
            self._downloads.begin(path, self._download_of(path))
        for done in [self._pool.submit(self._download_of(path)) for path in at_once]:
            done.result()
        return {request: data for mine in by_tar.values() for request, data in self._read_held(mine)}

    def _is_worth_waiting(self, path: str, requests: list[ShardRange]) -> bool:
        size = self._size_of(path)
        return size <= PIECE_BYTES or 4 * sum(request[2] for request in requests) >= size

    def _is_here(self, path: str) -> bool:
        if self._held(path) is None:
            descriptor = self.cache.shard(_sha256(path), self._size_of(path))
            if descriptor is None:
                return False
            self._hold(path, descriptor)
        return True

    def _whole(self, request: ShardRange, data: bytes) -> bytes:
        path, offset, size = request
        if len(data) != size:
            raise IntegrityError(f"{path} has {self._sizes[path]} bytes, and none of {size} at offset {offset}")
        return data

    def _read_held(self, requests: list[ShardRange]) -> Iterator[tuple[ShardRange, bytes]]:
        path = requests[0][0]
        if not self._is_here(path):
            return
        held = self._held(path)  # stays open while it is read, even if another thread drops it
        if held is None:
            return
        with self.store.explained("read", path):
            for request in requests:
                yield request, self._whole(request, read_fully(held.number, request[1], request[2]))

    def _download_of(self, path: str) -> Callable[[], None]:
        """Without a reference to this reader, so that it can be collected meanwhile."""
        store, cache, sha256, size = self.store, self.cache, _sha256(path), self._size_of(path)

        def fetch(offset: int, length: int) -> bytes:
            with vanishing(path):
                return store.read_range(path, offset, length)

        def work() -> None:
            descriptor = cache.download(sha256, size, fetch)
            if descriptor is not None:
                os.close(descriptor)

        return work

    def _size_of(self, path: str) -> int:
        if path not in self._sizes:
            raise UsageError(f"{path} is not among the {len(self._sizes)} shards that this reader was opened for")
        return self._sizes[path]

    # -- single images

    def _from_images(self, wanted: Mapping[ShardRange, int | None]) -> dict[ShardRange, bytes]:
        found: dict[ShardRange, bytes] = {}
        for (path, offset, size), checksum in wanted.items():
            data = self.cache.image(_sha256(path), offset, size, checksum)
            if data is not None:
                found[path, offset, size] = data
        return found

    def _fetch(self, wanted: Mapping[ShardRange, int | None]) -> dict[ShardRange, bytes]:
        found: dict[ShardRange, bytes] = {}
        for part in self._pool.map(self._fetch_run, join_neighbours(list(wanted))):
            found.update(part)
        for request, checksum in wanted.items():
            if checksum is not None and xxhash.xxh3_64_intdigest(found[request]) != checksum:
                found.update(self._fetch_run([request]))
        return found

    def _fetch_run(self, run: list[ShardRange]) -> dict[ShardRange, bytes]:
        path, begin, _ = run[0]
        end = max(offset + size for _, offset, size in run)
        with vanishing(path):
            data = self.store.read_range(path, begin, end - begin)
        return {(path, offset, size): data[offset - begin : offset - begin + size] for _, offset, size in run}


def join_neighbours(requests: list[ShardRange]) -> list[list[ShardRange]]:
    """Runs of ranges to read as one. Together they read at most 9/8 of the bytes that are wanted."""
    runs: list[list[ShardRange]] = []
    end = wanted = 0
    for path, offset, size in sorted(requests):
        joined = max(end, offset + size)
        if runs and runs[-1][0][0] == path and _is_one_read(runs[-1][0][1], offset, end, joined, wanted + size):
            runs[-1].append((path, offset, size))
            end, wanted = joined, wanted + size
        else:
            runs.append([(path, offset, size)])
            end, wanted = offset + size, size
    return runs


def _is_one_read(begin: int, offset: int, end: int, joined: int, wanted: int) -> bool:
    length = joined - begin
    return offset - end <= GAP_BYTES and length <= PIECE_BYTES and 8 * length <= 9 * wanted


def open_reader(
    store: Store, cache: NodeCache | None = None, shards: pa.Table | None = None, split: str | None = None
) -> ShardReader:
    """The reader for ``store``: through ``cache`` if one is given and the root is remote.

    ``shards`` is the snapshot's table of them; where those of ``split`` fit into the cache, they are kept whole.
    """
    if store.is_local or cache is None:
        return ShardReader(store)
    if shards is None:
        raise UsageError("a reader with a cache must know the sizes of the shards: give the snapshot's table of them")
    columns = (shards[name].to_pylist() for name in ("split", "tar_sha256", "tar_size"))
    sizes = {tar_path(sha256): size for of, sha256, size in zip(*columns, strict=True) if split in (None, of)}
    return CachedReader(store, cache, sizes)


class _Downloads:
    """Work in the background, in daemon threads: the end of the program does not wait for a download."""

    def __init__(self, num_threads: int = 4) -> None:
        self._num_threads = num_threads
        self._queue: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._begun: set[str] = set()
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def begin(self, name: str, work: Callable[[], None]) -> None:
        """Unless it is under way."""
        with self._lock:
            if name in self._begun:
                return
            self._begun.add(name)
            if len(self._threads) < self._num_threads:
                arguments = (self._queue, self._begun, self._failures)
                self._threads.append(threading.Thread(target=_work, args=arguments, daemon=True))
                self._threads[-1].start()
        self._queue.put((name, work))

    def raise_failure(self) -> None:
        """What went wrong since it was asked last."""
        if self._failures:
            raise self._failures.pop()

    def end(self) -> None:
        """Begin nothing more."""
        for _ in self._threads:
            self._queue.put(None)


def _work(
    tasks: queue.SimpleQueue[tuple[str, Callable[[], None]] | None], begun: set[str], failures: list[BaseException]
) -> None:
    while (task := tasks.get()) is not None:
        name, work = task
        try:
            work()
        except EvenshardError as error:
            failures.append(error)
        finally:
            begun.discard(name)


def _sha256(path: str) -> str:
    """The name of a tar is its hash."""
    return path[-len(".tar") - 64 : -len(".tar")]
