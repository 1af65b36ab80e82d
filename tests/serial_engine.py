"""An engine without Ray, for tests that build hundreds of times: units run one after the other in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest


class SerialEngine:
    """Counts the units that it ran, by task."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def prepare(self) -> None: ...

    def map(
        self, function: Callable[..., Iterator[Any]], units: Iterable[tuple[str, tuple[Any, ...]]], stage: str = "unit"
    ) -> Iterator[Any]:
        for name, arguments in units:
            self.ran.append(f"{function.__name__} {name}")
            yield from function(*arguments, attempt=1)

    def note(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def serial_engine(monkeypatch: pytest.MonkeyPatch) -> SerialEngine:
    from pipeline.ingest.work import Work

    engine = SerialEngine()
    monkeypatch.setattr(Work, "_engine", lambda self, *_: engine)
    monkeypatch.setattr(Work, "start_s", property(lambda self: math.inf))  # however slow a listing is: not counted
    return engine
