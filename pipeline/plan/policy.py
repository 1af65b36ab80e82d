"""Class counts and a policy -> targets: how often each class is drawn in one epoch (DESIGN.md, section 7).

Comes in: ``int64[K]`` counts (images of each class in the manifest's split) and a ``Policy``, parsed from text such as
``power:alpha=0.5,epoch_size=100000``, from a mapping, or read back from a file. Goes out: ``Targets``.

    T_c = clip(s * n_c^alpha, floor, ceiling), at most max_repeat * n_c, rounded by largest remainder

Guarantees:
* exact: integers and fractions only, powers and roots to 24 decimals by correctly rounded decimal arithmetic, so the
  targets are the same on every platform. Ties go to the smaller class id.
* ``N`` is the sum of the counts, ``K`` the number of classes that have an image. A class without images gets no draws.
* more images, at least as many draws; equal wishes differ by at most the one draw that rounding gives. (``explicit``
  is what its table says, and ``only`` exempts classes.)
* ``max_repeat`` always wins: over floors, over the asked total. What it withheld is ``Targets.shortfall``.
* ``epoch_size`` scales any policy: the wishes of all classes by one factor, then the cap. ``power`` and ``ratio`` meet
  it by moving s between their floor and ceiling, which stay.
* ``singletons=drop`` counts classes of one image as classes without images. ``pseudo_singletons=P`` treats P classes of
  20 images or more as if they had one, their first: what a model recalls of their other images is an estimate of
  one-shot recall that no training image enters. Which P is a keyed hash of the class id: the same in every build.

Levels (``floor``, ``ceiling``, ``per_class``) are a number of images or ``min``, ``max``, ``mean`` (N/K), ``median``,
``q0.9`` (a quantile: the smallest count that this share of the classes does not exceed), or a multiple such as
``10*mean`` or ``min/0.3``; fractions are rounded half to even, to at least 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import PolicyError, UnfitPolicyError
from pipeline.keyed import derive, keyed_hash, seed_key
from pipeline.plan.apportion import fill, largest_remainder, total_of
from pipeline.plan.parameters import MAX_INTEGER
from pipeline.plan.shots import FEW_BELOW
from pipeline.plan.spelling import NAMES, PRESETS, Policy, counted, nearest, parse, to_json
from pipeline.plan.wishes import DEMANDS, Demand, Groups, caps_of, group

__all__ = [
    "DEFAULTS",
    "MAX_TARGET",
    "NAMES",
    "PRESETS",
    "Policy",
    "Targets",
    "apply",
    "parse",
    "progressive",
    "to_json",
]

IntArray = NDArray[np.int64]

MAX_TARGET = 2**31 - 1
"""The epoch function counts the draws of one class in 31 bits."""

_TAG_PSEUDO = 18  # purposes below belong to the epoch function and to splits


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """What a policy gives, ``int64[K]`` each and read-only."""

    available: IntArray
    """Images there are."""
    pool: IntArray
    """Images drawn from, the first ones of the class."""
    target: IntArray
    """Draws per epoch."""
    wished: IntArray
    """What the same policy would draw without ``max_repeat``."""
    asked: int
    """Draws that the policy wished for in all, before ``max_repeat``."""

    @property
    def num_draws(self) -> int:
        return int(self.target.sum())

    @property
    def shortfall(self) -> int:
        """Draws that max_repeat (or a class without images) withheld."""
        return self.asked - self.num_draws

    @property
    def withheld(self) -> IntArray:
        """int64 [K]: draws that ``max_repeat`` took from each class. With a fixed total, other classes got them."""
        return np.maximum(self.wished - self.target, 0)

    @property
    def num_starved(self) -> int:
        """Classes that have images and are never drawn: dropped, an explicit 0, or too small an epoch_size."""
        return int(np.count_nonzero((self.available > 0) & (self.target == 0)))

    @property
    def largest_repeat(self) -> float:
        """How often an image of the hardest-worked class appears in one epoch, on average over its pool."""
        drawn = self.target > 0
        return float((self.target[drawn] / self.pool[drawn]).max(initial=0.0))


DEFAULTS: Mapping[str, Policy] = {
    "natural": parse("natural"),
    "oversampled": parse("oversampled"),
    "undersampled": parse("undersampled"),
    "balanced": parse("balanced:per_class=mean"),
}
"""The manifests of every build."""


# -- targets -------------------------------------------------------------------------------------------------------


def apply(counts: ArrayLike, policy: Policy, names: Sequence[str] | None = None) -> Targets:
    """Targets of ``policy`` for ``counts`` (``int64[K]``). ``names`` (by class id) are needed by ``explicit`` only.

    Raises PolicyError where no class has an image or a draw, a class passes MAX_TARGET, or floors pass epoch_size.
    """
    available = _checked(counts)
    pool = _pool(available, policy)
    asked, target = _rounded(pool, policy, names)
    if not target.any():
        raise UnfitPolicyError(
            f"policy {policy}: no class is drawn; ask for at least one draw of a class that has images"
        )
    if (largest := int(target.max())) > MAX_TARGET:
        raise _too_many(policy, largest)
    wished = target
    if policy.get("max_repeat") is not None:
        _, wished = _rounded(pool, policy.having(max_repeat=None), names)
    if policy.get("frozen"):
        pool = np.minimum(pool, target)
    for array in (available, pool, target, wished):
        array.setflags(write=False)
    return Targets(available=available, pool=pool, target=target, wished=wished, asked=asked)


def _too_many(policy: Policy, draws: int) -> PolicyError:
    return UnfitPolicyError(f"policy {policy}: {draws} draws of one class; at most {MAX_TARGET} are possible")


def _pool(available: IntArray, policy: Policy) -> IntArray:
    """The images that a policy may draw from: all, but for singletons that are dropped and classes made poor."""
    pool = available.copy()
    if wanted := policy.integer("pseudo_singletons"):
        rich = np.flatnonzero(available >= FEW_BELOW)
        if len(rich) < wanted:
            raise UnfitPolicyError(
                f"policy {policy}: pseudo_singletons must be at most {len(rich)}, the number of classes with "
                f"{FEW_BELOW} images or more"
            )
        pool[rich[np.argsort(keyed_hash(derive(seed_key(0), _TAG_PSEUDO), rich), kind="stable")[:wanted]]] = 1
    if policy.get("singletons") == "drop":
        pool[available == 1] = 0
    if not pool.any():
        raise UnfitPolicyError(f"policy {policy}: no class has more than one image; keep some")
    return pool


def _rounded(counts: IntArray, policy: Policy, names: Sequence[str] | None) -> tuple[int, IntArray]:
    """The draws that were asked in all, and the whole number of each class."""
    wish, unmet = _wishes(counts, policy, names)
    groups = group(counts, wish)
    asked, ideal, unit = _settle(groups, DEMANDS[policy.name](groups, policy), policy)
    if ceil(Fraction(max(ideal), unit)) >= MAX_INTEGER:
        raise UnfitPolicyError(
            f"policy {policy}: {max(ideal) // unit} draws of one class; at most {MAX_TARGET} are possible"
        )
    target = np.zeros_like(counts)
    target[groups.ids] = largest_remainder(ideal, unit, groups.many, groups.member)
    return asked + unmet, target


def progressive(
    counts: ArrayLike, num_stages: int, epoch_size: int | None = None, *, max_repeat: float | str | None = None
) -> list[Targets]:
    """``num_stages`` targets from natural to balanced, each of ``epoch_size`` draws (default: N); Kang et al. 2020.

    Each is also a policy of its own: ``progressive:stage=I,num_stages=E``.
    """
    common = {"policy": "progressive", "num_stages": num_stages, "epoch_size": epoch_size, "max_repeat": max_repeat}
    if num_stages < 1:
        raise PolicyError(f"progressive: num_stages must be at least 1, not {num_stages}")
    return [apply(counts, parse({**common, "stage": stage})) for stage in range(num_stages)]


def _checked(counts: ArrayLike) -> IntArray:
    array = np.asarray(counts)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and (array < 0).any()):
        raise PolicyError(f"counts must be one row of integers, none negative; found {array.dtype} {array.shape}")
    if not array.any():
        raise UnfitPolicyError(f"none of the {array.size} classes has an image in this split: nothing can be drawn")
    return array.astype(np.int64)


def _wishes(counts: IntArray, policy: Policy, names: Sequence[str] | None) -> tuple[IntArray, int]:
    """Per class what an explicit table asks, and how many of its draws meet a class without images."""
    wish = np.zeros_like(counts)
    table = policy.get("targets")
    if not isinstance(table, tuple):
        return wish, 0
    if names is None or len(names) != len(counts):
        raise PolicyError(f"policy explicit needs the names of all {len(counts)} classes")
    ids = {name: class_id for class_id, name in enumerate(names)}
    if unknown := [name for name, _ in table if name not in ids]:
        names_are = counted(len(unknown), "name is", "names are")
        raise UnfitPolicyError(
            f"policy explicit: {names_are} no class of this snapshot: {', '.join(unknown[:5])}"
            f"{nearest(unknown[0], ids)}"
        )
    if policy.get("others") == "natural":
        wish = counts.copy()
    for name, target in table:
        wish[ids[name]] = target
    return wish, int(wish[counts == 0].sum())


def _settle(groups: Groups, demand: Demand, policy: Policy) -> tuple[int, list[int], int]:
    """The total that was asked, and the exact target of each group as (numerators, denominator)."""
    caps = caps_of(groups, policy)
    total = policy.integer("epoch_size") or demand.total
    if total is None:
        asked = round(Fraction(total_of(groups.many, demand.weight), demand.unit))
        ideal = [min(weight, cap * demand.unit) for weight, cap in zip(demand.weight, caps, strict=True)]
        return asked, ideal, demand.unit
    low = [min(demand.low, cap) for cap in caps]
    above = demand.high or [MAX_INTEGER if weight else 0 for weight in demand.weight]
    high = [min(bound, cap) for bound, cap in zip(above, caps, strict=True)]
    least = total_of(groups.many, low)
    if least > total and policy.get("epoch_size") is not None:
        raise UnfitPolicyError(
            f"policy {policy}: a floor of {demand.low} takes {least} draws; raise epoch_size or lower it"
        )
    total = max(total, least)
    return total, *fill(demand.weight, groups.many, low, high, total)
