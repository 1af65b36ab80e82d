"""What `remedies.py` found, in words: means over seeds, paired intervals, a table and a plot.

Comes in: ``{row name: [seeds, figures]}`` in [0, 1]. Goes out: Markdown and SVG. Differences are to the first row of
the same seed: set, initial network and number of draws are shared, so that what a seed makes easy or hard cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as students_t

Found = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def helps(self) -> bool:
        return self.low > 0


def paired_interval(row: ArrayLike, baseline: ArrayLike, level: float = 0.95) -> Interval:
    """The mean of ``row - baseline`` over seeds, and Student's interval of it: mean +- t * s / sqrt(n).

    For the few seeds of a benchmark a bootstrap is too narrow: it does not know how uncertain their spread is.
    """
    differences = np.asarray(row, np.float64) - np.asarray(baseline, np.float64)
    if (n := len(differences)) < 2:
        return Interval(float(differences.mean()), math.nan, math.nan)
    mean, half = float(differences.mean()), float(students_t.ppf((1 + level) / 2, n - 1)) / math.sqrt(n)
    half *= float(differences.std(ddof=1))
    return Interval(mean, mean - half, mean + half)


def against_first(found: Found, figure: int) -> dict[str, Interval]:
    """The interval of each row but the first."""
    first, *others = found
    return {name: paired_interval(found[name][:, figure], found[first][:, figure]) for name in others}


# -- table -------------------------------------------------------------------------------------------------------------


def table(found: Found, figures: Sequence[str], members: Mapping[str, int]) -> str:
    """Markdown, in points: means; and paired differences of ``balanced`` and ``few`` to the first row."""
    shown = [i for i, name in enumerate(figures) if members.get(name, 1)]
    at = {name: figures.index(name) for name in ("balanced", "few")}
    heads = [f"{figures[i]} ({members[figures[i]]})" if figures[i] in members else figures[i] for i in shown]
    lines = [
        "| | " + " | ".join((*heads, "balanced: difference", "few: difference")) + " |",
        "|---|" + "--:|" * (len(heads) + 2),
    ]
    differences = {name: against_first(found, place) for name, place in at.items()}
    for row, values in found.items():
        means = [_points(float(values[:, i].mean())) for i in shown]
        told = [_told(differences[name].get(row)) for name in at]
        lines.append("| " + " | ".join((row, *means, *told)) + " |")
    return "\n".join(lines)


def _points(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _told(interval: Interval | None) -> str:
    """Bold where the interval lies above zero."""
    if interval is None:
        return ""
    mean, low, high = (f"{100 * value + 0.0:+.1f}" for value in (interval.mean, interval.low, interval.high))
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if interval.helps else text


# -- plot --------------------------------------------------------------------------------------------------------------

LEFT, WIDTH, GAP, LINE, TOP = 404, 300, 24, 24, 58


def plot(found: Found, figures: Sequence[str], title: str) -> str:
    """SVG: for each row the difference to the first and its interval, of balanced accuracy and of few-shot recall."""
    panels = [(name, against_first(found, figures.index(name))) for name in ("balanced", "few")]
    first, *rows = found
    height = TOP + LINE * len(rows) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + 2 * WIDTH + 2 * GAP} {height}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(12, 22, title, weight="bold"),
        *(_text(LEFT - 12, TOP + LINE * i + 17, row.replace("`", ""), anchor="end") for i, row in enumerate(rows)),
    ]
    for place, (name, intervals) in enumerate(panels):
        says = {"balanced": "balanced accuracy", "few": "recall of few-shot classes"}[name]
        parts += _panel(LEFT + place * (WIDTH + GAP), f"{says}, points against {first}", list(intervals.values()))
    return "\n".join([*parts, "</svg>\n"])


def _panel(left: int, title: str, intervals: list[Interval]) -> list[str]:
    known = [100 * bound for i in intervals for bound in (i.low, i.mean, i.high) if not math.isnan(bound)]
    low, high = min(-2.0, *known) - 1, max(2.0, *known) + 1
    bottom = TOP + LINE * len(intervals)

    def x(points: float) -> float:
        return round(left + (points - low) / (high - low) * WIDTH, 1)

    parts = [_text(left, TOP - 12, title, size=11)]
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if (high - low) / s <= 8)
    for tick in range(math.ceil(low / step) * step, math.floor(high) + 1, step):
        colour = "#333" if tick == 0 else "#ddd"
        parts.append(f'<path d="M{x(tick)} {TOP}V{bottom}" stroke="{colour}"/>')
        parts.append(_text(x(tick), bottom + 18, f"{tick:+d}" if tick else "0", anchor="middle", size=11))
    for i, interval in enumerate(intervals):
        y, colour = TOP + LINE * i + 12, "#1a7f37" if interval.helps else "#b35900" if interval.high < 0 else "#666"
        if not math.isnan(interval.low):
            parts.append(
                f'<path d="M{x(100 * interval.low)} {y}H{x(100 * interval.high)}" stroke="{colour}" stroke-width="2"/>'
            )
        parts.append(f'<circle cx="{x(100 * interval.mean)}" cy="{y}" r="4" fill="{colour}"/>')
    return parts


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, weight: str = "normal") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="#222">'
        f"{escape(words)}</text>"
    )
