"""A schedule: manifests one after the other, each with its share of the training.

Comes in: a kind and a number of epochs. Goes out: stages, and the text that a trainer reads: ``natural:20 ->
balanced:5``. Guarantees: shares sum to 1; epochs are whole, sum to what was asked, and no stage is left without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pipeline.errors import UsageError
from pipeline.plan.apportion import largest_remainder
from pipeline.plan.policy import DEFAULTS, Policy, parse


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One manifest, and its share of the training."""

    manifest: str
    policy: Policy
    share: Fraction


def deferred(then: str = "balanced", share: Fraction = Fraction(1, 5)) -> tuple[Stage, ...]:
    """Natural draws, then a short stage on ``then``, one of the four defaults: deferred re-sampling.

    Cao et al., NeurIPS 2019, switch at epoch 160 of 200; hence the fifth.
    """
    if then not in DEFAULTS:
        raise UsageError(f"deferred: the last stage is one of {', '.join(DEFAULTS)}, not {then!r}")
    if not 0 < share < 1:
        raise UsageError(f"deferred: the share of the last stage lies between 0 and 1, not {share}")
    return (
        Stage(manifest="natural", policy=DEFAULTS["natural"], share=1 - share),
        Stage(manifest=then, policy=DEFAULTS[then], share=share),
    )


def progressive(num_stages: int = 5) -> tuple[Stage, ...]:
    """From natural to balanced in equal steps, each epoch as long as the source: Kang et al., ICLR 2020."""
    if num_stages < 2:
        raise UsageError(f"progressive: at least 2 stages, not {num_stages}")
    return tuple(
        Stage(
            manifest=f"progressive-{stage + 1}-of-{num_stages}",
            policy=parse(f"progressive:stage={stage},num_stages={num_stages}"),
            share=Fraction(1, num_stages),
        )
        for stage in range(num_stages)
    )


def epochs_of(stages: Sequence[Stage], num_epochs: int) -> list[int]:
    """Whole epochs of each stage: its share by largest remainder, and at least one."""
    if num_epochs < len(stages):
        raise UsageError(f"{len(stages)} stages need at least {len(stages)} epochs, not {num_epochs}")
    unit = int(np.lcm.reduce([stage.share.denominator for stage in stages]))
    spare = num_epochs - len(stages)
    ideal = [max(0, int(stage.share * unit * num_epochs) - unit) for stage in stages]  # beyond the one that each has
    scale = sum(ideal) or 1
    extra = largest_remainder([part * spare for part in ideal], scale, [1] * len(ideal), np.arange(len(ideal)))
    return [1 + int(count) for count in extra]


def text_of(stages: Sequence[Stage], num_epochs: int) -> str:
    """``natural:20 -> balanced:5``."""
    epochs = epochs_of(stages, num_epochs)
    return " -> ".join(f"{stage.manifest}:{count}" for stage, count in zip(stages, epochs, strict=True))
