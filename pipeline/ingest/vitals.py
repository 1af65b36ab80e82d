"""Signs of life: what a running build is doing, for `evenshard status`.

Comes in: the progress of a build. Goes out: one small file in runs/now/, replaced every few seconds while the build
runs, and runs/now/last.json when it has ended, however it did. Guarantees: a build never fails, waits or changes a
byte for it; how old a sign is, is told by the clock of the storage; no text in it holds a credential.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any

from pipeline.errors import EvenshardError
from pipeline.ingest.whoami import Worker, whoami
from pipeline.store import Store, redact

NOW = "runs/now"
LAST = f"{NOW}/last.json"

FIRST_S = 1.0
"""What is over sooner leaves only how it ended."""
EVERY_S = 5.0
DEAD_S = 60.0
"""Twelve signs missed."""
_FORGET_S = 86_400.0
_MAX_ERROR = 1000

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What a build said last. ``silent_s`` is None where the storage does not tell times."""

    worker: Worker
    source: str = ""
    state: str = "running"
    """running, died; or how it ended: done, failed, interrupted."""
    stage: str = ""
    done: int = 0
    total: int = 0
    """0: unknown."""
    per_s: float = 0.0
    left_s: float | None = None
    idle_s: float = 0.0
    """Since the count last moved."""
    rejects: int = 0
    started_s: float = 0.0
    written_s: float = 0.0
    silent_s: float | None = None
    snapshot: int | None = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Stage:
    name: str = ""
    done: int = 0
    total: int = 0
    first: int = 0  # that was done when it began, or before
    begun_s: float = field(default_factory=lambda: time.monotonic())
    moved_s: float = field(default_factory=lambda: time.monotonic())


class Vitals:
    """The ``progress`` of one build, which tells others, too; use as a context manager around the whole build."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._stage = _Stage()
        self._num_rejects = 0
        self._snapshot: int | None = None
        self._store: Store | None = None
        self._source = ""
        self._started_s = time.time()
        self._path = f"{NOW}/{int(self._started_s)}-{os.urandom(4).hex()}.json"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_telling, name="evenshard-vitals", daemon=True)
        self._has_told = False

    def __enter__(self) -> Vitals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        self._over.set()
        self._thread.join()
        self._write(LAST, _state(value), "" if value is None else redact(str(value))[:_MAX_ERROR])
        if self._has_told:
            with suppress(EvenshardError):
                self._store.remove(self._path)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """What ``pipeline.build`` calls its progress."""
        now = self._stage
        if stage != now.name:
            self._stage = _Stage(stage, done, total, done)
        elif done != now.done or total != now.total:
            now.done, now.total, now.moved_s = done, total, time.monotonic()
        if self._progress is not None:
            self._progress(stage, done, total)

    def rejected(self, count: int) -> None:
        """So many more images cannot be used."""
        self._num_rejects += count

    def begin(self, store: Store, source: str) -> None:
        """From here on there is a ROOT to write to."""
        self._store, self._source = store, redact(source)
        self._thread.start()

    def published(self, number: int) -> None:
        """The newest snapshot is this one."""
        self._snapshot = number

    def _keep_telling(self) -> None:
        wait_s = FIRST_S
        while not self._over.wait(wait_s):
            wait_s = EVERY_S
            if not self._has_told:
                self._forget_the_dead()
            self._has_told = True
            self._write(self._path, "running", "")

    def _write(self, path: str, state: str, error: str) -> None:
        stage, now_s = self._stage, time.monotonic()
        spent_s = now_s - stage.begun_s
        per_s = (stage.done - stage.first) / spent_s if spent_s > 0 else 0.0
        left_s = (stage.total - stage.done) / per_s if per_s > 0 and stage.total else None
        sign = Sign(
            worker=whoami(),
            source=self._source,
            state=state,
            stage=stage.name,
            done=stage.done,
            total=stage.total,
            per_s=round(per_s, 1),
            left_s=None if left_s is None else round(left_s, 1),
            idle_s=round(now_s - stage.moved_s, 1),
            rejects=self._num_rejects,
            started_s=int(self._started_s),
            written_s=int(time.time()),
            snapshot=self._snapshot,
            error=error,
        )
        # A disk that is full, a store that is away: the build finds out by itself, and says so.
        with suppress(EvenshardError):
            assert self._store is not None
            self._store.replace(path, json.dumps(sign.to_json(), indent=1, sort_keys=True).encode())

    def _forget_the_dead(self) -> None:
        with suppress(EvenshardError):
            assert self._store is not None
            now_s = self._store.now_s()
            for entry in self._store.entries(NOW):
                if entry.path != LAST and entry.modified_s is not None and entry.modified_s < now_s - _FORGET_S:
                    self._store.remove(entry.path)


def _state(error: BaseException | None) -> str:
    if error is None:
        return "done"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def read_signs(store: Store) -> tuple[tuple[Sign, ...], Sign | None]:
    """The builds that are running, or died since the last one ended; and the one that ended last."""
    entries = {entry.path: entry for entry in store.entries(NOW)}
    now_s = _now_s(store)
    found = {path: _read(store, path, _silent_s(entry.modified_s, now_s)) for path, entry in entries.items()}
    last = found.pop(LAST, None)
    ended_ago = None if last is None else last.silent_s
    signs = [sign for sign in found.values() if sign is not None]
    return tuple(sign for sign in signs if sign.state == "running" or _is_news(sign, ended_ago)), last


def _is_news(sign: Sign, ended_ago: float | None) -> bool:
    return ended_ago is None or sign.silent_s is None or sign.silent_s < ended_ago


def _now_s(store: Store) -> float:
    try:
        return store.now_s()
    except EvenshardError:
        return time.time()  # a ROOT that can only be read: this machine's clock has to do


def _silent_s(modified_s: float | None, now_s: float) -> float | None:
    return None if modified_s is None else round(max(0.0, now_s - modified_s), 1)


def _read(store: Store, path: str, silent_s: float | None) -> Sign | None:
    """None for a file that went away, or holds something else."""
    try:
        facts: dict[str, Any] = json.loads(store.read(path))
        facts |= {"worker": Worker.from_json(facts["worker"]), "silent_s": silent_s}
        sign = Sign(**facts)
        is_dead = sign.state == "running" and silent_s is not None and silent_s > DEAD_S
    except (EvenshardError, ValueError, TypeError, KeyError):
        return None
    return replace(sign, state="died") if is_dead else sign
