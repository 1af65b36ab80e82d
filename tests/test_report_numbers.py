"""report: numbers, curves and advice follow from the snapshot, and from nothing else."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from tiny_snapshot import COUNTS, write_snapshot

from pipeline.ingest.stats import describe
from pipeline.plan.policy import apply, parse
from pipeline.report.advice import Facts, what_next
from pipeline.report.chart import MAX_COLUMNS, MAX_POINTS, NARROW, SQUARE, WIDE, Frame, class_curve, gini, lorenz
from pipeline.report.numbers import GROUPS, Classes, Coverage, Draws, coverage, group_rows, headline, split_rows
from pipeline.report.page import _extremes
from pipeline.report.refused import Copies, reason_counts, reason_groups, spread
from pipeline.report.survey import Place, Survey, survey
from pipeline.report.words import percent, times
from pipeline.schema import REJECTS, Reason
from pipeline.snapshot import Snapshot


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Train 60, 19, 0, 9, 4, 1 of six classes; test 5, 3, 2, 1, 0, 0."""
    return write_snapshot(tmp_path_factory.mktemp("numbers") / "root")


@pytest.fixture(scope="module")
def classes(snapshot: Snapshot) -> Classes:
    return Classes.of(snapshot)


# ---- numbers


def test_groups_hold_every_class_and_draw_once(snapshot: Snapshot, classes: Classes) -> None:
    draws = [Draws.of(snapshot.manifest(name)) for name in snapshot.manifests]
    rows = group_rows(classes, draws)
    assert [row["name"] for row in rows] == list(GROUPS)
    assert [row["classes"] for row in rows] == [0, 1, 3, 1, 1]
    assert [row["images"] for row in rows] == [0, 60, 32, 1, 0]
    assert [row["evaluable"] for row in rows] == [0, 1, 2, 0, 1]
    for one in draws:
        assert sum(row["draws"][one.name] for row in rows) == one.manifest.num_draws


@pytest.mark.parametrize(
    ("train", "group"),
    [(0, "none"), (1, "one"), (2, "few"), (19, "few"), (20, "medium"), (100, "medium"), (101, "many")],
)
def test_groups_begin_where_the_literature_has_them(train: int, group: str) -> None:
    column = np.array([train])
    classes = Classes(["x"], {"train": column, "count": column}, column > 0)
    assert GROUPS[classes.group[0]] == group


def test_coverage_counts_what_can_be_measured(classes: Classes) -> None:
    told = coverage(classes)
    assert (told.num_classes, told.evaluable, told.untrained) == (6, 4, 1)
    assert (told.train_images, told.train_images_evaluable) == (93, 88)
    assert told.median_held_out == 2


def test_splits_are_those_of_the_table(classes: Classes) -> None:
    rows = {row["name"]: row for row in split_rows(classes)}
    for split, counts in COUNTS.items():
        here = [count for count in counts if count]
        assert rows[split]["images"] == sum(counts)
        assert rows[split]["classes"] == len(here)
        assert rows[split]["smallest"] == min(here, default=0)


def test_a_manifest_row_says_what_an_epoch_costs(snapshot: Snapshot, classes: Classes) -> None:
    row = Draws.of(snapshot.manifest("balanced")).row(classes)
    assert row["draws"] == 5 * 23
    assert row["distinct"] == 23 + 19 + 9 + 4 + 1
    assert row["repeat"] == 23
    assert row["singles"] == 23 / (5 * 23)


def test_the_headline_tells_head_and_tail() -> None:
    assert headline(np.array([10, 1, 1])) == (
        "The largest class holds half of the training images; half of the classes have a single one."
    )
    assert headline(np.array([4, 4, 4, 4])).startswith("The 2 largest of 4 classes hold half")
    assert headline(np.zeros(3, np.int64)) == "There is no training image in it."


@pytest.mark.parametrize(
    ("part", "whole", "told"),
    [
        (0, 5, "0"),
        (5, 5, "100"),
        (1, 3, "33"),
        (1, 30, "3.3"),
        (1, 10**6, "under 0.1"),
        (99_999, 10**5, "over 99.9"),
        (0, 0, "0"),
    ],
)
def test_shares_tell_some_from_none_and_from_all(part: int, whole: int, told: str) -> None:
    assert percent(part, whole) == f"{told}\u202f%"


@pytest.mark.parametrize(
    ("factor", "told"), [(0, "never"), (1, "1×"), (1.5, "1.5×"), (33.3, "33×"), (0.5, "every 2 epochs"), (0.8, "0.8×")]
)
def test_repeats_are_told_in_words(factor: float, told: str) -> None:
    assert times(factor) == told


# ---- survey


def test_the_survey_counts_every_image(snapshot: Snapshot) -> None:
    seen = survey(snapshot)
    assert seen.is_whole
    assert seen.num_images == snapshot.record.num_images
    assert seen.formats == (("png", seen.num_images),)
    assert seen.sides == (("up to 32", seen.num_images),)
    assert (seen.num_groups, seen.relatives) == (0, ())


def test_digests_are_found_where_they_lie(snapshot: Snapshot) -> None:
    wanted = {snapshot.index(shard)["sha256"][row].as_py(): Place(shard, row) for shard, row in ((0, 3), (2, 0))}
    assert survey(snapshot, [*wanted, bytes(32)]).found == wanted


def test_a_survey_of_some_shards_says_so(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.report.survey.MAX_SHARDS", 2)
    seen = survey(snapshot)
    assert (seen.is_whole, seen.num_shards) == (False, 2)
    assert seen.num_images < snapshot.record.num_images


def test_groups_of_several_classes_come_first(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    def grouped(of: Snapshot, row: dict[str, Any]) -> pa.Table:
        table = of.index(indexes.index(row["index_sha256"]))
        ids = table["class_id"].to_numpy()
        group = np.where((ids == 3) | (ids == 4), 7, 9 + ids).astype(np.uint64)
        return table.set_column(table.column_names.index("group"), "group", pa.array(group))

    indexes = snapshot.shards["index_sha256"].to_pylist()
    monkeypatch.setattr("pipeline.report.survey._index", grouped)
    seen = survey(snapshot)
    assert (seen.num_groups, seen.num_grouped, seen.num_mixed) == (4, 103, 1)
    first = seen.relatives[0]
    assert (first.num_members, first.num_classes, len(first.members)) == (14, 2, 4)
    assert {snapshot.index(p.shard)["class_id"][p.row].as_py() for p in first.members} == {3, 4}


# ---- rejects


def rejects(*rows: tuple[str, str, str, str]) -> pa.Table:
    keys = ("path", "label", "reason", "sha256")
    filled = [{"key": "", "split": "", "detail": "", **dict(zip(keys, row, strict=True))} for row in rows]
    return pa.Table.from_pylist(filled, schema=REJECTS)


def test_every_reject_is_counted_and_a_spread_is_shown() -> None:
    table = rejects(*((f"{i:03d}", "x", "empty", "") for i in range(100)), ("a", "x", "gone", ""))
    assert reason_counts(table) == {"empty": 100, "gone": 1}
    groups = reason_groups(table)
    assert [row["path"] for row in groups[0]["examples"]] == ["010", "030", "050", "070", "090"]
    assert groups[1]["examples"][0]["path"] == "a"


def test_copies_stand_together_by_their_bytes() -> None:
    one, two = "11" * 32, "22" * 32
    table = rejects(
        ("a", "x", "label-conflict", one), ("b", "y", "label-conflict", one), ("c", "x", "duplicate-of", two)
    )
    copies = Copies(table)
    assert (copies.num_sets(Reason.LABEL_CONFLICT), copies.num_sets(Reason.DUPLICATE_OF)) == (1, 1)
    assert copies.wanted == [bytes.fromhex(two)]


@pytest.mark.parametrize(("count", "wanted"), [(0, 5), (3, 5), (5, 5), (6, 5), (1000, 7)])
@pytest.mark.parametrize("phase", [0.25, 0.5, 0.75])
def test_a_spread_is_of_distinct_places(count: int, wanted: int, phase: float) -> None:
    places = spread(count, wanted, phase)
    assert places == sorted(set(places))
    assert len(places) == min(count, wanted)
    assert all(0 <= place < count for place in places)


def test_extremes_are_the_smallest_and_a_spread_of_ties() -> None:
    values = np.array([5, 1, 3, 3, 3, 3, 0, 9])
    assert _extremes(values, values > 0, 3, phase=0.25) == [1, 2, 4]
    assert _extremes(values, values > 0, 3, phase=0.75) == [1, 3, 5]
    assert _extremes(values, values > 0, 99) == [1, 2, 3, 4, 5, 0, 7]


# ---- advice

_QUIET = Facts(
    trained=describe([50, 50]),
    covered=Coverage(
        num_classes=2, evaluable=2, untrained=0, train_images=100, train_images_evaluable=100, median_held_out=9
    ),
    draws=[],
    reasons={},
    num_images=118,
    survey=cast(Survey, SimpleNamespace(num_mixed=0, median_side=300, median_bytes=9000)),
)


def drawn(name: str, policy: str, *counts: int) -> Draws:
    targets = apply(np.array(counts), parse(policy))
    document = SimpleNamespace(policy=parse(policy))
    made = SimpleNamespace(
        name=name,
        targets=targets.target,
        pool=targets.pool,
        available=targets.available,
        num_draws=int(targets.target.sum()),
        document=document,
    )
    return Draws.of(cast(Any, made))


def titles(**changes: Any) -> list[str]:
    return [advice.title for advice in what_next(replace(_QUIET, **changes))]


def covered(**changes: int) -> Coverage:
    return replace(_QUIET.covered, **changes)


def seen(**changes: int) -> Survey:
    return cast(Survey, SimpleNamespace(**{**vars(_QUIET.survey), **changes}))


NATURAL = "Train on natural draws"


def test_even_classes_need_no_more_than_training() -> None:
    assert titles() == [NATURAL]


@pytest.mark.parametrize(
    ("changes", "title", "number"),
    [
        ({"num_moved": 3}, "Train again from scratch", "3 images changed"),
        ({"num_vanished": 1}, "Look for lost classes", "1 class of"),
        ({"reasons": {Reason.LABEL_CONFLICT: 12}}, "Settle the labels", "12 files"),
        ({"survey": seen(num_mixed=4)}, "Look at groups of several classes", "4 groups"),
        ({"reasons": {Reason.EMPTY: 1, Reason.GONE: 2}}, "Repair or accept what was rejected", "gone (2)"),
        ({"covered": covered(untrained=1)}, "Add training images", "1 class has"),
        ({"covered": covered(evaluable=0)}, "Hold images out", "None of the 2 classes"),
        ({"covered": covered(evaluable=1)}, "Report coverage beside every metric", "1 of 2 classes"),
        ({"covered": covered(median_held_out=4)}, "Judge groups, not single classes", "by 25 points"),
        ({"survey": seen(median_side=1025)}, "Store smaller images", "1,025 pixels"),
        ({"draws": [drawn("under", "undersample:ceiling=10", 100, 10)]}, "Give under 10 epochs", "20 of 110 images"),
        (
            {"draws": [drawn("bal", "balanced:per_class=22", 22, 2)]},
            "Cap the repeats of bal, or augment them hard",
            "11×",
        ),
    ],
)
def test_each_sentence_says_the_number_that_set_it_off(changes: dict[str, Any], title: str, number: str) -> None:
    advice = {one.title: one for one in what_next(replace(_QUIET, **changes))}
    assert set(advice) == {NATURAL, title}
    assert number in advice[title].text


@pytest.mark.parametrize(
    "changes",
    [
        {"reasons": {Reason.DUPLICATE_OF: 12, Reason.DUPLICATE_ROW: 3}},
        {"covered": covered(median_held_out=5)},
        {"survey": seen(median_side=1024)},
        {"draws": [drawn("bal", "balanced:per_class=20", 20, 2)]},
        {"draws": [drawn("natural", "natural", 20, 2)]},
        {"draws": [drawn("frozen", "undersample:ceiling=10,frozen=1", 100, 10)]},
    ],
)
def test_at_the_threshold_nothing_is_said(changes: dict[str, Any]) -> None:
    assert titles(**changes) == [NATURAL]


def test_imbalance_changes_the_recipe() -> None:
    assert titles(trained=describe([100, 10])) == [NATURAL]
    assert "log_prior" in titles(trained=describe([101, 10]))[0]


def test_what_is_urgent_comes_first() -> None:
    told = what_next(replace(_QUIET, survey=seen(median_side=4000), num_vanished=2, reasons={Reason.EMPTY: 1}))
    assert [one.urgent for one in told] == [True, False, False, False]


@pytest.mark.parametrize("policy", ["balanced:per_class=mean", "oversample:floor=max,max_repeat=50", "power:alpha=0"])
def test_a_capped_policy_is_one_that_is_understood(policy: str) -> None:
    advice = what_next(replace(_QUIET, draws=[drawn("x", policy, 500, 3)]))[-1]
    words = shlex.split(advice.command)
    assert words[:4] == ["evenshard", "manifest", "ROOT", "x-capped"]
    capped = parse(words[-1])
    assert (capped.name, capped.number("max_repeat")) == (parse(policy).name, 10)


# ---- chart


def heights(path: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?:V|^M\S+ )([\d.]+)", path)]


def test_each_level_of_a_curve_is_one_step() -> None:
    chart = class_curve(np.array([1000, 100, 10, 10, 1, 0]), {})
    assert heights(chart.area)[:-1] == pytest.approx([WIDE.top, 120.7, 211.3, 302, WIDE.base], abs=0.1)


def test_a_class_that_is_never_drawn_lies_on_the_ground() -> None:
    chart = class_curve(np.array([5, 5]), {"half": np.array([7, 0])})
    assert heights(chart.lines[0].path)[-1] == WIDE.base


def test_a_curve_of_many_classes_stays_small_and_keeps_its_ends() -> None:
    counts = np.sort(np.random.default_rng(0).integers(1, 10**6, 5000))[::-1]
    chart = class_curve(counts, {"natural": counts})
    levels = heights(chart.lines[0].path)
    assert len(levels) <= MAX_COLUMNS
    assert levels == sorted(levels)
    assert levels[0] == WIDE.top
    assert chart.power == 0.5


def test_zones_follow_the_counts() -> None:
    chart = class_curve(np.array([500] * 50 + [50] * 25 + [5] * 25), {})
    assert [mark.label for mark in chart.zones] == ["many-shot", "medium-shot", "few-shot"]
    assert chart.borders == (64 + 872 * 0.5, 64 + 872 * 0.75)


@pytest.mark.parametrize("num_classes", [0, 1, 2, 13, 81, 199, 201, 5000, 10**6])
@pytest.mark.parametrize("frame", [WIDE, NARROW], ids=lambda frame: frame.name)
def test_ticks_do_not_collide(num_classes: int, frame: Frame) -> None:
    chart = class_curve(np.ones(num_classes, np.int64), {}, frame)
    places = [mark.at for mark in chart.x_ticks]
    assert all(b - a >= 40 for a, b in pairwise(places))
    assert [mark.label for mark in chart.x_ticks][-1:] == [f"{num_classes:,}"][: num_classes > 0]


# ---- Lorenz


def points(path: str) -> NDArray[np.float64]:
    return np.array([[float(x), float(y)] for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)])


def test_equal_classes_lie_on_the_diagonal() -> None:
    chart = lorenz(np.array([7, 7, 7]), {})
    steps = points(chart.area[: chart.area.index("V")])
    assert steps[0].tolist() == [SQUARE.left, SQUARE.base]
    assert steps[-1].tolist() == [SQUARE.right, SQUARE.top]
    across = (steps[:, 0] - SQUARE.left) / (SQUARE.right - SQUARE.left)
    up = (SQUARE.base - steps[:, 1]) / (SQUARE.base - SQUARE.top)
    np.testing.assert_allclose(across, up, atol=0.001)


def test_gini_is_twice_the_area_above_the_curve() -> None:
    counts = np.random.default_rng(0).zipf(1.3, 4000).clip(max=10**6).astype(np.int64)
    chart = lorenz(counts, {"natural": counts})
    steps = points(chart.lines[0].path)
    assert len(steps) == MAX_POINTS
    across = (steps[:, 0] - SQUARE.left) / (SQUARE.right - SQUARE.left)
    up = (SQUARE.base - steps[:, 1]) / (SQUARE.base - SQUARE.top)
    assert 1 - 2 * np.trapezoid(up, across) == pytest.approx(chart.lines[0].gini, abs=0.02)
    assert chart.lines[0].gini == pytest.approx(describe(counts).gini)


def test_a_class_that_is_not_drawn_is_unequal_and_one_without_images_is_not_there() -> None:
    chart = lorenz(np.array([5, 5, 0]), {"half": np.array([9, 0, 0])})
    assert chart.lines[0].gini == gini(np.array([9, 0])) == 0.5
