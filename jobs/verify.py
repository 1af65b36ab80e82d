"""``python -m jobs.verify ROOT [options]``: the proof of a snapshot, for schedulers.

The options are those of ``evenshard verify``; exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys

from pipeline.cli import run
from pipeline.cli.checks import verify

if __name__ == "__main__":
    sys.exit(run(verify))
