"""The build: list -> know -> read -> settle -> shards -> tables -> manifests -> commit.

Comes in: a source and a configuration. Goes out: one more snapshot below ROOT, and a summary. Guarantees: nothing is
published unless every step succeeded; only what changed is read, the rest stays where it is or is copied from the
shards of the newest snapshot; finished units are kept, so a rerun goes on where a killed build stopped; images are
read in Ray tasks, one per unit, and never pass through this process.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import BuildConfig, make_config
from pipeline.errors import CommitError, SourceError
from pipeline.ingest import guards
from pipeline.ingest.commit import commit, probe
from pipeline.ingest.containers import container_units, keep, pack_container, sample_listing, token
from pipeline.ingest.identity import build_id, content_bytes, listing_digest, reading_settings
from pipeline.ingest.known import Known, find_known, lost_tars, read_notes, write_notes
from pipeline.ingest.layout import ShardRule, final_shards, gather, reading_units, repack_unit, to_fetch
from pipeline.ingest.lookalikes import count_lookalikes, huge_groups
from pipeline.ingest.manifests import Base, put_manifests, wanted_policies
from pipeline.ingest.past import Past, load_past
from pipeline.ingest.rejects import is_passing, read_rejects, reject_table
from pipeline.ingest.scratch import Scratch
from pipeline.ingest.settle import Samples, Settlement, settle
from pipeline.ingest.shards import pack_source, repack
from pipeline.ingest.source import Container, Listing, list_source, open_source
from pipeline.ingest.splits import TRAIN, assign
from pipeline.ingest.summary import BuildSummary, finish, summarise
from pipeline.ingest.tables import Written, put_tables
from pipeline.ingest.units import Pack, UnitRecord
from pipeline.ingest.vitals import Vitals
from pipeline.ingest.work import Progress, Work
from pipeline.plan.policy import parse
from pipeline.plan.spelling import counted
from pipeline.schema import (
    DEPARTED,
    HASHED_FORMAT_VERSION,
    REFERENCES,
    REJECTS,
    SNAPSHOT_FORMAT_VERSION,
    SPLIT_UNSET,
    SPLITS,
    FileRef,
    SnapshotRecord,
)
from pipeline.snapshot import Snapshot, open_snapshot, record_id, snapshot_exists
from pipeline.store import Store, put_table, redact

QUIET_S = 600.0
"""What a killed build left in staging/ goes after so long without a touch; sooner, its killer may still be at work."""

__all__ = ["BuildSummary", "Progress", "build", "run_build"]


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
    with Vitals(progress) as notify:
        return _run_build(config, notify)


def _run_build(config: BuildConfig, notify: Vitals) -> BuildSummary:
    started_s = time.time()
    policies = {name: parse(value) for name, value in config.manifests.items()}
    source = open_source(config)
    store = Store.open(config.root, create=True)
    probe(store)
    notify.begin(store, config.source)
    store.sweep_abandoned(QUIET_S)
    parent = open_snapshot(config.root) if snapshot_exists(store) else None
    _check_parent(config, parent)
    notify("list", 0, 0)
    scratch = Scratch()
    with Work(config, store, parent, notify) as work:
        listing = _with_class_ids_of(parent, list_source(config, source, work, scratch))
        build = _Build(config, store, parent, listing, notify, scratch)
        content = build.unchanged() or build.run(work)
    base = Base(content.class_table, content.classes, content.shards, content.samples)
    record = SnapshotRecord(
        number=parent.number + 1 if parent else 1,
        parent=record_id(parent.record) if parent else "",
        build_id=build_id(config, build.listing),
        seed=config.seed,
        classes=content.classes,
        shards=content.shards,
        rejects=content.rejects,
        samples=content.samples,
        departed=content.departed,
        manifests=put_manifests(store, base, wanted_policies(policies, parent)),
        num_images=content.num_images,
        num_classes=content.class_table.num_rows,
        num_rejects=content.rejects.num_rows,
        config=config.meaning(),
        created_by=f"evenshard {version('evenshard')}",
        near_duplicates=content.near_duplicates,
        format_version=SNAPSHOT_FORMAT_VERSION if content.near_duplicates is None else HASHED_FORMAT_VERSION,
    )
    changed = parent is None or content_bytes(record) != content_bytes(parent.record)
    snapshot = Snapshot(store, record) if changed or parent is None else parent
    summary = summarise(snapshot, parent, build.records, (*build.listing.notices, *content.notices))
    build.note(snapshot)
    if changed:
        notify("commit", 0, 0)
        commit(store, record)
    notify.published(snapshot.number)
    return finish(store, config, summary, started_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Content:
    """What the record of the next snapshot refers to, but for its manifests."""

    classes: FileRef
    shards: FileRef
    samples: Mapping[str, FileRef]
    rejects: FileRef
    departed: FileRef | None
    class_table: pa.Table
    num_images: int
    near_duplicates: Mapping[str, int] | None
    notices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Made:
    """What comes of all images, once their shards are written."""

    shards: Sequence[Written]
    rejects: pa.Table
    departed: pa.Table
    near_duplicates: Mapping[str, int] | None
    notices: tuple[str, ...]


class _Build:
    """The steps between the listing and the manifests. ``records`` are the units that were read."""

    def __init__(
        self,
        config: BuildConfig,
        store: Store,
        parent: Snapshot | None,
        listing: Listing,
        notify: Progress,
        scratch: Scratch,
    ) -> None:
        self.listing = listing
        self.records: list[UnitRecord] = []
        self._config, self._store, self._parent, self._notify = config, store, parent, notify
        self._scratch = scratch
        self._notes = read_notes(store, record_id(parent.record)) if parent else None
        self._settings = reading_settings(config, listing)
        self._listed = listing_digest(config, listing)
        scratch.rest()
        self._lost = lost_tars(store, parent)
        self._is_final = True  # no file was refused for a reason that may pass by itself
        self._opened: set[int] = set()  # tokens of containers that were read
        self._rule = ShardRule(config.shard_samples, config.shard_bytes, config.seed)

    def unchanged(self) -> _Content | None:
        """What the newest snapshot holds, if its build was shown exactly this listing, under these rules."""
        parent, notes = self._parent, self._notes
        if parent is None or notes is None or not notes.is_final or self._lost:
            return None
        if (notes.listing, notes.settings) != (self._listed, self._settings):
            return None
        record = parent.record
        if self.listing.containers:  # what is in them is what it was
            if notes.references is None:
                return None
            self.listing = dataclasses.replace(self.listing, references=notes.references)
        guards.check(self._config, None, parent.rejects, self._num_listed())
        return _Content(
            classes=record.classes,
            shards=record.shards,
            samples=record.samples,
            rejects=record.rejects,
            departed=record.departed,
            class_table=parent.classes,
            num_images=record.num_images,
            near_duplicates=record.near_duplicates,
        )

    def run(self, work: Work) -> _Content:
        """Read what is not known, settle who is in, write the shards and tables that this changes."""
        made = self._make_shards(work)
        self._notify("tables", 0, 0)
        self._scratch.rest()
        tables = put_tables(self._store, made.shards, self.listing.class_names, seed=self._config.seed)
        departed = made.departed
        return _Content(
            classes=tables.classes,
            shards=tables.shards,
            samples=tables.samples,
            rejects=put_table(self._store, made.rejects, REJECTS),
            departed=put_table(self._store, departed, DEPARTED) if departed.num_rows else None,
            class_table=tables.class_table,
            num_images=tables.num_images,
            near_duplicates=made.near_duplicates,
            notices=made.notices,
        )

    def _make_shards(self, work: Work) -> _Made:
        """What has a value for every image lives no longer than this."""
        past = load_past(self._store, self._parent, self._scratch)
        self._open_containers(work)
        _check_train(self._config, self.listing.references["split"].to_numpy())
        known, samples, settled, packs = self._read_and_settle(work, past)
        rejects = self._rejects(known, samples, settled)
        self._guard(past, samples, settled, rejects)
        shards = self._write(work, samples, settled, packs)
        stays, near = settled.split != SPLIT_UNSET, self._config.near_duplicates
        return _Made(
            shards=shards,
            rejects=rejects,
            departed=past.departures(samples.key, samples.digest[:, 0], stays),
            near_duplicates=count_lookalikes(settled.group, settled.alike) if near else None,
            notices=(
                *_told_of_lost(self._lost, self._parent),
                *_notices(past, samples, settled, self.listing.class_names),
                *(_huge_groups(samples, settled, self.listing.class_names, near) if near else ()),
            ),
        )

    def note(self, snapshot: Snapshot) -> None:
        """Leave what the next build compares with, before the commit: a kill after it must not cost reading again."""
        if self._parent is not snapshot or self._notes is None or self._notes.listing != self._listed:
            self._scratch.rest()
            write_notes(
                self._store,
                record_id(snapshot.record),
                self.listing.references,
                settings=self._settings,
                listing=self._listed,
                is_final=self._is_final,
            )

    def _open_containers(self, work: Work) -> None:
        """Make the listing one of samples: read the containers that changed."""
        listing = self.listing
        if not listing.containers:
            return
        kept = keep(listing.containers, self._settings, self._notes, self._parent)
        changed = [container for container in listing.containers if container.name not in kept.names]
        self._read_containers(work, changed)
        listing = sample_listing(self._store, listing, list(zip(changed, self.records, strict=True)), kept)
        self.listing = _with_class_ids_of(self._parent, listing)

    def _read_containers(self, work: Work, containers: Sequence[Container]) -> None:
        config, units = self._config, container_units(containers, self._settings)
        arguments = (self.listing.container_reader, config.inspection)
        self.records += work.run("read", pack_container, units, arguments, 0)
        self._opened.update(map(token, containers))

    def _read_and_settle(self, work: Work, past: Past) -> tuple[Known, Samples, Settlement, tuple[Pack, ...]]:
        """Until every image that stays is at hand: those that came back are read, which may settle things anew."""
        references = self.listing.references
        known = find_known(references, self._settings, self._notes, past, self._parent, self._lost)
        split = self._provisional(known, past)
        self._scratch.rest()
        while True:
            known = self._read(work, known, split)
            self._scratch.rest()
            samples, packs = gather(self._store, references, known, past, self.records, self._scratch)
            if not len(samples.key):
                raise SourceError(_nothing_readable(self._config, self.listing, self.records))
            settled = settle(
                samples,
                past,
                num_classes=len(self.listing.class_names),
                seed=self._config.seed,
                near=self._config.near_duplicates,
            )
            split = to_fetch(samples, settled, references.num_rows)
            if not np.any(split != SPLIT_UNSET):
                return known, samples, settled, packs
            known = known.without(np.flatnonzero(split != SPLIT_UNSET))

    def _provisional(self, known: Known, past: Past) -> Any:
        """The split of everything that must be read, as far as names tell; int8 [references]."""
        references = self.listing.references
        given = references["split"].to_numpy()
        before = past.split_of_key(references["key"].to_numpy())
        split = assign(
            references["class_id"].to_numpy(),
            references["group"].to_numpy(),
            np.where(given == SPLIT_UNSET, before, given).astype(np.int8),
            num_classes=len(self.listing.class_names),
            seed=self._config.seed,
        )
        wanted = np.full(references.num_rows, SPLIT_UNSET, np.int8)
        wanted[known.to_read] = split[known.to_read]
        return wanted

    def _read(self, work: Work, known: Known, split: Any) -> Known:
        """Read everything that has a split; returns what is still known from the past."""
        if self.listing.containers:
            marks = self.listing.references["fingerprint"].to_numpy()
            wanted = set(np.unique(marks[split != SPLIT_UNSET]).tolist()) - self._opened
            self._read_containers(work, [item for item in self.listing.containers if token(item) in wanted])
            return known.without(np.flatnonzero(np.isin(marks, np.array(sorted(self._opened), np.uint64))))
        config, total = self._config, int(np.count_nonzero(split != SPLIT_UNSET))
        units = (unit.with_digest(self._settings) for unit in reading_units(self.listing.references, split, self._rule))
        arguments = (self.listing.reader, config.inspection)
        self.records += work.run("read", pack_source, units, arguments, total)
        return known

    def _rejects(self, known: Known, samples: Samples, settled: Settlement) -> pa.Table:
        before = self._parent.rejects if self._parent else None
        read = read_rejects(self.listing, self.records, known, before)
        self._is_final = not any(map(is_passing, read))
        return reject_table(self.listing, read, (samples, settled))

    def _guard(self, past: Past, samples: Samples, settled: Settlement, rejects: pa.Table) -> None:
        number = self._parent.number if self._parent else 0
        outlook = guards.Outlook(number, past, samples, settled, self.listing.class_names)
        guards.check(self._config, outlook, rejects, self._num_listed())
        _check_train(self._config, settled.split)

    def _num_listed(self) -> int:
        return self.listing.references.num_rows + self.listing.rejects.num_rows

    def _write(self, work: Work, samples: Samples, settled: Settlement, packs: Sequence[Pack]) -> list[Written]:
        shards = list(final_shards(samples, settled, packs, self._rule, hashed=self._config.inspection.hashed))
        rest = [shard for shard in shards if shard.pack is None]
        units = (repack_unit(samples, settled, packs, shard) for shard in rest)
        written = iter(work.run("settle", repack, units, (), sum(len(shard.members) for shard in rest)))
        return [Written(shard.split, shard.prefix, shard.pack or _pack(next(written))) for shard in shards]


def _pack(record: UnitRecord) -> Pack:
    assert record.pack is not None, record  # it has members
    return record.pack


def _check_parent(config: BuildConfig, parent: Snapshot | None) -> None:
    if parent is not None and parent.record.seed != config.seed:
        raise CommitError(
            f"{config.root} was built with seed {parent.record.seed}, this build asks for {config.seed}: "
            "splits and shards would all change; keep the seed or choose an empty ROOT"
        )


def _check_train(config: BuildConfig, split: Any) -> None:
    """Manifests are drawn from train. Before reading, ``split`` is what the source gives, and may be open."""
    found = {SPLITS[code] for code in np.unique(split).tolist() if code != SPLIT_UNSET}
    if found and SPLITS[TRAIN] not in found and not np.any(split == SPLIT_UNSET):
        raise SourceError(_no_train(config, sorted(found)))


def _no_train(config: BuildConfig, found: Sequence[str]) -> str:
    return (
        f"{redact(config.source)} has no image in train, only in {' and '.join(found)}: there is nothing to draw an "
        "epoch from; add images to train, or let this build choose the splits (--split-from none). "
        "Nothing was published"
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


def _huge_groups(samples: Samples, settled: Settlement, class_names: Sequence[str], near: int) -> tuple[str, ...]:
    stays = settled.split != SPLIT_UNSET
    return huge_groups(
        settled.group[stays], settled.alike[stays], samples.class_id[stays], class_names, max_distance=near
    )


def _told_of_lost(lost: frozenset[str], parent: Snapshot | None) -> tuple[str, ...]:
    if not lost or parent is None:
        return ()
    shown = ", ".join(sorted(lost)[:3]) + (", ..." if len(lost) > 3 else "")
    return (
        f"{len(lost)} tar(s) of snapshot {parent.number} were gone ({shown}): what they held was taken anew from the "
        "source; find out who removes files from ROOT",
    )


def _notices(past: Past, samples: Samples, settled: Settlement, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """What is no error and should be known: classes that cannot train, images that the source moved."""
    told: list[str] = []
    stays = settled.split != SPLIT_UNSET
    counts = np.bincount(samples.class_id[stays], minlength=len(class_names))
    in_train = np.bincount(samples.class_id[settled.split == TRAIN], minlength=len(class_names))
    bare = np.flatnonzero((counts > 0) & (in_train == 0))
    if len(bare):
        shown = ", ".join(class_names[c] for c in bare[:5]) + (", ..." if len(bare) > 5 else "")
        told.append(
            f"{counted(len(bare), 'class has', 'classes have')} images, but none in train ({shown}): all of "
            "theirs were held out before, or by the source, and no image moves; new images of them will train"
        )
    before = past.split_of(samples.key, samples.digest)
    moved = int(np.count_nonzero(stays & (before != SPLIT_UNSET) & (before != settled.split)))
    if moved:
        told.append(f"{moved} image(s) are in another split than before, because the source says so")
    return tuple(told)
