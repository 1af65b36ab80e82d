"""Text for people: summaries and tables. Names from the source are hostile input and are escaped here."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.ingest.run import BuildSummary
    from pipeline.ingest.stats import Description

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def safe(text: str) -> str:
    """``text`` without control, bidirectional or undecodable characters; newlines stay for our own messages' sake."""
    return "".join(c if c == "\n" or unicodedata.category(c) not in _HIDDEN else ascii(c)[1:-1] for c in text)


def name(text: str) -> str:
    """A class or file name in a table: as ``safe``, on one line."""
    return safe(text).replace("\n", "\\n")


def painted(text: str, style: str, stream: TextIO | None = None) -> str:
    """``text`` in a colour or bold, where ``stream`` is a terminal and NO_COLOR is not set (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or not (stream or sys.stdout).isatty():
        return text
    return click.style(text, bold=True) if style == "bold" else click.style(text, fg=style)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain table; numbers to the right, thousands separated."""
    body = [[_cell(value) for value in row] for row in rows]
    numeric = [bool(body) and all(row[i][1] for row in body) for i in range(len(header))]
    widths = [max([len(header[i]), *(len(row[i][0]) for row in body)]) for i in range(len(header))]
    lines = [[(text, True) for text in header], *body]
    return "\n".join(
        "  ".join(
            cell[0].rjust(width) if right else cell[0].ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: object) -> tuple[str, bool]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return name(str(value)), False
    return (f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"), True


def num_bytes(count: int) -> str:
    """``count`` bytes in the unit a person would choose."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{count:,} bytes" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def counted(count: int, one: str, many: str = "") -> str:
    """``1 file``, ``2 files``; ``1 class has``, ``2,000 classes have``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def classes(told: Description) -> str:
    """``5 classes``, and how many more exist without an image: a class that vanished keeps its id."""
    empty = f" ({told.num_empty:,} more without an image)" if told.num_empty else ""
    return f"{counted(told.num_classes, 'class', 'classes')}{empty}"


def build_summary(summary: BuildSummary, root: str) -> str:
    """What was built, in ten lines or so."""
    rejects = ", ".join(f"{count:,} {reason}" for reason, count in summary.rejects.items()) or "none"
    splits = ", ".join(f"{split} {count:,}" for split, count in summary.splits.items())
    draws = ", ".join(f"{key} {count:,}" for key, count in summary.manifests.items())
    state = f"snapshot {summary.number}" if summary.changed else f"nothing changed: snapshot {summary.number} stands"
    read = f"read {counted(summary.num_read, 'image')} ({num_bytes(summary.read_bytes)})"
    lines = [
        f"{state} in {safe(root)}",
        f"images     {summary.num_images:,} in {classes(summary.description)}: {splits}",
        f"rejects    {summary.num_rejects:,}: {rejects}" if summary.num_rejects else "rejects    none",
        *([_near(summary.near_duplicates)] if summary.near_duplicates else []),
        f"imbalance  {_imbalance(summary.trained)}",
        f"work       {read} in {summary.elapsed_s:,.1f} s, {summary.num_reused_units} of {summary.num_units} units "
        "were done before",
        f"manifests  {draws} (draws per epoch)",
        *(f"notice     {name(notice)}" for notice in summary.notices),
        f"tars       {safe(root)}/shards, index beside them; rejects: evenshard stats {safe(root)} --rejects",
        f"next       evenshard stats {safe(root)}",
        f"           python -c \"import pipeline; m = pipeline.open_snapshot({root!r}).manifest('balanced'); "
        'print(m.num_draws)"',
    ]
    return "\n".join(lines)


def _near(found: Mapping[str, int]) -> str:
    images, groups = counted(found["num_images"], "image"), counted(found["num_groups"], "group")
    return f"look-alike {images} in {groups}, each in one split"


def _imbalance(told: Description) -> str:
    return (
        f"in train: largest class {told.imbalance:,.0f} x the smallest, {told.singletons:,} with one image, "
        f"Gini {told.gini:.2f}, {told.effective_classes:,.1f} effective classes"
    )


def description(told: Description, what: str) -> str:
    """The numbers of ``evenshard stats``, above the per-class table."""
    groups = ", ".join(
        f"{key} {group.num_classes:,} ({counted(group.num_images, 'image')})"
        for key, group in (("many (>100)", told.many), ("medium (20-100)", told.medium), ("few (<20)", told.few))
    )
    return "\n".join(
        [
            f"{what}: {counted(told.num_images, 'image')} in {classes(told)}",
            f"imbalance ratio {told.imbalance:,.1f} (largest / smallest class)   Gini {told.gini:.3f}   "
            f"entropy {told.entropy:.3f} nats = {told.effective_classes:,.1f} effective classes",
            f"classes: {groups}; {told.singletons:,} with one image",
        ]
    )


def rejects(rows: pa.Table) -> str:
    """The rejects table."""
    columns = ("reason", "path", "label", "detail")
    return table(columns, zip(*(rows[column].to_pylist() for column in columns), strict=True))
