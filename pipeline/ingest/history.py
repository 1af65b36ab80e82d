"""History: what every snapshot of a ROOT is, how it differs from the one before, who keeps it, which run made it.

Comes in: a ROOT. Goes out: one ``Past`` per snapshot, oldest first. Guarantees: read from records, shard tables, pins
and run logs alone, so it is quick at any size; a damaged record is told in its row, and hides no other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import EvenshardError, IntegrityError, NotFoundError, StoreError, UsageError
from pipeline.ingest.pins import read_pins
from pipeline.schema import SHARDS, SnapshotRecord, snapshot_path
from pipeline.snapshot import Snapshot, is_collected, newest_number, no_snapshot, read_record, record_id
from pipeline.store import Store

Progress = Callable[[str, int, int], None]
"""Called with ("history", records read, records in all)."""

_AT_ONCE = 16
_RUNS = "runs/builds"
_TORN = "its parent is not the record before it: one of the two was replaced or is damaged; restore it from a copy"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the log of a build says about itself."""

    started: str
    host: str
    source: str
    elapsed_s: float
    num_read: int
    command: str = ""  # that asks for the same build; '' in logs of older versions
    versions: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Past:
    """One snapshot. Where ``problem`` is set, the record cannot be used, and the numbers are 0."""

    number: int
    id: str = ""
    published: str = ""  # UTC, by the clock of the storage
    num_images: int = 0
    num_classes: int = 0
    num_rejects: int = 0
    num_shards: int | None = None  # None: its shard table was collected
    num_new_shards: int | None = None  # that the one before does not have
    parent_ok: bool = False
    collected: bool = False
    pins: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    run: Run | None = None
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def history(root: str | Store, last: int | None = None, *, progress: Progress | None = None) -> tuple[Past, ...]:
    """The ``last`` snapshots of ``root`` (all by default), oldest first."""
    if last is not None and last < 1:
        raise UsageError(f"show the last 1 or more snapshots, not {last}")
    store = root if isinstance(root, Store) else Store.open(root)
    newest = newest_number(store)
    if newest == 0:
        raise no_snapshot(store)
    first = 1 if last is None else max(1, newest - last + 1)
    numbers = range(max(1, first - 1), newest + 1)  # the one before the first shown is its parent
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looked: dict[int, _Looked] = {}
        for number, found in zip(numbers, pool.map(lambda number: _look(store, number), numbers), strict=True):
            looked[number] = found
            if progress is not None:
                progress("history", len(looked), len(numbers))
        runs = _runs(store, pool)
    pins = _pins(store)
    return tuple(_past(number, looked, pins, runs) for number in numbers if number >= first)


@dataclass(frozen=True, kw_only=True)
class _Looked:
    record: SnapshotRecord | None
    problem: str = ""
    published: str = ""
    tars: frozenset[str] | None = None
    collected: bool = False


def _look(store: Store, number: int) -> _Looked:
    entry = store.entry(snapshot_path(number))
    modified_s = None if entry is None else entry.modified_s
    published = "" if modified_s is None else _utc(modified_s)
    try:
        record = read_record(store, number)
    except (StoreError, IntegrityError) as error:
        return _Looked(record=None, problem=str(error), published=published)
    collected = is_collected(store, number)
    try:
        shards = Snapshot(store, record).table(record.shards, SHARDS)
    except (StoreError, IntegrityError) as error:
        problem = "" if collected and isinstance(error, NotFoundError) else str(error)
        return _Looked(record=record, published=published, collected=collected, problem=problem)
    tars = frozenset(shards["tar_sha256"].to_pylist())
    return _Looked(record=record, published=published, collected=collected, tars=tars)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S")


def _past(
    number: int, looked: Mapping[int, _Looked], pins: Mapping[int, Sequence[str]], runs: Mapping[int, Run]
) -> Past:
    mine, before = looked[number], looked.get(number - 1)
    told = Past(
        number=number,
        published=mine.published,
        pins=tuple(pins.get(number, ())),
        run=runs.get(number),
        problem=mine.problem,
    )
    record = mine.record
    if record is None:
        return told
    parent = None if before is None else before.record
    parent_ok = record.parent == (record_id(parent) if parent else "") and (parent is not None or number == 1)
    shared = before.tars if before is not None else frozenset[str]()
    return replace(
        told,
        id=record_id(record),
        num_images=record.num_images,
        num_classes=record.num_classes,
        num_rejects=record.num_rejects,
        num_shards=None if mine.tars is None else len(mine.tars),
        num_new_shards=None if mine.tars is None or shared is None else len(mine.tars - shared),
        parent_ok=parent_ok,
        collected=mine.collected,
        changes=tuple(_changes(parent, record)),
        problem=mine.problem or ("" if parent_ok else _TORN),
    )


def _changes(before: SnapshotRecord | None, now: SnapshotRecord) -> Iterable[str]:
    """In words, from the two records alone; ``evenshard diff`` knows which images."""
    if before is None:
        yield "the first"
        return
    for what, one, two in (
        ("images", before.num_images, now.num_images),
        ("classes", before.num_classes, now.num_classes),
        ("rejects", before.num_rejects, now.num_rejects),
    ):
        if one != two:
            yield f"{what} {two - one:+,}"
    if before.num_images == now.num_images and before.shards != now.shards:
        yield "images replaced or moved"
    for name in sorted({*before.manifests, *now.manifests}):
        if name not in before.manifests:
            yield f"manifest {name} added"
        elif name not in now.manifests:
            yield f"manifest {name} removed"
    wanted = sorted(key for key in {*before.config, *now.config} if before.config.get(key) != now.config.get(key))
    if wanted:
        yield f"config {', '.join(wanted)}"
    if before.created_by != now.created_by:
        yield f"by {now.created_by}"


def _pins(store: Store) -> dict[int, list[str]]:
    pins: dict[int, list[str]] = {}
    for pin in read_pins(store).values():
        pins.setdefault(pin.snapshot, []).append(pin.name)
    return pins


def run_of(store: Store, number: int) -> Run | None:
    """The run that published snapshot ``number``, where its log is there."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return _runs(store, pool).get(number)


def _runs(store: Store, pool: ThreadPoolExecutor) -> dict[int, Run]:
    """The run that published each snapshot. These logs are notes: one that cannot be read is passed over."""
    paths = store.list(_RUNS)
    runs: dict[int, Run] = {}
    for body in pool.map(lambda path: _read_run(store, path), paths):
        if body.get("changed") is True and type(body.get("snapshot")) is int:
            runs[body["snapshot"]] = Run(
                started=_utc(float(body.get("started_s", 0))),
                host=str(body.get("host", "")),
                source=str(body.get("source", "")),
                elapsed_s=float(body.get("elapsed_s", 0)),
                num_read=int(body.get("num_read", 0)),
                command=str(body.get("command", "")),
                versions=_versions(body),
            )
    return runs


def _versions(body: Mapping[str, Any]) -> dict[str, str]:
    told: Any = body.get("versions")
    named = {str(name): str(value) for name, value in told.items() if value} if isinstance(told, dict) else {}
    return {"python": str(body["python"])} | named if body.get("python") else named


def _read_run(store: Store, path: str) -> dict[str, Any]:
    try:
        body: Any = json.loads(store.read(path))
    except (EvenshardError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
