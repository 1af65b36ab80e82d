"""What a container of images (a tar, a Parquet file) gives, sample by sample.

Comes in: nothing. Goes out: the words that readers of containers share. Guarantees: every sample of a container is one
`Offered` or one `Refused`; what belongs to no sample is a `Refused` too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.errors import SourceError
from pipeline.ingest.source_rows import SPLIT_NAMES, is_encodable, printable
from pipeline.keyed import text_key
from pipeline.schema import SPLIT_UNSET, Reason

ContainerKind = Literal["tar", "parquet"]

CONTAINER_KINDS: dict[str, ContainerKind] = {
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""Extensions (lower case) of containers."""

MAX_LABEL_CHARS = 500
"""A class name. Longer texts are captions."""


class Offered(NamedTuple):
    """A sample with its bytes, not yet looked at. ``group`` is None where nothing groups."""

    path: str
    label: str
    data: bytes
    split: int = SPLIT_UNSET
    group: int | None = None


class Refused(NamedTuple):
    """A row of the rejects table."""

    path: str
    reason: Reason
    detail: str
    label: str = ""
    split: int = SPLIT_UNSET


Item = Offered | Refused


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where image, label, split and group are: an extension or column each; None is the usual place, or nowhere."""

    image: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None
    ignore_split: bool = False


class Names:
    """Makes paths of one container distinct: the first keeps its name, later ones get a number."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def distinct(self, path: str) -> str:
        candidate, number = path, 1
        while (key := text_key(candidate)) in self._seen:
            number += 1
            candidate = f"{path}#{number}"
        self._seen.add(key)
        return candidate


_CONTAINER_ENDS = tuple(CONTAINER_KINDS)


def container_kind(name: str) -> ContainerKind | None:
    """'tar' or 'parquet' by extension, else None."""
    if not name.lower().endswith(_CONTAINER_ENDS):  # nearly every file of a folder: one call, not one for each kind
        return None
    return next((kind for extension, kind in CONTAINER_KINDS.items() if name.lower().endswith(extension)), None)


def may_hold_containers(names: Sequence[str]) -> bool:
    """Whether `container_kind` may be something for one of these; False is certain, and cheap for many names."""
    text = "\n".join(names).lower() + "\n"
    return any(f"{end}\n" in text for end in _CONTAINER_ENDS)


def named(item: Item, class_names: Sequence[str]) -> Item:
    """The same with the name that its label, a number, stands for; refused if it stands for none."""
    number = int(item.label) if re.fullmatch(r"[0-9]{1,18}", item.label) else -1
    if 0 <= number < len(class_names):
        return item._replace(label=class_names[number])
    if isinstance(item, Refused):
        return item._replace(label="")
    text = item.label if len(item.label) <= _SHOWN_CHARS else item.label[:_SHOWN_CHARS] + "..."
    detail = f"label {text!r}, `classes` names the numbers 0 to {len(class_names) - 1}"
    return Refused(item.path, Reason.NO_LABEL, detail, split=item.split)


_SHOWN_CHARS = 50


def label_problem(label: str | None) -> tuple[Reason, str] | None:
    """Why this text cannot be a class name."""
    if label is None or not label.strip():
        return Reason.NO_LABEL, ""
    if not is_encodable(label):
        return Reason.NAME_ENCODING, "the label is not valid UTF-8"
    if len(label) > MAX_LABEL_CHARS or "\n" in label:
        return Reason.NO_LABEL, f"a text of {len(label)} characters, a class name is one line of {MAX_LABEL_CHARS}"
    return None


def group_id(text: str | None) -> int | None:
    """The group that this text names; the prefix keeps a group called "a.jpg" apart from the image a.jpg."""
    return text_key("group\n" + printable(text)) if text else None


def split_code(text: str | None, where: str, field: str) -> int:
    """The split that this text names. An unknown one stops the build: samples must not end up in train by a typo."""
    code = SPLIT_NAMES.get((text or "").strip().lower())
    if code is None:
        raise SourceError(
            f"{printable(where)}: {field!r} must say one of {', '.join(SPLIT_NAMES)}, but says "
            f"{printable(text or '')!r}; mend it, or ignore it with `--split-from none`"
        )
    return code
