"""Which remedy helps rare classes: every row of `remedies_rows.py` on the same sets, networks and numbers of draws.

    python benchmarks/remedies.py --out /tmp/remedies                              # drawn glyphs, six seeds
    python benchmarks/remedies.py --out /tmp/grocery --grocery DIR                 # Grocery photos made long-tailed

A seed decides the set, the initial network, the draws and their shifts. Each set is built by evenshard and each row
draws what the epoch function draws from its manifest. Figures are printed as they come; at the end a table with means
over seeds and 95 % paired intervals is printed, and OUT.csv (every figure of every seed), OUT.md and OUT.svg are
written. Learning rates of second stages were chosen once, of two or three, on seeds 100 and 101 of the drawn set, and
tau of the second tau-norm row on those and on 100 and 101 of Grocery; nothing else was tuned for a row.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from remedies_rows import FIGURES, run_rows
from remedies_sets import Held, drawn, grocery, shrink_grocery
from remedies_tell import Found, plot, table

from pipeline.plan.shots import GROUPS, group_of

STEPS, GROCERY_STEPS = 900, 500
SEEDS = 6


@dataclass(frozen=True)
class OfSeed:
    """What one seed gave: ``FIGURES`` by name of row, and how many classes each group has."""

    seed: int
    figures: dict[str, list[float]]
    members: dict[str, int]
    cpu_s: float


def run_seed(num_steps: int, photos: Path | None, small: Path, seed: int) -> OfSeed:
    """One seed, on one thread."""
    torch.set_num_threads(1)
    started_s = time.process_time()
    with tempfile.TemporaryDirectory(prefix="remedies-") as name:
        place = Path(name) / "seed"
        held = drawn(seed, place) if photos is None else grocery(seed, photos, small, place)
    figures = dict(_told(held, seed, num_steps))
    group = group_of(held.counts)
    members = {name: int((group == place).sum()) for place, name in enumerate(GROUPS)}
    return OfSeed(seed, figures, members, time.process_time() - started_s)


def _told(held: Held, seed: int, num_steps: int) -> Iterator[tuple[str, list[float]]]:
    for row, figures in run_rows(held, seed, num_steps):
        words = ", ".join(f"{name} {100 * value:.1f}" for name, value in zip(FIGURES, figures, strict=True))
        print(f"seed {seed}, {row.name}: {words}", flush=True)
        yield row.name, figures


def run(seeds: range, num_steps: int, processes: int, photos: Path | None = None) -> list[OfSeed]:
    """All seeds, some at a time."""
    small = Path(tempfile.mkdtemp(prefix="remedies-small-"))
    try:
        if photos is not None:
            shrink_grocery(photos, small)
        work = partial(run_seed, num_steps, photos, small)
        if processes == 1:
            return list(map(work, seeds))
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(work, seeds))
    finally:
        shutil.rmtree(small)


def by_row(done: list[OfSeed]) -> Found:
    """``{row name: [seeds, figures]}``."""
    return {name: np.array([one.figures[name] for one in done]) for name in done[0].figures}


def write(done: list[OfSeed], out: Path, title: str) -> str:
    """OUT.csv, OUT.md and OUT.svg; returns the table."""
    found, members = by_row(done), {name: round(np.mean([one.members[name] for one in done])) for name in GROUPS}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("seed", "row", *FIGURES))
        for one in done:
            writer.writerows(
                (one.seed, name, *(f"{value:.5f}" for value in figures)) for name, figures in one.figures.items()
            )
    text = table(found, FIGURES, members)
    Path(f"{out}.md").write_text(f"{text}\n", "utf-8")
    Path(f"{out}.svg").write_text(plot(found, FIGURES, title), "utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results are written to OUT.csv, OUT.md and OUT.svg")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from --first-seed")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"of 64 draws, for every row ({STEPS}; {GROCERY_STEPS} of Grocery)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--grocery", type=Path, metavar="DIR", help="the folder with train.txt and test.txt")
    args = parser.parse_args()
    started_s = time.monotonic()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    steps = args.steps or (STEPS if args.grocery is None else GROCERY_STEPS)
    done = run(seeds, steps, args.processes, args.grocery)
    what = "Grocery photos made long-tailed" if args.grocery else "Drawn set"
    title = f"{what}: differences to natural cross-entropy, 95 % paired intervals of {len(seeds)} seeds"
    print(f"\n{write(done, args.out, title)}")
    print(f"\n{time.monotonic() - started_s:.0f} s, {sum(one.cpu_s for one in done):.0f} s of processor time")


if __name__ == "__main__":
    main()
