"""Findings: what was expected, what was found, where, what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHOWN = 5
"""Findings of one code that are told in full for one file; a broken disk must not print a million lines."""


class Code(StrEnum):
    """What kind of contradiction."""

    RECORD = "record"  # the commit record is not what its id says, or contradicts the files that it names
    MISSING = "missing"  # a file that something names is not there
    DAMAGED = "damaged"  # a file has other bytes than its reference says, or cannot be read
    TABLE = "table"  # a table contradicts itself
    TAR = "tar"  # the members of a tar are not those that its index lists
    LABEL = "label"  # the .cls of a member names another class
    IMAGE = "image"  # image bytes do not have the checksums or facts that their row says
    ONCE = "once"  # an image is in two rows, or in a row and among the rejects
    GROUP = "group"  # a group has members in two splits
    PLACE = "place"  # a shard is not the leaf of the trie that it is named for
    COUNTS = "counts"  # class counts or bytes are not the sums over the rows
    SAMPLES = "samples"  # a sample row does not lead to its image, or the order is another
    MANIFEST = "manifest"  # a manifest contradicts itself, the counts or its policy
    EPOCH = "epoch"  # an epoch does not hold every class as often as its target says
    PIN = "pin"  # a pin cannot be read, or does not keep the snapshot that it means
    UNPROVED = "unproved"  # other damage keeps this from being looked at


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One contradiction; ``file`` is a path below ROOT."""

    code: Code
    file: str
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.file}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was looked at and what was found; no finding means that the snapshot is proved."""

    root: str
    number: int
    findings: tuple[Finding, ...]
    num_files: int
    num_images: int
    """Images whose bytes were read and compared."""
    num_bytes: int
    sample: float
    seed: int
    """Which part of each tar ``sample`` meant."""
    num_seeds: int
    """So many seeds in a row read every image; 0: no image is read at all."""
    tar_bytes: int
    tar_bytes_read: int
    elapsed_s: float
    notes: tuple[str, ...] = ()
    """What could not be looked at, and is no fault of the snapshot."""

    @property
    def sound(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sound": self.sound}


class Findings:
    """Collects findings in the order of arrival; per file and code the first SHOWN in full, the others counted."""

    def __init__(self) -> None:
        self._told: dict[tuple[Code, str], list[str]] = {}
        self._count: dict[tuple[Code, str], int] = {}

    def add(self, code: Code, file: str, detail: str) -> None:
        self._begin(code, file, 1)
        if len(told := self._told[code, file]) < SHOWN:
            told.append(detail)

    def add_rows(self, code: Code, file: str, wrong: NDArray[np.bool_], tell: Callable[[int], str]) -> None:
        """One finding for each place where ``wrong`` is set."""
        places = np.flatnonzero(wrong)
        if not len(places):
            return
        self._begin(code, file, len(places))
        told = self._told[code, file]
        told.extend(tell(place) for place in places[: SHOWN - len(told)].tolist())

    def all(self) -> tuple[Finding, ...]:
        found: list[Finding] = []
        for (code, file), told in self._told.items():
            details = list(told)
            if more := self._count[code, file] - len(told):
                details.append(f"and {more:,} more of this kind")
            found += [Finding(code=code, file=file, detail=detail) for detail in details]
        return tuple(found)

    def _begin(self, code: Code, file: str, count: int) -> None:
        self._told.setdefault((code, file), [])
        self._count[code, file] = self._count.get((code, file), 0) + count
