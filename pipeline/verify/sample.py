"""Which images a sampled verification re-reads: a share of every tar, another share under the next seed.

Comes in: a share, a seed, a tar's name and where its images begin. Goes out: runs of rows. Guarantees: the choice
follows from these alone; ``Sample.num_seeds`` seeds in a row read every image at least once, whatever the tars; each
seed reads a part of every tar that has enough images, so a shelf that went bad is met on the first night.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.keyed import text_key

_CIRCLE = 1 << 64


@dataclass(frozen=True)
class Sample:
    """A share of the bytes of every tar, from 0 to 1, and which one."""

    share: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"sample is a share of the images, from 0 to 1, not {self.share}")

    @property
    def num_seeds(self) -> int:
        """After so many seeds in a row everything was read; 0: never."""
        return math.ceil(1 / self.share - 1e-9) if self.share else 0

    def runs(self, tar_sha256: str, starts: NDArray[np.int64]) -> list[tuple[int, int]]:
        """First and last-but-one row of each run of rows to read; ``starts``: where rows begin, and the last one ends.

        A tar is a circle that each seed's window follows the one before on; where it begins is a hash of the tar's
        name, so that the tars of one night stand at different places.
        """
        if not self.share or len(starts) < 2:
            return []
        # Never less than asked, and so much that `num_seeds` windows leave no gap.
        width = max(int(self.share * _CIRCLE), -(-_CIRCLE // self.num_seeds))
        if width >= _CIRCLE:
            return [(0, len(starts) - 1)]
        begin = (text_key(tar_sha256) + self.seed * width) % _CIRCLE
        place = (starts[:-1] / starts[-1] * (1 << 53)).astype(np.uint64) << np.uint64(11)
        chosen = place - np.uint64(begin) < np.uint64(width)
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
