"""What all tests share: a private home, one local Ray, a tiny long-tailed photo folder, the rule on skipped tests."""

from __future__ import annotations

import csv
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from pipeline.snapshot import open_snapshot

TINY_COUNTS = {"apple": 40, "bread": 12, "cocoa": 5, "dates": 2, "endive": 1, "fig": 1}

TINY_TRAINING = ("--model", "small_cnn", "--side", "16", "--batch-size", "8", "--workers", "1")
"""What makes any `evenshard train` small enough for a test, and its batches for TINY_COUNTS."""

# Seeded and free of the clock, like every test here: a failure seen once is seen again.
settings.register_profile("evenshard", derandomize=True, deadline=None, database=None)
settings.load_profile("evenshard")


@pytest.fixture
def cycles_wait() -> Iterator[None]:
    """No cycle is collected: finalizers of another test's objects (sessions of stores) must not run where a document
    that is nested too deeply has used up the stack, nor fail there and blame a third test."""
    gc.disable()
    yield
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Give the session its own HOME and Ray directory: Ray leaves a token in one and joins clusters of the other."""
    # Below /tmp because a Unix socket's path has at most 107 bytes, and Ray adds about 70 of them.
    scratch = Path(tempfile.mkdtemp(prefix="evenshard-", dir="/tmp"))
    (scratch / "home").mkdir()
    environment = pytest.MonkeyPatch()
    environment.setenv("HOME", str(scratch / "home"))
    environment.setenv("RAY_TMPDIR", str(scratch))
    environment.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
    environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    environment.delenv("RAY_ADDRESS", raising=False)
    # Workers import what tests put in the place of a decoder.
    environment.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    )
    config.add_cleanup(lambda: shutil.rmtree(scratch, ignore_errors=True))
    config.add_cleanup(environment.undo)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two CPUs for the whole session; starting it takes seconds."""
    from pipeline.ingest.engine import RayEngine

    with RayEngine(address="local", workers=2):
        yield


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``<class>/<number>.<ext>`` of 61 distinct images of about 48 pixels, TINY_COUNTS of each class.

    All tests share it: copy it before changing anything in it.
    """
    root = tmp_path_factory.mktemp("tiny_images")
    for class_id, (name, count) in enumerate(TINY_COUNTS.items()):
        (root / name).mkdir()
        for number in range(count):
            suffix = ".png" if number % 7 == 3 else ".jpg"
            draw_image(class_id, number).save(root / name / f"{number:03d}{suffix}")
    return root


def write_guesses(root: Path, path: Path) -> None:
    """Predictions for the test split of ``root``: the largest class, for every image."""
    snapshot = open_snapshot(root)
    largest = max(snapshot.classes.to_pylist(), key=lambda row: row["train"])["name"]
    indexes = [snapshot.index(shard) for shard in range(snapshot.shards.num_rows)]
    keys = [row["key"] for index in indexes for row in index.to_pylist() if row["split"] == "test"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("key", "label"), *((key, largest) for key in keys)])


def draw_image(class_id: int, number: int) -> Image.Image:
    """A disc in the colour of its class on noise: no two are alike, each is the same on every run."""
    rng = np.random.default_rng((class_id, number))
    height, width = 40 + rng.integers(0, 17, 2)
    rows, columns = np.mgrid[:height, :width]
    pixels = rng.integers(0, 96, (height, width, 3), dtype=np.uint8)
    disc = np.hypot(rows - height / 2, columns - width / 2) < 10 + class_id
    pixels[disc] = 255 - np.array([40 * class_id, 25 * number % 200, 30 * class_id + 10])
    return Image.fromarray(pixels)


# ---- A test that is skipped in silence holds nothing: in CI each skip needs a line in expected_skips.txt.

EXPECTED_SKIPS = Path(__file__).with_name("expected_skips.txt")
UNLISTED = pytest.StashKey[list[str]]()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


_skips: dict[str, str] = {}


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped:
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    _skips[report.nodeid] = getattr(report, "wasxfail", reason).removeprefix("Skipped: ")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn a run that skipped something unlisted into a failed one, where CI or EVENSHARD_STRICT_SKIPS is set."""
    if not (os.environ.get("CI") or os.environ.get("EVENSHARD_STRICT_SKIPS")):
        return
    lines = [line.strip() for line in EXPECTED_SKIPS.read_text(encoding="utf-8").splitlines()]
    unlisted = sorted({f"{nodeid} | {reason}" for nodeid, reason in _skips.items()} - set(lines))
    session.config.stash[UNLISTED] = unlisted
    if unlisted and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    unlisted = config.stash.get(UNLISTED, [])
    if unlisted:
        terminalreporter.section(f"{len(unlisted)} skipped tests are not in tests/{EXPECTED_SKIPS.name}", red=True)
        terminalreporter.write_line("Make them run, or add these lines:")
        for line in unlisted:
            terminalreporter.write_line(line)
