"""A small network, fitted to batches of a loader and asked for predictions.

In: any iterable with a length of ``(uint8 [B, 3, H, W], int64 [B])`` batches. Out: the model changed in place, the mean
loss of each epoch. Guarantees: pixels are normalised on the model's device; nothing is sampled or weighted here, so
what the model sees is decided by the loader alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import UsageError


class Batches(Protocol):
    """What ``fit`` needs of a loader: each ``iter`` is one epoch."""

    def __iter__(self) -> Iterator[tuple[Any, ...]]: ...
    def __len__(self) -> int: ...


def small_cnn(num_classes: int, *, width: int = 32, seed: int = 0) -> nn.Sequential:
    """Four convolutions with batch normalisation, mean pooling and a linear head; made for 64-pixel images on a CPU.

    The initial weights are a function of ``seed`` and leave torch's global generator as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *_convolution(3, width, stride=2),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),
            *_convolution(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        ).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def normalise(images: Tensor, device: torch.device) -> Tensor:
    """Uint8 pixels become floats of about mean 0 and deviation 1, on ``device``."""
    return images.to(device).to(torch.float32, memory_format=torch.channels_last).sub_(127.5).div_(64.0)


def fit(
    model: nn.Module,
    loader: Batches,
    *,
    epochs: int,
    lr: float,
    label_smoothing: float = 0.0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train with SGD and a cosine learning rate; returns the mean loss of each epoch.

    ``lr`` is the peak; the rate rises over the first tenth and ends near zero. Only parameters that require gradients
    move. ``on_epoch(epoch, loss)`` is called after each epoch.
    """
    device = next(model.parameters()).device
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    losses: list[float] = []
    model.train()
    for epoch in range(epochs):
        total, num_images = 0.0, 0
        num_steps = len(loader)
        for step, (images, labels, *_) in enumerate(loader):
            _set_rate(optimizer, lr * rate_at((epoch + step / num_steps) / epochs))
            loss = criterion(model(normalise(images, device)), labels.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(labels)
            num_images += len(labels)
        losses.append(total / num_images)
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
    return losses


def rate_at(progress: float, warmup: float = 0.1) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1]: a linear rise, then half a cosine."""
    if progress < warmup:
        return (progress + 0.01) / (warmup + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Predictions and labels, int64 ``[N]``, of every image that its batch's mask keeps; without a mask, of all."""
    device = next(model.parameters()).device
    predictions: list[Tensor] = []
    labels: list[Tensor] = []
    model.eval()
    for images, truth, *mask in batches:
        keep = mask[0].bool() if mask else torch.ones(len(truth), dtype=torch.bool)
        predictions.append(model(normalise(images, device)).argmax(1).cpu()[keep])
        labels.append(truth[keep])
    if not labels:
        raise UsageError("nothing to evaluate: the loader gave no batch")
    return torch.cat(predictions).numpy(), torch.cat(labels).numpy()
