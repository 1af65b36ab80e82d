"""Class, shard and sample tables against the indexes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.ingest.shards import shard_hash
from pipeline.schema import SPLITS, SnapshotRecord
from pipeline.verify.files import RESTORE
from pipeline.verify.findings import Code, Findings
from pipeline.verify.rows import Rows

AGAIN = "build again"


def check_record(record: SnapshotRecord, tables: Mapping[str, pa.Table | None], path: str, findings: Findings) -> None:
    """The numbers that the record repeats."""
    classes, rejects, shards = tables["classes"], tables["rejects"], tables["shards"]
    facts = {
        "num_classes": (record.num_classes, _num_rows(classes)),
        "num_images": (record.num_images, _total(classes, "count")),
        "num_images, over shards": (record.num_images, _total(shards, "num_samples")),
        "num_images, over splits": (record.num_images, sum(ref.num_rows for ref in record.samples.values())),
        "num_rejects": (record.num_rejects, _num_rows(rejects)),
    }
    for name, (said, found) in facts.items():
        if found is not None and said != found:
            findings.add(Code.RECORD, path, f"{name}: the record says {said:,}, its tables have {found:,}; {AGAIN}")


def _num_rows(table: pa.Table | None) -> int | None:
    return None if table is None else table.num_rows


def _total(table: pa.Table | None, column: str) -> int | None:
    return None if table is None else int(table[column].to_numpy().sum())


def check_classes(classes: pa.Table, path: str, findings: Findings) -> None:
    """The class table by itself."""
    names: list[str] = classes["name"].to_pylist()
    columns = {name: classes[name].to_numpy() for name in classes.column_names if name != "name"}
    wrong = columns["class_id"] != np.arange(len(names))
    findings.add_rows(Code.TABLE, path, wrong, lambda i: f"row {i}: expected class_id {i}; {RESTORE}")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})[:3]
        findings.add(Code.TABLE, path, f"expected every name once, {twice} stand twice; {AGAIN}")
    sums = {
        "count": sum(columns[split] for split in SPLITS),
        "bytes": sum(columns[f"{split}_bytes"] for split in SPLITS),
        "evaluable": columns["val"] + columns["test"] > 0,
    }
    for name, expected in sums.items():
        _compare(columns[name], expected, lambda i, name=name: f"class {names[i]!r}: {name}", path, findings)


def check_counts(classes: pa.Table, rows: Rows, path: str, findings: Findings) -> None:
    """Counts and bytes of every class and split are the sums over the rows."""
    names: list[str] = classes["name"].to_pylist()
    for code, split in enumerate(SPLITS):
        mine = rows.split == code
        class_id = rows.class_id[mine]
        count = np.bincount(class_id, minlength=len(names))
        size_bytes = np.zeros(len(names), np.int64)
        np.add.at(size_bytes, class_id, rows.size[mine].astype(np.int64))
        for column, expected in ((split, count), (f"{split}_bytes", size_bytes)):
            found = classes[column].to_numpy()
            _compare(found, expected, lambda i, column=column: f"class {names[i]!r}: {column}", path, findings)


def _compare(found: NDArray[Any], expected: Any, name: Any, path: str, findings: Findings) -> None:
    findings.add_rows(
        Code.COUNTS,
        path,
        found != expected,
        lambda i: f"{name(i)} is {found[i]}, the images give {expected[i]}; {AGAIN}",
    )


def check_shards(shards: pa.Table, path: str, findings: Findings) -> bool:
    """The shard table by itself; False if its rows cannot be used further."""
    splits: list[str] = shards["split"].to_pylist()
    if unknown := sorted(set(splits) - set(SPLITS)):
        findings.add(Code.TABLE, path, f"expected splits among {', '.join(SPLITS)}, found {unknown}; {RESTORE}")
        return False
    order = list(zip(map(SPLITS.index, splits), shards["prefix"].to_pylist(), strict=True))
    if any(one >= two for one, two in pairwise(order)):
        findings.add(Code.TABLE, path, f"expected shards in the order of split, then prefix, each once; {RESTORE}")
    return True


def check_samples(
    samples: pa.Table,
    split: str,
    rows: Rows,
    class_counts: NDArray[np.int64],
    path: str,
    findings: Findings,
    *,
    seed: int,
) -> None:
    """Every row leads to its image; classes are contiguous, in keyed-hash order inside; no image is left out."""
    code = SPLITS.index(split)
    shard, row = (samples[name].to_numpy().astype(np.int64) for name in ("shard", "row"))
    size_of_shard = np.append(np.diff(rows.first), 0)
    last = len(rows.first) - 1
    astray = row >= size_of_shard[np.minimum(shard, last)]
    findings.add_rows(
        Code.SAMPLES, path, astray, lambda i: f"row {i}: there is no row {row[i]} in a shard {shard[i]}; {RESTORE}"
    )
    if astray.any():
        return
    place = rows.first[shard] + row
    _check_coverage(place, rows, code, path, findings)
    for name in ("offset", "size", "checksum"):
        said, found = samples[name].to_numpy(), getattr(rows, name)[place]

        def tell(i: int, name: str = name, said: Any = said, found: Any = found) -> str:
            return f"row {i}: {name} is {said[i]}, the index of {rows.name(int(place[i]))} says {found[i]}; {RESTORE}"

        findings.add_rows(Code.SAMPLES, path, said != found, tell)
    _check_order(place, rows, class_counts, shard_hash(rows.key[place], split=split, seed=seed), path, findings)


def _check_coverage(place: NDArray[np.int64], rows: Rows, code: int, path: str, findings: Findings) -> None:
    times = np.bincount(place, minlength=len(rows.key))
    wrong = times != (rows.split == code)
    findings.add_rows(
        Code.SAMPLES,
        path,
        wrong,
        lambda i: f"{rows.name(i)} of split {SPLITS[rows.split[i]]} stands in it {times[i]} times; {RESTORE}",
    )


def _check_order(
    place: NDArray[np.int64],
    rows: Rows,
    class_counts: NDArray[np.int64],
    hashes: NDArray[np.uint64],
    path: str,
    findings: Findings,
) -> None:
    class_id = rows.class_id[place]
    expected = np.repeat(np.arange(len(class_counts)), class_counts)
    if len(expected) != len(class_id):
        findings.add(
            Code.SAMPLES, path, f"the classes count {len(expected):,} images, it has {len(class_id):,} rows; {AGAIN}"
        )
        return
    findings.add_rows(
        Code.SAMPLES,
        path,
        class_id != expected,
        lambda i: (
            f"row {i} belongs to class {expected[i]}, {rows.name(int(place[i]))} is of class {class_id[i]}; {AGAIN}"
        ),
    )
    falls = np.zeros(len(hashes), np.bool_)
    falls[1:] = (class_id[1:] == class_id[:-1]) & (hashes[1:] <= hashes[:-1])
    findings.add_rows(
        Code.SAMPLES, path, falls, lambda i: f"row {i}: keyed hashes must rise within class {class_id[i]}; {AGAIN}"
    )
