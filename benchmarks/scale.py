"""How a build grows: images by the million that are on no disk, as a folder of classes, through the whole build.

    python benchmarks/scale.py [--images 500000 5000000] [--per-class 100] [--scratch DIR] [--rebuild]

The source is simulated where the operating system would be asked: `source_local` lists and reads files that are made up
(a small PNG whose last bytes are its number), in this process and in its workers. Everything behind is real: about 2 kB
of tar an image are written to the scratch folder. Each size runs in a process of its own and prints one line of JSON:
seconds, CPU seconds of all processes, microseconds an image, the largest memory (resident, MB) of the driver and of a
worker. ``--rebuild`` adds a second build, which finds nothing changed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES = "EVENSHARD_SCALE"  # images and images a class, for the workers


def _class_sizes() -> list[int]:
    """Zipf with exponent 1.2, at least one: as long-tailed as what this is made for."""
    import numpy as np

    num_images, per_class = map(int, os.environ[SIZES].split())
    num_classes = max(1, num_images // per_class)
    weight = (np.arange(num_classes) + 20.0) ** -1.2
    sizes = 1 + np.floor(weight / weight.sum() * (num_images - num_classes)).astype(int)
    sizes[0] += num_images - sizes.sum()
    return sizes.tolist()


def install() -> None:
    """Put the simulation where the operating system would be asked."""
    from PIL import Image

    from pipeline.ingest import source_files, source_local

    stream = io.BytesIO()
    Image.new("L", (8, 8), 90).save(stream, "PNG")
    picture = stream.getvalue()
    size = len(picture) + 12
    sizes = {f"class-{number:07d}": count for number, count in enumerate(_class_sizes())}

    def names(folder: str) -> list[str]:
        return [f"{number:08d}.png" for number in range(sizes[folder])]

    def scan(root: str, folder: str) -> Iterator[source_local.Entries]:
        if not folder:
            others = [source_local.Found(name, is_folder=True) for name in sizes]
            yield source_local.Entries([], array("q"), array("Q"), others)
            return
        count = sizes[folder]
        for start in range(0, count, source_local.CHUNK_FILES):
            numbers = range(start, min(start + source_local.CHUNK_FILES, count))
            files = [f"{number:08d}.png" for number in numbers]
            yield source_local.Entries(files, array("q", [size]) * len(files), array("Q", numbers), [])

    def scan_names(root: str, folder: str) -> Iterator[tuple[str, bool]]:
        yield from ((name, False) for name in names(folder)) if folder else ((name, True) for name in sizes)

    def read(self: Any, path: str, size: int) -> bytes:
        return picture + path[6:13].encode() + int(path[14:22]).to_bytes(5, "big")

    source_local.scan = source_files.scan = scan  # type: ignore[attr-defined]
    source_local.scan_names = source_files.scan_names = scan_names  # type: ignore[attr-defined]
    source_local.LocalFolder.read = read  # type: ignore[method-assign]


def _run_one(source: str, root: str) -> None:
    install()
    from pipeline.ingest.run import build
    from pipeline.store import spare_pandas

    spare_pandas()  # as the command does
    begun, stages = time.perf_counter(), {}

    def progress(stage: str, done: int, total: int) -> None:
        stages.setdefault(stage, [round(time.perf_counter() - begun, 1), _peak_mb(resource.RUSAGE_SELF)])

    summary = build(source, root, check="header", address="none", progress=progress)
    wall_s = time.perf_counter() - begun
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = [round(used.ru_utime + used.ru_stime, 1) for used in usage]
    told = {
        "images": summary.num_images,
        "read": summary.num_read,
        "shards": summary.num_shards,
        "wall_s": round(wall_s, 1),
        "cpu_s": {"driver": cpu_s[0], "workers": cpu_s[1]},
        "cpu_us_an_image": round(sum(cpu_s) / summary.num_images * 1e6, 1),
        "driver_peak_mb": _peak_mb(resource.RUSAGE_SELF),
        "worker_peak_mb": _peak_mb(resource.RUSAGE_CHILDREN),
        "stages_begin_s_and_peak_mb": stages,
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(told), flush=True)


def _peak_mb(who: int) -> int:
    return resource.getrusage(who).ru_maxrss >> 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[500_000, 5_000_000])
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--scratch", default=tempfile.gettempdir())
    parser.add_argument("--rebuild", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("SOURCE", "ROOT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        _run_one(*arguments.one)
        return
    folder = Path(tempfile.mkdtemp(prefix="evenshard-scale-", dir=arguments.scratch))
    try:
        (folder / "source").mkdir()
        # Workers are fresh interpreters: each imports this on its own when it starts.
        (folder / "sitecustomize.py").write_text(
            f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{_HOOK}"
        )
        for images in arguments.images:
            environment = os.environ | {SIZES: f"{images} {arguments.per_class}", "PYTHONPATH": str(folder)}
            command = [sys.executable, __file__, "--one", str(folder / "source"), str(folder / "root")]
            for _ in range(1 + arguments.rebuild):
                subprocess.run(command, env=environment, check=True)
            shutil.rmtree(folder / "root")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_HOOK = """
if sys.argv[:1] == ["-c"]:  # a worker; the driver installs it after its own start
    import scale
    scale.install()
"""

if __name__ == "__main__":
    main()
