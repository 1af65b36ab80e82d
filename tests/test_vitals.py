"""Signs of life of a build: what others see of it while it runs, when it has ended, and when it died."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serial_engine import SerialEngine, serial_engine

import pipeline
from pipeline.cli import cli, run
from pipeline.errors import CommitError, StoreError
from pipeline.ingest import vitals
from pipeline.ingest.vitals import LAST, Vitals, read_signs
from pipeline.ingest.whoami import ray_job, whoami
from pipeline.store import Store

__all__ = ["serial_engine"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "root", create=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(vitals, "FIRST_S", 0.01)
    monkeypatch.setattr(vitals, "EVERY_S", 0.01)
    yield
    assert not [one for one in threading.enumerate() if one.name == "evenshard-vitals"]


def until(store: Store, **wanted: Any) -> vitals.Sign:
    """What is told of the one build, as soon as it says so."""
    signs: tuple[vitals.Sign, ...] = ()
    for _ in range(2000):
        signs, _last = read_signs(store)
        if signs and all(getattr(signs[0], name) == value for name, value in wanted.items()):
            return signs[0]
        time.sleep(0.01)
    raise AssertionError(signs)


def test_a_running_build_is_seen_from_outside(store: Store) -> None:
    told: list[tuple[str, int, int]] = []
    with Vitals(lambda *step: told.append(step)) as notify:
        notify.begin(store, "https://user:secret@host/photos?sig=secret")
        notify("list", 0, 0)
        until(store, stage="list", done=0)
        notify("read", 100, 1000)
        notify("read", 300, 1000)
        notify.rejected(2)
        notify.rejected(1)
        sign = until(store, stage="read", done=300, rejects=3)
        assert (sign.state, sign.total, sign.worker) == ("running", 1000, whoami())
        assert sign.per_s > 0
        assert sign.left_s is not None
        assert sign.silent_s is not None
        assert sign.silent_s < vitals.DEAD_S
        assert sign.source == "https://host/photos"
    assert told == [("list", 0, 0), ("read", 100, 1000), ("read", 300, 1000)]
    assert store.list(vitals.NOW) == [LAST]


def test_speed_counts_what_was_done_here_and_time_left_follows(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [50.0]
    monkeypatch.setattr("pipeline.ingest.vitals.time.monotonic", lambda: clock[0])
    with Vitals() as notify:
        notify.begin(store, "photos")
        clock[0] = 100.0
        notify("read", 500, 1000)  # finished before
        clock[0] = 110.0
        notify("read", 700, 1000)
        clock[0] = 120.0
        sign = until(store, done=700, per_s=10.0)
        assert (sign.left_s, sign.idle_s) == (30.0, 10.0)


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "done"), (CommitError("12 of s3://u:secret@b/x are gone"), "failed"), (KeyboardInterrupt(), "interrupted")],
)
def test_how_it_ended_stays(store: Store, error: BaseException | None, state: str) -> None:
    def build() -> None:
        with Vitals() as notify:
            notify.begin(store, "photos")
            notify("read", 1, 2)
            until(store, done=1)
            if error is not None:
                raise error
            notify.published(7)

    if error is None:
        build()
    else:
        with pytest.raises(type(error)):
            build()
    signs, last = read_signs(store)
    assert signs == ()
    assert last is not None
    assert (last.state, last.snapshot, last.stage) == (state, 7 if error is None else None, "read")
    assert last.error == ("12 of s3://b/x are gone" if state == "failed" else "")


def test_a_storage_that_refuses_signs_stops_no_build(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()

    def refuse(path: str, data: bytes) -> None:
        tried.set()
        raise StoreError("disk is full")

    monkeypatch.setattr(store, "replace", refuse)
    with Vitals() as notify:
        notify.begin(store, "photos")
        assert tried.wait(10)
    assert read_signs(store) == ((), None)


def test_a_build_leaves_word_of_itself(tiny_images: Path, tmp_path: Path, serial_engine: SerialEngine) -> None:
    source = Path(shutil.copytree(tiny_images, tmp_path / "source"))
    pipeline.build(source, tmp_path / "root")
    _, last = read_signs(Store(str(tmp_path / "root")))
    assert last is not None
    assert (last.state, last.snapshot, last.source) == ("done", 1, str(source))
    shutil.rmtree(source / "bread")
    with pytest.raises(CommitError):
        pipeline.build(source, tmp_path / "root")
    _, last = read_signs(Store(str(tmp_path / "root")))
    assert last is not None
    assert last.state == "failed"
    assert "--allow class-vanished" in last.error


def test_rejects_are_counted_while_it_reads(
    tiny_images: Path, tmp_path: Path, serial_engine: SerialEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source/a"
    source.mkdir(parents=True)
    for number in range(4):
        (source / f"{number}.jpg").write_bytes(
            (tiny_images / f"apple/{number:03d}.{'png' if number == 3 else 'jpg'}").read_bytes()
        )
    (source / "bad.jpg").write_bytes(b"no image")
    pipeline.build(tmp_path / "source", tmp_path / "root")
    _, last = read_signs(Store(str(tmp_path / "root")))
    assert last is not None
    assert last.rejects == 1


# -- the command


def show_status(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert run(cli, ["status", str(root), *words]) == 0
    return capsys.readouterr().out


def test_status_tells_a_running_a_dead_and_an_ended_build(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(store.root)
    assert "no build is running; none has left word of itself" in show_status(root, capsys)
    sign = {
        "worker": {"host": "node7", "process": 12, "job": "raysubmit_9"}, "source": "/photos", "state": "running",
        "stage": "read", "done": 1200, "total": 2640, "per_s": 410.0, "left_s": 3.5, "idle_s": 0.2, "rejects": 3,
        "started_s": 1_800_000_000, "written_s": 1_800_000_100, "silent_s": None, "snapshot": None, "error": "",
    }  # fmt: skip
    store.replace(f"{vitals.NOW}/1-ab.json", json.dumps(sign).encode())
    assert show_status(root, capsys).splitlines()[:2] == [
        "build of /photos by process 12 on node7 (Ray job raysubmit_9), since 2027-01-15 08:00:00 UTC",
        "  reading images: 1,200 of 2,640, 410/s, about 4 s left; 3 rejects so far",
    ]
    then_s = time.time() - vitals.DEAD_S - 5
    os.utime(root / vitals.NOW / "1-ab.json", (then_s, then_s))
    told = show_status(root, capsys)
    assert ": died, no sign of life for 6" in told
    assert "no build is running" in told
    store.replace(LAST, json.dumps(sign | {"state": "done", "snapshot": 4}).encode())  # one after it ended well
    assert show_status(root, capsys).splitlines() == [
        "no build is running; the last one ended 2027-01-15 08:01:40 UTC by process 12 on node7 (Ray job raysubmit_9): "
        "done, snapshot 4"
    ]
    body = json.loads(show_status(root, capsys, "--json"))
    assert (body["builds"], body["last"]["snapshot"], body["nightly"]) == ([], 4, None)


def test_a_killed_build_is_seen_to_run_and_then_forgotten_when_the_next_one_ends(
    tiny_images: Path, tmp_path: Path, serial_engine: SerialEngine
) -> None:
    root = tmp_path / "root"
    program = (
        "import time; from pathlib import Path; from pipeline.ingest import vitals; from pipeline.store import Store\n"
        "vitals.FIRST_S = vitals.EVERY_S = 0.01\n"
        f"with vitals.Vitals() as notify: notify.begin(Store.open({str(root)!r}, create=True), 'x'); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        for _ in range(3000):
            if list(root.glob("runs/now/*.json")):
                break
            time.sleep(0.01)
        store = Store(str(root))
        assert until(store, state="running").worker.process == process.pid
        process.kill()
    (path,) = root.glob("runs/now/*.json")
    then_s = time.time() - 1000
    os.utime(path, (then_s, then_s))
    assert [sign.state for sign in read_signs(store)[0]] == ["died"]
    pipeline.build(tiny_images, root)
    assert read_signs(store)[0] == ()


def test_what_is_no_sign_is_passed_over(store: Store) -> None:
    for number, data in enumerate((b"{", b"[]", b"{}", b'{"worker": {}, "unknown": 1}')):
        store.replace(f"{vitals.NOW}/{number}.json", data)
    assert read_signs(store) == ((), None)


def test_of_a_ray_job_only_its_name_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"runtime_env": {"env_vars": {"X": "secret"}}, "metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(facts))
    assert str(whoami()) == f"process {os.getpid()} on {whoami().host} (Ray job raysubmit_1)"
    for broken in ("", "{", "[]", '{"metadata": null}'):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", broken)
        assert ray_job() == ""
