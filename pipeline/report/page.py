"""A snapshot -> what the page shows -> HTML."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from pipeline.errors import IntegrityError, NotFoundError, UsageError
from pipeline.images import ImageRejected
from pipeline.ingest.stats import describe
from pipeline.report.chart import class_curve
from pipeline.report.pictures import thumbnail
from pipeline.schema import SPLITS, Reason, report_path
from pipeline.snapshot import Manifest, Snapshot, open_snapshot
from pipeline.store import Store

NUM_RAREST = 24
NUM_EXAMPLES = 5
FIXED_COLUMNS = ("class", "images", *SPLITS, "bytes")
MAX_LISTED = 20_000
"""Classes in the page's own table: some 2 MB. Beyond, the rarest are left to `evenshard stats`."""

IntArray = NDArray[np.int64]

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # part of the spelling in many scripts, and of emoji

_MEANING = {
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


def write_report(root: str | os.PathLike[str] | Store, at: int | None = None, out: str | None = None) -> str:
    """Write the page of snapshot ``at`` (the newest by default) below ``root``, or to the file ``out``; says where."""
    snapshot = open_snapshot(root, at)
    page = render(snapshot).encode()
    if out is not None:
        _write_file(out, page)
        return out
    path = report_path(snapshot.number)
    snapshot.store.replace(path, page)
    return snapshot.store.local_path(path) or f"{snapshot.store.url}/{path}"


def _write_file(out: str, page: bytes) -> None:
    try:
        with open(out, "wb") as file:
            file.write(page)
    except OSError as error:
        raise UsageError(f"the page cannot be written to {out!r}: {error.strerror}; name another file") from error


def render(snapshot: Snapshot) -> str:
    """The whole page."""
    table = _ClassTable.of(snapshot)
    manifests = [_manifest_row(snapshot.manifest(name)) for name in snapshot.manifests]
    rank = np.argsort(-table.columns["train"], kind="stable")
    targets = {row["name"]: snapshot.manifest(row["name"]).targets for row in manifests}
    style, script = _asset("page.css"), _asset("page.js")
    return _template().render(
        snapshot=snapshot,
        told=describe(table.columns["count"]),
        trained=describe(table.columns["train"]),
        headline=_headline(table.columns["count"]),
        splits=_split_rows(table),
        manifests=manifests,
        chart=class_curve(table.columns["train"][rank], {name: values[rank] for name, values in targets.items()}),
        fixed_columns=FIXED_COLUMNS,
        data=_script_data(table.listed(targets, rank)),
        num_unlisted=max(0, len(table.names) - MAX_LISTED),
        rarest=_rarest(snapshot, table),
        rejects=_reject_groups(snapshot.rejects),
        style=style,
        script=script,
        policy=_content_policy(style, script),
    )


def visible(text: str) -> str:
    """``text`` with every control, bidirectional or unassigned character spelled out, so that it reads as it is."""
    return "".join(c if unicodedata.category(c) not in _HIDDEN or c in _JOINERS else ascii(c)[1:-1] for c in str(text))


def num_bytes(count: int) -> str:
    """``count`` bytes in the unit a person would choose."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:,.0f} bytes" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"


# -- classes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _ClassTable:
    names: list[str]
    columns: Mapping[str, IntArray]

    @classmethod
    def of(cls, snapshot: Snapshot) -> _ClassTable:
        classes = snapshot.classes
        numbers = [name for name in classes.column_names if name not in ("class_id", "name", "evaluable")]
        return cls(classes["name"].to_pylist(), {name: classes[name].to_numpy() for name in numbers})

    def listed(self, targets: Mapping[str, IntArray], rank: IntArray) -> dict[str, Any]:
        """What the script reads: FIXED_COLUMNS and one for each manifest, classes by images; ``chart``: rank -> row."""
        count = self.columns["count"]
        order = np.lexsort((np.arange(len(count)), -count))[:MAX_LISTED]
        values = [count, *(self.columns[split] for split in SPLITS), self.columns["bytes"], *targets.values()]
        row_of = np.full(len(count), -1, np.int64)
        row_of[order] = np.arange(len(order))
        return {
            "columns": [[visible(self.names[i]) for i in order], *(column[order].tolist() for column in values)],
            "chart": row_of[rank].tolist() if len(order) == len(count) else [],
        }


def _headline(counts: IntArray) -> str:
    """The imbalance in one sentence."""
    sizes = np.sort(counts[counts > 0])[::-1]
    if not len(sizes):
        return "There is no image in it."
    needed = int(np.searchsorted(np.cumsum(sizes), sizes.sum() / 2)) + 1
    median = int(sizes[len(sizes) // 2])  # half of the classes, rounded down, have no more
    head = "The largest class holds" if needed == 1 else f"The {needed:,} largest of {len(sizes):,} classes hold"
    tail = "a single image" if median == 1 else f"{median:,} or fewer"
    return f"{head} half of the images; half of the classes have {tail}."


def _split_rows(table: _ClassTable) -> list[dict[str, Any]]:
    return [
        {
            "name": split,
            "images": int(table.columns[split].sum()),
            "classes": int(np.count_nonzero(table.columns[split])),
            "bytes": int(table.columns[f"{split}_bytes"].sum()),
        }
        for split in SPLITS
    ]


def _manifest_row(manifest: Manifest) -> dict[str, Any]:
    drawn = manifest.targets > 0
    return {
        "name": manifest.name,
        "split": manifest.split,
        "policy": str(manifest.document.policy),
        "draws": manifest.num_draws,
        "distinct": int(np.minimum(manifest.targets, manifest.pool).sum()),
        "classes": int(drawn.sum()),
        "smallest": int(manifest.targets[drawn].min()),
        "largest": int(manifest.targets.max()),
        "repeat": float((manifest.targets[drawn] / manifest.pool[drawn]).max()),
    }


def _rarest(snapshot: Snapshot, table: _ClassTable) -> list[dict[str, Any]]:
    """One image each of the classes that have fewest."""
    count = table.columns["count"]
    present = np.flatnonzero(count)
    rarest = present[np.lexsort((present, count[present]))][:NUM_RAREST]
    starts = {split: snapshot.class_starts(split) for split in snapshot.record.samples}
    return [{"name": table.names[i], "count": int(count[i]), **_picture(snapshot, starts, i)} for i in rarest.tolist()]


def _picture(snapshot: Snapshot, starts: Mapping[str, IntArray], class_id: int) -> dict[str, str]:
    split = next(name for name in SPLITS if name in starts and starts[name][class_id] < starts[name][class_id + 1])
    try:
        return {"uri": thumbnail(snapshot.read_image(split, int(starts[split][class_id]))), "problem": ""}
    except (IntegrityError, NotFoundError, ImageRejected) as error:  # the page is still wanted, and says so
        return {"uri": "", "problem": str(error)}


def _reject_groups(rejects: pa.Table) -> list[dict[str, Any]]:
    reasons: list[str] = rejects["reason"].to_pylist()
    groups: list[dict[str, Any]] = []
    for reason, count in sorted(Counter(reasons).items(), key=lambda item: (-item[1], item[0])):
        rows = [i for i, name in enumerate(reasons) if name == reason][:NUM_EXAMPLES]
        meaning = _MEANING.get(Reason(reason), "") if reason in set(Reason) else ""
        examples = rejects.take(pa.array(rows, pa.int64())).to_pylist()
        groups.append({"reason": reason, "count": count, "meaning": meaning, "examples": examples})
    return groups


# -- the page -------------------------------------------------------------------------------------------------------


def _script_data(value: object) -> str:
    """JSON that cannot end its element or start another: a script element of a data type is read up to ``</script``."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _content_policy(style: str, script: str) -> str:
    """Nothing may load or run but the one style and the one script, by hash, and pictures in the page itself."""
    style_hash, script_hash = (base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in (style, script))
    rules: Sequence[str] = (
        "default-src 'none'",
        f"style-src 'sha256-{style_hash}'",
        f"script-src 'sha256-{script_hash}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(rules)


def _asset(name: str) -> str:
    return files("pipeline.report").joinpath(name).read_text("utf-8")


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": visible, "bytes": num_bytes, "num": lambda value: f"{value:,}"}
    return environment.from_string(_asset("page.html"))
