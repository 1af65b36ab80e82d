"""Every call of the commit path fails, and every one is the last: `python tests/soak/faults.py [--every 1] [--strace]`.

Without --strace the calls are those of Python's ``os``, made to fail inside a forked process. With it they are system
calls of a whole process, made to fail by ``strace -e inject``: also those behind ``open`` and Python's own writing.
Exit status 1 if anything was torn, lost, published in part, unnamed, or not mended by running again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_faults
from commit_faults import ERRORS, Outcome, contents, prepare, problems

TESTS = Path(__file__).parents[1]

SYSCALLS = (
    "openat",
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "link",
    "linkat",
    "unlink",
    "unlinkat",
    "mkdir",
    "rmdir",
)
SYSCALLS += ("rename", "renameat2", "utimensat")


@dataclass(frozen=True)
class Point:
    """The ``nth`` call of ``name`` in the main thread of the process."""

    name: str
    nth: int


def run(root: Path, incoming: Path, log: Path, inject: str | None) -> Outcome:
    """One walk under strace."""
    traced = "trace=" + ",".join(SYSCALLS)
    command = ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-o", str(log), "-e", traced]
    command += ["-e", f"inject={inject}"] if inject else []
    command += [sys.executable, str(TESTS / "commit_faults.py"), str(root), str(incoming)]
    calm = os.environ | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}  # as alike as two runs can be
    done = subprocess.run(command, cwd=TESTS.parent, env=calm, capture_output=True, text=True, check=False)
    about = done.stdout.splitlines()[-1] if done.stdout else ""
    error = (
        "" if done.returncode <= 0 else done.stderr.strip().splitlines()[-1] if done.stderr else f"{done.returncode}"
    )
    if "Traceback" in done.stderr:
        error = f"not ours: {done.stderr[-500:]}"
    return Outcome(killed=done.returncode in (-9, 137), done=done.returncode == 0, error=error, about=about)


def points(log: Path, root: Path) -> Iterator[Point]:
    """Calls of the main thread that change something below ``root``, with their number among all of that name."""
    lines = log.read_text().splitlines()
    main = lines[0].split()[0]
    seen: Counter[str] = Counter()
    for line in lines:
        match = re.match(r"(\d+) +(\w+)\((.*)", line)
        if match is None or match[1] != main:
            continue
        seen[match[2]] += 1
        if str(root) in match[3] and (match[2] != "openat" or "O_CREAT" in match[3]):
            yield Point(match[2], seen[match[2]])


def by_strace(folder: Path, every: int) -> int:
    """Every ``every``-th pair of a call and what becomes of it."""
    template, incoming = prepare(folder)
    root, log = folder / "tried", folder / "strace.log"
    before = contents(template)
    shutil.copytree(template, root)
    assert run(root, incoming, log, None).done
    after = contents(root)
    shutil.rmtree(root)
    shutil.copytree(template, root)
    assert run(root, incoming, log, None).done  # once more, now that everything is compiled
    faults = [(point, kind) for point in points(log, root) for kind in (*ERRORS, "SIGKILL")][::every]
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    for number, (point, kind) in enumerate(faults):
        shutil.rmtree(root)
        shutil.copytree(template, root)
        how = f"signal=SIGKILL:when={point.nth}" if kind == "SIGKILL" else f"error={kind}:when={point.nth}"
        outcome = run(root, incoming, log, f"{point.name}:{how}")
        hit = [line for line in log.read_text().splitlines() if "INJECTED" in line or "killed by SIGKILL" in line]
        if not hit or (kind != "SIGKILL" and not any(str(root) in line for line in hit)):
            ends["missed: another call had that number"] += 1
            continue
        ends["killed" if outcome.killed else "done all the same" if outcome.done else "failed by name"] += 1
        found = [*problems(root, outcome, before, after)]
        again = run(root, incoming, log, None)
        if not again.done or contents(root) != after:
            found.append(f"the rerun: {again.error or 'other bytes'}")
        wrong += [f"{point.name} number {point.nth}, {kind}: {text}" for text in found]
        if number % 25 == 0:
            print(f"{number} of {len(faults)}: {dict(ends)}, {len(wrong)} problems", file=sys.stderr, flush=True)
    print(*wrong, sep="\n")
    print(f"{len(faults)} faults at {len({point for point, _ in faults})} calls: {dict(ends)}: {len(wrong)} problems")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--strace", action="store_true")
    arguments = parser.parse_args()
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        status = (by_strace if arguments.strace else test_faults.main)(Path(folder), arguments.every)
    print(f"{time.perf_counter() - began_s:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
