"""Many folders listed at once, in workers.

Comes in: folders below a place, as a walk meets them. Goes out: what lies directly in each, in columns. Guarantees: no
more is told of a folder than can be told of all its files alike; the rest is for the walk itself to list (``odd``), so
that there is one account of what is out of the ordinary.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from pipeline.ingest.source_files import Place, list_folder
from pipeline.ingest.source_items import may_hold_containers
from pipeline.ingest.source_rows import FileColumns, are_plain, printable
from pipeline.keyed import text_keys

MIN_SHARED = 16
"""Folders that are worth sharing."""

TELL_EVERY_S = 0.25
"""Telling of every folder would cost as much as listing it."""

MAX_FILES = 1 << 16
"""Of one answer, unless one folder has more."""

NUM_BATCHES, MAX_BATCH = 32, 256
"""Into how many units to cut what waits, so that workers end together; and how many folders are in one at most."""


@dataclass(frozen=True)
class Walked:
    """What lies directly in some folders; the files of all of them one after another in ``files``."""

    folders: list[str]
    num_files: list[int]
    """Of each folder."""
    inner: list[list[str]]
    """The folders in each, by name."""
    files: FileColumns
    odd: list[str]
    """Folders of which something else is to be told: a link, a file without bytes, a name that is no text."""
    rest: list[str]
    """Folders that were left to others, as the files of those before were many."""


class Workers(Protocol):
    """Who shares a listing that takes long (`ingest.work`)."""

    @property
    def start_s(self) -> float:
        """About how long it takes until they work."""
        ...

    def prepare(self) -> None:
        """They will be wanted soon."""
        ...

    def share(
        self, function: Callable[..., Iterator[Any]], units: Iterable[tuple[str, tuple[Any, ...]]]
    ) -> Iterator[Any]:
        """Run a function of `ingest.crew` on units given as (name, arguments); yields results in any order."""
        ...


class SharedWalk:
    """Decides when a walk is worth sharing, and shares it.

    A walk that has taken half as long as workers take to start lets them start; when they will have, it hands over
    the folders that are still to be listed, if these are many.
    """

    def __init__(self, place: Place, max_bytes: int, workers: Workers) -> None:
        self._place, self._max_bytes, self._workers = place, max_bytes, workers
        self._start_s = workers.start_s
        self._began_s = time.monotonic()
        self._share_s: float | None = None

    def is_due(self, num_folders: int) -> bool:
        """Whether to hand over, now that so many folders wait."""
        now_s = time.monotonic()
        if num_folders < MIN_SHARED or now_s < self._began_s + self._start_s / 2:
            return False
        if self._share_s is None:
            self._workers.prepare()
            self._share_s = now_s + self._start_s
        return now_s >= self._share_s

    def list(self, folders: Sequence[str]) -> Iterator[Walked]:
        """What lies directly in each of these."""
        size = min(MAX_BATCH, -(-len(folders) // NUM_BATCHES))
        batches = (folders[start : start + size] for start in range(0, len(folders), size))
        units = ((f"list {printable(batch[0])} ff.", (self._place, batch, self._max_bytes)) for batch in batches)
        return self._workers.share(walk_folders, units)


def walk_folders(place: Place, folders: Sequence[str], max_bytes: int, *, attempt: int) -> Iterator[int | Walked]:
    """List these folders (a unit of `ingest.crew`): yields numbers of files, then a `Walked`."""
    del attempt  # listing again does no harm
    told, next_s = 0, time.monotonic() + TELL_EVERY_S
    walked = Walked([], [], [], FileColumns.empty(), [], [])
    paths: list[str] = []
    keys, files = bytearray(), walked.files
    for number, folder in enumerate(folders):
        if len(paths) >= MAX_FILES:
            walked.rest.extend(folders[number:])
            break
        found = _list(place, folder, max_bytes)
        if found is None:
            walked.odd.append(folder)
            continue
        names, sizes, fingerprints, inner = found
        full = [f"{folder}/{name}" for name in names]
        walked.folders.append(folder)
        walked.num_files.append(len(full))
        walked.inner.append(inner)
        paths += full
        keys += text_keys(full).tobytes()
        files.sizes.extend(sizes)
        files.fingerprints.extend(fingerprints)
        if (now_s := time.monotonic()) >= next_s:
            yield len(paths) - told
            told, next_s = len(paths), now_s + TELL_EVERY_S
    yield len(paths) - told
    files.keys.frombytes(bytes(keys))
    files.paths.append(pa.array(paths, pa.string()))
    yield walked


def _list(place: Place, folder: str, max_bytes: int) -> tuple[list[str], array[int], array[int], list[str]] | None:
    names: list[str] = []
    inner: list[str] = []
    sizes, fingerprints = array("q"), array("Q")
    for part in list_folder(place, folder):
        if any(not entry.is_folder or entry.problem for entry in part.others):
            return None
        inner += [entry.name for entry in part.others]
        names += part.names
        sizes += part.sizes
        fingerprints += part.fingerprints
    if not names and not inner:
        return None  # an empty folder is told of
    if names and (may_hold_containers(names) or not are_plain([folder, *names], sizes, max_bytes)):
        return None
    return names, sizes, fingerprints, inner
