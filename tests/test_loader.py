"""The loader's laws: E1 exact epochs, E5 free of topology, E6 resume anywhere, R1 checked; and its manners."""

from __future__ import annotations

import gc
import json
import math
import random
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_snapshot import COUNTS, identity, write_snapshot
from torchvision.transforms import v2

import pipeline
from pipeline.errors import IntegrityError, StateError, UsageError
from pipeline.images import ImageRejected, decode_crop
from pipeline.schema import Reason, index_path, table_path, tar_path
from pipeline.snapshot import Snapshot
from pipeline.stream import batches
from pipeline.stream.drawn import Details
from pipeline.stream.loader import EvaluationLoader, Loader, Topology
from pipeline.stream.prefetch import Prefetch
from pipeline.stream.transforms import Draw, RandomResizedCropFlip

TOPOLOGIES = [(1, 0), (1, 2), (2, 2), (3, 1), (7, 1)]  # ranks, workers
GLOBAL_BATCH = (
    42  # 93 draws an epoch of `natural`, 115 of `balanced`: it divides neither, and all of the ranks divide it
)


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("tiny"))


def first_pixels(image: torch.Tensor) -> torch.Tensor:
    """Who the image is, as [3, 1, 1]."""
    return image[:, :1, :1]


def noisy(image: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Who the image is, then 64 bits of the draw's randomness, its repeat number and its position."""
    facts = torch.tensor([draw.key % 2**31, draw.key >> 33, draw.repeat, draw.position, draw.class_id])
    return torch.cat([image[:, 0, 0].long(), facts])[:, None, None]


def loader_of(snapshot: Snapshot, name: str = "natural", batch_size: int = 10, **options: Any) -> Loader:
    return Loader(snapshot.manifest(name), batch_size, **{"transform": first_pixels, "details": True, **options})


def global_batches(make: Callable[..., Loader], ranks: int, epochs: int, state: Any = None) -> list[list[Any]]:
    """One entry per global step: every row of it, over all ranks in order, as plain values."""
    per_rank = []
    for rank in range(ranks):
        loader = make(rank=rank, world_size=ranks, batch_size=GLOBAL_BATCH // ranks)
        if state is not None:
            loader.load_state_dict(state)
        per_rank.append([rows_of(batch) for _ in range(epochs) for batch in loader])
    return [[row for part in step for row in part] for step in zip(*per_rank, strict=True)]


def rows_of(batch: tuple[Any, ...]) -> list[Any]:
    images, labels, details = batch
    columns = (images.flatten(1).tolist(), labels.tolist(), details.positions.tolist(), details.keys)
    return list(zip(*columns, details.repeats.tolist(), strict=True))


def positions_of(loader: Loader) -> list[int]:
    """Positions of (the rest of) one epoch."""
    return [position for _, _, details in loader for position in details.positions.tolist()]


# ---- What a batch is


def test_a_batch_is_uint8_images_and_int64_labels(snapshot: Snapshot) -> None:
    images, labels = next(iter(Loader(snapshot.manifest("natural"), 8)))
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (8, 3, 224, 224))
    assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (8,))


def test_labels_keys_and_pixels_belong_together(snapshot: Snapshot) -> None:
    paths = {row["key"]: row["path"] for i in range(len(snapshot.shards)) for row in snapshot.index(i).to_pylist()}
    for images, labels, details in loader_of(snapshot, "balanced"):
        assert isinstance(details, Details)
        assert (details.positions.dtype, details.repeats.dtype) == (torch.int64, torch.int64)
        for image, label, key in zip(images, labels.tolist(), details.keys, strict=True):
            class_id, number, _ = identity(image)
            assert (class_id, f"train/{class_id}/{number}.png") == (label, paths[key])


def test_without_decoding_the_bytes_of_the_shards_come_out(snapshot: Snapshot) -> None:
    raw = loader_of(snapshot, transform=None, decode=False)
    for (data, labels, _), (images, other_labels, _) in zip(raw, loader_of(snapshot), strict=True):
        assert isinstance(data, list)
        decoded = [torch.from_numpy(pipeline.images.decode_rgb(item)[0, 0]) for item in data]
        assert torch.equal(torch.stack(decoded), images[:, :, 0, 0])
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("transform", [lambda image: image.float()[:, :8, :8] / 255, lambda image: image[:1, :8, :8]])
def test_any_type_and_number_of_channels_is_batched(snapshot: Snapshot, transform: Any) -> None:
    images = [image for batch, _, _ in loader_of(snapshot, transform=transform) for image in batch]
    for image, (data, _) in zip(images, one_by_one(snapshot), strict=False):
        assert torch.equal(image, transform(torch.from_numpy(pipeline.images.decode_rgb(data)).permute(2, 0, 1)))


def one_by_one(snapshot: Snapshot) -> Iterator[tuple[bytes, int]]:
    for data, labels in Loader(snapshot.manifest("natural"), 1, decode=False):
        yield data[0], labels.item()


def test_repeats_count_earlier_draws_of_the_image(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, "balanced", transform=noisy)
    seen: dict[str, int] = {}
    for images, _, details in [batch for _ in range(2) for batch in loader]:
        assert images[:, 5, 0, 0].tolist() == details.repeats.tolist()
        assert images[:, 6, 0, 0].tolist() == details.positions.tolist()
        for key, repeat in zip(details.keys, details.repeats.tolist(), strict=True):
            assert repeat == seen.get(key, 0)
            seen[key] = repeat + 1
    assert max(seen.values()) >= 46


def test_every_draw_has_randomness_of_its_own_and_every_seed(snapshot: Snapshot) -> None:
    def keys(seed: int) -> list[tuple[int, int]]:
        loader = loader_of(snapshot, "balanced", transform=noisy, seed=seed)
        return [(low, high) for images, _, _ in loader for low, high in images[:, 3:5, 0, 0].tolist()]

    first, second = keys(0), keys(1)
    assert len({*first, *second}) == len(first) + len(second)


# ---- E1: exact


@pytest.mark.parametrize("name", ["natural", "balanced"])
@pytest.mark.parametrize("batch_size", [1, 10, 42, 93])
def test_epochs_hold_every_class_exactly_as_often_as_asked(snapshot: Snapshot, name: str, batch_size: int) -> None:
    manifest = snapshot.manifest(name)
    loader = loader_of(snapshot, name, batch_size)
    rows = [row for _ in range(4) for batch in loader for row in rows_of(batch)]
    num_draws = manifest.num_draws
    assert [row[2] for row in rows] == list(range(len(rows)))
    assert 4 * num_draws <= len(rows) < 4 * num_draws + batch_size
    for epoch in range(4):
        labels = [row[1] for row in rows[epoch * num_draws : (epoch + 1) * num_draws]]
        assert np.bincount(labels, minlength=6).tolist() == manifest.targets.tolist()


# ---- E5: free of topology


@pytest.mark.parametrize(("name", "seed"), [("natural", 0), ("balanced", 1), ("balanced", 77)])
def test_batches_are_the_same_on_any_topology(snapshot: Snapshot, name: str, seed: int) -> None:
    def make(workers: int) -> Callable[..., Loader]:
        return lambda **options: loader_of(snapshot, name, transform=noisy, seed=seed, workers=workers, **options)

    expected, *others = (global_batches(make(workers), ranks, epochs=3) for ranks, workers in TOPOLOGIES)
    assert all(found == expected for found in others)


def test_the_sequence_does_not_depend_on_the_batch_size(snapshot: Snapshot) -> None:
    def sequence(batch_size: int) -> list[Any]:
        loader = loader_of(snapshot, "balanced", batch_size, transform=noisy)
        return [row for _ in range(2) for batch in loader for row in rows_of(batch)][:230]

    assert sequence(3) == sequence(17) == sequence(42)


def test_torchvision_transforms_are_the_same_with_any_number_of_threads(snapshot: Snapshot) -> None:
    transform = v2.Compose([v2.RandomResizedCrop(8, antialias=True), v2.ColorJitter(0.4), v2.RandomHorizontalFlip()])

    def images(workers: int) -> torch.Tensor:
        return torch.cat([images for images, _, _ in loader_of(snapshot, transform=transform, workers=workers)])

    assert torch.equal(images(0), images(3))


def test_seeds_give_different_sequences(snapshot: Snapshot) -> None:
    first, second = (next(iter(loader_of(snapshot, batch_size=42, seed=seed)))[1] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_step_belongs_to_the_epoch_of_its_first_position(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, "natural", 42)  # 93 draws an epoch: epochs start at 0, 93, 186, 279, 372
    spans = []
    for epoch in range(4):
        assert loader.epoch == epoch
        assert len(loader) == math.ceil(((epoch + 1) * 93 - len(spans) * 42) / 42)
        spans += [details.positions[0].item() for _, _, details in loader]
        assert epoch * 93 <= spans[-1] < (epoch + 1) * 93
    assert spans == list(range(0, 93 * 4, 42))


# ---- E6: resume anywhere


@pytest.mark.parametrize("seed", range(20))
def test_restoring_any_state_goes_on_exactly(snapshot: Snapshot, seed: int) -> None:
    dice = random.Random(seed)
    name = dice.choice(["natural", "balanced"])

    def make(**options: Any) -> Loader:
        return loader_of(snapshot, name, transform=noisy, seed=seed, workers=dice.randint(0, 2), **options)

    ranks, other_ranks = dice.choice([1, 2, 3, 7]), dice.choice([1, 2, 3, 7])
    whole = global_batches(make, 1, epochs=3)
    stop = dice.randrange(len(whole))
    state = json.loads(json.dumps(state_after(make(rank=0, world_size=ranks, batch_size=42 // ranks), stop)))
    rest = global_batches(make, other_ranks, epochs=1 if stop else 3, state=state)
    assert rest
    assert rest == whole[stop : stop + len(rest)]


def state_after(loader: Loader, num_steps: int) -> dict[str, Any]:
    """The state after so many steps, taken while prefetched batches lie waiting."""
    endless = (None for _ in iter(int, 1) for _ in loader)
    for _ in range(num_steps):
        next(endless)
    return loader.state_dict()


def test_a_state_of_another_global_batch_goes_on_with_the_next_sample(snapshot: Snapshot) -> None:
    state = state_after(loader_of(snapshot, batch_size=7), 5)
    loader = loader_of(snapshot, batch_size=20)
    loader.load_state_dict(state)
    assert len(loader) == math.ceil((93 - 35) / 20)
    assert positions_of(loader) == list(range(35, 95))
    assert positions_of(loader) == list(range(95, 195))


def test_the_state_counts_what_was_handed_out_not_what_was_prefetched(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, batch_size=10, workers=2, world_size=2, rank=1, prefetch=4)
    steps = iter(loader)
    assert loader.state_dict()["consumed"] == 0
    next(steps)
    assert loader.state_dict()["consumed"] == 20


def test_the_state_is_plain_json(snapshot: Snapshot) -> None:
    manifest = snapshot.manifest("natural")
    state = loader_of(snapshot, seed=5).state_dict()
    assert state == {"format_version": 1, "epoch_rule": 1, "manifest": manifest.digest, "seed": 5, "consumed": 0}
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed: the state has 4, this loader 0"),
        ({"manifest": "feed"}, "manifest: the state has 'feed', this loader '[0-9a-f]{64}'"),
        ({"epoch_rule": 2}, "epoch_rule: the state has 2, this loader 1"),
        ({"format_version": 9}, "format_version: the state has 9, this loader 1"),
        ({"seed": None, "manifest": None}, "manifest: .*None.*; seed: .*None"),
        ({"consumed": -1}, "consumed: expected a whole number of samples, got -1"),
        ({"consumed": 1.5}, "consumed: expected a whole number of samples, got 1.5"),
    ],
)
def test_a_state_that_does_not_belong_is_refused_in_words(
    snapshot: Snapshot, change: dict[str, Any], message: str
) -> None:
    loader = loader_of(snapshot)
    with pytest.raises(StateError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})
    assert positions_of(loader)[0] == 0


# ---- Which epoch comes next


def test_each_iter_goes_on_with_the_next_epoch(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, batch_size=42)
    assert [positions_of(loader)[0] for _ in range(3)] == [0, 126, 210]


def test_after_a_break_the_next_epoch_starts_on_the_same_lattice(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, batch_size=42)
    for _ in loader:
        break
    assert loader.state_dict()["consumed"] == 42
    assert (loader.epoch, len(loader)) == (1, 2)
    assert positions_of(loader) == list(range(126, 210))


def test_after_a_break_on_a_lattice_of_its_own_nothing_moves_to_another(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, batch_size=42)
    loader.load_state_dict({**loader.state_dict(), "consumed": 10})
    next(iter(loader))
    assert positions_of(loader)[0] == 94


def test_an_iterator_that_was_never_advanced_skips_nothing(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, batch_size=42)
    iter(loader)
    assert positions_of(loader)[0] == 0


@pytest.mark.parametrize(("epoch", "first"), [(0, 0), (1, 126), (2, 210), (1000, 93_030)])
def test_set_epoch_goes_to_the_first_step_of_that_epoch(snapshot: Snapshot, epoch: int, first: int) -> None:
    loader = loader_of(snapshot, batch_size=42)
    loader.set_epoch(epoch)
    assert loader.epoch == epoch
    assert positions_of(loader)[0] == first


def test_set_epoch_to_where_a_restored_state_stands_keeps_its_place(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, batch_size=42)
    loader.load_state_dict({**loader.state_dict(), "consumed": 168})
    seen = []
    for epoch in range(loader.epoch, 4):
        loader.set_epoch(epoch)
        seen += positions_of(loader)
    assert seen == list(range(168, 378))


def test_set_epoch_after_a_break_starts_that_epoch_again_or_the_next(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, batch_size=42)
    for epoch, first in ((0, 0), (0, 0), (1, 126), (3, 294)):
        loader.set_epoch(epoch)
        assert next(iter(loader))[2].positions[0] == first


def test_len_is_the_number_of_steps_of_the_iterator_at_hand(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, batch_size=42)
    for _ in range(3):
        expected = len(loader)
        lengths = [len(loader) for _ in loader]
        assert lengths == [expected] * expected


def test_step_and_num_steps_tell_where_in_the_whole_epoch_training_stands(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, batch_size=42)  # steps at 0, 42, 84 | 126, 168 | 210, 252; epochs end at 93, 186, 279
    assert (loader.epoch, loader.step, loader.num_steps) == (0, 0, 3)
    found = [(loader.epoch, loader.step, loader.num_steps) for _ in range(3) for _ in loader]
    assert found == [(0, 1, 3), (0, 2, 3), (0, 3, 3), (1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 2)]
    for consumed, expected in ((168, (1, 1, 2, 1)), (252, (2, 1, 2, 1)), (279, (3, 0, 3, 3))):
        loader.load_state_dict({**loader.state_dict(), "consumed": consumed})
        assert (loader.epoch, loader.step, loader.num_steps, len(loader)) == expected
    next(iter(loader))  # and leave
    assert (loader.epoch, loader.step, loader.num_steps) == (4, 0, 2)


def test_an_epoch_smaller_than_one_global_batch_is_refused(snapshot: Snapshot) -> None:
    with pytest.raises(UsageError, match=r"'natural' draws 93 .* global batch of 94 \(batch_size 47 x world_size 2\)"):
        loader_of(snapshot, batch_size=47, rank=0, world_size=2)
    assert len(loader_of(snapshot, batch_size=93)) == 1


# ---- One live iterator


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "supersede", [iter, lambda loader: loader.set_epoch(3), lambda loader: loader.load_state_dict(loader.state_dict())]
)
def test_an_older_iterator_says_that_it_was_ended(snapshot: Snapshot, workers: int, supersede: Any) -> None:
    loader = loader_of(snapshot, workers=workers)
    old = iter(loader)
    next(old)
    _newer = supersede(loader)
    with pytest.raises(UsageError, match="iterator of epoch 0 was ended by a later iter"):
        next(old)


def test_an_exhausted_iterator_stays_exhausted(snapshot: Snapshot) -> None:
    loader = loader_of(snapshot, workers=1)
    old = iter(loader)
    assert len(list(old)) == 10
    next(iter(loader))
    assert list(old) == []


# ---- R1: checked


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decode", [True, False])
def test_a_damaged_image_is_an_error_before_its_batch(
    snapshot: Snapshot, tmp_path: Path, workers: int, decode: bool
) -> None:
    shutil.copytree(snapshot.store.url, tmp_path / "root")
    damaged = pipeline.open_snapshot(tmp_path / "root")
    options = {"workers": workers, "decode": decode, "transform": first_pixels if decode else None}
    keys = [key for _, _, details in loader_of(damaged, **options) for key in details.keys]
    tar = tar_path(damaged.shards["tar_sha256"][1].as_py())
    victim = damaged.index(1).to_pylist()[3]
    flip(tmp_path / "root" / tar, victim["offset"] + victim["size"] // 2)
    steps = iter(loader_of(pipeline.open_snapshot(tmp_path / "root"), **options))
    for _ in range(keys.index(victim["key"]) // 10):
        next(steps)
    with pytest.raises(IntegrityError) as caught:
        next(steps)
    assert all(word in str(caught.value) for word in (victim["key"], tar, f"offset {victim['offset']}"))


def drawn_by(snapshot: Snapshot) -> list[list[Draw]]:
    """The draws of each batch of 10."""
    seen: list[Draw] = []

    def note(image: torch.Tensor, draw: Draw) -> torch.Tensor:
        seen.append(draw)
        return image[:, :1, :1]

    return [seen[-len(labels) :] for _, labels, _ in loader_of(snapshot, transform=note)]


def test_the_default_transform_gives_each_image_the_crop_of_its_draw(snapshot: Snapshot) -> None:
    transform = RandomResizedCropFlip(16)
    bytes_of = [data for data, _, _ in loader_of(snapshot, transform=None, decode=False)]
    for (images, _, _), data, draws in zip(
        loader_of(snapshot, transform=transform), bytes_of, drawn_by(snapshot), strict=True
    ):
        for found, item, draw in zip(images, data, draws, strict=True):
            expected = np.empty((16, 16, 3), np.uint8)
            decode_crop(item, partial(transform.plan, uniform=draw.uniform(transform.num_uniform)), expected)
            assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_what_the_default_transform_cannot_decode_is_named(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ImageRejected(Reason.CORRUPT, "for a test")

    monkeypatch.setattr(batches, "decode_crop", refuse)
    pattern = (
        r"image [0-9a-f]{16} .* in shards/.*.tar at offset \d+ is as it was stored, but cannot be decoded: .*a test"
    )
    with pytest.raises(IntegrityError, match=pattern):
        next(iter(loader_of(snapshot, transform=RandomResizedCropFlip(16))))


def test_damage_is_named_even_where_the_index_is_damaged_too(snapshot: Snapshot, tmp_path: Path) -> None:
    shutil.copytree(snapshot.store.url, tmp_path / "root")
    damaged = pipeline.open_snapshot(tmp_path / "root")
    for row in damaged.shards.to_pylist():
        (tmp_path / "root" / index_path(row["index_sha256"])).unlink()
        path = tmp_path / "root" / tar_path(row["tar_sha256"])
        path.chmod(0o644)
        path.write_bytes(bytes(row["tar_size"]))
    with pytest.raises(IntegrityError, match=r"number \d+ of shard \d+ .*index.* in shards/.* at offset \d+"):
        next(iter(loader_of(damaged, details=False)))


# ---- Damage, replaced


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A copy of the snapshot in which these keys, of classes 0, 1 and 3, are damaged, each in its own way."""

    snapshot: Snapshot
    keys: list[str]
    rows: list[int]  # of the sample table


@pytest.fixture(scope="module")
def damaged(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    root = tmp_path_factory.mktemp("damaged") / "root"
    shutil.copytree(snapshot.store.url, root)
    starts, samples = snapshot.class_starts("train"), snapshot.samples("train")
    rows = [int(starts[0]) + 7, int(starts[0]) + 8, int(starts[1]) + 3, int(starts[3]) + 1]
    keys = []
    for row in rows:
        shard, place = int(samples.take("shard", [row])[0]), int(samples.take("row", [row])[0])
        victim = snapshot.index(shard).to_pylist()[place]
        flip(root / tar_path(snapshot.shards["tar_sha256"][shard].as_py()), victim["offset"] + victim["size"] // 2)
        keys.append(victim["key"])
    return Damaged(snapshot=pipeline.open_snapshot(root), keys=keys, rows=rows)


def replacing(damaged: Damaged, name: str = "balanced", batch_size: int = 10, **options: Any) -> Loader:
    return loader_of(damaged.snapshot, name, batch_size, on_damage="replace", **options)


@pytest.mark.filterwarnings("ignore:replaced by another image")
def test_a_damaged_image_gives_way_to_the_next_other_one_of_its_class(snapshot: Snapshot, damaged: Damaged) -> None:
    loader, healthy = replacing(damaged, transform=noisy), loader_of(snapshot, "balanced", transform=noisy)
    found = [row for _ in range(2) for batch in loader for row in rows_of(batch)]
    later = [row for _ in range(6) for batch in healthy for row in rows_of(batch)]
    for i, ((pixels, label, position, key, repeat), asked) in enumerate(zip(found, later, strict=False)):
        if asked[3] not in damaged.keys:
            assert (pixels, label, position, key, repeat) == asked
            continue
        stand_in = next(row for row in later[i + 1 :] if row[1] == label and row[3] not in damaged.keys)
        assert (label, position, key, repeat) == (asked[1], asked[2], *stand_in[3:])
        assert pixels[:3] == stand_in[0][:3]  # the other image
        assert (pixels[3:5], pixels[6:]) == (asked[0][3:5], asked[0][6:])  # with the randomness of this draw
    assert loader.num_replaced == sum(asked[3] in damaged.keys for asked in later[: len(found)]) > 5


@pytest.mark.filterwarnings("ignore:replaced by another image")
def test_replaced_rows_are_counted_as_they_are_handed_out_and_marked(snapshot: Snapshot, damaged: Damaged) -> None:
    loader = replacing(damaged, workers=2, prefetch=4)
    total = 0
    for (_, _, details), (_, _, asked) in zip(loader, loader_of(snapshot, "balanced"), strict=True):
        assert details.replaced.tolist() == [key in damaged.keys for key in asked.keys]
        total += int(details.replaced.sum())
        assert loader.num_replaced == total


@pytest.mark.filterwarnings("ignore:replaced by another image")
def test_replacements_are_the_same_on_any_topology_and_after_a_resume(damaged: Damaged) -> None:
    def make(workers: int) -> Callable[..., Loader]:
        return lambda **options: replacing(damaged, transform=noisy, workers=workers, **options)

    expected, *others = (global_batches(make(workers), ranks, epochs=3) for ranks, workers in TOPOLOGIES)
    assert all(found == expected for found in others)
    state = state_after(make(2)(batch_size=42), 4)
    assert global_batches(make(1), 3, epochs=2, state=state) == expected[4:]


def test_a_warning_names_shard_and_key_of_each_damaged_image_once(damaged: Damaged) -> None:
    loader = replacing(damaged, workers=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            list(loader)
    messages = [str(warning.message) for warning in caught]
    assert all(sum(key in message for message in messages) == 1 for key in damaged.keys)
    assert len(messages) == len(damaged.keys)
    assert all(re.search(r"replaced by .* image [0-9a-f]{16} .* in shards/.* at offset \d+", m) for m in messages)
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("decode", [True, False])
def test_an_image_that_cannot_be_decoded_is_replaced_where_it_is_decoded(
    snapshot: Snapshot, decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = next(one_by_one(snapshot))[0]
    refuse(monkeypatch, bad)
    transform = first_pixels if decode else None
    loader = Loader(snapshot.manifest("natural"), 31, decode=decode, transform=transform, on_damage="replace")
    with pytest.warns(UserWarning, match="cannot be decoded") if decode else nullcontext():
        images = [image for batch, _ in loader for image in batch]
    assert loader.num_replaced == decode
    assert decode or bad in images


def refuse(monkeypatch: pytest.MonkeyPatch, bad: bytes) -> None:
    """Let decoding these bytes fail, whichever decoder is asked."""
    decode_rgb = batches.decode_rgb

    def decode(data: bytes, *args: Any, **options: Any) -> Any:
        if data == bad:
            raise ImageRejected(Reason.CORRUPT, "broken for this test")
        return decode_rgb(data, *args, **options)

    monkeypatch.setattr(batches, "decode_rgb", decode)


def test_the_only_image_of_a_class_cannot_be_replaced(snapshot: Snapshot, tmp_path: Path) -> None:
    shutil.copytree(snapshot.store.url, tmp_path / "root")
    for row in snapshot.shards.to_pylist():
        path = tmp_path / "root" / tar_path(row["tar_sha256"])
        path.chmod(0o644)
        path.write_bytes(bytes(row["tar_size"]))
    loader = loader_of(pipeline.open_snapshot(tmp_path / "root"), on_damage="replace")
    with pytest.raises(
        IntegrityError, match=r"image [0-9a-f]{16} .*cannot be replaced: its class \d has \d+ other images"
    ):
        next(iter(loader))


def test_damage_of_the_sample_table_is_never_replaced(snapshot: Snapshot, tmp_path: Path) -> None:
    shutil.copytree(snapshot.store.url, tmp_path / "root")
    ref = snapshot.record.samples["train"]
    flip(tmp_path / "root" / table_path(ref.sha256), ref.size // 2)
    with pytest.raises(IntegrityError, match=ref.sha256):
        next(iter(loader_of(pipeline.open_snapshot(tmp_path / "root"), on_damage="replace")))


# ---- Pinned memory


def test_pin_memory_asks_for_images_and_labels_only_where_there_is_cuda(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tuple(tensor.shape)) or tensor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    next(iter(loader_of(snapshot, pin_memory=True)))
    assert pinned == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    next(iter(loader_of(snapshot, pin_memory=True)))
    next(iter(loader_of(snapshot, pin_memory=True, decode=False, transform=None)))
    next(iter(EvaluationLoader(snapshot, batch_size=2, transform=first_pixels, pin_memory=True)))
    assert pinned == [(10, 3, 1, 1), (10,), (10,), (2, 3, 1, 1), (2,), (2,)]
    next(iter(loader_of(snapshot)))
    assert len(pinned) == 6


# ---- Threads and exceptions


def failing_at(position: int) -> Callable[..., torch.Tensor]:
    def transform(image: torch.Tensor, draw: Draw) -> torch.Tensor:
        if draw.position == position:
            raise ZeroDivisionError("mine")
        return first_pixels(image)

    return transform


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_exception_comes_out_at_its_batch_and_the_state_stays_before_it(snapshot: Snapshot, workers: int) -> None:
    loader = loader_of(snapshot, transform=failing_at(47), workers=workers)
    steps = iter(loader)
    assert [next(steps)[2].positions[0].item() for _ in range(4)] == [0, 10, 20, 30]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="mine") as caught:
            next(steps)
    assert "in the transform of image" in caught.value.__notes__[0]
    assert loader.state_dict()["consumed"] == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_different_shapes_are_refused_with_shapes_and_keys(snapshot: Snapshot, workers: int) -> None:
    pattern = (
        r"image [0-9a-f]{16} \('train/.*'\) became \[3, \d+, \d+\] torch.uint8, "
        r"image [0-9a-f]{16} \('train/.*'\) became \[3, \d+, \d+\] torch.uint8.*crop"
    )
    with pytest.raises(UsageError, match=pattern):
        next(iter(loader_of(snapshot, transform=lambda image: image, workers=workers)))


@pytest.mark.parametrize(("transform", "found"), [(lambda image: 3, "int"), (lambda image: image[0], r"\[\d+, \d+\]")])
def test_what_is_no_image_is_refused(snapshot: Snapshot, transform: Any, found: str) -> None:
    with pytest.raises(
        UsageError, match=rf"must return a tensor \[C, H, W\]; for image [0-9a-f]{{16}} .* it gave {found}"
    ):
        next(iter(loader_of(snapshot, transform=transform)))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("evenshard_")]  # of Prefetch


def assert_threads_end() -> None:
    for thread in threads():
        thread.join(timeout=20)
    assert threads() == []


def leave_by_break(loader: Loader) -> None:
    for _ in loader:
        break


def leave_by_exception(loader: Loader) -> None:
    with suppress(ZeroDivisionError):
        for _ in loader:
            raise ZeroDivisionError


def leave_by_worker_exception(loader: Loader) -> None:
    failing = iter(Loader(loader.manifest, 10, transform=failing_at(47), workers=3))
    with suppress(ZeroDivisionError):
        list(failing)


def drop_unused(loader: Loader) -> None:
    iter(loader)


def replace_by_another(loader: Loader) -> None:
    steps = iter(loader)
    next(steps)
    loader.set_epoch(5)
    with pytest.raises(UsageError):
        next(steps)


@pytest.mark.parametrize(
    "leave", [list, leave_by_break, leave_by_exception, leave_by_worker_exception, drop_unused, replace_by_another]
)
def test_threads_end_with_the_iterator(snapshot: Snapshot, leave: Callable[[Loader], Any]) -> None:
    loader = loader_of(snapshot, workers=3)
    gc.disable()  # not only when a cycle happens to be collected
    try:
        leave(loader)
        assert_threads_end()
    finally:
        gc.enable()


HANGS = """
import sys, threading, time
import torch
from pipeline.stream.prefetch import Prefetch

began = threading.Event()

def hang(i):
    began.set()
    time.sleep(3600)

results = Prefetch(hang, range(9), threads=2, ahead=4)
began.wait()
print("ends")
"""


def test_a_transform_that_hangs_does_not_keep_the_interpreter_from_ending() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")


def test_at_most_so_many_batches_are_made_ahead() -> None:
    arguments = iter(range(100))
    results = Prefetch(lambda i: i, arguments, threads=2, ahead=5)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert next(arguments) == 15
    results.close()
    assert list(results) == []
    assert_threads_end()


def count_threads(image: torch.Tensor, draw: Draw) -> torch.Tensor:
    torch.zeros(100_000).sum()  # enough for torch to share it
    return torch.full((1, 1, 1), torch.get_num_threads())


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_spreads_transforms_over_no_further_threads_and_training_as_before(
    snapshot: Snapshot, workers: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = loader_of(snapshot, transform=count_threads, workers=workers)
        found = {count for images, _, _ in loader for count in images.flatten().tolist()}
        with ThreadPoolExecutor(1) as pool:
            assert (found, torch.get_num_threads(), pool.submit(torch.get_num_threads).result()) == ({1}, 3, 3)
    finally:
        torch.set_num_threads(before)


# ---- Arguments


def test_rank_and_world_size_come_from_torch_distributed_where_it_runs(tmp_path: Path) -> None:
    assert Topology.resolve(None, None) == Topology(rank=0, world_size=1)
    store = torch.distributed.FileStore(str(tmp_path / "rendezvous"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert Topology.resolve(None, None) == Topology(rank=0, world_size=1)
        assert Topology.resolve(2, 3) == Topology(rank=2, world_size=3)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"batch_size": 2.0}, "batch_size must be .* got 2.0"),
        ({"workers": -1}, "workers must be a whole number of 0 or more, got -1"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"rank": 1}, "together or neither, got rank=1, world_size=None"),
        ({"rank": 2, "world_size": 2}, "rank must be below world_size, got rank=2, world_size=2"),
        ({"rank": -1, "world_size": 2}, "rank must be a whole number of 0 or more, got -1"),
        ({"prefetch": 2}, "prefetch=2 needs threads"),
        ({"on_damage": "skip"}, "on_damage must be 'raise' or 'replace', got 'skip'"),
        ({"prefetch": 0, "workers": 1}, "prefetch must be a whole number of 1 or more, got 0"),
        ({"decode": False}, "decode=False hands out bytes"),
        ({"transform": "crop"}, "transform must be callable .* got 'crop'"),
    ],
)
def test_wrong_arguments_are_refused_with_their_value(snapshot: Snapshot, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loader_of(snapshot, **options)


@pytest.mark.parametrize("epoch", [-1, 1.5])
def test_set_epoch_refuses_what_is_no_epoch(snapshot: Snapshot, epoch: Any) -> None:
    with pytest.raises(UsageError, match=f"epoch must be a whole number of 0 or more, got {epoch}"):
        loader_of(snapshot).set_epoch(epoch)


# ---- Evaluation


@pytest.mark.parametrize(("ranks", "workers"), TOPOLOGIES)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 11, 20])
def test_every_sample_of_a_split_is_evaluated_once(
    snapshot: Snapshot, ranks: int, workers: int, batch_size: int
) -> None:
    seen: list[tuple[int, ...]] = []
    for rank in range(ranks):
        loader = evaluation(snapshot, batch_size, rank=rank, world_size=ranks, workers=workers)
        batches = list(loader)
        assert len(batches) == len(loader) == math.ceil(11 / (batch_size * ranks))
        for images, labels, mask in batches:
            assert images.shape == (batch_size, 3, 1, 1)
            assert mask.dtype == torch.bool
            assert torch.equal(images[:, 0, 0, 0].long(), labels)
            seen += [identity(image) for image in images[mask]]
    assert sorted(seen) == [(c, i, 2) for c, count in enumerate(COUNTS["test"]) for i in range(count)]


def evaluation(snapshot: Snapshot, batch_size: int = 4, **options: Any) -> EvaluationLoader:
    return EvaluationLoader(snapshot, "test", batch_size, transform=first_pixels, **options)


def test_evaluation_mixes_classes_in_the_same_way_each_time(snapshot: Snapshot) -> None:
    loader = EvaluationLoader(snapshot, "train", 31, transform=first_pixels, workers=2)
    first, second = ([label for _, labels, _ in loader for label in labels.tolist()] for _ in range(2))
    assert first == second
    assert first != sorted(first)


def test_evaluation_crops_the_centre_by_default(snapshot: Snapshot) -> None:
    images, _, _ = next(iter(EvaluationLoader(snapshot, batch_size=3)))
    assert images.shape == (3, 3, 224, 224)


def test_an_empty_split_cannot_be_evaluated(snapshot: Snapshot) -> None:
    with pytest.raises(UsageError, match="'val'"):
        EvaluationLoader(snapshot, "val")


def test_the_loaders_are_public() -> None:
    assert (pipeline.Loader, pipeline.EvaluationLoader) == (Loader, EvaluationLoader)


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_that_share_an_iterator_get_every_draw_once(snapshot: Snapshot, workers: int) -> None:
    loader = pipeline.Loader(snapshot.manifest("natural"), 4, workers=workers, decode=False, details=True)
    shared, seen = iter(loader), []

    def drain() -> None:
        for _, _, details in shared:
            seen.extend(details.positions.tolist())

    threads = [threading.Thread(target=drain) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(len(seen)))
    assert loader.state_dict()["consumed"] == len(seen)


def test_a_loader_in_a_dataloader_says_to_iterate_it_itself(snapshot: Snapshot) -> None:
    evaluation = pipeline.EvaluationLoader(snapshot, "test", batch_size=4, workers=0)
    for loader in (pipeline.Loader(snapshot.manifest("natural"), batch_size=4, workers=0), evaluation):
        with pytest.raises(UsageError, match=rf"Iterate the {type(loader).__name__} itself, `for images, labels in"):
            next(iter(torch.utils.data.DataLoader(loader)))  # pyright: ignore
