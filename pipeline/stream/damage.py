"""Damaged images, replaced by the next draws of their class.

Comes in: the rows of a batch, and the draw of each in its class. Goes out: the same batch, where every image that
cannot be read or decoded has given its place to another one of the same class. Guarantees: label, position and
randomness stay those of the draw; which image stands in depends on the draw, and on which images are damaged, alone,
so a replacement is the same on any topology and after any resume; damage to tables and indexes is never replaced.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import IntegrityError
from pipeline.plan.epoch import EpochFunction
from pipeline.schema import SAMPLES
from pipeline.store import CheckedTable
from pipeline.stream.batches import BatchReader, Places, Rows

MAX_TRIES = 64
"""Later draws looked at for a stand-in. They show every image of a class of 40; a larger class with as many damaged
images in a row has lost its shards, and standing in would hide that."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Repaired:
    """A batch without damaged images."""

    rows: Rows
    images: torch.Tensor | list[bytes]
    replaced: NDArray[np.bool_]
    damage: dict[int, str]  # sample row of each image that was replaced: what is wrong with it


class Replacement:
    """A ``BatchReader`` that replaces. Thread-safe. It remembers damage, so only the first meeting costs two reads."""

    def __init__(
        self, reader: BatchReader, samples: CheckedTable, plan: EpochFunction, class_starts: NDArray[np.int64]
    ) -> None:
        self._reader = reader
        self._samples = samples
        self._plan = plan
        self._class_starts = class_starts
        self._damaged: dict[int, str] = {}  # by sample row; only ever added to

    def images(self, rows: Rows, draw: NDArray[np.int64], places: Places) -> Repaired:
        """The batch of ``rows``, which lie at ``places``; ``draw`` int64 [n] numbers each draw in its class."""
        try:
            return self._repaired(rows, draw, places)
        except IntegrityError:
            for i in range(len(rows.row)):
                self._is_intact(rows.part(i, i + 1))
        return self._repaired(rows, draw, places)

    def _repaired(self, rows: Rows, draw: NDArray[np.int64], places: Places) -> Repaired:
        """With stand-ins for what is known to be damaged; IntegrityError where that is not all."""
        damaged = [i for i, row in enumerate(rows.row.tolist()) if row in self._damaged]
        damage = {row: self._damaged[row] for row in rows.row[damaged].tolist()}
        replaced = np.zeros(len(rows.row), dtype=np.bool_)
        if damaged:
            row, repeat = rows.row.copy(), rows.repeat.copy()
            for i in damaged:
                row[i], repeat[i] = self._stand_in(rows.part(i, i + 1), int(draw[i]))
            replaced[damaged] = True
            rows = dataclasses.replace(rows, row=row, repeat=repeat)
            places = self._reader.locate(row)
        return Repaired(rows=rows, images=self._reader.images(rows, places), replaced=replaced, damage=damage)

    def _stand_in(self, one: Rows, draw: int) -> tuple[int, int]:
        """Sample row and repeat number of the first later draw of the class that shows an intact image."""
        later = draw + np.arange(1, MAX_TRIES + 1)
        class_id = np.full(MAX_TRIES, one.class_id[0])
        ordinal, repeat = self._plan.images(class_id, later)
        tried = {int(one.row[0])}
        for row, count in zip((self._class_starts[class_id] + ordinal).tolist(), repeat.tolist(), strict=True):
            if row in tried:
                continue
            tried.add(row)
            candidate = dataclasses.replace(one, row=np.array([row]), repeat=np.array([count]))
            if self._is_intact(candidate):
                return row, count
        raise IntegrityError(
            f"{self._damaged[int(one.row[0])]}. It cannot be replaced: its class {one.class_id[0]} has "
            f"{len(tried) - 1} other images in its next {MAX_TRIES} draws, none of them intact"
        )

    def _is_intact(self, one: Rows) -> bool:
        row = int(one.row[0])
        if row in self._damaged:
            return False
        for name in SAMPLES.names:  # damage of the table is an error here, and not of this image
            self._samples.take(name, one.row)
        try:
            self._reader.images(one)
        except IntegrityError as error:
            self._damaged[row] = str(error)
            return False
        return True
