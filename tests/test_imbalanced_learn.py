"""Every ``sampling_strategy`` of imbalanced-learn has an equivalent, and its own samplers give the same counts."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from imblearn.over_sampling import RandomOverSampler
from imblearn.under_sampling import RandomUnderSampler

from pipeline.plan.policy import apply, parse

SAMPLERS = {"over": RandomOverSampler, "under": RandomUnderSampler}
STRATEGIES = [
    ("over", "minority", "oversample:only=minority"),
    ("over", "not minority", "oversample:only=not-minority"),
    ("over", "not majority", "oversample:only=not-majority"),
    ("over", "all", "oversample"),
    ("over", "auto", "oversample"),
    ("under", "majority", "undersample:only=majority"),
    ("under", "not minority", "undersample:only=not-minority"),
    ("under", "not majority", "undersample:only=not-majority"),
    ("under", "all", "undersample"),
    ("under", "auto", "undersample"),
]


def theirs(kind: str, strategy: object, counts: list[int]) -> list[int]:
    labels = np.repeat(np.arange(len(counts)), counts)
    _, resampled = SAMPLERS[kind](sampling_strategy=strategy, random_state=0).fit_resample(labels[:, None], labels)
    return np.bincount(resampled, minlength=len(counts)).tolist()


def ours(text: str, counts: list[int]) -> list[int]:
    return apply(counts, parse(text)).target.tolist()


def distinct_ends(seed: int) -> list[int]:
    """A long tail with one smallest and one largest class: of ties imbalanced-learn takes the first."""
    rng = np.random.default_rng(seed)
    middle = rng.integers(5, 300, int(rng.integers(0, 60)))
    return rng.permutation([*middle, 301 + int(rng.integers(300)), int(rng.integers(1, 4))]).tolist()


@pytest.mark.parametrize(("kind", "strategy", "text"), STRATEGIES)
@pytest.mark.parametrize("seed", range(10))
def test_strategies_by_name(kind: str, strategy: str, text: str, seed: int) -> None:
    counts = distinct_ends(seed)
    assert ours(text, counts) == theirs(kind, strategy, counts)


@pytest.mark.parametrize(("kind", "strategy", "text"), [row for row in STRATEGIES if row[1] in ("all", "auto")])
def test_ties_where_all_classes_change(kind: str, strategy: str, text: str) -> None:
    assert ours(text, [9, 9, 2, 1, 1]) == theirs(kind, strategy, [9, 9, 2, 1, 1])


def test_of_tied_classes_imbalanced_learn_takes_the_first_and_we_all() -> None:
    assert theirs("over", "minority", [5, 1, 1, 3]) == [5, 5, 1, 3]
    assert ours("oversample:only=minority", [5, 1, 1, 3]) == [5, 5, 5, 3]


@pytest.mark.parametrize("ratio", ["0.2", "0.5", "0.3", "1.0", "0.77"])
@pytest.mark.parametrize("counts", [[1000, 37], [20, 811], [333, 1]])
def test_a_float_of_two_classes(ratio: str, counts: list[int]) -> None:
    """Theirs cuts off what ours rounds: equal wherever the wish is whole, else less than one draw apart."""
    least, most = min(counts), max(counts)
    for kind, text, wish in (
        ("over", f"oversample:floor={ratio}*max", Fraction(ratio) * most),
        ("under", f"undersample:ceiling=min/{ratio}", least / Fraction(ratio)),
    ):
        if not least <= wish <= most:
            continue  # imbalanced-learn refuses it
        found, expected = ours(text, counts), theirs(kind, float(ratio), counts)
        changed = counts.index(least if kind == "over" else most)
        assert found[1 - changed] == expected[1 - changed]
        assert (found[changed], expected[changed]) == (round(wish), int(wish))


def test_a_float_is_for_two_classes_there_and_for_any_number_here() -> None:
    with pytest.raises(ValueError, match="binary"):
        theirs("over", 0.5, [9, 5, 1])
    assert ours("oversample:floor=0.5*max", [10, 5, 1]) == [10, 5, 5]


@pytest.mark.parametrize(("kind", "table"), [("over", {0: 40, 3: 9}), ("under", {1: 7, 0: 30})])
def test_a_dict(kind: str, table: dict[int, int]) -> None:
    counts = [30, 12, 5, 2]
    names = ["ant", "bee", "cat", "dog"]
    policy = parse({"policy": "explicit", "others": "natural", "targets": {names[i]: n for i, n in table.items()}})
    assert apply(counts, policy, names).target.tolist() == theirs(kind, table, counts)
