"""Snapshots: the record is one spelling of one content, readers find the newest, and nothing damaged comes through."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny_snapshot import COUNTS, picture, write_snapshot

from pipeline import schema
from pipeline.errors import IntegrityError, NotFoundError, UsageError
from pipeline.plan import manifest as manifests
from pipeline.schema import FileRef, SnapshotRecord, index_path, manifest_path, table_path, tar_path
from pipeline.snapshot import (
    Snapshot,
    decode_record,
    encode_record,
    newest_number,
    open_snapshot,
    read_record,
    record_id,
    snapshot_exists,
)
from pipeline.store import Store, make_ref, put_table


def reference(letter: str = "a", num_rows: int = 1) -> FileRef:
    return FileRef(sha256=letter * 64, size=5, num_rows=num_rows, blocks=("0" * 16,))


def record(**changes: Any) -> SnapshotRecord:
    made = SnapshotRecord(
        number=1,
        parent="",
        build_id="b" * 64,
        seed=7,
        classes=reference(),
        shards=reference("b"),
        rejects=reference("c", 0),
        samples={"train": reference("d"), "test": reference("e")},
        manifests={"natural": reference("f")},
        num_images=2,
        num_classes=1,
        num_rejects=0,
        config={"label_from": "parent", "path": "\udcff ä", "rate": "0.5", "nested": {"list": [1, None, True]}},
        created_by="evenshard 0.1.0",
    )
    return replace(made, **changes)


def ok(number: int) -> bytes:
    return encode_record(record(number=number))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "root", create=True)


# ---- The record


def test_a_record_survives_the_round_trip() -> None:
    assert decode_record(encode_record(record()), "here") == record()


def test_the_bytes_of_a_record_are_pinned() -> None:
    """Old snapshots must stay readable: change this only together with format_version."""
    assert record_id(record()) == "109927d3f202ef5ee03d8b529fe39e17a374f618c4541fa78fbae78d60f0b6c9"


def test_records_of_version_1_are_read_and_keep_their_id() -> None:
    old = record(format_version=1)
    assert record_id(old) == "f5167d366937e0dfb5dd888a906d18ef4e0aba92e021f47f1f173e2180e02022"
    assert b"departed" not in encode_record(old)
    assert decode_record(encode_record(old), "here") == old


def test_a_record_may_name_who_left() -> None:
    left = record(departed=reference("9"))
    assert decode_record(encode_record(left), "here") == left


def test_the_id_is_the_hash_of_the_rest_and_ends_in_a_newline() -> None:
    data = encode_record(record())
    values = json.loads(data)
    found = values.pop("id")
    rest = (json.dumps(values, sort_keys=True, indent=1) + "\n").encode()
    assert found == hashlib.sha256(rest).hexdigest() == record_id(record())
    assert data.endswith(b"}\n")


def test_order_of_mappings_does_not_show() -> None:
    other = record(config=dict(reversed(record().config.items())), samples=dict(reversed(record().samples.items())))
    assert encode_record(other) == encode_record(record())


def test_any_flipped_bit_is_refused_or_harmless() -> None:
    data = encode_record(record())
    for position in range(len(data)):
        flipped = data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :]
        try:
            assert decode_record(flipped, "here") == record()
        except IntegrityError:
            continue


def test_a_changed_value_is_named_as_damage() -> None:
    data = encode_record(record()).replace(b'"num_images": 2', b'"num_images": 3')
    with pytest.raises(IntegrityError, match=f"here is damaged: its id is '{record_id(record())}', its content has"):
        decode_record(data, "here")


@pytest.mark.usefixtures("cycles_wait")
@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="here is damaged"):
        decode_record(data, "here")


def test_a_newer_format_is_refused_with_advice() -> None:
    newer = encode_record(record(format_version=4))
    with pytest.raises(IntegrityError, match=r"here: format_version 4 is newer than 3.*upgrade evenshard"):
        decode_record(newer, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("seed"), r"missing keys \['seed'\]"),
        (lambda v: v.update(extra=1), r"unknown keys \['extra'\]"),
        (lambda v: v.update(number="1"), "number must be a whole number"),
        (lambda v: v.update(parent=None), "parent must be a string"),
        (lambda v: v.update(config=[]), "config must be an object"),
        (lambda v: v["classes"].update(sha256="../../etc"), "classes.sha256 must be hex digits"),
        (lambda v: v["classes"].update(size=-1), "classes.size must be a whole number from 0"),
        (lambda v: v["classes"].update(size=True), "classes.size must be a whole number from 0"),
        (lambda v: v["classes"].pop("size"), "classes is no reference"),
        (lambda v: v["samples"].update(dev=v["classes"]), "splits must be among"),
        (lambda v: v.update(samples=[]), "AttributeError"),
    ],
)
def test_a_record_of_another_shape_is_refused(change: Callable[[Any], Any], message: str) -> None:
    values = json.loads(encode_record(record()))
    del values["id"]
    change(values)
    canonical = json.dumps(values, sort_keys=True, indent=1) + "\n"
    values["id"] = hashlib.sha256(canonical.encode()).hexdigest()
    with pytest.raises(IntegrityError, match=f"here: not a commit record of evenshard: .*{message}"):
        decode_record(json.dumps(values).encode(), "here")


def test_floats_are_refused_with_their_place() -> None:
    with pytest.raises(UsageError, match=r"record\.config\.a\.1 is 0\.5: .*write it as a string"):
        encode_record(record(config={"a": [1, 0.5]}))


# ---- Finding it


@pytest.mark.parametrize("newest", [1, 2, 3, 4, 5, 7, 8, 9, 16, 23])
def test_the_newest_is_found(store: Store, newest: int) -> None:
    for number in range(1, newest + 1):
        store.create(schema.snapshot_path(number), ok(number))
    assert newest_number(store) == newest
    assert open_snapshot(store).number == newest


def test_the_newest_is_found_with_few_looks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    monkeypatch.setattr(Store, "exists", lambda _, path: bool(looks.append(path)) or int(path[-13:-5]) <= 1000)
    assert newest_number(store) == 1000
    assert len(looks) <= 21


def test_an_older_one_can_be_asked_for(store: Store) -> None:
    for number in (1, 2, 3):
        store.create(schema.snapshot_path(number), ok(number))
    assert open_snapshot(store.url, at=2).number == 2
    with pytest.raises(NotFoundError, match=r"there is no snapshot 9 in .*; the newest is 3"):
        open_snapshot(store, at=9)
    with pytest.raises(UsageError, match="numbered from 1; there is no snapshot 0"):
        open_snapshot(store, at=0)


@pytest.mark.parametrize("at", [None, 3])
def test_an_empty_root_says_what_to_run(store: Store, at: int | None) -> None:
    with pytest.raises(NotFoundError, match=r"no snapshot in .*; run `evenshard build SOURCE"):
        open_snapshot(store, at=at)
    assert not snapshot_exists(store)


def test_a_record_under_another_number_is_refused(store: Store) -> None:
    store.create(schema.snapshot_path(1), ok(2))
    with pytest.raises(IntegrityError, match="is the record of snapshot 2"):
        read_record(store, 1)


# ---- Reading it


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("tiny") / "root")


@pytest.fixture
def copy(tiny: Snapshot, tmp_path: Path) -> Snapshot:
    """To be damaged."""
    shutil.copytree(tiny.root, tmp_path / "copy")
    return open_snapshot(tmp_path / "copy")


def damage(snapshot: Snapshot, path: str, position: int = -9) -> None:
    file = Path(snapshot.root, path)
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_tables_are_as_they_were_written(tiny: Snapshot) -> None:
    assert tiny.classes.schema == schema.CLASSES
    assert tiny.classes.column("train").to_pylist() == list(COUNTS["train"])
    assert tiny.rejects.num_rows == 0
    assert tiny.shards.num_rows == 7
    assert tiny.manifests == ("balanced", "natural", "small")
    assert tiny.id == record_id(tiny.record)


def test_each_class_owns_its_rows(tiny: Snapshot) -> None:
    for split in ("train", "test"):
        starts = tiny.class_starts(split)
        samples = tiny.samples(split)
        shard, row = (samples.slice(name, 0, samples.num_rows).tolist() for name in ("shard", "row"))
        classes = [tiny.index(s)["class_id"][r].as_py() for s, r in zip(shard, row, strict=True)]
        assert classes == np.repeat(np.arange(6), np.diff(starts)).tolist()
        assert starts.dtype == np.int64


def test_an_empty_split_has_starts_but_no_table(tiny: Snapshot) -> None:
    assert tiny.class_starts("val").tolist() == [0] * 7
    with pytest.raises(UsageError, match=r"split 'val' of snapshot 1 has no image; splits with images: train, test"):
        tiny.samples("val")
    with pytest.raises(UsageError, match="split must be one of train, val, test, not 'dev'"):
        tiny.samples("dev")


def test_images_are_read_by_row(tiny: Snapshot) -> None:
    for row in range(tiny.samples("test").num_rows):
        data = tiny.read_image("test", row)
        class_id = int(np.searchsorted(tiny.class_starts("test"), row, side="right")) - 1
        assert data in {picture(class_id, number, 2) for number in range(COUNTS["test"][class_id])}


def test_a_damaged_image_is_named_by_shard_key_offset_and_path(copy: Snapshot) -> None:
    samples = copy.samples("train")
    shard, place, offset = (int(samples.take(name, [3])[0]) for name in ("shard", "row", "offset"))
    tar = tar_path(copy.shards["tar_sha256"][shard].as_py())
    damage(copy, tar, offset + 20)
    key = copy.index(shard)["key"][place].as_py()
    with pytest.raises(IntegrityError, match=rf"image {key} \('train/0/\d+\.png'\) in {tar} at offset {offset}: "):
        copy.read_image("train", 3)


def test_a_damaged_image_is_named_though_its_index_is_damaged_too(copy: Snapshot) -> None:
    row = copy.shards.to_pylist()[int(copy.samples("train").take("shard", [3])[0])]
    damage(copy, tar_path(row["tar_sha256"]), int(copy.samples("train").take("offset", [3])[0]))
    damage(copy, index_path(row["index_sha256"]))
    with pytest.raises(IntegrityError, match=r"image number \d+ of shard \d \(its index cannot be read"):
        copy.read_image("train", 3)


@pytest.mark.parametrize(
    "use",
    [
        lambda s: (table_path(s.record.classes.sha256), lambda: s.classes),
        lambda s: (table_path(s.record.shards.sha256), lambda: s.shards),
        lambda s: (table_path(s.record.rejects.sha256), lambda: s.rejects),
        lambda s: (table_path(s.record.samples["train"].sha256), lambda: s.samples("train")),
        lambda s: (index_path(s.shards["index_sha256"][0].as_py()), lambda: s.index(0)),
        lambda s: (manifest_path(s.record.manifests["natural"].sha256), lambda: s.manifest("natural")),
        lambda s: (
            table_path(s.manifest("natural").document.targets.sha256),
            lambda: open_snapshot(s.root).manifest("natural").targets,
        ),
    ],
)
def test_any_damaged_file_is_an_error_that_names_it(copy: Snapshot, use: Callable[[Snapshot], Any]) -> None:
    path, read = use(copy)
    damage(copy, path)
    with pytest.raises(IntegrityError, match=rf"{path} .*(SHA-256|XXH3-64)"):
        read()


def test_indexes_are_kept_but_not_without_end(tiny: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.snapshot.reader.OPEN_INDEXES", 2)
    fresh = open_snapshot(tiny.root)
    first = fresh.index(0)
    assert fresh.index(0) is first
    fresh.index(1), fresh.index(2)
    assert list(fresh._indexes) == [1, 2]


def test_a_shard_that_is_not_there_is_refused(tiny: Snapshot) -> None:
    with pytest.raises(IntegrityError, match="has 7 shards, no 7"):
        tiny.index(7)


def test_class_ids_must_be_the_row_numbers(copy: Snapshot) -> None:
    turned = copy.classes.take(pa.array([1, 0, 2, 3, 4, 5]))
    wrong = Snapshot(copy.store, replace(copy.record, classes=put_table(copy.store, turned, schema.CLASSES)))
    with pytest.raises(IntegrityError, match="class ids are not the row numbers"):
        _ = wrong.classes


def test_counts_must_fit_the_sample_table(copy: Snapshot) -> None:
    fewer = replace(copy.record.samples["train"], num_rows=5)
    wrong = Snapshot(copy.store, replace(copy.record, samples={"train": fewer}))
    with pytest.raises(IntegrityError, match="its classes count 93 images in train, its sample table has 5 rows"):
        wrong.class_starts("train")


def test_a_remote_snapshot_reads_the_same(tiny: Snapshot) -> None:
    remote = Store("memory://remote-snapshot")
    for path in tiny.store.list(""):
        remote.put(path, tiny.store.read(path))
    there = open_snapshot("memory://remote-snapshot")
    assert there.read_image("train", 50) == tiny.read_image("train", 50)
    assert there.manifest("balanced").targets.tolist() == tiny.manifest("balanced").targets.tolist()


def test_a_snapshot_and_its_manifests_can_be_pickled(tiny: Snapshot) -> None:
    manifest = pickle.loads(pickle.dumps(tiny.manifest("balanced")))
    assert manifest.digest == tiny.record.manifests["balanced"].sha256
    assert manifest.snapshot.read_image("train", 0) == tiny.read_image("train", 0)


# ---- Manifests


def test_a_manifest_is_bound_to_its_numbers(tiny: Snapshot) -> None:
    manifest = tiny.manifest("balanced")
    assert manifest.targets.tolist() == [23, 23, 0, 23, 23, 23]
    assert manifest.available.tolist() == list(COUNTS["train"])
    assert (manifest.pool <= manifest.available).all()
    assert (manifest.num_draws, manifest.split, manifest.name) == (115, "train", "balanced")
    assert manifest.digest == hashlib.sha256(tiny.store.read(manifest_path(manifest.digest))).hexdigest()


def test_vectors_follow_from_the_targets(tiny: Snapshot) -> None:
    manifest = tiny.manifest("balanced")
    drawn = manifest.targets > 0
    np.testing.assert_allclose(np.exp(manifest.log_prior).sum(), 1)
    np.testing.assert_allclose(manifest.log_q[drawn], np.log(1 / 5))
    np.testing.assert_allclose(manifest.repeat_factor[drawn], 23 / manifest.available[drawn])
    np.testing.assert_allclose(manifest.weights("residual")[drawn], 1)
    assert not np.allclose(manifest.weights("effective_number", beta=0.5), manifest.weights("balanced"))


def test_an_unknown_manifest_lists_the_known_ones(tiny: Snapshot) -> None:
    with pytest.raises(NotFoundError, match=r"no manifest 'even' in snapshot 1; manifests: balanced, natural, small"):
        tiny.manifest("even")


def rewritten(snapshot: Snapshot, **changes: Any) -> Snapshot:
    """The snapshot with its natural manifest changed, and every checksum right."""
    document = replace(snapshot.manifest("natural").document, **changes)
    data = manifests.encode(document)
    ref = make_ref(data, document.num_classes)
    snapshot.store.put(manifest_path(ref.sha256), data)
    return Snapshot(snapshot.store, replace(snapshot.record, manifests={"natural": ref}))


@pytest.mark.parametrize("field", ["classes", "shards", "samples"])
def test_a_manifest_of_another_snapshot_is_refused(copy: Snapshot, field: str) -> None:
    other = replace(getattr(copy.manifest("natural").document, field), sha256="0" * 64)
    with pytest.raises(IntegrityError, match=rf"does not belong to snapshot 1: it differs in {field}; write"):
        rewritten(copy, **{field: other}).manifest("natural")


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("available", 0, 61, r"1 classes, first \[0\]"),
        ("pool", 1, 20, r"1 classes, first \[1\]"),
        ("pool", 3, 0, r"1 classes, first \[3\]"),
        ("target", 5, -1, r"1 classes, first \[5\]"),
        ("target", 4, 5, "94 draws, not 93"),
        ("target", 2, 1, r"1 classes, first \[2\]"),
    ],
)
def test_targets_that_do_not_fit_the_images_are_refused(
    copy: Snapshot, column: str, row: int, value: int, message: str
) -> None:
    columns = copy.store and copy.manifest("natural")._table.to_pydict()
    columns[column][row] = value
    ref = put_table(copy.store, pa.table(columns, schema=schema.TARGETS), schema.TARGETS)
    with pytest.raises(IntegrityError, match=f"its targets do not fit the images: {message}"):
        rewritten(copy, targets=ref).manifest("natural")


def test_the_table_of_a_manifest_has_every_number_of_each_class(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path, policies={"capped": "balanced:per_class=23,max_repeat=3"})
    manifest = snapshot.manifest("capped")
    table = manifest.per_class()
    assert table["name"].to_pylist() == snapshot.classes["name"].to_pylist()
    assert table["group"].to_pylist() == ["medium", "few", "none", "few", "few", "one"]
    assert table["evaluable"].to_pylist() == [True, True, True, True, False, False]
    assert table["target"].to_pylist() == [23, 23, 0, 23, 12, 3]
    assert table["withheld"].to_pylist() == [0, 0, 0, 0, 11, 20]
    assert table["log_q"].to_pylist() == manifest.log_q.tolist()
    assert table["log_prior"].to_pylist() == manifest.log_prior.tolist()
    for kind in ("balanced", "effective_number", "square_root", "residual"):
        weights = table[f"weight_{kind}"].to_numpy()
        assert weights.tolist() == manifest.weights(kind).tolist()
        assert (weights * manifest.targets).sum() / manifest.num_draws == pytest.approx(1)
