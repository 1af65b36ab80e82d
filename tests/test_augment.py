"""Repeats are augmented harder: the first view is the plain crop, later ones differ more, each as its draw says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pipeline.errors import UsageError
from pipeline.stream.augment import OPERATIONS, HarderRepeats
from pipeline.stream.transforms import Draw, RandomResizedCropFlip, planned

CROP = RandomResizedCropFlip(24)


def image(channels: int = 3) -> torch.Tensor:
    rows, columns = np.mgrid[:40, :50]
    base = np.stack([(5 * rows + 3 * columns + 40 * c) % 200 + 20 for c in range(channels)])
    return torch.from_numpy(base.astype(np.uint8))


def draw(repeat: int, key: int = 5) -> Draw:
    return Draw(position=repeat, class_id=0, repeat=repeat, key=key)


@pytest.mark.parametrize("key", range(20))
def test_the_first_view_is_the_plain_crop(key: int) -> None:
    assert torch.equal(HarderRepeats(CROP)(image(), draw(0, key)), CROP(image(), draw(0, key)))


def test_later_views_differ_more_and_more() -> None:
    harder = HarderRepeats(CROP, full_at=30, magnitude=1.0)

    def change(repeat: int) -> float:
        pairs = [(harder(image(), draw(repeat, key)), CROP(image(), draw(repeat, key))) for key in range(60)]
        return float(np.mean([(one.float() - two.float()).abs().mean() for one, two in pairs]))

    changes = [change(repeat) for repeat in (0, 1, 5, 30)]
    assert changes[0] == 0.0
    assert all(later > 1.2 * earlier for earlier, later in itertools.pairwise(changes[1:])), changes
    assert change(30) == change(300), "beyond full_at nothing grows"


def test_strength_runs_from_none_to_all() -> None:
    harder = HarderRepeats(CROP, full_at=20, magnitude=0.5)
    values = [harder.strength(repeat) for repeat in range(30)]
    assert (values[0], values[20], values[29]) == (0.0, 0.5, 0.5)
    assert values == sorted(values)
    assert 0.1 < values[1] < 0.15


def test_a_view_is_a_function_of_its_draw() -> None:
    harder = HarderRepeats(CROP, num_operations=3)
    state = torch.get_rng_state()
    one, two = harder(image(), draw(7, 1)), harder(image(), draw(7, 1))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was moved"
    assert not torch.equal(one, harder(image(), draw(7, 2)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(len(OPERATIONS)))
def test_every_operation_keeps_shape_and_type_and_changes_nothing_at_zero(number: int, channels: int) -> None:
    before = image(channels)
    for amount in (-1.0, 1.0):
        after = OPERATIONS[number](before, amount)
        assert (after.shape, after.dtype) == (before.shape, torch.uint8)
    assert torch.equal(OPERATIONS[number](before, 0.0), before)
    assert channels == 1 or not torch.equal(OPERATIONS[number](before, 1.0), before)


def test_all_operations_are_met() -> None:
    whiches = {int(draw(1, key).uniform(CROP.num_uniform + 1)[-1] * len(OPERATIONS)) for key in range(200)}
    assert whiches == set(range(len(OPERATIONS)))


def test_the_loader_decodes_whole_images_for_it() -> None:
    assert planned(HarderRepeats(CROP)) is None


@pytest.mark.parametrize("options", [{"num_operations": 0}, {"full_at": 0}])
def test_numbers_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        HarderRepeats(CROP, **options)


@pytest.mark.parametrize("magnitude", [0.0, 1.01, float("nan")])
def test_a_magnitude_that_means_nothing_is_refused(magnitude: float) -> None:
    with pytest.raises(UsageError, match="at most 1"):
        HarderRepeats(CROP, magnitude=magnitude)
