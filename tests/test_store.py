"""The store: create-only and atomic writes, errors that say what to do, checks that no flipped bit passes."""

from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import xxhash
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import AlreadyExistsError, IntegrityError, NotFoundError, StoreError, UsageError
from pipeline.schema import BLOCK_BYTES, CLASSES, SAMPLES, FileRef, table_path
from pipeline.store import (
    CheckedTable,
    HashedSink,
    ShardReader,
    Store,
    block_digests,
    checked,
    ipc_to_table,
    make_ref,
    put_table,
    read_checked,
    read_image,
    redact,
    replace_by,
    sha256_file,
    table_to_ipc,
    temporary_dir,
    write_ipc,
)
from pipeline.store.claims import sweep_temporary


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store.open(tmp_path / "root", create=True)
    else:
        yield Store.open(f"memory://{tmp_path.name}", create=True)
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "root", create=True)


def files(store: Store) -> list[str]:
    return [path for path in store.list("") if not path.startswith("staging/")]


# ---- Both kinds of storage


def test_what_was_created_is_read(store: Store) -> None:
    store.create("runs/units/a.json", b"0123456789")
    assert store.read("runs/units/a.json") == b"0123456789"
    assert store.read_range("runs/units/a.json", 3, 4) == b"3456"
    assert store.size("runs/units/a.json") == 10
    assert store.exists("runs/units/a.json")


def test_a_directory_is_not_a_file(store: Store) -> None:
    store.create("runs/units/a.json", b"")
    assert not store.exists("runs/units")


def test_list_is_sorted_recursive_and_below_root(store: Store) -> None:
    for path in ("runs/b", "runs/units/a", "runs/a", "reports/c"):
        store.create(path, b"x")
    assert store.list("runs") == ["runs/a", "runs/b", "runs/units/a"]
    assert store.list("pins") == []


def test_create_never_overwrites(store: Store) -> None:
    store.create("runs/a", b"first")
    with pytest.raises(AlreadyExistsError, match=r"runs/a in .*never overwritten"):
        store.create("runs/a", b"second")
    assert store.read("runs/a") == b"first"


def test_put_accepts_what_is_there(store: Store) -> None:
    store.put("tables/a", b"same")
    store.put("tables/a", b"same")
    assert store.read("tables/a") == b"same"


def test_put_refuses_a_file_of_another_size(store: Store) -> None:
    store.create("tables/a", b"cut")
    with pytest.raises(IntegrityError, match=r"tables/a in .* has 5 bytes, but it has 3; remove"):
        store.put("tables/a", b"whole")


@pytest.mark.parametrize("there", [False, True])
def test_put_file_consumes_the_temporary_file(store: Store, there: bool) -> None:
    if there:
        store.create("shards/ab/c.tar", b"tar bytes")
    temporary = Path(store.staging_dir()) / "unit.tar"
    temporary.write_bytes(b"tar bytes")
    store.put_file("shards/ab/c.tar", str(temporary))
    assert store.read("shards/ab/c.tar") == b"tar bytes"
    assert not temporary.exists()


def test_put_file_from_another_file_system_is_copied(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp") / f"evenshard-{os.getpid()}.tar"
    elsewhere.write_bytes(b"tar bytes")
    local.put_file("shards/ab/c.tar", str(elsewhere))
    assert local.read("shards/ab/c.tar") == b"tar bytes"
    assert not elsewhere.exists()
    assert local.list("staging") == []


def test_replace_overwrites_only_what_no_snapshot_names(store: Store) -> None:
    store.replace("runs/state.json", b"1")
    store.replace("runs/state.json", b"2")
    assert store.read("runs/state.json") == b"2"
    with pytest.raises(UsageError, match=r"'tables/a' may not be overwritten"):
        store.replace("tables/a", b"")


@pytest.mark.parametrize("path", ["snapshots/00000001.json", "runs/builds/a.json"])
def test_what_is_kept_for_ever_cannot_be_removed(store: Store, path: str) -> None:
    store.create(path, b"1")
    with pytest.raises(UsageError, match=rf"'{path}' may not be removed"):
        store.remove(path)
    assert store.read(path) == b"1"


def test_a_removed_file_is_gone(store: Store) -> None:
    store.create("staging/a", b"")
    store.remove("staging/a")
    assert not store.exists("staging/a")
    with pytest.raises(NotFoundError, match="cannot remove staging/a"):
        store.remove("staging/a")


def test_what_vanishes_while_it_is_met_again_is_written_again(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    local.put("tables/a", b"12345")
    settle = local._backend.settle

    def collect_first(path: str) -> None:
        os.unlink(f"{local.root}/{path}")
        settle(path)

    monkeypatch.setattr(local._backend, "settle", collect_first)
    local.put("tables/a", b"12345")
    assert local.read("tables/a") == b"12345"


def test_what_is_met_again_is_young_again(local: Store) -> None:
    local.put("tables/a", b"12345")
    os.utime(f"{local.root}/tables/a", (0, 0))
    local.put("tables/a", b"12345")
    assert (local.entry("tables/a").modified_s or 0) > 1e9


def test_missing_file_names_path_and_root(store: Store) -> None:
    for read in (store.read, store.size, lambda path: store.read_range(path, 0, 1)):
        with pytest.raises(NotFoundError) as caught:
            read("shards/ab/c.tar")
        assert "shards/ab/c.tar" in str(caught.value)
        assert store.url in str(caught.value)


def test_a_short_range_is_an_error(store: Store) -> None:
    store.create("runs/a", b"0123")
    with pytest.raises(IntegrityError, match=r"runs/a in .*expected 4 bytes at offset 2, found 2"):
        store.read_range("runs/a", 2, 4)


@pytest.mark.parametrize("path", ["/etc/passwd", "../a", "tables/../../a", "a//b", "", ".", "a\\b", "a\0b"])
def test_no_path_leaves_root(store: Store, path: str) -> None:
    for use in (store.read, store.exists, lambda path: store.create(path, b"")):
        with pytest.raises(UsageError, match="not a path below ROOT"):
            use(path)


def test_a_store_is_pickled_by_its_url(store: Store) -> None:
    store.create("runs/a", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.url, copy.read("runs/a")) == (store.url, b"x")


# ---- Opening


def test_open_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no directory .*/nowhere; run `evenshard build SOURCE"):
        Store.open(tmp_path / "nowhere")


@pytest.mark.parametrize("create", [False, True])
def test_a_root_that_is_a_file_is_refused(tmp_path: Path, create: bool) -> None:
    (tmp_path / "root").write_text("x")
    with pytest.raises(StoreError, match=r"ROOT is a file, not a directory: .*/root"):
        Store.open(tmp_path / "root", create=create)


def test_a_directory_of_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(StoreError, match=r"ROOT is not empty and holds no snapshot: .* has 'cats'"):
        Store.open(tmp_path, create=True).refuse_foreign()
    assert os.listdir(tmp_path) == ["cats"]


def test_a_source_whose_classes_are_named_like_our_rooms_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "tables").mkdir()
    with pytest.raises(StoreError, match="holds no snapshot"):
        Store.open(tmp_path, create=True).refuse_foreign()


def test_a_begun_root_and_a_fresh_mount_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    store = Store.open(tmp_path, create=True)
    store.refuse_foreign()
    store.create("shards/ab/c.tar", b"")
    store.refuse_foreign()


def test_a_root_with_a_snapshot_may_hold_more(store: Store) -> None:
    store.create("snapshots/00000001.json", b"{}")
    store._backend.replace("README.txt", b"ours")
    store.refuse_foreign()


def test_a_remote_root_of_something_else_is_refused() -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/photos/a.jpg", b"x")
    with pytest.raises(StoreError, match=r"holds no snapshot: memory://bucket/photos has 'a\.jpg'"):
        Store.open("memory://bucket/photos", create=True).refuse_foreign()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "must be a directory or a URL"),
        ("nosuch://user:word@host/x", "cannot open nosuch://host/x"),
        ("simplecache::s3://bucket/x", "chain of URLs"),
    ],
)
def test_a_url_that_cannot_be_a_root(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Store.open(url)


def test_a_relative_root_means_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.open("root", create=True)
    store.create("runs/a", b"x")
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(store)).read("runs/a") == b"x"


def test_opening_a_new_root_leaves_it_empty(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "new" / "root", create=True)
    assert os.listdir(store.url) == []


def test_file_urls_are_local(tmp_path: Path) -> None:
    assert Store.open(f"file://{tmp_path}/a b", create=True).local_path("x") == f"{tmp_path}/a b/x"


# ---- Local files: whole and durable, or not at all


def test_of_many_creators_one_wins(tmp_path: Path) -> None:
    def attempt(number: int) -> bool:
        try:
            store.create("snapshots/00000001.json", b"%d" % number * 1000)
        except AlreadyExistsError:
            return False
        return True

    for round_number in range(20):
        store = Store.open(tmp_path / str(round_number), create=True)
        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(attempt, range(4)))
        assert won.count(True) == 1
        assert store.read("snapshots/00000001.json") == b"%d" % won.index(True) * 1000


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
def test_a_killed_write_leaves_nothing_under_its_name(local: Store, call: str) -> None:
    program = (
        "import os, sys; from pipeline.store import Store; store = Store.open(sys.argv[1], create=True)\n"
        f"os.{call} = lambda *args: os.kill(os.getpid(), 9)\n"
        "store.create('snapshots/00000001.json', b'x' * 100)"
    )
    done = subprocess.run([sys.executable, "-c", program, local.url], check=False)
    assert done.returncode == -9
    assert files(local) == []
    local.create("snapshots/00000001.json", b"next")


@pytest.mark.parametrize(
    ("call", "number", "advice"),
    [
        ("write", errno.ENOSPC, "free some space, or choose a ROOT on a larger disk"),
        ("write", errno.EDQUOT, "raise the quota"),
        ("fsync", errno.EIO, "the device failed"),
        ("link", errno.EACCES, "give this user the permission"),
        ("link", errno.EROFS, "mount the file system writable"),
        ("link", errno.EXDEV, "must lie on one file system"),
        ("link", errno.EPERM, "refuses hard links"),
    ],
)
def test_a_refused_write_says_what_to_do_and_leaves_nothing(
    local: Store, monkeypatch: pytest.MonkeyPatch, call: str, number: int, advice: str
) -> None:
    monkeypatch.setattr(os, call, refuse(number))
    with pytest.raises(StoreError, match=advice) as caught:
        local.create("tables/a.arrow", b"x")
    assert "tables/a.arrow" in str(caught.value)
    monkeypatch.undo()
    assert local.list("") == []


def refuse(number: int) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def test_an_unwritable_root_is_found_on_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", refuse(errno.EACCES))
    with pytest.raises(StoreError, match=r"cannot write to staging in .*/root: Permission denied; give this user"):
        Store.open(tmp_path / "root", create=True)


def test_a_link_whose_reply_was_lost_counts_as_made(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def made_but_denied(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", made_but_denied)
    local.create("tables/a", b"x")
    assert local.read("tables/a") == b"x"


def test_every_new_name_is_synced_before_success(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    local.create("shards/ab/c.tar", b"x")
    root = local.url
    before, data, *after = synced
    assert (before, os.path.dirname(data)) == (root, f"{root}/staging")
    assert after == [root, f"{root}/shards", f"{root}/shards/ab"]


def test_staging_may_vanish_when_it_is_empty(local: Store) -> None:
    local.create("tables/a", b"x")
    os.rmdir(f"{local.url}/staging")
    local.create("tables/b", b"x")
    os.rmdir(f"{local.url}/staging")
    assert os.path.isdir(local.staging_dir())


def test_links_and_pipes_are_not_read(local: Store, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    local.create("tables/a", b"")
    os.symlink(tmp_path / "secret", local.local_path("tables/link") or "")
    os.mkfifo(local.local_path("tables/pipe") or "")
    with pytest.raises(StoreError, match="symbolic link"):
        local.read("tables/link")
    with pytest.raises(StoreError, match="not a plain file"):
        local.read("tables/pipe")
    assert not local.exists("tables/link")


def test_an_unreadable_directory_is_not_an_absent_file(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "lstat", refuse(errno.EACCES))
    with pytest.raises(StoreError, match=r"cannot look for snapshots/00000001.json"):
        local.exists("snapshots/00000001.json")


def test_errors_of_a_remote_client_come_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    class ClientError(Exception):
        pass

    def fail(*args: Any, **options: Any) -> bytes:
        raise ClientError("GET https://user:word@host/a?X-Amz-Signature=0123 failed")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(StoreError, match=r"ClientError: GET https://host/a failed") as caught:
        Store.open("memory://bucket").read("runs/a")
    assert caught.value.__suppress_context__


# ---- Redaction


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://user:p@ss@host/a@b/c", "s3://host/a@b/c"),
        ("s3://AKIAIOSFODNN7EXAMPLE:ab/cd+e@bucket/x", "s3://bucket/x"),
        ("open 'https://h/a.tar?X-Amz-Signature=abc&b=1' failed", "open 'https://h/a.tar' failed"),
        ("https://h:9000/a@b#token=1 and more", "https://h:9000/a@b and more"),
        ("key AKIAIOSFODNN7EXAMPLE, ASIAIOSFODNN7EXAMPLE", "key ***, ***"),
        ("Authorization: Bearer abc.def-1", "Authorization: ***"),
        ("sent bearer abc.def~1==", "sent bearer ***"),
        ("aws_secret_access_key = wJalr/XUtn", "aws_secret_access_key = ***"),
        ("/data/what? a@b: 12 files", "/data/what? a@b: 12 files"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown


# ---- Files by content


def test_a_reference_names_hash_size_and_blocks() -> None:
    data = bytes(BLOCK_BYTES) + b"tail"
    ref = make_ref(data, 7)
    assert (ref.sha256, ref.size, ref.num_rows) == (hashlib.sha256(data).hexdigest(), len(data), 7)
    assert ref.blocks == (xxhash.xxh3_64_hexdigest(bytes(BLOCK_BYTES)), xxhash.xxh3_64_hexdigest(b"tail"))
    assert block_digests(b"") == ()


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(str(tmp_path / "a")) == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("damaged", [b"sound bytez", b"sound", b"sound bytes and more"])
def test_read_checked_refuses_other_bytes(store: Store, damaged: bytes) -> None:
    ref = make_ref(b"sound bytes", 0)
    store.create("tables/a", damaged)
    with pytest.raises(IntegrityError, match=f"tables/a in .* expected 11 bytes with SHA-256 {ref.sha256}"):
        read_checked(store, "tables/a", ref)


def classes_table(names: list[str]) -> pa.Table:
    numbers = list(range(len(names)))
    columns = dict.fromkeys(CLASSES.names, numbers) | {"name": names, "evaluable": [n % 3 == 0 for n in numbers]}
    return pa.table(columns).select(CLASSES.names).cast(CLASSES)


def test_equal_tables_give_equal_bytes_however_they_are_cut() -> None:
    table = classes_table([f"klasse {n}" for n in range(50)])
    pieces = pa.concat_tables([table.slice(0, 7), table.slice(7, 0), table.slice(7, 20), table.slice(27)])
    longer = pa.concat_tables([classes_table(["before"] * 3), table, classes_table(["after"])]).combine_chunks()
    described = table.replace_schema_metadata({"pandas": "{}"})
    for same in (pieces, longer.slice(3, 50), described):
        assert table_to_ipc(same) == table_to_ipc(table)


def test_unused_bits_of_booleans_do_not_show() -> None:
    clean, dirty = (pa.Array.from_buffers(pa.bool_(), 3, [None, pa.py_buffer(b)]) for b in (b"\x05", b"\xfd"))
    assert table_to_ipc(pa.table({"a": dirty})) == table_to_ipc(pa.table({"a": clean}))


def test_what_lies_behind_a_column_of_integers_does_not_show() -> None:
    values = np.arange(100, dtype=np.uint32)
    longer = pa.Array.from_buffers(pa.uint32(), 50, [None, pa.py_buffer(values)])
    exact = pa.array(values[:50].copy())
    assert table_to_ipc(pa.table({"a": longer})) == table_to_ipc(pa.table({"a": exact}))
    assert table_to_ipc(pa.table({"a": pa.array(values).slice(0, 50)})) == table_to_ipc(pa.table({"a": exact}))


@pytest.mark.parametrize("num_rows", [0, 1, 50_000])
def test_a_large_table_is_written_by_way_of_a_file_to_the_same_bytes(
    store: Store, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    table = samples_table(num_rows)
    small = put_table(store, table, SAMPLES)
    data = store.read(table_path(small.sha256))
    store.remove(table_path(small.sha256))
    monkeypatch.setattr(checked, "LARGE_BYTES", 0)
    assert put_table(store, table, SAMPLES) == small  # its blocks, too
    assert store.read(table_path(small.sha256)) == data
    assert put_table(store, table, SAMPLES) == small  # it is there already
    assert store.list("staging") == []


def test_replace_by_is_replace(store: Store) -> None:
    for text in (b"first", b"second"):
        replace_by(store, "runs/state", lambda file, text=text: file.write(text) and None)
        assert store.read("runs/state") == text
    with pytest.raises(UsageError, match="'tables/a' may not be overwritten"):
        replace_by(store, "tables/a", lambda file: None)

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"staging/.*No space left"):
        replace_by(store, "runs/state", fail)
    assert store.read("runs/state") == b"second"
    assert store.list("staging") == []


def test_a_hashed_sink_passes_on_what_it_hashes() -> None:
    table, target = classes_table(["a", "b"]), io.BytesIO()
    target.write(b"a line before\n")
    sink = HashedSink(target)
    write_ipc(table, sink)
    data = table_to_ipc(table)
    assert target.getvalue() == b"a line before\n" + data
    assert (sink.hash.hexdigest(), sink.num_bytes) == (hashlib.sha256(data).hexdigest(), len(data))


def test_bytes_of_a_table_are_pinned() -> None:
    """Snapshots of different versions share files only while this holds; update it when pyarrow's lock moves."""
    assert hashlib.sha256(table_to_ipc(classes_table(["a", "b"]))).hexdigest()[:16] == "50bcf90bec0c60f1"


def test_a_table_survives_the_round_trip(store: Store) -> None:
    table = classes_table(["ä", "b", "🍎"])
    ref = put_table(store, table, CLASSES)
    again = ipc_to_table(read_checked(store, table_path(ref.sha256), ref), CLASSES, "classes")
    assert again.equals(table)
    assert ref.num_rows == 3


def test_an_empty_table_survives_too(store: Store) -> None:
    ref = put_table(store, SAMPLES.empty_table(), SAMPLES)
    assert ipc_to_table(store.read(table_path(ref.sha256)), SAMPLES, "samples").num_rows == 0
    assert CheckedTable.open(store, table_path(ref.sha256), ref, SAMPLES).take("shard", []).tolist() == []


def test_put_table_refuses_other_columns_and_nulls(local: Store) -> None:
    with pytest.raises(UsageError, match=r"expected a table with columns \['class_id'.*found \['name'\]"):
        put_table(local, pa.table({"name": ["a"]}), CLASSES)
    holed = pa.table({name: pa.array([1, None]) for name in SAMPLES.names})
    with pytest.raises(UsageError, match="without missing values, found some in shard, row, offset, size, checksum"):
        put_table(local, holed, SAMPLES)


def test_nulls_where_none_may_be_are_damage() -> None:
    holed = pa.table([pa.array([None], type=field.type) for field in SAMPLES], schema=SAMPLES)
    with pytest.raises(IntegrityError, match="samples: expected no missing value, found some in shard, row"):
        ipc_to_table(table_to_ipc(holed), SAMPLES, "samples")


def test_a_table_of_another_schema_is_refused() -> None:
    with pytest.raises(IntegrityError, match=r"the index: expected columns shard uint32, .*found class_id int32"):
        ipc_to_table(table_to_ipc(classes_table(["a"])), SAMPLES, "the index")


def test_what_is_no_arrow_file_is_refused() -> None:
    for data in (b"", b"ARROW1\0\0", b"x" * 1000, table_to_ipc(classes_table(["a"]))[:-3]):
        with pytest.raises(IntegrityError, match="the index is not an Arrow IPC file"):
            ipc_to_table(data, SAMPLES, "the index")


# ---- Tables that are checked as they are touched


def samples_table(num_rows: int) -> pa.Table:
    random = np.random.default_rng(5)
    return pa.table({f.name: random.integers(0, 2**32, num_rows, dtype=np.uint64) for f in SAMPLES}).cast(SAMPLES)


def open_samples(store: Store, data: bytes, ref: FileRef, name: str) -> CheckedTable:
    store.create(f"tables/{name}", data)
    return CheckedTable.open(store, f"tables/{name}", ref, SAMPLES)


def test_columns_equal_the_table(store: Store) -> None:
    table = samples_table(100_000)
    data = table_to_ipc(table)
    checked = open_samples(store, data, make_ref(data, table.num_rows), "a")
    rows = np.random.default_rng(1).integers(0, 100_000, 1000)
    for name in SAMPLES.names:
        column = table.column(name).to_numpy()
        np.testing.assert_array_equal(checked.take(name, rows), column[rows])
        np.testing.assert_array_equal(checked.slice(name, 20_000, 90_001), column[20_000:90_001])
        assert checked.take(name, rows).dtype == column.dtype
    assert checked.num_rows == 100_000
    checked.verify_all()


def every_value(checked: CheckedTable) -> list[list[int]]:
    return [checked.take(name, np.arange(checked.num_rows)).tolist() for name in SAMPLES.names]


def test_a_flip_of_any_byte_is_seen_before_a_value_is_returned() -> None:
    data = table_to_ipc(samples_table(20))
    ref = make_ref(data, 20)
    for position in range(len(data)):
        with pytest.raises(IntegrityError, match="is damaged in bytes"):
            every_value(CheckedTable(flip(data, position, bit=position % 8), ref, SAMPLES, "samples"))


def flip(data: bytes, position: int, bit: int = 0) -> bytes:
    return data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]


def test_a_flip_in_a_large_table_stops_its_block_and_no_other(local: Store) -> None:
    table = samples_table(200_000)
    data = table_to_ipc(table)
    ref = make_ref(data, table.num_rows)
    assert len(ref.blocks) == 6
    for block in range(1, 5):
        position = block * BLOCK_BYTES + 77_777 * block
        checked = open_samples(local, flip(data, position), ref, f"flipped-{block}")
        offsets, sizes = checked._offsets, {f.name: f.type.bit_width // 8 for f in SAMPLES}
        name = max((n for n in offsets if offsets[n] <= position), key=lambda n: offsets[n])
        row = (position - offsets[name]) // sizes[name]
        with pytest.raises(IntegrityError, match=rf"damaged in bytes \[{block * BLOCK_BYTES}, "):
            checked.take(name, [row])
        with pytest.raises(IntegrityError, match="is damaged"):
            checked.slice(name, row, row + 1)
        with pytest.raises(IntegrityError, match="is damaged"):
            checked.verify_all()
        far = [n for n in offsets if (offsets[n] >> 20) != block]
        assert all(checked.take(n, [0])[0] == table.column(n)[0].as_py() for n in far)


@pytest.mark.parametrize("position", [0, 300, -1, -7, -10, -200])
def test_a_flip_at_the_ends_of_a_large_table_is_seen_on_opening(local: Store, position: int) -> None:
    data = table_to_ipc(samples_table(200_000))
    flipped = flip(data, position % len(data))
    with pytest.raises(IntegrityError):
        open_samples(local, flipped, make_ref(data, 200_000), "flipped")


def test_a_block_is_hashed_once(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data = table_to_ipc(samples_table(200_000))
    checked = open_samples(local, data, make_ref(data, 200_000), "a")
    every_value(checked)
    monkeypatch.setattr("pipeline.store.checked._digest", refuse(errno.EIO))
    every_value(checked)


def test_opening_hashes_the_ends_alone(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data = table_to_ipc(samples_table(200_000))
    checked = open_samples(local, data, make_ref(data, 200_000), "a")
    assert np.flatnonzero(checked._verified).tolist() == [0, 5]


def test_rows_outside_the_table_are_refused(local: Store) -> None:
    data = table_to_ipc(samples_table(20))
    checked = open_samples(local, data, make_ref(data, 20), "a")
    for rows in ([20], [-1]):
        with pytest.raises(IndexError, match="which has 20 rows"):
            checked.take("shard", rows)
    with pytest.raises(IndexError, match="which has 20 rows"):
        checked.slice("shard", 3, 21)
    with pytest.raises(UsageError, match="no column 'label'; columns: shard, row"):
        checked.take("label", [1])


def test_a_wrong_reference_is_refused(local: Store) -> None:
    data = table_to_ipc(samples_table(20))
    ref = make_ref(data, 20)
    for number, (wrong, message) in enumerate(
        [
            (replace(ref, size=ref.size + 1), "expected"),
            (replace(ref, blocks=()), "in 0 recorded blocks"),
            (replace(ref, num_rows=21), "expected 21 rows, found 20"),
        ]
    ):
        with pytest.raises(IntegrityError, match=message):
            open_samples(local, data, wrong, str(number))


def test_verify_all_also_compares_the_name(local: Store) -> None:
    data = table_to_ipc(samples_table(20))
    checked = open_samples(local, data, replace(make_ref(data, 20), sha256="0" * 64), "a")
    with pytest.raises(IntegrityError, match="expected SHA-256 0000"):
        checked.verify_all()


def test_threads_see_the_same_values(local: Store) -> None:
    table = samples_table(200_000)
    data = table_to_ipc(table)
    checked = open_samples(local, data, make_ref(data, table.num_rows), "a")
    rows = [np.random.default_rng(n).integers(0, 200_000, 5000) for n in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda wanted: checked.take("checksum", wanted), rows))
    column = table.column("checksum").to_numpy()
    assert all((values == column[wanted]).all() for values, wanted in zip(found, rows, strict=True))


# ---- Image bytes


def image_args(data: bytes, offset: int) -> tuple[str, int, int, int]:
    return "shards/ab/c.tar", offset, len(data), xxhash.xxh3_64_intdigest(data)


def test_an_image_is_read_and_verified(store: Store) -> None:
    store.create("shards/ab/c.tar", b"header" + b"image bytes" + b"padding")
    args = image_args(b"image bytes", 6)
    assert read_image(store, *args, "k") == b"image bytes"
    assert read_image(ShardReader(store), *args, "k") == b"image bytes"


def test_a_flipped_image_names_shard_key_and_offset(store: Store) -> None:
    store.create("shards/ab/c.tar", b"header" + flip(b"image bytes", 4) + b"padding")
    for source in (store, ShardReader(store)):
        with pytest.raises(IntegrityError, match=r"image 00ff of cats in shards/ab/c.tar at offset 6: expected 11"):
            read_image(source, *image_args(b"image bytes", 6), lambda: "00ff of cats")


def test_where_is_not_asked_without_need(local: Store) -> None:
    local.create("shards/ab/c.tar", b"image bytes")
    read_image(local, *image_args(b"image bytes", 0), lambda: pytest.fail("asked"))


def test_a_cut_tar_is_an_error(store: Store) -> None:
    store.create("shards/ab/c.tar", b"header" + b"ima")
    with pytest.raises(
        IntegrityError, match=r"shards/ab/c.tar in .* cut short: expected 11 bytes at offset 6, found 3"
    ):
        ShardReader(store).read("shards/ab/c.tar", 6, 11)


def test_a_reader_keeps_few_files_open_under_threads(local: Store) -> None:
    for number in range(12):
        local.create(f"shards/{number}.tar", b"%04d" % number * 100)
    reader = ShardReader(local, max_open=3)
    before = len(os.listdir("/proc/self/fd"))
    numbers = np.random.default_rng(3).integers(0, 12, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: reader.read(f"shards/{n}.tar", 40, 4), numbers))
    assert found == [b"%04d" % n for n in numbers]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_file_stays_open_while_it_is_read(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        local.create(f"shards/{number}.tar", b"%04d" % number)
    reader = ShardReader(local, max_open=1)

    def late(descriptor: int, offset: int, size: int) -> bytes:
        monkeypatch.undo()
        assert reader.read("shards/1.tar", 0, 4) == b"0001"  # another thread takes the only place in the cache
        return os.pread(descriptor, size, offset)

    monkeypatch.setattr("pipeline.store.shards.read_fully", late)
    assert reader.read("shards/0.tar", 0, 4) == b"0000"


def test_a_reader_is_pickled_without_its_files(local: Store) -> None:
    local.create("shards/a.tar", b"0123")
    reader = ShardReader(local, max_open=2)
    reader.read("shards/a.tar", 0, 1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(reader.read, ("shards/a.tar", 1, 2)) == b"12"
    assert pickle.loads(pickle.dumps(reader))._open == {}


def test_a_missing_tar_is_named(store: Store) -> None:
    with pytest.raises(NotFoundError, match=r"shards/ab/c.tar in"):
        ShardReader(store).read("shards/ab/c.tar", 0, 1)


# ---- What killed processes leave behind

LEAVE = """
import os, sys
from pipeline.store import Store
store = Store.open(sys.argv[1])
folder = store.staging_dir()
open(folder + "/unit.tar", "xb").write(b"half")
store._backend._write_temporary(b"half")
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_sweep_takes_what_the_killed_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    root = tmp_path / "root"
    store = Store.open(root, create=True)
    mine = store.staging_dir()
    Path(mine, "unit.tar").write_bytes(b"mine")
    with subprocess.Popen(
        [sys.executable, "-c", LEAVE, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        assert store.sweep_abandoned(0) == 0  # both are alive
        other.kill()
    assert store.sweep_abandoned(600) == 0  # too young
    assert store.sweep_abandoned(-1) == 2
    assert [path.name for path in (root / "staging").rglob("*")] == [Path(mine).name, "unit.tar"]


LEAVE_IN_TMPDIR = """
import os, sys
from pipeline.store import Store, temporary_dir
for folder in (Store.open("memory://bucket/root", create=True).staging_dir(), temporary_dir()):
    open(folder + "/half", "xb").write(b"half")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR of this process and its children."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def test_what_killed_builds_of_remote_roots_left_in_tmpdir_is_swept(scratch: Path) -> None:
    store = Store.open("memory://bucket/root", create=True)
    mine = store.staging_dir()
    Path(mine, "unit.tar").write_bytes(b"mine")
    with subprocess.Popen(
        [sys.executable, "-c", LEAVE_IN_TMPDIR], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        assert len(list(scratch.iterdir())) == 3
        assert store.sweep_abandoned(-1) == 0  # both are alive
        other.kill()
    assert store.sweep_abandoned(600) == 0  # too young
    assert store.sweep_abandoned(-1) == 2
    assert [path.name for path in scratch.rglob("*")] == [Path(mine).name, "unit.tar"]


def test_a_process_that_needs_a_temporary_directory_sweeps_first(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.store.claims._has_swept", False)
    old, young = (scratch / f"evenshard-{number}-{'0' * 32}" for number in (7, 8))
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    made = temporary_dir()
    assert sorted(scratch.iterdir()) == sorted([young, Path(made)])
    assert os.stat(made).st_mode & 0o777 == 0o700


def test_a_sweep_of_tmpdir_leaves_what_is_not_this_users(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"evenshard-1-{'0' * 31}"
    (scratch / "else").mkdir()
    (scratch / f"{name}a").symlink_to(scratch / "else")
    (scratch / f"{name}b").write_bytes(b"a file")
    (scratch / f"prefix-{name}c").mkdir()
    (scratch / f"{name}d").mkdir()
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    assert sweep_temporary(-1) == 0
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert sweep_temporary(-1) == 1
    assert not (scratch / f"{name}d").exists()
    assert len(list(scratch.iterdir())) == 4


def test_a_sweep_leaves_what_it_does_not_know(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "root", create=True)
    store.create("staging/probe-1", b"")
    assert store.sweep_abandoned(-1) == 0
    assert store.exists("staging/probe-1")
