"""``python -m jobs.build SOURCE ROOT [options]``: the build, for `ray job submit` and schedulers.

The options are those of ``evenshard build``; exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys

from pipeline.cli import run
from pipeline.cli.commands import build

if __name__ == "__main__":
    sys.exit(run(build))
