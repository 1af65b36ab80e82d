"""Curves over classes: how many images each has, what manifests draw of it, and how unequal that is (Lorenz).

Comes in: ``int64[K]`` counts and targets. Goes out: paths and marks in pixels; the template draws them, the style sheet
colours them, so the same curve serves light, dark and paper. Guarantees: a path stays small at any number of classes,
and its ends are those of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.shots import FEW_BELOW, MANY_ABOVE

ZERO_BAND = 16
"""Pixels between "none" and one image: a logarithmic axis has no zero, and a class that is never drawn must be seen."""

DASH = 9

MAX_COLUMNS = 720
"""Beyond this many classes, or two pixels a class, a column stands for several and shows their median."""

MAX_POINTS = 200
"""Of a Lorenz curve."""

MAX_LINEAR = 200
"""Beyond this many classes ranks stand at their square root: a long tail would squeeze its head into a line."""

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where a drawing area lies in its picture, in pixels."""

    name: str
    width: int
    height: int
    left: int
    right: int
    top: int
    base: int

    @property
    def max_columns(self) -> int:
        return min(MAX_COLUMNS, self.right - self.left)


WIDE = Frame(name="wide", width=960, height=360, left=64, right=936, top=30, base=318)
NARROW = Frame(name="narrow", width=400, height=300, left=48, right=378, top=30, base=258)
"""For phones: text keeps its size where a wide picture would shrink it to nothing."""
SQUARE = Frame(name="square", width=400, height=390, left=48, right=388, top=12, base=344)


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
    gini: float = 0.0


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
    frame: Frame = WIDE


def class_curve(counts: IntArray, targets: Mapping[str, IntArray], frame: Frame = WIDE) -> Chart:
    """``counts`` (training images, descending) as an area, ``targets`` (draws per epoch, same order) as lines."""
    top = max([10, *(int(values.max(initial=0)) for values in (counts, *targets.values()))])
    area = _path(counts, top, frame)
    zones, borders = _zones(counts, frame)
    return Chart(
        area=f"{area}V{frame.base}H{frame.left}Z" if area else "",
        lines=_lines({name: _path(values, top, frame) for name, values in targets.items()}),
        x_ticks=_x_ticks(len(counts), frame),
        y_ticks=(Mark(at=frame.base, label="none"), *_y_ticks(top, frame)),
        zones=zones,
        borders=borders,
        power=_power(len(counts)),
        frame=frame,
    )


def lorenz(counts: IntArray, targets: Mapping[str, IntArray], frame: Frame = SQUARE) -> Chart:
    """Share of all images (area) and draws (lines) that the smallest classes hold together; equal ones: the diagonal.

    Classes without an image are left out; ``targets`` are those of the same classes, each sorted by itself.
    """
    present = counts > 0
    shares = {name: _shares(values[present]) for name, values in (("", counts), *targets.items())}
    paths = {name: _lorenz_path(share, frame) for name, share in shares.items()}
    ticks = [(place / 4, f"{25 * place} %") for place in range(5)]
    area = paths.pop("")
    return Chart(
        area=f"{area}V{frame.base}H{frame.left}Z" if area else "",
        lines=_lines(paths, {name: gini(values[present]) for name, values in targets.items()}),
        x_ticks=tuple(Mark(at=round(_across(share, frame), 1), label=label) for share, label in ticks),
        y_ticks=tuple(Mark(at=round(_up(share, frame), 1), label=label) for share, label in ticks),
        zones=(),
        borders=(),
        power=1.0,
        frame=frame,
    )


def gini(values: IntArray) -> float:
    """0 where all are equal, towards 1 where one has everything; zeros count: a class that is not drawn is unequal."""
    total, num = int(values.sum()), len(values)
    if not total:
        return 0.0
    return float((np.arange(1 - num, num, 2) * np.sort(values).astype(np.float64)).sum() / (num * total))


def _shares(values: IntArray) -> NDArray[np.float64]:
    """float64 [K+1], from 0 to 1."""
    if not (total := int(values.sum())):
        return np.zeros(0)
    return np.concatenate([[0], np.cumsum(np.sort(values))]) / total


def _lorenz_path(shares: NDArray[np.float64], frame: Frame) -> str:
    if len(shares) < 2:
        return ""
    places = np.unique(np.linspace(0, len(shares) - 1, min(len(shares), MAX_POINTS)).round().astype(int)).tolist()
    points = [f"{_across(p / (len(shares) - 1), frame):.1f} {_up(float(shares[p]), frame):.1f}" for p in places]
    return "M" + "L".join(points)


def _across(share: float, frame: Frame) -> float:
    return frame.left + (frame.right - frame.left) * share


def _up(share: float, frame: Frame) -> float:
    return frame.base - (frame.base - frame.top) * share


def _lines(paths: Mapping[str, str], ginis: Mapping[str, float] | None = None) -> tuple[Line, ...]:
    dashes = f"{DASH} {DASH * (len(paths) - 1)}"
    return tuple(
        Line(name=name, path=path, dashes=dashes, phase=-DASH * i, gini=(ginis or {}).get(name, 0.0))
        for i, (name, path) in enumerate(paths.items())
    )


def _height(value: float, top: int, frame: Frame) -> float:
    if value <= 0:
        return frame.base
    floor = frame.base - ZERO_BAND
    return floor - (floor - frame.top) * math.log(max(value, 1)) / math.log(top)


def _path(values: IntArray, top: int, frame: Frame) -> str:
    """Steps: one level per class or column, equal neighbours drawn as one."""
    num_classes = len(values)
    parts: list[str] = []
    last = ""
    for start, stop in pairwise(_edges(num_classes, frame)):
        level = f"{_height(float(np.median(values[start:stop])), top, frame):.1f}"
        if level != last:
            parts.append(f"H{_place(start, num_classes, frame):.1f}V{level}" if parts else f"M{frame.left} {level}")
            last = level
    return "".join([*parts, f"H{frame.right}"]) if parts else ""


def _edges(num_classes: int, frame: Frame) -> list[int]:
    """Where columns begin and end: a class each, or as wide as a pixel or two."""
    if num_classes <= frame.max_columns:
        return list(range(num_classes + 1))
    share = (np.arange(frame.max_columns + 1) / frame.max_columns) ** (1 / _power(num_classes))
    return np.unique(np.round(share * num_classes).astype(np.int64)).tolist()


def _power(num_classes: int) -> float:
    return 0.5 if num_classes > MAX_LINEAR else 1.0


def _place(rank: float, num_classes: int, frame: Frame) -> float:
    """Pixels of a rank, counted from 0; a class owns [rank, rank + 1)."""
    return _across((rank / max(num_classes, 1)) ** _power(num_classes), frame)


def _x_ticks(num_classes: int, frame: Frame) -> tuple[Mark, ...]:
    """1, round numbers far enough from each other, and the last class."""
    step = max(1, _round(num_classes / (10 if _power(num_classes) == 1 else 5)))
    wanted = [1, *([step // 10, step // 2] if step >= 20 else []), *range(step, num_classes, step), num_classes]
    marks: list[Mark] = []
    for rank in [rank for rank in wanted if 1 <= rank <= num_classes]:
        at = round(_place(rank - 0.5, num_classes, frame), 1)
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


def _y_ticks(top: int, frame: Frame) -> tuple[Mark, ...]:
    decades = [10**exponent for exponent in range(int(math.log10(top)) + 1)]
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    values = [decade * factor for decade in decades for factor in factors if decade * factor <= top]
    return tuple(Mark(at=round(_height(value, top, frame), 1), label=f"{value:,}") for value in values)


def _zones(counts: IntArray, frame: Frame) -> tuple[tuple[Mark, ...], tuple[float, ...]]:
    """Many-, medium- and few-shot classes, as far as they are there and wide enough for their name."""
    num_many, num_few = int((counts > MANY_ABOVE).sum()), int((counts < FEW_BELOW).sum())
    num_medium = len(counts) - num_many - num_few
    marks: list[Mark] = []
    borders: list[float] = []
    start = 0
    for name, count in (("many-shot", num_many), ("medium-shot", num_medium), ("few-shot", num_few)):
        left, right = (_place(rank, len(counts), frame) for rank in (start, start + count))
        if right - left > 11 * len(name):
            marks.append(Mark(at=round((left + right) / 2, 1), label=name))
        start += count
        if 0 < start < len(counts) and count:
            borders.append(round(right, 1))
    return tuple(marks), tuple(borders)
