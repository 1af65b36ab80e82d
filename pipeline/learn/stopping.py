"""Signals that ask a training to stop, noted until a step is done.

Comes in: SIGTERM, SIGINT; the death of torchrun. Goes out: ``Stop.asked``. Guarantees: the first signal interrupts no
step and no write; the second one is Ctrl-C as usual; handlers that were there are put back; ranks whose torchrun was
killed do not train on in nobody's hands.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    """Whether this process was asked to stop."""

    signalled: bool = False
    torchrun: int | None = None  # its process, where it started this one

    @property
    def asked(self) -> bool:
        """By a signal, or as torchrun is gone, which would have sent one if it could."""
        return self.signalled or (self.torchrun is not None and os.getppid() != self.torchrun)


@contextmanager
def stopping() -> Generator[Stop]:
    """Note signals while this is open; elsewhere than in the main thread there are none to note."""
    stop = Stop(torchrun=os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)

    def note(*_: object) -> None:
        if stop.signalled:
            raise KeyboardInterrupt
        stop.signalled = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
