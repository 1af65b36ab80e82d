"""The summary of a training: figures after each stage, recall of each class, what the worst classes are taken for.

Comes in: labels and predictions of the evaluation split. Goes out: JSON values, in which null is what was not measured.
Guarantees: every mean over classes stands beside its coverage; nothing is corrected from a prior that is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.learn.metrics import per_class_recall
from pipeline.learn.predicting import evaluate_options
from pipeline.learn.ranks import Ranks
from pipeline.learn.recipe import Recipe
from pipeline.learn.scoring import Scored, figures, plain
from pipeline.snapshot import Snapshot

FORMAT = "evenshard.training"
FORMAT_VERSION = 1
SUMMARY, MODEL = "summary.json", "model.pt"

NUM_WORST = 20
NUM_TAKEN_FOR = 5
COUNT_EDGES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000)
"""Classes are told together by images in train: from one edge to below the next."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a checkpoint keeps of a stage that is done."""

    stage: str
    losses: list[float]
    num_steps: int  # of the training so far
    log_prior: list[float] | None
    """That the logits carry; None: not known, as after tau."""
    scores: dict[str, dict[str, Any]]
    """``as_it_is``, and ``corrected`` to a uniform prior where the prior is known."""
    recall: dict[str, list[float | None]]
    worst: list[dict[str, Any]]

    @classmethod
    def of(
        cls, stage: str, losses: list[float], num_steps: int, log_prior: Floats | None, scored: Scored, train: Ints
    ) -> StageResult:
        """``train``: int64 ``[K]``, images of each class in train."""
        told = {"as_it_is": scored.predicted}
        if scored.corrected is not None:
            told["corrected"] = scored.corrected
        recall = {name: per_class_recall(scored.labels, found, len(train)) for name, found in told.items()}
        return cls(
            stage=stage,
            losses=losses,
            num_steps=num_steps,
            log_prior=None if log_prior is None else log_prior.tolist(),
            scores={name: figures(scored.labels, found, train) for name, found in told.items()},
            recall={name: [plain(value) for value in values.tolist()] for name, values in recall.items()},
            worst=worst_classes(scored.labels, scored.predicted, train),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``log_prior`` still holds ``-inf``, which checkpoints can carry and JSON cannot."""
        return asdict(self)


def worst_classes(labels: Ints, predicted: Ints, train: Ints) -> list[dict[str, Any]]:
    """The measured classes of lowest recall, of equals those with most images, and what they are taken for."""
    recall = per_class_recall(labels, predicted, len(train))
    tested = np.bincount(labels, minlength=len(train))
    measured = np.flatnonzero(tested)
    order = measured[np.lexsort((measured, -tested[measured], recall[measured]))]
    found: list[dict[str, Any]] = []
    for class_id in order[:NUM_WORST].tolist():
        if recall[class_id] == 1:
            break
        taken = np.bincount(predicted[(labels == class_id) & (predicted != class_id)])
        most = np.lexsort((np.arange(len(taken)), -taken))[:NUM_TAKEN_FOR]
        row = {"class_id": class_id, "train": int(train[class_id]), "tested": int(tested[class_id])}
        pairs = [{"class_id": int(other), "count": int(taken[other])} for other in most if taken[other]]
        found.append({**row, "recall": float(recall[class_id]), "taken_for": pairs})
    return found


def by_count(recall: Floats, train: Ints) -> list[dict[str, Any]]:
    """Mean recall of classes with about as many images in train; classes that were not measured are counted apart."""
    rows: list[dict[str, Any]] = []
    for low, high in zip(COUNT_EDGES, (*COUNT_EDGES[1:], None), strict=True):
        members = (train >= low) & (train < high if high is not None else True)
        measured = members & ~np.isnan(recall)
        if members.any():
            mean = float(recall[measured].mean()) if measured.any() else None
            row = {"from": low, "below": high, "classes": int(members.sum()), "measured": int(measured.sum())}
            rows.append({**row, "recall": mean})
    return rows


def summary_of(
    recipe: Recipe, snapshot: Snapshot, split: str, ranks: Ranks, results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All of it, as ``summary.json`` has it."""
    names: list[str] = snapshot.classes.column("name").to_pylist()
    train = snapshot.classes.column("train").to_numpy()
    last = results[-1]
    recall = {name: np.array([np.nan if v is None else v for v in values]) for name, values in last["recall"].items()}
    worst = [
        {
            **row,
            "name": names[row["class_id"]],
            "taken_for": [{**t, "name": names[t["class_id"]]} for t in row["taken_for"]],
        }
        for row in last["worst"]
    ]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "snapshot": {"number": snapshot.number, "id": snapshot.id, "num_classes": len(names)},
        "recipe": {**recipe.fixed(), "batch_size": recipe.batch_size, "precision": recipe.precision},
        "ranks": ranks.world_size,
        "device": ranks.device.type,
        "split": split,
        "evaluate": evaluate_options(snapshot, recipe),
        "stages": [{key: row[key] for key in ("stage", "losses", "num_steps", "scores")} for row in results],
        "by_count": {name: by_count(values, train) for name, values in recall.items()},
        "worst": worst,
        "classes": [
            {"class_id": i, "name": name, "train": int(train[i]), **{k: plain(float(v[i])) for k, v in recall.items()}}
            for i, name in enumerate(names)
        ],
    }
