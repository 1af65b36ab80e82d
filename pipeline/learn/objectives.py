"""What a stage minimises, fed by its manifest, and the prior that its logits carry afterwards.

Comes in: the name of a loss, a manifest. Goes out: an ``Objective``. Guarantees: its value is a mean over the global
batch, so that 1, 2 and 4 ranks minimise the same; a loss whose prior is not known says so, and nothing is corrected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.learn.losses import CrossEntropy, Focal, balanced_softmax
from pipeline.learn.priors import carried
from pipeline.learn.recipe import check_loss
from pipeline.snapshot import Manifest

Floats = NDArray[np.float64]

_WEIGHTS = {
    "weighted": "balanced",
    "effective-number": "effective_number",
    "square-root": "square_root",
    "residual": "residual",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """``criterion(logits [B, K], labels [B])``: the mean over ranks of its values is the loss of the global batch."""

    criterion: nn.Module
    log_prior: Floats | None
    """float64 ``[K]`` that the logits carry after it was minimised; None: not known."""


def objective(name: str, manifest: Manifest) -> Objective:
    """The loss ``name`` over the draws of ``manifest``."""
    log_q = manifest.log_q
    if check_loss(name) == "focal":
        return Objective(criterion=Focal(), log_prior=None)
    if name == "balanced-softmax":
        offset = np.where(np.isfinite(log_q), log_q, 0.0)
        return Objective(criterion=balanced_softmax(log_q), log_prior=carried(log_q, offset=offset))
    if name in _WEIGHTS:
        weights = manifest.weights(_WEIGHTS[name])
        return Objective(criterion=CrossEntropy(weight=weights), log_prior=carried(log_q, weights=weights))
    return Objective(criterion=CrossEntropy(), log_prior=carried(log_q))
