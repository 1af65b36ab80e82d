"""Commands that decide how often each class is drawn: plan, manifest, manifests, classes, schedule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import listing, show
from pipeline.cli.asking import AT, JSON, command, manifest_names, one_of, policy_names

if TYPE_CHECKING:
    from pipeline.plan.outcome import Outcome
    from pipeline.plan.policy import Policy
    from pipeline.snapshot import Manifest, Snapshot

_EPOCH_SIZE = click.option(
    "--epoch-size", type=click.IntRange(1), metavar="N", help="Scale the policy to this many draws an epoch."
)
_SINGLE = ("natural", "oversampled", "undersampled", "balanced", "square_root")


def _policy(text: str, epoch_size: int | None) -> Policy:
    from pipeline.plan.policy import parse

    policy = parse(text)
    return policy if epoch_size is None else policy.having(epoch_size=epoch_size)


@command(
    examples=(
        "plan ROOT",
        "plan ROOT --policy natural --policy power:alpha=0.5,max_repeat=10",
        "plan ROOT --policy ten_to_one --epoch-size 100000 --batch 512 --json",
    )
)
@click.argument("root")
@click.option(
    "--policy", "texts", multiple=True, metavar="P", shell_complete=policy_names,
    help="A policy, a composition or a manifest of ROOT; several times. Default: the usual ones.",
)  # fmt: skip
@_EPOCH_SIZE
@click.option(
    "--batch", type=click.IntRange(1), default=256, show_default=True, metavar="N", help="Draws of a global batch."
)
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="train", show_default=True)
@AT
@JSON
def plan(
    root: str, texts: Sequence[str], epoch_size: int | None, batch: int, split: str, at: int | None, as_json: bool
) -> None:
    """Show what policies would do, side by side, without writing anything.

    Per group of classes (many, medium, few, one image) and overall: draws of an epoch, distinct images, the largest
    repeat of an image, the share of all draws, bytes read; and how many classes a batch meets.
    """
    from pipeline.plan.outcome import outcome, remarks
    from pipeline.plan.policy import apply, to_json
    from pipeline.snapshot import open_snapshot

    snapshot = open_snapshot(root, at=at)
    classes = snapshot.classes
    counts, sizes = classes[split].to_numpy(), classes[f"{split}_bytes"].to_numpy()
    names: list[str] = classes["name"].to_pylist()
    rows: list[tuple[str, Policy, Outcome]] = []
    for text in texts or _SINGLE:
        policy = _named(snapshot, text, epoch_size)
        rows.append((text, policy, outcome(apply(counts, policy, names), sizes, batch)))
    if as_json:
        plans = [
            {"name": text, "policy": to_json(policy), "remarks": remarks(found), **found.to_json()}
            for text, policy, found in rows
        ]
        body = {"snapshot": snapshot.number, "split": split, "plans": plans}
        click.echo(json.dumps(body, indent=1, sort_keys=True, default=float))
        return
    click.echo(_side_by_side(rows))
    for text, _, found in rows:
        for remark in remarks(found):
            click.echo(f"\n{show.painted(show.name(text), 'bold')}: {remark}")
    present = classes["count"].to_numpy() > 0  # a class that vanished keeps its id, and is none of them
    unmeasured = int((present & ~classes["evaluable"].to_numpy(zero_copy_only=False)).sum())
    held = f"; {unmeasured:,} of {show.counted(int(present.sum()), 'class', 'classes')} cannot be evaluated"
    click.echo(f"\nsnapshot {snapshot.number}, {split}; nothing was written{held if unmeasured else ''}")


def _named(snapshot: Snapshot, text: str, epoch_size: int | None) -> Policy:
    """A policy by its text, or that of a manifest of the snapshot."""
    if text in snapshot.manifests:
        policy = snapshot.manifest(text).document.policy
        return policy if epoch_size is None else policy.having(epoch_size=epoch_size)
    return _policy(text, epoch_size)


def _side_by_side(rows: Sequence[tuple[str, Policy, Outcome]]) -> str:
    from pipeline.plan.shots import RANGES

    header = ("policy", "classes of", "number", "draws", "share", "distinct", "largest repeat", "bytes")
    cells: list[tuple[object, ...]] = []
    for text, _, found in rows:
        for part in (found.overall, *found.parts):
            if not part.num_classes:
                continue
            what = f"{part.name} ({RANGES[part.name]})" if part.name in RANGES else part.name
            cells.append(
                (
                    text if part is found.overall else "",
                    what,
                    part.num_classes,
                    part.num_draws,
                    f"{part.share:.1%}",
                    part.num_distinct,
                    round(part.largest_repeat, 2),
                    show.num_bytes(part.num_bytes),
                )
            )
    summary = show.table(
        ("policy", "largest : smallest", "of images", f"classes in a batch of {rows[0][2].batch:,}", "all images in"),
        (
            (
                text,
                f"{found.imbalance:,.3g} : 1" if found.imbalance < 1000 else f"{found.imbalance:,.0f} : 1",
                f"{found.imbalance_before:,.0f} : 1",
                round(found.classes_per_batch, 1),
                f"{found.epochs_to_see_all:,} epochs" if found.epochs_to_see_all > 1 else "1 epoch",
            )
            for text, _, found in rows
        ),
    )
    return f"{show.table(header, cells)}\n\n{summary}"


@command(
    examples=(
        "manifest ROOT sqrt --policy power:alpha=0.5",
        "manifest ROOT mild --policy ten_to_one --epoch-size 100000",
    )
)
@click.argument("root")
@click.argument("name")
@click.option(
    "--policy", required=True, metavar="P", shell_complete=policy_names,
    help="For example balanced:per_class=50 or power:alpha=0.5.",
)  # fmt: skip
@_EPOCH_SIZE
@JSON
def manifest(root: str, name: str, policy: str, epoch_size: int | None, as_json: bool) -> None:
    """Add manifest NAME to an existing build, without touching an image."""
    from pipeline.ingest.manifests import add_manifest

    snapshot = add_manifest(root, name, _policy(policy, epoch_size))
    _print_manifests(snapshot, [name], as_json)


@command(examples=("manifests ROOT", "manifests ROOT --json"))
@click.argument("root")
@AT
@JSON
def manifests(root: str, at: int | None, as_json: bool) -> None:
    """The manifests of a snapshot: draws, distinct images and largest repeat per epoch."""
    from pipeline.snapshot import open_snapshot

    snapshot = open_snapshot(root, at=at)
    _print_manifests(snapshot, snapshot.manifests, as_json)


def _print_manifests(snapshot: Snapshot, names: Sequence[str], as_json: bool) -> None:
    from pipeline.plan.policy import to_json

    rows: list[dict[str, Any]] = []
    for name in names:
        opened = snapshot.manifest(name)
        drawn = opened.targets > 0
        repeats = opened.targets[drawn] / opened.pool[drawn]
        rows.append(
            {
                "name": name,
                "policy": to_json(opened.document.policy),
                "draws": opened.num_draws,
                "distinct": int(opened.targets.clip(max=opened.pool).sum()),
                "classes": int(drawn.sum()),
                "smallest_target": int(opened.targets[drawn].min()),
                "largest_target": int(opened.targets.max()),
                "largest_repeat": float(repeats.max()),
                "withheld": sum(opened.withheld.tolist()),
                "digest": opened.digest,
            }
        )
    if as_json:
        body = {"snapshot": snapshot.number, "manifests": rows}
        click.echo(json.dumps(body, indent=1, sort_keys=True))
        return
    header = ("name", "draws", "distinct", "classes", "smallest", "largest", "largest repeat", "withheld", "policy")
    keys = ("name", "draws", "distinct", "classes", "smallest_target", "largest_target", "largest_repeat", "withheld")
    policies = (str(snapshot.manifest(row["name"]).document.policy) for row in rows)
    click.echo(
        show.table(header, ((*(row[key] for key in keys), text) for row, text in zip(rows, policies, strict=True)))
    )
    click.echo(
        f"\nsnapshot {snapshot.number}, draws from train; in Python: pipeline.open_snapshot(ROOT).manifest(NAME)"
    )


@command(
    examples=(
        "classes ROOT balanced",
        "classes ROOT balanced --csv",
        "classes ROOT natural --class apple --json",
        "classes ROOT natural --merge-below 2 --into other",
    ),
)
@click.argument("root")
@click.argument("manifest_name", metavar="MANIFEST", shell_complete=manifest_names)
@click.option("--class", "chosen", multiple=True, metavar="NAME", help="This class only; several times.")
@AT
@click.option("--csv", "as_csv", is_flag=True, help="All columns as CSV; text that looks like a formula is guarded.")
@click.option(
    "--merge-below",
    type=click.IntRange(2),
    metavar="N",
    help="Print a label map (CSV) instead: classes of fewer than N images under another one, for build --label-map.",
)
@click.option(
    "--into", type=click.Choice(["parent", "other"]), help="Which one: the class above in the path, or `other`."
)
@JSON
def classes(
    root: str, manifest_name: str, chosen: Sequence[str], at: int | None, as_csv: bool, merge_below: int | None,
    into: str | None, as_json: bool,
) -> None:  # fmt: skip
    """What MANIFEST means for each class: images, draws, repeats, priors, weights, and whether it can be evaluated.

    log_prior is that of the source, log_q that of the draws. Weights have mean 1 over the draws; they need not sum to
    1, as a factor cancels in a cross-entropy with hard labels. A class without images has log_q -inf (JSON: null).
    """
    from pipeline.snapshot import open_snapshot

    one_of(csv=as_csv, json=as_json, merge_below=merge_below)
    one_of(class_=chosen, merge_below=merge_below)
    if (merge_below is None) != (into is None):
        raise click.UsageError("--merge-below N and --into parent|other go together: give both")
    manifest = open_snapshot(root, at=at).manifest(manifest_name)
    if merge_below is not None:
        _print_label_map(manifest, merge_below, into == "other")
        return
    table = manifest.per_class()
    rows: list[dict[str, Any]] = table.to_pylist()
    if chosen:
        rows = _choose(rows, chosen)
    if as_json:
        body = [{key: listing.plain(value) for key, value in row.items()} for row in rows]
        click.echo(json.dumps(body, indent=1))
        return
    if as_csv:
        click.echo(listing.csv_text(table.column_names, (tuple(row.values()) for row in rows)))
        return
    keys = ("class_id", "name", "group", "available", "target", "withheld", "repeat_factor", "log_prior", "log_q")
    shown = ((*(row[key] for key in keys), "yes" if row["evaluable"] else "no") for row in rows)
    click.echo(show.table((*keys, "evaluable"), shown))


def _print_label_map(manifest: Manifest, below: int, into_other: bool) -> None:
    """Only classes that move; a name that CSV cannot carry as it is stays, and is told."""
    from pipeline.errors import EvenshardError
    from pipeline.labels import unguarded
    from pipeline.plan.merging import merge_into, merge_singletons

    snapshot = manifest.snapshot
    if "label_map" in snapshot.record.config:
        raise EvenshardError(
            f"snapshot {snapshot.number} was built with a label map, so its classes are not the labels of the source: "
            "add lines to that file instead, or name a snapshot built without one (--at N)"
        )
    names: list[str] = snapshot.classes["name"].to_pylist()
    if into_other:
        moves = merge_into(names, manifest.available, "other", below)
    else:
        parents = merge_singletons(names, manifest.available, below).tolist()
        moves = {name: names[parent] for name, parent in zip(names, parents, strict=True) if name != names[parent]}
    carried = {
        label: name
        for label, name in moves.items()
        if all(unguarded(listing.guarded(text)) == text for text in (label, name))
    }
    click.echo(listing.csv_text(("label", "class"), carried.items()))
    kept = show.counted(len(moves) - len(carried), "class", "classes")
    told = f"{kept} with a name that CSV cannot carry left as it is; " if len(carried) < len(moves) else ""
    num = show.counted(len(carried), "class", "classes")
    click.echo(
        f"{told}{num} of fewer than {below:,} images in {manifest.split} under another one; "
        "evenshard build SOURCE ROOT --label-map FILE --allow class-map",
        err=True,
    )


def _choose(rows: list[dict[str, Any]], chosen: Sequence[str]) -> list[dict[str, Any]]:
    from pipeline.errors import NotFoundError
    from pipeline.plan.spelling import nearest

    found = {row["name"]: row for row in rows}
    if unknown := [name for name in chosen if name not in found]:
        raise NotFoundError(f"no class {unknown[0]!r} in this snapshot{nearest(unknown[0], found)}")
    return [found[name] for name in dict.fromkeys(chosen)]


@command(
    examples=(
        "schedule ROOT deferred --epochs 25",
        "schedule ROOT progressive --epochs 20 --stages 4 --dry-run",
    )
)
@click.argument("root")
@click.argument("kind", type=click.Choice(["deferred", "progressive"]))
@click.option("--epochs", type=click.IntRange(2), required=True, metavar="N", help="Epochs of the whole training.")
@click.option("--stages", type=click.IntRange(2), metavar="N", help="progressive: how many manifests (default: 5).")
@click.option("--dry-run", is_flag=True, help="Print only; add no manifest.")
@JSON
def schedule(root: str, kind: str, epochs: int, stages: int | None, dry_run: bool, as_json: bool) -> None:
    """A list of manifests with shares of the training; adds those that ROOT lacks.

    deferred: natural draws, the last fifth balanced. progressive: from natural to balanced in equal steps.
    """
    from pipeline.ingest.manifests import add_manifests
    from pipeline.plan import schedule as schedules
    from pipeline.plan.policy import to_json
    from pipeline.snapshot import open_snapshot

    if kind == "deferred" and stages is not None:
        raise click.UsageError("deferred has two stages: --stages is for progressive")
    found = schedules.deferred() if kind == "deferred" else schedules.progressive(stages or 5)
    counts = schedules.epochs_of(found, epochs)
    wanted = {stage.manifest: stage.policy for stage in found}
    snapshot = open_snapshot(root) if dry_run else add_manifests(root, wanted)
    if as_json:
        rows = [
            {"manifest": stage.manifest, "policy": to_json(stage.policy), "share": float(stage.share), "epochs": count}
            for stage, count in zip(found, counts, strict=True)
        ]
        click.echo(json.dumps({"snapshot": snapshot.number, "stages": rows}, indent=1, sort_keys=True))
        return
    cells = (
        (stage.manifest, count, f"{float(stage.share):.0%}", str(stage.policy))
        for stage, count in zip(found, counts, strict=True)
    )
    click.echo(show.table(("manifest", "epochs", "share", "policy"), cells))
    click.echo(f"\n{schedules.text_of(found, epochs)}")
