"""What differs between two snapshots: images and classes added, removed, relabelled, changed, renamed, moved.

Comes in: a ROOT and two snapshot numbers. Goes out: a ``Diff``: exact counts, and the images behind them by name.
Guarantees: shards that both snapshots share are not opened, so a nightly change costs what it touches; per image of an
opened shard it holds some 60 bytes, and names only of what differs.

An image is matched by its key (its path) first: same key, other bytes is *changed*. Of what is left, same bytes under
another path is *renamed*. Either may be *relabelled*. *Moved* are images in another split than before, by key or by
bytes: there must be none.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import NotFoundError
from pipeline.ingest.units import index_digests, index_keys
from pipeline.schema import INDEXES, SPLITS, FileRef, index_path
from pipeline.snapshot import Snapshot, is_collected, newest_number, open_snapshot
from pipeline.store import Store

Rows = NDArray[np.int64]

Progress = Callable[[str, int, int], None]
"""Called with ("compare", shards opened, shards to open)."""

KINDS = ("added", "removed", "changed", "renamed", "relabelled", "moved")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One image; what it was before, or what it is now, is None where it was not, or is not, there."""

    path_before: str | None = None
    path: str | None = None
    class_before: str | None = None
    class_name: str | None = None
    split_before: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A class whose number of images changed."""

    class_id: int
    name: str
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Snapshot ``after`` against ``before``. ``images[kind]`` holds at most as many as were asked to be named."""

    root: str
    before: int
    after: int
    num_images: tuple[int, int]
    num_shared_shards: int
    num_opened_shards: int
    counts: Mapping[str, int]  # by kind
    images: Mapping[str, tuple[Change, ...]]
    classes_added: tuple[str, ...]
    classes_vanished: tuple[str, ...]
    classes_renamed: tuple[tuple[int, str, str], ...]  # (class id, before, after): there must be none
    drift: tuple[Drift, ...]  # largest first
    rejects: Mapping[str, tuple[int, int]]  # by reason, where the counts differ

    @property
    def is_lawful(self) -> bool:
        """No image changed its split, no class id its meaning."""
        return not self.counts["moved"] and not self.classes_renamed

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_lawful": self.is_lawful}


def diff(
    root: str | Store,
    before: int | None = None,
    after: int | None = None,
    *,
    num_named: int | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare two snapshots of ``root``: by default the newest with the one before it, or ``before`` with the newest.

    ``num_named`` bounds how many images of each kind are named; all are counted.
    """
    store = root if isinstance(root, Store) else Store.open(root)
    after = (newest_number(store) or open_snapshot(store).number) if after is None else after
    chosen, before = before, after - 1 if before is None else before
    if before < 1 and chosen is None:
        raise NotFoundError(f"there is no snapshot before snapshot {after} of {store.url}: nothing to compare it with")
    sides = [_opened(store, number) for number in (before, after)]
    return _Comparison(sides[0], sides[1], progress or (lambda stage, done, total: None)).result(num_named)


def _opened(store: Store, number: int) -> Snapshot:
    try:
        return open_snapshot(store, number)
    except NotFoundError as error:
        if not is_collected(store, number):
            raise
        raise NotFoundError(f"{error}. Two that remain compare: `evenshard diff {store.url} A B`") from None


class _Side:
    """One of the two snapshots: the images of the shards that the other does not have, as columns."""

    def __init__(self, snapshot: Snapshot, shared: frozenset[str], opened: Callable[[], None]) -> None:
        self.snapshot = snapshot
        self.names: list[str] = snapshot.classes["name"].to_pylist()
        parts: list[tuple[int, str, pa.Table]] = []
        for number, row in enumerate(snapshot.shards.to_pylist()):
            if row["index_sha256"] not in shared:
                parts.append((number, row["split"], _open(snapshot, row)))
                opened()
        self.num_opened = len(parts)
        indexes = [index for _, _, index in parts]
        counts = [index.num_rows for index in indexes]
        self.key = _join([index_keys(index) for index in indexes], np.uint64)
        self.digest = _join([index_digests(index) for index in indexes], np.uint64, (0, 4))
        self.class_id = _join([index["class_id"].to_numpy() for index in indexes], np.int32)
        self.split = np.repeat(np.array([SPLITS.index(split) for _, split, _ in parts], np.int8), counts)
        self.shard = np.repeat(np.array([number for number, _, _ in parts], np.int32), counts)
        self.row = _join([np.arange(count, dtype=np.int32) for count in counts], np.int32)

    def where(self, place: int) -> tuple[str, str, str]:
        """Path, class name and split of one image."""
        path: str = self.snapshot.index(int(self.shard[place]))["path"][int(self.row[place])].as_py()
        return path, self.names[int(self.class_id[place])], SPLITS[int(self.split[place])]


def _open(snapshot: Snapshot, row: Mapping[str, Any]) -> pa.Table:
    """The columns of an index that are compared; unlike ``Snapshot.index``, nothing is kept."""
    ref = FileRef(sha256=row["index_sha256"], size=row["index_size"], num_rows=row["num_samples"])
    return snapshot.table(ref, INDEXES, index_path(ref.sha256)).select(["key", "sha256", "class_id"])


def _join(parts: Sequence[NDArray[Any]], dtype: Any, shape: tuple[int, ...] = (0,)) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(shape, dtype)


class _Comparison:
    def __init__(self, before: Snapshot, after: Snapshot, progress: Progress) -> None:
        one, two = (frozenset(snapshot.shards["index_sha256"].to_pylist()) for snapshot in (before, after))
        self._num_shared = len(one & two)
        steps = itertools.count(1)

        def opened() -> None:
            progress("compare", next(steps), len(one ^ two))

        self._old, self._new = _Side(before, one & two, opened), _Side(after, one & two, opened)

    def result(self, num_named: int | None) -> Diff:
        old, new = self._old, self._new
        found = self._match()
        images = {kind: tuple(self._changes(*(places[:num_named] for places in found[kind]))) for kind in KINDS}
        drift = self._drift()
        return Diff(
            root=old.snapshot.store.url,
            before=old.snapshot.number,
            after=new.snapshot.number,
            num_images=(old.snapshot.record.num_images, new.snapshot.record.num_images),
            num_shared_shards=self._num_shared,
            num_opened_shards=old.num_opened + new.num_opened,
            counts={kind: len(found[kind][0]) for kind in KINDS},
            images=images,
            classes_added=tuple(one.name for one in drift if not one.before),
            classes_vanished=tuple(one.name for one in drift if not one.after),
            classes_renamed=tuple(
                (number, one, two)
                for number, (one, two) in enumerate(zip(old.names, new.names, strict=False))
                if one != two
            ),
            drift=tuple(sorted(drift, key=lambda one: (-abs(one.after - one.before), one.class_id))),
            rejects=self._rejects(),
        )

    def _match(self) -> dict[str, tuple[Rows, Rows]]:
        """By kind: places in the old columns and in the new ones, -1 where there is none."""
        old, new = self._old, self._new
        _, a, b = np.intersect1d(old.key, new.key, assume_unique=True, return_indices=True)
        changed = np.any(old.digest[a] != new.digest[b], axis=1)
        _, by_a, by_b = np.intersect1d(old.digest[:, 0], new.digest[:, 0], return_indices=True)
        same = np.all(old.digest[by_a] == new.digest[by_b], axis=1)
        by_a, by_b = by_a[same], by_b[same]
        free = ~np.isin(by_a, a) & ~np.isin(by_b, b)
        renamed_a, renamed_b = by_a[free], by_b[free]
        pairs = np.concatenate([a, renamed_a]), np.concatenate([b, renamed_b])
        relabelled = old.class_id[pairs[0]] != new.class_id[pairs[1]]
        both = np.unique(np.stack([np.concatenate([a, by_a]), np.concatenate([b, by_b])]), axis=1)
        moved = old.split[both[0]] != new.split[both[1]]
        gone = np.setdiff1d(np.arange(len(old.key)), pairs[0])
        come = np.setdiff1d(np.arange(len(new.key)), pairs[1])
        return {
            "added": (np.full(len(come), -1), come),
            "removed": (gone, np.full(len(gone), -1)),
            "changed": (a[changed], b[changed]),
            "renamed": (renamed_a, renamed_b),
            "relabelled": (pairs[0][relabelled], pairs[1][relabelled]),
            "moved": (both[0][moved], both[1][moved]),
        }

    def _changes(self, before: Rows, after: Rows) -> Iterator[Change]:
        nowhere = (None, None, None)
        # In the order of the shards: each index is then opened once.
        order = np.lexsort((after, before))
        for a, b in zip(before[order].tolist(), after[order].tolist(), strict=True):
            path_before, class_before, split_before = nowhere if a < 0 else self._old.where(a)
            path, class_name, split = nowhere if b < 0 else self._new.where(b)
            yield Change(
                path_before=path_before,
                path=path,
                class_before=class_before,
                class_name=class_name,
                split_before=split_before,
                split=split,
            )

    def _drift(self) -> list[Drift]:
        counts = [side.snapshot.classes["count"].to_pylist() for side in (self._old, self._new)]
        names = max(self._old.names, self._new.names, key=len)
        before, after = ([*count, *[0] * (len(names) - len(count))] for count in counts)
        return [
            Drift(class_id=number, name=name, before=one, after=two)
            for number, (name, one, two) in enumerate(zip(names, before, after, strict=True))
            if one != two
        ]

    def _rejects(self) -> dict[str, tuple[int, int]]:
        if self._old.snapshot.record.rejects == self._new.snapshot.record.rejects:
            return {}
        before, after = (Counter(side.snapshot.rejects["reason"].to_pylist()) for side in (self._old, self._new))
        reasons = sorted({*before, *after})
        return {reason: (before[reason], after[reason]) for reason in reasons if before[reason] != after[reason]}
