"""The numbers of docs/METRICS.md are computed, its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_snapshot import write_snapshot

from pipeline.cli import cli, run
from pipeline.learn.metrics import accuracy, balanced_accuracy, kappa
from pipeline.plan.shots import RANGES

PAGE = (Path(__file__).parents[1] / "docs/METRICS.md").read_text("utf-8")
IMAGES = 2_000_000
COUNTS = {"train": (150, 19, 9, 4, 1), "val": (5, 3, 1, 0, 0), "test": (5, 3, 2, 1, 0)}


def rows(after: str) -> list[list[float]]:
    """The numbers of the first table behind these words."""
    table = PAGE.partition(after)[2].partition("|---")[2]
    lines = re.match(r"[-|]*\n((?:\|.*\n)+)", table)
    assert lines is not None
    return [[float(cell) for cell in line.strip("| ").split("|")] for line in lines[1].splitlines()]


def figures(prevalence: float, recall: float, specificity: float) -> dict[str, float]:
    rare = round(IMAGES * prevalence)
    hits, spared = round(rare * recall), round((IMAGES - rare) * specificity)
    counts = np.array([hits, rare - hits, IMAGES - rare - spared, spared])
    truth, told = np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0])
    found = np.array([spared / (IMAGES - rare), hits / rare])
    precision = hits / max(hits + counts[2], 1)
    return {
        "accuracy": accuracy(truth, told, counts),
        "precision": precision,
        "f1": 2 * precision * found[1] / max(precision + found[1], 1e-9),
        "kappa": kappa(truth, told, counts),
        "recall": found[1],
        "specificity": found[0],
        "balanced": balanced_accuracy(found),
    }


def test_the_worked_table_is_computed() -> None:
    table = rows("at four prevalences of that class:")
    assert [row[0] for row in table] == [0.5, 0.1, 0.01, 0.001]
    for prevalence, *told in table:
        assert told == [round(value, 3) for value in figures(prevalence, 0.9, 0.9).values()]


def test_the_table_of_the_model_that_knows_one_class_is_computed() -> None:
    table = rows("calls everything the frequent class:")
    assert len(table) == 4
    for prevalence, *told in table:
        made = figures(prevalence, 0, 1)
        assert told == [round(made[name], 3) + 0.0 for name in ("accuracy", "kappa", "balanced")]


def test_groups_are_those_of_the_code() -> None:
    assert f"{RANGES['many']}, {RANGES['medium']}, {RANGES['few']}, {RANGES['one']}" in PAGE


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = write_snapshot(tmp_path / "root", COUNTS)
    monkeypatch.chdir(tmp_path)
    head = torch.nn.Linear(3, 5)
    given = {"model": lambda images: head(images.mean((2, 3)))}
    programs = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        exec(program.replace('"ROOT"', repr(str(tmp_path / "root"))).replace("batch_size=64", "batch_size=8"), given)
    assert head.weight.grad is not None
    with torch.inference_mode():
        assert run(cli, ["evaluate", snapshot.root, "predictions.parquet", "--tau", "1"]) == 0
    told = capsys.readouterr().out
    assert "logits, snapshot 1, split test: 11 of 11 images" in told
    assert "sensitivity at specificity 0.99" in told
