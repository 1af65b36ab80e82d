"""The runbook: its links, the codes, names and messages that it quotes, and the repairs that it promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_image
from deploy_checks import anchors_of
from deploy_commands import DEPLOY, TOP, check_line, commands_in_markdown

import pipeline
from pipeline.config import GUARDRAILS
from pipeline.verify import verify

RUNBOOK = (DEPLOY / "RUNBOOK.md").read_text()


def test_its_commands_are_real_ones() -> None:
    for line in commands_in_markdown(RUNBOOK):
        check_line(line)


def test_links_of_the_runbook_lead_somewhere() -> None:
    anchors = list(anchors_of(RUNBOOK))
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([\w-]+)\)", RUNBOOK)) <= set(anchors)
    files = set(re.findall(r"\bdeploy/[\w./-]+\w", RUNBOOK))
    assert files
    assert not [name for name in files if not (TOP / name).is_file()]


def test_every_exit_code_and_every_guardrail_is_in_the_runbook() -> None:
    codes = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", RUNBOOK, re.MULTILINE) for code in row.split(",")}
    errors = {error.exit_code for error in vars(pipeline.errors).values() if hasattr(error, "exit_code")}
    assert codes >= errors | {0, 130}
    assert not [name for name in GUARDRAILS if f"`{name}`" not in RUNBOOK]


def strings_of_the_source() -> str:
    """All text constants of the project, those of one f-string joined by a NUL for each value."""
    found: list[str] = []
    for path in (TOP / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_the_runbook_quotes_are_those_of_the_code() -> None:
    table = RUNBOOK.partition("### What a failed build says")[2].partition("## Repairs")[0]
    quoted = [message for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for message in row.split("`")[1::2]]
    assert len(quoted) >= 9
    source = strings_of_the_source()
    parts = [part.strip() for message in quoted for part in re.split(r"\.\.\.|\b\d+\b", message)]
    assert [part for part in parts if part and part not in source] == []


def test_the_python_of_the_runbook_opens_an_older_snapshot(tiny_images: Path, tmp_path: Path) -> None:
    pipeline.build(tiny_images, tmp_path / "root", address="none", workers=1)
    (block,) = re.findall(r"^```python\n(.*?)^```", RUNBOOK, re.MULTILINE | re.DOTALL)
    block = block.replace('"ROOT"', repr(str(tmp_path / "root"))).replace("at=41", "at=1")
    names: dict[str, Any] = {}
    exec(block.replace("batch_size=64", "batch_size=4"), names)
    assert (names["snapshot"].number, len(names["loader"]) > 0) == (1, True)


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_lost_shard_comes_back_from_the_source_as_the_runbook_says(tmp_path: Path, damage: str) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    for number in range(12):
        (source / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        draw_image(number % 2, number).save(source / f"c{number % 2}" / f"{number}.png")
    pipeline.build(source, root, address="none", workers=1, shard_samples=3)
    lost = sorted(root.glob("shards/*/*.tar"))[0]
    whole = lost.read_bytes()
    lost.unlink() if damage == "missing" else lost.write_bytes(b"\0" * len(whole))
    assert not verify(root).sound
    lost.unlink(missing_ok=True)  # "remove it where it is damaged"
    again = pipeline.build(source, root, address="none", workers=1, shard_samples=3)
    assert 0 < again.num_read < 12
    assert lost.read_bytes() == whole
    assert verify(root).sound
