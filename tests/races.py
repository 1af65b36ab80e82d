"""Processes that commit to one ROOT at once, and readers that read while it is rebuilt and collected."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

from pipeline.errors import LostRaceError
from pipeline.ingest.collect import collect
from pipeline.ingest.commit import commit
from pipeline.snapshot import newest_number, open_snapshot, read_record, record_id
from pipeline.store import Store

_SPAWN = multiprocessing.get_context("spawn")


# ---- Commits


def race_commits(root: str, num_racers: int, num_rounds: int, folder: Path) -> list[str]:
    """``num_rounds`` times, all racers commit the next snapshot at once; returns what was not as it should be."""
    first = newest_number(Store(root))
    barrier = _SPAWN.Barrier(num_racers)
    logs = [folder / f"racer-{number}.json" for number in range(num_racers)]
    racers = [
        _SPAWN.Process(target=_race, args=(root, number, num_rounds, barrier, log)) for number, log in enumerate(logs)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    told = [json.loads(log.read_text()) for log in logs]
    return [
        problem
        for round_ in range(num_rounds)
        for problem in _judge(root, first + 1 + round_, [one[round_] for one in told])
    ]


def _race(root: str, number: int, num_rounds: int, barrier: Barrier, log: Path) -> None:
    store, told = Store(root), []
    for round_ in range(num_rounds):
        base = read_record(store, newest_number(store))
        mine = replace(base, number=base.number + 1, parent=record_id(base), build_id=f"{number:032x}{round_:032x}")
        barrier.wait()
        try:
            commit(store, mine)
            told.append([record_id(mine), ""])
        except LostRaceError as error:
            told.append([record_id(mine), str(error)])
        barrier.wait()
    log.write_text(json.dumps(told))


def _judge(root: str, number: int, told: Sequence[tuple[str, str]]) -> list[str]:
    """One winner, whose record is there and follows the one before; every loser was told its id."""
    record = read_record(Store(root), number)
    winner, before = record_id(record), record_id(read_record(Store(root), number - 1))
    won = [mine for mine, error in told if not error]
    problems = [f"snapshot {number}: {len(won)} winners"] if won != [winner] else []
    if record.parent != before:
        problems.append(f"snapshot {number} does not follow snapshot {number - 1}")
    for _, error in told:
        if error and f"its id is {winner}" not in error:
            problems.append(f"snapshot {number}: a loser was not told who won: {error}")
    return problems


# ---- Readers


@dataclass(frozen=True)
class Read:
    """What the readers did, and what the collections beside them removed."""

    num_opened: int
    num_read: int
    snapshots: set[int]
    errors: list[str]
    num_removed: int


def read_during(
    root: Path, num_readers: int, rebuilds: Sequence[Callable[[], object]], grace_s: float, folder: Path
) -> Read:
    """Readers open the newest snapshot and read from it, again and again, while it is rebuilt and collected.

    A reader keeps a snapshot for a quarter of the grace period; every rebuild is followed by a collection that keeps
    the newest alone.
    """
    stop = _SPAWN.Event()
    logs = [folder / f"reader-{number}.json" for number in range(num_readers)]
    readers = [
        _SPAWN.Process(target=_read, args=(str(root), number, grace_s / 4, stop, log))
        for number, log in enumerate(logs)
    ]
    for reader in readers:
        reader.start()
    while not all(os.path.exists(f"{log}.begun") for log in logs):
        time.sleep(0.05)
    removed = 0
    for rebuild in rebuilds:
        rebuild()
        removed += len(collect(str(root), 1, grace_s=grace_s, delete=True).removed)
        time.sleep(grace_s / 2)
    removed += len(collect(str(root), 1, grace_s=grace_s, delete=True).removed)
    stop.set()
    for reader in readers:
        reader.join()
    told = [json.loads(log.read_text()) for log in logs]
    return Read(
        num_opened=sum(one["opened"] for one in told),
        num_read=sum(one["read"] for one in told),
        snapshots={number for one in told for number in one["snapshots"]},
        errors=[error for one in told for error in one["errors"]],
        num_removed=removed,
    )


def _read(root: str, number: int, keep_s: float, stop: Event, log: Path) -> None:
    rng = random.Random(number)
    opened = read = 0
    snapshots: set[int] = set()
    errors: list[str] = []
    while not stop.is_set():
        try:
            snapshot = open_snapshot(root)
            snapshots.add(snapshot.number)
            opened += 1
            until = time.monotonic() + keep_s
            while time.monotonic() < until:
                split = rng.choice(sorted(snapshot.record.samples))
                snapshot.read_image(split, rng.randrange(snapshot.record.samples[split].num_rows))
                read += 1
            snapshot.manifest(snapshot.manifests[0]).targets.sum()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        Path(f"{log}.begun").touch()
    log.write_text(json.dumps({"opened": opened, "read": read, "snapshots": sorted(snapshots), "errors": errors}))
