"""A batch that does not come is an error that names rank, stage and shards, and loses nothing."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_proxy import Plan, directory_server, proxy
from tiny_snapshot import write_snapshot

from pipeline.errors import StalledError, UsageError
from pipeline.snapshot import Snapshot, open_snapshot
from pipeline.stream.loader import EvaluationLoader, Loader
from pipeline.stream.prefetch import Patience, Prefetch
from pipeline.stream.transforms import Draw


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("stalls"))


class HangsAt:
    """A transform that waits at one position until it is released."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.released = threading.Event()

    def __call__(self, image: torch.Tensor, draw: Draw) -> torch.Tensor:
        if draw.position == self.position:
            self.released.wait(60)
        return image[:, :1, :1]


@pytest.fixture
def hangs() -> Iterator[HangsAt]:
    transform = HangsAt(33)  # of the second step of 20, in the slice of rank 1
    yield transform
    transform.released.set()


def test_a_transform_that_hangs_is_named_with_rank_and_shards_and_no_batch_is_lost(
    snapshot: Snapshot, hangs: HangsAt
) -> None:
    options: dict[str, Any] = {"rank": 1, "world_size": 2, "details": True}
    batches = iter(Loader(snapshot.manifest("natural"), 10, transform=hangs, workers=2, timeout_s=0.3, **options))
    seen = [next(batches)[2].positions.tolist()]
    message = (
        r"no batch came for 0.3 s: in the transform \(.*threading.py:\d+ in wait\); rank 1 of 2 needs positions 30 to "
        r"39, from shards/[0-9a-f]{2}/[0-9a-f]{64}.tar, .*timeout_s"
    )
    for _ in range(2):
        with pytest.raises(StalledError, match=message):
            next(batches)
    hangs.released.set()
    seen += [details.positions.tolist() for _, _, details in batches]
    plain = Loader(snapshot.manifest("natural"), 10, transform=hangs, **options)
    assert seen == [details.positions.tolist() for _, _, details in plain]


def test_an_evaluation_that_hangs_is_named(snapshot: Snapshot, hangs: HangsAt) -> None:
    hangs.position = 7
    batches = iter(EvaluationLoader(snapshot, "test", 4, transform=hangs, workers=1, timeout_s=0.3))
    next(batches)
    with pytest.raises(StalledError, match=r"in the transform .*rank 0 of 1 needs positions 4 to 7, from shards/"):
        next(batches)


def test_storage_that_hangs_is_named(snapshot: Snapshot, tmp_path: Path) -> None:
    root = snapshot.store.root
    with (
        directory_server(root) as upstream,
        proxy(upstream, Plan(1, kinds=("stall",), matching="/shards/")) as (url, _),
    ):
        remote = open_snapshot(url).manifest("natural")
        cache: dict[str, Any] = {"cache_dir": tmp_path / "cache", "cache_bytes": 1 << 20}
        batches = iter(Loader(remote, 10, decode=False, workers=1, timeout_s=1.0, **cache))
        with pytest.raises(StalledError, match=r"no batch came for 1 s: reading from storage .*rank 0 of 1 needs"):
            next(batches)
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_download_that_another_process_does_not_end_is_named(snapshot: Snapshot, tmp_path: Path) -> None:
    with directory_server(snapshot.store.root) as url:
        remote = open_snapshot(url).manifest("natural")
        loader = Loader(remote, 10, decode=False, workers=1, timeout_s=0.5, cache_dir=tmp_path, cache_bytes=1 << 20)
        batches = iter(loader)
        with ExitStack() as held:
            for sha256 in snapshot.shards["tar_sha256"].to_pylist():
                fcntl.flock(held.enter_context(open(tmp_path / "locks" / sha256, "w")), fcntl.LOCK_EX)
            with pytest.raises(StalledError, match=r"reading from storage.*rank 0 of 1 needs positions 0 to 9"):
                next(batches)
        assert len(next(batches)[0]) == 10


def test_a_timeout_of_the_work_itself_is_not_a_stall() -> None:
    def fails(number: int) -> int:
        raise TimeoutError(f"of {number}")

    results = Prefetch(fails, range(3), threads=1, ahead=1, patience=Patience(timeout_s=20, describe=str))
    with pytest.raises(TimeoutError, match="of 0"):
        next(results)


def test_a_description_that_hangs_or_fails_hides_no_stall() -> None:
    released = threading.Event()
    for describe, told in ((lambda _: str(released.wait(60)), "hangs, too"), (lambda _: str(1 // 0), "ZeroDivision")):
        patience = Patience(timeout_s=0.1, describe=describe)
        results = Prefetch(lambda _: released.wait(60), range(1), threads=1, ahead=1, patience=patience)
        with pytest.raises(StalledError, match=told):
            next(results)
        results.close()
    released.set()


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(snapshot: Snapshot, timeout_s: float) -> None:
    with pytest.raises(UsageError, match=r"timeout_s must be a number of seconds above 0, or None"):
        Loader(snapshot.manifest("natural"), 10, timeout_s=timeout_s)
    with pytest.raises(UsageError, match=r"timeout_s must be"):
        EvaluationLoader(snapshot, timeout_s=timeout_s)


def test_none_waits(snapshot: Snapshot) -> None:
    loader = Loader(snapshot.manifest("natural"), 10, decode=False, workers=1, timeout_s=None)
    assert len(list(loader)) == len(list(Loader(snapshot.manifest("natural"), 10, decode=False)))
