"""The samples of a WebDataset tar, grouped by the format's own rules.

Comes in: a stream, and where labels are. Goes out: items. Guarantees: members are grouped as webdataset 1.0 does it
(consecutive files of one name up to the first dot of the base name, extensions in lower case); every sample, and every
member that belongs to none, is one item; at most one image is held, and nothing but text and JSON is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from pipeline.ingest.source_items import Fields, Item, Names, Offered, Refused, group_id, label_problem, split_code
from pipeline.ingest.source_rows import is_encodable, printable
from pipeline.ingest.source_tar import Damage, Member, Source, read_members
from pipeline.schema import SPLIT_UNSET, Reason

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"))
MAX_TEXT_BYTES = 1 << 20
"""Of a member that holds a label or JSON."""

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset.tariterators.base_plus_ext
_META = re.compile(r"__[^/]*__($|/)")
_KINDS = {"link": "a link", "sparse": "a sparse file", "special": "a pipe, a device or an unknown kind of entry"}


def read_samples(
    stream: Source, container: str, fields: Fields, *, split: int = SPLIT_UNSET, max_bytes: int
) -> Iterator[Item]:
    """The items of the tar called ``container``, in its order. ``split`` is that of samples that name none."""
    yield from _Reader(container, fields, split, max_bytes).items(stream)


def is_image_name(name: str) -> bool:
    """Whether the last extension of ``name`` is that of an image."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


@dataclass
class _Sample:
    key: str
    first: str  # name of its first member
    names: dict[str, str] = field(default_factory=dict)  # extension -> name of its first member with it
    images: dict[str, int] = field(default_factory=dict)  # extension -> size
    data: bytes | None = None  # of the one image
    texts: dict[str, bytes | None] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    doubled: str = ""  # a member whose extension another one had


class _Reader:
    def __init__(self, container: str, fields: Fields, split: int, max_bytes: int) -> None:
        self._container, self._split, self._max_bytes = container, split, max_bytes
        self._image = fields.image.lower() if fields.image else None
        self._label = _Place(fields.label or "cls")
        self._group = _Place(fields.group) if fields.group else None
        self._where = _Place(fields.split) if fields.split and not fields.ignore_split else None
        places = [place for place in (self._label, self._group, self._where) if place]
        self._text_extensions = frozenset(extension for place in places for extension, _ in place.options)
        self._names = Names()

    def items(self, stream: Source) -> Iterator[Item]:
        sample: _Sample | None = None
        for entry in read_members(stream, self._limit):
            key, extension = self._split_name(entry)
            if extension is None:
                yield from self._outside(entry)
                continue
            if sample is None or key != sample.key:
                yield from self._finish(sample)
                sample = _Sample(key, entry.name)
            yield from self._take(sample, entry, extension)
        yield from self._finish(sample)

    def _split_name(self, entry: Member | Damage) -> tuple[str, str | None]:
        """Key and extension; no extension for what belongs to no sample."""
        if (isinstance(entry, Member) and entry.kind != "file") or _META.match(entry.name):
            return "", None
        match = _NAME.match(entry.name)
        return (match[1], match[2].lower()) if match else ("", None)

    def _limit(self, name: str) -> int:
        match = _NAME.match(name)
        if match is None or _META.match(name):
            return -1
        extension = match[2].lower()
        if self._is_image(extension):
            return self._max_bytes
        return MAX_TEXT_BYTES if extension in self._text_extensions else -1

    def _is_image(self, extension: str) -> bool:
        return extension == self._image if self._image else is_image_name("." + extension)

    def _outside(self, entry: Member | Damage) -> Iterator[Refused]:
        if isinstance(entry, Damage):
            yield self._refusal(entry.name, Reason.DAMAGED, entry.detail)
        elif entry.kind in _KINDS:
            yield self._refusal(entry.name, Reason.UNREADABLE, f"{_KINDS[entry.kind]}, not a file")
        elif entry.kind == "file":
            why = "metadata by its name" if _META.match(entry.name) else "a name without an extension"
            yield self._refusal(entry.name, Reason.NO_IMAGE, f"{why}: belongs to no sample")

    def _take(self, sample: _Sample, entry: Member | Damage, extension: str) -> Iterator[Refused]:
        is_image, is_text = self._is_image(extension), extension in self._text_extensions
        if isinstance(entry, Damage):
            sample.damaged[extension] = entry.detail
            if not is_image and not is_text:
                yield self._refusal(entry.name, Reason.DAMAGED, entry.detail)
        if extension in sample.names:
            sample.doubled = sample.doubled or entry.name
        sample.names.setdefault(extension, entry.name)
        data, size = (entry.data, entry.size) if isinstance(entry, Member) else (None, 0)
        if is_image:
            sample.images[extension] = size
            sample.data = data if len(sample.images) == 1 and not sample.doubled else None
        if is_text:
            sample.texts[extension] = data

    def _finish(self, sample: _Sample | None) -> Iterator[Item]:
        if sample is None:
            return
        image = next(iter(sample.images), None)
        name = sample.names[image] if image is not None else sample.first
        label, why_not = self._label.text(sample.texts)
        shown = label if label and label_problem(label) is None else ""
        split, no_split = self._sample_split(sample, name)
        problem = self._obstacle(sample, image, name, (label, why_not)) or no_split
        if problem is not None:
            yield self._refusal(name, *problem, label=shown, split=split)
            return
        assert sample.data is not None  # no obstacle
        group = group_id(self._group.text(sample.texts)[0]) if self._group else None
        yield Offered(self._path(name), shown, sample.data, split, group)

    def _sample_split(self, sample: _Sample, name: str) -> tuple[int, tuple[Reason, str] | None]:
        if self._where is None:
            return self._split, None
        text, why_not = self._where.text(sample.texts)
        if text is None:
            return SPLIT_UNSET, (Reason.NO_LABEL, f"no split: {why_not}")
        return split_code(text, f"{self._container}/{name}", self._where.field), None

    def _obstacle(
        self, sample: _Sample, image: str | None, name: str, label: tuple[str | None, str]
    ) -> tuple[Reason, str] | None:
        if not is_encodable(name):
            return Reason.NAME_ENCODING, "not valid UTF-8"
        if sample.doubled:
            return Reason.AMBIGUOUS, f"a second member with this extension: {sample.doubled!r}"
        if image is None:
            there = ", ".join(sorted(sample.names))
            wanted = f"no member .{self._image}" if self._image else "no image among its members"
            return Reason.NO_IMAGE, f"{wanted} ({there})"
        if len(sample.images) > 1:
            return Reason.AMBIGUOUS, f"{len(sample.images)} images ({', '.join(sorted(sample.images))})"
        if image in sample.damaged:
            return Reason.DAMAGED, sample.damaged[image]
        if (problem := label_problem(label[0])) is not None:
            return problem[0], problem[1] or label[1]
        if sample.data is None:
            return Reason.TOO_LARGE, f"{sample.images[image]} bytes, the limit is {self._max_bytes}"
        return None if sample.data else (Reason.EMPTY, "0 bytes")

    def _refusal(self, name: str, reason: Reason, detail: str, *, label: str = "", split: int = SPLIT_UNSET) -> Refused:
        # What has no name is the container's own.
        return Refused(self._path(name) if name else self._container, reason, detail, label, split)

    def _path(self, name: str) -> str:
        return self._names.distinct(f"{self._container}/{printable(name)}")


class _Place:
    """Where a text is: the whole of a member (``cls``), or a field of a JSON member (``json.category``, nested too)."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.options = [(field.lower(), "")]
        for dot in (match.start() for match in re.finditer(r"\.", field)):
            if field[:dot].lower().endswith("json"):
                self.options.append((field[:dot].lower(), field[dot + 1 :]))

    def text(self, texts: dict[str, bytes | None]) -> tuple[str | None, str]:
        """The text and '', or None and why not."""
        for extension, inner in self.options:
            if extension not in texts:
                continue
            data = texts[extension]
            if data is None:
                return None, f"the member .{extension} is damaged, or longer than {MAX_TEXT_BYTES} bytes"
            try:
                text = data.decode("utf-8-sig")
                return (_in_json(text, inner) if inner else text.strip()), ""
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                problem = f"the member .{extension} has no text at {inner!r}" if inner else "not UTF-8"
                return None, problem if not isinstance(error, UnicodeDecodeError) else f".{extension} is not UTF-8"
        return None, f"no member .{self.options[-1][0]}"


def _in_json(text: str, inner: str) -> str:
    """The field ``inner`` (``a.b``: by that name, or b of a) as it was written."""
    value: Any = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    while inner:
        if not isinstance(value, dict):
            raise TypeError(inner)
        record = cast(dict[str, Any], value)
        if inner in record:
            value, inner = record[inner], ""
        else:
            name, _, inner = inner.partition(".")
            if not inner:
                raise KeyError(name)
            value = record[name]
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        raise TypeError(inner)
    return value.strip()
