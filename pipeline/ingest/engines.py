"""Which engine runs the units: processes of this machine while that is quicker than starting Ray, else Ray.

Comes in: an address and how much there is to do. Goes out: an `Engine`. Guarantees: the choice changes no byte of what
is built; Ray is imported only where it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pipeline.ingest.crew import UnitFunction
from pipeline.ingest.pool import Pool

NO_RAY = "none"
"""The address that stands for no Ray at all."""

SMALL_IMAGES = 20_000


class Engine(Protocol):
    """What runs units."""

    def map(self, function: UnitFunction, units: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterator[Any]:
        """See `crew.run_units`."""
        ...


def open_engine(*, address: str | None, workers: int | None, num_images: int) -> AbstractContextManager[Engine]:
    """The engine for ``num_images``.

    ``address``: 'none' for processes of this machine, 'local' for a private Ray, or a cluster's; by default what
    $RAY_ADDRESS says, else a Ray that runs in this process already, else processes if the work is small, else a
    private Ray.
    """
    chosen = address or os.environ.get("RAY_ADDRESS")
    is_small = num_images <= SMALL_IMAGES
    if chosen == NO_RAY or (chosen is None and is_small and "ray" not in sys.modules):
        return Pool(workers=workers)
    from pipeline.ingest.engine import RayEngine, is_running

    if chosen is None and is_small and not is_running():
        return Pool(workers=workers)
    return RayEngine(address=chosen, workers=workers)
