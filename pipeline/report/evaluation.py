"""What a model really does, on one page: figures, groups, worst classes.

Comes in: an ``Evaluation``. Goes out: a file. Guarantees: those of every page of this room; it has no script at all.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from pipeline.learn.evaluation import OF_PREVALENCE, Evaluation
from pipeline.learn.variants import Figure
from pipeline.plan.shots import GROUPS, RANGES
from pipeline.report import words
from pipeline.report.html import asset, content_policy, environment, write_file

MAX_WORST = 200

Row = dict[str, Any]

_OF_ONE = ("kappa", "macro AUROC", "calibration error")
"""Not a share of anything, and therefore not told in percent."""


def write_evaluation(told: Evaluation, out: str) -> None:
    """Write the page to the local file ``out``, whole or not at all."""
    write_file(out, render_evaluation(told).encode())


def render_evaluation(told: Evaluation) -> str:
    """The whole page."""
    style = asset("page.css")
    worst = told.worst(MAX_WORST)
    notes = [*told.notes, *(note for one in told.variants for note in one.notes)]
    if told.temperature is not None:
        notes.append(f"Temperature on val: {told.temperature:.3g}; scores divided by it are best calibrated.")
    return _template().render(
        told=told,
        rows=_rows(told),
        bars=_bars(told),
        worst=[_class_row(told, number) for number in worst],
        num_unlisted=told.num_classes_measured - len(worst),
        notes=notes,
        style=style,
        policy=content_policy(style),
    )


def _rows(told: Evaluation) -> list[Row]:
    first = told.variants[0].figures
    return [
        {
            "title": title,
            "moves": title in OF_PREVALENCE,
            "count": first[title].count,
            "cells": [_cell(title, one.figures[title]) for one in told.variants],
        }
        for title in first
        if first[title].count
    ]


def _cell(title: str, figure: Figure) -> Row:
    scale, digits = (1, 3) if title in _OF_ONE else (100, 1)
    low, high = figure.interval
    shown = "" if math.isnan(low) else f"[{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
    if math.isnan(figure.value):
        return {"value": "-", "interval": ""}
    value = f"{scale * figure.value:.{digits}f}"
    return {"value": value if scale == 1 else f"{value}\u202f%", "interval": shown}


def _bars(told: Evaluation) -> list[Row]:
    bars: list[Row] = []
    for place, group in enumerate(GROUPS):
        for number, one in enumerate(told.variants):
            figure = one.figures[f"recall, {group}"]
            if figure.count:
                title = f"{group} ({RANGES[group]}), {'to ' if number else ''}{one.name}"
                width = round(100 * figure.value, 2)
                bars.append({"title": title, "group": place, "width": width, "value": words.percent(figure.value, 1)})
    return bars


def _class_row(told: Evaluation, number: int) -> Row:
    taken = int(told.variants[0].confused[number])
    return {
        "name": told.names[number],
        "train": int(told.train[number]),
        "images": int(told.support[number]),
        "recall": [words.percent(float(one.recall[number]), 1) for one in told.variants],
        "taken": told.names[taken] if taken >= 0 else "-",
    }


@cache
def _template() -> Any:
    return environment().from_string(asset("evaluation.html"))
