from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.plan.merging import merge_singletons, merged

paths = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join)
classes = st.dictionaries(paths, st.integers(0, 3), min_size=1, max_size=25)


def told(rows: dict[str, int]) -> dict[str, str]:
    names = list(rows)
    return {
        name: names[i] for name, i in zip(names, merge_singletons(names, np.array(list(rows.values()))), strict=True)
    }


def test_a_singleton_goes_to_the_nearest_class_above_it() -> None:
    found = told({"fruit": 9, "fruit/apple": 4, "fruit/apple/gala": 1, "fruit/kiwi/gold": 1, "fruit/pear": 2})
    assert found == {
        "fruit": "fruit", "fruit/apple": "fruit/apple", "fruit/apple/gala": "fruit/apple",
        "fruit/kiwi/gold": "fruit", "fruit/pear": "fruit/pear",
    }  # fmt: skip


def test_through_ancestors_that_are_singletons_themselves() -> None:
    assert told({"a/b/c": 1, "a/b": 1, "a": 5}) == dict.fromkeys(("a/b/c", "a/b", "a"), "a")


def test_singletons_without_a_class_above_join_each_other() -> None:
    assert told({"x/1": 1, "x/2": 1, "x/deep/1": 1, "y/1": 1, "z": 1, "x": 0}) == {
        "x/1": "x/1", "x/2": "x/1", "x/deep/1": "x/deep/1", "y/1": "y/1", "z": "z", "x": "x",
    }  # fmt: skip


@given(rows=classes)
def test_only_singletons_move_and_nothing_is_lost(rows: dict[str, int]) -> None:
    counts = np.array(list(rows.values()))
    parents = merge_singletons(list(rows), counts)
    assert np.all(counts[parents != np.arange(len(counts))] == 1)
    assert np.array_equal(parents[parents], parents)
    assert np.all(counts[parents[counts > 0]] > 0)
    total = merged(counts, parents)
    assert total.sum() == counts.sum()
    assert np.all(total[parents[counts > 0]] >= counts[counts > 0])


def test_names_and_counts_must_fit() -> None:
    with pytest.raises(UsageError, match="1 class names for counts of 2 classes"):
        merge_singletons(["a"], np.array([1, 1]))
