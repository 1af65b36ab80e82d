"""What is said on standard error while something runs: lines for people or, with EVENSHARD_LOG=json, an object a line.

Comes in: text, and the facts behind it; what ``ingest.crew`` logs about units. Goes out: lines. Guarantees: with json,
every line of this project on standard error is one JSON object with time, level, event and message; without, nothing
of units is said and no line looks otherwise than before; no string holds a credential.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import click

from pipeline.cli.show import painted, safe
from pipeline.store import redact


def is_json() -> bool:
    """Whether lines are to be read by programs."""
    return os.environ.get("EVENSHARD_LOG") == "json"


def say(message: str, *, event: str, level: str = "info", **facts: Any) -> None:
    """One line; ``facts`` are for programs alone, and what is an error is painted for people."""
    if is_json():
        click.echo(_line(level, event, message, facts), err=True)
        return
    mark = f"{painted(f'{event}:', 'red', sys.stderr)} " if level == "error" else ""
    click.echo(f"{mark}{redact(safe(message))}", err=True)


def _line(level: str, event: str, message: str, facts: dict[str, Any]) -> str:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    told = {"time": now, "level": level, "event": event, "message": message, **facts}
    return json.dumps({name: redact(value) if isinstance(value, str) else value for name, value in told.items()})


class _Handler(logging.Handler):
    """Log records of this project as such lines."""

    def emit(self, record: logging.LogRecord) -> None:
        facts = getattr(record, "facts", {})
        event = record.name.rpartition(".")[2]
        click.echo(_line(record.levelname.lower(), event, record.getMessage(), facts), err=True)


@contextmanager
def logging_units() -> Generator[None]:
    """With json, also what happens to units."""
    if not is_json():
        yield
        return
    logger, handler = logging.getLogger("evenshard"), _Handler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
