"""Images that crash, hang or bloat their decoder: isolated and rejected, and nothing else is, whoever kills what."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from conftest import draw_image
from independent_checker import check_root, digests_of
from poison import KINDS, Poisonable, poisoned

import pipeline
from pipeline.config import BuildConfig
from pipeline.errors import EngineError
from pipeline.images import Facts, ImageRejected, Inspection, Limits
from pipeline.schema import Reason

LIMITS = Limits(max_pixels=1 << 20, max_bytes=1 << 20, max_cpu_s=1)
INSPECTION = Poisonable(check="decode", limits=LIMITS)
TOLD = {
    "segv": "its decoder died by SIGSEGV",
    "abort": "its decoder died by SIGABRT",
    "fpe": "its decoder died by SIGFPE",
    "exit": "its decoder ended its process with exit code 3",
    "spin": "its decoder took more than 1 s of processor time",
    "spin-held": "its decoder took more than 1 s of processor time",
    "bloat": f"its decoder wants more than {LIMITS.memory_bytes >> 20} MiB of memory",
}


def image(number: int = 0) -> bytes:
    stream = BytesIO()
    draw_image(1, number).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def poisonous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of this test meet decoders that can be poisoned."""

    def inspection(config: BuildConfig) -> Inspection:
        return Poisonable(check=config.check, limits=LIMITS)

    monkeypatch.setattr(BuildConfig, "inspection", property(inspection))


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_dies_of_poison_and_the_image_is_rejected(kind: str) -> None:
    with INSPECTION.open(attempt=2) as inspector:
        with pytest.raises(ImageRejected) as caught:
            inspector.inspect(poisoned(image(), kind), "a.png")
        assert (caught.value.reason, caught.value.detail) == (Reason.DECODER_CRASH, TOLD[kind])
        assert isinstance(inspector.inspect(image(), "b.png"), Facts)


def test_a_bloated_decoder_is_judged_at_the_first_attempt() -> None:
    with INSPECTION.open(attempt=1) as inspector, pytest.raises(ImageRejected, match=r"decoder-crash: .* MiB"):
        inspector.inspect(poisoned(image(), "bloat"), "a.png")


def test_children_say_what_the_decoder_says() -> None:
    with INSPECTION.open(attempt=1) as here, INSPECTION.open(attempt=2) as there:
        for number in range(5):
            assert here.inspect(image(number), "") == there.inspect(image(number), "")
        for inspector in (here, there):
            with pytest.raises(ImageRejected, match="truncated: no IEND chunk"):
                inspector.inspect(image()[:-20], "")


def test_an_image_whose_child_is_killed_is_not_rejected(tmp_path: Path) -> None:
    with INSPECTION.open(attempt=2) as inspector:
        once = poisoned(image(), f"killed-once;{tmp_path / 'note'}")
        assert isinstance(inspector.inspect(once, "a.png"), Facts)
        assert (tmp_path / "note").exists()
        with pytest.raises(EngineError, match=r"a\.png: its decoder ended 5 times, the last time by SIGKILL\. "):
            inspector.inspect(poisoned(image(), "killed"), "a.png")


def test_a_decoder_that_waits_is_stopped_and_not_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.images.isolated.NUM_LOSSES", 2)
    hasty = Poisonable(check="decode", limits=_Hasty(max_pixels=1 << 20, max_cpu_s=1))
    told = pytest.raises(EngineError, match="because it had waited 1 s without using the processor")
    with hasty.open(attempt=2) as inspector, told:
        inspector.inspect(poisoned(image(), "stuck"), "a.png")


class _Hasty(Limits):
    @property
    def wall_s(self) -> float:
        return 1.0


@pytest.mark.usefixtures("poisonous", "local_ray")
def test_a_build_rejects_the_poison_and_nothing_else(tiny_images: Path, tmp_path: Path) -> None:
    """B1, B2: the shards are those of a build without poison and without kills."""
    source = tmp_path / "photos"
    shutil.copytree(tiny_images, source)
    kills = poisoned(image(300), f"killed-once;{tmp_path / 'note'}")  # the worker, while it decodes others too
    (source / "apple" / "innocent.png").write_bytes(kills)
    kinds = ("segv", "abort", "spin", "bloat")
    for number, kind in enumerate(kinds):
        (source / "bread" / f"{kind}.png").write_bytes(poisoned(image(200 + number), kind))
    pipeline.build(source, tmp_path / "root", shard_samples=20)
    rows, rejects = check_root(tmp_path / "root")
    assert {row["path"]: (row["reason"], row["detail"]) for row in rejects} == {
        f"bread/{kind}.png": ("decoder-crash", TOLD[kind]) for kind in kinds
    }
    assert (tmp_path / "note").exists()
    for kind in kinds:
        (source / "bread" / f"{kind}.png").unlink()
    pipeline.build(source, tmp_path / "calm", shard_samples=20)
    # The listing decides which first shards are written, so some of the root's were superseded.
    assert shards_of(tmp_path / "calm").items() <= shards_of(tmp_path / "root").items()
    assert len(rows) == 62


def shards_of(root: Path) -> dict[str, str]:
    return {path: digest for path, digest in digests_of(root).items() if path.startswith(("shards/", "index/"))}


@pytest.mark.usefixtures("poisonous", "local_ray")
def test_a_unit_that_always_loses_its_worker_ends_the_build_by_name(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "0.png").write_bytes(poisoned(image(), "killed"))
    with pytest.raises(EngineError, match=re.escape("a/0.png: its decoder ended 5 times, the last time by SIGKILL")):
        pipeline.build(tmp_path / "photos", tmp_path / "root")
    assert not list((tmp_path / "root").glob("snapshots/*"))


THREADS = """
import threading
from pipeline.images import Limits
from pipeline.images.watch import limit_memory

def addresses():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

limit_memory(Limits())
before, barrier = addresses(), threading.Barrier(33)

def hold():
    data = [bytearray(3000) for _ in range(1000)]
    barrier.wait()
    barrier.wait()

threads = [threading.Thread(target=hold) for _ in range(32)]
for thread in threads:
    thread.start()
barrier.wait()
print((addresses() - before) >> 20)
barrier.wait()
"""


def test_threads_that_read_ahead_leave_the_decoder_its_memory() -> None:
    """32 of them reserve their stacks of 8 MiB and what they hold, not 64 MiB each for what they may come to hold."""
    told = subprocess.run([sys.executable, "-c", THREADS], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert int(told) < 32 * 8 + 3 * 64 + 200
