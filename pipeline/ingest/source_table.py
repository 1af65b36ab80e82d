"""A table as a source: each row names an image and its label.

Comes in: CSV, TSV, JSON Lines or Parquet. Goes out: rows. Guarantees: values are text exactly as written (`007` stays
`007`); every row is a candidate or a reject that names its row (1 is the first after the header); a path out of the
images' folder is never opened; a table that is damaged, or lacks a column, stops the build and says where.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import posixpath
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.ingest.source_files import FileFinder, Place, local_copy
from pipeline.ingest.source_local import Found
from pipeline.ingest.source_rows import SPLIT_NAMES, Rows, is_encodable, printable
from pipeline.keyed import text_key
from pipeline.schema import SPLIT_UNSET, Reason

BATCH_ROWS = 1 << 14
NUM_EXAMPLES = 5

_TEXT_KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json"}
KINDS = {
    **_TEXT_KINDS,
    **{extension + ".gz": kind for extension, kind in _TEXT_KINDS.items()},
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""Extensions (lower case) of tables."""

DEFAULT_NAMES = {
    "path": ("path", "file", "filename", "image", "image_path"),
    "label": ("label", "class", "class_name", "category"),
    "split": ("split",),
    "group": ("group",),
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns; None means: the usual name, if the table has it."""

    path: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None
    ignore_split: bool = False


class Row(NamedTuple):
    """Four cells as text; None where the table has no such column or a null."""

    path: str | None
    label: str | None
    split: str | None
    group: str | None


Choose = Callable[[Sequence[str]], Sequence[str | None]]
"""The columns of a table -> those of path, label, split and group."""


def table_kind(name: str) -> str | None:
    """'csv', 'tsv', 'json' or 'parquet' by extension, else None."""
    return next((kind for extension, kind in KINDS.items() if name.lower().endswith(extension)), None)


class TableListing:
    """One pass over a table; `run` fills ``rows`` and returns notices.

    ``also``: another spelling of the images' folder that paths may begin with, where links lead to it.
    """

    def __init__(self, table: Place, images: Place, rows: Rows, columns: Columns, *, also: str = "") -> None:
        self._table, self._rows, self._wanted = table, rows, columns
        self._prefixes = tuple({f"{prefix.rstrip('/')}/" for prefix in (images.path, images.url, also) if prefix})
        self._finder = FileFinder(images)
        self._unknown_splits: Counter[str] = Counter()
        self._chosen: Sequence[str | None] = ()

    @property
    def has_splits(self) -> bool:
        return self._chosen[2] is not None

    def run(self) -> tuple[str, ...]:
        with local_copy(self._table) as copy:
            numbered = enumerate(_read(copy, self._table, self._choose), start=1)
            while batch := list(itertools.islice(numbered, BATCH_ROWS)):
                self._take(batch)
        if self._unknown_splits:
            shown = ", ".join(f"{name!r} ({n} rows)" for name, n in sorted(self._unknown_splits.items())[:NUM_EXAMPLES])
            raise SourceError(
                f"{self._table.shown}: column {self._chosen[2]!r} must say one of {', '.join(SPLIT_NAMES)}, but says "
                f"{shown}; mend the table, or ignore the column with `--split-from none`"
            )
        return tuple(
            f"column {name!r} of the table decides the {what}"
            for what, name in zip(("split", "group"), self._chosen[2:], strict=True)
            if name is not None and getattr(self._wanted, what) is None
        )

    def _choose(self, names: Sequence[str]) -> Sequence[str | None]:
        self._chosen = [
            self._choose_one(field.name, names) for field in fields(self._wanted) if field.name in DEFAULT_NAMES
        ]
        return self._chosen

    def _choose_one(self, what: str, names: Sequence[str]) -> str | None:
        if what == "split" and self._wanted.ignore_split:
            return None
        wanted: str | None = getattr(self._wanted, what)
        candidates = DEFAULT_NAMES[what] if wanted is None else (wanted,)
        name = next((name for name in candidates if name in names), None)
        if name is None and (wanted is not None or what in ("path", "label")):
            raise SourceError(
                f"{self._table.shown} has no column {' or '.join(repr(candidate) for candidate in candidates)} for the "
                f"{what}; its columns are {', '.join(repr(name) for name in names)}: choose with `--{what}-column NAME`"
            )
        if name is not None and names.count(name) > 1:
            raise SourceError(f"{self._table.shown} has {names.count(name)} columns named {name!r}; rename all but one")
        return name

    def _take(self, batch: Sequence[tuple[int, Row]]) -> None:
        """Rows that name a file in the images' folder are looked up together; the others are rejects."""
        named: list[tuple[int, Row, str]] = []
        for number, row in batch:
            obstacle = self._obstacle(row)
            path = None if obstacle else below(self._prefixes, row.path or "")
            if obstacle is not None or path is None:
                reason = obstacle or Reason.OUTSIDE_ROOT
                self._rows.reject(row.path or "", reason, label=row.label or "", split=self._split(row), row=number)
            else:
                named.append((number, row, path))
        for (number, row, path), found in zip(named, self._finder.find([path for *_, path in named]), strict=True):
            self._add(number, row, path, found)

    def _obstacle(self, row: Row) -> Reason | None:
        if not row.path or not row.path.strip():
            return Reason.NO_PATH
        if not row.label or not row.label.strip():
            return Reason.NO_LABEL
        return None if is_encodable(row.path) and is_encodable(row.label) else Reason.NAME_ENCODING

    def _add(self, number: int, row: Row, path: str, found: Found) -> None:
        # The prefix keeps a group called "a.jpg" apart from the image a.jpg.
        group = text_key("group\n" + printable(row.group)) if row.group else None
        self._rows.add(path, found, row.label or "", self._split(row), row=number, group=group)

    def _split(self, row: Row) -> int:
        if not self.has_splits:
            return SPLIT_UNSET
        split = SPLIT_NAMES.get((row.split or "").strip().lower(), SPLIT_UNSET)
        if split == SPLIT_UNSET:
            self._unknown_splits[row.split or ""] += 1
        return split


def below(prefixes: Sequence[str], text: str) -> str | None:
    """The relative path that a table means, None where it leads out. ``prefixes`` of absolute paths end in '/'."""
    prefix = next((prefix for prefix in prefixes if text.startswith(prefix)), None)
    if prefix is None and (text.startswith("/") or "://" in text):
        return None
    path = posixpath.normpath(text[len(prefix or "") :]).lstrip("/")
    return None if path == ".." or path.startswith("../") else path


# --- Readers: rows of text ---


def _read(copy: str, table: Place, choose: Choose) -> Iterator[Row]:
    kind = table_kind(table.name)
    try:
        if kind == "parquet":
            yield from _read_parquet(copy, table.shown, choose)
            return
        with cast(IO[bytes], gzip.open(copy) if table.name.lower().endswith(".gz") else open(copy, "rb")) as file:
            lines = _Lines(file, table.shown)
            yield from _read_json(lines, choose) if kind == "json" else _read_csv(lines, kind == "tsv", choose)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{table.shown} cannot be read: {getattr(error, 'strerror', None) or error}") from error


class _Lines:
    """Lines of UTF-8, line ends kept; knows the line it gave last."""

    def __init__(self, file: IO[bytes], shown: str) -> None:
        self._file, self._shown = file, shown
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise self.error(
                    f"byte 0x{byte:02x} at column {error.start + 1} is not UTF-8; save it as UTF-8"
                ) from error
            yield text.removeprefix("\ufeff") if self.number == 1 else text

    def error(self, problem: str) -> SourceError:
        return SourceError(f"{self._shown}, line {self.number}: {problem}")


def _read_csv(lines: _Lines, has_tabs: bool, choose: Choose) -> Iterator[Row]:
    reader = csv.reader(lines, delimiter="\t" if has_tabs else ",", strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise lines.error("the table is empty, a header with the names of the columns is expected")
        places = [None if name is None else header.index(name) for name in choose(header)]
        for values in reader:
            if len(values) == len(header):
                yield Row(*(None if place is None else values[place] for place in places))
            elif values:  # a blank line is no row
                raise lines.error(f"{len(values)} fields, but the header has {len(header)}")
    except csv.Error as error:
        raise lines.error(str(error)) from error


def _read_json(lines: _Lines, choose: Choose) -> Iterator[Row]:
    names: Sequence[str | None] = ()
    for line in lines:
        if not line.strip():
            continue
        try:
            value: object = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        except (ValueError, RecursionError) as error:
            raise lines.error(f"not JSON: {error}") from error
        if not isinstance(value, dict):
            raise lines.error("a JSON object is expected on each line")
        record = cast(dict[str, Any], value)
        names = names or choose(list(record))
        yield Row(*(None if name is None else _json_text(record.get(name), name, lines) for name in names))
    if not names:
        raise lines.error("the table is empty, a JSON object is expected on each line")


def _json_text(value: object, name: str, lines: _Lines) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, str):  # numbers arrive as the text they were written as
        return value
    raise lines.error(f"{name!r} holds {type(value).__name__}, text or a number is expected")


def _read_parquet(copy: str, shown: str, choose: Choose) -> Iterator[Row]:
    try:
        with pq.ParquetFile(copy) as file:
            names = choose(list(file.schema_arrow.names))
            used = [name for name in dict.fromkeys(names) if name is not None]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=used):
                texts = {name: _as_text(batch.column(name), name, shown).to_pylist() for name in used}
                blank = [None] * batch.num_rows
                yield from (Row(*row) for row in zip(*(texts.get(name or "", blank) for name in names), strict=True))
    except pa.ArrowException as error:
        raise SourceError(f"{shown} is not a readable Parquet file: {error}") from error


def _as_text(column: pa.Array, name: str, shown: str) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not is_text and not pa.types.is_integer(kind) and not pa.types.is_boolean(kind):
        raise SourceError(f"{shown}: column {name!r} is {kind}; text or integers are expected, as labels are exact")
    return pc.cast(column, pa.string())
