"""What a policy would do, before anything is written: per group of classes and overall, and in words.

Comes in: ``Targets``, bytes per class, a batch size. Goes out: an ``Outcome`` of plain numbers, and ``remarks``:
sentences for whoever has to decide. Guarantees: pure functions; the groups' counts add up to the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.plan.policy import Targets
from pipeline.plan.shots import GROUPS, group_of
from pipeline.plan.spelling import counted

IntArray = NDArray[np.int64]

BATCH = 256
"""Draws of a global batch, where none is given."""

HARD_REPEAT = 20
"""From so many draws of one image in an epoch on, networks memorise the image rather than the class."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One group of classes, or all of them."""

    name: str
    num_classes: int
    """With an image in the split."""
    num_drawn_classes: int
    num_images: int
    num_draws: int
    num_distinct: int
    """Different images that the first epoch draws; with E2, min(T_c, pool) of each class."""
    share: float
    """Of all draws."""
    largest_repeat: float
    """Draws of one image in an epoch, on average over its class's pool."""
    num_bytes: int
    """Bytes that an epoch reads, repeats counted each time; 0 where sizes were not given."""
    num_held_classes: int
    """Classes that ``max_repeat`` keeps below what the policy wishes ..."""
    num_withheld: int
    """... and the draws that they lack."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one epoch under a policy is made of."""

    parts: tuple[Part, ...]
    """One for each of ``shots.GROUPS``, by images in the split."""
    overall: Part
    imbalance_before: float
    """The largest class over the smallest, in images ..."""
    imbalance: float
    """... and in draws, over the classes that are drawn."""
    imbalance_wished: float
    """What it would be without ``max_repeat``."""
    batch: int
    classes_per_batch: float
    epochs_to_see_all: int
    """Epochs after which every image of the pools was drawn, counted from the first."""
    num_out_of_pool: int
    """Images that no epoch ever draws: frozen out, dropped, or of a class without draws."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, the groups by name."""
        parts = {part.name: vars(part) for part in (*self.parts, self.overall)}
        return {key: value for key, value in vars(self).items() if key not in ("parts", "overall")} | {"groups": parts}


def outcome(targets: Targets, class_bytes: IntArray | None = None, batch: int = BATCH) -> Outcome:
    """What an epoch of ``targets`` holds. ``class_bytes``: int64 [K], bytes of each class's images in the split."""
    if batch < 1:
        raise UsageError(f"a batch has at least 1 draw, not {batch}")
    size = np.zeros(len(targets.target)) if class_bytes is None else class_bytes / np.maximum(targets.available, 1)
    group = group_of(targets.available)
    drawn = targets.target > 0
    epochs = -(-targets.pool[drawn] // targets.target[drawn])
    never = targets.available - np.where(drawn, targets.pool, 0)
    return Outcome(
        parts=tuple(_part(name, targets, size, group == place) for place, name in enumerate(GROUPS)),
        overall=_part("all", targets, size, targets.available >= 0),
        imbalance_before=_imbalance(targets.available),
        imbalance=_imbalance(targets.target),
        imbalance_wished=_imbalance(targets.wished),
        batch=batch,
        classes_per_batch=classes_per_batch(targets.target, batch),
        epochs_to_see_all=int(epochs.max()),
        num_out_of_pool=int(never.sum()),
    )


def _part(name: str, targets: Targets, size: NDArray[np.float64], member: NDArray[np.bool_]) -> Part:
    available, pool, target = (column[member] for column in (targets.available, targets.pool, targets.target))
    withheld = targets.withheld[member]
    drawn = target > 0
    return Part(
        name=name,
        num_classes=int(np.count_nonzero(available)),
        num_drawn_classes=int(np.count_nonzero(drawn)),
        num_images=int(available.sum()),
        num_draws=int(target.sum()),
        num_distinct=int(np.minimum(target, pool).sum()),
        share=int(target.sum()) / targets.num_draws,
        largest_repeat=float((target[drawn] / pool[drawn]).max(initial=0.0)),
        num_bytes=round(float((target * size[member]).sum())),
        num_held_classes=int(np.count_nonzero(withheld)),
        num_withheld=sum(withheld.tolist()),
    )


def _imbalance(counts: IntArray) -> float:
    present = counts[counts > 0]
    return int(present.max()) / int(present.min()) if len(present) else 0.0


def classes_per_batch(target: IntArray, batch: int) -> float:
    """Different classes that a batch of ``batch`` consecutive draws holds, on average over the epoch.

    A class of T draws has one in each of T equal slots of the epoch, at least a quarter of a slot apart (DESIGN.md,
    section 8). With x = batch * T / M slots under a batch, it is missed with probability E[max(0, gap - x)], the gap
    between neighbours in slots: w with probability w, else 1 + w, w about uniform on [1/4, 1). Under a random order it
    would be missed more often, with exp(-x).
    """
    if batch >= (num_draws := int(target.sum())):
        return float(np.count_nonzero(target))
    slots = batch * (target / num_draws)
    return float((1 - _missed(slots[target > 0])).sum())


def _missed(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """E[max(0, gap - x)] by its integrals: gaps below 1 have density 4/3 g on [1/4, 1), above 4/3 (2 - g) on [5/4, 2).

    A gap from 1 to 5/4 does not occur, as w is at least 1/4.
    """

    def upper(low: NDArray[np.float64]) -> NDArray[np.float64]:  # of (g - x) * 4/3 (2 - g) from ``low`` to 2
        def primitive(g: NDArray[np.float64] | float) -> NDArray[np.float64]:
            return 4 / 3 * (-(g**3) / 3 + (2 + x) * g**2 / 2 - 2 * x * g)

        return primitive(2.0) - primitive(low)

    def lower(low: NDArray[np.float64]) -> NDArray[np.float64]:  # of (g - x) * 4/3 g from ``low`` to 1
        return 4 / 3 * ((1 - low**3) / 3 - x * (1 - low**2) / 2)

    below_one = np.where(x < 1, lower(np.clip(x, 0.25, 1)), 0)
    return np.clip(np.where(x < 2, upper(np.clip(x, 1.25, 2)), 0) + below_one, 0, 1)


def remarks(found: Outcome) -> tuple[str, ...]:
    """What a user should know before choosing this policy, most important first; empty where nothing is remarkable."""
    whole, single = found.overall, found.parts[-1]
    told: list[str] = []
    if whole.num_held_classes:
        told.append(
            f"max_repeat holds {counted(whole.num_held_classes, 'class', 'classes')} below "
            f"{'its' if whole.num_held_classes == 1 else 'their'} wish ({single.num_held_classes:,} of one image): "
            f"{counted(whole.num_withheld, 'draw')}. Largest : smallest class is {_ratio(found.imbalance)} "
            f"where {_ratio(found.imbalance_wished)} was asked."
        )
    if whole.largest_repeat >= HARD_REPEAT:
        told.append(
            f"An image of the hardest-worked class is drawn {whole.largest_repeat:,.4g} times an epoch, and repeats "
            "are no new images: bound them (max_repeat=10), and augment."
        )
    if (unseen := whole.num_images - found.num_out_of_pool - whole.num_distinct) > whole.num_images / 10:
        told.append(
            f"One epoch leaves out {unseen / whole.num_images:.0%} of the images; {found.epochs_to_see_all:,} epochs "
            "show every one."
        )
    if found.num_out_of_pool:
        told.append(f"{counted(found.num_out_of_pool, 'image is', 'images are')} never drawn, in any epoch.")
    if (starved := whole.num_classes - whole.num_drawn_classes) > 0:
        are = "is" if starved == 1 else "are"
        told.append(f"{starved:,} of {whole.num_classes:,} classes {are} never drawn: a model cannot learn them.")
    return tuple(told)


def _ratio(value: float) -> str:
    return f"{value:,.3g}:1" if value < 1000 else f"{value:,.0f}:1"
