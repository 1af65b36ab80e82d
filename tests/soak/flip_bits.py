"""A thousand flipped bits: `python tests/soak/flip_bits.py --flips 1000 [--seed 0]`; exit status 1 if one was missed.

Builds a small ROOT of photos-to-be, then flips one random bit at a time in tars, indexes, tables, manifests and the
snapshot record, reads everything, verifies, and flips it back. Prints what became of them, by folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import draw_image
from flips import KINDS, Flip, emitted, places, try_flip

import pipeline
from pipeline.verify import verify


def make_root(folder: Path) -> Path:
    """90 images in six classes, in shards of at most 16."""
    for class_id, count in enumerate((40, 24, 12, 8, 4, 2)):
        (folder / f"source/class-{class_id}").mkdir(parents=True)
        for number in range(count):
            draw_image(class_id, number).save(folder / f"source/class-{class_id}/{number:03d}.jpg")
    pipeline.build(folder / "source", folder / "root", workers=1, shard_samples=16)
    return folder / "root"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = make_root(Path(folder))
        expected, began_s = emitted(root), time.perf_counter()
        flips: list[Flip] = []
        for place in places(root, arguments.flips, arguments.seed):
            flips.append(try_flip(root, *place, expected))
            if len(flips) % 100 == 0:
                print(f"{len(flips)} flips, {sum(not flip.good for flip in flips)} missed", file=sys.stderr, flush=True)
        whole = verify(root).sound and emitted(root) == expected
    print(f"{arguments.flips} flips in {time.perf_counter() - began_s:.0f} s, seed {arguments.seed}\n")
    report(flips)
    bad = [flip for flip in flips if not flip.good]
    for flip in bad:
        print(flip)
    if not whole:
        print("the ROOT is not what it was after the last bit was turned back")
    return 1 if bad or not whole else 0


def report(flips: list[Flip]) -> None:
    print("| folder | flips | detected by reading, by name | every byte unchanged | wrong | found by verify |")
    print("|---|--:|--:|--:|--:|--:|")
    for kind in (*KINDS, ""):
        mine = [flip for flip in flips if flip.file.startswith(kind)]
        seen = Counter(flip.reading for flip in mine)
        wrong = len(mine) - seen["detected"] - seen["unchanged"]
        found = sum(flip.verify_found for flip in mine)
        print(f"| {kind or 'all'} | {len(mine)} | {seen['detected']} | {seen['unchanged']} | {wrong} | {found} |")


if __name__ == "__main__":
    sys.exit(main())
