"""`evenshard evaluate`: any model's predictions met with the images, told honestly; bad files told in words."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_names import HOSTILE, OBEYED
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, cohen_kappa_score, roc_auc_score
from tiny_snapshot import write_snapshot

from pipeline.cli import cli, run
from pipeline.errors import EvenshardError, NotFoundError, SourceError, UsageError
from pipeline.learn import predictions, scores
from pipeline.learn.evaluation import Training, evaluate
from pipeline.learn.metrics import kappa
from pipeline.learn.prediction_files import read_predictions
from pipeline.learn.ranking import calibration_error
from pipeline.snapshot import Snapshot

COUNTS = {
    "train": (150, 60, 30, 9, 4, 1, 0),
    "val": (9, 7, 6, 3, 0, 0, 0),
    "test": (12, 8, 5, 4, 2, 0, 1),
}
K = 7
Table = dict[str, list[Any]]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("evaluate") / "root", COUNTS)


def images(snapshot: Snapshot, *splits: str) -> list[dict[str, Any]]:
    rows = [row for shard in range(snapshot.shards.num_rows) for row in snapshot.index(shard).to_pylist()]
    return [row for row in rows if row["split"] in splits]


def logits_of(rows: Sequence[dict[str, Any]], seed: int = 0) -> NDArray[np.float64]:
    """A model that favours head classes."""
    truth = np.array([row["class_id"] for row in rows])
    made = np.random.default_rng(seed).normal(size=(len(rows), K)) + np.array([2.0, 1, 0.5, 0, -0.5, -1, -2])
    made[np.arange(len(rows)), truth] += 1.5
    return made


def write(path: Path, table: Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(table), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(table), *zip(*table.values(), strict=True)])
    return path


def scored(path: Path, snapshot: Snapshot, *splits: str) -> tuple[Path, list[dict[str, Any]], NDArray[np.float64]]:
    rows = images(snapshot, *splits)
    logits = logits_of(rows)
    columns = {f"class {c}": logits[:, c].tolist() for c in range(K)}
    return write(path, {"key": [row["key"] for row in rows], **columns}), rows, logits


def call(*words: object) -> int:
    return run(cli, [str(word) for word in words])


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:y_pred contains classes:UserWarning")
def test_figures_are_those_of_the_scores(snapshot: Snapshot, tmp_path: Path) -> None:
    path, rows, logits = scored(tmp_path / "p.csv", snapshot, "test")
    told = evaluate(snapshot, path)
    truth = np.array([row["class_id"] for row in rows])
    given, uniform = told.variants
    carried = np.log(np.array(COUNTS["train"]).clip(1e-300))
    corrected = np.where(np.array(COUNTS["train"]) > 0, logits - carried, -np.inf)
    for one, values in ((given, logits), (uniform, corrected)):
        predicted = values.argmax(1)
        figures = one.figures
        assert figures["accuracy"].value == pytest.approx(accuracy_score(truth, predicted))
        assert figures["kappa"].value == pytest.approx(cohen_kappa_score(truth, predicted))
        assert figures["balanced accuracy"].value == pytest.approx(balanced_accuracy_score(truth, predicted))
        shifted = np.exp(values - values.max(1, keepdims=True))
        probability = shifted / shifted.sum(1, keepdims=True)
        there = np.unique(truth)
        areas = [roc_auc_score(truth == c, probability[:, c]) for c in there]
        assert figures["macro AUROC"].value == pytest.approx(np.mean(areas))
        recall = [(predicted[truth == c] == c).mean() for c in range(4)]
        assert figures["recall, many"].value == pytest.approx(recall[0])
        assert figures["recall, medium"].value == pytest.approx(np.mean(recall[1:3]))
        assert figures["recall, few"].count == 2  # classes 3 and 4
        assert figures["recall, one"].count == 0  # class 5 is not measured
        share = np.array(COUNTS["train"])[:5]
        each = np.array([*recall, (predicted[truth == 4] == 4).mean()])
        assert figures["accuracy at train's shares"].value == pytest.approx((each * share).sum() / share.sum())
    assert uniform.figures["balanced accuracy"].value > given.figures["balanced accuracy"].value
    assert (told.num_classes, told.num_classes_measured) == (7, 6)
    assert told.train_share == pytest.approx(253 / 254)
    assert given.figures["recall, few"].interval[0] <= given.figures["recall, few"].value


def test_every_spelling_of_a_file_tells_the_same(snapshot: Snapshot, tmp_path: Path) -> None:
    """Key or path, CSV or Parquet, columns or lists, logits or probabilities, in any order of rows."""
    path, rows, logits = scored(tmp_path / "p.csv", snapshot, "test", "val")
    expected = evaluate(snapshot, path).to_json()
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probability = shifted / shifted.sum(1, keepdims=True)
    keys, paths = [row["key"] for row in rows], [row["path"] for row in rows]
    order = np.random.default_rng(0).permutation(len(rows))
    columns: Table = {f"class {c}": logits[:, c].tolist() for c in range(K)}
    tables: dict[str, Table] = {
        "a.parquet": {"path": paths, **columns},
        "b.parquet": {"key": keys, "scores": logits.tolist()},
        "c.csv": {"path": ["no image"] * len(rows), "key": keys, **dict(reversed(columns.items()))},
        "d.csv": {"path": paths, **{f"class {c}": probability[:, c].tolist() for c in range(K)}},
        "e.csv": {name: np.array(values)[order].tolist() for name, values in {"key": keys, **columns}.items()},
    }
    for name, table in tables.items():
        found = evaluate(snapshot, write(tmp_path / name, table)).to_json()
        assert found["kind"] == ("probabilities" if name == "d.csv" else "logits")
        for key in ("variants", "classes", "notes"):
            if name != "d.csv":  # a logarithm of a rounded exponential
                assert found[key] == expected[key], name
        first = found["variants"][0]["figures"]["balanced accuracy"]
        assert first == expected["variants"][0]["figures"]["balanced accuracy"]


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize("asked", ["auto", "as they are"])
def test_a_class_without_images_needs_no_column(tmp_path: Path, kind: str, asked: str) -> None:
    """It is as if it had one that rules the class out. All logits are below 0, so that a 0 would win."""
    counts = {"train": (9, 0, 5), "val": (3, 0, 2), "test": (4, 0, 6)}
    snapshot = write_snapshot(tmp_path / "root", counts)
    rows = images(snapshot, "test", "val")
    logits = logits_of(rows)[:, :3] - 9
    logits[:, 1] = -np.inf
    shown = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) if kind == "probabilities" else logits
    columns: Table = {"key": [row["key"] for row in rows], **{f"class {c}": shown[:, c].tolist() for c in range(3)}}
    scores = kind if asked == "as they are" else asked
    whole = evaluate(snapshot, write(tmp_path / "whole.parquet", columns), priors=["em"], scores=scores)
    del columns["class 1"]
    for name in ("without.parquet", "without.csv"):
        found = evaluate(snapshot, write(tmp_path / name, columns), priors=["em"], scores=scores)
        assert found.kind == kind
        assert {**found.to_json(), "file": ""} == {**whole.to_json(), "file": ""}
    truth = np.array([row["class_id"] for row in rows if row["split"] == "test"])
    predicted = logits[[row["split"] == "test" for row in rows]].argmax(1)
    assert found.variants[0].figures["accuracy"].value == (predicted == truth).mean()


@pytest.mark.parametrize("kind", ["names", "ids", "ids as text"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_labels_are_names_or_ids(snapshot: Snapshot, tmp_path: Path, kind: str, ending: str) -> None:
    rows = images(snapshot, "test")
    predicted = logits_of(rows).argmax(1)
    spelled: list[Any] = [f"class {c}" if kind == "names" else c for c in predicted.tolist()]
    if kind == "ids as text":
        spelled = [str(c) for c in spelled]
    path = write(tmp_path / f"p.{ending}", {"key": [row["key"] for row in rows], "label": spelled})
    told = evaluate(snapshot, path)
    truth = np.array([row["class_id"] for row in rows])
    assert [one.name for one in told.variants] == ["as given"]
    assert told.variants[0].figures["kappa"].value == pytest.approx(kappa(truth, predicted))
    assert "macro AUROC" not in told.variants[0].figures
    assert told.temperature is None


def test_thresholds_come_from_val_and_never_from_test(snapshot: Snapshot, tmp_path: Path) -> None:
    path, rows, logits = scored(tmp_path / "p.csv", snapshot, "test", "val")
    told = evaluate(snapshot, path)
    own = {split: np.array([row["split"] == split for row in rows]) for split in ("val", "test")}
    truth = np.array([row["class_id"] for row in rows])
    train = np.array(COUNTS["train"])
    corrected = np.where(train > 0, logits - np.log(train.clip(1)), -np.inf)
    for one, values in zip(told.variants, (logits, corrected), strict=True):
        shifted = np.exp(values - values.max(1, keepdims=True))
        probability = shifted / shifted.sum(1, keepdims=True)
        each: list[float] = []
        for c in np.unique(truth[own["test"]]):
            outside = np.sort(probability[own["val"] & (truth != c), c])
            limit = outside[int(np.ceil(0.9 * len(outside))) - 1]
            each.append(float((probability[own["test"] & (truth == c), c] > limit).mean()))
        assert one.figures["sensitivity at specificity 0.9"].value == pytest.approx(np.mean(each))
    assert told.temperature is not None
    assert any("val has 25 images with scores, too few" in n and "specificity 0.99, 0.999:" in n for n in told.notes)
    columns: Table = {f"class {c}": logits[own["test"], c].tolist() for c in range(K)}
    keys = [row["key"] for row in rows if row["split"] == "test"]
    without = write(tmp_path / "q.csv", {"key": keys, **columns})
    alone = evaluate(snapshot, without)
    assert "sensitivity at specificity 0.9" not in alone.variants[0].figures
    assert any("no row of val" in note for note in alone.notes)
    assert alone.variants[0].figures["accuracy"] == told.variants[0].figures["accuracy"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_only_test_has_thresholds(snapshot: Snapshot, tmp_path: Path, split: str) -> None:
    path, _, _ = scored(tmp_path / "p.csv", snapshot, "train", "val")
    told = evaluate(snapshot, path, split=split)
    assert told.temperature is None
    assert "sensitivity at specificity 0.9" not in told.variants[0].figures
    assert "no thresholds and no temperature: they are chosen on val, for test alone" in told.notes


def test_ten_images_of_val_choose_a_threshold_of_one_in_ten(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path / "root", {"train": (9, 5), "val": (6, 4), "test": (4, 6)})
    rows = images(snapshot, "test", "val")
    scores = logits_of(rows)[:, :2].tolist()
    told = evaluate(snapshot, write(tmp_path / "p.parquet", {"key": [row["key"] for row in rows], "scores": scores}))
    assert any("val has 10 images" in note and "specificity 0.99, 0.999:" in note for note in told.notes)


def test_the_prior_is_that_of_manifest_weights_and_offset(snapshot: Snapshot, tmp_path: Path) -> None:
    """Trained on balanced draws, or with an offset of log_q, scores are uniform already."""
    path, _, _ = scored(tmp_path / "p.csv", snapshot, "test")
    for training in (Training(tau=1), Training(weights="residual")):
        given, uniform = evaluate(snapshot, path, training=training).variants
        seen = np.isin(np.arange(K), [6], invert=True)  # class 6 was never drawn, and cannot be predicted any more
        np.testing.assert_allclose(uniform.recall[seen], given.recall[seen])
    given, natural = evaluate(snapshot, path, priors=["natural"]).variants
    np.testing.assert_array_equal(natural.recall[:6], given.recall[:6])
    with pytest.raises(UsageError, match="no prior 'flat'"):
        evaluate(snapshot, path, priors=["flat"])


def test_the_worst_classes_and_what_they_are_taken_for(snapshot: Snapshot, tmp_path: Path) -> None:
    """Of classes that are never recognised, those with most images come first."""
    rows = sorted(images(snapshot, "test"), key=lambda row: row["class_id"])
    predicted = [0] * 12 + [2] * 5 + [0] * 3 + [0] * 5 + [3] * 4 + [0] * 3
    table: Table = {"key": [row["key"] for row in rows], "label": predicted}
    told = evaluate(snapshot, write(tmp_path / "p.parquet", table))
    assert told.worst(9) == [1, 2, 4, 6, 0, 3]
    assert told.worst(2) == [1, 2]
    assert told.variants[0].confused.tolist() == [-1, 2, 0, -1, 0, -1, 0]
    assert told.variants[0].num_never == 4


def test_a_class_that_is_recognised_once_is_not_never_recognised(snapshot: Snapshot, tmp_path: Path) -> None:
    rows = sorted(images(snapshot, "test"), key=lambda row: row["class_id"])
    table: Table = {"key": [row["key"] for row in rows], "label": [0] + [1] * 31}
    told = evaluate(snapshot, write(tmp_path / "p.parquet", table))
    assert told.variants[0].num_never == 4  # of 6 measured


def test_an_image_that_only_an_impossible_class_claims_is_wrong(snapshot: Snapshot, tmp_path: Path) -> None:
    """Class 6 has no training image: corrected, nothing is left to predict for what is given to it alone."""
    rows = images(snapshot, "test")
    certain = np.eye(K)[[row["class_id"] for row in rows]]
    first = next(place for place, row in enumerate(rows) if row["class_id"] == 0)
    certain[first] = np.eye(K)[6]
    table: Table = {"key": [row["key"] for row in rows], "scores": certain.tolist()}
    given, uniform = evaluate(snapshot, write(tmp_path / "p.parquet", table)).variants
    np.testing.assert_allclose(given.recall, [11 / 12, 1, 1, 1, 1, np.nan, 1])
    np.testing.assert_allclose(uniform.recall, [11 / 12, 1, 1, 1, 1, np.nan, 0])


def test_em_says_whether_it_converged(snapshot: Snapshot, tmp_path: Path) -> None:
    path, _, _ = scored(tmp_path / "p.csv", snapshot, "test")
    notes = evaluate(snapshot, path, priors=["em"]).variants[1].notes
    assert re.match(r"em: (converged|NOT converged.*) after \d+ steps", notes[0])
    assert "em: not checked, as the file has no row of val" in notes[1]


def test_em_starts_from_the_prior_that_the_scores_carry(snapshot: Snapshot, tmp_path: Path) -> None:
    """By the loop of the paper."""
    path, rows, logits = scored(tmp_path / "p.csv", snapshot, "test")
    old = np.array(COUNTS["train"]) / 254
    posterior = np.exp(logits[:, old > 0])
    share = old[old > 0]
    evidence = posterior / share
    for _ in range(200):
        moved = evidence * share
        before, share = share, (moved / moved.sum(1, keepdims=True)).mean(0)
        if np.abs(share - before).max() < 1e-5:
            break
    moved = evidence * share
    truth = np.array([row["class_id"] for row in rows])
    told = evaluate(snapshot, path, priors=["em"]).variants[1]
    place = np.flatnonzero(old > 0)
    right = place[moved.argmax(1)] == truth
    assert told.figures["accuracy"].value == pytest.approx(right.mean())
    error = calibration_error((moved / moved.sum(1, keepdims=True)).max(1), right)
    assert told.figures["calibration error"].value == pytest.approx(error)


def test_power_finds_how_flat_the_images_are_and_moves_scores_there(snapshot: Snapshot, tmp_path: Path) -> None:
    """Of certain scores the likeliest power is that under which log-shares have the mean they have among the labels."""
    rows = images(snapshot, "test")
    counts = np.array(COUNTS["train"])
    rows = [row for row in rows if counts[row["class_id"]]]
    truth = np.array([row["class_id"] for row in rows])
    table: Table = {"key": [row["key"] for row in rows], "scores": (30.0 * np.eye(K)[truth]).tolist()}
    variant = evaluate(snapshot, write(tmp_path / "p.parquet", table), priors=["power"], allow=["missing"]).variants[1]
    found = re.match(r"power: train's shares to the power of (-?[\d.]+) ", variant.notes[0])
    assert found is not None
    log_shares = np.log(counts[counts > 0])
    grid = np.linspace(-1, 2, 3001)
    means = np.array([np.average(log_shares, weights=np.exp(g * log_shares)) for g in grid])
    best = grid[int(np.abs(means - np.log(counts[truth]).mean()).argmin())]
    assert float(found[1]) == pytest.approx(best, abs=0.011)
    assert variant.notes[1] == "power: not checked, as the file has no row of val"
    only_largest = np.tile(30.0 * np.eye(K)[int(counts.argmax())], (len(rows), 1))
    table = {"key": table["key"], "scores": only_largest.tolist()}
    variant = evaluate(snapshot, write(tmp_path / "q.parquet", table), priors=["power"], allow=["missing"]).variants[1]
    assert "2.00 (1: as in train, 0: uniform), an end of where it is looked for" in variant.notes[0]


@pytest.mark.parametrize("is_good", [True, False])
def test_em_is_tried_on_val_whose_shares_are_known(snapshot: Snapshot, tmp_path: Path, is_good: bool) -> None:
    rows = images(snapshot, "test", "val")
    truth = np.array([row["class_id"] for row in rows])
    logits = 9.0 * np.eye(K)[truth if is_good else (truth + 1) % 6]
    path = write(tmp_path / "p.parquet", {"key": [row["key"] for row in rows], "scores": logits.tolist()})
    note = evaluate(snapshot, path, priors=["em"]).variants[1].notes[1]
    found = re.match(r"em: tried on val.* is off by ([\d.]+)% of the images, the shares of train by ([\d.]+)%;", note)
    assert found is not None
    val = np.array(COUNTS["val"]) / 25
    natural = np.abs(np.array(COUNTS["train"]) / 254 - val).sum() / 2
    assert float(found[2]) == pytest.approx(100 * natural, abs=0.06)
    assert (float(found[1]) < 1.5) is is_good


# -- what is wrong with a file ----------------------------------------------------------------------------------------


def broken(snapshot: Snapshot, tmp_path: Path) -> Path:
    """One image without a row, one twice, one NaN, one infinite, two rows of no image."""
    _, rows, logits = scored(tmp_path / "p.csv", snapshot, "test")
    keys = [row["key"] for row in rows]
    logits[3, 2], logits[4, 1] = np.nan, np.inf
    keys = [*keys[1:], keys[5], "0123456789012345", "ffffffffffffffff"]
    logits = np.concatenate([logits[1:], logits[:1], logits[:2]])
    return write(tmp_path / "b.csv", {"key": keys, **{f"class {c}": logits[:, c].tolist() for c in range(K)}})


def test_all_that_is_wrong_is_told_at_once(snapshot: Snapshot, tmp_path: Path) -> None:
    path = broken(snapshot, tmp_path)
    with pytest.raises(EvenshardError) as caught:
        evaluate(snapshot, path)
    told = str(caught.value)
    for part in (
        "2 keys are no image of the snapshot: '0123456789012345', 'ffffffffffffffff'",
        "1 of 32 images have no row:",
        "1 image has a second row; the first counts:",
        "2 rows have NaN, infinity or nothing finite for scores:",
        "--allow duplicate --allow missing --allow nan --allow unknown evaluates what is left",
    ):
        assert part in told
    left = evaluate(snapshot, path, allow=["duplicate", "missing", "nan", "unknown"])
    assert left.num_measured == 29
    assert sum(note.startswith("allowed:") for note in left.notes) == 4
    with pytest.raises(EvenshardError, match="1 of 32 images have no row") as caught:
        evaluate(snapshot, path, allow=["duplicate", "nan", "unknown"])
    assert "second row" not in str(caught.value)


@pytest.mark.parametrize("block", [1, 14, 1 << 20])
@pytest.mark.parametrize("bad", [[np.nan, *[0.0] * 6], [*[0.0] * 6, np.inf], [-np.inf] * 7])
def test_a_row_without_a_usable_score_is_found_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot, tmp_path: Path, block: int, bad: list[float]
) -> None:
    monkeypatch.setattr(predictions, "BLOCK", block)
    rows = images(snapshot, "test")
    for place in (0, 31):
        scores = logits_of(rows).tolist()
        scores[place] = bad
        path = write(tmp_path / "p.parquet", {"key": [row["key"] for row in rows], "scores": scores})
        with pytest.raises(EvenshardError, match=f"1 row has NaN.*scores: '{rows[place]['key']}'"):
            evaluate(snapshot, path)


def test_a_file_of_other_images_is_refused_whatever_is_allowed(snapshot: Snapshot, tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", {"path": ["/data/a.jpg"], "label": ["class 1"]})
    with pytest.raises(EvenshardError, match=r"named as in '\w+/\d/\d+.png'") as caught:
        evaluate(snapshot, path, allow=["missing", "unknown"])
    assert "should be" not in str(caught.value)


@pytest.mark.parametrize("before", ["/data/src/", "./", "C:\\src\\", "s3://bucket/"])
def test_a_path_from_elsewhere_is_told_what_it_should_be(snapshot: Snapshot, tmp_path: Path, before: str) -> None:
    rows = images(snapshot, "test")
    paths = [before + (row["path"].replace("/", "\\") if "\\" in before else row["path"]) for row in rows]
    path = write(tmp_path / "p.csv", {"path": paths, "label": ["class 1"] * len(rows)})
    with pytest.raises(EvenshardError) as caught:
        evaluate(snapshot, path)
    assert f"so {paths[0]!r} should be {rows[0]['path']!r}" in str(caught.value)


def test_a_file_of_another_split_is_told_of_which(snapshot: Snapshot, tmp_path: Path) -> None:
    path, rows, _ = scored(tmp_path / "p.csv", snapshot, "val")
    with pytest.raises(EvenshardError, match=rf"32 of 32 images have no row.*; {len(rows)} rows are of split val"):
        evaluate(snapshot, path)


def test_a_label_that_is_no_class_is_wrong_and_told(snapshot: Snapshot, tmp_path: Path) -> None:
    rows = images(snapshot, "test")
    labels = [f"class {row['class_id']}" for row in rows]
    labels[0] = "klass"
    told = evaluate(snapshot, write(tmp_path / "p.csv", {"key": [row["key"] for row in rows], "label": labels}))
    assert told.variants[0].figures["accuracy"].value == pytest.approx(31 / 32)
    assert any("1 rows hold a label that is no class and counts as wrong: 'klass'" in note for note in told.notes)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"image": ["a"], "label": ["class 1"]}, "expected a column key or path, found 'image', 'label'"),
        ({"key": ["a"], "label": ["class 1"]}, "16 hex digits"),
        ({"key": ["0" * 16]}, "found none"),
        ({"key": ["0" * 16], "label": ["class 1"], "class 0": [1.0]}, "1 columns are neither"),
        ({"key": ["0" * 16], "class 0": [1.0]}, "6 classes with images have no column of scores: 'class 1'"),
        ({"key": ["0" * 16], "scores": [[1.0, 2.0]]}, "must have 7 numbers"),
        ({"key": ["0" * 16, "1" * 16], "scores": [[1.0] * 7, None]}, "1 rows without a value"),
        ({"key": [None], "label": ["class 1"]}, "without a value|is null, expected text"),
        ({"key": [1], "label": ["class 1"]}, "is int64, expected text"),
        ({"key": [], "label": []}, "holds no row"),
    ],
)
def test_a_file_that_is_none_is_told_in_words(snapshot: Snapshot, tmp_path: Path, table: Table, told: str) -> None:
    path = write(tmp_path / "p.parquet", table)
    with pytest.raises(SourceError, match=told):
        evaluate(snapshot, path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe\x00", b"PAR1 no", b"key,label\na\n", b"key,class 0\n1,x\n", b"key,key\n1,2\n"]
)
def test_bytes_that_are_no_table_are_told_in_words(snapshot: Snapshot, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"p\.csv"):
        evaluate(snapshot, path)


def test_what_is_not_there_is_not_found(snapshot: Snapshot, tmp_path: Path) -> None:
    for place in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(NotFoundError, match="name another file"):
            evaluate(snapshot, place)


def test_scores_that_are_neither_are_asked_about(snapshot: Snapshot, tmp_path: Path) -> None:
    path, rows, logits = scored(tmp_path / "p.csv", snapshot, "test")
    with pytest.raises(EvenshardError, match="some lie outside"):
        evaluate(snapshot, path, scores="probabilities")
    columns = {f"class {c}": (1 / (1 + np.exp(-logits[:, c]))).tolist() for c in range(K)}
    sigmoids = write(tmp_path / "s.csv", {"key": [row["key"] for row in rows], **columns})
    with pytest.raises(EvenshardError, match="do not sum to 1: say --scores"):
        evaluate(snapshot, sigmoids)
    assert evaluate(snapshot, sigmoids, scores="probabilities").kind == "probabilities"


def test_one_row_decides_what_all_scores_are(
    monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot, tmp_path: Path
) -> None:
    """The first by key, which is in a block of its own."""
    monkeypatch.setattr(scores, "BLOCK", 1)
    rows = sorted(images(snapshot, "test"), key=lambda row: row["key"])
    certain = np.eye(K)[[row["class_id"] for row in rows]]
    keys = [row["key"] for row in rows]
    for first, told in (([1.5, -0.5, *[0.0] * 5], None), ([0.5, *[0.0] * 6], "do not sum to 1")):
        certain[0] = first
        path = write(tmp_path / "p.parquet", {"key": keys, "scores": certain.tolist()})
        if told is None:
            assert evaluate(snapshot, path).kind == "logits"
        else:
            with pytest.raises(EvenshardError, match=told):
                evaluate(snapshot, path)


def test_keys_of_digits_alone_stay_text(snapshot: Snapshot, tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", {"key": ["0000000000000012", "1234567890123456"], "label": ["1", "2"]})
    given = read_predictions(path, ["a", "b", "c"], np.ones(3, bool))
    assert given.keys.tolist() == [0x12, 0x1234567890123456]
    assert given.labels is not None
    assert given.labels.tolist() == [1, 2]


def test_a_class_may_be_called_like_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", {"key": ["0" * 16], "path": [1.5], "label": [2.5]})
    given = read_predictions(path, ["label", "path"], np.ones(2, bool))
    assert given.scores is not None
    assert given.scores.tolist() == [[2.5, 1.5]]


def test_one_class_is_a_whole_snapshot(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path / "root", {"train": (5,), "val": (0,), "test": (1,)})
    keys = [row["key"] for row in images(snapshot, "test")]
    told = evaluate(snapshot, write(tmp_path / "p.csv", {"key": keys, "class 0": [0.3]}), scores="logits")
    assert told.variants[1].figures["balanced accuracy"].value == 1
    json.dumps(told.to_json(), allow_nan=False)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_tells_text_json_and_a_page(
    snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, _ = scored(tmp_path / "p.csv", snapshot, "test", "val")
    page = tmp_path / "page.html"
    assert call("evaluate", snapshot.root, path, "--prior", "uniform", "--prior", "em", "--page", page) == 0
    told = capsys.readouterr().out
    for part in (
        "balanced accuracy",
        "to uniform",
        "to em",
        "classes measured: 6 of 7",
        "worst classes",
        f"wrote {page}",
    ):
        assert part in told
    assert call("evaluate", snapshot.root, path, "--json") == 0
    body = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    value = body["variants"][0]["figures"]["balanced accuracy"]["value"]
    assert f"{value:.1%}" in told
    html = page.read_text("utf-8")
    assert "default-src &#39;none&#39;" in html
    assert "<script" not in html
    assert "recall, many" in html


def test_exit_codes_follow_the_rule(snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken(snapshot, tmp_path)
    everything = [word for name in ("duplicate", "missing", "nan", "unknown") for word in ("--allow", name)]
    assert call("evaluate", snapshot.root, path) == 1
    assert call("evaluate", snapshot.root, path, *everything) == 0
    assert call("evaluate", snapshot.root, path, *everything, "--page", tmp_path / "none/p.html") == 1
    assert call("evaluate", snapshot.root, path, "--manifest", "balancd") == 1
    assert call("evaluate", snapshot.root, path, "--prior", "flat") == 2
    assert call("evaluate", snapshot.root, path, "--tau", "-1") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_no_name_is_more_than_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes with hostile names, and a hostile label and key in the file."""
    num = len(HOSTILE)
    import tiny_snapshot

    made = tiny_snapshot._classes

    def named(counts: Any) -> pa.Table:
        table = made(counts)
        return table.set_column(1, table.schema.field("name"), pa.array(HOSTILE))

    monkeypatch.setattr(tiny_snapshot, "_classes", named)
    snapshot = write_snapshot(tmp_path / "root", {"train": (3,) * num, "val": (0,) * num, "test": (2,) * num})
    rows = images(snapshot, "test")
    wrong: Table = {"key": [row["key"] for row in rows], "label": [HOSTILE[row["class_id"] - 1] for row in rows]}
    wrong["label"][0] = "\x1b[31m</script><img src=x>"
    page = tmp_path / "page.html"
    assert call("evaluate", snapshot.root, write(tmp_path / "p.parquet", wrong), "--page", page) == 0
    assert OBEYED.search("".join(capsys.readouterr())) is None
    html = page.read_text("utf-8")
    body = html[html.index("<body>") :]
    assert re.search(r"<(script|img|style)", body) is None
    assert OBEYED.search(body) is None
    assert "&lt;script&gt;alert(1)" in body
    logits = np.eye(num)[[row["class_id"] for row in rows]] * 5 - 1
    scores = {"key": wrong["key"], **{name: logits[:, c].tolist() for c, name in enumerate(HOSTILE)}}
    told = evaluate(snapshot, write(tmp_path / "s.csv", scores))
    assert told.variants[0].figures["accuracy"].value == 1


def test_only_the_base_install_is_needed(snapshot: Snapshot, tmp_path: Path) -> None:
    path, _, _ = scored(tmp_path / "p.csv", snapshot, "test", "val")
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'ray', 'scipy', 'sklearn')))\n"
        "from pipeline.cli import main; main()"
    )
    words = ["evaluate", snapshot.root, str(path), "--prior", "em", "--page", str(tmp_path / "page.html")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "balanced accuracy" in done.stdout
