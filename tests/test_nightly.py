"""The nightly job: its line, its exit code, one at a time, and no step that hides another."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from serial_engine import SerialEngine, serial_engine

from pipeline.cli import cli, run
from pipeline.errors import StoreError, UsageError
from pipeline.ingest.collect import Collection
from pipeline.nightly import Holder, Night, find_holder, nightly_config, run_nightly
from pipeline.nightly import run as steps
from pipeline.nightly import turn as turns
from pipeline.nightly.turn import Turn, take_turn
from pipeline.snapshot import open_snapshot
from pipeline.store import Store

__all__ = ["serial_engine"]

TOP = Path(__file__).parents[1]
FLAGS = TOP / "tests/golden/job_flags.json"


@pytest.fixture
def source(tiny_images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_images, tmp_path / "source"))


@pytest.fixture
def root(source: Path, tmp_path: Path, serial_engine: SerialEngine) -> Path:
    """With the snapshot of a first night."""
    assert night(source, tmp_path / "root").outcome == "done"
    return tmp_path / "root"


def night(source: Path, root: Path, **options: Any) -> Night:
    config = {name: options.pop(name) for name in list(options) if name not in ("keep", "sample", "grace_s")}
    return run_nightly(nightly_config(source=str(source), root=str(root), **config), **options)


def turn_file(root: Path, number: int) -> dict[str, Any]:
    return json.loads((root / f"runs/nightly/{number:08d}.json").read_text())


# -- what a night does


def test_a_first_night_and_one_that_finds_nothing_new(source: Path, root: Path) -> None:
    first = turn_file(root, 1)["summary"]
    assert first["outcome"] == "done"
    assert first["diff"]["added"] == first["images"] == first["read"]["images"] == 61
    assert first["diff"]["classes_added"] == first["classes"] == 6
    again = night(source, root)
    told = again.to_json()
    assert (again.exit_code, told["snapshot"], told["changed"], told["read"]["images"]) == (0, 1, False, 0)
    assert (told["diff"]["added"], told["diff"]["classes_added"], told["rejects"]["new"]) == (0, 0, 0)
    assert set(told["steps"].items()) == {(name, "done") for name in ("build", "verify", "report", "diff", "collect")}
    assert set(told["seconds"]) == set(told["steps"])
    assert turn_file(root, 2)["summary"] == told


def test_a_night_says_what_changed(source: Path, root: Path) -> None:
    (source / "apple/000.jpg").unlink()
    shutil.copy(source / "bread/000.jpg", source / "apple/000.jpg")  # under two labels now: both are rejected
    for number in (100, 101):
        data = (source / "apple/001.jpg").read_bytes()
        (source / f"apple/{number}.jpg").write_bytes(data + b"\0%d" % number)
    told = night(source, root, max_rejects=2, sample=1.0).to_json()
    assert (told["outcome"], told["snapshot"], told["changed"]) == ("done", 2, True)
    assert told["images"] == 61
    assert {kind: count for kind, count in told["diff"].items() if count} == {"before": 1, "added": 2, "removed": 2}
    assert told["rejects"] == {"total": 2, "new": 2, "by_reason": {"label-conflict": 2}}
    assert told["verified"]["images"] == 61
    assert Path(told["report"]).is_file()
    (source / "fig/000.jpg").write_bytes((source / "fig/000.jpg").read_bytes() + b"\0")
    told = night(source, root, max_rejects=2).to_json()
    assert (told["rejects"]["total"], told["rejects"]["new"], told["diff"]["changed"]) == (2, 0, 1)


def test_collection_is_real_keeps_what_was_asked_and_pins(source: Path, root: Path) -> None:
    assert run(cli, ["pin", str(root), "paper"]) == 0
    for number in range(2, 5):
        (source / "fig/000.jpg").write_bytes((source / "fig/000.jpg").read_bytes() + b"\0")
        told = night(source, root, keep=1, grace_s=0.0).to_json()
        assert (told["outcome"], told["snapshot"]) == ("done", number)
    # A snapshot that was the newest when the grace period ended (here: just now) is kept one night longer.
    assert told["collected"]["kept"][0] == 1
    assert told["collected"]["kept"][-1] == 4
    assert 2 in told["collected"]["snapshots"]
    assert told["collected"]["files"] > 0
    assert told["collected"]["bytes"] > 0
    assert open_snapshot(str(root), 1).classes.num_rows == 6


# -- a step that fails hides no other


def test_a_refused_build_is_told_and_the_snapshot_is_verified_and_collected(source: Path, root: Path) -> None:
    shutil.rmtree(source / "bread")
    found = night(source, root)
    told = found.to_json()
    assert (told["outcome"], found.exit_code) == ("failed", 1)
    assert told["steps"] == {
        "build": "refused", "verify": "done", "report": "skipped", "diff": "skipped", "collect": "done",
    }  # fmt: skip
    assert "--allow class-vanished" in told["errors"][0]["message"]
    assert told["verified"]["sound"] is True
    assert open_snapshot(str(root)).number == 1


def test_more_rejects_than_one_in_a_hundred_refuse_unless_told(source: Path, root: Path) -> None:
    (source / "apple/001.jpg").write_bytes(b"no image")
    assert "1 of 61 entries were rejected" in night(source, root).errors[0]["message"]
    found = night(source, root, max_rejects=1)
    assert (found.outcome, found.facts["rejects"]["new"]) == ("done", 1)


def test_nothing_is_collected_after_a_failed_verification(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tar, *_) = sorted(root.glob("shards/*/*.tar"))
    tar.chmod(0o644)
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    monkeypatch.setattr(steps, "collect", lambda *_, **__: pytest.fail("collected"))
    found = night(source, root, sample=1.0)
    assert (found.outcome, found.exit_code) == ("failed", 1)
    assert found.steps == {
        "build": "done", "verify": "failed", "report": "done", "diff": "done", "collect": "skipped",
    }  # fmt: skip
    assert found.facts["verified"]["sound"] is False
    assert tar.name in found.facts["verified"]["first_findings"][0]
    assert "is not sound" in found.errors[0]["message"]


def test_a_failed_collection_and_a_page_that_cannot_be_written_make_the_night_fail(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Collection:
        raise StoreError("disk is gone")

    monkeypatch.setattr(steps, "collect", refuse)
    found = night(source, root)
    assert (found.exit_code, found.errors) == (1, [{"step": "collect", "message": "disk is gone"}])
    monkeypatch.undo()
    monkeypatch.setattr(steps, "write_build_report", lambda *_: ("", "no page"))
    found = night(source, root)
    assert (found.exit_code, found.steps["report"], found.steps["collect"]) == (1, "failed", "done")


def test_a_fault_of_ours_is_a_failed_step_too(source: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "diff", lambda *_, **__: 1 / 0)
    (source / "fig/000.jpg").write_bytes((source / "fig/000.jpg").read_bytes() + b"\0")
    found = night(source, root)
    assert (found.exit_code, found.steps["diff"], found.steps["collect"]) == (1, "failed", "done")
    assert found.errors[0]["message"].startswith("ZeroDivisionError")


def test_a_first_night_without_a_source(tmp_path: Path) -> None:
    found = night(tmp_path / "nowhere", tmp_path / "root")
    assert (found.outcome, found.exit_code) == ("failed", 1)
    assert found.steps["verify"] == found.steps["collect"] == "skipped"
    assert find_holder(Store(str(tmp_path / "root"))) is None


def test_a_root_that_holds_something_else_is_left_alone(source: Path) -> None:
    with pytest.raises(StoreError, match="ROOT is not empty"):
        night(source, source)
    assert not (source / "runs").exists()


def test_the_exit_code_is_2_only_if_nothing_else_went_wrong() -> None:
    for errors, code in (((UsageError(), UsageError()), 2), ((StoreError(), UsageError()), 1)):
        for order in (errors, errors[::-1]):
            found = Night(root="", source="")
            for error in order:
                found.failed("build", error)
            assert found.exit_code == code


# -- one at a time


def test_a_second_night_is_refused_and_does_nothing(source: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "run_build", lambda *_, **__: pytest.fail("built"))
    held = take_turn(Store(str(root)))
    assert isinstance(held, Turn)
    with held:
        held.at("verify")
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*.json")}
        found = night(source, root)
        assert (found.outcome, found.exit_code) == ("refused", 1)
        assert f"is under way: process {os.getpid()} on " in found.errors[0]["message"]
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*.json")} == before
        shown = CliRunner().invoke(cli, ["status", str(root)]).stdout
        assert f"nightly run 2: process {os.getpid()} on " in shown
        assert "at step 'verify'" in shown
    assert find_holder(Store(str(root))) is None


def test_of_two_that_see_the_same_past_one_gets_the_turn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(root))
    monkeypatch.setattr(turns, "_newest", lambda _: 1)
    first, second = take_turn(store), take_turn(store)
    assert isinstance(first, Turn)
    assert isinstance(second, Holder)
    assert (second.number, second.worker.process) == (2, os.getpid())


def test_a_turn_lapses_when_its_owner_is_silent(source: Path, root: Path) -> None:
    held = take_turn(Store(str(root)))
    assert isinstance(held, Turn)
    path = root / f"runs/nightly/{held.number:08d}.json"
    silent(path, turns.LAPSE_S - 30)
    assert isinstance(take_turn(Store(str(root))), Holder)
    silent(path, turns.LAPSE_S + 1)
    assert night(source, root).outcome == "done"
    other = held.lost_to()
    assert other is not None
    assert other.number == held.number + 1


def test_who_lost_its_turn_while_it_slept_does_no_further_step(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "BEAT_S", 3600.0)
    built = steps.run_build

    def slow_build(*given: Any, **options: Any) -> Any:
        summary = built(*given, **options)
        silent(root / "runs/nightly/00000002.json", turns.LAPSE_S + 1)
        assert isinstance(take_turn(Store(str(root))), Turn)
        return summary

    monkeypatch.setattr(steps, "run_build", slow_build)
    found = night(source, root)
    assert (found.exit_code, found.steps["build"], found.steps["verify"]) == (1, "done", "failed")
    assert found.steps["collect"] == "skipped"
    assert "took the turn" in found.errors[0]["message"]


def test_a_turn_that_is_held_gives_signs_of_life(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "BEAT_S", 0.01)
    held = take_turn(Store(str(root)))
    assert isinstance(held, Turn)
    path = root / f"runs/nightly/{held.number:08d}.json"
    with held:
        silent(path, 1000)
        before_s = path.stat().st_mtime
        waited = 0
        while path.stat().st_mtime == before_s and (waited := waited + 1) < 1000:
            time.sleep(0.01)
        assert path.stat().st_mtime > before_s
    assert find_holder(Store(str(root))) is None


def test_an_interrupted_night_gives_its_turn_back(source: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "run_build", stop)
    with pytest.raises(KeyboardInterrupt):
        night(source, root)
    assert turn_file(root, 2)["summary"] == {"outcome": "interrupted"}
    monkeypatch.undo()
    assert isinstance(take_turn(Store(str(root))), Turn)


def test_a_damaged_turn_counts_by_its_age(source: Path, root: Path) -> None:
    path = root / "runs/nightly/00000002.json"
    path.write_bytes(b"{")
    assert night(source, root).outcome == "refused"
    silent(path, turns.LAPSE_S + 1)
    assert night(source, root).outcome == "done"


def silent(path: Path, seconds: float) -> None:
    then_s = time.time() - seconds
    os.utime(path, (then_s, then_s))


def test_two_started_at_once_are_a_sequence_or_a_refusal(source: Path, tmp_path: Path) -> None:
    """Processes, as a scheduler that fires twice starts them; three times, onto the snapshot that is there."""
    root = tmp_path / "root"
    for attempt in range(3):
        (source / "fig/000.jpg").write_bytes((source / "fig/000.jpg").read_bytes() + b"\0")
        started = [nightly_process(source, root) for _ in range(2)]
        outputs = [process.communicate(timeout=300) for process in started]
        told = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
        assert [process.returncode for process in started] == [one["exit_code"] for one in told]
        outcomes = sorted(one["outcome"] for one in told)
        assert outcomes in (["done", "refused"], ["done", "done"]), outputs
        newest = open_snapshot(str(root))
        assert newest.number == attempt + 1
        assert sum(one.get("changed", False) for one in told) == 1
    assert run(cli, ["verify", str(root), "--quiet"]) == 0


def nightly_process(source: Path, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.nightly", str(source), str(root), "--address", "none", "--workers", "1"]
    return subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_terminated_night_is_an_interrupted_one(source: Path, tmp_path: Path) -> None:
    """As `ray job stop`, Kubernetes and systemd end it: the turn is given back at once."""
    root = tmp_path / "root"
    process = nightly_process(source, root)
    for _ in range(6000):
        if (root / "runs/nightly/00000001.json").exists() and turn_file(root, 1)["step"] == "build":
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in told) == (130, False), told
    assert turn_file(root, 1)["summary"] == {"outcome": "interrupted"}
    assert not list(root.glob("snapshots/*"))


# -- the command line


def test_the_last_line_is_the_summary_and_the_exit_code_follows(source: Path, root: Path, tmp_path: Path) -> None:
    config = tmp_path / "build.yaml"
    config.write_text(f"source: {source}\nroot: {root}\nmax_rejects: 5\n")
    done = CliRunner().invoke(cli, ["nightly", "--config", str(config), "--keep", "3", "--sample", "1"])
    assert (done.exit_code, json.loads(done.stdout.splitlines()[-1])["verified"]["images"]) == (0, 61)
    shutil.rmtree(source / "bread")
    done = CliRunner().invoke(cli, ["nightly", "--config", str(config)])
    assert (done.exit_code, json.loads(done.stdout.splitlines()[-1])["outcome"]) == (1, "failed")
    assert "error: build: " in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("ROOT --keep 0", "Invalid value for '--keep'"),
        ("SOURCE ROOT --sample 2", "Invalid value for '--sample'"),
        ("SOURCE ROOT --grace 7", "is not a duration"),
        ("SOURCE ROOT --spilt-from top", "'--split-from'?"),
        ("SOURCE", "root is missing"),
    ],
)
def test_a_wrong_call_is_exit_code_2_and_touches_nothing(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(cli, ["nightly", *words.split()]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def flags(command: click.Command) -> list[str]:
    """Every parameter with its spellings, whether it takes a value, and its default, as one line."""
    return sorted(
        f"{' '.join(param.opts)} {'flag' if getattr(param, 'is_flag', False) else 'value'}"
        f"{' several' if param.multiple else ''} default={_default(param)}"
        for param in command.params
    )


def _default(param: click.Parameter) -> object:
    return param.to_info_dict()["default"]


def test_the_flags_of_the_jobs_are_frozen() -> None:
    """Schedulers elsewhere call them. A flag may be added; run with EVENSHARD_UPDATE_GOLDEN=1 then, and say so."""
    import jobs.build
    import jobs.export
    import jobs.nightly
    import jobs.train
    import jobs.verify

    commands = {
        "build": jobs.build.build,
        "export": jobs.export.export,
        "nightly": jobs.nightly.nightly,
        "train": jobs.train.train,
        "verify": jobs.verify.verify,
    }
    assert set(commands) == {path.stem for path in (TOP / "jobs").glob("[a-z]*.py")}
    found = {name: flags(command) for name, command in commands.items()}
    if os.environ.get("EVENSHARD_UPDATE_GOLDEN"):
        FLAGS.write_text(json.dumps(found, indent=1) + "\n")
    frozen = json.loads(FLAGS.read_text())
    changed = {name: sorted(set(found[name]) ^ set(frozen.get(name, []))) for name in found}
    assert found == frozen, f"{changed}: if that is meant, run this test once with EVENSHARD_UPDATE_GOLDEN=1"


@pytest.mark.parametrize("name", ["build", "export", "nightly", "train", "verify"])
def test_every_job_is_the_command_of_its_name(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", "--help"], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert f"usage: python -m jobs.{name}" in done.stdout.lower()
    wrong = subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", "--nonsense"], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
