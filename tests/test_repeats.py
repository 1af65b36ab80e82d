"""The cache of decoded repeats: it changes no pixel, stays within its bytes, and keeps what is drawn most."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

import pipeline.images.crops as crops
from pipeline.errors import UsageError
from pipeline.images import decoded_eighths
from pipeline.snapshot import Snapshot
from pipeline.stream.loader import Loader
from pipeline.stream.repeats import RepeatCache
from pipeline.stream.transforms import RandomResizedCropFlip
from tests.tiny_snapshot import write_snapshot


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("repeats"))


def pixels(value: int, size: int = 10) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full((1, size), value, np.uint8)


def batches(snapshot: Snapshot, name: str = "balanced", **options: Any) -> list[torch.Tensor]:
    loader = Loader(snapshot.manifest(name), 7, **options)
    return [images for _ in range(2) for images, _ in loader]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("repeat_bytes", [1, 3_000, 10**9])
@pytest.mark.parametrize("quality", ["fast", "exact"])
def test_batches_are_the_same_with_and_without(
    snapshot: Snapshot, workers: int, repeat_bytes: int, quality: Any
) -> None:
    transform = RandomResizedCropFlip(9, quality=quality)
    plain = batches(snapshot, transform=transform)
    cached = batches(snapshot, transform=transform, repeat_bytes=repeat_bytes, workers=workers)
    assert all(torch.equal(one, two) for one, two in zip(plain, cached, strict=True))


def test_a_transform_that_writes_into_its_image_harms_no_repeat(snapshot: Snapshot) -> None:
    def spoil(image: torch.Tensor) -> torch.Tensor:
        first = image[:, :1, :1].clone()
        image.zero_()
        return first

    plain, cached = batches(snapshot, transform=spoil), batches(snapshot, transform=spoil, repeat_bytes=10**9)
    assert all(torch.equal(one, two) for one, two in zip(plain, cached, strict=True))


def test_what_is_kept_is_decoded_once(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = crops.decode_rgb
    monkeypatch.setattr(crops, "decode_rgb", lambda data: decoded.append(1) or decode(data))
    loader = Loader(snapshot.manifest("balanced"), 5, transform=RandomResizedCropFlip(9), repeat_bytes=10**9)
    shown = {key for _ in range(3) for _, _, key in with_keys(loader)}
    assert len(decoded) == len(shown)


def with_keys(loader: Loader) -> Any:
    """Rows instead of keys would do as well: one name per distinct image."""
    rows = loader._reader.images

    def spy(planned: Any, places: Any = None) -> Any:
        seen.extend(planned.row.tolist())
        return rows(planned, places)

    seen: list[int] = []
    loader._reader.images = spy  # pyright: ignore[reportAttributeAccessIssue]
    for images, labels in loader:
        yield from ((images, labels, row) for row in seen)
        seen.clear()


@pytest.mark.parametrize("seed", range(5))
def test_it_stays_within_its_bytes_and_keeps_what_is_drawn_most(seed: int) -> None:
    rng = np.random.default_rng(seed)
    draws = rng.integers(1, 30, 50).astype(float)
    cache = RepeatCache(1000, draws)
    sizes = rng.integers(1, 200, 50)
    for row in rng.integers(0, 50, 500).tolist():
        of = cache.of(row, row)
        if of.find(8) is None:
            of.keep(8, pixels(row, int(sizes[row])))
        held = [r for r in range(50) if cache.find(r, 8) is not None]
        assert cache.used_bytes == sum(int(sizes[r]) for r in held) <= 1000
    least = min(draws[r] for r in held)
    fits = [r for r in range(50) if r not in held and draws[r] > least]
    # Whoever is drawn more often than the least of those inside stayed outside only for want of room.
    for r in fits:
        freed = sum(int(sizes[h]) for h in held if draws[h] < draws[r])
        assert 1000 - cache.used_bytes + freed < sizes[r]


def test_equal_draws_throw_nothing_out() -> None:
    cache = RepeatCache(20, np.ones(9))
    for row in range(9):
        cache.of(row, row).keep(8, pixels(row))
    assert [row for row in range(9) if cache.find(row, 8) is not None] == [0, 1]


def test_kept_pixels_are_its_own_and_cannot_be_written() -> None:
    cache = RepeatCache(1000, np.ones(1))
    mine = np.arange(100, dtype=np.uint8).reshape(10, 10)
    cache.of(0, 0).keep(8, mine[2:4])
    mine[:] = 0
    found = cache.find(0, 8)
    assert found is not None
    assert found.tolist() == np.arange(100).reshape(10, 10)[2:4].tolist()
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1


def test_threads_keep_the_count_of_bytes_right() -> None:
    cache = RepeatCache(500, np.arange(200, dtype=float))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: cache.of(row % 200, row % 200).keep(8, pixels(0)), range(2000)))
    assert cache.used_bytes == sum(10 for row in range(200) if cache.find(row, 8) is not None) == 500
    assert min(row for row in range(200) if cache.find(row, 8) is not None) == 150


@pytest.mark.parametrize("seed", range(3))
def test_the_scale_is_foreseen_that_the_decoder_takes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        height, width = (int(side) for side in rng.integers(1, 300, 2))
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(stream, "JPEG")
        least = {"min_height": int(rng.integers(1, height + 1)), "min_width": int(rng.integers(1, width + 1))}
        found = simplejpeg.decode_jpeg(stream.getvalue(), "RGB", min_factor=2, **least)
        eighths = decoded_eighths(height, width, **least)
        assert found.shape[:2] == (-(-height * eighths // 8), -(-width * eighths // 8))


def test_no_bytes_are_no_cache_and_fewer_are_a_wrong_call(snapshot: Snapshot) -> None:
    assert Loader(snapshot.manifest("balanced"), 5)._reader._repeats is None
    with pytest.raises(UsageError, match="repeat_bytes must be a whole number of 0 or more, got -1"):
        Loader(snapshot.manifest("balanced"), 5, repeat_bytes=-1)
    with pytest.raises(UsageError, match="at least 1 byte, not 0"):
        RepeatCache(0, np.ones(1))


@pytest.mark.parametrize("seed", range(4))
def test_crops_of_kept_jpegs_are_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (23, 31, 3), dtype=np.uint8)).resize((620, 460)).save(stream, "JPEG")
    data, cache = stream.getvalue(), RepeatCache(10**9, np.ones(1))
    scales: set[int] = set()
    for _ in range(40):
        transform, uniform = RandomResizedCropFlip(int(rng.integers(20, 200))), rng.random(41)

        def plan(height: int, width: int, transform: Any = transform, uniform: Any = uniform) -> Any:
            return transform.plan(height, width, uniform)

        plain, cached = (np.empty((transform.size, transform.size, 3), np.uint8) for _ in range(2))
        crops.decode_crop(data, plan, plain)
        crops.decode_crop(data, plan, cached, cache.of(0, 0))
        assert np.array_equal(plain, cached)
        scales = {scale for scale in range(9) if cache.find(0, scale) is not None}
    assert len(scales) > 2  # whole, and smaller ones
