"""Servers that others wrote, as processes on loopback, for tests of remote roots: nginx, moto's S3 (`s3_server.py`)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

_CONFIG = """
{user}
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    log_format plain '$request_method $status $body_bytes_sent $uri';
    access_log {folder}/access.log plain;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        autoindex on;
    }}
}}
"""


@dataclass(frozen=True)
class Served:
    """One line of nginx's log."""

    method: str
    status: int
    body_bytes: int
    path: str


class Nginx:
    """A running one: its URL, and what it says it has served."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    def served(self) -> list[Served]:
        lines = [line.split(" ", 3) for line in self._log.read_text().splitlines()]
        return [Served(method, int(status), int(size), path) for method, status, size, path in lines]


@contextmanager
def nginx(root: str | os.PathLike[str]) -> Iterator[Nginx]:
    """The files of ``root`` by HTTP with ranges."""
    assert NGINX is not None
    folder = Path(tempfile.mkdtemp(prefix="evenshard-nginx-", dir="/tmp"))
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""  # else its worker is nobody, who cannot read a private folder
    (folder / "nginx.conf").write_text(_CONFIG.format(folder=folder, port=port, root=os.path.abspath(root), user=user))
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(lambda: is_listening(port) or server.poll() is not None)
            assert server.poll() is None, (folder / "error.log").read_text()
            yield Nginx(f"http://127.0.0.1:{port}", folder / "access.log")
        finally:
            server.terminate()  # killed, it would leave its worker behind
            server.wait(timeout=30)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3(root: str | os.PathLike[str]) -> Iterator[str]:
    """The URL of an S3 server that has ``root`` as s3://bucket/root, which the environment names meanwhile."""
    port = free_port()
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        command = [sys.executable, str(Path(__file__).with_name("s3_server.py")), str(port)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                wait_for(lambda: is_listening(port))
                filesystem = fsspec.filesystem("s3")
                filesystem.mkdir("bucket")
                filesystem.put(f"{root}/", "bucket/root/", recursive=True)
                yield f"http://127.0.0.1:{port}"
            finally:
                server.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_for(happened: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
