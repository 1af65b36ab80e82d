"""What a source holds: the door to `source_folder` and `source_table`.

Comes in: a configuration. Goes out: a `Listing`: references sorted by key, class names, rejects, a reader for workers.
Guarantees: every file (folder) or row (table) is one reference or one reject; the order of listing changes nothing; no
image is opened; a source that is missing, empty, ambiguous or within ROOT stops with advice.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.config import BuildConfig
from pipeline.errors import SourceError
from pipeline.ingest.source_files import Place, SourceReader, kind_of, open_place
from pipeline.ingest.source_folder import FolderListing
from pipeline.ingest.source_rows import Rows
from pipeline.ingest.source_table import KINDS, Columns, TableListing, table_kind

__all__ = ["Listing", "SourceReader", "list_source"]

NUM_EXAMPLES = 5
_TABLE_OPTIONS = ("path_column", "label_column", "split_column", "group_column", "images")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What was found: ``class_names[class_id]``; ``splits_given`` where the source says who is train, val and test."""

    references: pa.Table
    class_names: tuple[str, ...]
    rejects: pa.Table
    reader: SourceReader
    notices: tuple[str, ...]
    splits_given: bool


def list_source(config: BuildConfig) -> Listing:
    """List ``config.source``: names and sizes, of a table also its text."""
    source = open_place(config.source)
    is_table = _is_table(source)
    _check_apart(source, open_place(config.root), is_table)
    rows = Rows(max_bytes=config.max_image_bytes)
    images, notices, splits_given = (
        _list_table(config, source, rows) if is_table else _list_folder(config, source, rows)
    )
    if not len(rows):
        raise SourceError(_nothing_found(source, rows, is_table))
    settled = rows.settle()
    if not settled.references.num_rows:
        raise SourceError(_nothing_found(source, rows, is_table))
    return Listing(
        references=settled.references,
        class_names=settled.class_names,
        rejects=settled.rejects,
        reader=SourceReader(images, config.max_image_bytes),
        notices=notices + _twins(settled.class_names),
        splits_given=splits_given,
    )


def _is_table(source: Place) -> bool:
    kind = kind_of(source)
    if kind == "missing":
        chained = "; chained URLs ('::') are not supported" if "::" in source.path else ""
        raise SourceError(f"source {source.shown} is not there: give a folder of images or a table{chained}")
    is_table = table_kind(source.name) is not None and kind != "folder"
    if kind == "file" and not is_table:
        raise SourceError(
            f"source {source.shown} is a file, but no table: its name must end in {', '.join(sorted(KINDS))}; "
            "or give the folder that holds the images"
        )
    return is_table


def _check_apart(source: Place, root: Place, is_table: bool) -> None:
    if root.holds(source):
        raise SourceError(
            f"source {source.shown} {'is' if root == source else 'lies within'} ROOT {root.shown}: a build must not "
            "read what it writes; give another ROOT"
        )
    if not is_table and source.holds(root):
        raise SourceError(
            f"ROOT {root.shown} lies within the source {source.shown}: the next build would list its files as images; "
            "give a ROOT outside"
        )


def _list_folder(config: BuildConfig, source: Place, rows: Rows) -> tuple[Place, tuple[str, ...], bool]:
    given = [f"--{name.replace('_', '-')}" for name in _TABLE_OPTIONS if getattr(config, name) is not None]
    if given:
        raise SourceError(f"{', '.join(given)}: for tables only, but source {source.shown} is a folder")
    listing = FolderListing(source, rows, label_from=config.label_from, split_from=config.split_from)
    return source, listing.run(), config.split_from == "top"


def _list_table(config: BuildConfig, source: Place, rows: Rows) -> tuple[Place, tuple[str, ...], bool]:
    if config.split_from == "top":
        raise SourceError(f"--split-from top is for folders; for the table {source.shown} use `--split-column NAME`")
    if config.split_from == "none" and config.split_column is not None:
        raise SourceError("--split-from none and --split-column exclude each other: choose one")
    images = source.parent if config.images is None else open_place(config.images)
    if images.is_local and kind_of(images) != "folder":
        raise SourceError(f"--images {images.shown} is not a folder")
    columns = Columns(
        path=config.path_column,
        label=config.label_column,
        split=config.split_column,
        group=config.group_column,
        ignore_split=config.split_from == "none",
    )
    spelled = os.path.dirname(config.source) if config.images is None else config.images
    listing = TableListing(source, images, rows, columns, also=os.path.abspath(spelled) if images.is_local else "")
    notices = listing.run()
    return images, notices, listing.has_splits


def _nothing_found(source: Place, rows: Rows, is_table: bool) -> str:
    rejected = ", ".join(f"{number} {reason}" for reason, number in rows.num_rejects_by_reason().items())
    expected = "a row for each image" if is_table else "class folders with images in them, like SOURCE/cat/1.jpg"
    if not rejected:
        return f"source {source.shown} is empty; expected {expected}"
    return f"source {source.shown} has no usable image ({rejected}); expected {expected}"


def _twins(names: Sequence[str]) -> tuple[str, ...]:
    """Class names that look alike are distinct classes, which is seldom what was meant."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), []).append(name)
    twins = [" and ".join(repr(name) for name in group) for group in alike.values() if len(group) > 1]
    if not twins:
        return ()
    return (f"{len(twins)} group(s) of class names differ only in case or encoding: {'; '.join(twins[:NUM_EXAMPLES])}",)
