"""What ties sampling, weights and logit offsets together, by training; what the scale of weights does and does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, one_hot

from pipeline.plan.manifest import WEIGHTS, log_prior, log_q, weights
from pipeline.plan.policy import apply, parse

COUNTS = [900, 240, 120, 60, 30]
NUM_LOOKS = 4  # what an image looks like is one of these; the network is a table, so it can learn any posterior
POLICIES = ["natural", "power:alpha=0.5,max_repeat=3", "balanced:per_class=200,max_repeat=4"]

Floats = NDArray[np.float64]


def draws_of(target: NDArray[np.int64], seed: int) -> tuple[torch.Tensor, torch.Tensor, Floats]:
    """Looks and labels of an epoch, and P(look | class) [NUM_LOOKS, K] in it."""
    rng = np.random.default_rng(seed)
    table = np.array([1 + rng.multinomial(n - NUM_LOOKS, rng.dirichlet(np.ones(NUM_LOOKS))) for n in target.tolist()]).T
    looks, labels = (np.repeat(axis.ravel(), table.ravel()) for axis in np.indices(table.shape))
    return torch.from_numpy(looks), torch.from_numpy(labels), table / table.sum(0)


def trained(looks: torch.Tensor, labels: torch.Tensor, weight: Floats, offset: Floats) -> Floats:
    """Logits [NUM_LOOKS, K] that minimise the weighted loss of ``logits + offset``."""
    logits = torch.zeros((NUM_LOOKS, len(weight)), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = cross_entropy(logits[looks] + torch.from_numpy(offset), labels, weight=torch.from_numpy(weight))
        value.backward()
        return value

    optimizer.step(loss)
    return logits.detach().numpy()


def softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [None, *WEIGHTS])
@pytest.mark.parametrize("tau", [0.0, 1.0, 0.7])
def test_a_network_carries_the_prior_log_q_plus_log_w_minus_a(policy: str, kind: str | None, tau: float) -> None:
    targets = apply(COUNTS, parse(policy))
    looks, labels, likelihood = draws_of(targets.target, seed=len(policy))
    weight = np.ones(len(COUNTS)) if kind is None else weights(kind, targets.available, targets.target)
    offset = tau * log_q(targets.target)
    carried = log_q(targets.target) + np.log(weight) - offset
    logits = trained(looks, labels, weight, offset)
    for prior in (np.full(len(COUNTS), 1 / len(COUNTS)), np.exp(log_prior(targets.available))):
        exact = likelihood * prior / (likelihood * prior).sum(1, keepdims=True)  # Bayes' rule
        assert softmax(logits - carried + np.log(prior)) == pytest.approx(exact, abs=1e-4)


def test_residual_weights_balance_what_any_draws_lack() -> None:
    for policy in POLICIES:
        targets = apply(COUNTS, parse(policy))
        carried = log_q(targets.target) + np.log(weights("residual", targets.available, targets.target))
        assert np.ptp(carried) == pytest.approx(0)


def test_the_scale_of_weights_cancels_with_hard_labels_and_not_with_soft_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(64, 5, generator=rng), torch.randint(0, 5, (64,), generator=rng)
    targets = apply(COUNTS, parse("natural"))
    weight = torch.from_numpy(weights("balanced", targets.available, targets.target)).float()
    hard = [float(cross_entropy(logits, labels, weight=scale * weight)) for scale in (1, 10)]
    soft = [float(cross_entropy(logits, one_hot(labels, 5).float(), weight=scale * weight)) for scale in (1, 10)]
    assert hard[1] == pytest.approx(hard[0])
    assert soft[1] == pytest.approx(10 * soft[0])
