"""The node cache: only what is verified is used, nothing foreign is removed, and it stays within its bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash
from fault_proxy import directory_server

from pipeline.errors import IntegrityError, StoreError, UsageError
from pipeline.schema import tar_path
from pipeline.store import Store
from pipeline.stream import cache as module
from pipeline.stream import remote
from pipeline.stream.cache import MARKER, NodeCache, default_cache
from pipeline.stream.remote import CachedReader, join_neighbours, open_reader


class Shard:
    """Some bytes, their name, and a count of the ranges fetched."""

    def __init__(self, number: int, size: int = 1000) -> None:
        self.data = random.Random(number).randbytes(size)
        self.size = size
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self.num_fetched = 0

    def fetch(self, offset: int, size: int) -> bytes:
        self.num_fetched += 1
        return self.data[offset : offset + size]

    def download(self, cache: NodeCache) -> bytes | None:
        return content(cache.download(self.sha256, self.size, self.fetch))

    def found(self, cache: NodeCache) -> bytes | None:
        return content(cache.shard(self.sha256, self.size))

    def path(self, cache: NodeCache) -> Path:
        return Path(cache.directory, "files", self.sha256[:2], f"{self.sha256}.tar")


def content(descriptor: int | None) -> bytes | None:
    if descriptor is None:
        return None
    with open(descriptor, "rb") as file:
        return file.read()


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache", 10_000)


def test_a_shard_is_fetched_once_and_found_by_all(cache: NodeCache) -> None:
    shard = Shard(1)
    assert shard.found(cache) is None
    assert shard.download(cache) == shard.found(cache) == shard.data
    assert shard.download(pickle.loads(pickle.dumps(cache))) == shard.data
    assert shard.num_fetched == 1


def test_threads_that_want_the_same_shard_wait_for_one_download(cache: NodeCache) -> None:
    shard, barrier = Shard(1), threading.Barrier(8)

    def work(_: int) -> bytes | None:
        barrier.wait()
        return shard.download(cache)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(8))) == {shard.data}
    assert shard.num_fetched == 1


def test_the_directory_is_private(cache: NodeCache) -> None:
    Shard(1).download(cache)
    kept = [Path(cache.directory), *Path(cache.directory).rglob("*")]
    assert not [path for path in kept if path.stat().st_mode & 0o077 and path.name != MARKER]


def test_a_directory_of_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 'thesis.tex' and no cache"):
        NodeCache(tmp_path, 1000)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_directory_that_others_can_write_is_refused(cache: NodeCache) -> None:
    os.chmod(cache.directory, 0o777)
    with pytest.raises(StoreError, match="can be written by others"):
        NodeCache(cache.directory, 1000)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:500] + b"\0" + data[501:]])
def test_planted_content_is_not_used_but_replaced(cache: NodeCache, damage: Callable[[bytes], bytes]) -> None:
    shard = Shard(1)
    shard.path(cache).parent.mkdir(parents=True)
    shard.path(cache).write_bytes(damage(shard.data))
    assert shard.found(cache) is None
    assert shard.download(cache) == shard.data


def test_a_verified_file_that_changes_is_verified_again(cache: NodeCache) -> None:
    shard = Shard(1)
    shard.download(cache)
    shard.path(cache).write_bytes(b"x" * shard.size)
    assert shard.found(cache) is None


def test_a_verified_file_is_not_hashed_again(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(1)
    shard.download(cache)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed"))
    assert shard.found(NodeCache(cache.directory, 1000)) == shard.data


def test_a_link_under_the_name_of_a_shard_is_refused_and_left(cache: NodeCache, tmp_path: Path) -> None:
    shard = Shard(1)
    (tmp_path / "target").write_bytes(shard.data)
    shard.path(cache).parent.mkdir(parents=True)
    shard.path(cache).symlink_to(tmp_path / "target")
    for attempt in (shard.found, shard.download):
        with pytest.raises(StoreError, match="was not made here"):
            attempt(cache)
    assert (tmp_path / "target").read_bytes() == shard.data
    assert shard.path(cache).is_symlink()


def test_wrong_bytes_are_fetched_twice_and_never_kept(cache: NodeCache) -> None:
    shard = Shard(1)
    shard.data = bytes(shard.size)
    with pytest.raises(IntegrityError, match=rf"{tar_path(shard.sha256)} arrived as 1000 bytes"):
        shard.download(cache)
    assert shard.num_fetched == 2
    assert cache.used_bytes() == 0


def test_least_recently_used_goes_first(cache: NodeCache) -> None:
    shards = [Shard(number) for number in range(12)]
    for shard in shards[:10]:
        shard.download(cache)
    shards[0].found(cache)
    for shard in shards[10:]:
        shard.download(cache)
    assert [number for number, shard in enumerate(shards) if shard.found(cache) is None] == [1, 2]
    assert cache.used_bytes() == cache.max_bytes


def test_making_room_removes_nothing_foreign(cache: NodeCache) -> None:
    foreign = Path(cache.directory, "files", "ab", "notes.txt")
    foreign.parent.mkdir()
    foreign.write_bytes(b"n" * 5000)
    for number in range(20):
        Shard(number).download(cache)
    assert foreign.exists()


def test_a_shard_larger_than_the_cache_is_not_fetched(cache: NodeCache) -> None:
    shard = Shard(1, size=10_001)
    assert shard.download(cache) is None
    assert shard.num_fetched == 0


def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(cache: NodeCache) -> None:
    abandoned = Path(cache.directory, "partial", "abandoned")
    abandoned.write_bytes(b"half")
    shard = Shard(1)

    def fetch(offset: int, size: int) -> bytes:
        NodeCache(cache.directory, 10_000)  # another process starts meanwhile
        return shard.fetch(offset, size)

    assert content(cache.download(shard.sha256, shard.size, fetch)) == shard.data
    assert os.listdir(abandoned.parent) == []


def test_images_are_kept_and_checked(cache: NodeCache) -> None:
    sha256 = "ab" * 32
    cache.keep_image(sha256, 512, b"image")
    assert cache.image(sha256, 512, 5) == b"image"
    assert cache.image(sha256, 512, 5, checksum=1) is None
    path = next(Path(cache.directory).glob("files/*/*.img"))
    for damaged in (b"", path.read_bytes()[:-1], path.read_bytes()[:-1] + b"E", path.read_bytes() + b"!"):
        path.write_bytes(damaged)
        assert cache.image(sha256, 512, 5) is None
    cache.keep_image(sha256, 512, b"image")
    assert cache.image(sha256, 512, 5) == b"image"


def test_images_least_recently_used_go_first(cache: NodeCache) -> None:
    for number in range(90):
        cache.keep_image("ab" * 32, number * 512, bytes(92))
    assert cache.image("ab" * 32, 0, 92)
    for number in range(90, 130):
        cache.keep_image("ab" * 32, number * 512, bytes(92))
    assert cache.image("ab" * 32, 0, 92)
    assert cache.image("ab" * 32, 512, 92) is None


def test_images_stay_within_the_bytes(cache: NodeCache) -> None:
    for number in range(300):
        cache.keep_image("ab" * 32, number * 512, bytes(92))
        assert cache.used_bytes() <= cache.max_bytes
    assert cache.used_bytes() > 0.9 * cache.max_bytes


def test_a_full_disk_is_found_before_anything_is_fetched(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(1)
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(StoreError, match=r"cannot write to the cache directory .*/cache: No space left.*cache_bytes"):
        shard.download(cache)
    assert (shard.num_fetched, cache.used_bytes()) == (0, 0)


def test_a_read_only_directory_is_found_on_opening(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NEW", os.O_RDONLY | os.O_DIRECTORY)  # root may write anywhere, so the open must fail
    with pytest.raises(StoreError, match=r"cannot open the cache directory .*EVENSHARD_CACHE"):
        NodeCache(cache.directory, 1000)


def refuse(number: int) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_the_default_directory_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache().directory == str(tmp_path / "xdg" / "evenshard")
    monkeypatch.setenv("EVENSHARD_CACHE", str(tmp_path / "fast disk"))
    assert default_cache(max_bytes=7).directory == str(tmp_path / "fast disk")


# ---- The reader


def test_neighbours_are_read_as_one_and_little_is_read_in_vain() -> None:
    rng = random.Random(2)
    requests = {(f"{rng.randrange(3)}.tar", 512 * rng.randrange(4000), rng.randrange(1, 9000)) for _ in range(700)}
    runs = join_neighbours(list(requests))
    assert sorted(request for run in runs for request in run) == sorted(requests)
    assert len(runs) < len(requests) / 2
    for run in runs:
        length = max(offset + size for _, offset, size in run) - run[0][1]
        assert len({path for path, _, _ in run}) == 1
        assert 8 * length <= 9 * sum(size for _, _, size in run)


def remote_shards(name: str, shards: list[Shard]) -> Store:
    store = Store.open(f"memory://{name}")
    for shard in shards:
        store.put(tar_path(shard.sha256), shard.data)
    return store


def reader_of(store: Store, shards: list[Shard], cache: NodeCache) -> CachedReader:
    return CachedReader(store, cache, {tar_path(shard.sha256): shard.size for shard in shards})


@pytest.mark.parametrize("max_bytes", [100_000, 1_500])
def test_ranges_are_those_of_the_shards(tmp_path: Path, max_bytes: int) -> None:
    shards = [Shard(number) for number in range(4)]
    reader = reader_of(remote_shards(tmp_path.name, shards), shards, NodeCache(tmp_path / "cache", max_bytes))
    assert reader.keeps_shards == (max_bytes == 100_000)
    rng = random.Random(1)
    for _ in range(30):
        wanted = [(rng.choice(shards), rng.randrange(900), rng.randrange(1, 100)) for _ in range(10)]
        wanted.append(wanted[0])
        found = reader.read_many([(tar_path(shard.sha256), offset, size) for shard, offset, size in wanted])
        assert found == [shard.data[offset : offset + size] for shard, offset, size in wanted]


def test_large_shards_come_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 100)
    shard, cache = Shard(1), NodeCache(tmp_path / "cache", 100_000)
    reader = reader_of(remote_shards(tmp_path.name, [shard]), [shard], cache)
    assert reader.read(tar_path(shard.sha256), 10, 20) == shard.data[10:30]
    done = threading.Event()
    while shard.found(cache) is None:
        assert not done.wait(0.01)
    spent = reader.store.traffic
    assert reader.read(tar_path(shard.sha256), 500, 20) == shard.data[500:520]
    assert reader.store.traffic == spent


def test_a_failure_in_the_background_is_raised_by_a_later_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 100)
    shard = Shard(1)
    reader = reader_of(remote_shards(tmp_path.name, [shard]), [shard], NodeCache(tmp_path / "cache", 100_000))
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    assert reader.read(tar_path(shard.sha256), 10, 20) == shard.data[10:30]  # begins the download
    with pytest.raises(StoreError, match="No space left"):
        read_until_it_fails(reader, (tar_path(shard.sha256), 10, 20))


def test_a_download_that_failed_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 100)
    shard, cache = Shard(1), NodeCache(tmp_path / "cache", 100_000)
    reader = reader_of(remote_shards(tmp_path.name, [shard]), [shard], cache)
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
        reader.read(tar_path(shard.sha256), 10, 20)
        with pytest.raises(StoreError, match="No space left"):
            read_until_it_fails(reader, (tar_path(shard.sha256), 10, 20))
    for _ in range(1000):
        with suppress(StoreError):  # of downloads begun meanwhile
            reader.read(tar_path(shard.sha256), 10, 20)
        if shard.found(cache) is not None:
            return
        threading.Event().wait(0.01)
    pytest.fail("the shard never came")


def test_what_is_under_way_is_not_begun_again() -> None:
    downloads, go, done, begun = remote._Downloads(), threading.Event(), threading.Event(), []

    def work() -> None:
        begun.append(1)
        go.wait(30)

    for _ in range(5):
        downloads.begin("a", work)
    downloads.begin("b", done.set)
    assert done.wait(30)
    go.set()
    downloads.end()
    assert len(begun) == 1


def test_an_image_that_was_kept_wrong_is_fetched_again(tmp_path: Path) -> None:
    shard, cache = Shard(1), NodeCache(tmp_path / "cache", 500)
    reader = reader_of(remote_shards(tmp_path.name, [shard]), [shard], cache)
    cache.keep_image(shard.sha256, 10, b"wrong" * 4)  # as it came, twice
    right = shard.data[10:30]
    found = reader.read_many([(tar_path(shard.sha256), 10, 20)], [xxhash.xxh3_64_intdigest(right)])
    assert found == [right] == [cache.image(shard.sha256, 10, 20)]


def test_a_range_beyond_the_end_of_a_kept_shard_is_damage(tmp_path: Path) -> None:
    shard = Shard(1)
    reader = reader_of(remote_shards(tmp_path.name, [shard]), [shard], NodeCache(tmp_path / "cache", 100_000))
    reader.read(tar_path(shard.sha256), 0, 10)
    with pytest.raises(IntegrityError, match=r"has 1000 bytes, and none of 20 at offset 990"):
        reader.read(tar_path(shard.sha256), 990, 20)


FORKS = """
import os, sys, threading
from pipeline.schema import tar_path
from pipeline.store import Store
from pipeline.stream.cache import NodeCache
from pipeline.stream.remote import CachedReader

url, sha256, size, folder = sys.argv[1:]
reader = CachedReader(Store.open(url), NodeCache(folder, 500), {tar_path(sha256): int(size)})
reader.read(tar_path(sha256), 0, 10)  # starts threads, which the child has not
child = os.fork()
if not child:
    os._exit(len(reader.read(tar_path(sha256), 100, 20)))
threading.Timer(60, os.kill, (child, 9)).start()
os._exit(0 if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 20 else 1)
"""


def test_a_reader_works_in_a_forked_child(tmp_path: Path) -> None:
    shard = Shard(1)
    path = tmp_path / "root" / tar_path(shard.sha256)
    path.parent.mkdir(parents=True)
    path.write_bytes(shard.data)
    with directory_server(tmp_path / "root") as url:
        command = [sys.executable, "-W", "ignore", "-c", FORKS, url, shard.sha256, "1000", str(tmp_path / "cache")]
        assert subprocess.run(command, check=False, timeout=120).returncode == 0


def read_until_it_fails(reader: CachedReader, request: tuple[str, int, int]) -> None:
    for _ in range(1000):
        reader.read(*request)
        threading.Event().wait(0.01)


def test_an_image_that_arrives_wrong_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, cache = Shard(1), NodeCache(tmp_path / "cache", 500)
    reader = reader_of(remote_shards(tmp_path.name, [shard]), [shard], cache)
    right, answers = reader.store.read_range, [b"wrong" * 4]
    monkeypatch.setattr(reader.store, "read_range", lambda *args: answers.pop() if answers else right(*args))
    request = (tar_path(shard.sha256), 10, 20)
    checksum = xxhash.xxh3_64_intdigest(shard.data[10:30])
    assert reader.read_many([request], [checksum]) == [shard.data[10:30]]
    assert cache.image(shard.sha256, 10, 20) == shard.data[10:30]


def test_local_roots_need_no_cache(tmp_path: Path, cache: NodeCache) -> None:
    assert not isinstance(open_reader(Store.open(tmp_path / "root", create=True), cache), CachedReader)
    with pytest.raises(UsageError, match="sizes of the shards"):
        open_reader(Store.open("memory://x"), cache)


def test_a_reader_is_pickled_without_its_connections(tmp_path: Path, cache: NodeCache) -> None:
    shard = Shard(1)
    reader = reader_of(remote_shards(tmp_path.name, [shard]), [shard], cache)
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(tar_path(shard.sha256), 3, 4) == shard.data[3:7]
