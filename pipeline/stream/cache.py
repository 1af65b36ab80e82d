"""The node cache: a directory in which all processes of a node share what they fetched.

Comes in: shards, and images of them, by the SHA-256 of the shard. Goes out: the same, later. Guarantees: a whole shard
is downloaded at most once per node, and is used only if it has the SHA-256 that names it; a killed process leaves only
temporaries, which the next one removes; no file is removed that was not made here; the directory stays within its
bytes, and least recently used goes first.

    DIR/evenshard-cache     marker: this directory is a cache
    DIR/files/ab/ab12...tar, ab12...-OFFSET-SIZE.img       an image file begins with the XXH3-64 of the rest
    DIR/locks/ab12...       flock: who downloads that shard; inside, which file was verified
    DIR/partial/...         flock: being written; without a lock, left by a killed process
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import xxhash

from pipeline.errors import IntegrityError, StoreError, UsageError
from pipeline.schema import tar_path

MARKER = "evenshard-cache"
CACHE_VARIABLE = "EVENSHARD_CACHE"

PIECE_BYTES = 8 << 20
"""A shard is downloaded in ranges of this size: what a failed attempt costs, and what a process holds in memory."""

_DEFAULT_BYTES = 64 << 30
_CREDIT_SHARE = 64  # images make room by this share of the cache at once
_MARKER_TEXT = b"evenshard node cache, format 1\n"
_OURS = re.compile(r"[0-9a-f]{64}(\.tar|-\d+-\d+\.img)")
_CHECKSUM_BYTES = 8
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

Fetch = Callable[[int, int], bytes]
"""``fetch(offset, size)``: exactly these bytes of a shard."""


class NodeCache:
    """Files by content in one directory, shared by threads and processes. Picklable: it carries its settings alone."""

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int) -> None:
        if max_bytes < 1:
            raise UsageError(
                f"the cache must have at least 1 byte, not {max_bytes}; leave out cache_bytes for a default"
            )
        self.directory = os.path.abspath(os.path.expanduser(os.fspath(directory)))
        self.max_bytes = max_bytes
        self._credit = 0  # bytes of images that may be written before looking again
        self._lock = threading.Lock()
        with self._explained("open"):
            self._claim()
            self._remove_abandoned()

    def __reduce__(self) -> tuple[type[NodeCache], tuple[str, int]]:
        return NodeCache, (self.directory, self.max_bytes)

    def __repr__(self) -> str:
        return f"NodeCache({self.directory!r}, max_bytes={self.max_bytes})"

    def shard(self, sha256: str, size: int) -> int | None:
        """A descriptor of the whole shard, which the caller closes; None if it is not here, or not what it is named."""
        with self._explained("read"):
            opened = self._open(self._path(f"{sha256}.tar"))
            if opened is None:
                return None
            try:
                if self._is_verified(opened, sha256, size):
                    _touch(opened)
                    return opened
            except BaseException:
                os.close(opened)
                raise
            os.close(opened)
            return None

    def download(self, sha256: str, size: int, fetch: Fetch) -> int | None:
        """``shard``, after a download unless another thread or process did that; None if it can never fit."""
        if size > self.max_bytes:
            return None
        with self._explained("write to"), self._locked(sha256):
            here = self.shard(sha256, size)
            return self._download(sha256, size, fetch) if here is None else here

    def image(self, sha256: str, offset: int, size: int, checksum: int | None = None) -> bytes | None:
        """One image of a shard; None if it is not here, or not what arrived, or not what ``checksum`` says."""
        with self._explained("read"):
            opened = self._open(self._path(f"{sha256}-{offset}-{size}.img"))
            if opened is None:
                return None
            with open(opened, "rb", buffering=0) as file:
                data = os.pread(opened, _CHECKSUM_BYTES + size + 1, 0)
                _touch(file.fileno())
        found = int.from_bytes(data[:_CHECKSUM_BYTES], "big")
        image = data[_CHECKSUM_BYTES:]
        sound = len(image) == size and found == xxhash.xxh3_64_intdigest(image) and checksum in (None, found)
        return image if sound else None

    def keep_image(self, sha256: str, offset: int, data: bytes) -> None:
        """So that ``image`` finds it next time."""
        size = len(data) + _CHECKSUM_BYTES
        if size > self.max_bytes:
            return
        with self._explained("write to"):
            self._spend(size)
            with self._new_file(f"{sha256}-{offset}-{len(data)}.img") as descriptor:
                _write(descriptor, xxhash.xxh3_64_digest(data) + data)

    def used_bytes(self) -> int:
        """What lies here, unfinished downloads included."""
        return sum(file.size for file in self._files()) + self._partial_bytes()

    # -- the directory

    def _claim(self) -> None:
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        found = os.stat(self.directory)
        if found.st_uid != os.geteuid():
            raise StoreError(
                f"the cache directory {self.directory} belongs to user {found.st_uid}, and this process runs as user "
                f"{os.geteuid()}: a cache is shared by the processes of one user, so `chown` it, or choose another "
                f"(cache_dir or ${CACHE_VARIABLE})"
            )
        if self._is_marked() and found.st_mode & 0o022:
            raise StoreError(
                f"the cache directory {self.directory} can be written by others, who could plant files in it: "
                f"`chmod 700` it, or choose another (cache_dir or ${CACHE_VARIABLE})"
            )
        if not self._is_marked():
            self._mark()
        for name in ("files", "locks", "partial"):
            os.makedirs(f"{self.directory}/{name}", mode=0o700, exist_ok=True)
        self._write_probe()

    def _is_marked(self) -> bool:
        return os.path.isfile(f"{self.directory}/{MARKER}")

    def _mark(self) -> None:
        if names := sorted(set(os.listdir(self.directory)) - {MARKER}):
            if self._is_marked():  # by another process, between two looks
                return
            raise UsageError(
                f"the cache directory {self.directory} holds {names[0]!r} and no cache of evenshard; files in a cache "
                f"come and go, so choose a new or an empty directory (cache_dir or ${CACHE_VARIABLE})"
            )
        os.chmod(self.directory, 0o700)
        with suppress(FileExistsError), open(os.open(f"{self.directory}/{MARKER}", _NEW, 0o600), "wb") as file:
            file.write(_MARKER_TEXT)

    def _write_probe(self) -> None:
        with self._partial() as (_, path):
            os.unlink(path)

    def _path(self, name: str) -> str:
        return f"{self.directory}/files/{name[:2]}/{name}"

    def _open(self, path: str) -> int | None:
        """A plain file of ours; None if there is none, an error if something else has its name."""
        try:
            descriptor = os.open(path, _READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _planted(path) from None
            raise
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            os.close(descriptor)
            raise _planted(path)
        return descriptor

    @contextmanager
    def _locked(self, name: str) -> Generator[int]:
        """Until the block ends no other thread or process of the node is in such a block of this name."""
        descriptor = os.open(f"{self.directory}/locks/{name}", _LOCK, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a child that was forked meanwhile
            os.close(descriptor)

    @contextmanager
    def _explained(self, verb: str) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot {verb} the cache directory {self.directory}: {error.strerror}; {self._advice(error)}, or "
                f"choose another (cache_dir or ${CACHE_VARIABLE})"
            ) from error

    def _advice(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # An error, not reading on without it: what repeats would be fetched, and paid for, again and again.
            with suppress(OSError):
                free = shutil.disk_usage(self.directory).free
                return f"{free} bytes are free there: free some space, or give the cache fewer bytes (cache_bytes)"
        if error.errno == errno.EROFS:
            return "mount its file system writable"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return "it was removed while in use: run again"
        return "let this user write there"

    # -- shards

    def _download(self, sha256: str, size: int, fetch: Fetch) -> int:
        with self._new_file(f"{sha256}.tar") as descriptor:
            self._make_room(size, descriptor)
            found = _copy(descriptor, size, fetch)
            if found != sha256:  # two objects spliced, or bytes changed on the way: once more
                found = _copy(descriptor, size, fetch)
            if found != sha256:
                raise IntegrityError(
                    f"{tar_path(sha256)} arrived as {size} bytes with SHA-256 {found}, not the one that it is named "
                    f"by; restore the file from a copy, or look at what lies between here and the server"
                )
            kept = os.dup(descriptor)
        self._note_verified(kept, sha256)
        return kept

    def _is_verified(self, descriptor: int, sha256: str, size: int) -> bool:
        if os.fstat(descriptor).st_size != size:
            return False
        if self._noted(sha256) == _identity(descriptor):
            return True
        with open(os.dup(descriptor), "rb") as file:
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == sha256:
            self._note_verified(descriptor, sha256)
        return found == sha256

    def _note_verified(self, descriptor: int, sha256: str) -> None:
        """A file is hashed once, not once per process; torn notes and changed files are hashed again."""
        note = os.open(f"{self.directory}/locks/{sha256}", _LOCK, 0o600)
        with open(note, "wb", buffering=0) as file:
            file.truncate(0)
            file.write(_identity(descriptor))

    def _noted(self, sha256: str) -> bytes:
        try:
            with open(os.open(f"{self.directory}/locks/{sha256}", _READ), "rb", buffering=0) as file:
                return file.read()
        except FileNotFoundError:
            return b""

    # -- writing

    @contextmanager
    def _new_file(self, name: str) -> Generator[int]:
        """Under its name when the block ends well; one of that name is replaced, if it is a plain file of ours."""
        final = self._path(name)
        with self._partial() as (descriptor, path):
            yield descriptor
            os.makedirs(os.path.dirname(final), mode=0o700, exist_ok=True)
            there = self._open(final)
            if there is not None:
                os.close(there)
            os.rename(path, final)

    @contextmanager
    def _partial(self) -> Generator[tuple[int, str]]:
        """A new temporary file, locked so that others see that its writer lives."""
        path = f"{self.directory}/partial/{uuid.uuid4().hex}"
        descriptor = os.open(path, _NEW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not os.fstat(descriptor).st_nlink:  # taken for abandoned before it was locked
                with self._partial() as another:
                    yield another
                return
            yield descriptor, path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)
            os.close(descriptor)

    # -- room

    def _spend(self, size: int) -> None:
        with self._lock:
            if self._credit < size:
                self._credit = max(size, self.max_bytes // _CREDIT_SHARE)
                self._make_room(self._credit)
            self._credit -= size

    def _make_room(self, size: int, descriptor: int | None = None) -> None:
        """Remove least recently used files until ``size`` more bytes fit, and give them to the file, if there is one.

        So downloads at the same time see each other, and a full disk is found before anything is fetched.
        """
        with self._locked("room"):
            self._remove_abandoned()
            files = sorted(self._files(), key=lambda file: file.used_ns)
            excess = sum(file.size for file in files) + self._partial_bytes() + size - self.max_bytes
            for file in files:
                if excess <= 0:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(file.path)
                excess -= file.size
            if descriptor is not None and size:
                os.posix_fallocate(descriptor, 0, size)

    def _files(self) -> Iterator[_File]:
        for directory in _entries(f"{self.directory}/files"):
            if not directory.is_dir(follow_symlinks=False):
                continue
            for entry in _entries(directory.path):
                if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # another process made room
                        found = entry.stat(follow_symlinks=False)
                        yield _File(path=entry.path, size=found.st_size, used_ns=found.st_atime_ns)

    def _partial_bytes(self) -> int:
        total = 0
        for entry in _entries(f"{self.directory}/partial"):
            with suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
        return total

    def _remove_abandoned(self) -> None:
        """What killed processes left: the kernel has dropped their locks."""
        for entry in _entries(f"{self.directory}/partial"):
            with suppress(FileNotFoundError, BlockingIOError):
                descriptor = os.open(entry.path, _READ)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                finally:
                    os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class _File:
    path: str
    size: int
    used_ns: int


def default_cache(directory: str | os.PathLike[str] | None = None, max_bytes: int | None = None) -> NodeCache:
    """In $EVENSHARD_CACHE or the user's cache directory; 64 GiB, or half of what the disk has left if that is less."""
    if directory is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        directory = os.environ.get(CACHE_VARIABLE) or f"{home}/evenshard"
    if max_bytes is not None:
        return NodeCache(directory, max_bytes)
    cache = NodeCache(directory, _DEFAULT_BYTES)
    room = (shutil.disk_usage(cache.directory).free + cache.used_bytes()) // 2
    return cache if room >= _DEFAULT_BYTES else NodeCache(directory, max(room, 1))


def _copy(descriptor: int, size: int, fetch: Fetch) -> str:
    """Download into a file of the right size; the SHA-256 of what came."""
    digest = hashlib.sha256()
    for offset in range(0, size, PIECE_BYTES):
        piece = fetch(offset, min(PIECE_BYTES, size - offset))
        digest.update(piece)
        _write(descriptor, piece, offset)
    return digest.hexdigest()


def _write(descriptor: int, data: bytes, offset: int = 0) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        offset += written
        rest = rest[written:]


def _touch(descriptor: int) -> None:
    """Used now. The access time is ours alone; the time of change tells whether the content was verified."""
    os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))


def _identity(descriptor: int) -> bytes:
    found = os.fstat(descriptor)
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}".encode()


def _entries(directory: str) -> Iterator[os.DirEntry[str]]:
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        yield from entries


def _planted(path: str) -> StoreError:
    return StoreError(
        f"{path} in the cache is not a plain file of this user, and was not made here; remove it, and find out who "
        f"can write there"
    )
