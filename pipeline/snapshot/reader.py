"""From a ROOT to tables, images and manifests, each checked against the record."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import IntegrityError, NotFoundError, UsageError
from pipeline.plan import manifest as plan
from pipeline.plan.policy import apply
from pipeline.plan.spelling import nearest
from pipeline.schema import (
    CLASSES,
    INDEXES,
    REJECTS,
    SAMPLES,
    SHARDS,
    SPLITS,
    TARGETS,
    FileRef,
    SnapshotRecord,
    index_path,
    manifest_path,
    snapshot_path,
    table_path,
    tar_path,
)
from pipeline.snapshot.numbers import (
    collected,
    is_collected,
    newest_number,
    no_snapshot,
    refuse_collected,
)
from pipeline.snapshot.record import decode_record, record_id
from pipeline.store import CheckedTable, ShardReader, Store, ipc_to_table, read_checked, read_image

IntArray = NDArray[np.int64]

OPEN_INDEXES = 64
"""Indexes that a snapshot keeps in memory: some 20 MB of full shards."""


def open_snapshot(root: str | os.PathLike[str] | Store, at: int | None = None) -> Snapshot:
    """Snapshot number ``at`` of ``root``, the newest by default."""
    store = root if isinstance(root, Store) else Store.open(root)
    if at is not None and at < 1:
        raise UsageError(f"snapshots are numbered from 1; there is no snapshot {at}")
    number = newest_number(store) if at is None or not store.exists(snapshot_path(at)) else at
    if number == 0:
        raise no_snapshot(store)
    if at is not None and number != at:
        raise NotFoundError(f"there is no snapshot {at} in {store.url}; the newest is {number}")
    if at is not None:
        refuse_collected(store, at)
    return Snapshot(store, read_record(store, number))


def read_record(store: Store, number: int) -> SnapshotRecord:
    """The record of snapshot ``number``."""
    path = snapshot_path(number)
    where = f"{path} in {store.url}"
    record = decode_record(store.read(path), where)
    if record.number != number:
        raise IntegrityError(f"{where} is the record of snapshot {record.number}; restore the file from a copy")
    return record


class Snapshot:
    """One immutable build. Picklable: storage and record travel, tables are read again. Thread-safe."""

    def __init__(self, store: Store, record: SnapshotRecord) -> None:
        self.store = store
        self.record = record
        self.number = record.number
        self.manifests = tuple(sorted(record.manifests))
        self._reader = ShardReader(store)
        self._samples: dict[str, CheckedTable] = {}
        self._indexes: OrderedDict[int, pa.Table] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Snapshot], tuple[Store, SnapshotRecord]]:
        return Snapshot, (self.store, self.record)

    def __repr__(self) -> str:
        return f"Snapshot({self.store.url!r}, number={self.number}, num_images={self.record.num_images})"

    @property
    def root(self) -> str:
        """What opens it again, maybe with credentials: never for messages."""
        return self.store.root

    @cached_property
    def id(self) -> str:
        """SHA-256 of the record."""
        return record_id(self.record)

    @cached_property
    def classes(self) -> pa.Table:
        """One row per class, as ``schema.CLASSES``; the row number is the class id."""
        table = self.table(self.record.classes, CLASSES)
        if not np.array_equal(table.column("class_id").to_numpy(), np.arange(table.num_rows)):
            raise IntegrityError(f"snapshot {self.number} in {self.store.url}: class ids are not the row numbers")
        return table

    @cached_property
    def shards(self) -> pa.Table:
        """One row per shard, as ``schema.SHARDS``; the row number is the shard number."""
        return self.table(self.record.shards, SHARDS)

    @cached_property
    def rejects(self) -> pa.Table:
        """One row per source entry that is in no shard, as ``schema.REJECTS``."""
        return self.table(self.record.rejects, REJECTS)

    def samples(self, split: str) -> CheckedTable:
        """One row per sample of ``split``, as ``schema.SAMPLES``, sorted by class."""
        _check_split(split)
        ref = self.record.samples.get(split)
        if ref is None:
            raise UsageError(
                f"split {split!r} of snapshot {self.number} has no image; splits with images: "
                f"{', '.join(name for name in SPLITS if name in self.record.samples)}"
            )
        with self._lock, self.collection_told():
            if split not in self._samples:
                self._samples[split] = CheckedTable.open(self.store, table_path(ref.sha256), ref, SAMPLES)
            return self._samples[split]

    def class_starts(self, split: str) -> IntArray:
        """int64 [K+1]: class c owns rows [starts[c], starts[c+1]) of the sample table of ``split``."""
        _check_split(split)
        counts = self.classes.column(split).to_numpy()
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
        ref = self.record.samples.get(split)
        if starts[-1] != (num_samples := ref.num_rows if ref else 0):
            raise IntegrityError(
                f"snapshot {self.number} in {self.store.url}: its classes count {starts[-1]} images in {split}, its "
                f"sample table has {num_samples} rows"
            )
        return starts

    def index(self, shard: int) -> pa.Table:
        """One row per sample of one shard, as one of ``schema.INDEXES``, in the order of its tar."""
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        row = self._shard(shard)
        ref = FileRef(sha256=row["index_sha256"], size=row["index_size"], num_rows=row["num_samples"])
        table = self.table(ref, INDEXES, index_path(ref.sha256))
        with self._lock:
            self._indexes[shard] = table
            if len(self._indexes) > OPEN_INDEXES:
                self._indexes.popitem(last=False)
        return table

    def manifest(self, name: str) -> Manifest:
        """The manifest ``name``, bound to this snapshot."""
        if name not in self.record.manifests:
            raise NotFoundError(
                f"no manifest {name!r} in snapshot {self.number}{nearest(name, self.manifests)}; manifests: "
                f"{', '.join(self.manifests)}"
            )
        return Manifest(self, name)

    def read_image(self, split: str, row: int) -> bytes:
        """The verified bytes of one sample row."""
        samples = self.samples(split)
        shard, place, offset, size, checksum = (int(samples.take(name, [row])[0]) for name in SAMPLES.names)
        tar = tar_path(self._shard(shard)["tar_sha256"])
        with self.collection_told():
            return read_image(self._reader, tar, offset, size, checksum, lambda: self.describe(shard, place))

    def describe(self, shard: int, place: int) -> str:
        """Key and source path of row ``place`` of a shard, for messages; says so where the index cannot tell."""
        try:
            row = self.index(shard).slice(place, 1).to_pylist()[0]
        except (IntegrityError, NotFoundError, IndexError) as error:
            return f"number {place} of shard {shard} (its index cannot be read: {error})"
        return f"{row['key']} ({row['path']!r})"

    def _shard(self, shard: int) -> dict[str, Any]:
        if not 0 <= shard < self.shards.num_rows:
            raise IntegrityError(
                f"snapshot {self.number} in {self.store.url} has {self.shards.num_rows} shards, no {shard}"
            )
        return self.shards.slice(shard, 1).to_pylist()[0]

    def table(self, ref: FileRef, schema: pa.Schema | tuple[pa.Schema, ...], path: str = "") -> pa.Table:
        """The table that ``ref`` names, checked; in tables/ unless ``path`` says otherwise."""
        path = path or table_path(ref.sha256)
        where = f"{path} in {self.store.url}"
        with self.collection_told():
            table = ipc_to_table(read_checked(self.store, path, ref), schema, where)
        if table.num_rows != ref.num_rows:
            raise IntegrityError(f"{where}: expected {ref.num_rows} rows, found {table.num_rows}")
        return table

    def files(self) -> dict[str, int]:
        """Path and size of everything that a reader of this snapshot may open: its tables, manifests, tars, indexes."""
        files: dict[str, int] = {}
        for name, value in vars(self.record).items():  # whatever a later version may name, too
            refs = value.values() if isinstance(value, Mapping) else (value,)
            locate = manifest_path if name == "manifests" else table_path
            files |= {locate(ref.sha256): ref.size for ref in refs if isinstance(ref, FileRef)}
        for name in self.manifests:
            targets = self.manifest(name).document.targets  # opening it checks that its targets fit the classes
            files[table_path(targets.sha256)] = targets.size
        for row in self.shards.to_pylist():
            files[tar_path(row["tar_sha256"])] = row["tar_size"]
            files[index_path(row["index_sha256"])] = row["index_size"]
        return files

    @contextmanager
    def collection_told(self) -> Generator[None]:
        """Where a file is missing because this snapshot was collected, the error says that."""
        try:
            yield
        except NotFoundError as error:
            if not is_collected(self.store, self.number):
                raise
            raise NotFoundError(f"{collected(self.store, self.number)}: {error}") from None


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UsageError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")


# -- manifests ----------------------------------------------------------------------------------------------------


class Manifest:
    """How often each class is drawn in one epoch, bound to the snapshot that holds the images."""

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        ref = snapshot.record.manifests[name]
        path = manifest_path(ref.sha256)
        self.snapshot = snapshot
        self.name = name
        self.digest = ref.sha256
        with snapshot.collection_told():
            data = read_checked(snapshot.store, path, ref)
        self.document = plan.decode(data, f"{path} in {snapshot.store.url}")
        self.split = self.document.split
        self.num_draws = self.document.num_draws
        self._check_references(path)
        self._table = snapshot.table(self.document.targets, TARGETS)
        self._check_numbers(path)

    def __reduce__(self) -> tuple[type[Manifest], tuple[Snapshot, str]]:
        return Manifest, (self.snapshot, self.name)

    def __repr__(self) -> str:
        return f"Manifest({self.name!r}, split={self.split!r}, num_draws={self.num_draws})"

    @cached_property
    def targets(self) -> IntArray:
        """int64 [K]: T_c, draws per epoch."""
        return self._vector("target")

    @cached_property
    def pool(self) -> IntArray:
        """int64 [K]: how many images of the class are drawn from, its first ones in the sample table."""
        return self._vector("pool")

    @cached_property
    def available(self) -> IntArray:
        """int64 [K]: n_c, images of the class in the split."""
        return self._vector("available")

    @cached_property
    def log_prior(self) -> NDArray[np.float64]:
        """float64 [K]: log(n_c / N)."""
        return plan.log_prior(self.available)

    @cached_property
    def log_q(self) -> NDArray[np.float64]:
        """float64 [K]: log(T_c / M)."""
        return plan.log_q(self.targets)

    @cached_property
    def repeat_factor(self) -> NDArray[np.float64]:
        """float64 [K]: T_c / n_c."""
        return plan.repeat_factor(self.available, self.targets)

    def weights(self, kind: str, **options: Any) -> NDArray[np.float64]:
        """float64 [K], mean 1 over the draws; kinds and options as ``plan.manifest.weights``."""
        return plan.weights(kind, self.available, self.targets, **options)

    @cached_property
    def withheld(self) -> IntArray:
        """int64 [K]: draws that ``max_repeat`` took from each class."""
        names: list[str] = self.snapshot.classes.column("name").to_pylist()
        return apply(self.available, self.document.policy, names).withheld

    def per_class(self) -> pa.Table:
        """One row per class: all that a loss, a sampler or a paper needs, as ``plan.manifest.PER_CLASS``.

        ``evaluable``: the class has an image outside train. Leave the others out of every average over classes: they
        are not measured, which is not the same as a recall of 0.
        """
        classes = self.snapshot.classes
        return plan.per_class_table(
            classes.column("name").to_pylist(), classes.column("evaluable").to_numpy(), self._table, self.withheld
        )

    def _vector(self, name: str) -> IntArray:
        return cast("IntArray", self._table.column(name).to_numpy())

    def _check_references(self, path: str) -> None:
        """A manifest of another snapshot would draw other images in silence."""
        record, document = self.snapshot.record, self.document
        expected = {
            "name": self.name,
            "classes": record.classes,
            "shards": record.shards,
            "samples": record.samples.get(document.split),
        }
        wrong = [key for key, value in expected.items() if getattr(document, key) != value]
        if wrong:
            raise IntegrityError(
                f"{path} in {self.snapshot.store.url} does not belong to snapshot {record.number}: it differs in "
                f"{', '.join(wrong)}; write the manifest anew"
            )

    def _check_numbers(self, path: str) -> None:
        counts = np.diff(self.snapshot.class_starts(self.split))
        drawn = self.targets > 0
        sound = (self.available == counts) & (self.pool >= drawn) & (self.pool <= counts) & (self.targets >= 0)
        wrong = np.flatnonzero(~sound).tolist()
        total = int(self.targets.sum())
        if wrong or total != self.num_draws:
            raise IntegrityError(
                f"{path} in {self.snapshot.store.url}: its targets do not fit the images: "
                + (f"{len(wrong)} classes, first {wrong[:5]}" if wrong else f"{total} draws, not {self.num_draws}")
            )
