"""What a thread that does not come back is doing: for the error that ends a hang by name.

Comes in: a thread, and a function that tells of its work. Goes out: a sentence. Guarantees: nothing here waits for what
hangs, neither for the thread nor, beyond a moment, for storage.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType

_MOMENT_S = 2.0

_STAGES = {  # by the innermost of our modules on its stack
    "pipeline.store": "reading from storage",
    "pipeline.snapshot": "reading from storage",
    "pipeline.stream.remote": "reading from storage",
    "pipeline.stream.cache": "reading from storage, or waiting for another process that downloads the same shard",
    "pipeline.images": "decoding",
    "pipeline.plan": "planning",
    "pipeline.keyed": "planning",
    "pipeline.stream.transforms": "in the transform",
    "pipeline.stream.batches": "in the transform",
}


def stage_of(thread_id: int | None) -> str:
    """The stage, and the innermost line of the thread; what is left to say if it has not begun or has just ended."""
    frame = sys._current_frames().get(thread_id or 0)  # pyright: ignore[reportPrivateUsage]
    if frame is None:
        return "not begun: its thread is busy or has ended"
    innermost, where = frame, f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
    while frame is not None:
        stage = _stage(frame)
        if stage is not None:
            if frame is innermost and stage == "in the transform":
                stage = "assembling the batch"
            return f"{stage} ({where})"
        frame = frame.f_back
    return f"at {where}"


def _stage(frame: FrameType) -> str | None:
    module = str(frame.f_globals.get("__name__", ""))
    names = module.split(".")
    return next((_STAGES[name] for n in (3, 2) if (name := ".".join(names[:n])) in _STAGES), None)


def within_a_moment(describe: Callable[[], str]) -> str:
    """Its answer, or why there is none: it may meet the very storage that hangs."""
    answer: list[str] = []

    def ask() -> None:
        try:
            answer.append(describe())
        except Exception as error:
            answer.append(f"what it needs cannot be told: {type(error).__name__}: {error}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_MOMENT_S)
    return answer[0] if answer else "what it needs cannot be told: reading the sample table hangs, too"
