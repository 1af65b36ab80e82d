"""A second opinion on a ROOT, with nothing of this project: tarfile, hashlib, json and pyarrow only."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

FORMATS = {"jpg", "png", "webp", "gif", "bmp", "tif"}


def digests_of(root: Path) -> dict[str, str]:
    """SHA-256 of every file outside runs/ and reports/, by path."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("runs", "reports")
    }


def newest(root: Path) -> dict[str, Any]:
    return json.loads(sorted((root / "snapshots").iterdir())[-1].read_text())


def table(root: Path, ref: dict[str, Any], folder: str = "tables") -> pa.Table:
    data = (root / folder / f"{ref['sha256']}.arrow").read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (ref["sha256"], ref["size"])
    return pa.ipc.open_file(data).read_all()


def read_shard(root: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The index rows of one shard, each compared with its tar."""
    tar_path = root / "shards" / row["tar_sha256"][:2] / f"{row['tar_sha256']}.tar"
    assert os.path.getsize(tar_path) == row["tar_size"]
    assert hashlib.sha256(tar_path.read_bytes()).hexdigest() == row["tar_sha256"]
    ref = {"sha256": row["index_sha256"], "size": row["index_size"]}
    rows = table(root, ref, f"index/{row['index_sha256'][:2]}").to_pylist()
    with tarfile.open(tar_path, "r:") as tar:
        members = {item.name: item for item in tar}
        assert list(members) == sorted(members)
        assert len(members) == 2 * len(rows) == 2 * row["num_samples"]
        for entry in rows:
            check_row(tar, members, entry, row["split"])
    return rows


def check_row(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], entry: dict[str, Any], split: str) -> None:
    image, label = members[f"{entry['key']}.{entry['format']}"], members[f"{entry['key']}.cls"]
    assert entry["format"] in FORMATS
    assert (image.mtime, image.uid, image.gid, image.mode, image.type) == (0, 0, 0, 0o644, tarfile.REGTYPE)
    data = tar.extractfile(image).read()  # type: ignore[union-attr]
    assert (entry["offset"], entry["size"]) == (image.offset_data, len(data))
    assert entry["sha256"] == hashlib.sha256(data).digest()
    assert entry["key"] == hashlib.sha256(entry["path"].encode()).hexdigest()[:16]
    assert int(tar.extractfile(label).read()) == entry["class_id"]  # type: ignore[union-attr]
    assert entry["split"] == split


def check_root(root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All index rows and all rejects of the newest snapshot, after every comparison that needs no project code."""
    record = newest(root)
    rows = [row for shard in table(root, record["shards"]).to_pylist() for row in read_shard(root, shard)]
    rejects = table(root, record["rejects"]).to_pylist()
    classes = table(root, record["classes"]).to_pylist()
    assert len({row["key"] for row in rows}) == len({row["sha256"] for row in rows}) == len(rows)
    assert not {row["path"] for row in rows} & {row["path"] for row in rejects if row["reason"] != "duplicate-row"}
    counted = Counter((row["class_id"], row["split"]) for row in rows)
    for number, entry in enumerate(classes):
        assert entry["class_id"] == number
        splits = {split: counted[number, split] for split in ("train", "val", "test")}
        assert {split: entry[split] for split in splits} == splits
        assert entry["count"] == sum(splits.values())
    groups = {}
    for row in rows:
        assert groups.setdefault(row["group"], row["split"]) == row["split"]
    for split, ref in record["samples"].items():
        check_samples(root, record, split, ref, rows)
    return rows, rejects


def check_samples(
    root: Path, record: dict[str, Any], split: str, ref: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Every sample row leads to one index row of its split, and classes lie in order."""
    shards = table(root, record["shards"]).to_pylist()
    starts = [0]
    for shard in shards:
        starts.append(starts[-1] + shard["num_samples"])
    samples = table(root, ref).to_pylist()
    found = [rows[starts[sample["shard"]] + sample["row"]] for sample in samples]
    assert [(row["offset"], row["size"], row["checksum"]) for row in found] == [
        (sample["offset"], sample["size"], sample["checksum"]) for sample in samples
    ]
    assert {row["key"] for row in found} == {row["key"] for row in rows if row["split"] == split}
    class_ids = [row["class_id"] for row in found]
    assert class_ids == sorted(class_ids)
