"""Class counts + policies -> the manifests of a snapshot.

Comes in: the class table and the sample tables of a snapshot, and policies by name. Goes out: manifest files that no
image is copied for. Guarantees: every rebuild derives the policies of its parent anew; adding one commits the next
snapshot and touches no image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from pipeline.errors import AlreadyExistsError, PolicyError, UnfitPolicyError
from pipeline.ingest.commit import commit
from pipeline.ingest.known import pass_on_notes
from pipeline.plan import policy as policies
from pipeline.plan.manifest import ManifestDocument, check_name, encode
from pipeline.plan.policy import Policy
from pipeline.schema import TARGETS, FileRef, SnapshotRecord, manifest_path
from pipeline.snapshot import Snapshot, open_snapshot, record_id
from pipeline.store import Store, make_ref, put_table


@dataclasses.dataclass(frozen=True)
class Base:
    """What manifests refer to."""

    class_table: pa.Table
    classes: FileRef
    shards: FileRef
    samples: Mapping[str, FileRef]


def wanted_policies(extra: Mapping[str, Policy], parent: Snapshot | None) -> dict[str, Policy]:
    """The defaults, then the parent's, then what this build asks for: later ones win."""
    inherited: dict[str, Policy] = {}
    if parent is not None:
        inherited = {name: parent.manifest(name).document.policy for name in parent.manifests}
    return {**policies.DEFAULTS, **inherited, **extra}


def put_manifests(store: Store, base: Base, wanted: Mapping[str, Policy]) -> dict[str, FileRef]:
    """Write one manifest per policy; ``PolicyError`` names the manifest that cannot be made."""
    result: dict[str, FileRef] = {}
    for name in sorted(wanted):
        try:
            result[name] = _put_manifest(store, base, name, wanted[name])
        except PolicyError as error:
            raise type(error)(f"manifest {name!r}: {error}") from error
    return result


def _put_manifest(store: Store, base: Base, name: str, policy: Policy, split: str = "train") -> FileRef:
    check_name(name)
    if split not in base.samples:
        raise UnfitPolicyError(
            f"the snapshot has no {split} images; it has {', '.join(sorted(base.samples)) or 'none'}"
        )
    counts = base.class_table[split].to_numpy().astype(np.int64)
    targets = policies.apply(counts, policy, base.class_table["name"].to_pylist())
    columns = {"available": targets.available, "pool": targets.pool, "target": targets.target}
    document = ManifestDocument(
        name=name,
        policy=policy,
        split=split,
        num_classes=len(counts),
        num_draws=int(targets.target.sum()),
        targets=put_table(store, pa.table(columns, schema=TARGETS), TARGETS),
        classes=base.classes,
        shards=base.shards,
        samples=base.samples[split],
    )
    data = encode(document)
    ref = make_ref(data, len(counts))
    store.put(manifest_path(ref.sha256), data)
    return ref


def add_manifest(root: str, name: str, policy: Policy) -> Snapshot:
    """``add_manifests`` of one."""
    return add_manifests(root, {name: policy})


def add_manifests(root: str, wanted: Mapping[str, Policy]) -> Snapshot:
    """Derive more manifests for the newest snapshot of ``root`` and commit them together as the next snapshot.

    The same policy under the same name again is no change; nothing new returns the newest snapshot as it is. A name
    taken by another policy is an ``AlreadyExistsError``: trainers that use the name would silently get other draws.
    """
    snapshot = open_snapshot(root)
    record = snapshot.record
    for name, policy in wanted.items():
        if name in record.manifests and (present := snapshot.manifest(name).document.policy) != policy:
            raise AlreadyExistsError(
                f"manifest {name!r} of snapshot {record.number} has policy {present}, not {policy}; choose another name"
            )
    base = Base(snapshot.classes, record.classes, record.shards, record.samples)
    made = put_manifests(snapshot.store, base, wanted)
    if all(record.manifests.get(name) == ref for name, ref in made.items()):
        return snapshot
    following = next_record(record, manifests={**record.manifests, **made})
    pass_on_notes(snapshot.store, record_id(record), record_id(following))
    commit(snapshot.store, following)
    return open_snapshot(root)


def next_record(record: SnapshotRecord, *, manifests: Mapping[str, FileRef]) -> SnapshotRecord:
    """The record that follows ``record`` with other manifests and nothing else changed."""
    return dataclasses.replace(record, number=record.number + 1, parent=record_id(record), manifests=manifests)
