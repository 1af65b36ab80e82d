"""A build over thousands of damaged images: it ends, each is a row or a reject, memory is bounded.

    python tests/soak/mutants.py [--count 6000] [--seed 0] [--check decode]

Prints the reasons, and the largest resident set that any worker, or the child of one, came to.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from independent_checker import check_root
from mutants import KINDS, mutants

import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", choices=["decode", "header"], default="decode")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evenshard-mutants-") as folder:
        source, root = Path(folder, "photos"), Path(folder, "root")
        names: list[str] = []
        for name, data in mutants(args.count, seed=args.seed):
            (source / name[-3:]).mkdir(parents=True, exist_ok=True)
            (source / name[-3:] / name).write_bytes(data)
            names.append(f"{name[-3:]}/{name}")
        start = time.perf_counter()
        pipeline.build(source, root, address="none", check=args.check)
        elapsed = time.perf_counter() - start
        rows, rejects = check_root(root)
        told = sorted(row["path"] for row in [*rows, *rejects])
        assert told == sorted(names), "an image is neither, or both"
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
        print(f"{len(names)} mutants ({', '.join(KINDS)}), seed {args.seed}, check {args.check}: {elapsed:.0f} s")
        print(f"{len(rows)} rows, {len(rejects)} rejects: {dict(Counter(row['reason'] for row in rejects))}")
        print(f"largest resident set of a worker or child: {peak} MB")


if __name__ == "__main__":
    main()
