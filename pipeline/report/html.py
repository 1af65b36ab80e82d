"""What every page is made with: a template engine that escapes, a policy that forbids, a file that is whole.

Comes in: templates and styles of this room. Goes out: HTML. Guarantees: values are escaped unless they are ours;
nothing may load or run but the named style and script.
"""

from __future__ import annotations

import base64
import hashlib
import os
from contextlib import suppress
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipeline.errors import StoreError
from pipeline.report import words


def asset(name: str) -> str:
    """A file of this room."""
    return files("pipeline.report").joinpath(name).read_text("utf-8")


def content_policy(style: str, script: str = "") -> str:
    """Nothing may load or run but the one style and the one script, by hash, and pictures in the page itself."""
    rules = [
        "default-src 'none'",
        f"style-src 'sha256-{_digest(style)}'",
        *([f"script-src 'sha256-{_digest(script)}'"] if script else []),
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join(rules)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def environment() -> Environment:
    """Escapes every value, knows no undefined one, and says names as ``words`` does."""
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Any] = {
        "visible": words.visible,
        "bytes": words.num_bytes,
        "num": lambda value: f"{value:,}",
        "times": words.times,
    }
    made.filters.update(filters)
    functions: dict[str, Any] = {"percent": words.percent, "counted": words.counted}
    made.globals.update(functions)
    return made


def write_file(out: str, page: bytes) -> None:
    """Whole or not at all: an interrupted report leaves the page that was there."""
    draft = f"{out}.{os.urandom(4).hex()}.part"
    try:
        try:
            with open(draft, "xb") as file:
                file.write(page)
            os.replace(draft, out)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(draft)
    except OSError as error:
        raise StoreError(f"the page cannot be written to {out!r}: {error.strerror}; name another file") from error
