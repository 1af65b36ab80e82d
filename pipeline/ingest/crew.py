"""Units of work on workers that may be lost: bounded window, retries, and errors that name the unit.

Comes in: a generator function and its arguments, one tuple per unit, and a `Crew` that runs them. The function yields
the number of images done since it last yielded, then its result. Goes out: those numbers as they come, and results in
the order they finish. Guarantees: at most a crew's capacity is in flight; a unit whose worker was lost is tried again
and told so (``attempt``), as is a failing storage call; what still fails ends the build by name; what was lost, tried
again and spent is noted (`ingest.meters`). Results are small facts, never image bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pipeline.errors import EngineError, EvenshardError, StoreError
from pipeline.ingest.meters import RETRIES, UNIT_SECONDS, UNITS_LOST, Metric

MAX_TRIALS = 4
"""Of a unit inside one worker, where storage fails."""

MAX_ATTEMPTS = 10
"""Workers that one unit may cost. A decoder costs no more than the first (`images.isolated`): the rest is for killers
of processes, nodes that go, and memory that runs out."""

_log = logging.getLogger("evenshard.unit")
_log.addHandler(logging.NullHandler())  # whoever wants to hear of units adds another; EVENSHARD_LOG=json does

_TRANSIENT = (OSError, StoreError)

UnitFunction = Callable[..., Iterator[Any]]


@dataclass(frozen=True)
class Task:
    """One attempt at one unit; travels to a worker."""

    function: UnitFunction
    arguments: tuple[Any, ...]
    title: str = "unit"  # the stage and the unit's name
    attempt: int = 1


@dataclass(frozen=True)
class Spent:
    """What a task that came to its end has cost; the last that `work` yields, and for `run_units` alone."""

    seconds: float
    retries: int


def work(task: Task) -> Iterator[Any]:
    """Run a task, inside a worker. Storage trouble is retried here, and what was told of images then taken back."""
    began_s = time.monotonic()
    for trial in range(1, MAX_TRIALS + 1):
        done = 0
        try:
            for item in task.function(*task.arguments, attempt=task.attempt):
                done += item if isinstance(item, int) else 0
                yield item
            yield Spent(time.monotonic() - began_s, trial - 1)
            return
        except _TRANSIENT:
            if trial == MAX_TRIALS:
                raise
            yield -done  # it starts over
            time.sleep(0.2 * 4 ** (trial - 1))


@dataclass(frozen=True)
class Item:
    """What a task yielded."""

    value: Any


@dataclass(frozen=True)
class Ended:
    """A task came to its end."""


@dataclass(frozen=True)
class Failed:
    """A task raised ``error``."""

    error: BaseException


@dataclass(frozen=True)
class Lost:
    """The worker of a task is gone, and its task with it."""

    told: str


Event = Item | Ended | Failed | Lost


class Crew(Protocol):
    """Workers that run tasks."""

    def capacity(self) -> int:
        """How many tasks may be in flight, now."""
        ...

    def start(self, task: Task) -> Any:
        """Start a task, at once or when a worker is free; returns what its events are known by."""
        ...

    def events(self, wait_s: float) -> list[tuple[Any, Event]]:
        """What happened; empty when nothing did for ``wait_s``. Events of one task come in order, the last not Item."""
        ...

    def cancel(self) -> None:
        """Forget every task."""
        ...

    def note(self, metric: Metric, value: float, **labels: str) -> None:
        """Add ``value`` to a metric, where somebody collects them."""
        ...


@dataclass
class _Running:
    name: str
    stage: str
    task: Task
    num_done: int = 0  # images of this attempt
    has_result: bool = False


def run_units(
    crew: Crew, function: UnitFunction, units: Iterable[tuple[str, tuple[Any, ...]]], stage: str = "unit"
) -> Iterator[Any]:
    """Run ``function(*arguments, attempt=n)`` for each ``(name, arguments)`` and yield what it yields, as it comes.

    ``stage`` says what is done to them, for dashboards. A zero is yielded whenever a second has passed without
    anything, so that callers can show that time passes.
    Errors: ``EngineError`` naming the unit; an ``EvenshardError`` of the function is raised as itself.
    """
    running: dict[Any, _Running] = {}
    waiting = iter(units)
    exhausted = False
    try:
        while running or not exhausted:
            while not exhausted and len(running) < crew.capacity():
                unit = next(waiting, None)
                if unit is None:
                    exhausted = True
                else:
                    task = Task(function, unit[1], f"{stage} {unit[0]}")
                    running[crew.start(task)] = _Running(unit[0], stage, task)
            if running:
                yield from _events(crew, running)
    finally:
        if running:
            crew.cancel()


def _events(crew: Crew, running: dict[Any, _Running]) -> Iterator[Any]:
    events = crew.events(1.0)
    if not events:
        yield 0
    for handle, event in events:
        unit = running[handle]
        if isinstance(event, Item) and isinstance(event.value, Spent):
            _note(crew, unit, event.value)
            continue
        if isinstance(event, Item):
            is_count = isinstance(event.value, int)
            unit.num_done += event.value if is_count else 0
            unit.has_result |= not is_count
            yield event.value
            continue
        del running[handle]
        if isinstance(event, Failed):
            _log_unit(logging.ERROR, "failed", unit, why=str(event.error))
            raise _named(unit, event.error) from event.error
        if isinstance(event, Lost) and not unit.has_result:
            crew.note(UNITS_LOST, 1, stage=unit.stage)
            _log_unit(logging.WARNING, "lost its worker", unit, why=event.told)
            yield -unit.num_done  # it starts over
            again = _again(unit, event)
            running[crew.start(again.task)] = again


def _note(crew: Crew, unit: _Running, spent: Spent) -> None:
    crew.note(UNIT_SECONDS, spent.seconds, stage=unit.stage)
    _log_unit(logging.INFO, "is done", unit, images=unit.num_done, seconds=spent.seconds, retries=spent.retries)
    if spent.retries:
        crew.note(RETRIES, spent.retries, stage=unit.stage)


def _log_unit(level: int, what: str, unit: _Running, **facts: Any) -> None:
    facts |= {"unit": unit.name, "stage": unit.stage, "attempt": unit.task.attempt}
    _log.log(level, "unit %s %s, attempt %d", unit.name, what, unit.task.attempt, extra={"facts": facts})


def _again(unit: _Running, lost: Lost) -> _Running:
    task = unit.task
    if task.attempt == MAX_ATTEMPTS:
        raise EngineError(
            f"unit {unit.name} lost its worker {MAX_ATTEMPTS} times: {lost.told}. "
            "Finished units are kept: run the same command again to go on from here"
        )
    return _Running(unit.name, unit.stage, replace(task, attempt=task.attempt + 1))


def _named(unit: _Running, error: BaseException) -> BaseException:
    if isinstance(error, EvenshardError):
        return error
    return EngineError(f"unit {unit.name} failed after {MAX_TRIALS} attempts: {error!r}")
