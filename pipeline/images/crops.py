"""Crops at the speed of training: JPEGs by simplejpeg, scaling by OpenCV, everything else by the reference.

Both libraries come with the train extra; neither is imported before it is asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.images.pillow import HARD_MAX_PIXELS, decode_rgb, is_turned

_FAST_COLOURS = frozenset(("YCbCr", "Gray", "RGB"))  # simplejpeg leaves CMYK to its caller
_SHRINK = 2.0
"""Where bilinear scaling begins to skip pixels. Then JPEGs are scaled by their decoder, others by area."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """A box of an upright image, its size after scaling, whether to mirror it. A smaller output shows the middle."""

    top: int
    left: int
    rows: int
    columns: int
    height: int  # to which the rows are scaled
    width: int
    flip: bool = False


class Kept(Protocol):
    """Where the pixels of one image may lie already, decoded at so many eighths of its size."""

    def find(self, scale: int) -> NDArray[np.uint8] | None: ...
    def keep(self, scale: int, pixels: NDArray[np.uint8]) -> None: ...


@functools.cache
def _fast_decoders() -> tuple[Any, Any] | None:
    try:
        import cv2
        import simplejpeg
    except ImportError:
        return None
    # OpenCV would spread each small image over all cores, for each of the loader's threads. Its setting is the
    # process's: whoever wants OpenCV's own threads elsewhere sets it back, at the cost of the loader alone.
    cv2.setNumThreads(0)
    return simplejpeg, cv2


def can_decode_crops() -> bool:
    """Whether simplejpeg and OpenCV are installed, which `decode_crop` needs."""
    return _fast_decoders() is not None


def decode_crop(
    data: bytes, plan: Callable[[int, int], Crop], out: NDArray[np.uint8], kept: Kept | None = None
) -> None:
    """The part ``plan(height, width)`` of the upright image into ``out``, uint8 [h, w, 3], contiguous.

    The same image as `decode_rgb` decodes, or the same ImageRejected; JPEGs with the fast upsampling of colours,
    scaled bilinearly. From torchvision's antialiased crop, 348-pixel photographs differ by 1.0 of 255 on average at 224
    pixels, 2.5 at 112 and 4.2 at 64 (whole images scaled down: 1.3, 4.4 and 2.0), with no shift in brightness beyond
    0.17; single pixels at edges by up to 118.
    What ``kept`` has is not decoded again; the result is the same.
    """
    decoded = _decode_jpeg(data, plan, kept)
    if decoded is None:
        pixels = _kept_or(kept, REFERENCE, lambda: decode_rgb(data))
        decoded = pixels, plan(pixels.shape[0], pixels.shape[1])
    _scale(*decoded, out)


REFERENCE = 0
"""The scale under which the pixels of `decode_rgb` are kept: the whole image, by the other decoder."""


def decode_kept(data: bytes, kept: Kept) -> NDArray[np.uint8]:
    """`decode_rgb` of what is not in ``kept``; a copy, which may be written to."""
    return _kept_or(kept, REFERENCE, lambda: decode_rgb(data)).copy()


def _kept_or(kept: Kept | None, scale: int, decode: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    if kept is None:
        return decode()
    pixels = kept.find(scale)
    if pixels is None:
        pixels = decode()
        kept.keep(scale, pixels)
    return pixels


def decoded_eighths(height: int, width: int, min_height: int, min_width: int) -> int:
    """The scale at which simplejpeg decodes with ``min_factor=2``: at most half, and no side below what is asked."""
    fits = (n for n in range(1, 5) if -(-height * n // 8) >= min_height and -(-width * n // 8) >= min_width)
    return next(fits, 8)


def _decode_jpeg(
    data: bytes, plan: Callable[[int, int], Crop], kept: Kept | None
) -> tuple[NDArray[np.uint8], Crop] | None:
    """Pixels, perhaps at a fraction of their size, and where in them the crop lies; None is for Pillow to decode."""
    decoders = _fast_decoders()
    if decoders is None or not data.startswith(b"\xff\xd8\xff") or _needs_turning(data):
        return None
    try:
        height, width, colours, _ = decoders[0].decode_jpeg_header(data)
        if colours not in _FAST_COLOURS or height * width > HARD_MAX_PIXELS:
            return None
        crop = plan(height, width)
        scale = max(crop.height / crop.rows, crop.width / crop.columns)
        smallest, eighths = {}, 8
        if scale * _SHRINK <= 1:
            smallest = {"min_height": math.ceil(height * scale), "min_width": math.ceil(width * scale)}
            eighths = decoded_eighths(height, width, **smallest)
        # The fast DCT darkens every photograph by 0.8 of 255 on average: it is not used.
        decode = functools.partial(decoders[0].decode_jpeg, data, "RGB", fastupsample=True, min_factor=2, **smallest)
        pixels = _kept_or(kept, eighths, decode)
    except ValueError:  # damaged, or a kind of JPEG it does not know: Pillow's word counts
        return None
    return pixels, crop if eighths == 8 else _scaled(crop, eighths / 8, pixels.shape)


def _scaled(crop: Crop, factor: float, shape: tuple[int, ...]) -> Crop:
    """The same crop of an image decoded at ``factor`` of its size, to the nearest whole pixels."""
    top, left = (min(round(at * factor), end - 1) for at, end in zip((crop.top, crop.left), shape, strict=False))
    return Crop(
        top=top,
        left=left,
        rows=max(1, round((crop.top + crop.rows) * factor) - top),
        columns=max(1, round((crop.left + crop.columns) * factor) - left),
        height=crop.height,
        width=crop.width,
        flip=crop.flip,
    )


def _needs_turning(data: bytes) -> bool:
    """Whether a JPEG's EXIF or XMP turns it. Pillow is asked, at 40 us, only where the bytes could say so."""
    position = 2
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] != b"\xda":
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1 : position + 2] == b"\xe1":
            segment = data[position + 4 : end]
            if any(mark in segment for mark in (b"\x01\x12", b"\x12\x01", b"rientation")):
                return is_turned(data)
        position = end
    return data[position : position + 2] != b"\xff\xda" and is_turned(data)


def _scale(pixels: NDArray[np.uint8], crop: Crop, out: NDArray[np.uint8]) -> None:
    decoders = _fast_decoders()
    assert decoders is not None
    cv2 = decoders[1]
    part = pixels[crop.top : crop.top + crop.rows, crop.left : crop.left + crop.columns]
    shrink = max(crop.rows / crop.height, crop.columns / crop.width)
    # Measured on 440-pixel photographs: bilinear 0.12 ms, area 0.9 ms, both 1.1 to 1.3 of 255 from torchvision's.
    method = cv2.INTER_AREA if shrink >= _SHRINK else cv2.INTER_LINEAR
    size = (crop.width, crop.height)
    if out.shape[:2] == (crop.height, crop.width):
        cv2.resize(part, size, dst=out, interpolation=method)
    else:
        resized = cv2.resize(part, size, interpolation=method)
        top, left = (round((a - b) / 2) for a, b in zip(resized.shape[:2], out.shape[:2], strict=True))
        out[:] = resized[top : top + out.shape[0], left : left + out.shape[1]]
    if crop.flip:
        cv2.flip(out, 1, dst=out)
