"""Tars and Parquet files that hold images: which there are, and what is in each.

Comes in: a place, and where image, label, split and group are. Goes out: containers, each with the split that its name
gives, and a reader that travels to workers. Guarantees: the listing opens footers of Parquet files only; every file is
a container or a reject; what is ambiguous (images beside containers, names of splits that nobody chose, columns that
are not there) stops the build with advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pipeline.errors import SourceError, UsageError
from pipeline.ingest.source_files import Place, list_folder_entries, list_names, look_at
from pipeline.ingest.source_items import ContainerKind, Fields, Item, Refused, container_kind, named
from pipeline.ingest.source_local import Found
from pipeline.ingest.source_parquet import (
    PART_BYTES,
    Part,
    Unreadable,
    choose_columns,
    holds_images,
    open_parquet,
    plan_parts,
    read_rows,
)
from pipeline.ingest.source_rows import SPLIT_NAMES, is_encodable, printable
from pipeline.ingest.source_streams import Inflated, Listed, open_listed
from pipeline.ingest.source_webdataset import is_image_name, read_samples
from pipeline.labels import LabelMap
from pipeline.schema import SPLIT_UNSET, SPLITS, Reason

NUM_EXAMPLES = 5

SplitFrom = Literal["none", "top", "name"] | None

_PACKED = (".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4", ".tzst", ".tbz2", ".txz", ".zip", ".7z", ".rar")


class Container(NamedTuple):
    """One file with images in it, or (Parquet) some row groups of it. ``name`` begins the paths of its samples."""

    name: str
    kind: ContainerKind
    listed: Listed
    split: int = SPLIT_UNSET
    part: Part = Part()


@dataclass(frozen=True)
class ContainerReader:
    """Reads containers of one place; travels to workers."""

    place: Place
    fields: Fields  # of tars
    columns: Fields  # of Parquet files
    max_bytes: int
    class_names: tuple[str, ...] | None = None
    """Where labels are numbers: what each is called."""
    label_map: LabelMap | None = None

    def items(self, container: Container) -> Iterator[Item]:
        """Every sample, and whatever else is in there, in the order of the file."""
        items = self._items(container)
        if self.class_names is not None:
            return (named(item, self.class_names) for item in items)
        found = self.label_map
        return items if found is None else (item._replace(label=found.class_of(item.label)) for item in items)

    def _items(self, container: Container) -> Iterator[Item]:
        with open_listed(self.place, container.listed) as file:
            if container.kind == "parquet":
                limits = {"split": container.split, "max_bytes": self.max_bytes}
                yield from read_rows(file, container.name, self.columns, container.part, **limits)
                return
            inflated = Inflated(file) if container.name.lower().endswith("gz") else None
            stream = file if inflated is None else inflated
            yield from read_samples(
                stream, container.name, self.fields, split=container.split, max_bytes=self.max_bytes
            )
            if inflated is not None and inflated.problem:
                yield Refused(container.name, Reason.DAMAGED, inflated.problem)


def first_of_a_kind(place: Place) -> Literal["containers", "images"] | None:
    """What the first file (in sorted order) with a telling name is; a few folders are listed, not all."""
    pending = [""]
    while pending:
        folder = pending.pop()
        found = sorted(list_names(place, folder))
        for name, is_folder in found:
            if not is_folder and container_kind(name):
                return "containers"
            if not is_folder and is_image_name(name):
                return "images"
        pending += [_join(folder, name) for name, is_folder in reversed(found) if is_folder]
    return None


def parquet_holds_images(place: Place, fields: Fields) -> bool:
    """Whether the one Parquet file that ``place`` names is a container. An unreadable one is taken for a table."""
    try:
        with open_listed(place, _listed(place)) as stream, open_parquet(stream) as file:
            return holds_images(file.schema_arrow, fields)
    except Unreadable:
        return False


def _listed(place: Place) -> Listed:
    """The file that ``place`` itself names."""
    found = look_at(place, "")
    if found.problem is not None:
        raise SourceError(f"{place.shown} cannot be opened: {found.detail}")
    return Listed("", found.size, found.fingerprint)


class ContainerListing:
    """One walk for containers; `run` fills ``rejects`` and returns them sorted by name."""

    def __init__(self, place: Place, fields: Fields, *, kind: ContainerKind | None, split_from: SplitFrom) -> None:
        self._place = place
        self._kind: ContainerKind | None = kind
        self._split_from: SplitFrom = split_from
        self.fields = fields
        """As asked; what the first Parquet file makes of them is in ``columns``."""
        self.columns = fields
        self.rejects: list[Refused] = []
        self.notices: tuple[str, ...] = ()

    @property
    def has_splits(self) -> bool:
        return self._split_from in ("top", "name") or self.columns.split is not None

    def run(self, *, is_file: bool) -> list[Container]:
        containers: list[Container] = []
        if is_file:
            name = self._place.name
            kind = self._kind or container_kind(name)
            assert kind is not None  # the caller knows it for a container
            containers.append(Container(name, kind, _listed(self._place)))
        else:
            # By name: a server that lists one file twice has not got two.
            containers = [found for _, found in sorted({found.name: found for found in self._walk()}.items())]
        self._settle_columns(containers)
        return [part for container in self._with_splits(containers) for part in self._parts(container)]

    def _walk(self) -> Iterator[Container]:
        pending, images = [""], list[str]()
        while pending:
            folder = pending.pop()
            for found in list_folder_entries(self._place, folder):
                path = _join(folder, found.name)
                if found.is_folder:
                    pending.append(path)
                    continue
                kind = container_kind(found.name)
                if kind is None and self._kind is None and is_image_name(found.name):
                    images.append(path)
                if (refusal := self._refusal(path, kind, found)) is not None:
                    self.rejects.append(refusal)
                else:
                    assert kind is not None  # else refused
                    yield Container(path, kind, Listed(path, found.size, found.fingerprint))
        if images:
            raise SourceError(mixture(self._place, sorted(images), "images beside tars or Parquet files"))

    def _refusal(self, path: str, kind: ContainerKind | None, found: Found) -> Refused | None:
        if not is_encodable(path):
            return Refused(printable(path), Reason.NAME_ENCODING, "not valid UTF-8")
        if path.lower().endswith(_PACKED):
            raise SourceError(
                f"{self._place.shown}: {path!r} is packed in a way that is not read; unpack it, or repack it as .tar "
                "or .tar.gz"
            )
        if found.problem is not None:
            return Refused(path, found.problem, found.detail)
        if kind is None or (self._kind is not None and kind != self._kind):
            wanted = {"tar": "a tar", "parquet": "a Parquet file", None: "a tar or Parquet file"}[self._kind]
            return Refused(path, Reason.FORMAT_NOT_ALLOWED, f"not {wanted} by its name")
        return None if found.size else Refused(path, Reason.EMPTY, "0 bytes")

    def _settle_columns(self, containers: Sequence[Container]) -> None:
        """The first Parquet file that can be read decides the columns of all, so that no file means others."""
        for container in containers:
            if container.kind != "parquet":
                continue
            try:
                with open_listed(self._place, container.listed) as stream, open_parquet(stream) as file:
                    schema = file.schema_arrow
            except Unreadable:
                continue
            chosen = choose_columns(schema, self.fields, f"{self._place.shown}: {container.name}")
            self.columns = replace(
                self.fields, image=chosen.image, label=chosen.label, split=chosen.split, group=chosen.group
            )
            self.notices = tuple(
                f"column {name!r} decides the {what}"
                for what, name in (("split", chosen.split), ("group", chosen.group))
                if name is not None and getattr(self.fields, what) is None
            )
            return

    def _with_splits(self, containers: Sequence[Container]) -> Iterator[Container]:
        by_name = [split_in_name(container.name) for container in containers]
        if self._split_from is None and self.columns.split is None:
            known = {code for code in by_name if code is not None}
            if 0 in known and len(known) > 1:
                raise SourceError(self._split_advice(containers, by_name))
        if self._split_from not in ("top", "name"):
            yield from containers
            return
        if self.columns.split is not None:
            raise UsageError(
                f"--split-from {self._split_from} and the column {self.columns.split!r} both give splits: choose one"
            )
        found = by_name if self._split_from == "name" else [_split_on_top(c.name) for c in containers]
        bare = [container.name for container, code in zip(containers, found, strict=True) if code is None]
        if bare:
            where = "a folder on top named" if self._split_from == "top" else "a name that says"
            raise SourceError(
                f"{self._place.shown}: with --split-from {self._split_from} every file needs {where} one of "
                f"{', '.join(SPLIT_NAMES)}; {shown(bare)} has none, or several"
            )
        for container, code in zip(containers, found, strict=True):
            yield container._replace(split=SPLIT_UNSET if code is None else code)

    def _split_advice(self, containers: Sequence[Container], by_name: Sequence[int | None]) -> str:
        examples = {
            SPLITS[code]: container.name
            for container, code in zip(reversed(containers), reversed(by_name), strict=True)
            if code is not None
        }
        return (
            f"{self._place.shown} holds files named like splits: {shown(sorted(examples.values()))}. Choose one: "
            f"`--split-from name` keeps these splits; `--split-from none` makes new ones of all samples"
        )

    def _parts(self, container: Container) -> Iterator[Container]:
        if container.kind == "tar" or container.listed.size <= PART_BYTES:
            yield container
            return
        try:
            with open_listed(self._place, container.listed) as stream, open_parquet(stream) as file:
                parts = plan_parts(file)
        except Unreadable:
            parts = [Part()]
        yield from (container._replace(part=part) for part in parts)


def split_in_name(path: str) -> int | None:
    """The one split that a file's name says (train-00000-of-00002.parquet), or else the folder nearest to it."""
    *folders, name = path.split("/")
    for text in (name.partition(".")[0], *reversed(folders)):
        found = {SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", text.lower()) if word in SPLIT_NAMES}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _split_on_top(path: str) -> int | None:
    top, slash, _ = path.partition("/")
    return SPLIT_NAMES.get(top.lower()) if slash else None


def mixture(place: Place, names: Sequence[str], what: str) -> str:
    """The refusal of a folder that is two kinds of source at once."""
    return (
        f"{place.shown} holds {what} ({shown(names)}), so it is not clear what to read. Give the folder of one kind, "
        "or choose: `--source-kind folder` takes images, `--source-kind tar` tars, `--source-kind parquet` Parquet "
        "files with images in them; everything else is rejected by name"
    )


def shown(names: Sequence[str]) -> str:
    """A few names for a message."""
    text = ", ".join(repr(printable(name)) for name in names[:NUM_EXAMPLES])
    return f"{text} and {len(names) - NUM_EXAMPLES} more" if len(names) > NUM_EXAMPLES else text


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
