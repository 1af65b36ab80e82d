"""Logs for programs: with EVENSHARD_LOG=json each line on standard error is an object; units tell of their attempts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import crew_tasks
import pytest

from pipeline.cli import cli, run
from pipeline.cli.logs import logging_units, say
from pipeline.cli.progress import Reporter
from pipeline.errors import EngineError
from pipeline.ingest.pool import Pool


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENSHARD_LOG", "json")


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_every_unit_of_a_build_is_told_with_its_attempt(
    as_json: None, tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", str(tiny_images), str(tmp_path / "root"), "--address", "none", "--shard-samples", "20"]
    assert run(cli, words) == 0
    told = lines(capsys)
    units = [line for line in told if line["event"] == "unit" and line["stage"] == "read"]
    assert len(units) > 2
    assert sum(line["images"] for line in units) == 61
    assert {(line["attempt"], line["level"], line["retries"]) for line in units} == {(1, "info", 0)}
    assert units[0]["message"] == f"unit {units[0]['unit']} is done, attempt 1"
    assert all(set(line) >= {"time", "level", "event", "message"} for line in told)
    assert logging.getLogger("evenshard").handlers == []


def test_without_it_nothing_is_said_of_units(
    tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVENSHARD_LOG", raising=False)
    assert run(cli, ["build", str(tiny_images), str(tmp_path / "root"), "--address", "none"]) == 0
    assert "unit" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [("stats nowhere", 1, "there is no directory"), ("stats", 2, "Missing argument 'ROOT'")],
)
def test_errors_are_objects_too(
    as_json: None, words: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(cli, words.split()) == code
    (line,) = lines(capsys)
    assert (line["event"], line["level"]) == ("error", "error")
    assert message in line["message"]


def test_progress_has_its_numbers(
    as_json: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 6.0])
    monkeypatch.setattr("pipeline.cli.progress.time.monotonic", lambda: next(clock))
    with Reporter() as progress:
        for done in (0, 10, 60):
            progress("read", done, 100)
    first, second = lines(capsys)
    assert (first["event"], first["stage"], first["total"]) == ("stage", "read", 100)
    assert (second["event"], second["done"], second["total"], second["per_s"]) == ("progress", 60, 100, 10.0)


def test_no_line_holds_a_credential(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    say("see https://u:secret@host/x?sig=secret", event="error", level="error", place="s3://k:secret@b", num=3)
    (line,) = lines(capsys)
    assert "secret" not in json.dumps(line)
    assert line["num"] == 3


def test_a_lost_worker_is_told_with_its_attempt_and_the_next_one(
    as_json: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_units(), Pool(workers=1) as pool:
        list(pool.map(crew_tasks.die_until, [("val 0", (2, 5))], "read"))
    told = [(line["level"], line["unit"], line["attempt"]) for line in lines(capsys)]
    assert told == [("warning", "val 0", 1), ("info", "val 0", 2)]


def test_a_unit_that_failed_for_good_is_told(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_units(), Pool(workers=1) as pool, pytest.raises(EngineError):
        list(pool.map(crew_tasks.fail_with, [("val 0", (ValueError("no"),))], "read"))
    (line,) = lines(capsys)
    assert (line["level"], line["unit"], line["attempt"]) == ("error", "val 0", 1)
    assert line["why"]
