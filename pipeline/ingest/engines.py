"""Which engine runs the units: Ray where there is a cluster, processes of this machine where there is none.

Comes in: an address. Goes out: an `Engine`. Guarantees: the choice changes no byte of what is built; Ray is imported
only where it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pipeline.ingest.crew import UnitFunction
from pipeline.ingest.meters import Metric
from pipeline.ingest.pool import Pool

NO_RAY = "none"
"""The address that stands for no Ray at all."""

POOL_START_S, RAY_START_S = 0.25, 5.0
"""Rough: a worker's imports; a private Ray, of whose start on two cores 6 to 9 s were measured. They decide no byte."""


class Engine(Protocol):
    """What runs units."""

    def prepare(self) -> None:
        """There will be units soon."""
        ...

    def map(
        self, function: UnitFunction, units: Iterable[tuple[str, tuple[Any, ...]]], stage: str = "unit"
    ) -> Iterator[Any]:
        """See `crew.run_units`."""
        ...

    def note(self, metric: Metric, value: float, **labels: str) -> None:
        """See `crew.Crew.note`."""
        ...


def open_engine(
    *, address: str | None, workers: int | None, allow_open: bool = False
) -> AbstractContextManager[Engine]:
    """The engine to work with.

    ``address``: 'none' for processes of this machine, 'local' for a private Ray, or a cluster's; by default what
    $RAY_ADDRESS says (as it does within a Ray job), else a Ray that this process is connected to, else processes: on
    one machine a private Ray does nothing that they do not, and takes seconds to start. ``allow_open``: also a cluster
    that answers without a token from elsewhere, which is refused otherwise (`ingest.exposure`).
    """
    chosen = _chosen(address)
    if chosen == NO_RAY:
        return Pool(workers=workers)
    from pipeline.ingest.engine import RayEngine

    return RayEngine(address=chosen, workers=workers, allow_open=allow_open)


def start_s(address: str | None) -> float:
    """About how long the engine takes until it works, in seconds; asking starts nothing."""
    return POOL_START_S if _chosen(address) == NO_RAY else RAY_START_S


def _chosen(address: str | None) -> str | None:
    """``NO_RAY``, an address, or None for the Ray that this process is connected to."""
    chosen = address or os.environ.get("RAY_ADDRESS")
    if chosen is not None:
        return chosen
    if "ray" not in sys.modules:
        return NO_RAY
    from pipeline.ingest.engine import is_running

    return None if is_running() else NO_RAY
