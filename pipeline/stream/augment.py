"""Stronger augmentation for repeats: what is seen again should not look the same.

Comes in: a decoded image and its ``Draw``. Goes out: pixels of one batch row. Guarantees: those of the other transforms
(the result depends on image and draw alone); the first time an image is drawn, nothing is added to the usual crop.

A balanced epoch shows the only image of a class hundreds of times, always the same pixels but for crop and flip; images
of large classes are seen once. So the strength follows the number of earlier draws of the very image, not the class.
The operations and their bounds are RandAugment's (Cubuk et al., 2020), without those that need a palette.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchvision.transforms.v2 import functional

from pipeline.errors import UsageError
from pipeline.stream.transforms import Draw, RandomResizedCropFlip

_UNIFORMS = 3  # of one operation: which, how strong, which way


def _turned(
    image: torch.Tensor, *, angle: float = 0.0, shift: tuple[int, int] = (0, 0), shear: float = 0.0
) -> torch.Tensor:
    fill = [float(image.float().mean())]
    return functional.affine(image, angle, list(shift), 1.0, [math.degrees(math.atan(shear)), 0.0], fill=fill)


def _shift_x(image: torch.Tensor, amount: float) -> torch.Tensor:
    return _turned(image, shift=(round(0.45 * amount * image.shape[-1]), 0))


def _shift_y(image: torch.Tensor, amount: float) -> torch.Tensor:
    return _turned(image, shift=(0, round(0.45 * amount * image.shape[-2])))


# Each takes uint8 [C, H, W] and an amount in [-1, 1]; 0 changes nothing.
OPERATIONS: tuple[Callable[[torch.Tensor, float], torch.Tensor], ...] = (
    lambda image, amount: functional.adjust_brightness(image, 1 + 0.9 * amount),
    lambda image, amount: functional.adjust_contrast(image, 1 + 0.9 * amount),
    lambda image, amount: functional.adjust_saturation(image, 1 + 0.9 * amount) if len(image) == 3 else image,
    lambda image, amount: functional.adjust_sharpness(image, 1 + 0.9 * amount),
    lambda image, amount: _turned(image, angle=30.0 * amount),
    lambda image, amount: _turned(image, shear=0.3 * amount),
    _shift_x,
    _shift_y,
)


@dataclass(frozen=True)
class HarderRepeats:
    """``crop``, then ``num_operations`` random changes whose strength grows with how often the image was drawn before.

    Strength is ``magnitude * log(1 + repeat) / log(1 + full_at)``, at most ``magnitude``: half of it is reached after a
    few repeats, all of it at ``full_at``. Bounds at strength 1: 30 degrees, shear 0.3, 45 % of the side, factors 0.1 to
    1.9; RandAugment's usual magnitude is 0.3 of them. The loader decodes whole images for it (as with
    ``quality="exact"``), which takes about three times as long. Errors: ``UsageError`` for counts below 1, and a
    magnitude that is not above 0 and at most 1.
    """

    crop: RandomResizedCropFlip
    num_operations: int = 2
    full_at: int = 20
    magnitude: float = 0.3

    def __post_init__(self) -> None:
        if self.num_operations < 1 or self.full_at < 1:
            raise UsageError(
                f"num_operations and full_at must be at least 1, found {self.num_operations} and {self.full_at}"
            )
        if not 0 < self.magnitude <= 1:
            raise UsageError(f"magnitude must be above 0 and at most 1, found {self.magnitude}")

    def strength(self, repeat: int) -> float:
        """In [0, ``magnitude``]: 0 for the first time an image is drawn (``repeat`` 0)."""
        return self.magnitude * min(1.0, math.log1p(repeat) / math.log1p(self.full_at))

    def __call__(self, image: torch.Tensor, draw: Draw) -> torch.Tensor:
        return self.change(self.crop(image, draw), draw)

    def change(self, made: torch.Tensor, draw: Draw) -> torch.Tensor:
        """What follows the crop: uint8 ``[C, H, W]`` to the same shape; unchanged for the first draw of an image."""
        strength = self.strength(draw.repeat)
        if strength == 0.0:
            return made
        # Numbers behind those of the crop: the first ones are the same however many are asked for.
        numbers = draw.uniform(self.crop.num_uniform + _UNIFORMS * self.num_operations)[self.crop.num_uniform :]
        for which, how, way in numbers.reshape(-1, _UNIFORMS).tolist():
            amount = strength * (0.5 + 0.5 * how)
            made = OPERATIONS[int(which * len(OPERATIONS))](made, amount if way < 0.5 else -amount)
        return made
