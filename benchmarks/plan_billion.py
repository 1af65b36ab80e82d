"""Planning an epoch of 10^9 samples in 10^6 classes: `python benchmarks/plan_billion.py DIR`.

DIR takes two arrays of 8 MB, images and targets of each class, and a sample table of 28 bytes a sample: an Arrow file
as builds write it, opened and checked as loaders do, block by block on first touch. Its rows are zeros and the file is
sparse, so the disk is not measured; hashing what is touched is. Each policy runs in a process of its own, so that peak
memory is its own. Seconds are processor time, medians of 3; a resume begins with the arrays and ends with the rows of
the sample table of one batch.
"""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.plan.epoch import EpochFunction
from pipeline.schema import BLOCK_BYTES, SAMPLES, FileRef
from pipeline.store import CheckedTable, Store

NUM_CLASSES, NUM_SAMPLES, BATCH, SMALL = 10**6, 10**9, 8192, 64
NUM_PLANNED = 250 * BATCH
POLICIES = "natural", "balanced"


def make_tables(folder: Path) -> None:
    """A Pareto tail scaled to 10^9 images, at least one a class; balanced draws 1,000 of each."""
    weight = 1 + np.random.default_rng(0).pareto(1.1, NUM_CLASSES)
    counts = 1 + np.floor(weight / weight.sum() * (NUM_SAMPLES - NUM_CLASSES)).astype(np.int64)
    counts[counts.argmax()] += NUM_SAMPLES - counts.sum()
    np.save(folder / "natural.npy", counts)
    np.save(folder / "balanced.npy", np.full(NUM_CLASSES, NUM_SAMPLES // NUM_CLASSES, np.int64))
    with (folder / "samples.arrow").open("wb") as file:
        columns = [pa.array(np.zeros(NUM_SAMPLES, field.type.to_pandas_dtype())) for field in SAMPLES]
        with pa.ipc.new_file(pa.PythonFile(_Sparse(file), "w"), SAMPLES) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SAMPLES))


class _Sparse(io.RawIOBase):
    """Leaves holes where zeros would be written: 28 GB of them are written in no time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        size = len(memoryview(data).cast("B"))
        if size < 1 << 20:
            self._file.write(data)
        else:
            self._file.seek(size, os.SEEK_CUR)
        self._size += size
        return size

    def flush(self) -> None:
        self._file.flush()


def reference(path: Path) -> FileRef:
    """What a snapshot's record says of it; the digest of a block of holes is computed once."""
    hole = xxhash.xxh3_64_hexdigest(bytes(BLOCK_BYTES))
    size, digests = path.stat().st_size, []
    with path.open("rb") as file:
        for start in range(0, size, BLOCK_BYTES):
            inside = BLOCK_BYTES < start < size - 2 * BLOCK_BYTES
            file.seek(start)
            digests.append(hole if inside else xxhash.xxh3_64_hexdigest(file.read(BLOCK_BYTES)))
    return FileRef(sha256="0" * 64, size=size, num_rows=NUM_SAMPLES, blocks=tuple(digests))


def measure(folder: Path, policy: str) -> None:
    pool: Any = np.load(folder / "natural.npy", mmap_mode="r")
    targets: Any = np.load(folder / f"{policy}.npy", mmap_mode="r")
    ref, store = reference(folder / "samples.arrow"), Store.open(folder)
    base_bytes = peak_bytes()
    starts = np.concatenate([[0], np.cumsum(pool)])

    def resume(percent: int, batch: int) -> Callable[[], None]:
        def run() -> None:
            plan, position = EpochFunction(pool, targets, 0), NUM_SAMPLES // 100 * percent
            samples = CheckedTable.open(store, "samples.arrow", ref, SAMPLES)
            drawn = plan.draws(position, position + batch)
            ordinal, _ = plan.images(drawn.class_id, drawn.draw)
            for name in ("shard", "offset", "size", "checksum"):
                samples.take(name, starts[drawn.class_id] + ordinal)

        return run

    plan = EpochFunction(pool, targets, 0)
    began_s = time.process_time()
    for i in range(0, NUM_PLANNED, BATCH):
        drawn = plan.draws(i, i + BATCH)
        plan.images(drawn.class_id, drawn.draw)
    elapsed_s = time.process_time() - began_s
    print(f"| {policy} | plan the first {NUM_PLANNED:,} draws | {NUM_PLANNED / elapsed_s / 1e6:.2f} million a second |")
    print(f"| {policy} | peak memory so far, of it before | {peak_bytes() / 1e6:,.0f} MB, {base_bytes / 1e6:,.0f} MB |")
    print(f"| {policy} | construct `EpochFunction` | {median_s(lambda: EpochFunction(pool, targets, 0)):.2f} s |")
    for batch in SMALL, BATCH:
        for percent in (0, 50, 99):
            taken = median_s(resume(percent, batch))
            print(f"| {policy} | construct, and first batch of {batch:,} at {percent} % | {taken:.2f} s |", flush=True)
    own, mapped_bytes = memory_bytes("RssAnon"), memory_bytes("RssFile")
    print(f"| {policy} | memory of its own at the end | {own / 1e6:,.0f} MB, {mapped_bytes / 1e6:,.0f} mapped |")


def memory_bytes(field: str) -> int:
    """RssAnon: what only this process holds. RssFile: pages of files, which the kernel takes back when it likes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def median_s(action: Callable[[], object]) -> float:
    taken: list[float] = []
    for _ in range(3):
        begin = time.process_time()
        action()
        taken.append(time.process_time() - begin)
    return float(np.median(taken))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    if len(sys.argv) > 2:
        measure(directory, sys.argv[2])
    else:
        os.makedirs(directory, exist_ok=True)
        make_tables(directory)
        print("| epoch of 10^9 in 10^6 classes | what | measured |\n|---|---|--:|", flush=True)
        for name in POLICIES:
            subprocess.run([sys.executable, __file__, str(directory), name], check=True)
