"""Races in small; ``tests/soak/races.py`` runs a thousand of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from races import race_commits, read_during
from real_servers import s3
from tiny_snapshot import write_snapshot

import pipeline
from pipeline.snapshot import newest_number
from pipeline.store import Store
from pipeline.verify import verify

COUNTS = {"train": (9, 2, 1), "val": (0, 0, 0), "test": (2, 1, 0)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_snapshot(tmp_path / "root", COUNTS, {"natural": "natural"})
    return tmp_path / "root"


@pytest.fixture
def bucket(root: Path) -> Iterator[str]:
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with s3(root):
        yield "s3://bucket/root"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_racing_commits_have_one_winner_each(root: Path, tmp_path: Path) -> None:
    assert race_commits(str(root), 4, 20, tmp_path) == []
    assert newest_number(Store(str(root))) == 21


def test_racing_commits_on_s3_have_one_winner_each(bucket: str, tmp_path: Path) -> None:
    assert race_commits(bucket, 3, 3, tmp_path) == []
    assert newest_number(Store(bucket)) == 4


def test_readers_of_the_newest_never_miss_a_file(local_ray: None, tiny_images: Path, tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    shutil.copytree(tiny_images, source)

    def rebuild() -> None:
        number = len(list((source / "apple").iterdir()))
        (source / f"apple/{number:03d}.jpg").write_bytes((source / "apple/000.jpg").read_bytes() + b"%d" % number)
        pipeline.build(source, root, shard_samples=8)

    rebuild()
    done = read_during(root, 3, [rebuild] * 3, 1.0, tmp_path)
    assert done.errors == []
    assert done.num_removed > 10
    assert len(done.snapshots) > 2
    assert done.num_opened > 10
    assert verify(root).sound
