"""One rule for every command: 2 where the call is wrong by itself, 1 where it was well formed and could not be done.

The calls of ``WRONG`` name a ROOT that is not there, too: what is wrong by itself is wrong whatever lies where.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from tiny_snapshot import write_snapshot

from pipeline.cli import cli, run

READERS = {
    "stats": "stats {}",
    "plan": "plan {}",
    "manifests": "manifests {}",
    "manifest": "manifest {} mine --policy natural",
    "classes": "classes {} natural",
    "schedule": "schedule {} deferred --epochs 10",
    "history": "history {}",
    "diff": "diff {}",
    "pin": "pin {} paper",
    "gc": "gc {} --keep 1",
    "verify": "verify {}",
    "report": "report {}",
    "export": "export {} natural {tmp}/dest",
    "evaluate": "evaluate {} {tmp}/file",
    "train": "train {} --stage natural:1 --out {tmp}/w",
}
"""How each is called; {} is ROOT."""

WITH_AT = ("stats", "plan", "manifests", "classes", "pin", "verify", "report", "export", "evaluate", "train")

FAILED = {
    "source is not there": ("build {tmp}/none {tmp}/r", "none"),
    "source is empty": ("build {tmp}/empty {tmp}/r", "is empty"),
    "build file is not there": ("build {tmp}/empty {tmp}/r --config {tmp}/none.yaml", "none.yaml"),
    "class names are not there": ("build {tmp}/empty {tmp}/r --classes {tmp}/none.txt", "none.txt"),
    "ROOT is taken": ("build {tmp}/photos {tmp}/taken", "not empty"),
    "ROOT is a file": ("build {tmp}/photos {tmp}/file", "is a file"),
    "another seed": ("build {tmp}/photos {root} --seed 5", "seed"),
    "nightly's source is not there": ("nightly {tmp}/none {tmp}/r", "none"),
    "no ROOT whose builds could be told": ("status {tmp}/none", "there is no directory"),
    "no such manifest": ("classes {root} balancd", "did you mean 'balanced'"),
    "no such manifest to export": ("export {root} balancd {tmp}/dest", "did you mean 'balanced'"),
    "no such class": ("classes {root} natural --class aple", "no class 'aple'"),
    "an explicit target of no class": ("plan {root} --policy {explicit}", "1 name is no class"),
    "an explicit manifest of no class": ("manifest {root} x --policy {explicit}", "1 name is no class"),
    "a split without images": ("plan {root} --split val", "nothing can be drawn"),
    "name of a manifest is taken": ("manifest {root} balanced --policy natural", "choose another name"),
    "name of a pin is taken": ("pin {root} kept --at 2", "keeps snapshot 1, not 2"),
    "no such pin": ("pin {root} none --remove", "pins: kept"),
    "nothing before the first": ("diff {first}", "no snapshot before"),
    "no such snapshot to compare": ("diff {root} 1 99", "the newest is 2"),
    "DEST is taken": ("export {root} natural {tmp}/taken", "not empty"),
    "the page has no place": ("report {root} --out {tmp}/none/page.html", "name another file"),
    "no predictions": ("evaluate {root} {tmp}/none.csv", "name another file"),
    "predictions of nothing": ("evaluate {root} {tmp}/file", "expected a column key or path"),
    "trained on no such manifest": ("evaluate {root} {tmp}/file --manifest balancd", "did you mean 'balanced'"),
    "no source to show": ("report {root} --source {tmp}/none", "no directory"),
    "no such manifest to train on": ("train {root} --stage balancd:1 --out {tmp}/x", "did you mean 'balanced'"),
    "no such weights": ("train {root} --stage natural:1 --out {tmp}/y --weights {tmp}/none.pt", "never downloaded"),
    "a training's place is taken": ("train {root} --stage natural:1 --out {tmp}/taken", "holds other files"),
    "the demo's place is taken": ("demo {tmp}/busy", "another directory"),
    **{f"no ROOT: {name}": (words.replace("{}", "{tmp}/none"), "evenshard build") for name, words in READERS.items()},
    **{f"empty ROOT: {name}": (words.replace("{}", "{tmp}/empty"), "no snapshot") for name, words in READERS.items()},
    **{f"a file: {name}": (words.replace("{}", "{tmp}/file"), "file") for name, words in READERS.items()},
    **{
        f"no such snapshot: {name}": (READERS[name].replace("{}", "{root}") + " --at 99", "the newest is 2")
        for name in WITH_AT
    },
}

WRONG = {
    "no command": ("xyzzy", "The commands are"),
    "no arguments": ("build", "source is missing"),
    "unknown key of the build file": ("build --config {tmp}/bad.yaml", "shard_sample"),
    "two sources of splits": ("build {tmp}/tars {tmp}/w --split-from name --split-column s", "choose one"),
    "ROOT is the source": ("build {tmp}/photos {tmp}/photos", "must not read what it writes"),
    "ROOT in the source": ("build {tmp}/photos {tmp}/photos/root", "lies within the source"),
    "no number of rejects": (
        "build a {tmp}/w --max-rejects banana",
        "a rate from 0.0 to 1.0 (0.01) or a percentage ('1%')",
    ),
    "no number of bytes": ("build a {tmp}/w --shard-bytes much", "128MiB"),
    "no guardrail": ("build a {tmp}/w --allow everything", "no guardrail"),
    "no workers": ("build a {tmp}/w --workers 0", "workers"),
    "no policy": ("build a {tmp}/w --manifest x=balancd", "did you mean 'balanced'"),
    "no name of a manifest": ("build a {tmp}/w --manifest a/b=natural", "a/b"),
    "no such policy": ("manifest {} x --policy balancd", "did you mean 'balanced'"),
    "no such parameter": ("manifest {} x --policy balanced:per_clas=1", "did you mean 'per_class'"),
    "no draws": ("plan {} --epoch-size 0", "x>=1"),
    "no batch": ("plan {} --batch 0", "x>=1"),
    "no epochs": ("schedule {} deferred --epochs 1", "x>=2"),
    "stages of deferred": ("schedule {} deferred --epochs 10 --stages 4", "--stages is for progressive"),
    "no such schedule": ("schedule {} slow --epochs 10", "deferred"),
    "two formats of stats": ("stats {} --csv --json", "--csv and --json contradict"),
    "two formats of classes": ("classes {} natural --csv --json", "--csv and --json contradict"),
    "rejects have no split": ("stats {} --rejects --split val", "--rejects and --split contradict"),
    "no such split": ("stats {} --split trian", "train"),
    "no name of a pin": ("pin {root} a/b", "a pin's name is"),
    "which pin": ("pin {} --remove", "which pin"),
    "a pin has one way": ("pin {} paper --remove --at 1", "no --at"),
    "keep nothing": ("gc {} --keep 0", "x>=1"),
    "keep what": ("gc {}", "--keep"),
    "no duration": ("gc {} --keep 1 --grace week", "7d"),
    "no share": ("verify {} --sample 2", "0<=x<=1"),
    "no epoch": ("export {} natural d --epoch -1", "x>=0"),
    "no tar": ("export {} natural d --shard-samples 0", "x>=1"),
    "no such prior": ("evaluate {} p.csv --prior flat", "uniform"),
    "no prior and another": ("evaluate {} p.csv --prior none --prior em", "--prior none and --prior em contradict"),
    "no such allowance": ("evaluate {} p.csv --allow everything", "missing"),
    "no tau": ("evaluate {} p.csv --tau -1", "x>=0"),
    "no snapshot 0": ("diff {} 0", "x>=1"),
    "no last": ("history {} --last 0", "x>=1"),
    "named": ("diff {} --named -1", "x>=0"),
    "no stage": ("train {} --stage natural --out {tmp}/w", "MANIFEST:EPOCHS"),
    "no such option of a stage": ("train {} --stage natural:1:frezee --out {tmp}/w", "did you mean 'freeze'"),
    "no such model": ("train {} --stage natural:1 --model resnet81 --out {tmp}/w", "did you mean 'resnet18'"),
    "no such loss": ("train {} --stage natural:1 --loss balanced-softmx --out {tmp}/w", "did you mean 'balanced-so"),
    "no such augmentation": ("train {} --stage natural:1 --augment hard --out {tmp}/w", "harder-repeats"),
    "no batch to train": ("train {} --stage natural:1 --batch-size 0 --out {tmp}/w", "batch_size must be 1 or more"),
    "no rate": ("train {} --stage natural:1 --lr -1 --out {tmp}/w", "lr must be above 0"),
    "no shell": ("completion sh", "bash"),
    **{f"unknown option: {name}": (f"{words} --spilt", "--spilt") for name, words in READERS.items()},
    **{f"one too many: {name}": (f"{words} 1 1 1", "extra argument") for name, words in READERS.items()},
    **{f"no ROOT named: {name}": (name, "Missing") for name in READERS},
    **{f"snapshot 0: {name}": (f"{READERS[name]} --at 0", "x>=1") for name in WITH_AT},
    **{f"no number: {name}": (f"{READERS[name]} --at one", "not a valid") for name in WITH_AT},
    **{
        f"{name} takes no such option": (f"{name} x --spilt", "--spilt")
        for name in ("build", "demo", "nightly", "status")
    },
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("codes")
    write_snapshot(folder / "root")
    shutil.copytree(folder / "root", folder / "first")
    assert call(f"pin {folder}/root kept --at 1") == 0
    assert call(f"manifest {folder}/root more --policy power:alpha=0.5") == 0
    for name in ("empty", "taken", "tars", "busy/photos"):
        (folder / name).mkdir(parents=True)
    (folder / "busy/photos/mine.jpg").write_text("mine")
    (folder / "taken/thesis.txt").write_text("mine")
    (folder / "file").write_text("mine")
    (folder / "tars/train-0.tar").write_bytes(bytes(1024))
    (folder / "bad.yaml").write_text("source: a\nroot: b\nshard_sample: 3\n")
    shutil.copytree(tiny_images, folder / "photos")
    explicit = 'explicit:{"targets":{"aple":1}}'
    return {"tmp": str(folder), "root": f"{folder}/root", "first": f"{folder}/first", "explicit": explicit}


def call(text: str) -> int:
    return run(cli, text.split())


def filled(words: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        words = words.replace(f"{{{name}}}", value)
    return words.replace("{}", f"{places['tmp']}/none")


def test_every_command_is_in_both_tables() -> None:
    for table in (FAILED, WRONG):
        named = {words.split()[0] for words, _ in table.values()}
        assert set(cli.commands) - named <= ({"completion"} if table is FAILED else set())


@pytest.mark.parametrize("case", FAILED)
def test_what_cannot_be_done_is_1(case: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words, hint = FAILED[case]
    assert call(filled(words, places)) == 1, capsys.readouterr().err
    told = capsys.readouterr().err
    assert hint in told
    assert re.search("Traceback|Usage:|fault of evenshard", told) is None
    assert (Path(places["tmp"]) / "taken/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_by_itself_is_2(case: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words, hint = WRONG[case]
    assert call(filled(words, places)) == 2, capsys.readouterr().err
    told = capsys.readouterr().err
    assert hint in told
    assert "Traceback" not in told
    assert not (Path(places["tmp"]) / "w").exists()


def test_the_rule_is_in_the_help_and_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    for text in (capsys.readouterr().out, readme):
        told = " ".join(text.split())
        for words in ("Exit codes: 0 done", "1 the call was well formed", "2 the call is wrong by itself", "130"):
            assert words in told


# ---- a place that is no ROOT, but close to one


def test_a_part_of_a_root_names_the_root(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(places["root"])
    part = next((root / "shards").iterdir())
    for place in (root / "shards", root / "snapshots", part):
        for words in READERS.values():
            assert call(filled(words.replace("{}", str(place)), places)) == 1
            assert f"no snapshot in {place}, which is a part of the ROOT {root}: did you mean {root}?" in (
                capsys.readouterr().err
            )


@pytest.mark.parametrize(("folder", "what"), [("photos", "images"), ("photos/apple", "images"), ("tars", "tars or")])
def test_a_source_is_told_to_be_built_into_another_place(
    folder: str, what: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"{places['tmp']}/{folder}"
    for words in READERS.values():
        assert call(filled(words.replace("{}", place), places)) == 1
        told = capsys.readouterr().err
        assert f"it holds {what}" in told
        assert f"Build it into another directory: `evenshard build {place} ROOT`" in told
