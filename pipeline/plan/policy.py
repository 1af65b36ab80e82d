"""Class counts and a policy -> targets: how often each class is drawn in one epoch (DESIGN.md, section 7).

Comes in: ``int64[K]`` counts (images of each class in the manifest's split) and a ``Policy``, parsed from text such as
``power:alpha=0.5,epoch_size=100000``, from a mapping, or read back from a file. Goes out: ``Targets``.

    T_c = clip(s * n_c^alpha, floor, ceiling), at most max_repeat * n_c, rounded by largest remainder

Guarantees:
* exact: integers and fractions only, powers and roots to 24 decimals by correctly rounded decimal arithmetic, so the
  targets are the same on every platform. Ties go to the smaller class id.
* ``N`` is the sum of the counts, ``K`` the number of classes that have an image. A class without images gets no draws.
* more images, at least as many draws; equal wishes differ by at most the one draw that rounding gives. (``explicit``
  is what its table says.)
* ``max_repeat`` always wins: over floors, over the asked total. What it withheld is ``Targets.shortfall``.
* ``epoch_size`` scales any policy: the wishes of all classes by one factor, then the cap. ``power`` and ``ratio`` meet
  it by moving s between their floor and ceiling, which stay.

Levels (``floor``, ``ceiling``, ``per_class``) are a number of images or ``min``, ``max``, ``mean`` (N/K), ``median``,
``q0.9`` (a quantile: the smallest count that this share of the classes does not exceed), or a multiple such as
``10*mean``; fractions are rounded half to even, to at least 1.
"""

from __future__ import annotations

import difflib
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, isqrt
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import PolicyError
from pipeline.plan import parameters as of
from pipeline.plan.apportion import fill, largest_remainder, total_of
from pipeline.plan.parameters import DECIMAL, MAX_INTEGER, Parameter, Value

IntArray = NDArray[np.int64]

MAX_TARGET = 2**31 - 1
"""The epoch function counts the draws of one class in 31 bits."""

_UNIT = 10**24  # irrational wishes are integers in this unit


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A rule from counts to targets. ``parameters`` are canonical, complete with defaults, and sorted by name."""

    name: str
    parameters: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", _canonical(self.name, self.parameters))

    def get(self, key: str) -> Value | None:
        return dict(self.parameters).get(key)

    def integer(self, key: str) -> int | None:
        value = self.get(key)
        return value if isinstance(value, int) else None

    def number(self, key: str) -> Fraction:
        return Fraction(str(self.get(key)))

    def __str__(self) -> str:
        """The text that ``parse`` reads; an ``explicit`` table is only counted."""
        shown = ((k, f"<{len(v)} classes>" if isinstance(v, tuple) else v) for k, v in self.parameters)
        return ":".join(filter(None, (self.name, ",".join(f"{key}={value}" for key, value in shown))))


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """What a policy gives, ``int64[K]`` each and read-only: images there are, images drawn from, draws per epoch."""

    available: IntArray
    pool: IntArray
    target: IntArray
    asked: int
    """Draws that the policy wished for before max_repeat."""

    @property
    def num_draws(self) -> int:
        return int(self.target.sum())

    @property
    def shortfall(self) -> int:
        """Draws that max_repeat (or a class without images) withheld."""
        return self.asked - self.num_draws

    @property
    def num_starved(self) -> int:
        """Classes that have images and are never drawn: epoch_size is too small for them, or an explicit 0."""
        return int(np.count_nonzero((self.available > 0) & (self.target == 0)))

    @property
    def largest_repeat(self) -> float:
        """The largest T_c / n_c: how often an image of the hardest-worked class appears in one epoch."""
        drawn = self.target > 0
        return float((self.target[drawn] / self.available[drawn]).max(initial=0.0))


_COMMON: Mapping[str, Parameter] = {
    "max_repeat": of.number("of at least 1", lambda x: x >= 1),
    "epoch_size": of.integer(1),
}


def _known(name: str) -> dict[str, Parameter]:
    return {**_RULES[name].parameters, **_COMMON}


def _canonical(name: str, given: Sequence[tuple[str, object]]) -> tuple[tuple[str, Value], ...]:
    if name not in _RULES:
        raise PolicyError(f"unknown policy {name!r}{_nearest(name, _RULES)}; the policies are {', '.join(_RULES)}")
    known = _known(name)
    if len(dict(given)) < len(given):
        raise PolicyError(f"policy {name}: a parameter is given twice: {', '.join(key for key, _ in given)}")
    if unknown := [key for key, _ in given if key not in known]:
        raise PolicyError(
            f"policy {name}: unknown parameter {unknown[0]!r}{_nearest(unknown[0], known)}; "
            f"the parameters are {', '.join(known)}"
        )
    values = {key: _read(name, key, dict(given).get(key), known[key]) for key in sorted(known)}
    return tuple((key, value) for key, value in values.items() if value is not None)


def _read(name: str, key: str, value: object, parameter: Parameter) -> Value | None:
    if value is None:
        if parameter.required:
            raise PolicyError(f"policy {name} needs {key}: {parameter.expects}")
        return parameter.default
    try:
        return parameter.read(value)
    except ValueError as error:
        raise PolicyError(f"policy {name}: {key} must be {parameter.expects}, not {value!r}") from error


def _nearest(word: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def parse(spec: str | Mapping[str, object]) -> Policy:
    """Read ``balanced``, ``balanced:per_class=10``, ``undersample:frozen``, ``explicit:{"targets": {"cat": 10}}``, or a
    mapping such as ``{"policy": "balanced", "per_class": 10}``. Raises PolicyError."""
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        given = _read_json(spec, rest) if rest.lstrip().startswith("{") else _read_pairs(rest)
        return Policy(name=name.strip(), parameters=given)
    if not isinstance(spec.get("policy"), str):
        raise PolicyError(f"a policy needs the key 'policy' with one of {', '.join(_RULES)}; found {dict(spec)!r}")
    given = tuple((str(key), value) for key, value in spec.items() if key != "policy")
    return Policy(name=str(spec["policy"]), parameters=given)


def _read_pairs(text: str) -> tuple[tuple[str, object], ...]:
    pairs = (part.partition("=") for part in text.split(",") if part.strip())
    return tuple((key.strip(), value.strip() if sign else "true") for key, sign, value in pairs)


def _read_json(spec: str, text: str) -> tuple[tuple[str, object], ...]:
    try:
        pairs = json.loads(text, object_pairs_hook=tuple, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise PolicyError(f"policy {spec!r}: the part after ':' is not JSON: {error}") from error
    return cast("tuple[tuple[str, object], ...]", pairs)


def to_json(policy: Policy) -> dict[str, Any]:
    """The mapping that ``parse`` reads back; only integers, strings (decimals too) and the table of ``explicit``."""
    values = {key: dict(value) if isinstance(value, tuple) else value for key, value in policy.parameters}
    return {"policy": policy.name, **values}


# -- counts: classes of equal size (and equal wish) are computed once ------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """The classes that have an image, by size. Python integers: products pass 2^63."""

    sizes: list[int]  # n of each group, ascending
    many: list[int]  # classes in each group
    wishes: list[int]  # explicit targets of each group, else 0
    ids: IntArray  # class ids with n > 0, ascending
    member: IntArray  # the group of each of them
    num_images: int
    num_classes: int


def _group(counts: IntArray, wish: IntArray) -> _Groups:
    ids = np.flatnonzero(counts > 0)
    sizes, by_size = np.unique(counts[ids], return_inverse=True)
    wishes, by_wish = np.unique(wish[ids], return_inverse=True)
    code, member, many = np.unique(by_size * len(wishes) + by_wish, return_inverse=True, return_counts=True)
    return _Groups(
        sizes=sizes[code // len(wishes)].tolist(),
        many=many.tolist(),
        wishes=wishes[code % len(wishes)].tolist(),
        ids=ids,
        member=member,
        num_images=int(counts.sum()),
        num_classes=len(ids),
    )


def _statistic(groups: _Groups, name: str) -> Fraction:
    """Of the counts of classes that have an image."""
    if name == "mean":
        return Fraction(groups.num_images, groups.num_classes)
    if name in ("min", "max"):
        return Fraction(groups.sizes[0] if name == "min" else groups.sizes[-1])
    rank = max(1, ceil(Fraction(name.removeprefix("q")) * groups.num_classes))
    return Fraction(groups.sizes[int(np.searchsorted(np.cumsum(groups.many), rank))])


def _images(groups: _Groups, level: Value | None, missing: int) -> int:
    """A level as a number of images; ``missing`` where the policy has none."""
    if not isinstance(level, str):
        return missing if level is None else cast(int, level)
    factor, _, name = level.rpartition("*")
    return max(1, round(Fraction(factor or "1") * _statistic(groups, name)))


def _caps(groups: _Groups, policy: Policy) -> list[int]:
    if policy.get("max_repeat") is None:
        return [MAX_INTEGER] * len(groups.sizes)
    return [floor(policy.number("max_repeat") * size) for size in groups.sizes]


# -- the policies: what each wishes, per class of each group -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Demand:
    weight: list[int]
    unit: int = 1  # a class wishes weight / unit draws ...
    total: int | None = None  # ... or a share of this total in proportion to weight,
    low: int = 0  # between these
    high: list[int] | None = None


def _natural(groups: _Groups, policy: Policy) -> _Demand:
    """T = n: every image once. The default sampler of any framework; the first stage of Kang et al., ICLR 2020."""
    return _Demand(weight=groups.sizes)


def _oversample(groups: _Groups, policy: Policy) -> _Demand:
    """T = max(n, floor). Buda et al., Neural Networks 2018 (floor = max)."""
    least = _images(groups, policy.get("floor"), 0)
    return _Demand(weight=[max(size, least) for size in groups.sizes])


def _undersample(groups: _Groups, policy: Policy) -> _Demand:
    """T = min(n, ceiling). Buda et al., Neural Networks 2018 (ceiling = min)."""
    most = _images(groups, policy.get("ceiling"), MAX_INTEGER)
    return _Demand(weight=[min(size, most) for size in groups.sizes])


def _balanced(groups: _Groups, policy: Policy) -> _Demand:
    """T = k for every class: class-balanced sampling, cRT in Kang et al., ICLR 2020."""
    return _Demand(weight=[_images(groups, policy.get("per_class"), 0)] * len(groups.sizes))


def _power(groups: _Groups, policy: Policy) -> _Demand:
    """T in proportion to n^alpha. Kang et al., ICLR 2020; alpha 0.5: Mahajan et al., ECCV 2018 (square root)."""
    low = _images(groups, policy.get("floor"), 0)
    high = _images(groups, policy.get("ceiling"), MAX_INTEGER)
    if low > high:
        raise PolicyError(f"policy {policy}: floor {low} is above ceiling {high}")
    alpha = Decimal(str(policy.get("alpha")))
    weight = [_raise(size, alpha) for size in groups.sizes]
    return _Demand(weight=weight, total=groups.num_images, low=low, high=[high] * len(weight))


def _raise(size: int, alpha: Decimal) -> int:
    """size^alpha in units of 1e-24, to the nearest."""
    power = DECIMAL.exp(DECIMAL.multiply(alpha, DECIMAL.ln(Decimal(size))))
    return int(DECIMAL.to_integral_value(DECIMAL.multiply(power, _UNIT)))


def _ratio(groups: _Groups, policy: Policy) -> _Demand:
    """T in [low, max_ratio * low], as near to natural as the total allows. Networks tolerate 10:1: Cao et al. 2019.

    Low is the least that reaches the total; then the largest classes are lowered to one level. The ratio is kept
    exactly: it wins over epoch_size, and max_repeat wins over both.
    """
    total = policy.integer("epoch_size") or groups.num_images
    ratio, caps = policy.number("max_ratio"), _caps(groups, policy)
    natural = [ceil(Fraction(size * total, groups.num_images)) for size in groups.sizes]

    def bounds(low: int) -> list[int]:
        return [min(max(low, size), floor(ratio * low)) for size in natural]

    def reaches(low: int) -> bool:
        return total_of(groups.many, [min(*pair) for pair in zip(bounds(low), caps, strict=True)]) >= total

    low = 1 + bisect_left(range(1, total + 1), True, key=reaches)
    if total_of(groups.many, [min(low, cap) for cap in caps]) <= total:
        return _Demand(weight=[1] * len(natural), total=total, low=low, high=bounds(low))
    low = max(1, low - 1)  # a ratio near 1: nothing between low and low + 1, so raise the largest classes instead
    return _Demand(weight=groups.sizes, total=total, low=low, high=[floor(ratio * low)] * len(natural))


def _repeat_factor(groups: _Groups, policy: Policy) -> _Demand:
    """T = n * max(1, sqrt(t / f)), f = n/N: LVIS, Gupta et al., CVPR 2019. (So T = max(n, sqrt(t * N * n)).)"""
    threshold = policy.number("threshold")
    scale = threshold.numerator * groups.num_images * _UNIT**2
    weight = [max(size * _UNIT, isqrt(scale * size // threshold.denominator)) for size in groups.sizes]
    return _Demand(weight=weight, unit=_UNIT)


def _effective_number(groups: _Groups, policy: Policy) -> _Demand:
    """Each image in proportion to (1 - beta) / (1 - beta^n): Cui et al., CVPR 2019. From natural (0) to balanced."""
    beta = Decimal(str(policy.get("beta")))
    return _Demand(weight=[_effective_share(size, beta) for size in groups.sizes], total=groups.num_images)


def _effective_share(size: int, beta: Decimal) -> int:
    """size * (1 - beta) / (1 - beta^size) in units of 1e-24, to the nearest."""
    power = DECIMAL.exp(DECIMAL.multiply(Decimal(size), DECIMAL.ln(beta))) if beta else Decimal(0)
    share = DECIMAL.divide(DECIMAL.multiply(Decimal(size), 1 - beta), DECIMAL.subtract(Decimal(1), power))
    return int(DECIMAL.to_integral_value(DECIMAL.multiply(share, _UNIT)))


def _progressive(groups: _Groups, policy: Policy) -> _Demand:
    """Stage i of E: q = (1 - t) * n/N + t/K, t = i/(E-1): progressively balanced sampling, Kang et al., ICLR 2020."""
    stage, last = policy.integer("stage") or 0, (policy.integer("num_stages") or 1) - 1
    if stage > last:
        raise PolicyError(f"policy {policy}: stages count from 0, the last is {last}")
    weight = [(last - stage) * size * groups.num_classes + stage * groups.num_images for size in groups.sizes]
    return _Demand(weight=weight if last else groups.sizes, total=groups.num_images)


def _explicit(groups: _Groups, policy: Policy) -> _Demand:
    """T from a table; a class that it does not name is not drawn."""
    return _Demand(weight=groups.wishes)


@dataclass(frozen=True, kw_only=True)
class _Rule:
    demand: Callable[[_Groups, Policy], _Demand]
    parameters: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])


_RULES: Mapping[str, _Rule] = {
    "natural": _Rule(demand=_natural),
    "oversample": _Rule(demand=_oversample, parameters={"floor": of.level("max")}),
    "undersample": _Rule(demand=_undersample, parameters={"ceiling": of.level("min"), "frozen": of.flag()}),
    "balanced": _Rule(demand=_balanced, parameters={"per_class": of.level("mean")}),
    "power": _Rule(
        demand=_power,
        parameters={
            "alpha": of.number("from 0 to 1", lambda x: 0 <= x <= 1, "0.5"),
            "floor": of.level(),
            "ceiling": of.level(),
        },
    ),
    "ratio": _Rule(demand=_ratio, parameters={"max_ratio": of.number("of at least 1", lambda x: x >= 1, "10")}),
    "repeat_factor": _Rule(  # 0.001 is the threshold of the LVIS reference configurations
        demand=_repeat_factor,
        parameters={"threshold": of.number("above 0, at most 1", lambda x: 0 < x <= 1, "0.001")},
    ),
    "effective_number": _Rule(
        demand=_effective_number, parameters={"beta": of.number("from 0 to below 1", lambda x: 0 <= x < 1, "0.999")}
    ),
    "progressive": _Rule(
        demand=_progressive,
        parameters={"stage": of.integer(0, required=True), "num_stages": of.integer(1, required=True)},
    ),
    "explicit": _Rule(demand=_explicit, parameters={"targets": of.table()}),
}

NAMES = tuple(_RULES)
"""Every policy, in the order of DESIGN.md."""

DEFAULTS: Mapping[str, Policy] = {
    "natural": parse("natural"),
    "oversampled": parse("oversample:floor=mean,max_repeat=10"),
    "undersampled": parse("undersample:ceiling=10*mean"),
    "balanced": parse("balanced:per_class=mean"),
}
"""The manifests of every build."""


# -- targets -------------------------------------------------------------------------------------------------------


def apply(counts: ArrayLike, policy: Policy, names: Sequence[str] | None = None) -> Targets:
    """Targets of ``policy`` for ``counts`` (``int64[K]``). ``names`` (by class id) are needed by ``explicit`` only.

    Raises PolicyError where no class has an image or a draw, a class passes MAX_TARGET, or floors pass epoch_size.
    """
    available = _checked(counts)
    wish, unmet = _wishes(available, policy, names)
    groups = _group(available, wish)
    asked, ideal, unit = _settle(groups, _RULES[policy.name].demand(groups, policy), policy)
    target = np.zeros_like(available)
    target[groups.ids] = largest_remainder(ideal, unit, groups.many, groups.member)
    if not target.any():
        raise PolicyError(f"policy {policy}: no class is drawn; ask for at least one draw of a class that has images")
    pool = np.minimum(available, target) if policy.get("frozen") else available.copy()
    for array in (available, pool, target):
        array.setflags(write=False)
    return Targets(available=available, pool=pool, target=target, asked=asked + unmet)


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
        raise PolicyError(f"none of the {array.size} classes has an image in this split: nothing can be drawn")
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
        raise PolicyError(
            f"policy explicit: {len(unknown)} names are no class of this snapshot: {', '.join(unknown[:5])}"
            f"{_nearest(unknown[0], ids)}"
        )
    for name, target in table:
        wish[ids[name]] = target
    return wish, int(wish[counts == 0].sum())


def _settle(groups: _Groups, demand: _Demand, policy: Policy) -> tuple[int, list[int], int]:
    """The total that was asked, and the exact target of each group as (numerators, denominator)."""
    caps = _caps(groups, policy)
    total = policy.integer("epoch_size") or demand.total
    if total is None:
        asked = round(Fraction(total_of(groups.many, demand.weight), demand.unit))
        ideal = [min(weight, cap * demand.unit) for weight, cap in zip(demand.weight, caps, strict=True)]
        return asked, *_bounded(ideal, demand.unit, policy)
    low = [min(demand.low, cap) for cap in caps]
    above = demand.high or [MAX_INTEGER if weight else 0 for weight in demand.weight]
    high = [min(bound, cap) for bound, cap in zip(above, caps, strict=True)]
    least = total_of(groups.many, low)
    if least > total and policy.get("epoch_size") is not None:
        raise PolicyError(f"policy {policy}: a floor of {demand.low} takes {least} draws; raise epoch_size or lower it")
    total = max(total, least)
    return total, *_bounded(*fill(demand.weight, groups.many, low, high, total), policy)


def _bounded(ideal: list[int], unit: int, policy: Policy) -> tuple[list[int], int]:
    if (largest := ceil(Fraction(max(ideal), unit))) > MAX_TARGET:
        raise PolicyError(f"policy {policy}: {largest} draws of one class; at most {MAX_TARGET} are possible")
    return ideal, unit
