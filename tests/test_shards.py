from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.ingest.shards import KeptIndexes, TarWriter, leaves, shard_hash, tar_header
from pipeline.ingest.tar_writer import sample_headers
from pipeline.ingest.units import Pack
from pipeline.schema import INDEX, FileRef, index_path
from pipeline.store import Store, table_to_ipc

MEMBERS = [
    ("00ff.cls", b"7"),
    ("00ff.jpg", b"x" * 512),
    ("0100.cls", b"12"),
    ("0100.png", b""),
    ("0101.jpg", b"y" * 700),
]


def written() -> tuple[bytes, list[int]]:
    stream = io.BytesIO()
    tar = TarWriter(stream)
    offsets = [tar.add(name, data) for name, data in MEMBERS]
    tar.close()
    return stream.getvalue(), offsets


def test_headers_are_those_of_the_standard_library() -> None:
    info = tarfile.TarInfo("0123456789abcdef.jpg")
    info.size, info.mode = 123_456, 0o644
    assert tar_header(info.name, info.size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_tarfile_reads_every_member_back() -> None:
    with tarfile.open(fileobj=io.BytesIO(written()[0])) as archive:
        assert [(item.name, archive.extractfile(item).read()) for item in archive] == MEMBERS  # type: ignore[union-attr]


def test_offsets_lead_to_the_data() -> None:
    data, offsets = written()
    assert all(data[offset : offset + len(body)] == body for offset, (_, body) in zip(offsets, MEMBERS, strict=True))


def test_close_returns_the_hash_of_the_whole_file() -> None:
    stream = io.BytesIO()
    tar = TarWriter(stream)
    tar.add("a.jpg", b"1")
    assert tar.close() == hashlib.sha256(stream.getvalue()).hexdigest()
    assert tar.size == len(stream.getvalue())


@pytest.mark.parametrize("seed", range(5))
def test_samples_laid_out_together_are_members_added_one_by_one(seed: int) -> None:
    """Any mixture of keys, labels, extensions on both sides of "cls", sizes around a block, other members between."""
    rng = np.random.default_rng(seed)
    together, singly = io.BytesIO(), io.BytesIO()
    one, other = TarWriter(together), TarWriter(singly)
    for number in range(700):
        key = int(rng.integers(0, 2**64, dtype=np.uint64))
        class_id = int(rng.choice([0, 9, 10, 123_456, 2**31 - 1]))
        extension = str(rng.choice(["bmp", "gif", "jpg", "png", "tif", "webp"]))
        data = rng.bytes(int(rng.choice([0, 1, 511, 512, 513, 9000])))
        members = {f"{key:016x}.cls": b"%d" % class_id, f"{key:016x}.{extension}": data}
        offsets = {name: other.add(name, members[name]) for name in sorted(members)}
        assert one.add_sample(key, class_id, extension, data) == offsets[f"{key:016x}.{extension}"]
        if number % 100 == 0:
            assert one.add("note.txt", b"x") == other.add("note.txt", b"x")
    assert one.close() == other.close()
    assert together.getvalue() == singly.getvalue()
    assert one.size == len(singly.getvalue()) > 1 << 20  # more than is kept back before it is written


def test_a_sample_that_ustar_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="under 8 GiB"):
        sample_headers([1], [0], ["jpg"], [8**11])


def test_a_name_that_ustar_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 100 bytes"):
        tar_header("k" * 101, 1)


def sorted_hashes(num: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).integers(0, 2**64, num, dtype=np.uint64))


def divide(
    hashes: np.ndarray, max_samples: int = 20, max_bytes: int = 10**9, size: int = 1
) -> dict[str, tuple[int, ...]]:
    sizes = np.full(len(hashes), size, np.int64)
    parts = leaves(hashes, sizes, max_samples=max_samples, max_bytes=max_bytes)
    return {leaf.prefix: tuple(hashes[leaf.start : leaf.stop].tolist()) for leaf in parts}


@pytest.mark.parametrize("num", [0, 1, 20, 21, 500, 3000])
@pytest.mark.parametrize("seed", range(3))
def test_leaves_hold_every_sample_once_under_its_own_prefix(num: int, seed: int) -> None:
    hashes = sorted_hashes(num, seed)
    parts = divide(hashes)
    assert [value for prefix in sorted(parts) for value in parts[prefix]] == hashes.tolist()
    assert all(f"{value:064b}".startswith(prefix) for prefix, values in parts.items() for value in values)
    assert all(1 <= len(values) <= 20 for values in parts.values())


def test_bytes_divide_too_and_one_huge_image_stands_alone() -> None:
    assert max(map(len, divide(sorted_hashes(100, 0), max_samples=1000, max_bytes=10).values())) <= 10
    assert set(map(len, divide(sorted_hashes(9, 0), max_samples=1000, max_bytes=10, size=99).values())) == {1}


def leaf_of(parts: dict[str, tuple[int, ...]], value: int) -> str:
    return next(prefix for prefix in parts if f"{value:064b}".startswith(prefix))


@pytest.mark.parametrize("seed", range(30))
def test_one_sample_more_or_less_touches_one_leaf(seed: int) -> None:
    """B3: all that changes lies below the coarser of the two leaves that hold the sample."""
    hashes = sorted_hashes(400, seed)
    gone = int(np.random.default_rng(seed).integers(0, 400))
    larger, smaller = divide(hashes), divide(np.delete(hashes, gone))
    changed = {prefix for prefix in larger.keys() | smaller.keys() if larger.get(prefix) != smaller.get(prefix)}
    coarser = min((leaf_of(parts, int(hashes[gone])) for parts in (larger, smaller)), key=len)
    assert changed
    assert all(prefix.startswith(coarser) for prefix in changed)


def test_splits_and_seeds_have_tries_of_their_own() -> None:
    key = np.arange(100, dtype=np.uint64)
    hashes = [shard_hash(key, split=split, seed=seed) for split in ("train", "val") for seed in (0, 1)]
    assert len({tuple(np.argsort(value).tolist()) for value in hashes}) == 4


# ---- Indexes that are read again and again


class Indexes:
    """A store that counts what is read, with an index of each size."""

    def __init__(self, root: Path, *sizes: int) -> None:
        self.store = Store.open(str(root))
        self.reads: list[str] = []
        self.packs = [self._put(number, size) for number, size in enumerate(sizes)]
        read = self.store.read

        def counted(path: str) -> bytes:
            self.reads.append(path)
            return read(path)

        self.store.read = counted  # type: ignore[method-assign]

    def _put(self, number: int, num_rows: int) -> Pack:
        columns = {
            field.name: pa.array([f"{number:016x}"] * num_rows)
            if pa.types.is_string(field.type)
            else pa.array([bytes(32)] * num_rows, field.type)
            if pa.types.is_fixed_size_binary(field.type)
            else pa.array([number] * num_rows, field.type)
            for field in INDEX
        }
        data = table_to_ipc(pa.table(columns, schema=INDEX))
        digest = hashlib.sha256(data).hexdigest()
        self.store.put(index_path(digest), data)
        tar, index = (FileRef(sha256=digest, size=size, num_rows=num_rows) for size in (1, len(data)))
        return Pack(tar, index)


def test_a_large_index_is_read_once_and_a_small_one_each_time(tmp_path: Path) -> None:
    made = Indexes(tmp_path, 100, 5)
    kept = KeptIndexes(max_bytes=1 << 20, min_bytes=5_000)
    for _ in range(3):
        tables = [kept.read(made.store, pack) for pack in made.packs]
        assert [(table.num_rows, table["class_id"][0].as_py()) for table in tables] == [(100, 0), (5, 1)]
    large, small = (index_path(pack.index.sha256) for pack in made.packs)
    assert sorted(made.reads) == sorted([large, *[small] * 3])
    assert kept.used_bytes == kept.read(made.store, made.packs[0]).nbytes


def test_kept_indexes_never_hold_more_than_they_may(tmp_path: Path) -> None:
    """Also in turns through more of them than have room, where some are still found."""
    made = Indexes(tmp_path, *[100] * 6)
    size = KeptIndexes(min_bytes=0).read(made.store, made.packs[0]).nbytes
    made.reads.clear()
    kept = KeptIndexes(max_bytes=4 * size + size // 2, min_bytes=0)
    for _ in range(40):
        for number, pack in enumerate(made.packs):
            assert kept.read(made.store, pack)["class_id"][0].as_py() == number
            assert kept.used_bytes <= 4 * size
    assert kept.used_bytes == 4 * size
    assert 6 < len(made.reads) < 180, "of 240"
    assert KeptIndexes(max_bytes=size - 1, min_bytes=0).read(made.store, made.packs[0]).num_rows == 100
