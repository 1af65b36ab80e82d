"""The samples of a Parquet file that holds its images as bytes.

Comes in: a seekable file, and which columns hold what. Goes out: items. Guarantees: every row is one item; rows of a
row group that is damaged are refused by name, those before the damage and those of other groups are kept; pages are
streamed, so memory is a few megabytes plus one page of each column; nothing in the file names code.

Two layouts are read: Hugging Face's ``image: struct<bytes, path>``, whose class names lie in the schema's metadata, and
a plain binary column.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import EvenshardError, SourceError
from pipeline.ingest.source_items import Fields, Item, Offered, Refused, group_id, label_problem, split_code
from pipeline.ingest.source_rows import is_encodable, printable
from pipeline.ingest.source_table import DEFAULT_NAMES
from pipeline.keyed import text_key
from pipeline.schema import SPLIT_UNSET, Reason

BATCH_BYTES = 8 << 20
READ_BYTES = 1 << 20
"""Of a column at a time; without it pyarrow takes a whole column chunk into memory."""
PART_BYTES = 1 << 30
"""A larger file is read in parts, each some row groups."""

_IMAGE_NAMES = ("image", "img", "picture", "photo", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Part:
    """Row groups [start, stop) of a file; ``stop`` -1 is its end."""

    start: int = 0
    stop: int = -1


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The columns of one file. ``class_names`` where labels are numbers that stand for names."""

    image: str
    label: str
    split: str | None
    group: str | None
    has_paths: bool
    class_names: tuple[str, ...] | None


class Unreadable(Exception):
    """The bytes of the file are not what they should be."""


def read_rows(
    stream: BinaryIO, container: str, fields: Fields, part: Part, *, split: int = SPLIT_UNSET, max_bytes: int
) -> Iterator[Item]:
    """The items of the file called ``container``, in its order. ``split`` is that of rows without a split column."""
    try:
        file = open_parquet(stream)
    except Unreadable as error:
        yield Refused(container, Reason.DAMAGED, str(error))
        return
    with file:
        chosen = choose_columns(file.schema_arrow, fields, container)
        reader = _Reader(file, container, chosen, split, max_bytes)
        stop = file.num_row_groups if part.stop < 0 else part.stop
        for group in range(part.start, stop):
            yield from reader.row_group(group)


def open_parquet(stream: BinaryIO) -> pq.ParquetFile:
    """The file, its footer read, else ``Unreadable``. Page checksums are verified where there are any."""
    try:
        file = pq.ParquetFile(
            stream,
            buffer_size=READ_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
        )
    except Exception as error:
        raise _damage(error, "no readable Parquet footer") from error
    counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    # A row with an image has more than a byte; a number beyond that would have us count for ever.
    if min(counts, default=0) < 0 or sum(counts) != file.metadata.num_rows or sum(counts) > _size(stream):
        raise Unreadable("the Parquet footer contradicts itself")
    return file


def _size(stream: BinaryIO) -> int:
    place = stream.tell()
    size = stream.seek(0, 2)
    stream.seek(place)
    return size


def holds_images(schema: pa.Schema, fields: Fields) -> bool:
    """Whether this is a container, and no table of paths."""
    names = [fields.image] if fields.image else schema.names
    return any(_is_image(schema.field(name).type) for name in names if name in schema.names)


def plan_parts(file: pq.ParquetFile) -> list[Part]:
    """Runs of row groups of about PART_BYTES; one part if the file is not larger."""
    meta = file.metadata
    sizes = [max(0, meta.row_group(i).total_byte_size) for i in range(meta.num_row_groups)]
    if sum(sizes) <= PART_BYTES:
        return [Part()]
    parts: list[Part] = []
    start = held = 0
    for number, size in enumerate(sizes):
        if number > start and held + size > PART_BYTES:
            parts.append(Part(start, number))
            start, held = number, 0
        held += size
    return [*parts, Part(start, len(sizes))]


def choose_columns(schema: pa.Schema, fields: Fields, where: str) -> Chosen:
    """Which columns hold what: those that were named, else what Hugging Face's metadata says, else the usual names."""
    features = _features(schema)
    image = _choose_image(schema, fields, features, where)
    labels = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    label = fields.label or (labels[0] if len(labels) == 1 else _usual(schema, "label"))
    if label is None or label not in schema.names:
        wanted = repr(label) if label else " or ".join(repr(name) for name in DEFAULT_NAMES["label"])
        raise SourceError(_no_column(schema, where, wanted, "label"))
    split = None if fields.ignore_split else fields.split or _usual(schema, "split")
    group = fields.group or _usual(schema, "group")
    for name, what in ((split, "split"), (group, "group")):
        if name is not None and name not in schema.names:
            raise SourceError(_no_column(schema, where, repr(name), what))
    for name in (label, split, group):
        if name is not None and not _is_text(schema.field(name).type):
            raise SourceError(
                f"{where}: column {name!r} is {schema.field(name).type}; text or integers are expected, as labels are "
                "exact"
            )
    kind = schema.field(image).type
    names: Any = features.get(label, {}).get("names")
    is_named = isinstance(names, list) and pa.types.is_integer(schema.field(label).type)
    return Chosen(
        image=image,
        label=label,
        split=split,
        group=group,
        has_paths=pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 and _is_text(kind.field("path").type),
        class_names=tuple(str(name) for name in cast(list[object], names)) if is_named else None,
    )


def _choose_image(schema: pa.Schema, fields: Fields, features: Mapping[str, Mapping[str, Any]], where: str) -> str:
    if fields.image is not None:
        if fields.image not in schema.names:
            raise SourceError(_no_column(schema, where, repr(fields.image), "image"))
        if not _is_image(schema.field(fields.image).type):
            raise SourceError(
                f"{where}: column {fields.image!r} is {schema.field(fields.image).type}; image bytes are expected "
                "(binary, or a struct with a field 'bytes'); a column of paths is read with `--path-column`"
            )
        return fields.image
    able = [name for name in schema.names if _is_image(schema.field(name).type)]
    declared = [name for name in able if features.get(name, {}).get("_type") == "Image"]
    usual = [name for name in _IMAGE_NAMES if name in able]
    for names in (declared, usual[:1], able):
        if len(names) == 1:
            return names[0]
    if not able:
        raise SourceError(_no_column(schema, where, "of image bytes", "image"))
    raise SourceError(
        f"{where} has {len(able)} columns of bytes, {_listed(able)}: choose one with `--image-column NAME`"
    )


def _no_column(schema: pa.Schema, where: str, wanted: str, what: str) -> str:
    return (
        f"{where} has no column {wanted} for the {what}; its columns are {_listed(schema.names)}: choose with "
        f"`--{what}-column NAME`"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _usual(schema: pa.Schema, what: str) -> str | None:
    return next((name for name in DEFAULT_NAMES[what] if name in schema.names), None)


def _features(schema: pa.Schema) -> dict[str, Mapping[str, Any]]:
    """The columns as Hugging Face's `datasets` describes them; {} where nothing does."""
    try:
        found: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {str(name): value for name, value in found.items() if isinstance(value, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_string or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _damage(error: Exception, what: str) -> Exception:
    """Trouble of the file, told apart from trouble in reading it."""
    if isinstance(error, EvenshardError) or getattr(error, "errno", None) is not None:
        return error
    return Unreadable(what)


class _Reader:
    def __init__(self, file: pq.ParquetFile, container: str, chosen: Chosen, split: int, max_bytes: int) -> None:
        self._file, self._container, self._chosen = file, container, chosen
        self._split, self._max_bytes = split, max_bytes
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts: list[int] = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        self._is_first = self._first_of_each_name() if chosen.has_paths else None

    def row_group(self, number: int) -> Iterator[Item]:
        start, stop = self._starts[number : number + 2]
        done, problem = start, ""
        names = self._names(number)
        try:
            for batch in self._batches(number):
                for item in self._items(batch, done, names[done - start :]):
                    if done < stop:
                        done += 1
                        yield item
        except Unreadable as error:
            problem = str(error)
        for row in range(done, stop):
            detail = f"row {row}: {problem or f'row group {number} ends before it'}"
            yield Refused(self._path(row, names[row - start]), Reason.DAMAGED, detail)

    def _batches(self, number: int) -> Iterator[pa.RecordBatch]:
        chosen = self._chosen
        columns = [name for name in dict.fromkeys((chosen.image, chosen.label, chosen.split, chosen.group)) if name]
        meta = self._file.metadata.row_group(number)
        rows = max(1, min(1024, BATCH_BYTES * max(1, meta.num_rows) // max(1, meta.total_byte_size)))
        batches = self._file.iter_batches(batch_size=rows, row_groups=[number], columns=columns, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
                if batch is not None:
                    batch.validate()
            except Exception as error:
                raise _damage(error, f"row group {number} cannot be read from here on") from error
            if batch is None:
                return
            yield batch

    def _items(self, batch: pa.RecordBatch, start: int, names: Sequence[str | None]) -> Iterator[Item]:
        chosen = self._chosen
        images = batch.column(chosen.image)
        if pa.types.is_struct(images.type):
            images = _field(images, "bytes")
        blank = [None] * batch.num_rows
        labels, splits, groups = (
            _texts(batch.column(name)) if name else blank for name in (chosen.label, chosen.split, chosen.group)
        )
        for offset in range(batch.num_rows):
            row = start + offset
            name = names[offset] if offset < len(names) else None
            yield self._item(row, name, images[offset], (labels[offset], splits[offset], groups[offset]))

    def _item(
        self, row: int, name: str | None, image: pa.Scalar, texts: tuple[str | None, str | None, str | None]
    ) -> Item:
        path = self._path(row, name)
        split = self._split
        if self._chosen.split is not None:
            split = split_code(texts[1], f"{self._container}, row {row}", self._chosen.split)
        label, why_not = self._label(texts[0])
        problem = label_problem(label)
        shown = (label or "").strip() if problem is None else ""
        if problem is None:
            problem, data = self._data(image)
            if problem is None:
                return Offered(path, shown, data, split, group_id(texts[2]))
        return Refused(path, problem[0], f"row {row}: {problem[1] or why_not}", shown, split)

    def _data(self, image: pa.Scalar) -> tuple[tuple[Reason, str] | None, bytes]:
        if not image.is_valid:
            return (Reason.NO_IMAGE, f"no bytes in column {self._chosen.image!r}"), b""
        buffer = image.as_buffer()
        if buffer is None or not buffer.size:
            return (Reason.EMPTY, "0 bytes"), b""
        if buffer.size > self._max_bytes:
            return (Reason.TOO_LARGE, f"{buffer.size} bytes, the limit is {self._max_bytes}"), b""
        return None, buffer.to_pybytes()

    def _label(self, text: str | None) -> tuple[str | None, str]:
        """The class name, or None and why not."""
        names = self._chosen.class_names
        if text is None or names is None:
            return text, f"no label in column {self._chosen.label!r}"
        number = int(text)
        if 0 <= number < len(names):
            return names[number], "the name of this class is blank"
        return None, f"label {number}, the schema names {len(names)} classes" + (", -1 is none" if number < 0 else "")

    def _first_of_each_name(self) -> NDArray[np.bool_]:
        """For each row of the file: whether it is the first of its name."""
        keys = np.zeros(self._starts[-1], np.uint64)
        for number, start in enumerate(self._starts[:-1]):
            found = [text_key(printable(name)) if name else 0 for name in self._read_names(number)]
            keys[start : start + len(found)] = found
        _, first = np.unique(keys, return_index=True)
        is_first = np.zeros(len(keys), np.bool_)
        is_first[first] = True
        return is_first

    def _names(self, number: int) -> list[str | None]:
        start, stop = self._starts[number : number + 2]
        blank: list[str | None] = [None] * (stop - start)
        return self._read_names(number) or blank if self._chosen.has_paths else blank

    def _read_names(self, number: int) -> list[str | None]:
        """The names of all rows of a group, [] if they cannot be read."""
        image = self._chosen.image
        try:
            table = self._file.read_row_group(number, columns=[f"{image}.path"], use_threads=False)
            table.validate()
        except Exception as error:
            if not isinstance(_damage(error, ""), Unreadable):
                raise
            return []
        names = _texts(_field(table.column(image).combine_chunks(), "path"))
        return names if len(names) == self._starts[number + 1] - self._starts[number] else []

    def _path(self, row: int, name: str | None) -> str:
        if not name or not is_encodable(name):
            return f"{self._container}/{row}"
        is_first = self._is_first is None or bool(self._is_first[row])
        return f"{self._container}/{name}" if is_first else f"{self._container}/{name}#{row}"


def _field(column: pa.StructArray, name: str) -> pa.Array:
    """A field of a struct, null where the struct is."""
    return column.flatten()[column.type.get_field_index(name)]


def _texts(column: pa.Array) -> list[str | None]:
    """Text and integers as text; undecodable bytes become lone surrogates, as they do in file names."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return pc.cast(column, pa.string()).to_pylist()
    values = pc.cast(column, pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]
