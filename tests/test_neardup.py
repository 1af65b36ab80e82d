"""Near duplicates: the clusters that comparing all pairs would find."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest import neardup
from pipeline.ingest.neardup import MAX_DISTANCE, near_clusters


def all_pairs(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """Brute force: follow every edge from the first member of each cluster."""
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= max_distance
    leader = np.full(len(hashes), -1)
    for start in range(len(hashes)):
        reached = [start] if leader[start] < 0 else []
        while reached:
            place = reached.pop()
            if leader[place] < 0:
                leader[place] = start
                reached += np.flatnonzero(near[place]).tolist()
    return leader


def crowd(rng: np.random.Generator, size: int, centres: int, flips: int) -> np.ndarray:
    """``size`` hashes, each some bits away from one of the ``centres``."""
    hashes = rng.integers(0, 1 << 64, centres, dtype=np.uint64)[rng.integers(0, centres, size)]
    for _ in range(flips):
        hashes ^= (rng.random(size) < 0.5).astype(np.uint64) << rng.integers(0, 64, size).astype(np.uint64)
    return hashes


@pytest.mark.parametrize("max_distance", range(MAX_DISTANCE + 1))
@pytest.mark.parametrize(("centres", "flips"), [(1, 8), (40, 9), (1500, 6)])
def test_clusters_are_those_of_all_pairs(max_distance: int, centres: int, flips: int) -> None:
    hashes = crowd(np.random.default_rng((max_distance, centres)), 1500, centres, flips)
    expected = all_pairs(hashes, max_distance)
    assert np.array_equal(near_clusters(hashes, max_distance=max_distance), expected)


@pytest.mark.parametrize("max_distance", [1, 4, 8])
def test_crowds_are_searched_by_the_bits_that_are_left(max_distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neardup, "_CROWD", 20)
    monkeypatch.setattr(neardup, "_FEW", 8)
    monkeypatch.setattr(neardup, "_FEW_BITS", 14)
    rng = np.random.default_rng(max_distance)
    hashes = np.concatenate([crowd(rng, 900, 3, 7), rng.integers(0, 1 << 12, 600, dtype=np.uint64)])
    assert np.array_equal(near_clusters(hashes, max_distance=max_distance), all_pairs(hashes, max_distance))


@given(st.lists(st.integers(0, 255), max_size=40), st.integers(0, 4), st.randoms(use_true_random=False))
def test_order_does_not_matter(values: list[int], max_distance: int, random: st.randoms) -> None:
    hashes = np.array(values, dtype=np.uint64)
    shuffled = list(range(len(values)))
    random.shuffle(shuffled)
    one = near_clusters(hashes, max_distance=max_distance)
    two = near_clusters(hashes[shuffled], max_distance=max_distance)
    assert np.array_equal(one, all_pairs(hashes, max_distance))
    together = one[shuffled][:, None] == one[shuffled][None, :]
    assert np.array_equal(together, two[:, None] == two[None, :])


def test_a_distance_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_distance must be from 0 to 8, not 9"):
        near_clusters(np.zeros(1, np.uint64), max_distance=9)
