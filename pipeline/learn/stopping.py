"""Signals that ask a training to stop, noted until a step is done.

Comes in: SIGTERM, SIGINT. Goes out: ``Stop.asked``. Guarantees: the first signal interrupts no step and no write; the
second one is Ctrl-C as usual; handlers that were there are put back.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    """Whether this process was asked to stop."""

    asked: bool = False


@contextmanager
def stopping() -> Generator[Stop]:
    """Note signals while this is open; elsewhere than in the main thread there are none to note."""
    stop = Stop()

    def note(*_: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
