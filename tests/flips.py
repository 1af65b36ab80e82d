"""Flip one bit of a ROOT, and see what readers make of it: the check behind test_flips.py and soak/flip_bits.py."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import Loader, open_snapshot
from pipeline.errors import EvenshardError, IntegrityError
from pipeline.snapshot import Snapshot
from pipeline.verify import verify

KINDS = "shards", "index", "tables", "manifests", "snapshots"
"""Folders of what a snapshot is made of; its record is in the last."""


@dataclass(frozen=True, kw_only=True)
class Flip:
    """What became of one flipped bit. ``reading`` is "detected", "unchanged", or what is wrong."""

    file: str  # below ROOT
    place: int
    bit: int
    reading: str
    verify_found: bool

    @property
    def good(self) -> bool:
        return self.reading in ("detected", "unchanged") and self.verify_found


def files_by_kind(root: Path) -> dict[str, list[str]]:
    """Files that a snapshot is made of, by folder; folders without any are left out."""
    found = {kind: sorted(str(p.relative_to(root)) for p in (root / kind).rglob("*") if p.is_file()) for kind in KINDS}
    return {kind: files for kind, files in found.items() if files}


def places(root: Path, num_flips: int, seed: int) -> Iterator[tuple[str, int, int]]:
    """(file, byte, bit): the kinds in turn, a file of the kind by its size, a byte and a bit at random."""
    rng = np.random.default_rng(seed)
    kinds = list(files_by_kind(root).values())
    for number in range(num_flips):
        files = kinds[number % len(kinds)]
        sizes = np.array([(root / file).stat().st_size for file in files])
        file = files[rng.choice(len(files), p=sizes / sizes.sum())]
        yield file, int(rng.integers((root / file).stat().st_size)), int(rng.integers(8))


def emitted(root: Path) -> str:
    """A digest of everything that a reader hands out: record, tables, indexes, manifests, and every image with label.

    Everything is opened afresh, so nothing is remembered from an earlier state of the files.
    """
    digest = hashlib.sha256()
    snapshot = open_snapshot(root)
    digest.update(repr(snapshot.record).encode())
    for table in (snapshot.classes, snapshot.shards, snapshot.rejects):
        digest.update(repr(table.to_pydict()).encode())
    for number in range(snapshot.shards.num_rows):
        digest.update(repr(snapshot.index(number).to_pydict()).encode())
    for name in snapshot.manifests:
        manifest = snapshot.manifest(name)
        digest.update(repr((manifest.document, manifest.targets.tolist(), manifest.pool.tolist())).encode())
    _update_with_images(digest, snapshot)
    batches = Loader(snapshot.manifest("natural"), 16, decode=False, details=True)
    for images, labels, details in batches:
        digest.update(repr((images, labels.tolist(), details.keys)).encode())
    return digest.hexdigest()


def _update_with_images(digest: hashlib._Hash, snapshot: Snapshot) -> None:
    for split in sorted(snapshot.record.samples):
        for row in range(snapshot.samples(split).num_rows):
            digest.update(snapshot.read_image(split, row))


@contextmanager
def flipped(path: Path, place: int, bit: int) -> Iterator[None]:
    """The file with this bit turned, and turned back afterwards."""
    os.chmod(path, 0o644)
    _turn(path, place, bit)
    try:
        yield
    finally:
        _turn(path, place, bit)


def _turn(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def try_flip(root: Path, file: str, place: int, bit: int, expected: str) -> Flip:
    """Flip, read everything, verify, flip back; ``expected`` is what ``emitted`` gives for the sound ROOT."""
    with flipped(root / file, place, bit):
        reading, verified = _read(root, file, expected), _verify(root, file)
    return Flip(file=file, place=place, bit=bit, reading=reading, verify_found=verified)


def _read(root: Path, file: str, expected: str) -> str:
    try:
        same = emitted(root) == expected
    except IntegrityError as error:
        return "detected" if file in str(error) else f"the error does not name the file: {error}"
    except EvenshardError as error:
        return f"another error: {type(error).__name__}: {error}"
    return "unchanged" if same else "other bytes were handed out"


def _verify(root: Path, file: str) -> bool:
    """Whether verify says that something is wrong with this very file."""
    try:
        return any(finding.file == file for finding in verify(root).findings)
    except EvenshardError as error:
        return file in str(error)
