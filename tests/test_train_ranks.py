"""Training under torchrun: 1, 2 and 4 ranks are one training; killed, it goes on with another number of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_TRAINING
from tiny_snapshot import write_snapshot
from train_rank import recipe_of, rows

from pipeline.learn.checkpoints import checkpoints, load_newest
from pipeline.learn.trainer import Step, train
from pipeline.snapshot import Snapshot

TOP = Path(__file__).parents[1]
NUM_STEPS = 52  # 7 epochs of 93 draws and 5 of 115, in steps of 24


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("train"))


def options(snapshot: Snapshot, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "root": snapshot.store.url, "out": str(out), "stages": ["natural:7 -> balanced:5:loss=weighted:lr=0.01"],
        "loss": "balanced-softmax", "model": "small_cnn", "norm": "group", "side": 16, "batch_size": 24, "lr": 0.02,
        "workers": 1, "save_every": 9, "augment": "harder-repeats", **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    """The same training by one process, without torchrun."""
    out, seen = tmp_path_factory.mktemp("alone") / "out", list[Step]()
    train(recipe_of(options(snapshot, out, predictions=True)), observe=seen.append)
    return out, seen


def torchrun(given: dict[str, Any], folder: Path, num_ranks: int, at_step: int = 0, number: int = 0) -> tuple[int, str]:
    """Exit code and output; rank files lie in ``folder``."""
    folder.mkdir(exist_ok=True)
    program = str(TOP / "tests/train_rank.py"), json.dumps(given), str(folder), str(at_step), str(number)
    return launch(folder, num_ranks, program, stderr=subprocess.STDOUT)


def launch(folder: Path, num_ranks: int, program: tuple[str, ...], stderr: int) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    environment = {
        "PYTHONPYCACHEPREFIX": str(folder.parent / "compiled"),
        **os.environ,
        "PYTHONPATH": f"{TOP}{os.pathsep}{TOP / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    job = subprocess.Popen(
        [*command, *program], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, start_new_session=True
    )
    try:
        output = job.communicate(timeout=150)[0]
    finally:
        if job.poll() is None:
            job.terminate()  # it ends its ranks, which are sessions of their own, within thirty seconds
            job.communicate(timeout=60)
    return job.returncode, output


def told(folder: Path, num_ranks: int) -> list[dict[str, Any]]:
    """What all ranks did, step by step: positions of the global batch, and the loss, which is the same on all."""
    parts = [[json.loads(line) for line in (folder / f"{r}.jsonl").read_text().splitlines()] for r in range(num_ranks)]
    steps = list(zip(*parts, strict=False))
    assert all(len({part["loss"] for part in step}) == 1 for step in steps)
    return [{**step[0], "positions": [p for part in step for p in part["positions"]]} for step in steps]


def weights(out: Path) -> torch.Tensor:
    held = torch.load(out / "model.pt", weights_only=True)["state_dict"]
    return torch.cat([tensor.flatten() for tensor in held.values()])


def draws(steps: list[dict[str, Any]]) -> dict[int, list[int]]:
    return {stage: [p for s in steps if s["stage"] == stage for p in s["positions"]] for stage in (0, 1)}


WHOLE = {0: list(range(28 * 24)), 1: list(range(24 * 24))}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_number_of_ranks_is_one_training(
    num_ranks: int, snapshot: Snapshot, alone: tuple[Path, list[Step]], tmp_path: Path
) -> None:
    out, seen = alone
    code, output = torchrun(options(snapshot, tmp_path / "out"), tmp_path / "ranks", num_ranks)
    assert code == 0, output
    steps = told(tmp_path / "ranks", num_ranks)
    assert len(steps) == len(seen) == NUM_STEPS
    assert draws(steps) == WHOLE
    assert max(abs(one["loss"] - other.loss) for one, other in zip(steps, seen, strict=True)) < 1e-4
    assert float((weights(tmp_path / "out") - weights(out)).abs().max()) < 1e-4
    mine, theirs = (json.loads((where / "summary.json").read_text()) for where in (tmp_path / "out", out))
    assert (mine["ranks"], theirs["ranks"]) == (num_ranks, 1)
    assert mine["worst"] == theirs["worst"]


@pytest.fixture(scope="module")
def sets_alone(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    out, seen = tmp_path_factory.mktemp("sets_alone") / "out", list[Step]()
    train(recipe_of(options(snapshot, out, **SETS)), observe=seen.append)
    return out, seen


SETS: dict[str, Any] = {
    "stages": [f"natural:1:loss={loss}" for loss in ("auc", "kappa", "quadratic-kappa")],
    "augment": "crop",
}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_losses_that_are_no_means_are_of_the_global_batch(
    num_ranks: int, snapshot: Snapshot, sets_alone: tuple[Path, list[Step]], tmp_path: Path
) -> None:
    out, seen = sets_alone
    code, output = torchrun(options(snapshot, tmp_path / "out", **SETS), tmp_path / "ranks", num_ranks)
    assert code == 0, output
    losses = [one["loss"] for one in told(tmp_path / "ranks", num_ranks)]
    np.testing.assert_allclose(losses, [one.loss for one in seen], rtol=0, atol=1e-4)
    assert len(losses) == 12
    assert float((weights(tmp_path / "out") - weights(out)).abs().max()) < 1e-4


def test_killed_it_goes_on_with_other_ranks_and_every_draw_counts_once(
    snapshot: Snapshot, alone: tuple[Path, list[Step]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, output = torchrun(options(snapshot, out), tmp_path / "first", 2, at_step=34)
    assert code != 0, output
    assert not (out / "model.pt").exists()
    state = load_newest(out, print)
    assert state is not None
    begun = state["progress"]["num_steps"]
    assert (state["progress"]["stage"], begun) == (1, 28)  # after the first stage; 27 was the last multiple of 9 before
    code, output = torchrun(options(snapshot, out, resume=True, predictions=True), tmp_path / "second", 3)
    assert code == 0, output
    first, second = told(tmp_path / "first", 2), told(tmp_path / "second", 3)
    assert [one["step"] for one in second] == list(range(begun + 1, NUM_STEPS + 1))
    assert draws([*first[:begun], *second]) == WHOLE
    assert float((weights(out) - weights(alone[0])).abs().max()) < 1e-4
    # Three ranks of eight meet eleven test images: each is counted once, and as by one rank.
    by_three = json.loads((tmp_path / "second/rows.json").read_text())
    assert sorted(by_three) == sorted(rows(recipe_of(options(snapshot, out))))
    assert len(by_three) == 11
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stages"][1]["scores"]["as_it_is"]["num_images"] == 11
    mine, theirs = (pq.read_table(where / "predictions.parquet") for where in (out, alone[0]))
    assert mine["key"].equals(theirs["key"])
    assert mine.num_rows == 11
    scores = [np.array(table["scores"].to_pylist()) for table in (mine, theirs)]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-4)


def test_a_signal_to_one_rank_stops_all_at_one_step_with_a_checkpoint(snapshot: Snapshot, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, output = torchrun(options(snapshot, out), tmp_path / "ranks", 2, at_step=31, number=signal.SIGTERM)
    assert code != 0
    assert "exitcode  : 130" in output, output
    state = load_newest(out, print)
    assert state is not None
    # Noted in step 31, told to all ranks in step 32.
    assert (state["progress"]["num_steps"], state["progress"]["loader"]["consumed"]) == (32, 4 * 24)
    assert [len((tmp_path / f"ranks/{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)] == [32, 32]
    assert len(checkpoints(out)) == 2


def test_the_job_under_torchrun_speaks_once(snapshot: Snapshot, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        "-m",
        "jobs.train",
        snapshot.store.url,
        "--stage",
        "natural:1",
        "--out",
        str(out),
        *TINY_TRAINING,
        "--json",
    )
    code, output = launch(tmp_path, 2, words, stderr=subprocess.DEVNULL)
    assert code == 0
    assert json.loads(output) == json.loads((out / "summary.json").read_text())
    assert json.loads(output)["ranks"] == 2
    assert (out / "index.html").exists()


def test_of_ranks_that_end_with_another_only_that_one_has_a_reason(snapshot: Snapshot, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    words = ("-m", "jobs.train", snapshot.store.url, "--stage", "natural:1", "--out", str(out), *TINY_TRAINING)
    code, output = launch(tmp_path, 2, words, stderr=subprocess.STDOUT)
    assert code == 1
    assert "holds other files" in output
    assert "fault of evenshard" not in output
    if "error: rank" in output:  # torchrun may have ended it before
        assert "error: rank 1 ends, as another rank is gone: its message says why" in output
