"""Commits: one winner, nothing published in part, and an unknown outcome is looked up, never deleted."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem
from tiny_snapshot import write_snapshot

from pipeline.errors import CommitError, LostRaceError, StoreError
from pipeline.ingest.commit import commit, probe
from pipeline.schema import SnapshotRecord, index_path, manifest_path, snapshot_path, table_path, tar_path
from pipeline.snapshot import Snapshot, encode_record, newest_number, open_snapshot, record_id
from pipeline.store import Store


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_snapshot(tmp_path_factory.mktemp("tiny") / "root")


@pytest.fixture
def copy(tiny: Snapshot, tmp_path: Path) -> Snapshot:
    shutil.copytree(tiny.root, tmp_path / "copy")
    return open_snapshot(tmp_path / "copy")


def successor(snapshot: Snapshot, build_id: str = "1" * 64) -> SnapshotRecord:
    return replace(snapshot.record, number=snapshot.number + 1, parent=snapshot.id, build_id=build_id)


# ---- Publishing


def test_the_first_snapshot_and_the_next_are_published(copy: Snapshot) -> None:
    Path(copy.root, snapshot_path(1)).unlink()
    commit(copy.store, copy.record)
    assert open_snapshot(copy.root).id == copy.id
    commit(copy.store, successor(copy))
    assert open_snapshot(copy.root).record == successor(copy)


def test_the_loser_is_told_who_won(copy: Snapshot) -> None:
    ours, theirs = successor(copy), successor(copy, "2" * 64)
    commit(copy.store, theirs)
    with pytest.raises(LostRaceError, match=rf"another build published snapshot 2 in .*its id is {record_id(theirs)}"):
        commit(copy.store, ours)
    assert open_snapshot(copy.root).record == theirs


def test_committing_what_is_there_is_no_error(copy: Snapshot) -> None:
    commit(copy.store, successor(copy))
    commit(copy.store, successor(copy))
    assert newest_number(copy.store) == 2


def test_of_racing_builds_one_wins(copy: Snapshot) -> None:
    def attempt(number: int) -> bool:
        try:
            commit(Store(copy.root), successor(copy, str(number) * 64))
        except LostRaceError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(attempt, range(4)))
    assert won.count(True) == 1
    assert open_snapshot(copy.root).record.build_id == str(won.index(True)) * 64


@pytest.mark.parametrize(("number", "message"), [(3, "there is no snapshot 2"), (1, "its parent must be ''")])
def test_numbers_do_not_skip(copy: Snapshot, number: int, message: str) -> None:
    with pytest.raises(CommitError, match=message):
        commit(copy.store, replace(successor(copy), number=number))


def test_the_parent_is_the_snapshot_before(copy: Snapshot) -> None:
    with pytest.raises(CommitError, match=f"its parent must be '{copy.id}', the snapshot before it, not 'else'"):
        commit(copy.store, replace(successor(copy), parent="else"))
    assert newest_number(copy.store) == 1


# ---- Everything it names is there


def named(snapshot: Snapshot) -> dict[str, str]:
    """One path of each kind."""
    record, shard = snapshot.record, snapshot.shards.to_pylist()[-1]
    return {
        "classes": table_path(record.classes.sha256),
        "shards": table_path(record.shards.sha256),
        "rejects": table_path(record.rejects.sha256),
        "samples": table_path(record.samples["test"].sha256),
        "manifest": manifest_path(record.manifests["small"].sha256),
        "targets": table_path(snapshot.manifest("small").document.targets.sha256),
        "tar": tar_path(shard["tar_sha256"]),
        "index": index_path(shard["index_sha256"]),
    }


KINDS = ("classes", "shards", "rejects", "samples", "manifest", "targets", "tar", "index")


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_stops_the_commit(copy: Snapshot, kind: str) -> None:
    path = named(copy)[kind]
    Path(copy.root, path).unlink()
    with pytest.raises(CommitError, match=rf"not published .*{path}"):
        commit(copy.store, successor(copy))
    assert newest_number(copy.store) == 1


@pytest.mark.parametrize("kind", ["rejects", "samples", "tar", "index"])
def test_a_cut_file_stops_the_commit(copy: Snapshot, kind: str) -> None:
    path = named(copy)[kind]
    os.truncate(Path(copy.root, path), 9)
    with pytest.raises(CommitError, match=rf"1 are not there as they were written: {path} \(9 bytes, expected \d+\)"):
        commit(copy.store, successor(copy))


@pytest.mark.parametrize("kind", ["classes", "shards", "manifest", "targets"])
def test_a_damaged_file_that_is_read_stops_the_commit(copy: Snapshot, kind: str) -> None:
    path = named(copy)[kind]
    os.truncate(Path(copy.root, path), 9)
    with pytest.raises(CommitError, match=rf"snapshot 2 was not published .*{path} .*damaged"):
        commit(copy.store, successor(copy))
    assert newest_number(copy.store) == 1


def test_many_missing_files_are_counted(copy: Snapshot) -> None:
    shutil.rmtree(Path(copy.root, "shards"))
    with pytest.raises(CommitError, match=r"7 are not there.* \(missing, expected \d+\), .* and 2 more; run the build"):
        commit(copy.store, successor(copy))


# ---- Unknown outcomes


class Unsure(Store):
    """A store whose reply to ``create`` is lost, after ``landed`` was written."""

    landed: bytes | None = None

    def create(self, path: str, data: bytes) -> None:
        if self.landed is not None:
            super().create(path, self.landed)
        raise StoreError("connection reset")


def unsure(copy: Snapshot, landed: SnapshotRecord | None) -> Unsure:
    store = Unsure(copy.root)
    store.landed = None if landed is None else encode_record(landed)
    return store


def test_a_lost_reply_to_a_write_that_landed_is_success(copy: Snapshot) -> None:
    commit(unsure(copy, successor(copy)), successor(copy))
    assert newest_number(copy.store) == 2


def test_a_lost_reply_behind_the_write_of_another_is_a_lost_race(copy: Snapshot) -> None:
    with pytest.raises(LostRaceError, match="another build published snapshot 2"):
        commit(unsure(copy, successor(copy, "2" * 64)), successor(copy))


def test_a_write_that_did_not_land_is_a_failed_commit(copy: Snapshot) -> None:
    with pytest.raises(CommitError, match=r"00000002\.json was not published in .*: connection reset; run the build"):
        commit(unsure(copy, None), successor(copy))


def test_what_cannot_be_read_back_is_unknown_and_stays(copy: Snapshot) -> None:
    store = unsure(copy, None)
    store.landed = b"half"
    with pytest.raises(CommitError, match=r"whether snapshots/00000002\.json was published .* is unknown"):
        commit(store, successor(copy))
    assert store.read(snapshot_path(2)) == b"half"


# ---- Probing


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_sound_root_passes_and_nothing_is_left(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "root") if kind == "local" else "memory://probed"
    store = Store.open(url, create=True)
    probe(store)
    probe(store)
    assert store.list("") == []


def test_a_root_of_something_else_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    store = Store.open(tmp_path, create=True)
    with pytest.raises(StoreError, match="ROOT is not empty and holds no snapshot"):
        probe(store)
    assert os.listdir(tmp_path) == ["photos"]


def test_a_store_that_ignores_create_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = MemoryFileSystem.pipe_file
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value, mode="": pipe(self, path, value))
    store = Store.open("memory://forgetful", create=True)
    with pytest.raises(
        StoreError, match=r"memory://forgetful cannot hold snapshots: .*took two writes of one new name"
    ):
        probe(store)
    assert store.list("") == []


def test_a_driver_that_looks_and_then_writes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", AbstractFileSystem.pipe_file)
    with pytest.raises(StoreError, match="only looks first and then writes"):
        probe(Store.open("memory://racy", create=True))


def test_a_published_record_holds_no_clock_and_no_place(copy: Snapshot) -> None:
    commit(copy.store, successor(copy))
    values: dict[str, Any] = json.loads(copy.store.read(snapshot_path(2)))
    assert copy.root not in json.dumps(values)
    assert not {"time", "date", "host", "url"} & values.keys()
