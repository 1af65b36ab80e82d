from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.plan.policy import apply
from pipeline.plan.schedule import Stage, deferred, epochs_of, progressive, text_of

stages_lists = st.one_of(
    st.integers(2, 9).map(progressive), st.fractions(Fraction(1, 50), Fraction(49, 50)).map(lambda x: deferred(share=x))
)


def test_as_text() -> None:
    assert text_of(deferred(), 25) == "natural:20 -> balanced:5"
    assert text_of(deferred("undersampled", Fraction(1, 4)), 8) == "natural:6 -> undersampled:2"
    assert text_of(progressive(3), 4) == "progressive-1-of-3:2 -> progressive-2-of-3:1 -> progressive-3-of-3:1"


@given(stages=stages_lists, more=st.integers(0, 200))
def test_epochs_sum_to_what_was_asked_and_stay_near_their_share(stages: tuple[Stage, ...], more: int) -> None:
    num_epochs = len(stages) + more
    epochs = epochs_of(stages, num_epochs)
    assert sum(epochs) == num_epochs
    assert min(epochs) >= 1
    assert sum(stage.share for stage in stages) == 1
    assert all(abs(n - stage.share * num_epochs) <= len(stages) for n, stage in zip(epochs, stages, strict=True))


def test_progressive_stages_are_equally_long_from_natural_to_balanced() -> None:
    counts = [900, 90, 9, 1]
    targets = [apply(counts, stage.policy).target.tolist() for stage in progressive(4)]
    assert {sum(row) for row in targets} == {1000}
    assert (targets[0], targets[-1]) == (counts, [250] * 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: deferred("sqrt"), "one of natural, oversampled, undersampled, balanced, not 'sqrt'"),
        (lambda: deferred(share=Fraction(1)), "lies between 0 and 1, not 1"),
        (lambda: progressive(1), "at least 2 stages, not 1"),
        (lambda: epochs_of(progressive(5), 4), "5 stages need at least 5 epochs, not 4"),
    ],
)
def test_what_is_no_schedule_is_refused(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()  # pyright: ignore
