"""A snapshot as numbers: classes, groups of classes, splits, and what one epoch of every manifest would draw.

Comes in: a snapshot. Goes out: frozen facts over ``int64[K]`` columns in class order. Guarantees: nothing is sampled or
estimated; priors and weights are those that the manifest itself computes, so the page cannot disagree with a loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.plan import shots
from pipeline.plan.manifest import WEIGHTS
from pipeline.plan.outcome import Outcome, outcome, remarks
from pipeline.plan.policy import Targets
from pipeline.schema import SPLITS
from pipeline.snapshot import Manifest, Snapshot

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

GROUPS = (*shots.GROUPS, "none")
"""By training images: above 100, 20 to 100, 2 to 19, a single one, none at all."""

WEIGHT_TITLES = {kind: f"weight, {kind.replace('_', ' ')}" for kind in WEIGHTS}


@dataclass(frozen=True, eq=False)
class Classes:
    """Columns of the classes table, each ``int64[K]``."""

    names: list[str]
    columns: Mapping[str, IntArray]
    evaluable: BoolArray

    @classmethod
    def of(cls, snapshot: Snapshot) -> Classes:
        table = snapshot.classes
        numbers = [name for name in table.column_names if name not in ("class_id", "name", "evaluable")]
        columns = {name: table[name].to_numpy().astype(np.int64) for name in numbers}
        return cls(table["name"].to_pylist(), columns, table["evaluable"].to_numpy(zero_copy_only=False).astype(bool))

    @property
    def count(self) -> IntArray:
        return self.columns["count"]

    @property
    def train(self) -> IntArray:
        return self.columns["train"]

    @cached_property
    def group(self) -> IntArray:
        """Position in GROUPS of every class."""
        group = shots.group_of(self.train).astype(np.int64)
        return np.where(group == shots.NO_GROUP, len(shots.GROUPS), group)


@dataclass(frozen=True, eq=False)
class Draws:
    """One manifest: what one epoch of it draws."""

    manifest: Manifest
    targets: IntArray
    pool: IntArray
    repeat: FloatArray  # draws per epoch of an image of the pool; 0 where nothing is drawn

    @classmethod
    def of(cls, manifest: Manifest) -> Draws:
        targets, pool = manifest.targets, manifest.pool
        repeat = np.divide(targets, pool, out=np.zeros(len(targets)), where=(pool > 0) & (targets > 0))
        return cls(manifest, targets, pool, repeat)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def distinct(self) -> int:
        """Images that one epoch shows."""
        return int(np.minimum(self.targets, self.pool).sum())

    def outcome(self, classes: Classes) -> Outcome:
        """What one epoch is made of."""
        manifest, wished = self.manifest, self.targets + self.manifest.withheld
        targets = Targets(
            available=manifest.available, pool=self.pool, target=self.targets, wished=wished, asked=int(wished.sum())
        )
        return outcome(targets, classes.columns[f"{manifest.split}_bytes"])

    def row(self, classes: Classes) -> dict[str, Any]:
        """For the table of manifests."""
        found, drawn = self.outcome(classes), self.targets > 0
        whole, single = found.overall, found.parts[-1]
        return {
            "name": self.name,
            "split": self.manifest.split,
            "policy": str(self.manifest.document.policy),
            "draws": whole.num_draws,
            "distinct": whole.num_distinct,
            "bytes": whole.num_bytes,
            "classes": whole.num_drawn_classes,
            "smallest": int(self.targets[drawn].min()),
            "largest": int(self.targets.max()),
            "imbalance": found.imbalance,
            "repeat": whole.largest_repeat,
            "singles": single.share,
            "batch": found.batch,
            "classes_per_batch": found.classes_per_batch,
            "remarks": remarks(found),
        }

    def measures(self) -> dict[str, FloatArray]:
        """What a sampler, a loss or a paper asks for, by title."""
        manifest = self.manifest
        told = {"repeat factor": manifest.repeat_factor, "log_prior": manifest.log_prior, "log_q": manifest.log_q}
        told |= {"withheld by max_repeat": manifest.withheld.astype(np.float64)}
        return told | {title: manifest.weights(kind) for kind, title in WEIGHT_TITLES.items()}


def group_rows(classes: Classes, draws: list[Draws]) -> list[dict[str, Any]]:
    """Many, medium, few, one: how many classes and images, and the share of every manifest's draws."""
    rows: list[dict[str, Any]] = []
    for code, name in enumerate(GROUPS):
        inside = (classes.group == code) & (classes.count > 0)
        if name == "none" and not inside.any():
            continue
        rows.append(
            {
                "name": name,
                "classes": int(inside.sum()),
                "images": int(classes.train[inside].sum()),
                "evaluable": int((inside & classes.evaluable).sum()),
                "draws": {one.name: int(one.targets[inside].sum()) for one in draws},
                "repeat": {one.name: float(one.repeat[inside].max(initial=0)) for one in draws},
            }
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What can be measured at all: classes with an image outside train."""

    num_classes: int  # with any image
    evaluable: int
    untrained: int  # images, but none in train
    train_images: int
    train_images_evaluable: int  # training images in classes that can be evaluated
    median_held_out: int  # images outside train of an evaluable class


def coverage(classes: Classes) -> Coverage:
    """How much of the classes, and of the training images, an evaluation can speak of."""
    present = classes.count > 0
    evaluable = classes.evaluable & present
    held_out = (classes.count - classes.train)[evaluable]
    return Coverage(
        num_classes=int(present.sum()),
        evaluable=int(evaluable.sum()),
        untrained=int((present & (classes.train == 0)).sum()),
        train_images=int(classes.train.sum()),
        train_images_evaluable=int(classes.train[evaluable].sum()),
        median_held_out=int(np.median(held_out)) if len(held_out) else 0,
    )


def split_rows(classes: Classes) -> list[dict[str, Any]]:
    """Images, classes and bytes of each split."""
    rows: list[dict[str, Any]] = []
    for split in SPLITS:
        images = classes.columns[split]
        here = images[images > 0]
        rows.append(
            {
                "name": split,
                "images": int(images.sum()),
                "classes": len(here),
                "smallest": int(here.min(initial=0) if not len(here) else here.min()),
                "median": int(np.median(here)) if len(here) else 0,
                "largest": int(images.max(initial=0)),
                "bytes": int(classes.columns[f"{split}_bytes"].sum()),
            }
        )
    return rows


def headline(counts: IntArray) -> str:
    """The imbalance of ``counts``, training images of each class, in one sentence."""
    sizes = np.sort(counts[counts > 0])[::-1]
    if not len(sizes):
        return "There is no training image in it."
    needed = int(np.searchsorted(np.cumsum(sizes), sizes.sum() / 2)) + 1
    median = int(sizes[len(sizes) // 2])  # half of the classes, rounded down, have no more
    head = "The largest class holds" if needed == 1 else f"The {needed:,} largest of {len(sizes):,} classes hold"
    tail = "a single one" if median == 1 else f"{median:,} or fewer"
    return f"{head} half of the training images; half of the classes have {tail}."


def seven_digits(values: FloatArray) -> list[float | str]:
    """For JSON, which has no infinities: those become text."""
    return [float(f"{value:.7g}") if math.isfinite(value) else f"{value:g}" for value in values.tolist()]
