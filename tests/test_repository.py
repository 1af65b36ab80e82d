"""The repository keeps its own rules: names, sizes, the lock, what the README shows, the rule on skipped tests."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import pipeline

TOP = Path(__file__).parents[1]
MODULES = sorted(path for room in ("pipeline", "jobs") for path in (TOP / room).rglob("*.py"))
PROMISES = ["E1", "E2", "E3", "E4", "E4b", "E5", "E6", "B1", "B2", "B3", "B4", "R1", "S1"]
VAGUE_NAMES = {"util", "utils", "common", "core", "helper", "helpers", "base", "misc", "legacy"}


# ---- The front door


def test_public_names_are_sorted_and_resolve() -> None:
    assert pipeline.__all__ == sorted(pipeline.__all__)
    assert [name for name in pipeline.__all__ if getattr(pipeline, name, None) is None] == []


def test_every_deliberate_error_is_a_public_name() -> None:
    errors = importlib.import_module("pipeline.errors")
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined <= set(pipeline.__all__)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'bild'; it has .*build"):
        _ = pipeline.bild


@pytest.mark.parametrize("statement", ["import pipeline", "import pipeline; pipeline.open_snapshot, pipeline.Policy"])
def test_the_base_names_need_neither_torch_nor_ray(statement: str) -> None:
    run_python(f"import sys; sys.modules.update(torch=None, ray=None); {statement}")


def test_importing_pipeline_is_light() -> None:
    heavy = "{'torch', 'ray', 'pyarrow', 'pandas', 'PIL', 'fsspec'}"
    assert run_python(f"import sys, pipeline; print({heavy} & set(sys.modules))") == "set()\n"


def test_a_missing_extra_is_named_with_its_install_command() -> None:
    program = (
        "import sys; sys.modules.update(torch=None, torchvision=None)\n"
        "import pipeline\n"
        "try: pipeline.Loader\n"
        "except pipeline.MissingExtraError as error: print(error)"
    )
    assert "pip install 'evenshard[train]'" in run_python(program)


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=TOP)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Modules and dependencies


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(TOP).as_posix())
def test_module_is_of_one_job_and_has_a_telling_name(module: Path) -> None:
    assert module.stem not in VAGUE_NAMES
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_lock_hashes_every_requirement_and_names_no_host() -> None:
    lock = (TOP / "requirements.lock").read_text(encoding="utf-8")
    requirements = re.findall(r"^(\S+==\S+)((?:[^\n]*\\\n)*[^\n]*)", lock, re.MULTILINE)
    assert len(requirements) > 50
    assert [name for name, rest in requirements if "--hash=sha256:" not in rest] == []
    assert re.search(r"https?:|--(extra-)?index|--find", lock) is None


def test_the_lock_holds_every_direct_dependency() -> None:
    metadata = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *metadata["dependencies"],
        *(line for extra in metadata["optional-dependencies"].values() for line in extra),
    ]
    names = {re.split(r"[\[<>=]", line)[0] for line in wanted} - {"evenshard"}
    locked = re.findall(r"^([a-z0-9-]+)==", (TOP / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert names - set(locked) == set()


# ---- What the README shows can be typed


def test_readme_commands_exist() -> None:
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    cli = importlib.import_module("pipeline.cli")
    group = next(value for value in vars(cli).values() if isinstance(value, click.Group))
    commands = list(shown_commands(readme, "evenshard"))
    assert {words[0] for words in commands} >= set(group.list_commands(click.Context(group)))
    assert [problem for words in commands for problem in misfits(group, words)] == []


def test_readme_make_targets_exist() -> None:
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (TOP / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {word for words in shown_commands(readme, "make") for word in words} - targets == set()


def test_readme_python_uses_public_names() -> None:
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    used = {name for block in blocks(readme, "python") for name in re.findall(r"(?<!from )\bpipeline\.(\w+)", block)}
    assert used
    assert used <= set(pipeline.__all__)


def test_readme_imports_exist() -> None:
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    imports = {line for block in blocks(readme, "python") for line in block.splitlines() if line.startswith("from ")}
    assert imports
    run_python("\n".join(sorted(imports)))


@pytest.mark.parametrize("promise", PROMISES)
def test_readme_names_a_test_for_every_promise(promise: str) -> None:
    row = next(
        line
        for line in (TOP / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| {promise} |")
    )
    held_by = re.findall(r"`(test_\w+)::(\w+)`", row)
    assert held_by
    missing = [
        name for file, name in held_by if f"def {name}(" not in (TOP / f"tests/{file}.py").read_text(encoding="utf-8")
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("stats ROOT --split val", None),
        ("stat ROOT", "no command 'stat'"),
        ("stats ROOT --spilt val", "stats has no option --spilt"),
        ("stats ROOT OTHER", "stats takes 1 argument(s), got 2"),
    ],
)
def test_a_wrong_command_line_in_the_readme_would_be_found(line: str, problem: str | None) -> None:
    stats = click.Command("stats", params=[click.Argument(["root"]), click.Option(["--split"])])
    assert misfits(click.Group(commands={"stats": stats}), line.split()) == ([problem] if problem else [])


def blocks(markdown: str, *languages: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


def shown_commands(markdown: str, program: str) -> Iterator[list[str]]:
    """The words after ``program`` on every line of a shell block that starts with it."""
    for block in blocks(markdown, "bash", "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == [program]:
                yield words[1:]


def misfits(group: click.Group, words: list[str]) -> list[str]:
    """What of one command line its command does not know: the command, its options, too many arguments."""
    command = group.get_command(click.Context(group), words[0])
    if command is None:
        return [f"no command {words[0]!r}"]
    options = {name: param for param in command.params for name in param.opts if isinstance(param, click.Option)}
    problems: list[str] = []
    num_arguments = 0
    rest = iter(words[1:])
    for word in rest:
        name, _, value = word.partition("=")
        if not name.startswith("-"):
            num_arguments += 1
        elif name not in options:
            return [f"{words[0]} has no option {name}"]
        elif not value and not getattr(options[name], "is_flag", False):
            next(rest, None)
    accepted = [param.nargs for param in command.params if isinstance(param, click.Argument)]
    if -1 not in accepted and num_arguments > sum(accepted):
        problems.append(f"{words[0]} takes {sum(accepted)} argument(s), got {num_arguments}")
    return problems


# ---- The rule on skipped tests, shown on a test file of its own

SKIPPING = """
import pytest

@pytest.mark.skip(reason="needs a GPU")
def test_skips():
    assert False
"""


@pytest.mark.parametrize(
    ("environment", "listed", "returncode"),
    [
        ({}, "", 0),
        ({"CI": "1"}, "", 1),
        ({"EVENSHARD_STRICT_SKIPS": "1"}, "", 1),
        ({"CI": "1"}, "test_it.py::test_skips | needs a GPU", 0),
        ({"CI": "1"}, "test_it.py::test_skips | needs a network", 1),
    ],
)
def test_an_unlisted_skip_fails_a_strict_run(
    tmp_path: Path, environment: dict[str, str], listed: str, returncode: int
) -> None:
    done = run_pytest(tmp_path, SKIPPING, listed, environment)
    assert done.returncode == returncode, done.stdout + done.stderr
    assert ("test_it.py::test_skips | needs a GPU" in done.stdout) == bool(returncode)
    assert re.search(r"1 passed, 1 skipped in [\d.]+s", done.stdout.splitlines()[-1])


def test_a_module_that_skips_itself_fails_a_strict_run(tmp_path: Path) -> None:
    program = "import pytest\npytest.importorskip('no_such_module')\n"
    done = run_pytest(tmp_path, program, "", {"CI": "1"})
    assert done.returncode == 1
    assert "test_it.py | could not import 'no_such_module'" in done.stdout


def run_pytest(
    folder: Path, program: str, listed: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    shutil.copy(TOP / "tests" / "conftest.py", folder)
    (folder / "expected_skips.txt").write_text(listed)
    (folder / "test_it.py").write_text(program)
    (folder / "test_other.py").write_text("def test_runs(): pass\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        "-c",
        "/dev/null",
        ".",
    ]
    clean = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
