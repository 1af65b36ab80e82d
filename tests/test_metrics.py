"""Metrics equal scikit-learn's, torchmetrics' and brute force where those are right, and are right where not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, cohen_kappa_score, recall_score, roc_auc_score
from torchmetrics.functional.classification import (
    binary_sensitivity_at_specificity,
    multiclass_auroc,
    multiclass_calibration_error,
)

from pipeline.errors import UsageError
from pipeline.learn.intervals import over_classes, over_images
from pipeline.learn.metrics import accuracy, accuracy_at, balanced_accuracy, kappa, per_class_recall
from pipeline.learn.ranking import SPECIFICITIES, at_threshold, auroc, calibration_error, threshold

SIZES = [(1, 1), (1, 5), (12, 1), (30, 3), (400, 20)]


def guesses(seed: int, size: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels, and predictions that are right half of the time. Large K leaves classes without an image, or with one."""
    rng = np.random.default_rng((seed, *size))
    labels = rng.integers(0, size[1], size[0])
    return labels, np.where(rng.random(size[0]) < 0.5, labels, rng.integers(0, size[1], size[0]))


def scored(seed: int, num: int, ties: bool = False) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    rng = np.random.default_rng((seed, num))
    positive = rng.random(num) < 0.3
    scores = rng.normal(size=num) + positive
    return (np.round(scores) if ties else scores), positive


# -- from labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore:y_pred contains classes:UserWarning", "ignore:A single label:UserWarning")
def test_figures_of_labels_are_scikit_learns(seed: int, size: tuple[int, int]) -> None:
    labels, predicted = guesses(seed, size)
    recall = per_class_recall(labels, predicted, size[1])
    assert accuracy(labels, predicted) == pytest.approx(accuracy_score(labels, predicted))
    assert balanced_accuracy(recall) == pytest.approx(balanced_accuracy_score(labels, predicted))
    there = np.unique(labels)
    np.testing.assert_allclose(
        recall[there], recall_score(labels, predicted, labels=there, average=None, zero_division=0)
    )
    if len(np.unique([*labels, *predicted])) > 1:
        assert kappa(labels, predicted) == pytest.approx(cohen_kappa_score(labels, predicted))


def test_kappa_of_one_class_is_not_defined() -> None:
    assert math.isnan(kappa(np.zeros(5, np.int64), np.zeros(5, np.int64)))
    assert math.isnan(kappa(np.zeros(0, np.int64), np.zeros(0, np.int64)))


def test_a_prediction_that_is_no_class_is_wrong_and_nothing_else() -> None:
    for beyond in (2, 70):
        labels, predicted = np.array([0, 0, 1, 1]), np.array([0, -1, 1, beyond])
        assert accuracy(labels, predicted) == 0.5
        assert kappa(labels, predicted) == pytest.approx(cohen_kappa_score(labels, predicted))


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(UsageError, match="label 2 is outside of 2 classes"):
        per_class_recall(np.array([0, 2]), np.array([0, 1]), 2)


@pytest.mark.parametrize("num_classes", [2, 10, 50])
def test_kappa_on_equal_classes_is_accuracy_in_other_words(num_classes: int) -> None:
    labels = np.repeat(np.arange(num_classes), 20)
    predicted = np.where(np.random.default_rng(0).random(len(labels)) < 0.6, labels, (labels + 1) % num_classes)
    right = accuracy(labels, predicted)
    assert kappa(labels, predicted) == pytest.approx((right - 1 / num_classes) / (1 - 1 / num_classes))


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_at_the_test_shares_is_accuracy(seed: int) -> None:
    labels, predicted = guesses(seed, (400, 20))
    recall = per_class_recall(labels, predicted, 20)
    shares = np.bincount(labels, minlength=20) / 400
    assert accuracy_at(recall, shares) == pytest.approx(accuracy(labels, predicted))
    assert accuracy_at(np.array([1.0, np.nan, 0.5]), np.array([0.2, 0.7, 0.1])) == pytest.approx(0.25 / 0.3)
    assert math.isnan(accuracy_at(np.array([np.nan]), np.array([1.0])))


# -- from scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_scikit_learns_and_brute_force(seed: int, ties: bool) -> None:
    scores, positive = scored(seed, 80, ties)
    inside, outside = scores[positive], scores[~positive]
    brute = np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside])
    assert auroc(scores, positive) == pytest.approx(brute)
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


def test_auroc_needs_both_kinds() -> None:
    assert math.isnan(auroc(np.ones(3), np.ones(3, bool)))
    assert math.isnan(auroc(np.ones(3), np.zeros(3, bool)))
    assert auroc(np.array([-np.inf, 0.0]), np.array([False, True])) == 1


def test_a_perfect_classifier_is_perfect_though_half_of_the_classes_have_no_image() -> None:
    """torchmetrics gives it 0.5."""
    labels = np.repeat(np.arange(5), 4)
    probability = np.full((20, 10), 0.01)
    probability[np.arange(20), labels] = 0.91
    with pytest.warns(UserWarning, match="No positive samples"):
        theirs = multiclass_auroc(torch.from_numpy(probability), torch.from_numpy(labels), num_classes=10)
    assert float(theirs) == pytest.approx(0.5)
    each = np.array([auroc(probability[:, c], labels == c) for c in range(10)])
    assert balanced_accuracy(each) == 1
    assert np.isnan(each).sum() == 5


@pytest.mark.parametrize("specificity", SPECIFICITIES)
@pytest.mark.parametrize("num", [2, 30, 400])
@pytest.mark.parametrize("ties", [False, True])
def test_sensitivity_at_specificity_is_the_best_of_all_thresholds(num: int, specificity: float, ties: bool) -> None:
    """On the images it was chosen on; as torchmetrics with every score a threshold, and as brute force."""
    for seed in range(3):
        scores, positive = scored(seed, num, ties)
        if positive.all() or not positive.any():
            continue
        found, achieved = at_threshold(scores, positive, threshold(scores, positive, specificity))
        options = [((scores > t)[positive].mean(), (scores <= t)[~positive].mean()) for t in [-np.inf, *scores]]
        assert found == pytest.approx(max(sens for sens, spec in options if spec >= specificity))
        assert achieved >= specificity
        probability = torch.from_numpy(scores).sigmoid()
        theirs, _ = binary_sensitivity_at_specificity(probability, torch.from_numpy(positive).int(), specificity)
        assert found == pytest.approx(float(theirs))


def test_a_threshold_of_validation_is_kept_on_test() -> None:
    limit = threshold(np.array([0.1, 0.2, 0.3, 0.4, 0.9]), np.array([False] * 4 + [True]), 0.75)
    assert limit == 0.3
    told = at_threshold(np.array([0.35, 0.25, 0.31, 0.1]), np.array([True, True, False, False]), limit)
    assert told == (0.5, 0.5)
    assert threshold(np.arange(10.0), np.zeros(10, bool), 0.9) == 8
    assert threshold(np.arange(10.0), np.zeros(10, bool), 0) == -math.inf


def test_without_images_there_is_no_threshold_and_no_figure() -> None:
    assert math.isnan(threshold(np.ones(2), np.ones(2, bool), 0.9))
    assert np.isnan(at_threshold(np.ones(2), np.ones(2, bool), math.nan)).all()
    assert np.isnan(at_threshold(np.ones(2), np.zeros(2, bool), 0.5)[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_is_torchmetrics(seed: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng((seed, *size))
    probability = rng.dirichlet(np.full(size[1], 0.3), size[0])
    labels = rng.integers(0, size[1], size[0])
    wide = torch.from_numpy(np.pad(probability, ((0, 0), (0, 1))))  # torchmetrics wants two classes
    theirs = multiclass_calibration_error(wide, torch.from_numpy(labels), num_classes=size[1] + 1, n_bins=15, norm="l1")
    ours = calibration_error(probability.max(1), probability.argmax(1) == labels)
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_bins_hold_their_upper_edge() -> None:
    """A bin for each of these two: 1 - 1/15 and 1/15 off."""
    edge = 1 / 15
    assert calibration_error(np.array([edge, edge * 1.001]), np.array([True, False])) == pytest.approx(0.5, abs=1e-4)


def test_no_image_has_no_calibration_error() -> None:
    assert math.isnan(calibration_error(np.zeros(0), np.zeros(0, bool)))


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_images_moves_no_bit(seed: int) -> None:
    """So that what several ranks gathered is what one would have."""
    rng = np.random.default_rng(seed)
    labels, predicted = guesses(seed, (400, 20))
    scores = rng.random(400)
    told: list[list[float]] = []
    for order in (np.arange(400), rng.permutation(400)):
        y, p, s = labels[order], predicted[order], scores[order]
        limit = threshold(s, y == 3, 0.9)
        figures = [accuracy(y, p), kappa(y, p), auroc(s, y == 3), limit, calibration_error(s, y == p)]
        told.append([*figures, *at_threshold(s, y == 4, limit), *over_images(y, p, kappa)])
    assert told[0] == told[1]


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UsageError, match="1 of 2 scores are NaN"):
        auroc(np.array([np.nan, 1.0]), np.array([True, False]))
    with pytest.raises(UsageError, match="scores and their truth"):
        auroc(np.ones(3), np.ones(2, bool))
    with pytest.raises(UsageError, match="specificity is from 0 to 1"):
        threshold(np.ones(2), np.zeros(2, bool), 90)
    with pytest.raises(UsageError, match="they must be equal"):
        accuracy_at(np.ones(2), np.ones(3))
    with pytest.raises(UsageError, match="they must be equal"):
        over_images(np.ones(2, np.int64), np.ones(3, np.int64), kappa)


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_an_interval_of_accuracy_is_the_binomials(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 500)
    predicted = np.where(rng.random(500) < 0.7, labels, 9)
    low, high = over_images(labels, predicted, accuracy, seed)
    right = accuracy(labels, predicted)
    half = 1.96 * math.sqrt(right * (1 - right) / 500)
    assert (low, high) == (pytest.approx(right - half, abs=0.008), pytest.approx(right + half, abs=0.008))
    assert high - low == pytest.approx(2 * half, rel=0.1)  # of 90 % it would be narrower by a sixth


@pytest.mark.parametrize("seed", range(3))
def test_an_interval_over_classes_is_that_of_a_mean(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=400)
    low, high = over_classes(values, seed)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.1)


def test_every_image_is_drawn_and_undefined_replicates_are_left_out() -> None:
    right_and_wrong = np.array([0, 0]), np.array([0, 1])
    assert over_images(*right_and_wrong, accuracy) == (0, 1)
    both_right = np.array([0, 1]), np.array([0, 1])  # kappa is not defined where one of them was drawn twice
    assert over_images(*both_right, kappa) == (1, 1)


def test_an_interval_over_classes_holds_the_truth_of_one_image_classes() -> None:
    """100 classes of one test image: resampling inside classes would have no width at all."""
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        chance = rng.beta(1, 1, 100)
        low, high = over_classes((rng.random(100) < chance).astype(float), seed)
        held += low <= chance.mean() <= high
    assert held >= 54


def test_an_interval_depends_on_its_seed_alone() -> None:
    values = np.random.default_rng(0).random(30)
    values[3] = np.nan
    assert over_classes(values, 1) == over_classes(values, 1)
    assert over_classes(values, 1) != over_classes(values, 2)
    low, high = over_classes(values, 1)
    assert low < np.nanmean(values) < high
    assert over_classes(values, 1) == over_classes(np.delete(values, 3), 1)
    labels, predicted = guesses(0, (400, 20))
    assert over_images(labels, predicted, kappa, 1) == over_images(labels, predicted, kappa, 1)
    assert over_images(labels, predicted, kappa, 1) != over_images(labels, predicted, kappa, 2)


def test_nothing_has_no_interval() -> None:
    assert np.isnan(over_classes(np.full(3, np.nan))).all()
    assert np.isnan(over_images(np.zeros(0, np.int64), np.zeros(0, np.int64), accuracy)).all()
    assert np.isnan(over_images(np.zeros(4, np.int64), np.zeros(4, np.int64), kappa)).all()
    assert over_classes(np.array([0.5])) == (0.5, 0.5)
