"""Units of work on Ray: bounded window, retries, and errors that name the unit. The only module that imports Ray.

Comes in: a generator function and its arguments, one tuple per unit. It yields the number of images done since it
last yielded, then its result. Goes out: those numbers as they come, and results in the order they finish. Guarantees:
at most a few units per CPU are in flight; a crashed worker is retried by Ray, a failing storage call by us; what still
fails ends the build by name. Results are small facts, never image bytes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from pipeline.errors import EngineError, EvenshardError, MissingExtraError, StoreError

# `uv run` would otherwise make Ray package and upload the working directory for every driver.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ours use no GPU; this keeps Ray from announcing that it will stop hiding them.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:  # pragma: no cover - exercised by the base-install check
    raise MissingExtraError("building needs Ray, which is not installed: pip install 'evenshard[build]'") from error

WINDOW_PER_CPU = 3
"""Enough that no worker waits for the driver, few enough that a failure stops the build early."""

MAX_ATTEMPTS = 4

START_ATTEMPTS = 3
_BUSY = "timed out during startup"  # Ray allows its own processes 30 s, which a busy machine can exceed
_TRANSIENT = (OSError, StoreError)


UnitFunction = Callable[..., Iterator[Any]]


def _attempt(function: UnitFunction, arguments: tuple[Any, ...]) -> Iterator[Any]:
    """Run one unit inside a worker. Ray retries crashes, not exceptions, so storage trouble is retried here."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        done = 0
        try:
            for item in function(*arguments):
                done += item if isinstance(item, int) else 0
                yield item
            return
        except _TRANSIENT:
            if attempt == MAX_ATTEMPTS:
                raise
            yield -done  # it starts over
            time.sleep(0.2 * 4 ** (attempt - 1))


class Engine:
    """A connection to a Ray cluster, or a private local Ray for the time of a ``with`` block."""

    def __init__(self, *, address: str | None = None, workers: int | None = None) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._workers = workers
        self._owns_ray = False

    def __enter__(self) -> Engine:
        if ray.is_initialized():
            return self
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self._address in (None, "local"):
            # A plain init() would join whatever cluster runs on this machine.
            options |= {
                "address": "local",
                "num_cpus": self._workers or os.cpu_count(),
                "include_dashboard": False,
                "object_store_memory": 128 << 20,  # units return facts, never bytes
            }
        else:
            options["address"] = self._address
        self._connect(options)
        self._owns_ray = True
        return self

    def _connect(self, options: dict[str, Any]) -> None:
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                ray.init(**options)
                return
            except Exception as error:  # Ray raises bare Exceptions here
                ray.shutdown()
                if attempt == START_ATTEMPTS or _BUSY not in str(error):
                    where = self._address or "a local Ray"
                    raise EngineError(f"could not start or reach {where}: {error}") from error

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    def num_cpus(self) -> int:
        """CPUs of the cluster now; nodes come and go."""
        present = max(1, int(ray.cluster_resources().get("CPU", 1)))
        return min(present, self._workers) if self._workers else present

    def map(self, function: UnitFunction, units: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterator[Any]:
        """Run ``function(*arguments)`` for each ``(name, arguments)`` and yield what it yields, as it comes.

        A zero is yielded whenever a second has passed without anything, so that callers can show that time passes.
        Errors: ``EngineError`` naming the unit; an ``EvenshardError`` of the function is raised as itself.
        """
        task = ray.remote(num_cpus=1, max_retries=MAX_ATTEMPTS - 1, num_returns="streaming")(_attempt)
        pending: dict[Any, str] = {}  # streams of running units
        waiting = iter(units)
        exhausted = False
        try:
            while pending or not exhausted:
                window = self._window()
                while not exhausted and len(pending) < window:
                    unit = next(waiting, None)
                    if unit is None:
                        exhausted = True
                        break
                    name, arguments = unit
                    pending[task.remote(function, arguments)] = name
                if not pending:
                    break
                ready: list[Any] = ray.wait(list(pending), num_returns=1, timeout=1.0)[0]
                if not ready:
                    yield 0
                for stream in ready:
                    reference = next(stream, None)
                    if reference is None:
                        del pending[stream]
                    else:
                        yield self._result(reference, pending[stream])
        finally:
            for stream in pending:
                ray.cancel(stream, force=False)

    def _window(self) -> int:
        # With an explicit number of workers on a larger cluster, the window itself is the limit.
        cpus = self.num_cpus()
        return cpus if self._workers and not self._owns_ray else cpus * WINDOW_PER_CPU

    @staticmethod
    def _result(reference: Any, name: str) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if hasattr(error, "cause") else None
            if isinstance(cause, EvenshardError):
                raise cause from None
            raise EngineError(f"unit {name} failed after {MAX_ATTEMPTS} attempts: {cause or error}") from error
        except RayError as error:
            raise EngineError(
                f"unit {name} lost its worker {MAX_ATTEMPTS} times: {error}. "
                "Finished units are kept: run the same command again to go on from here"
            ) from error
