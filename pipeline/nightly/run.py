"""The steps of a night, in order: turn, build, verify, report, diff, collect.

Comes in: a build's configuration. Goes out: a ``Night``. Guarantees: each step runs whatever became of the others, as
far as it can; a collection only after a verification that found nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pipeline.config import BuildConfig, make_config
from pipeline.errors import CommitError, EvenshardError, IntegrityError, StoreError
from pipeline.ingest.collect import collect
from pipeline.ingest.commit import GRACE_S
from pipeline.ingest.diff import diff
from pipeline.ingest.run import BuildSummary, run_build
from pipeline.nightly.night import DONE, REFUSED, Night
from pipeline.nightly.turn import Holder, Turn, take_turn
from pipeline.report import write_build_report
from pipeline.snapshot import newest_number, open_snapshot
from pipeline.store import Store, redact
from pipeline.verify import Verification, verify

NIGHTLY_MAX_REJECTS = 0.01
"""Of what is listed, where neither flag nor build file says: nobody is there to read how many images were lost."""

Progress = Callable[[str, int, int], None]

_Done = TypeVar("_Done")


def nightly_config(file_values: Mapping[str, Any] | None = None, **flags: Any) -> BuildConfig:
    """``make_config``, but for what nights are stricter about."""
    return make_config({"max_rejects": NIGHTLY_MAX_REJECTS, **(file_values or {})}, **flags)


def run_nightly(
    config: BuildConfig,
    *,
    keep: int = 7,
    sample: float = 0.05,
    grace_s: float = GRACE_S,
    progress: Progress | None = None,
) -> Night:
    """Build the next snapshot, prove it (a share ``sample`` of the images), write its page, collect all but ``keep``.

    What goes wrong is in the ``Night``. Only what makes it impossible to begin is raised: ``StoreError`` for a ROOT
    that holds something else or cannot be written.
    """
    notify = progress or (lambda stage, done, total: None)
    store = Store.open(config.root, create=True)
    store.refuse_foreign()
    night = Night(root=store.url, source=redact(config.source))
    turn = take_turn(store)
    if isinstance(turn, Holder):
        night.failed("turn", _taken(store, turn), REFUSED)
        return night
    with turn:
        _Steps(config, store, turn, night, notify).run(keep, sample, grace_s)
        turn.end(night.to_json())
    return night


def _taken(store: Store, holder: Holder) -> CommitError:
    return CommitError(
        f"another nightly run of {store.url} is under way: {holder}. Nothing was done; wait for it, or look at it with "
        f"`evenshard status {store.url}`. If it is dead, its turn lapses three minutes after its last sign of life"
    )


class _Steps:
    def __init__(self, config: BuildConfig, store: Store, turn: Turn, night: Night, notify: Progress) -> None:
        self._config, self._store, self._turn, self._night, self._notify = config, store, turn, night, notify

    def run(self, keep: int, sample: float, grace_s: float) -> None:
        night = self._night
        summary = self._step("build", self._build)
        is_sound = self._step("verify", lambda: self._verify(sample)) is not None
        if summary is not None:
            self._step("report", lambda: self._report(summary))
            self._step("diff", lambda: self._compare(summary))
        else:
            for name in ("report", "diff"):
                night.skipped(name, "there is no new snapshot")
        if is_sound:
            self._step("collect", lambda: self._collect(keep, grace_s))
        else:
            night.skipped("collect", "the newest snapshot was not proved, and the older ones may be needed")

    def _step(self, name: str, work: Callable[[], _Done]) -> _Done | None:
        """What ``work`` returns; None if it failed, as then the steps after it are to run, too."""
        night, begun_s = self._night, time.monotonic()
        try:
            self._keep_turn(name)
            done = work()
            night.steps.setdefault(name, DONE)
            return done
        except CommitError as error:
            night.failed(name, error, REFUSED)
        except Exception as error:  # whatever it is: the line has to come, and the exit code tells
            night.failed(name, error)
        finally:
            night.seconds[name] = time.monotonic() - begun_s
        return None

    def _keep_turn(self, name: str) -> None:
        other = self._turn.lost_to()
        if other is not None:
            raise StoreError(
                f"{name} was left out: this run was silent for too long, so that {other.worker} took the turn; it "
                "does the rest"
            )
        self._turn.at(name)

    def _build(self) -> BuildSummary:
        summary = run_build(self._config, progress=self._notify)
        self._night.built(summary, _num_new_rejects(self._store, summary))
        return summary

    def _verify(self, sample: float) -> Verification | None:
        if self._is_empty():
            self._night.skipped("verify", "there is no snapshot")
            return None
        found = verify(self._store, None, sample, progress=self._notify)
        self._night.verified(found)
        if not found.sound:
            raise IntegrityError(
                f"snapshot {found.number} of {found.root} is not sound: {len(found.findings):,} findings, the first: "
                f"{found.findings[0]}; `evenshard verify {found.root}` tells all"
            )
        return found

    def _is_empty(self) -> bool:
        try:
            return newest_number(self._store) == 0
        except EvenshardError:
            return False  # verification tells what is wrong with it

    def _report(self, summary: BuildSummary) -> None:
        self._notify("report", 0, 0)
        page, problem = write_build_report(self._config, summary)
        self._night.facts["report"] = page
        if problem:
            raise StoreError(problem)

    def _compare(self, summary: BuildSummary) -> None:
        if not summary.changed or summary.number == 1:
            self._night.compared_with_nothing(summary)
            return
        found = diff(self._store, summary.number - 1, summary.number, num_named=0)
        self._night.compared(found)
        if not found.is_lawful:
            raise IntegrityError(
                f"from snapshot {found.before} to {found.after} of {found.root}, {found.counts['moved']:,} images "
                f"moved between splits and {len(found.classes_renamed):,} class ids changed their meaning: see "
                f"`evenshard diff {found.root}`"
            )

    def _collect(self, keep: int, grace_s: float) -> None:
        done = collect(self._store, keep, grace_s=grace_s, delete=True, progress=self._notify)
        self._night.collected(done)


def _num_new_rejects(store: Store, summary: BuildSummary) -> int:
    """Entries that are rejected now and were not, for that reason, in the snapshot before."""
    if not summary.changed:
        return 0
    now = _rejects(store, summary.number)
    return (now - _rejects(store, summary.number - 1)).total() if summary.number > 1 else now.total()


def _rejects(store: Store, number: int) -> Counter[tuple[Any, Any]]:
    rows = open_snapshot(store, number).rejects
    return Counter(zip(rows["path"].to_pylist(), rows["reason"].to_pylist(), strict=True))
