from __future__ import annotations

import decimal
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.errors import PolicyError
from pipeline.plan.apportion import fill
from pipeline.plan.policy import DEFAULTS, MAX_TARGET, NAMES, Targets, apply, parse, progressive, to_json

LONG_TAIL = [3000, 800, 250, 90, 40, 20, 9, 5, 3, 2, 1, 1, 1, 0]
NAMED = [f"class {i}" for i in range(len(LONG_TAIL))]

SHAPES = [
    "natural",
    "oversample",
    "oversample:floor=q0.5",
    "undersample:ceiling=7",
    "undersample:ceiling=mean,frozen",
    "clip:floor=2,ceiling=5*mean",
    "balanced",
    "power:alpha=0.5",
    "power:alpha=0",
    "power:alpha=0.3",
    "power:alpha=0.7,floor=2,ceiling=5*mean",
    "ratio:max_ratio=10",
    "ratio:max_ratio=1.5",
    "repeat_factor:threshold=0.3",
    "effective_number:beta=0.99",
    "effective_number:beta=0",
    "progressive:stage=1,num_stages=4",
]
shapes = st.sampled_from(SHAPES)
counts_lists = st.lists(st.integers(0, 400), min_size=1, max_size=30).filter(any)


def with_option(text: str, option: str) -> str:
    return f"{text}{',' if ':' in text else ':'}{option}"


def target(counts: list[int], text: str) -> list[int]:
    return apply(counts, parse(text)).target.tolist()


# -- the table of DESIGN.md, section 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("natural", [8, 4, 2, 1, 0]),
        ("oversample", [8, 8, 8, 8, 0]),
        ("oversample:floor=3", [8, 4, 3, 3, 0]),
        ("oversample:max_repeat=3", [8, 8, 6, 3, 0]),
        ("oversample:floor=median", [8, 4, 2, 2, 0]),
        ("undersample", [1, 1, 1, 1, 0]),
        ("undersample:ceiling=3", [3, 3, 2, 1, 0]),
        ("undersample:ceiling=q0.75", [4, 4, 2, 1, 0]),
        ("balanced:per_class=10", [10, 10, 10, 10, 0]),
        ("balanced:per_class=0.5*max", [4, 4, 4, 4, 0]),
        ("power:alpha=1", [8, 4, 2, 1, 0]),
        ("power:alpha=0,epoch_size=8", [2, 2, 2, 2, 0]),
        ("power:alpha=1,floor=2,ceiling=6", [6, 5, 2, 2, 0]),
        ("ratio:max_ratio=2", [5, 4, 3, 3, 0]),
        ("effective_number:beta=0", [8, 4, 2, 1, 0]),
        ("effective_number:beta=0.999999999", [4, 4, 4, 3, 0]),
        ("progressive:stage=0,num_stages=3", [8, 4, 2, 1, 0]),
        ("progressive:stage=2,num_stages=3", [4, 4, 4, 3, 0]),
    ],
)
def test_policy_gives_these_targets(text: str, expected: list[int]) -> None:
    assert target([8, 4, 2, 1, 0], text) == expected


def test_square_root_sampling_is_in_proportion_to_the_root() -> None:
    assert target([10000, 100, 1], "power:alpha=0.5,epoch_size=222") == [200, 20, 2]


def test_lvis_repeat_factor() -> None:
    counts = [9000, 900, 90, 10]  # f = 0.9, 0.09, 0.009, 0.001; t = 0.09
    expected = [9000, 900, 284, 95]  # 90 sqrt(10) = 284.60 and 10 sqrt(90) = 94.87, together 379
    assert target(counts, "repeat_factor:threshold=0.09") == expected


def test_effective_number_follows_cui() -> None:
    beta, counts = Fraction(9, 10), [50, 5, 1]
    shares = [n * (1 - beta) / (1 - beta**n) for n in counts]
    ideal = [Fraction(10**6) * share / sum(shares) for share in shares]
    found = target(counts, "effective_number:beta=0.9,epoch_size=1000000")
    assert all(abs(a - b) < 1 for a, b in zip(found, ideal, strict=True))


def test_explicit_table_by_name() -> None:
    policy = parse({"policy": "explicit", "targets": {"cat": 7, "bee": 2}})
    assert apply([3, 5, 1], policy, names=["ant", "bee", "cat"]).target.tolist() == [0, 2, 7]


def test_explicit_class_without_images_is_a_shortfall() -> None:
    targets = apply([0, 5], parse('explicit:{"targets": {"ant": 4, "bee": 3}}'), names=["ant", "bee"])
    assert (targets.target.tolist(), targets.asked, targets.shortfall) == ([0, 3], 7, 4)


def test_explicit_unknown_class_is_named() -> None:
    policy = parse({"policy": "explicit", "targets": {"cta": 1}})
    with pytest.raises(PolicyError, match=r"1 name is no class of this snapshot: cta \(did you mean 'cat'\?\)"):
        apply([1, 1], policy, names=["cat", "dog"])


def test_explicit_needs_names() -> None:
    with pytest.raises(PolicyError, match="needs the names of all 2 classes"):
        apply([1, 1], parse({"policy": "explicit", "targets": {"cat": 1}}))


# -- the four defaults


def test_defaults_are_these_four() -> None:
    assert list(DEFAULTS) == ["natural", "oversampled", "undersampled", "balanced"]


@given(counts=counts_lists)
def test_defaults_are_what_the_design_says(counts: list[int]) -> None:
    num_images, num_classes = sum(counts), sum(n > 0 for n in counts)
    mean, ten = round(Fraction(num_images, num_classes)), round(Fraction(10 * num_images, num_classes))
    expected = {
        "natural": counts,
        "oversampled": [min(max(n, mean), 10 * n) for n in counts],
        "undersampled": [min(n, ten) for n in counts],
        "balanced": [mean if n else 0 for n in counts],
    }
    assert {name: apply(counts, policy).target.tolist() for name, policy in DEFAULTS.items()} == expected


def test_default_undersampling_rotates_through_all_images() -> None:
    targets = apply([1000, *[1] * 99], DEFAULTS["undersampled"])
    assert (int(targets.target[0]), int(targets.pool[0])) == (110, 1000)


# -- laws


@given(counts=counts_lists, text=shapes, size=st.integers(30, 5000))
def test_sum_is_epoch_size(counts: list[int], text: str, size: int) -> None:
    if text == "ratio:max_ratio=1.5" or "ceiling=5*mean" in text:
        assume(False)  # their bounds win over the asked total
    policy = parse(with_option(text, f"epoch_size={max(size, 2 * len(counts))}"))
    assert apply(counts, policy).num_draws == max(size, 2 * len(counts))


@given(counts=counts_lists, text=shapes, repeat=st.sampled_from(["1", "1.5", "2", "10"]), size=st.integers(100, 5000))
def test_max_repeat_always_wins(counts: list[int], text: str, repeat: str, size: int) -> None:
    for options in (f"max_repeat={repeat}", f"max_repeat={repeat},epoch_size={size}"):
        targets = apply(counts, parse(with_option(text, options)))
        assert np.all(targets.target <= np.floor(targets.available * float(repeat)))


@given(counts=counts_lists, text=shapes, repeat=st.integers(1, 4), size=st.integers(100, 5000))
def test_total_is_short_only_where_every_class_is_at_its_cap(
    counts: list[int], text: str, repeat: int, size: int
) -> None:
    assume("ratio" not in text and "ceiling=5*mean" not in text)
    targets = apply(counts, parse(with_option(text, f"max_repeat={repeat},epoch_size={size}")))
    assert targets.num_draws == min(size, repeat * sum(counts))
    assert targets.shortfall == size - targets.num_draws


def smallest_step(counts: list[int], text: str) -> int:
    targets = apply(counts, parse(text))
    order = np.lexsort((-np.arange(len(counts)), targets.available))  # equal classes: the smaller id comes last
    return int(np.diff(targets.target[order]).min(initial=0))


options = st.sampled_from(["epoch_size=777", "max_repeat=3", "max_repeat=2.5,epoch_size=400"])


@given(counts=counts_lists, text=shapes, option=options)
def test_more_images_give_at_least_as_many_draws_but_for_rounding(counts: list[int], text: str, option: str) -> None:
    assert smallest_step(counts, text) >= -1
    assert smallest_step(counts, with_option(text, option)) >= -1


@given(counts=counts_lists, text=st.sampled_from(["natural", "power:alpha=0.3", "effective_number"]), option=options)
def test_where_wishes_differ_rounding_keeps_their_order(counts: list[int], text: str, option: str) -> None:
    assert smallest_step(counts, with_option(text, option)) == 0


@given(counts=counts_lists, text=shapes, size=st.integers(60, 5000))
def test_equal_classes_differ_by_one_draw_at_most(counts: list[int], text: str, size: int) -> None:
    targets = apply(counts, parse(with_option(text, f"epoch_size={size}")))
    for count in set(counts):
        assert np.ptp(targets.target[targets.available == count]) <= 1


@given(counts=counts_lists, text=shapes)
def test_empty_classes_get_nothing_and_change_nothing(counts: list[int], text: str) -> None:
    with_gaps = [n for count in counts for n in (0, count)]
    targets = apply(with_gaps, parse(text))
    assert not targets.target[::2].any()
    assert targets.target[1::2].tolist() == target(counts, text)


@given(counts=counts_lists, text=shapes)
def test_asking_for_the_total_it_has_changes_nothing(counts: list[int], text: str) -> None:
    once = apply(counts, parse(text))
    assert target(counts, with_option(text, f"epoch_size={once.num_draws}")) == once.target.tolist()


@given(counts=counts_lists, text=shapes)
def test_targets_as_explicit_table_give_themselves(counts: list[int], text: str) -> None:
    names = [str(class_id) for class_id in range(len(counts))]
    once = apply(counts, parse(text)).target.tolist()
    table = parse({"policy": "explicit", "targets": dict(zip(names, once, strict=True))})
    assert apply(counts, table, names).target.tolist() == once


@given(counts=counts_lists, ratio=st.sampled_from(["1", "1.5", "3", "10"]), size=st.integers(30, 3000))
def test_ratio_is_kept_exactly(counts: list[int], ratio: str, size: int) -> None:
    drawn = apply(counts, parse(f"ratio:max_ratio={ratio},epoch_size={size}")).target
    drawn = drawn[drawn > 0]
    assert drawn.max() <= Fraction(ratio) * int(drawn.min())


@given(counts=counts_lists)
def test_ratio_of_a_balanced_enough_source_is_natural(counts: list[int]) -> None:
    counts = [n + 300 for n in counts]
    assert target(counts, "ratio:max_ratio=10") == counts


@given(counts=counts_lists, text=shapes, factor=st.integers(2, 9))
def test_epoch_size_scales_every_class_alike(counts: list[int], text: str, factor: int) -> None:
    assume("floor=2" not in text and "ratio" not in text)  # whose bounds stay
    once = apply(counts, parse(text))
    scaled = apply(counts, parse(with_option(text, f"epoch_size={factor * once.num_draws}")))
    assert np.all(np.abs(scaled.target - factor * once.target) <= factor)


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 50), st.integers(1, 5), st.integers(0, 20), st.integers(0, 60)), min_size=1, max_size=8
    ),
    share=st.fractions(0, 1),
)
def test_fill_finds_the_one_scale(rows: list[tuple[int, int, int, int]], share: Fraction) -> None:
    weight, many, low, extra = (list(column) for column in zip(*rows, strict=True))
    high = [a + b for a, b in zip(low, extra, strict=True)]
    least, most = (sum(m * v for m, v in zip(many, bound, strict=True)) for bound in (low, high))
    total = least + int(share * (most - least))
    ideal, unit = fill(weight, many, low, high, total)
    values = [Fraction(value, unit) for value in ideal]
    assert sum(m * v for m, v in zip(many, values, strict=True)) == total
    inside = {v / w for v, w, lo, hi in zip(values, weight, low, high, strict=True) if lo < v < hi}
    assert len(inside) <= 1
    for scale in inside:
        assert values == [min(max(scale * w, lo), hi) for w, lo, hi in zip(weight, low, high, strict=True)]


# -- edges


@pytest.mark.parametrize("text", SHAPES)
@pytest.mark.parametrize("counts", [[1], [7], [1, 0], [1, 1, 1]])
def test_smallest_sources(counts: list[int], text: str) -> None:
    targets = apply(counts, parse(text))
    assert targets.num_draws > 0
    assert np.all((targets.target > 0) == (targets.available > 0))


def test_frozen_draws_from_the_first_images_only() -> None:
    targets = apply([9, 4, 2], parse("undersample:ceiling=4,frozen=true"))
    assert (targets.target.tolist(), targets.pool.tolist()) == ([4, 4, 2], [4, 4, 2])


def test_rotating_draws_from_all_images() -> None:
    assert apply([9, 4, 2], parse("undersample:ceiling=4")).pool.tolist() == [9, 4, 2]


def test_ties_go_to_the_smaller_class_id() -> None:
    assert target([5, 5, 5, 5], "balanced:epoch_size=6") == [2, 2, 1, 1]


def test_starved_classes_are_counted() -> None:
    assert apply([900, 1, 1], parse("natural:epoch_size=10")).num_starved == 2


def test_largest_repeat() -> None:
    assert apply([5, 2, 0], parse("balanced:per_class=9")).largest_repeat == 4.5


def test_floor_beyond_epoch_size_is_refused() -> None:
    with pytest.raises(PolicyError, match="a floor of 10 takes 30 draws; raise epoch_size or lower it"):
        apply([50, 5, 10], parse("power:floor=10,epoch_size=29"))


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_nothing_to_draw_is_refused(counts: list[int]) -> None:
    with pytest.raises(PolicyError, match="has an image in this split"):
        apply(np.array(counts, dtype=np.int64), parse("natural"))


@pytest.mark.parametrize("counts", [[-1, 2], [0.5], [[1]]])
def test_counts_that_are_none_are_refused(counts: list[float]) -> None:
    with pytest.raises(PolicyError, match="counts must be one row of integers, none negative"):
        apply(counts, parse("natural"))


def test_largest_possible_target() -> None:
    assert target([1], f"balanced:per_class={MAX_TARGET}") == [MAX_TARGET]
    with pytest.raises(PolicyError, match=rf"2147483648 draws of one class; at most {MAX_TARGET}"):
        target([1], f"balanced:per_class={MAX_TARGET + 1}")


def test_targets_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        apply([3], parse("natural")).target[0] = 1


# -- the same everywhere


GOLDEN_POWER = [26154, 17593, 12411, 9134, 7162, 5817, 4578, 3838, 3293, 2916, 2368, 2368, 2368, 0]
GOLDEN_EFFECTIVE = [19954, 9180, 7141, 6606, 6445, 6381, 6346, 6333, 6327, 6324, 6321, 6321, 6321, 0]


def test_golden_targets() -> None:
    assert target(LONG_TAIL, "power:alpha=0.3,epoch_size=100000") == GOLDEN_POWER
    assert target(LONG_TAIL, "effective_number:epoch_size=100000") == GOLDEN_EFFECTIVE


def test_irrational_targets_do_not_depend_on_the_decimal_context_of_the_caller() -> None:
    expected = target(LONG_TAIL, "power:alpha=0.3")
    with decimal.localcontext(decimal.Context(prec=3, rounding=decimal.ROUND_UP)):
        assert target(LONG_TAIL, "power:alpha=0.3") == expected


@pytest.mark.parametrize("root", [3, 5, 7, 9, 11])
def test_powers_are_exact_enough_to_see_ties(root: int) -> None:
    """3 ** 10 to the power of 0.3 is 27; the nearest floats make it a little less, and the tie goes the wrong way."""
    share = root**3 // 2
    text = f"power:alpha=0.3,epoch_size={share + 1}"
    assert target([root**10, 1], text) == [share + 1, 0]
    assert target([1, root**10], text) == [1, share]


def test_perfect_powers_are_exact() -> None:
    counts = [n * n for n in range(1, 40)]
    assert target(counts, f"power:alpha=0.5,epoch_size={sum(range(1, 40))}") == list(range(1, 40))


# -- progressive


def stages() -> list[Targets]:
    return progressive(LONG_TAIL, 5, 10_000)


def test_progressive_stages_are_equally_long() -> None:
    assert {stage.num_draws for stage in stages()} == {10_000}


def test_progressive_goes_from_natural_to_balanced() -> None:
    first, last = stages()[0].target, stages()[-1].target
    assert first.tolist() == target(LONG_TAIL, "natural:epoch_size=10000")
    assert last.tolist() == target(LONG_TAIL, "balanced:epoch_size=10000")


def test_progressive_head_falls_and_tail_rises() -> None:
    drawn = np.stack([stage.target for stage in stages()])
    assert np.all(np.diff(drawn[:, 0]) < 0)
    assert np.all(np.diff(drawn[:, 10]) > 0)


def test_progressive_of_one_stage_is_natural() -> None:
    assert progressive(LONG_TAIL, 1)[0].target.tolist() == LONG_TAIL


def test_progressive_without_stages_is_refused() -> None:
    with pytest.raises(PolicyError, match="num_stages must be at least 1, not 0"):
        progressive(LONG_TAIL, 0)


# -- spelling


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("power", {"policy": "power", "alpha": "0.5"}),
        ("power:alpha=5e-1 , epoch_size=1e5", {"policy": "power", "alpha": "0.5", "epoch_size": 100000}),
        ({"policy": "power", "alpha": 0.25, "floor": None}, {"policy": "power", "alpha": "0.25"}),
        ({"policy": "balanced", "per_class": 10}, {"policy": "balanced", "per_class": 10}),
        ("undersample:frozen", {"policy": "undersample", "ceiling": "min", "frozen": 1}),
        ({"policy": "undersample", "frozen": True}, {"policy": "undersample", "ceiling": "min", "frozen": 1}),
        ("oversample:floor=2.50*median", {"policy": "oversample", "floor": "2.5*q0.5"}),
        ("oversample:floor=1*mean,max_repeat=10.0", {"policy": "oversample", "floor": "mean", "max_repeat": "10"}),
        ('explicit:{"targets": {"b": 2, "a": 1}}', {"policy": "explicit", "targets": {"a": 1, "b": 2}}),
    ],
)
def test_spellings_have_one_canonical_form(text: str | dict[str, object], canonical: dict[str, object]) -> None:
    assert to_json(parse(text)) == canonical


@pytest.mark.parametrize("text", [*SHAPES, 'explicit:{"targets": {"a": 1}}'])
def test_canonical_form_reads_back_through_json(text: str) -> None:
    policy = parse(text)
    data = json.dumps(to_json(policy))
    assert "." not in "".join(str(v) for v in json.loads(data).values() if not isinstance(v, str | dict))
    assert parse(json.loads(data)) == policy


@pytest.mark.parametrize("text", SHAPES)
def test_text_reads_back(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


def test_every_policy_of_the_design_is_there() -> None:
    used = Counter(parse(text).name for text in SHAPES) | Counter(["explicit"])
    assert set(used) == set(NAMES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("natrual", r"unknown policy 'natrual' \(did you mean 'natural'\?\); the policies are natural, oversample"),
        (
            "balanced:per_clas=1",
            r"unknown parameter 'per_clas' \(did you mean 'per_class'\?\); .* per_class, max_repeat",
        ),
        ("balanced:per_class=1,per_class=2", "a parameter is given twice"),
        ("balanced:per_class=0", "per_class must be a number of images, .*, not '0'"),
        ("balanced:per_class=2.5", "per_class must be"),
        ("oversample:floor=q1.5", "floor must be"),
        ("oversample:floor=-1*mean", "floor must be"),
        ("power:alpha=1.1", "alpha must be a number from 0 to 1, not '1.1'"),
        ("power:alpha=nan", "alpha must be"),
        ("power:alpha=1e-999999999", "alpha must be"),
        ("power:epoch_size=0", "epoch_size must be an integer of at least 1, not '0'"),
        ("power:epoch_size=1e30", "epoch_size must be"),
        ("natural:max_repeat=0.9", "max_repeat must be a number of at least 1"),
        ({"policy": "natural", "epoch_size": True}, "epoch_size must be an integer of at least 1, not True"),
        ("undersample:frozen=maybe", "frozen must be true or false, not 'maybe'"),
        ("effective_number:beta=1", "beta must be a number from 0 to below 1"),
        ("explicit", "policy explicit needs targets: a table from class name"),
        ({"policy": "explicit", "targets": {}}, "targets must be a table"),
        ({"policy": "explicit", "targets": {"a": -1}}, "targets must be a table"),
        ('explicit:{"targets": {"a": 1, "a": 2}}', "targets must be a table"),
        ("explicit:{", "the part after ':' is not JSON"),
        ({"alpha": 1}, "a policy needs the key 'policy' with one of natural, .*; found"),
        ("", "unknown policy ''"),
    ],
)
def test_wrong_policies_say_what_is_wrong(spec: str | dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(spec)


def test_stage_beyond_the_last_is_refused() -> None:
    with pytest.raises(PolicyError, match="stages count from 0, the last is 2"):
        apply([1], parse("progressive:stage=3,num_stages=3"))


def test_floor_above_ceiling_is_refused() -> None:
    with pytest.raises(PolicyError, match="floor 9 is above ceiling 3"):
        apply([1], parse("power:floor=9,ceiling=3"))
