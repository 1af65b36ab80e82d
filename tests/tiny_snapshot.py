"""A hand-written snapshot of a hundred 8 to 12 pixel images: what readers need, without a build.

Every image tells who it is: its first pixel is (class, number in class, split), so pixels can be checked.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from PIL import Image

from pipeline import schema
from pipeline.keyed import text_key
from pipeline.plan import manifest as manifests
from pipeline.plan.policy import apply, parse
from pipeline.snapshot import Snapshot, encode_record, open_snapshot
from pipeline.store import Store, put_table, table_to_ipc

COUNTS = {"train": (60, 19, 0, 9, 4, 1), "val": (0, 0, 0, 0, 0, 0), "test": (5, 3, 2, 1, 0, 0)}
POLICIES = {"natural": "natural", "balanced": "balanced:per_class=23", "small": "balanced:per_class=1"}
SAMPLES_PER_SHARD = 17

Row = dict[str, Any]


def write_snapshot(
    root: Path, counts: Mapping[str, Sequence[int]] = COUNTS, policies: Mapping[str, str] = POLICIES
) -> Snapshot:
    """Tars, indexes, tables, manifests and the record of snapshot 1, in that order, then opened as a reader would."""
    store = Store.open(root, create=True)
    shards: list[Row] = []
    filled = [split for split in schema.SPLITS if any(counts[split])]
    samples = {split: _write_split(store, split, counts[split], shards) for split in filled}
    tables = {
        "classes": put_table(store, _classes(counts), schema.CLASSES),
        "shards": put_table(store, pa.Table.from_pylist(shards, schema=schema.SHARDS), schema.SHARDS),
        "rejects": put_table(store, schema.REJECTS.empty_table(), schema.REJECTS),
    }
    train = samples["train"]
    record = schema.SnapshotRecord(
        number=1,
        parent="",
        build_id="0" * 64,
        seed=0,
        samples=samples,
        manifests={
            name: _write_manifest(store, name, policy, counts["train"], train, tables)
            for name, policy in policies.items()
        },
        num_images=sum(map(sum, counts.values())),
        num_classes=len(counts["train"]),
        num_rejects=0,
        config={},
        created_by="evenshard tests",
        **tables,
    )
    store.create(schema.snapshot_path(1), encode_record(record))
    return open_snapshot(root)


def identity(image: torch.Tensor) -> tuple[int, int, int]:
    """(class, number in class, split) of a tensor [3, H, W] whose first pixel was left alone."""
    return tuple(image[:, 0, 0].tolist())


def picture(class_id: int, number: int, split: int) -> bytes:
    """A PNG of 8 to 12 pixels a side."""
    rng = np.random.default_rng((class_id, number, split))
    pixels = rng.integers(0, 256, (*rng.integers(8, 13, 2), 3), dtype=np.uint8)
    pixels[0, 0] = class_id % 256, number % 256, split
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _write_split(store: Store, split: str, counts: Sequence[int], shards: list[Row]) -> schema.FileRef:
    code = schema.SPLITS.index(split)
    members = [
        (text_key(f"{split}/{class_id}/{number}.png"), class_id, picture(class_id, number, code), number)
        for class_id, count in enumerate(counts)
        for number in range(count)
    ]
    members.sort()
    rows: list[Row] = []
    for first in range(0, len(members), SAMPLES_PER_SHARD):
        rows += _write_shard(store, split, members[first : first + SAMPLES_PER_SHARD], shards)
    rows.sort(key=lambda row: (row["class_id"], row["key"]))
    columns = {name: [row[name] for row in rows] for name in schema.SAMPLES.names}
    return put_table(store, pa.table(columns, schema=schema.SAMPLES), schema.SAMPLES)


def _write_shard(store: Store, split: str, members: list[tuple[int, int, bytes, int]], shards: list[Row]) -> list[Row]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, class_id, data, _ in members:
            for extension, content in (("png", data), ("cls", str(class_id).encode())):
                info = tarfile.TarInfo(f"{key:016x}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    tar_bytes = out.getvalue()
    with tarfile.open(fileobj=io.BytesIO(tar_bytes)) as tar:
        offsets = {member.name: member.offset_data for member in tar.getmembers()}
    index = [_index_row(split, *member, offset=offsets[f"{member[0]:016x}.png"]) for member in members]
    index_bytes = table_to_ipc(pa.Table.from_pylist(index, schema=schema.INDEX))
    tar_sha256, index_sha256 = (hashlib.sha256(data).hexdigest() for data in (tar_bytes, index_bytes))
    store.put(schema.tar_path(tar_sha256), tar_bytes)
    store.put(schema.index_path(index_sha256), index_bytes)
    shards.append(
        {
            "split": split,
            "prefix": f"{len(shards):b}",
            "num_samples": len(members),
            "tar_sha256": tar_sha256,
            "tar_size": len(tar_bytes),
            "index_sha256": index_sha256,
            "index_size": len(index_bytes),
        }
    )
    return [{"shard": len(shards) - 1, "row": i, **row} for i, row in enumerate(index)]


def _index_row(split: str, key: int, class_id: int, data: bytes, number: int, *, offset: int) -> Row:
    width, height = Image.open(io.BytesIO(data)).size
    return {
        "key": f"{key:016x}",
        "path": f"{split}/{class_id}/{number}.png",
        "class_id": class_id,
        "split": split,
        "offset": offset,
        "size": len(data),
        "checksum": xxhash.xxh3_64_intdigest(data),
        "width": width,
        "height": height,
        "format": "png",
        "mode": "RGB",
        "sha256": hashlib.sha256(data).digest(),
        "group": key,
    }


def _classes(counts: Mapping[str, Sequence[int]]) -> pa.Table:
    columns: dict[str, Any] = {split: list(counts[split]) for split in schema.SPLITS}
    totals = np.sum([counts[split] for split in schema.SPLITS], axis=0)
    columns |= {"class_id": range(len(totals)), "name": [f"class {i}" for i in range(len(totals))], "count": totals}
    columns |= dict.fromkeys(("bytes", "train_bytes", "val_bytes", "test_bytes"), totals * 0)
    columns["evaluable"] = totals > np.array(counts["train"])
    return pa.table({name: columns[name] for name in schema.CLASSES.names}, schema=schema.CLASSES)


def _write_manifest(
    store: Store,
    name: str,
    policy: str,
    counts: Sequence[int],
    samples: schema.FileRef,
    tables: Mapping[str, schema.FileRef],
) -> schema.FileRef:
    targets = apply(np.array(counts), parse(policy))
    document = manifests.ManifestDocument(
        name=name,
        policy=parse(policy),
        split="train",
        num_classes=len(counts),
        num_draws=int(targets.target.sum()),
        targets=put_table(store, manifests.targets_table(targets), schema.TARGETS),
        classes=tables["classes"],
        shards=tables["shards"],
        samples=samples,
    )
    data = manifests.encode(document)
    sha256 = hashlib.sha256(data).hexdigest()
    store.put(schema.manifest_path(sha256), data)
    return schema.FileRef(sha256=sha256, size=len(data), num_rows=len(counts))
