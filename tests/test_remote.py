"""Remote roots through faults: zero wrong bytes, requests and bytes as announced, one download per node."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fault_proxy import FAULTS, Plan, directory_server, proxy
from real_servers import needs_nginx, nginx, s3, wait_for
from remote_kills import kill_while_downloading
from remote_rank import epoch, every_image, read, read_all
from tiny_snapshot import write_snapshot

from pipeline.errors import IntegrityError, NotFoundError, StoreError
from pipeline.schema import tar_path
from pipeline.snapshot import Snapshot, open_snapshot
from pipeline.store import ShardReader, Store, remote
from pipeline.stream.cache import NodeCache
from pipeline.stream.loader import Loader
from pipeline.stream.remote import CachedReader, open_reader


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote") / "root"
    write_snapshot(root, {"train": (90, 40, 20, 10, 5, 1), "val": (0,) * 6, "test": (5, 3, 2, 1, 0, 0)})
    return root


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seconds become hundredths, and no connection outlives its test."""
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.03, 0.04, 0.05))
    monkeypatch.setattr(remote, "STALL_S", 0.3)
    yield
    for protocol in ("s3", "http"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


@pytest.fixture(scope="module")
def moto(root: Path) -> Iterator[str]:
    """An S3 server that has the root as s3://bucket/root."""
    with s3(root) as url:
        yield url


def shard_bytes(snapshot: Snapshot) -> int:
    return sum(snapshot.shards["tar_size"].to_pylist())


@pytest.mark.parametrize("share", [2.0, 0.25])
def test_http_with_faults_gives_the_bytes_of_the_local_root(root: Path, tmp_path: Path, share: float) -> None:
    local = open_snapshot(root)
    plan = Plan(0.1 if share < 1 else 0.35, seed=5, in_a_row=4)  # of few requests some must break
    with directory_server(root) as upstream, proxy(upstream, plan) as (url, sent):
        check_epoch(url, local, NodeCache(tmp_path / "cache", int(share * shard_bytes(local))), plan, sum_of(sent))


@pytest.mark.parametrize("share", [2.0, 0.25])
def test_s3_with_faults_gives_the_bytes_of_the_local_root(
    root: Path, tmp_path: Path, moto: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = open_snapshot(root)
    plan = Plan(0.1 if share < 1 else 0.35, seed=6, in_a_row=4)
    with proxy(moto, plan) as (url, sent):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        cache = NodeCache(tmp_path / "cache", int(share * shard_bytes(local)))
        check_epoch("s3://bucket/root", local, cache, plan, sum_of(sent))


@needs_nginx
@pytest.mark.parametrize("share", [2.0, 0.25])
def test_an_epoch_from_nginx_through_faults_and_what_nginx_says_of_it(root: Path, tmp_path: Path, share: float) -> None:
    plan = Plan(0.1 if share < 1 else 0.35, seed=8, in_a_row=4)
    with nginx(root) as server, proxy(server.url, plan) as (url, _):
        snapshot = open_snapshot(url)
        begun, opened = len(plan.log), snapshot.store.traffic  # looking for the newest record asks with HEAD, then GET
        num_served = len(server.served())
        options = {"cache_dir": tmp_path / "cache", "cache_bytes": int(share * shard_bytes(snapshot)), "decode": False}
        there = Loader(snapshot.manifest("balanced"), 16, workers=2, **options)
        here = Loader(open_snapshot(root).manifest("balanced"), 16, decode=False)
        for (found, labels), (expected, expected_labels) in zip(there, here, strict=True):
            assert found == expected
            assert labels.tolist() == expected_labels.tolist()
        assert all(plan.done[fault] for fault in FAULTS)
        spent, served = snapshot.store.traffic, server.served()[num_served:]
    faults = [fault for _, _, fault in plan.log[begun:]]
    assert spent.num_requests - opened.num_requests == len(faults)
    assert len(served) == len(faults) - faults.count("503")  # those never reached it
    assert {(one.method, one.status) for one in served} <= {("GET", 200), ("GET", 206)}
    in_vain = sum(one.body_bytes for one in served) - (spent.fetched_bytes - opened.fetched_bytes)
    assert in_vain > 0  # what it sent and the proxy broke


@needs_nginx
def test_what_nginx_sends_is_what_is_announced(root: Path, tmp_path: Path) -> None:
    with nginx(root) as server:
        snapshot = open_snapshot(server.url)
        loader = Loader(snapshot.manifest("balanced"), 16, decode=False, cache_dir=tmp_path / "c", cache_bytes=5000)
        assert sum(len(labels) for _, labels in loader) >= 138
        traffic, served = snapshot.store.traffic, [one for one in server.served() if one.status in (200, 206)]
    served = [one for one in served if one.method == "GET"]  # the others ask how large a record is, or find none
    assert (traffic.num_requests, traffic.num_retries) == (len(served), 0)
    assert traffic.fetched_bytes == sum(one.body_bytes for one in served)


def sum_of(sent: dict[str, int]) -> Callable[[], int]:
    return lambda: sum(size for path, size in sent.items() if "/shards/" in path)


def check_epoch(url: str, local: Snapshot, cache: NodeCache, plan: Plan, sent: Callable[[], int]) -> None:
    snapshot = open_snapshot(url)
    assert snapshot.id == local.id
    reader, plain = open_reader(Store.open(url), cache, snapshot.shards, "train"), ShardReader(local.store)
    for batch in epoch(every_image(snapshot), 400):
        assert read(reader, batch) == read(plain, batch)
    traffic = reader.store.traffic
    assert all(plan.done[fault] for fault in FAULTS)
    assert traffic.num_retries
    assert traffic.num_requests == plan.gets("/shards/")
    assert traffic.fetched_bytes == sent()
    assert cache.used_bytes() <= cache.max_bytes


def test_fetched_bytes_stay_near_those_of_the_images_that_were_not_cached(root: Path, tmp_path: Path) -> None:
    requests = every_image(open_snapshot(root))
    whole = sum(size for (_, _, size), _ in requests)
    with directory_server(root) as url:
        snapshot = open_snapshot(url)
        reader = open_reader(Store.open(url), NodeCache(tmp_path / "cache", whole // 4), snapshot.shards)
        assert isinstance(reader, CachedReader)
        missed = 0
        for batch in epoch(requests, 800):
            wanted = {request for request, _ in batch}
            missed += sum(
                size for path, offset, size in wanted if reader.cache.image(path[-68:-4], offset, size) is None
            )
            read(reader, batch)
        assert missed < 0.9 * sum(sum(request[2] for request, _ in batch) for batch in epoch(requests, 800))
        assert missed <= reader.store.traffic.fetched_bytes <= 1.2 * missed


def test_processes_that_share_a_cache_download_each_shard_once(root: Path, tmp_path: Path) -> None:
    plan = Plan(0)
    spawn = multiprocessing.get_context("spawn")
    with directory_server(root) as upstream, proxy(upstream, plan) as (url, _), spawn.Pool(2) as pool:
        found = pool.starmap(read_all, [(url, str(tmp_path / "cache"), 1 << 30)] * 2)
    assert found[0] == found[1] == read_all(str(root), str(tmp_path / "unused"), 1 << 30)
    num_shards = open_snapshot(root).shards["split"].to_pylist().count("train")
    assert num_shards > 3
    assert plan.gets("/shards/") == num_shards


def test_a_killed_download_leaves_a_usable_cache(root: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with directory_server(root) as upstream:
        with proxy(upstream, Plan(1, kinds=("stall",), matching="/shards/"), stall_s=60) as (url, _):
            victim = multiprocessing.get_context("spawn").Process(target=read_all, args=(url, cache, 1 << 30))
            victim.start()
            wait_for(lambda: any(os.stat(path).st_size for path in Path(cache).glob("partial/*")))
            assert victim.pid
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
        assert list(Path(cache).glob("partial/*"))
        assert read_all(upstream, cache, 1 << 30) == read_all(str(root), cache, 1 << 30)
    assert not list(Path(cache).glob("partial/*"))


def test_kills_at_random_moments_cost_no_byte_that_had_arrived(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALL_S", 20.0)  # a busy machine must not look like a stall: requests are counted
    killed = kill_while_downloading(root, tmp_path, num_kills=5, seed=1)
    assert killed.num_kills == 5
    assert killed.num_fetched_again == 0
    assert killed.num_wrong == 0
    assert killed.num_in_vain <= killed.num_under_way


def test_attempts_are_counted_and_then_the_read_fails_by_name(root: Path) -> None:
    plan = Plan(1, kinds=("503",), matching="/shards/")
    path = tar_path(open_snapshot(root).shards["tar_sha256"][0].as_py())
    with directory_server(root) as upstream, proxy(upstream, plan) as (url, _):
        store = Store.open(url)
        with pytest.raises(StoreError, match=rf"cannot read {path} in {url}: 6 attempts .* 503"):
            store.read_range(path, 0, 100)
        assert plan.gets(path) == 6
        assert (store.traffic.num_requests, store.traffic.num_retries) == (6, 5)


def test_a_snapshot_is_not_taken_for_absent_because_the_server_is_busy(root: Path) -> None:
    with directory_server(root) as upstream:
        with proxy(upstream, Plan(1, kinds=("503",))) as (url, _), pytest.raises(StoreError, match="503"):
            open_snapshot(url)
        assert not Store.open(upstream).exists("snapshots/00000002.json")


def test_a_vanished_shard_is_named_with_the_way_to_keep_it(root: Path, tmp_path: Path) -> None:
    with directory_server(tmp_path) as url:
        sha256 = "ab" * 32
        store = Store.open(url)
        for reader in (ShardReader(store), CachedReader(store, NodeCache(tmp_path / "c", 99), {tar_path(sha256): 50})):
            with pytest.raises(NotFoundError, match=rf"shards/ab/{sha256}.tar .*`evenshard pin`"):
                reader.read_many([(tar_path(sha256), 0, 10)])


def test_a_tar_that_ends_early_is_an_integrity_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    with directory_server(tmp_path) as url:
        for offset in (5, 50):
            with pytest.raises(IntegrityError, match="cut short"):
                Store.open(url).read_range("a.tar", offset, 10)


def test_other_bytes_of_the_right_length_never_enter_the_cache(root: Path, tmp_path: Path) -> None:
    sha256 = "cd" * 32
    (tmp_path / "shards" / "cd").mkdir(parents=True)
    (tmp_path / tar_path(sha256)).write_bytes(b"other" * 10)
    cache = NodeCache(tmp_path / "cache", 1000)
    with directory_server(tmp_path) as url:
        reader = CachedReader(Store.open(url), cache, {tar_path(sha256): 50})
        with pytest.raises(IntegrityError, match=f"{sha256}.tar arrived as 50 bytes with SHA-256"):
            reader.read(tar_path(sha256), 0, 10)
    assert cache.used_bytes() == 0


def test_a_loader_on_a_remote_root_gives_the_batches_of_the_local_one(root: Path, tmp_path: Path) -> None:
    with directory_server(root) as upstream, proxy(upstream, Plan(0.1, seed=7)) as (url, _):
        options = {"cache_dir": tmp_path / "cache", "cache_bytes": 5000, "workers": 2, "decode": False}
        there = Loader(open_snapshot(url).manifest("balanced"), 16, **options)
        here = Loader(open_snapshot(root).manifest("balanced"), 16, decode=False)
        for (found, labels), (expected, expected_labels) in zip(there, here, strict=True):
            assert found == expected
            assert labels.tolist() == expected_labels.tolist()
    assert list((tmp_path / "cache").glob("files/*/*.img"))
