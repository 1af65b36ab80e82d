"""The command line as people meet it: examples, suggestions, errors, colours, completion, interruption, names."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from conftest import TINY_TRAINING, write_guesses
from tiny_snapshot import COUNTS, write_snapshot

import pipeline
from pipeline.cli import cli, run
from pipeline.cli.asking import Command, manifest_names
from pipeline.cli.listing import distribution
from pipeline.cli.progress import Reporter
from pipeline.snapshot import encode_record, open_snapshot


@pytest.fixture(scope="module")
def root(local_ray: None, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("front") / "root"
    assert call("build", tiny_images, root, "--quiet") == 0
    return root


def call(*arguments: object) -> int:
    return run(cli, [str(argument) for argument in arguments])


def commands() -> dict[str, Command]:
    return {name: command for name, command in cli.commands.items() if isinstance(command, Command)}


# -- help


def test_every_command_has_examples_and_debug() -> None:
    assert set(commands()) == set(cli.commands)
    for name, command in commands().items():
        assert command.examples, name
        assert all(example.split()[0] == name for example in command.examples)
        assert "--debug" in command.get_help(click.Context(command, info_name=name))


@pytest.mark.parametrize(("columns", "widest"), [(80, 80), (300, 100)])
def test_help_fits_the_terminal_and_stays_readable(
    columns: int, widest: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("", *commands()):
        assert call(*filter(None, (name, "--help"))) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if len(line) > widest] == []


def test_every_reader_speaks_json() -> None:
    readers = set(commands()) - {"completion", "demo"}
    assert [name for name in readers if not any("--json" in param.opts for param in commands()[name].params)] == []


def test_every_example_of_the_help_runs(
    local_ray: None,
    tiny_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In an order that gives each what it needs; ``demo`` trains, and has tests of its own."""
    monkeypatch.chdir(tmp_path)
    places = {
        "PHOTOS": str(tiny_images),
        **{word: str(tmp_path / word) for word in ("ROOT", "DEST", "OTHER", "PREDICTIONS", "PAGE")},
    }
    smaller = {"train": TINY_TRAINING}
    first = ("build", "manifest", "schedule")
    order = [*first, *sorted(set(commands()) - {*first, "demo"})]
    for name in order:
        if name == "evaluate":
            write_guesses(tmp_path / "ROOT", tmp_path / "PREDICTIONS")
        for example in commands()[name].examples:
            words = [places.get(word, word) for word in shlex.split(example)]
            assert call(*words, *smaller.get(name, ())) == 0, f"{example}: {capsys.readouterr().err}"


# -- what is mistyped


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        ("stat {root}", 2, "No such command 'stat'. Did you mean 'stats'?"),
        ("xyzzy", 2, "The commands are build, classes"),
        ("stats {root} --spilt train", 2, "Did you mean '--split'?"),
        ("stats {root} --splt train", 2, "Did you mean '--split'?"),
        ("classes {root} natural --class aple", 1, "no class 'aple' in this snapshot (did you mean 'apple'?)"),
        ("classes {root} balancd", 1, "(did you mean 'balanced'?); manifests: balanced, natural"),
        ("plan {root} --policy squareroot", 2, "(did you mean 'square_root'?)"),
        ("plan {root} --policy balanced:per_clas=1", 2, "(did you mean 'per_class'?)"),
    ],
)
def test_a_mistyped_name_is_met_with_the_nearest(
    words: str, code: int, hint: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.format(root=root).split()) == code
    assert hint in capsys.readouterr().err


# -- errors


def test_an_error_is_one_line_and_debug_shows_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("stats", tmp_path / "none") == 1
    assert "Traceback" not in capsys.readouterr().err
    for words in (("stats", tmp_path / "none", "--debug"), ("--debug", "stats", tmp_path / "none")):
        assert call(*words) == 1
        told = capsys.readouterr().err
        assert "Traceback" in told
        assert told.splitlines()[-1].startswith("error: there is no directory")


def test_a_fault_of_ours_is_no_traceback_either(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(root: str, at: int | None = None) -> None:
        raise ZeroDivisionError("x\x1b[31m")

    monkeypatch.setattr("pipeline.snapshot.open_snapshot", broken)
    assert call("stats", root) == 1
    told = capsys.readouterr().err
    assert "error: ZeroDivisionError: x\\x1b[31m\nThis is a fault of evenshard" in told
    assert "Traceback" not in told


# -- terminals


def on_a_terminal(*words: object, **environment: str) -> str:
    """What a terminal would get."""
    leader, follower = pty.openpty()
    names = {**os.environ, **environment}
    command = [sys.executable, "-m", "pipeline.cli", *map(str, words)]
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=names) as process:
        os.close(follower)
        shown = b""
        try:
            while data := os.read(leader, 1 << 16):
                shown += data
        except OSError:  # the terminal of a finished process
            pass
        process.wait(60)
    os.close(leader)
    return shown.decode()


def test_colour_is_for_terminals_whose_user_wants_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b[36m" in on_a_terminal("stats", root, NO_COLOR="")
    assert "\x1b[" not in on_a_terminal("stats", root, NO_COLOR="1")
    assert call("stats", root) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_the_chart_counts_classes_by_their_images() -> None:
    lines = distribution(np.array([1, 1, 1, 2, 4, 7, 150, 0]), "train").splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["1", "3"], ["2-4", "2"], ["5-9", "1"], ["10-19", "0"], ["20-49", "0"], ["50-99", "0"], ["100-199", "1"],
    ]  # fmt: skip
    assert [line.count("█") for line in lines[1:]] == [40, 26, 13, 0, 0, 0, 13]
    assert lines[-1].endswith("90.4% of the images")
    assert distribution(np.zeros(3, np.int64), "val") == "no class has an image in val"


def test_progress_tells_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0])
    monkeypatch.setattr("pipeline.cli.progress.time.monotonic", lambda: next(clock))
    with Reporter() as progress:
        for done in (0, 10, 60):
            progress("read", done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "reading images (100)",
        "reading images: 60 of 100, 10 images/s, 4 s left",
    ]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every step of progress: stage, done, in all."""
    steps: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Reporter, "__call__", lambda self, *step: steps.append(step))
    return steps


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        ("report {root} --out {tmp}/page.html", {"survey", "pictures"}),
        ("history {root}", {"history"}),
        ("verify {root}", {"verify"}),
        ("gc {root} --keep 1", {"keep"}),
        ("export {root} natural {tmp}/dest", {"export"}),
    ],
)
def test_whatever_may_take_long_tells_its_progress(
    words: str, stages: set[str], root: Path, tmp_path: Path, told: list[tuple[str, int, int]]
) -> None:
    assert call(*words.format(root=root, tmp=tmp_path).split()) == 0
    assert_steps(told, stages)


def test_diff_tells_how_many_shards_it_compared(tmp_path: Path, told: list[tuple[str, int, int]]) -> None:
    store = write_snapshot(tmp_path / "root").store
    other = write_snapshot(tmp_path / "other", {**COUNTS, "val": (1, 0, 0, 0, 0, 0)})
    for path in other.files():
        if not store.exists(path):
            store.create(path, other.store.read(path))
    following = replace(other.record, number=2, parent=open_snapshot(store).id)
    store.create("snapshots/00000002.json", encode_record(following))
    assert call("diff", store.root) == 0
    assert_steps(told, {"compare"})


def assert_steps(told: list[tuple[str, int, int]], stages: set[str]) -> None:
    assert stages <= {stage for stage, _, _ in told}
    for stage in stages:
        steps = [(done, total) for name, done, total in told if name == stage]
        assert steps == sorted(steps)
        assert stage == "pictures" or steps[-1][0] == steps[-1][1] > 0


# -- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("completion", shell) == 0
    assert f"_EVENSHARD_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_manifests_complete_and_a_root_that_does_not_open_offers_nothing(root: Path, tmp_path: Path) -> None:
    def offered(place: Path, typed: str) -> list[str]:
        context = click.Context(cli.commands["classes"])
        context.params = {"root": str(place)}
        return manifest_names(context, cli.commands["classes"].params[1], typed)

    assert offered(root, "na") == ["natural"]
    assert offered(tmp_path, "") == []


# -- interruption


def heed_sigint() -> None:
    """In a new process: a shell's background jobs, these tests among them, are started with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_build_publishes_nothing_and_the_next_one_finishes(tiny_images: Path, tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    for copy in range(30):  # of other names, so other classes, so no duplicates within a class
        shutil.copytree(tiny_images / "bread", source / f"c{copy}")
    words = ["build", source, root, "--address", "none", "--workers", "1", "--allow", "rejects", "--shard-samples", "5"]
    command = [sys.executable, "-m", "pipeline.cli", *map(str, words)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_sigint,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("reading"):
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, told = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in told) == (130, False), told
    assert "stopped: nothing was published" in told
    assert not list(root.glob("snapshots/*"))


# -- plan


def test_plan_shows_and_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path for path in root.rglob("*"))
    words = ("--policy", "natural", "--policy", "balanced:per_class=50,max_repeat=10", "--batch", "16")
    assert call("plan", root, *words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert call("plan", root, *words) == 0
    assert sorted(path for path in root.rglob("*")) == before
    train = pipeline.open_snapshot(root).classes["train"].to_numpy()
    natural, balanced = told["plans"]
    assert natural["groups"]["all"]["num_draws"] == train.sum()
    assert natural["groups"]["all"]["num_bytes"] == sum(pipeline.open_snapshot(root).classes["train_bytes"].to_pylist())
    assert balanced["groups"]["all"]["num_draws"] == np.minimum(50, 10 * train).sum()
    assert balanced["groups"]["one"]["share"] == pytest.approx(
        10 * (train == 1).sum() / np.minimum(50, 10 * train).sum()
    )
    assert balanced["remarks"][0].startswith("max_repeat holds")
    assert balanced["classes_per_batch"] > natural["classes_per_batch"]


def test_epoch_size_scales_any_policy_and_manifests_are_policies(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for policy in ("natural", "square_root", "balanced", "undersampled") for word in ("--policy", policy)]
    assert call("plan", root, *words, "--epoch-size", "60", "--json") == 0
    assert [one["groups"]["all"]["num_draws"] for one in json.loads(capsys.readouterr().out)["plans"]] == [60] * 4


def test_a_schedule_adds_its_manifests_in_one_snapshot(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "root"
    shutil.copytree(root, own)
    assert call("schedule", own, "progressive", "--epochs", "7", "--stages", "3", "--json") == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    snapshot = pipeline.open_snapshot(own)
    assert snapshot.number == 2
    assert [snapshot.manifest(stage["manifest"]).num_draws for stage in stages] == [
        snapshot.manifest("natural").num_draws
    ] * 3
    assert sum(stage["epochs"] for stage in stages) == 7
    assert call("schedule", own, "deferred", "--epochs", "25") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "natural:20 -> balanced:5"
    assert pipeline.open_snapshot(own).number == 2
