"""Bootstrap intervals: how much a figure would move with other images, or other classes.

In: labels and predictions, or one figure per class. Out: ``(low, high)``, the 2.5th and 97.5th percentile of
``REPLICATES`` replicates. Guarantees: seeded by keyed hashes, and free of order, so that the same images give the same
interval on any number of ranks; NaN where there is nothing to resample.

Two kinds, for two kinds of figures (Efron and Tibshirani, 1993):

*over images*: N images are drawn from the N with replacement, not stratified, so that class shares move as they would.
For accuracy and kappa, which are sums over images.

*over classes*: the measured classes are drawn with replacement, each with its figure. For means over classes.
Resampling images inside each class would call a class with one test image certain, and half of a long tail has one;
this holds their noise and the spread between classes, so that it is rather too wide than too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.keyed import derive, keyed_hash, seed_key

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]
Interval = tuple[float, float]

REPLICATES = 1000
_IMAGES, _CLASSES = 1, 2  # purposes of keys


def over_images(
    labels: Ints, predictions: Ints, statistic: Callable[[Ints, Ints, Ints], float], seed: int = 0
) -> Interval:
    """95 % interval of ``statistic(labels, predictions, counts)``; it is given the distinct pairs, and how often each
    occurs in a replicate."""
    if labels.shape != predictions.shape:
        raise UsageError(f"labels have shape {labels.shape}, predictions {predictions.shape}; they must be equal")
    if not len(labels):
        return math.nan, math.nan
    pairs, counts = np.unique(np.stack([labels, predictions]), axis=1, return_counts=True)
    pair_of = np.repeat(np.arange(len(counts)), counts)
    made = np.empty(REPLICATES)
    for number in range(REPLICATES):
        chosen = _indices(derive(seed_key(seed), _IMAGES, number), len(labels), len(labels))
        drawn = np.bincount(pair_of[chosen], minlength=len(counts))
        made[number] = statistic(pairs[0], pairs[1], drawn)
    return _percentiles(made)


def over_classes(values: Floats, seed: int = 0) -> Interval:
    """95 % interval of the mean of ``values``, one per class; NaN are classes that were not measured."""
    measured = values[~np.isnan(values)]
    if not len(measured):
        return math.nan, math.nan
    made = np.empty(REPLICATES)
    for number in range(REPLICATES):
        made[number] = measured[_indices(derive(seed_key(seed), _CLASSES, number), len(measured), len(measured))].mean()
    return _percentiles(made)


def _indices(key: int, num: int, size: int) -> NDArray[np.intp]:
    """``num`` numbers below ``size`` < 2^32, independent of each other."""
    top = keyed_hash(key, np.arange(num)) >> np.uint64(32)
    return ((top * np.uint64(size)) >> np.uint64(32)).astype(np.intp)


def _percentiles(made: Floats) -> Interval:
    defined = made[~np.isnan(made)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [0.025, 0.975]).tolist()
    return low, high
