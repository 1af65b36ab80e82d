"""One rank's batches of a manifest: which rows each step draws, planned many steps at once, and the batch they make.

Comes in: the first position of a global step. Goes out: this rank's batch of it. Guarantees: a batch depends on its
position alone, never on which were asked for before, nor by which thread.

Planning costs 10 us a draw for 64 of them and 0.4 us for 4,096, as numpy is called as often for both: so the rows of
many steps are planned together, fewer at first, so that the first batch does not wait for the hundredth.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.keyed import keyed_hash
from pipeline.plan.epoch import EpochFunction
from pipeline.stream.batches import BatchReader, Places, Rows
from pipeline.stream.damage import Repaired, Replacement

PLANNED_ROWS = 4096
"""Rows planned at once, chosen by measurement: 16,384 would save another 0.1 us of 0.4 us a row."""

_KEPT = 4  # plans: threads that work ahead of each other ask for steps of neighbouring ones

Batch = tuple[Any, ...]
"""``(images, labels)``, with ``Details`` or a mask as third: images ``[B, C, H, W]`` or bytes, labels int64 ``[B]``."""


@dataclass(kw_only=True)  # not frozen: Lightning, moving a batch to its device, refuses batches that hold such
class Details:
    """Where each row of a batch comes from."""

    positions: torch.Tensor  # int64 [B]: place in the endless sequence
    keys: list[str]  # 16 hex digits each, as in the shards
    repeats: torch.Tensor  # int64 [B]: how often this image was drawn before, since position 0
    replaced: torch.Tensor  # bool [B]: whether this image stands in for a damaged one, see ``on_damage``


@dataclass(frozen=True, kw_only=True)
class Built:
    """A batch, and what its loader tells of it when it is handed out."""

    batch: Batch
    num_replaced: int
    damage: dict[int, str]  # of replaced images, by sample row


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the batches of one rank, wherever they begin."""

    plan: EpochFunction
    class_starts: NDArray[np.int64]
    augment: int  # key of the randomness of transforms
    first: int  # of our slice in the global batch
    batch_size: int
    details: bool
    pin_memory: bool


class DrawnBatches:
    """This rank's batches of the steps that begin at ``starts``. Thread-safe."""

    def __init__(self, recipe: Recipe, reader: BatchReader, replacement: Replacement | None, starts: range) -> None:
        self._recipe = recipe
        self._reader = reader
        self._replacement = replacement
        self._starts = starts
        self._plans: OrderedDict[int, _Planned] = OrderedDict()  # by the number of their first step
        self._lock = threading.Lock()

    def batch(self, start: int) -> Built:
        """The batch of the step that begins at position ``start``."""
        planned = self._planned((start - self._starts.start) // self._starts.step)
        made = self._images(planned)
        labels = torch.from_numpy(made.rows.class_id.astype(np.int64))
        batch = pinned(made.images, labels) if self._recipe.pin_memory else (made.images, labels)
        return Built(
            batch=(*batch, self._details(made)) if self._recipe.details else batch,
            num_replaced=int(made.replaced.sum()),
            damage=made.damage,
        )

    def _images(self, planned: _Planned) -> Repaired:
        if self._replacement is not None:
            return self._replacement.images(planned.rows, planned.draw, planned.places)
        none = np.zeros(self._recipe.batch_size, dtype=np.bool_)
        images = self._reader.images(planned.rows, planned.places)
        return Repaired(rows=planned.rows, images=images, replaced=none, damage={})

    def _details(self, made: Repaired) -> Details:
        return Details(
            positions=torch.from_numpy(made.rows.position.copy()),
            keys=self._reader.keys(made.rows.row),
            repeats=torch.from_numpy(made.rows.repeat.copy()),
            replaced=torch.from_numpy(made.replaced),
        )

    def _planned(self, step: int) -> _Planned:
        size = self._recipe.batch_size
        begin, end = planned_steps(step, max(1, PLANNED_ROWS // size))
        with self._lock:
            if begin not in self._plans:
                self._plans[begin] = self._plan(self._starts[begin:end])
                if len(self._plans) > _KEPT:
                    self._plans.popitem(last=False)
            plan = self._plans[begin]
        return plan.part((step - begin) * size, (step - begin + 1) * size)

    def _plan(self, starts: range) -> _Planned:
        recipe = self._recipe
        begins = [start + recipe.first for start in starts]
        parts = [recipe.plan.draws(begin, begin + recipe.batch_size) for begin in begins]
        class_id = np.concatenate([part.class_id for part in parts])
        draw = np.concatenate([part.draw for part in parts])
        ordinal, repeat = recipe.plan.images(class_id, draw)
        rows = Rows(
            row=recipe.class_starts[class_id] + ordinal,
            class_id=class_id,
            position=(np.array(begins)[:, None] + np.arange(recipe.batch_size)).ravel(),
            repeat=repeat,
            key=keyed_hash(keyed_hash(recipe.augment, class_id), draw),
        )
        return _Planned(rows=rows, draw=draw, places=self._reader.locate(rows.row))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Planned:
    rows: Rows
    draw: NDArray[np.int64]  # the number of each draw in its class
    places: Places

    def part(self, begin: int, end: int) -> _Planned:
        return _Planned(rows=self.rows.part(begin, end), draw=self.draw[begin:end], places=self.places.part(begin, end))


def planned_steps(step: int, at_most: int) -> tuple[int, int]:
    """[begin, end) of the steps planned together with ``step``: 1, 2, 4, ... of them, doubling up to ``at_most``."""
    doublings = min((step + 1).bit_length(), at_most.bit_length()) - 1
    size = 1 << doublings
    begin = step - (step + 1 - size) % size
    return begin, begin + size


def pinned(*parts: Any) -> Batch:
    """In page-locked memory, for copies to the GPU that run while it computes; as they are where there is no CUDA."""
    if not torch.cuda.is_available():
        return parts
    return tuple(part.pin_memory() if isinstance(part, torch.Tensor) and part.is_cpu else part for part in parts)
