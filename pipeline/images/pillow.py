"""The reference: what a file is, and its pixels, by Pillow. The room's guarantees are in `pipeline.images`."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, WebPImagePlugin

from pipeline.errors import ConfigError
from pipeline.schema import Reason

Check = Literal["decode", "header"]

HARD_MAX_PIXELS = 178_956_970
"""Pillow's own refusal line (512 MiB as RGB). `Limits` may go up to here, not beyond."""

# Pillow refuses at twice this number. Written down, so that no other library in the process decides for us.
Image.MAX_IMAGE_PIXELS = HARD_MAX_PIXELS // 2

# Image.open loads these plugins only on demand, and then all forty at once; import the two that it does not start with.
_PLUGINS = (TiffImagePlugin, WebPImagePlugin)

_PILLOW_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}

_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"II+\0": "tif",
    b"MM\0+": "tif",
}

_BMP_HEADER_SIZES = frozenset((12, 16, 40, 52, 56, 64, 108, 124))

_REFUSED_MAGIC = {
    b"%!PS": "EPS or PostScript",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"%PDF": "PDF",
    b"8BPS": "PSD",
    b"icns": "ICNS",
    b"\0\0\1\0": "ICO",
    b"\0\0\2\0": "CUR",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"DDS ": "DDS",
    b"SIMPLE": "FITS",
    b"gimp xcf": "XCF",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"qoif": "QOI",
    b"\x59\xa6\x6a\x95": "Sun raster",
    b"\x01\xda": "SGI",
    b"#?RADIANCE": "Radiance HDR",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"<svg": "SVG",
    b"BLP": "BLP",
    b"FLIF": "FLIF",
    b"AT&TFORM": "DjVu",
}

_REFUSED_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}

_OTHER_MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip data",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"{": "JSON or text",
}

_PNG_MODES = {
    (1, 0): "1", (2, 0): "L", (4, 0): "L", (8, 0): "L", (16, 0): "I;16",
    (8, 2): "RGB", (16, 2): "RGB",
    (1, 3): "P", (2, 3): "P", (4, 3): "P", (8, 3): "P",
    (8, 4): "LA", (16, 4): "RGBA", (8, 6): "RGBA", (16, 6): "RGBA",
}  # fmt: skip
"""(bits, colour type) -> the mode Pillow opens it in."""

_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}

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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused before it costs anything."""

    max_pixels: int = 50_000_000
    max_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= HARD_MAX_PIXELS:
            raise ConfigError(f"max_pixels must be from 1 to {HARD_MAX_PIXELS}, not {self.max_pixels}")
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, not {self.max_bytes}")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the index says of an image. Width and height are those of the stored raster, before EXIF orientation."""

    width: int
    height: int
    format: str
    mode: str


class ImageRejected(Exception):
    """One file cannot be used: a row of the rejects table, never the end of a build."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value


def inspect(data: bytes, *, check: Check, limits: Limits) -> Facts:
    """Facts of an image that `decode_rgb` can decode, else ImageRejected.

    ``decode`` decodes every pixel of the first frame. ``header`` trusts the pixels of a JPEG or PNG whose structure is
    plain and complete, and decodes everything else.
    """
    found = recognise(data, limits=limits)
    plain = _walk(found, data)
    if plain is not None:
        _check_pixels(plain.width, plain.height, limits.max_pixels)
        if check == "header":
            return plain
    with _decoding(found):
        image = _open(data, found)
        width, height = _stored_size(image)
        _check_pixels(width, height, limits.max_pixels)
        mode = image.mode
        _check_mode(mode)
        image.load()
    return Facts(width=width, height=height, format=found, mode=mode)


def decode_rgb(data: bytes, *, max_pixels: int = HARD_MAX_PIXELS) -> NDArray[np.uint8]:
    """uint8 [H, W, 3], upright: EXIF orientation applied, alpha over white, 16-bit scaled, CMYK converted; first frame.

    Colour profiles are ignored, as in torchvision and OpenCV.
    """
    found = recognise(data, limits=Limits(max_bytes=max(1, len(data))))
    with _decoding(found):
        image = _open(data, found)
        _check_pixels(*image.size, max_pixels)
        _check_mode(image.mode)
        image.load()
        upright = _transpose(image)
        return np.array(upright if upright.mode == "RGB" and "transparency" not in upright.info else _rgb(upright))


def is_turned(data: bytes) -> bool:
    """Whether the EXIF or XMP of a JPEG says that its pixels lie in another way than they are to be seen."""
    with _decoding("jpg"):
        return _orientation(_open(data, "jpg")) in _TRANSPOSE


def recognise(data: bytes, *, limits: Limits) -> str:
    """The format ('jpg', 'png', ...) that the first bytes claim, among those allowed; else ImageRejected."""
    if not data:
        raise ImageRejected(Reason.EMPTY, "0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageRejected(Reason.TOO_LARGE, f"{len(data)} bytes, the limit is {limits.max_bytes}")
    head = data[:32]
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:2] == b"BM" and len(head) >= 18 and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return "bmp"
    raise _unknown(data)


def _unknown(data: bytes) -> ImageRejected:
    head = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n")
    brand = _REFUSED_BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None
    refused = brand or next((name for magic, name in _REFUSED_MAGIC.items() if data.startswith(magic)), None)
    if refused is None and b"<svg" in head.lower():
        refused = "SVG"
    if refused is not None:
        allowed = ", ".join(_PILLOW_FORMATS.values())
        return ImageRejected(Reason.FORMAT_NOT_ALLOWED, f"{refused}; allowed are {allowed}")
    other = next((name for magic, name in _OTHER_MAGIC.items() if head.lower().startswith(magic.lower())), None)
    return ImageRejected(Reason.NOT_AN_IMAGE, f"looks like {other}" if other else f"starts with {data[:8].hex(' ')}")


def _open(data: bytes, found: str) -> Image.Image:
    # BytesIO shares `data` until someone writes to it: no copy.
    return Image.open(BytesIO(data), formats=(_PILLOW_FORMATS[found],))


@contextmanager
def _decoding(found: str) -> Generator[None]:
    """Whatever a decoder raises about one image becomes a reject row."""
    try:
        yield
    except (ImageRejected, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRejected(Reason.TOO_LARGE, str(error)) from error
    except Image.UnidentifiedImageError as error:  # its message holds a memory address, which no build repeats
        raise ImageRejected(
            Reason.CORRUPT, f"begins like {_PILLOW_FORMATS[found]}, but its header is damaged"
        ) from error
    except Exception as error:  # decoders raise anything at all on hostile bytes: struct.error, KeyError, ...
        raise _refusal(error) from error


def _refusal(error: Exception) -> ImageRejected:
    text = re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", str(error)) or type(error).__name__
    cut_short = isinstance(error, EOFError) or re.search("truncated|not enough|end of (file|data)", text, re.IGNORECASE)
    return ImageRejected(Reason.TRUNCATED if cut_short else Reason.CORRUPT, text[:200])


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageRejected(Reason.CORRUPT, f"declares {width} x {height} pixels")
    if width * height > max_pixels:
        raise ImageRejected(Reason.TOO_LARGE, f"declares {width} x {height} pixels, the limit is {max_pixels}")


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


# --- Structure: is the file complete, and is it so plain that its header can be trusted? ---


def _walk(found: str, data: bytes) -> Facts | None:
    """Facts where the structure is plain, None where a decoder must judge; ImageRejected where the end is missing.

    BMP has no end mark, nor has TIFF: there the decoder finds out.
    """
    if found == "jpg":
        return _walk_jpeg(data)
    if found == "png":
        return _walk_png(data)
    if found == "gif":
        _walk_gif(data)
    if found == "tif" and len(data) < _tiff_directory(data) + 2:
        raise _truncated(f"the directory at byte {_tiff_directory(data)} lies beyond the {len(data)} bytes")
    if found == "webp" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise _truncated(f"{len(data)} bytes of {8 + int.from_bytes(data[4:8], 'little')}")
    return None


def _truncated(detail: str) -> ImageRejected:
    return ImageRejected(Reason.TRUNCATED, detail)


class _Frame(NamedTuple):
    width: int
    height: int
    components: int


def _walk_jpeg(data: bytes) -> Facts | None:
    frame, is_plain, position = None, True, 2
    while position + 4 <= len(data):
        if data[position] != 0xFF or data[position + 1] in (0x00, 0x01, 0xFF) or 0xD0 <= data[position + 1] <= 0xD9:
            is_plain = False  # fill bytes or garbage between segments: Pillow skips them its own way
            position += 1
            continue
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            is_plain &= frame is None and marker <= 0xC2 and data[position + 4 : position + 5] == b"\x08"
            frame = _jpeg_frame(data[position + 4 : position + 10])
        position += 2 + length
    # The bytes FF D9 cannot occur within coded pixels (FF is stuffed); thumbnails with their own end lie before.
    if position + 4 > len(data) or not (data.endswith(b"\xff\xd9") or data.find(b"\xff\xd9", position) >= 0):
        raise _truncated(f"no end-of-image marker in {len(data)} bytes")
    if not is_plain or frame is None or frame.components not in _JPEG_MODES or not frame.height:
        return None
    return Facts(width=frame.width, height=frame.height, format="jpg", mode=_JPEG_MODES[frame.components])


def _jpeg_frame(segment: bytes) -> _Frame | None:
    if len(segment) < 6:
        return None
    height, width, components = struct.unpack(">HHB", segment[1:6])
    return _Frame(width, height, components)


def _walk_png(data: bytes) -> Facts | None:
    position, names, is_intact = 8, set[bytes](), True
    while b"IEND" not in names:
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            raise _truncated(f"no IEND chunk in {len(data)} bytes")
        names.add(data[position + 4 : position + 8])
        checksum = zlib.crc32(memoryview(data)[position + 4 : end - 4])
        is_intact &= checksum == int.from_bytes(data[end - 4 : end], "big")
        position = end
    return _png_facts(data[8:33]) if is_intact and b"IDAT" in names and b"acTL" not in names else None


def _png_facts(chunk: bytes) -> Facts | None:
    if chunk[:8] != b"\0\0\0\rIHDR":
        return None
    width, height, bits, colour, packing, filtering, interlace = struct.unpack(">IIBBBBB", chunk[8:21])
    mode = _PNG_MODES.get((bits, colour))
    if mode is None or mode == "P" or packing or filtering or interlace > 1:
        return None  # a palette may be missing or short: let Pillow look
    return Facts(width=width, height=height, format="png", mode=mode)


def _walk_gif(data: bytes) -> None:
    """Raise where a block is cut. A missing trailer alone is forgiven: encoders forget it, and no pixel is lost."""
    position = 13 + (3 << (1 + (data[10] & 7)) if len(data) > 10 and data[10] & 0x80 else 0)
    while position < len(data):
        kind = data[position]
        if kind == 0x2C:
            if position + 10 >= len(data):
                break
            flags = data[position + 9]
            position = _skip_gif_blocks(data, position + 11 + (3 << (1 + (flags & 7)) if flags & 0x80 else 0))
        elif kind == 0x21:
            position = _skip_gif_blocks(data, position + 2)
        else:
            return  # the trailer, or garbage that Pillow judges
    if position != len(data):
        raise _truncated(f"a block is cut at byte {len(data)}")


def _skip_gif_blocks(data: bytes, position: int) -> int:
    """Position after the chain of sub-blocks; beyond the data where the chain is cut."""
    while position < len(data):
        length = data[position]
        position += 1 + length
        if length == 0:
            return position
    return len(data) + 1


def _tiff_directory(data: bytes) -> int:
    """Where the first directory lies: most writers put it after the pixels."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
    is_big = data[2:4] in (b"+\0", b"\0+")
    return int.from_bytes(data[8:16] if is_big else data[4:8], order)


# --- Pixels ---


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
