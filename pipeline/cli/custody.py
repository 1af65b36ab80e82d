"""Commands that look after a ROOT over time: its history, what is kept, what goes. Thin, like those in ``commands``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from pipeline.cli import show
from pipeline.cli.asking import AT, JSON, QUIET, command
from pipeline.cli.progress import Reporter
from pipeline.store import redact

if TYPE_CHECKING:
    from pipeline.ingest.collect import Collection
    from pipeline.ingest.diff import Change, Diff
    from pipeline.store import Entry

_UNIT_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_SHOWN = 20


def duration(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """An option's ``7d``, ``12h``, ``30m``, ``90s`` in seconds."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value)
    if match is None and value != "0":
        raise click.BadParameter(f"{value!r} is not a duration such as 7d, 12h, 30m or 90s")
    return float(match[1]) * _UNIT_S[match[2]] if match else 0.0


@command(examples=("history ROOT --last 7",))
@click.argument("root")
@click.option("--last", type=click.IntRange(1), default=30, show_default=True, metavar="N", help="The newest so many.")
@QUIET
@JSON
def history(root: str, last: int, quiet: bool, as_json: bool) -> None:
    """The snapshots of ROOT: what each holds, what changed, who keeps it, which run made it.

    Exit code 1 if a record is damaged, or is not the child of the one before.
    """
    from pipeline.errors import IntegrityError
    from pipeline.ingest.history import history

    with Reporter(quiet=quiet) as progress:
        rows = history(root, last, progress=progress)
    if as_json:
        click.echo(json.dumps([row.to_json() for row in rows], indent=1, sort_keys=True))
    else:
        header = (
            "snapshot",
            "published (UTC)",
            "images",
            "classes",
            "rejects",
            "shards",
            "new",
            "state",
            "changes",
            "run",
        )
        cells = (
            (
                *(row.number, row.published, row.num_images, row.num_classes, row.num_rejects),
                *("-" if count is None else f"{count:,}" for count in (row.num_shards, row.num_new_shards)),
                _state(row.problem, row.collected, row.pins),
                ", ".join(row.changes),
                "" if row.run is None else f"{row.run.host}, {row.run.elapsed_s:,.0f} s, from {row.run.source}",
            )
            for row in rows
        )
        click.echo(show.table(header, cells))
        if rows[0].number > 1:
            click.echo(f"\n{rows[0].number - 1:,} older: --last {rows[-1].number}")
    if wrong := [row for row in rows if row.problem]:
        told = "; ".join(f"snapshot {row.number}: {row.problem}" for row in wrong)
        raise IntegrityError(f"the history of {root} is not sound: {told}")


def _state(problem: str, collected: bool, pins: Iterable[str]) -> str:
    words = [*(["DAMAGED"] if problem else []), *(["collected"] if collected else [])]
    return ", ".join([*words, *(f"pinned as {pin}" for pin in pins)]) or "whole"


@command(examples=("diff ROOT", "diff ROOT 1 2 --json"))
@click.argument("root")
@click.argument("before", metavar="[A]", required=False, type=click.IntRange(1))
@click.argument("after", metavar="[B]", required=False, type=click.IntRange(1))
@click.option("--named", type=click.IntRange(0), metavar="N", help="Images named per kind of change (default: 20).")
@QUIET
@click.option(
    "--json", "as_json", is_flag=True, help="Machine-readable output; names all images, unless --named bounds them."
)
def diff(root: str, before: int | None, after: int | None, named: int | None, quiet: bool, as_json: bool) -> None:
    """What changed from snapshot A of ROOT to B: images, labels, classes and their counts, rejects.

    By default the newest is compared with the one before it, or A with the newest. Exit code 1 if an image moved
    between splits, or a class id changed its meaning: neither may happen.
    """
    from pipeline.errors import IntegrityError
    from pipeline.ingest.diff import diff

    num_named = named if as_json or named is not None else 20
    with Reporter(quiet=quiet) as progress:
        found = diff(root, before, after, num_named=num_named, progress=progress)
    click.echo(json.dumps(found.to_json(), indent=1, sort_keys=True) if as_json else _diff(found))
    if not found.is_lawful:
        moved, renamed = (
            show.counted(found.counts["moved"], "image"),
            show.counted(len(found.classes_renamed), "class id"),
        )
        raise IntegrityError(
            f"from snapshot {found.before} to {found.after} of {root}, {moved} moved between splits and {renamed} "
            "changed the meaning: what was evaluated before cannot be compared with what is now"
        )


def _diff(found: Diff) -> str:
    one, two = found.num_images
    lines = [
        f"snapshot {found.before} to {found.after}: {one:,} to {two:,} images in all splits; "
        + ", ".join(f"{kind} {count:,}" for kind, count in found.counts.items()),
        f"{show.counted(found.num_shared_shards, 'shard is', 'shards are')} shared, {found.num_opened_shards:,} "
        f"{'was' if found.num_opened_shards == 1 else 'were'} compared",
    ]
    for what, names in (("added", found.classes_added), ("vanished", found.classes_vanished)):
        if names:
            lines.append(f"classes {what}: {', '.join(map(show.name, names[:_SHOWN]))}{_and_more(len(names))}")
    for number, before, after in found.classes_renamed[:_SHOWN]:
        lines.append(f"class {number} was {show.name(before)}, and is {show.name(after)}")
    if found.drift:
        rows = ((one.name, one.before, one.after, f"{one.after - one.before:+,}") for one in found.drift[:_SHOWN])
        lines += ["", show.table(("class", "before", "after", "change"), rows)]
        lines += (
            [f"{show.counted(more, 'more class', 'more classes')} changed (--json lists all)"]
            if (more := len(found.drift) - _SHOWN) > 0
            else []
        )
    if found.rejects:
        rows = ((reason, before, after) for reason, (before, after) in found.rejects.items())
        lines += ["", show.table(("rejects", "before", "after"), rows)]
    for kind, changes in found.images.items():
        if changes:
            lines += ["", *(f"{kind} {_change(kind, change)}" for change in changes)]
            more = found.counts[kind] - len(changes)
            lines += [f"{kind} {more:,} more (--json lists all)"] if more else []
    return "\n".join(lines)


def _and_more(count: int) -> str:
    return f" and {count - _SHOWN:,} more" if count > _SHOWN else ""


def _change(kind: str, change: Change) -> str:
    path = show.name(change.path or change.path_before or "")
    details = {
        "added": f"{change.class_name}, {change.split}",
        "removed": f"{change.class_before}, {change.split_before}",
        "changed": f"{change.class_name}, {change.split}",
        "renamed": f"was {change.path_before}",
        "relabelled": f"{change.class_before} to {change.class_name}",
        "moved": f"{change.split_before} to {change.split}",
    }
    return f"{path} ({show.name(details[kind])})"


@command(examples=("pin ROOT paper --at 2", "pin ROOT paper --remove"))
@click.argument("root")
@click.argument("name", required=False)
@AT
@click.option("--remove", is_flag=True, help="Remove the pin instead.")
@JSON
def pin(root: str, name: str | None, at: int | None, remove: bool, as_json: bool) -> None:
    """Keep a snapshot of ROOT from collection under NAME; without NAME, list the pins."""
    from dataclasses import asdict

    from pipeline.errors import UsageError
    from pipeline.ingest.pins import pin, read_pins, unpin
    from pipeline.store import Store

    if name is None:
        if remove or at is not None:
            raise UsageError("which pin? name it: evenshard pin ROOT NAME")
        pins = tuple(read_pins(Store.open(root)).values())
        text = show.table(("pin", "snapshot"), ((one.name, one.snapshot) for one in pins)) if pins else "no pins"
    elif remove:
        if at is not None:
            raise UsageError("--remove takes the name alone, no --at")
        pins = (unpin(root, name),)
        text = f"removed pin {name}: snapshot {pins[0].snapshot} goes when no longer among those that gc keeps"
    else:
        pins = (pin(root, name, at),)
        text = f"snapshot {pins[0].snapshot} of {show.safe(redact(root))} is kept as {name}"
    click.echo(json.dumps([asdict(one) for one in pins], indent=1, sort_keys=True) if as_json else text)


@command(examples=("gc ROOT --keep 7", "gc ROOT --keep 7 --delete"))
@click.argument("root")
@click.option("--keep", type=click.IntRange(1), required=True, metavar="N", help="Keep the newest so many snapshots.")
@click.option("--delete", is_flag=True, help="Remove the files; without it, they are only listed.")
@click.option(
    "--grace",
    callback=duration,
    metavar="TIME",
    help="Leave younger files alone (default: 7d). Builds count on it: shorter only while none runs.",
)
@QUIET
@JSON
def gc(root: str, keep: int, delete: bool, grace: float | None, quiet: bool, as_json: bool) -> None:  # fmt: skip
    """Collect: remove files of ROOT that no kept snapshot names. A dry run, unless --delete is given.

    Kept are the newest N snapshots, pinned ones, and those that were the newest within the grace period. Unknown files
    are listed and left alone. It may be stopped at any moment, and run beside builds and readers.
    """
    from pipeline.ingest.collect import collect
    from pipeline.ingest.commit import GRACE_S

    with Reporter(quiet=quiet) as progress:
        done = collect(root, keep, grace_s=GRACE_S if grace is None else grace, delete=delete, progress=progress)
    again = f"evenshard gc {show.safe(redact(root))} --keep {keep}" + (
        f" --grace {grace:g}s" if grace is not None else ""
    )
    click.echo(json.dumps(done.to_json(), indent=1, sort_keys=True) if as_json else _collection(done, again))


def _collection(done: Collection, again: str) -> str:
    size = show.num_bytes(done.removed_bytes)
    count = show.counted(len(done.removed), "file")
    lines = [show.table(("kept", "why"), done.kept.items())]
    if done.collected:
        verb = "collected" if done.deleted else "would collect"
        plural = "s" if len(done.collected) > 1 else ""
        lines.append(f"{verb}: snapshot{plural} {', '.join(map(str, done.collected))}")
    if not done.deleted:
        lines += [f"would remove {show.name(entry.path)}" for entry in done.removed[:_SHOWN]]
        if (more := len(done.removed) - _SHOWN) > 0:
            lines.append(f"would remove {more:,} more (--json lists all)")
    if done.young:
        lines.append(f"left: {_counted(done.young)} that nothing names, younger than the grace period")
    if done.spared:
        lines.append(f"left: {show.counted(len(done.spared), 'file')} that a build or a pin took meanwhile")
    if done.unknown:
        shown = ", ".join(show.name(entry.path) for entry in done.unknown[:_SHOWN])
        lines.append(f"unknown, left alone: {_counted(done.unknown)}: {shown}")
    if done.deleted:
        lines.append(f"freed {size}: removed {count}")
    elif done.removed:
        lines.append(f"a dry run: to free {size} in {count}: {again} --delete")
    else:
        lines.append("nothing to remove")
    return "\n".join(lines)


def _counted(entries: Iterable[Entry]) -> str:
    sizes = [entry.size for entry in entries]
    return f"{show.counted(len(sizes), 'file')} ({show.num_bytes(sum(sizes))})"
