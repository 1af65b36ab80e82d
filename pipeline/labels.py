"""A label map: which class each label of a source belongs to, where that is not the label itself.

Comes in: a CSV or Parquet file with the columns ``label`` and ``class``. Goes out: a frozen ``LabelMap``. Guarantees:
every label has one class; what is mapped is mapped once, so that a chain a -> b -> c moves a to b; labels that are not
in it keep their name; its digest is of its content, in no order, and of no file name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import NotFoundError

COLUMNS = ("label", "class")
MAX_FILE_BYTES = 64 << 20
_NAME = re.compile(r"\S(.{0,498}\S)?")
_GUARDED = re.compile(r"' *[=+\-@\t\r\n]")
"""What `evenshard classes --csv` writes for text that a spreadsheet would run as a formula."""


@dataclass(frozen=True)
class LabelMap:
    """``classes[label]``, and the ``file`` that said so."""

    classes: Mapping[str, str]
    file: str

    @property
    def digest(self) -> str:
        """SHA-256 of what it says."""
        return hashlib.sha256(json.dumps(sorted(self.classes.items())).encode()).hexdigest()

    def class_of(self, label: str) -> str:
        """The class of ``label``."""
        return self.classes.get(label, label)

    def unused(self, labels: Iterable[str]) -> list[str]:
        """Labels of the map that no source has, sorted."""
        return sorted(self.classes.keys() - set(labels))


def read_label_map(path: str | os.PathLike[str]) -> LabelMap:
    """The label map of a local file. ``NotFoundError`` where there is none, ``ValueError`` where it is no label map."""
    where = os.fspath(path)
    try:
        with open(where, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"label map {where!r} cannot be read: {error.strerror}; name another file") from error
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"a file of more than {MAX_FILE_BYTES} bytes is no label map")
    rows = _parquet_rows(data) if data[:4] == b"PAR1" else _csv_rows(data)
    classes: dict[str, str] = {}
    for number, (label, name) in enumerate(rows, 1):
        if not label:
            raise ValueError(f"row {number} has no label")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"row {number}: {name[:50]!r} is no class: expected one line, 1 to 500 characters, no blanks around it"
            )
        if classes.setdefault(label, name) != name:
            raise ValueError(f"row {number}: label {label!r} is {name!r} here, and was {classes[label]!r} before")
    if not classes:
        raise ValueError("expected rows of label and class, found none")
    return LabelMap(classes, where)


def _check_columns(found: Sequence[str]) -> None:
    if sorted(found) != sorted(COLUMNS):
        raise ValueError(f"expected the columns {' and '.join(COLUMNS)}, found {', '.join(map(repr, found)) or 'none'}")


def _csv_rows(data: bytes) -> list[tuple[str, str]]:
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"neither CSV in UTF-8 nor Parquet: {error}") from None
    header = rows[0] if rows else []
    _check_columns(header)
    if wrong := [number for number, row in enumerate(rows[1:], 1) if row and len(row) != len(COLUMNS)]:
        raise ValueError(f"row {wrong[0]} has {len(rows[wrong[0]])} cells, expected {len(COLUMNS)}")
    places = [header.index(name) for name in COLUMNS]
    cells = ([unguarded(row[place]) for place in places] for row in rows[1:] if row)
    return [(label, name) for label, name in cells]


def unguarded(cell: str) -> str:
    """The text that a guarded cell stands for: without the apostrophe before what looks like a formula."""
    return cell[1:] if _GUARDED.match(cell) else cell


def _parquet_rows(data: bytes) -> list[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a Parquet file that can be read: {error}") from None
    _check_columns(table.column_names)
    for name in COLUMNS:
        if not pa.types.is_string(table[name].type) and not pa.types.is_large_string(table[name].type):
            raise ValueError(f"column {name!r} is {table[name].type}, expected text")
        if table[name].null_count:
            raise ValueError(f"column {name!r} has rows without a value")
    return list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))
