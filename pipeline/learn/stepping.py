"""One step of a training: pixels to logits to gradients to parameters, and the optimiser of a stage.

Comes in: a batch of this rank. Goes out: the loss of the global batch, on the device. Guarantees: gradients are those
of a mean over the global batch; what is random in a network is a function of (seed, stage, step, rank), so that a
resumed training goes on exactly and no generator needs to be saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.keyed import derive, seed_key
from pipeline.learn.ranks import Ranks
from pipeline.learn.recipe import Precision, Recipe, Stage
from pipeline.learn.train import rate_at

_NETWORK, _DRAWS, _HEAD = 11, 12, 13  # purposes of keys; those of draws lie below 10
_MEAN, _DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, which torchvision's weights know


def draw_seed(seed: int, stage: int) -> int:
    """The seed of a stage's loader: two stages on one manifest must not repeat each other's draws."""
    return seed if not stage else derive(seed_key(seed), _DRAWS, stage) >> 33


def head_seed(seed: int, stage: int) -> int:
    """The seed of a head that starts anew in ``stage``."""
    return derive(seed_key(seed), _HEAD, stage) >> 33


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a rank sees in one step."""

    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B]


class Stepper:
    """A network, its optimiser and its criterion, for one stage."""

    def __init__(
        self, model: nn.Module, head: nn.Linear | None, criterion: nn.Module, recipe: Recipe, index: int, ranks: Ranks
    ) -> None:
        """``head``: the only part that moves; None: everything does."""
        stage: Stage = recipe.stages[index]
        self._model, self._head, self._ranks = model, head, ranks
        self._criterion = criterion.to(ranks.device)
        self._lr = stage.lr or recipe.lr
        self._key = derive(seed_key(recipe.seed), _NETWORK, index)
        self._bf16 = uses_bf16(recipe.precision, ranks.device)
        moving = set((head or model).parameters())
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in moving)
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter in moving],
            lr=self._lr,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )
        self._network: nn.Module = model
        if ranks.world_size > 1:
            self._network = DistributedDataParallel(
                model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None
            )
        self._set_modes()

    def step(self, batch: Batch, number: int, progress: float) -> Tensor:
        """Move the parameters once; float32 scalar, this rank's share: summed over ranks it is the global loss.

        ``number`` counts the steps of the stage, ``progress`` in [0, 1) is where it stands.
        """
        device = self._ranks.device
        torch.manual_seed(derive(self._key, number, self._ranks.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * rate_at(progress)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
            logits = logits_of(self._network(pixels(batch.images, device)))
        loss: Tensor = self._criterion(logits, batch.labels.to(device, non_blocking=True))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        self.optimizer.step()
        return loss.detach() / self._ranks.world_size

    def _set_modes(self) -> None:
        """A frozen body keeps its running means, too."""
        if self._head is None:
            self._model.train()
        else:
            self._model.eval()
            self._head.train()


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """``auto`` is bf16 on a GPU that has it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def pixels(images: Tensor, device: torch.device) -> Tensor:
    """uint8 ``[B, C, H, W]`` to float32 on ``device``, channels last, normalised as torchvision's weights want it."""
    moved = images.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
    return moved.sub_(mean).div_(deviation)


def logits_of(output: Any) -> Tensor:
    """Networks with auxiliary heads return a tuple that has the logits by name."""
    return output if isinstance(output, Tensor) else output.logits
