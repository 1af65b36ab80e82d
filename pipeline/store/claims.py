"""Who still works on an entry of staging/: a lock that the kernel gives back when its process ends, however it ends.

Comes in: paths of temporary files and directories. Goes out: locks, and the removal of what nobody holds. Guarantees:
what a living process holds is never removed, whichever process sweeps; what a killed one left behind is.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
from contextlib import suppress

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_OURS = re.compile(r"\d+-[0-9a-f]{32}")  # what staging entries are called; anything else is left alone

_held: dict[str, int] = {}
_lock = threading.Lock()


def claim(path: str) -> bool:
    """Hold ``path`` until it is gone or this process ends; False if a sweep took it before it was held."""
    _forget_gone()
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except FileNotFoundError:
        return False
    except OSError:  # it cannot be held; only its age protects it
        return True
    with suppress(OSError):  # a file system without locks: a sweep cannot take one there either
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        same = os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        same = False
    if not same:
        os.close(descriptor)
        return False
    with _lock:
        _held[path] = descriptor
    return True


def _forget_gone() -> None:
    with _lock:
        for path in [path for path in _held if not os.path.lexists(path)]:
            os.close(_held.pop(path))


def sweep_abandoned(staging: str, before_s: float) -> int:
    """Remove the entries that nobody holds and nobody has touched since ``before_s``; returns how many went.

    The age is a second fence, for network file systems whose locks end at the machine.
    """
    try:
        names = os.listdir(staging)
    except FileNotFoundError:
        return 0
    return sum(_OURS.fullmatch(name) is not None and _take(f"{staging}/{name}", before_s) for name in names)


def _take(path: str, before_s: float) -> bool:
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError:
        return False  # gone, or not ours to open
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _touched_s(path) >= before_s:
            return False
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
        return not os.path.lexists(path)
    except OSError:
        return False  # held, or no locks here
    finally:
        os.close(descriptor)


def _touched_s(path: str) -> float:
    inside = [entry.path for entry in os.scandir(path)] if os.path.isdir(path) else []
    return max(os.lstat(one).st_mtime for one in (path, *inside))
