"""The build, end to end on Ray: B1 once, B2 reproducible, sticky ids, guardrails, exports that stock readers read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import TINY_COUNTS, draw_image
from independent_checker import check_root, digests_of, newest

import pipeline
from pipeline.errors import AlreadyExistsError, CommitError, SourceError, UsageError
from pipeline.export import export_cost, export_tars, plan_export
from pipeline.keyed import text_key

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    # webdataset leaves the tars it has read to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def messy_images(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder with one of every trouble."""
    source = tmp_path_factory.mktemp("messy") / "photos"
    shutil.copytree(tiny_images, source)
    first = (source / "apple" / "000.jpg").read_bytes()
    (source / "apple" / "empty.jpg").write_bytes(b"")
    (source / "apple" / "cut.jpg").write_bytes(first[: len(first) // 2])
    (source / "apple" / "note.jpg").write_text("not an image")
    (source / "apple" / "copy.of.000.jpg").write_bytes(first)
    (source / "bread" / "both \N{CROISSANT}.jpg").write_bytes((source / "cocoa" / "000.jpg").read_bytes())
    (source / "bread" / "CASE.jpg").write_bytes(encoded(1, 90))
    (source / "bread" / "case.jpg").write_bytes(encoded(1, 91))
    (source / "stray.jpg").write_bytes(encoded(2, 92))
    (source / "empty class").mkdir()
    return source


def encoded(class_id: int, number: int) -> bytes:
    from io import BytesIO

    stream = BytesIO()
    draw_image(class_id, number).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def messy_root(messy_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("build") / "root"
    pipeline.build(messy_images, root, shard_samples=10)
    return root


def test_every_file_is_one_row_or_one_reject(messy_images: Path, messy_root: Path) -> None:
    """B1."""
    rows, rejects = check_root(messy_root)
    listed = [str(path.relative_to(messy_images)) for path in messy_images.rglob("*") if path.is_file()]
    told = [row["path"] for row in rows] + [row["path"] for row in rejects if row["reason"] != "class-empty"]
    assert sorted(told) == sorted(listed)


def test_rejects_name_their_reasons(messy_root: Path) -> None:
    _, rejects = check_root(messy_root)
    copies = ["apple/000.jpg", "apple/copy.of.000.jpg"]
    assert {row["path"]: row["reason"] for row in rejects} == {
        max(copies, key=text_key): "duplicate-of",
        "apple/cut.jpg": "truncated",
        "apple/empty.jpg": "empty",
        "apple/note.jpg": "not-an-image",
        "bread/both \N{CROISSANT}.jpg": "label-conflict",
        "cocoa/000.jpg": "label-conflict",
        "empty class": "class-empty",
        "stray.jpg": "no-label",
    }


def test_class_counts_are_those_of_the_folders(tiny_images: Path, tmp_path: Path) -> None:
    summary = pipeline.build(tiny_images, tmp_path / "root")
    classes = pipeline.open_snapshot(tmp_path / "root").classes
    assert dict(zip(classes["name"].to_pylist(), classes["count"].to_pylist(), strict=True)) == TINY_COUNTS
    assert (summary.num_images, summary.num_rejects, summary.number) == (61, 0, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_copies_in_another_order_with_other_times_build_the_same_bytes(
    messy_images: Path, messy_root: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B2."""
    source = tmp_path / "elsewhere"
    for number, path in enumerate(sorted(messy_images.rglob("*"), reverse=True)):
        target = source / path.relative_to(messy_images)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        os.utime(target, (10_000 * number, 20_000 * number))
    monkeypatch.setenv("TZ", "Pacific/Chatham")
    pipeline.build(source, tmp_path / "root", shard_samples=10, workers=workers)
    assert digests_of(tmp_path / "root") == digests_of(messy_root)


def test_a_second_build_reads_nothing_and_changes_nothing(tiny_images: Path, tmp_path: Path) -> None:
    pipeline.build(tiny_images, tmp_path / "root")
    before = digests_of(tmp_path / "root")
    again = pipeline.build(tiny_images, tmp_path / "root")
    assert (again.changed, again.number, again.num_read) == (False, 1, 0)
    assert digests_of(tmp_path / "root") == before


def test_a_new_class_is_appended_and_old_ids_stay(tiny_images: Path, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    shutil.copytree(tiny_images, source)
    pipeline.build(source, tmp_path / "root")
    (source / "aaa").mkdir()
    (source / "aaa" / "0.jpg").write_bytes(encoded(6, 0))
    summary = pipeline.build(source, tmp_path / "root")
    names = pipeline.open_snapshot(tmp_path / "root").classes["name"].to_pylist()
    assert (summary.number, names) == (2, [*sorted(TINY_COUNTS), "aaa"])
    assert newest(tmp_path / "root")["parent"] == json.loads(
        (tmp_path / "root/snapshots/00000001.json").read_text()
    ).get("id")


def test_another_collection_is_refused_unless_allowed(tiny_images: Path, tmp_path: Path) -> None:
    pipeline.build(tiny_images, tmp_path / "root")
    other = tmp_path / "other"
    shutil.copytree(tiny_images / "apple", other / "quince")
    flags = ("class-map", "class-vanished", "shrink")
    with pytest.raises(CommitError, match=".*".join(f"--allow {flag}" for flag in flags)):
        pipeline.build(other, tmp_path / "root")
    assert pipeline.open_snapshot(tmp_path / "root").number == 1
    assert pipeline.build(other, tmp_path / "root", allow=flags).number == 2


def test_too_many_rejects_are_refused(messy_images: Path, tmp_path: Path) -> None:
    with pytest.raises(CommitError, match="more than --max-rejects 4 allows"):
        pipeline.build(messy_images, tmp_path / "root", max_rejects=4)
    assert not list((tmp_path / "root").glob("snapshots/*"))


def test_nothing_readable_publishes_nothing(tmp_path: Path) -> None:
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "photos/a/1.jpg").write_bytes(b"no image")
    with pytest.raises(SourceError, match="no readable image"):
        pipeline.build(tmp_path / "photos", tmp_path / "root")
    assert not list((tmp_path / "root").glob("snapshots/*"))


def test_another_seed_needs_another_root(tiny_images: Path, tmp_path: Path) -> None:
    pipeline.build(tiny_images, tmp_path / "root")
    with pytest.raises(CommitError, match="built with seed 0, this build asks for 1"):
        pipeline.build(tiny_images, tmp_path / "root", seed=1)


@pytest.fixture(scope="module")
def oversampled(messy_root: Path) -> pipeline.Manifest:
    return pipeline.open_snapshot(messy_root).manifest("oversampled")


def test_stock_webdataset_counts_the_targets_in_exported_tars(oversampled: pipeline.Manifest, tmp_path: Path) -> None:
    plan = plan_export(oversampled, shard_samples=16)
    done = export_tars(oversampled, tmp_path / "out", plan)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    labels = np.array([int(sample["cls"]) for sample in samples])
    assert np.array_equal(np.bincount(labels, minlength=len(oversampled.targets)), oversampled.targets)
    assert len({sample["__key__"] for sample in samples}) == len(samples) == done.num_draws


def test_the_cost_of_an_export_is_told_exactly(oversampled: pipeline.Manifest, tmp_path: Path) -> None:
    plan = plan_export(oversampled, shard_samples=16)
    cost = export_cost(oversampled, plan)
    assert export_tars(oversampled, tmp_path / "out", plan).tar_bytes == cost.tar_bytes


def test_exports_repeat_byte_for_byte_and_go_on_where_they_stopped(
    oversampled: pipeline.Manifest, tmp_path: Path
) -> None:
    plan = plan_export(oversampled, shard_samples=16)
    export_tars(oversampled, tmp_path / "one", plan)
    export_tars(oversampled, tmp_path / "two", plan)
    gone = sorted((tmp_path / "two").glob("*.tar"))[1]
    gone.unlink()
    again = export_tars(oversampled, tmp_path / "two", plan)
    assert again.num_reused == again.num_shards - 1
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")


def test_an_export_never_mixes_with_another(oversampled: pipeline.Manifest, tmp_path: Path) -> None:
    export_tars(oversampled, tmp_path / "out", plan_export(oversampled))
    with pytest.raises(AlreadyExistsError, match="holds another export"):
        export_tars(oversampled, tmp_path / "out", plan_export(oversampled, seed=1))


def test_each_exported_tar_is_balanced_in_itself(oversampled: pipeline.Manifest, tmp_path: Path) -> None:
    """E3, in files."""
    plan = plan_export(oversampled, shard_samples=16)
    export_tars(oversampled, tmp_path / "out", plan)
    share = oversampled.targets / oversampled.num_draws
    for path in (tmp_path / "out").glob("*.tar"):
        labels = Counter(int(sample["cls"]) for sample in webdataset.WebDataset(str(path), shardshuffle=False))
        counts = np.array([labels[c] for c in range(len(share))])
        bound = 2 * (2 + 3 * np.sqrt(np.count_nonzero(share)) * share)
        assert np.all(np.abs(counts - counts.sum() * share) <= bound)


def test_a_table_of_targets_is_a_manifest(tiny_images: Path, tmp_path: Path) -> None:
    manifests = {"mine": {"policy": "explicit", "targets": {"fig": 9, "apple": 3}}}
    pipeline.build(tiny_images, tmp_path / "root", manifests=manifests)
    targets = pipeline.open_snapshot(tmp_path / "root").manifest("mine").targets
    assert dict(zip(sorted(TINY_COUNTS), targets.tolist(), strict=True)) == dict.fromkeys(TINY_COUNTS, 0) | {
        "fig": 9,
        "apple": 3,
    }


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(
    messy_images: Path, messy_root: Path, tmp_path: Path
) -> None:
    """B2 after SIGKILL of the driver; its workers die with it."""
    root = tmp_path / "root"
    command = [sys.executable, "-m", "jobs.build", str(messy_images), str(root), "--shard-samples", "10"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None and len(list(root.glob("runs/units/*/*.json"))) < 2:
            time.sleep(0.01)
        driver.kill()
    assert not list(root.glob("snapshots/*"))
    summary = pipeline.build(messy_images, root, shard_samples=10)
    assert 2 <= summary.num_reused_units < summary.num_units
    shutil.rmtree(root / "staging")  # what the killed build was writing; never read
    assert digests_of(root) == {path: hash for path, hash in digests_of(messy_root).items() if "staging/" not in path}


def test_files_that_change_places_and_keep_their_times_are_read_again(local_ray: None, tmp_path: Path) -> None:
    """B1: size and mtime alone would call both unchanged, and leave each label with the other's image."""
    source = tmp_path / "photos"
    for number, name in enumerate(("a", "b")):
        (source / name).mkdir(parents=True)
        draw_image(number, 0).resize((16, 16)).save(source / name / "0.bmp")
        os.utime(source / name / "0.bmp", (10**9, 10**9))
    pipeline.build(source, tmp_path / "root")
    (source / "a/0.bmp").rename(tmp_path / "aside")
    (source / "b/0.bmp").rename(source / "a/0.bmp")
    (tmp_path / "aside").rename(source / "b/0.bmp")
    assert pipeline.build(source, tmp_path / "root", allow=("class-map",)).changed
    rows, _ = check_root(tmp_path / "root")
    assert {row["path"]: row["sha256"].hex() for row in rows} == {
        f"{name}/0.bmp": hashlib.sha256((source / name / "0.bmp").read_bytes()).hexdigest() for name in "ab"
    }


def test_a_refused_build_leaves_no_trace(tiny_images: Path, tmp_path: Path) -> None:
    """The source above all is only read."""
    before = sorted(tiny_images.rglob("*"))
    with pytest.raises(UsageError, match="lies within the source"):
        pipeline.build(tiny_images, tiny_images / "out")
    with pytest.raises(SourceError, match="is not there"):
        pipeline.build(tmp_path / "nowhere", tmp_path / "root")
    assert sorted(tiny_images.rglob("*")) == before
    assert not (tmp_path / "root").exists()
