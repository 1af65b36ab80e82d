"""Folders and tables: every file is a candidate or a reject with a reason; what is ambiguous stops with advice."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import make_config
from pipeline.errors import SourceError, UsageError
from pipeline.images import ImageRejected
from pipeline.ingest import source_files, source_rows, source_trouble
from pipeline.ingest.source import Listing, list_source
from pipeline.ingest.source_files import open_place
from pipeline.ingest.source_reader import SourceReader
from pipeline.ingest.source_rows import sort_labels
from pipeline.ingest.source_table import below
from pipeline.schema import REFERENCES, REJECTS, SPLIT_UNSET, Reason


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    return path


def put(folder: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + name.encode("utf-8", "surrogateescape"))


def listed(source: Any, **options: Any) -> Listing:
    return list_source(make_config(source=source, root="memory://root", **options))


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        listed(source, **options)
    return str(caught.value)


def labels(listing: Listing) -> dict[str, str]:
    ids = listing.references["class_id"].to_pylist()
    return dict(zip(listing.references["path"].to_pylist(), (listing.class_names[i] for i in ids), strict=True))


def splits(listing: Listing) -> dict[str, int]:
    return dict(zip(listing.references["path"].to_pylist(), listing.references["split"].to_pylist(), strict=True))


def rejects(listing: Listing) -> dict[str, str]:
    return dict(zip(listing.rejects["path"].to_pylist(), listing.rejects["reason"].to_pylist(), strict=True))


# --- Folders ---


def test_the_class_is_the_folder_of_the_file(folder: Path) -> None:
    put(folder, "fruit/apple/1.jpg", "fruit/pear/1.jpg", "milk/1.jpg")
    assert labels(listed(folder)) == {"fruit/apple/1.jpg": "apple", "fruit/pear/1.jpg": "pear", "milk/1.jpg": "milk"}


@pytest.mark.parametrize(("label_from", "names"), [("top", ("fruit", "milk")), ("path", ("fruit/apple", "milk"))])
def test_the_class_may_be_the_top_folder_or_the_path(folder: Path, label_from: str, names: tuple[str, ...]) -> None:
    put(folder, "fruit/apple/1.jpg", "milk/1.jpg")
    assert listed(folder, label_from=label_from).class_names == names


def test_a_reference_holds_key_size_and_fingerprint(folder: Path) -> None:
    put(folder, "a/1.jpg")
    listing = listed(folder)
    assert listing.references.schema == REFERENCES
    row = listing.references.to_pylist()[0]
    assert f"{row['key']:016x}" == hashlib.sha256(b"a/1.jpg").hexdigest()[:16]
    assert (row["size"], row["split"], row["group"]) == (8, SPLIT_UNSET, row["key"])
    assert not listing.splits_given


def test_the_fingerprint_follows_size_and_time(folder: Path) -> None:
    put(folder, "a/1.jpg")
    before = listed(folder).references["fingerprint"].to_pylist()
    assert listed(folder).references["fingerprint"].to_pylist() == before
    os.utime(folder / "a/1.jpg", ns=(5, 5))
    assert listed(folder).references["fingerprint"].to_pylist() != before


def test_the_order_of_listing_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, *(f"{c}/{n}.jpg" for c in "cab" for n in range(9)), "loose.txt", "other.txt")
    (folder / "empty").mkdir()
    scan = os.scandir

    class Backwards(contextlib.AbstractContextManager[Any]):
        def __init__(self, path: str) -> None:
            self.entries = sorted(scan(path), key=lambda entry: entry.name, reverse=True)

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None: ...

    one = listed(folder)
    monkeypatch.setattr(source_files.os, "scandir", Backwards)
    two = listed(folder)
    assert one.references.equals(two.references)
    assert one.rejects.equals(two.rejects)
    assert one.class_names == two.class_names
    keys = one.references["key"].to_pylist()
    assert keys == sorted(keys)


def test_chunks_join(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, *(f"a/{n}.jpg" for n in range(10)))
    whole = listed(folder)
    monkeypatch.setattr(source_rows, "CHUNK_ROWS", 3)
    assert listed(folder).references.equals(whole.references)


def test_integers_sort_as_numbers_and_names_by_code_point() -> None:
    assert sort_labels(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sort_labels(["10", "9", "x"]) == ("10", "9", "x")
    assert sort_labels(["b", "B", "a", "é"]) == ("B", "a", "b", "é")
    assert sort_labels(["01", "1", "0"]) == ("0", "01", "1")


def test_odd_names_are_distinct_files(folder: Path) -> None:
    names = [
        "a/x.jpg",
        "a/X.jpg",
        "a/v1.2.final.jpg",
        "a/🍎 1.jpg",
        "a/e\u0301.jpg",
        "a/\u00e9.jpg",
        "a/.hidden",
        "a/n",
    ]
    put(folder, *names, "a b/1.jpg", "c.d/1.jpg")
    listing = listed(folder)
    assert sorted(labels(listing)) == sorted([*names, "a b/1.jpg", "c.d/1.jpg"])
    assert listing.class_names == ("a", "a b", "c.d")


def test_class_names_that_differ_in_case_are_noticed(folder: Path) -> None:
    put(folder, "Apple/1.jpg", "apple/1.jpg")
    listing = listed(folder)
    assert listing.class_names == ("Apple", "apple")
    assert "'Apple' and 'apple'" in listing.notices[0]


def test_what_is_no_candidate_is_a_reject(folder: Path, tmp_path: Path) -> None:
    put(folder, "a/1.jpg", "loose.jpg", "a/bad\udcff.jpg")
    put(tmp_path, "outside/secret.jpg")
    (folder / "a/empty.jpg").write_bytes(b"")
    (folder / "b").mkdir()
    (folder / "a/leads_out.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    (folder / "a/broken.jpg").symlink_to("nowhere.jpg")
    (folder / "linked").symlink_to(folder / "a")
    (folder / "a/loop").symlink_to(folder)
    (folder / "a/alias.jpg").symlink_to("1.jpg")
    os.mkfifo(folder / "a/pipe.jpg")
    listing = listed(folder)
    assert listing.rejects.schema == REJECTS
    assert set(labels(listing)) == {"a/1.jpg", "a/alias.jpg"}
    assert rejects(listing) == {
        "loose.jpg": "no-label",
        "a/bad\\xff.jpg": "name-encoding",
        "a/empty.jpg": "empty",
        "b": "class-empty",
        "a/leads_out.jpg": "outside-root",
        "a/broken.jpg": "gone",
        "linked": "symlink",
        "a/loop": "symlink",
        "a/pipe.jpg": "unreadable",
    }


@pytest.mark.parametrize("name", ["bad\udcff.jpg", "empty.jpg", "huge.jpg"])
def test_one_odd_file_among_many_is_the_only_reject(folder: Path, name: str) -> None:
    """Files are taken in by folders where there is nothing to be said of any of them."""
    put(folder, *(f"a/{number}.jpg" for number in range(50)), "b/1.jpg")
    (folder / "a" / name).write_bytes({"empty.jpg": b"", "huge.jpg": b"x" * 1001}.get(name, b"x"))
    listing = listed(folder, max_image_bytes=1000)
    assert len(labels(listing)) == 51
    assert list(rejects(listing)) == [f"a/{name}".replace("\udcff", "\\xff")]


def test_one_container_among_many_images_is_noticed(folder: Path) -> None:
    put(folder, *(f"a/{number}.jpg" for number in range(50)), "a/more.TAR")
    assert "tars or Parquet files beside images" in refusal(folder)
    listing = listed(folder, source_kind="folder")
    assert len(labels(listing)) == 51


def test_rejects_do_not_say_where_the_source_lies(folder: Path, tmp_path: Path) -> None:
    put(folder, "a/1.jpg", "loose.jpg")
    (folder / "a/x.jpg").symlink_to(tmp_path / "secret.jpg")
    assert str(tmp_path) not in json.dumps(listed(folder).rejects.to_pylist())


def test_a_file_beyond_the_limit_is_rejected_unread(folder: Path) -> None:
    put(folder, "a/1.jpg", "a/much-too-long.jpg")
    assert rejects(listed(folder, max_image_bytes=10)) == {"a/much-too-long.jpg": "too-large"}


def test_splits_that_nobody_chose_stop_with_advice(folder: Path) -> None:
    put(folder, "train/a/1.jpg", "test/a/1.jpg")
    message = refusal(folder)
    assert "--split-from top" in message
    assert "--split-from none" in message
    assert f"{folder}/train" in message


def test_splits_from_the_top(folder: Path) -> None:
    put(folder, "train/a/1.jpg", "training/a/2.jpg", "Valid/a/1.jpg", "dev/a/2.jpg", "testing/a/1.jpg", "train/3.jpg")
    listing = listed(folder, split_from="top")
    assert listing.splits_given
    assert Counter(splits(listing).values()) == {0: 2, 1: 2, 2: 1}
    assert listing.class_names == ("a",)
    assert listing.rejects.to_pylist()[0]["split"] == "train"


def test_a_lone_train_folder_is_a_class(folder: Path) -> None:
    put(folder, "train/1.jpg", "plane/1.jpg")
    assert listed(folder).class_names == ("plane", "train")


def test_a_folder_that_is_no_split_is_named(folder: Path) -> None:
    put(folder, "train/a/1.jpg", "extra/a/1.jpg")
    assert "'extra'" in refusal(folder, split_from="top")


def test_one_class_name_under_two_parents_is_refused(folder: Path) -> None:
    put(folder, "fruit/orange/1.jpg", "paint/orange/1.jpg")
    message = refusal(folder)
    assert "'fruit/orange', 'paint/orange'" in message
    assert "--label-from path" in message
    assert listed(folder, label_from="path").class_names == ("fruit/orange", "paint/orange")


def test_one_class_name_under_two_parents_in_two_splits_is_one_class(folder: Path) -> None:
    put(folder, "train/veg/cap/1.jpg", "test/veg/mushroom/cap/1.jpg")
    listing = listed(folder, split_from="top")
    assert listing.class_names == ("cap",)
    assert "'cap': 'veg/cap', 'veg/mushroom/cap'" in listing.notices[0]


def test_two_paths_of_one_key_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "a/1.jpg", "a/2.jpg", "a/3.jpg")
    keys = {"a/1.jpg": 7, "a/2.jpg": 7, "a/3.jpg": 8}
    monkeypatch.setattr(source_rows, "text_keys", lambda texts: np.array([keys[text] for text in texts], np.uint64))
    assert "'a/1.jpg' and 'a/2.jpg' have the same 64-bit key" in refusal(folder)


def test_a_folder_that_cannot_be_listed_is_no_short_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "a/1.jpg", "b/1.jpg")
    scan = os.scandir

    def deny(place: int | str) -> Any:
        if (os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scan(place)

    monkeypatch.setattr(source_files.os, "scandir", deny)
    assert "folder 'b' cannot be listed: Permission denied" in refusal(folder)


@pytest.mark.parametrize("table", ["a.csv", "photos.parquet"])
def test_a_missing_source_is_said_to_be_missing(tmp_path: Path, table: str) -> None:
    assert "is not there" in refusal(tmp_path / "nothing")
    assert "is not there" in refusal(tmp_path / table)


def test_an_empty_source_says_what_is_expected(folder: Path) -> None:
    assert "is empty; expected class folders" in refusal(folder)
    put(folder, "1.jpg", "2.jpg")
    assert "2 no-label" in refusal(folder)


def test_a_file_that_is_no_table_is_refused(folder: Path) -> None:
    put(folder, "notes.txt")
    assert ".parquet" in refusal(folder / "notes.txt")


def test_source_and_root_lie_apart(folder: Path) -> None:
    put(folder, "a/1.jpg")
    for source, root, part in ((folder, folder, "is ROOT"), (folder / "a", folder, "lies within ROOT")):
        with pytest.raises(UsageError, match=part):
            list_source(make_config(source=source, root=root))
    with pytest.raises(UsageError, match="lies within the source"):
        list_source(make_config(source=folder, root=folder / "out"))


def test_columns_are_for_tables(folder: Path) -> None:
    put(folder, "a/1.jpg")
    assert "--label-column" in refusal(folder, label_column="x")


# --- Tables ---


def table(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_labels_stay_as_they_are_written(folder: Path) -> None:
    put(folder, "1.jpg", "2.jpg", "3.jpg")
    listing = listed(table(folder, "path,label\n1.jpg,007\n2.jpg,1.0\n3.jpg, NaN\n"))
    assert labels(listing) == {"1.jpg": "007", "2.jpg": "1.0", "3.jpg": " NaN"}


WAYS = {
    "csv": "path,label\nsub/1.jpg,007\n2.jpg,b\n",
    "tsv": "path\tlabel\nsub/1.jpg\t007\n2.jpg\tb\n",
    "jsonl": '{"path": "sub/1.jpg", "label": "007"}\n\n{"label": "b", "path": "2.jpg"}\n',
}


@pytest.mark.parametrize("extension", [*WAYS, "csv.gz", "parquet"])
def test_every_kind_of_table_says_the_same(folder: Path, extension: str) -> None:
    put(folder, "sub/1.jpg", "2.jpg")
    path = folder / f"T.{extension.upper()}"
    if extension == "parquet":
        pq.write_table(
            pa.table({"path": ["sub/1.jpg", "2.jpg"], "label": pa.array(["007", "b"]).dictionary_encode()}), path
        )
    else:
        data = WAYS[extension.removesuffix(".gz")].encode()
        path.write_bytes(gzip.compress(data) if extension.endswith(".gz") else data)
    assert labels(listed(path)) == {"sub/1.jpg": "007", "2.jpg": "b"}


def test_numbers_of_parquet_and_json_become_their_text(folder: Path) -> None:
    put(folder, "1.jpg", "2.jpg")
    pq.write_table(pa.table({"path": ["1.jpg", "2.jpg"], "label": [10, 9]}), folder / "t.parquet")
    assert listed(folder / "t.parquet").class_names == ("9", "10")
    lines = '{"path": "1.jpg", "label": 10}\n{"path": "2.jpg", "label": 1.50}\n'
    assert listed(table(folder, lines, "t.jsonl")).class_names == ("1.50", "10")


def test_float_labels_of_parquet_are_refused(folder: Path) -> None:
    pq.write_table(pa.table({"path": ["1.jpg"], "label": [1.0]}), folder / "t.parquet")
    assert "column 'label' is double" in refusal(folder / "t.parquet")


def test_bom_crlf_and_quoted_newlines_are_fine(folder: Path) -> None:
    put(folder, "1.jpg", "2.jpg")
    listing = listed(table(folder, b'\xef\xbb\xbfpath,label\r\n1.jpg,"a\nb"\r\n2.jpg,"say ""c"""\r\n'))
    assert labels(listing) == {"1.jpg": "a\nb", "2.jpg": 'say "c"'}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"path,label\n1.jpg,a\n2.jpg,b,c\n", "line 3: 3 fields, but the header has 2"),
        (b'path,label\n"1\n.jpg",a\n2.jpg\n', "line 4: 1 fields"),
        (b"path,label\n1.jpg,caf\xe9\n", "line 2: byte 0xe9 at column 10 is not UTF-8"),
        (b'path,label\n1.jpg,"a\n', "line 2: unexpected end of data"),
        (b"", "line 0: the table is empty"),
        (b"path,label\n", "is empty; expected a row for each image"),
    ],
)
def test_a_damaged_table_says_where(folder: Path, text: bytes, part: str) -> None:
    assert part in refusal(table(folder, text))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"path": "1.jpg", "label": "a"}\n{oops\n', "line 2: not JSON"),
        ("[1]\n", "line 1: a JSON object is expected"),
        ('{"path": ["1.jpg"], "label": "a"}\n', "line 1: 'path' holds list"),
        ("\n", "line 1: the table is empty"),
    ],
)
def test_damaged_json_lines_say_where(folder: Path, text: str, part: str) -> None:
    assert part in refusal(table(folder, text, "t.jsonl"))


@pytest.mark.parametrize("name", ["t.parquet", "t.csv.gz"])
def test_a_damaged_binary_table_is_refused(folder: Path, name: str) -> None:
    assert name in refusal(table(folder, b"neither of these", name))


def test_a_missing_column_names_the_columns_and_the_flag(folder: Path) -> None:
    message = refusal(table(folder, "path,kind\n1.jpg,a\n"))
    assert "t.csv has no column 'label' or 'class'" in message
    assert "its columns are 'path', 'kind': choose with `--label-column NAME`" in message
    assert "no column 'nope' for the split" in refusal(table(folder, "path,label\n1.jpg,a\n"), split_column="nope")


def test_a_doubled_column_is_refused(folder: Path) -> None:
    assert "2 columns named 'label'" in refusal(table(folder, "path,label,label\n1.jpg,a,b\n"))


def test_columns_can_be_chosen(folder: Path) -> None:
    put(folder, "1.jpg")
    path = table(folder, "name,fine,coarse\n1.jpg,a,b\n")
    assert listed(path, path_column="name", label_column="coarse").class_names == ("b",)


def test_usual_column_names_are_found(folder: Path) -> None:
    put(folder, "1.jpg")
    assert listed(table(folder, "id,category,filename\n9,a,1.jpg\n")).class_names == ("a",)


def test_images_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    put(tmp_path, "store/1.jpg")
    path = table(folder, f"path,label\n1.jpg,a\n./1.jpg,a\n{tmp_path}/store/1.jpg,a\n")
    listing = listed(path, images=tmp_path / "store")
    assert labels(listing) == {"1.jpg": "a"}
    assert listing.rejects["reason"].to_pylist() == ["duplicate-row", "duplicate-row"]
    assert listing.reader.read("1.jpg").startswith(b"x")


def test_each_bad_row_is_a_reject_that_names_its_row(folder: Path, tmp_path: Path) -> None:
    put(folder, "1.jpg", "2.jpg", "3.jpg")
    put(tmp_path, "secret.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "way_out").symlink_to(tmp_path)
    text = f"""path,label
1.jpg,a
,a
2.jpg,
../secret.jpg,a
{tmp_path}/secret.jpg,a
file:///etc/passwd,a
way_out/secret.jpg,a
missing.jpg,a
1.jpg,a
3.jpg,a
3.jpg,b
empty.jpg,a
sub,a
http://127.0.0.1/x.jpg,a
"""
    listing = listed(table(folder, text))
    assert labels(listing) == {"1.jpg": "a"}
    assert [(r["detail"].partition(":")[0], r["reason"]) for r in sorted(listing.rejects.to_pylist(), key=_row)] == [
        ("row 2", "no-path"),
        ("row 3", "no-label"),
        ("row 4", "outside-root"),
        ("row 5", "outside-root"),
        ("row 6", "outside-root"),
        ("row 7", "outside-root"),
        ("row 8", "gone"),
        ("row 9", "duplicate-row"),
        ("row 10", "label-conflict"),
        ("row 11", "label-conflict"),
        ("row 12", "empty"),
        ("row 13", "unreadable"),
        ("row 14", "outside-root"),
    ]


def _row(reject: dict[str, str]) -> int:
    return int(reject["detail"].partition(":")[0].split()[1])


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a.jpg", "a.jpg"),
        ("./a//b.jpg", "a/b.jpg"),
        ("a/../b.jpg", "b.jpg"),
        ("/img/a.jpg", "a.jpg"),
        ("/img/../a.jpg", None),
        ("a/../../b.jpg", None),
        ("..", None),
        ("/image/a.jpg", None),
        ("s3://bucket/a.jpg", None),
    ],
)
def test_paths_lead_below_the_images_or_nowhere(text: str, path: str | None) -> None:
    assert below(("/img/",), text) == path


def test_a_split_column_is_taken_and_noticed(folder: Path) -> None:
    put(folder, "1.jpg", "2.jpg", "3.jpg")
    path = table(folder, "path,label,split\n1.jpg,a,train\n2.jpg,a,Validation\n3.jpg,a,test\n")
    listing = listed(path)
    assert splits(listing) == {"1.jpg": 0, "2.jpg": 1, "3.jpg": 2}
    assert listing.splits_given
    assert "column 'split' of the table decides the split" in listing.notices
    assert set(splits(listed(path, split_from="none")).values()) == {SPLIT_UNSET}


def test_unknown_splits_are_listed(folder: Path) -> None:
    put(folder, "1.jpg", "2.jpg", "3.jpg")
    message = refusal(table(folder, "path,label,split\n1.jpg,a,train\n2.jpg,a,holdout\n3.jpg,a,\n"))
    assert "'' (1 rows), 'holdout' (1 rows)" in message


def test_one_path_in_two_splits_is_trained_on_only(folder: Path) -> None:
    put(folder, "1.jpg")
    listing = listed(table(folder, "path,label,split\n1.jpg,a,test\n1.jpg,a,train\n1.jpg,a,train\n"))
    assert splits(listing) == {"1.jpg": 0}
    assert sorted(listing.rejects["reason"].to_pylist()) == ["duplicate-row", "leak"]


def test_groups_join_and_are_no_keys(folder: Path) -> None:
    put(folder, "1.jpg", "2.jpg", "3.jpg")
    listing = listed(table(folder, "path,label,group\n3.jpg,a,\n1.jpg,a,3.jpg\n2.jpg,a,3.jpg\n"))
    rows = {row["path"]: row for row in listing.references.to_pylist()}
    assert rows["1.jpg"]["group"] == rows["2.jpg"]["group"] != rows["3.jpg"]["group"]
    assert rows["3.jpg"]["group"] == rows["3.jpg"]["key"]


def test_a_table_beside_none_of_its_images_is_told_where_they_were_sought(folder: Path) -> None:
    told = refusal(table(folder, "path,label\nfar/1.jpg,a\nfar/2.jpg,a\n"))
    assert "'far/1.jpg' the first" in told
    assert "--images FOLDER" in told


def test_options_of_folders_are_refused_for_tables(folder: Path) -> None:
    path = table(folder, "path,label\n1.jpg,a\n")
    assert "--split-column" in refusal(path, split_from="top")
    assert "exclude each other" in refusal(path, split_from="none", split_column="x")
    assert "is not a folder" in refusal(path, images=folder / "nowhere")


# --- Reading ---


def test_the_reader_travels_and_reads(folder: Path) -> None:
    put(folder, "a/1.jpg")
    reader = pickle.loads(pickle.dumps(listed(folder).reader))
    assert reader.read("a/1.jpg") == b"xa/1.jpg"


def refused(reader: SourceReader, path: str) -> Reason:
    with pytest.raises(ImageRejected) as caught:
        reader.read(path)
    return caught.value.reason


def test_reading_refuses_with_a_reason(folder: Path, tmp_path: Path) -> None:
    put(folder, "a/1.jpg", "b/1.jpg")
    put(tmp_path, "secret.jpg")
    (folder / "a/out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "a/link").symlink_to(tmp_path)
    os.mkfifo(folder / "a/pipe")
    reader = SourceReader(open_place(str(folder)), 1000)
    assert refused(reader, "a/2.jpg") == Reason.GONE
    assert refused(reader, "a/out.jpg") == Reason.OUTSIDE_ROOT
    assert refused(reader, "a/link/secret.jpg") == Reason.OUTSIDE_ROOT
    assert refused(reader, "a/pipe") == Reason.UNREADABLE
    assert refused(reader, "a") == Reason.UNREADABLE
    assert refused(SourceReader(open_place(str(folder)), 3), "a/1.jpg") == Reason.TOO_LARGE


def test_a_transient_error_is_retried_and_a_lasting_one_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "a/1.jpg")
    pauses: list[float] = []
    monkeypatch.setattr(source_trouble.time, "sleep", pauses.append)
    failures = [OSError(5, "Input/output error")] * 2
    really_open = os.open

    def fail(*arguments: Any, **options: Any) -> int:
        if failures:
            raise failures.pop()
        return really_open(*arguments, **options)

    monkeypatch.setattr(source_files.os, "open", fail)
    reader = SourceReader(open_place(str(folder)), 1000)
    assert reader.read("a/1.jpg") == b"xa/1.jpg"
    assert len(pauses) == 2
    failures.extend([OSError(5, "Input/output error")] * (1 + len(source_trouble.RETRY_PAUSES_S)))
    assert refused(reader, "a/1.jpg") == Reason.UNREADABLE


# --- URLs ---


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("ftp://host/photos", "protocol 'ftp' is not one of"),
        ("simplecache::s3://bucket/photos", "chained"),
        ("s3://bucket/a::file:///etc", "chained"),
        ("simplecache::/etc", "chained"),
        ("github://org:repo@main/photos", "protocol 'github'"),
    ],
)
def test_only_named_protocols(url: str, part: str) -> None:
    assert part in refusal(url)


def test_a_file_url_is_a_local_folder(folder: Path) -> None:
    put(folder, "a/1.jpg")
    assert labels(listed(f"file://{folder}")) == {"a/1.jpg": "a"}


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_an_object_store_is_listed_like_a_folder(memory: Any) -> None:
    memory.pipe({"/photos/fruit/apple/1.jpg": b"one", "/photos/milk/é 1.jpg": b"three", "/photos/loose.jpg": b"x"})
    listing = listed("memory://photos")
    assert labels(listing) == {"fruit/apple/1.jpg": "apple", "milk/é 1.jpg": "milk"}
    assert rejects(listing) == {"loose.jpg": "no-label"}
    assert listing.reader.read("milk/é 1.jpg") == b"three"
    assert refused(listing.reader, "milk/2.jpg") == Reason.GONE


def test_a_table_of_an_object_store(memory: Any) -> None:
    memory.pipe({"/photos/t.csv": b"path,label\na/1.jpg,a\na/2.jpg,a\nb/1.jpg,b\n", "/photos/a/1.jpg": b"one"})
    listing = listed("memory://photos/t.csv")
    assert labels(listing) == {"a/1.jpg": "a"}
    assert rejects(listing) == {"a/2.jpg": "gone", "b/1.jpg": "gone"}


def test_a_missing_object_store_folder_is_missing(memory: Any) -> None:
    assert "is not there" in refusal("memory://photos")


def test_a_server_that_lists_twice_has_no_two_files(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe({"/photos/a/1.jpg": b"one", "/photos/a/2.jpg": b"two"})
    once = source_files._list_remote
    monkeypatch.setattr(source_files, "_list_remote", lambda *given: [*once(*given), *once(*given)])
    listing = listed("memory://photos")
    assert sorted(labels(listing)) == ["a/1.jpg", "a/2.jpg"]
    assert listing.rejects.num_rows == 0


class Handler(SimpleHTTPRequestHandler):
    """A plain file server; /away redirects out."""

    def log_message(self, format: str, *args: Any) -> None: ...

    def send_head(self) -> Any:
        if self.path.endswith("/away.jpg"):
            self.send_response(302)
            self.send_header("Location", "/secret.jpg")
            self.end_headers()
            return io.BytesIO(b"")
        return super().send_head()


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    handler = partial(Handler, directory=str(folder))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_web_folder_is_listed_and_read(folder: Path, web: str) -> None:
    put(folder, "photos/a/1 é%.jpg", "photos/b/1.jpg", "secret.jpg")
    listing = listed(f"{web}/photos")
    assert labels(listing) == {"a/1 é%.jpg": "a", "b/1.jpg": "b"}
    assert listing.references["size"].to_pylist().count(15) == 1
    assert listing.reader.read("a/1 é%.jpg").startswith(b"xphotos")


def test_a_table_on_the_web_stays_in_its_folder(folder: Path, web: str) -> None:
    put(folder, "photos/1.jpg", "secret.jpg")
    table(
        folder / "photos",
        f"path,label\n1.jpg,a\n%2e%2e/secret.jpg,a\n{web}/photos/1.jpg,a\n{web}/secret.jpg,a\n2.jpg,a\naway.jpg,a\n",
    )
    listing = listed(f"{web}/photos/t.csv")
    assert labels(listing) == {"1.jpg": "a"}
    assert Counter(listing.rejects["reason"].to_pylist()) == {
        "gone": 2,
        "duplicate-row": 1,
        "outside-root": 1,
        "unreadable": 1,
    }
    assert b"secret" not in listing.reader.read("away.jpg")


@pytest.mark.parametrize("seed", range(3))
def test_integer_labels_sort_as_integers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [int(value) for value in rng.integers(-(10**6), 10**6, 200)] + [0, -1, 1, -10, 10, 9, -9]
    labels = sorted({str(value) for value in values} | {"007", "-0", "00", "-012"})
    assert list(sort_labels(labels)) == sorted(labels, key=lambda label: (int(label), label))


def test_labels_of_thousands_of_digits_are_integers_too() -> None:
    assert sort_labels(["1" + "0" * 5000, "2", "-" + "9" * 6000]) == ("-" + "9" * 6000, "2", "1" + "0" * 5000)
