"""Collection: what is kept can be read at every moment, what nobody needs goes, and races end with one or the other."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from real_servers import s3
from tiny_snapshot import write_snapshot

from pipeline.cli import cli, run
from pipeline.errors import AlreadyExistsError, CommitError, IntegrityError, NotFoundError, StoreError, UsageError
from pipeline.ingest.collect import Collection, collect
from pipeline.ingest.commit import commit
from pipeline.ingest.pins import pin, read_pins, unpin
from pipeline.schema import SnapshotRecord, snapshot_path
from pipeline.snapshot import Snapshot, newest_number, numbers, open_snapshot
from pipeline.store import Store

DAY_S = 86_400
ONE = {"train": (30, 6, 1), "val": (0, 0, 0), "test": (2, 1, 0)}
TWO = {"train": (30, 6, 2), "val": (0, 0, 0), "test": (2, 1, 0)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots 1 and 2 of overlapping images; every file is a year old."""
    folder = tmp_path_factory.mktemp("collect")
    first = write_snapshot(folder / "root", ONE, {"natural": "natural"})
    other = write_snapshot(folder / "other", TWO, {"natural": "natural"})
    for path in other.files():
        copy_file(other.store, first.store, path)
    commit(first.store, replace(other.record, number=2, parent=first.id))
    age(first.store, 365)
    return folder / "root"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    shutil.copytree(made, tmp_path / "root")
    return Store.open(tmp_path / "root")


def copy_file(source: Store, dest: Store, path: str) -> None:
    if not dest.exists(path):
        dest.create(path, source.read(path))


def age(store: Store, days: float, *paths: str) -> None:
    """Make ``paths`` (all by default) as if written so many days ago."""
    then = time.time() - days * DAY_S
    for path in paths or store.list(""):
        os.utime(f"{store.root}/{path}", (then, then))


def only_in(store: Store, number: int) -> set[str]:
    """Files that this snapshot names and the other of the two does not."""
    mine, other = (set(files_of(store, n)) for n in (number, 3 - number))
    return mine - other


def files_of(store: Store, number: int) -> dict[str, int]:
    return open_snapshot(store, number).files()


def missing(store: Store, files: dict[str, int]) -> list[str]:
    return [path for path in files if not store.exists(path)]


def paths(done: Collection) -> set[str]:
    return {entry.path for entry in done.removed}


# ---- What goes and what stays


def test_what_only_older_snapshots_name_goes(store: Store) -> None:
    lonely, kept = only_in(store, 1), files_of(store, 2)
    sizes = sum(store.size(path) for path in lonely)
    done = collect(store, 1, delete=True)
    assert paths(done) == lonely
    assert (done.removed_bytes, done.collected, dict(done.kept)) == (sizes, (1,), {2: "the newest"})
    assert missing(store, kept) == []
    assert [path for path in lonely if store.exists(path)] == []
    assert {path.split("/")[0] for path in lonely} == {"shards", "index", "tables", "manifests"}


def test_a_dry_run_tells_the_same_and_touches_nothing(store: Store) -> None:
    before = store.list("")
    told = collect(store, 1)
    assert store.list("") == before
    done = collect(store, 1, delete=True)
    assert replace(done, deleted=False) == told


def test_records_stay_and_the_newest_is_still_found_by_probing(store: Store) -> None:
    collect(store, 1, delete=True)
    assert newest_number(store) == 2
    assert store.exists(snapshot_path(1))
    assert open_snapshot(store).number == 2


def test_a_second_collection_finds_nothing(store: Store) -> None:
    collect(store, 1, delete=True)
    again = collect(store, 1, delete=True)
    assert (again.removed, again.collected) == ((), (1,))
    assert again.kept == {2: "the newest"}


def test_keep_counts_from_the_newest(store: Store) -> None:
    done = collect(store, 2, delete=True)
    assert (done.removed, dict(done.kept)) == ((), {1: "one of the newest 2", 2: "the newest"})


def test_what_was_collected_is_not_kept_by_a_later_larger_keep(store: Store) -> None:
    collect(store, 1, delete=True)
    assert dict(collect(store, 2, delete=True).kept) == {2: "the newest"}


def test_a_snapshot_stays_for_the_grace_period_after_it_was_the_newest(store: Store) -> None:
    age(store, 1, snapshot_path(2))
    assert dict(collect(store, 1, delete=True).kept) == {
        1: "the newest at some time in the grace period",
        2: "the newest",
    }
    assert only_in(store, 1) != set()
    age(store, 8, snapshot_path(2))
    assert dict(collect(store, 1, delete=True).kept) == {2: "the newest"}


def test_young_files_stay_whoever_wrote_them(store: Store) -> None:
    young, old = (f"shards/{ab}/{ab * 32}.tar" for ab in ("ab", "cd"))
    store.create(young, b"a build is writing")
    store.create(old, b"a build died")
    age(store, 8, old)
    done = collect(store, 2, delete=True)
    assert [entry.path for entry in done.young] == [young]
    assert paths(done) == {old}
    assert store.exists(young)


@pytest.mark.parametrize("skew_days", [-30, 30])
def test_age_is_told_by_the_clock_of_the_storage(store: Store, monkeypatch: pytest.MonkeyPatch, skew_days: int) -> None:
    store.create(young := f"shards/ab/{'ab' * 32}.tar", b"x")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + skew_days * DAY_S)
    assert paths(collect(store, 1)) == only_in(store, 1)
    assert [entry.path for entry in collect(store, 1).young] == [young]


def test_unknown_files_are_reported_and_left(store: Store) -> None:
    strangers = [
        "notes.txt",
        "shards/ab/thesis.tar",
        f"shards/aa/{'ab' * 32}.tar",
        "tables/a/b.arrow",
        "snapshots/1.json",
    ]
    for path in strangers:
        store.create(path, b"mine")
    age(store, 365, *strangers)
    done = collect(store, 1, delete=True)
    assert sorted(entry.path for entry in done.unknown) == sorted(strangers)
    assert [path for path in strangers if not store.exists(path)] == []


def test_reports_logs_and_pins_are_ours_and_stay(store: Store) -> None:
    ours = ["reports/00000001/index.html", "runs/builds/x.json", "runs/other/x.arrow"]
    for path in ours:
        store.create(path, b"{}")
    age(store, 365, *ours)
    done = collect(store, 1, delete=True)
    assert done.unknown == ()
    assert [path for path in ours if not store.exists(path)] == []


def test_what_dead_builds_left_in_staging_goes(store: Store) -> None:
    dead, alive = Path(store.staging_dir()), Path(store.staging_dir())
    for folder in (dead, alive):
        (folder / "unit.tar").write_bytes(b"half")
    age(store, 8, f"staging/{dead.name}/unit.tar")
    assert collect(store, 2, delete=True).removed_bytes == 4
    assert not (dead / "unit.tar").exists()
    assert (alive / "unit.tar").exists()
    os.utime(dead, (0, 0))
    collect(store, 2, delete=True)
    assert (dead.exists(), alive.exists()) == (False, True)


def unit(tar: str, index: str) -> bytes:
    return json.dumps({"tar": {"sha256": tar}, "index": {"sha256": index}}).encode()


def test_unit_records_go_with_what_they_lead_to(store: Store) -> None:
    new, old = (open_snapshot(store, n).shards.to_pylist() for n in (2, 1))
    lost = next(row for row in old if row["tar_sha256"] not in {row["tar_sha256"] for row in new})
    for name, row in (("used", new[0]), ("stale", lost)):
        store.create(f"runs/units/{name}.json", unit(row["tar_sha256"], row["index_sha256"]))
    store.create("runs/units/gone.json", unit("0" * 64, "0" * 64))
    store.create("runs/units/empty.json", b'{"tar": null, "index": null}')
    store.create("runs/units/other.json", b"?")
    age(store, 8, *store.list("runs/units"))
    collect(store, 1, delete=True)
    assert store.list("runs/units") == [f"runs/units/{name}.json" for name in ("empty", "other", "used")]


def test_notes_on_the_sources_of_kept_snapshots_stay(store: Store) -> None:
    first, second = (f"runs/sources/{open_snapshot(store, n).id}.listing" for n in (1, 2))
    for path in (first, second):
        store.create(path, b"{}")
    age(store, 8, first, second)
    assert first in paths(collect(store, 1, delete=True))
    assert store.list("runs/sources") == [second]


# ---- Refusals


@pytest.mark.parametrize("keep", [0, -1])
def test_the_newest_is_always_kept(store: Store, keep: int) -> None:
    with pytest.raises(UsageError, match="keep at least 1 snapshot"):
        collect(store, keep, delete=True)


def test_a_root_without_a_snapshot_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/photo.jpg").write_text("mine")
    with pytest.raises(NotFoundError, match=r"no snapshot in .*: it holds images, so it is a source"):
        collect(str(tmp_path), 1, delete=True)


@pytest.mark.parametrize("kind", ["shards", "manifest", "pin", "pinned id", "pinned number", "record"])
def test_what_cannot_be_told_stops_it_before_anything_is_removed(store: Store, kind: str) -> None:
    record = open_snapshot(store, 2).record
    damaged = {
        "shards": f"tables/{record.shards.sha256}.arrow",
        "manifest": f"manifests/{record.manifests['natural'].sha256}.json",
        "record": snapshot_path(2),
        "pin": "pins/x.json",
    }
    body = {"name": "x", "snapshot": 1, "snapshot_id": "else", "format_version": 1}
    if kind in damaged:
        Path(store.root, damaged[kind]).parent.mkdir(exist_ok=True)
        Path(store.root, damaged[kind]).write_bytes(b"{}")
    else:
        store.create("pins/x.json", json.dumps(body | ({"snapshot": 7} if kind == "pinned number" else {})).encode())
    before = store.list("")
    with pytest.raises(IntegrityError):
        collect(store, 1, delete=True)
    assert store.list("") == before


# ---- Pins


def test_a_pin_keeps_its_snapshot_until_it_is_removed(store: Store) -> None:
    assert pin(store, "paper", 1).snapshot == 1
    assert dict(collect(store, 1, delete=True).kept) == {1: "pinned as paper", 2: "the newest"}
    assert unpin(store, "paper").snapshot == 1
    assert collect(store, 1, delete=True).collected == (1,)


def test_a_pin_is_of_the_newest_unless_told(store: Store) -> None:
    assert (pin(store, "a").snapshot, list(read_pins(store))) == (2, ["a"])


def test_a_pin_is_never_moved(store: Store) -> None:
    pin(store, "paper", 1)
    pin(store, "paper", 1)
    with pytest.raises(AlreadyExistsError, match=r"keeps snapshot 1, not 2: choose another name, or remove it first"):
        pin(store, "paper", 2)
    assert read_pins(store)["paper"].snapshot == 1


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-x", "a b", "x" * 101])
def test_pin_names_are_plain(store: Store, name: str) -> None:
    with pytest.raises(UsageError, match="a pin's name is"):
        pin(store, name)


def test_a_missing_pin_is_named_with_those_that_are_there(store: Store) -> None:
    pin(store, "paper")
    with pytest.raises(NotFoundError, match=r"no pin 'papre' in .*; pins: paper"):
        unpin(store, "papre")


def test_what_was_collected_cannot_be_pinned(store: Store) -> None:
    collect(store, 1, delete=True)
    with pytest.raises(NotFoundError, match=r"snapshot 1 of .* was collected"):
        pin(store, "late", 1)
    assert read_pins(store) == {}


# ---- Readers are told


def test_opening_what_was_collected_says_so(store: Store) -> None:
    opened = open_snapshot(store, 1)
    collect(store, 1, delete=True)
    told = (
        r"snapshot 1 of .* was collected: `evenshard gc` removed .* What remains is snapshot \d+; "
        r"`evenshard history /.*`evenshard pin /.* NAME --at N`"
    )
    with pytest.raises(NotFoundError, match=told):
        open_snapshot(store, 1)
    for read in (lambda: opened.classes, lambda: opened.samples("train"), lambda: opened.manifest("natural")):
        with pytest.raises(NotFoundError, match=told):
            read()


@pytest.mark.parametrize(
    "words",
    [
        "stats {} --at 1",
        "plan {} --at 1",
        "manifests {} --at 1",
        "classes {} natural --at 1",
        "export {} natural {}-tars --at 1",
        "verify {} --at 1",
        "report {} --at 1",
        "pin {} late --at 1",
        "diff {}",
        "diff {} 1 2",
        "diff {} 1 1",
    ],
)
def test_every_reader_names_what_remains_and_the_way_out(
    words: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    collect(store, 1, delete=True)
    assert run(cli, words.replace("{}", store.root).split()) == 1
    told = capsys.readouterr().err
    assert f"snapshot 1 of {store.url} was collected" in told
    assert "What remains is snapshot 2; `evenshard history" in told
    assert "NAME --at N`" in told
    assert ("Two that remain compare: `evenshard diff" in told) == words.startswith("diff")


def test_of_many_that_remain_the_newest_are_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(store, 1, delete=True)
    monkeypatch.setattr(numbers, "MAX_NAMED", 1)
    monkeypatch.setattr(numbers, "newest_number", lambda store: 4)  # 2, 3 and 4 remain
    with pytest.raises(NotFoundError, match="What remains is snapshot 2 older ones and 4;"):
        open_snapshot(store, 1)


def read_all(snapshot: Snapshot) -> None:
    for row in range(snapshot.record.samples["train"].num_rows):
        snapshot.read_image("train", row)


def test_reading_an_image_of_what_was_collected_says_so(store: Store) -> None:
    opened = open_snapshot(store, 1)
    opened.samples("train"), opened.shards
    collect(store, 1, delete=True)
    with pytest.raises(NotFoundError, match=r"snapshot 1 of .* was collected"):
        read_all(opened)


# ---- At any moment


class Stepped(Store):
    """A store that calls ``at_step(number)`` before each thing it does."""

    def __init__(self, root: str, at_step: Callable[[int], None]) -> None:
        super().__init__(root)
        self._steps = itertools.count()
        self._at_step = at_step
        for name in ("read", "entry", "list", "entries", "create", "replace", "remove", "freshen", "probe"):
            setattr(self._backend, name, self._stepping(getattr(self._backend, name)))

    def _stepping(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            self._at_step(next(self._steps))
            return call(*arguments)

        return step


def steps_of(run: Callable[[Store], object], root: str) -> int:
    """How many steps ``run`` takes."""
    seen: list[int] = []
    run(Stepped(root, seen.append))
    return len(seen)


def fresh(made: Path, folder: Path) -> Store:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    return Store.open(folder)


def gc(store: Store) -> Collection:
    return collect(store, 1, delete=True)


def revival(store: Store) -> SnapshotRecord:
    """Snapshot 3 is what snapshot 1 was: a build that finds its files there, a year old, named by no parent."""
    return replace(open_snapshot(store, 1).record, number=3, parent=open_snapshot(store, 2).id)


class Stop(Exception):
    pass


def at(when: int, act: Callable[[], object]) -> Callable[[int], None]:
    """``act`` before step ``when``."""

    def look(number: int) -> None:
        if number == when:
            act()

    return look


class Attempt:
    """A commit, on a store of its own, and what came of it."""

    def __init__(self, root: str, record: SnapshotRecord, at_step: Callable[[int], None] = lambda number: None) -> None:
        self._root, self._record, self._at_step = root, record, at_step
        self.outcome: Exception | None = None

    def __call__(self) -> None:
        try:
            commit(Stepped(self._root, self._at_step), self._record)
        except CommitError as error:
            self.outcome = error


class Gc:
    """A collection, on a store of its own."""

    def __init__(self, root: str) -> None:
        self._root = root

    def __call__(self) -> None:
        gc(Store(self._root))


class Keep:
    """A pin of snapshot 1, on a store of its own."""

    def __init__(self, root: str) -> None:
        self._root = root

    def __call__(self) -> None:
        with suppress(NotFoundError):
            pin(Store(self._root), "x", 1)


def stop() -> None:
    raise Stop


class Inline:
    """A pool without threads: steps have numbers only if one follows another."""

    def __init__(self, max_workers: int) -> None: ...

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *exc_info: object) -> None: ...

    map = staticmethod(map)


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("collect", "commit"):
        monkeypatch.setattr(f"pipeline.ingest.{module}.ThreadPoolExecutor", Inline)


@pytest.mark.usefixtures("stepwise")
def test_stopped_at_any_step_it_harms_nothing_and_the_next_one_finishes(made: Path, tmp_path: Path) -> None:
    num_steps = steps_of(gc, fresh(made, tmp_path / "root").root)
    whole = set(fresh(made, tmp_path / "root").list(""))
    for stop_at in range(num_steps):
        store = fresh(made, tmp_path / "root")
        kept = files_of(store, 2)

        with pytest.raises(Stop):
            gc(Stepped(store.root, at(stop_at, stop)))
        assert missing(store, kept) == []
        if whole - set(store.list("")):  # then whoever opens it is told, instead of failing on the way
            with pytest.raises(NotFoundError, match="was collected"):
                open_snapshot(store, 1)
        gc(store)
        assert missing(store, kept) == []
        assert {path.split("/")[0] for path in store.list("")} <= {
            "snapshots", "shards", "index", "tables", "manifests", "runs"
        }  # fmt: skip
        assert set(store.list("")) - set(kept) - set(store.list("runs")) == {snapshot_path(1), snapshot_path(2)}


def law_of_races(store: Store, files: dict[str, int], outcome: Exception | None) -> None:
    """A commit beside a collection is refused, or everything it names is there."""
    if outcome is None:
        assert missing(store, files) == []
        read_all(open_snapshot(store))
    else:
        assert isinstance(outcome, CommitError)
        assert newest_number(store) == 2


@pytest.mark.usefixtures("stepwise")
def test_a_commit_at_any_step_of_a_collection_is_refused_or_whole(made: Path, tmp_path: Path) -> None:
    outcomes: list[str] = []
    for when in range(steps_of(gc, fresh(made, tmp_path / "root").root)):
        store = fresh(made, tmp_path / "root")
        files, build = files_of(store, 1), Attempt(store.root, revival(store))
        gc(Stepped(store.root, at(when, build)))
        law_of_races(store, files, build.outcome)
        outcomes.append(str(build.outcome))
    assert outcomes[0] == "None"  # before the collection looked: it sees the new record
    assert any("a collection is running (runs/gc/" in text for text in outcomes)
    assert any("no such file" in text for text in outcomes)


@pytest.mark.usefixtures("stepwise")
def test_a_collection_at_any_step_of_a_commit_takes_nothing_of_it(made: Path, tmp_path: Path) -> None:
    num_steps = steps_of(lambda store: commit(store, revival(store)), fresh(made, tmp_path / "root").root)
    for when in range(num_steps):
        store = fresh(made, tmp_path / "root")
        files, build = files_of(store, 1), Attempt(store.root, revival(store), at(when, Gc(store.root)))
        build()
        law_of_races(store, files, build.outcome)


@pytest.mark.usefixtures("stepwise")
def test_any_two_stops_of_commit_and_collection(made: Path, tmp_path: Path) -> None:
    """The commit begins inside a collection, and a second collection runs inside that commit."""
    num_gc = steps_of(gc, fresh(made, tmp_path / "root").root)
    num_commit = steps_of(lambda store: commit(store, revival(store)), fresh(made, tmp_path / "root").root)
    for outer, inner in itertools.product(range(0, num_gc, 7), range(0, num_commit, 11)):
        store = fresh(made, tmp_path / "root")
        files, build = files_of(store, 1), Attempt(store.root, revival(store), at(inner, Gc(store.root)))
        gc(Stepped(store.root, at(outer, build)))
        law_of_races(store, files, build.outcome)


@pytest.mark.usefixtures("stepwise")
def test_a_pin_at_any_step_of_a_collection_is_refused_or_kept(made: Path, tmp_path: Path) -> None:
    num_steps = steps_of(gc, fresh(made, tmp_path / "root").root)
    refused = 0
    for when in range(num_steps):
        store = fresh(made, tmp_path / "root")
        files = files_of(store, 1)
        gc(Stepped(store.root, at(when, Keep(store.root))))
        law_of_pins(store, files)
        refused += not read_pins(store)
    assert 0 < refused < num_steps


@pytest.mark.usefixtures("stepwise")
def test_a_collection_at_any_step_of_a_pin_is_seen(made: Path, tmp_path: Path) -> None:
    for when in range(steps_of(lambda store: pin(store, "x", 1), fresh(made, tmp_path / "root").root)):
        store = fresh(made, tmp_path / "root")
        files = files_of(store, 1)
        with suppress(NotFoundError):
            pin(Stepped(store.root, at(when, Gc(store.root))), "x", 1)
        law_of_pins(store, files)


def law_of_pins(store: Store, files: dict[str, int]) -> None:
    """Pinned and whole, or refused."""
    if read_pins(store):
        assert missing(store, files) == []
        assert open_snapshot(store, 1).number == 1


@pytest.mark.usefixtures("stepwise")
def test_two_collections_at_once_end_as_one(made: Path, tmp_path: Path) -> None:
    for when in range(0, steps_of(gc, fresh(made, tmp_path / "root").root), 3):
        store = fresh(made, tmp_path / "root")
        kept = files_of(store, 2)
        gc(Stepped(store.root, at(when, Gc(store.root))))
        assert missing(store, kept) == []
        assert collect(store, 1).removed == ()
        assert store.list("runs/gc") == []


# ---- What builds rely on


def test_a_commit_makes_old_files_that_its_parent_does_not_name_young(store: Store) -> None:
    now = store.now_s()
    commit(store, revival(store))
    named, by_parent = files_of(store, 1), files_of(store, 2)
    ages = {path: now - (store.entry(path).modified_s or 0) for path in named}
    assert {path for path in named if ages[path] > 60} == set(named) & set(by_parent)


def test_a_marker_of_a_dead_collection_stops_nobody_and_goes(store: Store) -> None:
    store.create("runs/gc/dead.json", b"{}")
    age(store, 1 / 24 + 0.01, "runs/gc/dead.json")
    commit(store, revival(store))
    collect(store, 1, delete=True)
    assert store.list("runs/gc") == []


def test_a_commit_that_looks_too_long_is_refused(store: Store) -> None:
    with pytest.raises(CommitError, match="more than half the grace period"):
        commit(store, revival(store), grace_s=0)
    assert newest_number(store) == 2


def test_the_marker_is_renewed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[str] = []
    create = Store.create

    def note(self: Store, path: str, data: bytes) -> None:
        created.append(path)
        create(self, path, data)

    monkeypatch.setattr(Store, "create", note)
    monkeypatch.setattr("pipeline.ingest.collect._RENEW_S", -1)
    collect(store, 1, delete=True)
    assert len([path for path in created if path.startswith("runs/gc/")]) > 3
    assert store.list("runs/gc") == []


def test_what_cannot_be_removed_is_named_and_the_next_run_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = next(path for path in only_in(store, 1) if path.startswith("shards/"))
    unlink = os.unlink

    def refuse(path: Any) -> None:
        if str(path).endswith(tar):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path)

    with monkeypatch.context() as broken:
        broken.setattr(os, "unlink", refuse)
        with pytest.raises(
            StoreError, match=rf"1 could not be: cannot remove {tar} in .*: Permission denied; .*goes on"
        ):
            collect(store, 1, delete=True)
    assert tar in paths(collect(store, 1, delete=True))


# ---- Other storage


@pytest.fixture(scope="module")
def bucket(made: Path) -> Iterator[str]:
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with s3(made):
        yield "s3://bucket"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_collection_and_commit_on_object_stores(
    made: Path, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place = f"{request.getfixturevalue('bucket')}/{tmp_path.name}" if kind == "s3" else f"memory://{tmp_path.name}"
    local, store = Store.open(made), Store.open(place, create=True)
    for path in local.list(""):
        store.create(path, local.read(path))
    time.sleep(1.1)  # S3 tells whole seconds
    lonely, kept = only_in(store, 1), files_of(store, 2)
    record = revival(store)
    assert collect(store, 1, delete=True).removed == ()
    assert paths(collect(store, 1, grace_s=0.05, delete=True)) == lonely
    assert missing(store, kept) == []
    with pytest.raises(NotFoundError, match="was collected"):
        open_snapshot(store, 1)
    for path in lonely:
        store.create(path, local.read(path))
    commit(store, record)
    assert open_snapshot(store).read_image("train", 0)


@pytest.mark.parametrize("kind", ["memory", "s3", "local"])
def test_freshening_changes_the_time_and_no_byte(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    places = {"memory": f"memory://{tmp_path.name}", "local": str(tmp_path / "root")}
    place = f"{request.getfixturevalue('bucket')}/{tmp_path.name}" if kind == "s3" else places[kind]
    store = Store.open(place, create=True)
    store.create("shards/a", b"bytes")
    before = store.entry("shards/a")
    time.sleep(1.1)
    store.freshen("shards/a")
    after = store.entry("shards/a")
    assert before.modified_s + 1 <= after.modified_s <= store.now_s()
    assert store.read("shards/a") == b"bytes"
    assert store.entries("shards") == [after]
    with pytest.raises(NotFoundError):
        store.freshen("shards/b")
