"""What a stage minimises, fed by its manifest, and the prior that its logits carry afterwards.

Comes in: the name of a loss, a manifest. Goes out: an ``Objective``; what `evenshard evaluate` must be told of it.
Guarantees: its value is a mean over the global batch, so that 1, 2 and 4 ranks minimise the same; a loss whose prior is
not known says so, and nothing is corrected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import EvenshardError
from pipeline.learn.evaluation import Training
from pipeline.learn.losses import CrossEntropy, Focal, Kappa, KappaKind, PairwiseAUC, balanced_softmax
from pipeline.learn.recipe import check_loss
from pipeline.plan.shots import FEW_BELOW
from pipeline.snapshot import Manifest

Floats = NDArray[np.float64]

_WEIGHTS = {
    "weighted": "balanced",
    "effective-number": "effective_number",
    "square-root": "square_root",
    "residual": "residual",
}
AUC_SHARE = 0.01
"""Of the pairs' loss, beside cross-entropy: a pair ranked wrong weighs the square of a difference of log-odds, up to a
hundred times a usual cross-entropy. Chosen on the drawn set, where 1 learns nothing (docs/LOG.md)."""

_KAPPAS: Mapping[str, KappaKind] = {"kappa": "nominal", "quadratic-kappa": "quadratic"}
_UNKNOWN = ("focal", "auc", *_KAPPAS)  # leave logits whose prior is not known


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """``criterion(logits [B, K], labels [B])``: the mean over ranks of its values is the loss of the global batch."""

    criterion: nn.Module
    log_prior: Floats | None
    """float64 ``[K]`` that the logits carry after it was minimised; None: not known."""


def objective(name: str, manifest: Manifest) -> Objective:
    """The loss ``name`` over the draws of ``manifest``."""
    training = training_of(name, manifest.name)
    log_prior = None if training is None else training.carried(manifest)
    return Objective(criterion=_criterion(name, manifest), log_prior=log_prior)


def training_of(name: str, manifest: str) -> Training | None:
    """What decides the prior after the loss ``name`` on that manifest; None: it is not known."""
    if check_loss(name) in _UNKNOWN:
        return None
    return Training(manifest=manifest, weights=_WEIGHTS.get(name), tau=1.0 if name == "balanced-softmax" else 0.0)


def _criterion(name: str, manifest: Manifest) -> nn.Module:
    if name == "focal":
        return Focal()
    if name == "auc":
        return _Added(CrossEntropy(), PairwiseAUC(_rare(manifest)), AUC_SHARE)
    if name in _KAPPAS:
        return Kappa(_KAPPAS[name])
    if name == "balanced-softmax":
        return balanced_softmax(manifest.log_q)
    return CrossEntropy(weight=manifest.weights(_WEIGHTS[name]) if name in _WEIGHTS else None)


def _rare(manifest: Manifest) -> list[int]:
    """Ids of few- and one-shot classes that are drawn."""
    rare = (manifest.available < FEW_BELOW) & (manifest.targets > 0)
    if not rare.any():
        raise EvenshardError(
            f"loss auc ranks the images of rare classes, and manifest {manifest.name!r} draws of no class with fewer "
            f"than {FEW_BELOW} of them: choose another loss, such as balanced-softmax"
        )
    return np.flatnonzero(rare).tolist()


class _Added(nn.Module):
    """One loss and ``share`` times another."""

    def __init__(self, first: nn.Module, second: nn.Module, share: float) -> None:
        super().__init__()
        self.first, self.second, self.share = first, second, share

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = self.first(logits, labels) + self.share * self.second(logits, labels)
        return value
