"""Bayes' rule between priors: exact on models that are known, once and never twice; EM and temperature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from pipeline.errors import UsageError
from pipeline.learn.calibration import MAX_SHARPNESS, temperature
from pipeline.learn.priors import POWERS, Logits, carried, estimate_prior, fit_power, normalised, step, uniform
from pipeline.learn.scores import Scores, log_softmax
from pipeline.plan.manifest import log_q, weights

Floats = NDArray[np.float64]
SHAPES = [(1, 1), (1, 4), (7, 1), (40, 3), (200, 17)]


def shares(rng: np.random.Generator, num_classes: int) -> Floats:
    return np.log(rng.dirichlet(np.full(num_classes, 0.7)) + 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_correction_is_bayes_rule(shape: tuple[int, int], seed: int) -> None:
    """By plain probabilities: p(c|x) * new(c) / old(c), made to sum to 1."""
    rng = np.random.default_rng((seed, *shape))
    old, new = (normalised(shares(rng, shape[1])) for _ in range(2))
    logits = Logits(rng.normal(0, 3, shape), old)
    ratio = logits.probabilities() * np.exp(new) / np.exp(old)
    corrected = logits.corrected(new, source=old)
    np.testing.assert_allclose(corrected.probabilities(), ratio / ratio.sum(1, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(corrected.log_prior, new, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_there_and_back_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = normalised(shares(rng, 9)), normalised(shares(rng, 9))
    logits = Logits(rng.normal(0, 3, (30, 9)), old)
    again = logits.corrected(new).corrected(old, source=new)
    np.testing.assert_allclose(again.probabilities(), logits.probabilities(), atol=1e-12)


def test_it_is_not_the_one_against_rest_rule() -> None:
    """Which circulates, and picks another class here."""
    p, old, new = np.array([0.49, 0.31, 0.2]), np.array([0.6, 0.3, 0.1]), np.full(3, 1 / 3)
    exact = Logits(np.log(p)[None], np.log(old)).corrected(np.log(new)).probabilities()[0]
    odds = new * p / old
    one_against_rest = odds / (odds + (1 - new) * (1 - p) / (1 - old))
    np.testing.assert_allclose(exact, odds / odds.sum())
    assert np.abs(exact - one_against_rest / one_against_rest.sum()).max() > 0.01


def test_correcting_twice_is_refused() -> None:
    natural = np.log([0.7, 0.2, 0.1])
    logits = Logits(np.zeros((2, 3)), natural)
    once = logits.corrected(uniform(natural), source=natural)
    with pytest.raises(UsageError, match=r"by up to a factor of 3\.33.*Were they corrected before"):
        once.corrected(uniform(natural), source=natural)
    with pytest.raises(UsageError, match="of 3 classes, the prior of 2"):
        once.corrected(uniform(natural), source=np.log([0.5, 0.5]))
    without = Logits(np.zeros((2, 3)), np.array([np.log(0.5), np.log(0.5), -np.inf]))
    with pytest.raises(UsageError, match="do not carry the prior"):
        without.corrected(uniform(natural), source=natural)
    with pytest.raises(UsageError, match="in what can occur"):
        without.corrected(uniform(natural), source=np.log([0.5, 0.5, 1e-12]))


@pytest.mark.parametrize("kind", [None, "balanced", "residual", "square_root"])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_what_a_manifest_makes_logits_carry(kind: str | None, tau: float) -> None:
    available, target = np.array([500, 60, 7, 0, 1]), np.array([300, 100, 70, 0, 10])
    w = None if kind is None else weights(kind, available, target)
    found = carried(log_q(target), w, tau * np.where(target > 0, log_q(target), 0))
    drawn = target > 0
    expected = target[drawn] * (1 if w is None else w[drawn]) / target[drawn] ** tau
    np.testing.assert_allclose(np.exp(found[drawn]), expected / expected.sum())
    assert found[3] == -np.inf


def test_balanced_softmax_and_residual_weights_leave_a_uniform_prior() -> None:
    target = np.array([300, 100, 0, 10])
    q = log_q(target)
    for found in (carried(q, offset=q), carried(q, weights("residual", target, target))):
        np.testing.assert_allclose(found, uniform(q), atol=1e-12)


def test_a_class_that_was_never_drawn_stays_impossible() -> None:
    """Also where the target wants it, and though its logit is the largest."""
    logits = Logits(np.array([[1.0, 0.5, 9.0]]), np.array([np.log(0.8), np.log(0.2), -np.inf]))
    corrected = logits.corrected(np.log([1 / 3, 1 / 3, 1 / 3]))
    assert corrected.probabilities()[0, 2] == 0
    np.testing.assert_allclose(np.exp(corrected.log_prior), [0.5, 0.5, 0])
    assert not np.isnan(corrected.values).any()
    np.testing.assert_array_equal(step(logits.log_prior, np.log([0.5, 0.25, 0.25]))[2:], [-np.inf])


@pytest.mark.parametrize("bad", [[], [[0.0]], [np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_what_is_no_prior_is_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match="log prior"):
        normalised(bad)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"logits must be \[N, 2\]"):
        Logits(np.zeros((3, 4)), np.log([0.5, 0.5]))
    with pytest.raises(UsageError, match="must have one shape"):
        carried(np.log([0.5, 0.5]), np.ones(3))
    with pytest.raises(UsageError, match="must be positive"):
        carried(np.log([0.5, 0.5]), np.array([1.0, 0.0]))
    with pytest.raises(UsageError, match="no class can occur under both"):
        step(np.array([0.0, -np.inf]), np.array([-np.inf, 0.0]))
    with pytest.raises(UsageError, match="the same"):
        step(np.zeros(2), np.zeros(3))


# -- EM ---------------------------------------------------------------------------------------------------------------


def gaussian(seed: int, share: Floats, num: int, old: Floats) -> Logits:
    """Exact log posteriors under ``old`` of points drawn where classes are as frequent as ``share``."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(share), num, p=share)
    points = labels * 2.0 + rng.normal(size=num)
    return Logits(-0.5 * (points[:, None] - 2.0 * np.arange(len(share))) ** 2 + np.log(old), np.log(old))


@pytest.mark.parametrize("seed", range(3))
def test_em_finds_the_prior_of_unlabelled_images(seed: int) -> None:
    old, new = np.array([0.9, 0.07, 0.03]), np.array([0.2, 0.3, 0.5])
    found = estimate_prior(gaussian(seed, new, 20_000, old))
    assert found.converged
    np.testing.assert_allclose(np.exp(found.log_prior), new, atol=0.02)
    assert (np.diff(found.log_likelihood) > -1e-12).all()
    assert found.log_likelihood[-1] > found.log_likelihood[0] + 0.1


@pytest.mark.parametrize("seed", range(3))
def test_em_is_the_loop_of_the_paper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = np.exp(normalised(shares(rng, 4)))
    logits = Logits(rng.normal(0, 2, (25, 4)), np.log(old))
    posterior, q = logits.probabilities(), old.copy()
    for _ in range(7):
        moved = [[row[c] * q[c] / old[c] for c in range(4)] for row in posterior]
        q = np.mean([[value / sum(row) for value in row] for row in moved], axis=0)
    found = estimate_prior(logits, max_steps=7, tolerance=1e-30)
    np.testing.assert_allclose(np.exp(found.log_prior), q, rtol=1e-9)
    assert not found.converged
    assert found.num_steps == 7
    assert found.change > 0


def test_em_leaves_a_class_that_was_never_drawn_at_nothing() -> None:
    logits = Logits(np.array([[0.0, 1.0, 5.0], [2.0, 0.0, 5.0]]), np.array([np.log(0.5), np.log(0.5), -np.inf]))
    found = estimate_prior(logits)
    assert found.log_prior[2] == -np.inf
    assert np.isfinite(found.log_likelihood).all()


def test_em_of_one_class_ends_at_once() -> None:
    found = estimate_prior(Logits(np.zeros((4, 1)), np.zeros(1)))
    assert (found.converged, found.num_steps, found.log_prior.tolist()) == (True, 1, [0.0])


def test_em_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="there is none"):
        estimate_prior(Logits(np.zeros((0, 2)), np.zeros(2)))
    with pytest.raises(UsageError, match="max_steps"):
        estimate_prior(Logits(np.zeros((1, 2)), np.zeros(2)), max_steps=0)


# -- one power --------------------------------------------------------------------------------------------------------

TAIL = np.array([0.7, 0.2, 0.08, 0.02])


def to_power(power: float) -> Floats:
    return TAIL**power / (TAIL**power).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power", [-0.5, 0.0, 0.4, 1.0, 1.6])
def test_the_power_of_the_images_is_found_whatever_prior_the_scores_carry(power: float, seed: int) -> None:
    old = np.array([0.4, 0.1, 0.3, 0.2])
    found = fit_power(Scores(values=gaussian(seed, to_power(power), 20_000, old).values), np.log(old), np.log(TAIL))
    assert found.power == pytest.approx(power, abs=0.06)
    np.testing.assert_allclose(np.exp(found.log_prior), to_power(found.power), rtol=1e-9)
    assert not found.is_at_end


@pytest.mark.parametrize("seed", range(5))
def test_no_other_power_is_likelier(seed: int) -> None:
    """By brute force over a fine grid."""
    rng = np.random.default_rng(seed)
    values, old = rng.normal(0, 3, (30, 4)), np.exp(normalised(shares(rng, 4)))
    likelihood = np.exp(values - np.log(old))
    grid = np.linspace(*POWERS, 3001)
    told = [np.log(likelihood @ to_power(power)).mean() for power in grid]
    found = fit_power(Scores(values=values), np.log(old), np.log(TAIL))
    assert found.power == pytest.approx(grid[int(np.argmax(told))], abs=2e-3)


@pytest.mark.parametrize(("class_id", "end"), [(0, POWERS[1]), (3, POWERS[0])])
def test_images_that_no_power_explains_end_at_an_end(class_id: int, end: float) -> None:
    values = np.tile(20.0 * np.eye(4)[class_id], (10, 1))
    found = fit_power(Scores(values=values), np.log(TAIL), np.log(TAIL))
    assert found.power == pytest.approx(end, abs=1e-3)
    assert found.is_at_end


def test_a_class_that_cannot_occur_stays_impossible_under_every_power() -> None:
    log_shares = np.array([np.log(0.6), np.log(0.4), -np.inf, np.log(0.3)])
    carries = np.array([np.log(0.3), np.log(0.3), np.log(0.4), -np.inf])
    found = fit_power(Scores(values=np.random.default_rng(0).normal(size=(50, 4))), carries, log_shares)
    assert np.isneginf(found.log_prior).tolist() == [False, False, True, True]
    assert np.isfinite(found.power)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_of_equal_shares_every_power_is_the_same(num_classes: int) -> None:
    even = np.full(num_classes, -np.log(num_classes))
    found = fit_power(Scores(values=np.random.default_rng(1).normal(size=(9, num_classes))), even, even)
    np.testing.assert_allclose(found.log_prior, even)
    assert (found.power, found.is_at_end) == (1.0, False)


def test_a_power_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="there is none"):
        fit_power(Scores(values=np.zeros((0, 2))), np.zeros(2), np.zeros(2))


# -- temperature ------------------------------------------------------------------------------------------------------


def nll(values: Floats, labels: NDArray[np.int64], t: float) -> float:
    return float(-log_softmax(values / t)[np.arange(len(labels)), labels].mean())


@pytest.mark.parametrize("true_t", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_temperature_is_the_best_there_is(true_t: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    calibrated = rng.normal(0, 2, (4000, 6))
    labels = np.array([rng.choice(6, p=row) for row in np.exp(log_softmax(calibrated))])
    found = temperature(calibrated * true_t, labels)
    assert found == pytest.approx(true_t, rel=0.1)
    grid = found * np.exp(np.linspace(-0.5, 0.5, 41))
    best = min(nll(calibrated * true_t, labels, t) for t in grid.tolist())
    assert nll(calibrated * true_t, labels, found) <= best + 1e-12


def test_temperature_is_a_logistic_regression_of_one_weight() -> None:
    rng = np.random.default_rng(7)
    margin = rng.normal(0, 3, 500)
    labels = (rng.random(500) < 1 / (1 + np.exp(-margin / 2))).astype(np.int64)
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(margin[:, None], labels)
    values = np.stack([np.zeros(500), margin], axis=1)
    assert temperature(values, labels) == pytest.approx(1 / float(model.coef_[0, 0]), rel=1e-4)


def test_temperature_ends_where_sharper_is_always_better_or_worse() -> None:
    values = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert temperature(values, np.array([0, 1])) == pytest.approx(1 / MAX_SHARPNESS)
    assert temperature(values, np.array([1, 0])) == pytest.approx(MAX_SHARPNESS)


def test_impossible_classes_do_not_poison_a_temperature() -> None:
    rng = np.random.default_rng(0)
    values, labels = rng.normal(0, 2, (300, 3)), rng.integers(0, 3, 300)
    wide = np.concatenate([values, np.full((300, 1), -np.inf)], axis=1)
    assert temperature(wide, labels) == pytest.approx(temperature(values, labels))
    extra = np.concatenate([wide, wide[:1]]), np.append(labels, 3)
    assert temperature(*extra) == pytest.approx(temperature(values, labels))
    with pytest.raises(UsageError, match="there is none"):
        temperature(wide[:1], np.array([3]))
