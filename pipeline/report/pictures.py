"""Image bytes -> a small PNG as a data URI: new pixels in a file of our making, whatever the original carried.

Comes in: places of a snapshot, or rejects with their source. Goes out: a ``Picture``: pixels, or why there are none.
Guarantees: bytes are decoded only after their checksum was verified, one image at a time and within MAX_PIXELS; where
the build read headers only, a child process decodes each image first, so that a decoder's crash costs a tile.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EvenshardError
from pipeline.images import ImageRejected, Inspection, Inspector, Limits, decode_rgb
from pipeline.report.survey import Place, Progress
from pipeline.schema import tar_path
from pipeline.snapshot import Snapshot
from pipeline.store import ShardReader, read_image

MAX_PIXELS = 50_000_000
"""150 MB as RGB, once; larger images are told, not shown."""

Originals = Callable[[str], bytes]
"""The bytes of an entry of the source by its path; raises ``ImageRejected``."""

SIDE = 112
"""Longest side of a thumbnail; some 15 kB each as PNG, so a contact sheet of 24 stays well below a megabyte."""


@dataclass(frozen=True)
class Picture:
    """A ``data:`` URI; or '' and the problem."""

    uri: str
    problem: str = ""


class Pictures:
    """Thumbnails of one snapshot, each made once. A context manager: it may hold a child process."""

    def __init__(
        self, snapshot: Snapshot, originals: Originals | None = None, progress: Progress | None = None
    ) -> None:
        self._snapshot = snapshot
        self._originals = originals
        self._progress = progress
        self._reader = ShardReader(snapshot.store)
        self._tars: list[str] = snapshot.shards["tar_sha256"].to_pylist()
        self._inspector: Inspector | None = None
        if snapshot.record.config.get("check") == "header":
            limits = Limits(max_pixels=MAX_PIXELS)
            self._inspector = Inspector(Inspection(check="decode", limits=limits), isolated=True)
        self._made: dict[Place | str, Picture] = {}

    def __enter__(self) -> Pictures:
        if self._inspector is not None:
            self._inspector.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._inspector is not None:
            self._inspector.__exit__(kind, value, trace)

    @property
    def has_originals(self) -> bool:
        """Whether rejects can be shown."""
        return self._originals is not None

    def sample(self, split: str, row: int) -> Picture:
        """Row ``row`` of the sample table of ``split``."""
        shard, place = (int(self._snapshot.samples(split).take(name, [row])[0]) for name in ("shard", "row"))
        return self.at(Place(shard, place))

    def at(self, place: Place) -> Picture:
        """An image of a shard."""
        if place not in self._made:
            self._made[place] = self._picture(lambda: self._stored(place))
        return self._made[place]

    def original(self, path: str, sha256: str) -> Picture:
        """A rejected entry of the source, if it still holds the bytes that were rejected."""
        if path not in self._made:
            self._made[path] = self._picture(lambda: self._rejected(path, sha256))
        return self._made[path]

    def _stored(self, place: Place) -> bytes:
        row = self._snapshot.index(place.shard).slice(place.row, 1).to_pylist()[0]
        tar = tar_path(self._tars[place.shard])
        where = (row["offset"], row["size"], row["checksum"])
        with self._snapshot.collection_told():
            return read_image(self._reader, tar, *where, lambda: self._snapshot.describe(place.shard, place.row))

    def _rejected(self, path: str, sha256: str) -> bytes:
        assert self._originals is not None
        data = self._originals(path)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise _OtherBytesError("the file in the source has changed since")
        return data

    def _picture(self, read: Callable[[], bytes]) -> Picture:
        if self._progress is not None:
            self._progress("pictures", len(self._made), 0)  # how many there will be, is known at the end
        try:
            data = read()
            if self._inspector is not None:
                self._inspector.inspect(data, "an image of the page")
            return Picture(thumbnail(data))
        except (EvenshardError, ImageRejected, IndexError) as error:  # the page is still wanted, and says so
            return Picture("", str(error))


class _OtherBytesError(EvenshardError):
    """What lies in the source is not what was rejected."""


def thumbnail(data: bytes, side: int = SIDE) -> str:
    """A ``data:`` URI of the image, at most ``side`` pixels wide and high. Raises ``images.ImageRejected``."""
    pixels = shrink(decode_rgb(data, max_pixels=MAX_PIXELS), side)
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
