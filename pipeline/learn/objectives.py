"""What a stage minimises, fed by its manifest, and the prior that its logits carry afterwards.

Comes in: the name of a loss, a manifest. Goes out: an ``Objective``; what `evenshard evaluate` must be told of it.
Guarantees: its value is a mean over the global batch, so that 1, 2 and 4 ranks minimise the same; a loss whose prior is
not known says so, and nothing is corrected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.learn.evaluation import Training
from pipeline.learn.losses import CrossEntropy, Focal, balanced_softmax
from pipeline.learn.recipe import check_loss
from pipeline.snapshot import Manifest

Floats = NDArray[np.float64]

_WEIGHTS = {
    "weighted": "balanced",
    "effective-number": "effective_number",
    "square-root": "square_root",
    "residual": "residual",
}
_UNKNOWN = ("focal",)  # leave logits whose prior is not known


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
    if name == "balanced-softmax":
        return balanced_softmax(manifest.log_q)
    return CrossEntropy(weight=manifest.weights(_WEIGHTS[name]) if name in _WEIGHTS else None)
