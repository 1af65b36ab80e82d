"""Diff: what it counts and names is what plain sets say, and shards that are shared are not opened."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import NotFoundError
from pipeline.ingest.diff import KINDS, Diff, diff
from pipeline.keyed import text_key
from pipeline.schema import CLASSES, INDEX, REJECTS, SHARDS, SPLITS, SnapshotRecord, index_path, snapshot_path
from pipeline.snapshot import encode_record, open_snapshot
from pipeline.store import Store, put_table, table_to_ipc

NAMES = ("ant", "bee", "cat", "dog")
SHARD_BITS = 3

Image = tuple[int, int, int]  # content, class id, split
Images = dict[str, Image]


def publish(
    store: Store, number: int, images: Images, names: Sequence[str] = NAMES, reasons: Sequence[str] = ()
) -> None:
    """Snapshot ``number``: indexes and tables as a build would write them; diff opens no tar."""
    shards: list[dict[str, object]] = []
    for code, split in enumerate(SPLITS):
        for prefix in range(1 << SHARD_BITS):
            mine = sorted((text_key(p), p) for p, image in images.items() if image[2] == code)
            rows = [row_of(key, path, images[path]) for key, path in mine if key >> (64 - SHARD_BITS) == prefix]
            if rows:
                shards.append(shard_of(store, split, f"{prefix:0{SHARD_BITS}b}", rows))
    counts = [[sum(i[1:] == (c, s) for i in images.values()) for c in range(len(names))] for s in range(3)]
    classes = {name: [0] * len(names) for name in CLASSES.names} | dict(zip(SPLITS, counts, strict=True))
    classes |= {
        "class_id": list(range(len(names))),
        "name": list(names),
        "count": [sum(c) for c in zip(*counts, strict=True)],
    }
    classes["evaluable"] = [False] * len(names)
    rejects = [dict.fromkeys(REJECTS.names, "") | {"path": f"{i}", "reason": text} for i, text in enumerate(reasons)]
    record = SnapshotRecord(
        number=number,
        parent="",
        build_id="",
        seed=0,
        classes=put_table(store, pa.table(classes, schema=CLASSES), CLASSES),
        shards=put_table(store, pa.Table.from_pylist(shards, schema=SHARDS), SHARDS),
        rejects=put_table(store, pa.Table.from_pylist(rejects, schema=REJECTS), REJECTS),
        samples={},
        manifests={},
        num_images=len(images),
        num_classes=len(names),
        num_rejects=len(rejects),
        config={},
        created_by="tests",
    )
    store.create(snapshot_path(number), encode_record(record))


def row_of(key: int, path: str, image: Image) -> dict[str, object]:
    zeros = dict.fromkeys(("offset", "size", "checksum", "width", "height", "group"), 0)
    facts = {"key": f"{key:016x}", "path": path, "class_id": image[1], "split": SPLITS[image[2]]}
    return zeros | facts | {"format": "png", "mode": "RGB", "sha256": hashlib.sha256(b"%d" % image[0]).digest()}


def shard_of(store: Store, split: str, prefix: str, rows: list[dict[str, object]]) -> dict[str, object]:
    data = table_to_ipc(pa.Table.from_pylist(rows, schema=INDEX))
    sha256 = hashlib.sha256(data).hexdigest()
    store.put(index_path(sha256), data)
    facts = {
        "split": split,
        "prefix": prefix,
        "num_samples": len(rows),
        "index_sha256": sha256,
        "index_size": len(data),
    }
    return facts | {"tar_sha256": sha256, "tar_size": 0}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "root", create=True)


def compared(store: Store, before: Images, after: Images, **more: object) -> Diff:
    publish(store, 1, before)
    publish(store, 2, after, **more)
    return diff(store)


def told(found: Diff, kind: str) -> set[tuple[str | None, str | None]]:
    return {(change.path_before, change.path) for change in found.images[kind]}


def drawn(rng: random.Random, num_images: int) -> Images:
    """Random images, no two of the same bytes."""
    contents = rng.sample(range(10 * num_images), num_images)
    return {f"{i}.png": (content, rng.randrange(4), rng.randrange(3)) for i, content in enumerate(contents)}


def mutated(rng: random.Random, images: Images, num_changes: int) -> Images:
    """Some are removed, added, given other bytes, another name, class or split, or swapped."""
    result = dict(images)
    unused = iter(range(10**6, 10**7))
    for step in range(num_changes):
        path = rng.choice(sorted(result))
        content, class_id, split = result[path]
        kind = rng.randrange(7)
        if kind == 0:
            del result[path]
        elif kind == 1:
            result[f"new{step}.png"] = (next(unused), rng.randrange(4), rng.randrange(3))
        elif kind == 2:
            result[path] = (next(unused), class_id, split)
        elif kind == 3:
            result[f"renamed{step}.png"] = result.pop(path)
        elif kind == 4:
            result[path] = (content, rng.randrange(4), split)
        elif kind == 5:
            result[path] = (content, class_id, rng.randrange(3))
        else:
            other = rng.choice(sorted(result))
            result[path], result[other] = result[other], result[path]
    return result


def by_sets(before: Images, after: Images) -> dict[str, set[tuple[str | None, str | None]]]:
    """The same in plain words."""
    common = before.keys() & after.keys()
    at = {image[0]: path for path, image in before.items()}
    same_bytes = {(at[image[0]], path) for path, image in after.items() if image[0] in at}
    renamed = {(a, b) for a, b in same_bytes if a not in common and b not in common}
    pairs = {(path, path) for path in common} | renamed
    return {
        "added": {(None, path) for path in after.keys() - {b for _, b in pairs}},
        "removed": {(path, None) for path in before.keys() - {a for a, _ in pairs}},
        "changed": {(path, path) for path in common if before[path][0] != after[path][0]},
        "renamed": renamed,
        "relabelled": {(a, b) for a, b in pairs if before[a][1] != after[b][1]},
        "moved": {(a, b) for a, b in pairs | same_bytes if before[a][2] != after[b][2]},
    }


@pytest.mark.parametrize("seed", range(8))
def test_what_it_names_is_what_plain_sets_say(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    before = drawn(rng, 150)
    after = mutated(rng, before, 5 * (seed + 1))
    found, expected = compared(store, before, after), by_sets(before, after)
    assert {kind: told(found, kind) for kind in KINDS} == expected
    assert found.counts == {kind: len(expected[kind]) for kind in KINDS}


def test_one_change_opens_one_shard_of_each_side(store: Store) -> None:
    before = drawn(random.Random(1), 150)
    _, class_id, split = before["7.png"]
    found = compared(store, before, before | {"7.png": (10**7, class_id, split)})
    assert (found.counts["changed"], sum(found.counts.values()), found.num_opened_shards) == (1, 1, 2)
    assert found.num_shared_shards == open_snapshot(store).shards.num_rows - 1


def test_shared_shards_are_not_even_there(store: Store) -> None:
    before = drawn(random.Random(1), 150)
    publish(store, 1, before)
    publish(store, 2, before)
    for path in store.list("index"):
        store.remove(path)
    assert sum(diff(store).counts.values()) == 0


def test_nothing_changed_is_lawful_and_empty(store: Store) -> None:
    images = drawn(random.Random(2), 40)
    found = compared(store, images, images)
    assert (found.is_lawful, found.drift, found.rejects, found.num_images) == (True, (), {}, (40, 40))


def test_classes_appear_vanish_and_drift(store: Store) -> None:
    before = {"a": (1, 0, 0), "b": (2, 0, 0), "c": (3, 1, 0), "d": (4, 2, 0)}
    after = {"a": (1, 0, 0), "e": (5, 4, 0), "f": (6, 2, 0), "d": (4, 2, 0), "g": (7, 2, 0)}
    found = compared(store, before, after, names=(*NAMES, "emu"))
    assert (found.classes_added, found.classes_vanished, found.classes_renamed) == (("emu",), ("bee",), ())
    assert [(one.name, one.before, one.after) for one in found.drift] == [
        ("cat", 1, 3),
        ("ant", 2, 1),
        ("bee", 1, 0),
        ("emu", 0, 1),
    ]


def test_a_class_id_of_another_meaning_is_unlawful(store: Store) -> None:
    images = drawn(random.Random(3), 20)
    found = compared(store, images, images, names=("ant", "cow", "cat", "dog"))
    assert (found.classes_renamed, found.is_lawful) == (((1, "bee", "cow"),), False)


def test_rejects_are_compared_by_reason(store: Store) -> None:
    images = drawn(random.Random(4), 20)
    assert compared(store, images, images, reasons=("gone", "gone", "empty")).rejects == {
        "empty": (0, 1),
        "gone": (0, 2),
    }


def test_names_can_be_bounded_and_counts_are_not(store: Store) -> None:
    publish(store, 1, drawn(random.Random(5), 60))
    publish(store, 2, {f"x{path}": (10**6 + i, 0, 0) for i, path in enumerate(drawn(random.Random(5), 60))})
    found = diff(store, num_named=3)
    assert (found.counts["added"], len(found.images["added"])) == (60, 3)


def test_any_two_snapshots_can_be_compared(store: Store) -> None:
    for number in (1, 2, 3):
        publish(store, number, {f"{i}": (i, 0, 0) for i in range(number)})
    assert [(found.before, found.after) for found in (diff(store), diff(store, 1), diff(store, 1, 2))] == [
        (2, 3),
        (1, 3),
        (1, 2),
    ]
    assert diff(store, 3, 1).counts["removed"] == 2
    with pytest.raises(NotFoundError, match=r"there is no snapshot 9 in .*; the newest is 3"):
        diff(store, 1, 9)


def test_one_snapshot_has_nothing_to_be_compared_with(store: Store) -> None:
    with pytest.raises(NotFoundError, match="no snapshot in"):
        diff(store)
    publish(store, 1, {"a": (1, 0, 0)})
    with pytest.raises(NotFoundError, match="there is no snapshot before snapshot 1"):
        diff(store)


def test_damage_is_an_error(store: Store) -> None:
    publish(store, 1, {"a": (1, 0, 0)})
    publish(store, 2, {"a": (2, 0, 0)})
    snapshot = open_snapshot(store, 2)
    Path(store.root, index_path(snapshot.shards["index_sha256"][0].as_py())).unlink()
    with pytest.raises(NotFoundError, match="cannot read index/"):
        diff(store)
