from __future__ import annotations

import numpy as np
import pytest

from pipeline.ingest.splits import TEST, TRAIN, VAL, assign, find_duplicates, join_groups, number_groups, straddlers
from pipeline.schema import SPLIT_UNSET


def open_splits(num: int) -> np.ndarray:
    return np.full(num, SPLIT_UNSET, np.int8)


def keys(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, num, dtype=np.uint64)


def assign_classes(counts: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    class_id = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    group = keys(len(class_id))
    return class_id, assign(class_id, group, open_splits(len(class_id)), num_classes=len(counts), seed=seed)


@pytest.mark.parametrize(
    ("count", "train", "held"),
    [(1, 1, 0), (2, 1, 1), (3, 1, 2), (9, 7, 2), (30, 24, 6), (250, 210, 40), (999, 959, 40)],
)
def test_sizes_follow_the_rule(count: int, train: int, held: int) -> None:
    _, split = assign_classes([count])
    assert (np.sum(split == TRAIN), np.sum(split != TRAIN)) == (train, held)


def test_two_images_hold_one_out_for_val_in_some_classes_and_test_in_others() -> None:
    class_id, split = assign_classes([2] * 200)
    assert np.all(np.bincount(class_id[split == TRAIN]) == 1)
    assert 60 < np.sum(split == VAL) < 140


@pytest.mark.parametrize("seed", range(5))
def test_order_of_samples_does_not_matter(seed: int) -> None:
    class_id, group = np.random.default_rng(seed).integers(0, 9, 300).astype(np.int32), keys(300, seed) % np.uint64(120)
    split = assign(class_id, group, open_splits(300), num_classes=9, seed=seed)
    order = np.random.default_rng(seed + 100).permutation(300)
    again = assign(class_id[order], group[order], open_splits(300), num_classes=9, seed=seed)
    assert np.array_equal(split[order], again)


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_together_and_every_class_keeps_a_train_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    class_id = rng.integers(0, 30, 120).astype(np.int32)
    group = rng.integers(0, 50, 120).astype(np.uint64)  # many groups of several classes
    split = assign(class_id, group, open_splits(120), num_classes=30, seed=seed)
    assert not straddlers(group, split).any()
    assert set(class_id[split == TRAIN]) == set(class_id)


def test_a_given_split_wins_for_its_whole_group() -> None:
    given = np.array([2, SPLIT_UNSET, SPLIT_UNSET], np.int8)
    split = assign(np.zeros(3, np.int32), np.array([7, 7, 8], np.uint64), given, num_classes=1, seed=0)
    assert split.tolist() == [2, 2, TRAIN]


def test_seeds_choose_other_images() -> None:
    assert not np.array_equal(assign_classes([50], seed=1)[1], assign_classes([50], seed=2)[1])


def digests(values: list[int]) -> np.ndarray:
    return np.array([[value, 0, 0, value] for value in values], np.uint64).reshape(-1, 4)


def test_copies_of_one_class_leave_all_but_the_smallest_key() -> None:
    found = find_duplicates(
        digests([5, 5, 6, 5]), keys_of([3, 1, 0, 2]), np.zeros(4, np.int32), open_splits(4), np.zeros(4, bool)
    )
    assert found.duplicate.tolist() == [True, False, False, True]
    assert found.keeper.tolist() == [1, -1, -1, 1]


def test_one_image_under_two_labels_leaves_entirely_and_each_names_another() -> None:
    found = find_duplicates(
        digests([5, 5, 5]), keys_of([0, 1, 2]), np.array([1, 1, 2], np.int32), open_splits(3), np.zeros(3, bool)
    )
    assert found.conflict.all()
    assert found.keeper.tolist() == [1, 0, 0]


def test_a_copy_in_a_later_split_is_a_leak() -> None:
    split = np.array([2, 0, 0], np.int8)
    found = find_duplicates(digests([5, 5, 5]), keys_of([0, 1, 2]), np.zeros(3, np.int32), split, np.zeros(3, bool))
    assert (found.leak.tolist(), found.duplicate.tolist()) == ([True, False, False], [False, False, True])


def test_no_samples_no_duplicates() -> None:
    found = find_duplicates(digests([]), keys_of([]), np.zeros(0, np.int32), open_splits(0), np.zeros(0, bool))
    assert len(found.keeper) == 0


def test_joined_groups_share_the_smallest_id() -> None:
    group = keys_of([9, 4, 7, 5])
    assert join_groups(group, keys_of([9, 7]), keys_of([7, 4])).tolist() == [4, 4, 4, 5]


def keys_of(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint64)


@pytest.mark.parametrize("seed", range(20))
def test_who_has_a_split_keeps_it_and_new_groups_fill_what_is_free(seed: int) -> None:
    rng = np.random.default_rng(seed)
    class_id = rng.integers(0, 12, 300).astype(np.int32)
    group = keys(300, seed)
    fixed = np.where(rng.random(300) < 0.6, rng.integers(0, 3, 300), SPLIT_UNSET).astype(np.int8)
    split = assign(class_id, group, fixed, num_classes=12, seed=seed)
    assert np.array_equal(split[fixed != SPLIT_UNSET], fixed[fixed != SPLIT_UNSET])
    for number in range(12):
        mine = class_id == number
        quota = min(20, max(1, mine.sum() // 10))
        for code in (VAL, TEST):
            before, now = np.sum(fixed[mine] == code), np.sum(split[mine] == code)
            assert now == before if before >= quota else before <= now <= quota


@pytest.mark.parametrize("seed", range(20))
def test_a_class_with_a_new_image_trains(seed: int) -> None:
    rng = np.random.default_rng(seed)
    class_id = rng.integers(0, 40, 120).astype(np.int32)
    group = rng.integers(0, 90, 120).astype(np.uint64)  # some of several classes
    held = rng.integers(0, 3, 90).astype(np.int8)
    fixed = np.where(held == TRAIN, SPLIT_UNSET, held)[group.astype(int)].astype(np.int8)
    split = assign(class_id, group, fixed, num_classes=40, seed=seed)
    assert not straddlers(group, split).any()
    assert set(class_id[fixed == SPLIT_UNSET]) <= set(class_id[split == TRAIN])


@pytest.mark.parametrize("seed", range(6))
def test_numbered_groups_are_those_of_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**64, 40, dtype=np.uint64)
    for group in (ids, np.sort(ids), rng.choice(ids[:9], 200), np.sort(rng.choice(ids[:9], 200)), ids[:1], ids[:0]):
        groups, inverse = number_groups(group)
        expected, places = np.unique(group, return_inverse=True)
        assert groups.tolist() == expected.tolist()
        assert inverse.tolist() == places.tolist()
