"""The command of every night. Thin, like its neighbours in ``commands``."""

from __future__ import annotations

import sys
from typing import Any

import click

from pipeline.cli import show
from pipeline.cli.asking import command
from pipeline.cli.commands import build_options
from pipeline.cli.custody import duration
from pipeline.cli.progress import Reporter


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
        click.echo(f"notice: {show.safe(notice)}", err=True)
    for error in night.errors:
        click.echo(
            f"{show.painted('error:', 'red', sys.stderr)} {error['step']}: {show.safe(error['message'])}", err=True
        )
    click.echo(night.line())
    if night.exit_code:
        raise click.exceptions.Exit(night.exit_code)
