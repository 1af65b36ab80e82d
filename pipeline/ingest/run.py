"""The build: list -> units -> settle -> tables -> manifests -> commit.

Comes in: a source and a configuration. Goes out: one more snapshot below ROOT, and a summary. Guarantees: nothing is
published unless every step succeeded; finished units are kept, so a rerun goes on where a killed build stopped; images
are read in Ray tasks, one per unit, and never pass through this process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import BuildConfig, make_config
from pipeline.errors import CommitError, SourceError, UsageError
from pipeline.ingest.commit import commit, probe
from pipeline.ingest.manifests import Base, put_manifests, wanted_policies
from pipeline.ingest.settle import Expelled, FinalShard, Samples, ShardLimits, final_shards, gather, repack_unit, settle
from pipeline.ingest.shards import (
    Unit,
    UnitFunction,
    UnitRecord,
    find_unit_record,
    leaves,
    pack_source,
    repack,
    shard_hash,
)
from pipeline.ingest.source import Listing, list_source
from pipeline.ingest.splits import assign
from pipeline.ingest.stats import Description, describe
from pipeline.ingest.tables import RejectRow, Tables, Written, put_tables, reject_table
from pipeline.keyed import text_key
from pipeline.plan.policy import parse
from pipeline.schema import REFERENCES, REJECTS, SPLIT_UNSET, SPLITS, Reason, SnapshotRecord
from pipeline.snapshot import Snapshot, encode_record, open_snapshot, record_id, snapshot_exists
from pipeline.store import Store, put_table, redact

if TYPE_CHECKING:
    from pipeline.ingest.engine import Engine

Progress = Callable[[str, int, int], None]
"""Called with (stage, images done, images in all), at least every second while units run."""

_NOT_LOST = frozenset({Reason.DUPLICATE_OF, Reason.DUPLICATE_ROW, Reason.CLASS_EMPTY, Reason.LEAK})
"""Rejects that do not count against ``max_rejects``: no distinct labelled image is missing because of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """What a build did. ``changed`` is False when the source gave exactly the newest snapshot again."""

    root: str
    number: int
    changed: bool
    num_images: int
    num_classes: int
    num_rejects: int
    rejects: Mapping[str, int]  # by reason
    splits: Mapping[str, int]
    manifests: Mapping[str, int]  # draws per epoch
    description: Description
    num_read: int  # images read from the source
    read_bytes: int
    num_units: int
    num_reused_units: int
    elapsed_s: float
    notices: tuple[str, ...]


def build(
    source: str | os.PathLike[str], root: str | os.PathLike[str], *, progress: Progress | None = None, **options: Any
) -> BuildSummary:
    """Build the next snapshot of ``root`` from ``source``; ``options`` are the fields of ``config.BuildConfig``.

    Errors: ``UsageError`` for a wrong call, ``SourceError`` for a source that cannot be used, ``StoreError`` for
    storage, ``EngineError`` for a unit that failed for good, ``CommitError`` when a guardrail or a race stopped it.
    Nothing is published in any of these cases.
    """
    return run_build(make_config({}, source=str(source), root=str(root), **options), progress=progress)


def run_build(config: BuildConfig, *, progress: Progress | None = None) -> BuildSummary:
    """``build`` for a ready configuration."""
    started_s = time.time()
    notify = progress or (lambda stage, done, total: None)
    policies = {name: parse(value) for name, value in config.manifests.items()}
    store = Store.open(config.root, create=True)
    probe(store)
    parent = open_snapshot(config.root) if snapshot_exists(store) else None
    _check_parent(config, parent)
    notify("list", 0, 0)
    listing = _with_class_ids_of(parent, list_source(config))
    with _Work(config, store, listing, notify) as work:
        records = work.pack()
        shards, rejects = work.settle(records)
    notify("tables", 0, 0)
    tables = put_tables(store, shards, listing.class_names, seed=config.seed)
    _guard(config, parent, tables, rejects, listing)
    base = Base(tables.class_table, tables.classes, tables.shards, tables.samples)
    record = SnapshotRecord(
        number=parent.number + 1 if parent else 1,
        parent=record_id(parent.record) if parent else "",
        build_id=_build_id(config, listing),
        seed=config.seed,
        classes=tables.classes,
        shards=tables.shards,
        rejects=put_table(store, rejects, REJECTS),
        samples=tables.samples,
        manifests=put_manifests(store, base, wanted_policies(policies, parent)),
        num_images=tables.num_images,
        num_classes=len(listing.class_names),
        num_rejects=rejects.num_rows,
        config=config.meaning(),
        created_by=f"evenshard {version('evenshard')}",
    )
    changed = parent is None or _content(record) != _content(parent.record)
    if changed:
        notify("commit", 0, 0)
        commit(store, record)
    summary = _summary(config, listing, records, open_snapshot(config.root), (changed, started_s))
    _log_run(store, config, summary, started_s)
    return summary


class _Work:
    """The two passes over units, with one Ray connection that is made only if something is to be done."""

    def __init__(self, config: BuildConfig, store: Store, listing: Listing, notify: Progress) -> None:
        self._config, self._store, self._listing, self._notify = config, store, listing, notify
        self._open = ExitStack()
        self._started: Engine | None = None

    def __enter__(self) -> _Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def pack(self) -> list[UnitRecord]:
        """Write every provisional unit; returns their records in unit order."""
        config, references = self._config, self._listing.references
        settings = {"check": config.check, "max_pixels": config.max_pixels, "max_bytes": config.max_image_bytes}
        # Two sources may hold files of the same names, sizes and times: finished work belongs to one of them.
        place = self._listing.reader.place
        settings["source"] = f"{place.protocol}:{redact(place.path)}"
        settings |= {"pillow": version("pillow"), "evenshard": version("evenshard")}
        plan = _provisional(references, config, self._listing)
        jobs = ((_unit(references, *part).with_digest(settings)) for part in plan)
        arguments = (self._listing.reader, config.check, config.limits)
        return self._run("read", pack_source, jobs, arguments, references.num_rows)

    def settle(self, records: Sequence[UnitRecord]) -> tuple[list[Written], pa.Table]:
        """Decide who is in, repack the shards that this changes; returns all final shards in order, and all rejects.

        What it holds per sample is freed when it returns, before the sample tables are made.
        """
        config, listing = self._config, self._listing
        samples = gather(self._store, records)
        if not len(samples.key):
            raise SourceError(_nothing_readable(config, listing, records))
        split, group, expelled = settle(
            samples, splits_given=listing.splits_given, num_classes=len(listing.class_names), seed=config.seed
        )
        limits = ShardLimits(config.shard_samples, config.shard_bytes)
        shards = final_shards(samples, (split, group), records, limits=limits, seed=config.seed)
        rejects = reject_table(_reject_rows(listing, records, samples, expelled), listing.rejects)
        return self._write_final(shards, samples, group, records), rejects

    def _write_final(
        self,
        shards: Sequence[FinalShard],
        samples: Samples,
        group: NDArray[np.uint64],
        records: Sequence[UnitRecord],
    ) -> list[Written]:
        rest = [shard for shard in shards if shard.record is None]
        jobs = (repack_unit(self._store, samples, shard, group, records) for shard in rest)
        total = sum(len(shard.members) for shard in rest)
        written = iter(self._run("settle", repack, jobs, (), total))
        return [Written(shard.split, shard.prefix, shard.record or next(written)) for shard in shards]

    def _run(
        self, stage: str, function: UnitFunction, jobs: Iterator[Unit], rest: tuple[Any, ...], total: int
    ) -> list[UnitRecord]:
        finished: dict[str, UnitRecord] = {}
        order: list[str] = []
        done = 0

        def pending() -> Iterator[tuple[str, tuple[Any, ...]]]:
            nonlocal done
            for unit in jobs:
                order.append(unit.digest)
                if (record := find_unit_record(self._store, unit.digest)) is not None:
                    finished[unit.digest] = record
                    done += unit.members.num_rows
                    continue
                yield unit.name, (self._store.root, unit, *rest)

        waiting = pending()
        first = next(waiting, None)
        if first is not None:
            engine = self._engine()
            self._notify(stage, done, total)
            for item in engine.map(function, chain([first], waiting)):
                if isinstance(item, UnitRecord):
                    finished[item.digest] = item
                else:
                    done += item
                self._notify(stage, done, total)
        return [finished[digest] for digest in order]

    def _engine(self) -> Engine:
        # Ray is imported, and started, only by builds that have something to do, and once.
        if self._started is None:
            from pipeline.ingest.engine import Engine

            self._notify("start", 0, 0)
            self._started = self._open.enter_context(Engine(address=self._config.address, workers=self._config.workers))
        return self._started


def _provisional(
    references: pa.Table, config: BuildConfig, listing: Listing
) -> Iterator[tuple[str, str, NDArray[np.int64]]]:
    """Split, trie prefix and reference rows (ascending, so by key) of each unit, from names and sizes alone."""
    key, size = references["key"].to_numpy(), references["size"].to_numpy()
    split = assign(
        references["class_id"].to_numpy(),
        references["group"].to_numpy(),
        references["split"].to_numpy(),
        num_classes=len(listing.class_names),
        seed=config.seed,
    )
    for code, name in enumerate(SPLITS):
        members = np.flatnonzero(split == code)
        hashes = shard_hash(key[members], split=name, seed=config.seed)
        order = np.argsort(hashes)
        members = members[order]
        parts = leaves(hashes[order], size[members], max_samples=config.shard_samples, max_bytes=config.shard_bytes)
        for leaf in parts:
            yield name, leaf.prefix, np.sort(members[leaf.start : leaf.stop])


def _unit(references: pa.Table, split: str, prefix: str, rows: NDArray[np.int64]) -> Unit:
    # take() copies just these rows: a slice would be pickled with all of the table behind it.
    members = references.take(pa.array(rows)).combine_chunks()
    return Unit(name=f"{split}-{prefix or 'all'}", split=split, members=members)


def _check_parent(config: BuildConfig, parent: Snapshot | None) -> None:
    if parent is not None and parent.record.seed != config.seed:
        raise UsageError(
            f"{config.root} was built with seed {parent.record.seed}, this build asks for {config.seed}: "
            "splits and shards would all change; keep the seed or choose an empty ROOT"
        )


def _with_class_ids_of(parent: Snapshot | None, listing: Listing) -> Listing:
    """Class ids never change meaning: those of the parent stay, new classes are appended in their sorted order."""
    if parent is None:
        return listing
    known: list[str] = parent.classes["name"].to_pylist()
    place = {name: number for number, name in enumerate(known)}
    new = [name for name in listing.class_names if name not in place]
    names = (*known, *new)
    place.update({name: len(known) + number for number, name in enumerate(new)})
    if names == listing.class_names:
        return listing
    mapping = np.array([place[name] for name in listing.class_names], np.int32)
    ids = pa.array(mapping[listing.references["class_id"].to_numpy()])
    column = REFERENCES.get_field_index("class_id")
    references = listing.references.set_column(column, REFERENCES.field("class_id"), ids)
    return dataclasses.replace(listing, references=references, class_names=names)


def _nothing_readable(config: BuildConfig, listing: Listing, records: Sequence[UnitRecord]) -> str:
    reasons = Counter(reason for record in records for _, reason, _, _ in record.rejects)
    reasons.update(listing.rejects["reason"].to_pylist())
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"no readable image in {redact(config.source)}: {told}; nothing was published"


def _reject_rows(
    listing: Listing, records: Sequence[UnitRecord], samples: Samples, expelled: Expelled
) -> Iterator[RejectRow]:
    references = listing.references
    keys = references["key"].to_numpy()

    def row(key: int, reason: str, detail: str, sha256: str) -> RejectRow:
        place = int(np.searchsorted(keys, np.uint64(key)))
        label = listing.class_names[references["class_id"][place].as_py()]
        code = references["split"][place].as_py()
        split = "" if code == SPLIT_UNSET else SPLITS[code]
        return (references["path"][place].as_py(), f"{key:016x}", label, split, reason, detail, sha256)

    for record in records:
        for path, reason, detail, sha256 in record.rejects:
            yield row(text_key(path), reason, detail, sha256)
    for sample, other, reason in zip(expelled.sample.tolist(), expelled.other.tolist(), expelled.reason, strict=True):
        detail = "a member of its group is in an earlier split"
        if other >= 0:
            place = int(np.searchsorted(keys, samples.key[other]))
            detail = f"same bytes as {references['path'][place].as_py()}"
        sha256 = samples.digest[sample].astype(">u8").tobytes().hex()
        yield row(int(samples.key[sample]), str(reason), detail, sha256)


def _guard(config: BuildConfig, parent: Snapshot | None, tables: Tables, rejects: pa.Table, listing: Listing) -> None:
    """Refuse to publish what is probably an accident."""
    if parent is not None and "class-vanished" not in config.allow:
        before, now = parent.classes["count"].to_numpy(), tables.class_table["count"].to_numpy()
        gone = np.flatnonzero((before > 0) & (now[: len(before)] == 0))
        if len(gone):
            shown = ", ".join(listing.class_names[i] for i in gone[:5])
            raise CommitError(
                f"{len(gone)} of {int((before > 0).sum())} classes of snapshot {parent.number} of {config.root} "
                f"have no image in this source ({shown}{', ...' if len(gone) > 5 else ''}); another collection needs "
                "another ROOT; if the classes are meant to go, use --allow class-vanished. Nothing was published"
            )
    if config.max_rejects is not None and "rejects" not in config.allow:
        lost = sum(reason not in _NOT_LOST for reason in rejects["reason"].to_pylist())
        listed = listing.references.num_rows + listing.rejects.num_rows
        limit = config.max_rejects if isinstance(config.max_rejects, int) else config.max_rejects * listed
        if lost > limit:
            raise CommitError(
                f"{lost} of {listed} entries were rejected, more than --max-rejects {config.max_rejects} allows; "
                "nothing was published"
            )


def _build_id(config: BuildConfig, listing: Listing) -> str:
    """SHA-256 over what this build was asked to do. No fingerprints: copies with other mtimes are the same build."""
    digest = hashlib.sha256(json.dumps(config.meaning(), sort_keys=True).encode())
    for name in ("key", "class_id", "split", "group", "size"):
        digest.update(listing.references[name].to_numpy().tobytes())
    digest.update(json.dumps(listing.class_names).encode())
    return digest.hexdigest()


def _content(record: SnapshotRecord) -> bytes:
    return encode_record(dataclasses.replace(record, number=1, parent="", build_id="", config={}, created_by=""))


def _summary(
    config: BuildConfig,
    listing: Listing,
    records: Sequence[UnitRecord],
    snapshot: Snapshot,
    outcome: tuple[bool, float],
) -> BuildSummary:
    fresh = [record for record in records if not record.reused]
    classes = snapshot.classes
    return BuildSummary(
        root=snapshot.store.url,
        number=snapshot.number,
        changed=outcome[0],
        num_images=snapshot.record.num_images,
        num_classes=snapshot.record.num_classes,
        num_rejects=snapshot.record.num_rejects,
        rejects=dict(sorted(Counter(snapshot.rejects["reason"].to_pylist()).items())),
        splits={split: int(classes[split].to_numpy().sum()) for split in SPLITS},
        manifests={name: snapshot.manifest(name).num_draws for name in snapshot.manifests},
        description=describe(classes["count"].to_numpy()),
        num_read=sum(record.num_images for record in fresh),
        read_bytes=sum(record.num_bytes for record in fresh),
        num_units=len(records),
        num_reused_units=len(records) - len(fresh),
        elapsed_s=time.time() - outcome[1],
        notices=listing.notices,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None  # a rebuild that has nothing to do needs no Ray


def _log_run(store: Store, config: BuildConfig, summary: BuildSummary, started_s: float) -> None:
    """When, where, from which URL: beside the snapshot, never in it."""
    body = {
        "started_s": int(started_s),
        "elapsed_s": round(summary.elapsed_s, 3),
        "host": platform.node(),
        "source": redact(config.source),
        "snapshot": summary.number,
        "changed": summary.changed,
        "num_read": summary.num_read,
        "config": config.meaning(),
        "versions": {name: _version(name) for name in ("evenshard", "ray", "pyarrow", "pillow", "numpy", "fsspec")},
        "python": platform.python_version(),
    }
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(started_s))
    store.create(f"runs/builds/{stamp}-{os.urandom(4).hex()}.json", json.dumps(body, indent=1, sort_keys=True).encode())
