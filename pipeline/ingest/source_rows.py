"""What a listing found, in columns.

Comes in: one file after another, in any order. Goes out: the REFERENCES table sorted by key, class names, rejects.
Guarantees: every file that came in is one reference or one reject; the result does not depend on the order of arrival;
about 50 bytes and the path for each file, no Python object.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.ingest.scratch import Scratch
from pipeline.ingest.source_local import Entries, Found
from pipeline.keyed import text_key, text_keys
from pipeline.schema import REFERENCES, REJECTS, SPLIT_UNSET, SPLITS, Reason

CHUNK_ROWS = 1 << 16

SPLIT_NAMES = {
    "train": 0,
    "training": 0,
    "val": 1,
    "valid": 1,
    "validation": 1,
    "dev": 1,
    "test": 2,
    "testing": 2,
}
"""Spellings (lower case) of the splits, to positions in SPLITS."""


def printable(name: str) -> str:
    r"""``name`` as UTF-8 can hold it: undecodable bytes as \xff."""
    escaped = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", name)
    return escaped.encode("utf-8", "backslashreplace").decode()


def is_encodable(name: str) -> bool:
    """Whether ``name`` came from valid text; undecodable bytes of file names arrive as lone surrogates."""
    return name.isascii() or not re.search("[\ud800-\udfff]", name)


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A finished listing."""

    references: pa.Table
    class_names: tuple[str, ...]
    rejects: pa.Table


@dataclass(frozen=True)
class FileColumns:
    """Regular files that are candidates as they are, by column."""

    paths: list[pa.Array]  # string, in parts
    keys: array[int]  # 'Q', of the paths
    sizes: array[int]  # 'q', bytes
    fingerprints: array[int]  # 'Q'

    @classmethod
    def empty(cls) -> FileColumns:
        return cls([], array("Q"), array("q"), array("Q"))


def are_plain(names: Sequence[str], sizes: array[int], max_bytes: int) -> bool:
    """Whether neither the names nor the sizes of these files (at least one) are an obstacle to any of them."""
    if min(sizes) == 0 or max(sizes) > max_bytes:
        return False
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return False
    return True


class Rows:
    """Collects a listing. Tables, which may name one file twice, number all their rows (from 1); folders none."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._codes: dict[str, int] = {}
        self._chunks: list[pa.Array] = []
        self._paths: list[str] = []
        self._keys, self._fingerprints = array("Q"), array("Q")
        self._groups = array("Q")  # empty as long as every group is its key
        self._sizes, self._labels, self._splits = array("q"), array("i"), array("b")
        self._rows = array("q")  # empty unless rows are numbered
        self._rejects: list[tuple[str, ...]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(
        self, path: str, found: Found, label: str, split: int, *, row: int = 0, group: int | None = None
    ) -> Reason | None:
        """Take a file in, or reject it for what its name or its listing tells; says why."""
        reason, detail = self._obstacle(path, label, found)
        if reason is not None:
            self.reject(path, reason, label=label, split=split, detail=detail, row=row)
            return reason
        self._append(path, found, self._codes.setdefault(label, len(self._codes)), split, row, group)
        return None

    def add_files(self, folder: str, files: Entries, label: str, split: int) -> int:
        """`add` of the regular files in ``folder``, all of one label; returns how many were taken in."""
        names = files.names
        paths = [f"{folder}/{name}" for name in names] if folder else names
        is_simple = bool(paths) and not self._groups and not self._rows
        if not is_simple or not are_plain([label, *paths], files.sizes, self._max_bytes):
            found = Entries(names, files.sizes, files.fingerprints, []).each()
            reasons = (self.add(path, file, label, split) for path, file in zip(paths, found, strict=True))
            return sum(reason is None for reason in reasons)
        code = self._codes.setdefault(label, len(self._codes))
        self._paths += paths
        self._keys.frombytes(text_keys(paths).tobytes())
        self._fingerprints += files.fingerprints
        self._sizes += files.sizes
        self._labels.extend([code] * len(names))
        self._splits.extend([split] * len(names))
        if len(self._paths) >= CHUNK_ROWS:
            self._flush()
        return len(names)

    def add_columns(self, files: FileColumns, counts: Sequence[tuple[str, int, int]]) -> None:
        """Plain files that others have listed; ``counts``: of one after another (label, split, number of files)."""
        assert len(self._groups) + len(self._rows) == 0, "of folders only"
        self._flush()
        self._chunks += files.paths
        self._keys += files.keys
        self._fingerprints += files.fingerprints
        self._sizes += files.sizes
        for label, split, count in counts:
            if count:
                self._labels.extend([self._codes.setdefault(label, len(self._codes))] * count)
                self._splits.extend([split] * count)

    def _obstacle(self, path: str, label: str, found: Found) -> tuple[Reason | None, str]:
        if not is_encodable(path) or not is_encodable(label):
            return Reason.NAME_ENCODING, "not valid UTF-8"
        if found.problem is not None:
            return found.problem, found.detail
        if found.size == 0:
            return Reason.EMPTY, "0 bytes"
        if found.size > self._max_bytes:
            return Reason.TOO_LARGE, f"{found.size} bytes, the limit is {self._max_bytes}"
        return None, ""

    def _append(self, path: str, found: Found, code: int, split: int, row: int, group: int | None) -> None:
        key = text_key(path)
        self._paths.append(path)
        if group is not None or self._groups:
            self._groups.extend(self._keys[len(self._groups) :])
            self._groups.append(key if group is None else group)
        self._keys.append(key)
        self._fingerprints.append(found.fingerprint)
        self._sizes.append(found.size)
        self._labels.append(code)
        self._splits.append(split)
        if row:
            self._rows.append(row)
        if len(self._paths) >= CHUNK_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._chunks.append(pa.array(self._paths, pa.string()))
        self._paths.clear()

    def reject(
        self, path: str, reason: Reason, *, label: str = "", split: int = SPLIT_UNSET, detail: str = "", row: int = 0
    ) -> None:
        """One row of the rejects table."""
        where = ": ".join(part for part in (f"row {row}" if row else "", detail) if part)
        name, split_name = printable(path), SPLITS[split] if split >= 0 else ""
        key = f"{text_key(name):016x}" if name else ""
        self._rejects.append((name, key, printable(label), split_name, reason.value, where, ""))

    def settle(self, scratch: Scratch | None = None) -> Settled:
        """Sort, resolve what came twice, number the classes. The collector is spent."""
        scratch = scratch or Scratch()
        self._flush()
        paths = scratch.join_texts(self._chunks)
        scratch.rest()
        order = np.argsort(np.frombuffer(self._keys, np.uint64), kind="stable").astype(np.int32)
        order = order[self._kept(order, paths)]
        columns = {"path": scratch.keep_array(paths.take(pa.array(order)))}
        del paths  # one column at a time is held twice, not all of them
        scratch.rest()
        names, columns["class_id"] = self._classes(_taken(self._labels, np.int32, order))
        for name, values, dtype in (
            ("key", self._keys, np.uint64),
            ("group", self._groups, np.uint64),
            ("split", self._splits, np.int8),
            ("size", self._sizes, np.int64),
            ("fingerprint", self._fingerprints, np.uint64),
        ):
            if name == "group" and not values:
                columns[name] = columns["key"]
            else:
                columns[name] = pa.array(scratch.keep(_taken(values, dtype, order)))
        references = pa.Table.from_arrays([columns[name] for name in REFERENCES.names], schema=REFERENCES)
        return Settled(references=references, class_names=names, rejects=self.rejects_table())

    def _kept(self, order: NDArray[np.int32], paths: pa.Array) -> NDArray[np.bool_]:
        kept = np.ones(len(order), np.bool_)
        for start, stop in _runs(np.frombuffer(self._keys, np.uint64)[order]):
            survivor = self._resolve([int(index) for index in order[start:stop]], paths)
            kept[start:stop] = order[start:stop] == survivor
        return kept

    def _resolve(self, indexes: Sequence[int], paths: pa.Array) -> int:
        """Of several entries with one key: the index that stays, or -1."""
        names = {paths[index].as_py() for index in indexes}
        if len(names) > 1:
            both = " and ".join(repr(name) for name in sorted(names))
            raise SourceError(f"{both} have the same 64-bit key {self._keys[indexes[0]]:016x}; rename one of them")
        if not self._rows:
            return indexes[0]  # a server that lists one file twice has not got two
        path, labels = names.pop(), list(self._codes)
        if len({self._labels[index] for index in indexes}) > 1:
            all_labels = sorted({labels[self._labels[index]] for index in indexes})
            detail = "one path under labels " + ", ".join(repr(label) for label in all_labels)
            self._reject_again(indexes, path, Reason.LABEL_CONFLICT, detail)
            return -1
        # Train wins: a file that is also to be trained on is worth nothing for evaluation.
        survivor = min(indexes, key=lambda index: (self._splits[index], self._rows[index]))
        for reason, is_leak in ((Reason.DUPLICATE_ROW, False), (Reason.LEAK, True)):
            others = [i for i in indexes if i != survivor and (self._splits[i] != self._splits[survivor]) == is_leak]
            self._reject_again(others, path, reason, f"also row {self._rows[survivor]}")
        return survivor

    def _reject_again(self, indexes: Sequence[int], path: str, reason: Reason, detail: str) -> None:
        labels = list(self._codes)
        for index in indexes:
            label, split, row = labels[self._labels[index]], self._splits[index], self._rows[index]
            self.reject(path, reason, label=label, split=split, detail=detail, row=row)

    def _classes(self, codes: NDArray[np.int32]) -> tuple[tuple[str, ...], pa.Array]:
        labels = list(self._codes)
        used = [int(code) for code in np.unique(codes)]
        names = sort_labels([labels[code] for code in used])
        rank = np.full(len(labels), -1, np.int32)
        for class_id, name in enumerate(names):
            rank[self._codes[name]] = class_id
        return names, pa.array(rank[codes])

    def num_rejects_by_reason(self) -> dict[str, int]:
        """For messages, most frequent first."""
        reasons = [row[4] for row in self._rejects]
        return dict(sorted(((r, reasons.count(r)) for r in set(reasons)), key=lambda item: (-item[1], item[0])))

    def first_reject(self) -> str:
        """Its path, in the order of arrival; for messages."""
        return self._rejects[0][0]

    def rejects_table(self) -> pa.Table:
        """REJECTS, sorted."""
        rows = sorted(self._rejects, key=lambda row: (row[0], row[4], row[5], row))
        columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in REJECTS]
        return pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], schema=REJECTS)


def sort_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Numerically if all are integers, else by code point; the position is the class id."""
    if all(re.fullmatch(r"-?[0-9]+", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (_integer(label), label)))
    return tuple(sorted(labels))


def _integer(text: str) -> tuple[int, tuple[int, str]]:
    """Ordered as the integer that ``text`` spells, of any length: Python refuses to convert more than 4,300 digits."""
    digits = text.lstrip("-").lstrip("0")
    if not digits:
        return (0, (0, ""))
    if not text.startswith("-"):
        return (1, (len(digits), digits))
    return (-1, (-len(digits), digits.translate(_NINES)))


_NINES = str.maketrans("0123456789", "9876543210")


def _taken(column: array[int], dtype: type[Any], order: NDArray[np.int32]) -> NDArray[Any]:
    """The values in this order; empties ``column``."""
    values = np.frombuffer(column, dtype)[order]
    del column[:]
    return values


def _runs(keys: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of two and more equal values."""
    equal = np.flatnonzero(keys[1:] == keys[:-1])
    if equal.size:
        breaks = np.flatnonzero(np.diff(equal) > 1)
        starts, stops = equal[np.append(0, breaks + 1)], equal[np.append(breaks, equal.size - 1)] + 2
        yield from zip(starts.tolist(), stops.tolist(), strict=True)
