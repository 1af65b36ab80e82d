"""E6 on a grid: from 128 random stops of each of 9 topologies, the exact rest of the sequence on another.

1,152 resumes, each of all ranks. A topology here is (ranks, batch per rank): the global batch changes with it. Ranks 1
to 8, workers 0 to 3.
"""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
from tiny_snapshot import write_snapshot

from pipeline.snapshot import Snapshot
from pipeline.stream.loader import Loader

TOPOLOGIES = [(1, 64), (2, 16), (3, 25), (4, 8), (5, 13), (6, 11), (7, 9), (8, 5), (8, 16)]
NUM_STOPS = 128
NUM_EPOCHS = 3  # that stops lie in
SEED = 3

Row = tuple[int, int, str, bytes]  # position, label, key, the image's bytes


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("grid"), policies={"balanced": "balanced:per_class=35"})  # 175 draws


@pytest.fixture(scope="module")
def sequence(snapshot: Snapshot) -> list[Row]:
    """The draws themselves, one by one, of all epochs that are looked at."""
    loader = loader_of(snapshot, rank=0, ranks=1, batch_size=1, workers=0)
    return [row for _ in range(NUM_EPOCHS + 2) for batch in loader for row in rows_of(batch)]


@cache  # a state is all that passes from one topology to the next, so loaders may serve again
def loader_of(snapshot: Snapshot, *, rank: int, ranks: int, batch_size: int, workers: int) -> Loader:
    return Loader(
        snapshot.manifest("balanced"),
        batch_size,
        seed=SEED,
        rank=rank,
        world_size=ranks,
        workers=workers,
        decode=False,
        details=True,
    )


def rows_of(batch: tuple[Any, ...]) -> list[Row]:
    images, labels, details = batch
    return list(zip(details.positions.tolist(), labels.tolist(), details.keys, images, strict=True))


def states_on_the_way(snapshot: Snapshot, ranks: int, batch_size: int) -> list[dict[str, Any]]:
    """The state before each step, which every rank must tell alike."""
    loaders = [loader_of(snapshot, rank=r, ranks=ranks, batch_size=batch_size, workers=r % 4) for r in range(ranks)]
    states: list[list[dict[str, Any]]] = []
    for loader in loaders:
        loader.load_state_dict({**loader.state_dict(), "consumed": 0})
        states.append([loader.state_dict()])
        states[-1] += [loader.state_dict() for _ in range(NUM_EPOCHS) for _ in loader]
    assert all(found == states[0] for found in states)
    return states[0]


def rest_after(snapshot: Snapshot, state: str, ranks: int, batch_size: int, workers: int) -> list[Row]:
    """The rest of the epoch, over all ranks, in the order of the sequence."""
    per_rank: list[list[list[Row]]] = []
    for rank in range(ranks):
        loader = loader_of(snapshot, rank=rank, ranks=ranks, batch_size=batch_size, workers=workers)
        loader.load_state_dict(json.loads(state))
        per_rank.append([rows_of(batch) for batch in loader])
    return [row for step in zip(*per_rank, strict=True) for part in step for row in part]


@pytest.mark.parametrize(("ranks", "batch_size"), TOPOLOGIES)
def test_the_rest_is_exact_after_128_stops_on_another_topology(
    snapshot: Snapshot, sequence: list[Row], ranks: int, batch_size: int
) -> None:
    dice = random.Random(100 * ranks + batch_size)
    states = states_on_the_way(snapshot, ranks, batch_size)
    others = [topology for topology in TOPOLOGIES if topology != (ranks, batch_size)]
    epoch_ends = range(175, 175 * (NUM_EPOCHS + 2), 175)
    for _ in range(NUM_STOPS):
        state = dice.choice(states)
        stop, (other_ranks, other_size) = state["consumed"], dice.choice(others)
        rest = rest_after(snapshot, json.dumps(state), other_ranks, other_size, workers=dice.randint(0, 3))
        end = next(end for end in epoch_ends if end > stop)
        assert end - stop <= len(rest) < end - stop + other_ranks * other_size
        assert rest == sequence[stop : stop + len(rest)]
