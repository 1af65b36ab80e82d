"""A cluster that answers everybody is refused before anything is sent to it, unless it is allowed by name."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray_head import Head, head

from pipeline.cli import cli, run
from pipeline.errors import EngineError, UsageError
from pipeline.ingest import exposure
from pipeline.ingest.exposure import refuse_dashboard, refuse_open


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every host counts as another machine."""
    monkeypatch.setattr(exposure, "_is_loopback", lambda host: False)
    monkeypatch.setattr(exposure, "_WAIT_S", 2.0)


@contextmanager
def dashboard(status: int, asked: list[tuple[str, dict[str, str]]] | None = None) -> Iterator[str]:
    """Something that answers HTTP with ``status``; notes path and headers of what was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if asked is not None:
                asked.append((self.path, dict(self.headers)))
            self.send_response(status)
            self.send_header("Location", "/login")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def rpc(answer: Callable[[grpc.ServicerContext], bytes], asked: list[str] | None = None) -> Iterator[str]:
    """Something that answers gRPC: HOST:PORT."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            if asked is not None:
                asked.append(handler_call_details.method)
                asked.extend(name for name, _ in handler_call_details.invocation_metadata if "auth" in name.lower())
            return grpc.unary_unary_rpc_method_handler(lambda _, context: answer(context))

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def refusing(context: grpc.ServicerContext) -> bytes:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
    return b""


def failing(context: grpc.ServicerContext) -> bytes:
    context.abort(grpc.StatusCode.NOT_FOUND, "what did you ask?")
    return b""


@pytest.mark.usefixtures("far")
def test_an_open_dashboard_is_refused_and_gets_no_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "planted-token")
    asked: list[tuple[str, dict[str, str]]] = []
    with (
        dashboard(200, asked) as url,
        pytest.raises(EngineError, match=r"answers without a token.*--allow open-cluster"),
    ):
        refuse_open(f"{url}/")
    ((path, headers),) = asked
    assert path == "/api/jobs/"
    assert "planted-token" not in str(headers)
    assert "authorization" not in {name.lower() for name in headers}


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("status", [401, 403, 302, 404, 500])
def test_a_dashboard_that_wants_a_token_is_not(status: int) -> None:
    with dashboard(status) as url:
        refuse_open(url)


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(
    ("answer", "is_open"), [(lambda _: b"", True), (failing, True), (refusing, False)], ids=["ok", "error", "closed"]
)
def test_a_gcs_or_client_server_is_refused_if_it_answers(
    scheme: str, answer: Callable[[grpc.ServicerContext], bytes], is_open: bool
) -> None:
    asked: list[str] = []
    with rpc(answer, asked) as address:
        if is_open:
            with pytest.raises(EngineError, match=f"cluster at {scheme}{address} answers without a token"):
                refuse_open(scheme + address)
        else:
            refuse_open(scheme + address)
    assert asked == [
        {"": "/ray.rpc.NodeInfoGcsService/CheckAlive", "ray://": "/ray.rpc.RayletDriver/ClusterInfo"}[scheme]
    ]


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "http://127.0.0.1:1", "auto", "x://y:1", "a:b"]
)
def test_what_cannot_be_asked_is_left_to_who_connects(address: str) -> None:
    refuse_open(address)


def test_loopback_is_its_users_own() -> None:
    with dashboard(200) as url:
        refuse_open(url)
        refuse_open(url.replace("127.0.0.1", "localhost"))


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("::", False)],
)
def test_what_is_loopback(host: str, is_loopback: bool) -> None:
    assert exposure._is_loopback(host) is is_loopback


def test_a_dashboard_is_where_jobs_are_submitted() -> None:
    for url in ("http://127.0.0.1:8265", "https://u:secret@ray.example/x?sig=secret"):
        with pytest.raises(UsageError, match="ray job submit --address http") as told:
            refuse_dashboard(url)
        assert "secret" not in str(told.value)
    refuse_dashboard("10.0.0.1:6379")


def test_a_client_server_is_no_place_to_build_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client has no streaming tasks: to say so is better than Ray's RuntimeError at the first unit."""
    from pipeline.ingest.engine import RayEngine, ray

    ended: list[str] = []
    monkeypatch.setattr(RayEngine, "_connect", lambda self, options: "")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append("shutdown"))
    with pytest.raises(UsageError, match=r"ray://127.0.0.1:1 is a client server.*ray job submit.*HOST:6379"):
        RayEngine(address="ray://127.0.0.1:1").__enter__()
    assert ended == ["shutdown"]


# -- a real one


@pytest.fixture(scope="module")
def open_head() -> Iterator[Head]:
    with head(auth="disabled") as started:
        yield started


@pytest.mark.usefixtures("far")
def test_builds_refuse_an_open_cluster_unless_it_is_allowed(open_head: Head, tiny_images: Path, tmp_path: Path) -> None:
    """The command in a process of its own: this one is connected to the tests' own Ray."""
    program = (
        "import sys; from pipeline.ingest import exposure; exposure._is_loopback = lambda host: False\n"
        "from pipeline.cli import cli, run; sys.exit(run(cli, sys.argv[1:]))"
    )

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *map(str, words), "--quiet"]
        return subprocess.run(command, env=open_head.environment, capture_output=True, text=True, check=False)

    root = tmp_path / "root"
    refused = call("build", tiny_images, root, "--address", open_head.gcs)
    assert refused.returncode == 1
    assert f"the Ray cluster at {open_head.gcs} answers without a token" in refused.stderr
    assert not list(root.glob("snapshots/*"))
    assert open_head.get("/api/jobs/") == []  # nobody has connected

    wrong = call("build", tiny_images, root, "--address", open_head.dashboard, "--allow", "open-cluster")
    assert (wrong.returncode, "ray job submit" in wrong.stderr) == (2, True)

    allowed = call("build", tiny_images, root, "--address", open_head.gcs, "--allow", "open-cluster")
    assert allowed.returncode == 0, allowed.stderr
    words = ("export", root, "natural", tmp_path / "dest", "--address", open_head.gcs)
    assert call(*words).returncode == 1
    assert call(*words, "--allow", "open-cluster").returncode == 0


def test_allowing_it_is_no_part_of_what_a_snapshot_is(tiny_images: Path, tmp_path: Path) -> None:
    words = ["build", str(tiny_images), str(tmp_path / "root"), "--address", "none", "--quiet"]
    assert run(cli, words) == 0
    assert run(cli, [*words, "--allow", "open-cluster"]) == 0
    assert len(list((tmp_path / "root/snapshots").iterdir())) == 1
