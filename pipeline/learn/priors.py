"""Which prior a model's logits carry, and Bayes' rule to make it another one.

In: logits ``[N, K]`` and the log prior they carry, from a manifest. Out: logits for another prior, the prior of
unlabelled images. Guarantees: numpy only, float64; a correction starts from the prior that the logits have, or is
refused; a class that the model never met stays impossible, it is never smoothed.

One identity is used throughout (``plan.manifest``; Menon et al., ICLR 2021, for the offset): a network trained on draws
``q`` with loss weights ``w`` and an offset ``a`` added to its logits in the loss carries ``log q + log w - a``. The
multiclass Bayes' rule then moves its logits to a prior ``p``: ``z + log p - (log q + log w - a)``. The one-against-rest
form that circulates (it scales the odds of each class by itself) is another rule, and picks other classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import UsageError
from pipeline.learn.scores import Scores, log_softmax, logsumexp

Floats = NDArray[np.float64]

_SAME = 1e-6
"""Two log priors that differ by less are one: manifests are integers, so that real differences are larger."""


def normalised(log_prior: ArrayLike) -> Floats:
    """float64 ``[K]`` whose exponentials sum to 1; ``-inf`` stays. Refuses what is no log prior."""
    values = np.asarray(log_prior, dtype=np.float64)
    if values.ndim != 1 or not len(values) or np.isnan(values).any() or np.isposinf(values).any():
        raise UsageError(f"a log prior is one number or -inf for each class, not {_shown(values)}")
    if not np.isfinite(values).any():
        raise UsageError(f"a log prior needs a class that can occur; all {len(values)} are -inf")
    return values - logsumexp(values[None])[0]


def uniform(log_prior: Floats) -> Floats:
    """float64 ``[K]``: equal shares of all classes that can occur under ``log_prior``."""
    return normalised(np.where(np.isfinite(log_prior), 0.0, -np.inf))


def carried(log_q: Floats, weights: Floats | None = None, offset: Floats | None = None) -> Floats:
    """The prior that logits carry after training on draws ``q``: log q + log w - a, normalised; float64 ``[K]``.

    ``log_q`` is ``manifest.log_q``, ``weights`` the class weights of the loss, ``offset`` what the loss added to the
    logits (``log_q`` itself for balanced softmax: what is left is uniform). A class without draws stays ``-inf``.
    """
    drawn = np.isfinite(log_q)
    w = np.ones_like(log_q) if weights is None else np.asarray(weights, dtype=np.float64)
    a = np.zeros_like(log_q) if offset is None else np.asarray(offset, dtype=np.float64)
    if w.shape != log_q.shape or a.shape != log_q.shape:
        raise UsageError(f"log_q, weights and offset must have one shape; found {log_q.shape}, {w.shape}, {a.shape}")
    if not ((w > 0) & np.isfinite(w) & np.isfinite(a))[drawn].all():
        raise UsageError("weights of drawn classes must be positive, and offsets finite: otherwise nothing was learned")
    result = np.full(len(log_q), -np.inf)
    result[drawn] = log_q[drawn] + np.log(w[drawn]) - a[drawn]
    return normalised(result)


def step(source: Floats, target: Floats) -> Floats:
    """float64 ``[K]`` to be added to logits that carry ``source`` so that they carry ``target``; ``-inf`` for a class
    that either of them rules out."""
    if source.shape != target.shape:
        raise UsageError(f"the two priors are over {source.shape} and {target.shape} classes; they must be the same")
    possible = np.isfinite(source) & np.isfinite(target)
    if not possible.any():
        raise UsageError("no class can occur under both priors: there is nothing to predict")
    result = np.full(len(source), -np.inf)
    result[possible] = target[possible] - source[possible]
    return result


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits with the prior that they carry, so that nobody corrects them twice.

    ``values``: floats ``[N, K]``, any constant per row. ``log_prior``: float64 ``[K]``.
    """

    values: NDArray[np.floating[Any]]
    log_prior: Floats

    def __post_init__(self) -> None:
        prior = normalised(self.log_prior)
        if self.values.ndim != 2 or self.values.shape[1] != len(prior):
            raise UsageError(f"logits must be [N, {len(prior)}] for a prior over {len(prior)} classes, not "
                             f"{list(self.values.shape)}")  # fmt: skip
        object.__setattr__(self, "log_prior", prior)

    def corrected(self, target: ArrayLike, source: ArrayLike | None = None) -> Logits:
        """The same predictions where classes are as frequent as ``target`` says (a log prior).

        ``source``: the prior that the caller takes the logits for. UsageError if they carry another one, which is what
        happens when they were corrected before.
        """
        if source is not None:
            self._check(normalised(source))
        wanted = normalised(target)
        shift = step(self.log_prior, wanted)
        return Logits(self.values + shift, np.where(np.isfinite(shift), wanted, -np.inf))

    def probabilities(self) -> Floats:
        """float64 ``[N, K]``, rows sum to 1."""
        return np.exp(log_softmax(self.values))

    def _check(self, source: Floats) -> None:
        if source.shape != self.log_prior.shape:
            raise UsageError(f"the logits are of {len(self.log_prior)} classes, the prior of {len(source)}")
        one_sided = np.isfinite(source) != np.isfinite(self.log_prior)
        both = np.isfinite(source) & np.isfinite(self.log_prior)
        apart = np.abs(source[both] - self.log_prior[both]).max(initial=0.0)
        if one_sided.any() or apart > _SAME:
            what = f"by up to a factor of {np.exp(min(apart, 700.0)):,.3g}" if apart > _SAME else "in what can occur"
            raise UsageError(
                f"these logits do not carry the prior that they are to be corrected from: it differs {what}. Were they "
                "corrected before? Correct them once, from the prior of their training"
            )


def _shown(values: NDArray[Any]) -> str:
    return f"shape {list(values.shape)}" if values.ndim != 1 or not len(values) else f"{values[:5].tolist()}..."


# -- an unknown prior -------------------------------------------------------------------------------------------------

EXACT = 1 << 23
"""Likelihoods of an estimate, images x classes, up to which they are held as float64. More are held as float32, each
rounded by 6e-8 of itself, in half of the memory; sums are float64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A prior found by EM. Where ``converged`` is False, ``change`` says how far its last step still went."""

    log_prior: Floats
    converged: bool
    num_steps: int
    change: float
    """The largest change of a class's share in the last step."""
    log_likelihood: tuple[float, ...]
    """Mean over the images, before each step and at the end, up to a constant; it never falls."""


def estimate_prior(logits: Logits, *, tolerance: float = 1e-6, max_steps: int = 1000) -> Estimate:
    """The class shares of the images that ``logits`` [N, K] were computed for, without their labels.

    Saerens, Latinne and Decaestecker, Neural Computation 14 (2002): starting from the prior that the logits carry,
    predict under the current estimate, take the mean prediction as the next one. It ascends the likelihood, and is as
    good as the logits are calibrated; on long tails dividing them by a temperature made it worse (docs/LOG.md). Rare
    classes often end near 0.
    """
    return fit_prior(Scores(values=logits.values), logits.log_prior, tolerance=tolerance, max_steps=max_steps)


def fit_prior(scores: Scores, log_prior: Floats, *, tolerance: float = 1e-6, max_steps: int = 1000) -> Estimate:
    """As ``estimate_prior``, of scores that carry ``log_prior``. Images of which no class has a score tell nothing."""
    if not tolerance > 0 or max_steps < 1:
        raise UsageError(f"tolerance must be above 0 and max_steps at least 1, not {tolerance} and {max_steps}")
    start = normalised(log_prior)
    likelihood = _likelihoods(scores, step(start, uniform(start)))
    if not len(likelihood):
        raise UsageError("a prior is estimated from images with scores; there is none")
    share, told, change = np.exp(start), list[float](), np.inf
    while len(told) < max_steps and change >= tolerance:
        after, mean_log = _expected(likelihood, share)
        told.append(mean_log)
        change, share = float(np.abs(after - share).max()), after
    num_steps = len(told)
    told.append(_expected(likelihood, share)[1])
    with np.errstate(divide="ignore"):
        found = normalised(np.log(share))
    return Estimate(
        log_prior=found, converged=change < tolerance, num_steps=num_steps, change=change, log_likelihood=tuple(told)
    )


def _likelihoods(scores: Scores, shift: Floats) -> NDArray[np.floating[Any]]:
    """p(x|c) ``[N, K]``, each row in units of its largest; images without a score are left out."""
    moved = replace(scores, shift=shift if scores.shift is None else scores.shift + shift)
    kind = np.float64 if len(scores) * scores.num_classes <= EXACT else np.float32
    made = np.empty((len(scores), scores.num_classes), kind)
    num = 0
    for _, logits in moved.by_rows():
        top = logits.max(axis=1)
        there = np.isfinite(top)
        rows = np.exp(logits[there] - top[there, None])
        made[num : num + len(rows)] = rows
        num += len(rows)
    return made[:num]


def _expected(likelihood: NDArray[np.floating[Any]], share: Floats) -> tuple[Floats, float]:
    """The mean prediction under ``share``, and the mean logarithm of what an image is worth under it."""
    total, log_total = np.zeros(len(share)), 0.0
    block = max(1, EM_BLOCK // len(share))
    for first in range(0, len(likelihood), block):
        part = likelihood[first : first + block].astype(np.float64)
        worth = part @ share
        total += (1 / worth) @ part
        log_total += float(np.log(worth).sum())
    return share * total / len(likelihood), log_total / len(likelihood)


EM_BLOCK = 1 << 18
"""Numbers that are widened at a time: 2 MiB, which stay near the core for both products."""


# -- an unknown prior of one number -----------------------------------------------------------------------------------

POWERS = (-1.0, 2.0)
"""Where a power is looked for: from a tail turned around to one twice as steep."""

_POWER_STEP = 0.25
_POWER_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class PowerEstimate:
    """The prior ``shares ** power``, normalised."""

    log_prior: Floats
    power: float
    """0: all classes are equally frequent, 1: as they were, at an end of ``POWERS``: none of these fits."""

    @property
    def is_at_end(self) -> bool:
        return min(abs(self.power - end) for end in POWERS) <= _POWER_TOLERANCE


def fit_power(scores: Scores, log_prior: Floats, log_shares: Floats) -> PowerEstimate:
    """Of all priors that are a power of ``shares``, the one under which the unlabelled images are most likely.

    ``scores`` [N, K] carry ``log_prior``; ``log_shares``: float64 ``[K]``, such as those of train. EM (``fit_prior``)
    chooses K shares and believes each class's own scores, which of rare classes are learned from a handful of images;
    here all images together choose one number. The likelihood has one hill in all that was tried; it need not, so that
    steps of 0.25 look for the highest one, and its slope is bisected there.
    """
    start, base = normalised(log_prior), normalised(log_shares)
    base = np.where(np.isfinite(start), base, -np.inf)
    likelihood = _likelihoods(scores, step(start, uniform(start)))
    if not len(likelihood):
        raise UsageError("a prior is estimated from images with scores; there is none")

    def at(power: float) -> tuple[float, float]:
        """The mean log-likelihood, and its slope."""
        share = np.exp(_to_power(base, power))
        after, mean_log = _expected(likelihood, share)
        return mean_log, float((after - share) @ np.where(np.isfinite(base), base, 0.0))

    if np.ptp(base[np.isfinite(base)]) < _SAME:  # every power of equal shares is the same
        return PowerEstimate(log_prior=base, power=1.0)
    powers = np.arange(POWERS[0], POWERS[1] + _POWER_STEP / 2, _POWER_STEP).tolist()
    told = [at(power) for power in powers]
    best = max(range(len(powers)), key=lambda i: told[i][0])
    low = powers[best] if told[best][1] > 0 else powers[best] - _POWER_STEP
    low, high = max(low, POWERS[0]), min(low + _POWER_STEP, POWERS[1])
    while high - low > _POWER_TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] > 0 else (low, middle)
    power = (low + high) / 2
    return PowerEstimate(log_prior=_to_power(base, power), power=power)


def _to_power(log_shares: Floats, power: float) -> Floats:
    """Normalised; what cannot occur stays so, whatever the power."""
    possible = np.isfinite(log_shares)
    return normalised(np.where(possible, power * np.where(possible, log_shares, 0.0), -np.inf))
