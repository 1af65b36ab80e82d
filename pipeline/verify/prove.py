"""``verify``: record, tables, shards, rows, samples, manifests, in order; later steps use what earlier ones proved."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pyarrow as pa

from pipeline.errors import EvenshardError, IntegrityError, NotFoundError, UsageError
from pipeline.schema import (
    CLASSES,
    DEPARTED,
    INDEXES,
    REJECTS,
    SAMPLES,
    SHARDS,
    SPLITS,
    FileRef,
    SnapshotRecord,
    index_path,
    snapshot_path,
    table_path,
    tar_path,
)
from pipeline.snapshot import decode_record, newest_number, no_snapshot, record_id, refuse_collected
from pipeline.store import Store, ipc_to_table
from pipeline.verify import rows as images
from pipeline.verify import tables
from pipeline.verify.files import RESTORE, Files
from pipeline.verify.findings import Code, Findings, Verification
from pipeline.verify.manifests import check_manifest
from pipeline.verify.pins import check_pins
from pipeline.verify.sample import Sample
from pipeline.verify.tars import check_layout, check_part, check_tar, row_starts

Progress = Callable[[str, int, int], None]
"""Called with (stage, images done, images in all) after every shard."""


def verify(
    root: str | os.PathLike[str] | Store,
    at: int | None = None,
    sample: float = 1.0,
    *,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Prove snapshot ``at`` (the newest by default) of ``root``, and that its pins keep what they mean.

    ``sample``: the share of every tar that is read; records, tables, indexes and manifests always are, and the size of
    every tar is asked. Which share follows from ``seed`` and the tars' names: n = 1/sample seeds in a row read all of
    them. By default the seed is the number of the day (UTC, since 1970), so that a nightly run reads all in n nights.

    Errors: ``UsageError`` for a wrong call, ``NotFoundError`` where there is no such snapshot; whatever else is wrong
    is a finding.
    """
    started_s = time.monotonic()
    chosen = Sample(sample, _today() if seed is None else seed)
    store = root if isinstance(root, Store) else Store.open(root)
    number = _number(store, at)
    proof = _Proof(store, number, chosen, progress or (lambda stage, done, total: None))
    proof.run()
    return Verification(
        root=store.url,
        number=number,
        findings=proof.findings.all(),
        num_files=proof.files.num_files,
        num_images=proof.num_images,
        num_bytes=proof.files.num_bytes,
        sample=chosen.share,
        seed=chosen.seed,
        num_seeds=chosen.num_seeds,
        tar_bytes=proof.tar_bytes,
        tar_bytes_read=proof.tar_bytes_read,
        elapsed_s=time.monotonic() - started_s,
        notes=proof.notes,
    )


def _today() -> int:
    return int(time.time() // 86_400)


def _number(store: Store, at: int | None) -> int:
    newest = newest_number(store)
    if newest == 0:
        raise no_snapshot(store)
    if at is not None and at < 1:
        raise UsageError(f"snapshots are numbered from 1; there is no snapshot {at}")
    if at is not None and at > newest:
        raise NotFoundError(f"there is no snapshot {at} in {store.url}; the newest is {newest}")
    if at is not None:
        refuse_collected(store, at)
    return at or newest


class _Proof:
    def __init__(self, store: Store, number: int, sample: Sample, progress: Progress) -> None:
        self.findings = Findings()
        self.files = Files(store, self.findings)
        self.num_images = self.tar_bytes = self.tar_bytes_read = 0
        self.notes: tuple[str, ...] = ()
        self._store, self._number, self._sample, self._progress = store, number, sample, progress
        self._path = snapshot_path(number)

    def run(self) -> None:
        self._snapshot()
        self.notes += check_pins(self._store, self.files, self.findings)

    def _snapshot(self) -> None:
        record = self._record()
        if record is None:
            self._unproved("nothing that this snapshot names could be looked at: its record cannot be used")
            return
        found = {
            "classes": self.files.table(record.classes, CLASSES),
            "shards": self.files.table(record.shards, SHARDS),
            "rejects": self.files.table(record.rejects, REJECTS),
        }
        if record.departed is not None:
            self.files.table(record.departed, DEPARTED)
        tables.check_record(record, found, self._path, self.findings)
        classes, shards = found["classes"], found["shards"]
        if classes is not None:
            tables.check_classes(classes, table_path(record.classes.sha256), self.findings)
        rows = self._shards(record, shards) if shards is not None else None
        if rows is None or shards is None:
            self._unproved("not every index can be used: images were not compared with each other, counts and samples")
        else:
            self._rows(record, rows, shards, found["rejects"])
        self._samples(record, rows, classes)
        for name, ref in sorted(record.manifests.items()):
            check_manifest(name, ref, record, classes, self.files, self.findings)

    def _record(self) -> SnapshotRecord | None:
        record = self._read_record(self._number)
        if record is None:
            return None
        expected = ""
        if self._number > 1:
            parent = self._read_record(self._number - 1)
            if parent is None:
                return record
            expected = record_id(parent)
        if record.parent != expected:
            told = f"expected parent {expected!r}, the id of the record before, found {record.parent!r}"
            self.findings.add(Code.RECORD, self._path, f"{told}; {RESTORE}")
        return record

    def _read_record(self, number: int) -> SnapshotRecord | None:
        path = snapshot_path(number)
        data = self.files.read_any(path)
        if data is None:
            return None
        try:
            record = decode_record(data, path)
        except IntegrityError as error:
            self.findings.add(Code.RECORD, path, f"{str(error).removeprefix(path).lstrip(': ')}; {RESTORE}")
            return None
        if record.number != number:
            self.findings.add(Code.RECORD, path, f"it is the record of snapshot {record.number}; {RESTORE}")
            return None
        return record

    # -- shards ----------------------------------------------------------------------------------------------------

    def _shards(self, record: SnapshotRecord, shards: pa.Table) -> images.Rows | None:
        """Check every tar and index; all rows together, or None if some index cannot be used."""
        where = table_path(record.shards.sha256)
        if not tables.check_shards(shards, where, self.findings):
            return None
        parts: list[tuple[int, pa.Table]] = []
        done = 0
        for shard in shards.to_pylist():
            self._progress("verify", done, record.num_images)
            index = self._shard(shard, where, record.num_classes)
            if index is not None:
                parts.append(
                    (
                        SPLITS.index(shard["split"]),
                        index.select([name for name in index.column_names if name in (*images.COLUMNS, "phash")]),
                    )
                )
            done += shard["num_samples"]
        self._progress("verify", done, record.num_images)
        if len(parts) < shards.num_rows:
            return None
        paths = [index_path(sha256) for sha256 in shards["index_sha256"].to_pylist()]
        return images.collect(parts, lambda number: self._reopen(paths[number]))

    def _shard(self, shard: dict[str, object], where: str, num_classes: int) -> pa.Table | None:
        tar, index_name, split = str(shard["tar_sha256"]), str(shard["index_sha256"]), str(shard["split"])
        if not self.files.is_name(where, tar, index_name):
            return None
        ref = FileRef(sha256=index_name, size=_int(shard["index_size"]), num_rows=_int(shard["num_samples"]))
        path = index_path(index_name)
        index = self.files.table(ref, INDEXES, path)
        usable = index is not None and images.check_index(index, split, num_classes, path, self.findings)
        self._tar(tar_path(tar), tar, _int(shard["tar_size"]), index)
        return index if usable else None

    def _tar(self, path: str, sha256: str, size: int, index: pa.Table | None) -> None:
        self.tar_bytes += size
        if self._sample.share < 1:
            if self.files.expect(path, size) and index is not None and check_layout(index, size, path, self.findings):
                self._parts(path, sha256, size, index)
            return
        data = self.files.read_any(path)
        if data is None:
            return
        self.tar_bytes_read += len(data)
        self.files.is_same(path, data, sha256, size)
        if index is not None:  # also where the tar is damaged: this finds the images that are
            self.num_images += check_tar(data, index, path, self.findings)

    def _parts(self, path: str, sha256: str, size: int, index: pa.Table) -> None:
        starts = row_starts(index)
        for first, stop in self._sample.runs(sha256, starts):
            start, is_last = int(starts[first]), stop == index.num_rows
            data = self.files.read_part(path, start, size if is_last else int(starts[stop]))
            if data is None:
                continue
            self.tar_bytes_read += len(data)
            rows = index.slice(first, stop - first)
            self.num_images += check_part(data, rows, path, self.findings, start=start, is_last=is_last)

    def _reopen(self, path: str) -> pa.Table | None:
        try:
            return ipc_to_table(self._store.read(path), INDEXES, path)
        except EvenshardError:
            return None  # it was readable before: the message goes without the source path

    # -- what the rows say together ----------------------------------------------------------------------------------

    def _rows(self, record: SnapshotRecord, rows: images.Rows, shards: pa.Table, rejects: pa.Table | None) -> None:
        images.check_once(rows, self._path, self.findings)
        images.check_groups(rows, self._path, self.findings)
        images.check_lookalikes(rows, record.config.get("near_duplicates"), self._path, self.findings)
        if rejects is not None:
            images.check_rejects(rejects, rows, table_path(record.rejects.sha256), self.findings)
        listed = list(enumerate(shards.to_pylist()))
        for code, split in enumerate(SPLITS):
            leaves = [
                images.Leaf(shard=number, prefix=shard["prefix"], path=tar_path(shard["tar_sha256"]))
                for number, shard in listed
                if shard["split"] == split
            ]
            images.check_places(rows, leaves, code, record.config, self.findings, seed=record.seed)

    def _samples(self, record: SnapshotRecord, rows: images.Rows | None, classes: pa.Table | None) -> None:
        if rows is not None and classes is not None and classes.num_rows == record.num_classes:
            tables.check_counts(classes, rows, table_path(record.classes.sha256), self.findings)
        for split, ref in record.samples.items():
            samples = self.files.table(ref, SAMPLES)
            if samples is not None and rows is not None and classes is not None:
                counts = classes[split].to_numpy()
                path = table_path(ref.sha256)
                tables.check_samples(samples, split, rows, counts, path, self.findings, seed=record.seed)

    def _unproved(self, detail: str) -> None:
        self.findings.add(Code.UNPROVED, self._path, f"{detail}; repair what is named here and verify again")


def _int(value: object) -> int:
    assert isinstance(value, int), value  # a column of int64 without nulls
    return value
