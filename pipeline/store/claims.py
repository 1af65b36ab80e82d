"""Who still works on an entry of staging/, or on a temporary directory: a lock that the kernel gives back when its
process ends, however it ends.

Comes in: paths of temporary files and directories. Goes out: locks, and the removal of what nobody holds. Guarantees:
what a living process holds is never removed, whichever process sweeps; what a killed one left behind is.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import uuid
from contextlib import suppress

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_OURS = re.compile(r"\d+-[0-9a-f]{32}")  # what staging entries are called; anything else is left alone
_TEMPORARY = re.compile(r"evenshard-\d+-[0-9a-f]{32}")  # in TMPDIR, where others have their files, too

TEMPORARY_QUIET_S = 3600.0
"""What a killed process left in TMPDIR goes after so long, once another process there needs a temporary directory."""

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


def temporary_dir() -> str:
    """A new directory in TMPDIR, held by this process, which is to remove it; first, what killed ones left is swept."""
    global _has_swept
    if not _has_swept:
        _has_swept = True
        sweep_temporary(TEMPORARY_QUIET_S)
    while True:
        path = f"{tempfile.gettempdir()}/evenshard-{os.getpid()}-{uuid.uuid4().hex}"
        os.mkdir(path, 0o700)
        if claim(path):
            return path


_has_swept = False


def sweep_temporary(quiet_s: float) -> int:
    """Remove this user's ``temporary_dir`` directories that nobody holds, or has touched for ``quiet_s``: how many."""
    folder, before_s = tempfile.gettempdir(), time.time() - quiet_s
    paths = [f"{folder}/{name}" for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    return sum(_is_own_dir(path) and _take(path, before_s) for path in paths)


def _is_own_dir(path: str) -> bool:
    """TMPDIR is everybody's: another user's directory, or a link, under such a name is not ours to remove."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


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
