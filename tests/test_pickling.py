"""Loaders are pickled with their state and without their threads; iterators refuse in words."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Iterator
from multiprocessing.pool import Pool
from typing import Any

import pytest
import torch
from tiny_snapshot import write_snapshot

from pipeline.errors import UsageError
from pipeline.snapshot import Snapshot
from pipeline.stream.loader import EvaluationLoader, Loader
from pipeline.stream.transforms import Draw


def stamped(image: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Who the image is, and the randomness of its draw."""
    return torch.cat([image[:, 0, 0].long(), torch.tensor([draw.key % 2**31, draw.position])])[:, None, None]


def values(batches: Any) -> list[Any]:
    return [[images.flatten(1).tolist(), labels.tolist()] for images, labels, *_ in batches]


def two_epochs(loader: Loader) -> list[Any]:
    """The rest of this epoch, and the next one."""
    return [values(loader), values(loader), loader.state_dict()]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("pickling"))


@pytest.fixture(scope="module")
def spawned() -> Iterator[Pool]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


def loader_of(snapshot: Snapshot, workers: int) -> Loader:
    return Loader(
        snapshot.manifest("balanced"),
        10,
        transform=stamped,
        seed=5,
        rank=1,
        world_size=2,
        workers=workers,
        details=True,
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_spawned_process_goes_on_where_the_loader_stands(
    snapshot: Snapshot, spawned: Pool, workers: int, num_steps: int
) -> None:
    loader = loader_of(snapshot, workers)
    batches = iter(loader)
    for _ in range(num_steps):
        next(batches)
    found = spawned.apply(two_epochs, (loader,))
    again = loader_of(snapshot, 0)
    again.load_state_dict(loader.state_dict())
    assert found == two_epochs(again)
    assert len(values(batches)) == len(found[0])  # this one was not disturbed


def test_a_loader_at_the_start_of_a_chosen_epoch_stays_there(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, 0)
    loader.set_epoch(3)
    assert pickle.loads(pickle.dumps(loader)).epoch == 3
    assert values(copy.deepcopy(loader)) == values(loader)


def test_an_evaluation_loader_goes_to_a_spawned_process(snapshot: Snapshot, spawned: Pool) -> None:
    loader = EvaluationLoader(snapshot, "test", 3, transform=stamped, rank=1, world_size=2, workers=2)
    assert spawned.apply(values, (loader,)) == values(loader)


def test_what_was_replaced_is_remembered(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, 0)
    loader.num_replaced = 7
    assert pickle.loads(pickle.dumps(loader)).num_replaced == 7


def test_iterators_are_refused_in_words(snapshot: Snapshot) -> None:
    for loader in (loader_of(snapshot, 2), EvaluationLoader(snapshot, "test", 3, workers=2)):
        batches = iter(loader)
        with pytest.raises(UsageError, match=r"cannot be pickled, as its threads cannot: pickle the [Ll]oader instead"):
            pickle.dumps(batches)
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]
