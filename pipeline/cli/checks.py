"""Commands that look at a finished snapshot: prove it, show it. Thin, like their neighbours in ``commands``."""

from __future__ import annotations

import json

import click

from pipeline.cli import show
from pipeline.cli.progress import Reporter


@click.command()
@click.argument("root")
@click.option("--at", type=int, metavar="N", help="A snapshot other than the newest.")
@click.option("--sample", type=float, default=1.0, show_default=True, metavar="F", help="Share of tars to read again.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def verify(root: str, at: int | None, sample: float, quiet: bool, as_json: bool) -> None:
    """Prove a snapshot: every file, image, row, count, split, manifest and epoch against its record.

    Every contradiction is named, with what to do about it; the exit code is 1 if there is one.
    """
    from pipeline.errors import IntegrityError
    from pipeline.verify import verify

    with Reporter(quiet=quiet) as progress:
        found = verify(root, at, sample, progress=progress)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1, sort_keys=True))
    else:
        for finding in found.findings:
            click.echo(show.name(str(finding)))
    what = f"snapshot {found.number} of {found.root}"
    if not found.sound:
        raise IntegrityError(f"{what} is not sound: {len(found.findings):,} findings")
    if not as_json:
        click.echo(
            f"{show.safe(what)} is sound: {found.num_files:,} files, {found.num_images:,} images "
            f"({show.num_bytes(found.num_bytes)}) checked in {found.elapsed_s:,.1f} s"
        )


@click.command()
@click.argument("root")
@click.option("--at", type=int, metavar="N", help="A snapshot other than the newest.")
@click.option("--out", metavar="FILE", help="Write the page to this file instead of below ROOT.")
def report(root: str, at: int | None, out: str | None) -> None:
    """Write one self-contained HTML page about a snapshot: imbalance, manifests, classes, rejects."""
    from pipeline.report import write_report

    click.echo(f"wrote {show.safe(write_report(root, at=at, out=out))}")
