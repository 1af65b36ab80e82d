from __future__ import annotations

import json
import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.ingest.stats import ClassStats, Group, class_table, describe
from pipeline.schema import CLASSES, SPLITS

NUM_CLASSES = 4
images = st.lists(
    st.tuples(st.integers(0, NUM_CLASSES - 1), st.integers(0, len(SPLITS) - 1), st.integers(0, 2**40)), max_size=40
)
counts_lists = st.lists(st.integers(0, 500), min_size=1, max_size=30)


def stats_of(rows: list[tuple[int, int, int]]) -> ClassStats:
    columns = zip(*rows, strict=True) if rows else ([], [], [])
    return ClassStats.of(*(list(column) for column in columns), num_classes=NUM_CLASSES)


def values(stats: ClassStats) -> list[object]:
    return [stats.counts.tolist(), stats.sizes_bytes.tolist()]


# -- counting


def test_counts_and_bytes_by_split() -> None:
    stats = ClassStats.of([0, 0, 1, 0], [0, 0, 2, 1], [10, 20, 5, 2**60], num_classes=2)
    assert stats.counts.tolist() == [[2, 0], [1, 0], [0, 1]]
    assert stats.sizes_bytes.tolist() == [[30, 0], [2**60, 0], [0, 5]]


@given(rows=images, cut=st.integers(0, 40))
def test_merge_of_pieces_is_the_whole(rows: list[tuple[int, int, int]], cut: int) -> None:
    assert values(stats_of(rows[:cut]).merge(stats_of(rows[cut:]))) == values(stats_of(rows))


@given(a=images, b=images, c=images)
def test_merge_is_associative_and_commutative(
    a: list[tuple[int, int, int]], b: list[tuple[int, int, int]], c: list[tuple[int, int, int]]
) -> None:
    x, y, z = stats_of(a), stats_of(b), stats_of(c)
    assert values(x.merge(y).merge(z)) == values(x.merge(y.merge(z))) == values(z.merge(x).merge(y))


@given(rows=images)
def test_zeros_are_neutral(rows: list[tuple[int, int, int]]) -> None:
    pieces = [ClassStats.zeros(NUM_CLASSES), stats_of(rows), ClassStats.zeros(NUM_CLASSES)]
    assert values(reduce(ClassStats.merge, pieces)) == values(stats_of(rows))


def test_merge_leaves_its_parts_alone() -> None:
    part = stats_of([(0, 0, 1)])
    part.merge(part)
    assert part.counts.sum() == 1


def test_merge_of_other_class_maps_is_refused() -> None:
    with pytest.raises(UsageError, match="statistics of 2 classes cannot merge with those of 3"):
        ClassStats.zeros(2).merge(ClassStats.zeros(3))


@pytest.mark.parametrize(
    ("class_id", "split", "message"),
    [(4, 0, "class_id must be from 0 to 3; row 1 has 4"), (0, -1, "split must be from 0 to 2; row 1 has -1")],
)
def test_what_is_out_of_range_is_refused(class_id: int, split: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stats_of([(0, 0, 1), (class_id, split, 1)])


# -- the classes table


def test_class_table() -> None:
    stats = ClassStats.of([0, 0, 1, 0], [0, 1, 0, 2], [10, 20, 5, 7], num_classes=2)
    table = class_table(["cat", "dog"], stats)
    assert table.schema == CLASSES
    assert table.to_pylist() == [
        {"class_id": 0, "name": "cat", "count": 3, "train": 1, "val": 1, "test": 1}
        | {"bytes": 37, "train_bytes": 10, "val_bytes": 20, "test_bytes": 7, "evaluable": True},
        {"class_id": 1, "name": "dog", "count": 1, "train": 1, "val": 0, "test": 0}
        | {"bytes": 5, "train_bytes": 5, "val_bytes": 0, "test_bytes": 0, "evaluable": False},
    ]


def test_class_table_of_no_classes() -> None:
    assert class_table([], ClassStats.zeros(0)).schema == CLASSES


def test_class_table_needs_a_name_for_each_class() -> None:
    with pytest.raises(UsageError, match="1 class names for statistics of 2 classes"):
        class_table(["cat"], ClassStats.zeros(2))


# -- description


def test_long_tail() -> None:
    found = describe([700, 101, 100, 20, 19, 1, 1, 0])
    assert (found.num_classes, found.num_empty, found.num_images, found.singletons) == (7, 1, 942, 2)
    assert (found.largest, found.smallest, found.imbalance) == (700, 1, 700)
    assert found.many == Group(num_classes=2, num_images=801)
    assert found.medium == Group(num_classes=2, num_images=120)
    assert found.few == Group(num_classes=3, num_images=21)


def test_known_inequality() -> None:
    found = describe([1, 3])
    assert found.gini == 0.25
    assert found.entropy == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))


@given(count=st.integers(1, 1000), num_classes=st.integers(1, 30))
def test_equal_classes_are_balanced(count: int, num_classes: int) -> None:
    found = describe([count] * num_classes)
    assert (found.imbalance, found.gini) == (1, 0)
    assert found.effective_classes == pytest.approx(num_classes)


def test_one_class_has_no_entropy() -> None:
    found = describe([7])
    assert (found.entropy, found.effective_classes, found.gini, found.imbalance) == (0, 1, 0, 1)


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_nothing_is_described_by_zeros(counts: list[int]) -> None:
    found = describe(np.array(counts, np.int64))
    assert (found.num_classes, found.num_empty, found.num_images) == (0, len(counts), 0)
    assert (found.imbalance, found.gini, found.entropy, found.effective_classes) == (0, 0, 0, 0)


@given(counts=counts_lists, seed=st.integers(0, 9))
def test_order_and_empty_classes_do_not_matter(counts: list[int], seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation([*counts, 0, 0])
    found, other = vars(describe(counts)), vars(describe(shuffled))
    assert found | {"num_empty": 0} == other | {"num_empty": 0}


@given(counts=counts_lists.filter(any))
def test_measures_stay_in_their_ranges(counts: list[int]) -> None:
    found = describe(counts)
    assert 0 <= found.gini < 1
    assert 1 - 1e-9 <= found.effective_classes <= found.num_classes + 1e-9
    assert found.imbalance >= 1


@given(counts=counts_lists)
def test_groups_add_up(counts: list[int]) -> None:
    found = describe(counts)
    groups = (found.many, found.medium, found.few)
    assert sum(group.num_classes for group in groups) == found.num_classes
    assert sum(group.num_images for group in groups) == found.num_images


@given(counts=counts_lists.filter(any))
def test_gini_is_half_the_mean_difference(counts: list[int]) -> None:
    sizes = np.array([n for n in counts if n])
    expected = np.abs(sizes[:, None] - sizes[None, :]).mean() / (2 * sizes.mean())
    assert describe(counts).gini == pytest.approx(expected)


def test_description_prints_as_json() -> None:
    found = json.loads(json.dumps(describe([5, 1]).to_json()))
    assert found["few"] == {"num_classes": 2, "num_images": 6}
    assert found["imbalance"] == 5.0
