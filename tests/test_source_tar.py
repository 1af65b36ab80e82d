"""WebDataset tars as a source: grouped by the format's rules, damage by member, nothing lost in silence."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset

from pipeline.errors import SourceError
from pipeline.ingest.source_items import Fields, Item, Offered, Refused
from pipeline.ingest.source_streams import Inflated
from pipeline.ingest.source_tar import BLOCK, Damage, Member, read_members
from pipeline.ingest.source_webdataset import MAX_TEXT_BYTES, read_samples
from pipeline.schema import SPLIT_UNSET, Reason

MAX_BYTES = 1 << 20

# webdataset leaves the tars it has read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def make_tar(*members: tuple[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def samples(data: bytes, **fields: Any) -> list[Item]:
    return list(read_samples(io.BytesIO(data), "t.tar", Fields(**fields), max_bytes=MAX_BYTES))


def offered(items: list[Item]) -> dict[str, tuple[str, bytes]]:
    return {item.path: (item.label, item.data) for item in items if isinstance(item, Offered)}


def refused(items: list[Item]) -> dict[str, Reason]:
    return {item.path: item.reason for item in items if isinstance(item, Refused)}


def details(items: list[Item]) -> str:
    return "\n".join(item.detail for item in items if isinstance(item, Refused))


TWO = (("d/a.jpg", b"A"), ("d/a.cls", b"7\n"), ("d/b.png", b"B"), ("d/b.cls", b"cat"))
TWO_OFFERED = {"t.tar/d/a.jpg": ("7", b"A"), "t.tar/d/b.png": ("cat", b"B")}


# ---- The format's rules


def test_a_sample_is_its_consecutive_members_and_the_label_its_cls() -> None:
    items = samples(make_tar(*TWO))
    assert offered(items) == TWO_OFFERED
    assert not refused(items)


def test_extensions_are_one_in_either_case() -> None:
    assert offered(samples(make_tar(("a.JPG", b"A"), ("a.CLS", b"1")))) == {"t.tar/a.JPG": ("1", b"A")}


NAMES = ["a.jpg", "a.seg.png", "a.JPG", "d.x/a.jpg", "d/a.b.cls", "./a.jpg", "a/.b.jpg", ".b.jpg", "a", "d.x/a", "a..b"]


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_those_of_webdataset(seed: int, tmp_path: Path) -> None:
    """Whatever webdataset yields as one sample is one item here, under the same key."""
    rng = random.Random(seed)
    folders = rng.choices(["", "d/", "d.x/", "./"], k=12)
    members = [(f"{folder}{rng.choice('abc')}{rng.choice(['.jpg', '.cls', '.x.jpg', ''])}", b"7") for folder in folders]
    (tmp_path / "t.tar").write_bytes(make_tar(*members))
    keys = []
    handler = webdataset.ignore_and_continue
    for sample in webdataset.WebDataset(str(tmp_path / "t.tar"), shardshuffle=False, handler=handler):
        keys.append(sample["__key__"])
    items = [item for item in samples(make_tar(*members)) if "belongs to no sample" not in str(item[2])]
    assert len(items) == len(keys)
    assert all(item.path.startswith(f"t.tar/{key}.") for item, key in zip(items, keys, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    (item,) = samples(make_tar((name, b"")))
    assert ("belongs to no sample" in details([item])) == (key is None)
    if extension in ("jpg", "seg.png"):
        assert refused([item]) == {f"t.tar/{name}": Reason.NO_LABEL}


def test_what_belongs_to_no_sample_is_refused_one_by_one() -> None:
    items = samples(make_tar(("README", b"x"), ("__meta__/a.jpg", b"x"), *TWO))
    assert refused(items) == {"t.tar/README": Reason.NO_IMAGE, "t.tar/__meta__/a.jpg": Reason.NO_IMAGE}
    assert offered(items) == TWO_OFFERED


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, Reason.UNREADABLE),
        (tarfile.LNKTYPE, Reason.UNREADABLE),
        (tarfile.CHRTYPE, Reason.UNREADABLE),
        (tarfile.FIFOTYPE, Reason.UNREADABLE),
        (tarfile.GNUTYPE_SPARSE, Reason.UNREADABLE),
        (b"Z", Reason.UNREADABLE),
        (tarfile.DIRTYPE, None),
    ],
)
def test_only_files_are_read(kind: bytes, reason: Reason | None) -> None:
    entry = tarfile.TarInfo("d/x.jpg")
    entry.type, entry.linkname = kind, "/etc/passwd"
    items = samples(entry.tobuf(tarfile.USTAR_FORMAT) + make_tar(*TWO))
    assert refused(items) == ({"t.tar/d/x.jpg": reason} if reason else {})
    assert offered(items) == TWO_OFFERED


def test_a_name_that_climbs_is_only_text() -> None:
    items = samples(make_tar(("../../etc/a.jpg", b"A"), ("../../etc/a.cls", b"1")))
    assert offered(items) == {"t.tar/../../etc/a.jpg": ("1", b"A")}


def test_names_that_come_twice_stay_apart() -> None:
    items = samples(make_tar(("a.jpg", b"1"), ("a.cls", b"1"), ("b.cls", b"1"), ("a.jpg", b"2"), ("a.cls", b"2")))
    assert offered(items) == {"t.tar/a.jpg": ("1", b"1"), "t.tar/a.jpg#2": ("2", b"2")}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.jpg", b"A"), ("a.png", b"B"), ("a.cls", b"1")], Reason.AMBIGUOUS),
        ([("a.jpg", b"A"), ("a.JPG", b"B"), ("a.cls", b"1")], Reason.AMBIGUOUS),
        ([("a.jpg", b"A"), ("a.cls", b"1"), ("a.cls", b"2")], Reason.AMBIGUOUS),
        ([("a.cls", b"1"), ("a.txt", b"x")], Reason.NO_IMAGE),
        ([("a.pyd", b"cos\nsystem\n."), ("a.cls", b"1")], Reason.NO_IMAGE),
        ([("a.jpg", b"A")], Reason.NO_LABEL),
        ([("a.jpg", b"A"), ("a.cls", b" \n")], Reason.NO_LABEL),
        ([("a.jpg", b"A"), ("a.cls", b"two\nlines")], Reason.NO_LABEL),
        ([("a.jpg", b"A"), ("a.cls", b"x" * 501)], Reason.NO_LABEL),
        ([("a.jpg", b"A"), ("a.cls", b"\xff\xfe")], Reason.NO_LABEL),
        ([("a.jpg", b"A"), ("a.cls", b"1" * (MAX_TEXT_BYTES + 1))], Reason.NO_LABEL),
        ([("a.jpg", b""), ("a.cls", b"1")], Reason.EMPTY),
        ([("a.jpg", b"A" * (MAX_BYTES + 1)), ("a.cls", b"1")], Reason.TOO_LARGE),
        ([("a.jpg", b"A" * MAX_BYTES), ("a.cls", b"1")], None),
    ],
)
def test_a_sample_that_cannot_be_used_is_refused_with_its_reason(
    members: list[tuple[str, bytes]], reason: Reason | None
) -> None:
    items = samples(make_tar(*members))
    assert [item.reason if isinstance(item, Refused) else None for item in items] == [reason]


def test_a_name_that_is_no_text_is_refused() -> None:
    items = samples(make_tar(("\udcff.jpg", b"A"), ("\udcff.cls", b"1")))
    assert refused(items) == {"t.tar/\\xff.jpg": Reason.NAME_ENCODING}


# ---- Where labels are


BOTH = (
    ("a.jpg", b"A"),
    ("a.seg.png", b"S"),
    ("a.txt", b"a cat"),
    ("a.json", b'{"x": {"y": 7, "z.w": "q"}, "b": true}'),
)


@pytest.mark.parametrize(
    ("label", "found"),
    [("txt", "a cat"), ("TXT", "a cat"), ("json.x.y", "7"), ("json.x.z.w", "q"), ("JSON.b", "true")],
)
def test_a_label_is_a_text_or_a_field_of_json(label: str, found: str) -> None:
    assert offered(samples(make_tar(*BOTH), label=label, image="jpg")) == {"t.tar/a.jpg": (found, b"A")}


@pytest.mark.usefixtures("cycles_wait")
@pytest.mark.parametrize(
    ("json", "label", "part"),
    [
        (b"{}", "json.x", "no text at 'x'"),
        (b'{"x": [1]}', "json.x", "no text at 'x'"),
        (b'{"x": null}', "json.x", "no text at 'x'"),
        (b"[" * 100_000, "json.x", "no text at 'x'"),
        (b"not json", "json.x", "no text at 'x'"),
        (b'{"x": 1}', "meta.json.x", "no member .meta.json"),
        (b'{"x": 1}', "cls", "no member .cls"),
    ],
)
def test_a_label_that_is_not_there_is_told(json: bytes, label: str, part: str) -> None:
    items = samples(make_tar(("a.jpg", b"A"), ("a.json", json)), label=label)
    assert refused(items) == {"t.tar/a.jpg": Reason.NO_LABEL}
    assert part in details(items)


def test_the_image_may_be_chosen_by_its_extension() -> None:
    assert offered(samples(make_tar(*BOTH), label="txt", image="seg.png")) == {"t.tar/a.seg.png": ("a cat", b"S")}
    assert refused(samples(make_tar(*BOTH), label="txt")) == {"t.tar/a.jpg": Reason.AMBIGUOUS}
    assert refused(samples(make_tar(*BOTH), label="txt", image="webp")) == {"t.tar/a.jpg": Reason.NO_IMAGE}


def test_split_and_group_may_be_fields_too() -> None:
    def sample(key: str, json: bytes) -> tuple[tuple[str, bytes], ...]:
        return (f"{key}.jpg", key.encode()), (f"{key}.cls", b"1"), (f"{key}.json", json)

    data = make_tar(
        *sample("a", b'{"s": "train", "g": 5}'),
        *sample("b", b'{"s": "Valid", "g": "5"}'),
        *sample("c", b'{"s": "test"}'),
    )
    a, b, c = samples(data, split="json.s", group="json.g")  # type: ignore[misc]
    assert (a.split, b.split, c.split) == (0, 1, 2)
    assert a.group == b.group is not None  # type: ignore[union-attr]
    assert c.group is None  # type: ignore[union-attr]
    assert {item.split for item in samples(data, split="json.s", ignore_split=True)} == {SPLIT_UNSET}


def test_a_split_that_is_none_stops_and_one_that_is_missing_is_refused() -> None:
    with pytest.raises(SourceError, match=r"'json\.s' must say one of .* but says 'holdout'"):
        samples(make_tar(("a.jpg", b"A"), ("a.cls", b"1"), ("a.json", b'{"s": "holdout"}')), split="json.s")
    items = samples(make_tar(("a.jpg", b"A"), ("a.cls", b"1")), split="json.s")
    assert refused(items) == {"t.tar/a.jpg": Reason.NO_LABEL}


# ---- Dialects


LONG = "d" * 90 + "/" + "e" * 90 + "/" + "f" * 90


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_the_standard_library_are_read(tar_format: int) -> None:
    name = LONG if tar_format != tarfile.USTAR_FORMAT else "d" * 90 + "/" + "e" * 90
    members = ((f"{name}.jpg", b"A" * 700), (f"{name}.cls", "é".encode()), *TWO)
    expected = {f"t.tar/{name}.jpg": ("é", b"A" * 700), **TWO_OFFERED}
    assert offered(samples(make_tar(*members, tar_format=tar_format))) == expected


def test_tars_of_webdataset_are_read(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "%d.tar"), maxcount=2, verbose=0) as writer:
        for key, label in (("a", 1), ("é", 2), ("c", 3)):
            writer.write({"__key__": key, "jpg": key.encode(), "cls": label, "json": {"n": label}})
    found: dict[str, tuple[str, bytes]] = {}
    for path in sorted(tmp_path.glob("*.tar")):
        found |= offered(samples(path.read_bytes()))
    assert found == {"t.tar/a.jpg": ("1", b"a"), "t.tar/é.jpg": ("2", "é".encode()), "t.tar/c.jpg": ("3", b"c")}


@pytest.mark.parametrize("dialect", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_tars_of_gnu_tar_are_read(tmp_path: Path, dialect: str) -> None:
    tar = shutil.which("tar")
    assert tar, "GNU tar is part of every system that this runs on"
    (tmp_path / "d").mkdir()
    for name, data in TWO:
        (tmp_path / name).write_bytes(data)
    (tmp_path / "d/b.link").symlink_to("a.jpg")
    subprocess.run([tar, f"--format={dialect}", "--sort=name", "-cf", "t.tar", "d"], cwd=tmp_path, check=True)
    items = samples((tmp_path / "t.tar").read_bytes())
    assert offered(items) == TWO_OFFERED
    assert refused(items) == {"t.tar/d/b.link": Reason.UNREADABLE}


def test_sparse_files_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "a.cls").write_bytes(b"1")
    for dialect in ("gnu", "pax"):
        command = ["tar", f"--format={dialect}", "--sparse", "--hole-detection=raw", "-cf", "t.tar", "a.cls", "a.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        items = samples((tmp_path / "t.tar").read_bytes())
        assert not offered(items)
        assert Reason.UNREADABLE in refused(items).values()


def test_a_size_beyond_eight_gigabytes_is_understood() -> None:
    entry = tarfile.TarInfo("a.jpg")
    entry.size = 9 << 30
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        items = samples(entry.tobuf(tar_format) + bytes(BLOCK))
        assert "512 of 9663676416 bytes" in details(items)


def test_gzip_is_unpacked_and_its_damage_told() -> None:
    packed = gzip.compress(make_tar(*TWO), mtime=0)

    def read(data: bytes) -> tuple[list[Item], str]:
        stream = Inflated(io.BytesIO(data))
        items = list(read_samples(stream, "t.tar", Fields(), max_bytes=MAX_BYTES))
        while stream.read(1 << 16):
            pass
        return items, stream.problem

    assert read(packed) == (samples(make_tar(*TWO)), "")
    assert read(packed + bytes(100)) == read(packed)
    assert "cut off" in read(packed[:-20])[1]
    assert "checksum is wrong" in read(packed[:-6] + b"\0" + packed[-5:])[1]
    halves = make_tar(*TWO)
    assert read(gzip.compress(halves[:2000]) + gzip.compress(halves[2000:])) == read(packed)


def test_an_inflated_bomb_is_passed_over_in_pieces() -> None:
    bomb = gzip.compress(make_tar(("a.jpg", bytes(200 << 20)), ("a.cls", b"1")), 9)
    import tracemalloc

    tracemalloc.start()
    items = list(read_samples(Inflated(io.BytesIO(bomb)), "t.tar", Fields(), max_bytes=MAX_BYTES))
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert refused(items) == {"t.tar/a.jpg": Reason.TOO_LARGE}


# ---- Damage


SIX = tuple((f"{key}.{ext}", data) for key in "abcdef" for ext, data in (("jpg", key.encode() * 700), ("cls", b"1")))


def good(items: list[Item]) -> set[str]:
    for path, (label, data) in offered(items).items():
        key = path.removeprefix("t.tar/")[0]
        assert (label, data) == ("1", key.encode() * 700), "damage gave wrong bytes"
    return {path.removeprefix("t.tar/")[0] for path in offered(items)}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_keeps_what_is_whole_and_tells_the_rest(tar_format: int) -> None:
    data = make_tar(*SIX, tar_format=tar_format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        ends = {entry.name[0]: entry.offset_data + entry.size for entry in tar}  # the label is the second member
    marked = max(ends.values()) // BLOCK * BLOCK + 2 * BLOCK
    for cut in [*range(0, len(data), BLOCK), *range(100, len(data), 1700)]:
        items = samples(data[:cut])
        assert good(items) == {key for key, end in ends.items() if end <= cut}
        assert ("t.tar" in refused(items)) == (cut < marked), cut


def test_every_flipped_bit_of_a_header_is_noticed_and_costs_one_sample() -> None:
    data = make_tar(*SIX)
    rng = random.Random(1)
    for _ in range(300):
        member = rng.randrange(6)
        inside = rng.choice([*range(154), *range(156, BLOCK)])  # what ends the checksum's digits means nothing
        place = member * (3 + 2) * BLOCK + rng.choice([0, 3]) * BLOCK + inside
        broken = bytearray(data)
        broken[place] ^= 1 << rng.randrange(8)
        items = samples(bytes(broken))
        assert good(items) == set("abcdef") - {"abcdef"[member]}
        assert Reason.DAMAGED in refused(items).values()


def test_a_tar_of_noise_in_any_place_ends_and_gives_no_wrong_bytes() -> None:
    data = make_tar(*SIX, tar_format=tarfile.PAX_FORMAT)
    rng = random.Random(2)
    for _ in range(300):
        start = rng.randrange(0, len(data), BLOCK)
        length = rng.choice([1, 100, BLOCK, 5 * BLOCK])
        broken = data[:start] + rng.randbytes(length) + data[start + length :]
        items = samples(broken)
        assert set(offered(items)) <= {f"t.tar/{key}.jpg" for key in "abcdef"}
        lost = set("abcdef") - {path[6] for path in offered(items)}
        assert not lost or refused(items)


def test_a_hole_is_told_and_what_follows_is_read() -> None:
    data = make_tar(*SIX)
    for start in range(0, len(data) - 4 * BLOCK, BLOCK):
        items = samples(data[:start] + bytes(3 * BLOCK) + data[start + 3 * BLOCK :])
        lost = set("abcdef") - {path[6] for path in offered(items)}
        assert len(lost) <= 2
        assert refused(items) or not lost


def test_tars_one_after_the_other_are_all_read_and_told() -> None:
    items = samples(make_tar(*SIX[:6]) + make_tar(*SIX[6:]))
    assert good(items) == set("abcdef")
    assert refused(items) == {"t.tar": Reason.DAMAGED}
    assert "zero bytes" in details(items)


@pytest.mark.parametrize("record", [b"99 path=x\n", b"x", b"7 path\n", b"12 path=xxxxx", b"0 path=x\n"])
def test_a_damaged_pax_header_costs_its_member(record: bytes) -> None:
    entry = tarfile.TarInfo("././@PaxHeader")
    entry.type, entry.size = tarfile.XHDTYPE, len(record)
    head = entry.tobuf(tarfile.USTAR_FORMAT) + record.ljust(BLOCK, b"\0")
    items = samples(head + make_tar(("x.jpg", b"X"), *TWO))
    assert offered(items) == TWO_OFFERED
    assert refused(items) == {"t.tar": Reason.DAMAGED}


def test_an_endless_extended_header_is_passed_over() -> None:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 3 << 20
    data = entry.tobuf(tarfile.GNU_FORMAT) + bytes(3 << 20) + make_tar(("x.jpg", b"X"), *TWO)
    items = samples(data)
    assert offered(items) == TWO_OFFERED
    assert refused(items) == {"t.tar": Reason.DAMAGED}


def test_every_byte_of_a_tar_is_accounted_for() -> None:
    """Members and damage follow one another without a gap, whatever was done to the file."""
    data = make_tar(*SIX)
    rng = random.Random(3)
    for _ in range(200):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        entries = list(read_members(io.BytesIO(bytes(broken)), lambda name: MAX_BYTES))
        names = Counter(entry.name for entry in entries if isinstance(entry, Member))
        missing = [name for name, _ in SIX if name not in names]
        assert not missing or any(isinstance(entry, Damage) for entry in entries)
