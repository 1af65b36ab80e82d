"""The command that trains. Thin, like its neighbours in ``commands``."""

from __future__ import annotations

import json
import os
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from pipeline.cli import show
from pipeline.cli.asking import AT, JSON, QUIET, Stopped, command, loss_names, model_names
from pipeline.cli.logs import say
from pipeline.store import redact


def train_options(function: Any) -> Any:
    """What a training takes; the defaults are those of ``learn.recipe.Recipe``."""
    options = (
        click.option(
            "--stage", "stages", multiple=True, required=True, metavar="MANIFEST:EPOCHS",
            help="One after the other, with options: balanced:5:crt:lr=0.01. See below.",
        ),
        click.option("--out", required=True, metavar="DIR", help="Checkpoints, model, summary, page."),
        click.option(
            "--loss", metavar="NAME", shell_complete=loss_names,
            help="cross-entropy (default), balanced-softmax, weighted, effective-number, square-root, residual, focal, "
            "auc, kappa, quadratic-kappa.",
        ),
        click.option(
            "--model", metavar="NAME", shell_complete=model_names,
            help="A classifier of torchvision (default: resnet18), or small_cnn for small images on CPUs.",
        ),
        click.option("--weights", metavar="FILE", help="Start from this state dict; nothing is ever downloaded."),
        click.option("--norm", type=click.Choice(["batch", "group"]), help="group: GroupNorm in place of BatchNorm."),
        click.option("--side", type=int, metavar="N", help="Pixels of the images that the model sees (default: 224)."),
        click.option(
            "--augment", type=click.Choice(["crop", "harder-repeats"]),
            help="harder-repeats: views of an image differ more each time that it is drawn again (default: crop).",
        ),
        click.option("--batch-size", type=int, metavar="N", help="Of all ranks together (default: 64)."),
        click.option("--lr", type=float, metavar="X", help="Peak learning rate of SGD (default: 0.1)."),
        click.option("--momentum", type=float, metavar="X", help="Of SGD (default: 0.9)."),
        click.option("--weight-decay", type=float, metavar="X", help="Of SGD (default: 0.0005)."),
        click.option("--seed", type=int, metavar="N", help="Of weights, draws and augmentation (default: 0)."),
        click.option(
            "--split", type=click.Choice(["train", "val", "test"]), help="Evaluated on (default: val, else test)."
        ),
        click.option(
            "--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="auto: bf16 on GPUs, fp32 elsewhere."
        ),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="auto: GPUs where there are any."),
        click.option("--workers", type=int, metavar="N", help="Loader threads of each rank (default: 2)."),
        click.option("--save-every", type=int, metavar="N", help="Steps between checkpoints (default: 500)."),
        click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of DIR, if it has one."),
        click.option("--tensorboard", is_flag=True, help="Also write DIR/tensorboard; needs that package."),
        click.option(
            "--predictions", is_flag=True, help="Also write logits of val and test, for `evenshard evaluate`."
        ),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@command(
    examples=(
        "train ROOT --stage natural:20 --stage balanced:5 --out DIR",
        "train ROOT --stage natural:20 --stage balanced:5 --out DIR --resume",
        "train ROOT --stage natural:20 --loss balanced-softmax --out DIR2",
        "train ROOT --stage natural:20 --stage balanced:5:crt --out DIR3",
        "train ROOT --stage natural:20 --out DIR4 --predictions",
    )
)
@click.argument("root")
@train_options
@AT
@QUIET
@JSON
def train(root: str, stages: tuple[str, ...], quiet: bool, as_json: bool, **flags: Any) -> None:
    """Train a classifier in stages, each on the draws of a manifest, and measure it honestly after each.

    Options of a stage, after MANIFEST:EPOCHS and separated by colons: loss=NAME and lr=X for this stage; freeze, only
    the head moves; reset, the head starts anew; crt, both; tau=X, at its end each class's weights are divided by their
    norm to this power. What `evenshard schedule` prints may be given as it is.

    On several GPUs or processes: torchrun --nproc-per-node=4 --no-python evenshard train ... All ranks together train
    as one would. Ctrl-C and SIGTERM leave a checkpoint; --resume goes on from it, on any number of ranks.
    """
    from pipeline.learn.recipe import Recipe, parse_stages

    given = {name: value for name, value in flags.items() if value is not None}
    recipe = Recipe(root=root, stages=parse_stages(stages), **given)
    _need_torch()
    # Read when torch is first imported: OpenMP threads that spin while they wait take the loader's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pipeline.learn.predicting import PREDICTIONS
    from pipeline.learn.trainer import train as train_all
    from pipeline.report import write_training_page

    try:
        trained = train_all(recipe, echo=(lambda _: None) if quiet else _echo)
    except KeyboardInterrupt as stop:
        if not str(stop):
            raise
        raise Stopped(f"{Path(recipe.out) / str(stop)} holds what was done; --resume goes on from it") from None
    if trained.rank:
        return
    page = write_training_page(trained.summary, recipe.out)
    if as_json:
        click.echo(json.dumps(trained.summary, indent=1))
        return
    click.echo(show.table(*_table(trained.summary)))
    click.echo(f"\nmodel      {show.safe(recipe.out)}/model.pt\npage       {show.safe(page)}")
    if recipe.predictions:
        click.echo(show.safe(_next(root, f"{recipe.out}/{PREDICTIONS}", trained.summary["evaluate"])))


def _next(root: str, file: str, options: list[str]) -> str:
    """Where the predictions are, and the command that measures them."""
    told = shlex.join(["evenshard", "evaluate", redact(root), file, *options])
    note = "\nnote       which prior they carry is not known (loss or tau): do not correct them to another"
    return f"scores     {file}\nnext       {told}{note if '--prior' in options else ''}"


def _echo(text: str) -> None:
    say(text, event="train")


def _need_torch() -> None:
    from pipeline.errors import MissingExtraError

    missing = [name for name in ("torch", "torchvision") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"training needs {' and '.join(missing)}: pip install 'evenshard[train]'")


_FIGURES = ("accuracy", "balanced_accuracy", "many", "medium", "few", "coverage")


def _table(summary: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    rows: list[tuple[object, ...]] = []
    for stage in summary["stages"]:
        for kind, scores in stage["scores"].items():
            label = stage["stage"] if kind == "as_it_is" else "  corrected to a uniform prior"
            rows.append((label, *(_percent(scores[name]) for name in _FIGURES)))
    return (summary["split"], *(name.replace("_", " ") for name in _FIGURES)), rows


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
