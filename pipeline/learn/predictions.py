"""A file of predictions, of any model, met with the images of a snapshot.

In: the rows of a file (``prediction_files``), a snapshot. Out: for a split, which row each of its images got.
Guarantees: no torch; no row is dropped in silence: keys that are no image, images without a row, repeated rows and rows
that hold no finite score are counted, with examples, and refused unless allowed by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import EvenshardError
from pipeline.keyed import text_key
from pipeline.learn.prediction_files import NUM_EXAMPLES, Numbers, Predictions, listed
from pipeline.learn.scores import BLOCK
from pipeline.schema import SPLITS
from pipeline.snapshot import Snapshot

Ints = NDArray[np.int64]
U64 = NDArray[np.uint64]

ALLOWED = ("duplicate", "missing", "nan", "unknown")
"""What is wrong with a file, and may be allowed by name."""


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
        hint = _path_hint(images, given, np.flatnonzero(~known)) if given.by == "path" else ""
        if not len(met):
            elsewhere = Counter(SPLITS[number] for number in images.split[place[known]].tolist())
            hint += "".join(f"; {count:,} rows are of split {name}" for name, count in sorted(elsewhere.items()))
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
            f"{listed(sorted(given.strange))}"
        )
    val = None
    if split == "test" and given.scores is not None and others["val"]:
        rows, _, _ = _rows(images, place, known & (images.split[place] == SPLITS.index("val")), usable)
        val = _met(images, "val", place, rows) if len(rows) else None
    return _met(images, split, place, met), val, notes


def _path_hint(images: Images, given: Predictions, unknown: Ints) -> str:
    """How images are named, and what the first unknown one would have to be called."""
    if not len(unknown):
        return ""
    found = given.names[int(unknown[0])].as_py()
    parts = found.replace("\\", "/").split("/")
    endings = ["/".join(parts[first:]) for first in range(len(parts))]
    near = [ending for ending in endings if text_key(ending) in images.keys]
    advice = f", so {found!r} should be {near[0]!r}" if near else ""
    return f"; its images are named as in {images.example!r}{advice}"


def _met(images: Images, split: str, place: NDArray[np.intp], rows: Ints) -> Met:
    num_images = int(np.count_nonzero(images.split == SPLITS.index(split)))
    return Met(split=split, labels=images.class_id[place[rows]], rows=rows, num_images=num_images)


def _usable(scores: Numbers) -> NDArray[np.bool_]:
    """bool ``[rows]``: no NaN, no infinity but -inf, and something finite."""
    sound = np.empty(len(scores), bool)
    step = max(1, BLOCK // scores.shape[1])
    for first in range(0, len(scores), step):
        part = scores[first : first + step]
        sound[first : first + step] = (part < np.inf).all(axis=1) & (part > -np.inf).any(axis=1)  # false of NaN
    return sound


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
