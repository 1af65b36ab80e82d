"""The parameters of a policy: many spellings in, one canonical form out.

Comes in: a value from a command line, a YAML or JSON file, or Python. Goes out: an integer, a decimal as text (no float
ever reaches a file), a level as text, or a sorted table. Guarantees: reading a canonical value gives it back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import cast

import numpy as np

Value = int | str | tuple[tuple[str, int], ...]

DECIMAL = Context(prec=60, rounding=ROUND_HALF_EVEN)
"""Decimal arithmetic whose exp and ln are correctly rounded: the same on every platform, unlike any libm's pow."""

MAX_INTEGER = 2**62


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """``read`` raises ValueError where a value is not what ``expects`` says; None where it says nothing."""

    read: Callable[[object], Value | None]
    expects: str
    default: Value | None = None
    required: bool = False


def integer(low: int, *, required: bool = False) -> Parameter:
    """An integer in any spelling: 100000, 1e5, "100_000"."""

    def read(value: object) -> int:
        number = _decimal(value)
        if number != int(number) or not low <= number < MAX_INTEGER:
            raise ValueError(value)
        return int(number)

    return Parameter(read=read, expects=f"an integer of at least {low}", required=required)


def number(expects: str, valid: Callable[[Decimal], bool], default: str | None = None) -> Parameter:
    """A decimal number, kept as text: 0.5, 5e-1 and "0.50" are all "0.5"."""

    def read(value: object) -> str:
        read = _decimal(value)
        if not valid(read):
            raise ValueError(value)
        return _text(read)

    return Parameter(read=read, expects=f"a number {expects}", default=default)


def level(default: str | None = None) -> Parameter:
    """A number of images, or a statistic of the counts: ``mean``, ``q0.9``, ``10*mean``."""
    expects = (
        "a number of images, min, max, mean, median, a quantile such as q0.9, or a multiple of one such as 10*mean or "
        "min/0.3"
    )
    return Parameter(read=_read_level, expects=expects, default=default)


def flag() -> Parameter:
    """True or false, kept as 1 or 0; false by default."""
    return Parameter(read=_read_flag, expects="true or false", default=0)


def choice(default: str, *others: str) -> Parameter:
    """One of some words. The default is what an absent parameter means, and is kept as absent: one form for each."""

    def read(value: object) -> str | None:
        word = re.sub(r"[ _]+", "-", str(value).strip().lower())
        if word not in (default, *others):
            raise ValueError(value)
        return None if word == default else word

    return Parameter(read=read, expects=f"one of {', '.join((default, *others))}")


def table() -> Parameter:
    """Class name -> number of draws, sorted by name; required."""
    return Parameter(read=_read_table, expects="a table from class name to a number of draws", required=True)


def _decimal(value: object) -> Decimal:
    if not isinstance(value, int | float | str | Decimal | np.integer):
        raise ValueError(value)
    try:
        number = Decimal(str(value).strip())  # of True, too, it makes no number
    except InvalidOperation as error:
        raise ValueError(value) from error
    _, digits, exponent = number.as_tuple()
    if not isinstance(exponent, int) or len(digits) > 40 or not -40 <= exponent <= 20:  # also refuses NaN and infinity
        raise ValueError(value)
    return number


def _text(number: Decimal) -> str:
    return format(DECIMAL.normalize(number), "f") if number else "0"


def _read_level(value: object) -> Value:
    match = re.fullmatch(r"(?:([^*/]+)\*)?(?:(min|max|mean|median)|q([^*/]+))(?:/([^*/]+))?", str(value).strip())
    if match is None:
        return cast(int, integer(1).read(value))
    factor, share, divisor = (_decimal(match[place] or missing) for place, missing in ((1, "1"), (3, "0.5"), (4, "1")))
    if factor <= 0 or divisor <= 0 or not 0 <= share <= 1:
        raise ValueError(value)
    name = match[2] if match[2] in ("min", "max", "mean") else f"q{_text(share)}"
    above, below = ("" if factor == 1 else f"{_text(factor)}*"), ("" if divisor == 1 else f"/{_text(divisor)}")
    return f"{above}{name}{below}"


def _read_flag(value: object) -> Value:
    known = {"true": 1, "false": 0, "1": 1, "0": 0}
    if (text := str(value).strip().lower()) not in known:
        raise ValueError(value)
    return known[text]


def _read_table(value: object) -> Value:
    rows = _rows(value)
    read = integer(0).read
    found = {str(name): cast(int, read(target)) for name, target in rows}
    if not rows or len(found) < len(rows):
        raise ValueError(value)
    return tuple(sorted(found.items()))


def _rows(value: object) -> tuple[tuple[object, object], ...]:
    if isinstance(value, Mapping):
        return tuple(cast("Mapping[object, object]", value).items())
    if isinstance(value, tuple):  # canonical, or the pairs of a JSON object
        return cast("tuple[tuple[object, object], ...]", value)
    raise ValueError(value)
