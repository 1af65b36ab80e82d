"""A deterministic USTAR stream.

Comes in: names and bytes. Goes out: a tar, its SHA-256, the offset of every member. Guarantees: the same members give
the same bytes: mtime, uid and gid are 0, the mode is 0644, and there are no extended headers.
"""

from __future__ import annotations

import hashlib
from typing import BinaryIO

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_FLUSH_BYTES = 1 << 20
# Everything of a USTAR header that never varies: mode 0644, uid, gid, mtime 0, regular file, no owner names.
_HEAD = b"0000644\0" + b"0000000\0" * 2
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 155 + 12)
_MTIME = b"00000000000\0"
_FIXED_SUM = sum(_HEAD) + sum(_MTIME) + sum(_TAIL) + 8 * ord(" ")


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte POSIX.1-1988 (USTAR) header of a regular file; ``name`` is ASCII, at most 100 bytes."""
    encoded = name.encode("ascii")
    if len(encoded) > 100 or size >= 8**11:
        raise ValueError(f"a USTAR member has a name of at most 100 bytes and under 8 GiB: {name!r}, {size} bytes")
    octal = b"%011o" % size
    checksum = _FIXED_SUM + sum(encoded) + sum(octal)
    return b"%b%b%b\0%b%06o\0 %b" % (encoded.ljust(100, b"\0"), _HEAD, octal, _MTIME, checksum, _TAIL)


class TarWriter:
    """A deterministic USTAR stream: same members, same bytes. Knows its offset, size and running SHA-256."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._waiting: list[bytes] = []
        self._num_waiting = 0
        self.size = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data."""
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
        self._waiting.append(_ZEROS * 2)
        self.size += 2 * _BLOCK
        self._flush()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        """Hashing and writing small members one by one costs more than the bytes do."""
        data = b"".join(self._waiting)
        self._waiting.clear()
        self._num_waiting = 0
        self._stream.write(data)
        self._hash.update(data)
