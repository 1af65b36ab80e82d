"""A disk that is full, or may not be written: a clean failure that names the file, nothing published, and a rerun."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from commit_faults import contents

import pipeline
from pipeline.cli import cli, run
from pipeline.errors import EvenshardError
from pipeline.snapshot import snapshot_exists
from pipeline.store import Store
from pipeline.verify import verify

SMALLEST = 64 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which ``resize`` fills, empties and locks; skips where this user may not mount."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or mount("-t", "tmpfs", "-o", f"size={SMALLEST},mode=755", "tmpfs", str(place)):
        pytest.skip("mounting is refused")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode


def remount(place: Path, options: str) -> None:
    assert mount("-o", f"remount,{options}", str(place)) == 0


def call(*arguments: object) -> int:
    return run(cli, [str(argument) for argument in arguments])


def published(root: Path) -> dict[str, str]:
    """What a build wrote, but for the notes that hold clocks."""
    return {path: digest for path, digest in contents(root).items() if not path.startswith("runs/")}


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    pipeline.build(tiny_images, root, shard_samples=8)
    return published(root)


def test_builds_on_a_full_disk_publish_nothing_until_there_is_room(
    disk: Path, tiny_images: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    root = disk / "root"
    failures: list[str] = []
    for size in range(SMALLEST, 4 << 20, 128 << 10):
        remount(disk, f"size={size}")
        try:
            pipeline.build(tiny_images, root, shard_samples=8)
            break
        except EvenshardError as error:
            failures.append(str(error))
            assert not snapshot_exists(Store(str(root)))
    assert len(failures) >= 2
    for text in failures:
        assert "No space left on device; free some space" in text
        assert any(f"{name}" in text for name in ("shards/", "index/", "staging", "runs/", "tables/", "manifests/"))
    assert published(root) == undisturbed
    assert verify(str(root)).sound


def test_commands_on_a_full_disk_say_so_and_change_nothing(
    disk: Path, tiny_images: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = disk / "root"
    remount(disk, "size=8m")
    pipeline.build(tiny_images, root, shard_samples=8)
    pipeline.build(tiny_images, root, manifests={"flat": "balanced:per_class=3"}, shard_samples=8)
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    before = published(root)
    calls = {
        "report": ("report", root),
        "pin": ("pin", root, "paper"),
        "manifest": ("manifest", root, "other", "--policy", "balanced:per_class=4"),
    }
    for name, arguments in calls.items():
        assert call(*arguments) == 1, name
        assert "No space left on device" in capsys.readouterr().err
    assert published(root) == before
    assert call("gc", root, "--keep", "1", "--delete", "--grace", "0", "--quiet") in (0, 1)  # it frees, or says so
    os.unlink(disk / "filler")
    for arguments in calls.values():
        assert call(*arguments) == 0
    assert call("gc", root, "--keep", "1", "--delete", "--grace", "0", "--quiet") == 0
    assert verify(str(root)).sound


def test_a_read_only_disk_is_refused_and_read(
    disk: Path, tiny_images: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = disk / "root"
    remount(disk, "size=8m")
    pipeline.build(tiny_images, root, shard_samples=8)
    before = contents(root)
    remount(disk, "ro")
    for arguments in (
        ("build", tiny_images, root, "--quiet"),
        ("report", root),
        ("pin", root, "paper"),
        ("gc", root, "--keep", "1", "--delete", "--quiet"),
        ("manifest", root, "other", "--policy", "balanced:per_class=4"),
    ):
        assert call(*arguments) == 1, arguments
        told = capsys.readouterr().err
        assert "Read-only file system; mount the file system writable" in told
        assert str(root) in told
    for arguments in (("stats", root), ("history", root), ("verify", root, "--quiet"), ("pin", root)):
        assert call(*arguments) == 0, arguments
    assert contents(root) == before
    remount(disk, "rw")
    for arguments in (("build", tiny_images, root, "--quiet", "--shard-samples", "8"), ("pin", root, "paper")):
        assert call(*arguments) == 0, arguments
