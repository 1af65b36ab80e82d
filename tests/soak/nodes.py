"""Nodes of a Ray cluster die or stall at random moments of builds; each build ends with the bytes of one left alone.

    python -m tests.soak.nodes [--kills 20] [--builds 4] [--images 600]

Four raylets on this machine (`ray.cluster_utils.Cluster`): a head without CPUs, where the driver is, and three nodes of
one. While a build runs, a node is killed (its raylet by SIGKILL), or stopped for a while (SIGSTOP: first it is silent,
later it is back, and by then may have been called dead while its worker went on writing), and reaped at once or left as
a zombie; a new node takes its place. Checked of each build: every file outside runs/, reports/ and staging/ equals what
processes of this machine built; a build may fail, and then its rerun does. One line of JSON a build; exit code 1 if a
law was broken. Only processes that this one started are touched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.soak.kill import SHARD_SAMPLES, kept, make_sources, num_done  # noqa: E402

STOP_S = (1.0, 40.0)
"""Ray calls a node dead after some 20 s of silence: some wake up before, some after."""

PATIENCE_S = 600.0
MAX_RERUNS = 5


def start(source: Path, root: Path, address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.build", str(source), str(root), "--json", "--quiet", "--address", address]
    command += ["--shard-samples", str(SHARD_SAMPLES), "--allow", "open-cluster"]  # nobody else reaches this one
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Nodes:
    """The cluster, and what is done to it."""

    def __init__(self, rng: random.Random) -> None:
        from ray.cluster_utils import Cluster

        self._rng = rng
        self._cluster: Any = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20}
        )
        self.address: str = self._cluster.address
        self._nodes: list[Any] = []
        self._asleep: list[tuple[float, int]] = []  # when to wake it, the raylet's pid
        self.done = {"killed": 0, "killed unreaped": 0, "stopped": 0, "woke": 0}
        for _ in range(3):
            self._add()

    def _add(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=80 << 20))

    def disturb(self) -> str:
        """Kill or stop one node, and start another in its place."""
        node = self._nodes.pop(self._rng.randrange(len(self._nodes)))
        raylet = node.all_processes["raylet"][0].process
        what = self._rng.choice(["killed", "killed unreaped", "stopped"])
        if what == "stopped":
            os.kill(raylet.pid, signal.SIGSTOP)
            self._asleep.append((time.monotonic() + self._rng.uniform(*STOP_S), raylet.pid))
        else:
            os.kill(raylet.pid, signal.SIGKILL)
            if what == "killed":
                raylet.wait()
        self.done[what] += 1
        self._add()
        return what

    def wake(self, *, all_of_them: bool = False) -> None:
        now_s = time.monotonic()
        for due_s, pid in list(self._asleep):
            if all_of_them or now_s >= due_s:
                self._asleep.remove((due_s, pid))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                    self.done["woke"] += 1

    def close(self) -> None:
        self.wake(all_of_them=True)
        family = psutil.Process().children(recursive=True)
        self._cluster.shutdown()
        _, alive = psutil.wait_procs(family, timeout=15)
        for process in alive:  # workers of nodes that were killed, and what those left
            with contextlib.suppress(psutil.Error):
                process.kill()


def run_one(nodes: Nodes, source: Path, root: Path, num_kills: int, units: int, rng: random.Random) -> dict[str, Any]:
    """One build, disturbed so often, run until it succeeds."""
    started_s, done, failures = time.monotonic(), 0, list[str]()
    marks = sorted(rng.uniform(0.02, 0.9) for _ in range(num_kills))
    for _ in range(1 + MAX_RERUNS):
        driver = start(source, root, nodes.address)
        deadline_s = time.monotonic() + PATIENCE_S
        while driver.poll() is None and time.monotonic() < deadline_s:
            nodes.wake()
            if done < num_kills and num_done(root) >= marks[done] * units:
                nodes.disturb()
                done += 1
            time.sleep(0.1)
        if driver.poll() is None:
            driver.kill()
            failures.append(f"no end in {PATIENCE_S:.0f} s")
        _, told = driver.communicate()
        if driver.returncode == 0:
            break
        failures.append(f"exit code {driver.returncode}: {told[-600:]}")
    return {"seconds": round(time.monotonic() - started_s, 1), "disturbed": done, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--builds", type=int, default=4)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="evenshard-nodes-", dir="/tmp"))
    (scratch / "home").mkdir()
    os.environ |= {"HOME": str(scratch / "home"), "RAY_TMPDIR": str(scratch), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # a private cluster of one test
    os.environ.pop("RAY_ADDRESS", None)
    try:
        sys.exit(0 if soak(scratch, arguments) else 1)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def soak(scratch: Path, arguments: argparse.Namespace) -> bool:
    source, _ = make_sources(scratch, arguments.images)
    reference = start(source, scratch / "reference", "none")
    _, told = reference.communicate()
    assert reference.returncode == 0, told
    expected, units = kept(scratch / "reference"), num_done(scratch / "reference")
    print(json.dumps({"undisturbed units": units}), flush=True)
    rng, identical = random.Random(arguments.seed), 0
    nodes = Nodes(rng)
    try:
        for number in range(arguments.builds):
            root = scratch / f"root-{number}"
            told_of = run_one(nodes, source, root, arguments.kills // arguments.builds, units, rng)
            files = kept(root)
            told_of["identical"] = files == expected
            told_of["differing"] = sorted(p for p in files.keys() | expected.keys() if files.get(p) != expected.get(p))[
                :5
            ]
            identical += told_of["identical"]
            print(json.dumps(told_of), flush=True)
            shutil.rmtree(root)
    finally:
        nodes.close()
    print(json.dumps({"builds": arguments.builds, "identical": identical, **nodes.done}), flush=True)
    return identical == arguments.builds


if __name__ == "__main__":
    main()
