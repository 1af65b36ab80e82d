"""One night: build, verify, page, difference, collection, and one line that says how it went.

Comes in: the configuration of a build, how many snapshots to keep, which share to verify. Goes out: a ``Night``, which
is one line of JSON, and a file in runs/nightly/. Guarantees: one nightly run of a ROOT at a time, a second one is
refused and does nothing; a step that fails hides no other: what can still be looked at, is; nothing is collected
unless the snapshot was proved; whatever was lost, refused or left undone makes the exit code 1.

Inside, in this order:
    turn.py        whose turn it is: a numbered claim that a dead owner loses
    night.py       what a night did: the line, the exit code
    run.py         the steps, in order
"""

from pipeline.nightly.night import Night
from pipeline.nightly.run import nightly_config, run_nightly
from pipeline.nightly.turn import Holder, find_holder

__all__ = ["Holder", "Night", "find_holder", "nightly_config", "run_nightly"]
