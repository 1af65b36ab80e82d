"""Progress of what takes long: a live bar on a terminal, a line every few seconds elsewhere (job logs, CI)."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline.cli.logs import is_json, say

LINE_EVERY_S = 2.0
"""Whatever takes no longer says nothing."""

_VERBS = {
    "list": "listing the source",
    "start": "starting workers",
    "read": "reading images",
    "settle": "settling duplicates and splits",
    "tables": "writing tables and manifests",
    "commit": "publishing",
    "report": "writing the page",
    "export": "writing tars",
    "draw": "drawing images",
    "look": "looking at files",
    "keep": "reading what is kept",
    "remove": "removing files",
    "survey": "reading indexes",
    "compare": "comparing shards",
    "pictures": "making pictures",
    "history": "reading records",
}
_UNITS = {
    **dict.fromkeys(("look", "remove"), "files"),
    **dict.fromkeys(("survey", "compare"), "shards"),
    "pictures": "pictures",
    **dict.fromkeys(("history", "keep"), "snapshots"),
}


def verb(stage: str) -> str:
    """What is being done, in words."""
    return _VERBS.get(stage, stage or "starting")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} {task.fields['unit']}/s")


class Reporter:
    """Use as a context manager; the instance is the ``progress`` callback of ``pipeline.build``."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._stage_start_s = self._last_line_s = 0.0
        self._first_done = 0

    def __enter__(self) -> Reporter:
        if not self._quiet and sys.stderr.isatty() and not is_json():
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
            self._live = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._quiet:
            return
        if self._live is not None:
            self._show_bar(self._live, stage, done, total)
        else:
            self._print_line(stage, done, total)

    def _show_bar(self, live: Progress, stage: str, done: int, total: int) -> None:
        if stage != self._stage or self._task is None:
            if self._task is not None:
                live.remove_task(self._task)
            self._stage = stage
            self._task = live.add_task(_VERBS.get(stage, stage), total=total or None, unit=_UNITS.get(stage, "images"))
        live.update(self._task, completed=done, total=total or None)

    def _print_line(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_start_s, self._last_line_s, self._first_done = stage, now, now, done
            if stage in ("list", "start", "read", "export"):
                told = f" ({total:,})" if total else ""
                say(f"{_VERBS.get(stage, stage)}{told}", event="stage", stage=stage, done=done, total=total)
            return
        if now - self._last_line_s < LINE_EVERY_S:
            return
        self._last_line_s = now
        rate = (done - self._first_done) / (now - self._stage_start_s)
        left = f", {(total - done) / rate:,.0f} s left" if rate > 0 and total else ""
        of_all = f" of {total:,}" if total else ""  # of containers nobody knows how many images they hold
        say(
            f"{_VERBS.get(stage, stage)}: {done:,}{of_all}, {rate:,.0f} {_UNITS.get(stage, 'images')}/s{left}",
            event="progress",
            stage=stage,
            done=done,
            total=total,
            per_s=round(rate, 1),
        )
