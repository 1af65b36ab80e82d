"""The demo itself: draw, build, train on ``natural``, fine-tune on ``balanced``, compare.

In: a directory, a seed, a way to say things. Out: ``DemoResult``. Guarantees: every step says what it does before it
does it; a step that did not deliver what it promised is an error; the ROOT that remains is an ordinary one.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import make_config
from pipeline.demo.draw import PhotoPlan, draw_photos, plan_photos
from pipeline.errors import EvenshardError, MissingExtraError
from pipeline.ingest.run import BuildSummary, run_build
from pipeline.learn.metrics import balanced_accuracy, group_accuracy, per_class_recall, shot_groups
from pipeline.report import write_build_report
from pipeline.snapshot import Manifest, Snapshot, open_snapshot

if TYPE_CHECKING:
    from torch import nn

Echo = Callable[[str], Any]

SAY_EVERY_S = 3.0
WORKERS = 2  # loader threads, beside the two of the training itself


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training: the whole network on natural draws, then its last layer on balanced ones.

    The second stage is the classifier re-training of Kang et al. (ICLR 2020), without forgetting the first. Of the
    recipes tried on three seeds it lifted few-shot classes most, for about the same loss of many-shot ones.
    """

    side: int = 64
    batch_size: int = 64
    width: int = 16
    natural_epochs: int = 12
    natural_lr: float = 0.1
    balanced_epochs: int = 3
    balanced_lr: float = 0.1


FULL = Recipe()
QUICK = Recipe(natural_epochs=6, balanced_epochs=3)


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Accuracy in [0, 1] by group - ``many``, ``medium``, ``few``, ``all`` - after each stage, on test photos."""

    root: str
    snapshot: int
    natural: Mapping[str, float]
    balanced: Mapping[str, float]
    elapsed_s: float


def run_demo(
    directory: str | os.PathLike[str], *, seed: int = 0, quick: bool = False, echo: Echo = print
) -> DemoResult:
    """Run the whole demo below ``directory``; a second run there draws and packs nothing again, and trains anew.

    Errors: ``MissingExtraError`` before anything is done; ``UsageError`` if the directory holds other files;
    ``EvenshardError`` if a step lost something.
    """
    _require("ray", "torch", "torchvision")
    # Read when torch is first imported. Loader threads and training share the cores, and OpenMP threads that spin
    # while they wait take them from both: measured on two busy cores, 8 ms of CPU an image instead of 2.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    started_s = time.monotonic()
    place, recipe = Path(directory), QUICK if quick else FULL
    plan = plan_photos(seed, quick=quick)
    _draw(plan, place / "photos", echo)
    snapshot = _build(plan, place, echo)
    natural, balanced = _train(snapshot, recipe, seed, echo)
    elapsed_s = time.monotonic() - started_s
    _tell(snapshot, natural, balanced, echo)
    _tell_next(place / "root", elapsed_s, echo)
    return DemoResult(
        root=str(place / "root"), snapshot=snapshot.number, natural=natural, balanced=balanced, elapsed_s=elapsed_s
    )


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtraError(f"the demo needs {', '.join(missing)}: pip install 'evenshard[all]'")


# Draw ----------------------------------------------------------------------------------------------------------------


def _draw(plan: PhotoPlan, photos: Path, echo: Echo) -> None:
    counts = [known.num_train for known in plan.classes]
    rare = sum(count <= 5 for count in counts)
    echo(f"[1/4] Drawing photos of {len(counts)} made-up products into {photos}")
    echo(
        f"      train: {plan.num_train:,} photos with a long tail - the largest class has {counts[0]}, {rare} classes "
        f"have five or fewer, {counts.count(1)} have one"
    )
    echo(
        f"      test: {plan.classes[0].num_test} fresh photos of every class, rare ones too - no real tail has them to "
        "spare, but without\n      them nobody could say how well rare classes are recognised"
    )
    echo(f"      and {len(plan.damaged)} files that no model should see: broken, empty, no image, copied, mislabelled")
    since = time.monotonic()
    num_drawn = draw_photos(plan, photos, _every_few_seconds(echo, "drawn"))
    there = len(plan.photos) + len(plan.damaged) - num_drawn
    reused = f"; {there:,} were there from an earlier run" if there else ""
    echo(f"      {num_drawn:,} files drawn in {time.monotonic() - since:.0f} s{reused}")


def _every_few_seconds(echo: Echo, verb: str) -> Callable[[int, int], None]:
    last_s = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last_s
        if done and time.monotonic() - last_s >= SAY_EVERY_S:
            last_s = time.monotonic()
            echo(f"      {done:,} of {total:,} {verb}")

    return say


# Build ---------------------------------------------------------------------------------------------------------------


def _build(plan: PhotoPlan, place: Path, echo: Echo) -> Snapshot:
    source, root = place / "photos", place / "root"
    echo(f"\n[2/4] Building {root}: every photo read once, checked, packed into tars")
    echo(f"      the same as: evenshard build {shlex.quote(str(source))} {shlex.quote(str(root))} --split-from top")
    say = _every_few_seconds(echo, "packed")
    config = make_config({}, source=str(source), root=str(root), split_from="top")
    summary = run_build(config, progress=lambda stage, done, total: say(done, total))
    snapshot = open_snapshot(root)
    check_nothing_lost(plan, snapshot.classes, snapshot.rejects)
    _tell_build(summary, snapshot, echo)
    page, problem = write_build_report(config, summary)
    echo(f"      {problem or f'all of it on one page: {page}'}")
    return snapshot


def check_nothing_lost(plan: PhotoPlan, classes: pa.Table, rejects: pa.Table) -> None:
    """Every drawn photo must be in its class and split, every damaged file among the rejects; more of both is fine."""
    train, test = (
        dict(zip(classes["name"].to_pylist(), classes[s].to_pylist(), strict=True)) for s in ("train", "test")
    )
    lost = [
        f"{known.name}: drew {known.num_train} for train and {known.num_test} for test, "
        f"found {train.get(known.name, 0)} and {test.get(known.name, 0)}"
        for known in plan.classes
        if train.get(known.name, 0) < known.num_train or test.get(known.name, 0) < known.num_test
    ]
    if lost:
        raise EvenshardError(f"the build lost photos of {len(lost)} classes, see its rejects: {'; '.join(lost[:5])}")
    if rejects.num_rows < len(plan.damaged):
        raise EvenshardError(f"{len(plan.damaged)} damaged files were drawn, but only {rejects.num_rows} turned away")


def _tell_build(summary: BuildSummary, snapshot: Snapshot, echo: Echo) -> None:
    rejects = ", ".join(f"{count} {reason}" for reason, count in summary.rejects.items())
    state = f"snapshot {summary.number}" if summary.changed else f"nothing changed, snapshot {summary.number} stands"
    echo(f"      {state} in {summary.elapsed_s:.0f} s: {summary.num_images:,} images in {summary.num_classes} classes")
    echo(f"      {summary.num_rejects} files turned away, each with its reason: {rejects}")
    echo(f"      {len(snapshot.manifests)} manifests, each a number per class that says how often an epoch draws it:")
    for name in snapshot.manifests:
        targets = snapshot.manifest(name).targets
        echo(f"        {name:<13}{targets.sum():>6,} draws an epoch, {targets.min()} to {targets.max()} of a class")


# Train ---------------------------------------------------------------------------------------------------------------


def _train(snapshot: Snapshot, recipe: Recipe, seed: int, echo: Echo) -> tuple[dict[str, float], dict[str, float]]:
    from pipeline.learn.train import small_cnn

    model = small_cnn(snapshot.record.num_classes, width=recipe.width, seed=seed)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    echo(f"\n[3/4] Training a network of {num_weights:,} weights on `natural`: photos as often as they occur")
    _fit(model, snapshot.manifest("natural"), recipe, (recipe.natural_epochs, recipe.natural_lr), seed, echo)
    natural = _score(model, snapshot, recipe)
    echo(f"      {_in_words(natural)}")
    echo("\n[4/4] Fine-tuning its last layer on `balanced`: every class equally often, with nothing copied on disk")
    model[:-1].requires_grad_(False)
    _fit(model, snapshot.manifest("balanced"), recipe, (recipe.balanced_epochs, recipe.balanced_lr), seed, echo)
    balanced = _score(model, snapshot, recipe)
    echo(f"      {_in_words(balanced)}")
    return natural, balanced


def _fit(model: nn.Module, manifest: Manifest, recipe: Recipe, stage: tuple[int, float], seed: int, echo: Echo) -> None:
    from pipeline.learn.train import fit
    from pipeline.stream.loader import Loader
    from pipeline.stream.transforms import RandomResizedCropFlip

    transform = RandomResizedCropFlip(recipe.side, scale=(0.6, 1.0))
    loader = Loader(manifest, recipe.batch_size, transform=transform, seed=seed, workers=WORKERS)
    epochs, lr = stage
    started_s = time.monotonic()

    def say(epoch: int, loss: float) -> None:
        echo(f"      epoch {epoch + 1} of {epochs}: loss {loss:.2f}, {time.monotonic() - started_s:.0f} s")

    losses = fit(model, loader, epochs=epochs, lr=lr, on_epoch=say)
    if not math.isfinite(losses[-1]):
        raise EvenshardError(f"training on {manifest.name!r} diverged: the losses were {losses}")


def _score(model: nn.Module, snapshot: Snapshot, recipe: Recipe) -> dict[str, float]:
    """Accuracy on the test split by group of training counts, and over all classes alike."""
    from pipeline.learn.train import evaluate
    from pipeline.stream.loader import EvaluationLoader
    from pipeline.stream.transforms import ResizeCenterCrop

    transform = ResizeCenterCrop(recipe.side, resize=recipe.side)
    batches = EvaluationLoader(snapshot, "test", 100, transform=transform, workers=WORKERS)
    predictions, labels = evaluate(model, batches)
    recall = per_class_recall(labels, predictions, snapshot.record.num_classes)
    return {**group_accuracy(recall, _train_counts(snapshot)), "all": balanced_accuracy(recall)}


def _train_counts(snapshot: Snapshot) -> NDArray[np.int64]:
    return snapshot.classes["train"].to_numpy()


def _in_words(accuracy: Mapping[str, float]) -> str:
    return "accuracy on test: " + ", ".join(f"{group} {value:.1%}" for group, value in accuracy.items())


# Tell ----------------------------------------------------------------------------------------------------------------


def _tell(snapshot: Snapshot, natural: Mapping[str, float], balanced: Mapping[str, float], echo: Echo) -> None:
    members = {name: int(mask.sum()) for name, mask in shot_groups(_train_counts(snapshot)).items()}
    members["all"] = snapshot.record.num_classes
    echo("\nAccuracy on test photos, mean over the classes of a group (groups by photos in train)\n")
    echo(_row("", {"many": ">100", "medium": "20-100", "few": "<20", "all": "all"}))
    echo(_row("classes", {group: f"{count}" for group, count in members.items()}))
    echo(_row("natural", {group: f"{value:.1%}" for group, value in natural.items()}))
    echo(_row("then balanced", {group: f"{value:.1%}" for group, value in balanced.items()}))
    echo(_row("change", {group: f"{_change(natural[group], balanced[group]):+.1f}" for group in natural}))
    echo(
        "\nThe photos did not change, only how often each class was drawn. Balance finds rare classes that the\n"
        "network could nearly tell apart; it adds no photo of them, and frequent classes pay for a part of it."
    )


def _change(before: float, after: float) -> float:
    """In points; never -0.0."""
    return round(100 * (after - before), 1) + 0.0


def _row(title: str, cells: Mapping[str, str]) -> str:
    return f"  {title:<15}" + "".join(f"{cells[group]:>10}" for group in ("many", "medium", "few", "all"))


def _tell_next(root: Path, elapsed_s: float, echo: Echo) -> None:
    quoted = shlex.quote(str(root))
    snippet = (
        f"from pipeline import Loader, open_snapshot; manifest = open_snapshot({json.dumps(str(root))})"
        '.manifest("balanced"); images, labels = next(iter(Loader(manifest, batch_size=32))); print(labels)'
    )
    echo(f"\n{elapsed_s:.0f} s in all. Next, on the same ROOT:\n")
    echo(f"  evenshard stats {quoted} --split train      # the tail, class by class")
    echo(f"  evenshard stats {quoted} --rejects          # what was turned away, and why")
    echo(f"  evenshard manifests {quoted}                # draws, distinct images, largest repeat")
    echo(f"  evenshard manifest {quoted} square-root --policy power:alpha=0.5")
    echo(f"  python -c {shlex.quote(snippet)}")
