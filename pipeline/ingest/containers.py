"""What is in the containers of a source: each is read once, by one task; then its samples are a listing like any other.

Comes in: the containers of a listing, and what the newest snapshot was built from. Goes out: units of work, and a
listing of samples. Guarantees: a container whose size and fingerprint are those of the last build is not read again,
its samples and rejects are taken from that build; every other one is read front to back in one task, which writes what
it accepts into a provisional tar (class ids are codes of that task, negative in its index, so no shard can be taken for
one); the listing depends on what is in the containers alone, not on which of them were read now.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.images import Inspection
from pipeline.ingest.known import Notes
from pipeline.ingest.shards import TELL_EVERY_S, Packer, ShardWriter
from pipeline.ingest.source import Container, ContainerReader, Listing, twins
from pipeline.ingest.source_items import Offered, Refused
from pipeline.ingest.source_rows import Rows, sort_labels
from pipeline.ingest.units import UnitRecord, index_keys, put_unit_record, read_index
from pipeline.keyed import text_key
from pipeline.schema import REFERENCES, REJECTS, SPLIT_UNSET, SPLITS, UNIT_FORMAT_VERSION, Reason
from pipeline.snapshot import Snapshot
from pipeline.store import Store


@dataclass(frozen=True, kw_only=True)
class ContainerUnit:
    """A container to be read. How many samples it holds is not known before."""

    container: Container
    digest: str
    num_members: int = 0

    @property
    def name(self) -> str:
        return self.container.name


def container_units(containers: Iterable[Container], settings: Mapping[str, Any]) -> Iterator[ContainerUnit]:
    """Units named by everything that decides their bytes."""
    for container in containers:
        what = [container.name, container.kind, *container.listed, container.split, asdict(container.part)]
        head = json.dumps([UNIT_FORMAT_VERSION, "container", what, dict(settings)], sort_keys=True)
        yield ContainerUnit(container=container, digest=hashlib.sha256(head.encode()).hexdigest())


def token(container: Container) -> int:
    """The fingerprint of every sample in it: equal means that the container has not changed, and is the same one."""
    listed, part = container.listed, container.part
    text = f"{container.name}\0{listed.size} {listed.fingerprint} {part.start} {part.stop}"
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogateescape"))


# ---- In a task


def pack_container(
    root: str, unit: ContainerUnit, reader: ContainerReader, inspection: Inspection, *, attempt: int
) -> Iterator[int | UnitRecord]:
    """Read a container once: hash, check, write what is accepted into a provisional tar."""
    store = Store.open(root)
    told, next_s = 0, time.monotonic() + TELL_EVERY_S
    with ShardWriter(store) as writer, inspection.open(attempt=attempt) as inspector:
        intake = _Intake(Packer(writer, inspector))
        packer = intake.packer
        for item in reader.items(unit.container):
            if isinstance(item, Refused):
                intake.refused.append((item.path, str(item.reason), item.detail, item.label, item.split))
                continue
            intake.take(item)
            if (now_s := time.monotonic()) >= next_s:
                yield packer.num_images - told
                told, next_s = packer.num_images, now_s + TELL_EVERY_S
        tar, index = writer.finish(intake.index())
    yield packer.num_images - told
    contents = {"labels": list(intake.codes), "rejected": intake.rejected, "refused": intake.refused}
    yield put_unit_record(store, packer.record(unit.digest, tar, index, contents))


@dataclass
class _Intake:
    """What a task has met in its container so far."""

    packer: Packer
    codes: dict[str, int] = field(default_factory=dict[str, int])
    rejected: list[tuple[int, int, int, int]] = field(default_factory=list[tuple[int, int, int, int]])
    """Of each reject: code of its label, split, group, size."""
    refused: list[tuple[str, str, str, str, int]] = field(default_factory=list[tuple[str, str, str, str, int]])
    _rows: list[tuple[str, int, str, int]] = field(default_factory=list[tuple[str, int, str, int]])
    """Path, class, split and group of what was accepted."""

    def take(self, item: Offered) -> None:
        """One sample becomes a row or a reject."""
        code = self.codes.setdefault(item.label, len(self.codes))
        key = text_key(item.path)
        group = key if item.group is None else item.group
        if self.packer.take(item.path, key, code, item.data, len(item.data)):
            split = "" if item.split == SPLIT_UNSET else SPLITS[item.split]
            self._rows.append((item.path, -1 - code, split, group))
        else:
            self.rejected.append((code, item.split, group, len(item.data)))

    def index(self) -> pa.Table:
        """INDEX of what was accepted."""
        path, class_id, split, group = zip(*self._rows, strict=True) if self._rows else ((),) * 4
        return self.packer.index(
            pa.array(path, pa.string()),
            pa.array(class_id, pa.int32()),
            pa.array(split, pa.string()),
            pa.array(group, pa.uint64()),
        )


# ---- In the driver


@dataclass(frozen=True)
class Kept:
    """Samples and rejects of containers that are as they were; ``class_names`` number the samples' classes."""

    names: frozenset[str]
    references: pa.Table
    class_names: tuple[str, ...]
    rejects: pa.Table


def keep(
    containers: Sequence[Container], settings: Mapping[str, Any], notes: Notes | None, parent: Snapshot | None
) -> Kept:
    """What the last build found in containers that have not changed, if it read by the same rules."""
    nothing = Kept(frozenset(), REFERENCES.empty_table(), (), REJECTS.empty_table())
    if notes is None or parent is None or notes.settings != settings or notes.references is None:
        return nothing
    noted = notes.references["fingerprint"].to_numpy()
    present = set(np.unique(noted).tolist())
    # A container without a usable sample has left no trace among the references, and is read again.
    changed = {container.name for container in containers if token(container) not in present}
    kept = [container for container in containers if container.name not in changed]
    tokens = np.array([token(container) for container in kept], np.uint64)
    references = notes.references.filter(pa.array(np.isin(noted, tokens)))
    names = frozenset(container.name for container in kept)
    return Kept(
        names, references, tuple(parent.classes["name"].to_pylist()), _rejects_within(parent.rejects, names, references)
    )


def _rejects_within(rejects: pa.Table, names: frozenset[str], references: pa.Table) -> pa.Table:
    """Rejects that lie in these containers and are no references: the others are told of as references are."""
    keys = np.array([int(key or "0", 16) for key in rejects["key"].to_pylist()], np.uint64)
    is_known = np.isin(keys, references["key"].to_numpy()).tolist()
    rows = [
        row
        for row, (path, known) in enumerate(zip(rejects["path"].to_pylist(), is_known, strict=True))
        if not known and _container_of(path, names) is not None
    ]
    return rejects.take(pa.array(rows, pa.int64()))


def _container_of(path: str, names: frozenset[str]) -> str | None:
    """The container whose name begins ``path``; of several (a folder may be called a.tar) the longest."""
    while path:
        if path in names:
            return path
        path = path.rpartition("/")[0]
    return None


def sample_listing(store: Store, listing: Listing, read: Sequence[tuple[Container, UnitRecord]], kept: Kept) -> Listing:
    """The listing of all samples: of the containers that were read now, and of those that were kept."""
    labels: dict[str, int] = {}
    tables = [_numbered(kept.references, kept.class_names, labels)]
    rows = Rows(max_bytes=0)
    for container, record in read:
        tables += _references(store, container, record, labels)
        for path, reason, detail, label, split in record.contents["refused"]:
            rows.reject(path, Reason(reason), label=label, split=split, detail=detail)
    rejects = pa.concat_tables([listing.rejects, kept.rejects, rows.rejects_table()])
    order = [(name, "ascending") for name in ("path", "reason", "detail")]
    reader = listing.container_reader
    references, class_names = _sorted(pa.concat_tables(tables), list(labels), reader.class_names if reader else None)
    if not references.num_rows:
        raise SourceError(_nothing_usable(listing, rejects))
    return replace(
        listing,
        references=references,
        class_names=class_names,
        rejects=rejects.sort_by(order),
        notices=listing.notices + twins(class_names) + _damaged(rejects),
    )


def _references(store: Store, container: Container, record: UnitRecord, labels: dict[str, int]) -> Iterator[pa.Table]:
    """REFERENCES of one container: accepted samples, then those that were read and rejected."""
    contents = record.contents
    names: list[str] = contents["labels"]
    mark = token(container)
    if record.pack is not None:
        index = read_index(store, record.pack)
        codes = -1 - index["class_id"].to_numpy()
        splits = np.array([SPLITS.index(text) if text else SPLIT_UNSET for text in index["split"].to_pylist()], np.int8)
        columns = (index["path"].combine_chunks(), index_keys(index), codes, splits)
        yield _table(*columns, index["group"].to_numpy(), index["size"].to_numpy(), mark, (names, labels))
    if record.rejects:
        paths = [path for path, *_ in record.rejects]
        codes, splits, groups, sizes = zip(*contents["rejected"], strict=True)
        keys = np.array([text_key(path) for path in paths], np.uint64)
        columns = (pa.array(paths, pa.string()), keys, np.array(codes), np.array(splits, np.int8))
        yield _table(*columns, np.array(groups, np.uint64), np.array(sizes, np.int64), mark, (names, labels))


def _table(
    paths: pa.Array,
    keys: NDArray[np.uint64],
    codes: NDArray[Any],
    splits: NDArray[np.int8],
    groups: NDArray[Any],
    sizes: NDArray[Any],
    mark: int,
    naming: tuple[Sequence[str], dict[str, int]],
) -> pa.Table:
    columns = {
        "path": paths,
        "key": pa.array(keys),
        "class_id": pa.array(codes.astype(np.int32)),
        "split": pa.array(splits),
        "group": pa.array(groups.astype(np.uint64)),
        "size": pa.array(sizes.astype(np.int64)),
        "fingerprint": pa.array(np.full(len(keys), mark, np.uint64)),
    }
    return _numbered(pa.table(columns, schema=REFERENCES), *naming)


def _numbered(references: pa.Table, names: Sequence[str], labels: dict[str, int]) -> pa.Table:
    """The same with class ids that ``labels`` gives; names that it lacks are added."""
    codes = references["class_id"].to_numpy()
    number = np.full(max(len(names), 1), -1, np.int32)
    for code in np.unique(codes).tolist():
        number[code] = labels.setdefault(str(names[code]), len(labels))
    place = REFERENCES.get_field_index("class_id")
    return references.set_column(place, REFERENCES.field("class_id"), pa.array(number[codes]))


def _sorted(
    references: pa.Table, labels: Sequence[str], class_names: tuple[str, ...] | None
) -> tuple[pa.Table, tuple[str, ...]]:
    """Sorted by key, classes numbered in the order of their names; a key that comes twice stops the build.

    Where ``class_names`` give a name to each number, the numbers stay, also of classes without an image.
    """
    names = class_names or sort_labels(labels)
    references = _numbered(references, labels, {name: number for number, name in enumerate(names)})
    keys = references["key"].to_numpy()
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        pair = references["path"].take(pa.array(order[twice[0] : twice[0] + 2])).to_pylist()
        if pair[0] == pair[1]:
            raise SourceError(
                f"two samples are called {pair[0]!r}: a Parquet row whose image has no path is called by its number, a "
                "path that comes again gets # and the row's number, and the path of another row is just that; change "
                "that path"
            )
        raise SourceError(
            f"two samples have the key {int(keys[twice[0]]):016x}: {pair[0]!r} and {pair[1]!r}; rename one of them"
        )
    return references.take(pa.array(order)).combine_chunks(), names


def _nothing_usable(listing: Listing, rejects: pa.Table) -> str:
    reasons = Counter(rejects["reason"].to_pylist())
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    advice = ""
    if reasons[Reason.NO_LABEL] and any(container.kind == "tar" for container in listing.containers):
        advice = "; the label of a sample in a tar is its member .cls, unless `--label-column` says txt or json.FIELD"
    return f"no usable sample in {listing.reader.place.shown} ({told}){advice}. Nothing was published"


def _damaged(rejects: pa.Table) -> tuple[str, ...]:
    damaged = rejects.filter(
        pa.array([reason == Reason.DAMAGED for reason in rejects["reason"].to_pylist()], pa.bool_())
    )
    if not damaged.num_rows:
        return ()
    first = damaged["path"][0].as_py()
    return (
        f"{damaged.num_rows} place(s) in tars or Parquet files are damaged, the first in {first!r}: what lay there is "
        "lost, and may be more samples than the rejects table has rows",
    )
