"""Changing a policy of a large snapshot: `python benchmarks/policy_change.py ROOT` adds manifests to ROOT (a copy's).

Wall and processor seconds of the whole command, start of Python included, and the bytes and files that it wrote. What
only reads writes nothing. ROOT keeps the manifests; each run uses names of its own.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

POLICIES = (
    "power:alpha=0.5,max_repeat=10",
    "ratio:max_ratio=10,max_repeat=10",
    "effective_number:beta=0.9999",
    "repeat_factor:threshold=0.0002",
    "balanced:per_class=100,max_repeat=10",
)


def written(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}


def measure(words: list[str]) -> tuple[float, float]:
    before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipeline.cli", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start_s, cpu_s


def main(root: Path) -> None:
    stamp = f"{os.getpid()}"
    print("| command | wall s | CPU s | files written | bytes written |\n|---|--:|--:|--:|--:|")
    for number, policy in enumerate(POLICIES):
        before = written(root)
        wall_s, cpu_s = measure(["manifest", str(root), f"bench-{stamp}-{number}", "--policy", policy])
        new = {name: size for name, size in written(root).items() if before.get(name) != size}
        print(f"| manifest `{policy}` | {wall_s:.2f} | {cpu_s:.2f} | {len(new)} | {sum(new.values()):,} |", flush=True)
    for words in (["plan", str(root)], ["stats", str(root)], ["classes", str(root), "balanced", "--csv"]):
        before = written(root)
        wall_s, cpu_s = measure(words)
        assert written(root) == before
        print(f"| {words[0]} | {wall_s:.2f} | {cpu_s:.2f} | 0 | 0 |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
