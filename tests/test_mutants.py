"""Damaged images: the header parser never says more than Pillow; a build over them ends, each a row or a reject."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import pytest
from independent_checker import check_root
from mutants import mutants, originals
from PIL import Image, TiffImagePlugin

import pipeline
from pipeline.images import Facts, ImageRejected, Inspection, Limits, inspect
from pipeline.images.headers import PILLOW_FORMATS, glance
from pipeline.images.plain import plain_jpeg, plain_png

LIMITS = Limits(max_pixels=1 << 22, max_bytes=1 << 20)


def pillow_opens(data: bytes, found: str) -> Facts | None:
    """What Pillow alone says of a header."""
    assert TiffImagePlugin
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(BytesIO(data), formats=(PILLOW_FORMATS[found],))
    except Exception:
        return None
    return Facts(*image.size, found, image.mode)


def test_plain_files_need_no_pillow() -> None:
    assert [bool(plain_jpeg(data) or plain_png(data)) for extension, data in originals() if extension == "jpg"] == [
        *[True] * 6,  # baseline; progressive with a colour profile; each in three modes
        *[False] * 3,  # EXIF is Pillow's
    ]
    found = [plain_png(data) for extension, data in originals() if extension == "png"]
    assert [facts.mode if facts else "" for facts in found] == ["RGB", "RGBA", "L", "", "1"] * 2 + [""]


def test_the_parser_tells_what_pillow_tells_or_nothing() -> None:
    num_told = 0
    for name, data in [*mutants(4000, seed=1), *originals()]:
        facts = plain_jpeg(data) or (plain_png(data) if data.startswith(b"\x89PNG\r\n\x1a\n") else None)
        if facts is not None:
            num_told += 1
            assert facts == pillow_opens(data, facts.format), name
    assert num_told > 250  # else the law holds of nothing


def test_segments_of_a_wrong_length_are_left_to_pillow() -> None:
    data = originals()[0][1]
    frame = data.index(b"\xff\xc0")
    longer = (
        data[: frame + 3] + bytes([data[frame + 3] + 1]) + data[frame + 4 : frame + 19] + b"\0" + data[frame + 19 :]
    )
    assert plain_jpeg(data) is not None
    assert plain_jpeg(longer) is None
    assert plain_jpeg(data[:2] + b"\xff\xfe\0\0" + data[4:]) is None
    empty = data[:2] + b"\xff\xfe\0\1" + data[2:]
    assert plain_jpeg(empty) is None


def test_the_header_check_accepts_only_what_pillow_opens_as_the_same() -> None:
    for name, data in mutants(1500, seed=2):
        try:
            facts = inspect(data, check="header", limits=LIMITS)
        except ImageRejected:
            continue
        opened = pillow_opens(data, facts.format)
        assert opened is not None, name
        assert facts[3] == opened[3], name
        assert sorted(facts[:2]) == sorted(opened[:2]), name  # TIFF is turned by Pillow, not by us


def test_what_the_parser_leaves_is_checked_by_structure_first() -> None:
    whole = {extension: data for extension, data in originals() if extension in ("gif", "webp")}
    for extension, data in whole.items():
        with pytest.raises(ImageRejected, match="truncated"):
            glance(data[: len(data) // 2], limits=LIMITS)
        huge = bytearray(data)
        at, size = {"gif": (6, 2), "webp": (24, 3)}[extension]
        huge[at : at + 2 * size] = b"\xff" * (2 * size)
        with pytest.raises(ImageRejected, match="too-large: declares"):
            Inspection(check="decode", limits=LIMITS).decode(bytes(huge))


def test_a_build_over_mutants_ends_with_a_row_or_a_reject_for_each(tmp_path: Path) -> None:
    """B1."""
    names: list[str] = []
    for number, (name, data) in enumerate(mutants(210, seed=3)):
        path = tmp_path / "photos" / "ab"[number % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        names.append(f"{path.parent.name}/{name}")
    pipeline.build(tmp_path / "photos", tmp_path / "root", address="none", workers=1, max_pixels=1 << 22)
    rows, rejects = check_root(tmp_path / "root")
    assert sorted([row["path"] for row in rows] + [row["path"] for row in rejects]) == sorted(names)
    assert len(rows) > 20
    assert len(rejects) > 20
