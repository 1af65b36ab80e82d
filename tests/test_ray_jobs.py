"""The jobs where they are to run: submitted to a private head of Ray, with its token; and what is uploaded for it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_head import TOP, Head, head

from pipeline.snapshot import open_snapshot

UPLOAD_BYTES = 2_000_000
SECRET = "kJ8-planted-in-the-environment"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head(AWS_SECRET_ACCESS_KEY=SECRET) as started:
        yield started


def summary(output: str) -> dict[str, Any]:
    """The line of the night, out of the log of a job."""
    # Of a job that failed, the client shows the end of its log once more.
    return json.loads([line for line in output.splitlines() if line.startswith('{"outcome"')][-1])


def test_a_submitted_night_succeeds_twice_then_fails_and_is_told(
    cluster: Head, tiny_images: Path, tmp_path: Path
) -> None:
    source, root = Path(shutil.copytree(tiny_images, tmp_path / "source")), tmp_path / "root"
    words = ("python", "-m", "jobs.nightly", str(source), str(root))

    first = cluster.submit(*words)
    assert first.returncode == 0, first.stdout + first.stderr
    assert summary(first.stdout)["read"]["images"] == 61
    nights = [json.loads(path.read_text()) for path in sorted((root / "runs/nightly").iterdir())]
    assert nights[0]["job"].startswith("raysubmit_")

    second = cluster.submit(*words)
    assert second.returncode == 0, second.stdout + second.stderr
    told = summary(second.stdout)
    assert (told["outcome"], told["changed"], told["read"]["images"]) == ("done", False, 0)

    shutil.rmtree(source / "bread")
    third = cluster.submit(*words)
    assert third.returncode == 1
    assert summary(third.stdout)["outcome"] == "failed"
    assert "--allow class-vanished" in third.stdout

    jobs = {job["submission_id"]: job["status"] for job in cluster.get("/api/jobs/")}
    assert sorted(jobs.values()) == ["FAILED", "SUCCEEDED", "SUCCEEDED"]
    assert nights[0]["job"] in jobs
    assert open_snapshot(str(root)).number == 1
    uploaded = {path.relative_to(cluster.folder).as_posix(): path.stat().st_size for path in packages(cluster)}
    assert any(name.endswith("/jobs/nightly.py") for name in uploaded)
    assert [name for name in uploaded if "/tests/" in name or "/.venv/" in name or "/benchmarks/" in name] == []
    assert sum(uploaded.values()) < UPLOAD_BYTES
    assert SECRET not in json.dumps(cluster.get("/api/jobs/"))
    assert leaking(root) == leaking(cluster.folder / "ray") == []  # Ray's own logs, too
    assert SECRET not in first.stdout + third.stdout


def packages(cluster: Head) -> list[Path]:
    """The files of every uploaded working directory."""
    found = cluster.folder.glob("ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/**/*")
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def leaking(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_what_is_uploaded_is_small_and_holds_no_tests() -> None:
    """By git's reading of the file, which has the rules that Ray follows. Ray leaves out .git and .venv, too."""
    tracked = git("ls-files", "-z", "--cached")
    left_out = set(git("ls-files", "-z", "--cached", "--ignored", "--exclude-from=.rayignore"))
    uploaded = [name for name in tracked if name not in left_out]
    assert {"jobs/nightly.py", "pipeline/nightly/run.py", "pipeline/report/page.html"} <= set(uploaded)
    assert [name for name in uploaded if name.startswith((".venv", "tests/", "benchmarks/", "docs/"))] == []
    assert sum((TOP / name).stat().st_size for name in uploaded) < UPLOAD_BYTES
    ignored = set((TOP / ".rayignore").read_text().split()) | set((TOP / ".gitignore").read_text().split())
    assert {".venv/", ".env", "evenshard-demo/"} <= ignored


def git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=TOP, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]
