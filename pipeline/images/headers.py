"""What the first bytes and the structure of a file say, without a decoder."""

from __future__ import annotations

import struct
import zlib
from typing import Literal

from pipeline.images.facts import Facts, ImageRejected, Limits, check_pixels
from pipeline.images.plain import plain_jpeg, plain_png
from pipeline.schema import Reason

PILLOW_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}

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


def glance(data: bytes, *, limits: Limits) -> Facts | None:
    """Facts of an image whose structure is plain and complete, as its decoder would tell them; None: ask the decoder.

    ImageRejected for what no decoder is to be asked about: not an allowed format, cut short, beyond the limits.
    """
    facts = plain_jpeg(data) if len(data) <= limits.max_bytes else None
    if facts is None:
        found = recognise(data, limits=limits)
        if found == "png":
            facts = plain_png(data)
        if facts is None:
            _refuse_cut(found, data)
            return None
    check_pixels(facts.width, facts.height, limits.max_pixels)
    return facts


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
        allowed = ", ".join(PILLOW_FORMATS.values())
        return ImageRejected(Reason.FORMAT_NOT_ALLOWED, f"{refused}; allowed are {allowed}")
    other = next((name for magic, name in _OTHER_MAGIC.items() if head.lower().startswith(magic.lower())), None)
    return ImageRejected(Reason.NOT_AN_IMAGE, f"looks like {other}" if other else f"starts with {data[:8].hex(' ')}")


# --- Structure: is the file complete? ---


def is_whole(found: str, data: bytes) -> bool:
    """Whether the structure of a file that `glance` did not refuse shows that all its pixels are there.

    TIFF has no end mark, and a damaged file may still look whole: what tells is then the decoder.
    """
    if found == "jpg":
        return _jpeg_segments(data)
    if found == "bmp":
        return _is_whole_bmp(data)
    return found in ("gif", "webp") or (found == "png" and _png_chunks(data))


def _refuse_cut(found: str, data: bytes) -> None:
    """Raise ImageRejected where the end is missing. BMP has no end mark, nor has TIFF: there the decoder finds out."""
    if found == "jpg":
        _jpeg_segments(data)
    if found == "png":
        _png_chunks(data)
    if found == "gif":
        _walk_gif(data)
    if found == "tif" and len(data) < _tiff_directory(data) + 2:
        raise _truncated(f"the directory at byte {_tiff_directory(data)} lies beyond the {len(data)} bytes")
    if found == "webp" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise _truncated(f"{len(data)} bytes of {8 + int.from_bytes(data[4:8], 'little')}")


def _truncated(detail: str) -> ImageRejected:
    return ImageRejected(Reason.TRUNCATED, detail)


def _jpeg_segments(data: bytes) -> bool:
    """Whether segments lead from the first one to the scan without a gap; ImageRejected where the end is missing."""
    is_orderly, position = True, 2
    while position + 4 <= len(data):
        if data[position] != 0xFF or data[position + 1] in (0x00, 0x01, 0xFF) or 0xD0 <= data[position + 1] <= 0xD9:
            is_orderly = False  # fill bytes or garbage between segments: Pillow skips them its own way
            position += 1
            continue
        if data[position + 1] == 0xDA:
            break
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    # The bytes FF D9 cannot occur within coded pixels (FF is stuffed); thumbnails with their own end lie before.
    if position + 4 > len(data) or not (data.endswith(b"\xff\xd9") or data.find(b"\xff\xd9", position) >= 0):
        raise _truncated(f"no end-of-image marker in {len(data)} bytes")
    return is_orderly


def _png_chunks(data: bytes) -> bool:
    """Whether all chunks are intact, and the image is no animation; ImageRejected where the end is missing."""
    position, names, is_intact = 8, set[bytes](), True
    while b"IEND" not in names:
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            raise _truncated(f"no IEND chunk in {len(data)} bytes")
        names.add(data[position + 4 : position + 8])
        checksum = zlib.crc32(memoryview(data)[position + 4 : end - 4])
        is_intact &= checksum == int.from_bytes(data[end - 4 : end], "big")
        position = end
    return is_intact and b"IDAT" in names and b"acTL" not in names


def refuse_canvas(found: str, data: bytes, max_pixels: int) -> None:
    """Raise ImageRejected for a WebP or GIF whose canvas, which their decoders fill first, is beyond the limit."""
    if found == "webp" and data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        check_pixels(width, height, max_pixels)
    if found == "gif" and len(data) >= 10:
        check_pixels(*struct.unpack("<HH", data[6:10]), max_pixels)


def _is_whole_bmp(data: bytes) -> bool:
    """Whether an uncompressed BMP of the usual header has as many bytes as its size asks for."""
    if len(data) < 54 or int.from_bytes(data[14:18], "little") < 40 or int.from_bytes(data[30:34], "little") != 0:
        return False
    start, width, height = struct.unpack("<I4xii", data[10:26])
    bits = int.from_bytes(data[28:30], "little")
    return bits in (8, 24, 32) and width > 0 and len(data) >= start + (width * bits + 31) // 32 * 4 * abs(height)


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
