"""Checkpoints of a training: whole files or none, found again after any kill.

Comes in: a dictionary of tensors and plain values. Goes out: ``OUT/checkpoint-<stage>-<step>-<digest>.pt``, which
``torch.load`` reads. Guarantees: written to a temporary file, synced, then renamed to a name that holds the SHA-256 of
its bytes, so a torn or altered file is never taken for a checkpoint; read without unpickling anything but tensors and
plain values; the newest two stay.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.errors import IntegrityError, StoreError

FORMAT_VERSION = 1
KEPT = 2
"""The newest, and the one before it, should the disk have damaged that."""

_NAME = re.compile(r"checkpoint-\d{3}-\d{10}-([0-9a-f]{32})\.pt")
_PART = re.compile(r"\.checkpoint-.*\.part")


def save(folder: Path, stage: int, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` as the checkpoint of ``step``, with ``stage`` to go on with; older ones but the last go."""

    def name(digest: str) -> str:
        return f"checkpoint-{stage:03d}-{step:010d}-{digest[:32]}.pt"

    path = write_whole(folder, lambda path: save_tensors({"format_version": FORMAT_VERSION, **state}, path), name)
    for old in [one for one in checkpoints(folder) if one != path][KEPT - 1 :]:
        with suppress(FileNotFoundError):
            old.unlink()
    return path


def save_tensors(held: dict[str, Any], path: Path) -> None:
    """``torch.save``, which wraps a full disk in a RuntimeError: here it is the OSError that it was."""
    try:
        with path.open("wb") as file:
            torch.save(held, file)
    except RuntimeError as error:
        cause = error.__context__  # of a file that Python opened
        raise cause if isinstance(cause, OSError) else OSError(str(error)) from error


def write_whole(folder: Path, write: Callable[[Path], None], name: Callable[[str], str]) -> Path:
    """A file of ``folder`` that is there whole or not at all; ``name`` is told the SHA-256 of its bytes."""
    draft = folder / f".checkpoint-{os.getpid()}-{os.urandom(4).hex()}.part"
    with writing_to(folder):
        for part in folder.iterdir():  # of a process that was killed while it wrote
            if _PART.fullmatch(part.name):
                part.unlink(missing_ok=True)
        try:
            write(draft)
            with draft.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            os.replace(draft, path := folder / name(digest))
            _sync_directory(folder)
        finally:
            with suppress(FileNotFoundError):
                draft.unlink()
    return path


@contextmanager
def writing_to(folder: Path) -> Generator[None]:
    """A disk that is full, a folder that must not be written: StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{folder}: nothing could be written there: {error}; free space or name another DIR"
        ) from error


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: Path) -> list[Path]:
    """Files that are named like checkpoints, the newest first."""
    return sorted((path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)), reverse=True)


def load_newest(folder: Path, tell: Callable[[str], Any]) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU; None where there is none. Each damaged one is told.

    IntegrityError where all are damaged: to begin anew must be somebody's decision.
    """
    found = checkpoints(folder)
    for path in found:
        if problem := _problem(path):
            tell(f"{path.name} is passed over: {problem}")
            continue
        state = _read(path)
        if state.get("format_version") != FORMAT_VERSION:
            raise IntegrityError(
                f"{path}: format_version {state.get('format_version')!r}, this version of evenshard reads "
                f"{FORMAT_VERSION}; resume with the version that wrote it"
            )
        return state
    if found:
        raise IntegrityError(f"{folder}: all {len(found)} checkpoints are damaged; name another DIR to begin anew")
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no type of its own for what it refuses to unpickle
        raise IntegrityError(
            f"{path}: its name tells its bytes, and they are no checkpoint of evenshard (code of a file is never run): "
            "name another DIR"
        ) from error
    if not isinstance(state, dict):
        raise IntegrityError(f"{path}: its bytes are no checkpoint of evenshard: name another DIR")
    return cast("dict[str, Any]", state)


def _problem(path: Path) -> str:
    match = _NAME.fullmatch(path.name)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if match is None or not digest.startswith(match[1]):
        return f"its bytes have SHA-256 {digest[:32]}..., not what its name says"
    return ""
