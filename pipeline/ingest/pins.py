"""Pins: snapshots that collection keeps, by name.

Comes in: a ROOT, a name, a snapshot number. Goes out: ``pins/NAME.json``, created and never overwritten. Guarantees: of
a pin and a collection that run at once, the pin is refused or the collection keeps the snapshot, never neither; a pin
that cannot be read stops a collection, it is not passed over.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import AlreadyExistsError, IntegrityError, NotFoundError, UsageError
from pipeline.schema import pin_path
from pipeline.snapshot import is_collected, open_snapshot
from pipeline.store import Store

PIN_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Pin:
    """Snapshot ``snapshot``, whose record has the id ``snapshot_id``, is kept while this file is there."""

    name: str
    snapshot: int
    snapshot_id: str
    format_version: int = PIN_FORMAT_VERSION


def pin(root: str | Store, name: str, number: int | None = None) -> Pin:
    """Keep snapshot ``number`` of ``root``, the newest by default, until ``unpin``.

    The same pin again is no error; a name that keeps another snapshot is an ``AlreadyExistsError``. ``NotFoundError``
    where there is no such snapshot, or it was collected.
    """
    _check_name(name)
    snapshot = open_snapshot(root, number)
    store, made = snapshot.store, Pin(name=name, snapshot=snapshot.number, snapshot_id=snapshot.id)
    try:
        store.create(pin_path(name), (json.dumps(asdict(made), indent=1, sort_keys=True) + "\n").encode())
    except AlreadyExistsError:
        present = read_pin(store, name)
        if present != made:
            raise AlreadyExistsError(
                f"pin {name!r} of {store.url} keeps snapshot {present.snapshot}, not {made.snapshot}: choose another "
                f"name, or remove it first with `evenshard pin {store.url} {name} --remove`"
            ) from None
    # A collection notes what it is about to collect, then reads the pins once more: one of the two sees the other.
    if is_collected(store, made.snapshot):
        store.remove(pin_path(name))
        open_snapshot(store, made.snapshot)  # says so
    return made


def unpin(root: str | Store, name: str) -> Pin:
    """Remove the pin ``name``: what it kept goes with the next collection, unless something else keeps it."""
    _check_name(name)
    store = root if isinstance(root, Store) else Store.open(root)
    pins = pin_names(store)
    if name not in pins:
        raise NotFoundError(f"there is no pin {name!r} in {store.url}; pins: {', '.join(pins) or 'none'}")
    removed = read_pin(store, name)
    store.remove(pin_path(name))
    return removed


def pin_names(store: Store) -> list[str]:
    """The names of all pins, whether they can be read or not, sorted."""
    return [path.removeprefix("pins/").removesuffix(".json") for path in store.list("pins")]


def read_pins(store: Store) -> dict[str, Pin]:
    """Every pin by name, sorted."""
    return {pin.name: pin for pin in (_read(store, path) for path in store.list("pins"))}


def read_pin(store: Store, name: str) -> Pin:
    """The pin ``name``."""
    return _read(store, pin_path(name))


def _read(store: Store, path: str) -> Pin:
    where = f"{path} in {store.url}"
    try:
        body: Any = json.loads(store.read(path))
        found = Pin(**body)
        types = {"name": str, "snapshot": int, "snapshot_id": str, "format_version": int}
        sound = all(type(getattr(found, name)) is kind for name, kind in types.items())
    except (ValueError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{where} is no pin of evenshard: {error}; {_REPAIR}") from error
    if not sound or pin_path(found.name) != path or found.format_version != PIN_FORMAT_VERSION:
        raise IntegrityError(f"{where} is no pin that this version of evenshard can read: {body!r}; {_REPAIR}")
    return found


_REPAIR = "if nobody needs it, delete the file; it keeps a snapshot from being collected"


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(
            f"a pin's name is 1 to 100 letters, digits, '.', '_' or '-', a letter or digit first; not {name!r}"
        )
