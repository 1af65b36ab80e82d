"""The README is run: its commands on a tiny photo folder, its Python blocks, its promises against tests they name."""

from __future__ import annotations

import importlib
import io
import json
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from conftest import TINY_COUNTS, TINY_TRAINING, write_guesses
from containers import Sample, parquet_of, put, samples_of
from fsspec.implementations.memory import MemoryFileSystem
from serial_engine import serial_engine

import pipeline

__all__ = ["serial_engine"]

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
    names = ("ROOT", "DEST", "DIR", "PREDICTIONS")
    places = {"PHOTOS": str(tiny_images), **{name: str(folder / name.lower()) for name in names}}
    smaller = {"train": TINY_TRAINING}
    first_block = "```bash\n" + blocks(section("Commands"), "bash")[0] + "```\n"
    commands = [words for words in shown_commands(first_block, "evenshard") if words[0] != "demo"]
    results: list[Result] = []
    for line in commands:
        if line[0] == "evaluate":
            write_guesses(folder / "root", folder / "predictions")
        words = [*(places.get(word, word) for word in line), *smaller.get(line[0], ())]
        results.append(CliRunner().invoke(cli(), words))
    return folder / "root", results


def test_the_commands_run(ran: tuple[Path, list[Result]]) -> None:
    assert len(ran[1]) > 5
    assert [result.output for result in ran[1] if result.exit_code or result.exception] == []


EXAMPLES = list(shown_commands("```bash\n" + blocks(section("Commands"), "bash")[1] + "```\n", "evenshard"))


@pytest.mark.usefixtures("serial_engine")
@pytest.mark.parametrize("words", EXAMPLES, ids=" ".join)
def test_the_examples_of_sources_run(words: list[str], tiny_images: Path, tmp_path: Path) -> None:
    """Each on a source as it describes one; s3:// is memory:// here, buckets are looked at by test_source_remote."""
    assert words[0] == "build"
    samples = samples_of(tiny_images)
    places = sources(words, samples, tmp_path)
    assert words[1] in places
    result = CliRunner().invoke(cli(), [*(places.get(word, word) for word in words), "--quiet"])
    assert (result.exit_code, result.exception) == (0, None), result.output
    snapshot = pipeline.open_snapshot(places[words[2]])
    assert (snapshot.record.num_images, snapshot.rejects.num_rows) == (len(samples), 0)
    counts = dict(zip(snapshot.classes["name"].to_pylist(), snapshot.classes["count"].to_pylist(), strict=True))
    assert counts == TINY_COUNTS
    if "--split-from" in words:
        assert snapshot.classes["test"].to_pylist() == [n // 3 for n in snapshot.classes["count"].to_pylist()]
    if "--group-column" in words:
        groups = [snapshot.index(n)["group"].to_pylist() for n in range(snapshot.shards.num_rows)]
        assert len({group for part in groups for group in part}) == len(TINY_COUNTS)


def sources(words: list[str], samples: list[Sample], folder: Path) -> dict[str, str]:
    """A place for every placeholder, with what the options of this example need in it."""
    split_of = dict(splits_of(samples))
    where = (lambda name: f"{split_of[name]}/{name}") if words[-2:] == ["--split-from", "top"] else str
    photos = put(folder / "photos", {where(name): data for name, _, data in samples})
    rows = [f"{name},{label}" for name, label, _ in samples]
    put(folder, {"photos.csv": "\n".join(["file,sku", *rows]).encode()})
    tars = put(folder / "tars", {"a.tar": labelled_tar(samples)})
    parts = {split: [one for one in samples if split_of[one[0]] == split] for split in ("train", "test")}
    files = {f"{split}-00000-of-00001.parquet": parquet_of(part) for split, part in parts.items()}
    bucket = f"memory://{folder.name}"
    MemoryFileSystem().pipe_file(f"/{folder.name}/train.parquet", renamed(parquet_of(samples)))
    return {
        "PHOTOS": str(photos),
        "ROOT": str(folder / "root"),
        "photos.csv": str(folder / "photos.csv"),
        "TARS": str(tars),
        "PARQUET": str(put(folder / "parquet", files)),
        "s3://bucket/train.parquet": f"{bucket}/train.parquet",
        "s3://bucket/root": f"{bucket}/root",
    }


def splits_of(samples: list[Sample]) -> Iterator[tuple[str, str]]:
    """Of every class, a third is test."""
    seen: Counter[str] = Counter()
    for name, label, _ in samples:
        yield name, "test" if seen[label] < TINY_COUNTS[label] // 3 else "train"
        seen[label] += 1


def labelled_tar(samples: list[Sample]) -> bytes:
    """Each sample with its own .cls and .json; the product is the class, so that every class is one group."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, label, data in samples:
            stem, _, extension = name.rpartition(".")
            body = json.dumps({"category": label, "product": label}).encode()
            for suffix, content in {extension: data, "cls": label.encode(), "json": body}.items():
                entry = tarfile.TarInfo(f"{stem}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def renamed(parquet: bytes) -> bytes:
    """With other columns, and no word of what they are."""
    stream = io.BytesIO()
    table = pq.read_table(pa.BufferReader(parquet)).rename_columns(["photo", "kind"])
    pq.write_table(table.replace_schema_metadata({}), stream)
    return stream.getvalue()


def test_the_python_blocks_run(ran: tuple[Path, list[Result]], tmp_path: Path) -> None:
    # The tiny set has fewer images than one of the README's batches.
    programs = [text.replace("batch_size=64", "batch_size=8") for text in blocks(README, "python")]
    assert len(programs) == 3
    stages = '("natural", 20, 0.1), ("balanced", 5, 0.01)'
    assert sum(stages in text for text in programs) == 1
    # One epoch each, of a network a fortieth of the size: what is held is that the loop runs.
    programs = [text.replace(stages, '("natural", 1, 0.1), ("balanced", 1, 0.01)') for text in programs]
    programs = [text.replace("resnet18(", "shufflenet_v2_x0_5(") for text in programs]
    import torch

    given = {"checkpoint": None, "device": "cpu", "path": tmp_path / "checkpoint.pt", "model": torch.nn.Linear(1, 1)}
    for program in programs:
        exec(program.replace('"ROOT"', repr(str(ran[0]))), given)


def test_the_training_loop_of_a_user_has_thirty_lines() -> None:
    (loop,) = blocks(section("Train"), "python")
    assert "torch.nn.CrossEntropyLoss" in loop
    assert len(loop.splitlines()) <= 30


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
