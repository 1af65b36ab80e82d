"""Limits that hold for C code too, with or without the GIL: the kernel ends a process that breaks them.

`setitimer` on the processor time of this process, and on the clock, with the signals' default action, which is to end
the process. Two system calls before and two after an image: 3 us together, on a busy core.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

from pipeline.images.facts import Limits


def watch(limits: Limits) -> None:
    """From now on this process ends by SIGPROF after ``max_cpu_s`` of its own, by SIGALRM after ``wall_s``."""
    signal.setitimer(signal.ITIMER_PROF, limits.max_cpu_s)
    signal.setitimer(signal.ITIMER_REAL, limits.wall_s)


def unwatch() -> None:
    """The decoder has come back."""
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


_M_ARENA_MAX = -8  # of glibc's mallopt


def limit_memory(limits: Limits) -> tuple[int, int] | None:
    """Bound what this process may add to its address space; returns the previous limits, None where there are none."""
    _share_arenas()
    try:
        with open("/proc/self/statm", "rb") as file:
            present = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: no way to tell what is in use
        return None
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = present + limits.memory_bytes
    soft = min(limit for limit in (wanted, *before) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (soft, before[1]))
    return before


def _share_arenas() -> None:
    """Keep threads from reserving 64 MiB of addresses each, of which they use little: they would count."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
