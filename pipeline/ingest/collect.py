"""Collection: remove the files that no kept snapshot names.

Comes in: a ROOT and how many of its newest snapshots to keep. Goes out: a ``Collection``: what went, or would go.

Guarantees:
    kept are the newest snapshots, those that a pin names, and those that were the newest at any moment of the grace
    period: so whoever opens the newest snapshot can read it for that long, and pin it;
    nothing is removed that one of these names, nor what is younger than the grace period by the clock of the storage,
    nor what is not ours: unknown files are reported;
    commit records stay for ever, and so do reports, run logs and pins;
    it may be stopped at any moment and run again; two may run at once; ``ingest.commit`` tells why builds may, too.

Order: a snapshot that loses a file is noted as collected before it does. Then whatever leads to files goes before the
files it leads to: unit records, manifests, tables, indexes, tars.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.errors import (
    AlreadyExistsError,
    EvenshardError,
    IntegrityError,
    NotFoundError,
    StoreError,
    UsageError,
)
from pipeline.ingest.commit import GRACE_S, MARKER_LIFE_S, MARKERS, is_dead_marker
from pipeline.ingest.known import notes_path
from pipeline.ingest.pins import Pin, read_pins
from pipeline.schema import collected_path, index_path, snapshot_path, tar_path
from pipeline.snapshot import Snapshot, is_collected, newest_number, no_snapshot, read_record
from pipeline.store import Entry, Store

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all): kept snapshots read, files removed."""

_RENEW_S = MARKER_LIFE_S / 6
_AT_ONCE = 16
_SHOWN = 5

_UNITS, _SOURCES, _MANIFESTS, _TABLES, _INDEXES, _TARS, _STAGING, _OURS, _UNKNOWN = range(9)
"""Kinds of files; those before ``_OURS`` may go, in this order."""

_KINDS = (
    (_UNITS, r"runs/units/.+"),
    (_SOURCES, r"runs/sources/[0-9a-f]{64}\.listing"),
    (_MANIFESTS, r"manifests/[0-9a-f]{64}\.json"),
    (_TABLES, r"tables/[0-9a-f]{64}\.arrow"),
    (_INDEXES, r"index/(?P<ab>[0-9a-f]{2})/(?P=ab)[0-9a-f]{62}\.arrow"),
    (_TARS, r"shards/(?P<cd>[0-9a-f]{2})/(?P=cd)[0-9a-f]{62}\.tar"),
    (_STAGING, r"staging/.+"),
    (_OURS, r"snapshots/[0-9]{8}\.json|pins/[^/]+\.json|runs/.+|reports/.+"),
)
_PATTERN = re.compile("|".join(f"(?P<kind{kind}>{pattern})" for kind, pattern in _KINDS))


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What a collection removed; where ``deleted`` is False, what it would remove."""

    root: str
    deleted: bool
    kept: Mapping[int, str]
    """Snapshots that stay, and why."""
    collected: tuple[int, ...]
    """Snapshots that lose files, in this collection or in one before."""
    removed: tuple[Entry, ...]
    young: tuple[Entry, ...]
    """Nothing names them, but they are younger than the grace period."""
    spared: tuple[str, ...]
    """Chosen, and then left: a build or a pin took them meanwhile."""
    unknown: tuple[Entry, ...]

    @property
    def removed_bytes(self) -> int:
        return sum(entry.size for entry in self.removed)

    def to_json(self) -> dict[str, Any]:
        return {
            "root": self.root,
            "deleted": self.deleted,
            "kept": {str(number): why for number, why in self.kept.items()},
            "collected": list(self.collected),
            "removed_bytes": self.removed_bytes,
            "removed": [{"path": entry.path, "size": entry.size} for entry in self.removed],
            "young": [{"path": entry.path, "size": entry.size} for entry in self.young],
            "spared": list(self.spared),
            "unknown": [{"path": entry.path, "size": entry.size} for entry in self.unknown],
        }


def collect(
    root: str | Store,
    keep: int,
    *,
    grace_s: float = GRACE_S,
    delete: bool = False,
    progress: Progress | None = None,
) -> Collection:
    """Find, and with ``delete`` remove, what no kept snapshot of ``root`` names; ``keep`` of the newest are kept.

    A ``grace_s`` shorter than ``GRACE_S`` is for a ROOT that no build is writing to: builds count on the longer one.
    Errors: ``UsageError`` for a wrong call, ``NotFoundError`` where there is no snapshot, ``IntegrityError`` for a
    damaged pin, record or table of a kept snapshot (nothing is removed then), ``StoreError`` for storage.
    """
    if keep < 1:
        raise UsageError(f"keep at least 1 snapshot, not {keep}: the newest is what everybody opens")
    if not 0 <= grace_s < float("inf"):
        raise UsageError(f"the grace period is a number of seconds from 0, not {grace_s}")
    store = root if isinstance(root, Store) else Store.open(root)
    return _Run(store, keep, grace_s, progress or (lambda stage, done, total: None)).run(delete)


@dataclass(frozen=True)
class _Living:
    """What stays, at one moment."""

    newest: int
    pins: Mapping[str, Pin]
    kept: Mapping[int, str]
    files: frozenset[str]
    """Also the notes on their sources, whether there are some or not."""


class _Run:
    def __init__(self, store: Store, keep: int, grace_s: float, progress: Progress) -> None:
        self._store, self._keep, self._grace_s, self._progress = store, keep, grace_s, progress
        if newest_number(store) == 0:
            raise no_snapshot(store)
        # Time, then files, then records and pins: what a build publishes in between is seen. See ``ingest.commit``.
        self._now_s = store.now_s()
        self._before_s = self._now_s - grace_s
        progress("look", 0, 0)
        self._by_kind: dict[int, list[Entry]] = {kind: [] for kind in range(_UNKNOWN + 1)}
        for entry in store.entries(""):
            self._by_kind[_kind(entry.path)].append(entry)
        self._ours = {entry.path: entry for entry in self._by_kind[_OURS]}

    def run(self, delete: bool) -> Collection:
        living = self._living()
        unnamed = list(self._unnamed(living))
        doomed = [entry for entry in unnamed if self._is_old(entry)]
        losing = self._losing(living, {entry.path for entry in doomed})
        removed, spared = (self._delete(living, doomed, losing)) if delete else (doomed, [])
        return Collection(
            root=self._store.url,
            deleted=delete,
            kept=living.kept,
            collected=tuple(losing),
            removed=tuple(removed),
            young=tuple(entry for entry in unnamed if not self._is_old(entry)),
            spared=tuple(spared),
            unknown=tuple(self._by_kind[_UNKNOWN]),
        )

    # -- what stays ------------------------------------------------------------------------------------------------

    def _living(self) -> _Living:
        store = self._store
        newest, pins = newest_number(store), read_pins(store)
        kept = dict(sorted(self._kept(newest, pins)))
        files: set[str] = set()
        for done, number in enumerate(kept, 1):
            snapshot = Snapshot(store, read_record(store, number))
            for pin in pins.values():
                if pin.snapshot == number and pin.snapshot_id != snapshot.id:
                    raise IntegrityError(
                        f"pin {pin.name!r} of {store.url} is for a snapshot {number} with id {pin.snapshot_id}, but "
                        f"{snapshot_path(number)} has {snapshot.id}; nothing was removed: remove the pin, or restore "
                        f"the record"
                    )
            files.add(notes_path(snapshot.id))
            try:
                files.update(snapshot.files())
            except (NotFoundError, IntegrityError) as error:
                raise IntegrityError(
                    f"nothing was removed: snapshot {number} is to be kept ({kept[number]}), and what it names cannot "
                    f"be told: {error}"
                ) from error
            self._progress("keep", done, len(kept))
        return _Living(newest, pins, kept, frozenset(files))

    def _kept(self, newest: int, pins: Mapping[str, Pin]) -> Iterator[tuple[int, str]]:
        pinned: dict[int, list[str]] = {}
        for pin in pins.values():
            if not 1 <= pin.snapshot <= newest:
                raise IntegrityError(
                    f"pin {pin.name!r} of {self._store.url} keeps snapshot {pin.snapshot}, and the newest is {newest}; "
                    f"nothing was removed: remove the pin, or restore the record"
                )
            pinned.setdefault(pin.snapshot, []).append(pin.name)
        for number in range(1, newest + 1):
            if number in pinned:
                yield number, f"pinned as {', '.join(pinned[number])}"
            elif self._is_noted(number):
                continue
            elif number > newest - self._keep:
                yield number, "the newest" if number == newest else f"one of the newest {self._keep}"
            elif self._was_newest_lately(number):
                yield number, "the newest at some time in the grace period"

    def _is_noted(self, number: int) -> bool:
        """Whether a collection before this one took something of it."""
        return collected_path(number) in self._ours

    def _was_newest_lately(self, number: int) -> bool:
        """Whether the next record is younger than the grace period; one that was not listed has just been written."""
        following = self._ours.get(snapshot_path(number + 1))
        return following is None or not self._is_old(following)

    # -- what goes -------------------------------------------------------------------------------------------------

    def _unnamed(self, living: _Living) -> Iterator[Entry]:
        yield from self._stale_units(living)
        for kind in (_SOURCES, _MANIFESTS, _TABLES, _INDEXES, _TARS, _STAGING):
            yield from (entry for entry in self._by_kind[kind] if entry.path not in living.files)

    def _stale_units(self, living: _Living) -> Iterator[Entry]:
        """Records of finished units that will lead nowhere: a build would do that work again."""
        staying = {
            entry.path
            for kind in (_INDEXES, _TARS)
            for entry in self._by_kind[kind]
            if entry.path in living.files or not self._is_old(entry)
        }
        old = [entry for entry in self._by_kind[_UNITS] if self._is_old(entry)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for entry, files in zip(old, pool.map(self._unit_files, old), strict=True):
                if files is not None and not files <= staying:
                    yield entry

    def _unit_files(self, entry: Entry) -> set[str] | None:
        """What a unit record leads to; None if there is no telling."""
        try:
            body: Any = json.loads(self._store.read(entry.path))
            refs = ((body["tar"], tar_path), (body["index"], index_path))
            return {locate(str(ref["sha256"])) for ref, locate in refs if ref}
        except (NotFoundError, ValueError, KeyError, TypeError):
            return None

    def _is_old(self, entry: Entry) -> bool:
        return entry.modified_s is not None and entry.modified_s < self._before_s

    def _losing(self, living: _Living, doomed: set[str]) -> list[int]:
        """Snapshots that are not kept, and name something that goes or is gone."""
        return [
            number
            for number in range(1, living.newest + 1)
            if number not in living.kept and (self._is_noted(number) or self._loses(number, doomed))
        ]

    def _loses(self, number: int, doomed: set[str]) -> bool:
        try:
            return not doomed.isdisjoint(Snapshot(self._store, read_record(self._store, number)).files())
        except (NotFoundError, IntegrityError):
            return True

    # -- removing --------------------------------------------------------------------------------------------------

    def _delete(self, living: _Living, doomed: Sequence[Entry], losing: Iterable[int]) -> tuple[list[Entry], list[str]]:
        for number in losing:
            self._note(number, living)
        with _Marker(self._store) as marker:
            now = self._again(living)
            for pin in now.pins.values():  # one that was made in this moment; nothing of its snapshot was removed
                if is_collected(self._store, pin.snapshot):
                    self._store.remove(collected_path(pin.snapshot))
            removed = self._remove([entry for entry in doomed if entry.path not in now.files], marker)
            self._store.sweep(self._before_s)
        self._remove_dead_markers()
        gone = {entry.path for entry in removed}
        return removed, [entry.path for entry in doomed if entry.path not in gone]

    def _again(self, living: _Living) -> _Living:
        """Records and pins once more: a pin that was made before its snapshot was noted as collected counts."""
        newest, pins = newest_number(self._store), read_pins(self._store)
        return living if (newest, pins) == (living.newest, living.pins) else self._living()

    def _note(self, number: int, living: _Living) -> None:
        body = {"snapshot": number, "kept": list(living.kept), "collected_s": int(self._now_s)}
        with suppress(AlreadyExistsError):
            self._store.create(collected_path(number), json.dumps(body, indent=1, sort_keys=True).encode())

    def _remove_dead_markers(self) -> None:
        for entry in self._by_kind[_OURS]:
            if entry.path.startswith(f"{MARKERS}/") and is_dead_marker(entry, self._now_s):
                with suppress(NotFoundError):
                    self._store.remove(entry.path)

    def _remove(self, entries: Sequence[Entry], marker: _Marker) -> list[Entry]:
        removed: list[Entry] = []
        failed: list[EvenshardError] = []
        # Kinds one after the other; of one kind many at once, as an object store answers in tens of milliseconds.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for kind in range(_OURS):
                mine = [entry for entry in entries if _kind(entry.path) == kind]
                for start in range(0, len(mine), 10 * _AT_ONCE):
                    marker.renew()
                    self._progress("remove", len(removed), len(entries))
                    some = mine[start : start + 10 * _AT_ONCE]
                    for entry, outcome in zip(some, pool.map(self._remove_one, some), strict=True):
                        if outcome is True:
                            removed.append(entry)
                        elif isinstance(outcome, EvenshardError):
                            failed.append(outcome)
                if failed:
                    break
        if failed:
            more = f" and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
            raise StoreError(
                f"{len(removed)} of {len(entries)} files were removed from {self._store.url}, {len(failed)} could not "
                f"be: {'; '.join(map(str, failed[:_SHOWN]))}{more}; run the same command again: it goes on from here"
            )
        return removed

    def _remove_one(self, entry: Entry) -> bool | EvenshardError:
        """True if it is gone; False if it was freshened meanwhile."""
        try:
            found = self._store.entry(entry.path)
            if found is not None and not self._is_old(found):
                return False
            if found is not None:
                self._store.remove(entry.path)
        except NotFoundError:
            return True
        except StoreError as error:
            return error
        return True


def _kind(path: str) -> int:
    match = _PATTERN.fullmatch(path)
    return _UNKNOWN if match is None or match.lastgroup is None else int(match.lastgroup.removeprefix("kind"))


class _Marker:
    """A file in runs/gc/ that is there while files are removed, and never old."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path, self._made_s = "", 0.0

    def __enter__(self) -> _Marker:
        self._make()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(StoreError):  # left behind, it is dead in an hour; an error on the way here tells more
            self._store.remove(self._path)

    def _make(self) -> None:
        path = f"{MARKERS}/{uuid.uuid4().hex}.json"
        self._made_s = time.monotonic()
        self._store.create(path, b"{}")
        self._path = path

    def renew(self) -> None:
        """Before every few files: the new one is there before the old one goes."""
        if time.monotonic() - self._made_s > _RENEW_S:
            before = self._path
            self._make()
            self._store.remove(before)
