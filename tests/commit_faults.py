"""The commit path with one call to the operating system failing, or the process killed at it, and what must hold then.

``python tests/commit_faults.py ROOT INCOMING`` walks the path once: exit status 0, or 1 with the error on stderr.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import AlreadyExistsError, EvenshardError
from pipeline.ingest.commit import commit, probe
from pipeline.snapshot import decode_record, encode_record, newest_number, open_snapshot
from pipeline.store import Store

CALLS = ("open", "write", "fsync", "link", "unlink", "mkdir", "replace", "utime", "rmdir")
"""What changes a disk, as functions of ``os``; ``open`` counts where it creates."""

ERRORS = ("EIO", "ENOSPC", "EACCES")
KILLS = ("killed before", "killed after")

_ONE = {"train": (9, 2, 1), "val": (0, 0, 0), "test": (2, 1, 0)}
_TWO = {"train": (9, 3, 1), "val": (0, 0, 0), "test": (2, 1, 0)}


def prepare(folder: Path) -> tuple[Path, Path]:
    """A ROOT with snapshot 1, and a folder with what snapshot 2 needs: its files, and its record as record.json."""
    from tiny_snapshot import write_snapshot  # it needs torch, and the walk under strace should not

    first = write_snapshot(folder / "root", _ONE, {"natural": "natural"})
    second = write_snapshot(folder / "incoming", _TWO, {"natural": "natural"})
    record = replace(second.record, number=2, parent=first.id)
    shutil.rmtree(folder / "incoming/snapshots")
    (folder / "incoming/record.json").write_bytes(encode_record(record))
    return folder / "root", folder / "incoming"


def walk(root: str, incoming: Path, tell: Callable[[str], None] = lambda path: None) -> None:
    """What a build does to storage, one thing after the other; ``tell`` hears the file that each is about."""
    tell("staging")
    store = Store.open(root, create=True)
    tell("staging/probe-")
    probe(store)
    files = sorted(str(path.relative_to(incoming)) for path in incoming.rglob("*") if path.is_file())
    for path in files:
        if path == "record.json":
            continue
        tell(path)
        data = (incoming / path).read_bytes()
        if path.endswith(".tar"):
            _put_as_unit(store, path, data, tell)
        else:
            store.put(path, data)
    tell("runs/units/ab/unit.json")
    with suppress(AlreadyExistsError):
        store.create("runs/units/ab/unit.json", b"{}")
    tell("runs/sources/notes.listing")
    store.replace("runs/sources/notes.listing", b"notes")
    tell("snapshots/00000002.json")
    commit(store, decode_record((incoming / "record.json").read_bytes(), "record.json"))


def _put_as_unit(store: Store, path: str, data: bytes, tell: Callable[[str], None]) -> None:
    tell("staging")
    folder = store.staging_dir()
    try:
        local = os.path.join(folder, "unit.tar")
        try:
            with open(local, "xb") as file:
                file.write(data)
        except OSError as error:  # the shard writer's own file; it names it by itself
            raise EvenshardError(f"cannot write {local}: {error}") from error
        tell(path)
        store.put_file(path, local)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Fault:
    """Call number ``at`` below ROOT fails, or the process is killed just before it or just after."""

    at: int
    kind: str  # one of ERRORS or KILLS


class Layer:
    """Counts the calls of ``os`` that change something below ROOT, and makes one of them fail."""

    def __init__(self, root: str, fault: Fault | None) -> None:
        self.calls: list[str] = []
        self._root, self._fault = root, fault
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            if not self._counts(name, arguments):
                return call(*arguments, **more)
            self.calls.append(name)
            fault = self._fault
            if fault is None or fault.at != len(self.calls) - 1:
                return call(*arguments, **more)
            if fault.kind == "killed before":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.kind == "killed after":
                call(*arguments, **more)
                os.kill(os.getpid(), signal.SIGKILL)
            number = getattr(errno, fault.kind)
            raise OSError(number, os.strerror(number))

        return wrapped

    def _counts(self, name: str, arguments: tuple[Any, ...]) -> bool:
        if name == "open" and not arguments[1] & os.O_CREAT:
            return False
        target = arguments[0]
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        return str(path).startswith(self._root)


@dataclass(frozen=True)
class Outcome:
    """How a walk ended. ``about`` is the file it was busy with, ``error`` what it said."""

    killed: bool
    done: bool
    error: str
    about: str
    calls: tuple[str, ...] = ()


def walk_apart(root: Path, incoming: Path, fault: Fault | None, notes: Path) -> Outcome:
    """A walk in a process of its own."""
    notes.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _be_child(root, incoming, fault, notes)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return Outcome(killed=True, done=False, error="", about="")
    told = json.loads(notes.read_text())
    return Outcome(
        killed=False, done=not told["error"], error=told["error"], about=told["about"], calls=tuple(told["calls"])
    )


def _be_child(root: Path, incoming: Path, fault: Fault | None, notes: Path) -> None:
    about: list[str] = [""]
    error = ""
    layer = Layer(str(root), fault)
    try:
        walk(str(root), incoming, lambda path: about.__setitem__(0, path))
    except EvenshardError as problem:
        error = f"{type(problem).__name__}: {problem}"
    except BaseException as problem:
        error = f"not ours: {problem!r}"
    notes.write_text(json.dumps({"error": error, "about": about[0], "calls": layer.calls}))
    os._exit(0)


def contents(root: Path) -> dict[str, str]:
    """Path and SHA-256 of everything outside staging/."""
    files = (path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] != "staging")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def problems(root: Path, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    """What is wrong once a walk has ended; ``before`` and ``after`` are the contents around an undisturbed one."""
    found = contents(root)
    for path, digest in found.items():
        if after.get(path) != digest:
            yield f"{path} is torn, or should not be there"
    if lost := before.keys() - found.keys():
        yield f"lost: {sorted(lost)}"
    if outcome.done and found != after:
        yield "it said that it was done, and was not"
    newest = newest_number(Store(str(root)))
    snapshot = open_snapshot(root, newest)
    for row in range(snapshot.record.samples["train"].num_rows):
        snapshot.read_image("train", row)
    if newest == 2 and outcome.error:
        yield f"published, and an error all the same: {outcome.error}"
    if outcome.error and not (outcome.about in outcome.error and str(root) in outcome.error):
        yield f"the error does not name {outcome.about}: {outcome.error}"
    if outcome.error.startswith("not ours"):
        yield outcome.error


if __name__ == "__main__":
    try:
        walk(sys.argv[1], Path(sys.argv[2]), lambda path: print(path, flush=True))
    except EvenshardError as failed:
        sys.exit(f"{type(failed).__name__}: {failed}")
