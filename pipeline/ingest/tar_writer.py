"""A deterministic USTAR stream.

Comes in: names and bytes. Goes out: a tar, its SHA-256, the offset of every member. Guarantees: the same members give
the same bytes: mtime, uid and gid are 0, the mode is 0644, and there are no extended headers.
"""

from __future__ import annotations

import hashlib
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_FLUSH_BYTES = 1 << 20
# Everything of a USTAR header that never varies: mode 0644, uid, gid, mtime 0, regular file, no owner names.
_HEAD = b"0000644\0" + b"0000000\0" * 2
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 155 + 12)
_MTIME = b"00000000000\0"
_SAMPLE_BYTES = 3 * _BLOCK
"""Of a sample beyond its image: two headers, and the label, which fits a block."""

_FIXED_SUM = sum(_HEAD) + sum(_MTIME) + sum(_TAIL) + 8 * ord(" ")

# Bytes 100 to 511 of a header, the checksum's place filled with blanks, as its rule has it.
_TEMPLATE = np.frombuffer(_HEAD + bytes(12) + _MTIME + b" " * 8 + _TAIL, np.uint8)


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte POSIX.1-1988 (USTAR) header of a regular file; ``name`` is ASCII, at most 100 bytes."""
    encoded = name.encode("ascii")
    if len(encoded) > 100 or size >= 8**11:
        raise ValueError(f"a USTAR member has a name of at most 100 bytes and under 8 GiB: {name!r}, {size} bytes")
    octal = b"%011o" % size
    checksum = _FIXED_SUM + sum(encoded) + sum(octal)
    return b"%b%b%b\0%b%06o\0 %b" % (encoded.ljust(100, b"\0"), _HEAD, octal, _MTIME, checksum, _TAIL)


def sample_headers(keys: list[int], class_ids: list[int], extensions: list[str], sizes: list[int]) -> bytes:
    """1,536 bytes a sample: header and padded body of ``<key>.cls``, then the header of ``<key>.<extension>``.

    `tar_header` for many members at once: a column of bytes at a time, not a string.
    """
    stems = np.array(keys, ">u8").tobytes().hex().encode()
    stem = np.frombuffer(stems, np.uint8).reshape(len(keys), 16)
    label = np.array(class_ids).astype("S19").view(np.uint8).reshape(len(keys), -1)
    blocks = np.zeros((len(keys), _SAMPLE_BYTES), np.uint8)
    _fill_headers(blocks[:, :_BLOCK], stem, ["cls"], np.count_nonzero(label, axis=1))
    blocks[:, _BLOCK : _BLOCK + label.shape[1]] = label
    _fill_headers(blocks[:, 2 * _BLOCK :], stem, extensions, np.array(sizes))
    return blocks.tobytes()


def _fill_headers(
    blocks: NDArray[np.uint8], stem: NDArray[np.uint8], extensions: list[str], sizes: NDArray[np.int64]
) -> None:
    """Headers of regular files ``<stem>.<extension>`` into zeroed ``blocks`` uint8 [n, 512]."""
    extension = np.array([text.encode("ascii") for text in extensions], "S").view(np.uint8).reshape(len(extensions), -1)
    if sizes.max() >= 8**11 or 17 + extension.shape[1] > 100:
        raise ValueError(f"a USTAR member has a name of at most 100 bytes and under 8 GiB: {sizes.max()} bytes")
    blocks[:, 100:] = _TEMPLATE
    blocks[:, :16] = stem
    blocks[:, 16] = ord(".")
    blocks[:, 17 : 17 + extension.shape[1]] = extension
    blocks[:, 124:135] = octal = _octal(sizes, 11)
    checksum = stem.sum(axis=1, dtype=np.int64) + extension.sum(axis=1, dtype=np.int64) + octal.sum(axis=1)
    blocks[:, 148:154] = _octal(checksum + (_FIXED_SUM + ord(".")), 6)  # the other bytes are those of any header
    blocks[:, 154] = 0


def _octal(numbers: NDArray[np.int64], num_digits: int) -> NDArray[np.int64]:
    shifts = np.arange(3 * (num_digits - 1), -1, -3)
    return (numbers[:, None] >> shifts & 7) + ord("0")


class TarWriter:
    """A deterministic USTAR stream: same members, same bytes. Knows its offset, size and running SHA-256."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._waiting: list[bytes] = []
        self._num_waiting = 0
        self._keys: list[int] = []  # of samples that wait for their headers, like the next three
        self._class_ids: list[int] = []
        self._extensions: list[str] = []
        self._images: list[bytes] = []
        self.size = 0

    def add_sample(self, key: int, class_id: int, extension: str, data: bytes) -> int:
        """Append ``<key as 16 hex digits>.<extension>`` and its label, in the order of their names.

        Returns the offset of ``data``.
        """
        self._keys.append(key)
        self._class_ids.append(class_id)
        self._extensions.append(extension)
        self._images.append(data)
        offset = self.size + (_BLOCK if extension < "cls" else _SAMPLE_BYTES)
        num_bytes = _SAMPLE_BYTES + len(data) + -len(data) % _BLOCK
        self.size += num_bytes
        self._num_waiting += num_bytes
        if self._num_waiting >= _FLUSH_BYTES:
            self._flush()
        return offset

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data."""
        self._lay_out()
        offset = self.size + _BLOCK
        padding = -len(data) % _BLOCK
        self._waiting += (tar_header(name, len(data)), data, _ZEROS[:padding])
        self.size = offset + len(data) + padding
        self._num_waiting += _BLOCK + len(data) + padding
        if self._num_waiting >= _FLUSH_BYTES:
            self._flush()
        return offset

    def close(self) -> str:
        """Write the end of the archive (not the stream's); returns the hex SHA-256 of everything written."""
        self._lay_out()
        self._waiting.append(_ZEROS * 2)
        self.size += 2 * _BLOCK
        self._flush()
        return self._hash.hexdigest()

    def _lay_out(self) -> None:
        """Let the samples that wait for their headers have them."""
        if not self._keys:
            return
        sizes = [len(data) for data in self._images]
        headers = sample_headers(self._keys, self._class_ids, self._extensions, sizes)
        places = range(0, len(headers), _SAMPLE_BYTES)
        for place, extension, data in zip(places, self._extensions, self._images, strict=True):
            label_end, end, padding = place + 2 * _BLOCK, place + _SAMPLE_BYTES, _ZEROS[: -len(data) % _BLOCK]
            if extension < "cls":
                self._waiting += (headers[label_end:end], data, padding, headers[place:label_end])
            else:
                self._waiting += (headers[place:end], data, padding)
        for column in (self._keys, self._class_ids, self._extensions, self._images):
            column.clear()

    def _flush(self) -> None:
        """Hashing and writing small members one by one costs more than the bytes do."""
        self._lay_out()
        data = b"".join(self._waiting)
        self._waiting.clear()
        self._num_waiting = 0
        self._stream.write(data)
        self._hash.update(data)
