"""Policies by their formulas alone, class by class, in fractions and decimals: what tests hold the real ones against.

Nothing here is shared with pipeline.plan: no grouping, no fill by rounds, no integers in units of 1e-24.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from fractions import Fraction

EXACT = Context(prec=80)
Wish = list[Fraction]


def to_fraction(value: Decimal) -> Fraction:
    """To 30 decimals, so that the root of a perfect square is what it is."""
    return Fraction(value.quantize(Decimal(10) ** -30, context=EXACT))


def power_of(n: int, alpha: str) -> Fraction:
    return to_fraction(EXACT.power(Decimal(n), Decimal(alpha))) if n else Fraction(0)


def effective_share(n: int, beta: str) -> Fraction:
    """n images of (1 - beta) / (1 - beta^n) each."""
    rest, below = EXACT.subtract(Decimal(1), Decimal(beta)), EXACT.subtract(Decimal(1), EXACT.power(Decimal(beta), n))
    return to_fraction(EXACT.divide(EXACT.multiply(Decimal(n), rest), below))


def repeat_factor(n: int, total: int, threshold: str) -> Fraction:
    """n * max(1, sqrt(t / f)), f = n / total."""
    if not n:
        return Fraction(0)
    frequency = EXACT.divide(Decimal(n), Decimal(total))
    root = EXACT.sqrt(EXACT.divide(Decimal(threshold), frequency))
    return n * max(Fraction(1), to_fraction(root))


def scaled(weight: Wish, total: int, low: Sequence[Fraction], high: Sequence[Fraction | None]) -> Wish:
    """x = clip(s * weight, low, high) whose sum is ``total``, or every high: by walking the corners of that sum."""
    alike = Counter(kind for kind in zip(weight, low, high, strict=True) if kind[0])
    corners = sorted({bound / w for w, *bounds in alike for bound in bounds if bound is not None} | {Fraction(0)})

    def value(s: Fraction, w: Fraction, lo: Fraction, hi: Fraction | None) -> Fraction:
        x = max(s * w, lo)
        return x if hi is None else min(x, hi)

    def total_at(s: Fraction) -> Fraction:
        return sum((many * value(s, *kind) for kind, many in alike.items()), Fraction(0))

    first, last = 0, len(corners)
    while first < last:  # the first corner at which the sum is enough
        middle = (first + last) // 2
        first, last = (first, middle) if total_at(corners[middle]) >= total else (middle + 1, last)
    if first == 0:
        scale = corners[0]
    else:
        scale = left = corners[first - 1]
        moving = sum(m * w for (w, lo, hi), m in alike.items() if left * w >= lo and (hi is None or left * w < hi))
        scale += (total - total_at(left)) / moving if moving else 0
    found = {kind: value(scale, *kind) for kind in alike}
    return [found.get(kind, Fraction(0)) for kind in zip(weight, low, high, strict=True)]


def capped(wish: Wish, counts: Sequence[int], max_repeat: Fraction | None) -> Wish:
    if max_repeat is None:
        return wish
    return [min(value, Fraction(int(max_repeat * n))) for value, n in zip(wish, counts, strict=True)]


def rounded(ideal: Wish) -> list[int]:
    """Largest remainder: whole parts, then one more for the largest rests, ties to the smaller class id."""
    alike = Counter(ideal)
    whole = {value: int(value) for value in alike}
    rests = sorted({value - whole[value] for value in alike}, reverse=True)
    place = {value: rests.index(value - whole[value]) for value in alike}
    left = round(sum(many * value for value, many in alike.items())) - sum(many * whole[v] for v, many in alike.items())
    first = set(sorted(range(len(ideal)), key=lambda i: (place[ideal[i]], i))[:left])
    return [whole[value] + (i in first) for i, value in enumerate(ideal)]


def targets(
    counts: Sequence[int],
    weigh: Callable[[int], Fraction],
    *,
    total: int | None = None,
    bounds: tuple[int, int | None] = (0, None),
    max_repeat: str | None = None,
) -> list[int]:
    """Without a total, what is wished, capped; with one, wishes scaled to it between bounds and caps; rounded."""
    memo = {n: weigh(n) if n else Fraction(0) for n in set(counts)}
    wish, repeat = [memo[n] for n in counts], None if max_repeat is None else Fraction(max_repeat)
    if total is None:
        return rounded(capped(wish, counts, repeat))
    high: list[Fraction | None] = [None if bounds[1] is None else Fraction(bounds[1])] * len(counts)
    if repeat is not None:
        high = [
            Fraction(int(repeat * n)) if top is None else min(top, Fraction(int(repeat * n)))
            for n, top in zip(counts, high, strict=True)
        ]
    low = [Fraction(bounds[0]) if top is None else min(Fraction(bounds[0]), top) for top in high]
    least = sum(low[i] for i, n in enumerate(counts) if n)
    return rounded(scaled(wish, max(total, int(least)), low, high))
