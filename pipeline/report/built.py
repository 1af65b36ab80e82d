"""The page of a build: written after the snapshot is published, and never a reason to call the build failed.

Comes in: what was asked of a build, and what it did. Goes out: where the page lies, or why there is none.
"""

from __future__ import annotations

import contextlib

from pipeline.config import BuildConfig
from pipeline.errors import EvenshardError
from pipeline.ingest.source import open_originals
from pipeline.ingest.summary import BuildSummary
from pipeline.report.page import write_report
from pipeline.report.pictures import Originals
from pipeline.report.survey import Progress
from pipeline.schema import report_path
from pipeline.store import Store


def write_build_report(
    config: BuildConfig, summary: BuildSummary, *, progress: Progress | None = None
) -> tuple[str, str]:
    """Where the page of the snapshot lies and '', or '' and a notice. A build that changed nothing keeps its page."""
    try:
        store, path = Store.open(config.root), report_path(summary.number)
        if not summary.changed and store.exists(path):
            return store.local_path(path) or f"{store.url}/{path}", ""
        return write_report(store, at=summary.number, originals=_originals(config), progress=progress), ""
    except Exception as error:  # whatever it is: the snapshot is published, and a page can be written later
        told = str(error) if isinstance(error, EvenshardError | OSError) else repr(error)
        return "", (
            f"snapshot {summary.number} is published, but its page could not be written: {told}; "
            "`evenshard report ROOT` writes it"
        )


def _originals(config: BuildConfig) -> Originals | None:
    with contextlib.suppress(EvenshardError):  # then rejected images are named, not shown
        reader = open_originals(config)
        return reader.read if reader else None
    return None
