"""Scores by blocks: the bits of the whole at once, in the memory of a part; files keep the precision they have."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.learn import prediction_files, priors, scores
from pipeline.learn.calibration import fit_temperature, temperature
from pipeline.learn.metrics import balanced_accuracy
from pipeline.learn.prediction_files import read_predictions
from pipeline.learn.priors import Logits, estimate_prior, fit_prior
from pipeline.learn.ranking import SPECIFICITIES, at_threshold, auroc, threshold
from pipeline.learn.scores import NO_CLASS, Scores, class_blocks, decide, log_probabilities, log_softmax
from pipeline.learn.variants import Counts, Labelled, of_scores

Floats = NDArray[np.float64]
BLOCKS = [1, 40, 1 << 20]


def drawn(seed: int, num: int, num_classes: int) -> tuple[Floats, NDArray[np.int64]]:
    """Logits and labels; one class of every third image is impossible."""
    rng = np.random.default_rng((seed, num, num_classes))
    labels = rng.integers(0, num_classes, num)
    values = rng.normal(0, 2, (num, num_classes))
    values[np.arange(num), labels] += 2
    values[::3, seed % num_classes] = -np.inf
    return values, labels


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 5), (37, 11)])
def test_blocks_have_the_bits_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, block: int, kind: Any, probabilities: bool, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(scores, "BLOCK", block)
    values, _ = drawn(1, *size)
    values = (np.exp(values) if probabilities else values).astype(kind)
    rows = np.random.default_rng(0).permutation(size[0])[: size[0] // 2 + 1]
    shift = np.linspace(-1, 1, size[1])
    some = Scores(values=values, rows=rows, probabilities=probabilities, sharpness=0.7, shift=shift)
    wide = values[rows].astype(np.float64)
    with np.errstate(divide="ignore"):
        told = log_softmax((np.log(wide) if probabilities else wide) * 0.7 + shift)
    decided = decide(some)
    lost = np.isnan(told).any(axis=1)
    np.testing.assert_array_equal(decided.predicted, np.where(lost, NO_CLASS, told.argmax(1)))
    told[lost] = -np.inf
    np.testing.assert_array_equal(decided.confidence, np.exp(told.max(1)))
    parts = [log_probabilities(some, decided, mine) for mine in class_blocks(size[1], len(rows))]
    np.testing.assert_array_equal(np.concatenate(parts), told.T)


def test_an_image_that_no_class_has_a_score_for_is_taken_for_nothing() -> None:
    values = np.array([[-np.inf, -np.inf], [-np.inf, 3.0]])
    decided = decide(Scores(values=values))
    assert decided.predicted.tolist() == [NO_CLASS, 1]
    assert decided.confidence.tolist() == [0, 1]
    both = log_probabilities(Scores(values=values), decided, slice(0, 2))
    lacking = Scores(values=np.array([[0.5, -np.inf]]), probabilities=True)
    assert decide(lacking).log_total.tolist() == [np.log(0.5)]
    assert both.tolist() == [[-np.inf, -np.inf], [-np.inf, 0]]


@pytest.mark.parametrize("block", BLOCKS)
def test_figures_are_those_of_one_float64_matrix(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(scores, "BLOCK", block)
    values, labels = drawn(3, 90, 7)
    mine, val = np.arange(60), np.arange(60, 90)
    counts = Counts(np.arange(1, 8), np.full(7, 1 / 7))
    made, held = (Labelled(Scores(values=values.astype(np.float32), rows=rows), labels[rows]) for rows in (mine, val))
    told = of_scores("x", made, held, counts)
    whole = log_softmax(values.astype(np.float32))
    limits = [[threshold(whole[val, c], labels[val] == c, s) for c in range(7)] for s in SPECIFICITIES]
    for row, specificity in enumerate(SPECIFICITIES):
        found = [at_threshold(whole[mine, c], labels[mine] == c, limits[row][c]) for c in range(7)]
        sensitive, kept = np.array(found).T
        assert told.figures[f"sensitivity at specificity {specificity:g}"].value == balanced_accuracy(sensitive)
        assert told.figures[f"specificity found, of {specificity:g}"].value == balanced_accuracy(kept)
    assert told.auroc is not None
    assert told.auroc.tolist() == [auroc(whole[mine, c], labels[mine] == c) for c in range(7)]
    assert told.figures["accuracy"].value == (whole[mine].argmax(1) == labels[mine]).mean()


@pytest.mark.parametrize("block", BLOCKS)
def test_temperature_and_em_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    values, labels = drawn(5, 80, 6)
    values[0] = -np.inf
    values[1, labels[1]] = -np.inf
    old = np.log(np.arange(1, 7) / 21)
    expected = temperature(values, labels), estimate_prior(Logits(values, old)).log_prior
    monkeypatch.setattr(scores, "BLOCK", block)
    monkeypatch.setattr(priors, "EM_BLOCK", block)
    assert temperature(values, labels) == pytest.approx(expected[0], rel=1e-9)
    np.testing.assert_allclose(estimate_prior(Logits(values, old)).log_prior, expected[1], rtol=1e-9)
    without = estimate_prior(Logits(values[1:], old)).log_prior
    np.testing.assert_allclose(without, expected[1], rtol=1e-9)  # what no class has a score for tells nothing
    monkeypatch.setattr(priors, "EXACT", 0)
    single = estimate_prior(Logits(values, old))
    np.testing.assert_allclose(np.exp(single.log_prior), np.exp(expected[1]), atol=1e-6)


def test_temperature_of_shifted_scores_is_the_best_there_is() -> None:
    """By a grid; the shift is not divided."""
    values, labels = drawn(6, 300, 5)
    shift = np.log([0.4, 0.3, 0.2, 0.1, 1e-300])
    some = Scores(values=values, shift=shift)
    kept = np.isfinite(values[np.arange(300), labels])
    grid = np.exp(np.linspace(-2, 2, 4001))
    fits = [log_softmax(values[kept] / t + shift)[np.arange(kept.sum()), labels[kept]].mean() for t in grid]
    assert fit_temperature(some, labels) == pytest.approx(grid[int(np.argmax(fits))], rel=2e-3)
    assert fit_temperature(Scores(values=np.full((2, 2), -np.inf)), np.array([0, 1])) is None


def test_images_of_a_class_that_the_shift_rules_out_say_nothing_of_a_temperature() -> None:
    rng = np.random.default_rng(0)
    values, labels = rng.normal(0, 2, (300, 4)), rng.integers(0, 4, 300)
    values[np.arange(300), labels] += 1
    shift = np.array([0.0, -1.0, 0.5, -np.inf])
    kept = labels < 3
    expected = fit_temperature(Scores(values=values[kept, :3], shift=shift[:3]), labels[kept])
    assert fit_temperature(Scores(values=values, shift=shift), labels) == pytest.approx(expected)
    assert fit_temperature(Scores(values=values[~kept], shift=shift), labels[~kept]) is None


def test_em_of_shifted_scores_is_that_of_their_sum() -> None:
    values, _ = drawn(2, 60, 5)
    old, shift = np.log(np.arange(1, 6) / 15), np.linspace(-2, 2, 5)
    found = fit_prior(Scores(values=values, shift=shift), old).log_prior
    np.testing.assert_allclose(found, estimate_prior(Logits(values + shift, old)).log_prior, rtol=1e-9)


def test_memory_is_that_of_the_scores_and_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BLOCK", 1 << 14)
    monkeypatch.setattr(priors, "EM_BLOCK", 1 << 14)
    monkeypatch.setattr(priors, "EXACT", 0)
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(4000, 400)).astype(np.float32), rng.integers(0, 400, 4000)
    made = Labelled(Scores(values=values, rows=np.arange(3000)), labels[:3000])
    held = Labelled(Scores(values=values, rows=np.arange(3000, 4000)), labels[3000:])
    counts = Counts(np.ones(400, np.int64), np.full(400, 1 / 400))
    tracemalloc.start()
    try:
        of_scores("x", made.moved(np.ones(400)), held, counts)
        fit_temperature(held.scores, held.labels)
        figures = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        fit_prior(made.scores, np.zeros(400), max_steps=2)
        em = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert figures < values.nbytes / 2
    assert em < 1.5 * values.nbytes


# -- files ------------------------------------------------------------------------------------------------------------

NAMES = ["a", "a.b", "c"]
EVERY = np.ones(3, bool)


def write(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def keys(num: int) -> list[str]:
    return [f"{number:016x}" for number in range(num)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([[0.5, 1.0, 2.0]] * 9), np.float32),  # of float64, each of which is a float32, too
        (np.array([[0.5, 1.0, 2.0]] * 8 + [[0.5, 1.0, 2.0 + 1e-12]]), np.float64),
        (np.array([[1e300, 1.0, 2.0]] * 9), np.float64),
        (np.array([[0.1, 1.0, -np.inf]] * 9, np.float32), np.float32),
        (np.array([[0.1, 1.0, 2.0]] * 9, np.float16), np.float32),
        (np.array([[1, 2**24 + 1, 3]] * 9), np.float64),
        (np.array([[np.nan, 1, 3]] * 9), np.float32),
    ],
)
def test_a_file_keeps_its_precision_in_the_least_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int, values: NDArray[Any], kind: Any
) -> None:
    monkeypatch.setattr(prediction_files, "BLOCK", block)
    wide = {name: values[:, c] for c, name in enumerate(NAMES)}
    files = [
        write(tmp_path / "wide.parquet", {"key": keys(9), **wide}),
        write(tmp_path / "list.parquet", {"key": keys(9), "scores": list(values)}),
        tmp_path / "p.csv",
    ]
    rows = [",".join(map(repr, row)) for row in values.tolist()]
    files[2].write_text("\n".join(["key,a,a.b,c", *(f"{key},{row}" for key, row in zip(keys(9), rows, strict=True))]))
    for path in files:
        found = read_predictions(path, NAMES, EVERY)
        assert found.scores is not None
        assert found.scores.dtype == kind, path
        np.testing.assert_array_equal(found.scores, values.astype(np.float64))
        assert found.keys.tolist() == list(range(9))


def test_row_groups_and_pages_are_read_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    listed = pa.table({"key": keys(50), "scores": list(values)})
    wide = pa.table({"key": keys(50), **{name: values[:, c] for c, name in enumerate(NAMES)}})
    monkeypatch.setattr(prediction_files, "BLOCK", 21)
    for number, table in enumerate((listed, wide)):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(table, path, row_group_size=13, data_page_size=64)
        found = read_predictions(path, NAMES, EVERY)
        np.testing.assert_array_equal(found.values, values)


def test_a_large_csv_is_read_in_parts(tmp_path: Path) -> None:
    """More than a block of 4 MiB, with names of several lines, and no line end at the end."""
    names = ["one\r\ntwo", "b", "c"]
    values = np.random.default_rng(0).normal(size=(70_000, 3))
    rows = [f"{key},{a!r},{b!r},{c!r}" for key, (a, b, c) in zip(keys(70_000), values.tolist(), strict=True)]
    path = tmp_path / "p.csv"
    path.write_text("\n".join(['key,"one\r\ntwo",b,c', *rows]), newline="")
    assert path.stat().st_size > 1 << 22
    found = read_predictions(path, names, EVERY)
    np.testing.assert_array_equal(found.values, values)


def test_what_a_file_lacks_is_impossible(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", {"key": keys(2), "c": [0.5, 1.0], "a": [0.25, 2.0]})
    found = read_predictions(path, NAMES, np.array([True, False, True]))
    assert found.values.tolist() == [[0.25, -np.inf, 0.5], [2.0, -np.inf, 1.0]]
    assert found.lacking.tolist() == [1]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_csv_of_another_world_is_read(tmp_path: Path, ending: str, packed: bool, mark: str) -> None:
    """A spreadsheet's: a byte order mark, Windows line ends, quotes; gzipped; keys in upper case; an empty cell."""
    names = ["a,b", 'say "x"', "größe 漢", " c "]
    lines = ['key,"a,b","say ""x""",größe 漢, c ', "00000000000000AB,1,2.5,-3e2,4", '"00000000000000ac",1,,inf,-inf']
    data = (mark + ending.join(lines) + (ending if packed else "")).encode()
    path = tmp_path / "p.csv"
    path.write_bytes(gzip.compress(data) if packed else data)
    found = read_predictions(path, names, np.ones(4, bool))
    assert found.keys.tolist() == [0xAB, 0xAC]
    np.testing.assert_array_equal(found.values, [[1, 2.5, -300, 4], [1, np.nan, np.inf, -np.inf]])
    labels = f"{mark}key,label{ending}00000000000000ab,größe 漢{ending}".encode()
    path.write_bytes(gzip.compress(labels) if packed else labels)
    told = read_predictions(path, names, np.ones(4, bool)).labels
    assert told is not None
    assert told.tolist() == [2]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.int16()])
@pytest.mark.parametrize("made", ["list", "large_list", "fixed", "chunked"])
def test_lists_of_every_kind_are_read(tmp_path: Path, kind: pa.DataType, made: str) -> None:
    values = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    lists = {"list": pa.list_(kind), "large_list": pa.large_list(kind), "fixed": pa.list_(kind, 3)}
    column = pa.array(np.array(values).astype(kind.to_pandas_dtype()).tolist()).cast(lists.get(made, pa.list_(kind)))
    parts = [column.slice(0, 1), column.slice(1)] if made == "chunked" else [column]
    path = write(tmp_path / "p.parquet", {"key": keys(3), "scores": pa.chunked_array(parts)})
    found = read_predictions(path, NAMES, EVERY)
    assert found.values.tolist() == values
    assert found.values.dtype == np.float32


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "expected a column key or path, found none"),
        (b"key;label\n00;a\n", "divided by commas, not by ';'"),
        (b"key\tlabel\n00\ta\n", r"divided by commas, not by '\\t'"),
        (b"key,label\n", "holds no row"),
        (b"key,a,a.b,c\n", "holds no row"),
        (b"\xef\xbb\xbfkey,label\r\n", "holds no row"),
        (b"key,a,a.b,c\n0000000000000001,1,2\n", "Expected 4 columns, got 3"),
        (b"key,a,a.b,c\n0000000000000001,1,2,x\n", "invalid value 'x'"),
        (b"key,a,a.b,c\n1.23457E+15,1,2,3\n", "16 hex digits"),
        (b",key,label\n0,0000000000000001,a\n", "1 columns are neither|2 columns are neither"),
        (b"\x1f\x8bno", "neither CSV in UTF-8 nor Parquet"),
        (gzip.compress(b"key,a,a.b,c\n0000000000000001,1,2,3\n")[:-9], "neither CSV in UTF-8 nor Parquet"),
        ("key,label\n0000000000000001,a\n".encode("utf-16"), "neither CSV in UTF-8 nor Parquet"),
    ],
)
def test_a_csv_that_is_none_is_told_in_words(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=told):
        read_predictions(path, NAMES, EVERY)


def test_a_header_longer_than_a_block_is_read(tmp_path: Path) -> None:
    names = [f"{number:06d}" + "x" * 490 for number in range(9000)]
    path = tmp_path / "p.csv"
    path.write_text(f"key,{','.join(names)}\n{keys(1)[0]},{','.join(['0.125'] * 9000)}\n")
    assert read_predictions(path, names, np.ones(9000, bool)).values.tolist() == [[0.125] * 9000]
