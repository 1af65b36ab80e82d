"""An object store, or any other fsspec file system: reads are tried again, writes never replace.

Comes in: a URL and paths below it. Goes out: bytes, errors as storage raises them. Guarantees: a read is tried a fixed
number of times, after fixed pauses, and then fails by name; a stalled connection counts as failed; a short body is
never returned for a long one; what was asked and what came is counted.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from pipeline.errors import MissingExtraError, StoreError, UsageError
from pipeline.store.backends import Entry, remove_if_there
from pipeline.store.claims import sweep_temporary, temporary_dir
from pipeline.store.messages import redact

PAUSES = (0.1, 0.3, 0.9, 2.7, 8.1)
"""Seconds before the second and each later attempt of a read: fixed, so that a run can be told in advance."""

STALL_S = 20.0
"""A connection that brings no byte for so long has failed."""

DEADLINE_S = 150.0
"""No attempt begins later than this after the first."""

_TRANSIENT_STATUS = frozenset({408, 425, 429})  # and all from 500
_ABSENT_STATUS = frozenset({403, 404, 410})  # 403 is what S3 says of a missing object to who may not list
_TRANSIENT_ERRNO = frozenset(
    {errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.EPIPE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH}
)
_TRANSIENT_TYPES = frozenset(  # by name: the libraries that define them may not be installed
    {"HTTPClientError", "IncompleteRead", "IncompleteReadError", "ResponseParserError"}
    | {"ClientPayloadError", "ClientConnectionError"}
)

_MODIFIED = ("LastModified", "mtime", "updated", "last_modified", "modified", "created")
"""What the fsspec drivers call the moment at which an object was written; the first that is there counts."""

_OLD_S = 86_400.0
"""An existing file that a build meets again is freshened at once from this age on; ``ingest.commit`` looks closer."""

_Read = TypeVar("_Read")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What reads of file contents have cost so far; attempts that failed count as requests."""

    num_requests: int = 0
    num_retries: int = 0
    fetched_bytes: int = 0


class RemoteBackend:
    """Creation is a conditional write (S3: ``If-None-Match: *``)."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._process = os.getpid()
        self._filesystem, self.root = _connect(url)
        self._for_reads: Any = None
        self._lock = threading.Lock()
        self._traffic = Traffic()

    @property
    def traffic(self) -> Traffic:
        """Of this process, since the root was opened."""
        return self._traffic

    def read(self, path: str) -> bytes:
        return self._persistently(path, lambda: self._fetch(path))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        if not length:
            return b""
        return self._persistently(path, lambda: self._fetch_range(path, offset, length))

    def entry(self, path: str) -> Entry | None:
        def ask() -> Entry | None:
            with _absence():
                found = self._info(path)
                if found["type"] != "file":
                    return None
                # A web server that compresses names no size.
                size = len(self._fetch(path)) if found["size"] is None else int(found["size"])
                return Entry(path=path, size=size, modified_s=_modified_s(found))
            return None

        return self._persistently(path, ask)

    def list(self, prefix: str) -> list[str]:
        try:
            found = self._fs(fresh=True).find(self._at(prefix) if prefix else self.root)
        except FileNotFoundError:
            return []
        return sorted(name[len(self.root) + 1 :] for name in found)

    def entries(self, prefix: str) -> Iterator[Entry]:
        try:
            found = self._fs(fresh=True).find(self._at(prefix) if prefix else self.root, detail=True)
        except FileNotFoundError:
            return
        for name, facts in found.items():
            yield Entry(path=name[len(self.root) + 1 :], size=int(facts["size"]), modified_s=_modified_s(facts))

    def top_names(self) -> list[str] | None:
        try:
            found = self._fs(fresh=True).ls(self.root, detail=False)
        except FileNotFoundError:
            return None
        if found == [self.root]:  # what fsspec answers for a file
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return [name.rstrip("/").rsplit("/", 1)[-1] for name in found]

    def make_root(self) -> None:
        path = f"staging/{uuid.uuid4().hex}"
        self.replace(path, b"")
        self.remove(path)

    def create(self, path: str, data: bytes) -> None:
        self._fs().pipe_file(self._at(path), data, mode="create")

    def create_from(self, path: str, local_file: str) -> None:
        self._fs().put_file(local_file, self._at(path), mode="create")
        remove_if_there(local_file)

    def settle(self, path: str) -> None:
        """An object that can be seen is durable; one that is old is made young, where a clean-up could take it.

        This machine's clock says only whether to bother: freshening copies the object.
        """
        found = self.entry(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if found.modified_s is not None and found.modified_s < time.time() - _OLD_S:
            self.freshen(path)

    def freshen(self, path: str) -> None:
        filesystem, at = self._fs(), self._at(path)
        if "s3" in _protocols(filesystem):
            # A copy onto itself, inside the store: readers see the old object or the new one, of the same bytes.
            filesystem.cp_file(at, at, MetadataDirective="REPLACE")
        else:
            filesystem.pipe_file(at, filesystem.cat_file(at))

    def probe(self) -> Entry:
        path = f"staging/{uuid.uuid4().hex}"
        self.replace(path, b"")
        try:
            found = self.entry(path)
        finally:
            self.remove(path)
        if found is None:
            raise StoreError(f"{path} in {redact(self._url)} was written, and then was not there")
        return found

    def replace(self, path: str, data: bytes) -> None:
        self._fs().pipe_file(self._at(path), data)

    def replace_from(self, path: str, local_file: str) -> None:
        self._fs().put_file(local_file, self._at(path))
        remove_if_there(local_file)

    def remove(self, path: str) -> None:
        self._fs().rm_file(self._at(path))

    def staging_dir(self) -> str:
        return temporary_dir()

    def sweep(self, before_s: float) -> None:
        """Object stores have no directories."""

    def sweep_abandoned(self, quiet_s: float) -> int:
        """An object appears whole or not at all; what killed builds leave lies in TMPDIR, by this machine's clock."""
        return sweep_temporary(quiet_s)

    def creates_atomically(self) -> bool:
        """False where fsspec would only look first and then write: of two builds both could win."""
        from fsspec.spec import AbstractFileSystem

        filesystem = self._fs()
        return bool(filesystem.async_impl) or type(filesystem).pipe_file is not AbstractFileSystem.pipe_file

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _fs(self, *, fresh: bool = False) -> Any:
        if self._process != os.getpid():  # an event loop does not survive a fork, nor does a lock that a thread held
            self._filesystem, _ = _connect(self._url)
            self._for_reads, self._lock, self._process = None, threading.Lock(), os.getpid()
        if fresh:
            self._filesystem.invalidate_cache()  # a cached listing would hide what another build wrote
        return self._filesystem

    def _reading(self) -> Any:
        """A connection that notices stalls, and leaves trying again to us: otherwise attempts would multiply."""
        usual = self._fs()
        if self._for_reads is None:
            options = _reading_options(usual)
            self._for_reads = _connect(self._url, **options)[0] if options else usual
            if options and hasattr(self._for_reads, "retries"):  # of s3fs
                self._for_reads.retries = 1
        return self._for_reads

    def _info(self, path: str) -> Any:
        filesystem = self._reading()
        filesystem.invalidate_cache()  # a cached listing would hide what another build wrote
        return filesystem.info(self._at(path))

    def _fetch(self, path: str) -> bytes:
        return self._counted(lambda: self._reading().cat_file(self._at(path)))

    def _fetch_range(self, path: str, offset: int, length: int) -> bytes:
        end = offset + length
        try:
            data = self._counted(lambda: self._reading().cat_file(self._at(path), start=offset, end=end))
        except Exception as error:
            if _status(error) != 416:  # the range begins beyond the end
                raise
            data = b""
        if len(data) > length:
            raise StoreError(
                f"cannot read {path} in {redact(self._url)}: asked for {length} bytes at offset {offset}, it sent "
                f"{len(data)}; serve ROOT from a server that answers range requests"
            )
        if len(data) < length and self._ends_after(path, end):
            raise TimeoutError(f"{len(data)} of {length} bytes came")
        return data

    def _ends_after(self, path: str, end: int) -> bool:
        found = self._info(path)["size"]
        return found is None or int(found) >= end

    def _counted(self, fetch: Callable[[], bytes]) -> bytes:
        data = b""
        try:
            data = fetch()
        finally:
            self._count(num_requests=1, fetched_bytes=len(data))
        return data

    def _count(self, **more: int) -> None:
        with self._lock:
            self._traffic = Traffic(**{name: value + more.get(name, 0) for name, value in vars(self._traffic).items()})

    def _persistently(self, path: str, read: Callable[[], _Read]) -> _Read:
        begun = time.monotonic()
        for attempts, pause in enumerate((*PAUSES, None), 1):
            try:
                return read()
            except Exception as error:
                if not _is_transient(error):
                    raise
                spent = time.monotonic() - begun
                if pause is None or spent + pause > DEADLINE_S:
                    raise self._gave_up(
                        path, error, attempts, spent
                    ) from None  # a client's traceback may hold signed URLs
            self._count(num_retries=1)
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _gave_up(self, path: str, error: Exception, attempts: int, spent: float) -> StoreError:
        cause = redact(f"{type(error).__name__}: {error}".strip(": "))
        return StoreError(
            f"cannot read {path} in {redact(self._url)}: {attempts} attempts in {spent:.0f} s failed, the "
            f"last with {cause}; check the network and the server, then run again"
        )


class _absence:
    """Swallows that a file is not there, and nothing else: fsspec's HTTP calls every failure of ``info`` that."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, FileNotFoundError):
            return False
        cause = error.__cause__
        if cause is not None and _is_transient(cause) and _status(cause) not in _ABSENT_STATUS:
            raise cause
        return True


def _is_transient(error: BaseException) -> bool:
    """Whether the same read may succeed a moment later."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUS
    if isinstance(error, TimeoutError | ConnectionError) or _TRANSIENT_TYPES & {
        kind.__name__ for kind in type(error).__mro__
    }:
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp or of botocore."""
    for found in (error, error.__cause__):
        status = getattr(found, "status", None)
        if isinstance(status, int):
            return status
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            answer: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return answer if isinstance(answer, int) else None
    return None


def _modified_s(facts: Mapping[str, Any]) -> float | None:
    value = next((facts[name] for name in _MODIFIED if facts.get(name) is not None), None)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value) if isinstance(value, int | float) else None


def _protocols(filesystem: Any) -> set[str]:
    protocol = filesystem.protocol
    return {protocol} if isinstance(protocol, str) else set(protocol)


def _reading_options(filesystem: Any) -> dict[str, Any]:
    """What makes stalls an error, and a body come as it is stored; {} for kinds that have no such options."""
    protocols = _protocols(filesystem)
    given: dict[str, Any] = dict(filesystem.storage_options)
    if "s3" in protocols:
        config = {"connect_timeout": STALL_S, "read_timeout": STALL_S, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": {**(given.get("config_kwargs") or {}), **config}}
    if "http" in protocols:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
        client: dict[str, Any] = given.get("client_kwargs") or {}
        headers = {**client.get("headers", {}), "Accept-Encoding": "identity"}
        return {"client_kwargs": {**client, "timeout": timeout, "headers": headers}}
    return {}


def _connect(url: str, **options: Any) -> tuple[Any, str]:
    import fsspec.core

    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise MissingExtraError(
            f"cannot open {redact(url)}: {error}; for S3 and HTTP: pip install 'evenshard[s3]'"
        ) from error
    except ValueError as error:
        raise UsageError(f"cannot open {redact(url)}: {redact(str(error))}") from None
    return filesystem, str(root).rstrip("/")
