"""A flipped bit is never read: it is detected by name, or lies where nobody reads; and verify finds every one."""

from __future__ import annotations

from pathlib import Path

import pytest
from flips import emitted, files_by_kind, places, try_flip

import pipeline
from pipeline.verify import verify

pytestmark = pytest.mark.usefixtures("local_ray")

NUM_FLIPS = 60


@pytest.fixture(scope="module")
def root(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    root = tmp_path_factory.mktemp("flips") / "root"
    pipeline.build(tiny_images, root, workers=2, shard_samples=8)
    return root


def test_every_flipped_bit_is_detected_or_harmless_and_verify_finds_all(root: Path) -> None:
    assert verify(root).sound
    assert list(files_by_kind(root)) == ["shards", "index", "tables", "manifests", "snapshots"]
    expected = emitted(root)
    flips = [try_flip(root, *place, expected) for place in places(root, NUM_FLIPS, seed=0)]
    assert [flip for flip in flips if not flip.good] == []
    assert sum(flip.reading == "detected" for flip in flips) > NUM_FLIPS // 2
    assert verify(root).sound  # every bit is back
    assert emitted(root) == expected
