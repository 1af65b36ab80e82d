"""Done when it is the same: builds from S3 to S3 and from HTTP equal the local build byte for byte, through faults."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import TINY_COUNTS
from containers import Sample, parquet_of, put, samples_of, tar_of
from fault_proxy import FAULTS, FileHandler, Plan, directory_server, proxy, serving
from independent_checker import check_root, digests_of
from real_servers import needs_nginx, nginx, s3
from serial_engine import serial_engine

import pipeline
from pipeline.errors import SourceError
from pipeline.ingest import source_files, source_streams, source_trouble
from pipeline.ingest.source_files import open_place
from pipeline.ingest.source_streams import Listed, open_listed
from pipeline.store import remote

__all__ = ["serial_engine"]

pytestmark = pytest.mark.usefixtures("serial_engine")

KINDS = ("folder", "table", "tar", "parquet")
BLOCK_BYTES = 10_000
STALL_S = 1.5
KINDS_OF_FAULT = ("503", "cut") * 4 + ("stall",)  # each stall costs as much as all the others


def faults(seed: int, share: float = 0.25) -> Plan:
    return Plan(share, seed=seed, in_a_row=4, kinds=KINDS_OF_FAULT)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seconds become hundredths, blocks small, and no connection outlives its test."""
    for module, pauses in ((remote, "PAUSES"), (source_trouble, "RETRY_PAUSES_S")):
        monkeypatch.setattr(module, pauses, (0.01, 0.02, 0.03, 0.04, 0.05))
    for module in (remote, source_files):
        monkeypatch.setattr(module, "STALL_S", STALL_S)
    monkeypatch.setattr(source_streams, "BLOCK_BYTES", BLOCK_BYTES)
    forget_connections()
    yield
    forget_connections()


def forget_connections() -> None:
    source_files.filesystem.cache_clear()
    for protocol in ("s3", "http"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


@pytest.fixture(scope="module")
def samples(tiny_images: Path) -> list[Sample]:
    return samples_of(tiny_images)[::2]


@pytest.fixture(scope="module")
def sources(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with the same images as four kinds of source, trouble among them."""
    top = tmp_path_factory.mktemp("sources")
    data = samples[0][2]
    mixed: list[Sample] = [*samples, ("apple/é %.jpg", "apple", data + b"\0"), ("apple/bad.jpg", "apple", b"no image")]
    put(top / "folder", {name: data for name, _, data in mixed})
    put(top / "table", {f"img/{name}": data for name, _, data in mixed})
    text = io.StringIO()
    rows = [(f"img/{name}", label) for name, label, _ in mixed]
    csv.writer(text).writerows([("path", "label"), *rows, ("img/missing.jpg", "apple")])
    put(top / "table", {"photos.csv": text.getvalue().encode()})
    put(top / "tar", {f"a/{part}.tar": tar_of(mixed[part::3]) for part in range(3)})
    put(top / "tar", {"cut.tar": tar_of(mixed[:4])[:9_000], "README.md": b"x"})
    names = sorted(TINY_COUNTS)
    put(top / "parquet", {f"data/part {part}.parquet": parquet_of(mixed[part::2], names) for part in range(2)})
    return top


@pytest.fixture(scope="module")
def bucket(sources: Path) -> Iterator[str]:
    """A server that has the sources at s3://bucket/root."""
    with s3(sources) as url:
        yield url


def source_of(place: str, kind: str) -> str:
    return f"{place}/{kind}/photos.csv" if kind == "table" else f"{place}/{kind}"


def build(source: str, root: str | Path) -> pipeline.BuildSummary:
    return pipeline.build(source, root, shard_samples=20, manifests={"sqrt": "power:alpha=0.5"})


@pytest.fixture(scope="module")
def expected(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The files of a local build, by kind of source; built when asked for, once."""
    roots: dict[str, Path] = {}

    def local(kind: str) -> dict[str, str]:
        if kind not in roots:
            roots[kind] = tmp_path_factory.mktemp("local") / "root"
            build(source_of(str(sources), kind), roots[kind])
            rows, rejects = check_root(roots[kind])
            assert len(rows) >= 31
            assert rejects
        return digests_of(roots[kind])

    return local


def objects_of(url: str) -> dict[str, str]:
    """SHA-256 of every object outside runs/ and reports/, by path: what `digests_of` says of a directory."""
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    root = url.removeprefix("s3://")
    found = {path[len(root) + 1 :]: hashlib.sha256(files.cat_file(path)).hexdigest() for path in files.find(root)}
    return {path: digest for path, digest in sorted(found.items()) if not path.startswith(("runs/", "reports/"))}


@pytest.mark.parametrize("kind", KINDS)
def test_s3_to_s3_through_faults_equals_the_local_build(
    bucket: str, expected: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = faults(3, share=0.1)  # of several requests for one read, any may break, and six reads in a row are the end
    with proxy(bucket, plan, stall_s=2 * STALL_S) as (url, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        forget_connections()
        summary = build(source_of("s3://bucket/root", kind), f"s3://bucket/out-{kind}")
        again = build(source_of("s3://bucket/root", kind), f"s3://bucket/out-{kind}")
    assert all(plan.done[fault] for fault in FAULTS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket)
    assert objects_of(f"s3://bucket/out-{kind}") == expected(kind)
    assert summary.num_images >= 31
    assert (again.changed, again.num_read) == (False, 0)


@needs_nginx
@pytest.mark.parametrize("kind", KINDS)
def test_http_to_local_through_faults_equals_the_local_build(
    sources: Path, expected: Any, kind: str, tmp_path: Path
) -> None:
    plan = faults(4)
    with nginx(sources) as server, proxy(server.url, plan, stall_s=2 * STALL_S) as (url, _):
        build(source_of(url, kind), tmp_path / "root")
        again = build(source_of(url, kind), tmp_path / "root")
    assert plan.done["503"] + plan.done["cut"] > 2  # of so few requests, not every kind of fault
    assert digests_of(tmp_path / "root") == expected(kind)
    assert (again.changed, again.num_read) == (False, 0)


def test_faults_that_do_not_end_stop_the_build_and_name_the_file(sources: Path, tmp_path: Path) -> None:
    always = Plan(1.0, matching=".tar", kinds=("503",))
    with directory_server(sources) as upstream, proxy(upstream, always) as (url, _):
        told = refusal(lambda: build(f"{url}/tar/cut.tar", tmp_path / "root"))
    assert "cut.tar cannot be opened: the server answers 503" in told
    assert not list((tmp_path / "root").glob("snapshots/*"))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(SourceError) as caught:
        call()
    return str(caught.value)


# ---- One file, by ranges


LARGE = os.urandom(12 * BLOCK_BYTES + 77)


def listed(url: str, name: str) -> Any:
    place = open_place(url)
    found = source_files.look_at(place, name)
    return open_listed(place, Listed(name, found.size, found.fingerprint))


def test_a_remote_file_is_read_and_sought_like_a_local_one(tmp_path: Path) -> None:
    put(tmp_path, {"x/f.bin": LARGE})
    plan = Plan(0.35, seed=5, in_a_row=4)
    with (
        directory_server(tmp_path) as upstream,
        proxy(upstream, plan, stall_s=2 * STALL_S) as (url, _),
        listed(f"{url}/x", "f.bin") as file,
    ):
        assert b"".join(iter(partial(file.read, 3_333), b"")) == LARGE
        for place in (5, 110_000, 40_000, 41_000, len(LARGE) - 3, len(LARGE)):
            assert file.seek(place) == place
            assert file.read(30_001) == LARGE[place : place + 30_001]
        assert file.seek(-10, os.SEEK_END) == len(LARGE) - 10
        assert file.read() == LARGE[-10:]
    assert all(plan.done[fault] for fault in FAULTS)


def test_a_front_to_back_reading_asks_for_each_block_once(tmp_path: Path) -> None:
    put(tmp_path, {"f.bin": LARGE})
    plan = Plan(0.0)
    with directory_server(tmp_path) as upstream, proxy(upstream, plan) as (url, sent), listed(url, "f.bin") as file:
        assert file.read() == LARGE
    blocks = -(-len(LARGE) // BLOCK_BYTES)
    assert plan.gets("f.bin") == blocks + 1  # and one byte, to see that the server knows ranges
    assert sum(sent.values()) == len(LARGE) + 1


def test_a_server_without_ranges_sends_the_file_once(tmp_path: Path) -> None:
    class Plain(FileHandler):
        def answer(self, *, with_body: bool) -> None:
            del self.headers["Range"]
            super().answer(with_body=with_body)

    put(tmp_path, {"f.bin": LARGE})
    plan = Plan(0.0)
    with (
        serving(Plain, root=tmp_path) as upstream,
        proxy(upstream, plan) as (url, _),
        listed(url, "f.bin") as file,
    ):
        assert file.read() == LARGE
    assert plan.gets("f.bin") == 2  # the question, and the file


def test_a_file_that_changes_is_not_mixed(tmp_path: Path) -> None:
    put(tmp_path, {"f.bin": LARGE})

    def read(url: str) -> None:
        with listed(url, "f.bin") as file:
            file.read(10)
            put(tmp_path, {"f.bin": LARGE + b"x"})

    with directory_server(tmp_path) as url:
        assert "changed while it was read" in refusal(lambda: read(url))


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    class Away(FileHandler):
        def answer(self, *, with_body: bool) -> None:
            if not self.path.startswith("/away") or not with_body:
                super().answer(with_body=with_body)
                return
            self.send_response(302)
            self.send_header("Location", "/f.bin")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def read(url: str) -> None:
        with listed(url, "away.bin") as file:
            file.read(10)

    put(tmp_path, {"f.bin": LARGE[:100], "away.bin": LARGE[:100]})
    with serving(Away, root=tmp_path) as url:
        assert "away.bin cannot be read at byte 0" in refusal(lambda: read(url))


def test_a_remote_file_is_held_in_a_few_blocks(tmp_path: Path) -> None:
    put(tmp_path, {"f.bin": LARGE})
    with directory_server(tmp_path) as url, listed(url, "f.bin") as file:
        file.read()
        assert 0 < len(file.raw._blocks) <= source_streams.NUM_BLOCKS
