"""Manifests against counts and policy, and the first promise (E1) on an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import IntegrityError, PolicyError
from pipeline.plan.epoch import EpochFunction
from pipeline.plan.manifest import ManifestDocument, decode
from pipeline.plan.policy import apply
from pipeline.schema import TARGETS, FileRef, SnapshotRecord, manifest_path, table_path
from pipeline.verify.files import RESTORE, Files
from pipeline.verify.findings import Code, Findings

MAX_WALKED_DRAWS = 5_000_000
"""Longer epochs are proved by their targets alone: walking this many takes seconds."""

_DRAWS_AT_ONCE = 1 << 18
_AGAIN = "write the manifest anew"


def check_manifest(
    name: str, ref: FileRef, record: SnapshotRecord, classes: pa.Table | None, files: Files, findings: Findings
) -> None:
    """One manifest: its file, what it refers to, its targets, and that an epoch of it keeps E1."""
    path = manifest_path(ref.sha256)
    data = files.read(path, ref.sha256, ref.size)
    if data is None:
        return
    try:
        document = decode(data, path)
    except IntegrityError as error:
        findings.add(Code.MANIFEST, path, str(error).removeprefix(f"{path}: "))
        return
    _check_references(document, name, record, path, findings)
    targets = files.table(document.targets, TARGETS)
    if targets is None or classes is None:
        return
    check = _Check(name, document, {key: targets[key].to_numpy() for key in TARGETS.names}, path, findings)
    if check.numbers(classes):
        check.policy(classes)
        check.epoch()


def _check_references(
    document: ManifestDocument, name: str, record: SnapshotRecord, path: str, findings: Findings
) -> None:
    """A manifest of another snapshot would draw other images in silence."""
    expected = {
        "name": name,
        "num_classes": record.num_classes,
        "classes": record.classes,
        "shards": record.shards,
        "samples": record.samples.get(document.split),
    }
    for key, value in expected.items():
        if (found := getattr(document, key)) != value:
            findings.add(
                Code.MANIFEST, path, f"{key}: the snapshot has {_show(value)}, it names {_show(found)}; {_AGAIN}"
            )


def _show(value: object) -> str:
    return table_path(value.sha256) if isinstance(value, FileRef) else repr(value)


class _Check:
    def __init__(
        self,
        name: str,
        document: ManifestDocument,
        columns: dict[str, NDArray[np.int64]],
        path: str,
        findings: Findings,
    ) -> None:
        self._name, self._document, self._path, self._findings = name, document, path, findings
        self._available, self._pool, self._target = (columns[key] for key in TARGETS.names)

    def numbers(self, classes: pa.Table) -> bool:
        """Sums and ranges; False if the targets cannot be drawn."""
        counts = classes[self._document.split].to_numpy()
        if len(counts) != len(self._target):
            self._add(f"expected targets of {len(counts)} classes, found {len(self._target)}; {_AGAIN}")
            return False
        if (total := int(self._target.sum())) != self._document.num_draws:
            self._add(f"num_draws is {self._document.num_draws:,}, its targets sum to {total:,}; {RESTORE}")
        names: list[str] = classes["name"].to_pylist()
        self._rows("available", self._available, counts, names)
        drawable = (self._target >= 0) & (self._pool >= (self._target > 0)) & (self._pool <= counts)

        def tell(i: int) -> str:
            has = f"{self._target[i]} draws from a pool of {self._pool[i]} of {counts[i]} images"
            return f"manifest {self._name!r}, class {names[i]!r}: {has} cannot be; {_AGAIN}"

        self._findings.add_rows(Code.MANIFEST, self._path, ~drawable, tell)
        return bool(drawable.all()) and total > 0

    def policy(self, classes: pa.Table) -> None:
        """Its policy, applied to the counts again, gives the same."""
        names: list[str] = classes["name"].to_pylist()
        try:
            again = apply(classes[self._document.split].to_numpy(), self._document.policy, names)
        except PolicyError as error:
            self._add(f"its policy {self._document.policy} cannot be applied to the counts: {error}; {_AGAIN}")
            return
        self._rows("pool", self._pool, again.pool, names)
        self._rows("target", self._target, again.target, names)

    def epoch(self) -> None:
        """Epoch 0 under seed 0: every class exactly T_c times (E1), every image of its pool equally often, give or
        take one (E2)."""
        num_draws = self._document.num_draws
        if num_draws > MAX_WALKED_DRAWS or num_draws != int(self._target.sum()):
            return
        function = EpochFunction(self._pool, self._target, 0)
        start = np.cumsum(self._pool) - self._pool
        times = np.zeros(int(self._pool.sum()), np.int64)
        drawn = np.zeros(len(self._target), np.int64)
        for begin in range(0, num_draws, _DRAWS_AT_ONCE):
            draws = function.draws(begin, min(begin + _DRAWS_AT_ONCE, num_draws))
            ordinal, _ = function.images(draws.class_id, draws.draw)
            drawn += np.bincount(draws.class_id, minlength=len(drawn))
            np.add.at(times, start[draws.class_id] + ordinal, 1)
        wrong = (drawn != self._target) | _uneven(times, start, self._pool)
        self._findings.add_rows(
            Code.EPOCH,
            self._path,
            wrong,
            lambda c: (
                f"manifest {self._name!r}, class {c}: epoch 0 draws it {drawn[c]} times, its target is "
                f"{self._target[c]}, or its images unevenly; this is a fault of evenshard: report it"
            ),
        )

    def _rows(self, column: str, found: NDArray[np.int64], expected: NDArray[Any], names: list[str]) -> None:
        def tell(i: int) -> str:
            said = f"{column} is {found[i]}, expected {expected[i]}"
            return f"manifest {self._name!r}, class {names[i]!r}: {said} from {self._document.policy}; {_AGAIN}"

        self._findings.add_rows(Code.MANIFEST, self._path, found != expected, tell)

    def _add(self, detail: str) -> None:
        self._findings.add(Code.MANIFEST, self._path, f"manifest {self._name!r}: {detail}")


def _uneven(times: NDArray[np.int64], start: NDArray[np.int64], pool: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Classes of which one image was drawn at least twice as much more than another."""
    wrong = np.zeros(len(pool), np.bool_)
    filled = np.flatnonzero(pool)
    least, most = (ufunc.reduceat(times, start[filled]) for ufunc in (np.minimum, np.maximum))
    wrong[filled] = most - least > 1
    return wrong
