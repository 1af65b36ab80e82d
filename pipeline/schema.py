"""Arrow schemas, format versions, file names, and the few frozen types that cross rooms.

Comes in: nothing. Goes out: the words every other room agrees on. Guarantees: nothing here reads or writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa

SNAPSHOT_FORMAT_VERSION = 2
HASHED_FORMAT_VERSION = 3
"""Of snapshots whose indexes carry perceptual hashes; others stay readable for those who know version 2 alone."""
MANIFEST_FORMAT_VERSION = 1
UNIT_FORMAT_VERSION = 1

SPLITS = ("train", "val", "test")
"""Order matters: a split's position is its code in ``REFERENCES.split`` and its rank among shards."""

SPLIT_UNSET = -1

BLOCK_BYTES = 1 << 20
"""Files are checked in blocks of this size, each on first touch."""


class Reason(StrEnum):
    """Why an entry of the source is not in a shard. Each is a row of the rejects table, never a log line only."""

    EMPTY = "empty"  # zero bytes
    TRUNCATED = "truncated"
    NOT_AN_IMAGE = "not-an-image"
    FORMAT_NOT_ALLOWED = "format-not-allowed"
    CORRUPT = "corrupt"  # recognised, but the decoder refuses it
    TOO_LARGE = "too-large"  # pixels or bytes beyond the limit
    UNREADABLE = "unreadable"  # permission or I/O error, after retries
    GONE = "gone"  # listed, then not there (or a table row without its file)
    CHANGED = "changed"  # size differs from the listing
    NO_LABEL = "no-label"
    NO_PATH = "no-path"  # table row without a path
    NO_IMAGE = "no-image"  # a sample of a tar or a Parquet row without image bytes
    AMBIGUOUS = "ambiguous"  # a sample of a tar with several images, none of them chosen
    DAMAGED = "damaged"  # the tar or Parquet file cannot be read there
    DUPLICATE_ROW = "duplicate-row"  # a table names one path twice with one label
    NAME_ENCODING = "name-encoding"
    OUTSIDE_ROOT = "outside-root"
    SYMLINK = "symlink"  # a link to a directory: never followed
    CLASS_EMPTY = "class-empty"  # a class directory without files
    DUPLICATE_OF = "duplicate-of"
    LABEL_CONFLICT = "label-conflict"
    LEAK = "leak"  # joins an evaluation split to train
    DECODER_CRASH = "decoder-crash"


def _schema(*fields: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, dtype, nullable=False) for name, dtype in fields])


REFERENCES = _schema(
    ("path", pa.string()),  # relative to the source (or the table's image root), '/' separated
    ("key", pa.uint64()),  # first 8 bytes of SHA-256 of path, big endian; hex of it is the shard key
    ("class_id", pa.int32()),
    ("split", pa.int8()),  # position in SPLITS, or SPLIT_UNSET
    ("group", pa.uint64()),  # samples of one group stay in one split; equals key where nothing groups
    ("size", pa.int64()),  # bytes, from the listing
    ("fingerprint", pa.uint64()),  # XXH3-64 of (size, mtime_ns or etag): equal means "not changed since"
)
"""One row per listed image, sorted by key. The only per-image state the driver holds."""

INDEX = _schema(
    ("key", pa.string()),  # [0-9a-f]{16}
    ("path", pa.string()),
    ("class_id", pa.int32()),
    ("split", pa.string()),
    ("offset", pa.uint64()),  # of the image bytes in the tar
    ("size", pa.uint32()),
    ("checksum", pa.uint64()),  # XXH3-64 of the image bytes
    ("width", pa.uint32()),
    ("height", pa.uint32()),
    ("format", pa.string()),  # jpg, png, ...: also the member's extension
    ("mode", pa.string()),
    ("sha256", pa.binary(32)),  # of the image bytes
    ("group", pa.uint64()),
)
"""One row per sample of one tar, in tar order."""

HASHED_INDEX = INDEX.append(pa.field("phash", pa.uint64()))  # null: a picture without anything to see
"""INDEX of a build that looks for near duplicates."""

INDEXES = (INDEX, HASHED_INDEX)
"""What an index may be."""

CLASSES = _schema(
    ("class_id", pa.int32()),
    ("name", pa.string()),
    ("count", pa.int64()),
    ("train", pa.int64()),
    ("val", pa.int64()),
    ("test", pa.int64()),
    ("bytes", pa.int64()),
    ("train_bytes", pa.int64()),
    ("val_bytes", pa.int64()),
    ("test_bytes", pa.int64()),
    ("evaluable", pa.bool_()),  # has an image outside train
)
"""One row per class, ``class_id`` = row number. ``count`` = train + val + test."""

SHARDS = _schema(
    ("split", pa.string()),
    ("prefix", pa.string()),  # bits of the trie leaf, '' for the root
    ("num_samples", pa.int64()),
    ("tar_sha256", pa.string()),
    ("tar_size", pa.int64()),
    ("index_sha256", pa.string()),
    ("index_size", pa.int64()),
)
"""One row per shard; the row number is the shard number in SAMPLES. Ordered by split, then prefix."""

SAMPLES = _schema(
    ("shard", pa.uint32()),
    ("row", pa.uint32()),  # row of the shard's index
    ("offset", pa.uint64()),
    ("size", pa.uint32()),
    ("checksum", pa.uint64()),
)
"""One row per sample of one split, sorted by class, then keyed hash: class c owns a contiguous range."""

REJECTS = _schema(
    ("path", pa.string()),
    ("key", pa.string()),
    ("label", pa.string()),
    ("split", pa.string()),
    ("reason", pa.string()),
    ("detail", pa.string()),
    ("sha256", pa.string()),  # hex of the bytes where they were read, else ''
)
"""One row per source entry that is in no shard, sorted by (path, reason, detail)."""

DEPARTED = _schema(
    ("key", pa.uint64()),
    ("content", pa.uint64()),  # first 8 bytes of the SHA-256 of the image bytes, big endian
    ("split", pa.int8()),  # position in SPLITS
)
"""One row per image that was in a split of an earlier snapshot and is in none now, sorted by (key, content).

Whoever comes back, by its bytes or by its key, goes where it was: an older model may have trained on it.
"""

TARGETS = _schema(
    ("available", pa.int64()),  # images of the class in the manifest's split
    ("pool", pa.int64()),  # how many of them this policy draws from: the first `pool` rows of the class
    ("target", pa.int64()),  # draws per epoch
)
"""One row per class of one manifest, in class_id order."""


@dataclass(frozen=True, kw_only=True)
class FileRef:
    """An immutable file by content: hex SHA-256, bytes, rows, and XXH3-64 digests (hex16) of its 1 MiB blocks."""

    sha256: str
    size: int
    num_rows: int
    blocks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "size": self.size, "num_rows": self.num_rows, "blocks": "".join(self.blocks)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FileRef:
        text = str(data.get("blocks", ""))
        return cls(
            sha256=str(data["sha256"]),
            size=int(data["size"]),
            num_rows=int(data["num_rows"]),
            blocks=tuple(text[i : i + 16] for i in range(0, len(text), 16)),
        )


def tar_path(sha256: str) -> str:
    """Where a tar lies below ROOT."""
    return f"shards/{sha256[:2]}/{sha256}.tar"


def index_path(sha256: str) -> str:
    """Where the Arrow index of a tar lies below ROOT."""
    return f"index/{sha256[:2]}/{sha256}.arrow"


def table_path(sha256: str) -> str:
    """Where a table lies below ROOT."""
    return f"tables/{sha256}.arrow"


def manifest_path(sha256: str) -> str:
    """Where a manifest lies below ROOT."""
    return f"manifests/{sha256}.json"


def snapshot_path(number: int) -> str:
    """Where the commit record of snapshot ``number`` (from 1) lies below ROOT."""
    return f"snapshots/{number:08d}.json"


def collected_path(number: int) -> str:
    """Where collection notes, before it removes the first file of snapshot ``number``, that it does."""
    return f"runs/collected/{number:08d}.json"


def pin_path(name: str) -> str:
    """Where the pin ``name`` lies below ROOT."""
    return f"pins/{name}.json"


def report_path(number: int) -> str:
    """Where the page of snapshot ``number`` lies below ROOT."""
    return f"reports/{number:08d}/index.html"


@dataclass(frozen=True, kw_only=True)
class SnapshotRecord:
    """The commit record: everything a reader needs to find, and check, the rest. Holds no clock, host or URL."""

    number: int
    parent: str  # id of the parent record, '' for the first
    build_id: str  # SHA-256 over what this build was asked to do: config, references
    seed: int
    classes: FileRef
    shards: FileRef
    rejects: FileRef
    samples: Mapping[str, FileRef]  # by split; a split without samples is absent
    manifests: Mapping[str, FileRef]  # by name; num_rows = number of classes
    num_images: int
    num_classes: int
    num_rejects: int
    config: Mapping[str, Any]  # the part of the build file that decides bytes
    created_by: str  # distribution and version
    departed: FileRef | None = None  # None: nothing has left yet; version 1 did not remember it
    near_duplicates: Mapping[str, int] | None = None  # num_groups, num_images; None: not looked for
    format_version: int = SNAPSHOT_FORMAT_VERSION
