"""Steps planned together: every step belongs to one plan, and no batch depends on which plan made it, or when."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import IntegrityError
from pipeline.schema import tar_path
from pipeline.snapshot import Snapshot
from pipeline.store import OPEN_FILES, ShardReader, Store
from pipeline.stream import drawn
from pipeline.stream.drawn import planned_steps
from pipeline.stream.loader import Loader
from tests.tiny_snapshot import write_snapshot


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("drawn"))


@pytest.mark.parametrize("at_most", [1, 2, 3, 5, 8, 64, 100])
def test_plans_cover_every_step_once_and_grow_to_their_bound(at_most: int) -> None:
    assert planned_steps(0, at_most) == (0, 1)
    step = size = 0
    while step < 1000:
        begin, end = planned_steps(step, at_most)
        assert begin == step
        assert size <= end - begin <= at_most
        assert {planned_steps(inside, at_most) for inside in range(begin, end)} == {(begin, end)}
        step, size = end, end - begin
    assert 2 * size > at_most


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 1), (4, 3)])
@pytest.mark.parametrize("planned_rows", [1, 8, 64])
def test_batches_do_not_depend_on_what_was_planned_with_them(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, batch_size: int, world_size: int, planned_rows: int
) -> None:
    def keys(rows: int) -> list[tuple[list[str], list[int], list[int]]]:
        monkeypatch.setattr(drawn, "PLANNED_ROWS", rows)
        loader = Loader(
            snapshot.manifest("balanced"),
            batch_size,
            rank=world_size - 1,
            world_size=world_size,
            decode=False,
            details=True,
        )
        return [(d.keys, d.positions.tolist(), d.repeats.tolist()) for _ in range(2) for _, _, d in loader]

    assert keys(planned_rows) == keys(1)


def test_steps_asked_for_in_any_order_by_any_thread_are_the_same(snapshot: Snapshot) -> None:
    loader = Loader(snapshot.manifest("natural"), 1, decode=False, details=True)
    batches = drawn.DrawnBatches(loader._recipe, loader._reader, None, range(0, 93, 1))
    expected = [batches.batch(start).batch[0] for start in range(93)]
    mixed = random.Random(0).sample(range(93), 93)
    again = drawn.DrawnBatches(loader._recipe, loader._reader, None, range(0, 93, 1))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: again.batch(start).batch[0], mixed))
    assert found == [expected[start] for start in mixed]


def test_reading_more_shards_than_stay_open_reads_the_same(snapshot: Snapshot) -> None:
    samples = snapshot.samples("train")
    tars = [tar_path(sha) for sha in snapshot.shards["tar_sha256"].to_pylist()]
    columns = zip(
        *(samples.slice(name, 0, samples.num_rows).tolist() for name in ("shard", "offset", "size")), strict=True
    )
    requests = [(tars[shard], offset, size) for shard, offset, size in columns]
    assert len({request[0] for request in requests}) > 3
    few, many = ShardReader(snapshot.store, max_open=2), ShardReader(snapshot.store, max_open=OPEN_FILES)
    assert few.read_many(requests) == many.read_many(requests)
    for start in range(0, len(requests), 2):  # each opens another shard than the one before, and closes one
        assert few.read_many(requests[start : start + 2]) == many.read_many(requests[start : start + 2])
    assert len(few._open) <= 2
    assert few.read_many([]) == []


def test_a_shard_cut_short_is_named(snapshot: Snapshot, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(bytes(100))
    reader = ShardReader(Store.open(tmp_path))
    with pytest.raises(IntegrityError, match=r"shards/a\.tar.* is cut short: expected 60 bytes at offset 50, found 50"):
        reader.read_many([("shards/a.tar", 0, 60), ("shards/a.tar", 50, 60)])
