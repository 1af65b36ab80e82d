"""Files below one root, local or remote: list, find, read.

Comes in: a path or URL that the user named. Goes out: names with size and fingerprint, and bytes. Guarantees: only
named protocols, no chained URLs, no redirects; nothing outside the root is read, through a link or '..' neither; a
listing that fails is an error, never a short list; a file that cannot be read is `ImageRejected`, after retries, with
a detail that holds no place, so that a copy of the source elsewhere gives the same rows.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import fsspec
import xxhash

from pipeline.errors import MissingExtraError, SourceError
from pipeline.ingest.source_local import (
    CHUNK_FILES,
    Entries,
    Found,
    judge,
    judge_link,
    lies_within,
    problem,
    scan,
    scan_names,
)
from pipeline.ingest.source_trouble import NoRangesError, as_rejection, attempt, is_doubtful
from pipeline.schema import Reason
from pipeline.store import redact, temporary_dir

PROTOCOLS = ("file", "s3", "gs", "gcs", "az", "abfs", "http", "https", "memory")
STALL_S = 20.0
"""A connection that brings no byte for so long has failed."""
NUM_REQUESTS = 16
"""Concurrent questions to a server that lists no sizes."""

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
        return self.protocol == other.protocol and lies_within(other.path, self.path)


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
        found.retries = 1  # trying again is `attempt`'s: otherwise attempts would multiply
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
    for part in list_folder(place, folder):
        yield from part.each()


def list_names(place: Place, folder: str) -> Iterator[tuple[str, bool]]:
    """Names directly in ``folder``, and whether each is a folder; locally no file is looked at."""
    if not place.is_local:
        yield from ((found.name, found.is_folder) for found in list_folder_entries(place, folder))
        return
    with _listing(place, folder):
        yield from scan_names(place.path, folder)


def list_folder(place: Place, folder: str) -> Iterator[Entries]:
    """The same, part by part: regular files in columns."""
    with _listing(place, folder):
        yield from scan(place.path, folder) if place.is_local else _in_parts(_list_remote(place, folder))


@contextmanager
def _listing(place: Place, folder: str) -> Generator[None]:
    """Name what could not be listed."""
    try:
        yield
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
            self._folders[folder] = lies_within(real, self._place.path)
        if not self._folders[folder]:
            return Found(path, problem=Reason.OUTSIDE_ROOT, detail="a link on the way leads out of the images' folder")
        try:
            status = os.lstat(full)
            return judge_link(self._place.path, full, path) if stat.S_ISLNK(status.st_mode) else judge(path, status)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            return problem(path, error)

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
    folder = temporary_dir()
    try:
        copy = f"{folder}/table"
        try:
            attempt(lambda: filesystem(place.protocol).get_file(place.join(""), copy), is_doubtful)
        except Exception as error:  # any client error, already retried
            raise SourceError(f"{place.shown} cannot be read: {redact(as_rejection(error).detail)}") from error
        yield copy
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch_range(place: Place, path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a remote file that is at least so long; after all retries ``ImageRejected``.

    A server without ranges is noticed (``NoRangesError``) where ``start`` > 0.
    """
    try:
        return attempt(lambda: _fetch_range(place, path, start, stop), is_doubtful)
    except (NoRangesError, MissingExtraError, MemoryError):
        raise
    except Exception as error:  # clients of object stores raise what they like
        raise as_rejection(error) from error


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
        return judge(place.name, os.stat(place.path))
    except OSError as error:
        return problem(place.name, error)


def kind_of(place: Place) -> str:
    """'file', 'folder' or 'missing'. The web does not tell: there it is 'unknown'."""
    if place.is_web:
        return "unknown"
    if place.is_local:
        return "folder" if os.path.isdir(place.path) else "file" if os.path.isfile(place.path) else "missing"
    try:
        info = attempt(lambda: filesystem(place.protocol).info(place.path), is_doubtful)
    except FileNotFoundError:
        return "missing"
    except Exception as error:  # credentials, network: say so instead of "missing"
        raise SourceError(f"{place.shown} cannot be opened: {redact(str(error))}") from error
    return "folder" if info["type"] == "directory" else "file"


# --- Remote ---


def _in_parts(found: Iterable[Found]) -> Iterator[Entries]:
    rest = iter(found)
    while entries := list(islice(rest, CHUNK_FILES)):
        part = Entries.empty()
        for entry in entries:
            if entry.is_folder or entry.problem is not None:
                part.others.append(entry)
            else:
                part.add(entry)
        yield part


def _list_remote(place: Place, folder: str) -> Iterator[Found]:
    base = place.join(folder).rstrip("/")
    # The web needs the slash: without it servers redirect, and redirects are not followed.
    target = base + "/" if place.is_web else base
    infos: list[dict[str, Any]] = attempt(lambda: filesystem(place.protocol).ls(target, detail=True), is_doubtful)
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
        info: dict[str, Any] = attempt(lambda: filesystem(place.protocol).info(place.join(path)), is_doubtful)
    except Exception as error:  # any client error, already retried, is this one file's
        rejection = as_rejection(error)
        return Found(name, problem=rejection.reason, detail=rejection.detail)
    if info.get("size") is None:
        return Found(name, problem=Reason.UNREADABLE, detail="the server tells no size")
    return _remote_file(name, info)


def _remote_file(name: str, info: Mapping[str, Any]) -> Found:
    size = int(info["size"])
    tag = next((str(info[key]) for key in _ETAG_NAMES if info.get(key)), "")
    return Found(name, size=size, fingerprint=xxhash.xxh3_64_intdigest(f"{size} {tag}".encode()))
