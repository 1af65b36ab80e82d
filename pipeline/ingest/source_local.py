"""Files below one local folder: list, judge, open, read.

Comes in: a resolved folder and paths relative to it. Goes out: names with size and fingerprint, and bytes. Guarantees:
nothing outside the folder is read, through a link or '..' neither, whoever changes links meanwhile; pipes and devices
never hang; a file that is none is told with the reason.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, NamedTuple

import xxhash

from pipeline.images import ImageRejected
from pipeline.ingest.source_trouble import as_rejection
from pipeline.schema import Reason

CHUNK_FILES = 1 << 16


class Found(NamedTuple):
    """One entry of a folder. ``problem`` says why it is no candidate."""

    name: str
    is_folder: bool = False
    size: int = 0
    fingerprint: int = 0
    problem: Reason | None = None
    detail: str = ""


class Entries(NamedTuple):
    """Some of what lies directly in a folder: regular files by column, the rest one by one."""

    names: list[str]
    sizes: array[int]  # 'q', bytes
    fingerprints: array[int]  # 'Q'
    others: list[Found]

    @classmethod
    def empty(cls) -> Entries:
        return cls([], array("q"), array("Q"), [])

    def add(self, file: Found) -> None:
        """Take in a regular file."""
        self.names.append(file.name)
        self.sizes.append(file.size)
        self.fingerprints.append(file.fingerprint)

    def each(self) -> Iterator[Found]:
        """All of them, one by one."""
        yield from self.others
        for name, size, fingerprint in zip(self.names, self.sizes, self.fingerprints, strict=True):
            yield Found(name, size=size, fingerprint=fingerprint)


_pack_token = struct.Struct("<qqqQ").pack


def _fingerprint(status: os.stat_result) -> int:
    # The change time and the inode tell what a copied, moved or unpacked file with an old mtime would hide.
    token = _pack_token(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return xxhash.xxh3_64_intdigest(token)


def scan(root: str, folder: str) -> Iterator[Entries]:
    """What lies directly in ``folder``, in any order, in parts of at most ``CHUNK_FILES`` files."""
    full = f"{root}/{folder}" if folder else root
    descriptor = os.open(full, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # names then need no walk from the top
    try:
        part = Entries.empty()
        with os.scandir(descriptor) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        part.names.append(entry.name)
                        part.sizes.append(status.st_size)
                        part.fingerprints.append(_fingerprint(status))
                    else:
                        part.others.append(_examine(root, f"{full}/{entry.name}", entry.name, status))
                except OSError as error:
                    part.others.append(problem(entry.name, error))
                if len(part.names) + len(part.others) >= CHUNK_FILES:
                    yield part
                    part = Entries.empty()
        yield part
    finally:
        os.close(descriptor)


def scan_names(root: str, folder: str) -> Iterator[tuple[str, bool]]:
    """Names directly in ``folder``, and whether each is a folder; a link is none."""
    with os.scandir(f"{root}/{folder}" if folder else root) as entries:
        for entry in entries:
            yield entry.name, entry.is_dir(follow_symlinks=False)


def _examine(root: str, full: str, name: str, status: os.stat_result) -> Found:
    if stat.S_ISLNK(status.st_mode):
        return judge_link(root, full, name)
    if stat.S_ISDIR(status.st_mode):
        return Found(name, is_folder=True)
    return judge(name, status)


def judge_link(root: str, full: str, name: str) -> Found:
    """What a link leads to; OSError where it leads nowhere."""
    real = os.path.realpath(full)
    if os.path.isdir(real):
        return Found(name, problem=Reason.SYMLINK, detail="a link to a folder is not followed")
    if not lies_within(real, root):
        return Found(name, problem=Reason.OUTSIDE_ROOT, detail="a link out of the source is not followed")
    return judge(name, os.stat(full))


def judge(name: str, status: os.stat_result) -> Found:
    """A file by its status, which must not be a link's."""
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        return Found(name, problem=Reason.UNREADABLE, detail=f"{what}, not a file")
    return Found(name, size=status.st_size, fingerprint=_fingerprint(status))


def problem(name: str, error: OSError | ValueError) -> Found:
    """An entry that cannot be looked at."""
    rejection = as_rejection(error)
    return Found(name, problem=rejection.reason, detail=rejection.detail)


# --- Reading ---


def open_within(root: str, path: str) -> BinaryIO:
    """A regular file that really lies at or below ``root``; ``ImageRejected`` for any other."""
    return open(_open_within(root, path)[0], "rb")


def read_within(root: str, path: str, max_bytes: int) -> bytes:
    """All of a file, by system calls alone: a file object would cost as much as the read."""
    descriptor, size = _open_within(root, path)
    try:
        if size > max_bytes:
            raise ImageRejected(Reason.TOO_LARGE, f"{size} bytes, the limit is {max_bytes}")
        data = os.read(descriptor, size + 1)
        while len(data) < size and (more := os.read(descriptor, size + 1 - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # non-blocking: opening a pipe must not hang


def _open_within(root: str, path: str) -> tuple[int, int]:
    """Its descriptor, which is the caller's, and its size."""
    full = f"{root}/{path}" if path else root
    descriptor = os.open(full, _FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageRejected(Reason.UNREADABLE, "not a regular file")
        if not lies_within(_real_path(descriptor, full), root):
            raise ImageRejected(Reason.OUTSIDE_ROOT, "a link out of the source is not followed")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _real_path(descriptor: int, full: str) -> str:
    """Where an open file really lies; the kernel knows it for a tenth of what resolving the name costs."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return os.path.realpath(full)


def lies_within(path: str, root: str) -> bool:
    """Whether the resolved ``path`` is ``root`` or below it."""
    return path == root or path.startswith(root.rstrip("/") + "/")


class _OpenHow(ctypes.Structure):
    """Linux's ``struct open_how``."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_SYS_OPENAT2 = 437  # since Linux 5.6, the same number on all machines
_RESOLVE_NO_MAGICLINKS, _RESOLVE_BENEATH = 0x02, 0x08
_HOW = _OpenHow(_FLAGS, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
_HOW_ADDRESS, _HOW_BYTES = ctypes.addressof(_HOW), ctypes.sizeof(_HOW)


def _system_call() -> ctypes._NamedFuncPointer | None:  # pyright: ignore[reportPrivateUsage]
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).syscall
    call.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
    call.restype = ctypes.c_long
    return call


class LocalFolder:
    """A folder held open, to read many files of known size below it; usable from several threads.

    The kernel itself refuses what lies outside (`openat2`): a read takes 9 us, and 15 where it is asked afterwards.
    Whatever it refuses, and every file that is not as it was listed, goes the long way, which tells why.
    """

    def __init__(self, root: str) -> None:
        self._call = _system_call()
        self._descriptor = -1
        if self._call is not None:
            try:
                self._descriptor = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                self._call = None

    def __enter__(self) -> LocalFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, path: str, size: int) -> bytes | None:
        """The ``size`` bytes of a file, None where anything is out of the ordinary."""
        name = path.encode("utf-8", "surrogateescape")
        if self._call is None or b"\0" in name:
            return None
        descriptor: int = self._call(_SYS_OPENAT2, self._descriptor, name, _HOW_ADDRESS, _HOW_BYTES)
        if descriptor < 0:
            return None
        try:
            data = os.read(descriptor, size + 1)  # one more than there should be
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return data if len(data) == size else None
