"""What storage errors mean and what to do about them, and text without credentials."""

from __future__ import annotations

import errno
import os
import re

RESTORE = "restore the file from a copy, or build into an empty ROOT"

_ADVICE = {
    errno.ENOSPC: "free some space, or choose a ROOT on a larger disk, and run again: finished work is kept",
    errno.EDQUOT: "raise the quota, or choose another ROOT, and run again: finished work is kept",
    errno.EFBIG: "raise the file size limit (ulimit -f), and run again",
    errno.EROFS: "mount the file system writable, or choose another ROOT",
    errno.EACCES: "give this user the permission, or choose another ROOT",
    errno.EPERM: "give this user the permission, or choose another ROOT",
    errno.EXDEV: "all of ROOT must lie on one file system: move back the part that is mounted or linked elsewhere",
    errno.ELOOP: "the files of a snapshot are plain files: replace the symbolic link by the file itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the device failed: check the disk, then restore from a copy",
}

_NAMES = (
    r"\w*(?:secret|session_?token|security_?token|auth_?token|sas_?token|password|account_?key|signature)|token|sig"
)

_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?<=://)[^/\s'\"]*@"), ""),  # user:password@
    (re.compile(r"(?<=://)[^/\s:@]+:(?!\d+(?:/|\s|$))[^\s@]*@"), ""),  # the same, with '/' in the password
    (re.compile(r"(?<=://)([^\s?#'\"<>]*)[?#][^\s'\"<>]*"), r"\1"),  # query and fragment: presigned URLs
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), "***"),
    (re.compile(r"\b(authorization['\"]?\s*[:=]\s*['\"]?)(?:\w+\s+)?[^\s'\",]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b(bearer)\s+[\w.~+/=-]+", re.IGNORECASE), r"\1 ***"),
    (
        re.compile(
            r"((?:x-amz-(?:signature|credential|security-token)|secret_?(?:access_?)?key|session_?token|password)"
            r"['\"]?\s*[:=]\s*['\"]?)[^\s'\"&,]+",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    (
        re.compile(rf"(['\"](?:{_NAMES})['\"]\s*:\s*['\"])[^'\"]+", re.IGNORECASE),
        r"\1***",
    ),  # options, as a dict shows them
    (re.compile(rf"\b((?:{_NAMES})=['\"]?)[^\s'\"&,;)]+", re.IGNORECASE), r"\1***"),  # and as a call or a query does
)

_SECRET_VARIABLES = re.compile(
    r"(?:^|_)(?:SECRET|TOKEN|PASSWORD|PASSWD|ACCOUNT_KEY|CONNECTION_STRING|SAS)(?:_(?!FILE$|PATH$|DIR$)|$)"
)
_SHORTEST = 8  # a shorter value is no secret, and may be in any word


def redact(text: str) -> str:
    """``text`` without what opens doors: userinfo and query strings of URLs, access keys, tokens, options that are
    named like a secret, and whatever this process's environment has under such a name."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_VARIABLES.search(name.upper()):
            text = text.replace(value, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def explain(error: OSError) -> str:
    """Why storage refused, and what to do where that is known."""
    reason = redact(error.strerror or str(error) or type(error).__name__)
    advice = _ADVICE.get(error.errno or 0)
    return f"{reason}; {advice}" if advice else reason
