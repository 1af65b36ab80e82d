"""What is in no shard: rejects by reason with samples, copies beside what they are copies of, bytes under two labels.

Comes in: the rejects table, the survey, pictures. Goes out: rows for the template. Guarantees: every reject is counted;
what is shown of a reason is a spread over all of its rows, and says how many more there are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.report.pictures import Picture, Pictures
from pipeline.report.survey import Place
from pipeline.schema import Reason

NUM_EXAMPLES = 5
NUM_PAIRS = 12

Row = dict[str, Any]

MEANING = {
    Reason.EMPTY: "the file has no bytes",
    Reason.TRUNCATED: "the file ends before the image does",
    Reason.NOT_AN_IMAGE: "the bytes are those of something else",
    Reason.FORMAT_NOT_ALLOWED: "an image in a format that is not read",
    Reason.CORRUPT: "recognised, but it cannot be decoded",
    Reason.TOO_LARGE: "beyond the limit of pixels or bytes",
    Reason.UNREADABLE: "storage refused to give it, also when asked again",
    Reason.GONE: "named in the source, and not there",
    Reason.CHANGED: "its size changed while the build ran",
    Reason.NO_LABEL: "nothing says which class it is",
    Reason.NO_PATH: "a row without a path",
    Reason.DUPLICATE_ROW: "a row that repeats another one",
    Reason.NAME_ENCODING: "its name is not valid UTF-8",
    Reason.OUTSIDE_ROOT: "a path that leaves the source",
    Reason.SYMLINK: "a link to a directory; they are not followed",
    Reason.CLASS_EMPTY: "a class directory without files",
    Reason.DUPLICATE_OF: "the same bytes as an image that is in",
    Reason.LABEL_CONFLICT: "the same bytes under two labels: all copies are out",
    Reason.LEAK: "belongs with images of an earlier split",
    Reason.NO_IMAGE: "a sample without the bytes of an image",
    Reason.AMBIGUOUS: "a sample with several images, none of them chosen",
    Reason.DAMAGED: "the file that holds it cannot be read there",
    Reason.DECODER_CRASH: "the decoder dies of it",
}

_COPIES = (Reason.DUPLICATE_OF, Reason.LABEL_CONFLICT)


def reason_counts(rejects: pa.Table) -> dict[str, int]:
    """Rejects by reason, most frequent first."""
    counts = Counter(dict(zip(*_value_counts(rejects["reason"]), strict=True)))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _value_counts(column: pa.ChunkedArray) -> tuple[list[str], list[int]]:
    counts = column.combine_chunks().value_counts()
    return counts.field("values").to_pylist(), counts.field("counts").to_pylist()


def reason_groups(rejects: pa.Table) -> list[Row]:
    """By reason: how many, what it means, a spread of rows."""
    groups: list[Row] = []
    for reason, count in reason_counts(rejects).items():
        rows = _of(rejects, reason)
        chosen = spread(count, NUM_EXAMPLES)
        meaning = MEANING.get(Reason(reason), "") if reason in set(Reason) else ""
        examples = rows.take(pa.array(chosen, pa.int64())).to_pylist()
        groups.append({"reason": reason, "count": count, "meaning": meaning, "examples": examples})
    return groups


def spread(count: int, wanted: int, phase: float = 0.5) -> list[int]:
    """``wanted`` of ``range(count)`` at equal distances; all of them where there are no more."""
    if count <= wanted:
        return list(range(count))
    return [int((place + phase) * count / wanted) for place in range(wanted)]


def _of(rejects: pa.Table, reason: str) -> pa.Table:
    return rejects.filter(pc.field("reason") == reason)


class Copies:
    """Exact duplicates and label conflicts: some sets of equal bytes, each with everyone that carries them."""

    def __init__(self, rejects: pa.Table) -> None:
        self._sets = {reason: _sets(_of(rejects, reason)) for reason in _COPIES}

    @property
    def wanted(self) -> list[bytes]:
        """Digests of the duplicates that will be shown: what is in a shard can be found there."""
        return [bytes.fromhex(sha256) for sha256 in self._chosen(Reason.DUPLICATE_OF)]

    def duplicates(self, found: Mapping[bytes, Place], kept: Mapping[Place, Row], pictures: Pictures) -> list[Row]:
        """The image that is in, and who is out because of it; ``kept`` tells path and class of an image that is in."""
        cards: list[Row] = []
        for sha256, rows in self._chosen(Reason.DUPLICATE_OF).items():
            place = found.get(bytes.fromhex(sha256))
            inside = kept.get(place) if place else None
            picture = pictures.at(place) if place else Picture("", "its index was not read for this page")
            lines = [{"label": inside["label"], "path": inside["path"], "state": "in"}] if inside else []
            cards.append({"picture": picture, "lines": lines + _lines(rows), "more": _more(rows)})
        return cards

    def conflicts(self, pictures: Pictures) -> list[Row]:
        """Everyone who claims the same bytes under another label; shown from the source, for no shard has them."""
        cards: list[Row] = []
        for sha256, rows in self._chosen(Reason.LABEL_CONFLICT).items():
            if pictures.has_originals:
                picture = pictures.original(rows[0]["path"], sha256)
            else:
                picture = Picture("", "not in any shard; `evenshard report ROOT --source SOURCE` shows it")
            cards.append({"picture": picture, "lines": _lines(rows), "more": _more(rows)})
        return cards

    def num_sets(self, reason: Reason) -> int:
        """Distinct images that are concerned."""
        return len(self._sets[reason])

    def _chosen(self, reason: Reason) -> dict[str, Sequence[Row]]:
        sets = self._sets[reason]
        names = list(sets)
        return {names[place]: sets[names[place]] for place in spread(len(names), NUM_PAIRS)}


def _sets(rows: pa.Table) -> dict[str, list[Row]]:
    sets: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows.select(["path", "label", "sha256"]).to_pylist():
        if row["sha256"]:
            sets[row["sha256"]].append(row)
    return dict(sorted(sets.items()))


def _lines(rows: Sequence[Row]) -> list[Row]:
    return [{"label": row["label"], "path": row["path"], "state": "out"} for row in rows[:4]]


def _more(rows: Sequence[Row]) -> int:
    return max(0, len(rows) - 4)
