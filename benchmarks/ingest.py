"""Builds next to what else writes the same files: CPU an image, and peak memory of all processes.

    python benchmarks/ingest.py generate DIR --images 500000 --classes 5000
    python benchmarks/ingest.py measure DIR [--only floor build-header ...] [--scratch DIR]

``generate`` draws distinct 64x64 JPEGs with a long tail, the same on every machine. ``measure`` runs, one after the
other, each in a process of its own that adopts and waits for all its descendants, so that their processor time counts:

    floor           read, hash and write the same bytes; no tar, no index
    floor-two       the same by two processes at once, as builds are measured: two busy cores are slower than one
    ustar           the same as tars, by the project's own bare writer
    tarfile         the same as tars, by Python's
    decode          Pillow's full decode of every image, and nothing else
    ray             start a local Ray, run one empty task, stop it
    shardwriter     webdataset's ShardWriter (in an environment made as benchmarks/requirements.txt says)
    mdswriter       MosaicML's MDSWriter (likewise)
    build-header    the whole build, with --check header, on two processes of this machine
    build-decode    the same with a full decode
    build-header-ray    as the first, on a local Ray, its start and stop included

A first, unmeasured pass over the files warms the page cache. It prints one line of JSON each, and a table in the end.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

PER_FILE = 2000


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


# ---- what is measured: each takes the folder of images and an empty folder, and returns how many images it did


def each_file(directory: Path) -> Iterator[tuple[str, str]]:
    """(path, class folder), in the order of the names."""
    for folder in sorted(entry.path for entry in os.scandir(directory) if entry.is_dir()):
        for name in sorted(os.listdir(folder)):
            yield f"{folder}/{name}", os.path.basename(folder)


def read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def floor(directory: Path, dest: str) -> int:
    digest, number = hashlib.sha256(), 0
    out = open(f"{dest}/0", "wb")  # noqa: SIM115
    for number, (path, _) in enumerate(each_file(directory), 1):
        data = read(path)
        digest.update(data)
        out.write(data)
        if number % PER_FILE == 0:
            out.close()
            out = open(f"{dest}/{number}", "wb")  # noqa: SIM115
    out.close()
    return number


def floor_two(directory: Path, dest: str) -> int:
    """Each process takes every other class."""
    halves = [subprocess.Popen([sys.executable, __file__, "half", str(directory), dest, half]) for half in "01"]
    if max([half.wait() for half in halves]):
        raise RuntimeError("a half failed")
    return sum(1 for _ in each_file(directory))


def half_floor(directory: Path, dest: str, half: int) -> None:
    digest, out = hashlib.sha256(), open(f"{dest}/{half}", "wb")  # noqa: SIM115
    for number, folder in enumerate(sorted(entry.path for entry in os.scandir(directory))):
        if number % 2 == half:
            for name in sorted(os.listdir(folder)):
                data = read(f"{folder}/{name}")
                digest.update(data)
                out.write(data)
    out.close()


def ustar(directory: Path, dest: str) -> int:
    from pipeline.ingest.shards import TarWriter

    files = list(each_file(directory))
    for start in range(0, len(files), PER_FILE):
        with open(f"{dest}/{start:08d}.tar", "wb") as out:
            tar = TarWriter(out)
            for number, (path, _) in enumerate(files[start : start + PER_FILE], start):
                tar.add(f"{number:016x}.jpg", read(path))
            tar.close()
    return len(files)


def python_tarfile(directory: Path, dest: str) -> int:
    files = list(each_file(directory))
    for start in range(0, len(files), PER_FILE):
        with tarfile.open(f"{dest}/{start:08d}.tar", "w:", format=tarfile.USTAR_FORMAT) as tar:
            for number, (path, _) in enumerate(files[start : start + PER_FILE], start):
                info, data = tarfile.TarInfo(f"{number:08d}.jpg"), read(path)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return len(files)


def decode(directory: Path, dest: str) -> int:
    files = list(each_file(directory))
    for path, _ in files:
        Image.open(io.BytesIO(read(path))).load()
    return len(files)


def start_ray(directory: Path, dest: str) -> int:
    from pipeline.ingest.engine import RayEngine

    with RayEngine(workers=2) as engine:
        list(engine.map(_nothing, [("nothing", ())]))
    return 1


def _nothing(*_: object, attempt: int) -> Iterator[int]:
    yield 1


def shardwriter(directory: Path, dest: str) -> int:
    import webdataset

    number = 0
    with webdataset.ShardWriter(f"{dest}/%06d.tar", maxcount=PER_FILE, verbose=0) as writer:
        for number, (path, label) in enumerate(each_file(directory), 1):
            writer.write({"__key__": f"{number:016x}", "jpg": read(path), "cls": label.encode()})
    return number


def mdswriter(directory: Path, dest: str) -> int:
    from streaming import MDSWriter

    files = list(each_file(directory))
    with MDSWriter(out=f"{dest}/mds", columns={"jpg": "bytes", "cls": "str"}) as writer:
        for path, label in files:
            writer.write({"jpg": read(path), "cls": label})
    return len(files)


def build(check: str, address: str) -> Callable[[Path, str], int]:
    def run(directory: Path, dest: str) -> int:
        import pipeline
        from pipeline.store import spare_pandas

        spare_pandas()  # as the command does
        return pipeline.build(directory, f"{dest}/root", check=check, workers=2, address=address).num_images

    return run


CASES: dict[str, Callable[[Path, str], int]] = {
    "floor": floor,
    "floor-two": floor_two,
    "ustar": ustar,
    "tarfile": python_tarfile,
    "decode": decode,
    "ray": start_ray,
    "shardwriter": shardwriter,
    "mdswriter": mdswriter,
    "build-header": build("header", "none"),
    "build-decode": build("decode", "none"),
    "build-header-ray": build("header", "local"),
}


# ---- measuring

PR_SET_CHILD_SUBREAPER = 36


def measure(name: str, directory: Path, dest: str) -> dict[str, object]:
    """Run one case in a child; adopt its orphans and wait for them, so that no processor time is missed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    began_s = time.perf_counter()
    child = subprocess.Popen([sys.executable, __file__, "run", str(directory), name, dest], stdout=subprocess.PIPE)
    peak = _Peak(child.pid)
    peak.start()
    output, _ = child.communicate()
    elapsed_s = time.perf_counter() - began_s
    peak.stop()
    _reap()
    if child.returncode:
        return {"case": name, "failed": child.returncode}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    images = int(output.split()[-1])
    return {
        "case": name,
        "images": images,
        "cpu_us_per_image": round((used.ru_utime + used.ru_stime) / images * 1e6, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "wall_s": round(elapsed_s, 1),
        "peak_pss_mb": round(peak.peak_bytes / 1e6),
    }


class _Peak(threading.Thread):
    """The largest sum of proportional set sizes of all descendants, looked at twice a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pid, self._over = pid, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.5):
            self.peak_bytes = max(self.peak_bytes, sum(map(_pss, psutil.Process().children(recursive=True))))

    def stop(self) -> None:
        self._over.set()
        self.join()


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.Error, OSError):
        return 0


def _reap() -> None:
    """Daemons that outlive the child are ours now: they get ten seconds to end by themselves."""
    deadline = time.monotonic() + 10
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            if time.monotonic() > deadline:
                for process in psutil.Process().children(recursive=True):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.1)


def table(found: list[dict[str, object]]) -> str:
    """Ratios to the floor and to ShardWriter."""
    cost = {str(row["case"]): float(str(row["cpu_us_per_image"])) for row in found if "cpu_us_per_image" in row}
    lines = ["| case | CPU us an image | x floor | ShardWriter / it | wall s | peak PSS MB, all processes |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for row in found:
        name = str(row["case"])
        if name == "ray":
            lines.append(
                f"| Ray's start and stop | {row['cpu_s']} CPU s in all | | | {row['wall_s']} | {row['peak_pss_mb']} |"
            )
        elif name in cost:
            ratios = [
                f"{cost[name] / cost['floor']:.2f}" if "floor" in cost else "",
                f"{cost['shardwriter'] / cost[name]:.2f}" if "shardwriter" in cost else "",
            ]
            lines.append(f"| {name} | {cost[name]} | {' | '.join(ratios)} | {row['wall_s']} | {row['peak_pss_mb']} |")
        else:
            lines.append(f"| {name} | failed: {row['failed']} | | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["generate", "measure", "one", "run", "half"])
    parser.add_argument("directory")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--scratch", help="where outputs are written and removed again")
    arguments = parser.parse_args()
    directory = Path(arguments.directory).resolve()
    if arguments.action == "generate":
        generate(directory, arguments.images, arguments.classes)
    elif arguments.action == "half":
        half_floor(directory, arguments.names[0], int(arguments.names[1]))
    elif arguments.action == "run":
        print(CASES[arguments.names[0]](directory, arguments.names[1]))
    elif arguments.action == "one":
        dest = tempfile.mkdtemp(dir=arguments.scratch)
        print(json.dumps(measure(arguments.names[0], directory, dest)), flush=True)
        shutil.rmtree(dest)
    else:
        for path, _ in each_file(directory):
            read(path)
        found: list[dict[str, object]] = []
        for name in arguments.only:
            command = [sys.executable, __file__, "one", str(directory), name]
            command += ["--scratch", arguments.scratch] if arguments.scratch else []
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            print(output, end="", flush=True)
            found.append(json.loads(output))
        print(table(found))


if __name__ == "__main__":
    main()
