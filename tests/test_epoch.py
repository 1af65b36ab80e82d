"""The epoch function against plain Python integers, golden vectors, and itself from other starts."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import reference_epoch as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PolicyError, UsageError
from pipeline.keyed import keyed_hash, mix, permute
from pipeline.plan import clock
from pipeline.plan.epoch import EPOCH_RULE, Draws, EpochFunction, Stage

GOLDEN: dict[str, Any] = json.loads(reference.GOLDEN.read_text())
MIXED = ([0, 3, 2, 20, 9], [4, 1, 40, 17, 600])  # targets, pool


def function(pool: list[int], schedule: reference.Schedule, seed: int = 0, bits: int | None = None) -> EpochFunction:
    stages = [Stage(targets=np.array(targets), num_epochs=num) for targets, num in schedule]
    return EpochFunction(np.array(pool), stages, seed, _window_bits=bits)


def rows(f: EpochFunction, begin: int, end: int) -> list[tuple[int, int, int]]:
    """(class, p, image) of positions [begin, end)."""
    draws = f.draws(begin, end)
    ordinal, _ = f.images(draws.class_id, draws.draw)
    return list(zip(draws.class_id.tolist(), draws.draw.tolist(), ordinal.tolist(), strict=True))


def same(a: Draws, b: Draws) -> bool:
    return np.array_equal(a.class_id, b.class_id) and np.array_equal(a.draw, b.draw)


def long_function(seed: int = 0) -> EpochFunction:
    """A long tail whose epoch spans several default windows."""
    targets = 300_000 // np.arange(1, 60)
    return EpochFunction(np.maximum(1, targets // 3), targets, seed)


# --- golden vectors: frozen with epoch rule 1


def test_golden_vectors_belong_to_this_rule() -> None:
    assert GOLDEN["epoch_rule"] == EPOCH_RULE == 1


def test_golden_hashes() -> None:
    for x, value in GOLDEN["mix"]:
        assert int(mix(int(x))) == int(value)


def test_golden_jitter() -> None:
    p, expected = zip(*GOLDEN["jitter"], strict=True)
    key = next(int(k) for s, t, c, k in GOLDEN["class_key"] if (s, t, c) == (3, 1, 77))
    keys = np.full(len(p), key, np.uint64)
    assert clock.jitter(keys, np.array(p, np.uint64)).tolist() == list(expected)


def test_golden_permutations() -> None:
    key = next(int(k) for s, t, c, k in GOLDEN["class_key"] if (s, t, c) == (4, 2, 0))
    whole = [(n, x, image) for n, images in GOLDEN["permute"] for x, image in enumerate(images)]
    n, x, expected = (np.array(column) for column in zip(*whole, *GOLDEN["permute_large"], strict=True))
    assert np.array_equal(permute(np.full(len(n), key, np.uint64), x, n), expected)


@pytest.mark.parametrize("name", reference.CASES)
def test_golden_draws(name: str) -> None:
    case = GOLDEN["cases"][name]
    f = function(case["pool"], case["schedule"], int(case["seed"]))
    assert rows(f, 0, len(case["draws"])) == [tuple(row) for row in case["draws"]]


def test_golden_file_is_what_the_reference_writes() -> None:
    assert json.loads(json.dumps(reference.golden())) == GOLDEN


# --- plain Python integers


@pytest.mark.parametrize("seed", [0, 3, -1, 2**64 - 1])
@pytest.mark.parametrize("bits", [None, 0, 1, 3, 6])
def test_epochs_equal_python_integers_however_the_clock_is_cut(seed: int, bits: int | None) -> None:
    targets, pool = MIXED
    f = function(pool, [(targets, None)], seed, bits)
    assert rows(f, 0, 3 * sum(targets)) == reference.sequence(seed, pool, [(targets, None)], range(3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    classes=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 25)), min_size=1, max_size=8),
    seed=st.integers(0, 2**64 - 1),
    bits=st.sampled_from([None, 0, 1, 3, 6]),
    first=st.integers(0, 10**6),
)
def test_any_epochs_equal_python_integers(classes: list[tuple[int, int]], seed: int, bits: int, first: int) -> None:
    pool, targets = [n for n, _ in classes], [t for _, t in classes]
    targets[0] = max(targets[0], 1)
    f = function(pool, [(targets, None)], seed, bits)
    expected = reference.sequence(seed, pool, [(targets, None)], range(first, first + 2))
    assert rows(f, f.epoch_start(first), f.epoch_start(first + 2)) == expected


@pytest.mark.parametrize("epoch", [10**6, 10**12 // sum(MIXED[0]), 2**61 // sum(MIXED[0])])
def test_far_epochs_equal_python_integers(epoch: int) -> None:
    targets, pool = MIXED
    f, length = function(pool, [(targets, None)], 5), sum(targets)
    assert f.epoch_of(epoch * length) == epoch
    got = rows(f, epoch * length, (epoch + 2) * length)
    assert got == reference.sequence(5, pool, [(targets, None)], range(epoch, epoch + 2))


@pytest.mark.parametrize("place", [0, 123_456_789, 2**30 + 1, 2**31 - 100, 2**31 + 40])
def test_the_largest_target_equals_python_integers(place: int) -> None:
    schedule: reference.Schedule = [([2**31 - 1, 3, 2**10], None)]
    f = function([5, 1, 600], schedule, 11)
    begin, end = f.epoch_start(7) + place, f.epoch_start(7) + place + 60
    draws = f.draws(begin, end)
    expected = reference.epoch_slice(11, schedule, 7, place, 60)
    assert list(zip(draws.class_id.tolist(), draws.draw.tolist(), strict=True)) == expected


@pytest.mark.parametrize("num", [3, 20, 2**30 + 1, 2**31 - 99, 2**31 - 1])
def test_slots_equal_python_integers(num: int) -> None:
    j = [0, 1, 2, num // 3, num // 2, num - 2, num - 1]
    step, rest = divmod(2**62, num)
    begin, length = clock.slots(*(np.array(x, np.uint64) for x in (j, [num] * 7, [step] * 7, [rest] * 7)))
    assert begin.tolist() == [i * 2**62 // num for i in j]
    assert (begin + length).tolist() == [(i + 1) * 2**62 // num for i in j]


def test_jitter_equals_python_integers_at_every_shape_of_the_allowed_places() -> None:
    keys, p = np.meshgrid(keyed_hash(1, np.arange(40)), np.arange(60, dtype=np.uint64))
    got = clock.jitter(keys.ravel(), p.ravel()).tolist()
    assert got == [
        reference.place_in_slot(k, q) for k, q in zip(keys.ravel().tolist(), p.ravel().tolist(), strict=True)
    ]


@pytest.mark.parametrize("parity", [0, 1])
def test_jitter_is_uniform(parity: int) -> None:
    """A truncated jitter sways all equal targets together."""
    p = np.arange(parity, 400_000, 2, dtype=np.uint64)
    counts = np.bincount(
        (clock.jitter(np.full(len(p), 99, np.uint64), p) >> np.uint64(26)).astype(np.int64), minlength=64
    )
    expected = len(p) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * np.sqrt(2 * 63)


# --- the same sequence from anywhere


@pytest.mark.parametrize("bits", [None, 3])
def test_a_schedule_equals_python_integers_across_its_borders(bits: int | None) -> None:
    pool = [5, 2, 33, 1, 0]
    schedule: reference.Schedule = [
        ([5, 0, 33, 1, 0], 2),
        ([3, 3, 3, 3, 0], 1),
        ([0, 9, 100, 0, 0], 2),
        ([0, 0, 0, 7, 0], None),
    ]
    f = function(pool, schedule, 2, bits)
    assert rows(f, 0, f.epoch_start(8)) == reference.sequence(2, pool, schedule, range(8))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_resume_anywhere_in_a_schedule_continues_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = rng.integers(1, 50, 40)
    stages = [Stage(targets=rng.integers(0, 30, 40) * rng.integers(0, 2, 40), num_epochs=k) for k in (2, 1, 3, None)]
    whole = EpochFunction(pool, stages, seed, _window_bits=2)
    end = whole.epoch_start(9)
    everything = whole.draws(0, end)
    for begin in rng.integers(0, end, 20):
        stop = int(rng.integers(begin, end + 1))
        fresh = EpochFunction(pool, stages, seed).draws(int(begin), stop)
        assert np.array_equal(fresh.class_id, everything.class_id[begin:stop])
        assert np.array_equal(fresh.draw, everything.draw[begin:stop])


def test_a_resume_finds_its_window_from_every_position() -> None:
    """The window where a position should lie is often one off."""
    targets, pool = [20, 31, 7, 1, 1, 1, 1, 1, 1, 1, 60], [9] * 11
    whole = rows(function(pool, [(targets, None)], 1), 0, sum(targets))
    assert [rows(function(pool, [(targets, None)], 1, 6), i, i + 1)[0] for i in range(sum(targets))] == whole


def test_a_resume_anywhere_in_a_long_epoch_continues_exactly() -> None:
    everything = long_function().draws(0, 2_000_000)
    for begin in np.random.default_rng(0).integers(0, 1_900_000, 10).tolist():
        fresh = long_function().draws(begin, begin + 50_000)
        assert np.array_equal(fresh.class_id, everything.class_id[begin : begin + 50_000])
        assert np.array_equal(fresh.draw, everything.draw[begin : begin + 50_000])


def test_small_steps_give_what_one_call_gives() -> None:
    f = long_function()
    steps = [f.draws(i, i + 997) for i in range(0, 200_000, 997)]
    assert np.array_equal(np.concatenate([s.class_id for s in steps]), f.draws(0, 997 * len(steps)).class_id)


def test_count_before_is_what_counting_gives() -> None:
    f = function([5, 2, 33, 1, 0], [([5, 0, 33, 1, 0], 2), ([3, 3, 3, 3, 0], 1), ([0, 9, 100, 0, 0], None)], 2, 2)
    classes = f.draws(0, f.epoch_start(6)).class_id
    for position in range(0, len(classes) + 1, 7):
        assert np.array_equal(f.count_before(position), np.bincount(classes[:position], minlength=5)), position


def test_draw_numbers_count_each_class_without_a_gap() -> None:
    f = long_function()
    draws = f.draws(0, 2_000_000)
    for c in (0, 1, 7, 58):
        numbers = draws.draw[draws.class_id == c]
        assert np.array_equal(numbers, np.arange(len(numbers)))


def test_threads_see_one_sequence() -> None:
    f, begins = long_function(), np.random.default_rng(1).integers(0, 3_000_000, 24).tolist()
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda begin: f.draws(begin, begin + 1000), begins))
    assert all(same(got, long_function().draws(b, b + 1000)) for got, b in zip(parallel[:6], begins, strict=False))
    assert all(same(got, f.draws(b, b + 1000)) for got, b in zip(parallel, begins, strict=True))


def test_it_survives_pickling() -> None:
    f = function([5, 2], [([3, 1], 2), ([1, 4], None)], 9)
    f.draws(0, 5)
    assert rows(pickle.loads(pickle.dumps(f)), 0, 40) == rows(f, 0, 40)


def test_changing_the_given_arrays_later_changes_nothing() -> None:
    pool, targets = np.array([5, 2]), np.array([3, 1])
    f = EpochFunction(pool, targets, 0)
    before = rows(f, 0, 8)
    pool[:], targets[:] = 1, 1
    assert rows(f, 0, 8) == before
    assert f.num_draws(0) == 4


def test_equal_ticks_are_ordered_by_class() -> None:
    """A million classes, one draw each: about a hundred pairs share one of the 2^32 ticks."""
    f = EpochFunction(np.ones(10**6, np.int64), np.ones(10**6, np.int64), 1)
    draws = f.draws(0, 10**6)
    ticks = f.ticks(0, draws.class_id, draws.draw)
    tied = ticks[1:] == ticks[:-1]
    assert tied.sum() > 50
    assert (ticks[1:] >= ticks[:-1]).all()
    assert (np.diff(draws.class_id)[tied] > 0).all()


def test_runs_of_equal_ticks_keep_their_order() -> None:
    ticks = np.random.default_rng(0).integers(0, 50, 5000).astype(np.uint64)
    assert np.array_equal(clock.sort_ticks(ticks), np.argsort(ticks, kind="stable"))


def test_a_class_of_one_seed_does_not_follow_another_class_of_another_seed() -> None:
    """Class 77 of seed 3 and class 0 of seed 4 met when seeds were added."""
    targets = np.full(80, 50)
    epochs = np.zeros(50, np.int64), np.arange(50)
    a, b = (EpochFunction(np.full(80, 50), targets, seed) for seed in (3, 4))
    assert not np.array_equal(a.ticks(0, epochs[0] + 77, epochs[1]), b.ticks(0, epochs[0], epochs[1]))
    assert np.abs(a.images(epochs[0] + 77, epochs[1])[0] - b.images(epochs[0], epochs[1])[0]).any()


@pytest.mark.parametrize("num_images", [20, 60])
def test_each_cycle_is_shuffled_afresh(num_images: int) -> None:
    f = function([num_images], [([num_images], None)], 4)
    ordinal, _ = f.images(np.zeros(num_images * 50, np.int64), np.arange(num_images * 50))
    assert len(np.unique(ordinal.reshape(50, num_images), axis=0)) == 50


def test_halves_start_anywhere() -> None:
    """Without a turn, the first half of every class's images would always be drawn first."""
    f = function([100] * 2000, [([1] * 2000, None)], 4)
    ordinal, _ = f.images(np.arange(2000), np.zeros(2000, np.int64))
    counts = np.bincount(ordinal // 10, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 9 + 4 * np.sqrt(18)


# --- small and strange shapes


def test_one_class_of_one_image() -> None:
    f = function([1], [([1], None)])
    draws = f.draws(0, 5)
    ordinal, repeat = f.images(draws.class_id, draws.draw)
    assert (draws.class_id.tolist(), ordinal.tolist(), repeat.tolist()) == ([0] * 5, [0] * 5, [0, 1, 2, 3, 4])


def test_classes_without_images_or_targets_are_never_drawn() -> None:
    f = function([0, 4, 0, 2], [([0, 3, 0, 0], None)])
    assert set(f.draws(0, 50).class_id.tolist()) == {1}
    assert f.count_before(50).tolist() == [0, 50, 0, 0]


def test_an_empty_span_gives_nothing() -> None:
    draws = function([1], [([1], None)]).draws(3, 3)
    assert (len(draws.class_id), draws.class_id.dtype, draws.draw.dtype) == (0, np.int32, np.int64)


def test_types_of_what_comes_out() -> None:
    f = function(MIXED[1], [(MIXED[0], None)])
    draws = f.draws(0, 50)
    ordinal, repeat = f.images(draws.class_id, draws.draw)
    types = [draws.class_id.dtype, draws.draw.dtype, ordinal.dtype, repeat.dtype, f.count_before(9).dtype]
    assert types == [np.int32, np.int64, np.int64, np.int64, np.int64]


def test_images_of_a_part_are_the_part_of_the_images() -> None:
    """A rank permutes only its own rows."""
    f = long_function()
    draws = f.draws(0, 40_000)
    whole, _ = f.images(draws.class_id, draws.draw)
    assert np.array_equal(f.images(draws.class_id[5::8], draws.draw[5::8])[0], whole[5::8])


def test_epochs_of_a_schedule_lie_end_to_end() -> None:
    f = function([5, 5], [([5, 5], 2), ([1, 2], 3), ([4, 0], None)])
    assert [f.epoch_start(e) for e in range(8)] == [0, 10, 20, 23, 26, 29, 33, 37]
    assert [f.num_draws(e) for e in range(7)] == [10, 10, 3, 3, 3, 4, 4]
    assert [f.epoch_of(p) for p in (0, 9, 10, 19, 20, 22, 23, 28, 29, 32, 33)] == [0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 6]


def test_a_finite_schedule_ends() -> None:
    f = function([5, 5], [([5, 5], 2)])
    assert f.epoch_start(2) == 20
    assert f.count_before(20).tolist() == [10, 10]
    with pytest.raises(UsageError, match="before the end of the schedule, 20; got 20"):
        f.draws(15, 21)
    with pytest.raises(UsageError, match=r"an epoch of the schedule, from 0; got 2"):
        f.num_draws(2)


@pytest.mark.parametrize(
    ("pool", "targets", "message"),
    [
        ([1, 0, 0], [1, 2, 3], "images for every class with a target; none for class 1: 2, class 2: 3"),
        ([0] * 9, [1] * 9, "class 4: 1, and 4 more"),
        ([1, 1], [1, 2**31], r"targets below 2\^31; got class 1: 2147483648"),
        ([1, 1], [0, 0], "at least one draw in an epoch; all 2 targets are 0"),
        ([1, 1], [1, -1], "to be 0 or more; got class 1: -1"),
        ([1, -2], [1, 1], "pool to be 0 or more; got class 1: -2"),
        ([1, 1], [1], "expected targets of 2 classes, got 1"),
        ([1.0, 2.0], [1, 1], "pool to be integers, one per class; got float64"),
    ],
)
def test_impossible_targets_are_refused_by_name(pool: list[int], targets: list[int], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        EpochFunction(np.array(pool), np.array(targets), 0)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([None, None], "stage 0: expected a number of epochs"),
        ([0, None], "stage 0: .* at least 1 epoch"),
        ([], "stage"),
    ],
)
def test_impossible_schedules_are_refused(lengths: list[int | None], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        function([1], [([1], length) for length in lengths])


@pytest.mark.parametrize(("begin", "end"), [(-1, 3), (3, 2), (0, 2**62 + 1)])
def test_impossible_positions_are_refused(begin: int, end: int) -> None:
    with pytest.raises(UsageError, match=f"got begin {begin} and end {end}"):
        function([1], [([1], None)]).draws(begin, end)


def test_images_of_an_empty_class_are_refused() -> None:
    with pytest.raises(UsageError, match="class 1 has none"):
        function([1, 0], [([1, 0], None)]).images(np.array([0, 1]), np.array([0, 0]))
