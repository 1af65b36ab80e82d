"""Planning an epoch of 10^9 samples in 10^6 classes: `python benchmarks/plan_billion.py DIR`.

DIR takes two arrays of 8 MB, images and targets of each class, and a sample table of 28 bytes a sample as a sparse
file. All are memory-mapped, as tables of a snapshot are; its rows are zeros, but a page that is touched is a page read.
Each policy runs in a process of its own, so that peak memory is its own. Seconds are processor time, medians of 3;
a resume begins with the arrays and ends with the rows of the sample table of one batch.
"""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.plan.epoch import EpochFunction

NUM_CLASSES, NUM_SAMPLES, BATCH = 10**6, 10**9, 8192
ROW_BYTES = 4 + 4 + 8 + 4 + 8  # shard, row, offset, size, checksum: pipeline.schema.SAMPLES
NUM_PLANNED = 250 * BATCH
POLICIES = "natural", "balanced"


def make_tables(folder: Path) -> None:
    """A Pareto tail scaled to 10^9 images, at least one a class; balanced draws 1,000 of each."""
    weight = 1 + np.random.default_rng(0).pareto(1.1, NUM_CLASSES)
    counts = 1 + np.floor(weight / weight.sum() * (NUM_SAMPLES - NUM_CLASSES)).astype(np.int64)
    counts[counts.argmax()] += NUM_SAMPLES - counts.sum()
    np.save(folder / "natural.npy", counts)
    np.save(folder / "balanced.npy", np.full(NUM_CLASSES, NUM_SAMPLES // NUM_CLASSES, np.int64))
    with (folder / "samples.bin").open("wb") as file:
        file.truncate(NUM_SAMPLES * ROW_BYTES)


def measure(folder: Path, policy: str) -> None:
    pool: Any = np.load(folder / "natural.npy", mmap_mode="r")
    targets: Any = np.load(folder / f"{policy}.npy", mmap_mode="r")
    with (folder / "samples.bin").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # else each of 8,192 rows a batch brings 128 KB of neighbours
    samples = np.frombuffer(mapped, np.uint8).reshape(NUM_SAMPLES, ROW_BYTES)
    base_bytes = peak_bytes()
    starts = np.concatenate([[0], np.cumsum(pool)])

    def read(plan: EpochFunction, position: int) -> None:
        drawn = plan.draws(position, position + BATCH)
        ordinal, _ = plan.images(drawn.class_id, drawn.draw)
        samples[starts[drawn.class_id] + ordinal].sum()

    def resume(percent: int) -> Callable[[], None]:
        return lambda: read(EpochFunction(pool, targets, 0), NUM_SAMPLES // 100 * percent)

    plan = EpochFunction(pool, targets, 0)
    began_s = time.process_time()
    for i in range(0, NUM_PLANNED, BATCH):
        drawn = plan.draws(i, i + BATCH)
        plan.images(drawn.class_id, drawn.draw)
    elapsed_s = time.process_time() - began_s
    print(f"| {policy} | plan the first {NUM_PLANNED:,} draws | {NUM_PLANNED / elapsed_s / 1e6:.2f} million a second |")
    print(f"| {policy} | peak memory so far, of it before | {peak_bytes() / 1e6:,.0f} MB, {base_bytes / 1e6:,.0f} MB |")
    print(f"| {policy} | construct `EpochFunction` | {median_s(lambda: EpochFunction(pool, targets, 0)):.2f} s |")
    for percent in (0, 50, 99):
        print(
            f"| {policy} | construct, and first batch at {percent} % | {median_s(resume(percent)):.2f} s |",
            flush=True,
        )
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
