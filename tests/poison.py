"""A decoder that dies of what it decodes: what marks an image as poison stands in its bytes."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np

from pipeline.images import Facts, Inspection

MARK = b"poison:"
KINDS = ("segv", "abort", "fpe", "exit", "spin", "spin-held", "bloat")
"""Deaths that only a decoder itself can cause. Others: 'stuck' waits for ever, 'killed' was killed from outside."""


class Poisonable(Inspection):
    """The usual inspection, whose decoder breaks in the way that is written behind the image."""

    def decode(self, data: bytes) -> Facts:
        """Die, or decode."""
        if MARK in data:
            _KINDS[data.split(MARK)[1].split(b";")[0].decode()](data)
        return super().decode(data)


def poisoned(image: bytes, kind: str) -> bytes:
    """``image`` with a mark behind its end, which every decoder skips."""
    return image + MARK + kind.encode() + b";"


def _segv(_: bytes) -> None:
    ctypes.string_at(8)


def _signal(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    time.sleep(60)


def _spin(_: bytes) -> None:
    while True:
        pass


def _spin_held(_: bytes) -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")  # C code that keeps the GIL: no other thread of Python runs meanwhile


def _bloat(_: bytes) -> None:
    blocks: list[np.ndarray] = []
    while True:
        blocks.append(np.empty(16 << 20, dtype=np.uint8))


def _stuck(_: bytes) -> None:
    threading.Event().wait()


def _once(data: bytes) -> None:
    """Killed from outside at the first attempt only: the file named in the mark remembers."""
    note = Path(os.fsdecode(data.split(MARK)[1].split(b";")[1]))
    if not note.exists():
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)


_KINDS = {
    "segv": _segv,
    "abort": lambda _: os.abort(),
    "fpe": lambda _: _signal(signal.SIGFPE),
    "exit": lambda _: os._exit(3),
    "spin": _spin,
    "spin-held": _spin_held,
    "bloat": _bloat,
    "stuck": _stuck,
    "killed": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "killed-once": _once,
}
