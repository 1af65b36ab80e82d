"""What is different since the snapshot before, and which command made this one.

Comes in: a snapshot. Goes out: a ``Since`` and a ``Run`` of ``ingest.history``. Guarantees: where the snapshot before
cannot be read any more, the page says why instead of failing; what runs/ holds is a note, told where it is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import EvenshardError
from pipeline.ingest.diff import KINDS, Change, Diff, Progress, diff
from pipeline.snapshot import Snapshot

NUM_NAMED = 6
NUM_DRIFTS = 12

_SENTENCE = {
    "added": "{class_name}",
    "removed": "{class_before}",
    "changed": "{class_name}",
    "renamed": "was {path_before}",
    "relabelled": "{class_before} \u2192 {class_name}",
    "moved": "{split_before} \u2192 {split}",
}


@dataclass(frozen=True)
class Since:
    """The difference to the snapshot before; None for the first one, or where ``problem`` says why."""

    diff: Diff | None
    problem: str = ""

    @property
    def kinds(self) -> list[tuple[str, int, list[tuple[str, str]]]]:
        """By kind of change: how many images, and (path, in which way) of a few."""
        told = self.diff
        if told is None:
            return []
        return [
            (
                kind,
                told.counts[kind],
                [(change.path or change.path_before or "", _way(kind, change)) for change in named],
            )
            for kind in KINDS
            if told.counts[kind]
            for named in (told.images[kind],)
        ]

    @property
    def is_same(self) -> bool:
        told = self.diff
        return told is not None and not (any(told.counts.values()) or told.drift or told.rejects)


def since_the_one_before(snapshot: Snapshot, progress: Progress | None = None) -> Since:
    """Compare ``snapshot`` with the one before it."""
    if snapshot.number == 1:
        return Since(None, "This is the first snapshot.")
    try:
        return Since(diff(snapshot.store, snapshot.number - 1, snapshot.number, num_named=NUM_NAMED, progress=progress))
    except EvenshardError as error:
        return Since(None, f"It cannot be compared with snapshot {snapshot.number - 1}: {error}")


def _way(kind: str, change: Change) -> str:
    return _SENTENCE[kind].format(**{name: value or "?" for name, value in vars(change).items()})
