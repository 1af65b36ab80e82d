"""Recall per class and per group of classes: figures that a frequent class cannot dominate; and those that it can.

In: labels and predictions as int arrays, counts of the training split. Out: floats in [0, 1] (kappa from -1), NaN where
nothing was measured. Pure functions of integer counts, so the same bits for any order of the images. A prediction that
is no class (-1, or beyond the last) is wrong, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.plan.shots import FEW_BELOW, MANY_ABOVE

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]


def per_class_recall(labels: Ints, predictions: Ints, num_classes: int) -> Floats:
    """Float64 ``[num_classes]``: the share of each class's images that was recognised; NaN for an absent class."""
    if labels.shape != predictions.shape:
        raise UsageError(f"labels have shape {labels.shape}, predictions {predictions.shape}; they must be equal")
    support = np.bincount(labels, minlength=num_classes)
    if len(support) > num_classes:
        raise UsageError(f"label {int(labels.max())} is outside of {num_classes} classes")
    hits = np.bincount(labels[labels == predictions], minlength=num_classes)
    return np.where(support > 0, hits / np.maximum(support, 1), np.nan)


def accuracy(labels: Ints, predictions: Ints, counts: Ints | None = None) -> float:
    """The share of the images that was recognised. It depends on prevalence. ``counts``: how often each pair occurs."""
    many = np.ones(len(labels), dtype=np.int64) if counts is None else counts
    total = int(many.sum())
    return int(many[labels == predictions].sum()) / total if total else float("nan")


def kappa(labels: Ints, predictions: Ints, counts: Ints | None = None) -> float:
    """Cohen's kappa (1960): (observed - chance) / (1 - chance) agreement; NaN where chance cannot be wrong.

    It depends on prevalence: see docs/METRICS.md. Two counts per class suffice, where a K x K table of 5,000 classes
    takes 200 MB. ``counts``: how often each pair occurs, as ``intervals.over_images`` gives it.
    """
    many = np.ones(len(labels), dtype=np.int64) if counts is None else counts
    total = int(many.sum())
    right = int(many[labels == predictions].sum())
    size = int(labels.max(initial=-1)) + 1
    inside = (predictions >= 0) & (predictions < size)  # what is never true agrees with nothing by chance
    truth = _sums(labels, many, size)
    told = _sums(predictions[inside], many[inside], size)
    chance = sum(a * b for a, b in zip(truth.tolist(), told.tolist(), strict=True))
    return (total * right - chance) / (total**2 - chance) if total**2 != chance else float("nan")


def _sums(values: Ints, many: Ints, size: int) -> NDArray[np.int64]:
    found = np.zeros(size, dtype=np.int64)
    np.add.at(found, values, many)
    return found


def balanced_accuracy(recall: Floats) -> float:
    """Mean recall over the classes that were measured; NaN if none was."""
    measured = recall[~np.isnan(recall)]
    return float(measured.mean()) if len(measured) else float("nan")


def coverage(recall: Floats) -> float:
    """The share of all classes that was measured. Classes without an image outside train never are: say it beside every
    mean over classes."""
    return float((~np.isnan(recall)).mean()) if len(recall) else float("nan")


def accuracy_at(recall: Floats, prior: Floats) -> float:
    """The accuracy where class c has the share ``prior[c]`` of the images, over the measured classes; else NaN."""
    if recall.shape != prior.shape:
        raise UsageError(f"recall covers {recall.shape} classes, the prior {prior.shape}; they must be equal")
    measured = ~np.isnan(recall)
    share = float(prior[measured].sum())
    return float((recall[measured] * prior[measured]).sum()) / share if share > 0 else float("nan")


def one_shot_recall(recall: Floats, pool: Ints) -> float:
    """Mean recall of the measured classes that trained on one image; NaN if there are none.

    ``pool`` is ``manifest.pool``. Real singletons have nothing to be measured on; those that are measured are the
    ``pseudo_singletons`` of the policy.
    """
    if recall.shape != pool.shape:
        raise UsageError(f"recall covers {recall.shape} classes, pool {pool.shape}; they must be equal")
    return balanced_accuracy(recall[pool == 1])


def shot_groups(train_counts: Ints) -> Mapping[str, NDArray[np.bool_]]:
    """Bool ``[K]`` masks ``many`` (> 100), ``medium`` (20 to 100) and ``few`` (< 20) by images in train."""
    many, few = train_counts > MANY_ABOVE, train_counts < FEW_BELOW
    return {"many": many, "medium": ~many & ~few, "few": few}


def group_accuracy(recall: Floats, train_counts: Ints) -> dict[str, float]:
    """Mean of per-class recall inside each group; NaN for a group in which no class was measured."""
    if recall.shape != train_counts.shape:
        raise UsageError(f"recall covers {recall.shape} classes, counts {train_counts.shape}; they must be equal")
    return {name: balanced_accuracy(recall[members]) for name, members in shot_groups(train_counts).items()}
