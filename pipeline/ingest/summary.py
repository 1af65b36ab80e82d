"""What a build did: for its caller, and for the log beside the snapshot.

Comes in: a snapshot and counts of the work. Goes out: a ``BuildSummary``, and a file in ``runs/builds/``: when, where
and from which URL, which no file of the snapshot says. Guarantees: a log that cannot be written is told, and makes no
published snapshot look like a failed build.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.config import BuildConfig
from pipeline.errors import StoreError
from pipeline.ingest.stats import Description, describe
from pipeline.ingest.units import UnitRecord
from pipeline.labels import LabelMap
from pipeline.plan.policy import parse
from pipeline.schema import SPLITS
from pipeline.snapshot import Snapshot
from pipeline.store import Store, redact


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """What a build did. ``changed`` is False when the source gave exactly the newest snapshot again."""

    root: str
    number: int
    changed: bool
    num_images: int
    num_classes: int
    num_rejects: int
    rejects: Mapping[str, int]  # by reason
    splits: Mapping[str, int]
    near_duplicates: Mapping[str, int] | None  # num_groups, num_images; None: not looked for
    manifests: Mapping[str, int]  # draws per epoch
    description: Description  # of all splits
    trained: Description  # of train alone: the imbalance that a model meets
    num_read: int  # images read from the source
    read_bytes: int
    num_units: int  # of reading
    num_reused_units: int
    num_shards: int
    num_new_shards: int  # that the snapshot before does not have
    elapsed_s: float
    notices: tuple[str, ...]


def summarise(
    snapshot: Snapshot, parent: Snapshot | None, records: Sequence[UnitRecord], notices: Sequence[str]
) -> BuildSummary:
    """What is in ``snapshot``, and what it took; ``elapsed_s`` is still 0."""
    fresh = [record for record in records if not record.reused]
    classes, tars = snapshot.classes, set(snapshot.shards["tar_sha256"].to_pylist())
    before: set[str] = set(parent.shards["tar_sha256"].to_pylist()) if parent else set()
    return BuildSummary(
        root=snapshot.store.url,
        number=snapshot.number,
        changed=snapshot is not parent,
        num_images=snapshot.record.num_images,
        num_classes=snapshot.record.num_classes,
        num_rejects=snapshot.record.num_rejects,
        rejects=dict(sorted(Counter(snapshot.rejects["reason"].to_pylist()).items())),
        splits={split: int(classes[split].to_numpy().sum()) for split in SPLITS},
        near_duplicates=snapshot.record.near_duplicates,
        manifests={name: snapshot.manifest(name).num_draws for name in snapshot.manifests},
        description=describe(classes["count"].to_numpy()),
        trained=describe(classes["train"].to_numpy()),
        num_read=sum(record.num_images for record in fresh),
        read_bytes=sum(record.num_bytes for record in fresh),
        num_units=len(records),
        num_reused_units=len(records) - len(fresh),
        num_shards=len(tars),
        num_new_shards=len(tars - before),
        elapsed_s=0.0,
        notices=tuple(notices),
    )


def finish(store: Store, config: BuildConfig, summary: BuildSummary, started_s: float) -> BuildSummary:
    """The summary with its time, after it was logged. The snapshot is published: from here on nothing may fail."""
    summary = dataclasses.replace(summary, elapsed_s=time.time() - started_s)
    try:
        _log(store, config, summary, started_s)
    except (StoreError, OSError) as error:
        told = f"snapshot {summary.number} is published, but the log of this build could not be written: {error}"
        return dataclasses.replace(summary, notices=(*summary.notices, told))
    return summary


def _log(store: Store, config: BuildConfig, summary: BuildSummary, started_s: float) -> None:
    body = {
        "started_s": int(started_s),
        "elapsed_s": round(summary.elapsed_s, 3),
        "host": platform.node(),
        "source": redact(config.source),
        "snapshot": summary.number,
        "changed": summary.changed,
        "num_read": summary.num_read,
        "command": equal_command(config),
        "config": config.meaning(),
        "versions": {name: _version(name) for name in ("evenshard", "ray", "pyarrow", "pillow", "numpy", "fsspec")},
        "python": platform.python_version(),
    }
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(started_s))
    store.create(f"runs/builds/{stamp}-{os.urandom(4).hex()}.json", json.dumps(body, indent=1, sort_keys=True).encode())


def equal_command(config: BuildConfig) -> str:
    """The command line that asks for the same build, whichever way this one was asked for; without credentials."""
    words = ["evenshard", "build", redact(config.source), redact(config.root)]
    for name, field in BuildConfig.model_fields.items():
        value = getattr(config, name)
        if name not in ("source", "root") and value != field.get_default(call_default_factory=True):
            flag = "--" + ("manifest" if name == "manifests" else name.replace("_", "-"))
            words += [word for text in _spellings(name, value) for word in (flag, text)]
    return shlex.join(words)


def _spellings(name: str, value: Any) -> list[str]:
    if name == "manifests":
        return [f"{key}={parse(policy)}" for key, policy in value.items()]
    if isinstance(value, LabelMap):
        return [value.file]
    if isinstance(value, tuple):
        return list(value)
    return [redact(value) if isinstance(value, str) else str(value)]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None  # a rebuild that has nothing to do needs no Ray
