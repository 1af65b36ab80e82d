"""Image bytes -> a small PNG as a data URI: new pixels in a file of our making, whatever the original carried."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from pipeline.images import decode_rgb

SIDE = 112
"""Longest side of a thumbnail; some 15 kB each as PNG, so a contact sheet of 24 stays well below a megabyte."""


def thumbnail(data: bytes, side: int = SIDE) -> str:
    """A ``data:`` URI of the image, at most ``side`` pixels wide and high. Raises ``images.ImageRejected``."""
    pixels = shrink(decode_rgb(data), side)
    png = encode_png(pixels & np.uint8(0xF8) | np.uint8(4))  # without the noise of the low bits: half the size
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def shrink(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """uint8 [h, w, 3], longest side at most ``side``: each pixel is the mean of the block that it stands for."""
    height, width = pixels.shape[:2]
    scale = max(height, width) / side
    if scale <= 1:
        return pixels
    rows, columns = (_edges(length, max(1, round(length / scale))) for length in (height, width))
    sums = np.add.reduceat(np.add.reduceat(pixels, rows[:-1], axis=0, dtype=np.uint32), columns[:-1], axis=1)
    area = np.outer(np.diff(rows), np.diff(columns))[:, :, None]
    return ((sums + area // 2) // area).astype(np.uint8)


def _edges(length: int, parts: int) -> NDArray[np.int64]:
    return np.arange(parts + 1) * length // parts


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """An 8-bit RGB PNG of uint8 [h, w, 3]; every line stored as differences to the one above."""
    height, width = pixels.shape[:2]
    above = np.concatenate([np.zeros_like(pixels[:1]), pixels[:-1]])
    lines = np.empty((height, 1 + 3 * width), np.uint8)
    lines[:, 0] = 2  # filter type "up"
    lines[:, 1:] = (pixels - above).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
