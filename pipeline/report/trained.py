"""The page of a training: figures after each stage, recall by class count, what the worst classes are taken for.

Comes in: the summary that a training leaves (``summary.json``). Goes out: ``OUT/index.html``. Guarantees: as of the
page of a snapshot - nothing is loaded, here no script runs at all, names of classes are text and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.report.html import asset, content_policy, environment, write_file

PAGE = "index.html"
MAX_LISTED = 20_000
"""Classes in the page's table, those with most images first; the summary has all."""


def write_training_page(summary: Mapping[str, Any], out: str) -> str:
    """Write the page of ``summary`` into the folder ``out``; says where."""
    path = str(Path(out) / PAGE)
    write_file(path, render_training(summary).encode())
    return path


def render_training(summary: Mapping[str, Any]) -> str:
    """The whole page."""
    style = asset("page.css")
    classes = sorted(summary["classes"], key=lambda row: (-row["train"], row["class_id"]))
    place = {row["from"]: number for number, row in enumerate(summary["by_count"]["as_it_is"])}
    last = summary["stages"][-1]["scores"]
    return _template().render(
        **{name: summary[name] for name in ("recipe", "snapshot", "split", "stages", "by_count", "worst", "ranks")},
        device=summary["device"],
        best=last["as_it_is"],
        listed=classes[:MAX_LISTED],
        num_unlisted=max(0, len(classes) - MAX_LISTED),
        loop_index=lambda row: place[row["from"]],  # pyright: ignore[reportUnknownLambdaType]
        style=style,
        policy=content_policy(style),
    )


@cache
def _template() -> Any:
    return environment().from_string(asset("trained.html"))
