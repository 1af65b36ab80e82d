"""Units on workers that are lost: the same promises on Ray and on processes of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import crew_tasks
import pytest
from independent_checker import digests_of

import pipeline
from pipeline.errors import EngineError, IntegrityError
from pipeline.ingest import crew
from pipeline.ingest.engines import Engine, open_engine
from pipeline.ingest.pool import Pool


@pytest.fixture(params=["pool", "ray"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "ray":
        request.getfixturevalue("local_ray")
    with open_engine(address="none" if request.param == "pool" else "local", workers=2) as opened:
        yield opened


def results(engine: Engine, function: Callable[..., Any], *arguments: tuple[Any, ...]) -> tuple[int, list[str]]:
    """How many images were told of in all, and the sorted results."""
    items = list(engine.map(function, ((f"unit {number}", each) for number, each in enumerate(arguments))))
    return sum(item for item in items if isinstance(item, int)), sorted(i for i in items if isinstance(i, str))


def test_every_unit_gives_its_result_once(engine: Engine) -> None:
    done, told = results(engine, crew_tasks.count, *((number,) for number in range(20)))
    assert (done, told) == (190, sorted(f"{number} at attempt 1" for number in range(20)))


def test_a_lost_worker_costs_an_attempt_and_takes_back_what_it_told(engine: Engine) -> None:
    done, told = results(engine, crew_tasks.die_until, (3, 10), (1, 20), (2, 30))
    assert (done, told) == (60, ["10 at attempt 3", "20 at attempt 1", "30 at attempt 2"])


def test_a_unit_that_always_loses_its_worker_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "MAX_ATTEMPTS", 2)
    with pytest.raises(EngineError, match=r"unit 0 lost its worker 2 times: .*run the same command again"):
        results(engine, crew_tasks.die_until, (9, 10))


def test_an_error_of_ours_is_raised_as_itself_and_others_name_the_unit(engine: Engine) -> None:
    with pytest.raises(IntegrityError, match="that shard is damaged"):
        results(engine, crew_tasks.damaged, ())
    with pytest.raises(EngineError, match=r"unit 0 failed after 4 attempts: KeyError\('x'\)"):
        results(engine, crew_tasks.fail_with, (KeyError("x"),))


def test_storage_trouble_is_tried_again_in_the_same_worker(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"failed after 4 attempts: OSError"):
        results(engine, crew_tasks.fail_with, (OSError(5, "trouble"),))


def test_time_is_told_while_nothing_comes(engine: Engine, tmp_path: Path) -> None:
    with closing(engine.map(crew_tasks.run_on, [("slow", (str(tmp_path),))])) as items:
        assert next(items) == 0


def test_workers_of_a_pool_end_with_its_block(tmp_path: Path) -> None:
    with Pool(workers=2) as pool, closing(pool.map(crew_tasks.run_on, [("a", (str(tmp_path),))])) as items:
        while not list(tmp_path.iterdir()):
            next(items)
    assert not any(is_alive(int(path.name)) for path in tmp_path.iterdir())


def test_workers_of_a_pool_end_when_their_driver_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; import crew_tasks; from pipeline.ingest.pool import Pool\n"
        "with Pool(workers=2) as pool: list(pool.map(crew_tasks.run_on, [('a', (sys.argv[1],))]))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths()})
    while not list(tmp_path.iterdir()):
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    worker = int(next(tmp_path.iterdir()).name)
    for _ in range(100):
        if not is_alive(worker):
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on")


def paths() -> str:
    return os.pathsep.join(path for path in sys.path if path)


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.usefixtures("local_ray")
def test_a_pool_builds_the_bytes_that_ray_builds(tiny_images: Path, tmp_path: Path) -> None:
    """B2."""
    source = tmp_path / "photos"
    shutil.copytree(tiny_images, source)
    (source / "apple" / "cut.jpg").write_bytes((source / "apple" / "000.jpg").read_bytes()[:300])
    for address in ("none", "local"):
        pipeline.build(source, tmp_path / address, shard_samples=10, address=address, workers=2)
    assert digests_of(tmp_path / "none") == digests_of(tmp_path / "local")


def test_a_build_without_ray_imports_none(tiny_images: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pipeline\n"
        "print(pipeline.build(sys.argv[1], sys.argv[2]).num_images)\n"
        "assert 'ray' not in sys.modules"
    )  # no guard for __main__ either: workers do not run it
    command = [sys.executable, "-c", code, str(tiny_images), str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths()})
    assert (done.stdout, done.returncode) == ("61\n", 0), done.stderr


@pytest.mark.parametrize(("is_connected", "expected"), [(False, "Pool"), (True, "RayEngine")])
def test_without_a_cluster_no_ray_is_started(
    is_connected: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipeline.ingest.engine.is_running", lambda: is_connected)
    assert type(open_engine(address=None, workers=1)).__name__ == expected


def test_a_cluster_is_used_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(open_engine(address="10.0.0.1:6379", workers=1)).__name__ == "RayEngine"
    assert type(open_engine(address="local", workers=1)).__name__ == "RayEngine"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert type(open_engine(address=None, workers=1)).__name__ == "RayEngine"
    assert type(open_engine(address="none", workers=1)).__name__ == "Pool"
