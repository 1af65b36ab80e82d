"""Publish a snapshot: create its record, after everything it names; say who won where another build was faster.

Comes in: a store and a record. Goes out: ``snapshots/N.json``, or an error. Guarantees: the record appears whole, once,
and never over another; every file it names was there, with its recorded size, before; nothing is ever deleted here, so
a commit whose outcome is unknown can be looked up, and running the build again is always safe.

Why a collection (``ingest.collect``) that runs at the same time takes no file that a published record names:

    A collection works in this order: it lists all files, and takes the time from storage; creates a marker in
    runs/gc/; reads the newest records and all pins; looks at a file once more, and removes it if no record that it
    keeps names it and it is still older than the grace period. The marker goes last.

    1. Files that the parent names: either the collection sees the parent as the newest record, and keeps them, or it
       sees a newer one, and this commit loses the race.
    2. Other files are *young* here: created by this build, or freshened below, less than half a grace period before
       the record is created (it is checked that no more passes). A collection that finds one of them old took its
       time when the file had aged by another half, so after the record was there; and it reads records after that.
    3. A file that was old and was freshened below: a collection may have looked at it just before. Then its marker is
       there, and this commit is refused; or the collection is over, and the last look finds the file missing.

    What is assumed: removing a file takes a collection less than ``MARKER_LIFE_S`` after it looked; it renews its
    marker far more often. And collections use the grace period that builds assume (``GRACE_S``), or a longer one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from pipeline.errors import (
    AlreadyExistsError,
    CommitError,
    IntegrityError,
    LostRaceError,
    NotFoundError,
    StoreError,
)
from pipeline.schema import SnapshotRecord, snapshot_path
from pipeline.snapshot import Snapshot, encode_record, read_record, record_id
from pipeline.store import Entry, Store

_LOOKS_AT_ONCE = 16  # an object store answers in tens of milliseconds, and a large snapshot names thousands of files
_SHOWN = 5

GRACE_S = 7 * 86_400.0
"""Collection leaves younger files alone. Twice as long as any build may take; Delta Lake and Lance wait as long."""

MARKER_LIFE_S = 3_600.0
"""A marker of a collection that is older was left by one that died."""

MARKERS = "runs/gc"
"""Where a collection leaves a file while it removes others."""


def probe(store: Store) -> None:
    """Before a build: ROOT is ours or empty, and its storage refuses to create one name twice."""
    store.refuse_foreign()
    if not store.creates_atomically():
        raise StoreError(_no_create_only(store, "its fsspec driver only looks first and then writes"))
    path = f"staging/probe-{uuid.uuid4().hex}"
    store.create(path, b"first")
    try:
        store.create(path, b"second")
    except AlreadyExistsError:
        return
    else:
        raise StoreError(_no_create_only(store, "it took two writes of one new name"))
    finally:
        store.remove(path)


def _no_create_only(store: Store, found: str) -> str:
    return (
        f"{store.url} cannot hold snapshots: two builds could overwrite each other, for {found}; "
        f"choose a local directory or an object store with conditional writes (If-None-Match)"
    )


def commit(store: Store, record: SnapshotRecord, *, grace_s: float = GRACE_S) -> None:
    """Publish ``record`` as snapshot ``record.number``, or raise and publish nothing.

    LostRaceError: another build has that number. CommitError: the parent is not the snapshot before, a file is missing
    or of another size or about to be collected, or storage failed. ``grace_s`` is that of collections of this ROOT.
    """
    parent = _check_parent(store, record)
    begun = time.monotonic()
    try:
        _Look(store, record, parent, grace_s).check()
    except StoreError as error:
        raise CommitError(f"{snapshot_path(record.number)} was not published in {store.url}: {error}") from error
    if (spent := time.monotonic() - begun) > grace_s / 2:
        raise CommitError(
            f"snapshot {record.number} was not published in {store.url}: looking at its files took {spent:.0f} s, more "
            f"than half the grace period of collections ({grace_s:.0f} s); run the build again"
        )
    try:
        store.create(snapshot_path(record.number), encode_record(record))
    except AlreadyExistsError:
        _settle(store, record, None)
    except StoreError as error:
        _settle(store, record, error)


def _settle(store: Store, record: SnapshotRecord, error: StoreError | None) -> None:
    """Whose record is there? A lost reply, or a retry inside the client, may have left ours: then it is committed."""
    path = snapshot_path(record.number)
    try:
        winner = record_id(read_record(store, record.number))
    except NotFoundError:
        raise CommitError(f"{path} was not published in {store.url}: {error}; run the build again") from error
    except (StoreError, IntegrityError) as unknown:
        raise CommitError(
            f"whether {path} was published in {store.url} is unknown: {unknown}; nothing was deleted: "
            f"run the build again, which is safe either way"
        ) from unknown
    if winner != record_id(record):
        raise LostRaceError(
            f"another build published snapshot {record.number} in {store.url} first: its id is {winner}, ours was "
            f"{record_id(record)}; run the build again to go on from it"
        ) from error


def _check_parent(store: Store, record: SnapshotRecord) -> SnapshotRecord | None:
    parent, expected = None, ""
    if record.number > 1:
        try:
            parent = read_record(store, record.number - 1)
            expected = record_id(parent)
        except NotFoundError as error:
            raise CommitError(
                f"snapshot {record.number} cannot be published in {store.url}: there is no snapshot {record.number - 1}"
            ) from error
    if record.parent != expected:
        raise CommitError(
            f"snapshot {record.number} cannot be published in {store.url}: its parent must be {expected!r}, the "
            f"snapshot before it, not {record.parent!r}; run the build again"
        )
    return parent


class _Look:
    """A record that names a missing file would break every reader, for ever: so all are looked at before."""

    def __init__(self, store: Store, record: SnapshotRecord, parent: SnapshotRecord | None, grace_s: float) -> None:
        self._store, self._grace_s = store, grace_s
        self._what = f"snapshot {record.number} was not published in {store.url}"
        try:
            self._files = Snapshot(store, record).files()
        except (NotFoundError, IntegrityError) as error:
            raise CommitError(f"{self._what}: {error}") from error
        self._kept = _named_by(store, parent)

    def check(self) -> None:
        """Everything is there, in its size, and will stay."""
        now_s = self._store.now_s()
        found = self._look(self._files)
        old = [path for path, entry in found.items() if path not in self._kept and self._is_old(entry, now_s)]
        if not old:
            return
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            list(pool.map(self._freshen, old))
        if marker := collection_running(self._store):
            raise CommitError(
                f"{self._what}: a collection is running ({marker}), and may be removing {old[0]}"
                f"{_more(len(old) - 1)}, which no snapshot that it keeps names; run the build again when it has ended"
            )
        self._look(old)

    def _freshen(self, path: str) -> None:
        with suppress(NotFoundError):  # collected in this moment: the last look tells
            self._store.freshen(path)

    def _is_old(self, entry: Entry, now_s: float) -> bool:
        return entry.modified_s is None or entry.modified_s < now_s - self._grace_s / 2

    def _look(self, paths: Iterable[str]) -> dict[str, Entry]:
        paths = list(paths)
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            found = dict(zip(paths, pool.map(self._store.entry, paths), strict=True))
        wrong = {path: entry for path, entry in found.items() if entry is None or entry.size != self._files[path]}
        if wrong:
            told = ", ".join(
                f"{path} ({'missing' if entry is None else f'{entry.size} bytes'}, expected {self._files[path]})"
                for path, entry in list(wrong.items())[:_SHOWN]
            )
            raise CommitError(
                f"{self._what}: of {len(self._files)} files that it names, {len(wrong)} are not there as they were "
                f"written: {told}{_more(len(wrong) - _SHOWN)}; run the build again"
            )
        return {path: entry for path, entry in found.items() if entry is not None}


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _named_by(store: Store, parent: SnapshotRecord | None) -> frozenset[str]:
    """What the parent names; nothing if it is damaged: then all old files are freshened."""
    try:
        return frozenset(Snapshot(store, parent).files()) if parent is not None else frozenset()
    except (NotFoundError, IntegrityError):
        return frozenset()


def collection_running(store: Store) -> str | None:
    """The marker of a collection that is removing files now."""
    markers = store.entries(MARKERS)
    if not markers:
        return None
    now_s = store.now_s()
    return next((entry.path for entry in markers if not is_dead_marker(entry, now_s)), None)


def is_dead_marker(entry: Entry, now_s: float) -> bool:
    """Whether the collection that left it has died."""
    return entry.modified_s is not None and entry.modified_s < now_s - MARKER_LIFE_S
