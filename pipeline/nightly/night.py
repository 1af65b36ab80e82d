"""What a night did: one line of JSON, and an exit code.

Comes in: what the steps found. Goes out: a ``Night``. Guarantees: a step that did not run says why; no line holds a
credential, as every text in it was redacted.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import EvenshardError
from pipeline.ingest.collect import Collection
from pipeline.ingest.diff import KINDS, Diff
from pipeline.ingest.summary import BuildSummary
from pipeline.store import redact
from pipeline.verify import Verification

STEPS = ("build", "verify", "report", "diff", "collect")

DONE, FAILED, REFUSED, SKIPPED = "done", "failed", "refused", "skipped"
"""Of a step and of a night. A step is *refused* where a guardrail stopped it; a night where another one is under
way."""

_SHOWN = 5  # findings of a verification that the line itself tells


@dataclass
class Night:
    """One night, as far as it has come. ``facts`` are the numbers of the line, ``errors`` what went wrong, by step."""

    root: str
    source: str
    steps: dict[str, str] = field(default_factory=dict[str, str])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    errors: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    notices: list[str] = field(default_factory=list[str])
    exit_code: int = 0
    started_s: float = field(default_factory=time.time)

    @property
    def outcome(self) -> str:
        """``done`` if nothing was lost, refused or left undone; ``refused`` if another night is under way."""
        if self.steps.get("turn") == REFUSED:
            return REFUSED
        return DONE if self.exit_code == 0 else FAILED

    def failed(self, step: str, error: Exception, outcome: str = FAILED) -> None:
        """Note that ``step`` failed; the first failure decides the exit code, a wrong call only if nothing else
        failed."""
        ours = isinstance(error, EvenshardError)
        told = str(error) if ours else f"{type(error).__name__}: {error} (a fault of evenshard: please report it)"
        self.steps[step] = outcome
        self.errors.append({"step": step, "message": redact(told)})
        code = error.exit_code if isinstance(error, EvenshardError) else 1
        self.exit_code = code if self.exit_code in (0, code) else 1

    def skipped(self, step: str, why: str) -> None:
        """Note that ``step`` did not run."""
        self.steps[step] = SKIPPED
        self.notices.append(f"{step} was left out: {why}")

    def built(self, summary: BuildSummary, num_new_rejects: int) -> None:
        """Take over what a build did."""
        self.notices += map(redact, summary.notices)
        self.facts |= {
            "snapshot": summary.number,
            "changed": summary.changed,
            "images": summary.num_images,
            "classes": summary.num_classes,
            "rejects": {"total": summary.num_rejects, "new": num_new_rejects, "by_reason": dict(summary.rejects)},
            "read": {"images": summary.num_read, "bytes": summary.read_bytes},
            "shards": {"total": summary.num_shards, "new": summary.num_new_shards},
        }

    def verified(self, found: Verification) -> None:
        """Take over what a verification found."""
        self.notices += map(redact, found.notes)
        self.facts["verified"] = {
            "snapshot": found.number,
            "sound": found.sound,
            "files": found.num_files,
            "images": found.num_images,
            "bytes": found.num_bytes,
            "sample": found.sample,
            "seed": found.seed,
            "findings": len(found.findings),
            "first_findings": [redact(str(finding)) for finding in found.findings[:_SHOWN]],
        }

    def compared(self, found: Diff) -> None:
        """Take over what differs from the snapshot before."""
        self.facts["diff"] = {
            "before": found.before,
            **{kind: found.counts[kind] for kind in KINDS},
            "classes_added": len(found.classes_added),
            "classes_vanished": len(found.classes_vanished),
        }

    def compared_with_nothing(self, summary: BuildSummary) -> None:
        """The first snapshot is all new; where none was published, nothing is."""
        added, classes = (summary.num_images, summary.num_classes) if summary.changed else (0, 0)
        none = dict.fromkeys(KINDS, 0)
        self.facts["diff"] = {"before": None, **none, "added": added, "classes_added": classes, "classes_vanished": 0}

    def collected(self, done: Collection) -> None:
        """Take over what a collection removed."""
        self.facts["collected"] = {
            "snapshots": list(done.collected),
            "kept": list(done.kept),
            "files": len(done.removed),
            "bytes": done.removed_bytes,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "exit_code": self.exit_code,
            "root": self.root,
            "source": self.source,
            **self.facts,
            "steps": self.steps,
            "started": datetime.fromtimestamp(self.started_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "seconds": {name: round(spent, 3) for name, spent in self.seconds.items()},
            "errors": self.errors,
            "notices": self.notices,
        }

    def line(self) -> str:
        """All of it on one line, whatever is in the names."""
        return json.dumps(self.to_json())
