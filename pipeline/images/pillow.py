"""The reference: what a file is, and its pixels, by Pillow. The room's guarantees are in `pipeline.images`."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, WebPImagePlugin

from pipeline.images.facts import HARD_MAX_PIXELS, Check, Facts, ImageRejected, Limits, check_pixels
from pipeline.images.headers import PILLOW_FORMATS, is_whole, recognise, refuse_canvas
from pipeline.images.similarity import difference_hash
from pipeline.schema import Reason

# Pillow refuses at twice this number. Written down, so that no other library in the process decides for us.
Image.MAX_IMAGE_PIXELS = HARD_MAX_PIXELS // 2

# Image.open loads these plugins only on demand, and then all forty at once; import the two that it does not start with.
_PLUGINS = (TiffImagePlugin, WebPImagePlugin)

_SCALED_MODES = frozenset(("I;16", "I;16L", "I;16B", "I;16N", "I", "F"))
_ALPHA_MODES = frozenset(("RGBA", "LA", "PA", "RGBa", "La"))
_PLAIN_MODES = frozenset(("RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "RGBX"))

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_facts(data: bytes, *, limits: Limits, check: Check, hashed: bool = False) -> Facts:
    """What Pillow says of an image, else ImageRejected.

    ``decode``: having decoded every pixel of the first frame. ``header``: having opened it, if it looks whole and is
    not to be ``hashed``.
    """
    found = recognise(data, limits=limits)
    try:
        refuse_canvas(found, data, limits.max_pixels)
        image = _open(data, found)
        width, height = _stored_size(image)
        check_pixels(width, height, limits.max_pixels)
        mode = image.mode
        _check_mode(mode)
        if check == "decode" or hashed or not is_whole(found, data):
            image.load()
        phash = difference_hash(_upright_rgb(image)) if hashed else None
    except MemoryError:
        raise
    except Exception as error:
        raise _rejection(error, found) from error
    return Facts(width, height, found, mode, phash)


def decode_rgb(data: bytes, *, max_pixels: int = HARD_MAX_PIXELS) -> NDArray[np.uint8]:
    """uint8 [H, W, 3], upright: EXIF orientation applied, alpha over white, 16-bit scaled, CMYK converted; first frame.

    Colour profiles are ignored, as in torchvision and OpenCV.
    """
    found = recognise(data, limits=Limits(max_bytes=max(1, len(data))))
    with _decoding(found):
        image = _open(data, found)
        check_pixels(*image.size, max_pixels)
        _check_mode(image.mode)
        image.load()
        return np.array(_upright_rgb(image))


def is_turned(data: bytes) -> bool:
    """Whether the EXIF or XMP of a JPEG says that its pixels lie in another way than they are to be seen."""
    with _decoding("jpg"):
        return _orientation(_open(data, "jpg")) in _TRANSPOSE


def _open(data: bytes, found: str) -> Image.Image:
    # BytesIO shares `data` until someone writes to it: no copy.
    return Image.open(BytesIO(data), formats=(PILLOW_FORMATS[found],))


@contextmanager
def _decoding(found: str) -> Generator[None]:
    """Whatever a decoder raises about one image becomes a reject row."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise _rejection(error, found) from error


def _rejection(error: Exception, found: str) -> ImageRejected:
    if isinstance(error, ImageRejected):
        return error
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return ImageRejected(Reason.TOO_LARGE, str(error))
    if isinstance(error, Image.UnidentifiedImageError):  # its message holds a memory address, which no build repeats
        return ImageRejected(Reason.CORRUPT, f"begins like {PILLOW_FORMATS[found]}, but its header is damaged")
    return _refusal(error)  # decoders raise anything at all on hostile bytes: struct.error, KeyError, ...


def _refusal(error: Exception) -> ImageRejected:
    text = re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", str(error)) or type(error).__name__
    cut_short = isinstance(error, EOFError) or re.search("truncated|not enough|end of (file|data)", text, re.IGNORECASE)
    return ImageRejected(Reason.TRUNCATED if cut_short else Reason.CORRUPT, text[:200])


def _check_mode(mode: str) -> None:
    if mode not in _PLAIN_MODES and mode not in _ALPHA_MODES and mode not in _SCALED_MODES:
        raise ImageRejected(Reason.FORMAT_NOT_ALLOWED, f"colour mode {mode} has no conversion to RGB")


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Pillow turns TIFF, and only TIFF, upright by itself; report the raster as it lies in the file."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags: Any = image.tag_v2
        if tags.get(_ORIENTATION_TAG) in (5, 6, 7, 8):
            return image.height, image.width
    return image.size


# --- Pixels ---


def _upright_rgb(image: Image.Image) -> Image.Image:
    upright = _transpose(image)
    return upright if upright.mode == "RGB" and "transparency" not in upright.info else _rgb(upright)


def _transpose(image: Image.Image) -> Image.Image:
    """Upright. Pillow has done it for TIFF, and dropped the tag."""
    method = _TRANSPOSE.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    if not any(name in image.info for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")):
        return 1  # 40 us faster than asking Pillow
    try:
        value: object = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the pixels: take them as they lie
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SCALED_MODES:
        return Image.fromarray(_to_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8 of grey values that Pillow would clip at 255.

    16-bit: the full range. 32-bit integers and floats carry no range: [0, 1] (floats only), [0, 255] and [0, 65535] are
    taken for one if all values fit, else the image's own smallest and largest value become black and white.
    """
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    grey = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(grey.min()), float(grey.max())
    tops = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    top = next((t for t in tops if low >= 0 and high <= t), None)
    if top is None:
        grey, top = grey - low, max(high - low, 1e-300)
    return np.floor(grey * (255.0 / top) + 0.5).astype(np.uint8)
