"""torchrun with four gloo ranks: disjoint and exact slices, equal steps; a rank that dies ends all, by name."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_snapshot import write_snapshot

from pipeline.snapshot import Snapshot

RANKS = 4
TOP = Path(__file__).parents[1]

TRAINS = """
import json, os, sys, time
from pathlib import Path

import torch

import pipeline

root, out, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
endless = mode != "short"
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()


def transform(image, draw):
    if rank == 2 and draw.position >= 60 and mode == "raises":
        raise ZeroDivisionError("a fault of the transform")
    if rank == 2 and draw.position >= 60 and mode == "hangs":
        (out / "began").touch()
        time.sleep(3600)
    return image[:, :8, :8].float() / 255


loader = pipeline.Loader(
    pipeline.open_snapshot(root).manifest("balanced"),
    batch_size=6,
    transform=transform,
    workers=1,
    details=True,
    timeout_s=3 if mode == "hangs" else 300,
)
network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 6))
model = torch.nn.parallel.DistributedDataParallel(network)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
steps = []
while loader.epoch < 2 or endless:
    for images, labels, details in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        steps.append(details.positions.tolist())
        if len(steps) == 3:
            (out / f"{rank}.pid").write_text(str(os.getpid()))
weight = sum(p.double().sum().item() for p in model.parameters())
(out / f"{rank}.json").write_text(json.dumps({"steps": steps, "state": loader.state_dict(), "weight": weight}))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("torchrun"))


def torchrun(snapshot: Snapshot, folder: Path, length: str) -> subprocess.Popen[str]:
    """Its own process group, so that whatever it leaves can be ended."""
    (folder / "trains.py").write_text(TRAINS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = {
        "PYTHONPYCACHEPREFIX": str(folder.parent / "compiled"),
        **os.environ,
        "PYTHONPATH": str(TOP),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # else each rank compiles torch, where nothing compiled may be kept
    }
    return subprocess.Popen(
        [*command, str(folder / "trains.py"), snapshot.store.url, str(folder), length],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(job: subprocess.Popen[str], within_s: float) -> str:
    """What it printed; it must end by itself, else it is ended and this fails."""
    try:
        return job.communicate(timeout=within_s)[0]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()


def test_four_ranks_train_on_disjoint_and_exact_slices_in_equal_steps(snapshot: Snapshot, tmp_path: Path) -> None:
    job = torchrun(snapshot, tmp_path, "short")
    output = finish(job, within_s=300)
    assert job.returncode == 0, output
    ranks: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    steps = [[p for part in step for p in part] for step in zip(*(rank["steps"] for rank in ranks), strict=True)]
    assert [p for step in steps for p in step] == list(range(240))  # two epochs of 115, in steps of 24
    assert {len(rank["steps"]) for rank in ranks} == {10}
    assert all(rank["state"] == ranks[0]["state"] and rank["state"]["consumed"] == 240 for rank in ranks)
    assert len({rank["weight"] for rank in ranks}) == 1


def test_a_killed_rank_ends_all_in_ten_seconds_and_is_named(snapshot: Snapshot, tmp_path: Path) -> None:
    job = torchrun(snapshot, tmp_path, "endless")
    pids = [tmp_path / f"{rank}.pid" for rank in range(RANKS)]
    try:
        until(lambda: all(path.exists() and path.read_text() for path in pids) or job.poll() is not None, within_s=300)
        victim = int(pids[2].read_text())
        os.kill(victim, signal.SIGKILL)
        output = finish(job, within_s=10)  # the promise, not a measurement: without an end this would be a hang
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
    assert job.returncode != 0
    assert re.search(rf"rank\s*: 2 \(local_rank: 2\)\s+exitcode\s*: -9 \(pid: {victim}\)", output), output
    until(lambda: not any(alive(int(path.read_text())) for path in pids), within_s=10)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("raises", r"ZeroDivisionError: a fault of the transform\n.*in the transform of image [0-9a-f]{16}"),
        ("hangs", r"StalledError: no batch came for 3 s: in the transform .*rank 2 of 4 needs positions \d+ to \d+"),
    ],
)
def test_a_rank_whose_transform_fails_or_hangs_ends_all_and_says_why(
    snapshot: Snapshot, tmp_path: Path, mode: str, message: str
) -> None:
    output = finish(job := torchrun(snapshot, tmp_path, mode), within_s=300)
    assert job.returncode != 0
    assert re.search(message, output), output
    assert re.search(r"rank\s*: 2 \(local_rank: 2\)\s+exitcode\s*: 1 ", output), output


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition: Any, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.05)
