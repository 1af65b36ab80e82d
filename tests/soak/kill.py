"""SIGKILL, at random moments, to workers and drivers of builds; each is run to its end, and equals one left alone.

    python -m tests.soak.kill [--builds 10] [--worker-kills 300] [--driver-kills 30] [--images 1500] [--engine local]

Odd builds are first ones, even ones rebuild a copied ROOT after two images in five changed. Of every build one driver
is killed when nine in ten of its units are done, the others at random moments; workers are killed all along. Checked of
each: every file outside runs/, reports/ and staging/ equals the undisturbed build's, so no image is rejected that was
not rejected there; and the run after the kill at 90 % does at most a tenth of the units. One line of JSON a build;
the exit code is 1 if any law was broken. Only processes that this one started, and their children, are killed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from independent_checker import check_root, digests_of  # noqa: E402

NUM_CLASSES = 60
SHARD_SAMPLES = 10
PATIENCE_S = 900.0


def draw(folder: Path, number: int, version: int = 0) -> None:
    """A picture that takes a decoder some milliseconds; classes are long-tailed."""
    rng = np.random.default_rng((number, version))
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((640, 640), Image.Resampling.BILINEAR).save(stream, "JPEG", quality=80)
    path = folder / f"class-{int(NUM_CLASSES * rng.random() ** 3) if version == 0 else 0:02d}" / f"{number:05d}.jpg"
    if version:
        path = next(folder.glob(f"*/{number:05d}.jpg"))
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stream.getvalue())


def make_sources(scratch: Path, num_images: int) -> tuple[Path, Path]:
    """The source of first builds, and the same after changes. Both hold a few files that every build rejects."""
    first, second = scratch / "first", scratch / "second"
    for number in range(num_images):
        draw(first, number)
    for number in range(5):
        (first / "class-00" / f"damaged-{number}.jpg").write_bytes(b"\xff\xd8\xff" + bytes(500 + number))
    shutil.copytree(first, second)  # copy2 keeps times, not inodes: all of it is new to a rebuild
    for number in range(0, num_images, 5):
        draw(second, number, 1)
        draw(second, number + 1, 1)
    return first, second


@dataclass
class Driver:
    """One run of a build in a process of its own."""

    source: Path
    root: Path
    arguments: argparse.Namespace
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "jobs.build", str(self.source), str(self.root), "--json", "--quiet"]
        command += ["--shard-samples", str(SHARD_SAMPLES), "--address", self.arguments.engine, "--workers", "2"]
        command += ["--allow", "shrink"]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        """Those at work: Ray names them after their task; a pool's are Python running `serve`.

        Ray's own agents are named alike, and a raylet whose agent dies ends: that would be the loss of a node.
        """
        found: list[psutil.Process] = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if line.startswith(("ray::read", "ray::settle")) or "ingest.pool import serve" in line:
                    found.append(process)
        return found

    def kill(self) -> None:
        """The driver, by SIGKILL; then whatever it started and that outlives it for ten seconds."""
        family = self.family()
        self.process.kill()
        self.process.communicate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def result(self) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=PATIENCE_S)
        if self.process.returncode != 0:
            raise AssertionError(f"a build that was let run failed with {self.process.returncode}: {err[-3000:]}")
        return json.loads(out.splitlines()[-1])


def num_done(root: Path) -> int:
    return sum(1 for _ in root.glob("runs/units/*/*.json"))


@dataclass
class Reference:
    """A build that was left alone, and what a disturbed one starts from (None: nothing)."""

    source: Path
    root: Path
    parent: Path | None
    num_units: int = 0
    files: dict[str, str] = field(default_factory=dict[str, str])

    def build(self, arguments: argparse.Namespace) -> None:
        before = num_done(self.parent) if self.parent else 0
        if self.parent:
            shutil.copytree(self.parent, self.root)
        Driver(self.source, self.root, arguments).result()
        self.files = kept(self.root)
        self.num_units = num_done(self.root) - before


def kept(root: Path) -> dict[str, str]:
    return {path: digest for path, digest in digests_of(root).items() if not path.startswith("staging/")}


@dataclass
class Soak:
    """What was done to one build."""

    reference: Reference
    root: Path
    arguments: argparse.Namespace
    rng: random.Random
    worker_kills: int = 0
    driver_kills: int = 0
    redone_after_90: float = 1.0  # share of the units
    ended: list[str] = field(default_factory=list[str])  # drivers that ended before they were killed, and how

    def run(self, num_worker_kills: int, num_driver_kills: int) -> dict[str, Any]:
        started_s = time.monotonic()
        if self.reference.parent:
            shutil.copytree(self.reference.parent, self.root)
        base, units = num_done(self.root), self.reference.num_units
        marks = [*sorted(self.rng.uniform(0.02, 0.85) for _ in range(num_driver_kills - 1)), 0.9]
        per_run = num_worker_kills / num_driver_kills
        for number, mark in enumerate(marks):
            for _ in range(5):
                wanted = round(per_run * (number + 1)) - self.worker_kills
                driver = Driver(self.reference.source, self.root, self.arguments)
                self._disturb(driver, base + mark * units, wanted)
                if driver.process.poll() is None:
                    driver.kill()
                    self.driver_kills += 1
                    break
                _, told = driver.process.communicate()
                self.ended.append(f"exit code {driver.process.returncode} {told[-500:]}")
                if "could not start or reach" not in told:  # a busy machine: Ray waits 30 s for its own processes
                    break
        published = len(list((self.root / "snapshots").glob("*.json"))) if (self.root / "snapshots").exists() else 0
        self.redone_after_90 = (base + units - num_done(self.root)) / units
        result = Driver(self.reference.source, self.root, self.arguments).result()
        files, expected = kept(self.root), self.reference.files
        num_images = len(list(self.reference.source.rglob("*.jpg")))
        same = files == expected
        check_root(self.root)
        return {
            "units": units,
            "kind": "rebuild" if self.reference.parent else "first",
            "engine": self.arguments.engine,
            "worker_kills": self.worker_kills,
            "driver_kills": self.driver_kills,
            "identical": same,
            "differing": sorted(
                path for path in files.keys() | expected.keys() if files.get(path) != expected.get(path)
            )[:5],
            "published_before_the_end": published - (1 if self.reference.parent else 0),
            "redone_after_90": round(self.redone_after_90, 4),
            "reread_after_90": round(result["num_read"] / num_images, 4),
            "rejects": result["rejects"],
            "ended_before_their_kill": self.ended,
            "seconds": round(time.monotonic() - started_s, 1),
        }

    def _disturb(self, driver: Driver, until_done: float, num_kills: int) -> None:
        """Kill workers, until so many units are done and so many workers were killed, or the build ends."""
        killed, deadline = 0, time.monotonic() + PATIENCE_S
        while driver.process.poll() is None and time.monotonic() < deadline:
            done = num_done(self.root) >= until_done
            if done and killed >= num_kills:
                return
            workers = driver.workers()
            if workers and killed < num_kills:
                with contextlib.suppress(psutil.Error):
                    self.rng.choice(workers).send_signal(signal.SIGKILL)
                    killed += 1
                    self.worker_kills += 1
            if done:
                return  # the rest of the kills falls to the next run
            time.sleep(self.rng.uniform(0.05, 0.6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builds", type=int, default=10)
    parser.add_argument("--worker-kills", type=int, default=300)
    parser.add_argument("--driver-kills", type=int, default=30)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--engine", default="local", help="local: a private Ray; none: processes of this machine")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="evenshard-kill-", dir="/tmp"))
    # A private HOME and Ray directory, as in tests/conftest.py.
    (scratch / "home").mkdir()
    os.environ |= {"HOME": str(scratch / "home"), "RAY_TMPDIR": str(scratch), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    os.environ.pop("RAY_ADDRESS", None)
    try:
        sys.exit(0 if soak(scratch, arguments) else 1)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def soak(scratch: Path, arguments: argparse.Namespace) -> bool:
    first, second = make_sources(scratch, arguments.images)
    references = [
        Reference(first, scratch / "reference-first", None),
        Reference(second, scratch / "reference-second", scratch / "reference-first"),
    ]
    for reference in references:
        reference.build(arguments)
    print(json.dumps({"undisturbed": [reference.num_units for reference in references]}), flush=True)
    told: list[dict[str, Any]] = []
    for number in range(arguments.builds):
        rng = random.Random(f"{arguments.seed} {number}")
        root = scratch / f"root-{number}"
        case = Soak(references[number % 2], root, arguments, rng)
        told.append(
            case.run(arguments.worker_kills // arguments.builds, max(1, arguments.driver_kills // arguments.builds))
        )
        print(json.dumps(told[-1]), flush=True)
        shutil.rmtree(root)
    total = {name: sum(one[name] for one in told) for name in ("worker_kills", "driver_kills")}
    total |= {"builds": len(told), "identical": sum(one["identical"] for one in told)}
    total["most_redone_after_90"] = max(one["redone_after_90"] for one in told)
    print(json.dumps(total), flush=True)
    return total["identical"] == total["builds"] and total["most_redone_after_90"] <= 0.1


if __name__ == "__main__":
    main()
