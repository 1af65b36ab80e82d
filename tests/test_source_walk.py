"""A listing that workers share: the same as without them, and shared only where it pays."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import make_config
from pipeline.errors import SourceError
from pipeline.ingest import source_walk
from pipeline.ingest.source import Listing, list_source
from pipeline.ingest.source_files import open_place
from pipeline.ingest.source_walk import SharedWalk, Walked, walk_folders
from pipeline.ingest.work import Work
from pipeline.store import Store


class Inline:
    """Workers of this process, at once; ``folders`` are those that they listed themselves."""

    start_s = 0.0

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.odd: list[str] = []
        self.num_units = 0
        self.answers: list[int] = []  # files of each

    def prepare(self) -> None: ...

    def share(
        self, function: Callable[..., Iterator[Any]], units: Iterable[tuple[str, tuple[Any, ...]]]
    ) -> Iterator[Any]:
        for _, arguments in reversed(list(units)):  # in another order than they were asked for
            self.num_units += 1
            for item in function(*arguments, attempt=1):
                if isinstance(item, Walked):
                    self.folders += item.folders
                    self.odd += item.odd
                    self.answers.append(sum(item.num_files))
                    yield item


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.fsencode(name) * (1 + len(os.listdir((folder / name).parent))))  # not all alike


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 classes in two splits, and one folder of every kind that is odd."""
    root = tmp_path / "photos"
    for split in ("train", "test"):
        put(root, *(f"{split}/c{number:02}/{image}.jpg" for number in range(20) for image in range(number % 4 + 1)))
        put(root, *(f"{split}/deep/d{number:02}/x/{image}.png" for number in range(18) for image in range(2)))
    put(root, "train/loose.jpg", "train/c03/notes\udcff.txt", "train/c04/sub/1.jpg", "train/c05/a.tar")
    put(root, "train/\udcfe/1.jpg", "train/Ünï/ä.jpg")
    (root / "train/c06/empty.jpg").touch()
    (root / "train/c07/large.jpg").write_bytes(b"x" * 5_000)
    (root / "train/hollow").mkdir()
    (root / "train/c08/link.jpg").symlink_to(root / "train/c09/0.jpg")
    (root / "train/c10/away.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (root / "train/c11/folder").symlink_to(root / "train/c12")
    os.mkfifo(root / "train/c13/pipe")
    return root


def listed(source: Path, workers: Any = None, **options: Any) -> Listing:
    return list_source(
        make_config(source=source, root="memory://root", max_image_bytes=4_000, **options), None, workers
    )


def same(one: Listing, two: Listing) -> bool:
    return (
        one.references.equals(two.references)
        and one.rejects.equals(two.rejects)
        and one.class_names == two.class_names
        and one.notices == two.notices
    )


@pytest.mark.parametrize("label_from", ["path", "top"])
@pytest.mark.parametrize("split_from", ["top", "none"])
def test_workers_change_nothing(photos: Path, label_from: str, split_from: str) -> None:
    options = {"source_kind": "folder", "label_from": label_from, "split_from": split_from}
    workers = Inline()
    alone = listed(photos, **options)
    assert same(listed(photos, workers, **options), alone)
    assert alone.references.num_rows > 150
    assert alone.rejects.num_rows >= 7
    assert len(workers.folders) > 50, "or nothing was shared"
    assert len(workers.odd) >= 7, "or nothing odd met a worker"


def test_files_beside_class_folders_have_no_label_there_either(tmp_path: Path) -> None:
    names = ["".join(pair) for pair in itertools.product("tT", "rR", "aA", "iI", "n")]
    put(tmp_path, *(f"{name}/{file}" for name in names for file in ("loose.jpg", "c/1.jpg")))
    workers = Inline()
    options = {"split_from": "top", "label_from": "path"}
    assert same(listed(tmp_path, workers, **options), listed(tmp_path, **options))
    assert len(workers.folders) == 2 * len(names)


def test_a_tar_among_images_stops_a_shared_walk(tmp_path: Path) -> None:
    put(tmp_path, *(f"c{number:02}/1.jpg" for number in range(20)), "c13/a.tar")
    for workers in (None, Inline()):
        with pytest.raises(SourceError, match=r"c13/a\.tar"):
            listed(tmp_path, workers)


def test_a_class_below_two_parents_stops_a_shared_walk(tmp_path: Path) -> None:
    put(tmp_path, *(f"p{parent}/c{number:02}/1.jpg" for number in range(20) for parent in range(2)))
    for workers in (None, Inline()):
        with pytest.raises(SourceError, match="different parents"):
            listed(tmp_path, workers)


def test_folders_within_shared_folders_are_shared_in_turn(photos: Path) -> None:
    workers = Inline()
    listed(photos, workers, source_kind="folder", label_from="path", split_from="top")
    assert {f"{split}/deep/d{n:02}/x" for split in ("train", "test") for n in range(18)} <= set(workers.folders)


def test_few_folders_are_not_shared(tmp_path: Path) -> None:
    put(tmp_path, *(f"c{number}/1.jpg" for number in range(source_walk.MIN_SHARED - 1)))
    workers = Inline()
    assert listed(tmp_path, workers).references.num_rows == source_walk.MIN_SHARED - 1
    assert workers.num_units == 0


def test_units_are_many_and_bounded(tmp_path: Path) -> None:
    workers = Inline()
    walk = SharedWalk(open_place(str(tmp_path)), 100, workers)
    folders = [f"c{number:05}" for number in range(20_000)]
    put(tmp_path, *(f"{folder}/1.jpg" for folder in folders[:100]))
    assert [len(found.folders) for found in walk.list(folders[:100])] == [4] * 25
    assert -(-len(folders) // source_walk.MAX_BATCH) > source_walk.NUM_BATCHES, "or the bound below is not met"
    units: list[Any] = []
    workers.share = lambda function, given: iter(units.extend(given) or ())  # type: ignore[method-assign, func-returns-value]
    list(walk.list(folders))
    assert [len(arguments[1]) for _, arguments in units[:-1]] == [source_walk.MAX_BATCH] * (len(units) - 1)
    assert [folder for _, arguments in units for folder in arguments[1]] == folders


def test_an_answer_is_bounded_and_leaves_the_rest_to_others(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are told by name: the largest may be next to each other, and their files would be one answer."""
    options = {"source_kind": "folder", "label_from": "path", "split_from": "top"}
    alone = listed(photos, **options)
    monkeypatch.setattr(source_walk, "MAX_FILES", 4)
    monkeypatch.setattr(source_walk, "NUM_BATCHES", 1)
    workers = Inline()
    assert same(listed(photos, workers, **options), alone)
    assert workers.num_units > 10
    assert max(workers.answers) < 4 + 4  # a folder is not cut: the largest of these holds 4
    assert len(set(workers.folders)) == len(workers.folders), "a folder was listed twice"


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


def test_a_walk_is_shared_when_workers_will_have_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, workers = Clock(), Inline()
    prepared: list[float] = []
    workers.start_s = 2.0
    workers.prepare = lambda: prepared.append(clock.now_s)  # type: ignore[method-assign]
    monkeypatch.setattr(source_walk, "time", clock)
    walk = SharedWalk(open_place(str(tmp_path)), 100, workers)
    due: list[float] = []
    for now_s in (100.5, 101.5, 102.0, 103.4, 103.6):
        clock.now_s = now_s
        assert not walk.is_due(source_walk.MIN_SHARED - 1)
        due += [now_s] * walk.is_due(source_walk.MIN_SHARED)
    assert prepared == [101.5]
    assert due == [103.6]


def test_not_of_every_folder_something_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *(f"c{number}/{file}.jpg" for number in range(9) for file in range(2)))
    folders = [f"c{number}" for number in range(9)]
    monkeypatch.setattr(source_walk, "time", Clock())
    assert list(walk_folders(open_place(str(tmp_path)), folders, 100, attempt=1))[:-1] == [18]
    monkeypatch.setattr(source_walk, "TELL_EVERY_S", 0.0)
    assert list(walk_folders(open_place(str(tmp_path)), folders, 100, attempt=1))[:-1] == [2] * 9 + [0]


def test_a_folder_that_goes_away_stops_the_walk_by_name(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg")
    with pytest.raises(SourceError, match="folder 'gone' went away"):
        list(walk_folders(open_place(str(tmp_path)), ["a", "gone"], 100, attempt=1))


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_workers_of_every_kind_share_a_walk(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, engine: str
) -> None:
    """The real thing: what travels to workers and back."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if engine == "ray":
        request.getfixturevalue("local_ray")
    monkeypatch.setattr(Work, "start_s", 0.0)
    options = {"source_kind": "folder", "label_from": "path", "split_from": "top"}
    config = make_config(
        source=photos, root=tmp_path / "root", address="none" if engine == "processes" else None, workers=2, **options
    )
    told: list[tuple[str, int, int]] = []
    with Work(config, Store.open(config.root, create=True), None, lambda *step: told.append(step)) as work:
        assert same(listed(photos, work, **options), listed(photos, **options))
    assert told[0] == ("start", 0, 0)
    assert {step[0] for step in told[1:]} == {"list"}
    assert max(done for _, done, _ in told) > 100


def test_no_worker_starts_for_a_short_walk(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Work, "start_s", math.inf)
    config = make_config(source=photos, root=tmp_path / "root", address="none")
    with Work(config, Store.open(config.root, create=True), None, lambda *_: None) as work:
        monkeypatch.setattr(work, "_engine", lambda: pytest.fail("workers were started"))
        listed(photos, work, source_kind="folder", split_from="top", label_from="path")
