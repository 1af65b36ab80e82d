"""Races at length: `python tests/soak/races.py [--rounds 1000] [--rebuilds 10]`; exit status 1 if one went wrong.

Four processes race for every snapshot number, on a directory and on an S3 server (moto); eight readers read the newest
snapshot while it is rebuilt and collected.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import draw_image
from races import race_commits, read_during
from real_servers import s3
from tiny_snapshot import write_snapshot

import pipeline
from pipeline.ingest.engine import RayEngine
from pipeline.snapshot import newest_number
from pipeline.store import Store
from pipeline.verify import verify

COUNTS = {"train": (9, 2, 1), "val": (0, 0, 0), "test": (2, 1, 0)}


def commits(place: str, root: str, num_rounds: int, folder: Path) -> bool:
    began_s = time.perf_counter()
    problems = race_commits(root, 4, num_rounds, folder)
    print(*problems, sep="\n", end="\n" if problems else "")
    print(
        f"{place}: {num_rounds} snapshots, 4 racers each, newest {newest_number(Store(root))}: "
        f"{len(problems)} problems, {time.perf_counter() - began_s:.0f} s",
        flush=True,
    )
    return not problems


def readers(num_rebuilds: int, folder: Path) -> bool:
    source, root = folder / "source", folder / "root"
    for class_id, count in enumerate((120, 60, 30, 10, 5, 2)):
        (source / f"class-{class_id}").mkdir(parents=True)
        for number in range(count):
            draw_image(class_id, number).save(source / f"class-{class_id}/{number:03d}.jpg")
    number = 0

    def rebuild() -> None:
        nonlocal number
        for _ in range(8):
            draw_image(0, 1000 + number).save(source / f"class-0/{1000 + number}.jpg")
            if number >= 16:
                (source / f"class-0/{1000 + number - 16}.jpg").unlink()
            number += 1
        pipeline.build(source, root, shard_samples=16)

    with RayEngine(address="local", workers=1):
        rebuild()
        done = read_during(root, 8, [rebuild] * num_rebuilds, 4.0, folder)
    sound = verify(root).sound
    print(*done.errors[:20], sep="\n", end="\n" if done.errors else "")
    print(
        f"8 readers, {num_rebuilds} rebuilds with collection: opened {done.num_opened:,} times, "
        f"{done.num_read:,} images of {len(done.snapshots)} snapshots, {len(done.errors)} failed; "
        f"{done.num_removed} files were removed meanwhile; verify {'finds nothing' if sound else 'FINDS SOMETHING'}",
        flush=True,
    )
    return sound and not done.errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--rebuilds", type=int, default=10)
    parser.add_argument("--only", choices=["local", "s3"], help="where to race; both by default")
    arguments = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        write_snapshot(folder / "local", COUNTS, {"natural": "natural"})
        shutil.copytree(folder / "local", folder / "upload")
        if arguments.rebuilds:
            (folder / "read").mkdir()
            good &= readers(arguments.rebuilds, folder / "read")
        if arguments.rounds and arguments.only != "s3":
            good &= commits("local disk", str(folder / "local"), arguments.rounds, folder)
        if arguments.rounds and arguments.only != "local":
            with s3(folder / "upload"):
                good &= commits("S3 (moto)", "s3://bucket/root", arguments.rounds, folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
