"""What a running build tells Ray and Prometheus: names, memory, counts."""

from __future__ import annotations

import re
import shutil
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import crew_tasks
import pytest
from deploy_checks import OUR_METRICS, RAY_METRICS

from pipeline import build
from pipeline.ingest.engine import UNIT_MEMORY_BYTES, RayEngine
from pipeline.ingest.meters import BYTES, IMAGES, METRICS, REJECTS, RETRIES, UNIT_SECONDS, UNITS_LOST, Metric
from pipeline.ingest.pool import Pool


class Noting(Pool):
    """A pool that keeps what others throw away."""

    def __init__(self) -> None:
        super().__init__(workers=1)
        self.noted: list[tuple[Metric, float, dict[str, str]]] = []

    def note(self, metric: Metric, value: float, **labels: str) -> None:
        assert tuple(labels) == metric.labels, metric
        self.noted.append((metric, value, labels))

    def total(self, metric: Metric) -> float:
        return sum(value for noted, value, _ in self.noted if noted is metric)


@pytest.fixture
def noting() -> Iterator[Noting]:
    with Noting() as pool:
        yield pool


def test_a_lost_worker_is_counted_and_only_the_attempt_that_ended_is_timed(noting: Noting) -> None:
    list(noting.map(crew_tasks.die_until, [("a", (3, 10)), ("b", (1, 10))], "read"))
    assert noting.total(UNITS_LOST) == 2
    assert [value > 0.05 for metric, value, _ in noting.noted if metric is UNIT_SECONDS] == [True, True]
    assert {labels["stage"] for _, _, labels in noting.noted} == {"read"}


def test_storage_trouble_is_counted_and_its_seconds_with_it(noting: Noting, tmp_path: Path) -> None:
    items = list(noting.map(crew_tasks.fail_once, [("a", (str(tmp_path),))], "read"))
    assert items == [1, -1, 1, "done"]  # what was spent is for the engine alone
    assert (noting.total(RETRIES), noting.total(UNITS_LOST)) == (1, 0)
    assert noting.total(UNIT_SECONDS) >= 0.2  # the pause before the second trial


def test_what_was_read_is_counted_by_reason(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: Counter[tuple[str, str]] = Counter()
    monkeypatch.setattr(
        Pool, "note", lambda self, metric, value, **labels: noted.update({(metric.name, *labels.values()): value})
    )
    source = with_a_broken_image(tiny_images, tmp_path / "source")
    build(source, tmp_path / "root", address="none", workers=1)
    assert noted[IMAGES.name, "read"] == 62
    assert noted[UNIT_SECONDS.name, "read"] > 0
    assert noted[BYTES.name, "read"] == sum(path.stat().st_size for path in source.rglob("*.*"))
    assert {key: count for key, count in noted.items() if key[0] == REJECTS.name} == {(REJECTS.name, "truncated"): 1}
    before = noted.copy()
    build(source, tmp_path / "root", address="none", workers=1)
    assert noted == before  # a second build reads nothing, and says so


def with_a_broken_image(images: Path, source: Path) -> Path:
    shutil.copytree(images, source)
    whole = next((source / "apple").glob("*.jpg")).read_bytes()
    (source / "apple" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    return source


@pytest.mark.usefixtures("local_ray")
def test_ray_knows_the_unit_the_attempt_and_the_memory() -> None:
    with RayEngine(address="local", workers=2) as engine:
        told = [item for item in engine.map(crew_tasks.die_then_tell, [("train/01", ())], "read") if item]
    assert told == [f"read train/01 attempt 2: {UNIT_MEMORY_BYTES} bytes"]


@pytest.mark.usefixtures("local_ray")
def test_a_unit_asks_for_no_more_memory_than_a_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.ingest import engine as engines

    monkeypatch.setattr(engines, "UNIT_MEMORY_BYTES", 1 << 45)
    with RayEngine(address="local", workers=2) as engine, closing(engine.map(crew_tasks.count, [("a", (7,))])) as items:
        told = list(islice(items, 20))  # a zero a second while nothing comes
    assert "7 at attempt 1" in told


@pytest.mark.usefixtures("local_ray")
def test_units_spread_over_the_nodes() -> None:
    from pipeline.ingest.engine import _RayCrew

    options: dict[str, Any] = _RayCrew(lambda: 1, lambda *_: None)._run._default_options
    assert options["scheduling_strategy"] == "SPREAD"


def exported_by_ray() -> str:
    """What Prometheus gets from Ray's agent on this node."""
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def scraped() -> dict[str, float]:
    """Sum of each exported series of ours over its labels but for the reason."""
    totals: Counter[str] = Counter()
    for line in exported_by_ray().splitlines():
        if match := re.fullmatch(r"(ray_evenshard_\w+)\{(.*)\} (\S+)", line):
            reason = re.search(r'reason="([^"]*)"', match[2])
            totals[match[1] + (f":{reason[1]}" if reason else "")] += float(match[3])
    return dict(totals)


@pytest.mark.usefixtures("local_ray")
def test_a_build_on_ray_is_seen_by_prometheus(tiny_images: Path, tmp_path: Path) -> None:
    source = with_a_broken_image(tiny_images, tmp_path / "source")
    with RayEngine(address="local", workers=2) as engine:  # what a healthy build never counts
        engine.note(RETRIES, 1, stage="test")
        engine.note(UNITS_LOST, 1, stage="test")
        build(source, tmp_path / "root", address="local")
        wanted = {name for metric in METRICS for name in metric.exported if metric is not REJECTS}
        wanted.add(f"{REJECTS.exported[0]}:truncated")
        seen: dict[str, float] = {}
        deadline = time.monotonic() + 60  # Ray exports every ten seconds
        while not wanted <= seen.keys() and time.monotonic() < deadline:
            time.sleep(0.5)
            seen = scraped()
    assert wanted <= seen.keys()
    assert seen["ray_evenshard_images_total"] >= 62
    assert unlabelled(OUR_METRICS) == []
    assert {name.partition(":")[0] for name in seen} == {name for metric in METRICS for name in metric.exported}


@pytest.mark.usefixtures("local_ray")
def test_ray_exports_what_the_dashboard_and_the_alerts_ask_it_for() -> None:
    deadline = time.monotonic() + 60
    while (missing := unlabelled(RAY_METRICS)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert missing == []


def unlabelled(metrics: dict[str, set[str]]) -> list[str]:
    """Those of ``metrics`` that Ray does not export, or without one of these labels."""
    series = re.findall(r"^(\w+)\{(.*)\} \S+$", exported_by_ray(), re.MULTILINE)
    labels = {name: set(re.findall(r'(\w+)="', text)) for name, text in series}
    return [name for name, used in metrics.items() if not used <= labels.get(name, set())]
