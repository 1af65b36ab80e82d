"""Units of work on Ray. The only module that imports Ray.

Comes in: units (`ingest.crew`). Goes out: what they yield. Guarantees: those of `run_units`; a private Ray ends with
the block that started it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import TracebackType
from typing import Any

from pipeline.errors import EngineError, MissingExtraError, UsageError
from pipeline.ingest.crew import Ended, Event, Failed, Item, Lost, Task, UnitFunction, run_units, work
from pipeline.ingest.exposure import refuse_dashboard, refuse_open
from pipeline.ingest.meters import Metric
from pipeline.store import redact

# `uv run` would otherwise make Ray package and upload the working directory for every driver.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ours use no GPU; this keeps Ray from announcing that it will stop hiding them.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.metrics import Counter, Histogram
except ImportError as error:  # pragma: no cover - exercised by the base-install check
    raise MissingExtraError("building needs Ray, which is not installed: pip install 'evenshard[build]'") from error

WINDOW_PER_CPU = 3
"""Enough that no worker waits for the driver, few enough that a failure stops the build early."""

UNIT_MEMORY_BYTES = 512 << 20
"""What a unit declares to Ray, so that no more of them start on a node than fit. Measured: 106 MiB for 2,000 small
images, 164 to 212 of 12 megapixels, 377 for a PNG at the default limit of 50 (docs/LOG.md)."""

START_ATTEMPTS = 3
_BUSY = "timed out during startup"  # Ray allows its own processes 30 s, which a busy machine can exceed


def is_running() -> bool:
    """Whether this process is connected to a Ray."""
    return ray.is_initialized()


class RayEngine:
    """A connection to a Ray cluster, or a private local Ray for the time of a ``with`` block."""

    def __init__(self, *, address: str | None = None, workers: int | None = None, allow_open: bool = False) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._workers = workers
        self._allow_open = allow_open
        self._owns_ray = False

    def __enter__(self) -> RayEngine:
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
            self._connect(options)
        else:
            self._join(self._address, options | {"address": self._address})
        self._owns_ray = True
        return self

    def _join(self, address: str, options: dict[str, Any]) -> None:
        """Connect to a cluster of others, if it asks for a token or is allowed not to."""
        if not self._allow_open:
            refuse_open(address)
        refuse_dashboard(address)
        dashboard = self._connect(options)
        if address.startswith("ray://"):
            ray.shutdown()
            raise UsageError(
                f"{redact(address)} is a client server, through which tasks cannot tell what they do: submit a job "
                "(`ray job submit --working-dir . -- python -m jobs.build ...`), or name HOST:6379 on a machine "
                "of the cluster"
            )
        if not self._allow_open:
            try:
                refuse_open(ray.get_runtime_context().gcs_address)  # that of 'auto' is known only now
                if dashboard:
                    refuse_open(f"http://{dashboard}")  # TLS, if it is on, does not protect it
            except EngineError:
                ray.shutdown()
                raise

    def _connect(self, options: dict[str, Any]) -> str:
        """Returns HOST:PORT of the dashboard, '' if there is none."""
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                return ray.init(**options).dashboard_url or ""
            except Exception as error:  # Ray raises bare Exceptions here
                ray.shutdown()
                if attempt == START_ATTEMPTS or _BUSY not in str(error):
                    where = redact(self._address or "a local Ray")
                    raise EngineError(f"could not start or reach {where}: {redact(str(error))}") from error
        raise AssertionError("the last attempt returns or raises")

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

    def prepare(self) -> None:
        """Nothing: Ray starts workers when there are tasks."""

    def map(
        self, function: UnitFunction, units: Iterable[tuple[str, tuple[Any, ...]]], stage: str = "unit"
    ) -> Iterator[Any]:
        """`run_units` on this Ray."""
        return run_units(_RayCrew(self._window, self.note), function, units, stage)

    def note(self, metric: Metric, value: float, **labels: str) -> None:
        """Add to what this driver's node exports; Prometheus has it within 10 s."""
        if metric.bounds:
            _histogram(metric).observe(value, tags=labels)
        elif value > 0:  # Ray's counters take nothing else
            _counter(metric).inc(value, tags=labels)

    def _window(self) -> int:
        # With an explicit number of workers on a larger cluster, the window itself is the limit.
        cpus = self.num_cpus()
        return cpus if self._workers and not self._owns_ray else cpus * WINDOW_PER_CPU


class _RayCrew:
    """A `Crew` of Ray tasks; what is known of each is its stream of results."""

    def __init__(self, capacity: Callable[[], int], note: Callable[..., None]) -> None:
        self.capacity, self.note = capacity, note
        # Ray would repeat a lost task as it was; ours is to know that it is not the first.
        self._run = ray.remote(
            num_cpus=1,
            memory=_unit_memory_bytes(),
            max_retries=0,
            num_returns="streaming",
            scheduling_strategy="SPREAD",  # a node more is a disk and a network more
        )(work)
        self._streams: set[Any] = set()

    def start(self, task: Task) -> Any:
        stream = self._run.options(name=f"{task.title} attempt {task.attempt}").remote(task)
        self._streams.add(stream)
        return stream

    def events(self, wait_s: float) -> list[tuple[Any, Event]]:
        ready: list[Any] = ray.wait(list(self._streams), num_returns=1, timeout=wait_s)[0]
        return [(stream, self._next(stream)) for stream in ready]

    def cancel(self) -> None:
        for stream in self._streams:
            ray.cancel(stream, force=False)

    def _next(self, stream: Any) -> Event:
        event: Event = Ended()
        try:
            reference = next(stream, None)
            if reference is not None:
                return Item(ray.get(reference))
        except RayTaskError as error:
            event = Failed(error.cause if isinstance(getattr(error, "cause", None), Exception) else error)
        except RayError as error:
            event = Lost(str(error))
        self._streams.discard(stream)
        return event


def _unit_memory_bytes() -> int:
    """What a unit declares: never more than the largest node has, for which it would wait without end."""
    nodes = (node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    return int(min(UNIT_MEMORY_BYTES, max(nodes, default=0)))


@cache
def _counter(metric: Metric) -> Counter:
    return Counter(metric.name, description=metric.description, tag_keys=metric.labels)


@cache
def _histogram(metric: Metric) -> Histogram:
    return Histogram(
        metric.name, description=metric.description, boundaries=list(metric.bounds), tag_keys=metric.labels
    )
