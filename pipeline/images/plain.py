"""Width, height and mode of plain JPEG and PNG files, at the speed of a few comparisons.

Comes in: bytes. Goes out: facts, or None for anything out of the ordinary. Guarantees: where facts come out, Pillow
opens the file and tells the same ones, and its structure is complete. None says nothing.
"""

from __future__ import annotations

import zlib

from pipeline.images.facts import Facts

_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}

# What Pillow skips or only keeps, whatever it holds: tables of Huffman codes, restart interval, application data 3 to
# 12 and 15, comments.
_SKIPPED = frozenset((0xC4, 0xDD, 0xFE, 0xEF, *range(0xE3, 0xED)))

_PNG_MODES = {
    (1, 0): "1", (2, 0): "L", (4, 0): "L", (8, 0): "L", (16, 0): "I;16",
    (8, 2): "RGB", (16, 2): "RGB",
    (8, 4): "LA", (16, 4): "RGBA", (8, 6): "RGBA", (16, 6): "RGBA",
}  # fmt: skip
"""(bits, colour type) -> the mode Pillow opens it in. A palette (type 3) may be missing or short: let Pillow look."""

# A second header and animations are Pillow's business. Chunks before the pixels that Pillow
# cannot trip over, with the shortest length it accepts.
_PNG_DEFERRED = frozenset((b"IHDR", b"acTL", b"fcTL", b"fdAT"))
_PNG_SHORTEST = {b"pHYs": 9, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"tIME": 0, b"bKGD": 0, b"sBIT": 0, b"eXIf": 0}


_MAX_HEADS, _MAX_HEAD_BYTES = 1024, 2048
_heads: dict[bytes, Facts] = {}
"""What was found in everything before the scan: encoders write the same tables into thousands of images."""


def plain_jpeg(data: bytes) -> Facts | None:
    """Facts of a baseline or progressive JPEG without fill bytes, EXIF or other cleverness."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    scan = data.find(b"\xff\xda", 2, _MAX_HEAD_BYTES)
    facts = _heads.get(data[:scan]) if scan > 0 else None
    if facts is None:
        position, facts = _jpeg_head(data)
        if facts is None:
            return None
        if position == scan:  # else these two bytes stood within a segment
            if len(_heads) >= _MAX_HEADS:
                _heads.clear()
            _heads[data[:scan]] = facts
        scan = position
    # The scan's own header, then coded pixels, within which the bytes FF D9 cannot occur (FF is stuffed).
    if scan + 4 > len(data) or scan + 2 + (data[scan + 2] << 8 | data[scan + 3]) > len(data):
        return None
    return facts if data.endswith(b"\xff\xd9") or data.find(b"\xff\xd9", scan) >= 0 else None


def _jpeg_head(data: bytes) -> tuple[int, Facts | None]:
    """Where the first scan starts, and what the segments before it say; they decide both."""
    frame, position, last = b"", 2, len(data) - 4
    while position <= last:
        marker, length = data[position + 1], data[position + 2] << 8 | data[position + 3]
        if data[position] != 0xFF:
            return position, None
        if marker == 0xDA:
            return position, _frame_facts(frame)
        if 0xC0 <= marker <= 0xC2:
            if frame:
                return position, None
            frame = data[position + 4 : position + 2 + length]
        elif marker not in _SKIPPED and not _is_harmless(marker, data[position + 4 : position + 2 + length]):
            return position, None
        position += 2 + length
    return position, None


def _is_harmless(marker: int, body: bytes) -> bool:
    """Whether Pillow cannot trip over this segment."""
    if marker == 0xDB:  # one or two tables of 64 bytes each
        return len(body) in (65, 130) and body[0] < 16 and (len(body) == 65 or body[65] < 16)
    if marker == 0xE2:
        return len(body) >= 14 and body.startswith(b"ICC_PROFILE\0")
    return marker in (0xE0, 0xEE) and len(body) >= 7


def _frame_facts(frame: bytes) -> Facts | None:
    if len(frame) < 6 or frame[0] != 8 or len(frame) != 6 + 3 * frame[5]:
        return None
    mode = _JPEG_MODES.get(frame[5])
    width, height = frame[3] << 8 | frame[4], frame[1] << 8 | frame[2]
    return Facts(width, height, "jpg", mode) if mode and width and height else None


def plain_png(data: bytes) -> Facts | None:
    """Facts of a PNG whose chunks are intact, and of which Pillow has nothing to unpack before the pixels."""
    if data[8:16] != b"\0\0\0\rIHDR" or len(data) < 57:
        return None
    mode = _PNG_MODES.get((data[24], data[25]))
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if mode is None or data[26] or data[27] or data[28] > 1 or not width or not height:
        return None
    return Facts(width, height, "png", mode) if _are_plain_chunks(data) else None


def _are_plain_chunks(data: bytes) -> bool:
    has_pixels, position, view = False, 8, memoryview(data)
    while True:
        name, length = data[position + 4 : position + 8], int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        if end > len(data) or zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if name == b"IEND":
            return has_pixels
        if name == b"IDAT":
            has_pixels = True
        elif position > 8 and (name in _PNG_DEFERRED or not (has_pixels or length >= _PNG_SHORTEST.get(name, 1 << 32))):
            return False
        position = end
