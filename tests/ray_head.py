"""A private head of Ray with its dashboard, as a process of our own: token, ports and directories that nobody shares.

`ray stop` would stop every Ray of this machine; ``ray start --block`` ends all it started when it gets SIGTERM.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = "a5" * 24
_FIRST_PORT = 20000  # Ray refuses ports that it may give to its workers, 10002 to 19999


@dataclass(frozen=True)
class Head:
    """A running one. ``environment`` is that of who may talk to it."""

    folder: Path
    gcs: str
    dashboard: str
    environment: dict[str, str]

    def submit(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """``ray job submit --working-dir . -- WORDS``, from the top of this repository, to the end of the job."""
        command = [RAY, "job", "submit", "--working-dir", ".", "--", *words]
        return subprocess.run(
            command, cwd=TOP, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def get(self, path: str) -> Any:
        """What the dashboard answers to who has the token."""
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@contextmanager
def head(*, auth: str = "token", **more: str) -> Iterator[Head]:
    """One with two CPUs; ``auth`` is 'token' or 'disabled', ``more`` is put into its environment, so its jobs'."""
    folder = Path(tempfile.mkdtemp(prefix="evenshard-head-", dir="/tmp"))  # a Unix socket's path is short
    (folder / "home").mkdir()
    gcs, dashboard, client, agent = _free_ports(4)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": auth,
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        **more,
    }
    command = [
        *(RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent}", "--num-cpus=2", "--object-store-memory=100000000"),
        *(f"--temp-dir={folder / 'ray'}", "--disable-usage-stats"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        found = Head(folder, f"127.0.0.1:{gcs}", url, environment | {"RAY_API_SERVER_ADDRESS": url})
        _wait(found, process)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(found: Head, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            if found.get("/api/jobs/") == []:
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        assert process.poll() is None, (found.folder / "log").read_text()
        time.sleep(0.2)
    raise TimeoutError((found.folder / "log").read_text())


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    port = _FIRST_PORT + os.getpid() % 5000
    while len(found) < count:
        port += 1
        with socket.socket() as tried:
            try:
                tried.bind(("0.0.0.0", port))
            except OSError:
                continue
        found.append(port)
    return found
