"""Rebuilds: nobody moves, only what changed is read, and what the notes are worth: time, never the result."""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from independent_checker import check_root, digests_of, newest, table
from PIL import Image
from serial_engine import SerialEngine, serial_engine

import pipeline
from pipeline.errors import CommitError
from pipeline.verify import verify

__all__ = ["serial_engine"]

pytestmark = pytest.mark.usefixtures("serial_engine")
ALL = ("class-map", "class-vanished", "rejects", "shrink")


def picture(number: int) -> bytes:
    """A small image, another one for each number."""
    stream = io.BytesIO()
    pixels = np.random.default_rng((3, number)).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class Collection:
    """A table of images on disk that can be edited: path -> (label, group)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, tuple[str, str]] = {}
        self._drawn = 0
        folder.mkdir()

    @property
    def source(self) -> Path:
        return self.folder / "photos.csv"

    def add(self, path: str, label: str, data: bytes | None = None, group: str = "") -> None:
        if data is None:
            data = picture(self._drawn)
            self._drawn += 1
        (self.folder / path).parent.mkdir(exist_ok=True)
        (self.folder / path).unlink(missing_ok=True)  # another inode, as most tools that replace a file do
        (self.folder / path).write_bytes(data)
        self.rows[path] = (label, group)

    def remove(self, path: str) -> None:
        (self.folder / path).unlink()
        del self.rows[path]

    def data(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def build(self, root: Path, **options: Any) -> pipeline.BuildSummary:
        with open(self.source, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "group"])
            writer.writerows((path, *rest) for path, rest in self.rows.items())
        return pipeline.build(self.source, root, **{"shard_samples": 6, "allow": ALL, **options})


@pytest.fixture
def photos(tmp_path: Path) -> Collection:
    made = Collection(tmp_path / "photos")
    for label, count in (("ant", 24), ("bee", 7), ("cow", 3), ("dog", 2), ("elk", 1)):
        for number in range(count):
            made.add(f"{label}-{number}.png", label)
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def splits_of(root: Path) -> dict[str, str]:
    return {row["path"]: row["split"] for row in check_root(root)[0]}


def reasons_of(root: Path) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in check_root(root)[1]}


def shards_of(root: Path) -> set[str]:
    return set(table(root, newest(root)["shards"])["tar_sha256"].to_pylist())


# ---- The law, over random histories


def edit(photos: Collection, rng: np.random.Generator) -> None:
    """One of everything that happens to a collection."""
    paths = sorted(photos.rows)
    path = str(rng.choice(paths))
    label, group = photos.rows[path]
    what = rng.integers(0, 9)
    fresh = f"new-{len(paths)}-{rng.integers(0, 10**6)}.png"
    other = str(rng.choice(["ant", "bee", "cow", "dog", "elk", "fox", "gnu"]))
    if what <= 1:
        photos.add(fresh, other, group=str(rng.choice(["", "g1", "g2", "g3"])))
    elif what == 2 and len(paths) > 8:
        photos.remove(path)
    elif what == 3:
        photos.add(path, label, group=group)  # other bytes
    elif what == 4:
        photos.rows[path] = (other, group)  # relabelled
    elif what == 5:
        photos.add(fresh, label, photos.data(path))  # a copy
    elif what == 6:
        photos.add(fresh, other, photos.data(path))  # a copy, mostly under another label
    elif what == 7:
        photos.rows[path] = (label, str(rng.choice(["", "g1", "g2", "g3"])))
    elif what == 8:
        photos.add(path, label, photos.data(path)[:-9], group)  # damaged


class Historian:
    """Remembers, apart from the code, where every key and content was."""

    def __init__(self) -> None:
        self.by_content: dict[bytes, str] = {}
        self.by_key: dict[str, str] = {}

    def check(self, root: Path) -> None:
        rows, _ = check_root(root)  # no group straddles splits, every file once
        counts: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            expected = self.by_content.get(row["sha256"]) or self.by_key.get(row["key"])
            assert expected in (None, row["split"]), f"{row['path']} moved from {expected} to {row['split']}"
            counts.setdefault(row["class_id"], []).append(row)
        known = {row["group"] for row in rows if row["sha256"] in self.by_content or row["key"] in self.by_key}
        for class_id, members in counts.items():
            trains = any(row["split"] == "train" for row in members)
            assert trains or all(row["group"] in known for row in members), f"class {class_id} cannot train"
        for row in rows:
            self.by_content[row["sha256"]] = self.by_key[row["key"]] = row["split"]


def listed_once(photos: Collection, root: Path) -> None:
    rows, rejects = check_root(root)
    assert sorted([row["path"] for row in rows] + [row["path"] for row in rejects]) == sorted(photos.rows)
    for row in rows:
        assert row["sha256"] == hashlib.sha256(photos.data(row["path"])).digest()


@pytest.mark.parametrize("seed", range(5))
def test_random_histories_move_nobody_and_need_no_notes(photos: Collection, root: Path, seed: int) -> None:
    rng, historian = np.random.default_rng(seed), Historian()
    photos.build(root)
    for _ in range(6):
        historian.check(root)
        for _ in range(rng.integers(0, 6)):
            edit(photos, rng)
        forgetful = root.parent / "forgetful"
        shutil.copytree(root, forgetful)
        shutil.rmtree(forgetful / "runs")
        photos.build(root)
        photos.build(forgetful)
        photos.build(forgetful)  # with nothing changed, nothing changes
        assert newest(forgetful) == newest(root)
        listed_once(photos, root)
        shutil.rmtree(forgetful)
    assert not verify(root).findings
