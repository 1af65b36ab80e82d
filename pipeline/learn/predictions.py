"""A file of predictions, of any model, met with the images of a snapshot.

In: CSV or Parquet with one row per image: ``key`` or ``path``, and either ``label`` or scores per class (a column named
by each class, or one list column ``scores`` in the order of class ids). Out: for a split, which class or which scores
each of its images got. Guarantees: no torch; no row is dropped in silence: keys that are no image, images without a
row, repeated rows and rows that hold no finite score are counted, with examples, and refused unless allowed by name.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from pipeline.errors import EvenshardError, NotFoundError, SourceError
from pipeline.keyed import text_keys
from pipeline.labels import unguarded
from pipeline.schema import SPLITS
from pipeline.snapshot import Snapshot

_compute: Any = pyarrow.compute  # its functions are made at run time, and have no types

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
U64 = NDArray[np.uint64]

ALLOWED = ("duplicate", "missing", "nan", "unknown")
"""What is wrong with a file, and may be allowed by name."""

NO_CLASS = -1
NUM_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """A file as it was read. One of ``labels`` and ``scores`` is there."""

    file: str
    by: str  # key or path
    names: pa.Array  # the key or path of each row
    keys: U64
    labels: Ints | None  # class ids; NO_CLASS where the text is no class
    scores: Floats | None  # [rows, K]; -inf in columns that the file lacks
    strange: Counter[str]  # labels that are no class


# -- reading ----------------------------------------------------------------------------------------------------------


def read_predictions(
    path: str | os.PathLike[str], class_names: Sequence[str], occupied: NDArray[np.bool_]
) -> Predictions:
    """Read a local file. ``occupied``: bool ``[K]``, classes with an image, each of which needs a column of scores."""
    where = os.fspath(path)
    try:
        with open(where, "rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        table = pyarrow.parquet.read_table(where) if is_parquet else _read_csv(where, class_names)
    except OSError as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise NotFoundError(f"predictions {where!r} cannot be read: {error.strerror}; name another file") from error
        raise SourceError(f"predictions {where!r}: neither CSV in UTF-8 nor Parquet: {error}") from error
    except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"predictions {where!r}: neither CSV in UTF-8 nor Parquet: {error}") from error
    if not table.num_rows:
        raise SourceError(f"predictions {where!r} holds no row; expected one for each image")
    try:
        return _predictions(where, table, class_names, occupied)
    except (ValueError, pa.ArrowException) as error:
        raise SourceError(f"predictions {where!r}: {error}") from error


def _beside(columns: Sequence[str], class_names: Sequence[str]) -> tuple[str | None, list[str]]:
    """The column that names the image, and the others; a path beside a key is left out, unless a class is called so."""
    by = next((name for name in ("key", "path") if name in columns), None)
    return by, [name for name in columns if name != by and (name not in ("key", "path") or name in class_names)]


def _read_csv(where: str, class_names: Sequence[str]) -> pa.Table:
    with open(where, encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, strict=True), [])
    _, rest = _beside(header, class_names)
    numbers = set(rest) if rest != ["label"] else set[str]()
    # A key of digits alone must not become a number.
    types = {name: pa.float64() if name in numbers else pa.string() for name in header}
    return pyarrow.csv.read_csv(
        where,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
    )


def _predictions(where: str, table: pa.Table, class_names: Sequence[str], occupied: NDArray[np.bool_]) -> Predictions:
    columns = table.column_names
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise ValueError(f"column {twice[0]!r} stands twice")
    by, rest = _beside(columns, class_names)
    if by is None:
        raise ValueError(f"expected a column key or path, found {_listed(columns)}")
    names = _text(table[by], by)
    labels = scores = None
    strange: Counter[str] = Counter()
    if rest == ["label"]:
        labels, strange = _labels(table["label"], class_names)
    elif rest == ["scores"] and _is_list(table["scores"].type):
        scores = _listed_scores(table["scores"], len(class_names))
    else:
        scores = _scores(table, rest, class_names, occupied)
    return Predictions(
        file=where, by=by, names=names, keys=_keys(names, by), labels=labels, scores=scores, strange=strange
    )


def _text(column: pa.ChunkedArray, name: str) -> pa.Array:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"column {name!r} is {column.type}, expected text")
    if column.null_count:
        raise ValueError(f"column {name!r} has {column.null_count:,} rows without a value")
    return pa.concat_arrays(column.cast(pa.large_string()).chunks)


def _keys(names: pa.Array, by: str) -> U64:
    if by == "path":
        return text_keys(names.to_pylist())
    wrong = _compute.invert(_compute.match_substring_regex(names, "^[0-9a-f]{16}$"))
    if examples := names.filter(wrong).slice(0, NUM_EXAMPLES).to_pylist():
        raise ValueError(f"a key is 16 hex digits in lower case, as in the index of a shard; found {_listed(examples)}")
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


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _listed_scores(column: pa.ChunkedArray, num_classes: int) -> Floats:
    if column.null_count:
        raise ValueError(f"column 'scores' has {column.null_count:,} rows without a value")
    lengths = _compute.unique(_compute.list_value_length(column)).to_pylist()
    if lengths != [num_classes]:
        raise ValueError(f"each list of scores must have {num_classes:,} numbers, one a class; found {lengths[:5]}")
    return _floats(_compute.list_flatten(column), "scores").reshape(-1, num_classes)


def _scores(table: pa.Table, rest: list[str], class_names: Sequence[str], occupied: NDArray[np.bool_]) -> Floats:
    place = {name: number for number, name in enumerate(class_names)}
    if not rest:
        raise ValueError("expected a column label, a list column scores, or a column for each class; found none")
    if strange := [name for name in rest if name not in place]:
        raise ValueError(
            f"{len(strange):,} columns are neither key, path, label (on its own), scores (of lists) nor a class: "
            f"{_listed(strange)}; drop them"
        )
    given = set(rest)
    if missing := [name for number, name in enumerate(class_names) if occupied[number] and name not in given]:
        raise ValueError(f"{len(missing):,} classes with images have no column of scores: {_listed(missing)}")
    scores = np.full((table.num_rows, len(class_names)), -np.inf)
    for name in rest:
        scores[:, place[name]] = _floats(table[name], name)
    return scores


def _floats(column: pa.ChunkedArray | pa.Array, name: str) -> Floats:
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise ValueError(f"column {name!r} is {column.type}, expected numbers")
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else (
        column.cast(pa.float64()).to_numpy()
    )  # fmt: skip


def _listed(names: Sequence[object]) -> str:
    more = f" and {len(names) - NUM_EXAMPLES:,} more" if len(names) > NUM_EXAMPLES else ""
    return (", ".join(repr(name)[:120] for name in names[:NUM_EXAMPLES]) or "none") + more


# -- meeting the images -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Met:
    """Rows of the file for images of one split, in the order of their keys: each image at most once."""

    split: str
    labels: Ints  # the truth
    rows: Ints  # of the file
    num_images: int
    """Of the split, with a row or without."""


@dataclass(frozen=True, eq=False)
class Images:
    """Every image of a snapshot by key, ascending."""

    keys: U64
    class_id: Ints
    split: NDArray[np.int8]
    example: str  # a path, for messages


def images_of(snapshot: Snapshot) -> Images:
    """Read the indexes: 17 bytes an image are kept."""
    parts: list[tuple[U64, Ints, NDArray[np.int8]]] = []
    example = ""
    for shard, split in enumerate(snapshot.shards["split"].to_pylist()):
        index = snapshot.index(shard)
        example = example or index["path"][0].as_py()
        keys = np.array([int(key, 16) for key in index["key"].to_pylist()], dtype=np.uint64)
        code = np.full(len(keys), SPLITS.index(split), dtype=np.int8)
        parts.append((keys, index["class_id"].to_numpy().astype(np.int64), code))
    keys, class_id, code = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    return Images(keys[order], class_id[order], code[order], example)


def meet(
    snapshot: Snapshot, given: Predictions, split: str, allow: Collection[str] = ()
) -> tuple[Met, Met | None, list[str]]:
    """The rows for ``split``, those for val where they may choose thresholds for test, and what was allowed or noticed.

    EvenshardError with all that is wrong and not in ``allow``, or if nothing is left.
    """
    images = images_of(snapshot)
    code = SPLITS.index(split)
    place = np.minimum(np.searchsorted(images.keys, given.keys), len(images.keys) - 1)
    known = images.keys[place] == given.keys
    usable = np.ones(len(place), bool) if given.scores is None else _usable(given.scores)
    mine = known & (images.split[place] == code)
    met, repeated, without = _rows(images, place, mine, usable)
    wrong = {
        "unknown": _unknown(snapshot, given, ~known),
        "missing": _missing(images, code, met, place[mine]),
        "duplicate": _told(given, repeated, "image has", "images have", "a second row; the first counts"),
        "nan": _told(given, without, "row has", "rows have", "NaN, infinity or nothing finite for scores"),
    }
    refused = [text for kind, text in wrong.items() if text and kind not in allow]
    if refused or not len(met):
        told = "; ".join(refused or [text for text in wrong.values() if text])
        names = sorted(kind for kind, text in wrong.items() if text and kind not in allow)
        advice = " ".join(f"--allow {name}" for name in names)
        hint = f"; its images are named as in {images.example!r}" if wrong["unknown"] and given.by == "path" else ""
        raise EvenshardError(
            f"{given.file!r} does not fit split {split} of snapshot {snapshot.number}: {told or 'it names no image'}"
            + hint
            + (f". {advice} evaluates what is left" if len(met) and advice else "")
        )
    notes = [f"allowed: {text}" for text in wrong.values() if text]
    others = Counter(SPLITS[number] for number in images.split[place[known & ~mine]].tolist())
    notes += [f"{count:,} rows are of split {name}" for name, count in sorted(others.items())]
    if given.strange:
        notes.append(
            f"{sum(given.strange.values()):,} rows hold a label that is no class and counts as wrong: "
            f"{_listed(sorted(given.strange))}"
        )
    val = None
    if split == "test" and given.scores is not None and others["val"]:
        rows, _, _ = _rows(images, place, known & (images.split[place] == SPLITS.index("val")), usable)
        val = _met(images, "val", place, rows) if len(rows) else None
    return _met(images, split, place, met), val, notes


def _met(images: Images, split: str, place: NDArray[np.intp], rows: Ints) -> Met:
    num_images = int(np.count_nonzero(images.split == SPLITS.index(split)))
    return Met(split=split, labels=images.class_id[place[rows]], rows=rows, num_images=num_images)


def _usable(scores: Floats) -> NDArray[np.bool_]:
    sound = ~(np.isnan(scores) | np.isposinf(scores)).any(axis=1)
    return np.asarray(sound & np.isfinite(scores).any(axis=1))


def _rows(
    images: Images, place: NDArray[np.intp], mine: NDArray[np.bool_], usable: NDArray[np.bool_]
) -> tuple[Ints, Ints, Ints]:
    """Rows that count, by key; rows that repeat an image; rows without a usable score."""
    rows = np.flatnonzero(mine)
    _, first = np.unique(place[rows], return_index=True)
    kept = rows[first]
    repeated = np.setdiff1d(rows, kept)
    return kept[usable[kept]], repeated, kept[~usable[kept]]


def _told(given: Predictions, rows: Ints, one: str, many: str, what: str) -> str:
    if not len(rows):
        return ""
    examples = given.names.take(pa.array(rows[:NUM_EXAMPLES])).to_pylist()
    more = f" and {len(rows) - NUM_EXAMPLES:,} more" if len(rows) > NUM_EXAMPLES else ""
    return f"{len(rows):,} {one if len(rows) == 1 else many} {what}: {', '.join(map(repr, examples))}{more}"


def _unknown(snapshot: Snapshot, given: Predictions, unknown: NDArray[np.bool_]) -> str:
    rows = np.flatnonzero(unknown)
    told = _told(given, rows, f"{given.by} is", f"{given.by}s are", "no image of the snapshot")
    if told and snapshot.rejects.num_rows:
        rejected = np.array([int(key, 16) for key in snapshot.rejects["key"].to_pylist() if key], dtype=np.uint64)
        if count := int(np.isin(given.keys[rows], rejected).sum()):
            told += f" ({count:,} of them rejected by the build, see evenshard stats --rejects)"
    return told


def _missing(images: Images, code: int, met: Ints, named: NDArray[np.intp]) -> str:
    wanted = np.flatnonzero(images.split == code)
    missing = np.setdiff1d(wanted, named)
    if not len(missing):
        return ""
    examples = ", ".join(f"{key:016x}" for key in images.keys[missing[:NUM_EXAMPLES]].tolist())
    more = f" and {len(missing) - NUM_EXAMPLES:,} more" if len(missing) > NUM_EXAMPLES else ""
    return f"{len(missing):,} of {len(wanted):,} images have no row: {examples}{more}"
