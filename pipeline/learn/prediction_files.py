"""A file of predictions, of any model: CSV (also gzipped) or Parquet with one row per image.

In: a local file with ``key`` or ``path``, and either ``label`` or scores per class (a column named by each class, or
one list column ``scores`` in the order of class ids). Out: ``Predictions``. Guarantees: no torch; scores are read in
parts into one array, float32 where every number of the file is one and float64 else, so that no two of them become
equal; a file that is none is a ``SourceError`` that says what is wrong with it.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from pipeline.errors import NotFoundError, SourceError
from pipeline.keyed import text_keys
from pipeline.labels import unguarded
from pipeline.learn.scores import BLOCK, NO_CLASS

_compute: Any = pyarrow.compute  # its functions are made at run time, and have no types

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
U64 = NDArray[np.uint64]
Numbers = NDArray[np.floating[Any]]

NUM_EXAMPLES = 3
_EMPTY = "it holds no row; expected one for each image"


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """A file as it was read. One of ``labels`` and ``scores`` is there."""

    file: str
    by: str  # key or path
    names: pa.Array  # the key or path of each row
    keys: U64
    labels: Ints | None  # class ids; NO_CLASS where the text is no class
    scores: Numbers | None  # [rows, K], float32 or float64; -inf in columns that the file lacks
    lacking: Ints  # those columns
    strange: Counter[str]  # labels that are no class

    @property
    def values(self) -> Numbers:
        """The scores of a file that has them."""
        assert self.scores is not None
        return self.scores


def read_predictions(path: str | os.PathLike[str], class_names: Sequence[str], occupied: Bools) -> Predictions:
    """Read a local file. ``occupied``: bool ``[K]``, classes with an image, each of which needs a column of scores."""
    where = os.fspath(path)
    try:
        with open(where, "rb") as file:
            start = file.read(4)
        if start == b"PAR1":
            return _read_parquet(where, class_names, occupied)
        return _read_csv(where, start[:2] == b"\x1f\x8b", class_names, occupied)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise NotFoundError(f"predictions {where!r} cannot be read: {error.strerror}; name another file") from error
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"predictions {where!r}: neither CSV in UTF-8 nor Parquet: {error}") from error
    except (ValueError, pa.ArrowException) as error:
        raise SourceError(f"predictions {where!r}: {error}") from error


# -- columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """What the columns of a file are for."""

    by: str  # names the image
    rest: tuple[str, ...]  # of labels or scores
    place: tuple[int, ...]  # class ids of ``rest``; none for labels and for lists of scores
    lacking: tuple[int, ...]


def _columns(header: Sequence[str], has_lists: bool, class_names: Sequence[str], occupied: Bools) -> _Columns:
    """A path beside a key is left out, unless a class is called so."""
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise ValueError(f"column {twice[0]!r} stands twice")
    by = next((name for name in ("key", "path") if name in header), None)
    if by is None:
        other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
        hint = f"; columns are divided by commas, not by {other!r}" if other else ""
        raise ValueError(f"expected a column key or path, found {listed(header)}{hint}")
    rest = tuple(name for name in header if name != by and (name not in ("key", "path") or name in class_names))
    if rest == ("label",) or (rest == ("scores",) and has_lists):
        return _Columns(by=by, rest=rest, place=(), lacking=())
    known = {name: number for number, name in enumerate(class_names)}
    if not rest:
        raise ValueError("expected a column label, a list column scores, or a column for each class; found none")
    if strange := [name for name in rest if name not in known]:
        raise ValueError(
            f"{len(strange):,} columns are neither key, path, label (on its own), scores (of lists) nor a class: "
            f"{listed(strange)}; drop them"
        )
    lacking = tuple(sorted(set(known.values()) - {known[name] for name in rest}))
    if missing := [class_names[number] for number in lacking if occupied[number]]:
        raise ValueError(f"{len(missing):,} classes with images have no column of scores: {listed(missing)}")
    return _Columns(by=by, rest=rest, place=tuple(known[name] for name in rest), lacking=lacking)


def _predictions(
    where: str, columns: _Columns, names: pa.Array, labels: tuple[Ints, Counter[str]] | None, scores: Numbers | None
) -> Predictions:
    if not len(names):
        raise ValueError(_EMPTY)
    found, strange = labels or (None, Counter[str]())
    return Predictions(
        file=where,
        by=columns.by,
        names=names,
        keys=_keys(names, columns.by),
        labels=found,
        scores=scores,
        lacking=np.array(columns.lacking, dtype=np.int64),
        strange=strange,
    )


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(where: str, class_names: Sequence[str], occupied: Bools) -> Predictions:
    # A column chunk may be the whole file: it is read in parts of buffer_size.
    with pyarrow.parquet.ParquetFile(where, pre_buffer=False, buffer_size=1 << 16) as file:
        if not file.metadata.num_rows:
            raise ValueError(_EMPTY)
        schema = file.schema_arrow
        has_lists = "scores" in schema.names and _is_list(schema.field("scores").type)
        columns = _columns(schema.names, has_lists, class_names, occupied)
        names = _text(_read_columns(file, [columns.by])[columns.by], columns.by)
        if not columns.place and columns.rest == ("label",):
            label = _read_columns(file, ["label"])["label"]
            return _predictions(where, columns, names, _labels(label, class_names), None)
        if not columns.place:
            return _predictions(where, columns, names, None, _lists(file, len(class_names)))
        matrix = _Matrix(len(names), len(class_names))
        step = max(1, BLOCK // max(1, len(names)))
        for first in range(0, len(columns.rest), step):
            chosen = list(columns.rest[first : first + step])
            table = _read_columns(file, chosen)
            part = np.stack([_numbers(table[name], name) for name in chosen], axis=1)
            matrix.put(slice(0, len(names)), columns.place[first : first + step], part)
        return _predictions(where, columns, names, None, matrix.finished(columns.lacking))


def _read_columns(file: pyarrow.parquet.ParquetFile, names: list[str]) -> pa.Table:
    """More may come along: to Parquet ``a`` is also the parent of ``a.b``."""
    return file.read(columns=names, use_threads=False, use_pandas_metadata=False)


def _lists(file: pyarrow.parquet.ParquetFile, num_classes: int) -> Numbers:
    matrix = _Matrix(file.metadata.num_rows, num_classes)
    first = 0
    for batch in file.iter_batches(max(1, BLOCK // num_classes), columns=["scores"], use_threads=False):
        part = _listed_scores(batch.column("scores"), num_classes)
        matrix.put(slice(first, first + len(part)), None, part)
        first += len(part)
    return matrix.finished(())


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _listed_scores(column: pa.Array, num_classes: int) -> Numbers:
    if column.null_count:
        raise ValueError(f"column 'scores' has {column.null_count:,} rows without a value")
    lengths = _compute.unique(_compute.list_value_length(column)).to_pylist()
    if lengths != [num_classes]:
        raise ValueError(f"each list of scores must have {num_classes:,} numbers, one a class; found {lengths[:5]}")
    return _numbers(_compute.list_flatten(column), "scores").reshape(-1, num_classes)


# -- CSV --------------------------------------------------------------------------------------------------------------


def _read_csv(where: str, is_gzip: bool, class_names: Sequence[str], occupied: Bools) -> Predictions:
    with _opened(where, is_gzip) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        header = next(csv.reader(text, strict=True), [])
    columns = _columns(header, False, class_names, occupied)
    texts = {columns.by} if columns.place else {columns.by, "label"}
    # A key of digits alone must not become a number.
    types = {name: pa.string() if name in texts else pa.float64() for name in (columns.by, *columns.rest)}
    size = max(1 << 22, 8 * sum(len(name.encode()) + 3 for name in header), 64 * len(header))  # holds a few rows
    options: dict[str, Any] = {
        "read_options": pyarrow.csv.ReadOptions(block_size=size, use_threads=False),
        "parse_options": pyarrow.csv.ParseOptions(newlines_in_values=True),
        "convert_options": pyarrow.csv.ConvertOptions(
            column_types=types, strings_can_be_null=False, include_columns=list(types)
        ),
    }
    with _opened(where, is_gzip) as file, pyarrow.csv.open_csv(file, **options) as reader:
        if not columns.place:
            table = reader.read_all()
            names = _text(table[columns.by], columns.by)
            return _predictions(where, columns, names, _labels(table["label"], class_names), None)
        matrix = _Matrix(_most_rows(where, is_gzip), len(class_names))
        parts: list[pa.Array] = []
        first = 0
        for batch in cast("Iterable[pa.RecordBatch]", reader):
            parts.append(batch.column(columns.by))
            part = batch.select(columns.rest).to_tensor(null_to_nan=True, row_major=True).to_numpy()
            matrix.put(slice(first, first + len(part)), columns.place, part)
            first += len(part)
    names = _text(pa.chunked_array(parts, pa.string()), columns.by)
    return _predictions(where, columns, names, None, matrix.finished(columns.lacking, first))


def _opened(where: str, is_gzip: bool) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(where, "rb")) if is_gzip else open(where, "rb")


def _most_rows(where: str, is_gzip: bool) -> int:
    """No CSV has more rows than line ends, as its header has one: memory of what it has less is never touched."""
    num_ends = 0
    with _opened(where, is_gzip) as file:
        while data := file.read(1 << 20):
            num_ends += data.count(b"\n") + data.count(b"\r")
    return num_ends


# -- values -----------------------------------------------------------------------------------------------------------


class _Matrix:
    """``[rows, K]``, filled part by part; float32 until a number comes that is none."""

    def __init__(self, most_rows: int, num_classes: int) -> None:
        self._values: Numbers = np.zeros((most_rows, num_classes), np.float32)  # not in memory before it is filled

    def put(self, rows: slice, columns: Sequence[int] | None, part: Numbers) -> None:
        if self._values.dtype == np.float32 and not _is_single(part):
            self._values = self._values.astype(np.float64)
        self._values[rows, slice(None) if columns is None else np.array(columns)] = part

    def finished(self, lacking: Sequence[int], num_rows: int | None = None) -> Numbers:
        """The first ``num_rows`` rows."""
        made = self._values[:num_rows]
        made[:, list(lacking)] = -np.inf
        return made


def _is_single(part: Numbers) -> bool:
    if part.dtype != np.float64:
        return True
    with np.errstate(over="ignore"):
        return np.array_equal(part.astype(np.float32), part, equal_nan=True)


def _numbers(column: pa.ChunkedArray | pa.Array, name: str) -> Numbers:
    """NaN where there is no value."""
    if pa.types.is_integer(column.type):
        column = column.cast(pa.float64())
    elif not pa.types.is_floating(column.type):
        raise ValueError(f"column {name!r} is {column.type}, expected numbers")
    return column.to_numpy(zero_copy_only=False)


def _text(column: pa.ChunkedArray, name: str) -> pa.Array:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"column {name!r} is {column.type}, expected text")
    if column.null_count:
        raise ValueError(f"column {name!r} has {column.null_count:,} rows without a value")
    return pa.concat_arrays(column.cast(pa.large_string()).chunks or [pa.array([], pa.large_string())])


def _keys(names: pa.Array, by: str) -> U64:
    if by == "path":
        return text_keys(names.to_pylist())
    wrong = _compute.invert(_compute.match_substring_regex(names, "^[0-9a-fA-F]{16}$"))
    if examples := names.filter(wrong).slice(0, NUM_EXAMPLES).to_pylist():
        raise ValueError(f"a key is 16 hex digits, as in the index of a shard; found {listed(examples)}")
    return np.array([int(key, 16) for key in names.to_pylist()], dtype=np.uint64)


def _labels(column: pa.ChunkedArray, class_names: Sequence[str]) -> tuple[Ints, Counter[str]]:
    """Names of classes, or their ids where no text is a name."""
    place = {name: number for number, name in enumerate(class_names)}
    if pa.types.is_integer(column.type):
        texts = [str(value) for value in column.to_pylist()]
        place = {}
    else:
        texts = _text(column, "label").to_pylist()
    distinct = set(texts)
    found = {text: place.get(text, place.get(unguarded(text), NO_CLASS)) for text in distinct}
    if all(number == NO_CLASS for number in found.values()):
        ids = {str(number): number for number in range(len(class_names))}
        found = {text: ids.get(text, NO_CLASS) for text in distinct}
    labels = np.array([found[text] for text in texts], dtype=np.int64)
    return labels, Counter(text for text in texts if found[text] == NO_CLASS)


def listed(names: Sequence[object]) -> str:
    """The first few, for a message."""
    more = f" and {len(names) - NUM_EXAMPLES:,} more" if len(names) > NUM_EXAMPLES else ""
    return (", ".join(repr(name)[:120] for name in names[:NUM_EXAMPLES]) or "none") + more
