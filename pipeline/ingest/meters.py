"""What a running build counts for Prometheus: every name, in one place.

Comes in: nothing. Goes out: `METRICS`. Guarantees: they are counted where Ray runs (`ingest.engine`) and cost nothing
elsewhere; no label holds a path, a URL or a class name; what the dashboard and the alerts of ``deploy/`` show is here
(`tests/test_deploy_metrics.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A counter; with ``bounds``, a histogram with buckets up to these and beyond."""

    name: str
    description: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names that Prometheus knows it by: Ray puts its own before all, and what kind it is behind."""
        endings = ("_bucket", "_count", "_sum") if self.bounds else ("_total",)
        return tuple(f"ray_{self.name}{ending}" for ending in endings)


IMAGES = Metric("evenshard_images", "Images read by units that finished, good or bad.", ("stage",))
BYTES = Metric("evenshard_bytes", "Bytes of the images read by units that finished.", ("stage",))
REJECTS = Metric("evenshard_rejects", "Images that were read and cannot be used, by reason.", ("reason",))
RETRIES = Metric("evenshard_retries", "Times that failing storage made a unit start over.", ("stage",))
UNITS_LOST = Metric("evenshard_units_lost", "Attempts at a unit whose worker was lost.", ("stage",))
UNIT_SECONDS = Metric(
    "evenshard_unit_seconds",
    "Seconds a unit took in its worker, failed trials included.",
    ("stage",),
    bounds=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
)

METRICS = (IMAGES, BYTES, REJECTS, RETRIES, UNITS_LOST, UNIT_SECONDS)
