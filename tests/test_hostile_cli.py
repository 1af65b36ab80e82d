"""Names of classes, files, pins and places are text on a terminal and in a table, in every command and its errors."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from conftest import draw_image, write_guesses
from hostile_names import OBEYED, STEERING

from pipeline.cli import cli, run
from pipeline.cli.listing import csv_text
from pipeline.snapshot import open_snapshot

IMAGES = 3
"""Of each class: one stays, one is renamed, one goes."""


def call(*words: object) -> int:
    return run(cli, [str(word) for word in words])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes and files named STEERING, in a ROOT of such a name; snapshot 2 adds, renames, relabels and removes."""
    folder = tmp_path_factory.mktemp("hostile")
    root = folder / STEERING[7]
    rows = {f"{i}{name}.{j}.png": name for i, name in enumerate(STEERING) for j in range(IMAGES)}
    for place, path in enumerate(rows):
        draw_image(place, 0).save(folder / path)
    (folder / f"bad {STEERING[7]}.png").write_text("no image")
    rows[f"bad {STEERING[7]}.png"] = "plain"
    assert build(folder, root, rows) == 0
    for i, name in enumerate(STEERING):
        (folder / f"{i}{name}.0.png").rename(folder / f"new {i}{name}.png")
        del rows[f"{i}{name}.0.png"], rows[f"{i}{name}.1.png"]
        rows[f"new {i}{name}.png"] = STEERING[i - 1]
    assert build(folder, root, rows) == 0
    shutil.copy(folder / "table.csv", root / STEERING[8])
    write_guesses(root, root / f"{STEERING[9]}.csv")
    return root


def build(folder: Path, root: Path, rows: dict[str, str]) -> int:
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows.items()])
    allowed = [word for name in ("class-map", "class-vanished", "shrink", "rejects") for word in ("--allow", name)]
    return call("build", folder / "table.csv", root, "--address", "none", "--workers", 1, *allowed)


def assert_inert(told: str, commands: str) -> None:
    assert OBEYED.search(told) is None, commands
    lines = told.splitlines()
    assert not any(line.startswith(("d.", "d ", "error: your disk")) for line in lines), "a newline of a name"


@pytest.mark.parametrize(
    "words",
    [
        "stats {} --all", "stats {} --csv", "stats {} --json", "stats {} --rejects", "stats {} --rejects --csv",
        "plan {}", "plan {} --json", "manifests {}", "classes {} balanced", "classes {} balanced --csv",
        "classes {} balanced --json", "history {}", "history {} --json", "verify {}", "diff {}", "diff {} --json",
        "pin {} first --at 1", "pin {}", "pin {} --json", "gc {} --keep 1", "gc {} --keep 1 --json",
        "schedule {} deferred --epochs 5 --dry-run", "manifest {} sqrt --policy power:alpha=0.5",
        "evaluate {} {}/{}.csv --page {}/{}.html", "evaluate {} {}/{}.csv --json",
        "report {}", "report {} --json", "report {} --out {}/{}.html",
        "export {} natural {}-tars", "export {} balanced {}-json --json",
    ],
)  # fmt: skip
def test_no_name_steers_a_terminal(words: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled = [word.replace("{}/{}", f"{root}/{STEERING[9]}").replace("{}", str(root)) for word in words.split()]
    assert call(*filled) == 0, capsys.readouterr().err
    told = "".join(capsys.readouterr())
    assert_inert(told, words)
    if "stats" in words and "rejects" not in words and "json" not in words:
        assert "<img src=x onerror=alert(1)>" in told
        assert "a\\u202egpj" in told
    if words == "diff {}":
        for kind in ("removed", "renamed", "relabelled"):
            assert told.count(f"\n{kind} ") == len(STEERING)
        assert "\\x1b[31mred" in told
    if words == "gc {} --keep 1":
        assert "unknown, left alone" in told


def test_a_build_tells_its_names_as_text(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = root.parent / "table.csv"
    assert call("build", source, root, "--address", "none", "--workers", 1, "--allow", "rejects") == 0
    assert_inert("".join(capsys.readouterr()), "build")


@pytest.mark.parametrize("name", STEERING)
@pytest.mark.parametrize(
    "words",
    [
        ("classes", "{root}", "natural", "--class", "{name}!"),
        ("classes", "{root}", "{name}"),
        ("export", "{root}", "{name}", "dest"),
        ("manifest", "{root}", "{name}", "--policy", "natural"),
        ("manifest", "{root}", "x", "--policy", "{name}"),
        ("plan", "{root}", "--policy", "{name}"),
        ("pin", "{root}", "{name}"),
        ("pin", "{root}", "{name}", "--remove"),
        ("stats", "{root}/{name}/none"),
        ("build", "{root}/{name}/none", "{root}-other"),
        ("build", "{root}", "{root}-other", "--allow", "{name}"),
        ("build", "--config", "{name}"),
        ("report", "{root}", "--out", "{root}/none/{name}"),
        ("gc", "{root}", "--keep", "{name}!"),
        ("stats", "{root}", "{name}"),
        ("stats", "{root}", "--{name}"),
        ("{name}",),
    ],
)
def test_no_argument_steers_a_terminal_from_an_error(
    words: tuple[str, ...], name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(root=root, name=name) for word in words]
    assert call(*given) in (1, 2)
    assert_inert("".join(capsys.readouterr()), str(given))


def test_a_pin_that_is_none_of_ours_is_named_as_text(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "root"))
    (copy / "pins").mkdir(exist_ok=True)
    for name in STEERING:
        path = copy / "pins" / f"{name}.json"
        path.write_text(json.dumps({"name": name}))
        for words in (("pin", copy), ("gc", copy, "--keep", 1), ("verify", copy), ("history", copy)):
            assert call(*words) == 1
            assert_inert("".join(capsys.readouterr()), str(words))
        path.unlink()


def test_names_are_whole_in_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("classes", root, "balanced", "--json") == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == {*STEERING, "plain"}
    assert call("stats", root, "--json") == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)["classes"]} == {*STEERING, "plain"}
    assert call("diff", root, 1, 2, "--json") == 0
    renamed = json.loads(capsys.readouterr().out)["images"]["renamed"]
    assert {change["class_name"] for change in renamed} == set(STEERING)


def test_names_are_whole_in_what_an_export_leaves(root: Path, tmp_path: Path) -> None:
    assert call("export", root, "natural", tmp_path / "tars", "--quiet") == 0
    classes = json.loads((tmp_path / "tars/export.json").read_text("utf-8"))["classes"]
    assert classes == open_snapshot(root).classes["name"].to_pylist()
    assert all(path.name.isascii() for path in (tmp_path / "tars").iterdir())


def test_no_cell_of_a_csv_is_a_formula(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("classes", root, "balanced", "--csv"), ("stats", root, "--csv")):
        assert call(*words) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        names = [row["name"] for row in rows]
        assert {"'=1+1", "'@SUM(A1)", "'-2", "'+3", "<img src=x onerror=alert(1)>", "plain"} <= set(names)
        assert not any(name.startswith(("=", "+", "-", "@", "\t")) for name in names)


def test_numbers_are_not_guarded() -> None:
    assert csv_text(("a",), [(-1.5,), ("-1.5",), ("  =1",)]) == "a\n-1.5\n'-1.5\n'  =1"
