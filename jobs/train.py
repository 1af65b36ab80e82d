"""``torchrun -m jobs.train ROOT --stage MANIFEST:EPOCHS --out DIR [options]``: a training, for schedulers.

The options are those of ``evenshard train``; exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys

from pipeline.cli import run
from pipeline.cli.training import train

if __name__ == "__main__":
    sys.exit(run(train))
