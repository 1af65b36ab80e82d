"""``python -m jobs.export ROOT MANIFEST DEST [options]``: resampled tars, for `ray job submit`.

The options are those of ``evenshard export``; exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys

from pipeline.cli import run
from pipeline.cli.commands import export

if __name__ == "__main__":
    sys.exit(run(export))
