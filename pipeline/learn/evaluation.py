"""What a model really does, from its predictions for a split: per group, per class, before and after prior correction.

In: a snapshot, a file of predictions, the manifest and the loss that the model was trained with. Out: an ``Evaluation``
of plain numbers. Guarantees: no torch; averages over classes are over measured classes alone, and say how many;
thresholds come from val, never from the split that is measured; nothing is dropped in silence (``predictions``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EvenshardError, UsageError
from pipeline.learn.calibration import fit_temperature
from pipeline.learn.prediction_files import Predictions, read_predictions
from pipeline.learn.predictions import Met, meet
from pipeline.learn.priors import carried, fit_power, fit_prior, normalised, step, uniform
from pipeline.learn.ranking import SPECIFICITIES
from pipeline.learn.scores import Scores
from pipeline.learn.variants import Counts, Labelled, Variant, of_labels, of_scores
from pipeline.plan.shots import GROUPS, group_of
from pipeline.snapshot import Manifest, Snapshot

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

AS_GIVEN = "as given"
PRIORS = ("natural", "uniform", "power", "em")
"""``natural``: as in train. Estimated from the images that are measured, without their labels: ``power``, the shares of
train to one power; ``em``, each share by itself."""

ESTIMATED = ("power", "em")

OF_PREVALENCE = frozenset({"accuracy", "accuracy at train's shares", "kappa", "calibration error"})
"""Figures that move with how frequent classes are, whatever the model does to each: docs/METRICS.md."""

SCORES = ("auto", "logits", "probabilities")
_SUM_TOLERANCE = 1e-2


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
    counts = Counts(train, natural)
    if given.labels is not None:
        kind, sharpness = "labels", None
        found = [of_labels(AS_GIVEN, met.labels, given.labels[met.rows], counts)]
    else:
        kind = _kind(given, np.concatenate([met.rows, val.rows]) if val else met.rows, scores)
        made, held = _labelled(given, met, kind), _labelled(given, val, kind) if val else None
        sharpness = fit_temperature(held.scores, held.labels) if held else None
        found = [of_scores(AS_GIVEN, made, held, counts), *_corrected(made, held, prior, priors, counts)]
        notes += _of_val(split, val, sharpness)
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


def _kind(given: Predictions, rows: Ints, asked: str) -> str:
    """Of the columns that the file has."""
    seen = Scores(values=given.values, rows=rows)
    within = even = True
    for _, block in seen.by_rows():
        block[:, given.lacking] = 0.0
        within &= bool((block >= 0).all() and (block <= 1 + _SUM_TOLERANCE).all())
        even &= bool((np.abs(block.sum(axis=1) - 1) <= _SUM_TOLERANCE).all())
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


def _labelled(given: Predictions, met: Met, kind: str) -> Labelled:
    scores = Scores(values=given.values, rows=met.rows, probabilities=kind == "probabilities")
    return Labelled(scores, met.labels)


def _of_val(split: str, val: Met | None, sharpness: float | None) -> list[str]:
    """What the thresholds cannot be trusted with."""
    if val is None:
        why = "and the file has no row of val" if split == "test" else "for test alone"
        return [f"no thresholds and no temperature: they are chosen on val, {why}"]
    notes = ["no temperature: no image of val has a score for its class"] if sharpness is None else []
    beyond = [f"{s:g}" for s in SPECIFICITIES if len(val.rows) * (1 - s) < 1 - 1e-9]
    if beyond:
        notes.append(
            f"val has {len(val.rows):,} images with scores, too few to choose a threshold of specificity "
            f"{', '.join(beyond)}: there it is the highest score of the other images"
        )
    return notes


def _corrected(
    made: Labelled, held: Labelled | None, prior: Floats, priors: Sequence[str], counts: Counts
) -> Iterator[Variant]:
    """A variant for each prior, from scores that carry ``prior``."""
    for name in priors:
        notes: tuple[str, ...] = ()
        if name in ESTIMATED:
            target, note = _estimated(name, made, prior, counts)
            notes = (f"{name}: {note}", _tried_on_val(name, held, prior, counts))
        else:
            with np.errstate(divide="ignore"):
                target = uniform(prior) if name == "uniform" else normalised(np.log(counts.natural))
        shift = step(prior, target)
        yield of_scores(name, made.moved(shift), held.moved(shift) if held else None, counts, notes)


def _estimated(name: str, images: Labelled, prior: Floats, counts: Counts) -> tuple[Floats, str]:
    """A log prior of the scores as they are: divided by a temperature they make it worse, see docs/LOG.md."""
    if name == "em":
        found = fit_prior(images.scores, prior, max_steps=200, tolerance=1e-5)
        short = f"NOT converged, its last step changed a share by {found.change:.1e}"
        return found.log_prior, f"{'converged' if found.converged else short} after {found.num_steps} steps"
    with np.errstate(divide="ignore"):
        fitted = fit_power(images.scores, prior, np.log(counts.natural))
    advice = ", an end of where it is looked for: do not use it, the scores are too unsure or the images too different"
    end = advice if fitted.is_at_end else ""
    return fitted.log_prior, f"train's shares to the power of {fitted.power:.2f} (1: as in train, 0: uniform){end}"


def _tried_on_val(name: str, held: Labelled | None, prior: Floats, counts: Counts) -> str:
    """How far estimated shares are from those of val: half of the sum of their differences."""
    if held is None:
        what = "; on long tails it often makes a model worse" if name == "em" else ""
        return f"{name}: not checked, as the file has no row of val{what}"
    true = np.bincount(held.labels, minlength=len(prior)) / len(held.labels)
    shares = np.exp(_estimated(name, held, prior, counts)[0])
    off, before = (np.abs(one - true).sum() / 2 for one in (shares, counts.natural))
    return (
        f"{name}: tried on val, whose shares are known, it is off by {off:.1%} of the images, the shares of train by "
        f"{before:.1%}; it can help only where the images at hand differ from train by more than it is off"
    )
