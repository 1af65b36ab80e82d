"""No planted credential comes out: not on a screen, not in a log, not in a file below ROOT or DEST, not in an error.

Planted are: user and password and signature in URLs, an access key, a secret key, a session token and a Ray token in
the environment, and the same among the options of fsspec. Then everything is run, with tracebacks on, and every byte
that came out is searched.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import fsspec
import fsspec.config
import pytest
from fault_proxy import directory_server
from real_servers import free_port, s3
from serial_engine import serial_engine

import pipeline
from pipeline.cli import cli, run
from pipeline.errors import EvenshardError
from pipeline.ingest import source_files, source_trouble
from pipeline.store import redact, remote

__all__ = ["serial_engine"]

PASSWORD, SIGNATURE, KEY, SECRET, SESSION, TOKEN, OPTION = PLANTED = (
    "pw-planted-3kd9",
    "sig-planted-8s7d",
    "AKIAPLANTED4X7Q2M9ZT",
    "secret/planted+w8Fh3Zk2",
    "session-planted-h7Jq",
    "token-planted-5b2c9e",
    "option-planted-m4Xv",
)


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch, serial_engine: object) -> Iterator[None]:
    monkeypatch.setenv("EVENSHARD_TRACEBACK", "1")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(remote, "PAUSES", (0.01,))
    monkeypatch.setattr(source_trouble, "RETRY_PAUSES_S", (0.01,))
    monkeypatch.setattr(fsspec.config, "conf", {"s3": {"client_kwargs": {"aws_session_token": OPTION}}})
    forget_connections()
    yield
    forget_connections()


def forget_connections() -> None:
    source_files.filesystem.cache_clear()
    for protocol in ("s3", "http", "https"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


class Watch:
    """Runs commands and keeps all that they say."""

    def __init__(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self.said = ""
        self._capfd, self._caplog = capfd, caplog
        caplog.set_level(logging.INFO)

    def run(self, *words: object, code: int | None = 0) -> str:
        found = run(cli, [str(word) for word in words])
        out, err = self._capfd.readouterr()
        told = out + err + self._caplog.text
        assert code is None or found == code, told
        assert leaks(told) == [], (words[0], leaks(told), told)
        return told


@pytest.fixture
def watch(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Watch:
    return Watch(capfd, caplog)


def leaks(text: str | bytes) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    return [secret for secret in PLANTED for form in (secret, quote(secret, safe="")) if form.encode() in data]


def leaking_files(folder: Path) -> list[tuple[str, list[str]]]:
    found = [(str(path), leaks(path.read_bytes())) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [one for one in found if one[1]]


def with_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://user:{PASSWORD}@{rest}?X-Amz-Signature={SIGNATURE}"


def read_all(watch: Watch, root: object, dest: object, code: int | None = 0) -> None:
    """Every command that opens a ROOT."""
    for words in (
        ("stats", root), ("stats", root, "--rejects"), ("verify", root), ("verify", root, "--json"), ("history", root),
        ("manifests", root), ("plan", root), ("classes", root, "balanced"), ("report", root), ("pin", root, "paper"),
        ("pin", root), ("gc", root, "--keep", "1"), ("gc", root, "--keep", "1", "--delete"), ("diff", root),
        ("export", root, "natural", dest, "--address", "none"), ("manifest", root, "extra", "--policy", "natural"),
        ("schedule", root, "progressive", "--epochs", "9"),
    ):  # fmt: skip
        watch.run(*words, code=None if words[0] in ("diff", "gc", "pin") else code)


def test_a_root_and_a_source_on_s3(
    tiny_images: Path, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3(tiny_images) as endpoint:
        for name, value in (("ACCESS_KEY_ID", KEY), ("SECRET_ACCESS_KEY", SECRET), ("SESSION_TOKEN", SESSION)):
            monkeypatch.setenv(f"AWS_{name}", value)
        forget_connections()
        source, root = "s3://bucket/root", "s3://bucket/built"
        watch.run("build", source, root)
        watch.run("nightly", source, root, "--sample", "1")
        read_all(watch, root, "s3://bucket/dest")
        bucket = fsspec.filesystem("s3")
        everything = {name: bucket.cat_file(name) for name in bucket.find("bucket")}
        assert len(everything) > 61
        assert {name: leaks(data) for name, data in everything.items() if leaks(data)} == {}
        assert endpoint
    # The server is gone: everything fails, and says where.
    forget_connections()
    for words in (("build", source, root), ("nightly", source, root), ("stats", root), ("verify", root)):
        watch.run(*words, code=1)
    watch.run("build", tiny_images, root, code=1)


@pytest.mark.parametrize("error", ["SignatureDoesNotMatch", "AccessDenied"])
def test_wrong_credentials(error: str, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that refuses, and tells back what it got, as some do."""
    body = f"<Error><Code>{error}</Code><Message>{KEY} {SECRET}</Message></Error>".encode()
    (tmp_path / "answer").write_bytes(body)
    for name, value in (("ACCESS_KEY_ID", KEY), ("SECRET_ACCESS_KEY", SECRET), ("SESSION_TOKEN", SESSION)):
        monkeypatch.setenv(f"AWS_{name}", value)
    with refusing_server(body) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        for words in (
            ("build", "s3://bucket/photos", tmp_path / "root"), ("nightly", "s3://bucket/photos", tmp_path / "root"),
            ("build", tmp_path, "s3://bucket/root"), ("stats", "s3://bucket/root"), ("verify", "s3://bucket/root"),
        ):  # fmt: skip
            watch.run(*words, code=1)
    assert [one for one in leaking_files(tmp_path) if not one[0].endswith("/answer")] == []


def refusing_server(body: bytes) -> object:
    from fault_proxy import FileHandler, serving

    class Handler(FileHandler):
        def answer(self, *, with_body: bool) -> None:
            self.send(403, body, with_body)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send(403, body)

        do_POST = do_PUT

    return serving(Handler, root=Path("/nowhere"))


def test_a_source_on_the_web_with_a_password_and_a_signature(tiny_images: Path, tmp_path: Path, watch: Watch) -> None:
    site = tmp_path / "site"
    shutil.copytree(tiny_images, site)
    names = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.*"))]
    text = io.StringIO()
    csv.writer(text).writerows([("path", "label"), *((name, name.split("/")[0]) for name in names), ("no.jpg", "fig")])
    (site / "photos.csv").write_text(text.getvalue())
    root = tmp_path / "root"
    with directory_server(site) as url:
        table, images = with_secrets(f"{url}/photos.csv"), url.replace("://", f"://user:{PASSWORD}@")
        told = watch.run("build", table, root, "--images", images)
        assert "61" in told
        watch.run("nightly", table, root, "--images", images, "--max-rejects", "5", "--sample", "1")
        config = tmp_path / "build.yaml"
        config.write_text(json.dumps({"source": table, "root": str(root), "images": images, "max_rejects": 5}))
        watch.run("nightly", "--config", config)
    read_all(watch, root, tmp_path / "dest")
    (site / "photos.csv").unlink()
    watch.run("nightly", "--config", config, code=1)  # nobody listens any more
    config.unlink()
    assert leaking_files(tmp_path) == []


def test_hosts_that_cannot_be_reached(tmp_path: Path, tiny_images: Path, watch: Watch) -> None:
    dead = with_secrets(f"http://127.0.0.1:{free_port()}/root")
    read_all(watch, dead, tmp_path / "dest", code=1)
    watch.run("build", dead, tmp_path / "root", code=None)
    watch.run("build", tiny_images, dead, code=None)
    watch.run("nightly", dead, tmp_path / "root", code=1)
    watch.run("nightly", tiny_images, dead, code=1)
    watch.run("build", tiny_images, tmp_path / "root")
    watch.run("export", tmp_path / "root", "natural", dead, code=1)
    watch.run("build", tiny_images, tmp_path / "x", "--images", dead, code=None)
    watch.run("report", tmp_path / "root", "--source", dead, code=None)
    for text in (
        f"gopher://user:{PASSWORD}@h/x?sig={SIGNATURE}",
        f"simplecache::{dead}",
        f"s3://{KEY}:{SECRET}@bucket/x",
    ):
        watch.run("build", text, tmp_path / "y", code=None)
        watch.run("build", tiny_images, text, code=None)
        watch.run("stats", text, code=None)
    assert leaking_files(tmp_path) == []


def test_a_build_file_with_a_mistake(tmp_path: Path, watch: Watch) -> None:
    url = with_secrets("https://host/photos")
    config = tmp_path / "build.yaml"
    for text in (f"source: {url}\nroot: 3", f"source: ['{url}']\nroot: x", f"'{url}': x", f"source: {url}: x"):
        config.write_text(text)
        watch.run("nightly", "--config", config, code=2)
    with pytest.raises(EvenshardError) as told:
        pipeline.build([url], tmp_path / "root")  # type: ignore[arg-type]
    assert leaks(str(told.value)) == []


def test_the_address_of_a_cluster(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.ingest.engine import RayEngine

    monkeypatch.setattr("pipeline.ingest.engine.ray.is_initialized", lambda: False)
    monkeypatch.setattr("pipeline.ingest.engine.ray.init", fail)
    monkeypatch.setattr("pipeline.ingest.engine.ray.shutdown", lambda: None)
    with pytest.raises(EvenshardError) as told:
        RayEngine(address=f"ray://user:{PASSWORD}@127.0.0.1:1").__enter__()
    assert "could not start or reach ray://127.0.0.1:1" in str(told.value)
    assert leaks(str(told.value)) == []


def fail(address: str, **_: object) -> None:
    raise ConnectionError(f"cannot reach {address}")


def test_a_ray_job_with_credentials_in_its_command_line_is_refused(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray lists the command line of every job, to whoever may list jobs."""
    facts = {"runtime_env": {"env_vars": {"X": SECRET}}, "metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(facts))
    told = watch.run("nightly", with_secrets("https://host/photos"), tmp_path / "root", code=2)
    assert "--config" in told
    assert list(tmp_path.iterdir()) == []
    assert watch.run("stats", tmp_path / "root", code=1)


@pytest.mark.parametrize(
    "text",
    [
        f"s3fs.S3FileSystem(key='{KEY}', secret='{OPTION}')",
        f"{{'client_kwargs': {{'aws_session_token': '{SESSION}'}}, 'token': \"{OPTION}\"}}",
        f"GET /x?X-Amz-Credential={OPTION}&X-Amz-Signature={SIGNATURE} HTTP/1.1",
        f"account_key={OPTION}; sas_token={SIGNATURE}",
        f"Authorization: Bearer {OPTION}",
        f"the variable says {TOKEN}",
    ],
)
def test_redact_knows_the_shapes_of_credentials(text: str) -> None:
    assert leaks(redact(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "answers without a token: whoever reaches it", "s3://bucket/key/a.jpg", "http://host:80/a", "token ring",
        "a = b", "/data/secret photos/x.jpg", "no key: 'a'", "tokens=3", "password reset", "class 'secret sauce': 3",
    ],
)  # fmt: skip
def test_redact_leaves_other_text_alone(text: str) -> None:
    assert redact(text) == text
