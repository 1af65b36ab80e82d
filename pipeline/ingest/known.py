"""What need not be read: the fingerprints that the newest snapshot was built from, compared with a new listing.

Comes in: a listing, the newest snapshot, and the notes that its build left in ``runs/sources/``. Goes out: for every
listed file, where it is in that snapshot - a row, or a reject that stands - or that it must be read, as where the tar
of that row is lost. Guarantees: notes
say only which fingerprint a file had; everything else comes from the checked files of the snapshot. Notes that are
missing, damaged, of another place or of other rules cost reading again, and change nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import IntegrityError, StoreError
from pipeline.ingest.past import Lookup, Past
from pipeline.ingest.units import Hashing
from pipeline.schema import REFERENCES, FileRef, Reason, tar_path
from pipeline.snapshot import Snapshot
from pipeline.store import HashedSink, Store, ipc_to_table, replace_by, write_ipc

NOTES_FORMAT_VERSION = 1

_SETTLED = frozenset({Reason.DUPLICATE_OF, Reason.LABEL_CONFLICT, Reason.LEAK})
"""Rejects of readable images: they come back when what expelled them goes."""


_RULES = ("check", "max_pixels", "max_bytes", "max_cpu_s")
"""Settings that another build may change without reading all again; a larger file, the listing itself refuses."""


_HEAD_BYTES = 1 << 16
"""Of notes, to be read at first; a long list of classes takes more."""


class Notes:
    """The listing that a snapshot was built from, and the rules under which its files were read."""

    def __init__(self, head: Mapping[str, Any], read: Callable[[], memoryview]) -> None:
        self.settings: Mapping[str, Any] = dict(head["settings"])
        """Of reading: place, check, limits, versions."""
        self.listing = str(head["listing"])
        """Digest of everything that the listing said."""
        self.is_final = head["is_final"] is True
        """No file was refused for a reason that may pass by itself."""
        self._ref = FileRef.from_json(head["references"])
        self._read = read

    @cached_property
    def references(self) -> pa.Table | None:
        """The listing, which is read when it is asked for; None if it is damaged."""
        try:
            body = self._read()
            if hashlib.sha256(body).hexdigest() != self._ref.sha256:
                return None
            return ipc_to_table(body, REFERENCES, "notes")
        except (StoreError, IntegrityError):
            return None


def write_notes(
    store: Store, snapshot_id: str, references: pa.Table, *, settings: Mapping[str, Any], listing: str, is_final: bool
) -> None:
    """A file of notes: a line of JSON, then the listing as an Arrow file. Made twice, as the line holds its hash."""
    body = HashedSink()
    write_ipc(references, body)
    ref = FileRef(sha256=body.hash.hexdigest(), size=body.num_bytes, num_rows=references.num_rows)
    head = {
        "format": "evenshard-listing",
        "format_version": NOTES_FORMAT_VERSION,
        "settings": settings,
        "listing": listing,
        "is_final": is_final,
        "references": ref.to_json() | {"blocks": ""},
    }

    def write(file: BinaryIO) -> None:
        file.write(json.dumps(head, sort_keys=True).encode() + b"\n")
        write_ipc(references, HashedSink(file))

    replace_by(store, notes_path(snapshot_id), write)


def notes_path(snapshot_id: str) -> str:
    """Where the notes on the snapshot with this id lie below ROOT; written before it is published."""
    return f"runs/sources/{snapshot_id}.listing"


def read_notes(store: Store, snapshot_id: str) -> Notes | None:
    """The notes on a snapshot; None if there are none that can be used. Of the listing in them nothing is read yet."""
    path = notes_path(snapshot_id)
    try:
        entry = store.entry(path)
        if entry is None:
            return None
        head = store.read_range(path, 0, min(entry.size, _HEAD_BYTES))
        if b"\n" not in head:
            head = store.read(path)
        line, newline, _ = head.partition(b"\n")
        values = json.loads(line)
        start = len(line) + len(newline)
        if values["format_version"] != NOTES_FORMAT_VERSION:
            return None
        return Notes(values, lambda: memoryview(store.read(path))[start:])
    except (StoreError, IntegrityError, ValueError, KeyError, TypeError):
        return None


def pass_on_notes(store: Store, snapshot_id: str, to: str) -> None:
    """What is noted of a snapshot holds of another one with the same images: else the next build would read all."""
    with suppress(StoreError):  # there are none, and nothing is lost but time
        store.replace(notes_path(to), store.read(notes_path(snapshot_id)))


@dataclass(frozen=True)
class Known:
    """For each row of REFERENCES: its row in the past, or the row of the parent's rejects that stands; else -1.

    ``digest`` (uint64 [n, 4]) is of the bytes where ``expelled``: readable, but with no row to copy them from;
    ``phash`` and ``hashing`` are what is known of how they look.
    """

    row: NDArray[np.int64]
    reject: NDArray[np.int64]
    expelled: NDArray[np.bool_]
    digest: NDArray[np.uint64]
    phash: NDArray[np.uint64]
    hashing: NDArray[np.int8]

    @property
    def to_read(self) -> NDArray[np.int64]:
        """Rows of REFERENCES that nothing is known of."""
        return np.flatnonzero((self.row < 0) & (self.reject < 0) & ~self.expelled)

    def without(self, references: NDArray[np.int64]) -> Known:
        """The same, with these rows to be read."""
        row, reject, expelled = self.row.copy(), self.reject.copy(), self.expelled.copy()
        row[references], reject[references], expelled[references] = -1, -1, False
        return replace(self, row=row, reject=reject, expelled=expelled)


def nothing_known(num_references: int) -> Known:
    """All must be read."""
    unknown = np.full(num_references, -1, np.int64)
    return Known(
        row=unknown,
        reject=unknown.copy(),
        expelled=np.zeros(num_references, np.bool_),
        digest=np.zeros((num_references, 4), np.uint64),
        phash=np.zeros(num_references, np.uint64),
        hashing=np.full(num_references, Hashing.UNKNOWN, np.int8),
    )


def lost_tars(store: Store, parent: Snapshot | None) -> frozenset[str]:
    """Paths of the tars that ``parent`` names and that are gone, or not as long as they were: a listing tells."""
    if parent is None:
        return frozenset()
    there = {entry.path: entry.size for entry in store.entries("shards")}
    named = zip(*(parent.shards[name].to_pylist() for name in ("tar_sha256", "tar_size")), strict=True)
    return frozenset(path for digest, size in named if there.get(path := tar_path(digest)) != size)


def find_known(
    references: pa.Table,
    settings: Mapping[str, Any],
    notes: Notes | None,
    past: Past,
    parent: Snapshot | None,
    lost: Set[str] = frozenset(),
) -> Known:
    """What the past says of each listed file whose fingerprint is the one in the notes, unless its tar was ``lost``."""
    known = nothing_known(references.num_rows)
    if notes is None or parent is None or not _comparable(settings, notes.settings) or notes.references is None:
        return known
    keys = references["key"].to_numpy()
    same = _unchanged(references, notes.references)
    row = past.find(keys)
    usable = same & (row >= 0)
    if lost:
        gone = np.array([tar_path(pack.tar.sha256) in lost for pack in past.packs], np.bool_)
        usable[usable] = ~gone[past.pack[row[usable]]]
    usable[usable] = _still_accepted(settings, notes.settings, past.num_pixels[row[usable]])
    if "hashed" in settings:
        usable[usable] = past.hashing[row[usable]] != Hashing.UNKNOWN
    known.row[usable] = row[usable]
    same_rules = settings == notes.settings
    rejected = _Rejected.of(parent.rejects)
    place = rejected.find(keys)
    candidate = np.flatnonzero(same & (row < 0) & (place >= 0))
    # Where splits, labels or neighbours put a readable file out, no rule of reading is asked, unless it is a new one.
    expelled = candidate[rejected.settled[place[candidate]]] if same_rules else candidate[:0]
    known.expelled[expelled] = True
    known.digest[expelled] = rejected.digest[place[expelled]]
    known.phash[expelled] = rejected.phash[place[expelled]]
    known.hashing[expelled] = rejected.hashing[place[expelled]]
    if same_rules:
        stands = candidate[~rejected.settled[place[candidate]]]
        known.reject[stands] = rejected.row[place[stands]]
    return known


def _comparable(settings: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether files that were read under ``before`` can be known at all: from the same place, by the same versions."""
    one, two = ({key: value for key, value in rules.items() if key not in _RULES} for rules in (settings, before))
    if "hashed" not in one:
        two.pop("hashed", None)  # hashes that nobody asks for do no harm
    return one == two


def _still_accepted(
    settings: Mapping[str, Any], before: Mapping[str, Any], num_pixels: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Who was accepted under ``before`` and is now: a decoded image has passed the header check as well."""
    checked = settings["check"] == before["check"] or before["check"] == "decode"
    return (num_pixels <= settings["max_pixels"]) & np.bool_(checked)


def _unchanged(references: pa.Table, before: pa.Table) -> NDArray[np.bool_]:
    place = Lookup.of(before["key"].to_numpy()).find(references["key"].to_numpy())
    same = place >= 0
    for name in ("size", "fingerprint"):
        same &= references[name].to_numpy() == before[name].to_numpy()[place] if before.num_rows else False
    return same


@dataclass(frozen=True)
class _Rejected:
    """Rejects whose bytes were read, so that a fingerprint vouches for them."""

    row: NDArray[np.int64]  # of the rejects table
    settled: NDArray[np.bool_]
    digest: NDArray[np.uint64]
    phash: NDArray[np.uint64]
    hashing: NDArray[np.int8]
    lookup: Lookup

    @classmethod
    def of(cls, rejects: pa.Table) -> _Rejected:
        reasons = rejects["reason"].to_pylist()
        texts = rejects["sha256"].to_pylist()
        # A file that changed while it was read has been seen in part: its bytes say nothing of the next time.
        rows = [i for i, text in enumerate(texts) if text and reasons[i] != Reason.CHANGED]
        keys = bytes.fromhex("".join(rejects["key"].take(pa.array(rows, pa.int64())).to_pylist()))
        digests = bytes.fromhex("".join(texts[i] for i in rows))
        return cls(
            np.array(rows, np.int64),
            np.array([reasons[i] in _SETTLED for i in rows], np.bool_),
            np.frombuffer(digests, ">u8").reshape(-1, 4).astype(np.uint64),
            *_looks(rejects, rows),
            Lookup.of(np.frombuffer(keys, ">u8").astype(np.uint64)),
        )

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        return self.lookup.find(keys)


# ---- What a rejected look-alike looks like: it is compared again tomorrow, and has no index row to keep its hash in.


def look(phash: int, hashing: int) -> str:
    """The last words of a reject's detail."""
    return f"(perceptual hash {phash:016x})" if hashing == Hashing.KNOWN else "(perceptual hash none)"


_LOOK = re.compile(r"\(perceptual hash ([0-9a-f]{16}|none)\)$")


def _looks(rejects: pa.Table, rows: list[int]) -> tuple[NDArray[np.uint64], NDArray[np.int8]]:
    reasons, details = (rejects[name].to_pylist() for name in ("reason", "detail"))
    phash, hashing = np.zeros(len(rows), np.uint64), np.full(len(rows), Hashing.UNKNOWN, np.int8)
    for place, row in enumerate(rows):
        found = _LOOK.search(details[row]) if reasons[row] == Reason.LEAK else None
        if found and found[1] != "none":
            phash[place], hashing[place] = int(found[1], 16), Hashing.KNOWN
        elif found:
            hashing[place] = Hashing.BLANK
    return phash, hashing
