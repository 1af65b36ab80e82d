"""The class curve: images per class on a logarithmic axis, largest class first, with the targets of every manifest.

Comes in: ``int64[K]`` counts and targets in the order of rank. Goes out: paths and marks in pixels; the template draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.ingest.stats import FEW_BELOW, MANY_ABOVE

WIDTH, HEIGHT = 960, 360
LEFT, RIGHT, TOP, BASE = 64, 948, 30, 318
ZERO_BAND = 16
"""Pixels between "none" and one image: a logarithmic axis has no zero, and a class that is never drawn must be seen."""

MAX_COLUMNS = 720
"""Beyond this many classes a column stands for several and shows their median."""

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
    width: float  # earlier lines are wider, so that they are seen where later ones cover them


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Everything that the template needs to draw."""

    area: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Mark, ...]
    y_ticks: tuple[Mark, ...]
    zones: tuple[Mark, ...]  # names, at the middle of their zone
    borders: tuple[float, ...]  # between zones
    num_classes: int
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
            Line(name=name, path=_path(values, top), width=2 + 1.5 * (len(targets) - 1 - i))
            for i, (name, values) in enumerate(targets.items())
        ),
        x_ticks=_x_ticks(len(counts)),
        y_ticks=(Mark(at=BASE, label="none"), *_y_ticks(top)),
        zones=zones,
        borders=borders,
        num_classes=len(counts),
    )


def _height(value: float, top: int) -> float:
    if value <= 0:
        return BASE
    floor = BASE - ZERO_BAND
    return floor - (floor - TOP) * math.log(max(value, 1)) / math.log(top)


def _path(values: IntArray, top: int) -> str:
    """Steps: one level per class or column, equal neighbours drawn as one."""
    levels = [f"{_height(value, top):.1f}" for value in _columns(values)]
    if not levels:
        return ""
    width = (RIGHT - LEFT) / len(levels)
    parts = [f"M{LEFT} {levels[0]}"]
    for i in range(1, len(levels)):
        if levels[i] != levels[i - 1]:
            parts.append(f"H{LEFT + i * width:.1f}V{levels[i]}")
    return "".join([*parts, f"H{RIGHT}"])


def _columns(values: IntArray) -> list[float]:
    if len(values) <= MAX_COLUMNS:
        return values.tolist()
    return [float(np.median(part)) for part in np.array_split(values, MAX_COLUMNS)]


def _x_ticks(num_classes: int) -> tuple[Mark, ...]:
    step = max(1, _round(num_classes / 6))
    ranks = [1, *range(step, num_classes + 1, step)] if step > 1 else range(1, num_classes + 1)
    width = (RIGHT - LEFT) / max(num_classes, 1)
    return tuple(Mark(at=round(LEFT + (rank - 0.5) * width, 1), label=f"{rank:,}") for rank in ranks)


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
    width = (RIGHT - LEFT) / max(len(counts), 1)
    marks: list[Mark] = []
    borders: list[float] = []
    start = 0
    for name, count in (("many-shot", num_many), ("medium-shot", num_medium), ("few-shot", num_few)):
        if count * width > 70:
            marks.append(Mark(at=round(LEFT + (start + count / 2) * width, 1), label=name))
        start += count
        if 0 < start < len(counts) and count:
            borders.append(round(LEFT + start * width, 1))
    return tuple(marks), tuple(borders)
