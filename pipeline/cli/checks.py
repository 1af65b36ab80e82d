"""Commands that look at a finished snapshot: prove it, show it. Thin, like their neighbours in ``commands``."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click

from pipeline.cli import show
from pipeline.cli.asking import AT, JSON, QUIET, command
from pipeline.cli.logs import say
from pipeline.cli.progress import Reporter

if TYPE_CHECKING:
    from pipeline.verify import Verification


@command(examples=("verify ROOT", "verify ROOT --sample 0.1 --json"))
@click.argument("root")
@AT
@click.option(
    "--sample",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    metavar="F",
    help="Share of the image bytes to read again.",
)
@click.option(
    "--seed", type=int, metavar="N", help="Which share; 1/F seeds in a row read all.  [default: the day's number]"
)
@QUIET
@JSON
def verify(root: str, at: int | None, sample: float, seed: int | None, quiet: bool, as_json: bool) -> None:
    """Prove a snapshot: every file, image, row, count, split, manifest and epoch against its record; and the pins.

    With --sample F, records, tables, indexes and manifests are proved as always, and of every tar a share F is read;
    the next day reads the next share, so that a nightly run reads every byte in 1/F nights.

    Every contradiction is named, with what to do about it; the exit code is 1 if there is one.
    """
    from pipeline.errors import IntegrityError
    from pipeline.verify import verify

    with Reporter(quiet=quiet) as progress:
        found = verify(root, at, sample, seed=seed, progress=progress)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1, sort_keys=True))
    else:
        for finding in found.findings:
            click.echo(show.name(str(finding)))
    for note in found.notes:
        say(f"note: {note}", event="note")
    what = f"snapshot {found.number} of {found.root}"
    if not found.sound:
        raise IntegrityError(f"{what} is not sound: {show.counted(len(found.findings), 'finding')}{_share(found)}")
    if not as_json:
        files, images = show.counted(found.num_files, "file"), show.counted(found.num_images, "image")
        click.echo(
            f"{show.safe(what)} is sound: {files}, {images} "
            f"({show.num_bytes(found.num_bytes)}) checked in {found.elapsed_s:,.1f} s{_share(found)}"
        )


def _share(found: Verification) -> str:
    """How much of the images was read, where it was not all, and how to read the rest."""
    if found.sample >= 1:
        return ""
    read = (
        f"{100 * found.tar_bytes_read / max(found.tar_bytes, 1):.3g} % of the {show.num_bytes(found.tar_bytes)} in tars"
    )
    rest = f"{found.num_seeds:,} seeds in a row read all" if found.num_seeds else "no image was read"
    return f"; sample {found.sample:g}, seed {found.seed}: {read} were read again, {rest}"


@command(examples=("report ROOT", "report ROOT --out page.html --json"))
@click.argument("root")
@AT
@click.option("--out", metavar="FILE", help="Write the page to this file instead of below ROOT.")
@click.option(
    "--source", metavar="PLACE", help="Where the images came from (the folder of their paths): shows label conflicts."
)
@QUIET
@JSON
def report(root: str, at: int | None, out: str | None, source: str | None, quiet: bool, as_json: bool) -> None:
    """Write one self-contained HTML page about a snapshot: imbalance, manifests, classes, pictures, rejects, advice.

    Every build writes it too. What is rejected lies in no shard: give --source to see it.
    """
    from pipeline.errors import SourceError
    from pipeline.images import Limits
    from pipeline.ingest.source import SourceReader
    from pipeline.ingest.source_files import open_place
    from pipeline.report import write_report
    from pipeline.snapshot import open_snapshot

    snapshot = open_snapshot(root, at)
    place = None if source is None else open_place(source)
    if place is not None and place.is_local and not os.path.isdir(place.path):
        raise SourceError(f"source {place.shown} is no directory: give the one that the images' paths start from")
    originals = None if place is None else SourceReader(place, Limits.max_bytes).read
    with Reporter(quiet=quiet) as progress:
        page = write_report(snapshot.store, snapshot.number, out, originals=originals, progress=progress)
    told = json.dumps({"snapshot": snapshot.number, "page": page}, sort_keys=True)
    click.echo(told if as_json else f"wrote {show.safe(page)}")
