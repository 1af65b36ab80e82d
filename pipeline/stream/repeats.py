"""Decoded images that will be drawn again, in memory.

Comes in: pixels, and how often their image is drawn in an epoch. Goes out: the same pixels, later. Guarantees: at most
``max_bytes`` of them; what is drawn more often stays in place of what is drawn less often, and nothing else is ever
thrown out, so draws in random order do not empty it; batches are the same with it and without.

A balanced epoch of a long tail draws few images most of the time: a class with one photo shows it 100 times. Reading
its bytes and verifying them costs 4 us; decoding them costs 200 to 600 us, and is what this saves.
"""

from __future__ import annotations

import heapq
import threading

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError

Pixels = NDArray[np.uint8]


class RepeatCache:
    """Pixels by sample row and scale. Thread-safe."""

    def __init__(self, max_bytes: int, draws: NDArray[np.floating]) -> None:
        """``draws[c]``: how often an epoch draws each image of class c on average."""
        if max_bytes < 1:
            raise UsageError(f"a cache of repeats must have at least 1 byte, not {max_bytes}; 0 makes none")
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._draws = draws
        self._pixels: dict[tuple[int, int], Pixels] = {}
        self._by_draws: list[tuple[float, tuple[int, int]]] = []  # a heap: what is drawn least often first
        self._lock = threading.Lock()

    def of(self, row: int, class_id: int) -> RepeatsOf:
        """The part of it that belongs to one image."""
        return RepeatsOf(self, row, float(self._draws[class_id]))

    def find(self, row: int, scale: int) -> Pixels | None:
        return self._pixels.get((row, scale))

    def keep(self, row: int, scale: int, pixels: Pixels, draws: float) -> None:
        """Unless all room is taken by what is drawn as often."""
        key, size = (row, scale), pixels.nbytes
        with self._lock:
            if key in self._pixels or not self._make_room(size, draws):
                return
            # A view would keep all of what it is a part of; and nobody may write into what others read.
            kept = pixels.copy() if pixels.base is not None else pixels
            kept.flags.writeable = False
            self._pixels[key] = kept
            self.used_bytes += size
            heapq.heappush(self._by_draws, (draws, key))

    def _make_room(self, size: int, draws: float) -> bool:
        room, leaving = self.max_bytes - self.used_bytes, 0
        losers: list[tuple[float, tuple[int, int]]] = []
        while room + leaving < size and self._by_draws and self._by_draws[0][0] < draws:
            losers.append(heapq.heappop(self._by_draws))
            leaving += self._pixels[losers[-1][1]].nbytes
        if room + leaving < size:
            for loser in losers:
                heapq.heappush(self._by_draws, loser)
            return False
        for _, key in losers:
            self.used_bytes -= self._pixels.pop(key).nbytes
        return True


class RepeatsOf:
    """One image's place in a ``RepeatCache``: what a decoder asks before, and tells after."""

    def __init__(self, cache: RepeatCache, row: int, draws: float) -> None:
        self._cache, self._row, self._draws = cache, row, draws

    def find(self, scale: int) -> Pixels | None:
        """Its pixels at ``scale`` eighths of its size, not to be written to."""
        return self._cache.find(self._row, scale)

    def keep(self, scale: int, pixels: Pixels) -> None:
        """They were decoded, and are the cache's from now on."""
        self._cache.keep(self._row, scale, pixels, self._draws)
