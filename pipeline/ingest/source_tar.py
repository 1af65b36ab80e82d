"""The members of a tar, one after the other, whatever state the file is in.

Comes in: a stream of bytes. Goes out: members with their data, and damage. Guarantees: memory stays below the limit
asked for plus a few kilobytes; every block of the stream belongs to a member, to padding or to a `Damage`, never to
nothing; names and links are text and lead nowhere; a reader that meets damage goes on at the next header that is whole.

Written here because `tarfile` ends in silence at a damaged or missing header: of 400 flipped bits in headers, 391 lost
members without an error. Understood: v7, USTAR, GNU long names and base-256 sizes, PAX (`path`, `size`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

BLOCK = 512
SKIP_BYTES = 1 << 20
MAX_EXTENDED_BYTES = 1 << 20
"""Of a long name or a PAX header. A path has 4,096 bytes."""

Kind = Literal["file", "folder", "link", "sparse", "special"]

_ZEROS = bytes(BLOCK)
_KINDS: dict[bytes, Kind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "link",
    b"2": "link",
    b"5": "folder",
    b"D": "folder",
    b"S": "sparse",
}
_LONG_NAME, _PAX = b"L", (b"x", b"X")
_EXTENDED = frozenset((_LONG_NAME, b"K", *_PAX, b"g"))
"""Entries about the entry after them. Long link names and global records mean nothing here."""


class Source(Protocol):
    """Anything to read from, front to back."""

    def read(self, size: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """An entry whose header is whole. ``data`` is None where it was not asked for, or is no file's."""

    name: str
    kind: Kind
    size: int
    data: bytes | None = None


@dataclass(frozen=True)
class Damage:
    """A stretch that cannot be read. ``name`` is that of the member it hit, '' where the header itself is lost."""

    offset: int
    detail: str
    name: str = ""


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes


class _Truncated(Exception):
    """The stream ends within something."""


Limit = Callable[[str], int]
"""The name of a file -> how many bytes of it to hold at most; a longer one is passed over (``data`` is None)."""


def read_members(stream: Source, limit: Limit) -> Iterator[Member | Damage]:
    """Members and damage in the order of the file. An error of ``stream`` itself is passed on."""
    blocks = _Blocks(stream)
    ended = False
    while block := blocks.header():
        if block == _ZEROS:
            ended, start = True, blocks.position - BLOCK
            if (block := _after_zeros(blocks)) is None:
                return
            # Two tars one after the other, or a hole: what follows is not lost, but somebody should know.
            size = blocks.position - BLOCK - start
            yield Damage(start, f"{size} zero bytes at byte {start}, and more after them")
        ended = False
        yield from _entry(blocks, block, limit)
    if not ended:
        yield Damage(blocks.position, f"cut off at byte {blocks.position}: no end-of-archive mark")


def _after_zeros(blocks: _Blocks) -> bytes | None:
    """The first block that is not zero, None if there is none. Less than a block is padding of no kind, and ignored."""
    while block := blocks.header():
        if block != _ZEROS:
            return block
    return None


def _entry(blocks: _Blocks, block: bytes, limit: Limit) -> Generator[Member | Damage]:
    """One member with the extended headers before it, or the damage in its place."""
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        start = blocks.position - BLOCK
        header = _parse(block)
        if header is None:
            yield from _find_header(blocks, start)
            return
        name = pax.get("path") or long_name or header.name
        try:
            if header.kind in _EXTENDED:
                problem, text = _extended(blocks, header)
                if header.kind == _LONG_NAME and text is not None:
                    long_name = text.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
                elif header.kind in _PAX and text is not None:
                    parsed = _parse_pax(text)
                    problem = problem or (f"PAX header at byte {start} is damaged" if parsed is None else "")
                    pax.update(parsed or {})
                if problem:
                    yield from _without_name(blocks, start, problem)
                    return
                block = blocks.header()
                if not block:
                    return  # the missing end mark is told by the caller
                continue
            yield _body(blocks, name, header, pax, limit)
        except _Truncated as cut:
            if header.kind not in _EXTENDED:  # else there is no name to tell, and the caller misses the end mark
                yield Damage(start, f"cut off at byte {blocks.position}: {cut}", name)
        return


def _body(blocks: _Blocks, name: str, header: _Header, pax: dict[str, str], limit: Limit) -> Member:
    size = int(pax["size"]) if re.fullmatch(r"\d{1,19}", pax.get("size", "")) else header.size
    kind = _KINDS.get(header.kind, "special")
    if kind == "file" and any(key.startswith("GNU.sparse.") for key in pax):
        kind = "sparse"
    if kind == "file" and name.endswith("/") and header.kind == b"\0":
        kind = "folder"  # v7 has no type for folders
    if kind in ("link", "folder"):
        size = 0  # old tars give a hard link its target's size, without the data
    if kind == "file" and size <= limit(name):
        return Member(name, kind, size, blocks.data(size))
    blocks.skip(size)
    return Member(name, kind, size)


def _extended(blocks: _Blocks, header: _Header) -> tuple[str, bytes | None]:
    if header.size > MAX_EXTENDED_BYTES:
        blocks.skip(header.size)
        return f"an extended header of {header.size} bytes, the limit is {MAX_EXTENDED_BYTES}", None
    return "", blocks.data(header.size)


def _without_name(blocks: _Blocks, start: int, problem: str) -> Iterator[Damage]:
    """Pass over the member whose extended header is lost: its own header may hold half a name."""
    block = blocks.header()
    header = _parse(block) if block else None
    if header is not None:
        try:
            blocks.skip(0 if _KINDS.get(header.kind) in ("link", "folder") else header.size)
        except _Truncated as cut:
            problem += f"; cut off at byte {blocks.position}: {cut}"
    elif block:
        blocks.give_back(block)
    yield Damage(start, problem)


def _find_header(blocks: _Blocks, start: int) -> Iterator[Damage]:
    """Go on at the next block that is a header beyond doubt, or that begins the end."""
    while block := blocks.header():
        if block == _ZEROS or (block[257:262] == b"ustar" and _parse(block) is not None):
            blocks.give_back(block)
            break
    yield Damage(start, f"no readable header at byte {start}; {blocks.position - start} bytes passed over")


class _Blocks:
    """Exact reads; knows where it is."""

    def __init__(self, stream: Source) -> None:
        self._stream = stream
        self._again = b""
        self.position = 0

    def header(self) -> bytes:
        """The next block; b'' at the end, where a piece of a block is dropped."""
        block = self._again or self._read(BLOCK)
        self._again = b""
        if len(block) < BLOCK:
            return b""
        self.position += BLOCK
        return block

    def give_back(self, block: bytes) -> None:
        self._again = block
        self.position -= BLOCK

    def data(self, size: int) -> bytes:
        data = self._read(size)
        self.position += len(data)
        if len(data) < size:
            raise _Truncated(f"{len(data)} of {size} bytes")
        self._pad(size)
        return data

    def skip(self, size: int) -> None:
        left = size
        while left:
            data = self._read(min(left, SKIP_BYTES))
            self.position += len(data)
            left -= len(data)
            if not data:
                raise _Truncated(f"{size - left} of {size} bytes")
        self._pad(size)

    def _pad(self, size: int) -> None:
        # Padding that is cut off takes nothing with it; the missing end mark is told where the next header is missed.
        self.position += len(self._read(-size % BLOCK))

    def _read(self, size: int) -> bytes:
        parts: list[bytes] = []
        left = size
        while left:
            part = self._stream.read(left)
            if not part:
                break
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _parse(block: bytes) -> _Header | None:
    """None where the checksum or a number is wrong."""
    recorded = _number(block[148:156])
    if recorded is None or not _adds_up(block, recorded):
        return None
    size = _number(block[124:136])
    if size is None or size < 0 or size >= 1 << 63:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _Header(name.decode("utf-8", "surrogateescape"), size, block[156:157])


def _adds_up(block: bytes, recorded: int) -> bool:
    """As unsigned bytes, or as the signed ones that some old tars added up; the checksum's own bytes are spaces."""
    plain = sum(block) - sum(block[148:156]) + 8 * 0x20
    if recorded == plain:
        return True
    return recorded == plain - 256 * sum(byte >= 0x80 for byte in block[:148] + block[156:])


def _number(field: bytes) -> int | None:
    if field[0] in (0x80, 0xFF):  # GNU base-256
        value = int.from_bytes(field[1:], "big")
        return value - (1 << 8 * (len(field) - 1)) if field[0] == 0xFF else value
    text = field.split(b"\0", 1)[0].strip()
    if not text:
        return 0
    return int(text, 8) if re.fullmatch(rb"[0-7]+", text) else None


def _parse_pax(data: bytes) -> dict[str, str] | None:
    """Records ``LENGTH KEY=VALUE\\n``; None where they do not add up."""
    records: dict[str, str] = {}
    place = 0
    while place < len(data):
        match = re.compile(rb"(\d{1,9}) ").match(data, place)
        if match is None:
            return None if data[place:].strip(b"\0") else records
        end = place + int(match[1])
        key, equals, value = data[match.end() : end - 1].partition(b"=")
        if end > len(data) or end <= match.end() or data[end - 1 : end] != b"\n" or not equals:
            return None
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        place = end
    return records
