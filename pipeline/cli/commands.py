"""The commands: parse, call, print. Rooms are imported when a command runs, so that `--help` is quick."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import listing, show
from pipeline.cli.asking import AT, JSON, QUIET, Stopped, command, manifest_names, one_of
from pipeline.cli.progress import Reporter
from pipeline.store import redact

if TYPE_CHECKING:
    import pyarrow as pa

_Command = Callable[..., None]


def _policy_pair(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``--manifest NAME=POLICY``, several times."""
    pairs: dict[str, str] = {}
    for value in values:
        name, separator, policy = value.partition("=")
        if not separator or not name or not policy:
            raise click.BadParameter(f"{value!r} is not NAME=POLICY, for example sqrt=power:alpha=0.5")
        pairs[name] = policy
    return pairs


def build_options(command: _Command) -> _Command:
    """Every option of a build; shared by `evenshard build` and the jobs. Unset options leave the build file's value."""
    options = (
        click.argument("source", required=False),
        click.argument("root", required=False),
        click.option("--config", "config_file", metavar="FILE", help="YAML build file; flags override it."),
        click.option(
            "--source-kind", type=click.Choice(["folder", "table", "tar", "parquet"]),
            help="What SOURCE is, where it cannot be told from its files.",
        ),
        click.option("--label-from", type=click.Choice(["parent", "top", "path"]), help="Folders: what the label is."),
        click.option(
            "--split-from", type=click.Choice(["none", "top", "name"]),
            help="Splits by the folders on top, or (tars, Parquet) by the names of the files: train-00000.tar.",
        ),
        click.option("--images", metavar="URL", help="Table source: where its image paths start (default: beside it)."),
        click.option("--path-column", metavar="NAME", help="Table source: column of image paths."),
        click.option(
            "--image-column", metavar="NAME",
            help="Parquet: column of image bytes. Tars: the image's extension, where a sample has several images.",
        ),
        click.option(
            "--label-column", metavar="NAME",
            help="Tables, Parquet: column of labels. Tars: cls (the default), txt, or json.FIELD.",
        ),
        click.option(
            "--classes", metavar="FILE",
            help="Tars, Parquet: labels are numbers; line 1 of FILE is the name of class 0, and so on.",
        ),
        click.option(
            "--label-map", metavar="FILE",
            help="CSV or Parquet with the columns label and class: labels that are another class. See `classes`.",
        ),
        click.option("--split-column", metavar="NAME", help="Column of splits (tars: as for labels)."),
        click.option("--group-column", metavar="NAME", help="Samples of one group stay in one split."),
        click.option(
            "--near-duplicates", type=int, metavar="BITS",
            help="Keep pictures that look alike in one split: 6 of 64 bits of a perceptual hash may differ.",
        ),
        click.option("--check", type=click.Choice(["decode", "header"]), help="How each image is checked."),
        click.option("--shard-samples", type=int, metavar="N", help="Divide shards beyond this many images."),
        click.option("--shard-bytes", metavar="N", help="Divide shards beyond it: 128MiB."),
        click.option("--max-rejects", metavar="N", help="Refuse to publish beyond: 20, 0.01 or 1%."),
        click.option("--max-shrink", metavar="N", help="Refuse to publish if more images went: 20 or 10% (default)."),
        click.option("--max-pixels", type=int, metavar="N", help="Reject larger images."),
        click.option("--max-decode-s", type=int, metavar="N", help="Reject images that decode for longer (CPU)."),
        click.option("--max-image-bytes", metavar="N", help="Reject larger files: 64MiB."),
        click.option("--seed", type=int, metavar="N", help="Decides splits and shards; fixed for the life of a ROOT."),
        click.option(
            "--manifest", "manifests", multiple=True, callback=_policy_pair, metavar="NAME=POLICY",
            help="A manifest beside the four defaults, for example sqrt=power:alpha=0.5.",
        ),
        click.option(
            "--allow", multiple=True, metavar="NAME", help="class-map, class-vanished, open-cluster, rejects, shrink."
        ),
        click.option("--workers", type=int, metavar="N", help="CPUs to use (default: all)."),
        click.option("--address", metavar="ADDRESS", help="Ray cluster, local, or none (default: $RAY_ADDRESS)."),
        click.option("--quiet", is_flag=True, help="No progress."),
        click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@command(
    examples=(
        "build PHOTOS ROOT",
        "build PHOTOS ROOT --check header --max-rejects 1%",
        "build PHOTOS ROOT --manifest sqrt=power:alpha=0.5 --json",
    )
)
@build_options
def build(quiet: bool, as_json: bool, config_file: str | None, **flags: Any) -> None:
    """Read the images of SOURCE once and publish the next snapshot of ROOT.

    SOURCE is a folder of images (class = an image's own directory), a table of paths (CSV, TSV, Parquet, JSON Lines),
    or WebDataset tars or Parquet files with the images in them, one or a folder of them. All may be fsspec URLs. An
    image that cannot be used becomes a row of the rejects table, with its reason.
    """
    from pipeline.config import load_config, make_config
    from pipeline.ingest.run import run_build
    from pipeline.report import write_build_report

    given = {name: value for name, value in flags.items() if value not in (None, (), {})}
    config = make_config(load_config(config_file) if config_file else {}, **given)
    with Reporter(quiet=quiet) as progress:
        summary = run_build(config, progress=progress)
        progress("report", 0, 0)
        try:
            page, problem = write_build_report(config, summary, progress=progress)
        except KeyboardInterrupt:
            told = f"snapshot {summary.number} is published, its page is not written; `evenshard report ROOT` writes it"
            raise Stopped(told) from None
    if problem:
        summary = replace(summary, notices=(*summary.notices, problem))
    if as_json:
        click.echo(json.dumps({**_plain(summary), "report": page}, sort_keys=True))
        return
    click.echo(show.build_summary(summary, redact(config.root)))
    if page:
        click.echo(f"page       {show.safe(page)}")


def _plain(value: Any) -> Any:
    return value.to_json() if hasattr(value, "to_json") else asdict(value)


@command(examples=("stats ROOT", "stats ROOT --split train --json", "stats ROOT --rejects", "stats ROOT --csv"))
@click.argument("root")
@AT
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Count one split only.")
@click.option("--rejects", "list_rejects", is_flag=True, help="List the rejected entries instead.")
@click.option("--all", "every", is_flag=True, help="List all classes, not only the largest and the rarest.")
@click.option("--csv", "as_csv", is_flag=True, help="The classes (or rejects) as CSV, formulas guarded.")
@JSON
def stats(
    root: str, at: int | None, split: str | None, list_rejects: bool, every: bool, as_csv: bool, as_json: bool
) -> None:
    """Class counts of a snapshot, and how imbalanced they are.

    Images are counted over all splits, unless --split names one; the imbalance is that of train, which is trained on.
    """
    from pipeline.ingest.stats import describe
    from pipeline.snapshot import open_snapshot

    one_of(csv=as_csv, json=as_json)
    one_of(rejects=list_rejects, split=split)
    snapshot = open_snapshot(root, at=at)
    if list_rejects:
        _print_rejects(snapshot.rejects, as_csv, as_json)
        return
    rows = _class_rows(snapshot.classes, split)
    counts, train = (snapshot.classes[name].to_numpy() for name in (split or "count", "train"))
    told = describe(counts)
    if as_json:
        body = {"snapshot": snapshot.number, "split": split, "summary": _plain(told), "classes": rows}
        click.echo(json.dumps({**body, "train": _plain(describe(train))}, indent=1))
    elif as_csv:
        click.echo(listing.csv_text(list(rows[0]) if rows else [], (tuple(row.values()) for row in rows)))
    else:
        _print_classes(rows, split, every)
        click.echo(f"{listing.distribution(counts if split else train, split or 'train')}\n")
        what = f"snapshot {snapshot.number}, {split or 'all splits'}"
        if split is None:  # a model meets the imbalance of train; val and test are cut evenly
            click.echo(f"{what}: {show.counted(told.num_images, 'image')} in {show.classes(told)}")
            what, told = "train", describe(train)
        click.echo(show.description(told, what))
        if unmeasured := sum(row["count"] > 0 and not row["evaluable"] for row in rows):
            num = show.counted(unmeasured, "class has", "classes have")
            click.echo(f"{num} no image outside train and cannot be evaluated")


def _class_rows(classes: pa.Table, split: str | None) -> list[dict[str, Any]]:
    """One row per class, counting ``split``, or all splits and, beside that, train."""
    wanted = ("name", split or "count", "train", f"{split}_bytes" if split else "bytes", "evaluable")
    columns = [classes[name].to_pylist() for name in wanted]
    total = max(sum(columns[1]), 1)
    return [
        {
            "class_id": number,
            "name": name,
            "count": count,
            **({} if split else {"train": train}),
            "share": count / total,
            "bytes": size,
            "evaluable": evaluable,
        }
        for number, (name, count, train, size, evaluable) in enumerate(zip(*columns, strict=True))
    ]


def _print_classes(rows: list[dict[str, Any]], split: str | None, every: bool) -> None:
    """The largest and the rarest of them, or ``every`` one."""
    rows = sorted(rows, key=lambda row: (-row["count"], row["class_id"]))
    left_out = 0 if every or len(rows) <= _LISTED else len(rows) - _LARGEST - _RAREST
    listed = [*rows[:_LARGEST], *rows[-_RAREST:]] if left_out else rows
    keys = ("class_id", "name", "count", *(() if split else ("train",)), "share", "bytes")
    shown = ([f"{row[key]:.2%}" if key == "share" else row[key] for key in keys] for row in listed)
    lines = show.table(keys, shown).splitlines()
    if left_out:
        lines.insert(1 + _LARGEST, f"... {left_out:,} more (--all lists them)")
    click.echo("\n".join(lines) + "\n")


_LISTED, _LARGEST, _RAREST = 24, 12, 6


def _print_rejects(rows: Any, as_csv: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows.to_pylist(), indent=1))
    elif as_csv:
        click.echo(listing.csv_text(rows.column_names, (tuple(row.values()) for row in rows.to_pylist())))
    else:
        click.echo(show.rejects(rows))


@command(examples=("export ROOT oversampled DEST", "export ROOT natural OTHER --epoch 3 --shard-samples 1000"))
@click.argument("root")
@click.argument("manifest_name", metavar="MANIFEST", shell_complete=manifest_names)
@click.argument("dest")
@AT
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the epoch function.")
@click.option("--epoch", type=click.IntRange(0), default=0, show_default=True, help="Which epoch to write.")
@click.option(
    "--shard-samples", type=click.IntRange(1), default=2000, show_default=True, metavar="N", help="Draws per tar."
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="CPUs to use (default: all).")
@click.option("--address", metavar="ADDRESS", help="Ray cluster, local, or none (default: $RAY_ADDRESS).")
@click.option(
    "--allow", multiple=True, type=click.Choice(["open-cluster"]), help="A cluster that answers without a token."
)
@QUIET
@JSON
def export(
    root: str, manifest_name: str, dest: str, at: int | None, seed: int, epoch: int, shard_samples: int,
    workers: int | None, address: str | None, allow: tuple[str, ...], quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write one epoch of MANIFEST to DEST as resampled WebDataset tars, repeats included."""
    from pipeline.export import export_cost, export_tars, plan_export
    from pipeline.snapshot import open_snapshot

    opened = open_snapshot(root, at=at).manifest(manifest_name)
    plan = plan_export(opened, seed=seed, epoch=epoch, shard_samples=shard_samples)
    cost = export_cost(opened, plan)
    click.echo(
        f"writes {show.num_bytes(cost.tar_bytes)} in {show.counted(plan.num_shards, 'tar')}: {plan.num_draws:,} draws "
        f"of {show.counted(cost.num_distinct, 'distinct image')} ({show.num_bytes(cost.distinct_bytes)}); the loader "
        "needs none of this",
        err=as_json,  # it is said before the disk is filled, and is no part of the answer
    )
    with Reporter(quiet=quiet) as progress:
        done = export_tars(
            opened, dest, plan, workers=workers, address=address, allow_open=bool(allow), progress=progress
        )
    if as_json:
        body = {"snapshot": plan.snapshot, "manifest": plan.manifest, "seed": seed, "epoch": epoch}
        body |= {"cost": asdict(cost), **asdict(done)}
        click.echo(json.dumps(body, indent=1, sort_keys=True))
        return
    reused = f", {done.num_reused:,} of them were there before" if done.num_reused else ""
    num_tars = show.counted(done.num_shards, "tar")
    click.echo(f"wrote {done.num_draws:,} draws to {num_tars} in {show.safe(done.dest)}{reused}")
    click.echo(f"read them with: webdataset.WebDataset({f'{redact(dest)}/{done.pattern}'!r}, shardshuffle=False)")


@command(examples=("demo", "demo DIR --quick"))
@click.argument("directory", metavar="[DIR]", default="evenshard-demo")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the drawings and the training.")
@click.option("--quick", is_flag=True, help="A smaller set and fewer epochs, to see every step in half a minute.")
def demo(directory: str, seed: int, quick: bool) -> None:
    """Draw a long-tailed product set, build it, train on natural draws, fine-tune on balanced ones."""
    from pipeline.demo.run import run_demo

    run_demo(directory, seed=seed, quick=quick, echo=click.echo)


@command(examples=("completion bash", "completion zsh"))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: commands, options, policies, manifests.

    bash: eval "$(evenshard completion bash)" in ~/.bashrc; zsh the same in ~/.zshrc; fish: evenshard completion fish >
    ~/.config/fish/completions/evenshard.fish
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    root = click.get_current_context().find_root().command
    if made is not None:
        click.echo(made(root, {}, "evenshard", "_EVENSHARD_COMPLETE").source())
