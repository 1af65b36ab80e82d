"""What a source holds: the door to `source_folder`, `source_table` and `source_containers`.

Comes in: a configuration. Goes out: a `Listing`: references sorted by key, class names, rejects, a reader for workers;
of containers (tars, Parquet with image bytes) only which there are, for what is in them is known once they are read.
Guarantees: every file (folder) or row (table) is one reference or one reject, every other file one container; the order
of listing changes nothing; no image is opened; a source that is missing, empty, ambiguous or within ROOT stops with
advice.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.config import BuildConfig
from pipeline.errors import SourceError, UsageError
from pipeline.ingest.scratch import Scratch
from pipeline.ingest.source_containers import (
    Container,
    ContainerListing,
    ContainerReader,
    first_of_a_kind,
    mixture,
    parquet_holds_images,
)
from pipeline.ingest.source_files import Place, kind_of, open_place
from pipeline.ingest.source_folder import FolderListing
from pipeline.ingest.source_items import Fields, container_kind
from pipeline.ingest.source_reader import SourceReader
from pipeline.ingest.source_rows import Rows, sort_labels
from pipeline.ingest.source_table import KINDS, Columns, TableListing, table_kind
from pipeline.ingest.source_walk import SharedWalk, Workers
from pipeline.labels import LabelMap
from pipeline.schema import REFERENCES, Reason

__all__ = ["Container", "ContainerReader", "Listing", "SourceReader", "list_source", "open_originals", "twins"]

NUM_EXAMPLES = 5
_COLUMNS = ("label_column", "split_column", "group_column")
_NOT_FOR = {
    "folder": ("path_column", "image_column", *_COLUMNS, "images", "classes"),
    "table": ("image_column", "classes"),
    "containers": ("path_column", "images"),
}
"""Options that mean nothing for a kind of source."""


_Kind = Literal["folder", "table", "containers"]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What was found: ``class_names[class_id]``; ``splits_given`` where the source says who is train, val and test.

    With ``containers`` there are no references yet: `ingest.containers` reads them, and makes a listing of samples.
    """

    references: pa.Table
    class_names: tuple[str, ...]
    rejects: pa.Table
    reader: SourceReader
    notices: tuple[str, ...]
    splits_given: bool
    containers: tuple[Container, ...] = ()
    container_reader: ContainerReader | None = None


@dataclass(frozen=True)
class Source:
    """A source that is there, lies apart from ROOT, and that the options of the build are made for."""

    place: Place
    storage: str
    kind: _Kind


def open_source(config: BuildConfig) -> Source:
    """Look at ``config.source``, before anything is written: what is refused here leaves no trace."""
    source = open_place(config.source)
    storage = _storage_kind(source)
    kind = _kind(config, source, storage)
    _check_apart(source, open_place(config.root), is_file=storage == "file" or kind == "table")
    _check_options(config, source, kind)
    return Source(source, storage, kind)


def list_source(
    config: BuildConfig, opened: Source | None = None, workers: Workers | None = None, scratch: Scratch | None = None
) -> Listing:
    """List ``config.source``: names and sizes, of a table also its text, of Parquet files with images the footers.

    ``workers`` share the listing of a folder if it takes longer than they take to start; ``scratch`` holds the columns.
    """
    found = opened or open_source(config)
    source, storage, kind = found.place, found.storage, found.kind
    if kind == "containers":
        return _list_containers(config, source, is_file=_is_one_file(source, storage))
    rows = Rows(max_bytes=config.max_image_bytes)
    images, notices, splits_given = (
        _list_table(config, source, rows) if kind == "table" else _list_folder(config, source, rows, workers)
    )
    if not len(rows):
        raise SourceError(_nothing_found(source, rows, kind))
    settled = rows.settle(scratch)
    if not settled.references.num_rows:
        raise SourceError(_nothing_found(source, rows, kind))
    listing = Listing(
        references=settled.references,
        class_names=settled.class_names,
        rejects=settled.rejects,
        reader=SourceReader(images, config.max_image_bytes),
        notices=notices + twins(settled.class_names),
        splits_given=splits_given,
    )
    return listing if config.label_map is None else _mapped(listing, config.label_map)


def _mapped(listing: Listing, given: LabelMap) -> Listing:
    """The same images under the classes of their labels. In containers, labels are mapped as they are read."""
    classes = [given.class_of(label) for label in listing.class_names]
    names = sort_labels(sorted(set(classes)))
    place = {name: number for number, name in enumerate(names)}
    ids = np.array([place[name] for name in classes], np.int32)[listing.references["class_id"].to_numpy()]
    column = REFERENCES.get_field_index("class_id")
    unused = given.unused(listing.class_names)
    shown = ", ".join(map(repr, unused[:3])) + (", ..." if len(unused) > 3 else "")
    told = (f"labels of {given.file} that this source does not have: {len(unused)} ({shown})",) if unused else ()
    return replace(
        listing,
        references=listing.references.set_column(column, REFERENCES.field("class_id"), pa.array(ids)),
        class_names=names,
        notices=listing.notices + told,
    )


def open_originals(config: BuildConfig) -> SourceReader | None:
    """What reads the files of ``config.source`` by the paths of its rows; None where they lie in containers."""
    source = open_place(config.source)
    kind = _kind(config, source, _storage_kind(source))
    if kind == "containers":
        return None
    images = source if kind == "folder" else _images_of(config, source)
    return SourceReader(images, config.max_image_bytes)


def _storage_kind(source: Place) -> str:
    kind = kind_of(source)
    if kind == "missing":
        chained = "; chained URLs ('::') are not supported" if "::" in source.path else ""
        raise SourceError(
            f"source {source.shown} is not there: give a folder of images, a table, or tars or Parquet files{chained}"
        )
    return kind


def _is_one_file(source: Place, storage: str) -> bool:
    """The web does not tell a file from a folder: there the name does."""
    return storage == "file" or (storage == "unknown" and container_kind(source.name) is not None)


def _kind(config: BuildConfig, source: Place, storage: str) -> _Kind:
    """What to take the source for: what was asked, what its name says, what the first telling file in it is."""
    asked = config.source_kind
    is_file = storage == "file" or (storage == "unknown" and _named_like_a_file(source.name))
    if asked == "folder" and is_file:
        raise SourceError(f"source {source.shown} is a file, and --source-kind folder was asked for")
    if asked == "table" and table_kind(source.name) is None:
        raise SourceError(f"source {source.shown} is no table: its name must end in {', '.join(sorted(KINDS))}")
    if asked is not None:
        return asked if asked in ("folder", "table") else "containers"
    if not is_file:
        return "containers" if first_of_a_kind(source) == "containers" else "folder"
    if container_kind(source.name) == "parquet":
        return "containers" if parquet_holds_images(source, _fields(config)) else "table"
    if container_kind(source.name) == "tar":
        return "containers"
    if table_kind(source.name) is None:
        raise SourceError(
            f"source {source.shown} is a file, but no table, tar or Parquet file: its name must end in "
            f"{', '.join(sorted(KINDS))}, .tar, .tar.gz or .tgz; or give the folder that holds the images"
        )
    return "table"


def _named_like_a_file(name: str) -> bool:
    return table_kind(name) is not None or container_kind(name) is not None


def _check_options(config: BuildConfig, source: Place, kind: _Kind) -> None:
    given = [f"--{name.replace('_', '-')}" for name in _NOT_FOR[kind] if getattr(config, name) is not None]
    if given:
        what = {"folder": "a folder of images", "table": "a table", "containers": "made of tars or Parquet files"}[kind]
        raise SourceError(f"{', '.join(given)}: not for source {source.shown}, which is {what}")


def _fields(config: BuildConfig) -> Fields:
    return Fields(
        image=config.image_column,
        label=config.label_column,
        split=config.split_column,
        group=config.group_column,
        ignore_split=config.split_from == "none",
    )


def _list_containers(config: BuildConfig, source: Place, *, is_file: bool) -> Listing:
    _check_one_split(config)
    kind = config.source_kind
    assert kind in (None, "tar", "parquet")
    listing = ContainerListing(source, _fields(config), kind=kind, split_from=config.split_from)
    containers = listing.run(is_file=is_file)
    rows = Rows(max_bytes=config.max_image_bytes)
    for refused in listing.rejects:
        rows.reject(refused.path, refused.reason, detail=refused.detail)
    if not containers:
        raise SourceError(_nothing_found(source, rows, "containers"))
    return Listing(
        references=REFERENCES.empty_table(),
        class_names=(),
        rejects=rows.rejects_table(),
        reader=SourceReader(source, config.max_image_bytes),
        notices=listing.notices,
        splits_given=listing.has_splits,
        containers=tuple(containers),
        container_reader=ContainerReader(
            source, listing.fields, listing.columns, config.max_image_bytes, config.classes, config.label_map
        ),
    )


def _check_apart(source: Place, root: Place, *, is_file: bool) -> None:
    if root.holds(source):
        raise UsageError(
            f"source {source.shown} {'is' if root == source else 'lies within'} ROOT {root.shown}: a build must not "
            "read what it writes; give another ROOT"
        )
    if not is_file and source.holds(root):
        raise UsageError(
            f"ROOT {root.shown} lies within the source {source.shown}: the next build would list its files as images; "
            "give a ROOT outside"
        )


def _list_folder(
    config: BuildConfig, source: Place, rows: Rows, workers: Workers | None
) -> tuple[Place, tuple[str, ...], bool]:
    if config.split_from == "name":
        raise SourceError(f"--split-from name is for tars and Parquet files, but source {source.shown} is a folder")
    walk = SharedWalk(source, config.max_image_bytes, workers) if workers is not None else None
    listing = FolderListing(source, rows, label_from=config.label_from, split_from=config.split_from, walk=walk)
    notices = listing.run()
    if listing.containers and config.source_kind is None:
        raise SourceError(mixture(source, sorted(listing.containers), "tars or Parquet files beside images"))
    return source, notices, config.split_from == "top"


def _list_table(config: BuildConfig, source: Place, rows: Rows) -> tuple[Place, tuple[str, ...], bool]:
    if config.split_from in ("top", "name"):
        raise SourceError(
            f"--split-from {config.split_from} is for folders; for the table {source.shown} use `--split-column NAME`"
        )
    _check_one_split(config)
    images = _images_of(config, source)
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


def _images_of(config: BuildConfig, table: Place) -> Place:
    return table.parent if config.images is None else open_place(config.images)


def _check_one_split(config: BuildConfig) -> None:
    if config.split_from == "none" and config.split_column is not None:
        raise SourceError("--split-from none and --split-column exclude each other: choose one")


def _nothing_found(source: Place, rows: Rows, kind: _Kind) -> str:
    rejected = ", ".join(f"{number} {reason}" for reason, number in rows.num_rejects_by_reason().items())
    expected = {
        "table": "a row for each image",
        "folder": "class folders with images in them, like SOURCE/cat/1.jpg",
        "containers": "files that end in .tar, .tar.gz, .tgz or .parquet",
    }[kind]
    if not rejected:
        return f"source {source.shown} is empty; expected {expected}"
    if kind == "table" and set(rows.num_rejects_by_reason()) == {Reason.GONE}:
        return (
            f"none of the files that {source.shown} names is there, {rows.first_reject()!r} the first; paths are "
            "relative to the table's folder: give another with `--images FOLDER`"
        )
    return f"source {source.shown} has no usable image ({rejected}); expected {expected}"


def twins(names: Sequence[str]) -> tuple[str, ...]:
    """A notice on class names that look alike: they are distinct classes, which is seldom what was meant."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), []).append(name)
    twins = [" and ".join(repr(name) for name in group) for group in alike.values() if len(group) > 1]
    if not twins:
        return ()
    groups = "1 group of class names differs" if len(twins) == 1 else f"{len(twins)} groups of class names differ"
    return (f"{groups} only in case or encoding: {'; '.join(twins[:NUM_EXAMPLES])}",)
