"""Servers on loopback for tests of remote roots: a directory by HTTP with ranges, and a proxy that breaks requests."""

from __future__ import annotations

import http.client
import os
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

FAULTS = ("503", "cut", "stall")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what these tests are about."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], **attributes: Any) -> Iterator[str]:
    """``http://127.0.0.1:port`` of a server of that handler."""
    server = _Server(("127.0.0.1", 0), type("Handler", (handler,), attributes))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...


class FileHandler(_Quiet):
    """Files below ``root``, whole or one range of them; 404 for all else."""

    root: Path

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.root / unquote(urlsplit(self.path).path).lstrip("/")
        data = path.read_bytes() if path.is_file() else None
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if data is None:
            self.send(404, b"")
        elif wanted is None:
            self.send(200, data, with_body)
        elif int(wanted[1]) >= len(data):
            self.send(416, b"")
        else:
            self.send(206, data[int(wanted[1]) : int(wanted[2]) + 1], with_body)

    def send(self, status: int, body: bytes, with_body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


class Plan:
    """Which requests break, by their number: a share of the GETs and HEADs that match, drawn by a seed.

    ``in_a_row`` bounds how often one path breaks without a good answer between: readers promise six attempts.
    """

    def __init__(
        self,
        share: float,
        seed: int = 0,
        kinds: tuple[str, ...] = FAULTS,
        matching: str = "",
        in_a_row: int | None = None,
    ) -> None:
        self.share, self.kinds, self.matching, self.in_a_row = share, kinds, matching, in_a_row
        self.broken: Counter[str] = Counter()  # by path, since its last good answer
        self.rng = random.Random(seed)
        self.lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.log: list[tuple[str, str, str | None]] = []  # method, path, fault

    def next(self, method: str, path: str) -> str | None:
        with self.lock:
            chosen = method in ("GET", "HEAD") and self.matching in path and self.rng.random() < self.share
            chosen = chosen and (self.in_a_row is None or self.broken[path] < self.in_a_row)
            self.broken[path] = self.broken[path] + 1 if chosen else 0
            fault = self.rng.choice(self.kinds) if chosen else None
            if fault in ("cut", "stall") and method == "HEAD":
                fault = "503"
            self.done[fault or "ok"] += 1
            self.log.append((method, path, fault))
            return fault

    def gets(self, part: str) -> int:
        """Requests for paths with ``part``, broken ones included."""
        return sum(method == "GET" and part in path for method, path, _ in self.log)


class ProxyHandler(_Quiet):
    """Everything to ``upstream``, except what the plan breaks."""

    upstream: str
    plan: Plan
    sent: Counter[str]  # bytes of whole bodies of GETs, by path
    stall_s: float
    delay_s: float

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.plan.next(self.command, self.path)
        if fault == "503":
            self.respond(503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce</Message></Error>")
            return
        status, headers, data = self.ask(body)
        if self.delay_s:
            threading.Event().wait(self.delay_s)
        if fault in ("cut", "stall") and data:
            self.respond(status, headers, data, up_to=len(data) // 2)
            self.wfile.flush()
            if fault == "stall":
                threading.Event().wait(self.stall_s)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
            self.close_connection = True
            return
        if self.command == "GET" and status < 300:
            with self.plan.lock:
                self.sent[unquote(self.path)] += len(data)
        self.respond(status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def respond(self, status: int, headers: dict[str, str], data: bytes, up_to: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:up_to])


@contextmanager
def directory_server(root: str | os.PathLike[str]) -> Iterator[str]:
    """The files of ``root`` by HTTP."""
    with serving(FileHandler, root=Path(root)) as url:
        yield url


@contextmanager
def proxy(upstream: str, plan: Plan, stall_s: float = 3.0, delay_s: float = 0.0) -> Iterator[tuple[str, Counter[str]]]:
    """Its URL, and the bytes of bodies that it sent whole, by path. Every answer comes ``delay_s`` late."""
    sent: Counter[str] = Counter()
    with serving(ProxyHandler, upstream=upstream, plan=plan, sent=sent, stall_s=stall_s, delay_s=delay_s) as url:
        yield url, sent
