"""A disk that is full, or may not be written: a clean failure that names the file, nothing published, and a rerun."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
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

TOP = Path(__file__).parents[1]
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


# ---- Another user's directory

_CAPABILITIES = (1, 2, 3)  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER: what makes root a user whom no permission binds
_PR_CAPBSET_DROP = 24
_SOMEBODY = 65534


def give_up_capabilities() -> None:
    """In a child, before it runs a program: it is bound by permissions then, and still owns its interpreter."""
    libc = ctypes.CDLL(None, use_errno=True)
    for number in _CAPABILITIES:
        if libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


PROGRAM = """
import contextlib, io, json, sys
from pipeline.cli import cli, run
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
        status = run(cli, arguments)
    print(json.dumps([status, told.getvalue()]))
"""


def call_unprivileged(*commands: tuple[object, ...]) -> list[tuple[int, str]]:
    """Exit code and standard error of each, run one after the other in one process that permissions bind."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([[str(word) for word in words] for words in commands]),
        preexec_fn=give_up_capabilities,
        cwd=TOP,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def bound_by_permissions(tmp_path: Path) -> None:
    """Skips where root cannot become a user who may not do everything."""
    probe = tmp_path / "probe"
    probe.mkdir(mode=0o555)
    script = "import sys; open(sys.argv[1], 'x')"
    try:
        os.chown(probe, _SOMEBODY, _SOMEBODY)
        done = subprocess.run(
            [sys.executable, "-c", script, str(probe / "x")],
            preexec_fn=give_up_capabilities,
            capture_output=True,
            text=True,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):  # not root, or a sandbox
        pytest.skip("only root can give up its capabilities")
    assert "PermissionError" in done.stderr


def give_away(folder: Path, mode: int) -> None:
    """To somebody else, who lets others look as ``mode`` says."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, _SOMEBODY, _SOMEBODY, follow_symlinks=False)
        path.chmod(mode if path.is_dir() else mode & 0o644)


@pytest.mark.usefixtures("bound_by_permissions", "local_ray")
def test_the_directory_of_somebody_else_is_refused_and_read(tiny_images: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    pipeline.build(tiny_images, root, shard_samples=8)
    give_away(root, 0o755)
    before = contents(root)
    writing = (
        ("build", tiny_images, root, "--quiet", "--address", "none"),
        ("report", root),
        ("pin", root, "paper"),
        ("gc", root, "--keep", "1", "--delete", "--quiet"),
        ("manifest", root, "other", "--policy", "balanced:per_class=4"),
    )
    reading = (("stats", root), ("history", root), ("verify", root, "--quiet"), ("pin", root))
    answers = call_unprivileged(*writing, *reading)
    assert [status for status, _ in answers] == [1] * len(writing) + [0] * len(reading), answers
    for _, told in answers[: len(writing)]:
        assert "Permission denied; give this user the permission" in told
        assert str(root) in told
    assert contents(root) == before
    give_away(root, 0o700)
    for status, told in call_unprivileged(*reading):
        assert status == 1
        assert "Permission denied" in told


@pytest.mark.usefixtures("bound_by_permissions")
def test_images_of_somebody_else_are_rejects_by_name(tiny_images: Path, tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    shutil.copytree(tiny_images, source)
    hidden = sorted((source / "apple").iterdir())[:3]
    for path in hidden:
        os.chown(path, _SOMEBODY, _SOMEBODY)
        path.chmod(0o600)
    command = ("build", source, root, "--quiet", "--address", "none")
    assert call_unprivileged(command) == [(0, "")]
    rejects = pipeline.open_snapshot(root).rejects.to_pylist()
    assert [(row["path"], row["reason"]) for row in rejects] == [
        (f"apple/{path.name}", "unreadable") for path in hidden
    ]
    assert all("Permission denied" in row["detail"] for row in rejects)
    for path in hidden:
        path.chmod(0o644)
    assert call_unprivileged(command) == [(0, "")]  # what could not be read, is tried again
    assert pipeline.open_snapshot(root).rejects.num_rows == 0
