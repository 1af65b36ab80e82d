"""Refusals to publish what is probably an accident; each is waived by name.

Comes in: what a build has settled, and the newest snapshot. Goes out: nothing, or one CommitError that tells of every
guardrail that was hit, with numbers and the flag. Guarantees: nothing was published or written over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import BuildConfig
from pipeline.errors import CommitError
from pipeline.ingest.past import Lookup, Past
from pipeline.ingest.settle import Samples, Settlement
from pipeline.schema import SPLIT_UNSET, Reason
from pipeline.store import redact

_NOT_LOST = frozenset({Reason.DUPLICATE_OF, Reason.DUPLICATE_ROW, Reason.CLASS_EMPTY, Reason.LEAK})
"""Rejects that do not count against ``max_rejects``: no distinct labelled image is missing because of them."""

_NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Outlook:
    """What the next snapshot would hold, against what the newest one (``number``) holds."""

    number: int
    past: Past
    samples: Samples
    settled: Settlement
    class_names: tuple[str, ...]


def check(config: BuildConfig, outlook: Outlook | None, rejects: pa.Table, num_listed: int) -> None:
    """Raise CommitError unless every guardrail holds or is allowed; ``outlook`` is None where nothing can differ."""
    told = list(_too_many_rejects(config, rejects, num_listed))
    if outlook is not None and outlook.number:
        told += _compare(config, outlook)
    if told:
        raise CommitError(f"{'; '.join(told)}. Nothing was published")


def _too_many_rejects(config: BuildConfig, rejects: pa.Table, num_listed: int) -> list[str]:
    if config.max_rejects is None or "rejects" in config.allow:
        return []
    lost = sum(reason not in _NOT_LOST for reason in rejects["reason"].to_pylist())
    if lost <= _limit(config.max_rejects, num_listed):
        return []
    return [
        f"{lost} of {num_listed} entries were rejected, more than --max-rejects {config.max_rejects} allows; see "
        "the reasons, raise the limit, or use --allow rejects"
    ]


def _limit(budget: float, total: int) -> float:
    return budget if isinstance(budget, int) else budget * total


def _compare(config: BuildConfig, outlook: Outlook) -> list[str]:
    past, samples, names = outlook.past, outlook.samples, outlook.class_names
    stays = outlook.settled.split != SPLIT_UNSET
    before = np.bincount(past.class_id, minlength=len(names))
    now = np.bincount(samples.class_id[stays], minlength=len(names))
    renamed = _renamed(past, samples, before)
    told: list[str] = []
    snapshot = f"snapshot {outlook.number} of {redact(config.root)}"
    if renamed and "class-map" not in config.allow:
        shown = [f"{count} of {before[c]} images of {names[c]!r} are now {names[d]!r}" for c, d, count in renamed]
        told.append(
            f"the class map changed: of {int((before > 0).sum())} classes of {snapshot}, {len(renamed)} "
            f"{_have(len(renamed))} most of the known images under another label ({_listed(shown)}); a model trained "
            "before would be wrong about them; give the labels back, or use --allow class-map"
        )
    gone = np.flatnonzero((before > 0) & (now == 0))
    gone = gone[~np.isin(gone, [c for c, _, _ in renamed])]
    if len(gone) and "class-vanished" not in config.allow:
        told.append(
            f"{len(gone)} of {int((before > 0).sum())} classes of {snapshot} {_have(len(gone))} no image in this "
            f"source ({_listed([names[c] for c in gone])}); another collection needs another ROOT; if the classes are "
            "meant to go, use --allow class-vanished"
        )
    lost = _num_lost(past, samples, stays)
    total = len(past.key)
    if config.max_shrink is not None and lost > _limit(config.max_shrink, total) and "shrink" not in config.allow:
        told.append(
            f"{lost} of {total} images of {snapshot} {'is' if lost == 1 else 'are'} not in this one "
            f"({lost / total:.1%}), more than --max-shrink {config.max_shrink} allows; if they are meant to go, use "
            "--allow shrink"
        )
    return told


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _renamed(past: Past, samples: Samples, before: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(class, other class, images) where more than half of a class's images, known by content, carry another label."""
    row = past.find_content(samples.digest)
    found = row >= 0
    row, label = row[found], samples.class_id[found]
    keeps = np.zeros(len(past.key), np.bool_)
    keeps[row[past.class_id[row] == label]] = True
    moved = ~keeps[row]
    pairs = np.unique(np.stack([row[moved], label[moved]]), axis=1)  # copies of one image count once
    old, new = past.class_id[pairs[0]], pairs[1]
    routes, count = np.unique(np.stack([old, new]), axis=1, return_counts=True)
    return [(int(c), int(d), int(n)) for (c, d), n in zip(routes.T, count, strict=True) if 2 * n > before[c]]


def _num_lost(past: Past, samples: Samples, stays: NDArray[np.bool_]) -> int:
    """Images of the past that are there neither by key nor by content."""
    by_key = Lookup.of(samples.key[stays]).find(past.key) >= 0
    by_content = Lookup.of(samples.digest[stays, 0]).find(past.digest[:, 0]) >= 0
    return int(np.count_nonzero(~by_key & ~by_content))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NUM_EXAMPLES]) + (", ..." if len(names) > _NUM_EXAMPLES else "")
