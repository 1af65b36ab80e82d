"""What a kind of storage must do; a directory. Paths are relative to the root and already checked; errors are raw."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipeline.errors import StoreError
from pipeline.store.claims import claim, sweep_abandoned

_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a planted FIFO must not block the reader
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

_Made = TypeVar("_Made")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file below ROOT."""

    path: str
    size: int
    modified_s: float | None
    """When its bytes, or ``freshen``, came to storage, by the clock of the storage; None where it does not tell."""


class Backend(Protocol):
    """What a kind of storage must do."""

    root: str

    def read(self, path: str) -> bytes: ...
    def read_range(self, path: str, offset: int, length: int) -> bytes: ...  # fewer bytes only at the end of the file
    def entry(self, path: str) -> Entry | None: ...  # None: no such file
    def list(self, prefix: str) -> list[str]: ...
    def entries(self, prefix: str) -> Iterator[Entry]: ...  # in any order
    def top_names(self) -> list[str] | None: ...  # None: no such root
    def make_root(self) -> None: ...  # and prove that it is writable
    def create(self, path: str, data: bytes) -> None: ...  # FileExistsError if the name is taken, atomically
    def create_from(self, path: str, local_file: str) -> None: ...
    def settle(self, path: str) -> None: ...  # make an existing file durable, and young where that is cheap
    def freshen(self, path: str) -> None: ...  # make it as young as one that was created now; its bytes stay
    def probe(self) -> Entry: ...  # a file that was created now, and is gone again
    def replace(self, path: str, data: bytes) -> None: ...
    def replace_from(self, path: str, local_file: str) -> None: ...
    def remove(self, path: str) -> None: ...
    def staging_dir(self) -> str: ...
    def sweep(self, before_s: float) -> None: ...  # remove directories of staging/ that are empty and older
    def sweep_abandoned(self, quiet_s: float) -> int: ...  # remove what killed processes left, untouched for so long
    def creates_atomically(self) -> bool: ...


class LocalBackend:
    """A directory. Creation: temporary file in staging/, fsync, link(2), which never replaces, fsync of the directory.

    fsspec's exclusive create is not used here: it looks first and then writes, and two of four racers have won.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._durable: set[str] = set()  # directories whose own entry this process has fsynced

    def read(self, path: str) -> bytes:
        with open(open_regular(self._at(path)), "rb", buffering=0) as file:
            return file.read()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        with open(open_regular(self._at(path)), "rb", buffering=0) as file:
            return read_fully(file.fileno(), offset, length)

    def entry(self, path: str) -> Entry | None:
        try:
            found = os.lstat(self._at(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _entry(path, found) if stat.S_ISREG(found.st_mode) else None

    def list(self, prefix: str) -> list[str]:
        top = self._at(prefix) if prefix else self.root
        return sorted(
            os.path.relpath(os.path.join(directory, name), self.root)
            for directory, _, names in os.walk(top, onerror=_raise_unless_absent)
            for name in names
        )

    def entries(self, prefix: str) -> Iterator[Entry]:
        for path in self.list(prefix):
            with suppress(FileNotFoundError):  # it went while others were looked at
                yield _entry(path, os.lstat(self._at(path)))

    def top_names(self) -> list[str] | None:
        try:
            return os.listdir(self.root)
        except FileNotFoundError:
            return None

    def make_root(self) -> None:
        begun = os.path.isdir(self._staging())
        os.unlink(self._write_temporary(b""))
        if not begun:
            with suppress(OSError):  # another process works there by now
                os.rmdir(self._staging())

    def create(self, path: str, data: bytes) -> None:
        temporary = self._write_temporary(data)
        try:
            self._link(temporary, path)
        finally:
            remove_if_there(temporary)

    def create_from(self, path: str, local_file: str) -> None:
        here = os.stat(local_file).st_dev == os.stat(self.root).st_dev
        temporary = local_file if here else self._copy_to_staging(local_file)
        try:
            _fsync(temporary)
            self._link(temporary, path)
        finally:
            if not here:
                remove_if_there(temporary)
        remove_if_there(local_file)

    def settle(self, path: str) -> None:
        """Whoever made the file may have died before the fsync of its directory entry."""
        with suppress(PermissionError):  # of another user: the commit looks at its age again
            self.freshen(path)
        directory = os.path.dirname(self._at(path))
        self._make_directory(directory)
        _fsync(directory)

    def freshen(self, path: str) -> None:
        os.utime(self._at(path), follow_symlinks=False)  # without times: the server's clock sets them on NFS

    def probe(self) -> Entry:
        temporary = self._write_temporary(b"")
        try:
            return _entry(os.path.relpath(temporary, self.root), os.lstat(temporary))
        finally:
            remove_if_there(temporary)

    def replace(self, path: str, data: bytes) -> None:
        temporary = self._write_temporary(data)
        try:
            self._make_directory(os.path.dirname(self._at(path)))
            os.replace(temporary, self._at(path))
        finally:
            remove_if_there(temporary)
        _fsync(os.path.dirname(self._at(path)))

    def replace_from(self, path: str, local_file: str) -> None:
        here = os.stat(local_file).st_dev == os.stat(self.root).st_dev
        temporary = local_file if here else self._copy_to_staging(local_file)
        try:
            _fsync(temporary)
            self._make_directory(os.path.dirname(self._at(path)))
            os.replace(temporary, self._at(path))
        finally:
            remove_if_there(temporary)
        _fsync(os.path.dirname(self._at(path)))
        remove_if_there(local_file)

    def remove(self, path: str) -> None:
        os.unlink(self._at(path))

    def staging_dir(self) -> str:
        directory, _ = self._in_staging(os.mkdir)
        return directory

    def sweep(self, before_s: float) -> None:
        for directory, names, files in os.walk(self._staging(), topdown=False):
            with suppress(OSError):  # someone fills or removes it by now
                if directory != self._staging() and not (names or files) and os.lstat(directory).st_mtime < before_s:
                    os.rmdir(directory)

    def sweep_abandoned(self, quiet_s: float) -> int:
        now_s = self.probe().modified_s
        return 0 if now_s is None else sweep_abandoned(self._staging(), now_s - quiet_s)

    def creates_atomically(self) -> bool:
        return True

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _staging(self) -> str:
        return f"{self.root}/staging"

    def _in_staging(self, make: Callable[[str], _Made]) -> tuple[str, _Made]:
        """A new entry of staging/, held by this process: only then can no sweep take it."""
        while True:
            name = f"{self._staging()}/{os.getpid()}-{uuid.uuid4().hex}"
            self._make_directory(self._staging())
            try:
                made = make(name)
            except FileNotFoundError:  # another process removed the empty directory
                self._durable.discard(self._staging())
                self._make_directory(self._staging())
                made = make(name)
            if claim(name):
                return name, made
            if isinstance(made, int):
                os.close(made)

    def _write_temporary(self, data: bytes) -> str:
        name, descriptor = self._in_staging(lambda name: os.open(name, _WRITE_FLAGS, 0o666))
        try:
            with open(descriptor, "wb", buffering=0) as file:
                _write_fully(file.fileno(), data)
                os.fsync(file.fileno())
        except BaseException:
            remove_if_there(name)
            raise
        return name

    def _copy_to_staging(self, local_file: str) -> str:
        name = self._write_temporary(b"")
        try:
            return shutil.copyfile(local_file, name)
        except BaseException:
            remove_if_there(name)
            raise

    def _link(self, temporary: str, path: str) -> None:
        final = self._at(path)
        self._make_directory(os.path.dirname(final))
        try:
            os.link(temporary, final)
        except FileExistsError:
            if not os.path.samestat(os.lstat(temporary), os.lstat(final)):  # NFS may lose the reply of a link it made
                raise
        except OSError as error:
            if error.errno in _NO_HARD_LINKS:
                raise StoreError(
                    f"cannot create {final}: its file system refuses hard links ({error.strerror}), and without them "
                    f"a file cannot be created whole and never overwritten; choose a ROOT on another file system"
                ) from error
            raise
        _fsync(os.path.dirname(final))

    def _make_directory(self, directory: str) -> None:
        """With its parents, each durable before anything is put into it."""
        if directory in self._durable:
            return
        if not os.path.isdir(directory) or len(directory) > len(self.root):
            parent = os.path.dirname(directory)
            self._make_directory(parent)
            with suppress(FileExistsError):
                os.mkdir(directory)
            _fsync(parent)  # also if another process made it: that one may die before its own fsync
        self._durable.add(directory)


def _entry(path: str, found: os.stat_result) -> Entry:
    return Entry(path=path, size=found.st_size, modified_s=found.st_mtime)


def open_regular(path: str) -> int:
    """A descriptor for reading a plain file: no link is followed in its last name, no FIFO or device is opened."""
    descriptor = os.open(path, _READ_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file")
    return descriptor


def read_fully(descriptor: int, offset: int, length: int) -> bytes:
    """One pread, more only where the file system gives less than asked; short only at the end of the file."""
    data = os.pread(descriptor, length, offset)
    while 0 < len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def remove_if_there(path: str) -> None:
    """Remove a temporary file that may be gone already."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def _write_fully(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not os.path.isdir(path):  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
