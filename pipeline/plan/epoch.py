"""The epoch function: from a position of the endless sequence of draws to a class, and to one of its images.

Comes in: images per class (``pool``), draws per class and epoch (``targets``, or a schedule of them), a seed. Goes out:
which class is drawn at any position, which of its images, and how often that image was drawn before. Guarantees (E1-E4b
of DESIGN.md, section 2; the arithmetic is its section 8): integers only, O(1) memory in the length of an epoch, and any
position costs the same to reach as the first.

    position --epoch_of--> epoch --windows--> (class, p) --images--> (class, image, repeat)

An epoch is a clock of 2^62 ticks (``clock``). Draw p of a class has a tick of its own; the order of the epoch is the
order of the ticks. Only one window of the clock is ever sorted; counts at its two borders say which draws it holds.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PolicyError, UsageError
from pipeline.keyed import I64, U64, ceil_sqrt, derive, keyed_hash, permute, seed_key
from pipeline.plan.clock import Clock, Epoch, Window

EPOCH_RULE = 1
"""Stands in manifests and loader states. Another order of draws needs another number."""

MAX_TARGET = 1 << 31
MAX_POSITION = 1 << 62
WINDOW_DRAWS = 65536
"""A window holds about this many draws: sorting it costs less than counting at its borders."""

_WHEN, _WHICH, _TURN = 1, 2, 3
_CACHED = 2  # windows and epochs kept: a batch may straddle a border
_IMAGES_AT_ONCE = 32768  # chosen by measurement: below it numpy calls cost more than the arithmetic
_ONE = np.uint64(1)

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """A part of a schedule: these targets for ``num_epochs`` epochs; None, for the last stage only, is for ever."""

    targets: I64
    num_epochs: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """Consecutive positions: ``class_id`` int32[n], and ``draw`` int64[n], the number p of the draw in its class."""

    class_id: NDArray[np.int32]
    draw: I64


class EpochFunction:
    """The endless sequence of draws of a manifest, or of a schedule of manifests, under one seed. Thread-safe."""

    def __init__(self, pool: I64, stages: I64 | Sequence[Stage], seed: int, *, _window_bits: int | None = None) -> None:
        self._pool = _counts("pool", pool)
        self._seed = seed
        self._window_bits = _window_bits
        self._parts = _lay_out([Stage(targets=stages)] if isinstance(stages, np.ndarray) else stages, self._pool)
        key = seed_key(seed)
        self._when, self._which, self._turn = (derive(key, tag) for tag in (_WHEN, _WHICH, _TURN))
        self._images = _Images(self._pool, self._which, self._turn)
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], Window] = OrderedDict()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Callable[..., EpochFunction], tuple[Any, ...]]:
        stages = [Stage(targets=part.targets, num_epochs=part.num_epochs) for part in self._parts]
        return _rebuild, (self._pool, stages, self._seed, self._window_bits)

    @property
    def num_classes(self) -> int:
        return len(self._pool)

    def num_draws(self, epoch: int) -> int:
        """M, the length of this epoch."""
        return self._part_of_epoch(epoch).num_draws

    def epoch_start(self, epoch: int) -> int:
        """The position of the first draw of this epoch; for the epoch after a finite schedule, its end."""
        last = self._parts[-1]
        if last.num_epochs is not None and epoch == last.first_epoch + last.num_epochs:
            return last.start + last.num_epochs * last.num_draws
        part = self._part_of_epoch(epoch)
        return part.start + (epoch - part.first_epoch) * part.num_draws

    def epoch_of(self, position: int) -> int:
        """The epoch that holds this position."""
        _check_span(position, position)
        part = self._parts[bisect_right([part.start for part in self._parts], position) - 1]
        epoch = part.first_epoch + (position - part.start) // part.num_draws
        if part.num_epochs is not None and epoch >= part.first_epoch + part.num_epochs:
            raise UsageError(
                f"expected a position before the end of the schedule, {self.epoch_start(epoch)}; got {position}"
            )
        return epoch

    def draws(self, begin: int, end: int) -> Draws:
        """The draws at positions [begin, end) of the endless sequence, in order; they may cross epochs."""
        _check_span(begin, end)
        class_ids: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
        draws: list[I64] = [np.empty(0, np.int64)]
        while begin < end:
            window = self._window_at(begin)
            stop = min(end, window.stop)
            class_ids.append(window.class_id[begin - window.start : stop - window.start])
            draws.append(window.draw[begin - window.start : stop - window.start])
            begin = stop
        return Draws(class_id=np.concatenate(class_ids), draw=np.concatenate(draws))

    def images(self, class_id: NDArray[np.integer[Any]], draw: I64) -> tuple[I64, I64]:
        """``(ordinal, repeat)``, int64[n] each: which image of its class each draw shows, in [0, pool of the class),
        and how often that same image was drawn before, over all epochs.
        """
        ordinal, repeat = np.empty(len(draw), np.int64), np.empty(len(draw), np.int64)
        for i in range(0, len(draw), _IMAGES_AT_ONCE):
            rows = slice(i, i + _IMAGES_AT_ONCE)
            ordinal[rows], repeat[rows] = self._images.at(class_id[rows], draw[rows])
        return ordinal, repeat

    def count_before(self, position: int) -> I64:
        """How often each class was drawn before this position: int64[K]."""
        _check_span(position, position)
        counts = np.zeros(self.num_classes, np.int64)
        if position == 0:
            return counts
        window = self._window_at(position - 1)
        epoch = self._epoch(self.epoch_of(position - 1))
        counts += self._drawn_before_epoch(epoch.number)
        counts[epoch.clock.classes] += window.lower.view(np.int64)
        counts += np.bincount(window.class_id[: position - window.start], minlength=self.num_classes)
        return counts

    def ticks(self, epoch: int, class_id: NDArray[np.integer[Any]], draw: I64) -> U64:
        """When these draws of one epoch happen, on its clock of 2^62 ticks: what their order is the order of."""
        here = self._epoch(epoch)
        row = np.searchsorted(here.clock.classes, class_id)
        return here.ticks(row, draw.view(np.uint64) - here.first[row])

    def _part_of_epoch(self, epoch: int) -> _Part:
        part = self._parts[bisect_right([part.first_epoch for part in self._parts], epoch) - 1]
        if epoch < 0 or (part.num_epochs is not None and epoch >= part.first_epoch + part.num_epochs):
            raise UsageError(f"expected an epoch of the schedule, from 0; got {epoch}")
        return part

    def _drawn_before_epoch(self, epoch: int) -> I64:
        """P of every class: draws over all earlier epochs, one product a stage."""
        drawn = np.zeros(self.num_classes, np.int64)
        for part in self._parts:
            drawn += part.targets * max(0, min(epoch - part.first_epoch, part.num_epochs or epoch))
        return drawn

    def _epoch(self, number: int) -> Epoch:
        with self._lock:
            return _cached(self._epochs, number, lambda: self._make_epoch(number))

    def _make_epoch(self, number: int) -> Epoch:
        part = self._part_of_epoch(number)
        clock = next((e.clock for e in self._epochs.values() if e.clock.targets is part.targets), None)
        if clock is None:
            clock = Clock.make(part.targets, self._when, self._bits(part.num_draws))
        first = self._drawn_before_epoch(number)[clock.classes].view(np.uint64)
        return Epoch(number=number, start=self.epoch_start(number), num_draws=part.num_draws, clock=clock, first=first)

    def _bits(self, num_draws: int) -> int:
        if self._window_bits is not None:
            return self._window_bits
        return ((num_draws - 1) // max(WINDOW_DRAWS, self.num_classes)).bit_length()

    def _window_at(self, position: int) -> Window:
        """The window that holds this position: kept, or found by stepping from where it should be."""
        with self._lock:
            for key, window in self._windows.items():
                if window.start <= position < window.stop:
                    self._windows.move_to_end(key)
                    return window
            epoch = self._epoch(self.epoch_of(position))
            index, lower, upper = self._bracket(epoch, position - epoch.start)
            return _cached(self._windows, (epoch.number, index), lambda: epoch.window(lower, upper))

    def _bracket(self, epoch: Epoch, place: int) -> tuple[int, U64, U64]:
        """The number of the window around ``place`` of the epoch, and the draws of each class before its borders."""
        index = (place << epoch.clock.bits) // epoch.num_draws
        follows = next(
            (i for (e, i), w in self._windows.items() if e == epoch.number and w.stop - epoch.start == place), None
        )
        if follows is not None:  # reading on: the border behind us was counted already
            index = follows + 1
            lower = self._windows[epoch.number, follows].upper
        else:
            lower = epoch.drawn_before(index)
        while int(lower.sum()) > place:
            index -= 1
            lower = epoch.drawn_before(index)
        upper = epoch.drawn_before(index + 1)
        while int(upper.sum()) <= place:
            index, lower = index + 1, upper
            upper = epoch.drawn_before(index + 1)
        return index, lower, upper


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A stage, checked, and where it lies: its first epoch and the position of its first draw."""

    targets: I64
    num_epochs: int | None
    num_draws: int
    first_epoch: int
    start: int


class _Images:
    """Which image draw p of a class shows: cycles of two halves, each shuffled afresh, all turned by the class's turn.

    Every cycle shows every image once, so an image shown in cycle k was shown k times before.
    """

    def __init__(self, pool: I64, which: int, turn: int) -> None:
        classes = np.arange(len(pool))
        self._pool = pool.view(np.uint64)
        self._keys = keyed_hash(which, classes)
        self._turn = keyed_hash(turn, classes) % np.maximum(self._pool, _ONE)
        sizes, row = np.unique(self._pool, return_inverse=True)
        self._side = ceil_sqrt(sizes >> _ONE).astype(np.uint32)[row]  # of the second half
        self._first_side = ceil_sqrt((sizes + _ONE) >> _ONE).astype(np.uint32)[row]

    def at(self, class_id: NDArray[np.integer[Any]], draw: I64) -> tuple[I64, I64]:
        pool, p = self._pool[class_id], draw.view(np.uint64)
        if pool.size and not pool.all():
            empty = class_id[np.flatnonzero(pool == 0)[0]]
            raise UsageError(f"expected draws of classes with images; class {empty} has none")
        cycle = p // pool
        place = p - cycle * pool
        middle = (pool + _ONE) >> _ONE
        half = place >= middle
        offset = middle * half
        size = np.where(half, pool - middle, middle)
        side = np.where(half, self._side[class_id], self._first_side[class_id]).astype(np.uint64)
        key = keyed_hash(self._keys[class_id], cycle + cycle + half)
        image = permute(key, (place - offset).view(np.int64), size.view(np.int64), side).view(np.uint64)
        image += offset + self._turn[class_id]
        image -= pool * (image >= pool)
        return image.view(np.int64), cycle.view(np.int64)


def _cached(cache: OrderedDict[_Key, _Value], key: _Key, make: Callable[[], _Value]) -> _Value:
    if key not in cache:
        cache[key] = make()
    cache.move_to_end(key)
    while len(cache) > _CACHED:
        cache.popitem(last=False)
    return cache[key]


def _rebuild(pool: I64, stages: Sequence[Stage], seed: int, window_bits: int | None) -> EpochFunction:
    return EpochFunction(pool, stages, seed, _window_bits=window_bits)


def _lay_out(stages: Sequence[Stage], pool: I64) -> tuple[_Part, ...]:
    """Check every stage and set them one after the other."""
    if not stages:
        raise PolicyError("expected at least one stage, got none")
    parts: list[_Part] = []
    epoch = start = 0
    for i, stage in enumerate(stages):
        targets = _check_targets(f"stage {i}", _counts(f"targets of stage {i}", stage.targets), pool)
        num_epochs = _check_num_epochs(i, stage.num_epochs, last=i == len(stages) - 1)
        num_draws = int(targets.sum())
        parts.append(_Part(targets=targets, num_epochs=num_epochs, num_draws=num_draws, first_epoch=epoch, start=start))
        epoch, start = epoch + (num_epochs or 0), start + (num_epochs or 0) * num_draws
    return tuple(parts)


def _counts(what: str, values: NDArray[np.integer[Any]]) -> I64:
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise PolicyError(f"expected {what} to be integers, one per class; got {values.dtype} of shape {values.shape}")
    counts = np.array(values, np.int64)
    if (counts < 0).any():
        raise PolicyError(f"expected {what} to be 0 or more; got {_some(values, counts < 0)}")
    return counts


def _check_targets(where: str, targets: I64, pool: I64) -> I64:
    if targets.shape != pool.shape:
        raise PolicyError(f"{where}: expected targets of {len(pool)} classes, got {len(targets)}")
    if not targets.any():
        raise PolicyError(f"{where}: expected at least one draw in an epoch; all {len(targets)} targets are 0")
    if (targets >= MAX_TARGET).any():
        raise PolicyError(f"{where}: expected targets below 2^31; got {_some(targets, targets >= MAX_TARGET)}")
    if (empty := (targets > 0) & (pool == 0)).any():
        raise PolicyError(f"{where}: expected images for every class with a target; none for {_some(targets, empty)}")
    return targets


def _check_num_epochs(i: int, num_epochs: int | None, *, last: bool) -> int | None:
    if num_epochs is None and not last:
        raise PolicyError(f"stage {i}: expected a number of epochs; only the last stage may go on for ever")
    if num_epochs is not None and num_epochs < 1:
        raise PolicyError(f"stage {i}: expected at least 1 epoch, got {num_epochs}")
    return num_epochs


def _check_span(begin: int, end: int) -> None:
    if not 0 <= begin <= end <= MAX_POSITION:
        raise UsageError(f"expected positions 0 <= begin <= end <= 2^62, got begin {begin} and end {end}")


def _some(values: NDArray[np.integer[Any]], bad: NDArray[np.bool_]) -> str:
    """All offenders at once, the first few by name."""
    rows = np.flatnonzero(bad)
    named = ", ".join(f"class {row}: {values[row]}" for row in rows[:5])
    return named if len(rows) <= 5 else f"{named}, and {len(rows) - 5} more"
