"""verify: a sound snapshot has no finding; every damage and every broken promise has one that names the place."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import pipeline
from pipeline import schema
from pipeline.cli import run
from pipeline.cli.checks import verify as verify_command
from pipeline.errors import NotFoundError, UsageError
from pipeline.ingest.manifests import add_manifest
from pipeline.ingest.pins import pin
from pipeline.ingest.shards import shard_hash
from pipeline.plan import manifest as manifests
from pipeline.plan.epoch import Draws, EpochFunction
from pipeline.plan.policy import parse
from pipeline.schema import FileRef, SnapshotRecord
from pipeline.snapshot import Snapshot, encode_record, open_snapshot
from pipeline.store import make_ref, put_table, table_to_ipc
from pipeline.verify import Code, verify
from pipeline.verify.findings import SHOWN, Findings
from pipeline.verify.rows import Rows, check_groups, check_once, check_rejects, collect
from pipeline.verify.tars import check_part, check_tar

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def built(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """Two snapshots of the tiny images and of four files that become rejects, in shards of at most 8 images."""
    folder = tmp_path_factory.mktemp("verify")
    source = folder / "source"
    shutil.copytree(tiny_images, source)
    shutil.copy(source / "apple/000.jpg", source / "apple/copy.jpg")
    shutil.copy(source / "apple/001.jpg", source / "bread/conflict.jpg")
    (source / "apple/broken.jpg").write_bytes(b"no image")
    pipeline.build(source, folder / "root", workers=2, shard_samples=8)
    add_manifest(str(folder / "root"), "sqrt", parse("power:alpha=0.5"))
    return folder / "root"


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(built, tmp_path / "root"))


def codes(root: Path, **options: Any) -> set[Code]:
    return {finding.code for finding in verify(root, **options).findings}


def test_a_sound_snapshot_has_no_finding(built: Path) -> None:
    found = verify(built)
    assert found.sound, found.findings
    record = open_snapshot(built).record
    assert (found.number, found.num_images) == (2, record.num_images)
    assert found.num_files > 2 * open_snapshot(built).shards.num_rows


def test_the_set_has_what_the_tests_below_break(built: Path) -> None:
    snapshot = open_snapshot(built)
    assert set(snapshot.rejects["reason"].to_pylist()) == {"duplicate-of", "label-conflict", "not-an-image"}
    assert snapshot.shards.num_rows > 5
    assert sorted(snapshot.record.samples) == ["test", "train", "val"]


# ---- damage: files that are not what their names say


def files_of(root: Path) -> dict[str, str]:
    """One path below ROOT of each kind of file that a snapshot names."""
    snapshot = open_snapshot(root)
    record = snapshot.record
    shard = snapshot.shards.slice(1, 1).to_pylist()[0]
    targets = snapshot.manifest("balanced").document.targets
    tables = {"classes": record.classes, "shards": record.shards, "rejects": record.rejects, "targets": targets}
    tables |= {f"samples of {split}": ref for split, ref in record.samples.items()}
    return {
        "record": schema.snapshot_path(2),
        "parent": schema.snapshot_path(1),
        "tar": schema.tar_path(shard["tar_sha256"]),
        "index": schema.index_path(shard["index_sha256"]),
        "manifest": schema.manifest_path(record.manifests["balanced"].sha256),
        **{name: schema.table_path(ref.sha256) for name, ref in tables.items()},
    }


KINDS = ("record", "parent", "tar", "index", "manifest", "classes", "shards", "rejects", "targets", "samples of train")


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_is_found_and_named(root: Path, kind: str) -> None:
    path = files_of(root)[kind]
    data = bytearray((root / path).read_bytes())
    data[len(data) * 2 // 3] ^= 1
    (root / path).write_bytes(data)
    code = Code.RECORD if kind in ("record", "parent") else Code.DAMAGED
    assert (code, path) in {(finding.code, finding.file) for finding in verify(root).findings}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("record", "parent")])
def test_a_file_that_is_gone_is_found_and_named(root: Path, kind: str) -> None:
    path = files_of(root)[kind]
    (root / path).unlink()
    assert (Code.MISSING, path) in {(finding.code, finding.file) for finding in verify(root).findings}


def test_damage_in_a_tar_names_the_image(root: Path) -> None:
    snapshot = open_snapshot(root)
    row = snapshot.index(1).slice(2, 1).to_pylist()[0]
    path = files_of(root)["tar"]
    with open(root / path, "r+b") as file:
        file.seek(row["offset"] + 30)
        file.write(b"\xff\x00\xff")
    details = [finding.detail for finding in verify(root).findings if finding.code == Code.IMAGE]
    assert details
    assert all(row["key"] in detail and row["path"] in detail for detail in details)


def test_what_damage_hides_is_named(root: Path) -> None:
    (root / files_of(root)["index"]).unlink()
    assert Code.UNPROVED in codes(root)


def test_a_record_that_is_no_record_is_a_finding(root: Path) -> None:
    (root / schema.snapshot_path(2)).write_bytes(b"{")
    assert codes(root) == {Code.RECORD, Code.UNPROVED}


def test_findings_of_one_kind_are_counted_beyond_the_first(root: Path) -> None:
    findings = Findings()
    for number in range(SHOWN + 3):
        findings.add(Code.TAR, "x", str(number))
    findings.add_rows(Code.TAR, "x", np.ones(4, np.bool_), str)
    assert [finding.detail for finding in findings.all()] == ["0", "1", "2", "3", "4", "and 7 more of this kind"]


# ---- lies: every hash is right, and what the files say is not


Edit = Callable[[pa.Table], pa.Table]


def republish(root: Path, **changes: Any) -> None:
    """Replace the newest record by one with other fields; its id is right, its manifests refer to its tables."""
    snapshot = open_snapshot(root)
    record = replace(snapshot.record, **changes)
    if changes.keys() & {"classes", "shards", "samples"}:
        record = replace(record, manifests={name: put_manifest(snapshot, name, record) for name in record.manifests})
    path = root / schema.snapshot_path(record.number)
    path.unlink()
    path.write_bytes(encode_record(record))


def put_manifest(snapshot: Snapshot, name: str, record: SnapshotRecord) -> FileRef:
    path = schema.manifest_path(record.manifests[name].sha256)
    document = manifests.decode(snapshot.store.read(path), path)
    files = {"classes": record.classes, "shards": record.shards, "samples": record.samples[document.split]}
    data = manifests.encode(replace(document, **files))
    ref = make_ref(data, document.num_classes)
    snapshot.store.put(schema.manifest_path(ref.sha256), data)
    return ref


def edit_table(root: Path, name: str, table_schema: pa.Schema, edit: Edit) -> None:
    """Replace a table of the record."""
    snapshot = open_snapshot(root)
    table = edit(snapshot.table(getattr(snapshot.record, name), table_schema))
    republish(root, **{name: put_table(snapshot.store, table, table_schema)})


def edit_samples(root: Path, edit: Edit, split: str = "train") -> None:
    snapshot = open_snapshot(root)
    table = edit(snapshot.table(snapshot.record.samples[split], schema.SAMPLES))
    ref = put_table(snapshot.store, table, schema.SAMPLES)
    republish(root, samples={**snapshot.record.samples, split: ref})


def edit_shard(root: Path, tar: Callable[[bytes], bytes] = bytes, index: Edit = lambda table: table) -> None:
    """Replace the files of shard 1, and its row of the shard table."""
    snapshot = open_snapshot(root)
    row = snapshot.shards.slice(1, 1).to_pylist()[0]
    tar_bytes = tar((root / schema.tar_path(row["tar_sha256"])).read_bytes())
    index_table = index(snapshot.index(1))
    index_bytes = table_to_ipc(index_table.cast(schema.INDEX))
    new = {"num_samples": index_table.num_rows}
    for kind, data in (("tar", tar_bytes), ("index", index_bytes)):
        digest = hashlib.sha256(data).hexdigest()
        new |= {f"{kind}_sha256": digest, f"{kind}_size": len(data)}
        snapshot.store.put((schema.tar_path if kind == "tar" else schema.index_path)(digest), data)
    edit_table(root, "shards", schema.SHARDS, lambda table: set_row(table, 1, **new))


def set_row(table: pa.Table, number: int, **values: Any) -> pa.Table:
    rows = table.to_pylist()
    rows[number] |= values
    return pa.Table.from_pylist(rows, schema=table.schema)


def retar(change: Callable[[tarfile.TarInfo, bytes], bytes | None]) -> Callable[[bytes], bytes]:
    """Write a tar anew; ``change`` may edit a member's header, and returns its bytes (None: left out)."""

    def edit(data: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
            for member in old.getmembers():
                content = change(member, old.extractfile(member).read())
                if content is not None:
                    member.size = len(content)
                    new.addfile(member, io.BytesIO(content))
        written = out.getvalue().rstrip(b"\0")
        return written + bytes(-len(written) % 512 + 1024)

    return edit


def with_clock(member: tarfile.TarInfo, data: bytes) -> bytes:
    member.mtime = 1_700_000_000
    return data


def with_pax(member: tarfile.TarInfo, data: bytes) -> bytes:
    member.pax_headers = {"comment": "hello"}
    return data


def other_label(member: tarfile.TarInfo, data: bytes) -> bytes:
    return b"9" if member.name.endswith(".cls") else data


def without_labels(member: tarfile.TarInfo, data: bytes) -> bytes | None:
    return None if member.name.endswith(".cls") else data


TARS: dict[str, tuple[Callable[[bytes], bytes], Code]] = {
    "a clock": (retar(with_clock), Code.TAR),
    "extended headers": (retar(with_pax), Code.TAR),
    "other labels": (retar(other_label), Code.LABEL),
    "no labels": (retar(without_labels), Code.TAR),
    "bytes after its end": (lambda data: data + bytes(512), Code.TAR),
    "no end": (lambda data: data[:-1024], Code.TAR),
    "nothing of a tar": (lambda data: b"x" * 2048, Code.TAR),
}


def test_a_tar_written_anew_by_tarfile_is_the_same(root: Path) -> None:
    edit_shard(root, tar=retar(lambda member, data: data))
    assert verify(root).sound


@pytest.mark.parametrize("what", TARS)
def test_a_tar_with(root: Path, what: str) -> None:
    edit, code = TARS[what]
    edit_shard(root, tar=edit)
    assert codes(root) == {code}


def test_extended_headers_that_the_index_knows_of(built: Path) -> None:
    data = retar(with_pax)((built / files_of(built)["tar"]).read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offsets = {member.name: member.offset_data for member in tar}
    rows = open_snapshot(built).index(1).to_pylist()
    index = [{**row, "offset": offsets[f"{row['key']}.{row['format']}"]} for row in rows]
    findings = Findings()
    check_tar(data, pa.Table.from_pylist(index, schema=schema.INDEX), "x", findings)
    assert {finding.code for finding in findings.all()} == {Code.TAR}


INDEXES: dict[str, tuple[dict[str, Any], set[Code]]] = {
    "width": ({"width": 1}, {Code.IMAGE}),
    "mode": ({"mode": "L"}, {Code.IMAGE}),
    "sha256": ({"sha256": bytes(32)}, {Code.IMAGE}),
    "checksum": ({"checksum": 1}, {Code.IMAGE, Code.SAMPLES}),
    "offset": ({"offset": 1024}, {Code.TAR, Code.SAMPLES}),
    "key": ({"key": "0" * 16}, {Code.TABLE, Code.TAR, Code.PLACE, Code.SAMPLES}),
    "path": ({"path": "elsewhere.jpg"}, {Code.TABLE}),
    "split": ({"split": "test"}, {Code.TABLE}),
    "class_id": ({"class_id": 5}, {Code.LABEL, Code.COUNTS, Code.SAMPLES}),
    "no such class": ({"class_id": 99}, {Code.TABLE, Code.LABEL, Code.UNPROVED}),
}


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_row_with_another(root: Path, what: str) -> None:
    values, expected = INDEXES[what]
    edit_shard(root, index=lambda table: set_row(table, 2, **values))
    assert codes(root) == expected


def test_an_index_that_leaves_an_image_out(root: Path) -> None:
    edit_shard(root, index=lambda table: table.slice(1))
    assert {Code.TAR, Code.RECORD, Code.COUNTS, Code.SAMPLES} <= codes(root)


def swap(table: pa.Table, one: int, two: int) -> pa.Table:
    order = np.arange(table.num_rows)
    order[[one, two]] = two, one
    return table.take(pa.array(order))


def swap_prefixes(table: pa.Table) -> pa.Table:
    one, two = table["prefix"].to_pylist()[:2]
    return set_row(set_row(table, 0, prefix=two), 1, prefix=one)


SAMPLES: dict[str, Edit] = {
    "swapped within a class": lambda table: swap(table, 0, 1),
    "swapped across classes": lambda table: swap(table, 0, table.num_rows - 1),
    "a row twice": lambda table: set_row(table, 1, **table.slice(0, 1).to_pylist()[0]),
    "a row missing": lambda table: table.slice(1),
    "another offset": lambda table: set_row(table, 0, offset=5),
    "another checksum": lambda table: set_row(table, 0, checksum=5),
    "another size": lambda table: set_row(table, 0, size=5),
    "no such shard": lambda table: set_row(table, 0, shard=4_000_000_000),
    "no such row": lambda table: set_row(table, 0, row=4_000_000_000),
}


@pytest.mark.parametrize("what", SAMPLES)
def test_a_sample_table_with(root: Path, what: str) -> None:
    edit_samples(root, SAMPLES[what])
    assert codes(root) - {Code.RECORD} == {Code.SAMPLES}


def test_a_sample_of_another_split_where_it_would_not_disturb_the_order(root: Path) -> None:
    rows = rows_of(root)
    stranger = int(np.flatnonzero((rows.split == 1) & (rows.class_id == 0))[0])
    shard = int(np.searchsorted(rows.first, stranger, side="right")) - 1
    samples = open_snapshot(root).samples("train")
    apples = rows.first[samples.slice("shard", 0, 30)] + samples.slice("row", 0, 30)  # of 40 apples, 32 train
    hashes = shard_hash(rows.key[[*apples, stranger]], split="train", seed=0)
    values = {name: int(getattr(rows, name)[stranger]) for name in ("offset", "size", "checksum")}
    values |= {"shard": shard, "row": stranger - int(rows.first[shard])}
    edit_samples(root, lambda table: set_row(table, int(np.searchsorted(hashes[:-1], hashes[-1])), **values))
    assert [finding.code for finding in verify(root).findings] == [Code.SAMPLES, Code.SAMPLES]


TABLES: dict[str, tuple[str, pa.Schema, Edit, Code]] = {
    "a class count": ("classes", schema.CLASSES, lambda table: set_row(table, 0, count=1), Code.COUNTS),
    "a split count": ("classes", schema.CLASSES, lambda table: set_row(table, 0, train=1, count=1), Code.COUNTS),
    "bytes": ("classes", schema.CLASSES, lambda table: set_row(table, 0, train_bytes=1), Code.COUNTS),
    "evaluable": ("classes", schema.CLASSES, lambda table: set_row(table, 0, evaluable=False), Code.COUNTS),
    "a class id": ("classes", schema.CLASSES, lambda table: set_row(table, 0, class_id=1), Code.TABLE),
    "a name twice": ("classes", schema.CLASSES, lambda table: set_row(table, 0, name="fig"), Code.TABLE),
    "the order of shards": ("shards", schema.SHARDS, lambda table: swap(table, 0, 1), Code.TABLE),
    "a shard's prefix": ("shards", schema.SHARDS, lambda table: set_row(table, 0, prefix=""), Code.PLACE),
    "which prefix is whose": ("shards", schema.SHARDS, swap_prefixes, Code.PLACE),
    "a shard's split": ("shards", schema.SHARDS, lambda table: set_row(table, 0, split="dev"), Code.TABLE),
    "a path for a name": ("shards", schema.SHARDS, lambda table: set_row(table, 0, tar_sha256="../../x"), Code.TABLE),
    "a reason": ("rejects", schema.REJECTS, lambda table: set_row(table, 0, reason="mood"), Code.ONCE),
    "an image as reject": ("rejects", schema.REJECTS, lambda table: set_row(table, 0, path="fig/000.jpg"), Code.ONCE),
    "a reject left out": ("rejects", schema.REJECTS, lambda table: table.slice(1), Code.RECORD),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_table_that_lies_about(root: Path, what: str) -> None:
    name, table_schema, edit, code = TABLES[what]
    edit_table(root, name, table_schema, edit)
    assert code in codes(root)


@pytest.mark.parametrize("changes", [{"num_images": 59}, {"num_rejects": 1}, {"num_classes": 7}, {"parent": "0" * 64}])
def test_a_record_that_lies(root: Path, changes: dict[str, Any]) -> None:
    republish(root, **changes)
    assert Code.RECORD in codes(root)


def test_limits_that_shards_do_not_keep(root: Path) -> None:
    config = open_snapshot(root).record.config
    republish(root, config={**config, "shard_samples": 4})
    assert codes(root) == {Code.PLACE}
    republish(root, config={**config, "shard_samples": 4000})
    assert codes(root) == {Code.PLACE}


def edit_manifest(root: Path, edit: Edit = lambda table: table, **changes: Any) -> None:
    """Replace manifest ``balanced``."""
    snapshot = open_snapshot(root)
    document = snapshot.manifest("balanced").document
    targets = put_table(snapshot.store, edit(snapshot.table(document.targets, schema.TARGETS)), schema.TARGETS)
    data = manifests.encode(replace(document, targets=targets, **changes))
    ref = make_ref(data, document.num_classes)
    snapshot.store.put(schema.manifest_path(ref.sha256), data)
    republish(root, manifests={**snapshot.record.manifests, "balanced": ref})


def move_draw(table: pa.Table) -> pa.Table:
    target = table["target"].to_numpy() + np.array([1, -1, 0, 0, 0, 0])
    return table.set_column(2, schema.TARGETS.field("target"), pa.array(target))


MANIFESTS: dict[str, Callable[[Path], None]] = {
    "a draw of another class": lambda root: edit_manifest(root, move_draw),
    "other counts": lambda root: edit_manifest(root, lambda table: set_row(table, 0, available=7)),
    "another pool": lambda root: edit_manifest(root, lambda table: set_row(table, 0, pool=7)),
    "no pool": lambda root: edit_manifest(root, lambda table: set_row(table, 5, pool=0)),
    "another sum": lambda root: edit_manifest(root, num_draws=59),
    "another policy": lambda root: edit_manifest(root, policy=parse("natural")),
    "another name": lambda root: edit_manifest(root, name="other"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_with(root: Path, what: str) -> None:
    MANIFESTS[what](root)
    found = {finding.code for finding in verify(root).findings}
    assert found == {Code.MANIFEST}


def test_an_epoch_that_breaks_its_target(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = EpochFunction.draws

    def off_by_one(function: EpochFunction, begin: int, end: int) -> Draws:
        good = draws(function, begin, end)
        class_id = good.class_id.copy()
        class_id[0] = (class_id[0] + 1) % 6
        return Draws(class_id=class_id, draw=good.draw)

    monkeypatch.setattr(EpochFunction, "draws", off_by_one)
    assert codes(built) == {Code.EPOCH}


def test_an_epoch_that_repeats_one_image(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpochFunction, "images", lambda self, class_id, draw: (draw * 0, draw))
    assert codes(built) == {Code.EPOCH}


# ---- rows together


def rows_of(root: Path) -> Rows:
    snapshot = open_snapshot(root)
    splits = snapshot.shards["split"].to_pylist()
    return collect([(schema.SPLITS.index(split), snapshot.index(i)) for i, split in enumerate(splits)], snapshot.index)


def changed(values: np.ndarray, place: int, value: Any) -> np.ndarray:
    values = values.copy()
    values[place] = value
    return values


def test_a_shard_in_place_of_another(root: Path) -> None:
    first = open_snapshot(root).shards.to_pylist()[0]
    files = {name: first[name] for name in first if name not in ("split", "prefix")}
    edit_table(root, "shards", schema.SHARDS, lambda table: set_row(table, 1, **files))
    assert {Code.ONCE, Code.PLACE} <= codes(root)


def test_a_group_of_an_evaluation_split_in_train(root: Path) -> None:
    snapshot = open_snapshot(root)
    last = snapshot.index(snapshot.shards.num_rows - 1)
    edit_shard(root, index=lambda table: set_row(table, 2, group=last["group"][0].as_py()))
    assert codes(root) == {Code.GROUP}


@pytest.mark.parametrize("column", ["key", "digest"])
def test_an_image_in_two_rows(built: Path, column: str) -> None:
    rows, findings = rows_of(built), Findings()
    check_once(rows, "x", findings)
    assert findings.all() == ()
    values = getattr(rows, column)
    check_once(replace(rows, **{column: changed(values, 40, values[3])}), "x", findings)
    assert [finding.code for finding in findings.all()] == [Code.ONCE]


def test_a_group_that_straddles_splits(built: Path) -> None:
    rows, findings = rows_of(built), Findings()
    check_groups(rows, "x", findings)
    assert findings.all() == ()
    one, two = np.flatnonzero(rows.split == 0)[0], np.flatnonzero(rows.split == 2)[0]
    check_groups(replace(rows, group=changed(rows.group, two, rows.group[one])), "x", findings)
    assert [finding.code for finding in findings.all()] == [Code.GROUP]


def test_a_copy_without_its_original_and_a_conflict_that_stayed(built: Path) -> None:
    rows, rejects, findings = rows_of(built), open_snapshot(built).rejects.to_pylist(), Findings()
    kept = rows.digest[0].astype(">u8").tobytes().hex()
    lies = {"duplicate-of": "0" * 64, "label-conflict": kept}
    table = [{**row, "sha256": lies.get(row["reason"], "")} for row in rejects]
    check_rejects(pa.Table.from_pylist(table, schema=schema.REJECTS), rows, "x", findings)
    assert len(findings.all()) == 3  # one copy, and both sides of the conflict


def test_a_rejected_row_of_a_table_may_name_an_image_that_another_row_brought(built: Path) -> None:
    row = {"path": "fig/000.jpg", "key": "", "label": "", "split": "", "sha256": ""}
    told = {reason: Findings() for reason in ("duplicate-row", "gone")}
    for reason, findings in told.items():
        table = pa.Table.from_pylist([{**row, "reason": reason, "detail": "row 3: also row 2"}], schema=schema.REJECTS)
        check_rejects(table, rows_of(built), "x", findings)
    assert [len(findings.all()) for findings in told.values()] == [0, 1]


# ---- how much is looked at


def images_read(root: Path, share: float, seed: int) -> Counter[str]:
    """The key of every image that a sampled verification reads, by listening to what is compared."""
    read: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:

        def listen(data: bytes, index: pa.Table, *rest: Any, **options: Any) -> int:
            read.update(index["key"].to_pylist())
            return check_part(data, index, *rest, **options)

        patch.setattr("pipeline.verify.prove.check_part", listen)
        found = verify(root, sample=share, seed=seed)
    assert found.sound, found.findings
    assert found.num_images == read.total()
    return read


@pytest.mark.parametrize(("share", "nights"), [(0.05, 20), (0.3, 4), (0.5, 2), (0.07, 15)])
def test_seeds_in_a_row_read_every_image(built: Path, share: float, nights: int) -> None:
    assert verify(built, sample=share).num_seeds == nights
    read = [images_read(built, share, seed) for seed in range(9_000, 9_000 + nights)]
    everything = sum(read, Counter[str]())
    assert len(everything) == open_snapshot(built).record.num_images
    if share * nights == 1:
        assert set(everything.values()) == {1}
        assert max(night.total() for night in read) < 4 * share * everything.total()
    assert images_read(built, share, 9_000) == read[0]


def test_a_sample_reads_a_part_of_every_tar(built: Path) -> None:
    """Every tar of at least 1/F images of like size, every night; what is read is told in bytes."""
    sizes = open_snapshot(built).shards["num_samples"].to_pylist()
    assert min(sizes) > 3
    for seed in range(3):
        read = images_read(built, 0.5, seed)
        for shard in range(len(sizes)):
            assert read.keys() & set(open_snapshot(built).index(shard)["key"].to_pylist())
        found = verify(built, sample=0.5, seed=seed)
        assert found.tar_bytes == sum(open_snapshot(built).shards["tar_size"].to_pylist())
        assert 0.2 < found.tar_bytes_read / found.tar_bytes < 0.8


def test_a_flip_anywhere_is_found_on_exactly_one_of_the_nights(root: Path) -> None:
    """Images, labels, headers, padding and the end: the windows of two seeds are the whole tar."""
    path = root / files_of(root)["tar"]
    data = path.read_bytes()
    rng = np.random.default_rng(4)
    places = [*rng.integers(0, len(data), 12).tolist(), 1_000, len(data) - 1, len(data) - 1_024]
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert sum(not verify(root, sample=0.5, seed=seed).sound for seed in (6, 7)) == 1, place


def test_the_default_seed_is_the_day(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.verify.prove.time.time", lambda: 86_400 * 20_000 + 5.0)
    assert verify(built, sample=0.1).seed == 20_000


def test_images_that_are_not_read_still_have_their_places(root: Path) -> None:
    path = files_of(root)["tar"]
    data = (root / path).read_bytes()
    (root / path).write_bytes(bytes(len(data)))
    assert codes(root, sample=0.0) == set()
    assert codes(root, sample=0.5, seed=1) == {Code.TAR}
    (root / path).write_bytes(data[:-1])
    assert codes(root, sample=0.0) == {Code.DAMAGED}
    (root / path).write_bytes(data)
    edit_shard(root, index=lambda table: set_row(table, 2, offset=1024))
    assert codes(root, sample=0.0) == {Code.TAR, Code.SAMPLES}


def test_a_tar_that_is_longer_than_its_images(root: Path) -> None:
    edit_shard(root, tar=lambda data: data + bytes(512))
    assert codes(root, sample=0.0) == {Code.TAR}


def test_the_command_tells_what_a_sample_read(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verify_command, [str(built), "--quiet", "--sample", "0.25", "--seed", "3"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"sample 0.25, seed 3: [0-9.]+ % of the .* in tars were read again, 4 seeds in a row", told)
    assert run(verify_command, [str(built), "--quiet", "--sample", "0"]) == 0
    assert "no image was read" in capsys.readouterr().out


# ---- pins


def test_pins_that_keep_what_they_mean(root: Path) -> None:
    pin(str(root), "paper", 1)
    pin(str(root), "newest")
    assert verify(root).sound


def no_json(root: Path) -> None:
    (root / "pins/paper.json").write_bytes(b"{")


def of_another_snapshot(root: Path) -> None:
    body = json.loads((root / "pins/paper.json").read_text())
    (root / "pins/paper.json").write_text(json.dumps({**body, "snapshot": 2}))


def of_no_snapshot(root: Path) -> None:
    body = json.loads((root / "pins/paper.json").read_text())
    (root / "pins/paper.json").write_text(json.dumps({**body, "snapshot": 7}))


def collected(root: Path) -> None:
    (root / "runs/collected").mkdir()
    (root / schema.collected_path(1)).write_bytes(b"{}")


def damaged(root: Path) -> None:
    path = root / schema.manifest_path(open_snapshot(root, 1).record.manifests["balanced"].sha256)
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize("harm", [no_json, of_another_snapshot, of_no_snapshot, collected, damaged])
@pytest.mark.parametrize("sample", [0.0, 1.0])
def test_a_pin_that_does_not_keep_what_it_means(root: Path, harm: Callable[[Path], None], sample: float) -> None:
    pin(str(root), "paper", 1)
    republish(root, manifests={})  # so that damage to the pinned snapshot is damage to it alone
    harm(root)
    found = verify(root, sample=sample).findings
    assert [(finding.code, finding.file) for finding in found] == [(Code.PIN, "pins/paper.json")]


def test_a_pinned_snapshot_that_lost_a_file(root: Path) -> None:
    pin(str(root), "paper", 1)
    old = schema.table_path(open_snapshot(root).record.samples["train"].sha256)
    edit_samples(root, lambda table: set_row(table, 0, checksum=1))
    assert codes(root) == {Code.SAMPLES}
    (root / old).unlink()
    assert (Code.MISSING, old) in {(finding.code, finding.file) for finding in verify(root).findings}


def test_an_older_snapshot_can_be_proved(root: Path) -> None:
    (root / schema.snapshot_path(2)).write_bytes(b"")
    assert verify(root, at=1).sound


@pytest.mark.parametrize("options", [{"sample": 1.5}, {"sample": float("nan")}])
def test_a_share_that_is_none(built: Path, options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="from 0 to 1"):
        verify(built, **options)


def test_no_snapshot(tmp_path: Path, built: Path) -> None:
    with pytest.raises(NotFoundError, match="no snapshot"):
        verify(tmp_path)
    with pytest.raises(NotFoundError, match=r"no snapshot 3.*newest is 2"):
        verify(built, at=3)


@pytest.mark.parametrize("seed", range(20))
def test_no_damage_to_a_tar_raises(built: Path, seed: int) -> None:
    """The hash of a hostile tar is right: what ``tarfile`` makes of it must still be a finding."""
    rng = np.random.default_rng(seed)
    snapshot = open_snapshot(built)
    data = bytearray((built / files_of(built)["tar"]).read_bytes())
    headers = rng.integers(0, len(data) // 512, 8) * 512
    for place in (headers + rng.integers(0, 345, 8)).tolist():
        data[place] = rng.integers(0, 256)
    findings = Findings()
    check_tar(bytes(data), snapshot.index(1), "x", findings)
    assert all(finding.detail for finding in findings.all())


# ---- the command


def test_the_command_says_that_all_is_well(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verify_command, [str(built), "--quiet"]) == 0
    assert "snapshot 2" in (out := capsys.readouterr().out)
    assert "is sound" in out


def test_the_command_names_every_finding_and_fails(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = files_of(root)["manifest"]
    (root / path).unlink()
    assert run(verify_command, [str(root), "--quiet"]) == 1
    told = capsys.readouterr()
    assert f"missing: {path}" in told.out
    assert told.err.endswith("is not sound: 1 finding\n")


def test_the_command_as_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verify_command, [str(root), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["sound"] is True
    (root / files_of(root)["tar"]).unlink()
    assert run(verify_command, [str(root), "--json", "--quiet"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["code"] == "missing"
