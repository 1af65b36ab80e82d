"""Damaged images of every allowed format: seeded, so that what one run met the next one meets."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
from conftest import draw_image
from PIL import Image

KINDS = ("flip", "cut", "swap", "zero", "repeat", "insert", "size")

_WRITERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("jpg", "JPEG", {"quality": 90}),
    ("jpg", "JPEG", {"progressive": True, "icc_profile": bytes(range(256)) * 4}),
    (
        "jpg",
        "JPEG",
        {"quality": 60, "exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"},
    ),
    ("png", "PNG", {}),
    ("png", "PNG", {"dpi": (96, 96), "optimize": True}),
    ("webp", "WEBP", {"quality": 70}),
    ("webp", "WEBP", {"lossless": True}),
    ("gif", "GIF", {}),
    ("bmp", "BMP", {}),
    ("tif", "TIFF", {}),
    *(("tif", "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
)
_MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "L", "P", "1"), "TIFF": ("RGB", "L")}


def originals() -> list[tuple[str, bytes]]:
    """(extension, bytes): every writer, in the modes it has, and two animations."""
    found: list[tuple[str, bytes]] = []
    for number, (extension, pillow_format, options) in enumerate(_WRITERS):
        for mode in _MODES.get(pillow_format, ("RGB",)):
            stream = BytesIO()
            draw_image(number, len(mode)).convert(mode).save(stream, pillow_format, **options)
            found.append((extension, stream.getvalue()))
    for extension in ("gif", "webp", "png"):
        stream = BytesIO()
        frames = [Image.new("RGB", (40, 30), (60 * number, 0, 99)) for number in range(4)]
        frames[0].save(
            stream, {"gif": "GIF", "webp": "WEBP", "png": "PNG"}[extension], save_all=True, append_images=frames[1:]
        )
        found.append((extension, stream.getvalue()))
    return found


def mutants(count: int, *, seed: int) -> Iterator[tuple[str, bytes]]:
    """``count`` files (name, bytes) that were images, each damaged in one of KINDS."""
    rng, whole = np.random.default_rng(seed), originals()
    for number in range(count):
        extension, data = whole[number % len(whole)]
        kind = KINDS[int(rng.integers(len(KINDS)))]
        other = whole[int(rng.integers(len(whole)))][1]
        yield f"{number:06d}-{kind}.{extension}", _mutate(kind, data, other, rng)


def _mutate(kind: str, data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(len(data)) if rng.random() < 0.5 else rng.integers(min(len(data), 200)))
    length = int(rng.integers(1, 64))
    if kind == "cut":
        return data[: place + 1]
    if kind == "swap":
        return other[:length] + data[length:]
    if kind == "repeat":
        return data[:place] + data[max(0, place - length) :]
    if kind == "insert":
        return data[:place] + rng.bytes(length) + data[place:]
    changed = bytearray(data)
    if kind == "zero":
        changed[place : place + length] = bytes(len(changed[place : place + length]))
    elif kind == "size":  # numbers of the header become large
        start = int(rng.integers(min(len(data), 60)))
        changed[start : start + 4] = rng.choice(
            [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\xff\xff\0\0"]
        )
    else:
        for _ in range(int(rng.integers(1, 9))):
            where = int(rng.integers(len(data)) if rng.random() < 0.5 else rng.integers(min(len(data), 200)))
            changed[where] ^= 1 << int(rng.integers(8))
    return bytes(changed)
