"""Units through the engine: what was finished before is found, the rest is done.

Comes in: a task function and its units. Goes out: their records, in the order of the units. Guarantees: workers, and
Ray, are started only if something is to be done, and once; progress is told at least every second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from itertools import chain
from types import TracebackType
from typing import Any

from pipeline.config import BuildConfig
from pipeline.ingest.commit import GRACE_S
from pipeline.ingest.containers import ContainerUnit
from pipeline.ingest.engines import Engine, open_engine, start_s
from pipeline.ingest.exposure import OPEN_CLUSTER
from pipeline.ingest.meters import BYTES, IMAGES, REJECTS
from pipeline.ingest.units import Repack, Reusable, Unit, UnitFunction, UnitRecord, find_unit_record
from pipeline.ingest.vitals import Vitals
from pipeline.snapshot import Snapshot
from pipeline.store import Store

Progress = Callable[[str, int, int], None]
"""Called with (stage, images done, images in all), at least every second while units run."""


class Work:
    """One engine for all units of a build."""

    def __init__(self, config: BuildConfig, store: Store, parent: Snapshot | None, notify: Progress) -> None:
        self._config, self._store, self._parent, self._notify = config, store, parent, notify
        self._open = ExitStack()
        self._started: Engine | None = None
        self._num_shared = 0

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def run(
        self,
        stage: str,
        function: UnitFunction,
        units: Iterator[Unit | Repack | ContainerUnit],
        rest: tuple[Any, ...],
        total: int,
    ) -> list[UnitRecord]:
        """Do ``function(root, unit, *rest)`` for every unit that is not done yet; ``total`` images, 0: unknown."""
        finished: dict[str, UnitRecord] = {}
        order: list[str] = []
        done = 0

        def pending() -> Iterator[tuple[str, tuple[Any, ...]]]:
            nonlocal done
            for unit in units:
                order.append(unit.digest)
                if (record := find_unit_record(self._store, unit.digest, self._reusable)) is not None:
                    finished[unit.digest] = record
                    done += unit.num_members
                    continue
                yield unit.name, (self._store.root, unit, *rest)

        waiting = pending()
        first = next(waiting, None)
        if first is not None:
            engine = self._engine()
            self._notify(stage, done, total)
            for item in engine.map(function, chain([first], waiting), stage):
                if isinstance(item, UnitRecord):
                    finished[item.digest] = item
                    _note(engine, item, stage)
                    if isinstance(self._notify, Vitals):
                        self._notify.rejected(len(item.rejects))
                else:
                    done += item
                self._notify(stage, done, total)
        return [finished[digest] for digest in order]

    def share(
        self, function: UnitFunction, units: Iterable[tuple[str, tuple[Any, ...]]], stage: str = "list"
    ) -> Iterator[Any]:
        """Do ``function`` for every unit, (name, arguments), and yield the results in any order; nothing is kept."""
        for item in self._engine().map(function, units, stage):
            if isinstance(item, int):
                self._num_shared += item
                self._notify(stage, self._num_shared, 0)
            else:
                yield item

    @cached_property
    def _reusable(self) -> Reusable:
        kept = frozenset(self._parent.files()) if self._parent is not None else frozenset[str]()
        return Reusable(kept, self._store.now_s() - GRACE_S / 2)

    @property
    def start_s(self) -> float:
        """About how long it takes until somebody works."""
        return 0.0 if self._started is not None else start_s(self._config.address)

    def prepare(self) -> None:
        """Workers will be wanted soon."""
        self._engine().prepare()

    def _engine(self) -> Engine:
        if self._started is None:
            self._notify("start", 0, 0)
            config = self._config
            opened = open_engine(
                address=config.address, workers=config.workers, allow_open=OPEN_CLUSTER in config.allow
            )
            self._started = self._open.enter_context(opened)
        return self._started


def _note(engine: Engine, record: UnitRecord, stage: str) -> None:
    """What was read, for those who watch; repacking reads none from the source."""
    if not record.num_images:
        return
    engine.note(IMAGES, record.num_images, stage=stage)
    engine.note(BYTES, record.num_bytes, stage=stage)
    for reason, count in Counter(reason for _, reason, _, _ in record.rejects).items():
        engine.note(REJECTS, count, reason=reason)
