"""Publish a snapshot: create its record, after everything it names; say who won where another build was faster.

Comes in: a store and a record. Goes out: ``snapshots/N.json``, or an error. Guarantees: the record appears whole, once,
and never over another; every file it names was there, with its recorded size, before; nothing is ever deleted here, so
a commit whose outcome is unknown can be looked up, and running the build again is always safe.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline.errors import (
    AlreadyExistsError,
    CommitError,
    IntegrityError,
    LostRaceError,
    NotFoundError,
    StoreError,
)
from pipeline.schema import (
    SnapshotRecord,
    index_path,
    manifest_path,
    snapshot_path,
    table_path,
    tar_path,
)
from pipeline.snapshot import Snapshot, encode_record, read_record, record_id
from pipeline.store import Store

_LOOKS_AT_ONCE = 16  # an object store answers in tens of milliseconds, and a large snapshot names thousands of files
_SHOWN = 5


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


def commit(store: Store, record: SnapshotRecord) -> None:
    """Publish ``record`` as snapshot ``record.number``, or raise and publish nothing.

    LostRaceError: another build has that number. CommitError: the parent is not the snapshot before, a file is missing
    or of another size, or storage failed.
    """
    _check_parent(store, record)
    _check_files(store, record)
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


def _check_parent(store: Store, record: SnapshotRecord) -> None:
    if record.number == 1:
        expected = ""
    else:
        try:
            expected = record_id(read_record(store, record.number - 1))
        except NotFoundError as error:
            raise CommitError(
                f"snapshot {record.number} cannot be published in {store.url}: there is no snapshot {record.number - 1}"
            ) from error
    if record.parent != expected:
        raise CommitError(
            f"snapshot {record.number} cannot be published in {store.url}: its parent must be {expected!r}, the "
            f"snapshot before it, not {record.parent!r}; run the build again"
        )


def _check_files(store: Store, record: SnapshotRecord) -> None:
    """A record that names a missing file would break every reader, for ever."""
    files = dict(_named_files(store, record))
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        found = list(pool.map(lambda path: _size(store, path), files))
    wrong = [
        f"{path} ({'missing' if size is None else f'{size} bytes'}, expected {files[path]})"
        for path, size in zip(files, found, strict=True)
        if size != files[path]
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CommitError(
            f"snapshot {record.number} was not published in {store.url}: of {len(files)} files that it names, "
            f"{len(wrong)} are not there as they were written: {', '.join(wrong[:_SHOWN])}{more}; run the build again"
        )


def _named_files(store: Store, record: SnapshotRecord) -> Iterator[tuple[str, int]]:
    """Path and size of everything a reader of this snapshot may open."""
    for ref in (record.classes, record.shards, record.rejects, record.departed, *record.samples.values()):
        if ref is not None:
            yield table_path(ref.sha256), ref.size
    for ref in record.manifests.values():
        yield manifest_path(ref.sha256), ref.size
    try:
        snapshot = Snapshot(store, record)
        for name in snapshot.manifests:
            snapshot.manifest(name)  # opening it reads and checks its targets, and that they fit the classes
        for row in snapshot.shards.to_pylist():
            yield tar_path(row["tar_sha256"]), row["tar_size"]
            yield index_path(row["index_sha256"]), row["index_size"]
    except (NotFoundError, IntegrityError) as error:
        raise CommitError(f"snapshot {record.number} was not published in {store.url}: {error}") from error


def _size(store: Store, path: str) -> int | None:
    try:
        return store.size(path)
    except NotFoundError:
        return None
