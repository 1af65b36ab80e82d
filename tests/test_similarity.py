"""Perceptual hashes: alike for pictures that look alike, in every format and orientation; none for blank ones."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.images import Check, Inspection, Limits


def photo(seed: int, width: int = 200, height: int = 150) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def hash_of(image: Image.Image, pillow_format: str = "PNG", check: Check = "decode", **options: Any) -> int | None:
    stream = BytesIO()
    image.save(stream, pillow_format, **options)
    with Inspection(check=check, limits=Limits(), hashed=True).open(attempt=1) as inspector:
        return inspector.inspect(stream.getvalue(), "").phash


def distance(one: int | None, two: int | None) -> int:
    assert one is not None
    assert two is not None
    return (one ^ two).bit_count()


@pytest.mark.parametrize("seed", range(5))
def test_the_same_picture_in_another_form_is_near(seed: int) -> None:
    plain = hash_of(photo(seed))
    assert distance(plain, hash_of(photo(seed), "JPEG", quality=50)) <= 3
    assert distance(plain, hash_of(photo(seed).resize((90, 68)), "WEBP")) <= 4
    assert distance(plain, hash_of(photo(seed).point(lambda value: value * 0.8))) <= 4
    turned = Image.Exif()
    turned[0x0112] = 3
    assert distance(plain, hash_of(photo(seed).rotate(180), "JPEG", exif=turned)) <= 3
    assert distance(plain, hash_of(photo(seed + 100))) > 12


def test_both_checks_hash_alike() -> None:
    assert hash_of(photo(1), check="header") == hash_of(photo(1), check="decode") is not None


def test_blank_pictures_have_no_hash() -> None:
    noise = np.random.default_rng(0).integers(250, 254, (100, 100, 3), dtype=np.uint8)
    assert hash_of(Image.fromarray(noise)) is None


def test_the_hash_is_the_same_everywhere() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 252, 4, dtype=np.uint8), (64, 1)))
    assert hash_of(ramp) == (1 << 64) - 1
    assert hash_of(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
