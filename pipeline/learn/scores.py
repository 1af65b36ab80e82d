"""Scores that are too many to copy: rows of a matrix as float64 logits, a block at a time.

In: the numbers of a file, which of its rows, and what they are. Out: what each image is taken for, and log
probabilities class by class. Guarantees: numpy only; the numbers are kept once, as they came; all arithmetic is
float64; whatever the size of a block, the results are the same bits, as each is of one row or of one number alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK = 1 << 20
"""Numbers of a block: 8 MiB, of which a few are there at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Some rows of ``values``, as the logits ``sharpness * z + shift``.

    ``values``: float32 or float64 ``[M, K]``, shared and never changed; ``rows``: int ``[N]``, or None for all. z is a
    number of ``values``, or its logarithm where they are ``probabilities``. ``shift``: float64 ``[K]`` or None.
    """

    values: NDArray[np.floating[Any]]
    rows: Ints | None = None
    probabilities: bool = False
    sharpness: float = 1.0
    shift: Floats | None = None

    def __len__(self) -> int:
        return len(self.values) if self.rows is None else len(self.rows)

    @property
    def num_classes(self) -> int:
        return int(self.values.shape[1])

    def by_rows(self) -> Iterator[tuple[slice, Floats]]:
        """Which images, and their logits ``[n, K]``, in order."""
        step = max(1, BLOCK // max(1, self.num_classes))
        for first in range(0, len(self), step):
            mine = slice(first, min(first + step, len(self)))
            yield mine, self._logits(self.values[mine if self.rows is None else self.rows[mine]], slice(None))

    def of_classes(self, columns: slice) -> Floats:
        """The logits of all images and some classes, ``[n, N]``: those of one class lie side by side."""
        part = self.values[:, columns]
        return np.ascontiguousarray(self._logits(part if self.rows is None else part[self.rows], columns).T)

    def _logits(self, part: NDArray[np.floating[Any]], columns: slice) -> Floats:
        made = part.astype(np.float64)
        if self.probabilities:
            with np.errstate(divide="ignore"):
                np.log(np.maximum(made, 0.0, out=made), out=made)  # -inf: a class without a column
        if self.sharpness != 1.0:
            made *= self.sharpness
        if self.shift is not None:
            made += self.shift[columns]
        return made


@dataclass(frozen=True, kw_only=True, eq=False)
class Decisions:
    """What each of N images is taken for."""

    predicted: Ints  # the class of the highest score, the first of equal ones; NO_CLASS where there is none
    confidence: Floats  # its probability
    log_total: Floats  # of the exponentials of the logits; -inf where no class has a score


NO_CLASS = -1


def decide(scores: Scores) -> Decisions:
    """Predict each image. One of which every class has the score -inf is taken for nothing."""
    predicted = np.empty(len(scores), dtype=np.int64)
    confidence, log_total = np.empty(len(scores)), np.empty(len(scores))
    for mine, logits in scores.by_rows():
        log_total[mine] = logsumexp(logits)
        told = _less(logits, log_total[mine])
        predicted[mine] = told.argmax(axis=1)
        confidence[mine] = np.exp(told.max(axis=1))
    predicted[np.isneginf(log_total)] = NO_CLASS
    return Decisions(predicted=predicted, confidence=confidence, log_total=log_total)


def class_blocks(num_classes: int, num_images: int) -> Iterator[slice]:
    """Slices of the classes, of as many as make a block."""
    step = max(1, BLOCK // max(1, num_images))
    for first in range(0, num_classes, step):
        yield slice(first, min(first + step, num_classes))


def log_probabilities(scores: Scores, decided: Decisions, columns: slice) -> Floats:
    """float64 ``[n, N]`` of some classes; -inf for an image that is taken for nothing."""
    return _less(scores.of_classes(columns).T, decided.log_total).T


def _less(logits: Floats, log_total: Floats) -> Floats:
    """``logits`` [N, n] less the total of each row, in place; where that is -inf, all are."""
    logits -= np.where(np.isneginf(log_total), 0.0, log_total)[:, None]
    return logits


def log_softmax(values: NDArray[np.floating[Any]]) -> Floats:
    """float64 ``[N, K]``: log probabilities of logits; a row of nothing but ``-inf`` becomes NaN."""
    wide = values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return wide - logsumexp(wide)[:, None]


def logsumexp(values: Floats) -> Floats:
    """float64 ``[N]`` of ``[N, K]``; -inf for a row of nothing but -inf."""
    top = values.max(axis=1)
    shift = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - shift[:, None]).sum(axis=1)) + shift
