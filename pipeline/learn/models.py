"""Models of torchvision with a head for these classes; the head by itself; group normalisation in place of batch's.

Comes in: a name, the number of classes. Goes out: a network of logits ``[B, K]``. Guarantees: initial weights are a
function of the seed and leave torch's global generator as it was; nothing is downloaded: weights come from a local file
or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.errors import NotFoundError, StoreError, UsageError
from pipeline.learn.recipe import Norm
from pipeline.learn.train import small_cnn
from pipeline.plan.spelling import nearest

SMALL = "small_cnn"
_MAX_GROUPS = 32  # Wu and He, ECCV 2018
_NO_AUXILIARY = ("googlenet", "inception_v3")


def model_names() -> list[str]:
    """``small_cnn``, made for small images on a CPU, and torchvision's classifiers."""
    return [SMALL, *torchvision.models.list_models(module=torchvision.models)]


def check_model(name: str) -> str:
    """``name``, if there is a model of that name."""
    if name not in (known := model_names()):
        raise UsageError(
            f"no model {name!r}{nearest(name, known)}; there are {SMALL} and the {len(known) - 1} classifiers of "
            "torchvision, such as resnet18, resnet50, convnext_tiny, vit_b_16"
        )
    return name


def make_model(name: str, num_classes: int, *, norm: Norm = "batch", seed: int = 0) -> nn.Module:
    """A network with fresh weights, in channels-last format."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if check_model(name) == SMALL:
            model: nn.Module = small_cnn(num_classes, width=16, seed=seed)
        else:
            extra: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name in _NO_AUXILIARY else {}
            model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
        if norm == "group":
            replace_batch_norm(model)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def check_size(model: nn.Module, side: int, batch_size: int, *, trains: bool = True) -> None:
    """UsageError where ``model`` cannot take so many images of that size, in training mode or not.

    Nothing is computed or changed: parameters and images are replaced by torch's meta tensors, which have shapes alone.
    """
    shapes = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    images = torch.empty(batch_size, 3, side, side, device="meta")
    try:
        with torch.no_grad():
            functional_call(model.train(trains), shapes, (images,))
    except (RuntimeError, ValueError, AssertionError) as error:  # each model has its own way
        raise UsageError(
            f"{type(model).__name__} cannot {'train on' if trains else 'take'} {batch_size} images of {side} pixels a "
            f"rank: {_first_line(error)}; give --side as the model wants it, or a larger --batch-size"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def replace_batch_norm(model: nn.Module) -> None:
    """Every BatchNorm2d becomes a GroupNorm over the same channels: what a rank computes then depends on its own images
    alone, so that any number of ranks trains alike."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            groups = math.gcd(_MAX_GROUPS, child.num_features)
            setattr(model, name, nn.GroupNorm(groups, child.num_features))
        else:
            replace_batch_norm(child)


def head_of(model: nn.Module, num_classes: int) -> nn.Linear:
    """The last linear layer, which has a row for each class."""
    heads = _linear_layers(model)
    if not heads or heads[-1].out_features != num_classes:
        raise UsageError(
            f"this model does not end in a linear layer of {num_classes} rows: freeze, reset, crt and tau have no head "
            "to work on; choose another model, such as resnet18"
        )
    return heads[-1]


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def reset_head(head: nn.Linear, seed: int) -> None:
    """Fresh weights, a function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = nn.Linear(head.in_features, head.out_features, bias=cast("Tensor | None", head.bias) is not None)
    head.load_state_dict(fresh.state_dict())


@torch.no_grad()
def tau_normalise(head: nn.Linear, tau: float) -> None:
    """Each class's row is divided by its norm to the power ``tau``, and so is no longer longer for being frequent.

    Kang et al., ICLR 2020, section 4.3, who have no bias: it is set to 0. A row of zeros stays.
    """
    norms = head.weight.norm(dim=1, keepdim=True)
    head.weight.div_(torch.where(norms > 0, norms, torch.ones_like(norms)) ** tau)
    bias = cast("Tensor | None", head.bias)
    if bias is not None:
        bias.zero_()


def load_weights(model: nn.Module, file: str | Path, num_classes: int) -> None:
    """Take the tensors of ``file`` (a state dict, or what holds one as ``state_dict`` or ``model``) that fit.

    The head of other classes is left out. UsageError where anything else is missing or has another shape.
    """
    given = _read_weights(Path(file))
    wanted = model.state_dict()
    last = _linear_layers(model)[-1:]  # the head, where the model has one
    own = {name for name, module in model.named_modules() if module in last and module.out_features == num_classes}
    heads = {f"{name}.{part}" for name in own for part in ("weight", "bias")}
    missing = sorted(name for name in wanted.keys() - heads if name not in given)
    shapes = {name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape}
    wrong = sorted(shapes - heads)
    if missing or wrong:
        what = f"it lacks {missing[:3]}" if missing else f"other shapes of {wrong[:3]}"
        raise UsageError(f"{file} holds no weights of this model: {what}; name the model (and --norm) it was made for")
    model.load_state_dict({**wanted, **{n: t for n, t in given.items() if n in wanted and n not in shapes}})


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise NotFoundError(
            f"no file of weights at {str(file)!r}; weights are read from a local file, never downloaded"
        )
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile: torch has no type of its own for it
        what = _first_line(error)
        if "Weights only" in what:  # torch goes on to advise that it be run
            what = "it holds more than tensors, and code of a file is never run: save the model's state_dict() instead"
        raise StoreError(f"{file} cannot be read as weights: {what}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = dict(_tensors(found))
    if not tensors:
        raise StoreError(f"{file} holds no tensors: expected a state dict of a model")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _tensors(found: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(found, dict):
        for name, value in cast("dict[Any, Any]", found).items():
            if isinstance(name, str) and isinstance(value, Tensor):
                yield name, value
