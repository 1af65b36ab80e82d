"""The rejects table: every entry of the source that is in no shard, and why.

Comes in: what the listing, the reading and the settling refused. Goes out: one sorted table. Guarantees: each listed
image that is in no shard is in one row of it; labels and splits are those of this listing, also for what was refused
in an earlier build.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.ingest.known import Known, look
from pipeline.ingest.settle import Samples, Settlement
from pipeline.ingest.source import Listing
from pipeline.ingest.units import UnitRecord
from pipeline.keyed import text_key
from pipeline.schema import REJECTS, SPLIT_UNSET, SPLITS, Reason


class Rejected(NamedTuple):
    """A reference that stays out."""

    reference: int
    reason: str
    detail: str
    sha256: str


def reject_table(
    listing: Listing,
    read: Sequence[Rejected],
    expelled: tuple[Samples, Settlement],
) -> pa.Table:
    """Rejects of the listing, of reading (``read_rejects``) and of settling, sorted."""
    rows = [*read, *_expelled(listing, *expelled)]
    references = listing.references.take(pa.array([row.reference for row in rows], pa.int64()))
    class_ids, splits = references["class_id"].to_pylist(), references["split"].to_pylist()
    columns = {
        "path": references["path"].to_pylist(),
        "key": [f"{key:016x}" for key in references["key"].to_pylist()],
        "label": [listing.class_names[number] for number in class_ids],
        "split": ["" if code == SPLIT_UNSET else SPLITS[code] for code in splits],
        "reason": [row.reason for row in rows],
        "detail": [row.detail for row in rows],
        "sha256": [row.sha256 for row in rows],
    }
    table = pa.concat_tables([listing.rejects.cast(REJECTS), pa.table(columns, schema=REJECTS)])
    return table.sort_by([("path", "ascending"), ("reason", "ascending"), ("detail", "ascending")])


def read_rejects(
    listing: Listing, records: Iterable[UnitRecord], known: Known, before: pa.Table | None
) -> list[Rejected]:
    """What reading refused: in these units, and in an earlier build (``before``: its rejects) for good."""
    paths = [reject for record in records for reject in record.rejects]
    keys = np.array([text_key(path) for path, *_ in paths], np.uint64)
    places = np.searchsorted(listing.references["key"].to_numpy(), keys).tolist()
    rows = [Rejected(place, *reject[1:]) for place, reject in zip(places, paths, strict=True)]
    standing = np.flatnonzero(known.reject >= 0)
    if before is not None and len(standing):
        old = before.take(pa.array(known.reject[standing]))
        columns = (old[name].to_pylist() for name in ("reason", "detail", "sha256"))
        rows += [Rejected(*row) for row in zip(standing.tolist(), *columns, strict=True)]
    return rows


def is_passing(rejected: Rejected) -> bool:
    """Whether the file may be read tomorrow: nothing is known of its bytes."""
    return not rejected.sha256 or rejected.reason == Reason.CHANGED


def _expelled(listing: Listing, samples: Samples, settled: Settlement) -> list[Rejected]:
    gone = settled.expelled
    others = samples.reference[np.maximum(gone.other, 0)]
    paths = listing.references["path"].take(pa.array(others)).to_pylist()
    details = [
        f"same bytes as {path}" if other >= 0 else "a member of its group is in an earlier split"
        for path, other in zip(paths, gone.other.tolist(), strict=True)
    ]
    for place in np.flatnonzero(gone.near).tolist():
        sample = gone.sample[place]
        words = look(int(samples.phash[sample]), int(samples.hashing[sample]))
        details[place] = f"an image that it, or its group, looks like is in an earlier split {words}"
    digests = samples.digest[gone.sample].astype(">u8").tobytes().hex()
    return [
        Rejected(reference, str(reason), detail, digests[64 * i : 64 * i + 64])
        for i, (reference, reason, detail) in enumerate(
            zip(samples.reference[gone.sample].tolist(), gone.reason, details, strict=True)
        )
    ]
