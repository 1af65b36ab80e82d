"""Exact apportionment: real-valued wishes of classes -> integers with the asked sum.

Comes in: groups of alike classes as Python integers (products pass 2^63), ``many[g]`` classes in group g. Goes out:
exact fractions (``fill``), then whole numbers (``largest_remainder``). Guarantees: integers only, so the same on every
platform.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def total_of(many: Sequence[int], values: Sequence[int]) -> int:
    """Sum over classes of a value per group."""
    return sum(count * value for count, value in zip(many, values, strict=True))


def fill(
    weight: Sequence[int], many: Sequence[int], low: Sequence[int], high: Sequence[int], total: int
) -> tuple[list[int], int]:
    """The x_g = clip(s * weight_g, low_g, high_g) whose sum over classes is ``total``: (numerators, denominator).

    Every high, if those sum to less. Needs low <= high and the sum of lows <= total. Each round tries the s that the
    groups not yet settled would need; the side to which clipping then pushes the sum tells which clips are final.
    """
    settled: dict[int, int] = {}
    while True:
        free = [g for g in range(len(weight)) if g not in settled]
        rest = total - sum(many[g] * value for g, value in settled.items())
        mass = sum(many[g] * weight[g] for g in free) or 1
        under = {g: low[g] for g in free if rest * weight[g] < low[g] * mass}
        over = {g: high[g] for g in free if rest * weight[g] > high[g] * mass}
        if not under and not over:
            return [settled[g] * mass if g in settled else rest * weight[g] for g in range(len(weight))], mass
        excess = sum(many[g] * (bound * mass - rest * weight[g]) for g, bound in (under | over).items())
        settled |= under if excess >= 0 else {}
        settled |= over if excess <= 0 else {}


def largest_remainder(
    ideal: Sequence[int], unit: int, many: Sequence[int], member: NDArray[np.intp]
) -> NDArray[np.int64]:
    """Whole numbers for ``ideal[member] / unit`` whose sum is the ideal sum, rounded half to even.

    Each gets its whole part; the largest remainders get one more, ties in the order of ``member``.
    """
    whole, rest = [value // unit for value in ideal], [value % unit for value in ideal]
    left = round(Fraction(total_of(many, ideal), unit)) - total_of(many, whole)
    rank = {value: place for place, value in enumerate(sorted(set(rest), reverse=True))}
    order = np.argsort(np.array([rank[value] for value in rest])[member], kind="stable")
    result = np.array(whole, dtype=np.int64)[member]
    result[order[:left]] += 1
    return result
