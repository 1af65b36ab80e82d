"""What a model really does, from its predictions for a split: per group, per class, before and after prior correction.

In: a snapshot, a file of predictions, the manifest and the loss that the model was trained with. Out: an ``Evaluation``
of plain numbers. Guarantees: no torch; averages over classes are over measured classes alone, and say how many;
thresholds come from val, never from the split that is measured; nothing is dropped in silence (``predictions``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EvenshardError, UsageError
from pipeline.learn.intervals import Interval, over_classes, over_images
from pipeline.learn.metrics import accuracy, accuracy_at, balanced_accuracy, kappa, per_class_recall
from pipeline.learn.predictions import NO_CLASS, Met, Predictions, meet, read_predictions
from pipeline.learn.priors import Logits, carried, estimate_prior, log_softmax, temperature, uniform
from pipeline.learn.ranking import SPECIFICITIES, at_threshold, auroc, calibration_error, threshold
from pipeline.plan.shots import GROUPS, group_of
from pipeline.snapshot import Manifest, Snapshot

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

AS_GIVEN = "as given"
PRIORS = ("natural", "uniform", "em")
"""``natural``: as in train. ``em``: estimated from the images that are measured, without their labels."""

OF_PREVALENCE = frozenset({"accuracy", "accuracy at train's shares", "kappa", "calibration error"})
"""Figures that move with how frequent classes are, whatever the model does to each: docs/METRICS.md."""

SCORES = ("auto", "logits", "probabilities")
_SUM_TOLERANCE = 1e-2


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Everything ``evenshard evaluate`` tells."""

    snapshot: int
    split: str
    manifest: str
    file: str
    kind: str  # labels, logits or probabilities
    num_images: int  # of the split
    num_measured: int  # that have a prediction
    names: Sequence[str]
    train: Ints  # [K] images in train
    support: Ints  # [K] measured images
    train_share: float  # of the training images, in measured classes
    variants: tuple[Variant, ...]
    temperature: float | None
    notes: tuple[str, ...] = field(default=())

    @property
    def num_classes(self) -> int:
        """Classes with an image in train or among the measured ones."""
        return int(np.count_nonzero((self.train > 0) | (self.support > 0)))

    @property
    def num_classes_measured(self) -> int:
        return int(np.count_nonzero(self.support))

    def worst(self, num: int) -> list[int]:
        """Class ids, lowest recall first; of equal ones those with most images, which are surest."""
        recall = self.variants[0].recall
        measured = np.flatnonzero(self.support)
        order = np.lexsort((measured, -self.support[measured], recall[measured]))
        return measured[order[:num]].tolist()

    def to_json(self) -> dict[str, Any]:
        """Plain values; None where nothing was measured. Per class, all of them, by class id."""
        head = ("snapshot", "split", "manifest", "file", "kind", "num_images", "num_measured", "num_classes")
        body = {name: getattr(self, name) for name in (*head, "num_classes_measured", "train_share", "temperature")}
        body |= {"notes": list(self.notes), "variants": [_variant_json(one) for one in self.variants]}
        groups = group_of(self.train).tolist()
        body["classes"] = [
            {
                "class_id": number,
                "name": name,
                "group": GROUPS[groups[number]] if groups[number] >= 0 else "none",
                "train": int(self.train[number]),
                "images": int(self.support[number]),
                "recall": {one.name: _plain(one.recall[number]) for one in self.variants},
                "auroc": {one.name: _plain(one.auroc[number]) for one in self.variants if one.auroc is not None},
            }
            for number, name in enumerate(self.names)
        ]
        return body


def _variant_json(one: Variant) -> dict[str, Any]:
    figures = {
        name: {"value": _plain(told.value), "interval": [_plain(end) for end in told.interval], "count": told.count}
        for name, told in one.figures.items()
    }
    return {"name": one.name, "figures": figures, "num_never_recognised": one.num_never, "notes": list(one.notes)}


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# -- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Training:
    """What decides the prior that a model's logits carry: log q + log w - a."""

    manifest: str = "natural"
    weights: str | None = None  # a kind of ``plan.manifest.WEIGHTS``
    tau: float = 0.0  # the loss added tau * log_q to the logits

    def carried(self, manifest: Manifest) -> Floats:
        """float64 ``[K]``."""
        if not self.tau >= 0:
            raise UsageError(f"tau must be 0 or more, not {self.tau}")
        drawn = np.isfinite(manifest.log_q)
        w = None if self.weights is None else manifest.weights(self.weights)
        return carried(manifest.log_q, w, self.tau * np.where(drawn, manifest.log_q, 0.0))


def evaluate(
    snapshot: Snapshot,
    path: str | os.PathLike[str],
    *,
    split: str = "test",
    training: Training | None = None,
    priors: Sequence[str] = ("uniform",),
    scores: str = "auto",
    allow: Collection[str] = (),
) -> Evaluation:
    """Measure the predictions in the local file ``path``; see the module for what is guaranteed.

    Labels cannot be corrected: ``priors`` then count for nothing. ``scores`` says what the numbers are: ``auto`` takes
    rows that lie in [0, 1] and sum to 1 for probabilities and rows with a number outside of it for logits.
    """
    if unknown := [name for name in priors if name not in PRIORS]:
        raise UsageError(f"no prior {unknown[0]!r}; expected {', '.join(PRIORS)}")
    if scores not in SCORES:
        raise UsageError(f"scores are {', '.join(SCORES)}, not {scores!r}")
    training = training or Training()
    manifest = snapshot.manifest(training.manifest)
    prior = training.carried(manifest)
    names: list[str] = snapshot.classes["name"].to_pylist()
    given = read_predictions(path, names, snapshot.classes["count"].to_numpy() > 0)
    met, val, notes = meet(snapshot, given, split, allow)
    train = snapshot.classes["train"].to_numpy().astype(np.int64)
    natural = np.exp(snapshot.manifest("natural").log_prior) if "natural" in snapshot.manifests else train / train.sum()
    support = np.bincount(met.labels, minlength=len(names)).astype(np.int64)
    if given.scores is None:
        kind, found, sharpness = "labels", [_of_labels(given, met, train, natural)], None
    else:
        kind = _kind(given.scores, np.concatenate([met.rows, val.rows]) if val else met.rows, scores)
        logits = _logits(given.scores, kind)
        sharpness = temperature(logits[val.rows], val.labels) if val else None
        found = _of_scores(logits, met, val, prior, list(priors), _Sources(train, natural))
        notes += _of_val(val)
    return Evaluation(
        snapshot=snapshot.number,
        split=split,
        manifest=training.manifest,
        file=os.fspath(path),
        kind=kind,
        num_images=met.num_images,
        num_measured=len(met.rows),
        names=names,
        train=train,
        support=support,
        train_share=int(train[support > 0].sum()) / max(int(train.sum()), 1),
        variants=tuple(found),
        temperature=sharpness,
        notes=tuple(notes),
    )


def _of_val(val: Met | None) -> list[str]:
    """What the thresholds cannot be trusted with."""
    if val is None:
        return ["no thresholds and no temperature: they are chosen on val, and the file has no row of val"]
    beyond = [f"{s:g}" for s in SPECIFICITIES if len(val.rows) * (1 - s) < 1]
    if not beyond:
        return []
    return [
        f"val has {len(val.rows):,} images with scores, too few to choose a threshold of specificity "
        f"{', '.join(beyond)}: there it is the highest score of the other images"
    ]


@dataclass(frozen=True, eq=False)
class _Sources:
    train: Ints
    natural: Floats


def _kind(scores: Floats, rows: Ints, asked: str) -> str:
    seen = scores[rows]
    within = bool((seen >= 0).all() and (seen <= 1 + _SUM_TOLERANCE).all())
    even = bool((np.abs(seen.sum(axis=1) - 1) <= _SUM_TOLERANCE).all()) if within else False
    if asked == "probabilities" and not within:
        raise EvenshardError("these scores are no probabilities: some lie outside of [0, 1]; say --scores logits")
    if asked != "auto":
        return asked
    if within and not even:
        raise EvenshardError(
            "these scores lie in [0, 1], and rows do not sum to 1: say --scores probabilities (they are divided by "
            "their sum) or --scores logits"
        )
    return "probabilities" if within else "logits"


def _logits(scores: Floats, kind: str) -> Floats:
    """Columns that the file lacks stay -inf; log 0 is -inf, too."""
    if kind == "logits":
        return scores
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(scores)


# -- variants ---------------------------------------------------------------------------------------------------------


def _of_labels(given: Predictions, met: Met, train: Ints, natural: Floats) -> Variant:
    assert given.labels is not None
    predicted = given.labels[met.rows]
    return _variant(AS_GIVEN, met, predicted, _Sources(train, natural), {}, None)


def _of_scores(
    logits: Floats, met: Met, val: Met | None, prior: Floats, priors: list[str], sources: _Sources
) -> list[Variant]:
    made = Logits(logits[met.rows], prior)
    held = Logits(logits[val.rows], prior) if val else None
    variants = [_scored(AS_GIVEN, made, held, (met, val), sources)]
    for name in priors:
        notes: tuple[str, ...] = ()
        if name == "em":
            found = estimate_prior(made, max_steps=200, tolerance=1e-5)
            target = found.log_prior
            state = (
                "converged"
                if found.converged
                else f"NOT converged, its last step changed a share by {found.change:.1e}"
            )
            notes = (f"em: {state} after {found.num_steps} steps",)
        else:
            with np.errstate(divide="ignore"):
                target = uniform(prior) if name == "uniform" else np.log(sources.natural)
        wanted = made.corrected(target, source=prior), held.corrected(target, source=prior) if held else None
        variants.append(_scored(name, *wanted, (met, val), sources, notes))
    return variants


def _scored(
    name: str,
    made: Logits,
    held: Logits | None,
    where: tuple[Met, Met | None],
    sources: _Sources,
    notes: tuple[str, ...] = (),
) -> Variant:
    met, val = where
    told = log_softmax(made.values)
    lost = np.isnan(told).any(axis=1)  # nothing that this prior allows has a score
    told[lost] = -np.inf
    predicted = np.where(lost, NO_CLASS, told.argmax(axis=1))
    num_classes = told.shape[1]
    support = np.bincount(met.labels, minlength=num_classes)
    ranks = np.full(num_classes, np.nan)
    sensitive = np.full((len(SPECIFICITIES), num_classes), np.nan)
    kept = np.full((len(SPECIFICITIES), num_classes), np.nan)
    held_told = np.nan_to_num(log_softmax(held.values), nan=-np.inf, neginf=-np.inf) if held else None
    for c in np.flatnonzero(support).tolist():
        column, positive = told[:, c], met.labels == c
        ranks[c] = auroc(column, positive)
        if held_told is not None and val is not None:
            for row, specificity in enumerate(SPECIFICITIES):
                limit = threshold(held_told[:, c], val.labels == c, specificity)
                sensitive[row, c], kept[row, c] = at_threshold(column, positive, limit)
    extra = {"macro AUROC": _over_classes(ranks)}
    if held_told is not None:
        for row, specificity in enumerate(SPECIFICITIES):
            extra[f"sensitivity at specificity {specificity:g}"] = _over_classes(sensitive[row])
            extra[f"specificity found, of {specificity:g}"] = _over_classes(kept[row])
    confidence = np.exp(told.max(axis=1))
    error = calibration_error(confidence, predicted == met.labels)
    extra["calibration error"] = Figure(error, (math.nan, math.nan), len(met.rows))
    return _variant(name, met, predicted, sources, extra, ranks, notes)


def _variant(
    name: str,
    met: Met,
    predicted: Ints,
    sources: _Sources,
    extra: Mapping[str, Figure],
    ranks: Floats | None,
    notes: tuple[str, ...] = (),
) -> Variant:
    recall = per_class_recall(met.labels, predicted, len(sources.train))
    figures = {
        "accuracy": _over_images(met.labels, predicted, accuracy),
        "accuracy at train's shares": Figure(
            accuracy_at(recall, sources.natural), (math.nan, math.nan), int((~np.isnan(recall)).sum())
        ),
        "kappa": _over_images(met.labels, predicted, kappa),
        "balanced accuracy": _over_classes(recall),
    }
    group = group_of(sources.train)
    for place, title in enumerate(GROUPS):
        figures[f"recall, {title}"] = _over_classes(np.where(group == place, recall, np.nan))
    measured = ~np.isnan(recall)
    return Variant(
        name=name,
        figures={**figures, **extra},
        recall=recall,
        auroc=ranks,
        confused=_confused(met.labels, predicted, len(recall)),
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
    wrong = (labels != predicted) & (predicted != NO_CLASS)
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    for place in np.argsort(-counts, kind="stable").tolist():
        if result[pairs[0, place]] == NO_CLASS:
            result[pairs[0, place]] = pairs[1, place]
    return result
