"""Which snapshots there are: the newest, those that were collected, and what to do where there is none.

Comes in: a ROOT. Goes out: numbers, and errors that tell the way out.
"""

from __future__ import annotations

import os

from pipeline.errors import EvenshardError, NotFoundError, StoreError
from pipeline.schema import collected_path, snapshot_path
from pipeline.store import Store

MAX_NAMED = 20
"""Snapshots that a message names."""

_LOOKED_AT = 50
"""Names of a directory that are looked at, to tell whether it is a source."""

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_CONTAINERS = (".tar", ".tar.gz", ".tgz", ".parquet")


def snapshot_exists(store: Store) -> bool:
    """Whether anything was ever committed."""
    return store.exists(snapshot_path(1))


def newest_number(store: Store) -> int:
    """The largest snapshot number, 0 if there is none: by doubling, then bisection, so no listing is needed."""
    if not snapshot_exists(store):
        return 0
    low, high = 1, 2
    while store.exists(snapshot_path(high)):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if store.exists(snapshot_path(middle)) else (low, middle)
    return low


def is_collected(store: Store, number: int) -> bool:
    """Whether `evenshard gc` removed, or began to remove, files that only this snapshot named."""
    return store.exists(collected_path(number))


def refuse_collected(store: Store, number: int) -> None:
    """``NotFoundError`` that says what remains, where snapshot ``number`` was collected."""
    if is_collected(store, number):
        raise NotFoundError(collected(store, number))


def collected(store: Store, number: int) -> str:
    """What readers of a collected snapshot are told."""
    return (
        f"snapshot {number} of {store.url} was collected: `evenshard gc` removed files that only it named "
        f"({collected_path(number)} says when). {_remaining(store)}; `evenshard history {store.url}` tells what each "
        f"of them is. To have snapshot {number} again, build from the source as it was then; to keep one that is in "
        f"use, `evenshard pin {store.url} NAME --at N`"
    )


def _remaining(store: Store) -> str:
    """Which snapshots are whole, oldest first; of storage that lists nothing, only the newest is known to be."""
    newest = newest_number(store)
    try:
        gone = {int(os.path.basename(path)[:8]) for path in store.list(os.path.dirname(collected_path(1)))}
    except (StoreError, ValueError):
        return f"The newest one, {newest}, remains"
    whole = [number for number in range(1, newest + 1) if number not in gone]
    shown = ", ".join(map(str, whole[-MAX_NAMED:]))
    older = f"{len(whole) - MAX_NAMED:,} older ones and " if len(whole) > MAX_NAMED else ""
    return f"What remains is snapshot {older}{shown}" if whole else "None remains"


def no_snapshot(store: Store) -> NotFoundError:
    """The error of whoever reads a place without a snapshot: it says where one is, or what to build."""
    if above := _root_above(store):
        return NotFoundError(f"no snapshot in {store.url}, which is a part of the ROOT {above}: did you mean {above}?")
    if what := _source_like(store):
        return NotFoundError(
            f"no snapshot in {store.url}: it holds {what}, so it is a source. Build it into another directory: "
            f"`evenshard build {store.url} ROOT`, then name ROOT here"
        )
    return NotFoundError(f"no snapshot in {store.url}; run `evenshard build SOURCE {store.url}`")


def _root_above(store: Store) -> str:
    """The ROOT that this place lies in, up to three directories above; '' where there is none."""
    place = store.root.rstrip("/")
    for _ in range(3):
        place = place.rpartition("/")[0]
        if not place or place.endswith((":", "/")):
            return ""
        try:
            above = Store(place)
            if snapshot_exists(above):
                return above.url
        except EvenshardError:
            return ""
    return ""


def _source_like(store: Store) -> str:
    """``images`` or ``tars or Parquet files``, where the first names here, or one directory down, say so."""
    if not store.is_local:  # a listing of a bucket may be long
        return ""
    names = _names(store.root)
    below = [f"{name}/{one}" for name in names[:5] for one in _names(os.path.join(store.root, name))]
    lowered = [name.lower() for name in (*names, *below)]
    if any(name.endswith(_IMAGES) for name in lowered):
        return "images"
    return "tars or Parquet files" if any(name.endswith(_CONTAINERS) for name in lowered) else ""


def _names(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry, _ in zip(entries, range(_LOOKED_AT), strict=False))
    except OSError:  # a file, or not ours to list
        return []
