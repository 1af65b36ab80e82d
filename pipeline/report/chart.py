"""The class curve: images per class on a logarithmic axis, largest class first, with the targets of every manifest.

Comes in: ``int64[K]`` counts and targets in the order of rank. Goes out: paths and marks in pixels; the template draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.ingest.stats import FEW_BELOW, MANY_ABOVE

WIDTH, HEIGHT = 960, 360
LEFT, RIGHT, TOP, BASE = 64, 936, 30, 318
ZERO_BAND = 16
"""Pixels between "none" and one image: a logarithmic axis has no zero, and a class that is never drawn must be seen."""

DASH = 9

MAX_COLUMNS = 720
"""Beyond this many classes a column stands for several and shows their median."""

MAX_LINEAR = 200
"""Beyond this many classes ranks stand at their square root: a long tail would squeeze its head into a line."""

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A tick of an axis, or the name of a zone."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """The targets of one manifest."""

    name: str
    path: str
    dashes: str  # each line is drawn whole and then once more in dashes of its own phase ...
    phase: int  # ... so lines that lie on each other show all their colours


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Everything that the template needs to draw."""

    area: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Mark, ...]
    y_ticks: tuple[Mark, ...]
    zones: tuple[Mark, ...]  # names, at the middle of their zone
    borders: tuple[float, ...]  # between zones
    power: float  # of the axis of ranks: 1 or 1/2
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    base: int = BASE


def class_curve(counts: IntArray, targets: Mapping[str, IntArray]) -> Chart:
    """``counts`` (training images, descending) as an area, ``targets`` (draws per epoch, same order) as lines."""
    top = max([10, *(int(values.max(initial=0)) for values in (counts, *targets.values()))])
    area = _path(counts, top)
    zones, borders = _zones(counts)
    return Chart(
        area=f"{area}V{BASE}H{LEFT}Z" if area else "",
        lines=tuple(
            Line(name=name, path=_path(values, top), dashes=f"{DASH} {DASH * (len(targets) - 1)}", phase=-DASH * i)
            for i, (name, values) in enumerate(targets.items())
        ),
        x_ticks=_x_ticks(len(counts)),
        y_ticks=(Mark(at=BASE, label="none"), *_y_ticks(top)),
        zones=zones,
        borders=borders,
        power=_power(len(counts)),
    )


def _height(value: float, top: int) -> float:
    if value <= 0:
        return BASE
    floor = BASE - ZERO_BAND
    return floor - (floor - TOP) * math.log(max(value, 1)) / math.log(top)


def _path(values: IntArray, top: int) -> str:
    """Steps: one level per class or column, equal neighbours drawn as one."""
    num_classes = len(values)
    parts: list[str] = []
    last = ""
    for start, stop in pairwise(_edges(num_classes)):
        level = f"{_height(float(np.median(values[start:stop])), top):.1f}"
        if level != last:
            parts.append(f"H{_place(start, num_classes):.1f}V{level}" if parts else f"M{LEFT} {level}")
            last = level
    return "".join([*parts, f"H{RIGHT}"]) if parts else ""


def _edges(num_classes: int) -> list[int]:
    """Where columns begin and end: a class each, or as wide as a pixel or two."""
    if num_classes <= MAX_COLUMNS:
        return list(range(num_classes + 1))
    share = (np.arange(MAX_COLUMNS + 1) / MAX_COLUMNS) ** (1 / _power(num_classes))
    return np.unique(np.round(share * num_classes).astype(np.int64)).tolist()


def _power(num_classes: int) -> float:
    return 0.5 if num_classes > MAX_LINEAR else 1.0


def _place(rank: float, num_classes: int) -> float:
    """Pixels of a rank, counted from 0; a class owns [rank, rank + 1)."""
    return LEFT + (RIGHT - LEFT) * (rank / max(num_classes, 1)) ** _power(num_classes)


def _x_ticks(num_classes: int) -> tuple[Mark, ...]:
    """1, round numbers far enough from each other, and the last class."""
    step = max(1, _round(num_classes / (10 if _power(num_classes) == 1 else 5)))
    wanted = [1, *([step // 10, step // 2] if step >= 20 else []), *range(step, num_classes, step), num_classes]
    marks: list[Mark] = []
    for rank in [rank for rank in wanted if 1 <= rank <= num_classes]:
        at = round(_place(rank - 0.5, num_classes), 1)
        if marks and at - marks[-1].at < 40:
            if rank < num_classes:
                continue
            marks.pop()
        marks.append(Mark(at=at, label=f"{rank:,}"))
    return tuple(marks)


def _round(value: float) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is at most ``value``."""
    scale = 10 ** math.floor(math.log10(max(value, 1)))
    return int(max(factor * scale for factor in (1, 2, 5) if factor * scale <= max(value, 1)))


def _y_ticks(top: int) -> tuple[Mark, ...]:
    decades = [10**exponent for exponent in range(int(math.log10(top)) + 1)]
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    values = [decade * factor for decade in decades for factor in factors if decade * factor <= top]
    return tuple(Mark(at=round(_height(value, top), 1), label=f"{value:,}") for value in values)


def _zones(counts: IntArray) -> tuple[tuple[Mark, ...], tuple[float, ...]]:
    """Many-, medium- and few-shot classes, as far as they are there and wide enough for their name."""
    num_many, num_few = int((counts > MANY_ABOVE).sum()), int((counts < FEW_BELOW).sum())
    num_medium = len(counts) - num_many - num_few
    marks: list[Mark] = []
    borders: list[float] = []
    start = 0
    for name, count in (("many-shot", num_many), ("medium-shot", num_medium), ("few-shot", num_few)):
        left, right = (_place(rank, len(counts)) for rank in (start, start + count))
        if right - left > 11 * len(name):
            marks.append(Mark(at=round((left + right) / 2, 1), label=name))
        start += count
        if 0 < start < len(counts) and count:
            borders.append(round(right, 1))
    return tuple(marks), tuple(borders)
