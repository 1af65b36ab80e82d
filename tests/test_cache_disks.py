"""The node cache on real disks: full, read-only, another user's, taken away; and shards that vanish meanwhile.

Each is an error that names the directory or the file and what to do, and training goes on from its state afterwards.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fault_proxy import directory_server
from real_servers import s3, wait_for
from tiny_snapshot import write_snapshot

from pipeline.errors import EvenshardError, NotFoundError, StoreError
from pipeline.schema import tar_path
from pipeline.snapshot import Snapshot, open_snapshot
from pipeline.store import remote
from pipeline.stream.cache import NodeCache
from pipeline.stream.loader import Loader

STATE = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images in 15 shards of 20 to 30 KB."""
    root = tmp_path_factory.mktemp("disks") / "root"
    write_snapshot(root, {"train": (120, 60, 30, 15, 10, 5), "val": (0,) * 6, "test": (5, 3, 2, 1, 0, 0)})
    return root


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.03, 0.04, 0.05))
    yield
    for protocol in ("s3", "http"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of so many bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
    try:
        refused = subprocess.run(mount, capture_output=True).returncode
    except FileNotFoundError:
        refused = 1
    if refused:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def loader(url: str | Path, cache: Path | None = None, **options: Any) -> Loader:
    if cache is not None:
        options |= {"cache_dir": cache}
    return Loader(open_snapshot(url).manifest("natural"), 16, decode=False, **options)


def expected(root: Path) -> list[list[bytes]]:
    return [images for images, _ in loader(root)]


def read_until_it_fails(reads: Loader) -> tuple[list[list[bytes]], STATE, EvenshardError]:
    """What came before the error, and where to go on."""
    came: list[list[bytes]] = []
    with pytest.raises(EvenshardError) as failed:
        came.extend(images for images, _ in reads)
    return came, reads.state_dict(), failed.value


def go_on(reads: Loader, state: STATE) -> list[list[bytes]]:
    reads.load_state_dict(state)
    return [images for images, _ in reads]


@pytest.mark.parametrize("share", [4.0, 0.5])  # whole shards, single images
def test_a_disk_that_fills_up_is_named_and_training_goes_on_when_there_is_room(
    root: Path, tmp_path: Path, share: float
) -> None:
    cache_bytes = int(share * sum(open_snapshot(root).shards["tar_size"].to_pylist()))
    with small_disk(tmp_path / "disk", "192k") as disk, directory_server(root) as url:
        came, state, error = read_until_it_fails(loader(url, disk / "cache", cache_bytes=cache_bytes))
        assert isinstance(error, StoreError)
        message = (
            rf"cannot write to the cache directory {disk}/cache: No space left on device; \d+ bytes are free there"
        )
        assert_says(error, message + r".*free some space.*cache_bytes.*cache_dir or \$EVENSHARD_CACHE")
        wait_for(lambda: not os.listdir(disk / "cache" / "partial"))  # of the downloads beside the one that failed
        assert came == expected(root)[: len(came)]
        remount(disk, "size=4m")
        came += go_on(loader(url, disk / "cache", cache_bytes=cache_bytes), state)
    assert came == expected(root)


def test_a_disk_that_others_fill_is_named(root: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk, directory_server(root) as url:
        reads = loader(url, disk / "cache", cache_bytes=1 << 20, workers=2)
        batches = iter(reads)
        came = [next(batches)[0], next(batches)[0]]
        fill(disk / "others")
        with pytest.raises(StoreError, match=r"cannot write to the cache directory .*: No space left"):
            came.extend(images for images, _ in batches)
        os.unlink(disk / "others")
        came += go_on(loader(url, disk / "cache", cache_bytes=1 << 20), reads.state_dict())
    assert came == expected(root)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(bytes(4096) for _ in range(1 << 20))


def test_a_cache_that_is_full_from_the_start_is_named_on_opening(root: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk, directory_server(root) as url:
        fill(disk / "others")
        with pytest.raises(StoreError, match=r"cannot open the cache directory .*/cache: No space left.*free some"):
            loader(url, disk / "cache")


def test_a_read_only_disk_is_named_on_opening(root: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk, directory_server(root) as url:
        loader(url, disk / "cache", cache_bytes=1 << 20)
        remount(disk, "ro")
        for cache in (disk / "cache", disk / "new"):
            with pytest.raises(StoreError, match=rf"cannot open .*{cache}: Read-only file system; mount .* writable"):
                loader(url, cache, cache_bytes=1 << 20)


@pytest.mark.parametrize("cache_bytes", [1 << 20, 40_000])
def test_a_disk_that_becomes_read_only_is_named(root: Path, tmp_path: Path, cache_bytes: int) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk, directory_server(root) as url:
        reads = loader(url, disk / "cache", cache_bytes=cache_bytes)
        first = next(iter(reads))[0]
        state = reads.state_dict()
        remount(disk, "ro")
        reads.load_state_dict(state)
        came, state, error = read_until_it_fails(reads)
        assert_says(error, rf"the cache directory {disk}/cache: Read-only file system; mount its file system writable")
        remount(disk, "rw")
        assert [first, *came, *go_on(loader(url, disk / "cache", cache_bytes=cache_bytes), state)] == expected(root)


def test_a_directory_of_another_user_is_refused_and_left_alone(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 4242, -1)
    with pytest.raises(StoreError, match=r"/cache belongs to user 4242, and this process runs as user 0: .*`chown` it"):
        NodeCache(tmp_path / "cache", 1000)
    assert os.listdir(tmp_path / "cache") == []


def test_a_directory_that_this_user_may_not_enter_is_named() -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to others anyway
        os.chmod(folder, 0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(StoreError, match=rf"cannot open .*{folder}/c: Permission denied; let this user write"):
                NodeCache(f"{folder}/c", 1000)
        finally:
            os.seteuid(0)


def test_a_cache_taken_away_is_named(root: Path, tmp_path: Path) -> None:
    with directory_server(root) as url:
        batches = iter(loader(url, tmp_path / "cache", cache_bytes=40_000))
        next(batches)
        os.rename(tmp_path / "cache", tmp_path / "elsewhere")
        with pytest.raises(StoreError, match=rf"{tmp_path}/cache: No such file or directory; it was removed while in"):
            list(batches)


# ---- Shards that vanish in the middle of an epoch


def last_tar(snapshot: Snapshot) -> str:
    """A training shard."""
    samples = snapshot.samples("train")
    shards = samples.slice("shard", 0, samples.num_rows).tolist()
    return tar_path(snapshot.shards["tar_sha256"][max(shards)].as_py())


def check_vanished(url: str, tar: str, remove: Callable[[], object], cache: Path, *, workers: int) -> None:
    reads = loader(url, cache, cache_bytes=2_000, workers=workers)
    batches = iter(reads)
    next(batches)
    remove()
    message = rf"cannot read {tar} in {url}: no such file.*vanished while it was in use.*`evenshard pin`"
    with pytest.raises(NotFoundError, match=message):
        list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_in_an_epoch_over_http_is_named(root: Path, tmp_path: Path, workers: int) -> None:
    copy = tmp_path / "copy"
    write_snapshot(copy, {"train": (120, 60, 30, 15, 10, 5), "val": (0,) * 6, "test": (5, 3, 2, 1, 0, 0)})
    tar = last_tar(open_snapshot(copy))
    with directory_server(copy) as url:
        check_vanished(url, tar, lambda: os.unlink(copy / tar), tmp_path / "cache", workers=workers)


def test_a_shard_that_vanishes_in_an_epoch_on_s3_is_named(root: Path, tmp_path: Path) -> None:
    tar = last_tar(open_snapshot(root))
    with s3(root):
        filesystem = fsspec.filesystem("s3")
        remove = lambda: filesystem.rm_file(f"bucket/root/{tar}")  # noqa: E731
        check_vanished("s3://bucket/root", tar, remove, tmp_path / "cache", workers=0)


def assert_says(error: Exception, pattern: str) -> None:
    with pytest.raises(type(error), match=pattern):
        raise error
