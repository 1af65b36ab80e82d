"""Figures of one class's scores against the rest, and calibration: AUROC, sensitivity at a specificity, its error.

In: float scores ``[N]`` of one class, higher for more likely, and a bool ``[N]`` that tells its images. Out: floats in
[0, 1], NaN where nothing was measured. Guarantees: numpy only; exact and free of order - counts are integers, sums of
floats are rounded once (``math.fsum``) - so that samples merged from any number of ranks give the same bits. ``-inf``
is a score like any other; NaN is refused.

No library does this on a long tail: torchmetrics 1.9 counts an absent class as AUROC 0, and bins thresholds where the
softmax of a rare class never comes; scikit-learn returns NaN for the whole. Where all classes are there they agree,
which tests hold.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

SPECIFICITIES = (0.9, 0.99, 0.999)
"""With 5,000 classes, 0.9 lets a tenth of all other images through, and nearly every model passes."""

NUM_BINS = 15
"""Of the calibration error, as in Guo et al., ICML 2017."""


def auroc(scores: Floats, positive: Bools) -> float:
    """P(an image of the class scores higher than another image), ties count half; NaN without both kinds.

    The Mann-Whitney form: 2U is an integer, counted by sorting; no threshold, no curve.
    """
    _check(scores, positive)
    inside, outside = scores[positive], np.sort(scores[~positive])
    if not len(inside) or not len(outside):
        return math.nan
    below = int(np.searchsorted(outside, inside, "left").sum())
    not_above = int(np.searchsorted(outside, inside, "right").sum())
    return (below + not_above) / (2 * len(inside) * len(outside))


def threshold(scores: Floats, positive: Bools, specificity: float) -> float:
    """The lowest score t for which at least the share ``specificity`` of the other images scores t or less.

    Chosen on validation; an image is called the class where its score is above t. NaN without other images. With fewer
    than 1 / (1 - specificity) of them it is their highest score.
    """
    _check(scores, positive)
    if not 0 <= specificity <= 1:
        raise UsageError(f"a specificity is from 0 to 1, not {specificity}")
    outside = scores[~positive]
    if not len(outside):
        return math.nan
    # A hair less than the product: 0.9 * 10 images must be 9 of them, whatever floats make of it.
    needed = math.ceil(specificity * len(outside) * (1 - 1e-12))
    return float(np.partition(outside, needed - 1)[needed - 1]) if needed else -math.inf


def at_threshold(scores: Floats, positive: Bools, limit: float) -> tuple[float, float]:
    """Sensitivity and specificity where scores above ``limit`` are called the class; NaN where there is no image."""
    _check(scores, positive)
    called = scores > limit
    num_inside, num_outside = int(positive.sum()), int((~positive).sum())
    hits, misses = int((called & positive).sum()), int((called & ~positive).sum())
    if math.isnan(limit):
        return math.nan, math.nan
    return (
        hits / num_inside if num_inside else math.nan,
        1 - misses / num_outside if num_outside else math.nan,
    )


def calibration_error(confidence: Floats, correct: Bools, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error of the predicted class: sum over bins of share * |accuracy - mean confidence|.

    ``confidence``: probability of the predicted class, ``[N]``; bins (i/n, (i+1)/n] of equal width. NaN without images.
    Naeini et al., AAAI 2015. It moves with prevalence, as accuracy does.
    """
    if not len(confidence):
        return math.nan
    edges = np.arange(1, num_bins) / num_bins
    place = np.searchsorted(edges, confidence, side="left")
    gaps: list[float] = []
    for number in range(num_bins):
        inside = place == number
        if inside.any():
            gaps.append(abs(int(correct[inside].sum()) - math.fsum(confidence[inside].tolist())))
    return math.fsum(gaps) / len(confidence)


def _check(scores: Floats, positive: Bools) -> None:
    if scores.shape != positive.shape or scores.ndim != 1:
        raise UsageError(f"expected scores and their truth, [N] each; found {scores.shape} and {positive.shape}")
    if np.isnan(scores).any():
        raise UsageError(
            f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; leave those images out, and say so"
        )
