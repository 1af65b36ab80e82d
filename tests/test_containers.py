"""Builds from tars and Parquet files: B1, B2, what changed is read again, damage stays where it is."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import TINY_COUNTS
from containers import Sample, parquet_of, put, samples_of, tar_of
from independent_checker import check_root, digests_of
from serial_engine import SerialEngine, serial_engine

import pipeline
from pipeline.errors import CommitError, SourceError
from pipeline.ingest import source_parquet
from pipeline.verify import verify

__all__ = ["serial_engine"]

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

Files = dict[str, bytes]


@pytest.fixture(scope="session")
def samples(tiny_images: Path) -> list[Sample]:
    found = samples_of(tiny_images)
    random.Random(0).shuffle(found)
    return found


def as_tars(samples: list[Sample], number: int = 4) -> Files:
    return {f"{part:05d}.tar": tar_of(samples[part::number]) for part in range(number)}


def as_parquet(samples: list[Sample], number: int = 3, **options: Any) -> Files:
    return {f"data/{part:05d}.parquet": parquet_of(samples[part::number], **options) for part in range(number)}


def rows_of(root: Path) -> set[tuple[str, str]]:
    """(label, SHA-256) of every image of the newest snapshot, each compared with its tar by the independent checker."""
    rows, _ = check_root(root)
    names = pipeline.open_snapshot(root).classes["name"].to_pylist()
    return {(names[row["class_id"]], row["sha256"].hex()) for row in rows}


def expected(samples: list[Sample]) -> set[tuple[str, str]]:
    return {(label, hashlib.sha256(data).hexdigest()) for _, label, data in samples}


def build(source: Path, root: Path, **options: Any) -> pipeline.BuildSummary:
    return pipeline.build(source, root, shard_samples=20, **options)


KINDS = {
    "tar": as_tars,
    "gzip": lambda samples: {f"{name}.gz": gzip.compress(data, 1, mtime=0) for name, data in as_tars(samples).items()},
    "parquet": as_parquet,
    "named": lambda samples: as_parquet(samples, names=sorted(TINY_COUNTS)),
    "both": lambda samples: {**as_tars(samples[:30]), **as_parquet(samples[30:])},
}


@pytest.mark.parametrize("kind", KINDS)
def test_containers_hold_what_the_folder_held(
    samples: list[Sample], tmp_path: Path, kind: str, serial_engine: SerialEngine
) -> None:
    """The same images, packed in any way, give the same set of (label, bytes), and nothing is lost."""
    source = put(tmp_path / "source", KINDS[kind](samples))
    summary = build(source, tmp_path / "root")
    assert rows_of(tmp_path / "root") == expected(samples)
    assert (summary.num_images, summary.num_rejects) == (61, 0)
    assert verify(str(tmp_path / "root")).findings == ()
    classes = pipeline.open_snapshot(tmp_path / "root").classes
    assert dict(zip(classes["name"].to_pylist(), classes["count"].to_pylist(), strict=True)) == TINY_COUNTS


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_one_file_is_a_source_too(
    samples: list[Sample], tmp_path: Path, kind: str, serial_engine: SerialEngine
) -> None:
    data = tar_of(samples) if kind == "tar" else parquet_of(samples)
    source = put(tmp_path, {f"all.{kind}": data}) / f"all.{kind}"
    build(source, tmp_path / "root")
    assert rows_of(tmp_path / "root") == expected(samples)
    rows, _ = check_root(tmp_path / "root")
    assert {row["path"] for row in rows} == {f"all.{kind}/{name}" for name, _, _ in samples}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bytes_do_not_depend_on_workers_or_engine(
    samples: list[Sample], tmp_path: Path, workers: int, local_ray: None, request: pytest.FixtureRequest
) -> None:
    """B2, on Ray and without it."""
    source = put(tmp_path / "source", KINDS["both"](samples))
    build(source, tmp_path / "ray", workers=workers)
    request.getfixturevalue("serial_engine")
    build(put(tmp_path / "copy", KINDS["both"](samples)), tmp_path / "serial")
    assert digests_of(tmp_path / "ray") == digests_of(tmp_path / "serial")


@pytest.mark.usefixtures("serial_engine")
class TestRebuilds:
    """Only containers that changed are read; what is known of the others is what reading them again would give."""

    @pytest.fixture
    def source(self, samples: list[Sample], tmp_path: Path) -> Path:
        return put(tmp_path / "source", KINDS["both"](samples))

    def test_nothing_changed_reads_nothing(self, source: Path, tmp_path: Path, serial_engine: SerialEngine) -> None:
        build(source, tmp_path / "root")
        before, ran = digests_of(tmp_path / "root"), len(serial_engine.ran)
        again = build(source, tmp_path / "root")
        assert (again.changed, again.num_read) == (False, 0)
        assert len(serial_engine.ran) == ran
        assert digests_of(tmp_path / "root") == before

    @pytest.mark.parametrize("with_first_pass", [False, True])
    def test_lost_tars_come_back(self, source: Path, tmp_path: Path, with_first_pass: bool) -> None:
        root = tmp_path / "root"
        build(source, root)
        before = digests_of(root)
        named = set(pipeline.open_snapshot(root).shards["tar_sha256"].to_pylist())
        for tar in root.glob("shards/*/*.tar"):
            if with_first_pass or tar.stem in named:
                tar.unlink()
        again = build(source, root)
        assert not again.changed
        assert (again.num_read > 0) == with_first_pass  # else what the containers became is still there to copy from
        assert {name: digest for name, digest in digests_of(root).items() if name in before} == before
        assert build(source, root).num_read == 0

    def test_one_changed_container_is_read_alone(
        self, source: Path, tmp_path: Path, samples: list[Sample], serial_engine: SerialEngine
    ) -> None:
        build(source, tmp_path / "root")
        shards = set(pipeline.open_snapshot(tmp_path / "root").shards["tar_sha256"].to_pylist())
        splits = {row["sha256"]: row["split"] for row in check_root(tmp_path / "root")[0]}
        fresh = [("new/1.jpg", "apple", _another(samples, "apple"))]
        put(source, {"00001.tar": tar_of([*samples[1:30:4], *fresh])})
        serial_engine.ran.clear()
        summary = build(source, tmp_path / "root")
        assert [ran for ran in serial_engine.ran if ran.startswith("pack")] == ["pack_container 00001.tar"]
        assert rows_of(tmp_path / "root") == expected([*samples, *fresh])
        assert summary.num_read == len(samples[1:30:4]) + 1
        after = set(pipeline.open_snapshot(tmp_path / "root").shards["tar_sha256"].to_pylist())
        assert len(after - shards) == 1
        now = {row["sha256"]: row["split"] for row in check_root(tmp_path / "root")[0]}
        assert {key: now[key] for key in splits} == splits

    def test_a_rebuild_holds_what_a_first_build_holds(
        self, source: Path, tmp_path: Path, samples: list[Sample]
    ) -> None:
        """With rejects of every kind in kept and in changed containers."""
        bad = tar_of([("x/bad.jpg", "apple", b"no image"), ("x/cut.jpg", "fig", samples[0][2][:200])], json=b"{}")
        loose = tar_of([("x/none.txt", "apple", b"text")])
        good = ("x/good.jpg", "apple", _another(samples, "apple"))
        put(source, {"mixed.tar": tar_of([good, ("x/no.txt", "apple", b"text")])})  # kept, with what it refused
        put(source, {"bad.tar": bad, "loose.tar": loose, "cut.tar": tar_of(samples[:2])[:1500], "README.md": b"x"})
        build(source, tmp_path / "one")
        put(source, {"00000.tar": tar_of(samples[0:30:4][:-1]), "late.tar": tar_of(samples[:1])})
        build(source, tmp_path / "one", allow=("shrink", "class-vanished"))
        build(source, tmp_path / "two")
        assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
        told = [_told(check_root(tmp_path / name)[1]) for name in ("one", "two")]
        assert told[0] == told[1]
        assert {reason for _, reason in told[0]} >= {"not-an-image", "truncated", "no-image", "damaged"}

    def test_a_sample_that_moves_keeps_its_split(self, source: Path, tmp_path: Path, samples: list[Sample]) -> None:
        build(source, tmp_path / "root")
        before = {row["sha256"]: row["split"] for row in check_root(tmp_path / "root")[0]}
        for path in source.rglob("*.*"):
            path.unlink()
        put(source, as_tars(samples[::-1], 2))
        build(source, tmp_path / "root")
        assert {row["sha256"]: row["split"] for row in check_root(tmp_path / "root")[0]} == before

    @pytest.mark.parametrize("is_collected", [False, True])
    def test_a_copy_comes_back_when_the_kept_one_goes(
        self, tmp_path: Path, samples: list[Sample], serial_engine: SerialEngine, is_collected: bool
    ) -> None:
        """The bytes of a rejected copy are in no shard: they come from its container's provisional tar, or from it."""
        name, label, data = samples[0]
        rest = (samples[1:9], samples[9:17])
        files = {f"c{n}.tar": tar_of([*rest[n], (f"copy{n}.jpg", label, data)]) for n in range(2)}
        source = put(tmp_path / "source", files)
        build(source, tmp_path / "root")
        kept = next(row["path"] for row in check_root(tmp_path / "root")[0] if "/copy" in row["path"])
        number = int(kept[1])
        put(source, {f"c{number}.tar": tar_of(rest[number])})
        if is_collected:
            shutil.rmtree(tmp_path / "root/runs/units")
        serial_engine.ran.clear()
        build(source, tmp_path / "root")
        assert rows_of(tmp_path / "root") == expected([*samples[1:17], (name, label, data)])
        read = [ran for ran in serial_engine.ran if ran.startswith("pack")]
        assert read == [f"pack_container c{n}.tar" for n in ([number, 1 - number] if is_collected else [number])]

    def test_lost_notes_cost_time_and_change_nothing(self, source: Path, tmp_path: Path) -> None:
        build(source, tmp_path / "root")
        before = digests_of(tmp_path / "root")
        for path in (tmp_path / "root/runs").rglob("*.*"):
            path.unlink()
        again = build(source, tmp_path / "root")
        assert (again.changed, again.num_read) == (False, 61)
        assert digests_of(tmp_path / "root") == before

    def test_another_field_for_the_label_reads_all_again(self, tmp_path: Path, samples: list[Sample]) -> None:
        source = put(
            tmp_path / "source", {"a.tar": tar_of(samples[:20], txt=b"one"), "b.tar": tar_of(samples[20:], txt=b"two")}
        )
        build(source, tmp_path / "root")
        again = build(source, tmp_path / "root", label_column="txt", allow=("class-map", "class-vanished", "shrink"))
        assert again.num_read == 61
        assert {label for label, _ in rows_of(tmp_path / "root")} == {"one", "two"}

    def test_a_new_manifest_reads_nothing(self, source: Path, tmp_path: Path) -> None:
        build(source, tmp_path / "root")
        assert build(source, tmp_path / "root", manifests={"sqrt": "power:alpha=0.5"}).num_read == 0
        again = build(source, tmp_path / "root")
        assert (again.changed, again.num_read) == (False, 0)
        put(source, {"late.tar": source.joinpath("00000.tar").read_bytes()})
        assert build(source, tmp_path / "root").num_read < 10

    def test_parts_of_a_large_file_are_units(
        self, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, serial_engine: SerialEngine
    ) -> None:
        source = put(tmp_path / "source", {"all.parquet": parquet_of(samples)})
        build(source, tmp_path / "one")
        from pipeline.ingest import source_containers

        monkeypatch.setattr(source_parquet, "PART_BYTES", 30_000)
        monkeypatch.setattr(source_containers, "PART_BYTES", 30_000)
        serial_engine.ran.clear()
        build(source, tmp_path / "two")
        assert serial_engine.ran.count("pack_container all.parquet") > 2
        finals = [pipeline.open_snapshot(tmp_path / name).shards["tar_sha256"].to_pylist() for name in ("one", "two")]
        assert finals[0] == finals[1]
        assert (build(source, tmp_path / "two").num_read) == 0


def _another(samples: list[Sample], label: str) -> bytes:
    data = next(data for _, other, data in samples if other == label)
    return data + b"\0"  # behind the end of the image: other bytes, the same pixels


def _told(rejects: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rejects; of two copies it may be either that stays."""
    return sorted((row["path"] if "same bytes" not in row["detail"] else "a copy", row["reason"]) for row in rejects)


# ---- B1


@pytest.mark.usefixtures("serial_engine")
def test_every_sample_is_one_row_or_one_reject(samples: list[Sample], tmp_path: Path) -> None:
    """B1, with trouble of every kind."""
    _, label, data = samples[0]
    trouble: list[Sample] = [
        ("t/empty.jpg", label, b""),
        ("t/cut.jpg", label, data[: len(data) // 2]),
        ("t/text.jpg", label, b"not an image"),
        ("t/copy.jpg", label, data),
        ("t/conflict.jpg", "fig", samples[1][2]),
        ("t/nolabel.jpg", "", samples[2][2] + b"\0"),
        ("t/nothing.txt", label, b"x"),
    ]
    source = put(
        tmp_path / "source",
        {**as_tars(samples), "trouble.tar": tar_of(trouble), "trouble.parquet": parquet_of(trouble), "notes.md": b"x"},
    )
    build(source, tmp_path / "root")
    rows, rejects = check_root(tmp_path / "root")
    told = Counter([row["path"] for row in rows] + [row["path"] for row in rejects])
    inside = [f"{part:05d}.tar/{name}" for part in range(4) for name, _, _ in samples[part::4]]
    inside += [f"trouble.{kind}/{name}" for kind in ("tar", "parquet") for name, _, _ in trouble] + ["notes.md"]
    assert told == Counter(inside)
    reasons = {row["path"]: row["reason"] for row in rejects}
    assert reasons["trouble.tar/t/empty.jpg"] == reasons["trouble.parquet/t/empty.jpg"] == "empty"
    assert reasons["trouble.tar/t/cut.jpg"] == "truncated"
    assert reasons["trouble.tar/t/conflict.jpg"] == "label-conflict"
    assert reasons["trouble.tar/t/nolabel.jpg"] == reasons["trouble.parquet/t/nolabel.jpg"] == "no-label"
    assert reasons["trouble.tar/t/nothing.txt"] == "no-image"
    assert reasons["trouble.parquet/t/nothing.txt"] == "not-an-image"
    assert reasons["notes.md"] == "format-not-allowed"
    assert verify(str(tmp_path / "root")).findings == ()


@pytest.mark.usefixtures("serial_engine")
def test_damage_is_told_and_counts_as_lost(samples: list[Sample], tmp_path: Path) -> None:
    files = as_tars(samples)
    files["00002.tar"] = files["00002.tar"][:40_000] + b"\xff" * 512 + files["00002.tar"][40_512:50_000]
    source = put(tmp_path / "source", files)
    with pytest.raises(CommitError, match="--max-rejects 0"):
        build(source, tmp_path / "root", max_rejects=0)
    summary = build(source, tmp_path / "root")
    assert any("are damaged, the first in '00002.tar" in notice for notice in summary.notices)
    assert expected([*samples[0::4], *samples[1::4], *samples[3::4]]) < rows_of(tmp_path / "root") < expected(samples)


@pytest.mark.usefixtures("serial_engine")
def test_a_build_of_any_cut_tar_ends_with_all_that_is_whole(tmp_path: Path, samples: list[Sample]) -> None:
    data = tar_of(samples[:3])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        ends = sorted(entry.offset_data + entry.size for entry in tar if entry.name.endswith(".cls"))
    others = tar_of(samples[3:])
    for number, cut in enumerate(range(0, len(data), 512)):
        if number % 7:  # each build is a whole one; the reader is tested at every cut
            continue
        source = put(tmp_path / f"s{cut}", {"a.tar": data[:cut], "b.tar": others})
        build(source, tmp_path / f"r{cut}", manifests={})
        whole = sum(end <= cut for end in ends)
        assert rows_of(tmp_path / f"r{cut}") == expected([*samples[:whole], *samples[3:]])
        told = [row["reason"] for row in check_root(tmp_path / f"r{cut}")[1] if row["path"] == "a.tar"]
        assert told == (["empty"] if not cut else ["damaged"] if cut < len(data) - 10240 + 0 and whole < 3 else told)


@pytest.mark.usefixtures("serial_engine")
def test_tars_that_webdataset_wrote_and_reads(samples: list[Sample], tmp_path: Path) -> None:
    """Interop: ShardWriter in, our export-free shards out, and stock webdataset reads them."""
    (tmp_path / "source").mkdir()
    names = sorted(TINY_COUNTS)
    with webdataset.ShardWriter(str(tmp_path / "source/%03d.tar"), maxcount=9, verbose=0) as writer:
        for name, label, data in samples:
            stem, _, extension = name.rpartition(".")
            writer.write({"__key__": stem, extension: data, "cls": names.index(label), "json": {"name": label}})
    build(tmp_path / "source", tmp_path / "root", label_column="json.name")
    assert rows_of(tmp_path / "root") == expected(samples)
    build(tmp_path / "source", tmp_path / "numbers")
    numbered = {(str(names.index(label)), digest) for label, digest in expected(samples)}
    assert rows_of(tmp_path / "numbers") == numbered
    urls = [str(path) for path in sorted((tmp_path / "root/shards").rglob("*.tar"))]
    images = {
        hashlib.sha256(next(s[e] for e in ("jpg", "png") if e in s)).hexdigest()
        for s in webdataset.WebDataset(urls, shardshuffle=False)
    }
    assert images == {digest for _, digest in expected(samples)}


# ---- Splits, choices, refusals


@pytest.mark.usefixtures("serial_engine")
class TestChoices:
    def test_splits_by_the_names_of_files(self, samples: list[Sample], tmp_path: Path) -> None:
        files = {
            "data/train-00000-of-00002.parquet": parquet_of(samples[:20]),
            "data/train-00001-of-00002.parquet": parquet_of(samples[20:40]),
            "data/validation-00000-of-00001.parquet": parquet_of(samples[40:50]),
            "data/test.parquet": parquet_of(samples[50:]),
        }
        source = put(tmp_path / "source", files)
        with pytest.raises(SourceError, match=r"named like splits.*--split-from name.*--split-from none"):
            build(source, tmp_path / "root")
        assert build(source, tmp_path / "root", split_from="name").splits == {"train": 40, "val": 10, "test": 11}
        assert build(source, tmp_path / "free", split_from="none").splits != {"train": 40, "val": 10, "test": 11}

    def test_splits_by_the_folders_on_top(self, samples: list[Sample], tmp_path: Path) -> None:
        source = put(tmp_path / "source", {"train/0.tar": tar_of(samples[:40]), "val/0.tar": tar_of(samples[40:])})
        for split_from in ("top", "name"):
            splits = build(source, tmp_path / split_from, split_from=split_from).splits
            assert splits == {"train": 40, "val": 21, "test": 0}
        put(source, {"more.tar": tar_of(samples[:1])})
        with pytest.raises(SourceError, match=r"every file needs a folder on top .* 'more.tar' has none"):
            build(source, tmp_path / "root", split_from="top")

    def test_images_beside_containers_stop_with_advice(self, samples: list[Sample], tmp_path: Path) -> None:
        files = {f"photos/{name}": data for name, _, data in samples[:10]}
        for number, place in enumerate(("a.tar", "photos/z.tar")):
            source = put(tmp_path / f"source{number}", {**files, place: tar_of(samples[10:])})
            with pytest.raises(SourceError, match=r"not clear what to read.*--source-kind folder"):
                build(source, tmp_path / "root")
        assert rows_of_built(source, tmp_path / "images", "folder") == expected(samples[:10])
        assert rows_of_built(source, tmp_path / "tars", "tar") == expected(samples[10:])

    def test_a_parquet_table_of_paths_stays_a_table(self, samples: list[Sample], tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        put(tmp_path / "photos", {name: data for name, _, data in samples})
        rows = pa.table({"image": [name for name, _, _ in samples], "label": [label for _, label, _ in samples]})
        pq.write_table(rows, tmp_path / "photos/table.parquet")
        build(tmp_path / "photos/table.parquet", tmp_path / "root")
        assert rows_of(tmp_path / "root") == expected(samples)

    @pytest.mark.parametrize(
        ("files", "options", "part"),
        [
            ({"a.tar": b""}, {}, "no usable sample|no usable image"),
            ({"a.tar.zst": b"x", "b.tar": b"x"}, {}, "packed in a way that is not read"),
            ({"a.tar": "tar"}, {"label_column": "txt"}, "no usable sample .*61 no-label.*`--label-column` says txt"),
            ({"a.tar": "tar"}, {"path_column": "x"}, "--path-column: not for source .* made of tars"),
            ({"a.tar": "tar"}, {"split_from": "none", "split_column": "json.s"}, "exclude each other"),
            ({"a.tar": "tar"}, {"split_from": "name"}, "'a.tar' has none, or several"),
            ({"a.tar": "tar"}, {"source_kind": "parquet"}, "1 format-not-allowed"),
            ({"a/1.jpg": b"x"}, {"source_kind": "tar"}, "1 format-not-allowed"),
            ({"a/1.jpg": b"x"}, {"split_from": "name"}, "is for tars and Parquet files"),
            ({"a/1.jpg": b"x"}, {"image_column": "x"}, "--image-column: not for source .* a folder of images"),
        ],
    )
    def test_what_cannot_be_meant_stops_in_words(
        self, samples: list[Sample], tmp_path: Path, files: dict[str, Any], options: dict[str, Any], part: str
    ) -> None:
        put(tmp_path / "source", {name: tar_of(samples) if data == "tar" else data for name, data in files.items()})
        with pytest.raises(SourceError, match=part):
            build(tmp_path / "source", tmp_path / "root", **options)
        assert not list((tmp_path / "root").glob("snapshots/*"))

    def test_a_container_that_changes_under_the_reader_stops_the_build(
        self, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from pipeline.ingest import source_containers

        source = put(tmp_path / "source", as_tars(samples))
        really = source_containers.read_samples

        def meddling(*arguments: Any, **options: Any) -> Any:
            yield from really(*arguments, **options)
            with open(source / "00002.tar", "ab") as file:
                file.write(b"x")

        monkeypatch.setattr(source_containers, "read_samples", meddling)
        with pytest.raises(SourceError, match=r"00002.tar changed while it was read"):
            build(source, tmp_path / "root")

    def test_groups_stay_in_one_split(self, samples: list[Sample], tmp_path: Path) -> None:
        apples = [sample for sample in samples if sample[1] == "apple"]
        files = {f"{n}.tar": tar_of(apples[n::8], json=b'{"product": "p%d"}' % n) for n in range(8)}
        build(put(tmp_path / "source", files), tmp_path / "root", group_column="json.product")
        split_of: dict[str, set[str]] = {}
        for row in check_root(tmp_path / "root")[0]:
            split_of.setdefault(row["path"].partition("/")[0], set()).add(row["split"])
        assert all(len(splits) == 1 for splits in split_of.values())
        assert len(set().union(*split_of.values())) == 3


def rows_of_built(source: Path, root: Path, kind: str) -> set[tuple[str, str]]:
    build(source, root, source_kind=kind)
    return rows_of(root)


# ---- Numbers that have names


def numbered(samples: list[Sample]) -> tuple[list[Sample], list[str]]:
    """Labels as numbers 1, 3, 5...: those between have no image."""
    names = [name for label in sorted(TINY_COUNTS, reverse=True) for name in (f"no {label}", label)]
    return [(path, str(names.index(label)), data) for path, label, data in samples], names


@pytest.mark.parametrize("kind", ["tar", "parquet", "both"])
@pytest.mark.parametrize("as_file", [False, True])
def test_classes_name_the_numbers_and_the_numbers_stay(
    samples: list[Sample], tmp_path: Path, kind: str, as_file: bool, serial_engine: SerialEngine
) -> None:
    numbers, names = numbered(samples)
    source = put(tmp_path / "source", KINDS[kind](numbers))
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n", encoding="utf-8")
    summary = build(source, tmp_path / "root", classes=str(tmp_path / "names.txt") if as_file else names)
    assert rows_of(tmp_path / "root") == expected(samples)
    assert summary.num_rejects == 0
    table = pipeline.open_snapshot(tmp_path / "root").classes
    assert table["name"].to_pylist() == names
    assert table["count"].to_pylist()[::2] == [0] * len(TINY_COUNTS)
    assert verify(str(tmp_path / "root")).findings == ()
    again = build(source, tmp_path / "root", classes=names)
    assert (again.changed, again.num_read) == (False, 0)


def test_a_number_without_a_name_is_a_reject(
    samples: list[Sample], tmp_path: Path, serial_engine: SerialEngine
) -> None:
    numbers, names = numbered(samples)
    strange = ["-1", "99", "1.5", "cat", "٣", "x" * 90]
    more = [(f"more/{number}.png", label, numbers[0][2]) for number, label in enumerate(strange)]
    source = put(tmp_path / "source", {"a.tar": tar_of([*numbers, *more])})
    build(source, tmp_path / "root", classes=names)
    rejects = pipeline.open_snapshot(tmp_path / "root").rejects.to_pylist()
    assert [(row["path"], row["reason"]) for row in rejects] == [(f"a.tar/more/{n}.png", "no-label") for n in range(6)]
    assert rejects[1]["detail"] == f"label '99', `classes` names the numbers 0 to {len(names) - 1}"
    assert len(rejects[5]["detail"]) < 120
    assert rows_of(tmp_path / "root") == expected(samples)


def test_rejects_carry_the_name_too(samples: list[Sample], tmp_path: Path, serial_engine: SerialEngine) -> None:
    numbers, names = numbered(samples)
    damaged = [("x/0.png", "1", b"no image"), ("x/1.png", "1", b""), ("x/2.png", "77", b"")]
    build(put(tmp_path / "source", {"a.tar": tar_of([*numbers, *damaged])}), tmp_path / "root", classes=names)
    rejects = pipeline.open_snapshot(tmp_path / "root").rejects.to_pylist()
    assert [row["label"] for row in rejects] == [names[1], names[1], ""]


def test_other_names_are_another_class_map(samples: list[Sample], tmp_path: Path, serial_engine: SerialEngine) -> None:
    """Names are read anew when they change, also of containers that did not."""
    numbers, names = numbered(samples)
    source = put(tmp_path / "source", KINDS["tar"](numbers))
    build(source, tmp_path / "root", classes=names)
    with pytest.raises(CommitError, match="the class map changed"):
        build(source, tmp_path / "root", classes=[*names[2:], *names[:2]])


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_folders_and_tables_have_names(samples: list[Sample], tmp_path: Path, kind: str) -> None:
    put(tmp_path / "source", {name: data for name, _, data in samples})
    source = tmp_path / "source"
    if kind == "table":
        source = put(tmp_path, {"t.csv": b"path,label\na.jpg,0\n"}) / "t.csv"
    with pytest.raises(SourceError, match=r"--classes: not for source .*, which is a"):
        build(source, tmp_path / "root", classes=["a"])


def test_a_path_that_is_what_a_row_without_a_path_is_called(
    samples: list[Sample], tmp_path: Path, serial_engine: SerialEngine
) -> None:
    named = [("2", *samples[0][1:]), *samples[1:4]]
    table = pq.read_table(pa.BufferReader(parquet_of(named)))
    images = table["image"].to_pylist()
    images[2]["path"] = None
    place = table.schema.get_field_index("image")
    table = table.set_column(place, table.schema.field("image"), pa.array(images, table.schema.field("image").type))
    stream = io.BytesIO()
    pq.write_table(table, stream)
    source = put(tmp_path / "source", {"a.parquet": stream.getvalue()})
    with pytest.raises(SourceError, match=r"two samples are called 'a.parquet/2': .* change that path"):
        build(source, tmp_path / "root")
