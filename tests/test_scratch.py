"""Columns in files without a name: like any other array, and not resident when a step has ended."""

from __future__ import annotations

import errno
import gc
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from independent_checker import digests_of
from serial_engine import serial_engine

import pipeline
import pipeline.ingest.run
from pipeline.errors import SourceError, StoreError
from pipeline.ingest import scratch as module
from pipeline.ingest.scratch import Scratch

__all__ = ["serial_engine"]


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_columns_keep_their_values_and_leave_memory_between_steps() -> None:
    scratch = Scratch()
    before = resident_mb()
    column, wide = scratch.zeros(8 << 20, np.uint64), scratch.zeros((4 << 20, 4), np.uint64)
    assert not column.any()
    column[:] = np.arange(len(column))
    wide[:, 1] = 7
    assert scratch.num_bytes == column.nbytes + wide.nbytes
    assert resident_mb() > before + 90
    scratch.rest()
    assert resident_mb() < before + 20
    assert (int(column[12345]), int(column[-1])) == (12345, len(column) - 1)
    assert wide[5].tolist() == [0, 7, 0, 0]


def test_a_column_of_two_dimensions_lies_by_itself() -> None:
    assert Scratch(min_bytes=0).zeros((100, 4), np.uint64)[:, 0].flags.c_contiguous
    assert Scratch().zeros((100, 4), np.uint64)[:, 0].flags.c_contiguous


def test_space_is_given_back_with_the_last_column() -> None:
    scratch = Scratch(min_bytes=0)
    open_before = len(os.listdir("/proc/self/fd"))
    first, second = scratch.zeros(1000, np.int8), scratch.keep(np.arange(10))
    assert scratch.num_bytes == 1080
    assert len(os.listdir("/proc/self/fd")) <= open_before + 2
    del first
    gc.collect()
    assert (scratch.num_bytes, second.tolist()) == (80, list(range(10)))


def test_small_columns_need_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda **_: pytest.fail("a file was made"))
    assert Scratch().zeros(1000, np.int64).sum() == 0
    assert Scratch(min_bytes=0).zeros(0, np.int64).shape == (0,)


@pytest.mark.parametrize("values", [["a", "", "Ünï", "long" * 30] * 50, [], list(range(90))])
def test_a_kept_column_is_the_same_column(values: list[Any]) -> None:
    column = pa.array(values, None if values else pa.string())
    scratch = Scratch(min_bytes=1)
    kept = scratch.keep_array(column)
    kept.validate(full=True)
    assert kept.equals(column)
    assert (scratch.num_bytes > 0) == bool(values)
    for other in (column.slice(1), pa.array([*values, None])):
        assert scratch.keep_array(other) is other


def test_a_full_disk_is_told_when_the_column_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(
        StoreError, match=r"16 MiB of temporary space are needed in .*: No space left on device; set TMP"
    ):
        Scratch().zeros(2 << 20, np.uint64)


def test_where_space_cannot_be_reserved_a_column_is_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(module.os, "posix_fallocate", unable)
    column = Scratch(min_bytes=0).zeros(100, np.int32)
    column[:] = 3
    assert column.sum() == 300


@pytest.mark.usefixtures("serial_engine")
def test_builds_on_files_are_builds_in_memory(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every column a file, on a first build and on a rebuild."""
    made: list[Scratch] = []

    def all_in_files() -> Scratch:
        made.append(Scratch(min_bytes=1))
        return made[-1]

    photos = tmp_path / "photos"
    shutil.copytree(tiny_images, photos)
    for step in range(2):
        for root, make in (("memory", Scratch), ("files", all_in_files)):
            monkeypatch.setattr(pipeline.ingest.run, "Scratch", make)
            summary = pipeline.build(photos, tmp_path / root, shard_samples=8, allow=("shrink",))
            assert (summary.number, summary.changed) == (step + 1, True)
        assert digests_of(tmp_path / "memory") == digests_of(tmp_path / "files")
        first, *_, last = sorted(photos.rglob("*.jpg"))
        first.unlink()
        last.write_bytes(last.read_bytes() + b"changed")
    assert len(made) == 2
    assert all(scratch.num_bytes == 0 for scratch in made), "a build left columns behind"


@pytest.mark.parametrize("min_bytes", [1, 1 << 20])
def test_joined_texts_are_the_texts_one_after_the_other(min_bytes: int) -> None:
    texts = [["a", "", "Ünï"], [], ["b" * 70], ["", ""], ["x", "y", "z"]]
    chunks = [pa.array(part, pa.string()) for part in texts]
    chunks[4] = pa.array(["no", *texts[4], "no"], pa.string()).slice(1, 3)
    joined = Scratch(min_bytes=min_bytes).join_texts(chunks)
    joined.validate(full=True)
    assert joined.to_pylist() == [text for part in texts for text in part]
    assert not chunks, "they are there twice"
    assert Scratch().join_texts([]).to_pylist() == []


def test_more_text_than_an_array_holds_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_TEXT_BYTES", 5)
    assert len(Scratch().join_texts([pa.array(["12345"])])) == 1
    with pytest.raises(SourceError, match="paths of 2 files take 6 bytes, and one build holds at most 5"):
        Scratch().join_texts([pa.array(["123", "456"])])
