"""report: every build writes its page, keeps it where nothing changed, and is published whatever becomes of it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from poison import Poisonable, poisoned
from serial_engine import SerialEngine, serial_engine

from pipeline.cli import cli, run
from pipeline.cli.checks import report as report_command
from pipeline.cli.commands import build as build_command
from pipeline.config import make_config
from pipeline.ingest.history import run_of
from pipeline.ingest.run import run_build
from pipeline.ingest.summary import equal_command
from pipeline.report import write_build_report, write_report
from pipeline.report.page import render
from pipeline.snapshot import open_snapshot
from pipeline.store import Store

__all__ = ["serial_engine"]

pytestmark = pytest.mark.usefixtures("serial_engine")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, a copy, the same bytes under both labels, and a file that is no image."""
    source = tmp_path / "photos"
    for number, name in enumerate(("one/a.png", "one/b.png", "one/c.png", "two/a.png", "two/b.png")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 9, 9)).save(source / name)
    shutil.copy(source / "one/a.png", source / "one/copy.png")
    for label in ("one", "two"):
        Image.new("RGB", (12, 12), "blue").save(source / label / "blue.png")
    (source / "two/bad.png").write_bytes(b"<html>")
    return source


def built(photos: Path, *options: str) -> int:
    return run(build_command, [str(photos), str(photos.parent / "root"), "--quiet", *options])


def page_of(photos: Path, number: int = 1) -> Path:
    return photos.parent / f"root/reports/{number:08d}/index.html"


def text_of(page: Path) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.read_text("utf-8")).split())


def test_a_build_writes_the_page_and_says_where(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert built(photos) == 0
    assert f"page       {page_of(photos)}\n" in capsys.readouterr().out
    assert page_of(photos).read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_build_with_perceptual_hashes_writes_the_page_too(photos: Path) -> None:
    with Image.open(photos / "one/b.png") as image:
        image.resize((64, 64)).save(photos / "one/b twin.png")
    assert built(photos, "--near-duplicates", "6") == 0
    found = open_snapshot(photos.parent / "root").record.near_duplicates
    assert found is not None
    told = f"{found['num_images']} image{'s' * (found['num_images'] != 1)} in {found['num_groups']} group"
    assert f"(at most 6 of 64 bits of a perceptual hash differ): {told}" in text_of(page_of(photos))


def test_a_page_of_a_build_that_looked_for_none_tells_of_no_lookalikes(photos: Path) -> None:
    assert built(photos) == 0
    assert "Look-alikes" not in text_of(page_of(photos))


def test_json_names_the_page(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert built(photos, "--json") == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(page_of(photos))


def test_a_build_that_changes_nothing_leaves_the_page_alone(photos: Path) -> None:
    built(photos)
    page_of(photos).write_text("mine")
    assert built(photos) == 0
    assert page_of(photos).read_text() == "mine"
    page_of(photos).unlink()
    assert built(photos) == 0
    assert page_of(photos).exists()


def test_a_page_that_fails_is_told_and_the_snapshot_stands(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise KeyError("a fault of ours")

    monkeypatch.setattr("pipeline.report.built.write_report", fails)
    assert built(photos) == 0
    told = capsys.readouterr().out
    assert "snapshot 1 is published, but its page could not be written: KeyError('a fault of ours')" in told
    assert "page  " not in told
    assert open_snapshot(photos.parent / "root").number == 1


def test_the_page_changes_no_other_file(photos: Path) -> None:
    """B2: reports/ is all that a page touches."""

    def files() -> dict[str, str]:
        found = (path for path in (photos.parent / "root").rglob("*") if path.is_file())
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found if "reports" not in path.parts
        }

    config = make_config({}, source=str(photos), root=str(photos.parent / "root"))
    summary = run_build(config)
    before = files()
    assert write_build_report(config, summary) == (str(page_of(photos)), "")
    assert files() == before


# ---- what no shard holds


def pictures_of(page: Path) -> int:
    return page.read_text("utf-8").count("<img ")


def test_label_conflicts_are_shown_by_the_build_and_on_request(photos: Path) -> None:
    built(photos)
    shown = pictures_of(page_of(photos))
    root = str(photos.parent / "root")
    assert run(report_command, [root]) == 0
    assert pictures_of(page_of(photos)) == shown - 1
    assert "not in any shard" in text_of(page_of(photos))
    assert run(report_command, [root, "--source", str(photos)]) == 0
    assert pictures_of(page_of(photos)) == shown


def test_a_rejected_file_that_changed_since_is_not_shown(photos: Path) -> None:
    built(photos)
    for label in ("one", "two"):
        Image.new("RGB", (12, 12), "red").save(photos / label / "blue.png")
    assert run(report_command, [str(photos.parent / "root"), "--source", str(photos)]) == 0
    assert "the file in the source has changed since" in text_of(page_of(photos))


def test_a_duplicate_stands_beside_what_it_copies(photos: Path) -> None:
    built(photos)
    text = text_of(page_of(photos))
    assert "1 picture was found more than once" in text
    assert re.search(r"in one one/(a|copy)\.png out one one/(a|copy)\.png", text)


def test_a_decoder_that_dies_costs_its_tile_not_the_page(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.report.pictures.Inspection", Poisonable)
    for path in (photos / "two").glob("?.png"):
        path.write_bytes(poisoned(path.read_bytes(), "segv"))
    assert built(photos, "--check", "header") == 0
    assert "decoder-crash: its decoder died by SIGSEGV" in text_of(page_of(photos))
    assert pictures_of(page_of(photos)) > 0


# ---- where it came from


def test_the_command_that_made_it_makes_it_again(photos: Path, tmp_path: Path) -> None:
    built(photos, "--check", "header", "--manifest", "sqrt=power:alpha=0.5", "--max-rejects", "50%")
    made = run_of(Store.open(tmp_path / "root"), 1)
    assert made is not None
    assert made.versions.keys() >= {"python", "evenshard", "numpy", "pillow"}
    words = shlex.split(made.command)
    assert " ".join(words[1:]) in text_of(page_of(photos))
    words[3] = str(tmp_path / "again")
    assert run(cli, [*words[1:], "--quiet"]) == 0
    one, two = (open_snapshot(tmp_path / name) for name in ("root", "again"))
    assert one.id == two.id


def test_the_command_tells_no_secret() -> None:
    config = make_config(
        {},
        source="https://me:secret@example.org/table.csv?token=secret",
        root="out",
        images="s3://key:secret@bucket/x",
        allow=("shrink", "rejects"),
        manifests={"mine": {"policy": "balanced", "per_class": 5}},
    )
    command = equal_command(config)
    assert "secret" not in command
    assert "--allow rejects --allow shrink" in command
    assert "--manifest mine=balanced:per_class=5" in command


def test_a_snapshot_that_no_build_made_says_so(photos: Path) -> None:
    built(photos)
    root = str(photos.parent / "root")
    assert run(cli, ["manifest", root, "few", "--policy", "balanced:per_class=1"]) == 0
    write_report(root)
    text = text_of(page_of(photos, 2))
    assert "a command that reads no image made it" in text
    assert "The images, classes and rejects are those of snapshot 1" in text


def test_the_page_says_what_changed(photos: Path, serial_engine: SerialEngine) -> None:
    built(photos)
    Image.new("RGB", (9, 9), "white").save(photos / "two/new.png")
    (photos / "one/c.png").rename(photos / "two/moved.png")
    assert built(photos) == 0
    text = text_of(page_of(photos, 2))
    assert "1 image added two/new.png two" in text
    assert "1 image relabelled two/moved.png one → two" in text
    assert "two 2 4 +2" in text


def test_a_snapshot_before_that_is_gone_is_told(photos: Path) -> None:
    built(photos)
    Image.new("RGB", (9, 9), "white").save(photos / "two/new.png")
    built(photos)
    root = photos.parent / "root"
    before = open_snapshot(root, 1)
    (root / f"tables/{before.record.classes.sha256}.arrow").unlink()
    assert "It cannot be compared with snapshot 1" in render(open_snapshot(root))
