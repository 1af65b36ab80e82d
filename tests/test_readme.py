"""The README is run: its commands on a tiny photo folder, its Python blocks, its promises against tests they name."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import pipeline

TOP = Path(__file__).parents[1]
README = (TOP / "README.md").read_text(encoding="utf-8")
PROMISES = ["E1", "E2", "E3", "E4", "E4b", "E5", "E6", "B1", "B2", "B3", "B4", "B5", "R1", "S1"]


def blocks(markdown: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


def shown_commands(markdown: str, program: str) -> Iterator[list[str]]:
    """The words after ``program`` on every line of a shell block that starts with it."""
    for block in blocks(markdown, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == [program]:
                yield words[1:]


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


# ---- Shown commands exist


def test_every_command_is_shown_and_every_shown_command_exists() -> None:
    commands = list(shown_commands(README, "evenshard"))
    assert {words[0] for words in commands} >= set(cli().list_commands(click.Context(cli())))
    assert [problem for words in commands for problem in misfits(cli(), words)] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (TOP / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = {word for words in shown_commands(README, "make") for word in words}
    assert shown
    assert shown - targets == set()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("stats ROOT --split val", None),
        ("stat ROOT", "no command 'stat'"),
        ("stats ROOT --spilt val", "stats has no option --spilt"),
        ("stats ROOT OTHER", "stats takes 1 argument(s), got 2"),
    ],
)
def test_a_command_line_that_does_not_exist_would_be_found(line: str, problem: str | None) -> None:
    stats = click.Command("stats", params=[click.Argument(["root"]), click.Option(["--split"])])
    assert misfits(click.Group(commands={"stats": stats}), line.split()) == ([problem] if problem else [])


def cli() -> click.Group:
    return next(v for v in vars(importlib.import_module("pipeline.cli")).values() if isinstance(v, click.Group))


def misfits(group: click.Group, words: list[str]) -> list[str]:
    """What of one command line its command does not know: the command, its options, too many arguments."""
    command = group.get_command(click.Context(group), words[0])
    if command is None:
        return [f"no command {words[0]!r}"]
    options = {name: param for param in command.params if isinstance(param, click.Option) for name in param.opts}
    num_arguments = 0
    rest = iter(words[1:])
    for word in rest:
        name, _, value = word.partition("=")
        if not name.startswith("-"):
            num_arguments += 1
        elif name not in options:
            return [f"{words[0]} has no option {name}"]
        elif not value and not options[name].is_flag:
            next(rest, None)
    accepted = [param.nargs for param in command.params if isinstance(param, click.Argument)]
    if num_arguments > sum(accepted):
        return [f"{words[0]} takes {sum(accepted)} argument(s), got {num_arguments}"]
    return []


# ---- Shown commands and Python run


@pytest.fixture(scope="module")
def ran(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[Path, list[Result]]:
    """ROOT, and what each command of the section Commands gave, in its order, on a tiny source."""
    folder = tmp_path_factory.mktemp("readme")
    places = {"PHOTOS": str(tiny_images), "ROOT": str(folder / "root"), "DEST": str(folder / "dest")}
    first_block = "```bash\n" + blocks(section("Commands"), "bash")[0] + "```\n"
    commands = [words for words in shown_commands(first_block, "evenshard") if words[0] != "demo"]
    return folder / "root", [CliRunner().invoke(cli(), [places.get(word, word) for word in line]) for line in commands]


def test_the_commands_run(ran: tuple[Path, list[Result]]) -> None:
    assert len(ran[1]) > 5
    assert [result.output for result in ran[1] if result.exit_code or result.exception] == []


def test_the_python_blocks_run(ran: tuple[Path, list[Result]], tmp_path: Path) -> None:
    # The tiny set has fewer images than one of the README's batches.
    programs = [text.replace("batch_size=64", "batch_size=8") for text in blocks(README, "python")]
    assert len(programs) == 2
    import torch

    given = {"checkpoint": None, "device": "cpu", "path": tmp_path / "checkpoint.pt", "model": torch.nn.Linear(1, 1)}
    for program in programs:
        exec(program.replace('"ROOT"', repr(str(ran[0]))), given)


def test_python_blocks_use_public_names() -> None:
    used = {name for text in blocks(README, "python") for name in re.findall(r"(?<!from )\bpipeline\.(\w+)", text)}
    assert used
    assert used <= set(pipeline.__all__)


# ---- Promises name tests that exist


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_names_a_test_that_exists(promise: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| {promise} |"))
    held_by = re.findall(r"`(test_\w+)::(test_\w+)`", row)
    assert held_by
    sources = {file: (TOP / f"tests/{file}.py").read_text(encoding="utf-8") for file, _ in held_by}
    assert [name for file, name in held_by if f"def {name}(" not in sources[file]] == []
