"""200 long tails, every policy: its formula, total, cap and monotonicity, against tests/reference_policy.py."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache, lru_cache
from math import ceil
from typing import Any

import numpy as np
import pytest
import reference_policy as reference
from numpy.typing import NDArray

from pipeline.plan.policy import NAMES, Targets, apply, parse

NUM_VECTORS = 200
LARGE_EVERY = 7
NUM_LARGE = 22
"""Every seventh, until there are so many, has 1,000 classes or more: prime to the turns of shapes and options."""
IntArray = NDArray[np.int64]


def long_tail(seed: int) -> IntArray:
    """1 to 5,000 classes: Zipf, Pareto, exponential or nearly equal, with zeros and singletons among them."""
    rng = np.random.default_rng((51, seed))
    large = seed % LARGE_EVERY == 0 and seed < NUM_LARGE * LARGE_EVERY
    num_classes = int(np.exp(rng.uniform(np.log(1000), np.log(5000)) if large else rng.uniform(0, np.log(120))))
    num_classes = {0: 5000, 14 * LARGE_EVERY: 5000}.get(seed, num_classes)
    rank = np.arange(1, num_classes + 1)
    shape = [
        lambda: 30_000 / rank ** rng.uniform(0.6, 1.6),
        lambda: rng.pareto(1.1, num_classes) * 3 + 1,
        lambda: 3_000 * 0.01 ** (rank / num_classes),
        lambda: rng.integers(40, 60, num_classes).astype(float),
    ][seed % 4]()
    counts = np.clip(shape, 1, 40_000).astype(np.int64)
    counts[rng.random(num_classes) < rng.choice([0.1, 0.6] if large else [0, 0.1, 0.6])] = 1
    counts[rng.random(num_classes) < rng.choice([0.02, 0.2] if large else [0, 0.2])] = 0
    counts[rng.integers(num_classes)] = max(2, int(counts.max()))
    return rng.permutation(counts)


VECTORS = [long_tail(seed) for seed in range(NUM_VECTORS)]


def test_the_vectors_are_what_they_are_made_for() -> None:
    assert max(map(len, VECTORS)) == 5000
    assert sum(bool((counts == 0).any()) for counts in VECTORS) > 50
    assert sum(int((counts == 1).sum()) > len(counts) / 2 for counts in VECTORS) > 20
    assert min(map(len, VECTORS)) == 1
    large = {seed: counts for seed, counts in enumerate(VECTORS) if 1000 <= len(counts) <= 5000}
    assert len(large) >= 20
    assert all((counts == 0).any() and (counts == 1).any() for counts in large.values())
    assert {options_of(seed)[0] for seed in large} == {None, "1", "10", "2.5"}
    assert {options_of(seed)[1] is None for seed in large} == {True, False}
    assert {seed % 4 for seed in large} == {0, 1, 2, 3}  # of every shape


# -- what each policy's formula says, from the reference


Counts = tuple[int, ...]


@lru_cache(8)
def mean_of(counts: Counts) -> Fraction:
    return Fraction(sum(counts), sum(n > 0 for n in counts))


@lru_cache(8)
def quantile_of(counts: Counts, share: Fraction) -> int:
    sizes = sorted(n for n in counts if n)
    return sizes[max(1, ceil(share * len(sizes))) - 1]


Expect = Callable[[Counts, str | None, int | None], list[int]]


def wishing(weigh: Callable[[Counts], Callable[[int], Fraction]], *, sums: bool = False) -> Expect:
    """A formula per class; ``sums``: in proportion to it, with the sum of the counts in all."""

    def expect(counts: Counts, max_repeat: str | None, epoch_size: int | None) -> list[int]:
        total = epoch_size or (sum(counts) if sums else None)
        return reference.targets(counts, weigh(counts), total=total, max_repeat=max_repeat)

    return expect


def whole(value: Fraction) -> int:
    return max(1, round(value))


def clipped_root(counts: Counts, max_repeat: str | None, epoch_size: int | None) -> list[int]:
    total, high = epoch_size or sum(counts), whole(5 * mean_of(counts))
    return reference.targets(
        counts, lambda n: reference.power_of(n, "0.5"), total=total, bounds=(2, high), max_repeat=max_repeat
    )


def progress(counts: Counts) -> Callable[[int], Fraction]:
    share, num_images, num_classes = Fraction(2, 4), sum(counts), sum(n > 0 for n in counts)
    return lambda n: (1 - share) * Fraction(n, num_images) + share * Fraction(1, num_classes)


FORMULAS: dict[str, Expect] = {
    "natural": wishing(lambda counts: lambda n: Fraction(n)),
    "oversample": wishing(lambda counts: lambda n: Fraction(max(counts))),
    "oversample:floor=mean": wishing(lambda counts: lambda n: Fraction(max(n, whole(mean_of(counts))))),
    "oversample:floor=0.3*max": wishing(
        lambda counts: lambda n: Fraction(max(n, whole(Fraction(3 * max(counts), 10))))
    ),
    "oversample:only=minority": wishing(
        lambda counts: lambda n: Fraction(max(counts) if n == quantile_of(counts, Fraction(0)) else n)
    ),
    "undersample": wishing(lambda counts: lambda n: Fraction(quantile_of(counts, Fraction(0)))),
    "undersample:ceiling=q0.8": wishing(lambda counts: lambda n: Fraction(min(n, quantile_of(counts, Fraction(4, 5))))),
    "undersample:ceiling=min/0.3": wishing(
        lambda counts: lambda n: Fraction(min(n, whole(Fraction(10 * quantile_of(counts, Fraction(0)), 3))))
    ),
    "undersample:only=majority,ceiling=7": wishing(
        lambda counts: lambda n: Fraction(min(n, 7) if n == max(counts) else n)
    ),
    "clip:floor=5,ceiling=10*mean": wishing(
        lambda counts: lambda n: Fraction(min(max(n, 5), max(5, whole(10 * mean_of(counts)))))
    ),
    "balanced": wishing(lambda counts: lambda n: Fraction(whole(mean_of(counts)))),
    "balanced:per_class=13": wishing(lambda counts: lambda n: Fraction(13)),
    "power": wishing(lambda counts: lambda n: reference.power_of(n, "0.5"), sums=True),
    "power:alpha=0": wishing(lambda counts: lambda n: Fraction(1), sums=True),
    "power:alpha=0.7": wishing(lambda counts: lambda n: reference.power_of(n, "0.7"), sums=True),
    "power:floor=2,ceiling=5*mean": clipped_root,
    "repeat_factor:threshold=0.01": wishing(lambda counts: lambda n: reference.repeat_factor(n, sum(counts), "0.01")),
    "effective_number:beta=0.99": wishing(lambda counts: lambda n: reference.effective_share(n, "0.99"), sums=True),
    "progressive:stage=2,num_stages=5": wishing(progress, sums=True),
}


def with_options(text: str, **options: Any) -> str:
    given = ",".join(f"{key}={value}" for key, value in options.items() if value is not None)
    return text if not given else f"{text}{',' if ':' in text else ':'}{given}"


def options_of(seed: int) -> tuple[str | None, int | None]:
    """max_repeat and epoch_size: neither, one, both; in turn."""
    rng = np.random.default_rng((52, seed))
    repeat = [None, "1", "10", "2.5"][seed % 4]
    size = None if seed % 3 == 0 else 2 * len(VECTORS[seed]) + int(VECTORS[seed].sum() * rng.uniform(0.2, 4))
    return repeat, size


@cache
def outcomes(text: str) -> list[tuple[IntArray, Targets, str | None, int | None]]:
    rows: list[tuple[IntArray, Targets, str | None, int | None]] = []
    for seed, vector in enumerate(VECTORS):
        repeat, size = options_of(seed)
        policy = parse(with_options(text, max_repeat=repeat, epoch_size=size))
        rows.append((vector, apply(vector, policy), repeat, size))
    return rows


@pytest.mark.parametrize("text", FORMULAS)
def test_every_policy_meets_its_formula_on_200_tails(text: str) -> None:
    for seed, (counts, targets, repeat, size) in enumerate(outcomes(text)):
        assert targets.target.tolist() == FORMULAS[text](tuple(counts.tolist()), repeat, size), f"tail {seed}"


def test_every_policy_has_a_formula_here_or_laws_below() -> None:
    assert {parse(text).name for text in FORMULAS} | {"ratio", "explicit"} == set(NAMES)


# -- total, cap, monotonicity: of all policies, ``ratio`` too


EVERY = [*FORMULAS, "ratio:max_ratio=10", "ratio:max_ratio=2.5"]


@pytest.mark.parametrize("text", EVERY)
def test_total_cap_and_order_on_200_tails(text: str) -> None:
    for counts, targets, repeat, size in outcomes(text):
        cap = np.full(len(counts), 2**62)
        if repeat is not None:
            most = {n: int(Fraction(repeat) * n) for n in set(counts.tolist())}
            cap = np.array([most[n] for n in counts.tolist()])
        assert np.all(targets.target <= cap)
        assert not targets.target[counts == 0].any()
        assert targets.shortfall == targets.asked - targets.num_draws >= 0
        if size is not None and "ceiling=5*mean" not in text and "ratio" not in text:
            assert targets.num_draws == min(size, sum(cap[counts > 0].tolist()))
        if "only" not in text:
            order = np.lexsort((-np.arange(len(counts)), counts))
            assert int(np.diff(targets.target[order]).min(initial=0)) >= -1
        for group in np.unique(counts[counts > 0])[:20]:
            assert np.ptp(targets.target[counts == group]) <= 1


@pytest.mark.parametrize("ratio", ["1", "2.5", "10", "100"])
def test_ratio_keeps_its_ratio_with_the_least_repetition_on_200_tails(ratio: str) -> None:
    for seed, counts in enumerate(VECTORS):
        size = options_of(seed)[1]
        total = size or int(counts.sum())
        target = apply(counts, parse(with_options(f"ratio:max_ratio={ratio}", epoch_size=size))).target
        present = counts[counts > 0].tolist()
        drawn = target[counts > 0]
        low, natural = int(drawn.min()), [ceil(Fraction(n * total, sum(present))) for n in present]
        assert drawn.max() <= Fraction(ratio) * low
        assert abs(int(target.sum()) - total) <= (len(present) if ratio == "1" else 0)
        if low > min(natural) and Fraction(ratio) >= 2:  # lifted: with a smaller floor, the total is out of reach
            most = [min(max(low - 1, n), int(Fraction(ratio) * (low - 1))) for n in natural]
            assert sum(most) < total, f"tail {seed}"


def test_explicit_is_its_table_and_others_are_natural_or_out() -> None:
    for seed, counts in enumerate(VECTORS):
        rng = np.random.default_rng((53, seed))
        names = [f"c{i}" for i in range(len(counts))]
        asked = {names[i]: int(rng.integers(1, 500)) for i in rng.permutation(np.flatnonzero(counts))[:40]}
        for others, base in (("none", np.zeros_like(counts)), ("natural", counts)):
            policy = parse({"policy": "explicit", "targets": asked, "others": others})
            expected = base.copy()
            expected[[names.index(name) for name in asked]] = list(asked.values())
            assert np.array_equal(apply(counts, policy, names).target, expected)


@pytest.mark.parametrize("text", EVERY)
def test_what_max_repeat_withholds_is_told_per_class(text: str) -> None:
    for counts, targets, repeat, size in outcomes(text):
        if repeat is None:
            assert not targets.withheld.any()
            continue
        free = apply(counts, parse(with_options(text, epoch_size=size)))
        assert np.array_equal(targets.wished, free.target)
        assert np.array_equal(targets.withheld, np.maximum(free.target - targets.target, 0))
        if (
            "ratio" not in text
            and size is None
            and parse(text).name not in ("power", "progressive", "effective_number")
        ):
            assert abs(int(targets.withheld.sum()) - targets.shortfall) <= len(counts) / 2  # each is rounded
