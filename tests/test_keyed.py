"""Keyed hashes and permutations: known values, the reference, and the statistics that caught weaker ones."""

from __future__ import annotations

import hashlib
from itertools import combinations, permutations
from math import isqrt

import numpy as np
import pytest
import reference_epoch as reference

from pipeline.keyed import (
    I64,
    U64,
    ceil_sqrt,
    derive,
    keyed_hash,
    mix,
    permute,
    seed_key,
    text_key,
    text_keys,
)


def some_keys(num: int, seed: int = 0) -> U64:
    return keyed_hash(seed_key(seed), np.arange(num))


def orders(num: int, size: int, seed: int = 0) -> I64:
    """Orders of ``size`` things under ``num`` keys: [num, size]."""
    keys, places = some_keys(num, seed), np.arange(size)
    return permute(np.repeat(keys, size), np.tile(places, num), np.full(num * size, size)).reshape(num, size)


def chi_square_z(counts: np.ndarray) -> float:
    """How many standard deviations chi-square lies above what equal chances give."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_mix_is_the_murmur3_finaliser() -> None:
    assert [int(mix(x)) for x in (0, 1)] == [0, 0xB456BCFC34C2CB2C]  # published values


def test_mix_leaves_its_argument_alone() -> None:
    x = np.arange(3, dtype=np.uint64)
    mix(x)
    assert x.tolist() == [0, 1, 2]


def test_keyed_hash_equals_python_integers_over_a_broadcast() -> None:
    keys, xs = [0, 2**64 - 1, 12345], [0, 1, 2**40, 2**62]
    got = keyed_hash(np.array(keys, np.uint64)[:, None], np.array(xs))
    assert got.tolist() == [[reference.keyed(k, x) for x in xs] for k in keys]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 + 1])
def test_scalar_keys_equal_python_integers(seed: int) -> None:
    assert seed_key(seed) == reference.mix(seed + reference.PHI)
    assert derive(seed_key(seed), 3, 7) == reference.class_key(seed, 3, 7)
    assert int(keyed_hash(seed_key(seed), 7)) == derive(seed_key(seed), 7)


def test_text_key_is_the_head_of_sha256() -> None:
    assert f"{text_key('shoes/a.jpg'):016x}" == hashlib.sha256(b"shoes/a.jpg").hexdigest()[:16]


def test_text_keys_are_many_at_once() -> None:
    texts = ["", "shoes/a.jpg", "milk/é 1.jpg"]
    assert text_keys(texts).tolist() == [text_key(text) for text in texts]
    assert text_keys([]).tolist() == []


def test_text_key_takes_names_that_are_not_utf8() -> None:
    name = b"caf\xe9.jpg"
    assert f"{text_key(name.decode('utf-8', 'surrogateescape')):016x}" == hashlib.sha256(name).hexdigest()[:16]


def test_keys_differ_between_seeds_classes_and_purposes() -> None:
    """Were seeds and ids added, class 77 of seed 3 would follow class 0 of seed 4."""
    keys = {derive(seed_key(seed), tag, c) for seed in range(20) for tag in (1, 2, 3) for c in range(200)}
    assert len(keys) == 20 * 3 * 200
    assert derive(seed_key(3), 1, 77) != derive(seed_key(4), 1, 0)


@pytest.mark.parametrize("size", [*range(1, 41), 100, 1021])
def test_permute_is_a_permutation_of_its_size(size: int) -> None:
    assert (np.sort(orders(20, size), axis=1) == np.arange(size)).all()


@pytest.mark.parametrize("size", [1, 2, 5, 15, 16, 17, 18, 31, 100])
def test_permute_equals_python_integers(size: int) -> None:
    keys = some_keys(5).tolist()
    assert orders(5, size).tolist() == [[reference.permuted(k, x, size) for x in range(size)] for k in keys]


def test_permute_of_mixed_sizes_equals_each_alone() -> None:
    keys, sizes = some_keys(400), np.arange(400) % 40 + 1
    places = np.arange(400) * 7 % sizes
    alone = [int(permute(keys[i : i + 1], places[i : i + 1], sizes[i : i + 1])[0]) for i in range(400)]
    assert permute(keys, places, sizes).tolist() == alone


def test_permute_of_four_billion_equals_python_integers() -> None:
    size = 2**32 - 5
    places = np.array([0, 1, size - 1])
    key = some_keys(1)
    root = int(ceil_sqrt(np.array([size], np.uint64))[0])
    assert root == 2**16
    got = permute(np.repeat(key, 3), places, np.full(3, size))
    assert got.tolist() == [reference.permuted(int(key[0]), x, size) for x in places.tolist()]


def test_ceil_sqrt_is_exact_around_squares() -> None:
    near = [r * r + d for r in (1, 2, 3, 1000, 2**16, 2**30, 2**31 - 1) for d in (-1, 0, 1)]
    assert ceil_sqrt(np.array(near, np.uint64)).tolist() == [isqrt(n - 1) + 1 if n else 0 for n in near]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_every_order_of_a_few_images_is_equally_likely(size: int) -> None:
    every = list(permutations(range(size)))
    _, counts = np.unique(orders(40 * len(every), size), axis=0, return_counts=True)
    assert len(counts) == len(every)
    assert chi_square_z(counts) < 4


@pytest.mark.parametrize("size", [15, 16, 17, 20])
def test_even_and_odd_permutations_are_equally_likely(size: int) -> None:
    """A binary Feistel network on a tiny domain gives only even ones."""
    num = 4000
    got = orders(num, size)
    inversions = sum((got[:, a] > got[:, b]).astype(int) for a, b in combinations(range(size), 2))
    odd = int((np.asarray(inversions) % 2).sum())
    assert abs(odd - num / 2) < 4 * np.sqrt(num / 4)


@pytest.mark.parametrize("size", [15, 16, 17, 18, 23])
def test_images_of_two_places_are_independent(size: int) -> None:
    """Six Feistel rounds fail this at 17."""
    got = orders(30_000, size)
    apart = ~np.eye(size, dtype=bool)
    for a, b in combinations(range(size), 2):
        together = np.bincount(got[:, a] * size + got[:, b], minlength=size * size).reshape(size, size)
        assert chi_square_z(together[apart]) < 5, (a, b)
