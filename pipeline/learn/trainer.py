"""A training from its recipe: stages one after the other, checkpoints between, scores after each.

    recipe --> [resume] --> for each stage: [reset head] --> epochs of steps --> [tau-norm] --> score --> checkpoint
                        |                                     |  every N steps, on SIGTERM: checkpoint
                        `-> model, summary, [predictions]

Comes in: a ``Recipe``; under torchrun, the ranks of its environment. Goes out: ``OUT`` with checkpoints, ``model.pt``,
``summary.json``, ``log.jsonl`` and, where asked for, ``predictions.parquet``; and the summary. Guarantees: any number
of ranks trains alike (batch normalisation apart: it sees the images of its rank); a training that was stopped or killed
goes on from its newest whole checkpoint, on any number of ranks, and every draw of its stages counts once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import AlreadyExistsError, EvenshardError, StateError, UsageError
from pipeline.learn import checkpoints, models, scoring
from pipeline.learn.ledger import LOG, Ledger, need_tensorboard
from pipeline.learn.objectives import objective
from pipeline.learn.predicting import PREDICTIONS, splits_of, write_predictions
from pipeline.learn.priors import step as prior_step
from pipeline.learn.priors import uniform
from pipeline.learn.ranks import Ranks, joined
from pipeline.learn.recipe import Recipe
from pipeline.learn.stepping import Batch, Stepper, draw_seed, head_seed
from pipeline.learn.stopping import Stop, stopping
from pipeline.learn.summing import MODEL, SUMMARY, StageResult, summary_of
from pipeline.snapshot import Manifest, open_snapshot
from pipeline.stream.augment import HarderRepeats
from pipeline.stream.loader import Loader
from pipeline.stream.transforms import RandomResizedCropFlip

LOOK_EVERY = {"cpu": 1, "cuda": 10}
"""Steps between looks at loss and signals: a GPU must be waited for to tell."""

BEFORE_NAMED = {"augment": "crop"}
"""What trainings were whose checkpoints do not name it yet."""

Echo = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What an observer is told after each step."""

    stage: int
    epoch: int
    number: int  # of the whole training, from 1
    loss: float  # of the global batch
    positions: Tensor  # int64 [B]: this rank's draws, by their place in the stage's sequence


Observe = Callable[[Step], Any]


@dataclass(kw_only=True)
class Progress:
    """Where a training stands; together with the parameters, all that a checkpoint holds."""

    stage: int = 0
    num_steps: int = 0
    num_lines: int = 0  # of the log
    loader: dict[str, Any] | None = None  # None: the stage was not begun
    optimizer: dict[str, Any] | None = None
    losses: list[float] = field(default_factory=list[float])  # of this stage's epochs so far
    loss_sum: float = 0.0  # of this epoch so far
    loss_count: int = 0
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of it: the summary as in ``summary.json``, and which rank this is."""

    summary: dict[str, Any]
    rank: int


def _quiet(text: str) -> None:
    del text


def train(recipe: Recipe, *, observe: Observe | None = None, echo: Echo = _quiet) -> Trained:
    """Train as ``recipe`` says. KeyboardInterrupt, with the name of a checkpoint, where a signal asked to stop."""
    models.check_model(recipe.model)
    if recipe.tensorboard:
        need_tensorboard()
    with joined(recipe.device) as ranks, stopping() as stop:
        training = _Training(recipe, ranks, stop, observe, echo if ranks.is_first else _quiet)
        with closing(training.ledger):
            return training.run()


class _Training:
    def __init__(self, recipe: Recipe, ranks: Ranks, stop: Stop, observe: Observe | None, echo: Echo) -> None:
        if recipe.batch_size % ranks.world_size:
            raise UsageError(
                f"batch_size {recipe.batch_size} counts all ranks together and must be a multiple of their number, "
                f"{ranks.world_size}"
            )
        self.recipe, self.ranks, self.stop, self.observe, self.echo = recipe, ranks, stop, observe, echo
        self.out = Path(recipe.out)
        state = ranks.told(self._prepare() if ranks.is_first else None)
        self.snapshot = open_snapshot(recipe.root, recipe.at or (state["snapshot"] if state else None))
        self.manifests = [self.snapshot.manifest(stage.manifest) for stage in recipe.stages]
        self.minimised = [
            objective(stage.loss or recipe.loss, manifest)
            for stage, manifest in zip(recipe.stages, self.manifests, strict=True)
        ]
        self.split = scoring.evaluation_split(self.snapshot, recipe.split)
        if recipe.predictions:
            splits_of(self.snapshot)
        self.num_classes = self.snapshot.record.num_classes
        self.model = models.make_model(recipe.model, self.num_classes, norm=recipe.norm, seed=recipe.seed)
        self._check_stages()
        self.progress = Progress()
        if state:
            self._restore(state)
        elif recipe.weights is not None:
            models.load_weights(self.model, recipe.weights, self.num_classes)
        self.model.to(ranks.device)
        self.ledger = Ledger(  # makes the folder: not before all that was named is there
            self.out if ranks.is_first else None,
            tensorboard=recipe.tensorboard,
            since_step=self.progress.num_steps,
            num_lines=self.progress.num_lines,
        )

    def run(self) -> Trained:
        """All stages that are left; the model, and the summary."""
        while self.progress.stage < len(self.recipe.stages):
            self._stage(self.progress.stage)
        summary = summary_of(self.recipe, self.snapshot, self.split, self.ranks, self.progress.results)
        if self.ranks.is_first:
            self._write(summary)
        if self.recipe.predictions:
            num = write_predictions(self.model, self.snapshot, self.recipe, self.ranks, self.out)
            self.echo(f"{PREDICTIONS}: the logits of {num:,} images")
        self.ranks.wait()  # so that what was written is there for all
        return Trained(summary=summary, rank=self.ranks.rank)

    def _check_stages(self) -> None:
        """What a stage lacks is told now, not when the stages before it are done."""
        recipe = self.recipe
        for stage, manifest in zip(recipe.stages, self.manifests, strict=True):
            if stage.uses_head:
                models.head_of(self.model, self.num_classes)
            if stage.epochs and manifest.num_draws < recipe.batch_size:
                raise EvenshardError(
                    f"stage {stage} draws {manifest.num_draws} images an epoch, fewer than batch_size "
                    f"{recipe.batch_size}: lower it, or use a manifest with higher targets"
                )
        moves_body = any(stage.epochs and not stage.freeze for stage in recipe.stages)
        models.check_size(self.model, recipe.side, recipe.batch_size // self.ranks.world_size, trains=moves_body)

    # -- checkpoints

    def _prepare(self) -> dict[str, Any] | None:
        """What the folder holds to go on from; AlreadyExistsError where it holds what nobody asked to go on with."""
        with checkpoints.writing_to(self.out):  # one may not even be allowed to look
            if self.out.exists() and not self.out.is_dir():
                raise AlreadyExistsError(f"{self.out} is a file: name another DIR")
            if not self.recipe.resume and self.out.is_dir() and any(self.out.iterdir()):
                what = "a training" if (self.out / LOG).exists() or checkpoints.checkpoints(self.out) else "other files"
                raise AlreadyExistsError(f"{self.out} holds {what}: go on with --resume, or name another DIR")
        if not self.recipe.resume:
            return None
        state = checkpoints.load_newest(self.out, self.echo)
        self.echo("no checkpoint yet: training starts" if state is None else "going on from a checkpoint")
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        wanted = self.recipe.fixed() | {"snapshot_id": self.snapshot.id}
        held = BEFORE_NAMED | state["fixed"]
        wrong = [
            f"{name} was {held.get(name)!r} and is {value!r} now"
            for name, value in wanted.items()
            if held.get(name) != value
        ]
        if wrong:
            raise StateError(
                f"{self.out} holds another training: {'; '.join(wrong)}. Resume it with what it was started with, or "
                "name another DIR"
            )
        self.model.load_state_dict(state["model"])
        self.progress = Progress(**state["progress"])

    def _save(self, loader: Loader | None, stepper: Stepper | None) -> str:
        """The name of the checkpoint of now; every rank has waited until it is there."""
        self.progress.num_lines = self.ledger.num_lines
        self.progress.loader = None if loader is None else loader.state_dict()
        self.progress.optimizer = None if stepper is None else stepper.optimizer.state_dict()
        name = ""
        if self.ranks.is_first:
            state = {
                "fixed": self.recipe.fixed() | {"snapshot_id": self.snapshot.id},
                "snapshot": self.snapshot.number,
                "model": self.model.state_dict(),
                "progress": asdict(self.progress),
            }
            name = checkpoints.save(self.out, self.progress.stage, self.progress.num_steps, state).name
        self.ranks.wait()
        return name

    def _write(self, summary: dict[str, Any]) -> None:
        last = self.progress.results[-1]
        holds = {
            "model": self.recipe.model,
            "norm": self.recipe.norm,
            "side": self.recipe.side,
            "classes": self.snapshot.classes.column("name").to_pylist(),
            "log_prior": last["log_prior"],
            "state_dict": self.model.state_dict(),
        }
        checkpoints.write_whole(self.out, lambda path: checkpoints.save_tensors(holds, path), lambda _: MODEL)
        text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
        checkpoints.write_whole(self.out, lambda path: _text(path, text), lambda _: SUMMARY)

    # -- a stage

    def _stage(self, index: int) -> None:
        stage, manifest = self.recipe.stages[index], self.manifests[index]
        head = models.head_of(self.model, self.num_classes) if stage.uses_head else None
        if stage.reset and head is not None and self.progress.loader is None:
            models.reset_head(head, head_seed(self.recipe.seed, index))
        minimised = self.minimised[index]
        if stage.epochs:
            moving = head if stage.freeze else None
            stepper = Stepper(self.model, moving, minimised.criterion, self.recipe, index, self.ranks)
            self._epochs(index, manifest, stepper)
        if stage.tau and head is not None:
            models.tau_normalise(head, stage.tau)
        self.ranks.as_first(self.model.buffers())
        log_prior = None if stage.tau else minimised.log_prior
        shift = None if log_prior is None else prior_step(log_prior, uniform(log_prior))
        scored = scoring.score(self.model, self.snapshot, self.split, shift, self.recipe, self.ranks)
        train_counts = self.snapshot.classes.column("train").to_numpy()
        result = StageResult.of(
            str(stage), self.progress.losses, self.progress.num_steps, log_prior, scored, train_counts
        )
        self._tell(result)
        progress = self.progress
        self.progress = Progress(
            stage=index + 1, num_steps=progress.num_steps, results=[*progress.results, result.to_json()]
        )
        self._save(None, None)

    def _tell(self, result: StageResult) -> None:
        told = result.scores["as_it_is"]
        self.ledger.write(self.progress.num_steps, result.stage, {f"{self.split}/{k}": v for k, v in told.items()})
        words = ", ".join(f"{name} {value:.1%}" for name, value in told.items() if isinstance(value, float))
        self.echo(f"{result.stage}: {self.split}: {words}")

    def _epochs(self, index: int, manifest: Manifest, stepper: Stepper) -> None:
        recipe, stage, ranks = self.recipe, self.recipe.stages[index], self.ranks
        crop = RandomResizedCropFlip(recipe.side)
        loader = Loader(
            manifest,
            recipe.batch_size // ranks.world_size,
            transform=HarderRepeats(crop) if recipe.augment == "harder-repeats" else crop,
            seed=draw_seed(recipe.seed, index),
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=recipe.workers,
            details=self.observe is not None,
            pin_memory=ranks.device.type == "cuda",
        )
        if self.progress.loader is not None and self.progress.optimizer is not None:
            loader.load_state_dict(self.progress.loader)
            stepper.optimizer.load_state_dict(self.progress.optimizer)
        # Where the last step of the last epoch ends: the learning rate is a function of the draws behind us.
        total = stage.epochs * manifest.num_draws
        while loader.epoch < stage.epochs:
            self._epoch(loader, stepper, index, total)
        self._save(loader, stepper)  # before the scores, which may take longer than a signal leaves

    def _epoch(self, loader: Loader, stepper: Stepper, index: int, total: int) -> None:
        epoch, progress, device = loader.epoch, self.progress, self.ranks.device
        begun_s, begun_step = time.monotonic(), progress.num_steps
        unread: list[Tensor] = []
        num_left = len(loader)
        for images, labels, *details in loader:
            done = (int(loader.state_dict()["consumed"]) - self.recipe.batch_size) / total
            loss = stepper.step(Batch(images=images, labels=labels), progress.num_steps, min(max(done, 0.0), 1.0))
            progress.num_steps += 1
            num_left -= 1
            flag = torch.tensor(float(self.stop.asked), device=device)
            unread.append(self.ranks.sum(torch.stack([loss.to(torch.float32), flag])))
            due = progress.num_steps % self.recipe.save_every == 0
            if due or not num_left or self.observe or progress.num_steps % LOOK_EVERY[device.type] == 0:
                last, stopped = self._look(unread)
                if self.observe:
                    at = details[0].positions
                    self.observe(Step(stage=index, epoch=epoch, number=progress.num_steps, loss=last, positions=at))
                if not num_left:  # before a checkpoint, from which the next epoch would go on
                    self._end_epoch(index, epoch, begun_s, begun_step)
                if stopped:
                    raise KeyboardInterrupt(self._save(loader, stepper))
                if due:
                    self._save(loader, stepper)

    def _look(self, unread: list[Tensor]) -> tuple[float, bool]:
        """The last loss, and whether any rank was asked to stop: the same on all of them."""
        read = torch.stack(unread).double().cpu()
        unread.clear()
        self.progress.loss_sum += float(read[:, 0].sum())
        self.progress.loss_count += len(read)
        if not bool(torch.isfinite(read).all()):
            raise EvenshardError(
                f"training diverged: the loss is {float(read[-1, 0])} at step {self.progress.num_steps}; lower --lr"
            )
        return float(read[-1, 0]), bool(read[:, 1].any())

    def _end_epoch(self, index: int, epoch: int, begun_s: float, begun_step: int) -> None:
        progress, stage = self.progress, self.recipe.stages[index]
        mean = progress.loss_sum / max(progress.loss_count, 1)
        progress.losses.append(mean)
        progress.loss_sum, progress.loss_count = 0.0, 0
        images = (progress.num_steps - begun_step) * self.recipe.batch_size
        per_s = images / max(time.monotonic() - begun_s, 1e-9)
        self.ledger.write(progress.num_steps, str(stage), {"loss": mean, "images_per_s": round(per_s, 1)})
        self.echo(f"{stage}: epoch {epoch + 1} of {stage.epochs}: loss {mean:.3f}, {per_s:,.0f} images/s")


def _text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")
