"""What a source is made of: images and bytes per class and split, and how unequal they are.

Comes in: class ids, splits and sizes of images, in any number of pieces. Goes out: ``ClassStats``, the classes table, a
``Description``. Guarantees: ``merge`` is associative and commutative with ``ClassStats.zeros`` as its neutral element,
in integers, so statistics do not depend on how the work was cut or in which order it finished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import UsageError
from pipeline.plan.shots import FEW_BELOW, MANY_ABOVE
from pipeline.schema import CLASSES, SPLITS

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassStats:
    """Images and their bytes: ``int64[len(SPLITS), K]`` each."""

    counts: IntArray
    sizes_bytes: IntArray

    @classmethod
    def zeros(cls, num_classes: int) -> ClassStats:
        shape = (len(SPLITS), num_classes)
        return cls(counts=np.zeros(shape, np.int64), sizes_bytes=np.zeros(shape, np.int64))

    @classmethod
    def of(cls, class_id: ArrayLike, split: ArrayLike, size_bytes: ArrayLike, num_classes: int) -> ClassStats:
        """Statistics of images given by column; ``split`` is a position in SPLITS."""
        ids, splits = np.asarray(class_id, np.int64), np.asarray(split, np.int64)
        _check_range("class_id", ids, num_classes)
        _check_range("split", splits, len(SPLITS))
        stats = cls.zeros(num_classes)
        np.add.at(stats.counts, (splits, ids), 1)
        np.add.at(stats.sizes_bytes, (splits, ids), np.asarray(size_bytes, np.int64))
        return stats

    @property
    def num_classes(self) -> int:
        return self.counts.shape[1]

    def merge(self, other: ClassStats) -> ClassStats:
        """Statistics of both sets of images, which share one class map."""
        if self.num_classes != other.num_classes:
            raise UsageError(f"statistics of {self.num_classes} classes cannot merge with those of {other.num_classes}")
        return ClassStats(counts=self.counts + other.counts, sizes_bytes=self.sizes_bytes + other.sizes_bytes)


def _check_range(name: str, values: IntArray, limit: int) -> None:
    wrong = np.flatnonzero((values < 0) | (values >= limit))
    if wrong.size:
        raise UsageError(f"{name} must be from 0 to {limit - 1}; row {wrong[0]} has {values[wrong[0]]}")


def class_table(names: Sequence[str], stats: ClassStats) -> pa.Table:
    """The classes table (``schema.CLASSES``): row c is class c."""
    if len(names) != stats.num_classes:
        raise UsageError(f"{len(names)} class names for statistics of {stats.num_classes} classes")
    columns: dict[str, Any] = {"class_id": np.arange(len(names), dtype=np.int32), "name": list(names)}
    columns |= {"count": stats.counts.sum(axis=0), "bytes": stats.sizes_bytes.sum(axis=0)}
    for code, split in enumerate(SPLITS):
        columns |= {split: stats.counts[code], f"{split}_bytes": stats.sizes_bytes[code]}
    columns["evaluable"] = stats.counts[1:].sum(axis=0) > 0
    return pa.Table.from_pydict({name: columns[name] for name in CLASSES.names}, schema=CLASSES)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Classes of similar size, and the images in them."""

    num_classes: int
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """How unequal the classes are. Classes without images are counted in ``num_empty`` and nowhere else."""

    num_classes: int
    num_empty: int
    num_images: int
    singletons: int
    """Classes with exactly one image."""
    largest: int
    smallest: int
    imbalance: float
    """Largest over smallest class; 1 is balanced."""
    gini: float
    """0 where all classes are equal, towards 1 where one owns everything."""
    entropy: float
    """Of the class of a random image, in nats."""
    effective_classes: float
    """exp(entropy): that many equal classes would be as diverse."""
    many: Group
    medium: Group
    few: Group

    def to_json(self) -> dict[str, Any]:
        """For printing; nothing with floats goes into a snapshot."""
        groups = {name: vars(getattr(self, name)) for name in ("many", "medium", "few")}
        return {**vars(self), **groups}


def describe(counts: ArrayLike) -> Description:
    """Describe ``int64[K]`` images per class. All measures are 0 where there is no image at all."""
    every = np.asarray(counts, np.int64)
    sizes = np.sort(every[every > 0])
    largest, smallest = (int(sizes[-1]), int(sizes[0])) if sizes.size else (0, 0)
    entropy = _entropy(sizes)
    return Description(
        num_classes=len(sizes),
        num_empty=len(every) - len(sizes),
        num_images=int(sizes.sum()),
        singletons=int(np.count_nonzero(sizes == 1)),
        largest=largest,
        smallest=smallest,
        imbalance=largest / smallest if smallest else 0.0,
        gini=_gini(sizes),
        entropy=entropy,
        effective_classes=math.exp(entropy) if sizes.size else 0.0,
        many=_sum_up(sizes[sizes > MANY_ABOVE]),
        medium=_sum_up(sizes[(sizes >= FEW_BELOW) & (sizes <= MANY_ABOVE)]),
        few=_sum_up(sizes[sizes < FEW_BELOW]),
    )


def _sum_up(sizes: IntArray) -> Group:
    return Group(num_classes=len(sizes), num_images=int(sizes.sum()))


def _gini(ascending: IntArray) -> float:
    """sum((2i - K - 1) * n_i) / (K * N), i from 1, in integers until the last division."""
    if not ascending.size:
        return 0.0
    num_classes = len(ascending)
    place = np.arange(1 - num_classes, num_classes, 2)
    return sum((place * ascending).tolist()) / (num_classes * int(ascending.sum()))


def _entropy(ascending: IntArray) -> float:
    """-sum(p * log p); fsum, so that equal counts give equal digits in any class order."""
    shares = ascending / ascending.sum() if ascending.size else np.zeros(0)
    return -math.fsum((shares * np.log(shares)).tolist()) + 0.0  # no negative zero
