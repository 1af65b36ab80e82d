"""What goes wrong with one file: what is worth another attempt, and what to say of it in the end.

Comes in: errors of the file system and of clients of object stores. Goes out: an answer, or ``ImageRejected``.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import MissingExtraError
from pipeline.images import ImageRejected
from pipeline.schema import Reason

RETRY_PAUSES_S = (0.1, 0.3, 0.9, 2.7, 8.1)
"""Before the second and each later attempt, as `store` waits for ROOT."""

_TRANSIENT = frozenset(
    (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)
)
_ABSENT = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP))
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

T = TypeVar("T")


class NoRangesError(Exception):
    """A web server sends whole files only."""


def attempt(call: Callable[[], T], is_worth_retrying: Callable[[Exception], bool]) -> T:
    """``call()``, again after a pause for as long as its failures are worth it and there are pauses left."""
    for pause_s in RETRY_PAUSES_S:
        try:
            return call()
        except Exception as error:
            if not is_worth_retrying(error):
                raise
        time.sleep(pause_s)
    return call()


def is_transient(error: Exception) -> bool:
    """Of local files: what may pass by itself."""
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def is_doubtful(error: Exception) -> bool:
    """fsspec calls every failure of HTTP "not found" and hides the real one as the cause."""
    if isinstance(error, FileNotFoundError):
        return getattr(error.__cause__, "status", 404) not in (403, 404, 410)
    return not isinstance(error, (*_FINAL, ImageRejected, MissingExtraError, NoRangesError))


def as_rejection(error: Exception) -> ImageRejected:
    """What any error of reading one file says of it; holds no place, so that a copy of the source says the same."""
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    if status is not None and status not in (404, 410):
        return ImageRejected(Reason.UNREADABLE, f"the server answers {status}")
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno in _ABSENT):
        return ImageRejected(Reason.GONE, "no such file")
    if isinstance(error, ValueError):
        return ImageRejected(Reason.GONE, "no file can have this name")
    why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return ImageRejected(Reason.UNREADABLE, why)
