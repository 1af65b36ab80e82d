"""How good a network is on a split, on any number of ranks: every sample counted once.

Comes in: a network, a split, what to add to its logits. Goes out: logits of this rank step by step; labels and
predictions of all ranks; the figures that go into a summary. Guarantees: rows that fill the last step count for
nothing; figures are those of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import EvenshardError, NotFoundError
from pipeline.learn import metrics
from pipeline.learn.ranks import Ranks
from pipeline.learn.recipe import Recipe
from pipeline.learn.stepping import logits_of, pixels, uses_bf16
from pipeline.snapshot import Snapshot
from pipeline.stream.loader import EvaluationLoader
from pipeline.stream.transforms import ResizeCenterCrop

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """int64 ``[N]`` each, over all ranks: one entry for every sample of the split."""

    labels: Ints
    predicted: Ints
    corrected: Ints | None
    """Predictions for a uniform prior; None where the prior of the logits is not known."""


def held_out(snapshot: Snapshot) -> list[str]:
    """Those of val and test that have images."""
    return [name for name in ("val", "test") if name in snapshot.record.samples]


def evaluation_split(snapshot: Snapshot, wanted: str | None) -> str:
    """The split asked for, else val, else test."""
    there = held_out(snapshot)
    if wanted is None and not there:
        raise NotFoundError(
            f"snapshot {snapshot.number} has no image outside train, so nothing could be measured: build it with a "
            "test split, or name --split train"
        )
    if wanted is not None:
        snapshot.samples(wanted)  # says which splits have images
    return wanted or there[0]


def logits_on(
    model: nn.Module, snapshot: Snapshot, split: str, recipe: Recipe, ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's steps: float32 logits ``[B, K]`` on its device, int64 labels ``[B]``, bool ``[B]``: the row counts.

    Every rank does equally many. Sorted by step, rank and row, the rows that count come first, in an order that no
    number of ranks changes.
    """
    device = ranks.device
    batches = EvaluationLoader(
        snapshot,
        split,
        max(1, recipe.batch_size // ranks.world_size),
        transform=ResizeCenterCrop(recipe.side, resize=max(recipe.side, round(recipe.side * 256 / 224))),
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=recipe.workers,
        pin_memory=device.type == "cuda",
    )
    model.eval()
    uses_half = uses_bf16(recipe.precision, device)
    for images, labels, real in batches:
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_half):
            logits = logits_of(model(pixels(images, device))).float()
        if not bool(torch.isfinite(logits).all()):
            raise EvenshardError("the network's logits are no finite numbers: it diverged; lower --lr")
        yield logits, labels, real


@torch.inference_mode()
def score(
    model: nn.Module, snapshot: Snapshot, split: str, shift: Floats | None, recipe: Recipe, ranks: Ranks
) -> Scored:
    """Predict all of ``split``; ``shift``: float64 ``[K]`` that moves the logits to a uniform prior."""
    added = None if shift is None else torch.from_numpy(shift).to(ranks.device, torch.float32)
    rows: list[Tensor] = []
    for logits, labels, real in logits_on(model, snapshot, split, recipe, ranks):
        moved = logits if added is None else logits + added
        rows.append(torch.stack([labels, logits.argmax(1).cpu(), moved.argmax(1).cpu()], 1)[real])
    found = ranks.concatenated(torch.cat(rows).numpy().astype(np.int64))
    return Scored(labels=found[:, 0], predicted=found[:, 1], corrected=None if shift is None else found[:, 2])


def recall_of(scored: Scored, num_classes: int) -> tuple[Floats, Floats | None]:
    """float64 ``[K]`` before and after the correction; NaN for a class without an image in the split."""
    after = None if scored.corrected is None else metrics.per_class_recall(scored.labels, scored.corrected, num_classes)
    return metrics.per_class_recall(scored.labels, scored.predicted, num_classes), after


def figures(labels: Ints, predicted: Ints, train: Ints) -> dict[str, Any]:
    """Accuracy, its mean over classes, over groups of classes by images in train, and how much that covers."""
    recall = metrics.per_class_recall(labels, predicted, len(train))
    groups = metrics.group_accuracy(recall, train)
    return {
        "num_images": len(labels),
        "accuracy": plain(float((labels == predicted).mean())),
        "balanced_accuracy": plain(metrics.balanced_accuracy(recall)),
        **{name: plain(value) for name, value in groups.items()},
        "coverage": plain(metrics.coverage(recall)),
    }


def plain(value: float) -> float | None:
    """JSON has no NaN: what was not measured is null."""
    return None if np.isnan(value) else value
