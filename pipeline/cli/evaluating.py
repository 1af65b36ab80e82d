"""`evenshard evaluate`: what a model really does, from a file of its predictions. Needs neither torch nor Ray."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import click

from pipeline.cli import show
from pipeline.cli.asking import AT, JSON, command, manifest_names

if TYPE_CHECKING:
    from pipeline.learn.evaluation import Evaluation
    from pipeline.learn.variants import Figure

NUM_WORST = 10
NONE = "none"


@command(
    examples=(
        "evaluate ROOT PREDICTIONS",
        "evaluate ROOT PREDICTIONS --manifest balanced --prior natural --json",
        "evaluate ROOT PREDICTIONS --prior uniform --prior power --page PAGE",
    )
)
@click.argument("root")
@click.argument("predictions")
@click.option(
    "--manifest", default="natural", show_default=True, metavar="NAME", shell_complete=manifest_names,
    help="What the model was trained on: decides the prior that its scores carry.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Choice(["balanced", "effective_number", "square_root", "residual"]),
    help="Class weights that its loss had.",
)  # fmt: skip
@click.option(
    "--tau", type=click.FloatRange(0), default=0.0, metavar="T",
    help="Its loss added T x log_q to the logits (balanced softmax, logit adjustment: 1).",
)  # fmt: skip
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@click.option(
    "--prior", "priors", multiple=True, type=click.Choice(["natural", "uniform", "power", "em", NONE]),
    help="Correct scores to this prior; several times. Estimated from the images: power, train's shares to one "
    "power; em, each share. none: only as given, where it is not known which prior they carry (focal, auc, kappa; "
    "tau-norm).  "
    "[default: uniform]",
)  # fmt: skip
@click.option(
    "--scores", type=click.Choice(["auto", "logits", "probabilities"]), default="auto", show_default=True,
    help="What the scores are.",
)  # fmt: skip
@click.option(
    "--allow", multiple=True, type=click.Choice(["duplicate", "missing", "nan", "unknown"]),
    help="Evaluate what is left although there are such rows or images.",
)  # fmt: skip
@click.option("--page", metavar="FILE", help="Write one self-contained HTML page, too.")
@AT
@JSON
def evaluate(
    root: str,
    predictions: str,
    manifest: str,
    weights: str | None,
    tau: float,
    split: str,
    priors: tuple[str, ...],
    scores: str,
    allow: tuple[str, ...],
    page: str | None,
    at: int | None,
    as_json: bool,
) -> None:
    """Tell what a model really does, by group of classes, from a file of its predictions.

    PREDICTIONS is a CSV or Parquet file, of any model: a column key or path, and a column label, or one column of
    scores for each class, or a list column scores. All images of the split must have a row; rows of val choose
    thresholds.
    """
    if NONE in priors and set(priors) != {NONE}:
        raise click.UsageError(
            f"--prior none and --prior {next(name for name in priors if name != NONE)} contradict each other"
        )
    from pipeline.learn.evaluation import Training
    from pipeline.learn.evaluation import evaluate as measure
    from pipeline.snapshot import open_snapshot

    told = measure(
        open_snapshot(root, at=at),
        predictions,
        split=split,
        training=Training(manifest=manifest, weights=weights, tau=tau),
        priors=[] if NONE in priors else list(dict.fromkeys(priors)) or ["uniform"],
        scores=scores,
        allow=allow,
    )
    if page is not None:
        from pipeline.report import write_evaluation

        write_evaluation(told, page)
    if as_json:
        click.echo(json.dumps({**told.to_json(), "page": page}, indent=1, sort_keys=True))
        return
    click.echo(_text(told))
    if page is not None:
        click.echo(f"\nwrote {show.name(page)}")


def _text(told: Evaluation) -> str:
    head = (
        f"{told.file}: {told.kind}, snapshot {told.snapshot}, split {told.split}: "
        f"{told.num_measured:,} of {show.counted(told.num_images, 'image')}"
    )
    covered = (
        f"classes measured: {told.num_classes_measured:,} of {told.num_classes:,}; they hold {told.train_share:.1%} of "
        "the training images. Others count neither as right nor as wrong"
    )
    lines = [show.name(head), covered, "", _figures(told), "", _worst(told)]
    notes = [*told.notes, *(note for one in told.variants for note in one.notes)]
    if told.temperature is not None:
        notes.append(f"temperature on val: {told.temperature:.3g} (scores divided by it are best calibrated)")
    return "\n".join([*lines, *(f"note: {show.name(note)}" for note in notes)])


def _figures(told: Evaluation) -> str:
    from pipeline.learn.evaluation import OF_PREVALENCE

    titles = list(told.variants[0].figures)
    header = ["", "over", *(_title(one.name) for one in told.variants)]
    rows = [
        [
            f"{title} *" if title in OF_PREVALENCE else title,
            f"{told.variants[0].figures[title].count:,}",
            *(_cell(one.figures[title], title) for one in told.variants),
        ]
        for title in titles
        if told.variants[0].figures[title].count
    ]
    rows.append(["classes never recognised", "", *(f"{one.num_never:,}" for one in told.variants)])
    return show.table(header, rows) + "\n* moves with how frequent classes are; [95 % interval]"


def _title(name: str) -> str:
    return name if name == "as given" else f"to {name}"


def _cell(figure: Figure, title: str) -> str:
    low, high = figure.interval
    if math.isnan(figure.value):
        return "-"
    if title in ("kappa", "macro AUROC", "calibration error"):
        value, ends = f"{figure.value:.3f}", f" [{low:.3f}, {high:.3f}]"
    else:
        value, ends = f"{figure.value:.1%}", f" [{100 * low:.1f}, {100 * high:.1f}]"
    return value if math.isnan(low) else value + ends


def _worst(told: Evaluation) -> str:
    rows = [
        [
            told.names[number],
            int(told.train[number]),
            int(told.support[number]),
            *(f"{one.recall[number]:.1%}" for one in told.variants),
            told.names[taken] if (taken := int(told.variants[0].confused[number])) >= 0 else "-",
        ]
        for number in told.worst(NUM_WORST)
    ]
    titles = [f"recall {_title(one.name)}" for one in told.variants]
    return show.table(["worst classes", "train", told.split, *titles, "taken for"], rows)
