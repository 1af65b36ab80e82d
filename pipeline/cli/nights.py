"""The command of every night, and how it goes. Thin, like their neighbours in ``commands``."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import show
from pipeline.cli.asking import JSON, command
from pipeline.cli.commands import build_options
from pipeline.cli.custody import duration
from pipeline.cli.logs import say
from pipeline.cli.progress import Reporter, verb

if TYPE_CHECKING:
    from pipeline.ingest.vitals import Sign


def nightly_options(function: Any) -> Any:
    """What a night takes beside the options of a build."""
    options = (
        click.option(
            "--keep", type=click.IntRange(min=1), default=7, show_default=True, metavar="N",
            help="Collect all but the newest so many snapshots, and pinned ones.",
        ),
        click.option(
            "--sample", type=click.FloatRange(0, 1), default=0.05, show_default=True, metavar="F",
            help="Share of the image bytes to verify; each day the next share.",
        ),
        click.option(
            "--grace", callback=duration, metavar="TIME",
            help="Collect no younger files (default: 7d). Builds count on it: shorter only while none runs.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@command(examples=("nightly PHOTOS ROOT --keep 7 --sample 0.05",))
@build_options
@nightly_options
def nightly(
    keep: int, sample: float, grace: float | None, quiet: bool, as_json: bool, config_file: str | None, **flags: Any
) -> None:
    """Build, verify, write the page, compare, collect: what a scheduler runs every night.

    The last line on standard output is one line of JSON that says how it went. The exit code is 1 if anything was lost,
    refused or left undone. One nightly run of a ROOT at a time: a second one is refused. More than 1 % rejects refuse
    to publish, unless --max-rejects or the build file say otherwise.
    """
    del as_json  # it always does
    from pipeline.config import load_config
    from pipeline.ingest.commit import GRACE_S
    from pipeline.nightly import nightly_config, run_nightly

    given = {name: value for name, value in flags.items() if value not in (None, (), {})}
    config = nightly_config(load_config(config_file) if config_file else {}, **given)
    with Reporter(quiet=quiet) as progress:
        night = run_nightly(
            config, keep=keep, sample=sample, grace_s=GRACE_S if grace is None else grace, progress=progress
        )
    for notice in night.notices:
        say(f"notice: {notice}", event="notice")
    for error in night.errors:
        say(f"{error['step']}: {error['message']}", event="error", level="error", step=error["step"])
    click.echo(night.line())
    if night.exit_code:
        raise click.exceptions.Exit(night.exit_code)


@command(examples=("status ROOT", "status ROOT --json"))
@click.argument("root")
@JSON
def status(root: str, as_json: bool) -> None:
    """What a build of ROOT is doing now: stage, images done, speed, time left, rejects, and when it was last heard of.

    A build that was not heard of for a minute has died. Where none is running, how the last one ended.
    """
    from dataclasses import asdict

    from pipeline.ingest.vitals import read_signs
    from pipeline.nightly import find_holder
    from pipeline.store import Store

    store = Store.open(root)
    signs, last = read_signs(store)
    holder = find_holder(store)
    if as_json:
        told = {
            "root": store.url,
            "builds": [sign.to_json() for sign in signs],
            "last": None if last is None else last.to_json(),
            "nightly": None if holder is None else asdict(holder),
        }
        click.echo(json.dumps(told, indent=1, sort_keys=True))
        return
    lines = [line for sign in signs for line in _sign(sign)]
    if holder is not None:
        lines.append(f"nightly run {holder.number}: {holder}")
    if not any(sign.state == "running" for sign in signs):
        lines.append(f"no build is running; {_ended(last)}")
    click.echo(show.safe("\n".join(lines)))


def _sign(sign: Sign) -> list[str]:
    moved = f"; the count has not moved for {sign.idle_s:,.0f} s" if sign.idle_s > _LONG_S else ""
    left = f", about {sign.left_s:,.0f} s left" if sign.left_s is not None else ""
    count = f"{sign.done:,}" + (f" of {sign.total:,}" if sign.total else "")
    silent = "an unknown time" if sign.silent_s is None else f"{sign.silent_s:,.0f} s"
    who = f"build of {sign.source} by {sign.worker}, since {_utc(sign.started_s)}"
    if sign.state == "died":
        return [
            f"{who}: died, no sign of life for {silent}",
            f"  it was {verb(sign.stage)}: {count}; run it again, finished units are kept",
        ]
    return [
        who,
        f"  {verb(sign.stage)}: {count}, {sign.per_s:,.0f}/s{left}{moved}; {sign.rejects:,} rejects so far",
        f"  last sign of life {silent} ago",
    ]


_LONG_S = 30.0


def _ended(last: Sign | None) -> str:
    if last is None:
        return "none has left word of itself"
    snapshot = f", snapshot {last.snapshot}" if last.snapshot is not None else ""
    why = f": {last.error}" if last.error else ""
    return f"the last one ended {_utc(last.written_s)} by {last.worker}: {last.state}{snapshot}{why}"


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
