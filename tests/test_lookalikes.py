"""Near duplicates in builds: pictures that look alike share a split, nobody is rejected for it, nobody moves."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from independent_checker import check_root, digests_of, newest
from PIL import Image
from serial_engine import SerialEngine, serial_engine
from test_incremental import Collection, Historian, edit, listed_once, reasons_of

import pipeline
from pipeline.cli import run
from pipeline.cli.commands import build as build_command
from pipeline.config import make_config
from pipeline.errors import ConfigError, IntegrityError
from pipeline.images import Facts
from pipeline.ingest import neardup
from pipeline.ingest.layout import to_fetch
from pipeline.ingest.lookalikes import count_lookalikes, huge_groups, join_lookalikes
from pipeline.ingest.past import load_past
from pipeline.ingest.scratch import Scratch
from pipeline.ingest.settle import Samples, settle
from pipeline.ingest.shards import Packer, TarWriter
from pipeline.ingest.units import Hashing, Pack, Part, Repack
from pipeline.schema import HASHED_INDEX, INDEX, SPLITS, FileRef
from pipeline.snapshot import encode_record, open_snapshot
from pipeline.snapshot.record import decode_record
from pipeline.store import Store, table_to_ipc
from pipeline.verify import Code, verify

__all__ = ["serial_engine"]


def scene(number: int, variant: int = 0) -> bytes:
    """A smooth picture; variants of one number are a few grey levels apart, and have other bytes."""
    grid = np.random.default_rng((7, number)).integers(20, 236, (6, 7, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(grid).resize((36, 32), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = np.random.default_rng((8, number, variant)).integers(-2, 3, pixels.shape) if variant else 0
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


class Scenes(Collection):
    """New images are often variants of images that were drawn before."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder)
        self._rng = np.random.default_rng((9, seed))

    def add(self, path: str, label: str, data: bytes | None = None, group: str = "") -> None:
        if data is None:
            data = scene(int(self._rng.integers(0, 40)), int(self._rng.integers(0, 1000)))
        super().add(path, label, data, group)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def photos(tmp_path: Path) -> Collection:
    """24 ants, all different; 12 bees in six pairs of look-alikes; 5 cows."""
    made = Collection(tmp_path / "photos")
    for number in range(24):
        made.add(f"ant-{number}.png", "ant", scene(number))
    for number in range(12):
        made.add(f"bee-{number}.png", "bee", scene(100 + number // 2, number))
    for number in range(5):
        made.add(f"cow-{number}.png", "cow", scene(200 + number))
    return made


def rows_of(root: Path) -> list[dict[str, Any]]:
    return check_root(root)[0]


def assert_lookalikes_share_a_split(root: Path, bits: int) -> None:
    """All pairs, by brute force, on what the indexes say."""
    rows = [row for row in rows_of(root) if row["phash"] is not None]
    for number, one in enumerate(rows):
        for two in rows[:number]:
            if (one["phash"] ^ two["phash"]).bit_count() <= bits:
                assert (one["split"], one["group"]) == (two["split"], two["group"]), (one["path"], two["path"])


# ---- What it does


@pytest.mark.usefixtures("serial_engine")
def test_lookalikes_share_a_split_and_none_is_rejected(photos: Collection, root: Path) -> None:
    summary = photos.build(root, near_duplicates=6)
    assert (summary.num_rejects, summary.num_images) == (0, 41)
    assert summary.near_duplicates == {"num_groups": 6, "num_images": 12}
    assert open_snapshot(root).record.near_duplicates == summary.near_duplicates
    assert_lookalikes_share_a_split(root, 6)
    bees = [row for row in rows_of(root) if row["path"].startswith("bee")]
    assert len({row["group"] for row in bees}) == 6
    # Six groups: one in val, one in test, two images each.
    assert sorted(row["split"] for row in bees) == ["test"] * 2 + ["train"] * 8 + ["val"] * 2
    assert verify(root).sound
    again = photos.build(root, near_duplicates=6)
    assert (again.changed, again.num_read, again.near_duplicates) == (False, 0, summary.near_duplicates)


@pytest.mark.usefixtures("serial_engine")
def test_without_the_key_they_would_be_torn(photos: Collection, root: Path) -> None:
    photos.build(root)
    assert "phash" not in rows_of(root)[0]
    bees = {row["path"]: row["split"] for row in rows_of(root) if row["path"].startswith("bee")}
    assert any(bees[f"bee-{n}.png"] != bees[f"bee-{n + 1}.png"] for n in range(0, 12, 2))


def test_a_build_without_the_key_is_the_build_that_it_was() -> None:
    """Neither the meaning of a config nor the bytes of an index know of the key; golden since before it existed."""
    assert "near_duplicates" not in make_config(source="a", root="b").meaning()
    assert make_config(source="a", root="b", near_duplicates=6).meaning()["near_duplicates"] == 6
    plain = packed_index([None], hashed=False)
    assert plain.schema.equals(INDEX)
    digest = hashlib.sha256(table_to_ipc(plain)).hexdigest()
    assert digest == "c887d8b955c705327fe3b6d45efc5b5aedbba270aee817a4818d1d0ebe6644c5"
    hashed = packed_index([1 << 63, None], hashed=True)
    assert hashed.schema.equals(HASHED_INDEX)
    assert hashed["phash"].to_pylist() == [1 << 63, None]


def packed_index(phashes: list[int | None], *, hashed: bool) -> pa.Table:
    """The index of images of which these hashes are told."""
    tar = TarWriter(io.BytesIO())
    inspector = SimpleNamespace(hashed=hashed)
    packer = Packer(SimpleNamespace(add=tar.add_sample), inspector)  # type: ignore[arg-type]
    for key, phash in enumerate(phashes):
        inspector.inspect = lambda data, path, phash=phash: Facts(2, 3, "jpg", "RGB", phash)
        assert packer.take("a/b.jpg", key, 3, b"an image", 8)
    count = len(phashes)
    class_id, group = pa.array([3] * count, pa.int32()), pa.array([5] * count, pa.uint64())
    return packer.index(pa.array(["a/b.jpg"] * count), class_id, pa.array(["train"] * count), group)


def build_a_copy(photos: Collection, folder: Path, seed: int, **options: Any) -> Path:
    """Build from the same images under the same names, listed in another order and with other times."""
    rng, copy = np.random.default_rng(seed), Collection(folder / "copy")
    for path in rng.permutation(sorted(photos.rows)).tolist():
        copy.add(path, photos.rows[path][0], photos.data(path))
        os.utime(copy.folder / path, ns=(seed, int(rng.integers(0, 10**18))))
    copy.build(folder / "other", near_duplicates=6, **options)
    return folder / "other"


@pytest.mark.usefixtures("serial_engine")
@pytest.mark.parametrize("seed", range(3))
def test_any_order_gives_the_same_bytes(photos: Collection, root: Path, tmp_path: Path, seed: int) -> None:
    photos.build(root, near_duplicates=6)
    assert digests_of(build_a_copy(photos, tmp_path, seed)) == digests_of(root)


@pytest.mark.parametrize("check", ["decode", "header"])
def test_any_number_of_workers_gives_the_same_bytes(photos: Collection, root: Path, tmp_path: Path, check: str) -> None:
    photos.build(root, near_duplicates=6, check=check, address="none", workers=1)
    other = build_a_copy(photos, tmp_path, 1, check=check, address="none", workers=2)
    assert digests_of(other) == digests_of(root)


@pytest.mark.usefixtures("serial_engine")
def test_the_header_check_decodes_for_the_hash(photos: Collection, root: Path) -> None:
    whole = photos.data("ant-3.png")
    photos.add("ant-3.png", "ant", whole[:60] + bytes(40) + whole[100:])  # its chunks end as they should
    summary = photos.build(root, near_duplicates=6, check="header")
    assert set(reasons_of(root)) == {"ant-3.png"}
    assert summary.near_duplicates == {"num_groups": 6, "num_images": 12}


@pytest.mark.usefixtures("serial_engine")
def test_blank_pictures_are_not_alike(tmp_path: Path, root: Path) -> None:
    photos = Collection(tmp_path / "photos")
    for number in range(8):
        stream = io.BytesIO()
        Image.new("RGB", (20 + number, 20), (number, number, number)).save(stream, "PNG")
        photos.add(f"{number}.png", "ant", stream.getvalue())
    summary = photos.build(root, near_duplicates=8)
    assert summary.near_duplicates == {"num_groups": 0, "num_images": 0}
    assert [row["phash"] for row in rows_of(root)] == [None] * 8
    assert verify(root).sound


@pytest.mark.usefixtures("serial_engine")
def test_lookalikes_in_tars(tmp_path: Path, root: Path) -> None:
    (tmp_path / "tars").mkdir()
    for part in range(2):
        with tarfile.open(tmp_path / f"tars/{part}.tar", "w") as tar:
            for number in range(part, 24, 2):  # the two of a pair lie in two tars
                for extension, data in (("png", scene(number // 2, number)), ("cls", b"bee")):
                    member = tarfile.TarInfo(f"{number:02d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    summary = pipeline.build(tmp_path / "tars", root, near_duplicates=6, shard_samples=6)
    assert summary.near_duplicates == {"num_groups": 12, "num_images": 24}
    assert_lookalikes_share_a_split(root, 6)
    assert verify(root).sound


# ---- Rebuilds


@pytest.mark.usefixtures("serial_engine")
@pytest.mark.parametrize("seed", range(6))
def test_random_histories_move_nobody_and_need_no_notes(tmp_path: Path, root: Path, seed: int) -> None:
    """As in test_incremental, with the key switched on, off and to other distances on the way."""
    photos, rng, historian = Scenes(tmp_path / "photos", seed), np.random.default_rng(seed), Historian()
    for number in range(40):
        photos.add(f"{number}.png", ["ant", "bee", "cow"][number % 3])
    keys = [None, 6, 6, 6, None, 3, 6] if seed % 2 else [6, 6, 6, 8, 2, None, 6]
    photos.build(root, near_duplicates=keys[0])
    for key in keys[1:]:
        historian.check(root)
        for _ in range(rng.integers(0, 6)):
            edit(photos, rng)
        forgetful = root.parent / "forgetful"
        shutil.copytree(root, forgetful)
        shutil.rmtree(forgetful / "runs")
        photos.build(root, near_duplicates=key)
        photos.build(forgetful, near_duplicates=key)
        photos.build(forgetful, near_duplicates=key)  # with nothing changed, nothing changes
        assert newest(forgetful) == newest(root)
        listed_once(photos, root)
        if key:
            assert_lookalikes_share_a_split(root, key)
        found = verify(root)
        assert found.sound, found.findings
        shutil.rmtree(forgetful)


@pytest.mark.usefixtures("serial_engine")
def test_a_new_lookalike_goes_where_the_old_one_is(photos: Collection, root: Path) -> None:
    photos.build(root, near_duplicates=6)
    for split in SPLITS:
        old = next(row for row in rows_of(root) if row["split"] == split and row["path"].startswith("ant"))
        number = int(old["path"][4:-4])
        photos.add(f"new-{split}.png", "ant", scene(number, 77))
        assert photos.build(root, near_duplicates=6).num_read == 1
        new = next(row for row in rows_of(root) if row["path"] == f"new-{split}.png")
        assert new["split"] == split
    assert all(row["phash"] is not None for row in rows_of(root))


@pytest.mark.usefixtures("serial_engine")
def test_switched_on_it_reads_all_once_and_lookalikes_across_splits_leave_evaluation(
    photos: Collection, root: Path
) -> None:
    photos.build(root)
    before = {row["path"]: row["split"] for row in rows_of(root)}
    summary = photos.build(root, near_duplicates=6)
    assert summary.num_read == 41
    after = {row["path"]: row["split"] for row in rows_of(root)}
    leaks = reasons_of(root)
    assert leaks
    assert set(leaks.values()) == {"leak"}
    assert {path: before[path] for path in after} == after  # nobody moved
    for path in leaks:
        pair = f"bee-{int(path[4:-4]) ^ 1}.png"
        assert SPLITS.index(before[path]) > SPLITS.index(before[pair]) == SPLITS.index(after[pair])
    assert all("looks like" in row["detail"] for row in check_root(root)[1])
    # Whoever left is compared again tomorrow, without being read.
    photos.add("ant-new.png", "ant", scene(900))
    assert photos.build(root, near_duplicates=6).num_read == 1
    assert reasons_of(root) == leaks
    # It comes back when nothing looks like it any more.
    path = next(iter(leaks))
    photos.remove(f"bee-{int(path[4:-4]) ^ 1}.png")
    photos.build(root, near_duplicates=6)
    assert {row["path"]: row["split"] for row in rows_of(root)}[path] == before[path]


@pytest.mark.usefixtures("serial_engine")
def test_another_distance_and_switching_off_read_nothing(photos: Collection, root: Path) -> None:
    photos.build(root, near_duplicates=6)
    assert photos.build(root, near_duplicates=1).num_read == 0
    summary = photos.build(root)
    assert (summary.num_read, summary.near_duplicates) == (0, None)
    assert "phash" not in rows_of(root)[0]
    assert newest(root)["format_version"] == 2


@pytest.mark.usefixtures("serial_engine")
def test_notes_that_claim_hashes_which_the_index_lacks_are_not_believed(photos: Collection, root: Path) -> None:
    from pipeline.ingest import known

    photos.build(root)
    (notes,) = (root / "runs/sources").iterdir()
    head, _, body = notes.read_bytes().partition(b"\n")
    notes.write_bytes(head.replace(b'"settings": {', b'"settings": {"hashed": true, ') + b"\n" + body)
    assert known.read_notes(open_snapshot(root).store, open_snapshot(root).id).settings["hashed"] is True
    assert photos.build(root, near_duplicates=6).num_read == 41


@pytest.mark.usefixtures("serial_engine")
def test_the_sources_word_comes_first(tmp_path: Path, root: Path) -> None:
    """Splits that the source gives are kept; of look-alikes across them, those of the later split leave."""
    for split, offset in (("train", 0), ("test", 8)):
        for number in range(12):
            path = tmp_path / f"photos/{split}/ant/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(scene(offset + number, 1 + offset))
    pipeline.build(tmp_path / "photos", root, split_from="top", near_duplicates=6)
    assert sorted(reasons_of(root)) == [f"test/ant/{number}.png" for number in range(4)]
    assert all(row["path"].startswith(row["split"]) for row in rows_of(root))


# ---- Numbers, warnings, words


def test_groups_are_joined_by_what_stays_alone() -> None:
    phash = np.array([0, 1, 3, 7, 0], np.uint64)
    hashing = np.array([2, 2, 2, 2, 1], np.int8)
    group = np.array([50, 40, 30, 20, 10], np.uint64)
    joined, alike = join_lookalikes(phash, hashing, group, np.array([0, 1, 2, 3, 4]), max_distance=1)
    assert joined.tolist() == [20, 20, 20, 20, 10]
    assert alike.tolist() == [True] * 4 + [False]
    joined, alike = join_lookalikes(phash, hashing, group, np.array([0, 1, 3, 4]), max_distance=1)
    assert joined.tolist() == [40, 40, 30, 20, 10]
    assert count_lookalikes(joined, alike) == {"num_groups": 1, "num_images": 2}
    assert Hashing.KNOWN == 2
    assert count_lookalikes(np.array([1, 1, 2], np.uint64), np.ones(3, np.bool_)) == {"num_groups": 1, "num_images": 2}


def test_whose_hash_is_not_known_is_fetched_even_if_its_group_leaves(photos: Collection) -> None:
    """It may look like a third one: a build that reads everything would know."""
    past = load_past(Store(str(photos.folder)), None, Scratch())
    number = np.arange(3)
    samples = Samples(
        reference=number.astype(np.int32),
        key=number.astype(np.uint64),
        class_id=np.zeros(3, np.int32),
        given=np.array([0, 1, 1], np.int8),
        group=np.array([0, 1, 1], np.uint64),
        size=number,
        digest=np.arange(12, dtype=np.uint64).reshape(3, 4),
        pack=np.array([0, 0, -1], np.int32),
        row=number.astype(np.int32),
        held_class=np.zeros(3, np.int32),
        held_split=np.array([0, 1, -1], np.int8),
        held_group=np.zeros(3, np.uint64),
        phash=np.array([7, 3, 0], np.uint64),
        hashing=np.array([Hashing.KNOWN, Hashing.KNOWN, Hashing.UNKNOWN], np.int8),
    )
    settled = settle(samples, past, num_classes=1, seed=0, near=2)
    assert settled.split.tolist() == [0, -1, -1]
    assert (to_fetch(samples, settled, 3) >= 0).tolist() == [False, False, True]
    assert np.all(to_fetch(samples, settle(samples, past, num_classes=1, seed=0), 3) == [-1, -1, 1])


@pytest.mark.usefixtures("serial_engine")
def test_a_huge_group_is_told_with_its_class_and_what_to_do(tmp_path: Path, root: Path) -> None:
    photos = Collection(tmp_path / "photos")
    for number in range(60):
        photos.add(f"ant-{number}.png", "ant", scene(number if number < 35 else 0, number))
        photos.add(f"bee-{number}.png", "bee", scene(100 + number if number > 8 else 100, number))
    _, notice = photos.build(root, near_duplicates=6).notices  # the first one is of the table
    assert notice.startswith("1 group of look-alikes is huge")
    assert "26 images, 26 of them among the 60 of class 'ant'" in notice
    assert "lower near_duplicates, now 6" in notice


def test_the_largest_groups_are_told_first_and_small_ones_not() -> None:
    sizes = [300, 21, 20, 40, 30]
    group = np.repeat(np.arange(5, dtype=np.uint64), sizes)
    class_id = np.repeat(np.array([0, 1, 1, 2, 3], np.int32), sizes)
    class_id[:2] = 4
    alike = np.ones(len(group), np.bool_)
    (told,) = huge_groups(group, alike, class_id, list("abcde"), max_distance=6)
    assert told.startswith("4 groups of look-alikes are huge")
    assert "300 images, 298 of them among the 298 of class 'a', the rest of 1 more class; 40 images" in told
    assert "; ..." in told
    many = np.append(class_id, np.zeros(5000, np.int32))
    padded = np.append(group, np.arange(10, 5010, dtype=np.uint64))
    (told,) = huge_groups(padded, np.append(alike, np.zeros(5000, np.bool_)), many, list("abcde"), max_distance=6)
    assert told.startswith("3 groups of look-alikes are huge")


def test_the_same_rows_with_and_without_hashes_are_two_units() -> None:
    ref = FileRef(sha256="0" * 64, size=1, num_rows=1)
    part = Part(Pack(ref, ref), np.zeros(1, np.int32))
    unit = Repack(name="x", split="val", parts=(part,), class_id=np.zeros(1, np.int32), group=np.zeros(1, np.uint64))
    assert unit.with_digest().digest != replace(unit, hashed=True).with_digest().digest


@pytest.mark.parametrize("bits", [0, 9, -1, True, "6"])
def test_a_distance_out_of_range(bits: object) -> None:
    with pytest.raises(ConfigError, match="near_duplicates"):
        make_config(source="a", root="b", near_duplicates=bits)


def test_the_config_allows_what_the_search_can() -> None:
    make_config(source="a", root="b", near_duplicates=neardup.MAX_DISTANCE)


@pytest.mark.usefixtures("serial_engine")
def test_the_command_takes_it_and_tells_what_it_found(
    photos: Collection, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos.build(root)
    shutil.rmtree(root)
    arguments = [str(photos.source), str(root), "--near-duplicates", "6", "--quiet", "--group-column", "group"]
    assert run(build_command, arguments) == 0
    assert "look-alike 12 images in 6 groups, each in one split" in capsys.readouterr().out


# ---- What verify finds, what a record may say


@pytest.fixture
def changed_index(photos: Collection, root: Path, serial_engine: SerialEngine) -> Any:
    """Publish the newest snapshot again, with the index of its first shard edited."""
    from test_verify import edit_table, set_row

    photos.build(root, near_duplicates=6, shard_samples=1000)

    def change(edit: Any) -> None:
        snapshot = open_snapshot(root)
        data = table_to_ipc(edit(snapshot.index(0)))
        digest = hashlib.sha256(data).hexdigest()
        path = root / f"index/{digest[:2]}/{digest}.arrow"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        new = {"index_sha256": digest, "index_size": len(data)}
        edit_table(root, "shards", snapshot.shards.schema, lambda table: set_row(table, 0, **new))

    return change


def test_verify_finds_lookalikes_in_two_groups(root: Path, changed_index: Any) -> None:
    assert verify(root).sound

    def edit(index: pa.Table) -> pa.Table:
        place = (
            index["path"].to_pylist().index(next(path for path in index["path"].to_pylist() if path.startswith("bee")))
        )
        group = index["group"].to_pylist()
        group[place] = 12345
        return index.set_column(index.column_names.index("group"), INDEX.field("group"), pa.array(group, pa.uint64()))

    changed_index(edit)
    (finding,) = verify(root).findings
    assert finding.code == Code.GROUP
    assert "look alike within 6 bits" in finding.detail


def test_verify_finds_an_index_without_hashes(root: Path, changed_index: Any) -> None:
    changed_index(lambda index: index.drop_columns(["phash"]))
    assert {finding.code for finding in verify(root).findings} == {Code.GROUP}
    assert "no perceptual hashes" in verify(root).findings[0].detail


@pytest.mark.parametrize("said", [{}, {"num_groups": 1}, {"num_groups": 1, "num_images": -2}, [1, 2]])
def test_a_record_that_miscounts_is_refused(photos: Collection, root: Path, serial_engine: Any, said: Any) -> None:
    photos.build(root, near_duplicates=6)
    record = open_snapshot(root).record
    assert decode_record(encode_record(record), "x") == record
    with pytest.raises(IntegrityError, match="x"):
        decode_record(encode_record(replace(record, near_duplicates=said)), "x")
