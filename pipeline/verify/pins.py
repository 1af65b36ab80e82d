"""Pins: each can be read, and the snapshot that it keeps is the one it means, with every file."""

from __future__ import annotations

from pipeline.errors import EvenshardError, IntegrityError, NotFoundError
from pipeline.ingest.pins import pin_names, read_pin
from pipeline.schema import pin_path
from pipeline.snapshot import Snapshot, open_snapshot
from pipeline.store import Store
from pipeline.verify.files import RESTORE, Files
from pipeline.verify.findings import Code, Findings


def check_pins(store: Store, files: Files, findings: Findings) -> tuple[str, ...]:
    """Look at every pin of ROOT; returns why none could be listed, where that is so."""
    try:
        names = pin_names(store)
    except EvenshardError as error:
        return (f"pins were not looked at, this storage cannot list them: {error}",)
    for name in names:
        path = pin_path(name)
        try:
            pin = read_pin(store, name)
            kept = open_snapshot(store, pin.snapshot)
            if kept.id != pin.snapshot_id:
                told = f"it keeps the snapshot of id {pin.snapshot_id}, but snapshot {kept.number} has {kept.id}"
                raise IntegrityError(f"{told}; {RESTORE}, or remove the pin")
            _expect_files(kept, files)
        except NotFoundError as error:
            findings.add(Code.PIN, path, f"what it keeps is not there: {error}; remove the pin if nobody needs it")
        except EvenshardError as error:
            findings.add(Code.PIN, path, str(error))
    return ()


def _expect_files(kept: Snapshot, files: Files) -> None:
    """Everything a reader may open is there, by name and size; `verify --at` proves the bytes."""
    for path, size in kept.files().items():
        if not files.was_seen(path):
            files.expect(path, size)
