"""Ctrl-C: exit code 130, no traceback, nothing half-written; what was there before still is, the next run finishes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import pipeline
from pipeline.cli import cli, run
from pipeline.cli.progress import Reporter
from pipeline.ingest.collect import collect


@pytest.fixture(scope="module")
def made(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two snapshots, the first of which loses files to a collection; the page of both."""
    folder = tmp_path_factory.mktemp("interrupted")
    source = Path(shutil.copytree(tiny_images, folder / "source"))
    build = ["build", str(source), str(folder / "root"), "--address", "none", "--workers", "1", "--quiet"]
    assert run(cli, [*build, "--shard-samples", "5"]) == 0
    (source / "apple/000.jpg").unlink()
    assert run(cli, [*build, "--shard-samples", "5"]) == 0
    return folder / "root"


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "stage", "told"),
    [
        ("report {root}", "pictures", "nothing was changed"),
        ("report {root} --out {tmp}/page.html", "pictures", "nothing was changed"),
        ("verify {root}", "verify", "nothing was changed"),
        ("history {root}", "history", "nothing was changed"),
        ("diff {root}", "compare", "nothing was changed"),
        ("gc {root} --keep 1 --grace 0", "keep", "run it again to finish"),
    ],
)
def test_readers_that_are_stopped_change_nothing(
    words: str,
    stage: str,
    told: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "page.html").write_text("the page of yesterday")
    before = files(tmp_path)
    stop_at(stage, monkeypatch)
    assert run(cli, words.format(root=root, tmp=tmp_path).split()) == 130
    shown = capsys.readouterr().err
    assert f"stopped: {told}" in shown or told in shown
    assert "Traceback" not in shown
    assert files(tmp_path) == before


def stop_at(stage: str, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """As Ctrl-C does: an exception out of nowhere, the ``after``-th time that ``stage`` is reported."""
    seen: list[str] = []

    def call(self: Reporter, now: str, done: int, total: int) -> None:
        seen.append(now)
        if seen.count(stage) > after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "__call__", call)


def heed_sigint() -> None:
    """In a new process: a shell's background jobs, these tests among them, are started with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_page_that_is_interrupted_while_it_is_written_leaves_the_old_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "page.html"
    out.write_text("the page of yesterday")

    def interrupted(source: str, dest: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.report.page.os.replace", interrupted)
        assert run(cli, ["report", str(root), "--out", str(out), "--quiet"]) == 130
    assert out.read_text() == "the page of yesterday"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "root"]
    assert run(cli, ["report", str(root), "--out", str(out), "--quiet"]) == 0
    assert out.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_collection_that_is_stopped_harms_nothing_and_the_next_one_finishes(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gc", str(root), "--keep", "1", "--grace", "0", "--delete"]
    with monkeypatch.context() as patch:
        stop_at("remove", patch, after=1)
        assert run(cli, words) == 130
    assert "stopped: what was removed belonged to collected snapshots alone" in capsys.readouterr().err
    assert run(cli, ["verify", str(root), "--quiet"]) == 0
    assert run(cli, [*words, "--quiet"]) == 0
    assert not collect(str(root), 1, grace_s=0).removed


def test_a_build_that_is_stopped_at_its_page_says_that_it_is_published(
    root: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(made.parent / "source", tmp_path / "source"))
    (source / "apple/001.jpg").unlink()
    stop_at("pictures", monkeypatch)
    words = ["build", str(source), str(root), "--address", "none", "--workers", "1", "--shard-samples", "5"]
    assert run(cli, words) == 130
    assert "stopped: snapshot 3 is published, its page is not written" in capsys.readouterr().err
    assert pipeline.open_snapshot(root).number == 3
    assert not (root / "reports/00000003/index.html").exists()


def test_an_export_that_is_interrupted_keeps_whole_tars_and_the_next_one_finishes(root: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    assert run(cli, ["manifest", str(root), "long", "--policy", "balanced:per_class=300"]) == 0
    words = ["export", str(root), "long", str(dest), "--shard-samples", "20", "--workers", "1", "--address", "none"]
    command = [sys.executable, "-m", "pipeline.cli", *words]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_sigint,
    ) as process:
        while not list(dest.glob("*.tar")):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, told = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in told) == (130, False), told
    assert "stopped: whole tars are kept" in told
    assert not (dest / "export.json").exists()
    for path in dest.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 2 * 20
    assert run(cli, [*words, "--quiet"]) == 0
    assert len(list(dest.glob("*.tar"))) == 90
