"""Predictions as given, and corrected to other priors: each a ``Variant`` of figures.

In: the truth of measured images, scores or labels. Out: figures with intervals, per-class recall and AUROC.
Guarantees: no torch; scores stay where they are and are read by blocks (``scores``); thresholds come from val, never
from the images that are measured; averages over classes are over measured classes alone, and say how many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.learn.intervals import Interval, over_classes, over_images
from pipeline.learn.metrics import accuracy, accuracy_at, balanced_accuracy, kappa, per_class_recall
from pipeline.learn.ranking import SPECIFICITIES, at_threshold, auroc, calibration_error, threshold
from pipeline.learn.scores import NO_CLASS, Decisions, Scores, class_blocks, decide, log_probabilities
from pipeline.plan.shots import GROUPS, group_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NO_INTERVAL = (math.nan, math.nan)


@dataclass(frozen=True)
class Figure:
    """A value, its 95 % interval (NaN: none) and over how many classes or images it speaks."""

    value: float
    interval: Interval
    count: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """The predictions as given, or corrected to a prior."""

    name: str
    figures: Mapping[str, Figure]
    recall: Floats  # [K], NaN: not measured
    auroc: Floats | None  # [K]
    confused: Ints  # [K]: what images of the class are most often taken for, NO_CLASS where they are not
    num_never: int  # measured classes of which no image was recognised
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Counts:
    """What a snapshot says of its classes."""

    train: Ints  # [K] images
    natural: Floats  # [K] shares


@dataclass(frozen=True, eq=False)
class Labelled:
    """Scores of N images and their truth."""

    scores: Scores
    labels: Ints

    def moved(self, shift: Floats) -> Labelled:
        """With ``shift`` [K] added to the logits."""
        return Labelled(replace(self.scores, shift=shift), self.labels)


def of_labels(name: str, labels: Ints, predicted: Ints, counts: Counts) -> Variant:
    """Of predictions that have no scores."""
    return _variant(name, (labels, predicted), counts, {}, None)


def of_scores(name: str, made: Labelled, held: Labelled | None, counts: Counts, notes: tuple[str, ...] = ()) -> Variant:
    """Of the images ``made``, with thresholds from ``held``, which are of val."""
    present = np.bincount(made.labels, minlength=made.scores.num_classes) > 0
    limits = _limits(held, present) if held else np.full((0, len(present)), np.nan)
    decided = decide(made.scores)
    ranks, called = _by_class(made, decided, present, limits)
    extra = {"macro AUROC": _over_classes(ranks)}
    for specificity, (sensitive, kept) in zip(SPECIFICITIES, called, strict=False):  # without val there is none
        extra[f"sensitivity at specificity {specificity:g}"] = _over_classes(sensitive)
        extra[f"specificity found, of {specificity:g}"] = _over_classes(kept)
    error = calibration_error(decided.confidence, decided.predicted == made.labels)
    extra["calibration error"] = Figure(error, _NO_INTERVAL, len(made.labels))
    return _variant(name, (made.labels, decided.predicted), counts, extra, ranks, notes)


def _limits(held: Labelled, present: NDArray[np.bool_]) -> Floats:
    """float64 ``[SPECIFICITIES, K]``: thresholds of classes that are ``present``, else NaN."""
    limits = np.full((len(SPECIFICITIES), len(present)), np.nan)
    for c, column in _columns(held.scores, decide(held.scores), present):
        limits[:, c] = [threshold(column, held.labels == c, specificity) for specificity in SPECIFICITIES]
    return limits


def _by_class(made: Labelled, decided: Decisions, present: NDArray[np.bool_], limits: Floats) -> tuple[Floats, Floats]:
    """AUROC ``[K]``; sensitivity and specificity ``[thresholds, 2, K]``; NaN where a class has no image."""
    ranks, called = np.full(len(present), np.nan), np.full((len(limits), 2, len(present)), np.nan)
    for c, column in _columns(made.scores, decided, present):
        positive = made.labels == c
        ranks[c] = auroc(column, positive)
        for row, limit in enumerate(limits[:, c].tolist()):
            called[row, :, c] = at_threshold(column, positive, limit)
    return ranks, called


def _columns(scores: Scores, decided: Decisions, present: NDArray[np.bool_]) -> Iterator[tuple[int, Floats]]:
    """The log probabilities ``[N]`` of each class that is ``present``."""
    for block in class_blocks(len(present), len(scores)):
        wanted = np.flatnonzero(present[block])
        if len(wanted):
            told = log_probabilities(scores, decided, block)
            yield from ((block.start + place, told[place]) for place in wanted.tolist())


def _variant(
    name: str,
    pairs: tuple[Ints, Ints],
    counts: Counts,
    extra: Mapping[str, Figure],
    ranks: Floats | None,
    notes: tuple[str, ...] = (),
) -> Variant:
    labels, predicted = pairs
    recall = per_class_recall(labels, predicted, len(counts.train))
    figures = {
        "accuracy": _over_images(labels, predicted, accuracy),
        "accuracy at train's shares": Figure(
            accuracy_at(recall, counts.natural), _NO_INTERVAL, int((~np.isnan(recall)).sum())
        ),
        "kappa": _over_images(labels, predicted, kappa),
        "balanced accuracy": _over_classes(recall),
    }
    group = group_of(counts.train)
    for place, title in enumerate(GROUPS):
        figures[f"recall, {title}"] = _over_classes(np.where(group == place, recall, np.nan))
    measured = ~np.isnan(recall)
    return Variant(
        name=name,
        figures={**figures, **extra},
        recall=recall,
        auroc=ranks,
        confused=_confused(labels, predicted, len(recall)),
        num_never=int((recall[measured] == 0).sum()),
        notes=notes,
    )


def _over_images(labels: Ints, predicted: Ints, statistic: Any) -> Figure:
    return Figure(statistic(labels, predicted), over_images(labels, predicted, statistic), len(labels))


def _over_classes(values: Floats) -> Figure:
    return Figure(balanced_accuracy(values), over_classes(values), int((~np.isnan(values)).sum()))


def _confused(labels: Ints, predicted: Ints, num_classes: int) -> Ints:
    """int64 ``[K]``: the class that wrong images of each class are most often taken for; the first of equal ones."""
    result = np.full(num_classes, NO_CLASS, dtype=np.int64)
    wrong = labels != predicted  # what was taken for nothing says nothing
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    for place in np.argsort(-counts, kind="stable").tolist():
        if result[pairs[0, place]] == NO_CLASS:
            result[pairs[0, place]] = pairs[1, place]
    return result
