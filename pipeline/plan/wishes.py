"""What each policy wishes: the formulas, each with its paper, before ``max_repeat``, total and rounding.

Comes in: counts of the classes that have an image, grouped by size, and a ``Policy``. Goes out: a ``Demand`` per group.
Guarantees: integers and fractions only, powers and roots to 24 decimals by correctly rounded decimal arithmetic.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, isqrt
from typing import cast

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PolicyError, UnfitPolicyError
from pipeline.plan.apportion import total_of
from pipeline.plan.parameters import DECIMAL, MAX_INTEGER, Value
from pipeline.plan.spelling import Policy

IntArray = NDArray[np.int64]

_UNIT = 10**24  # irrational wishes are integers in this unit


# -- counts: classes of equal size (and equal wish) are computed once ------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The classes that have an image, by size. Python integers: products pass 2^63."""

    sizes: list[int]  # n of each group, ascending
    many: list[int]  # classes in each group
    wishes: list[int]  # explicit targets of each group, else 0
    ids: IntArray  # class ids with n > 0, ascending
    member: IntArray  # the group of each of them
    num_images: int
    num_classes: int


def group(counts: IntArray, wish: IntArray) -> Groups:
    """Group classes by ``counts`` and by what an explicit table wishes for them."""
    ids = np.flatnonzero(counts > 0)
    sizes, by_size = np.unique(counts[ids], return_inverse=True)
    wishes, by_wish = np.unique(wish[ids], return_inverse=True)
    code, member, many = np.unique(by_size * len(wishes) + by_wish, return_inverse=True, return_counts=True)
    return Groups(
        sizes=sizes[code // len(wishes)].tolist(),
        many=many.tolist(),
        wishes=wishes[code % len(wishes)].tolist(),
        ids=ids,
        member=member,
        num_images=int(counts.sum()),
        num_classes=len(ids),
    )


def _statistic(groups: Groups, name: str) -> Fraction:
    """Of the counts of classes that have an image."""
    if name == "mean":
        return Fraction(groups.num_images, groups.num_classes)
    if name in ("min", "max"):
        return Fraction(groups.sizes[0] if name == "min" else groups.sizes[-1])
    rank = max(1, ceil(Fraction(name.removeprefix("q")) * groups.num_classes))
    return Fraction(groups.sizes[int(np.searchsorted(np.cumsum(groups.many), rank))])


def _images(groups: Groups, level: Value | None, missing: int) -> int:
    """A level as a number of images; ``missing`` where the policy has none."""
    if not isinstance(level, str):
        return missing if level is None else cast(int, level)
    factor, _, name = level.rpartition("*")
    name, _, divisor = name.partition("/")
    wanted = round(Fraction(factor or "1") / Fraction(divisor or "1") * _statistic(groups, name))
    return min(max(1, wanted), MAX_INTEGER - 1)


def caps_of(groups: Groups, policy: Policy) -> list[int]:
    """The most draws that ``max_repeat`` lets a class of each group have."""
    if policy.get("max_repeat") is None:
        return [MAX_INTEGER] * len(groups.sizes)
    return [floor(policy.number("max_repeat") * size) for size in groups.sizes]


# -- the policies: what each wishes, per class of each group -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Wishes per class of each group."""

    weight: list[int]
    unit: int = 1  # a class wishes weight / unit draws ...
    total: int | None = None  # ... or a share of this total in proportion to weight,
    low: int = 0  # between these
    high: list[int] | None = None


def _natural(groups: Groups, policy: Policy) -> Demand:
    """T = n: every image once. The default sampler of any framework; the first stage of Kang et al., ICLR 2020."""
    return Demand(weight=groups.sizes)


def _oversample(groups: Groups, policy: Policy) -> Demand:
    """T = max(n, floor). Buda et al., Neural Networks 2018 (floor = max)."""
    least = _images(groups, policy.get("floor"), 0)
    return Demand(weight=[max(size, least) if _chosen(groups, policy, size) else size for size in groups.sizes])


def _undersample(groups: Groups, policy: Policy) -> Demand:
    """T = min(n, ceiling). Buda et al., Neural Networks 2018 (ceiling = min)."""
    most = _images(groups, policy.get("ceiling"), MAX_INTEGER)
    return Demand(weight=[min(size, most) if _chosen(groups, policy, size) else size for size in groups.sizes])


def _chosen(groups: Groups, policy: Policy, size: int) -> bool:
    """Whether ``only`` lets classes of this size change. Of tied classes imbalanced-learn takes the first; here all."""
    least, most = groups.sizes[0], groups.sizes[-1]
    return {
        "minority": size == least,
        "not-minority": size != least,
        "majority": size == most,
        "not-majority": size != most,
    }.get(str(policy.get("only")), True)


def _clip(groups: Groups, policy: Policy) -> Demand:
    """T = min(max(n, floor), ceiling): the tail oversampled, the head undersampled. Buda et al. 2018 compare both."""
    low, high = _bounds(groups, policy)
    return Demand(weight=[min(max(size, low), high) for size in groups.sizes])


def _bounds(groups: Groups, policy: Policy) -> tuple[int, int]:
    low = _images(groups, policy.get("floor"), 0)
    high = _images(groups, policy.get("ceiling"), MAX_INTEGER)
    if low > high:
        raise UnfitPolicyError(f"policy {policy}: floor {low} is above ceiling {high}")
    return low, high


def _balanced(groups: Groups, policy: Policy) -> Demand:
    """T = k for every class: class-balanced sampling, cRT in Kang et al., ICLR 2020."""
    return Demand(weight=[_images(groups, policy.get("per_class"), 0)] * len(groups.sizes))


def _power(groups: Groups, policy: Policy) -> Demand:
    """T in proportion to n^alpha. Kang et al., ICLR 2020; alpha 0.5: Mahajan et al., ECCV 2018 (square root)."""
    low, high = _bounds(groups, policy)
    alpha = Decimal(str(policy.get("alpha")))
    weight = [_raise(size, alpha) for size in groups.sizes]
    return Demand(weight=weight, total=groups.num_images, low=low, high=[high] * len(weight))


def _raise(size: int, alpha: Decimal) -> int:
    """size^alpha in units of 1e-24, to the nearest."""
    power = DECIMAL.exp(DECIMAL.multiply(alpha, DECIMAL.ln(Decimal(size))))
    return int(DECIMAL.to_integral_value(DECIMAL.multiply(power, _UNIT)))


def _ratio(groups: Groups, policy: Policy) -> Demand:
    """T in [low, max_ratio * low], as near to natural as the total allows. Networks tolerate 10:1: Cao et al. 2019.

    Low is the least that reaches the total; then the largest classes are lowered to one level. The ratio is kept
    exactly: it wins over epoch_size, and max_repeat wins over both.
    """
    total = policy.integer("epoch_size") or groups.num_images
    ratio, caps = policy.number("max_ratio"), caps_of(groups, policy)
    natural = [ceil(Fraction(size * total, groups.num_images)) for size in groups.sizes]

    def bounds(low: int) -> list[int]:
        return [min(max(low, size), floor(ratio * low)) for size in natural]

    def reaches(low: int) -> bool:
        return total_of(groups.many, [min(*pair) for pair in zip(bounds(low), caps, strict=True)]) >= total

    low = 1 + bisect_left(range(1, total + 1), True, key=reaches)
    if total_of(groups.many, [min(low, cap) for cap in caps]) <= total:
        return Demand(weight=[1] * len(natural), total=total, low=low, high=bounds(low))
    low = max(1, low - 1)  # a ratio near 1: nothing between low and low + 1, so raise the largest classes instead
    return Demand(weight=groups.sizes, total=total, low=low, high=[floor(ratio * low)] * len(natural))


def _repeat_factor(groups: Groups, policy: Policy) -> Demand:
    """T = n * max(1, sqrt(t / f)), f = n/N: LVIS, Gupta et al., CVPR 2019. (So T = max(n, sqrt(t * N * n)).)"""
    threshold = policy.number("threshold")
    scale = threshold.numerator * groups.num_images * _UNIT**2
    weight = [max(size * _UNIT, isqrt(scale * size // threshold.denominator)) for size in groups.sizes]
    return Demand(weight=weight, unit=_UNIT)


def _effective_number(groups: Groups, policy: Policy) -> Demand:
    """Each image in proportion to (1 - beta) / (1 - beta^n): Cui et al., CVPR 2019. From natural (0) to balanced."""
    beta = Decimal(str(policy.get("beta")))
    return Demand(weight=[_effective_share(size, beta) for size in groups.sizes], total=groups.num_images)


def _effective_share(size: int, beta: Decimal) -> int:
    """size * (1 - beta) / (1 - beta^size) in units of 1e-24, to the nearest."""
    power = DECIMAL.exp(DECIMAL.multiply(Decimal(size), DECIMAL.ln(beta))) if beta else Decimal(0)
    share = DECIMAL.divide(DECIMAL.multiply(Decimal(size), 1 - beta), DECIMAL.subtract(Decimal(1), power))
    return int(DECIMAL.to_integral_value(DECIMAL.multiply(share, _UNIT)))


def _progressive(groups: Groups, policy: Policy) -> Demand:
    """Stage i of E: q = (1 - t) * n/N + t/K, t = i/(E-1): progressively balanced sampling, Kang et al., ICLR 2020."""
    stage, last = policy.integer("stage") or 0, (policy.integer("num_stages") or 1) - 1
    if stage > last:
        raise PolicyError(f"policy {policy}: stages count from 0, the last is {last}")
    weight = [(last - stage) * size * groups.num_classes + stage * groups.num_images for size in groups.sizes]
    return Demand(weight=weight if last else groups.sizes, total=groups.num_images)


def _explicit(groups: Groups, policy: Policy) -> Demand:
    """T from a table; a class that it does not name is not drawn, or drawn naturally (``others``)."""
    return Demand(weight=groups.wishes)


DEMANDS: Mapping[str, Callable[[Groups, Policy], Demand]] = {
    "natural": _natural,
    "oversample": _oversample,
    "undersample": _undersample,
    "clip": _clip,
    "balanced": _balanced,
    "power": _power,
    "ratio": _ratio,
    "repeat_factor": _repeat_factor,
    "effective_number": _effective_number,
    "progressive": _progressive,
    "explicit": _explicit,
}
