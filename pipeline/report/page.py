"""A snapshot -> what the page shows -> HTML."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from pipeline.errors import EvenshardError
from pipeline.ingest.history import run_of
from pipeline.ingest.stats import describe
from pipeline.report import words
from pipeline.report.advice import Facts, what_next
from pipeline.report.changes import NUM_DRIFTS, Since, since_the_one_before
from pipeline.report.chart import NARROW, WIDE, class_curve, lorenz
from pipeline.report.html import asset, content_policy, environment, write_file
from pipeline.report.numbers import (
    GROUPS,
    Classes,
    Draws,
    coverage,
    group_rows,
    headline,
    seven_digits,
    split_rows,
)
from pipeline.report.pictures import Originals, Pictures
from pipeline.report.refused import Copies, reason_counts, reason_groups, spread
from pipeline.report.survey import Place, Progress, Survey, survey
from pipeline.schema import SPLITS, Reason, report_path
from pipeline.snapshot import Snapshot, open_snapshot
from pipeline.store import Store

NUM_TILES = 24
NUM_REPEATED = 16
"""Tiles of each manifest that repeats ..."""
NUM_SHEETS = 4
"""... and of how many of them, those that repeat most."""

MAX_LISTED = 20_000
"""Classes in the page's own table. Beyond, the rarest are left to `evenshard stats`."""

MAX_DATA_BYTES = 8_000_000
"""What that table may weigh."""

IntArray = NDArray[np.int64]
Row = dict[str, Any]


def write_report(
    root: str | os.PathLike[str] | Store,
    at: int | None = None,
    out: str | None = None,
    *,
    originals: Originals | None = None,
    progress: Progress | None = None,
) -> str:
    """Write the page of snapshot ``at`` (the newest by default) below ``root``, or to the file ``out``; says where.

    ``originals`` reads entries of the source by path, to show rejected images; without it they are only named.
    """
    snapshot = open_snapshot(root, at)
    page = render(snapshot, originals, progress).encode()
    if out is not None:
        write_file(out, page)
        return out
    path = report_path(snapshot.number)
    snapshot.store.replace(path, page)
    return snapshot.store.local_path(path) or f"{snapshot.store.url}/{path}"


def render(snapshot: Snapshot, originals: Originals | None = None, progress: Progress | None = None) -> str:
    """The whole page."""
    classes = Classes.of(snapshot)
    draws = [Draws.of(snapshot.manifest(name)) for name in snapshot.manifests]
    copies = Copies(snapshot.rejects)
    seen = survey(snapshot, copies.wanted, progress=progress)
    since = since_the_one_before(snapshot, progress)
    with Pictures(snapshot, originals, progress) as pictures:
        sheets = _sheets(snapshot, classes, draws, pictures)
        pairs = _pairs(snapshot, classes, copies, seen, pictures)
    style, script = asset("page.css"), asset("page.js")
    return _template().render(
        snapshot=snapshot,
        told=describe(classes.count),
        trained=describe(classes.train),
        headline=headline(classes.train),
        covered=coverage(classes),
        splits=split_rows(classes),
        groups=(groups := group_rows(classes, draws)),
        stacks=_stacks(groups, [one.name for one in draws]),
        manifests=[one.row(classes) for one in draws],
        advice=what_next(_facts(snapshot, classes, draws, seen, since)),
        **_charts(classes, draws),
        data=_script_data(_listed(classes, draws)),
        num_unlisted=max(0, len(classes.names) - _num_listed(len(draws))),
        seen=seen,
        since=since,
        num_drifts=NUM_DRIFTS,
        rejects=reason_groups(snapshot.rejects),
        run=_run(snapshot),
        style=style,
        script=script,
        policy=content_policy(style, script),
        **sheets,
        **pairs,
    )


def _run(snapshot: Snapshot) -> Any:
    try:
        return run_of(snapshot.store, snapshot.number)
    except EvenshardError:  # notes; a storage that lists nothing has none to show
        return None


def _facts(snapshot: Snapshot, classes: Classes, draws: list[Draws], seen: Survey, since: Since) -> Facts:
    return Facts(
        trained=describe(classes.train),
        covered=coverage(classes),
        draws=draws,
        reasons=reason_counts(snapshot.rejects),
        num_images=snapshot.record.num_images,
        survey=seen,
        num_vanished=len(since.diff.classes_vanished) if since.diff else 0,
        num_moved=since.diff.counts["moved"] if since.diff else 0,
    )


# -- charts and the table of classes --------------------------------------------------------------------------------


def _rank(classes: Classes) -> IntArray:
    return np.argsort(-classes.train, kind="stable")


def _charts(classes: Classes, draws: list[Draws]) -> Row:
    rank = _rank(classes)
    targets = {one.name: one.targets for one in draws}
    ranked = {name: values[rank] for name, values in targets.items()}
    return {
        "curves": [class_curve(classes.train[rank], ranked, frame) for frame in (WIDE, NARROW)],
        "lorenz": lorenz(classes.train, targets),
    }


def _stacks(groups: list[Row], manifests: list[str]) -> list[Row]:
    """Bars of 100 %: classes, training images, and the draws of every manifest, by group."""
    rows = [("classes", [group["classes"] for group in groups]), ("training images", [g["images"] for g in groups])]
    rows += [(f"draws of {name}", [group["draws"][name] for group in groups]) for name in manifests]
    stacks: list[Row] = []
    for label, counts in rows:
        edges = np.concatenate([[0], np.cumsum(counts)]) * (100 / max(sum(counts), 1))
        parts = [
            {"group": group["name"], "x": round(float(x), 3), "width": round(float(w), 3), "count": count,
             "share": words.percent(count, sum(counts))}
            for group, count, x, w in zip(groups, counts, edges, np.diff(edges), strict=False)
        ]  # fmt: skip
        stacks.append({"label": label, "parts": parts})
    return stacks


def _num_listed(num_manifests: int) -> int:
    return min(MAX_LISTED, MAX_DATA_BYTES // (80 + 70 * max(num_manifests, 1)))


def _listed(classes: Classes, draws: list[Draws]) -> Row:
    """What the script reads, classes by images; ``chart``: rank -> row."""
    count = classes.count
    order = np.lexsort((np.arange(len(count)), -count))[: _num_listed(len(draws))]
    row_of = np.full(len(count), -1, np.int64)
    row_of[order] = np.arange(len(order))
    return {
        "names": [words.visible(classes.names[i]) for i in order],
        "ids": order.tolist(),
        "columns": {name: classes.columns[name][order].tolist() for name in ("count", *SPLITS, "bytes")},
        "evaluable": classes.evaluable[order].astype(int).tolist(),
        "groups": list(GROUPS),
        "group": classes.group[order].tolist(),
        "manifests": [
            {
                "name": one.name,
                "draws": one.targets[order].tolist(),
                "measures": {title: seven_digits(values[order]) for title, values in one.measures().items()},
            }
            for one in draws
        ],
        "chart": row_of[_rank(classes)].tolist() if len(order) == len(count) else [],
    }


# -- pictures -------------------------------------------------------------------------------------------------------


def _sheets(snapshot: Snapshot, classes: Classes, draws: list[Draws], pictures: Pictures) -> Row:
    """Contact sheets of the rarest classes and of what each manifest repeats most."""
    starts = {split: snapshot.class_starts(split) for split in snapshot.record.samples}

    def tile(class_id: int, split: str = "") -> Row:
        here = [name for name in SPLITS if name in starts and starts[name][class_id] < starts[name][class_id + 1]]
        chosen = split or here[0]
        repeats = [(one.name, words.times(float(one.repeat[class_id]))) for one in draws]
        return {
            "name": classes.names[class_id],
            "count": int(classes.count[class_id]),
            "train": int(classes.train[class_id]),
            "repeats": repeats,
            "picture": pictures.sample(chosen, int(starts[chosen][class_id])),
        }

    repeating = [one for one in draws if (one.repeat > 1).any()]
    repeating.sort(key=lambda one: -float(one.repeat.max()))
    repeated = [
        {"name": one.name, "tiles": [tile(c, one.manifest.split) for c in _extremes(-one.repeat, one.repeat > 1)]}
        for one in repeating[:NUM_SHEETS]
    ]
    rarest = _extremes(classes.count, classes.count > 0, NUM_TILES, phase=0.25)
    return {"rarest": [tile(class_id) for class_id in rarest], "repeated": repeated}


def _extremes(
    values: NDArray[Any], among: NDArray[np.bool_], num: int = NUM_REPEATED, phase: float = 0.75
) -> list[int]:
    """Classes of the smallest values; of those that tie with the last one, a spread."""
    present = np.flatnonzero(among)
    if len(present) <= num:
        return present[np.lexsort((present, values[present]))].tolist()
    last = np.partition(values[present], num - 1)[num - 1]
    sure = present[values[present] < last]
    tied = present[values[present] == last]
    chosen = tied[spread(len(tied), num - len(sure), phase)]
    return [*sure[np.lexsort((sure, values[sure]))].tolist(), *chosen.tolist()]


def _pairs(snapshot: Snapshot, classes: Classes, copies: Copies, seen: Survey, pictures: Pictures) -> Row:
    """Duplicates, label conflicts and related images, side by side."""
    related = [
        {
            "tiles": [{"picture": pictures.at(place), **_told(snapshot, classes, place)} for place in group.members],
            "more": group.num_members - len(group.members),
            "num_classes": group.num_classes,
        }
        for group in seen.relatives
    ]
    kept = {place: _told(snapshot, classes, place) for place in seen.found.values()}
    return {
        "duplicates": copies.duplicates(seen.found, kept, pictures),
        "conflicts": copies.conflicts(pictures),
        "related": related,
        "num_duplicated": copies.num_sets(Reason.DUPLICATE_OF),
        "num_conflicts": copies.num_sets(Reason.LABEL_CONFLICT),
    }


def _told(snapshot: Snapshot, classes: Classes, place: Place) -> Row:
    """Path, label and split of an image of a shard."""
    row = snapshot.index(place.shard).slice(place.row, 1).to_pylist()[0]
    return {"path": row["path"], "label": classes.names[row["class_id"]], "split": row["split"]}


# -- the page -------------------------------------------------------------------------------------------------------


def _script_data(value: object) -> str:
    """JSON that cannot end its element or start another: a script element of a data type is read up to ``</script``."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _template() -> Any:
    made = environment()
    filters: dict[str, Any] = {"bars": _bars, "breakable": _breakable}
    made.filters.update(filters)
    return made.from_string(asset("page.html"))


def _breakable(text: str) -> Markup:
    """Parameters of a policy break after their commas, and can still be copied."""
    return Markup(str(escape(words.visible(text))).replace(",", ",<wbr>"))


def _bars(rows: Iterable[tuple[str, int]]) -> list[Row]:
    """Label, count, width in percent of the largest."""
    listed = list(rows)
    top = max((count for _, count in listed), default=1)
    whole = sum(count for _, count in listed)
    return [
        {
            "label": label,
            "count": count,
            "width": round(100 * count / max(top, 1), 2),
            "share": words.percent(count, whole),
        }
        for label, count in listed
    ]
