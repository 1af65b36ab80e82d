from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_COUNTS

import pipeline
from pipeline.cli import cli, run
from pipeline.cli.commands import build as build_command
from pipeline.cli.show import safe, table


@pytest.fixture(scope="module")
def root(local_ray: None, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "root"
    pipeline.build(tiny_images, root)
    return root


@pytest.fixture
def own_root(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root, tmp_path / "root")
    return tmp_path / "root"


def call(*arguments: object) -> int:
    return run(cli, [str(argument) for argument in arguments])


def test_build_prints_what_was_built(tiny_images: Path, own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("build", tiny_images, own_root, "--quiet") == 0
    told = capsys.readouterr().out
    assert "nothing changed: snapshot 1 stands" in told
    assert "61 in 6 classes: train" in told
    assert len(told.splitlines()) <= 11


def test_build_reads_a_build_file_and_flags_override_it(
    local_ray: None, tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "build.yaml"
    file.write_text(f"source: {tiny_images}\nroot: {tmp_path}/no\nmanifests:\n  sqrt: {{policy: power, alpha: 0.5}}\n")
    flags = ("--config", file, "--quiet", "--json", "--manifest", "flat=balanced:per_class=3")
    assert run(build_command, [str(flag) for flag in (tiny_images, tmp_path / "root", *flags)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["manifests"]["flat"] == 18
    assert set(told["manifests"]) == {"balanced", "flat", "natural", "oversampled", "sqrt", "undersampled"}


def test_stats_as_json_counts_the_folders(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("stats", root, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["count"] for row in told["classes"]} == TINY_COUNTS
    assert (told["summary"]["imbalance"], told["summary"]["singletons"]) == (40.0, 2)
    assert sum(row["share"] for row in told["classes"]) == pytest.approx(1)


def test_stats_of_one_split_count_that_split(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("stats", root, "--json", "--split", "train") == 0
    told = json.loads(capsys.readouterr().out)
    classes = pipeline.open_snapshot(root).classes
    assert [row["count"] for row in told["classes"]] == classes["train"].to_pylist()
    assert [row["bytes"] for row in told["classes"]] == classes["train_bytes"].to_pylist()


def test_stats_for_people_start_with_the_largest_class(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("stats", root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "apple", "40", "32", "65.57%", lines[1].split()[-1]]
    assert lines[-5] == "snapshot 1, all splits: 61 images in 6 classes"
    assert lines[-4].startswith("train: ")


def test_the_imbalance_is_that_of_train_and_says_so(
    tiny_images: Path, own_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = pipeline.open_snapshot(own_root).classes["train"].to_numpy()
    ratio, singles = train.max() / train.min(), int((train == 1).sum())
    assert (ratio, singles) != (40, 2)  # of all splits
    for words in (["stats", own_root], ["stats", own_root, "--split", "train"]):
        assert call(*words) == 0
        told = capsys.readouterr().out
        assert f"imbalance ratio {ratio:.1f} (largest / smallest class)" in told
        assert f"; {singles} with one image" in told
        assert "images in train  classes" in told
    assert call("stats", own_root, "--json") == 0
    assert json.loads(capsys.readouterr().out)["train"]["imbalance"] == ratio
    assert call("build", tiny_images, own_root, "--quiet") == 0
    assert f"in train: largest class {ratio:.0f} x the smallest, {singles} with one image" in capsys.readouterr().out


def test_a_class_that_vanished_is_no_class_with_images(
    tiny_images: Path, own_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_images, tmp_path / "source")
    shutil.rmtree(tmp_path / "source/fig")
    assert call("build", tmp_path / "source", own_root, "--quiet", "--allow", "class-vanished") == 0
    assert "images     60 in 5 classes (1 more without an image): train" in capsys.readouterr().out
    assert call("stats", own_root) == 0
    assert "all splits: 60 images in 5 classes (1 more without an image)" in capsys.readouterr().out


def test_manifest_adds_a_snapshot_and_touches_no_image(own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in (own_root / "shards").rglob("*.tar"))
    assert call("manifest", own_root, "flat", "--policy", "balanced:per_class=7", "--json") == 0
    assert json.loads(capsys.readouterr().out)["manifests"][0]["draws"] == 42
    snapshot = pipeline.open_snapshot(own_root)
    assert snapshot.number == 2
    assert np.array_equal(snapshot.manifest("flat").targets, np.full(6, 7))
    assert sorted(path.name for path in (own_root / "shards").rglob("*.tar")) == before
    assert call("manifest", own_root, "flat", "--policy", "balanced:per_class=7") == 0
    assert pipeline.open_snapshot(own_root).number == 2


def test_a_manifest_name_keeps_its_meaning(own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("manifest", own_root, "balanced", "--policy", "natural") == 1
    told = capsys.readouterr().err
    assert "has policy balanced:per_class=mean, not natural; choose another name" in told


def test_a_rebuild_keeps_manifests_that_were_added(tiny_images: Path, own_root: Path) -> None:
    assert call("manifest", own_root, "flat", "--policy", "balanced:per_class=7") == 0
    assert call("build", tiny_images, own_root, "--quiet") == 0
    assert "flat" in pipeline.open_snapshot(own_root).manifests


def test_manifests_lists_draws(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("manifests", root, "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["manifests"]}
    train = pipeline.open_snapshot(root).classes["train"].to_numpy()
    assert rows["natural"]["draws"] == rows["natural"]["distinct"] == train.sum()
    assert rows["balanced"]["smallest_target"] == rows["balanced"]["largest_target"]
    assert call("manifests", root) == 0
    assert "undersample" in capsys.readouterr().out


def test_export_tells_its_cost_first(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", root, "balanced", tmp_path / "out", "--quiet") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("writes ")
    assert lines[1].startswith("wrote ")


def test_history_tells_each_snapshot_and_its_run(
    tiny_images: Path, own_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("manifest", own_root, "flat", "--policy", "balanced:per_class=7") == 0
    assert call("pin", own_root, "paper", "--at", "1") == 0
    capsys.readouterr()
    assert call("history", own_root, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["num_images"], first["pins"], first["changes"]) == (61, ["paper"], ["the first"])
    assert (first["run"]["source"], first["run"]["num_read"]) == (str(tiny_images), 61)
    assert (second["changes"], second["num_new_shards"], second["run"]) == (["manifest flat added"], 0, None)
    assert [row["parent_ok"] for row in (first, second)] == [True, True]
    assert call("history", own_root, "--last", "1") == 0
    told = capsys.readouterr().out
    assert "manifest flat added" in told
    assert "1 older: --last 2" in told


def test_diff_tells_what_a_rebuild_changed(
    local_ray: None, tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    shutil.copytree(tiny_images, source)
    assert call("build", source, root, "--quiet") == 0
    (source / "apple/000.jpg").rename(source / "dates/apple.jpg")
    (source / "apple/001.jpg").unlink()
    (source / "bread/000.jpg").rename(source / "bread/bun.jpg")
    with (source / "cocoa/000.jpg").open("ab") as file:
        file.write(b" ")
    assert call("build", source, root, "--quiet") == 0
    capsys.readouterr()
    assert call("diff", root, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    paths = {kind: {(one["path_before"], one["path"]) for one in images} for kind, images in found["images"].items()}
    assert paths == {
        "added": set(),
        "removed": {("apple/001.jpg", None)},
        "changed": {("cocoa/000.jpg", "cocoa/000.jpg")},
        "renamed": {("bread/000.jpg", "bread/bun.jpg"), ("apple/000.jpg", "dates/apple.jpg")},
        "relabelled": {("apple/000.jpg", "dates/apple.jpg")},
        "moved": set(),
    }
    assert call("diff", root, "1", "2") == 0
    told = capsys.readouterr().out
    assert "snapshot 1 to 2: 61 to 60 images in all splits; added 0, removed 1, changed 1, renamed 2, " in told
    assert "relabelled dates/apple.jpg (apple to dates)" in told


def test_history_fails_where_a_record_was_replaced(own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("manifest", own_root, "flat", "--policy", "balanced:per_class=7") == 0
    record = own_root / "snapshots/00000001.json"
    record.write_bytes(record.read_bytes()[:-3])
    assert call("history", own_root) == 1
    told = capsys.readouterr()
    assert "DAMAGED" in told.out
    assert "snapshot 1: snapshots/00000001.json in" in told.err


def test_pins_are_listed_and_removed(own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("pin", own_root) == 0
    assert call("pin", own_root, "paper") == 0
    assert call("pin", own_root, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["no pins", f"snapshot 1 of {own_root} is kept as paper"]
    assert json.loads("".join(lines[2:]))[0]["snapshot"] == 1
    assert call("pin", own_root, "paper", "--remove") == 0
    assert "removed pin paper" in capsys.readouterr().out


def test_gc_lists_then_deletes_and_says_how_much(own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orphan = own_root / f"shards/ab/{'ab' * 32}.tar"
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(bytes(1500))
    (own_root / "notes.txt").write_text("mine")
    assert call("gc", own_root, "--keep", "1", "--quiet") == 0
    assert "younger than the grace period" in capsys.readouterr().out
    os.utime(orphan, (0, 0))
    assert call("gc", own_root, "--keep", "1", "--quiet") == 0
    told = capsys.readouterr().out
    assert f"would remove shards/ab/{orphan.name}" in told
    assert f"a dry run: to free 1.5 kB in 1 file: evenshard gc {own_root} --keep 1 --delete" in told
    assert orphan.exists()
    assert call("gc", own_root, "--keep", "1", "--grace", "2h", "--quiet") == 0
    assert f"evenshard gc {own_root} --keep 1 --grace 7200s --delete" in capsys.readouterr().out
    assert call("gc", own_root, "--keep", "1", "--delete", "--json", "--quiet") == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["removed_bytes"], done["kept"], done["unknown"][0]["path"]) == (1500, {"1": "the newest"}, "notes.txt")
    assert not orphan.exists()


WRONG = {
    "missing source": (["build", "{tmp}/nowhere", "{tmp}/r"], 1, "nowhere"),
    "empty source": (["build", "{tmp}/empty", "{tmp}/r"], 1, "is empty"),
    "no arguments": (["build"], 2, "source is missing"),
    "unknown flag": (["build", "a", "b", "--shards", "3"], 2, "--shards"),
    "unknown key": (["build", "--config", "{tmp}/bad.yaml"], 2, "shard_sample"),
    "unknown policy": (["build", "{src}", "{tmp}/r", "--manifest", "x=balancd"], 2, "balanced"),
    "bad pair": (["build", "{src}", "{tmp}/r", "--manifest", "balanced"], 2, "NAME=POLICY"),
    "root holds something else": (["build", "{src}", "{tmp}/other"], 1, "not empty"),
    "root is a file": (["build", "{src}", "{tmp}/file"], 1, "file"),
    "root below a file": (["build", "{src}", "{tmp}/file/root"], 1, "file/root"),
    "root inside the source": (["build", "{tmp}/holder", "{tmp}/holder/root"], 2, "root"),
    "label column": (["build", "{tmp}/rows.csv", "{tmp}/r", "--label-column", "tag"], 1, "tag"),
    "no snapshot": (["stats", "{tmp}/empty"], 1, "evenshard build"),
    "keep nothing": (["gc", "{root}", "--keep", "0"], 2, "0 is not in the range x>=1"),
    "no number to keep": (["gc", "{root}"], 2, "--keep"),
    "no duration": (["gc", "{root}", "--keep", "1", "--grace", "week"], 2, "7d"),
    "nothing to compare": (["diff", "{root}"], 1, "no snapshot before"),
    "gc without a snapshot": (["gc", "{tmp}/other", "--keep", "1", "--delete"], 1, "no snapshot"),
    "pin of what is not there": (["pin", "{root}", "x", "--at", "9"], 1, "the newest is 1"),
    "removing without a name": (["pin", "{root}", "--remove"], 2, "which pin"),
    "unknown pin": (["pin", "{root}", "x", "--remove"], 1, "pins: none"),
    "history of nothing": (["history", "{tmp}/empty"], 1, "evenshard build"),
    "unknown manifest": (["export", "{root}", "balancd", "{tmp}/out"], 1, "natural"),
    "export into a full folder": (["export", "{root}", "natural", "{tmp}/other"], 1, "not empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_say_so(
    case: str, root: Path, tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, words = WRONG[case]
    for folder in ("empty", "other", "holder/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "other/thesis.txt").write_text("mine")
    shutil.copy(tiny_images / "fig/000.jpg", tmp_path / "holder/a")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "bad.yaml").write_text("source: a\nroot: b\nshard_sample: 3\n")
    (tmp_path / "rows.csv").write_text("path,label\na.jpg,x\n")
    filled = [text.format(tmp=tmp_path, src=tiny_images, root=root) for text in arguments]
    assert call(*filled) == code
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert (tmp_path / "other/thesis.txt").read_text() == "mine"


def test_hostile_names_cannot_steer_a_terminal() -> None:
    assert safe("a\x1b]0;b\u202ec\ud800") == "a\\x1b]0;b\\u202ec\\ud800"
    assert "\n" not in table(("name",), [("x\ny",)]).split("name\n")[1].strip("\n")


def test_planning_commands_import_neither_ray_nor_torch(root: Path) -> None:
    code = (
        "import sys; from pipeline.cli import cli, run; "
        f"assert run(cli, ['stats', {str(root)!r}]) == 0; assert run(cli, ['manifests', {str(root)!r}]) == 0; "
        "print(sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_build_job_is_the_build_command(tiny_images: Path, own_root: Path) -> None:
    command = [sys.executable, "-m", "jobs.build", str(tiny_images), str(own_root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["changed"] is False
    failed = subprocess.run([*command[:3], "/nowhere", str(own_root)], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "error: source /nowhere" in failed.stderr


def test_report_and_export_answer_in_json(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert call("report", root, "--out", page, "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out) == {"snapshot": 1, "page": str(page)}
    assert call("export", root, "balanced", tmp_path / "out", "--json", "--quiet") == 0
    told = capsys.readouterr()
    body = json.loads(told.out)
    assert (body["snapshot"], body["manifest"], body["num_reused"]) == (1, "balanced", 0)
    assert body["num_draws"] == pipeline.open_snapshot(root).manifest("balanced").num_draws
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert body["cost"]["tar_bytes"] == body["tar_bytes"] == written
    assert told.err.startswith("writes ")
