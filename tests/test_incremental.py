"""Rebuilds: nobody moves, only what changed is read, and what the notes are worth: time, never the result."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from independent_checker import check_root, newest, table
from PIL import Image
from serial_engine import SerialEngine, serial_engine

import pipeline
import pipeline.ingest.run
from pipeline.errors import CommitError, IntegrityError, SourceError, StoreError
from pipeline.ingest import known
from pipeline.ingest.manifests import add_manifest
from pipeline.ingest.scratch import Scratch
from pipeline.plan.policy import parse
from pipeline.store import Store
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
def test_random_histories_move_nobody_and_need_no_notes(
    photos: Collection, root: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed % 2:  # as of millions of images, whose columns are files
        monkeypatch.setattr(pipeline.ingest.run, "Scratch", partial(Scratch, min_bytes=1))
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


# ---- What is read, and what is rewritten


def test_with_nothing_changed_no_unit_runs(photos: Collection, root: Path, serial_engine: SerialEngine) -> None:
    first = photos.build(root)
    serial_engine.ran.clear()
    again = photos.build(root)
    assert (again.changed, again.number, again.num_read, again.num_units, serial_engine.ran) == (False, 1, 0, 0, [])
    assert (first.num_new_shards, again.num_new_shards) == (first.num_shards, 0)


def test_a_manifest_more_costs_the_next_build_nothing(
    photos: Collection, root: Path, serial_engine: SerialEngine
) -> None:
    photos.build(root)
    photos.add("some.png", "ant")
    photos.build(root)  # its units were read by two builds: no rerun of any would find them done
    add_manifest(str(root), "flat", parse("balanced:per_class=3"))
    serial_engine.ran.clear()
    again = photos.build(root)
    assert (again.number, again.changed, again.num_read, serial_engine.ran) == (3, False, 0, [])
    photos.add("more.png", "ant")
    assert photos.build(root).num_read == 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("what", ["add", "change", "remove"])
def test_one_image_touches_one_shard(photos: Collection, root: Path, seed: int, what: str) -> None:
    """B3: what changed lies below one node of one split's trie, and is what one shard became."""
    rng = np.random.default_rng(seed)
    for number in range(40):
        photos.add(f"more-{number}.png", "ant")
    photos.build(root)
    before = {
        (row["split"], row["prefix"]): row["tar_sha256"] for row in table(root, newest(root)["shards"]).to_pylist()
    }
    path = "one-more.png" if what == "add" else str(rng.choice(sorted(photos.rows)))
    if what == "remove":
        photos.remove(path)
    else:
        photos.add(path, photos.rows.get(path, ("ant", ""))[0], picture(1000 + seed))
    summary = photos.build(root)
    now = {(row["split"], row["prefix"]): row["tar_sha256"] for row in table(root, newest(root)["shards"]).to_pylist()}
    changed = {node for node in before.keys() | now.keys() if before.get(node) != now.get(node)}
    assert len({split for split, _ in changed}) == 1
    top = min((prefix for _, prefix in changed), key=len)
    assert changed
    assert all(prefix.startswith(top) for _, prefix in changed)
    assert len(changed & before.keys()) == 1 or len(changed & now.keys()) == 1
    assert (summary.num_read, summary.num_new_shards) == (0 if what == "remove" else 1, len(changed & now.keys()))


def lose(root: Path, rng: np.random.Generator, count: int) -> list[Path]:
    """Remove some tars of the newest snapshot."""
    chosen = rng.permutation(sorted(shards_of(root)))[:count].tolist()
    gone = [root / "shards" / digest[:2] / f"{digest}.tar" for digest in chosen]
    for path in gone:
        path.unlink()
    return gone


def num_samples(root: Path, tars: list[Path]) -> int:
    rows = table(root, newest(root)["shards"]).to_pylist()
    return sum(row["num_samples"] for row in rows if row["tar_sha256"] in {path.stem for path in tars})


@pytest.mark.parametrize("seed", range(4))
def test_tars_that_were_lost_come_back_with_the_next_build(photos: Collection, root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    photos.build(root)
    photos.add("more.png", "ant")  # so that some shards are no unit's of the last build
    photos.build(root)
    before = newest(root)
    gone = lose(root, rng, int(rng.integers(1, 4)))
    again = photos.build(root)
    assert (again.changed, again.num_read) == (False, num_samples(root, gone))
    assert newest(root) == before
    assert not verify(root).findings
    assert [notice for notice in again.notices if f"{len(gone)} tar(s) of snapshot 2 were gone" in notice]
    assert not [notice for notice in photos.build(root).notices if "were gone" in notice]


def test_a_lost_tar_and_a_change_are_one_build(photos: Collection, root: Path, tmp_path: Path) -> None:
    photos.build(root)
    spared = tmp_path / "spared"
    shutil.copytree(root, spared)
    gone = lose(root, np.random.default_rng(0), 2)
    photos.add("more.png", "ant")
    lost = num_samples(root, gone)
    assert photos.build(root).num_read == lost + 1
    photos.build(spared)
    assert newest(root) == newest(spared)
    assert not verify(root).findings


def test_a_lost_tar_whose_images_went_too_is_no_obstacle(photos: Collection, root: Path) -> None:
    photos.build(root)
    (gone,) = lose(root, np.random.default_rng(1), 1)
    prefix = next(row for row in pipeline.open_snapshot(root).shards.to_pylist() if row["tar_sha256"] == gone.stem)
    index = pa.ipc.open_file(root / "index" / prefix["index_sha256"][:2] / f"{prefix['index_sha256']}.arrow").read_all()
    for path in index["path"].to_pylist():
        photos.remove(path)
    assert photos.build(root).num_read == 0
    assert set(splits_of(root)) == set(photos.rows)


def test_a_tar_that_was_cut_short_stops_the_build_until_it_is_removed(photos: Collection, root: Path) -> None:
    photos.build(root)
    with pytest.raises(IntegrityError, match="remove that file and run again"):
        cut_and_build(photos, root)
    next(path for path in root.glob("shards/*/*.tar") if path.stat().st_size == 100).unlink()
    assert not photos.build(root).changed
    assert not verify(root).findings


def cut_and_build(photos: Collection, root: Path) -> None:
    digest = min(shards_of(root))
    with open(root / "shards" / digest[:2] / f"{digest}.tar", "r+b") as file:
        file.truncate(100)
    photos.build(root)


def test_touched_files_are_read_and_nothing_is_published(photos: Collection, root: Path) -> None:
    photos.build(root)
    for path in list(photos.rows)[:3]:
        photos.add(path, photos.rows[path][0], photos.data(path))
    again = photos.build(root)
    assert (again.num_read, again.changed) == (3, False)
    assert photos.build(root).num_read == 0


def test_rejects_stay_without_being_read(photos: Collection, root: Path) -> None:
    photos.add("bad.png", "ant", b"no image")
    photos.add("cut.png", "bee", picture(70)[:60])
    photos.build(root)
    photos.add("more.png", "cow")
    assert photos.build(root).num_read == 1
    assert reasons_of(root) == {"bad.png": "not-an-image", "cut.png": "truncated"}


def test_a_copy_takes_the_place_of_the_image_that_went(photos: Collection, root: Path) -> None:
    photos.build(root)
    where = splits_of(root)
    path = next(path for path, split in where.items() if split == "test")
    photos.add("copy.png", photos.rows[path][0], photos.data(path))
    assert photos.build(root).num_read == 1
    assert reasons_of(root) == {"copy.png": "duplicate-of"}
    photos.add("else.png", "ant")
    assert photos.build(root).num_read == 1  # not the copy
    photos.remove(path)
    assert photos.build(root).num_read == 1
    assert splits_of(root)["copy.png"] == "test"


def test_the_incumbent_of_two_copies_stays_whatever_its_key(photos: Collection, root: Path) -> None:
    photos.build(root)
    path = "ant-0.png"
    for number in range(8):
        photos.add(f"copy-{number}.png", "ant", photos.data(path))
    photos.build(root)
    assert set(reasons_of(root)) == {f"copy-{number}.png" for number in range(8)}


def test_a_label_conflict_ends_when_one_of_the_two_goes(photos: Collection, root: Path) -> None:
    photos.build(root)
    before = splits_of(root)
    photos.add("other.png", "bee", photos.data("ant-3.png"))
    photos.build(root)
    assert set(reasons_of(root).values()) == {"label-conflict"}
    photos.remove("other.png")
    assert photos.build(root).num_read == 1
    assert splits_of(root) == before


def test_a_header_check_is_repeated_by_decoding(photos: Collection, root: Path) -> None:
    photos.build(root, check="header")
    assert photos.build(root, check="decode").num_read == len(photos.rows)
    assert photos.build(root, check="header").num_read == 0


def test_another_limit_reads_what_it_may_change(photos: Collection, root: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (50, 50)).save(stream, "PNG")
    photos.add("large.png", "ant", stream.getvalue())
    photos.add("bad.png", "ant", b"no image")
    photos.build(root)
    assert photos.build(root, max_pixels=1000).num_read == 2  # the large one, and the reject
    assert reasons_of(root) == {"bad.png": "not-an-image", "large.png": "too-large"}
    assert photos.build(root, max_pixels=2500).num_read == 2
    assert reasons_of(root) == {"bad.png": "not-an-image"}


@pytest.mark.parametrize("damage", ["gone", "flipped", "empty", "no json"])
def test_damaged_notes_cost_reading_and_nothing_else(photos: Collection, root: Path, damage: str) -> None:
    photos.build(root)
    notes = next((root / "runs/sources").iterdir())
    shutil.rmtree(root / "runs/units")
    data = bytearray(notes.read_bytes())
    data[len(data) // 2] ^= 1
    notes.write_bytes({"gone": b"", "flipped": bytes(data), "empty": b"", "no json": b"{\n"}[damage])
    if damage == "gone":
        notes.unlink()
    if damage == "flipped":  # its first line is sound, and says that nothing changed
        assert photos.build(root).num_read == 0
        photos.add("more.png", "ant")
    again = photos.build(root)
    assert (again.num_read, again.changed) == (len(photos.rows), damage == "flipped")


def test_notes_with_more_settings_than_are_read_at_first_are_notes(
    photos: Collection, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos.build(root)
    monkeypatch.setattr(known, "_HEAD_BYTES", 30)
    assert photos.build(root).num_read == 0
    photos.add("more.png", "ant")
    assert photos.build(root).num_read == 1


def test_a_build_of_another_place_reads_all(photos: Collection, root: Path) -> None:
    photos.build(root)
    shutil.copytree(photos.folder, root.parent / "moved")
    photos.folder = root.parent / "moved"
    again = photos.build(root)
    assert (again.num_read, again.changed) == (len(photos.rows), False)


def test_what_was_read_before_a_failure_is_not_read_again(
    photos: Collection, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos.build(root)
    for number in range(9):
        photos.add(f"more-{number}.png", "ant")
    with monkeypatch.context() as broken:
        broken.setattr("pipeline.ingest.run.commit", lambda store, record: (_ for _ in ()).throw(CommitError("no")))
        with pytest.raises(CommitError):
            photos.build(root)
    again = photos.build(root)
    assert (again.changed, again.num_read) == (True, 0)


def test_finished_work_that_a_collection_may_take_is_done_again(photos: Collection, root: Path) -> None:
    photos.build(root)
    shutil.rmtree(root / "runs/sources")
    for path in [*root.rglob("*.tar"), *root.rglob("*.arrow")]:
        os.utime(path, (10**9, 10**9))
    assert photos.build(root).num_read == 0  # all of it is in the newest snapshot
    shutil.rmtree(root / "snapshots")
    shutil.rmtree(root / "runs/sources")
    for path in root.rglob("*.tar"):
        os.utime(path, (10**9, 10**9))
    assert photos.build(root).num_read == len(photos.rows)


# ---- Splits


def test_who_comes_back_goes_where_it_was(photos: Collection, root: Path) -> None:
    photos.build(root)
    before = splits_of(root)
    held = [path for path, split in before.items() if split != "train"]
    away = {path: (photos.rows[path][0], photos.data(path)) for path in held}
    for path in held:
        photos.remove(path)
    photos.build(root)
    photos.add("new.png", "ant")
    photos.build(root)
    for path, (label, data) in away.items():
        photos.add(path.replace(".png", "-renamed.png"), label, data)
    photos.build(root)
    now = splits_of(root)
    assert {path: now[path.replace(".png", "-renamed.png")] for path in held} == {path: before[path] for path in held}
    assert all(now[path] == split for path, split in before.items() if split == "train")


def test_other_bytes_under_the_same_name_stay_in_the_split(photos: Collection, root: Path) -> None:
    photos.build(root)
    for number in range(40):  # so that a build without a memory would choose others
        photos.add(f"later-{number}.png", "ant")
    photos.build(root)
    before = splits_of(root)
    for path in list(photos.rows):
        photos.add(path, photos.rows[path][0])
    photos.build(root)
    assert splits_of(root) == before


def test_a_relabelled_image_keeps_its_split(photos: Collection, root: Path) -> None:
    photos.build(root)
    before = splits_of(root)
    held = [path for path, split in before.items() if split == "test"]
    for path in held:
        photos.rows[path] = ("elk", "")
    assert photos.build(root).num_read == 0
    assert splits_of(root) == before
    classes = table(root, newest(root)["classes"]).to_pylist()
    assert next(row["test"] for row in classes if row["name"] == "elk") == len(held)


def test_a_group_joined_across_splits_loses_its_evaluation_members(photos: Collection, root: Path) -> None:
    photos.build(root)
    before = splits_of(root)
    one, two, three = (next(path for path in before if before[path] == split) for split in ("train", "val", "test"))
    for path in (one, two, three):
        photos.rows[path] = (photos.rows[path][0], "family")
    assert photos.build(root).num_read == 0
    assert reasons_of(root) == {two: "leak", three: "leak"}
    assert splits_of(root) == {path: split for path, split in before.items() if path not in (two, three)}
    for path in (one, two, three):
        photos.rows[path] = (photos.rows[path][0], "")
    assert photos.build(root).num_read == 2
    assert splits_of(root) == before


def test_a_class_whose_train_images_went_is_told(photos: Collection, root: Path) -> None:
    photos.build(root)
    where = splits_of(root)
    for path in [path for path in photos.rows if path.startswith("cow") and where[path] == "train"]:
        photos.remove(path)
    summary = photos.build(root)
    assert any("none in train (cow)" in notice for notice in summary.notices)
    photos.add("cow-new.png", "cow")
    photos.build(root)
    assert splits_of(root)["cow-new.png"] == "train"


def test_new_images_fill_the_places_of_val_and_test(photos: Collection, root: Path) -> None:
    photos.build(root)
    for step in range(6):
        for number in range(10):
            photos.add(f"ant-{step}-{number}.png", "ant")
        photos.build(root)
        splits = [split for path, split in splits_of(root).items() if path.startswith("ant")]
        quota = len(splits) // 10
        assert (splits.count("val"), splits.count("test")) == (quota, quota)


# ---- Guardrails


def test_a_renamed_class_is_no_new_class(photos: Collection, root: Path) -> None:
    photos.build(root)
    for path, (label, group) in list(photos.rows.items()):
        photos.rows[path] = ("wasp" if label == "bee" else label, group)
    told = r"of 5 classes .* 1 has most .* \(7 of 7 images of 'bee' are now 'wasp'\).* --allow class-map\. Nothing"
    with pytest.raises(CommitError, match=told):
        photos.build(root, allow=())
    assert photos.build(root, allow=("class-map",)).number == 2


def test_exchanged_ids_are_another_class_map(photos: Collection, root: Path) -> None:
    photos.build(root)
    swap = {"ant": "bee", "bee": "ant"}
    for path, (label, group) in list(photos.rows.items()):
        photos.rows[path] = (swap.get(label, label), group)
    with pytest.raises(CommitError, match=r"24 of 24 images of 'ant' are now 'bee', 7 of 7 images of 'bee' are now"):
        photos.build(root, allow=())


def test_a_few_new_labels_are_no_other_class_map(photos: Collection, root: Path) -> None:
    photos.build(root)
    for path in ("ant-0.png", "ant-1.png", "bee-0.png"):
        photos.rows[path] = ("cow", "")
    assert photos.build(root, allow=()).number == 2


def test_a_vanished_class_stops_the_commit(photos: Collection, root: Path) -> None:
    photos.build(root)
    photos.remove("elk-0.png")
    with pytest.raises(
        CommitError, match=r"1 of 5 classes .* no image in this source \(elk\).* --allow class-vanished"
    ):
        photos.build(root, allow=())
    assert photos.build(root, allow=("class-vanished",)).number == 2


def test_a_shrunken_source_stops_the_commit(photos: Collection, root: Path) -> None:
    photos.build(root)
    for number in range(4):
        photos.remove(f"ant-{number}.png")
    with pytest.raises(
        CommitError, match=r"4 of 37 images .* \(10\.8%\), more than --max-shrink 0\.1 .*--allow shrink"
    ):
        photos.build(root, allow=())
    with pytest.raises(CommitError, match="more than --max-shrink 3 allows"):
        photos.build(root, allow=(), max_shrink=3)
    assert photos.build(root, allow=(), max_shrink=4).number == 2


def test_moved_and_replaced_images_are_not_lost(photos: Collection, root: Path) -> None:
    photos.build(root)
    for number in range(6):
        data = photos.data(f"ant-{number}.png")
        photos.remove(f"ant-{number}.png")
        photos.add(f"moved/ant-{number}.png", "ant", data)
        photos.add(f"ant-{number + 6}.png", "ant")
    assert photos.build(root, allow=()).number == 2


@pytest.mark.parametrize("limit", [1, 0.04])
def test_too_many_rejects_stop_the_commit(photos: Collection, root: Path, limit: float) -> None:
    photos.build(root)
    for number in range(2):
        photos.add(f"bad-{number}.png", "ant", b"no image")
    with pytest.raises(CommitError, match=rf"2 of 39 entries .* --max-rejects {limit} .*--allow rejects"):
        photos.build(root, allow=(), max_rejects=limit)
    assert photos.build(root, allow=("rejects",), max_rejects=limit).number == 2


def test_all_that_was_hit_is_told_at_once(photos: Collection, root: Path) -> None:
    photos.build(root)
    for path in [path for path in photos.rows if path.startswith(("ant", "elk"))]:
        photos.remove(path)
    with pytest.raises(CommitError, match=r"2 of 5 classes .*class-vanished; 25 of 37 images .*shrink\. Nothing"):
        photos.build(root, allow=())
    assert pipeline.open_snapshot(root).number == 1


# ---- What fails early, and what may not fail any more


def test_a_source_without_train_stops_before_anything_is_read(
    photos: Collection, root: Path, serial_engine: SerialEngine
) -> None:
    (photos.folder / "splits.csv").write_text(
        "path,label,split\n" + "".join(f"{path},{label},test\n" for path, (label, _) in photos.rows.items())
    )
    with pytest.raises(SourceError, match=r"has no image in train, only in test: .*--split-from none"):
        pipeline.build(photos.folder / "splits.csv", root)
    assert serial_engine.ran == []


def test_a_log_that_cannot_be_written_is_told_and_no_failure(
    photos: Collection, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create

    def refuse(self: Store, path: str, data: bytes) -> None:
        if path.startswith("runs/builds/"):
            raise StoreError(f"cannot create {path}: no space")
        create(self, path, data)

    monkeypatch.setattr(Store, "create", refuse)
    summary = photos.build(root)
    assert "snapshot 1 is published, but the log of this build could not be written: cannot" in summary.notices[-1]
    assert pipeline.open_snapshot(root).number == 1
