from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.images import ImageRejected
from pipeline.ingest import source_local, source_reader
from pipeline.ingest.source_files import open_place
from pipeline.ingest.source_local import LocalFolder
from pipeline.ingest.source_reader import SourceReader
from pipeline.schema import Reason

MAX_BYTES = 100_000


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """300 files of many sizes, below ``tmp_path/source``."""
    rng = np.random.default_rng(3)
    made = {f"{n % 7}/é {n}.jpg": rng.bytes(int(rng.integers(1, 5000))) for n in range(300)}
    for path, data in made.items():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_bytes(data)
    return made


def reader(folder: Path) -> SourceReader:
    return SourceReader(open_place(str(folder)), MAX_BYTES)


def read_all(one: SourceReader, files: dict[str, bytes]) -> list[bytes | ImageRejected]:
    return list(one.read_all(list(files), [len(data) for data in files.values()]))


Waits = Callable[[], int]


def never() -> int:
    return 0


def always() -> Waits:
    """A count that grows by more than any part has files, each time it is asked for."""
    numbers = iter(range(0, 1 << 40, 1000))
    return lambda: next(numbers)


def now_and_then() -> Waits:
    numbers = iter(np.cumsum(np.random.default_rng(1).choice([0, 1000], 10_000)).tolist())
    return lambda: next(numbers)


@pytest.fixture(params=[never, always(), now_and_then()], ids=["never", "always", "now and then"])
def waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How often files seem to be waited for."""
    monkeypatch.setattr(source_reader, "_num_waits", request.param)


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("part_files", [1, 7, 64, 1000])
def test_every_file_comes_once_in_the_order_asked_for(
    tmp_path: Path, files: dict[str, bytes], part_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_reader, "PART_FILES", part_files)
    assert read_all(reader(tmp_path / "source"), files) == list(files.values())


@pytest.mark.usefixtures("waits")
def test_what_cannot_be_read_is_told_in_its_place(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = tmp_path / "source"
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "out.jpg").symlink_to(tmp_path / "secret")
    (folder / "link").symlink_to(tmp_path)
    (folder / "in.jpg").symlink_to(folder / "0/é 0.jpg")
    (folder / "near.jpg").symlink_to("0/é 0.jpg")
    os.mkfifo(folder / "pipe")
    (folder / "huge").write_bytes(bytes(MAX_BYTES + 1))
    first = files["0/é 0.jpg"]
    odd = {
        "gone.jpg": Reason.GONE,
        "out.jpg": Reason.OUTSIDE_ROOT,
        "link/secret": Reason.OUTSIDE_ROOT,
        "../secret": Reason.OUTSIDE_ROOT,
        "pipe": Reason.UNREADABLE,
        "0": Reason.UNREADABLE,
        "huge": Reason.TOO_LARGE,
        "a\0b": Reason.GONE,
        "in.jpg": first,
        "near.jpg": first,
        "é\udcff.jpg": Reason.GONE,
    }
    paths = [path for pair in zip(files, list(odd) * 28, strict=False) for path in pair]
    found = list(reader(folder).read_all(paths, [6] * len(paths)))
    expected = [odd.get(path, files.get(path)) for path in paths]
    assert [item.reason if isinstance(item, ImageRejected) else item for item in found] == expected


@pytest.mark.usefixtures("waits")
def test_a_file_that_has_grown_or_shrunk_comes_as_it_is(tmp_path: Path, files: dict[str, bytes]) -> None:
    paths = list(files)
    sizes = [max(0, len(files[path]) + step) for path, step in zip(paths, [-1, 1, 0, -5000] * 75, strict=True)]
    assert list(reader(tmp_path / "source").read_all(paths, sizes)) == list(files.values())


def test_without_the_kernel_s_help_everything_goes_the_long_way(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_local, "_SYS_OPENAT2", 10_000)  # there is no such call: ENOSYS
    with LocalFolder(str(tmp_path / "source")) as folder:
        assert folder.read("0/é 0.jpg", len(files["0/é 0.jpg"])) is None
    assert read_all(reader(tmp_path / "source"), files) == list(files.values())
    monkeypatch.setattr(source_local, "_system_call", lambda: None)  # nor any other system than Linux
    assert read_all(reader(tmp_path / "source"), files) == list(files.values())


def test_the_kernel_reads_what_lies_inside_and_nothing_else(tmp_path: Path, files: dict[str, bytes]) -> None:
    """The short way must not be what `test_what_cannot_be_read` passes by, for it never says no wrongly."""
    folder = tmp_path / "source"
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "out.jpg").symlink_to("../secret")
    (folder / "a").write_bytes(b"secret")  # what "a\0b" must not be taken for
    with LocalFolder(str(folder)) as local:
        if local.read("0/é 0.jpg", len(files["0/é 0.jpg"])) is None:
            pytest.skip("this kernel has no openat2")
        assert all(local.read(path, len(data)) == data for path, data in files.items())
        refused = ("out.jpg", "../secret", str(tmp_path / "secret"), "0/../../secret", "a\0b")
        assert [local.read(path, 6) for path in refused] == [None] * len(refused)
        assert local.read("0/é 0.jpg", 5) is None


def test_a_file_beyond_the_limit_is_refused_whatever_was_listed(tmp_path: Path) -> None:
    (tmp_path / "huge").write_bytes(bytes(MAX_BYTES + 1))
    (found,) = reader(tmp_path).read_all(["huge"], [MAX_BYTES + 1])
    assert isinstance(found, ImageRejected)
    assert found.reason == Reason.TOO_LARGE


def test_threads_read_what_is_waited_for_and_only_that(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    really = LocalFolder.read

    def read(self: LocalFolder, path: str, size: int) -> bytes | None:
        readers.append(threading.current_thread().name.partition("_")[0])
        return really(self, path, size)

    monkeypatch.setattr(LocalFolder, "read", read)
    monkeypatch.setattr(source_reader, "_num_waits", never)
    read_all(reader(tmp_path / "source"), files)
    assert set(readers) == {"MainThread"}
    readers.clear()
    monkeypatch.setattr(source_reader, "_num_waits", always())
    read_all(reader(tmp_path / "source"), files)
    part = source_reader.PART_FILES
    assert readers.count("MainThread") == part  # the first, by which it came to know
    assert readers.count("evenshard-read") == len(files) - part


def test_no_descriptor_is_left_open(tmp_path: Path, files: dict[str, bytes]) -> None:
    before = os.listdir("/proc/self/fd")
    read_all(reader(tmp_path / "source"), files)
    reading = reader(tmp_path / "source").read_all(list(files), [1] * len(files))
    assert next(reading) == next(iter(files.values()))
    reading.close()  # type: ignore[attr-defined]
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def test_files_of_a_server_are_waited_for_together(
    memory: fsspec.AbstractFileSystem, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe({f"/photos/{path}": data for path, data in files.items()})
    meeting = threading.Barrier(8)  # broken, after ten seconds, unless eight ask at once
    really = SourceReader.read
    numbers = iter(range(10_000))

    def read(self: SourceReader, path: str) -> bytes:
        if next(numbers) < 8:
            meeting.wait(10)
        return really(self, path)

    monkeypatch.setattr(SourceReader, "read", read)
    assert read_all(SourceReader(open_place("memory://photos"), MAX_BYTES), files) == list(files.values())


def test_only_so_many_bytes_are_read_ahead(
    memory: fsspec.AbstractFileSystem, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe({f"/photos/{path}": data for path, data in files.items()})
    monkeypatch.setattr(source_reader, "AHEAD_BYTES", 50_000)
    asked: list[int] = []
    really = SourceReader.read

    def read(self: SourceReader, path: str) -> bytes:
        data = really(self, path)
        asked.append(len(data))
        return data

    monkeypatch.setattr(SourceReader, "read", read)
    taken = 0
    one = SourceReader(open_place("memory://photos"), MAX_BYTES)
    for data in one.read_all(list(files), [len(data) for data in files.values()]):
        assert isinstance(data, bytes)
        assert sum(asked) - taken <= 50_000 + 10 * 5000  # and what one thread takes at a time
        taken += len(data)
    assert taken == sum(asked) == sum(map(len, files.values()))


def test_an_error_of_the_reader_itself_is_raised(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SourceReader, path: str) -> bytes:
        raise MemoryError(errno.ENOMEM)

    monkeypatch.setattr(SourceReader, "read", fail)
    monkeypatch.setattr(source_local, "_system_call", lambda: None)
    for waits in (never, always()):
        monkeypatch.setattr(source_reader, "_num_waits", waits)
        with pytest.raises(MemoryError):
            read_all(reader(tmp_path / "source"), files)
