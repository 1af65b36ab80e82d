"""One of several gloo ranks: evaluates a ROOT, takes a gradient, and writes what it found.

metric_ranks.py ROOT RANK RANKS FILE_OF_THE_GROUP BATCH OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from pipeline.learn.gather import Gather
from pipeline.learn.intervals import over_classes, over_images
from pipeline.learn.losses import AUCM, CrossEntropy, Focal, Kappa, PairwiseAUC, balanced_softmax
from pipeline.learn.metrics import accuracy, balanced_accuracy, kappa, per_class_recall
from pipeline.learn.ranking import at_threshold, auroc, calibration_error, threshold
from pipeline.snapshot import open_snapshot
from pipeline.stream.loader import EvaluationLoader
from pipeline.stream.transforms import ResizeCenterCrop

NUM_CLASSES = 6


def model(images: torch.Tensor) -> torch.Tensor:
    """[B, 6] of each image by itself, in integers: a matrix product may round by the size of the batch."""
    pixels = images.long()
    parts = [pixels[:, c % 3, c, :].sum(1) * (c + 3) % 997 for c in range(NUM_CLASSES)]
    return torch.stack(parts, 1).float() / 100


def figures(scores: np.ndarray, labels: np.ndarray) -> list[float]:
    predicted = scores.argmax(1)
    recall = per_class_recall(labels, predicted, NUM_CLASSES)
    told = [accuracy(labels, predicted), kappa(labels, predicted), balanced_accuracy(recall), *recall.tolist()]
    told += [*over_images(labels, predicted, kappa), *over_classes(recall)]
    told.append(calibration_error(1 / (1 + np.exp(-scores.max(1))), predicted == labels))
    for c in range(NUM_CLASSES):
        limit = threshold(scores[:, c], labels == c, 0.9)
        told += [auroc(scores[:, c], labels == c), limit, *at_threshold(scores[:, c], labels == c, limit)]
    return told


def gradients(rank: int, ranks: int) -> list[list[float]]:
    """Of each loss at 13 images that are spread unevenly over the ranks, averaged as DDP does."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randn((13, 4), generator=rng, dtype=torch.float64)
    labels = torch.randint(0, NUM_CLASSES, (13,), generator=rng)
    head = torch.randn((4, NUM_CLASSES), generator=rng, dtype=torch.float64)
    cut = np.linspace(0, 1, ranks + 1) ** 2 * 13
    mine = slice(round(cut[rank]), round(cut[rank + 1]))
    prior = np.log([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    means = [CrossEntropy(np.exp(-prior)), balanced_softmax(prior), Focal(), AUCM([2, 4], [0.1, 0.05])]
    losses = [*means, PairwiseAUC([2, 4]), PairwiseAUC([5, 0, 1]), Kappa(), Kappa("quadratic")]
    found: list[list[float]] = []
    for loss in losses:
        weight = head.clone().requires_grad_()
        value = loss(images[mine] @ weight, labels[mine])
        value.backward()
        assert weight.grad is not None
        told = torch.cat([weight.grad.flatten(), value.detach()[None]])
        distributed.all_reduce(told)
        found.append((told / ranks).tolist())
    return found


def main(root: str, rank: int, ranks: int, group: str, batch: int, out: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=ranks)
    loader = EvaluationLoader(open_snapshot(root), "test", batch, transform=ResizeCenterCrop(8, resize=8))
    gather, num_masked = Gather(), 0
    for images, labels, mask in loader:
        gather.update(model(images), labels, mask)
        num_masked += int((~mask).sum())
    scores, labels = gather.result()
    told = {"figures": figures(scores, labels), "labels": labels.tolist(), "scores": scores.tolist()}
    told |= {"num_masked": num_masked, "gradients": gradients(rank, ranks)}
    Path(out).write_text(json.dumps(told))
    distributed.destroy_process_group()


if __name__ == "__main__":
    root, rank, ranks, group, batch, out = sys.argv[1:]
    main(root, int(rank), int(ranks), group, int(batch), out)
