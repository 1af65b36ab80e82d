"""Metrics that a frequent class cannot dominate, and a trainer that learns what it is shown."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import UsageError
from pipeline.learn.metrics import (
    balanced_accuracy,
    coverage,
    group_accuracy,
    one_shot_recall,
    per_class_recall,
    shot_groups,
)
from pipeline.learn.train import evaluate, fit, normalise, rate_at, small_cnn


def test_recall_is_the_share_of_each_class_that_was_recognised() -> None:
    labels, predictions = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(per_class_recall(labels, predictions, 2), [0.75, 0.5])


def test_a_class_without_test_images_is_not_measured() -> None:
    recall = per_class_recall(np.array([0, 2]), np.array([0, 1]), 3)
    np.testing.assert_array_equal(recall, [1.0, np.nan, 0.0])


def test_an_absent_class_does_not_move_balanced_accuracy() -> None:
    labels, predictions = np.array([0, 0, 2, 2]), np.array([0, 0, 2, 1])
    assert balanced_accuracy(per_class_recall(labels, predictions, 3)) == 0.75


@pytest.mark.parametrize("seed", range(5))
def test_classes_that_cannot_be_evaluated_change_no_figure(seed: int) -> None:
    """However many there are, and though some predictions fall into them: those are misses of the true class alone."""
    rng = np.random.default_rng(seed)
    labels, predictions = rng.integers(0, 6, 300), rng.integers(0, 9, 300)  # classes 6 to 8 have no test image
    counts = np.array([500, 90, 40, 8, 3, 2, 1, 1, 1])
    few, many = (per_class_recall(labels, predictions, size) for size in (9, 5009))
    assert balanced_accuracy(many) == balanced_accuracy(few)
    assert group_accuracy(many, np.pad(counts, (0, 5000))) == group_accuracy(few, counts)
    assert (coverage(few), coverage(many)) == (6 / 9, 6 / 5009)
    expected = np.mean([(predictions[labels == c] == c).mean() for c in range(6)])
    assert balanced_accuracy(few) == pytest.approx(expected)


def test_one_shot_recall_is_that_of_measured_classes_with_one_image() -> None:
    recall = np.array([0.9, 0.5, np.nan, 0.1, np.nan])
    assert one_shot_recall(recall, np.array([70, 1, 1, 1, 3])) == pytest.approx(0.3)
    assert math.isnan(one_shot_recall(recall, np.array([70, 2, 1, 2, 3])))
    with pytest.raises(UsageError, match="must be equal"):
        one_shot_recall(recall, np.array([1]))


@pytest.mark.parametrize("seed", range(3))
def test_balanced_accuracy_does_not_depend_on_how_often_a_class_is_tested(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predictions = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    heavy = np.concatenate([labels, np.repeat(labels[labels == 0], 50)])
    heavy_predictions = np.concatenate([predictions, np.repeat(predictions[labels == 0], 50)])
    light = balanced_accuracy(per_class_recall(labels, predictions, 5))
    assert balanced_accuracy(per_class_recall(heavy, heavy_predictions, 5)) == pytest.approx(light)


def test_nothing_measured_is_nan_and_not_zero() -> None:
    assert math.isnan(balanced_accuracy(np.full(3, np.nan)))


def test_groups_meet_at_20_and_100() -> None:
    groups = shot_groups(np.array([101, 100, 20, 19]))
    assert {name: mask.tolist() for name, mask in groups.items()} == {
        "many": [True, False, False, False],
        "medium": [False, True, True, False],
        "few": [False, False, False, True],
    }


def test_group_accuracy_averages_classes_inside_each_group() -> None:
    recall, counts = np.array([1.0, 0.5, np.nan, 0.2, 0.4]), np.array([500, 200, 150, 3, 1])
    accuracy = group_accuracy(recall, counts)
    assert accuracy["many"] == 0.75
    assert accuracy["few"] == pytest.approx(0.3)
    assert math.isnan(accuracy["medium"])


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match=r"labels have shape \(2,\), predictions \(3,\)"):
        per_class_recall(np.array([0, 1]), np.array([0, 1, 1]), 2)
    with pytest.raises(UsageError, match=r"recall covers \(2,\) classes, counts \(3,\)"):
        group_accuracy(np.array([1.0, 1.0]), np.array([1, 2, 3]))


def test_a_label_beyond_the_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="label 7 is outside of 5 classes"):
        per_class_recall(np.array([7]), np.array([0]), 5)


def two_colours(num_images: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of noise in which class 1 is redder."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % 2
    images = torch.randint(0, 156, (num_images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[:, 0] += (labels * 60).to(torch.uint8)[:, None, None]
    return list(zip(images.split(16), labels.split(16), strict=True))


def test_fit_learns_what_it_is_shown() -> None:
    model = small_cnn(2, width=4)
    losses = fit(model, two_colours(96, 0), epochs=3, lr=0.05)
    predictions, labels = evaluate(model, two_colours(64, 1))
    assert losses[-1] < losses[0]
    assert (predictions == labels).mean() > 0.95


def test_fit_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = small_cnn(2, width=4, seed=5), small_cnn(2, width=4, seed=5)
    assert fit(first, two_colours(32, 0), epochs=1, lr=0.05) == fit(second, two_colours(32, 0), epochs=1, lr=0.05)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_another_seed_gives_other_weights() -> None:
    weights = [next(small_cnn(2, width=4, seed=seed).parameters()) for seed in (0, 1)]
    assert not torch.equal(*weights)


def test_fit_moves_only_what_requires_gradients() -> None:
    model = small_cnn(2, width=4)
    first, last = next(model.parameters()), list(model.parameters())[-1]
    first.requires_grad = False
    before, bias = first.detach().clone(), last.detach().clone()
    fit(model, two_colours(32, 0), epochs=1, lr=0.05)
    assert torch.equal(first, before)
    assert not torch.equal(last, bias)


def test_fit_tells_each_epoch() -> None:
    told: list[tuple[int, float]] = []
    losses = fit(small_cnn(2, width=4), two_colours(32, 0), epochs=2, lr=0.01, on_epoch=lambda *what: told.append(what))
    assert told == list(enumerate(losses))


def test_the_rate_rises_then_falls_to_almost_nothing() -> None:
    rates = [rate_at(step / 100) for step in range(101)]
    assert max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.2
    assert rates[-1] == pytest.approx(0, abs=1e-9)


class BrightestChannel(nn.Module):
    """Predicts which of the channels is brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * self.scale


def plain_colours(*channels: int) -> torch.Tensor:
    images = torch.zeros(len(channels), 3, 4, 4, dtype=torch.uint8)
    for row, channel in enumerate(channels):
        images[row, channel] = 200
    return images


def test_evaluate_counts_only_what_the_mask_keeps() -> None:
    batches = [
        (plain_colours(0, 1), torch.tensor([0, 1]), torch.tensor([True, True])),
        (plain_colours(2, 2), torch.tensor([1, 1]), torch.tensor([True, False])),
    ]
    predictions, labels = evaluate(BrightestChannel(), batches)
    assert predictions.tolist() == [0, 1, 2]
    assert labels.tolist() == [0, 1, 1]


def test_evaluate_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="the loader gave no batch"):
        evaluate(BrightestChannel(), [])


def test_normalised_pixels_are_centred() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2)
    assert normalise(images, torch.device("cpu")).flatten().tolist() == pytest.approx([-127.5 / 64, 127.5 / 64])
