"""A folder as a source: the class of a file is a folder's name.

Comes in: a place, and which folder names the class and the split. Goes out: rows. Guarantees: every file below the
place is a candidate or a reject with a reason; links to folders are never followed; a label that could mean two
classes, and a split that nobody chose, stop the build with advice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from pipeline.errors import SourceError
from pipeline.ingest.source_files import Place, list_folder
from pipeline.ingest.source_items import container_kind, may_hold_containers
from pipeline.ingest.source_local import Entries, Found
from pipeline.ingest.source_rows import SPLIT_NAMES, FileColumns, Rows, printable
from pipeline.ingest.source_walk import SharedWalk, Walked
from pipeline.schema import SPLIT_UNSET, SPLITS, Reason

NUM_EXAMPLES = 5
LabelFrom = Literal["parent", "top", "path"]
SplitFrom = Literal["none", "top"] | None


class _Meaning(NamedTuple):
    """What files directly in a folder are. ``class_folder`` is relative to the split's folder."""

    label: str | None
    split: int
    class_folder: str
    why_not: str


class FolderListing:
    """One walk over a folder; `run` fills ``rows`` and returns notices.

    What takes long is shared with workers by ``walk``.
    """

    def __init__(
        self,
        place: Place,
        rows: Rows,
        *,
        label_from: LabelFrom,
        split_from: SplitFrom,
        walk: SharedWalk | None = None,
    ) -> None:
        self._place, self._rows, self._walk = place, rows, walk
        self._label_from: LabelFrom = label_from
        self._split_from: SplitFrom = split_from
        self._num_files: dict[tuple[int, str], dict[str, int]] = {}  # (split, label) -> class folder -> files
        self._empty: list[tuple[str, _Meaning]] = []
        self.containers: list[str] = []
        """Files met that are named like tars or Parquet files; rejects, if this is a folder of images."""

    def run(self) -> tuple[str, ...]:
        tops = self._list("")
        self._check_tops(tops)
        pending = list(tops)
        while pending:
            if self._walk is not None and self._walk.is_due(len(pending)):
                pending = [inner for found in self._walk.list(pending) for inner in self._join_in(found)]
            else:
                pending.extend(self._list(pending.pop()))
        self._reject_empty()
        self._check_parents()
        return self._notices()

    def _list(self, folder: str) -> list[str]:
        """Take in the files directly in ``folder``; the folders in it."""
        meaning = self._meaning(folder)
        folders: list[str] = []
        num_entries = num_taken = 0
        for part in list_folder(self._place, folder):
            num_entries += len(part.names) + len(part.others)
            for found in part.others:
                if found.is_folder:
                    folders.append(_join(folder, found.name))
                else:
                    num_taken += self._take(_join(folder, found.name), found, meaning)
            num_taken += self._take_files(folder, part, meaning)
        self._count(meaning, num_taken)
        if folder and not num_entries:
            self._empty.append((folder, meaning))
        return folders

    def _join_in(self, found: Walked) -> Iterator[str]:
        """Take in what a worker has listed; the folders that are still to be listed."""
        meanings = [self._meaning(folder) for folder in found.folders]
        if any(meaning.label is None and count for meaning, count in zip(meanings, found.num_files, strict=True)):
            odd = [*found.folders, *found.odd]
            found, meanings = Walked([], [], [], FileColumns.empty(), odd, found.rest), []
        counts: list[tuple[str, int, int]] = []
        for folder, meaning, count, inner in zip(found.folders, meanings, found.num_files, found.inner, strict=True):
            counts.append((meaning.label or "", meaning.split, count))
            self._count(meaning, count)
            yield from (_join(folder, name) for name in inner)
        self._rows.add_columns(found.files, counts)
        yield from found.rest
        for folder in found.odd:
            yield from self._list(folder)

    def _count(self, meaning: _Meaning, num_taken: int) -> None:
        if num_taken and meaning.label is not None:
            folders = self._num_files.setdefault((meaning.split, meaning.label), {})
            folders[meaning.class_folder] = folders.get(meaning.class_folder, 0) + num_taken

    def _take_files(self, folder: str, part: Entries, meaning: _Meaning) -> int:
        """Take in the regular files of a folder, all at once where nothing is to be said of any of them."""
        if meaning.label is None or may_hold_containers(part.names):
            files = Entries(part.names, part.sizes, part.fingerprints, [])
            return sum(self._take(_join(folder, found.name), found, meaning) for found in files.each())
        return self._rows.add_files(folder, part, meaning.label, meaning.split)

    def _take(self, path: str, found: Found, meaning: _Meaning) -> bool:
        if container_kind(found.name):
            self.containers.append(path)
        if meaning.label is None:
            reason = found.problem or Reason.NO_LABEL
            self._rows.reject(path, reason, split=meaning.split, detail=found.detail or meaning.why_not)
            return False
        return self._rows.add(path, found, meaning.label, meaning.split) is None

    def _meaning(self, folder: str) -> _Meaning:
        parts = folder.split("/") if folder else []
        split, where = SPLIT_UNSET, "directly in the source"
        if self._split_from == "top" and parts:
            split, where = SPLIT_NAMES.get(parts[0].lower(), SPLIT_UNSET), f"directly in {printable(parts[0])}/"
            parts = parts[1:]
        if not parts:
            return _Meaning(None, split, "", f"lies {where}, not in a class folder")
        path = "/".join(parts)
        if self._label_from == "top":
            return _Meaning(parts[0], split, parts[0], "")
        return _Meaning(parts[-1] if self._label_from == "parent" else path, split, path, "")

    def _check_tops(self, tops: list[str]) -> None:
        known = {top: SPLITS[SPLIT_NAMES[top.lower()]] for top in tops if top.lower() in SPLIT_NAMES}
        if self._split_from is None and "train" in known.values() and len(set(known.values())) > 1:
            raise SourceError(self._split_advice(sorted(known), known))
        unknown = sorted(set(tops) - set(known))
        if self._split_from == "top" and unknown:
            raise SourceError(
                f"{self._place.shown}: with --split-from top every folder at the top is a split "
                f"({', '.join(SPLIT_NAMES)}), but it also holds {_listed(unknown)}; move these out or rename them"
            )

    def _split_advice(self, names: list[str], known: Mapping[str, str]) -> str:
        one = next(name for name in names if known[name] == "train")
        return (
            f"{self._place.shown} holds the folders {_listed(names)}, which look like splits. Choose one: "
            f"`--split-from top` keeps these splits; SOURCE {self._place.shown.rstrip('/')}/{one} builds one of them; "
            f"`--split-from none` takes them for ordinary folders"
        )

    def _reject_empty(self) -> None:
        for folder, meaning in self._empty:
            folders = self._num_files.get((meaning.split, meaning.label or ""), {})
            if meaning.class_folder not in folders:
                self._rows.reject(
                    folder, Reason.CLASS_EMPTY, label=meaning.label or "", split=meaning.split, detail="an empty folder"
                )

    def _check_parents(self) -> None:
        doubled = {label: folders for (_, label), folders in self._num_files.items() if len(folders) > 1}
        if doubled:
            lines = [f"{label!r}: {_listed(sorted(doubled[label]))}" for label in sorted(doubled)[:NUM_EXAMPLES]]
            more = f"; and {len(doubled) - len(lines)} more" if len(doubled) > len(lines) else ""
            raise SourceError(
                f"{self._place.shown}: {len(doubled)} class name(s) belong to folders under different parents: "
                f"{'; '.join(lines)}{more}. Take whole paths as classes with `--label-from path`, or rename the folders"
            )

    def _notices(self) -> tuple[str, ...]:
        folders_of: dict[str, set[str]] = {}
        for (_, label), folders in self._num_files.items():
            folders_of.setdefault(label, set()).update(folders)
        moved = sorted(label for label, folders in folders_of.items() if len(folders) > 1)
        if not moved:
            return ()
        examples = "; ".join(f"{label!r}: {_listed(sorted(folders_of[label]))}" for label in moved[:NUM_EXAMPLES])
        classes = "1 class lies" if len(moved) == 1 else f"{len(moved)} classes lie"
        return (f"{classes} under different parents in different splits, taken as one: {examples}",)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(printable(name)) for name in names[:NUM_EXAMPLES])
    return f"{shown} and {len(names) - NUM_EXAMPLES} more" if len(names) > NUM_EXAMPLES else shown
