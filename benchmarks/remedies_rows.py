"""The rows of `remedies.py`: which manifests a remedy draws from, with which loss, and how it predicts.

Of one seed all rows share the set, the initial network, the number of draws, and the shift and flip of draw number i.
Rows that begin alike are trained once and part where they differ: the same numbers, in less time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from remedies_sets import Held, generator
from torch import nn

from pipeline.keyed import derive, keyed_hash, seed_key, text_key
from pipeline.learn.losses import CrossEntropy
from pipeline.learn.metrics import balanced_accuracy, per_class_recall
from pipeline.learn.priors import carried, step, uniform
from pipeline.learn.scores import log_softmax
from pipeline.learn.train import normalise, rate_at, small_cnn
from pipeline.plan.epoch import EpochFunction
from pipeline.plan.shots import GROUPS, group_of
from pipeline.stream.augment import HarderRepeats
from pipeline.stream.batches import Rows
from pipeline.stream.transforms import RandomResizedCropFlip

BATCH = 64
MARGIN = 3  # pixels that a training image may be shifted by


@dataclass(frozen=True)
class Stage:
    """A share of the draws. ``loss``: ``plain``, ``log_q`` as an offset, or a kind of class weights."""

    manifest: str
    share: float = 1.0
    loss: str = "plain"
    lr: float = 0.1
    head_only: bool = False  # a fresh head on a network that stays: cRT
    harder: str = ""  # "repeats": HarderRepeats; "all": its full strength for every draw, to tell the two apart


@dataclass(frozen=True)
class Row:
    """One remedy. ``predict``: logits ``as they are``, moved to a ``uniform`` prior, or with a ``tau-norm`` head."""

    name: str
    stages: tuple[Stage, ...]
    predict: str = "as they are"
    tau: float = 1.0  # of tau-norm


_NATURAL = (Stage("natural"),)
_ROOT = (Stage("square-root"),)
_FIRST = Stage("natural", 0.8)

ROWS = (
    Row("natural, cross-entropy", _NATURAL),
    Row("oversampled: `balanced` from the first step", (Stage("balanced"),)),
    Row("undersampled to 20 of a class, others each epoch", (Stage("undersampled-20"),)),
    Row("undersampled to 20 of a class, always the same", (Stage("undersampled-20-frozen"),)),
    Row("weights 1/n from the first step", (Stage("natural", loss="balanced"),)),
    Row("weights by effective number, from the first step", (Stage("natural", loss="effective_number"),)),
    Row("weights 1/n deferred to the last fifth", (_FIRST, Stage("natural", 0.2, "balanced", 0.01))),
    Row("square-root draws", _ROOT),
    Row("square-root draws, corrected afterwards by `log_q`", _ROOT, "uniform"),
    Row("square-root draws, `log_q` in the loss", (Stage("square-root", loss="log_q"),)),
    Row("balanced softmax on `natural`", (Stage("natural", loss="log_q"),)),
    Row("two-stage: `natural`, then all weights on `balanced`", (_FIRST, Stage("balanced", 0.2))),
    Row(
        "two-stage: `natural`, then a new head on `balanced` (cRT)",
        (_FIRST, Stage("balanced", 0.2, lr=0.3, head_only=True)),
    ),
    Row("natural, corrected afterwards by its prior", _NATURAL, "uniform"),
    Row("natural, tau-norm head (tau 1)", _NATURAL, "tau-norm"),
    Row("natural, tau-norm head (tau 0.5)", _NATURAL, "tau-norm", tau=0.5),
    Row("oversampled, repeats augmented harder", (Stage("balanced", harder="repeats"),)),
    Row("balanced softmax, repeats augmented harder", (Stage("natural", loss="log_q", harder="repeats"),)),
    Row("balanced softmax, every draw augmented harder", (Stage("natural", loss="log_q", harder="all"),)),
)

FIGURES = ("balanced", *GROUPS, "at natural prior", "corrected to it")
"""In [0, 1]: mean recall over all classes, and over many-, medium-, few- and one-shot ones; accuracy where classes are
as frequent as in train, by the row's predictions and by its logits moved to that prior (NaN where they carry none)."""


def run_rows(held: Held, seed: int, num_steps: int, rows: tuple[Row, ...] = ROWS) -> Iterator[tuple[Row, list[float]]]:
    """Each row with its ``FIGURES``, in order; a step is ``BATCH`` draws."""
    trained: dict[tuple[Stage, ...], nn.Sequential] = {}
    for row in rows:
        for end in range(1, len(row.stages) + 1):
            if row.stages[:end] not in trained:
                before = trained[row.stages[: end - 1]] if end > 1 else small_cnn(len(held.counts), width=16, seed=seed)
                trained[row.stages[:end]] = _train(before, held, row.stages[:end], seed, num_steps)
        yield row, _figures(row, trained[row.stages], held)


# -- training ----------------------------------------------------------------------------------------------------------


def spans(stages: tuple[Stage, ...], num_steps: int) -> list[int]:
    """Steps of each stage: their shares, the last one taking what is left."""
    steps = [round(stage.share * num_steps) for stage in stages[:-1]]
    return [*steps, round(sum(stage.share for stage in stages) * num_steps) - sum(steps)]


def drawn_rows(held: Held, manifest: str, seed: int, num_draws: int) -> Rows:
    """The draws that a ``Loader`` of this seed reads first."""
    chosen = held.manifests[manifest]
    plan = EpochFunction(chosen.pool, chosen.targets, seed)
    draws = plan.draws(0, num_draws)
    ordinal, repeat = plan.images(draws.class_id, draws.draw)
    return Rows(
        row=held.class_starts[draws.class_id] + ordinal,
        class_id=draws.class_id,
        position=np.arange(num_draws),
        repeat=repeat,
        key=keyed_hash(keyed_hash(derive(seed_key(seed), text_key("augment")), draws.class_id), draws.draw),
    )


def _train(before: nn.Sequential, held: Held, stages: tuple[Stage, ...], seed: int, num_steps: int) -> nn.Sequential:
    """A copy of ``before``, trained through the last of ``stages``."""
    model, stage = copy.deepcopy(before), stages[-1]
    *earlier, mine = spans(stages, num_steps)
    drawn = drawn_rows(held, stage.manifest, seed, mine * BATCH)
    rows = torch.from_numpy(drawn.row).view(mine, BATCH)
    labels = torch.from_numpy(np.repeat(np.arange(len(held.counts)), held.counts))
    model.train()
    if stage.head_only:
        _renew_head(model, seed)
        model.requires_grad_(False).eval()  # batch statistics stay those of the first stage
        model[-1].requires_grad_(True)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=stage.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    criterion = CrossEntropy(*vectors(held, stage))
    pixels = nn.functional.pad(held.train, (0, 0, MARGIN, MARGIN, MARGIN, MARGIN), value=128)
    for i in range(mine):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * rate_at(i / mine)
        images = _augmented(pixels, rows[i], held.side, (seed, sum(earlier) + i))
        if stage.harder:
            images = _harder(images, drawn.part(i * BATCH, (i + 1) * BATCH), stage.harder)
        logits = model(normalise(images, torch.device("cpu")))
        loss = criterion(logits, labels[rows[i]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.requires_grad_(True)


def vectors(held: Held, stage: Stage) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Class weights and logit offset of a stage's loss, float64 [K] each."""
    manifest = held.manifests[stage.manifest]
    none = np.zeros(len(held.counts))
    offset = manifest.log_q if stage.loss == "log_q" else none
    weight = none + 1 if stage.loss in ("plain", "log_q") else manifest.weights(stage.loss)
    return weight, offset


def _renew_head(model: nn.Sequential, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model[-1].reset_parameters()


def _augmented(pixels: torch.Tensor, rows: torch.Tensor, side: int, draw: tuple[int, int]) -> torch.Tensor:
    """uint8 [B, 3, H, W]: shifted by up to MARGIN, half of them mirrored; the same for a draw number in every row."""
    seed, number = draw
    rng = generator(seed, "augment", number)
    top, left = torch.from_numpy(rng.integers(0, 2 * MARGIN + 1, (2, len(rows), 1)))
    along = torch.arange(side)
    mirrored = torch.from_numpy(rng.random((len(rows), 1)) < 0.5)
    y, x = top + along, left + torch.where(mirrored, side - 1 - along, along)
    return pixels[rows[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def _harder(images: torch.Tensor, drawn: Rows, which: str) -> torch.Tensor:
    """uint8 [B, 3, H, W]: as ``HarderRepeats`` changes what its crop has made."""
    harder = HarderRepeats(RandomResizedCropFlip(images.shape[-1]))
    draws = drawn.draws() if which == "repeats" else (replace(draw, repeat=harder.full_at) for draw in drawn.draws())
    return torch.stack([harder.change(image, draw) for image, draw in zip(images, draws, strict=True)])


# -- measuring ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _figures(row: Row, model: nn.Sequential, held: Held) -> list[float]:
    model = copy.deepcopy(model).eval()
    if row.predict == "tau-norm":
        head = model[-1]
        head.weight /= head.weight.norm(dim=1, keepdim=True) ** row.tau
        head.bias.zero_()
    batches = held.test.permute(0, 3, 1, 2).split(500)
    logits = torch.cat([model(normalise(batch, torch.device("cpu"))) for batch in batches]).double().numpy()
    if not np.isfinite(logits).all():
        raise FloatingPointError(f"training of {row.name!r} diverged")
    natural, prior = held.manifests["natural"].log_prior, carried_prior(row, held)
    if row.predict == "uniform":
        logits = logits + step(prior, uniform(prior))
        prior = uniform(prior)
    shares = np.exp(natural)
    recall = _recall(logits, held)
    as_deployed = np.full(len(shares), np.nan) if prior is None else _recall(logits + step(prior, natural), held)
    group = group_of(held.counts)
    means = [balanced_accuracy(recall[group == place]) for place in range(len(GROUPS))]
    return [balanced_accuracy(recall), *means, float(shares @ recall), float(shares @ as_deployed)]


def carried_prior(row: Row, held: Held) -> NDArray[np.float64] | None:
    """float64 [K]: the log prior that the last stage leaves in the logits; None after tau-norm, which loses it."""
    if row.predict == "tau-norm":
        return None
    weight, offset = vectors(held, row.stages[-1])
    return carried(held.manifests[row.stages[-1].manifest].log_q, weight, offset)


def _recall(logits: NDArray[np.float64], held: Held) -> NDArray[np.float64]:
    return per_class_recall(held.test_labels, log_softmax(logits).argmax(1), len(held.counts))
