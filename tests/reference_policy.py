"""Policies by their formulas alone, in fractions and decimals: what tests hold the real ones against.

Nothing here is shared with pipeline.plan: no fill by rounds, no integers in units of 1e-24. A formula is worked out
once for each number of images, and rounded class by class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from fractions import Fraction

EXACT = Context(prec=80)
BySize = dict[int, Fraction]
"""What a formula says of a class with so many images."""
Bounds = dict[int, Fraction | None]


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


def scaled(many: Counter[int], weight: BySize, total: int, low: BySize, high: Bounds) -> BySize:
    """x = clip(s * weight, low, high) whose sum is ``total``, or every high: by walking the corners of that sum."""
    sizes = [n for n in many if weight[n]]
    corners = sorted(
        {bound / weight[n] for n in sizes for bound in (low[n], high[n]) if bound is not None} | {Fraction(0)}
    )

    def value(s: Fraction, n: int) -> Fraction:
        x, top = max(s * weight[n], low[n]), high[n]
        return x if top is None else min(x, top)

    def total_at(s: Fraction) -> Fraction:
        return sum((many[n] * value(s, n) for n in sizes), Fraction(0))

    first, last = 0, len(corners)
    while first < last:  # the first corner at which the sum is enough
        middle = (first + last) // 2
        first, last = (first, middle) if total_at(corners[middle]) >= total else (middle + 1, last)
    if first == 0:
        scale = corners[0]
    else:
        scale = left = corners[first - 1]
        moving = sum(many[n] * weight[n] for n in sizes if _moves(left * weight[n], low[n], high[n]))
        scale += (total - total_at(left)) / moving if moving else 0
    return {n: value(scale, n) if weight[n] else Fraction(0) for n in many}


def _moves(x: Fraction, low: Fraction, high: Fraction | None) -> bool:
    return x >= low and (high is None or x < high)


def capped(wish: BySize, max_repeat: Fraction | None) -> BySize:
    if max_repeat is None:
        return wish
    return {n: min(value, Fraction(int(max_repeat * n))) for n, value in wish.items()}


def rounded(counts: Sequence[int], many: Counter[int], ideal: BySize) -> list[int]:
    """Largest remainder: whole parts, then one more for the largest rests, ties to the smaller class id."""
    whole = {n: int(value) for n, value in ideal.items()}
    rest = {n: ideal[n] - whole[n] for n in ideal}
    place = {value: i for i, value in enumerate(sorted(set(rest.values()), reverse=True))}
    turn = {n: place[rest[n]] for n in rest}
    left = round(sum((many[n] * rest[n] for n in many), Fraction(0)))
    first = set(sorted(range(len(counts)), key=lambda i: (turn[counts[i]], i))[:left])
    return [whole[n] + (i in first) for i, n in enumerate(counts)]


def targets(
    counts: Sequence[int],
    weigh: Callable[[int], Fraction],
    *,
    total: int | None = None,
    bounds: tuple[int, int | None] = (0, None),
    max_repeat: str | None = None,
) -> list[int]:
    """Without a total, what is wished, capped; with one, wishes scaled to it between bounds and caps; rounded."""
    many = Counter(counts)
    wish = {n: weigh(n) if n else Fraction(0) for n in many}
    repeat = None if max_repeat is None else Fraction(max_repeat)
    if total is None:
        return rounded(counts, many, capped(wish, repeat))
    high: Bounds = {n: None if bounds[1] is None else Fraction(bounds[1]) for n in many}
    if repeat is not None:
        caps = {n: Fraction(int(repeat * n)) for n in many}
        high = {n: caps[n] if top is None else min(top, caps[n]) for n, top in high.items()}
    low = {n: Fraction(bounds[0]) if top is None else min(Fraction(bounds[0]), top) for n, top in high.items()}
    least = sum(many[n] * low[n] for n in many if n)
    return rounded(counts, many, scaled(many, wish, max(total, int(least)), low, high))
