"""How tables leave the command line as CSV or JSON, and a chart of the class distribution for terminals.

Names of classes are hostile input: a cell that a spreadsheet would take for a formula gets a leading apostrophe, and
what could steer a terminal is spelled out.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cli import show

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """RFC 4180 with ``\\n`` line ends; text that begins like a formula is guarded, numbers are left alone."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([guarded(value) if isinstance(value, str) else value for value in row] for row in rows)
    return out.getvalue().rstrip("\n")


def guarded(text: str) -> str:
    """OWASP's advice: an apostrophe before what Excel, LibreOffice or Google would run."""
    shown = show.name(text)
    return f"'{shown}" if text.lstrip(" ").startswith(_FORMULA) else shown


def plain(value: Any) -> Any:
    """For JSON, which has neither infinity nor NaN: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- the chart ------------------------------------------------------------------------------------------------------


def distribution(counts: NDArray[np.integer], split: str) -> str:
    """How many classes have how many images of ``split``, and what they hold: a bar for each range, 1, 2-4, 5-9, ..."""
    present = counts[counts > 0]
    if not len(present):
        return f"no class has an image in {split}"
    edges = _edges(int(present.max()))
    edges = [
        edge for edge, following in zip(edges, [*edges[1:], edges[-1] + 1], strict=True) if following > present.min()
    ]
    rows: list[tuple[str, int, float]] = []
    for low, high in pairwise(edges):
        inside = present[(present >= low) & (present < high)]
        label = f"{low:,}" if high == low + 1 else f"{low:,}-{high - 1:,}"
        rows.append((label, len(inside), int(inside.sum()) / int(present.sum())))
    title = f"images in {split}"
    most, wide = max(count for _, count, _ in rows), max(len(title), *(len(label) for label, _, _ in rows))
    lines = [f"{title:>{wide}}  {'classes':>7}  {'':{BAR}}  hold"]
    for label, count, share in rows:
        bar = show.painted(f"{_bar(count / most):{BAR}}", "cyan")
        lines.append(f"{label:>{wide}}  {count:7,}  {bar}  {share:.1%} of the images")
    return "\n".join(lines)


def _edges(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, ... until one passes ``largest``."""
    edges = [1]
    while edges[-1] <= largest:
        lead = int(str(edges[-1])[0])
        edges.append({1: 2 * edges[-1], 2: 5 * edges[-1] // 2, 5: 2 * edges[-1]}[lead])
    return edges


def _bar(share: float) -> str:
    eighths = max(1, round(share * BAR * 8)) if share else 0
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
