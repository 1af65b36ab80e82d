"""Parquet files with image bytes as a source: every row is one item, whatever state the file is in."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError
from pipeline.ingest import source_parquet
from pipeline.ingest.source_items import Fields, Item, Offered, Refused
from pipeline.ingest.source_parquet import Part, choose_columns, holds_images, open_parquet, plan_parts, read_rows
from pipeline.schema import SPLIT_UNSET, Reason

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["cat", "dog"]


def features(**columns: Any) -> dict[bytes, bytes]:
    """What `datasets` writes beside a schema."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


CLASSES = features(image={"_type": "Image"}, label={"names": NAMES, "_type": "ClassLabel"})


def table(images: list[Any], labels: list[Any], metadata: Any = CLASSES, **columns: Any) -> pa.Table:
    columns = {"image": pa.array(images, IMAGE), "label": pa.array(labels), **columns}
    return pa.table(columns).replace_schema_metadata(metadata)


def picture(number: int, path: str | None = "") -> dict[str, Any]:
    return {"bytes": b"%d " % number * 300, "path": f"{number}.jpg" if path == "" else path}


def written(rows: pa.Table, **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(rows, stream, **{"row_group_size": 4, **options})
    return stream.getvalue()


def read(data: bytes | pa.Table, part: Part | None = None, max_bytes: int = 1 << 20, **fields: Any) -> list[Item]:
    stream = io.BytesIO(data if isinstance(data, bytes) else written(data))
    return list(read_rows(stream, "t.parquet", Fields(**fields), part or Part(), max_bytes=max_bytes))


def offered(items: list[Item]) -> dict[str, str]:
    return {item.path: item.label for item in items if isinstance(item, Offered)}


def refused(items: list[Item]) -> dict[str, tuple[str, str]]:
    return {item.path: (str(item.reason), item.detail) for item in items if isinstance(item, Refused)}


def refusal(rows: pa.Table, **fields: Any) -> str:
    with pytest.raises(SourceError) as caught:
        choose_columns(rows.schema, Fields(**fields), "t.parquet")
    return str(caught.value)


# ---- Layouts


def test_the_layout_of_hugging_face_gives_names_and_bytes() -> None:
    items = read(table([picture(1), picture(2)], [0, 1]))
    assert offered(items) == {"t.parquet/1.jpg": "cat", "t.parquet/2.jpg": "dog"}
    assert [item.data for item in items if isinstance(item, Offered)] == [b"1 " * 300, b"2 " * 300]
    assert {item.split for item in items} == {SPLIT_UNSET}


@pytest.mark.parametrize(
    ("kind", "labels", "found"),
    [
        (pa.string(), ["cat", "007"], {"cat", "007"}),
        (pa.large_string(), ["cat", "é"], {"cat", "é"}),
        (pa.dictionary(pa.int8(), pa.string()), ["cat", "dog"], {"cat", "dog"}),
        (pa.int16(), [3, -4], {"3", "-4"}),
        (pa.bool_(), [True, False], {"true", "false"}),
    ],
)
def test_plain_columns_are_read_as_they_are(kind: pa.DataType, labels: list[Any], found: set[str]) -> None:
    rows = pa.table({"jpg": pa.array([b"A", b"B"]), "class": pa.array(labels, kind)})
    assert offered(read(rows)) == dict(
        zip(("t.parquet/0", "t.parquet/1"), map(str, offered(read(rows)).values()), strict=True)
    )
    assert set(offered(read(rows)).values()) == found


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.struct([("bytes", pa.large_binary())])])
def test_large_types_hold_images_too(kind: pa.DataType) -> None:
    values = [b"A"] if not pa.types.is_struct(kind) else [{"bytes": b"A"}]
    assert offered(read(pa.table({"image": pa.array(values, kind), "label": ["x"]}))) == {"t.parquet/0": "x"}


def test_rows_are_named_by_their_paths_where_these_are_distinct() -> None:
    paths = ["a.jpg", None, "b.jpg", "a.jpg", "4.jpg", "../up.jpg", "a.jpg"]
    items = read(table([picture(n, path) for n, path in enumerate(paths)], [0] * 7))
    names = ["a.jpg", "1", "b.jpg", "a.jpg#3", "4.jpg", "../up.jpg", "a.jpg#6"]
    assert list(offered(items)) == [f"t.parquet/{name}" for name in names]


def test_rows_that_cannot_be_used_are_refused_with_their_reasons() -> None:
    images = [
        picture(0),
        None,
        {"bytes": None, "path": "x.jpg"},
        {"bytes": b"", "path": "e"},
        picture(4),
        picture(5),
        picture(6),
    ]
    items = read(table(images, [None, 0, 0, 0, -1, 2, 1]), max_bytes=1000)
    assert {path: reason for path, (reason, _) in refused(items).items()} == {
        "t.parquet/0.jpg": "no-label",
        "t.parquet/1": "no-image",
        "t.parquet/x.jpg": "no-image",
        "t.parquet/e": "empty",
        "t.parquet/4.jpg": "no-label",
        "t.parquet/5.jpg": "no-label",
    }
    assert "label 2, the schema names 2 classes" in refused(items)["t.parquet/5.jpg"][1]
    assert offered(items) == {"t.parquet/6.jpg": "dog"}
    assert refused(read(table([picture(9)], [0]), max_bytes=100))["t.parquet/9.jpg"][0] == Reason.TOO_LARGE


def test_split_and_group_columns_are_respected() -> None:
    split = pa.array(["train", "Validation", "test"])
    items = read(table([picture(n) for n in range(3)], [0, 0, 1], split=split, group=pa.array([5, 5, None])))
    assert [item.split for item in items] == [0, 1, 2]
    groups = [item.group for item in items if isinstance(item, Offered)]
    assert groups[0] == groups[1] is not None
    assert groups[2] is None
    rows = table([picture(0)], [0], split=pa.array(["holdout"]))
    with pytest.raises(SourceError, match=r"row 0: 'split' must say one of .* but says 'holdout'"):
        read(rows)
    assert [item.split for item in read(rows, ignore_split=True)] == [SPLIT_UNSET]


# ---- Which columns


def test_columns_are_chosen_by_metadata_then_by_name_then_by_kind() -> None:
    two = pa.table({"image": pa.array([b""]), "scan": pa.array([b""]), "label": ["x"], "kind": [0]})
    declared = features(scan={"_type": "Image"}, kind={"_type": "ClassLabel", "names": ["k"]})
    assert choose_columns(two.schema, Fields(), "t").image == "image"
    found = choose_columns(two.replace_schema_metadata(declared).schema, Fields(), "t")
    assert (found.image, found.label, found.class_names) == ("scan", "kind", ("k",))
    asked = choose_columns(two.replace_schema_metadata(declared).schema, Fields(image="image", label="label"), "t")
    assert (asked.image, asked.label, asked.class_names) == ("image", "label", None)
    assert choose_columns(pa.schema([("x", pa.binary()), ("label", pa.string())]), Fields(), "t").image == "x"


@pytest.mark.usefixtures("cycles_wait")
@pytest.mark.parametrize(
    "metadata", [b"", b"{", b"[]", b'{"info": 3}', b"[" * 100_000, b'{"info": {"features": {"label": 1}}}']
)
def test_metadata_that_is_none_is_ignored(metadata: bytes) -> None:
    rows = table([picture(1)], [0], {b"huggingface": metadata})
    assert offered(read(rows)) == {"t.parquet/1.jpg": "0"}


def test_what_cannot_be_chosen_stops_with_advice() -> None:
    both = pa.table({"x": pa.array([b""]), "y": pa.array([b""]), "label": ["x"]})
    assert "2 columns of bytes, 'x', 'y': choose one with `--image-column NAME`" in refusal(both)
    assert "no column of image bytes for the image; its columns are 'label'" in refusal(both.select(["label"]))
    assert "no column 'z' for the image" in refusal(both, image="z")
    assert "`--path-column`" in refusal(both, image="label")
    assert "no column 'label' or 'class' or" in refusal(both.select(["x"]))
    assert "choose with `--group-column NAME`" in refusal(both, image="x", group="z")
    assert "column 'w' is double; text or integers" in refusal(
        both.append_column("w", pa.array([0.5])), image="x", label="w"
    )


def test_a_table_of_paths_is_no_container() -> None:
    assert holds_images(table([], []).schema, Fields())
    assert not holds_images(pa.schema([("image", pa.string()), ("label", pa.string())]), Fields())
    assert not holds_images(table([], []).schema, Fields(image="label"))


# ---- Parts, memory


def test_parts_together_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_parquet, "PART_BYTES", 6000)
    data = written(table([picture(n, f"{n % 7}.jpg") for n in range(23)], [n % 2 for n in range(23)]))
    with open_parquet(io.BytesIO(data)) as file:
        parts = plan_parts(file)
    assert len(parts) > 2
    assert [item for part in parts for item in read(data, part)] == read(data)


def test_memory_does_not_grow_with_the_row_group() -> None:
    rng = random.Random(0)
    rows = table([{"bytes": rng.randbytes(100_000), "path": None} for _ in range(600)], [0] * 600)
    data = written(rows, row_group_size=600, write_batch_size=16)
    del rows
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = 0
    for _ in read_rows(io.BytesIO(data), "t", Fields(), Part(), max_bytes=1 << 20):
        peak = max(peak, pa.total_allocated_bytes() - before)
    peak += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20  # of 60 MB in one row group


# ---- Damage


TWENTY = table([picture(n) for n in range(20)], [n % 2 for n in range(20)])


def test_a_row_group_that_is_damaged_is_refused_row_by_row() -> None:
    data = bytearray(written(TWENTY, write_page_checksum=True, compression="none"))
    place = data.index(b"9 " * 300)
    data[place] ^= 1
    items = read(bytes(data))
    assert len(items) == 20
    assert list(refused(items)) == [f"t.parquet/{n}.jpg" for n in range(8, 12)]
    assert refused(items)["t.parquet/8.jpg"] == ("damaged", "row 8: row group 2 cannot be read from here on")


@pytest.mark.parametrize(
    "options", [{}, {"write_page_checksum": True}, {"compression": "zstd", "use_dictionary": False}]
)
def test_flipped_bits_end_in_rows_and_refusals(options: dict[str, Any]) -> None:
    """Each row is told exactly once; with page checksums, no byte of an image is wrong."""
    data = written(TWENTY, **options)
    images = {image["bytes"].as_py() for image in TWENTY["image"]}
    rng, told = random.Random(7), Counter[int]()
    for trial in range(400):
        broken = bytearray(data)
        place = rng.randrange(len(data)) if trial % 2 else rng.randrange(len(data) - 1500, len(data))
        broken[place] ^= 1 << rng.randrange(8)
        try:
            items = read(bytes(broken))
        except SourceError:  # a column's name is not the one it was
            continue
        told[len(items)] += 1
        assert len({item.path for item in items}) == len(items)
        if "write_page_checksum" in options:
            assert {item.data for item in items if isinstance(item, Offered)} <= images
    assert told[20] > 200
    assert set(told) <= {1, 20}


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all", written(TWENTY)[:-9], written(TWENTY)[:3000]])
def test_a_file_that_is_none_is_refused_as_one(data: bytes) -> None:
    assert refused(read(data)) == {"t.parquet": ("damaged", "no readable Parquet footer")}


def test_an_error_in_reading_is_no_damage() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() < 3000:
                raise SourceError("the network is away")
            return super().read(size)

    stream = Failing(written(TWENTY, compression="none"))
    with pytest.raises(SourceError, match="the network is away"):
        list(read_rows(stream, "t", Fields(), Part(), max_bytes=1 << 20))
