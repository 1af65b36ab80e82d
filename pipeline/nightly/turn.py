"""Whose turn it is: one nightly run of a ROOT at a time, on any number of machines.

Comes in: a store. Goes out: a ``Turn``, which is a numbered file in runs/nightly/, or the ``Holder`` of the turn that
is under way. Guarantees: a number is created once, so of two that begin at the same moment one gets it; how long an
owner has been silent is told by the clock of the storage, and one that was silent for ``LAPSE_S`` has lost its turn.
The files stay, as the log of the nights.

An owner that sleeps for longer than that and wakes up sees, before its next step, that it lost its turn. Until then
two may run: that wastes work and breaks nothing, because commits and collections may run beside each other
(`ingest.commit`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from pipeline.errors import AlreadyExistsError, EvenshardError, NotFoundError, StoreError
from pipeline.ingest.whoami import Worker, whoami
from pipeline.store import Store

NIGHTS = "runs/nightly"
BEAT_S = 20.0
LAPSE_S = 180.0
"""An owner beats nine times in it; a storage that answers badly for a minute costs nobody the turn."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A nightly run that is under way."""

    number: int
    worker: Worker
    step: str
    silent_s: float
    """Since its last sign of life."""

    def __str__(self) -> str:
        step = f", at step {self.step!r}" if self.step else ""
        return f"{self.worker}{step}, last sign of life {self.silent_s:,.0f} s ago"


def take_turn(store: Store) -> Turn | Holder:
    """This process's turn, or who has it now."""
    newest = _newest(store)
    if newest and (holder := _living(store, newest)):
        return holder
    turn = Turn(store, newest + 1)
    try:
        turn.create()
    except AlreadyExistsError:  # another began in the same moment
        return _living(store, newest + 1) or Holder(
            number=newest + 1, worker=Worker(host="?", process=0), step="", silent_s=0
        )
    return turn


def find_holder(store: Store) -> Holder | None:
    """Who is at work now."""
    newest = _newest(store)
    return _living(store, newest) if newest else None


class Turn:
    """A turn that is held until ``end``, or while a ``with`` block runs and this process lives."""

    def __init__(self, store: Store, number: int) -> None:
        self.number = number
        self._store = store
        self._path = _path(number)
        self._body: dict[str, Any] = {**asdict(whoami()), "started_s": int(time.time()), "step": ""}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, name="evenshard-turn", daemon=True)

    def create(self) -> None:
        """AlreadyExistsError if somebody else has this turn."""
        self._store.create(self._path, self._encoded())

    def __enter__(self) -> Turn:
        self._beat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended.is_set():
            outcome = "interrupted" if isinstance(value, KeyboardInterrupt) else "failed"
            self.end({"outcome": outcome})

    def at(self, step: str) -> None:
        """Note which step begins."""
        self._body["step"] = step
        self._write()

    def lost_to(self) -> Holder | None:
        """Who took the turn meanwhile, because this process was silent for too long."""
        newest = _newest(self._store)
        if newest <= self.number:
            return None
        return _living(self._store, newest) or Holder(
            number=newest, worker=Worker(host="?", process=0), step="ended", silent_s=0
        )

    def end(self, summary: Mapping[str, Any]) -> None:
        """Give the turn back, and leave what came of it."""
        self._ended.set()
        if self._beat.ident is not None:
            self._beat.join()
        self._body |= {"step": "", "ended_s": int(time.time()), "summary": dict(summary)}
        self._write()

    def _keep_alive(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._write()

    def _write(self) -> None:
        # A beat that fails is not the end: the next one may come through, and until LAPSE_S nobody minds.
        with self._lock, suppress(StoreError):
            self._store.replace(self._path, self._encoded())

    def _encoded(self) -> bytes:
        return json.dumps(self._body, indent=1, sort_keys=True).encode()


def _path(number: int) -> str:
    return f"{NIGHTS}/{number:08d}.json"


def _newest(store: Store) -> int:
    names = [path.removeprefix(f"{NIGHTS}/").removesuffix(".json") for path in store.list(NIGHTS)]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _living(store: Store, number: int) -> Holder | None:
    """Who has turn ``number``, if it has not ended and not lapsed."""
    path = _path(number)
    try:
        body: Any = json.loads(store.read(path))
    except NotFoundError:
        return None
    except (EvenshardError, ValueError):
        body = {}  # damaged: its age alone counts
    if isinstance(body, dict) and "ended_s" in body:
        return None
    entry, now_s = store.entry(path), store.now_s()
    if entry is None or entry.modified_s is None:
        return None
    silent_s = max(0.0, now_s - entry.modified_s)
    if silent_s > LAPSE_S:
        return None
    step = body.get("step", "") if isinstance(body, dict) else ""
    return Holder(number=number, worker=Worker.from_json(body), step=str(step), silent_s=silent_s)
