"""Metrics of three ranks are those of one, to the bit; losses over a global batch have the gradient of one rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_snapshot import COUNTS, write_snapshot

from pipeline.errors import UsageError
from pipeline.learn.gather import Gather
from pipeline.stream.loader import EvaluationLoader
from pipeline.stream.transforms import ResizeCenterCrop

TOP = Path(__file__).parents[1]
NUM_TEST = sum(COUNTS["test"])


def run_ranks(root: Path, folder: Path, ranks: int, batch: int) -> list[dict[str, Any]]:
    """What each rank found."""
    folder.mkdir()
    outs = [folder / f"{rank}.json" for rank in range(ranks)]
    words = [
        [str(root), str(rank), str(ranks), str(folder / "group"), str(batch), str(out)] for rank, out in enumerate(outs)
    ]
    started = [
        subprocess.Popen([sys.executable, "tests/metric_ranks.py", *line], cwd=TOP, stderr=subprocess.PIPE, text=True)
        for line in words
    ]
    problems = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, problems
    return [json.loads(out.read_text()) for out in outs]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    write_snapshot(folder / "root")
    return {ranks: run_ranks(folder / "root", folder / f"{ranks}", ranks, 12 // ranks - 1) for ranks in (1, 3)}


def test_three_ranks_find_what_one_finds(found: dict[int, list[dict[str, Any]]]) -> None:
    """11 images in steps of 11 and of 3 x 3: on three ranks the last step is filled up, on one it is not."""
    (alone,) = found[1]
    assert NUM_TEST == 11
    assert (alone["num_masked"], sum(rank["num_masked"] for rank in found[3])) == (0, 7)
    assert len(alone["labels"]) == NUM_TEST
    for rank in found[3]:
        assert rank["labels"] == alone["labels"]
        assert rank["scores"] == alone["scores"]
        np.testing.assert_array_equal(rank["figures"], alone["figures"])
    assert sum(np.isfinite(alone["figures"])) > 20


def test_losses_over_the_global_batch_have_the_gradient_of_one_rank(found: dict[int, list[dict[str, Any]]]) -> None:
    """Though one of three ranks has 1 image and one has 7."""
    for rank in found[3]:
        np.testing.assert_allclose(rank["gradients"], found[1][0]["gradients"], atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 3])
def test_keys_name_the_rows_of_each_rank(ranks: int, tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path / "root")
    index = [row for shard in range(snapshot.shards.num_rows) for row in snapshot.index(shard).to_pylist()]
    class_of = {row["key"]: row["class_id"] for row in index if row["split"] == "test"}
    named: list[str] = []
    for rank in range(ranks):
        loader = EvaluationLoader(snapshot, "test", 2, transform=ResizeCenterCrop(8), rank=rank, world_size=ranks)
        labels = torch.cat([labels[mask] for _, labels, mask in loader]).tolist()
        keys = loader.sample_keys()
        assert [class_of[key] for key in keys] == labels
        named += keys
    assert sorted(named) == sorted(class_of)


def test_rows_that_only_fill_a_step_are_left_out() -> None:
    gather = Gather()
    gather.update(torch.tensor([[9.0, 9.0], [2.0, 3.0]]), torch.tensor([1, 0]), torch.tensor([False, True]))
    gather.update(torch.tensor([[4.0, 5.0], [0.0, 1.0]]).bfloat16(), torch.tensor([1, 1]))
    scores, labels = gather.result()
    assert scores.tolist() == [[2, 3], [4, 5], [0, 1]]
    assert labels.tolist() == [0, 1, 1]
    assert scores.dtype == np.float32


def test_nothing_and_what_does_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="never called"):
        Gather().result()
    with pytest.raises(UsageError, match="expected logits"):
        Gather().update(torch.zeros(2, 3), torch.zeros(3))
