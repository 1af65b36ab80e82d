"""The predictions that a training leaves are those that it was measured by, and `evenshard evaluate` reads them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_TRAINING
from serial_engine import serial_engine
from tiny_snapshot import COUNTS, write_snapshot

from pipeline.cli import cli, run
from pipeline.errors import NotFoundError, StoreError
from pipeline.learn import predicting
from pipeline.learn.recipe import Recipe, parse_stages
from pipeline.learn.trainer import train
from pipeline.snapshot import Snapshot

__all__ = ["serial_engine"]

BOTH = {**COUNTS, "val": (4, 2, 1, 2, 0, 0)}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("predicting"), BOTH)


def recipe(snapshot: Snapshot, out: Path, stages: str = "natural:1", **more: Any) -> Recipe:
    small: dict[str, Any] = {"model": "small_cnn", "side": 16, "batch_size": 8, "workers": 1, "lr": 0.05}
    return Recipe(root=snapshot.store.url, out=str(out), stages=parse_stages([stages]), **{**small, **more})


def call(*words: object) -> int:
    return run(cli, [str(word) for word in words])


def keys_of(snapshot: Snapshot, split: str) -> set[str]:
    indexes = [snapshot.index(shard) for shard in range(snapshot.shards.num_rows)]
    return {row["key"] for index in indexes for row in index.to_pylist() if row["split"] == split}


@pytest.mark.usefixtures("serial_engine")
@pytest.mark.parametrize("loss", ["balanced-softmax", "weighted", "focal"])
def test_evaluate_finds_what_the_training_told(
    loss: str, tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the very command that the training names at its end, before and after correction."""
    root, out = tmp_path / "a root", tmp_path / "out"
    assert call("build", tiny_images, root, "--quiet") == 0
    words = ("train", root, "--stage", "natural:3", "--stage", "balanced:1", "--loss", loss, *TINY_TRAINING)
    assert call(*words, "--out", out, "--split", "test", "--predictions", "--quiet") == 0
    closing = capsys.readouterr().out
    command = re.search(r"^next +evenshard (evaluate .*)$", closing, re.MULTILINE)
    assert command is not None, closing
    assert ("do not correct them" in closing) == (loss == "focal")
    assert call(*shlex.split(command[1]), "--json") == 0
    told, expected = json.loads(capsys.readouterr().out), json.loads((out / "summary.json").read_text())
    scores = expected["stages"][-1]["scores"]
    assert [one["name"] for one in told["variants"]] == ["as given", *(["uniform"] if loss != "focal" else [])]
    assert told["kind"] == "logits"
    for one, kind in zip(told["variants"], scores, strict=True):
        for name, here in (("accuracy", "accuracy"), ("balanced accuracy", "balanced_accuracy")):
            assert one["figures"][name]["value"] == pytest.approx(scores[kind][here])
        recall = [row["recall"][one["name"]] for row in told["classes"]]
        assert recall == pytest.approx([row[kind] for row in expected["classes"]])
    assert "no thresholds" not in " ".join(told["notes"]), "val is in the file, too"


def test_every_image_of_val_and_test_once_in_row_groups(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "GROUP_BYTES", 6 * 4 * 5)  # five rows of six classes
    train(recipe(snapshot, tmp_path / "out", batch_size=4, predictions=True))
    file = pq.ParquetFile(tmp_path / "out/predictions.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [8, 5, 7]  # of steps of four
    keys = file.read()["key"].to_pylist()
    val, test = keys_of(snapshot, "val"), keys_of(snapshot, "test")
    assert (set(keys[:9]), set(keys[9:]), len(keys)) == (val, test, 20)
    assert np.isfinite(np.array(file.read()["scores"].to_pylist())).all()


def test_a_training_that_has_ended_writes_them_when_resumed(snapshot: Snapshot, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    train(recipe(snapshot, one, "natural:1 -> balanced:0:tau=0.5"))
    assert not (one / "predictions.parquet").exists()
    train(recipe(snapshot, one, "natural:1 -> balanced:0:tau=0.5", resume=True, predictions=True))
    train(recipe(snapshot, other, "natural:1 -> balanced:0:tau=0.5", predictions=True))
    assert (one / "predictions.parquet").read_bytes() == (other / "predictions.parquet").read_bytes()


@pytest.mark.parametrize(
    ("stages", "options"),
    [
        ("balanced:1 -> natural:1", "--manifest natural"),
        ("natural:1 -> balanced:1:loss=residual", "--manifest balanced --weights residual"),
        ("natural:1:loss=effective-number", "--manifest natural --weights effective_number"),
        ("natural:1:loss=balanced-softmax", "--manifest natural --tau 1"),
        ("natural:1:loss=focal", "--manifest natural --prior none"),
        ("natural:1 -> balanced:0:tau=1", "--manifest balanced --prior none"),
    ],
)
def test_evaluate_is_told_of_the_last_stage(snapshot: Snapshot, tmp_path: Path, stages: str, options: str) -> None:
    found = predicting.evaluate_options(snapshot, recipe(snapshot, tmp_path, stages))
    assert " ".join(found) == f"--at 1 --scores logits {options}"


def test_a_split_other_than_test_is_named(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path, {**BOTH, "test": (0,) * 6})
    assert "--split val" in " ".join(predicting.evaluate_options(snapshot, recipe(snapshot, tmp_path)))


def test_without_an_image_to_predict_nothing_is_begun(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path / "root", {**COUNTS, "test": (0,) * 6})
    with pytest.raises(NotFoundError, match="nothing could be measured: build it with a test split"):
        train(recipe(snapshot, tmp_path / "out"))
    with pytest.raises(NotFoundError, match="nothing could be predicted"):
        train(recipe(snapshot, tmp_path / "out", split="train", predictions=True))
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_leaves_no_half_file(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(StoreError, match="No space left"):
        train(recipe(snapshot, tmp_path, predictions=True, resume=True))
    assert torch.load(tmp_path / "model.pt", weights_only=True)["model"] == "small_cnn"
    assert not [path.name for path in tmp_path.iterdir() if "predictions" in path.name or ".part" in path.name]
