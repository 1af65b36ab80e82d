"""Recall per class and per group of classes: figures that a frequent class cannot dominate.

In: labels and predictions as int arrays, counts of the training split. Out: floats in [0, 1], NaN where nothing was
measured. Pure functions.
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


def balanced_accuracy(recall: Floats) -> float:
    """Mean recall over the classes that were measured; NaN if none was."""
    measured = recall[~np.isnan(recall)]
    return float(measured.mean()) if len(measured) else float("nan")


def coverage(recall: Floats) -> float:
    """The share of all classes that was measured. Classes without an image outside train never are: say it beside every
    mean over classes."""
    return float((~np.isnan(recall)).mean()) if len(recall) else float("nan")


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
