"""When: the order of the draws of one epoch, window by window ("When" and "Windows" of DESIGN.md, section 8).

Comes in: targets, a key, how often each class was drawn in earlier epochs. Goes out: the ordered draws of any window of
the epoch, and the counts at its borders. Guarantees: the order is that of (tick, class, p), however the clock is cut;
all arithmetic is on integers below 2^64.

    slot j of class c    |---------B_j-------------x-----B_{j+1}----|    x: tick of draw p = P + j, B_j + jitter
    windows              |------ w ------|----- w + 1 -----|             2^b of them; one is sorted at a time
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.keyed import I64, U64, keyed_hash

CLOCK_BITS = 62
"""An epoch is 2^62 ticks: as fine as products of a tick's parts with 31- and 32-bit numbers allow in 64 bits."""

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ONE = np.uint64(1)
_N = np.uint64(1 << 32)
_Q = np.uint64(1 << 30)


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """The ordered draws at positions [start, stop) of an epoch, and draws of each class before and after them."""

    start: int
    stop: int
    lower: U64
    upper: U64
    class_id: NDArray[np.int32]
    draw: I64


@dataclass(frozen=True, kw_only=True, eq=False)
class Clock:
    """When the classes with targets are drawn, in every epoch of a stage: arrays over those A <= K classes."""

    targets: I64  # of all K classes
    bits: int  # the clock is cut into 2^bits windows
    classes: NDArray[np.int32]
    keys: U64
    num: U64  # T_c
    step: U64  # divmod(2^62, T_c)
    rest: U64

    @classmethod
    def make(cls, targets: I64, when: int, bits: int) -> Clock:
        classes = np.flatnonzero(targets)
        num = targets[classes].view(np.uint64)
        step = np.uint64(1 << CLOCK_BITS) // num
        return cls(
            targets=targets,
            bits=bits,
            classes=classes.astype(np.int32),
            keys=keyed_hash(when, classes),
            num=num,
            step=step,
            rest=np.uint64(1 << CLOCK_BITS) - step * num,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Epoch:
    """One epoch: a clock, and how many draws of each of its classes came earlier."""

    number: int
    start: int
    num_draws: int
    clock: Clock
    first: U64  # P of each class of the clock

    def ticks(self, row: NDArray[np.intp] | slice, j: U64) -> U64:
        """The tick of draw ``j`` of this epoch, for the class at ``row`` of the clock."""
        clock = self.clock
        begin, length = slots(j, clock.num[row], clock.step[row], clock.rest[row])
        place = jitter(clock.keys[row], self.first[row] + j)
        return begin + place * (length >> _HALF) + (place * (length & _LOW) >> _HALF)

    def drawn_before(self, index: int) -> U64:
        """Draws of each class before window ``index``. A slot that spans the border holds one draw, on either side."""
        clock = self.clock
        if index == 1 << clock.bits:
            return clock.num
        j = np.uint64(index) * clock.num >> np.uint64(clock.bits)
        return j + (self.ticks(slice(None), j) < np.uint64(index << (CLOCK_BITS - clock.bits)))

    def window(self, lower: U64, upper: U64) -> Window:
        """Order draws [lower, upper) of each class by (tick, class, p)."""
        size = (upper - lower).view(np.int64)
        row = np.repeat(np.arange(len(size)), size)
        j = np.arange(len(row), dtype=np.uint64) + np.repeat(lower - (np.cumsum(size) - size).view(np.uint64), size)
        order = sort_ticks(self.ticks(row, j))
        j += self.first[row]
        start = self.start + int(lower.sum())
        return Window(
            start=start,
            stop=start + len(row),
            lower=lower,
            upper=upper,
            class_id=self.clock.classes[row[order]],
            draw=j[order].view(np.int64),
        )


def slots(j: U64, num: U64, step: U64, rest: U64) -> tuple[U64, U64]:
    """First tick and length of slot j of ``num``: from B_j = floor(j * 2^62 / num) to B_{j+1}.

    ``step, rest`` = divmod(2^62, num); j, rest < num < 2^31, so nothing overflows.
    """
    carried = j * rest
    whole = carried // num
    longer = carried - whole * num + rest >= num
    return j * step + whole, step + longer


def jitter(keys: U64, p: U64) -> U64:
    """U in [0, 2^32): where in its slot draw p lies. Uniform, yet neighbours p, p + 1 stay a quarter of a slot apart.

    Even draws lie where their hash says. An odd draw lies ``w`` after the one before it: a uniform choice among the
    places A that are a quarter of a slot (Q) from both neighbours, which are d apart.
    """
    hashed = keyed_hash(keys, p) >> _HALF
    odd = np.flatnonzero(p & _ONE)
    keys, p = keys[odd], p[odd]
    before = keyed_hash(keys, p - _ONE) >> _HALF
    d = (keyed_hash(keys, p + _ONE) >> _HALF) - before & _LOW
    hashed[odd] = (before + _choose(hashed[odd], d)) & _LOW
    return hashed


def _choose(h: U64, d: U64) -> U64:
    """Element number floor(h * |A| / N) of A = [Q, N) without the Q places up to and including d, modulo N."""
    wraps = d < _Q - _ONE  # then they are [0, d] and the last Q - 1 - d places of [Q, N)
    hole_end = np.maximum(d + _ONE, _Q)
    hole_begin = np.where(wraps, _Q, np.maximum(d + _ONE, _Q + _Q) - _Q)
    top = np.where(wraps, _N - _Q + d + _ONE, _N)
    below = hole_begin - _Q
    element = h * (below + (top - hole_end)) >> _HALF
    return np.where(element < below, _Q + element, hole_end + (element - below))


def sort_ticks(ticks: U64) -> NDArray[np.intp]:
    """A stable argsort by way of the faster unstable one: only runs of equal ticks need their order repaired."""
    order = np.argsort(ticks)
    ordered = ticks[order]
    equal = ordered[1:] == ordered[:-1]
    if equal.any():
        tied = np.flatnonzero(np.append(equal, False) | np.insert(equal, 0, False))
        order[tied] = order[tied][np.lexsort((order[tied], ordered[tied]))]
    return order
