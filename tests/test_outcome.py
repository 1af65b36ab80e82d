from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import PolicyError, UsageError
from pipeline.plan.epoch import EpochFunction
from pipeline.plan.outcome import Outcome, classes_per_batch, outcome, remarks
from pipeline.plan.policy import Targets, apply, parse
from pipeline.plan.shots import GROUPS, NO_GROUP, group_of

COUNTS = [3000, 250, 90, 20, 19, 2, 1, 1, 0]
counts_lists = st.lists(st.integers(0, 400), min_size=1, max_size=30).filter(any)
texts = st.sampled_from(
    ["natural", "balanced", "square_root", "undersample:ceiling=mean", "undersample:frozen", "oversample:max_repeat=3"]
)


def targets_of(text: str, counts: list[int] = COUNTS) -> Targets:
    return apply(counts, parse(text))


def told(text: str, counts: list[int] = COUNTS) -> Outcome:
    return outcome(targets_of(text, counts), np.array(counts) * 10)


def test_groups_by_images() -> None:
    names = [GROUPS[place] if place != NO_GROUP else "" for place in group_of(np.array([101, 100, 20, 19, 2, 1, 0]))]
    assert names == ["many", "medium", "medium", "few", "few", "one", ""]


def test_the_whole_table_of_one_policy() -> None:
    found = told("balanced:per_class=50,max_repeat=10")
    rows = [
        (part.name, part.num_classes, part.num_images, part.num_draws, part.num_distinct, part.largest_repeat)
        for part in (*found.parts, found.overall)
    ]
    assert rows == [
        ("many", 2, 3250, 100, 100, 0.2),
        ("medium", 2, 110, 100, 70, 2.5),
        ("few", 2, 21, 70, 21, 10),
        ("one", 2, 2, 20, 2, 10),
        ("all", 8, 3383, 290, 193, 10),
    ]
    assert [part.num_withheld for part in found.parts] == [0, 0, 30, 80]
    assert [part.num_bytes for part in found.parts] == [1000, 1000, 700, 200]
    assert (found.imbalance_before, found.imbalance, found.imbalance_wished) == (3000, 5, 1)
    assert (found.epochs_to_see_all, found.num_out_of_pool) == (60, 0)


@given(counts=counts_lists, text=texts)
def test_groups_add_up_to_the_whole(counts: list[int], text: str) -> None:
    found = told(text, counts)
    for field in ("num_classes", "num_drawn_classes", "num_images", "num_draws", "num_distinct", "num_withheld"):
        assert sum(getattr(part, field) for part in found.parts) == getattr(found.overall, field)
    assert sum(part.share for part in found.parts) == pytest.approx(1)
    assert found.overall.num_bytes == 10 * found.overall.num_draws
    assert max(part.largest_repeat for part in found.parts) == found.overall.largest_repeat


@given(counts=counts_lists, text=texts)
def test_distinct_images_are_those_that_the_epoch_draws(counts: list[int], text: str) -> None:
    targets = targets_of(text, counts)
    function = EpochFunction(targets.pool, targets.target, 3)
    draws = function.draws(0, targets.num_draws)
    ordinal, _ = function.images(draws.class_id, draws.draw)
    assert outcome(targets).overall.num_distinct == len(
        set(zip(draws.class_id.tolist(), ordinal.tolist(), strict=True))
    )


@pytest.mark.parametrize(("text", "batch"), [("natural", 64), ("natural", 400), ("square_root", 128), ("balanced", 32)])
def test_classes_per_batch_is_what_the_epoch_function_gives(text: str, batch: int) -> None:
    counts = np.maximum(1, 4000 / np.arange(1, 400) ** 1.2).astype(np.int64)
    targets = apply(counts, parse(text))
    drawn = EpochFunction(targets.pool, targets.target, 0).draws(0, targets.num_draws).class_id
    held = [len(np.unique(drawn[i : i + batch])) for i in range(0, len(drawn) - batch + 1, batch)]
    assert classes_per_batch(targets.target, batch) == pytest.approx(np.mean(held), rel=0.01)


def test_a_batch_of_a_whole_epoch_holds_every_class() -> None:
    assert classes_per_batch(np.array([1, 5, 0, 2]), 8) == 3
    assert classes_per_batch(np.array([30, 30, 0, 30, 30, 10]), 1) == pytest.approx(1, rel=0.01)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 draw, not 0"):
        outcome(targets_of("natural"), batch=0)


# -- in words


def test_nothing_is_said_where_nothing_is_remarkable() -> None:
    assert remarks(told("natural")) == ()


def test_max_repeat_that_wins_over_a_ratio_is_told() -> None:
    counts = [30_000, *[100] * 50, *[1] * 50]
    assert remarks(told("clip:floor=100,ceiling=1000,max_repeat=10", counts))[0] == (
        "max_repeat holds 50 classes below their wish (50 of one image): 4,500 draws. Largest : smallest class is "
        "100:1 where 10:1 was asked."
    )


def test_a_literal_ten_to_one_tells_its_price() -> None:
    counts = [30_000, *[100] * 50, *[1] * 50]
    said = remarks(told("clip:floor=100,ceiling=1000", counts))
    assert said[0].startswith("An image of the hardest-worked class is drawn 100 times an epoch")
    assert said[1] == "One epoch leaves out 83% of the images; 30 epochs show every one."


def test_what_is_never_drawn_is_told() -> None:
    said = remarks(told("undersample:ceiling=20,frozen,singletons=drop"))
    assert said == (
        "3,282 images are never drawn, in any epoch.",
        "2 of 8 classes are never drawn: a model cannot learn them.",
    )


# -- singletons and pseudo-singletons


def test_dropped_singletons_count_as_classes_without_images() -> None:
    targets = targets_of("balanced:singletons=drop")
    expected = targets_of("balanced", [n if n > 1 else 0 for n in COUNTS])
    assert np.array_equal(targets.target, expected.target)
    assert targets.available.tolist() == COUNTS
    assert targets.pool.tolist() == expected.available.tolist()


def test_dropping_all_classes_is_refused() -> None:
    with pytest.raises(PolicyError, match="no class has more than one image"):
        targets_of("natural:singletons=drop", [1, 1, 0])


def test_pseudo_singletons_are_rich_classes_drawn_from_one_image() -> None:
    targets = targets_of("natural:pseudo_singletons=3")
    poor = np.flatnonzero((targets.pool == 1) & (targets.available > 1))
    assert len(poor) == 3
    assert targets.available[poor].min() >= 20
    assert targets.target[poor].tolist() == [1, 1, 1]
    assert targets_of("square_root:pseudo_singletons=3").target[poor].max() <= 10


def test_the_choice_of_pseudo_singletons_grows_and_never_changes() -> None:
    def chosen(wanted: int) -> set[int]:
        targets = targets_of(f"natural:pseudo_singletons={wanted}", list(range(20, 80)))
        return set(np.flatnonzero(targets.pool == 1).tolist())

    assert chosen(5) < chosen(6) < chosen(30)
    assert sorted(chosen(5)) == [
        15,
        17,
        24,
        30,
        47,
    ]  # for ever: evaluations of different builds are of the same classes


def test_more_pseudo_singletons_than_rich_classes_is_refused() -> None:
    with pytest.raises(PolicyError, match="at most 4, the number of classes with 20 images or more"):
        targets_of("natural:pseudo_singletons=5")
