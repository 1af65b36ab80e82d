"""One tar against its index, member by member, by the standard library's ``tarfile``."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.images import HARD_MAX_PIXELS, ImageRejected, Limits, inspect
from pipeline.verify.files import RESTORE
from pipeline.verify.findings import Code, Findings

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_ROW_BLOCKS = 3  # of a row without its image: two headers and the label, a number
_LIMITS = Limits(max_pixels=HARD_MAX_PIXELS, max_bytes=1 << 40)
_FIXED = {"type": tarfile.REGTYPE, "mode": 0o644, "uid": 0, "gid": 0, "mtime": 0, "uname": "", "gname": ""}

_FACTS = ("width", "height", "format", "mode")

Row = dict[str, Any]
Problem = tuple[Code, str]


def check_tar(data: bytes, index: pa.Table, path: str, findings: Findings) -> int:
    """Compare a whole tar with its index; returns how many images were compared."""
    return check_part(data, index, path, findings, start=0, is_last=True)


def check_part(data: bytes, index: pa.Table, path: str, findings: Findings, *, start: int, is_last: bool) -> int:
    """Compare what a tar holds from ``start`` on with the rows that lie there; returns how many images were compared.

    ``is_last``: the last row of the tar is among them, and its end follows.
    """
    rows: list[Row] = index.to_pylist()
    members = _members(data, path, findings, end=_END if is_last else b"")
    if members is None or not _same_names(members, rows, path, findings):
        return 0
    by_name = {member.name: member for member in members}
    for row in rows:
        image, label = by_name[_image_name(row)], by_name[_label_name(row)]
        problems = (*_member_problems(image), *_member_problems(label), *_row_problems(data, row, image, label, start))
        for code, detail in problems:
            findings.add(code, path, f"{row['key']} ({row['path']!r}): {detail}; {RESTORE}")
    return len(rows)


def row_starts(index: pa.Table) -> NDArray[np.int64]:
    """Where the first header of each row must lie, and where the last row ends, by sizes alone; int64 [rows + 1]."""
    blocks = -(-index["size"].to_numpy().astype(np.int64) // _BLOCK)
    return np.concatenate([[0], np.cumsum((blocks + _ROW_BLOCKS) * _BLOCK)])


def check_layout(index: pa.Table, size: int, path: str, findings: Findings) -> bool:
    """Whether offsets and the size of the tar are those that the sizes of its images give; no byte of it is read."""
    starts = row_starts(index)
    offset, keys = index["offset"].to_numpy().astype(np.int64), index["key"]
    before = np.where(
        index["format"].to_numpy() < "cls", 1, _ROW_BLOCKS
    )  # of two members the first is the smaller name
    wrong = offset != starts[:-1] + before * _BLOCK
    findings.add_rows(
        Code.TAR,
        path,
        wrong,
        lambda i: (
            f"{keys[i]}: its index says offset {offset[i]}, the sizes of the images before it give "
            f"{starts[i] + before[i] * _BLOCK}; {RESTORE}"
        ),
    )
    if starts[-1] + len(_END) != size:
        told = f"expected {starts[-1] + len(_END):,} bytes by the sizes in its index, the shard table says {size:,}"
        findings.add(Code.TAR, path, f"{told}; {RESTORE}")
        return False
    return not wrong.any()


def _members(data: bytes, path: str, findings: Findings, *, end: bytes) -> list[tarfile.TarInfo] | None:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as error:
        findings.add(Code.TAR, path, f"cannot be read as a tar: {error}; {RESTORE}")
        return None
    last = max((member.offset_data + -(-member.size // _BLOCK) * _BLOCK for member in members), default=0)
    if data[last:] != end:
        told = (
            f"expected {len(end):,} zero bytes after the last member and nothing more, found {len(data) - last:,} bytes"
        )
        findings.add(Code.TAR, path, f"{told}; {RESTORE}")
    return members


def _image_name(row: Row) -> str:
    return f"{row['key']}.{row['format']}"


def _label_name(row: Row) -> str:
    return f"{row['key']}.cls"


def _same_names(members: Sequence[tarfile.TarInfo], rows: Sequence[Row], path: str, findings: Findings) -> bool:
    """Each row's two members stand together, sorted; rows and members come in one order."""
    expected = [name for row in rows for name in sorted((_image_name(row), _label_name(row)))]
    found = [member.name for member in members]
    if found == expected:
        return True
    place = next((i for i, (one, two) in enumerate(zip(expected, found, strict=False)) if one != two), None)
    if place is None:
        told = f"expected {len(expected):,} members, found {len(found):,}"
    else:
        told = f"expected member number {place} to be {expected[place]!r}, found {found[place]!r}"
    findings.add(Code.TAR, path, f"{told}; {RESTORE}")
    return False


def _member_problems(member: tarfile.TarInfo) -> Iterator[Problem]:
    """Equal contents must give equal bytes: no clock, owner or extended header."""
    wrong = {name: getattr(member, name) for name, value in _FIXED.items() if getattr(member, name) != value}
    if wrong:
        yield (
            Code.TAR,
            f"{member.name}: expected {', '.join(f'{name} {_FIXED[name]!r}' for name in wrong)}, found {wrong}",
        )
    if member.pax_headers or member.offset_data - member.offset != _BLOCK:
        yield Code.TAR, f"{member.name}: expected a plain USTAR header, found an extended one"


def _row_problems(
    data: bytes, row: Row, image: tarfile.TarInfo, label: tarfile.TarInfo, start: int
) -> Iterator[Problem]:
    if (start + image.offset_data, image.size) != (row["offset"], row["size"]):
        yield (
            Code.TAR,
            f"its index says {row['size']} bytes at offset {row['offset']}, "
            f"the tar has {image.size} at {start + image.offset_data}",
        )
    for member in (image, label):
        end = member.offset_data + member.size
        if any(data[end : end + -member.size % _BLOCK]):
            yield Code.TAR, f"{member.name}: expected zero bytes up to the next block, found others"
    text = data[label.offset_data : label.offset_data + label.size]
    if text != b"%d" % row["class_id"]:
        yield Code.LABEL, f"expected class {row['class_id']} in {label.name}, found {text[:20]!r}"
    content = data[image.offset_data : image.offset_data + image.size]
    if (found := xxhash.xxh3_64_intdigest(content)) != row["checksum"]:
        yield Code.IMAGE, f"expected XXH3-64 {row['checksum']:016x}, found {found:016x}"
    if (digest := hashlib.sha256(content).digest()) != row["sha256"]:
        yield Code.IMAGE, f"expected SHA-256 {row['sha256'].hex()}, found {digest.hex()}"
    else:
        yield from _fact_problems(content, row)


def _fact_problems(content: bytes, row: Row) -> Iterator[Problem]:
    """The bytes are the right ones: they must be the image that the index describes."""
    try:
        facts = inspect(content, check="header", limits=_LIMITS)
    except ImageRejected as rejected:
        yield Code.IMAGE, f"expected an image that can be read, found {rejected}"
        return
    wrong = {name: value for name, value in facts._asdict().items() if name in _FACTS and row[name] != value}
    if wrong:
        yield Code.IMAGE, f"expected {', '.join(f'{name} {row[name]!r}' for name in wrong)}, found {wrong}"
