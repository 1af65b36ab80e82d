"""Loaders side by side on the same images: `python benchmarks/stream.py DIR --images 20000 > table.md`.

In an environment of its own, made as `benchmarks/requirements.txt` says. DIR takes the photos and every peer's copy of
them, about 1.5 GB for 20,000; a second run finds them there.

Each peer runs in a process of its own. For each case the peers take turns, three times over, so that what else the
machine does hits all alike; a cell is the median. The figure to compare is images per CPU second: user and system time
of the process and all its descendants, from `iter()` to the last batch, so start-up and buffers count; a turn ends
after so many images, or with the first batch after 3 seconds. Time to first batch counts from making the loader.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from photos import generate
from stream_peers import (
    BATCH,
    PEERS,
    RAW_NAMES,
    RAW_SKIPS,
    CannotError,
    Case,
    batch_size,
    photos,
    pillow_rgb,
    prepare,
    read_bytes,
)

REPEATS = 3
TURN_S = 3.0
TIMEOUT_S = 120
"""For one turn of a peer, and for making its copy of the images ten times as much: its row says so."""
PROCESS_SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
LIMITS = "limits"
RESUME = "resume"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Medians of one peer in one case; ``note`` says why there is none."""

    peer: str
    case: Case
    per_cpu_s: float = 0.0
    per_s: float = 0.0
    first_batch_s: float = 0.0
    note: str = ""


# ---- in the process of one peer


def tree_cpu_s() -> float:
    """User and system time of this process, of its ended children, and of descendants that still run."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # ended since, and counted with the children from now on
        total += times.user + times.system + times.children_user + times.children_system
    return total


def measure_once(open_batches: Callable[[Case], Iterator[Any]], case: Case, draws: int) -> tuple[float, float, float]:
    """(images per CPU second, per second, seconds to the first batch)."""
    gc.collect()  # what an earlier turn left is not this one's
    made_s = time.perf_counter()
    batches = open_batches(case)
    cpu_s, began_s = tree_cpu_s(), time.perf_counter()
    seen = batch_size(next(batches))
    first_s = time.perf_counter() - made_s
    while seen < draws and time.perf_counter() - began_s < TURN_S:
        seen += batch_size(next(batches))
    return seen / (tree_cpu_s() - cpu_s), seen / (time.perf_counter() - began_s), first_s


def turn(name: str, case: Case, draws: int) -> dict[str, Any]:
    """One measurement, or why there is none."""
    try:
        return {"measured": measure_once(PEERS[name], case, draws)}
    except CannotError as error:
        return {"note": f"cannot: {error}"}
    except Exception as error:  # a peer's failure is a row of the table
        return {"note": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"}


def run_limits(case: Case) -> Iterator[Cell]:
    """What no loader can beat: reading the same bytes, and decoding them, with nothing around it."""
    from pipeline import open_snapshot
    from pipeline.schema import tar_path

    snapshot = open_snapshot(case.at("root"))
    samples, store = snapshot.samples("train"), snapshot.store
    names = [store.local_path(tar_path(sha)) or "" for sha in snapshot.shards["tar_sha256"].to_pylist()]
    files = {i: os.open(name, os.O_RDONLY) for i, name in enumerate(names)}
    columns = zip(*(samples.slice(c, 0, samples.num_rows).tolist() for c in ("shard", "offset", "size")), strict=True)
    places = random.Random(0).sample(list(columns), samples.num_rows)
    if not case.decoded:
        yield timed(
            case, "limit: pread", len(places), lambda: deque((os.pread(files[f], n, at) for f, at, n in places), 1)
        )
        return
    data = [os.pread(files[f], n, at) for f, at, n in places[:500]]
    yield timed(case, "limit: decode, Pillow", len(data), lambda: [pillow_rgb(one) for one in data])
    from simplejpeg import decode_jpeg

    yield timed(case, "limit: decode, simplejpeg", len(data), lambda: [decode_jpeg(one) for one in data])


def timed(case: Case, name: str, count: int, action: Callable[[], object]) -> Cell:
    taken: list[tuple[float, float]] = []
    for _ in range(REPEATS + 1):  # the first warms up
        cpu_s, began_s = time.process_time(), time.perf_counter()
        action()
        taken.append((time.process_time() - cpu_s, time.perf_counter() - began_s))
    cpu, wall = (statistics.median(column) for column in zip(*taken[1:], strict=True))
    return Cell(peer=name, case=case, per_cpu_s=count / cpu, per_s=count / wall)


def run_resume(case: Case) -> Iterator[dict[str, Any]]:
    """Seconds from making a loader to its first batch, from a state at 0, 50 and 99 % of an epoch, five times each."""
    from pipeline import Loader, open_snapshot

    manifest = open_snapshot(case.at("root")).manifest("even")
    taken: dict[int, list[tuple[float, float]]] = {0: [], 50: [], 99: []}
    for _ in range(7):
        for percent, times in taken.items():
            consumed = manifest.num_draws * percent // 100 // BATCH * BATCH
            cpu_s, began_s = time.process_time(), time.perf_counter()
            loader = Loader(manifest, BATCH, decode=case.decoded)
            loader.load_state_dict(loader.state_dict() | {"consumed": consumed})
            next(iter(loader))
            times.append((time.perf_counter() - began_s, time.process_time() - cpu_s))
    for percent, times in taken.items():
        wall, cpu = (statistics.median(column) * 1e3 for column in zip(*times[2:], strict=True))
        yield {"percent": percent, "ms": round(wall, 1), "cpu_ms": round(cpu, 1)}


def child(name: str, case: Case) -> None:
    """Answer each line with a line, as long as there are any."""
    if name in PEERS:
        prepare(name, case)
        for path, _ in photos(case)[:: 1 if name.startswith("ImageFolder") else 10**9]:
            read_bytes(path)  # a warm page cache for everyone
        import torch

        torch.set_num_threads(1)
        answer({"note": "ready"})
        for line in sys.stdin:
            request = json.loads(line)
            answer(turn(name, Case(**request["case"]), request["draws"]))
    elif name == LIMITS:
        for cell in run_limits(case):
            answer(asdict(cell))
    else:
        for found in run_resume(case):
            answer(found)


def answer(told: dict[str, Any]) -> None:
    print("\n@" + json.dumps(told), flush=True)


# ---- in the process that asks


class Asked:
    """The process of one peer."""

    def __init__(self, name: str, case: Case) -> None:
        self.name = name
        log = Path(case.data) / f"{name.replace(' ', '-').replace(',', '')}.log"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", name, json.dumps(asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("ab"),
            env=os.environ | PROCESS_SETTINGS,
            start_new_session=True,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            return {"note": "its process has ended"}
        return self.told(TIMEOUT_S)

    def told(self, timeout_s: float) -> dict[str, Any]:
        """Its next line; its end if that does not come in time."""
        timer = threading.Timer(timeout_s, self.end)
        timer.start()
        try:
            assert self._process.stdout
            for line in self._process.stdout:
                if line.startswith("@"):
                    return json.loads(line[1:])
        finally:
            timer.cancel()
        return {"note": f"ended with status {self._process.wait()}, or was not done in {timeout_s:.0f} s"}

    def rest(self) -> Iterator[dict[str, Any]]:
        """All it says of itself."""
        while "note" not in (found := self.told(TIMEOUT_S)) or found.get("peer"):
            yield found

    def end(self) -> None:
        try:
            os.killpg(self._process.pid, 9)
        except ProcessLookupError:
            return
        self._process.wait()


def take_turns(names: list[str], cases: list[Case], draws: int) -> list[dict[str, Any]]:
    """Every peer in every case, each of them three times, one after the other."""
    peers: list[Asked] = []
    cells: dict[tuple[str, Case], dict[str, Any]] = {}
    for name in names:  # prepared one by one, then all wait
        peers.append(Asked(name, cases[0]))
        print(f"{name}: {peers[-1].told(10 * TIMEOUT_S)['note']}", file=sys.stderr, flush=True)
    taken: dict[tuple[str, Case], list[list[float]]] = {}
    for case in cases:
        for _ in range(REPEATS):
            for peer in peers:
                place = peer.name, case
                if place in cells and cells[place]["note"]:
                    continue
                found = peer.ask({"case": asdict(case), "draws": draws})
                if "measured" in found:
                    taken.setdefault(place, []).append(found["measured"])
                    rates = [statistics.median(column) for column in zip(*taken[place], strict=True)]
                    cell = Cell(peer=peer.name, case=case, per_cpu_s=rates[0], per_s=rates[1], first_batch_s=rates[2])
                else:
                    cell = Cell(peer=peer.name, case=case, note=found["note"])
                cells[place] = asdict(cell)
        told = ", ".join(f"{peer.name} {cells[peer.name, case]['per_cpu_s']:,.0f}" for peer in peers)
        print(f"{case}: {told}", file=sys.stderr, flush=True)
    for peer in peers:
        peer.end()
    return list(cells.values())


def table(cells: list[dict[str, Any]], case: Case, label: str, workers: list[int]) -> str:
    """One row a peer: natural and balanced rates for each number of workers, and ratios at none."""
    ours = {c["case"]["balanced"]: c["per_cpu_s"] for c in of(cells, "evenshard", case)}
    heads = [f"{order}, {w} w" for order in ("natural", "balanced") for w in workers]
    lines = [
        f"\n### {label}\n",
        "Images per CPU second (per second in brackets).\n",
        "| loader | "
        + " | ".join(heads)
        + " | ours / it, natural | ours / it, balanced | first batch s, nat. / bal. |",
        "|---|" + "--:|" * (len(heads) + 3),
    ]
    notes: list[str] = []
    for peer in PEERS:
        if not case.decoded and peer in RAW_SKIPS:
            continue
        name = peer if case.decoded else RAW_NAMES.get(peer, peer)
        row = [name]
        for balanced, w in product((False, True), workers):
            found = one(cells, peer, replace(case, balanced=balanced, workers=w))
            row.append(rate(found))
            if found and found["note"]:
                notes.append(f"* {name}, {'balanced' if balanced else 'natural'}, {w} workers: {found['note']}")
        firsts: list[str] = []
        for balanced in (False, True):
            found = one(cells, peer, replace(case, balanced=balanced, workers=0))
            good = found is not None and found["per_cpu_s"] > 0
            row.append(f"{ours[balanced] / found['per_cpu_s']:.2f}" if good and ours.get(balanced) else "-")
            firsts.append(f"{found['first_batch_s']:.3f}" if good else "-")
        lines.append("| " + " | ".join([*row, " / ".join(firsts)]) + " |")
    for limit in (c for c in cells if c["peer"].startswith("limit") and c["case"]["size"] == case.size):
        if limit["case"]["decoded"] == case.decoded:
            ratio = f"{ours[False] / limit['per_cpu_s']:.2f}" if ours.get(False) else "-"
            lines.append(f"| {limit['peer']} | {rate(limit)} |" + " |" * (len(heads) - 1) + f" {ratio} | | |")
    if ours.get(False) and ours.get(True):
        notes.insert(0, f"* evenshard, balanced / natural, no workers: {ours[True] / ours[False]:.2f}")
    return "\n".join([*lines, "", *notes])


def of(cells: list[dict[str, Any]], peer: str, case: Case) -> list[dict[str, Any]]:
    """This peer's cells without workers, in both orders."""
    both = (one(cells, peer, replace(case, balanced=balanced, workers=0)) for balanced in (False, True))
    return [found for found in both if found]


def one(cells: list[dict[str, Any]], peer: str, case: Case) -> dict[str, Any] | None:
    return next((c for c in cells if c["peer"] == peer and c["case"] == asdict(case)), None)


def rate(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    return f"{found['per_cpu_s']:,.0f} ({found['per_s']:,.0f})" if found["per_cpu_s"] else "none"


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    names = "torch torchvision numpy pillow simplejpeg opencv-python-headless webdataset mosaicml-streaming litdata"
    found: list[str] = []
    for name in names.split():
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    memory = psutil.virtual_memory().total / 2**30
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores, {model}, {memory:.0f} GiB, Python {platform.python_version()}; {', '.join(found)}. "
        f"Load average at the end: {load}."
    )


def grid(arguments: argparse.Namespace, *, size: int, decoded: bool, workers: list[int]) -> list[Case]:
    return [
        Case(data=arguments.directory, size=size, decoded=decoded, balanced=balanced, workers=w)
        for w in workers
        for balanced in (False, True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--images", type=int, default=20_000, help="of the 224-pixel set")
    parser.add_argument("--draws", type=int, default=20_000, help="images read in each raw measurement")
    parser.add_argument("--decoded-draws", type=int, default=2_000, help="the same for decoded ones")
    parser.add_argument("--only", choices=["raw", "decoded"], help="one of the two modes")
    parser.add_argument("--decoded-workers", type=int, nargs="*", default=[0, 1, 2])
    arguments = parser.parse_args()
    os.makedirs(arguments.directory, exist_ok=True)
    arguments.directory = str(Path(arguments.directory).resolve())
    photos_224, photos_440 = (Path(arguments.directory) / f"photos-{size}" for size in (224, 440))
    generate(photos_224, num_images=arguments.images, num_classes=500, size=224)
    plans = []
    if arguments.only != "decoded":
        plans.append((grid(arguments, size=224, decoded=False, workers=[0, 1, 2]), arguments.draws, "Raw, 224 pixels"))
    if arguments.only != "raw":
        generate(photos_440, num_images=1500, num_classes=50, size=440)
        small = grid(arguments, size=224, decoded=True, workers=arguments.decoded_workers)
        plans.append((small, arguments.decoded_draws, "Decoded, 224 pixels"))
        big = grid(arguments, size=440, decoded=True, workers=[0])
        plans.append((big, arguments.decoded_draws // 2, "Decoded, 440 pixels"))
    print(f"{arguments.images:,} images of 224 pixels in 500 classes. {machine()}")
    for cases, draws, label in plans:
        report(cases, draws, label)
    print(f"\n{machine()}")


def report(cases: list[Case], draws: int, label: str) -> None:
    names = [name for name in PEERS if cases[0].decoded or name not in RAW_SKIPS]
    cells = take_turns(names, cases, draws)
    cells += Asked(LIMITS, cases[0]).rest()
    workers = sorted({case.workers for case in cases})
    print(table(cells, replace(cases[0], balanced=False, workers=0), f"{label}, {draws:,} draws a cell", workers))
    resumed = Asked(RESUME, cases[0]).rest()
    told = "; ".join(f"{r['percent']} %: {r['ms']} ms ({r['cpu_ms']} ms CPU)" for r in resumed)
    print(f"* evenshard, balanced, first batch of {BATCH} from a state at {told}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Case(**json.loads(sys.argv[3])))
    else:
        main()
