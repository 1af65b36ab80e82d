"""Units of work for tests of engines, importable by their workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import IntegrityError


def count(number: int, *, attempt: int) -> Iterator[int | str]:
    yield number
    yield f"{number} at attempt {attempt}"


def die_until(wanted: int, number: int, *, attempt: int) -> Iterator[int | str]:
    """Killed after it has told of two images, until the attempt that is wanted."""
    yield 2
    time.sleep(0.1)  # what was told is on its way
    if attempt < wanted:
        os.kill(os.getpid(), signal.SIGKILL)
    yield number - 2
    yield f"{number} at attempt {attempt}"


def fail_with(error: Exception, *, attempt: int) -> Iterator[int]:
    yield 1
    raise error


def damaged(*, attempt: int) -> Iterator[int]:
    yield 0
    raise IntegrityError("that shard is damaged")


def run_on(folder: str, *, attempt: int) -> Iterator[int]:
    """Leave a note, and go on for a minute."""
    Path(folder, str(os.getpid())).touch()
    for _ in range(600):
        time.sleep(0.1)
        yield 0


def fail_once(folder: str, *, attempt: int) -> Iterator[int | str]:
    """Storage trouble the first time, then none."""
    yield 1
    note = Path(folder, "tried")
    if not note.exists():
        note.touch()
        raise OSError(5, "trouble")
    yield "done"


def what_ray_knows(*, attempt: int) -> Iterator[int | str]:
    """The name and the memory that Ray has for the task it is called from."""
    import ray

    context = ray.get_runtime_context()
    yield f"{context.get_task_name()}: {context.get_assigned_resources()['memory']:.0f} bytes"


def die_then_tell(*, attempt: int) -> Iterator[int | str]:
    if attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from what_ray_knows(attempt=attempt)
