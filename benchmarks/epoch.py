"""How fast the epoch function draws, what it holds, and how long a resume takes: `python benchmarks/epoch.py`.

Times are processor time of the one core it uses, so a busy machine changes them little. Each shape runs in a process of
its own, so that peak memory is its own. Draws are read as a loader reads them, one global batch after the other; "with
an eighth" finds images for every eighth row only, as one of eight ranks does.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from pipeline.keyed import I64
from pipeline.plan.epoch import EpochFunction

NUM_DRAWS = 4_000_000
BATCH = 8192
SHAPES = {5_000: 500, 1_000_000: 10}  # classes: draws of each per epoch


def long_tail(num_classes: int) -> I64:
    """Images per class: a Pareto tail, where about half of the classes have one or two."""
    tail = 1 + np.random.default_rng(0).pareto(1.0, num_classes)
    return tail.clip(1, 100_000).astype(np.int64)


def rate(epoch_function: EpochFunction, rows: slice | None) -> float:
    """Draws per core second over consecutive batches; images of these rows of each, or of none."""
    begin = time.process_time()
    for i in range(0, NUM_DRAWS, BATCH):
        draws = epoch_function.draws(i, i + BATCH)
        if rows is not None:
            epoch_function.images(draws.class_id[rows], draws.draw[rows])
    return NUM_DRAWS / (time.process_time() - begin)


def median_s(action: Callable[[], object], times: int) -> float:
    taken: list[float] = []
    for _ in range(times):
        begin = time.process_time()
        action()
        taken.append(time.process_time() - begin)
    return float(np.median(taken))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(num_classes: int) -> None:
    pool, targets = long_tail(num_classes), np.full(num_classes, SHAPES[num_classes], np.int64)
    before = peak_bytes()
    places = iter(np.random.default_rng(1).integers(0, 10**12, 100).tolist())

    def resume() -> None:
        position = next(places)
        f = EpochFunction(pool, targets, 0)
        draws = f.draws(position, position + BATCH)
        f.images(draws.class_id, draws.draw)

    rates = {
        "class and draw": rate(EpochFunction(pool, targets, 0), None),
        "with images": rate(EpochFunction(pool, targets, 0), slice(None)),
        "with an eighth": rate(EpochFunction(pool, targets, 0), slice(None, None, 8)),
    }
    print(f"{num_classes:>9,} classes, {targets.sum():,} draws an epoch, batches of {BATCH:,}")
    print(
        "".join(
            f"{'':>9} {name:<15} {value / 1e6:6.2f} million draws a core second\n" for name, value in rates.items()
        ),
        end="",
    )
    print(f"{'':>9} resume anywhere {median_s(resume, 7) * 1e3:6.0f} ms, from arrays to the first batch")
    print(f"{'':>9} peak memory     {(peak_bytes() - before) / 1e6:6.0f} MB above the arrays given", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        for size in SHAPES:
            subprocess.run([sys.executable, __file__, str(size)], check=True)
