"""What a rebuild costs next to the first build: nothing changed, 50 images changed, one image in a hundred changed.

    python benchmarks/ingest.py generate DIR --images 50000 --classes 2000
    python benchmarks/incremental.py DIR [--check decode] [--workers 2] [--scratch DIR] [--in-place]

DIR is copied into the scratch folder first, since images are changed, or changed itself. Each build runs in a process
of its own, on a warm page cache, and prints one line of JSON: images read, shards written, seconds, CPU seconds of all
its processes, the shares of the first build's.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def change(paths: Sequence[Path], count: int, seed: int) -> None:
    """Replace ``count`` images by others: a byte more at the end, which decoders ignore."""
    for path in random.Random(seed).sample(paths, count):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data + bytes([seed]))


def _adopt_orphans() -> None:
    """Ray's workers are grandchildren: their CPU time is told only to whoever waits for them."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _wait_for_all() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _child(arguments: argparse.Namespace) -> None:
    started_s = time.perf_counter()
    _adopt_orphans()
    import pipeline
    from pipeline.store import spare_pandas

    spare_pandas()  # as the command does
    summary = pipeline.build(
        arguments.directory, arguments.root, check=arguments.check, workers=arguments.workers, allow=("shrink",)
    )
    told: dict[str, object] = {
        "images": summary.num_images,
        "read": summary.num_read,
        "shards": summary.num_shards,
        "new_shards": summary.num_new_shards,
        "changed": summary.changed,
    }
    elapsed_s = time.perf_counter() - started_s
    _wait_for_all()
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    told |= {
        "wall_s": round(elapsed_s, 2),
        "cpu_s": round(sum(part.ru_utime + part.ru_stime for part in usage), 2),
    }
    print(json.dumps(told), flush=True)


def _run(what: str, source: Path, root: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, str(source), "--action", "build", "--root", str(root)]
    command += ["--check", arguments.check, "--workers", str(arguments.workers)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"what": what, **json.loads(out.splitlines()[-1])}


def measure(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="evenshard-incremental-") as scratch:
        root = Path(scratch, "root")
        source = arguments.directory if arguments.in_place else Path(scratch, "photos")
        if not arguments.in_place:
            shutil.copytree(arguments.directory, source)
        paths = sorted(source.rglob("*.jpg"))
        first: dict[str, float] = {}
        for what, count in (("first", 0), ("nothing", 0), ("nothing", 0), ("50", 50), ("1 %", len(paths) // 100)):
            change(paths, count, seed=count % 251 + 1)
            told = _run(f"{what} changed" if first else what, source, root, arguments)
            first = first or told
            told |= {f"{name}_share": round(told[name] / first[name], 4) for name in ("wall_s", "cpu_s", "read")}
            print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--check", default="decode")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", help="where the copy and the ROOT are made and removed again")
    parser.add_argument(
        "--in-place", action="store_true", help="change DIR itself: copying 500,000 files takes minutes"
    )
    parser.add_argument("--action", choices=["measure", "build"], default="measure", help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    measure(arguments) if arguments.action == "measure" else _child(arguments)


if __name__ == "__main__":
    main()
