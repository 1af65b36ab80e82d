"""Files below one root, local or remote: list, find, read.

Comes in: a path or URL that the user named. Goes out: names with size and fingerprint, and bytes. Guarantees: only
named protocols, no chained URLs, no redirects; nothing outside the root is read, through a link or '..' neither; a
listing that fails is an error, never a short list; a file that cannot be read is `ImageRejected`, after retries, with
a detail that holds no place, so that a copy of the source elsewhere gives the same rows.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit

import fsspec
import xxhash

from pipeline.errors import MissingExtraError, SourceError
from pipeline.images import ImageRejected
from pipeline.schema import Reason
from pipeline.store import redact

PROTOCOLS = ("file", "s3", "gs", "gcs", "az", "abfs", "http", "https", "memory")
RETRY_PAUSES_S = (0.1, 0.3, 0.9, 2.7, 8.1)
"""Before the second and each later attempt, as `store` waits for ROOT."""
STALL_S = 20.0
"""A connection that brings no byte for so long has failed."""
NUM_REQUESTS = 16
"""Concurrent questions to a server that lists no sizes."""

_TRANSIENT = frozenset(
    (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)
)
_ABSENT = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP))
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_ETAG_NAMES = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "mtime",
    "created",
)

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A root: ``path`` is a resolved local folder (protocol 'file'), else what fsspec calls it (for HTTP the URL)."""

    protocol: str
    path: str
    query: str = ""  # of an HTTP URL that names one file; often a signature, so never shown

    @property
    def is_local(self) -> bool:
        return self.protocol == "file"

    @property
    def shown(self) -> str:
        """For messages."""
        return self.path if self.is_local else redact(self.url)

    @property
    def url(self) -> str:
        return self.path if self.is_local or self.is_web else f"{self.protocol}://{self.path.lstrip('/')}"

    @property
    def is_web(self) -> bool:
        return self.protocol in ("http", "https")

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> Place:
        return Place(self.protocol, posixpath.dirname(self.path))

    def join(self, relative: str) -> str:
        """What the file system calls a file here. Names are taken literally: on the web they are percent-encoded."""
        if not relative:
            return f"{self.path}?{self.query}" if self.query else self.path
        return f"{self.path.rstrip('/')}/{quote(relative) if self.is_web else relative}"

    def holds(self, other: Place) -> bool:
        """Whether ``other`` is this place or lies below it."""
        return self.protocol == other.protocol and _lies_within(other.path, self.path)


class Found(NamedTuple):
    """One entry of a folder. ``problem`` says why it is no candidate."""

    name: str
    is_folder: bool = False
    size: int = 0
    fingerprint: int = 0
    problem: Reason | None = None
    detail: str = ""


@dataclass(frozen=True)
class SourceReader:
    """Reads files of one place; travels to workers."""

    place: Place
    max_bytes: int

    def read(self, path: str) -> bytes:
        """The bytes of the file at ``path``, relative to the place."""
        try:
            if self.place.is_local:
                return _attempt(lambda: _read_local(self.place.path, path, self.max_bytes), _is_transient)
            return _attempt(
                lambda: bytes(filesystem(self.place.protocol).cat_file(self.place.join(path))), _is_doubtful
            )
        except (ImageRejected, MissingExtraError, MemoryError):
            raise
        except Exception as error:  # clients of object stores raise what they like; the file is unreadable all the same
            raise _as_rejection(error) from error


def open_place(text: str) -> Place:
    """The place that a path or URL names. Nothing is asked of storage."""
    if "://" not in text:
        return Place("file", os.path.realpath(text))
    protocol, _, rest = text.partition("://")
    if "::" in text:
        raise SourceError(f"{redact(text)!r}: chained URLs ('::') are not supported; name the files themselves")
    if protocol not in PROTOCOLS:
        raise SourceError(f"{redact(text)!r}: protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    if protocol == "file":
        return Place("file", os.path.realpath("/" + rest.lstrip("/")))
    if protocol in ("http", "https"):
        parts = urlsplit(text)
        return Place(protocol, f"{protocol}://{parts.netloc}{parts.path}".rstrip("/"), parts.query)
    return Place(protocol, str(filesystem(protocol)._strip_protocol(text)).rstrip("/"))


@lru_cache(maxsize=16)
def filesystem(protocol: str) -> Any:
    """The fsspec file system, without its listing cache: a later build must see what changed."""
    try:
        found = fsspec.filesystem(
            protocol, skip_instance_cache=True, use_listings_cache=False, **_connection_options(protocol)
        )
    except ImportError as error:
        extra = " Install `evenshard[s3]`." if protocol == "s3" else ""
        raise MissingExtraError(f"{protocol}:// needs a package that is not installed: {error}.{extra}") from error
    if protocol == "s3":
        found.retries = 1  # trying again is `_attempt`'s: otherwise attempts would multiply
    return found


def _connection_options(protocol: str) -> dict[str, Any]:
    """What makes stalls an error, and a body come as it is stored."""
    if protocol == "s3":
        return {
            "config_kwargs": {"connect_timeout": STALL_S, "read_timeout": STALL_S, "retries": {"total_max_attempts": 1}}
        }
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
        client = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}
        return {"allow_redirects": False, "client_kwargs": client}  # a redirect may lead out of the root
    return {}


def list_folder_entries(place: Place, folder: str) -> Iterator[Found]:
    """What lies directly in ``folder`` (relative), in any order; nothing of it is kept."""
    try:
        yield from _scan_local(place, folder) if place.is_local else _list_remote(place, folder)
    except FileNotFoundError as error:
        raise SourceError(f"{place.shown}: folder {folder!r} went away while it was listed; run again") from error
    except OSError as error:
        why = error.strerror or str(error)
        raise SourceError(f"{place.shown}: folder {folder!r} cannot be listed: {redact(why)}") from error


class FileFinder:
    """Finds files by name, for tables: locally by stat, on the web by asking, elsewhere by listing each folder once."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._folders: dict[str, bool] = {}
        self._listings: dict[str, Mapping[str, Found]] = {}

    def find(self, paths: Iterable[str]) -> list[Found]:
        if self._place.is_local:
            return [self._find_local(path) for path in paths]
        if self._place.is_web:
            with ThreadPoolExecutor(NUM_REQUESTS) as pool:
                return list(pool.map(lambda path: _ask(self._place, path, path), paths))
        return [self._find_listed(path) for path in paths]

    def _find_local(self, path: str) -> Found:
        folder, full = posixpath.dirname(path), f"{self._place.path}/{path}"
        if folder not in self._folders:
            real = os.path.realpath(f"{self._place.path}/{folder}") if "\0" not in folder else self._place.path
            self._folders[folder] = _lies_within(real, self._place.path)
        if not self._folders[folder]:
            return Found(path, problem=Reason.OUTSIDE_ROOT, detail="a link on the way leads out of the images' folder")
        try:
            status = os.lstat(full)
            return _judge_link(self._place.path, full, path) if stat.S_ISLNK(status.st_mode) else _judge(path, status)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            return _problem(path, error)

    def _find_listed(self, path: str) -> Found:
        folder, name = posixpath.split(path)
        if folder not in self._listings:
            try:
                self._listings[folder] = {found.name: found for found in _list_remote(self._place, folder)}
            except FileNotFoundError:
                self._listings[folder] = {}
        missing = Found(name, problem=Reason.GONE, detail="no such file")
        found = self._listings[folder].get(name, missing)
        return Found(name, problem=Reason.UNREADABLE, detail="a folder, not a file") if found.is_folder else found


@contextmanager
def local_copy(place: Place) -> Generator[str]:
    """A local file with the bytes of the file ``place``: itself, or a temporary download."""
    if place.is_local:
        yield place.path
        return
    with tempfile.TemporaryDirectory(prefix="evenshard-table-") as folder:
        copy = f"{folder}/table"
        try:
            _attempt(lambda: filesystem(place.protocol).get_file(place.join(""), copy), _is_doubtful)
        except Exception as error:  # any client error, already retried
            raise SourceError(f"{place.shown} cannot be read: {redact(_as_rejection(error).detail)}") from error
        yield copy


class NoRangesError(Exception):
    """A web server sends whole files only."""


def fetch_range(place: Place, path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a remote file that is at least so long; after all retries ``ImageRejected``.

    A server without ranges is noticed (``NoRangesError``) where ``start`` > 0.
    """
    try:
        return _attempt(lambda: _fetch_range(place, path, start, stop), _is_doubtful)
    except (NoRangesError, MissingExtraError, MemoryError):
        raise
    except Exception as error:  # clients of object stores raise what they like
        raise _as_rejection(error) from error


def _fetch_range(place: Place, path: str, start: int, stop: int) -> bytes:
    files, name = filesystem(place.protocol), place.join(path)
    if place.is_web:  # cat_file would take the whole body of a server that ignores ranges into memory
        try:
            with files.open(name, size=stop, cache_type="none") as file:
                data = bytes(file._fetch_range(start, stop))
        except ValueError as error:
            raise NoRangesError from error
    else:
        data = bytes(files.cat_file(name, start=start, end=stop))
    if len(data) != stop - start:
        raise ConnectionError(f"{len(data)} of {stop - start} bytes came")
    return data


def look_at(place: Place, path: str) -> Found:
    """One file as a listing would find it; '' is the file that ``place`` itself names."""
    if not place.is_local:
        return _ask(place, path, path)
    if path:
        return FileFinder(place).find([path])[0]
    try:
        return _judge(place.name, os.stat(place.path))
    except OSError as error:
        return _problem(place.name, error)


def kind_of(place: Place) -> str:
    """'file', 'folder' or 'missing'. The web does not tell: there it is 'unknown'."""
    if place.is_web:
        return "unknown"
    if place.is_local:
        return "folder" if os.path.isdir(place.path) else "file" if os.path.isfile(place.path) else "missing"
    try:
        info = _attempt(lambda: filesystem(place.protocol).info(place.path), _is_doubtful)
    except FileNotFoundError:
        return "missing"
    except Exception as error:  # credentials, network: say so instead of "missing"
        raise SourceError(f"{place.shown} cannot be opened: {redact(str(error))}") from error
    return "folder" if info["type"] == "directory" else "file"


# --- Local ---


def _scan_local(place: Place, folder: str) -> Iterator[Found]:
    with os.scandir(place.join(folder)) as entries:
        for entry in entries:
            yield _examine(place.path, entry)


def _examine(root: str, entry: os.DirEntry[str]) -> Found:
    try:
        if entry.is_symlink():
            return _judge_link(root, entry.path, entry.name)
        if entry.is_dir(follow_symlinks=False):
            return Found(entry.name, is_folder=True)
        return _judge(entry.name, entry.stat(follow_symlinks=False))
    except OSError as error:
        return _problem(entry.name, error)


def _judge_link(root: str, full: str, name: str) -> Found:
    real = os.path.realpath(full)
    if os.path.isdir(real):
        return Found(name, problem=Reason.SYMLINK, detail="a link to a folder is not followed")
    if not _lies_within(real, root):
        return Found(name, problem=Reason.OUTSIDE_ROOT, detail="a link out of the source is not followed")
    return _judge(name, os.stat(full))


def _judge(name: str, status: os.stat_result) -> Found:
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        return Found(name, problem=Reason.UNREADABLE, detail=f"{what}, not a file")
    # The change time and the inode tell what a copied, moved or unpacked file with an old mtime would hide.
    token = struct.pack("<qqqQ", status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return Found(name, size=status.st_size, fingerprint=xxhash.xxh3_64_intdigest(token))


def _problem(name: str, error: OSError | ValueError) -> Found:
    rejection = _as_rejection(error)
    return Found(name, problem=rejection.reason, detail=rejection.detail)


def _read_local(root: str, path: str, max_bytes: int) -> bytes:
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


def open_within(root: str, path: str) -> BinaryIO:
    """A regular file that really lies at or below ``root``; ``ImageRejected`` for any other."""
    return open(_open_within(root, path)[0], "rb")


def _open_within(root: str, path: str) -> tuple[int, int]:
    """Its descriptor, which is the caller's, and its size."""
    full = f"{root}/{path}" if path else root
    descriptor = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # non-blocking: opening a pipe must not hang
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageRejected(Reason.UNREADABLE, "not a regular file")
        if not _lies_within(_real_path(descriptor, full), root):
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


def _lies_within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


# --- Remote ---


def _list_remote(place: Place, folder: str) -> Iterator[Found]:
    base = place.join(folder).rstrip("/")
    # The web needs the slash: without it servers redirect, and redirects are not followed.
    target = base + "/" if place.is_web else base
    infos: list[dict[str, Any]] = _attempt(lambda: filesystem(place.protocol).ls(target, detail=True), _is_doubtful)
    unsized: list[tuple[str, str]] = []
    for info in infos:
        name = _child(place, str(info["name"]), base)
        if not name:
            continue
        if info["type"] == "directory":
            yield Found(name, is_folder=True)
        elif info.get("size") is None:
            unsized.append((name, f"{folder}/{name}" if folder else name))
        else:
            yield _remote_file(name, info)
    if unsized:
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            yield from pool.map(lambda pair: _ask(place, pair[1], pair[0]), unsized)


def _child(place: Place, full: str, base: str) -> str:
    """The name of an entry directly below ``base``, '' for anything else: the folder itself, links to elsewhere."""
    full = full.rstrip("/")
    if not full.startswith(base + "/") or (place.is_web and ("?" in full or "#" in full)):
        return ""
    name = full[len(base) + 1 :]
    if place.is_web:
        name = unquote(name, errors="surrogateescape")
    return "" if "/" in name or name in (".", "..") else name


def _ask(place: Place, path: str, name: str) -> Found:
    try:
        info: dict[str, Any] = _attempt(lambda: filesystem(place.protocol).info(place.join(path)), _is_doubtful)
    except Exception as error:  # any client error, already retried, is this one file's
        rejection = _as_rejection(error)
        return Found(name, problem=rejection.reason, detail=rejection.detail)
    if info.get("size") is None:
        return Found(name, problem=Reason.UNREADABLE, detail="the server tells no size")
    return _remote_file(name, info)


def _remote_file(name: str, info: Mapping[str, Any]) -> Found:
    size = int(info["size"])
    tag = next((str(info[key]) for key in _ETAG_NAMES if info.get(key)), "")
    return Found(name, size=size, fingerprint=xxhash.xxh3_64_intdigest(f"{size} {tag}".encode()))


# --- Trouble ---


def _attempt(call: Callable[[], T], is_worth_retrying: Callable[[Exception], bool]) -> T:
    for pause_s in RETRY_PAUSES_S:
        try:
            return call()
        except Exception as error:
            if not is_worth_retrying(error):
                raise
        time.sleep(pause_s)
    return call()


def _is_transient(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def _is_doubtful(error: Exception) -> bool:
    """fsspec calls every failure of HTTP "not found" and hides the real one as the cause."""
    if isinstance(error, FileNotFoundError):
        return getattr(error.__cause__, "status", 404) not in (403, 404, 410)
    return not isinstance(error, (*_FINAL, ImageRejected, MissingExtraError, NoRangesError))


def _as_rejection(error: Exception) -> ImageRejected:
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    if status is not None and status not in (404, 410):
        return ImageRejected(Reason.UNREADABLE, f"the server answers {status}")
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno in _ABSENT):
        return ImageRejected(Reason.GONE, "no such file")
    if isinstance(error, ValueError):
        return ImageRejected(Reason.GONE, "no file can have this name")
    why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return ImageRejected(Reason.UNREADABLE, why)
