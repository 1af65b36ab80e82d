"""Builds next to a plain copy of the same files into tars: images a second, CPU an image, peak memory of the driver.

    python benchmarks/ingest.py generate DIR --images 200000 --classes 1000
    python benchmarks/ingest.py measure DIR [--check header] [--workers 2]

``generate`` draws distinct 64x64 JPEGs with a long tail, the same on every machine. ``measure`` prints one line of JSON
for each of: a plain tarfile copy, a build; each in a process of its own, on a warm page cache (the copy runs first).
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


def class_counts(num_images: int, num_classes: int) -> np.ndarray:
    """Zipf-Mandelbrot with exponent 1.8, at least one image a class, summing to num_images."""
    weight = (np.arange(num_classes) + 10.0) ** -1.8
    counts = 1 + np.floor(weight / weight.sum() * (num_images - num_classes)).astype(int)
    counts[0] += num_images - counts.sum()
    return counts


def _draw(job: tuple[str, int, int]) -> None:
    """Write the images of one class: coarse noise, enlarged, so that JPEG has something to keep."""
    folder, class_id, count = job
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng((7, class_id))
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        with open(f"{folder}/{number:06d}.jpg", "wb") as file:
            file.write(stream.getvalue())


def generate(directory: Path, num_images: int, num_classes: int) -> None:
    counts = class_counts(num_images, num_classes)
    jobs = [(str(directory / f"class-{c:05d}"), c, int(n)) for c, n in enumerate(counts)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        for _ in pool.imap_unordered(_draw, jobs, chunksize=4):
            pass


def copy_to_tars(directory: Path, dest: str) -> dict[str, object]:
    """The floor: every file read once and written into tars of 2,000 by the standard library."""
    files = sorted(path for path in directory.rglob("*.jpg"))
    for start in range(0, len(files), 2000):
        with tarfile.open(f"{dest}/{start:08d}.tar", "w:", format=tarfile.USTAR_FORMAT) as tar:
            for number, path in enumerate(files[start : start + 2000], start):
                info = tarfile.TarInfo(f"{number:08d}.jpg")
                data = path.read_bytes()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return {"what": "plain copy", "images": len(files)}


def build(directory: Path, dest: str, check: str, workers: int) -> dict[str, object]:
    import pipeline

    summary = pipeline.build(directory, f"{dest}/root", check=check, workers=workers)
    return {"what": f"build, check={check}", "images": summary.num_images, "units": summary.num_units}


def _child(what: str, arguments: argparse.Namespace) -> None:
    started_s, directory = time.perf_counter(), Path(arguments.directory)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as dest:
        result = (
            copy_to_tars(directory, dest)
            if what == "copy"
            else build(directory, dest, arguments.check, arguments.workers)
        )
        elapsed_s = time.perf_counter() - started_s
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    images = int(str(result["images"]))
    cpu_s = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    result |= {
        "wall_s": round(elapsed_s, 2),
        "images_per_s": round(images / elapsed_s),
        "cpu_us_per_image": round(cpu_s / images * 1e6, 1),
        "driver_peak_mb": round(own.ru_maxrss / 1024, 1),
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["generate", "measure", "copy", "build"])
    parser.add_argument("directory")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--check", default="decode")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", help="where outputs are written and removed again")
    arguments = parser.parse_args()
    if arguments.action == "generate":
        generate(Path(arguments.directory), arguments.images, arguments.classes)
    elif arguments.action == "measure":
        for what in ("copy", "build"):
            subprocess.run([sys.executable, __file__, what, *sys.argv[2:]], check=True)
    else:
        _child(arguments.action, arguments)


if __name__ == "__main__":
    main()
