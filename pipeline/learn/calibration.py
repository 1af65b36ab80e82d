"""How sure a model may be: the temperature that makes its probabilities fit validation images.

In: scores of validation images and their labels. Out: a temperature. Guarantees: numpy only, float64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.learn.scores import Scores, log_softmax

Ints = NDArray[np.integer[Any]]

MAX_SHARPNESS = 1e4
_STEP = 1e-10  # of log(1/T): a smaller one is not worth taking
_MAX_STEPS = 100


def temperature(values: NDArray[np.floating[Any]], labels: Ints) -> float:
    """The T > 0 for which softmax(values / T) has the least negative log-likelihood on validation images.

    Guo et al., ICML 2017. ``values``: logits [N, K], ``labels``: int [N]. The log-likelihood is concave in 1/T, so the
    zero of its slope is found by Newton's steps, or by bisection where they leave its bracket. Where the best is at an
    end (all are right: sharper is always better; or worse than chance), the end is returned: 1/T within
    [1/MAX_SHARPNESS, MAX_SHARPNESS]. Images whose own class is impossible say nothing of T and are left out.
    """
    if len(values) != len(labels) or values.ndim != 2:
        raise UsageError(f"expected logits [N, K] and N labels, found {list(values.shape)} and {list(labels.shape)}")
    found = fit_temperature(Scores(values=values), labels)
    if found is None:
        raise UsageError("a temperature needs validation images of classes that the logits allow; there is none")
    return found


def fit_temperature(scores: Scores, labels: Ints) -> float | None:
    """As ``temperature``, None without such images; a ``shift`` of the scores is added after they were divided."""
    low, high = -np.log(MAX_SHARPNESS), np.log(MAX_SHARPNESS)
    end = _slope(scores, labels, high)[0]
    if math.isnan(end):
        return None
    if end >= 0:
        return float(np.exp(-high))
    if _slope(scores, labels, low)[0] <= 0:
        return float(np.exp(-low))
    place = 0.0
    for _ in range(_MAX_STEPS):
        slope, bend = _slope(scores, labels, place)
        move = -slope / bend if bend < 0 else math.inf
        if abs(move) < _STEP or high - low < _STEP:
            break
        low, high = (place, high) if slope > 0 else (low, place)
        place = place + move if low < place + move < high else (low + high) / 2
    return float(np.exp(-place))


def _slope(scores: Scores, labels: Ints, log_sharpness: float) -> tuple[float, float]:
    """The first and the second derivative of the mean log-likelihood by log(1/T); NaN without images."""
    s, shift = np.exp(log_sharpness), np.zeros(scores.num_classes) if scores.shift is None else scores.shift
    num, first, second = 0, 0.0, 0.0
    for mine, logits in replace(scores, sharpness=1.0, shift=None).by_rows():
        truth = labels[mine]
        kept = np.isfinite(logits[np.arange(len(logits)), truth]) & np.isfinite(shift[truth])
        z, truth = logits[kept], truth[kept]
        z -= z.max(axis=1, keepdims=True, initial=-np.inf)
        told = np.exp(log_softmax(z * s + shift))
        z[~np.isfinite(z)] = 0.0  # their probability is 0
        mean = (told * z).sum(axis=1)
        spread = (told * z * z).sum(axis=1) - mean**2
        gain = s * (z[np.arange(len(z)), truth] - mean)
        num, first = num + len(z), first + float(gain.sum())
        second += float((gain - s * s * spread).sum())
    return (first / num, second / num) if num else (math.nan, math.nan)
