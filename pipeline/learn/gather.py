"""The predictions of all ranks together, each image once: what exact metrics are computed from.

In: logits, labels and masks, batch by batch, on each rank. Out: on every rank, labels and scores of the whole split as
numpy arrays. Guarantees: nothing is averaged over ranks and no float is summed, so that any number of ranks gives the
same bits; rows that only fill a last step (mask False) are left out; the order is that of one rank. Nothing is pickled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from pipeline.errors import UsageError


class Gather:
    """Collects ``update`` by ``update``; ``result`` is for all ranks to call together.

    It holds the scores of the split on every rank: 4 bytes a score as float32, 240 MB for 12,000 images of 5,000
    classes.
    """

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._steps: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """One step of this rank: ``[B, K]`` logits, int64 ``[B]`` labels, bool ``[B]`` mask as ``EvaluationLoader``
        gives it. Every rank does equally many."""
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise UsageError(f"expected logits [B, K] and labels [B], found {list(logits.shape)}, {list(labels.shape)}")
        kept = torch.ones(len(labels), dtype=torch.bool) if mask is None else mask.bool().cpu()
        scores = logits.detach().cpu()
        scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        self._scores.append(scores[kept])
        self._labels.append(labels.cpu()[kept])
        self._steps.append(torch.full((int(kept.sum()),), len(self._steps)))

    def result(self) -> tuple[NDArray[np.floating[Any]], NDArray[np.int64]]:
        """Scores ``[N, K]`` and labels int64 ``[N]`` of all ranks, in the order of steps, ranks, rows."""
        if not self._scores:
            raise UsageError("nothing to gather: update was never called")
        scores, labels, steps = (torch.cat(parts) for parts in (self._scores, self._labels, self._steps))
        ranks = torch.zeros_like(steps)
        if distributed.is_available() and distributed.is_initialized():
            told = _all(torch.tensor([len(labels)]), 1)[:, 0].tolist()
            most = int(max(told))
            scores, labels, steps = (_joined(part, told, most) for part in (scores, labels, steps))
            ranks = torch.repeat_interleave(torch.arange(len(told)), torch.tensor(told))
        order = np.lexsort((ranks.numpy(), steps.numpy()))  # stable: rows of one batch keep theirs
        return scores.numpy()[order], labels.numpy()[order]


def _joined(part: Tensor, counts: list[int], most: int) -> Tensor:
    """The rows of all ranks, one rank after the other."""
    gathered = _all(part, most)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def _all(part: Tensor, rows: int) -> Tensor:
    """``[ranks, rows, ...]``; collectives want equal shapes, so that each rank fills up with zeros."""
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else None
    padded = torch.zeros((rows, *part.shape[1:]), dtype=part.dtype)
    padded[: len(part)] = part
    mine = padded.to(device) if device else padded
    gathered = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, mine)
    return torch.stack(gathered).cpu()
