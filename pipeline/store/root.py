"""``Store``: one ROOT, on a local directory or any other storage, with errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

from pipeline.errors import (
    AlreadyExistsError,
    EvenshardError,
    IntegrityError,
    NotFoundError,
    StoreError,
    UsageError,
)
from pipeline.schema import snapshot_path
from pipeline.store.backends import Backend, Entry, LocalBackend, remove_if_there
from pipeline.store.messages import RESTORE, explain, redact
from pipeline.store.remote import RemoteBackend, Traffic

LAYOUT = frozenset({"snapshots", "shards", "index", "tables", "manifests", "reports", "runs", "pins", "staging"})
"""The top-level names of a ROOT. ``staging`` is made first, so even the ROOT of a killed first build has it."""

_HARMLESS = frozenset({"lost+found", ".DS_Store"})  # what systems leave in a directory that is empty to its user
_REPLACEABLE = ("runs/", "reports/")  # no snapshot names what lies there
_KEPT_FOR_EVER = ("snapshots/", "runs/builds/")  # the newest snapshot is found by probing: a gap would hide it


class Store:
    """Paths are relative, '/' separated, and never leave ROOT. Picklable: it carries its URL alone."""

    def __init__(self, url: str) -> None:
        local = _local_root(url)
        self.root = url if local is None else local
        """What opens it again, maybe with credentials: never for messages."""
        self._backend: Backend = RemoteBackend(url) if local is None else LocalBackend(local)
        self.is_local = local is not None
        self.url = redact(url) if local is None else local
        """For messages: without credentials."""

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.root,)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @classmethod
    def open(cls, url: str | os.PathLike[str], *, create: bool = False) -> Store:
        """An existing ROOT; with ``create`` also a new one, proved writable. Whether it is ours, is not asked here."""
        store = cls(os.fspath(url))
        names = store._top_names() if store.is_local or create else None
        if create:
            with store.explained("write to", "staging"):
                store._backend.make_root()
        elif store.is_local and names is None:
            raise NotFoundError(f"there is no directory {store.url}; run `evenshard build SOURCE {store.url}`")
        return store

    def refuse_foreign(self) -> None:
        """StoreError if ROOT holds something, but neither a snapshot nor what a killed first build leaves."""
        names = set(self._top_names() or ()) - _HARMLESS
        begun = "staging" in names and names <= LAYOUT
        if not names or begun or self.exists(snapshot_path(1)):
            return
        shown = ", ".join(repr(name) for name in sorted(names - LAYOUT or names)[:3])
        raise StoreError(
            f"ROOT is not empty and holds no snapshot: {self.url} has {shown}; choose a new or an empty directory"
        )

    def read(self, path: str) -> bytes:
        with self.explained("read", path):
            return self._backend.read(_below_root(path))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``; an IntegrityError if the file ends before."""
        with self.explained("read", path):
            data = self._backend.read_range(_below_root(path), offset, length)
        if len(data) != length:
            raise IntegrityError(
                f"{path} in {self.url} is cut short: expected {length} bytes at offset {offset}, found {len(data)}; "
                f"{RESTORE}"
            )
        return data

    def exists(self, path: str) -> bool:
        return self._size(path) is not None

    def size(self, path: str) -> int:
        size = self._size(path)
        if size is None:
            raise NotFoundError(f"{path} is not in {self.url}; {RESTORE}")
        return size

    def list(self, prefix: str) -> list[str]:
        """Every file below the directory ``prefix`` ('' for all), as sorted paths below ROOT."""
        with self.explained("list", prefix):
            return self._backend.list(_below_root(prefix) if prefix else "")

    def entry(self, path: str) -> Entry | None:
        """Size and time of one file; None if it is not there."""
        with self.explained("look for", path):
            return self._backend.entry(_below_root(path))

    def entries(self, prefix: str) -> list[Entry]:
        """``list`` with size and time of each."""
        with self.explained("list", prefix):
            found = self._backend.entries(_below_root(prefix) if prefix else "")
            return sorted(found, key=lambda entry: entry.path)

    def now_s(self) -> float:
        """The time by the clock of the storage: that of a file which is written for it, and removed."""
        with self.explained("write to", "staging"):
            found = self._backend.probe()
        if found.modified_s is None:
            raise StoreError(f"{self.url} does not tell when a file was written, so that none can be known to be old")
        return found.modified_s

    def freshen(self, path: str) -> None:
        """Make an existing file as young as one that was written now; NotFoundError if it is not there."""
        with self.explained("freshen", path):
            self._backend.freshen(_below_root(path))

    def local_path(self, path: str) -> str | None:
        """For mmap and os.pread; None if ROOT is not a local directory."""
        return f"{self._backend.root}/{_below_root(path)}" if self.is_local else None

    def create(self, path: str, data: bytes) -> None:
        """Write a new file, whole and durable; AlreadyExistsError if the name is taken, whatever it holds."""
        with self.explained("create", path):
            self._backend.create(_below_root(path), data)

    def put(self, path: str, data: bytes) -> None:
        """``create`` for a name that is the hash of ``data``: an existing file of that size is freshened and kept."""
        if self._has(path, len(data)):
            return
        try:
            self.create(path, data)
        except AlreadyExistsError:
            self._has(path, len(data))

    def put_file(self, path: str, local_file: str) -> None:
        """``put`` of a temporary file, which is gone afterwards; from ``staging_dir()`` no byte is copied."""
        size = os.stat(local_file).st_size
        if not self._has(path, size):
            try:
                with self.explained("create", path):
                    self._backend.create_from(_below_root(path), local_file)
            except AlreadyExistsError:
                self._has(path, size)
        with self.explained("remove the temporary file of", path):
            remove_if_there(local_file)

    def replace(self, path: str, data: bytes) -> None:
        """Write or overwrite, atomically; only what no snapshot names."""
        _check_replaceable(path)
        with self.explained("write", path):
            self._backend.replace(_below_root(path), data)

    def replace_file(self, path: str, local_file: str) -> None:
        """``replace`` by a temporary file, which is gone afterwards; from ``staging_dir()`` no byte is copied."""
        _check_replaceable(path)
        with self.explained("write", path):
            self._backend.replace_from(_below_root(path), local_file)

    def remove(self, path: str) -> None:
        """Remove one file. Whether something needs it, ``ingest.collect`` knows; what is kept for ever stays here."""
        if path.startswith(_KEPT_FOR_EVER):
            raise UsageError(f"{path!r} may not be removed: what lies below {' and '.join(_KEPT_FOR_EVER)} is kept")
        with self.explained("remove", path):
            self._backend.remove(_below_root(path))

    def staging_dir(self) -> str:
        """A new local directory for temporary files, below ROOT/staging where ROOT is local. The caller removes it."""
        with self.explained("write to", "staging"):
            return self._backend.staging_dir()

    def sweep_abandoned(self, quiet_s: float) -> int:
        """Remove what killed processes left in staging/ (of a remote ROOT: in TMPDIR here) and nobody has touched for
        ``quiet_s``; returns how much."""
        with self.explained("clean up", "staging"):
            return self._backend.sweep_abandoned(quiet_s)

    def sweep(self, before_s: float) -> None:
        """Remove the directories of staging/ that are empty and older than ``before_s``."""
        with self.explained("sweep", "staging"):
            self._backend.sweep(before_s)

    @property
    def traffic(self) -> Traffic:
        """What reading the contents of remote files has cost this process; nothing is counted on a local ROOT."""
        return self._backend.traffic if isinstance(self._backend, RemoteBackend) else Traffic()

    def creates_atomically(self) -> bool:
        """Whether this kind of storage has an atomic create at all; whether it honours it, ``ingest.commit`` probes."""
        return self._backend.creates_atomically()

    def _size(self, path: str) -> int | None:
        found = self.entry(path)
        return None if found is None else found.size

    def _has(self, path: str, size: int) -> bool:
        found = self._size(path)
        if found is None:
            return False
        if found != size:
            raise IntegrityError(
                f"{path} in {self.url} is damaged: its name says that it has {size} bytes, but it has {found}; "
                f"remove that file and run again"
            )
        try:
            with self.explained("sync", path):
                self._backend.settle(path)
        except NotFoundError:
            return False  # collected in this moment: it is written again
        return True

    def _top_names(self) -> list[str] | None:
        with self.explained("list", ""):
            try:
                return self._backend.top_names()
            except NotADirectoryError:
                raise StoreError(f"ROOT is a file, not a directory: {self.url}; choose a directory") from None

    @contextmanager
    def explained(self, verb: str, path: str) -> Generator[None]:
        """Turn what storage raises into the errors of this project."""
        try:
            yield
        except EvenshardError:
            raise
        except OSError as error:
            raise self._translated(error, f"cannot {verb} {path or 'ROOT'} in {self.url}") from self._cause(error)
        except Exception as error:
            if self.is_local:
                raise
            # Clients of object stores raise types of their own.
            text = f"cannot {verb} {path or 'ROOT'} in {self.url}: {type(error).__name__}: {redact(str(error))}"
            raise StoreError(text) from None

    def _translated(self, error: OSError, what: str) -> StoreError:
        if isinstance(error, FileNotFoundError):
            return NotFoundError(f"{what}: no such file; {RESTORE}")
        if isinstance(error, FileExistsError):
            return AlreadyExistsError(f"{what}: it exists, and files are never overwritten")
        return StoreError(f"{what}: {explain(error)}")

    def _cause(self, error: OSError) -> OSError | None:
        """Tracebacks print causes, and those of a remote client may hold signed URLs."""
        return error if self.is_local else None


def _local_root(url: str) -> str | None:
    """The absolute path of a local ROOT; None for a URL of something else."""
    if not url or "\0" in url:
        raise UsageError(f"ROOT must be a directory or a URL, not {url!r}")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return os.path.abspath(os.path.expanduser(url))
    if scheme in ("file", "local"):
        return os.path.abspath(rest)
    if "::" in url:
        raise UsageError(f"{redact(url)} is a chain of URLs; name one alone: a cache in between could serve old bytes")
    return None


def _below_root(path: str) -> str:
    """``path`` if it is plain: a snapshot comes from others, and may name only what lies below its ROOT."""
    if "\0" in path or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise UsageError(f"{path!r} is not a path below ROOT: expected names joined by '/'")
    return path


def _check_replaceable(path: str) -> None:
    if not path.startswith(_REPLACEABLE):
        raise UsageError(f"{path!r} may not be overwritten: only files below {' and '.join(_REPLACEABLE)} may")
