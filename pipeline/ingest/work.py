"""Units through the engine: what was finished before is found, the rest is done on Ray.

Comes in: a task function and its units. Goes out: their records, in the order of the units. Guarantees: Ray is imported
and started only if something is to be done, and once; progress is told at least every second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.config import BuildConfig
from pipeline.ingest.containers import ContainerUnit
from pipeline.ingest.units import Repack, Unit, UnitFunction, UnitRecord, find_unit_record
from pipeline.store import Store

if TYPE_CHECKING:
    from pipeline.ingest.engine import Engine

Progress = Callable[[str, int, int], None]
"""Called with (stage, images done, images in all), at least every second while units run."""


class Work:
    """One connection to Ray for all units of a build."""

    def __init__(self, config: BuildConfig, store: Store, notify: Progress) -> None:
        self._config, self._store, self._notify = config, store, notify
        self._open = ExitStack()
        self._started: Engine | None = None

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
        """Do ``function(root, unit, *rest)`` for every unit that is not done yet; ``total`` images in all."""
        finished: dict[str, UnitRecord] = {}
        order: list[str] = []
        done = 0

        def pending() -> Iterator[tuple[str, tuple[Any, ...]]]:
            nonlocal done
            for unit in units:
                order.append(unit.digest)
                if (record := find_unit_record(self._store, unit.digest)) is not None:
                    finished[unit.digest] = record
                    done += unit.num_members
                    continue
                yield unit.name, (self._store.root, unit, *rest)

        waiting = pending()
        first = next(waiting, None)
        if first is not None:
            engine = self._engine()
            self._notify(stage, done, total)
            for item in engine.map(function, chain([first], waiting)):
                if isinstance(item, UnitRecord):
                    finished[item.digest] = item
                else:
                    done += item
                self._notify(stage, done, total)
        return [finished[digest] for digest in order]

    def _engine(self) -> Engine:
        if self._started is None:
            from pipeline.ingest.engine import Engine

            self._notify("start", 0, 0)
            self._started = self._open.enter_context(Engine(address=self._config.address, workers=self._config.workers))
        return self._started
