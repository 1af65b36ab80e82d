"""What a training is: its stages, loss, model and optimiser. Numbers and names only; checked before anything is opened.

Comes in: options, and stages spelled ``MANIFEST:EPOCHS[:option[=value]...]``. Goes out: a frozen ``Recipe``.
Guarantees: what is wrong by itself is a UsageError that says what was meant; no torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from pipeline.errors import UsageError
from pipeline.plan.manifest import check_name
from pipeline.plan.spelling import nearest

LOSSES: Mapping[str, str] = {
    "cross-entropy": "every draw counts alike",
    "balanced-softmax": "the log-prior of the draws is added to the logits in the loss",
    "weighted": "draws weigh 1/n_c",
    "effective-number": "draws weigh (1 - beta) / (1 - beta^n_c)",
    "square-root": "draws weigh 1/sqrt(n_c)",
    "residual": "draws weigh 1/T_c: what these draws still lack to be balanced",
    "focal": "easy draws count less; sigmoids, whose prior is not known",
    "auc": "cross-entropy, and each pair of a rare class's image and another that is not ranked right; prior not known",
    "kappa": "1 - Cohen's kappa of the batch; prior not known",
    "quadratic-kappa": "the same for classes in an order: an error counts by its distance squared; prior not known",
}
"""The losses that ``--loss`` and a stage's ``loss=`` name; ``objectives`` makes them."""

Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
Norm = Literal["batch", "group"]
Augment = Literal["crop", "harder-repeats"]
"""A random crop, mirrored or not; or that, and the k-th repeat of an image within its stage changes ever more."""


def check_loss(name: str) -> str:
    """``name``, if there is a loss of that name."""
    if name not in LOSSES:
        raise UsageError(f"no loss {name!r}{nearest(name, LOSSES)}; losses: {', '.join(LOSSES)}")
    return name


# -- a stage ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some epochs on the draws of one manifest."""

    manifest: str
    epochs: int
    loss: str = ""  # empty: that of the training
    lr: float = 0.0  # peak learning rate; 0: that of the training
    freeze: bool = False  # only the head moves
    reset: bool = False  # the head starts anew; with freeze, cRT of Kang et al., ICLR 2020
    tau: float = 0.0  # at the end each class's row of the head is divided by its norm to this power; ibid.

    def __post_init__(self) -> None:
        check_name(self.manifest)
        if self.loss:
            check_loss(self.loss)
        if self.epochs < 0 or not (math.isfinite(self.lr) and self.lr >= 0) or not 0 <= self.tau <= 1:
            raise UsageError(
                f"stage {self.manifest}: epochs must be 0 or more, lr above 0, tau from 0 to 1; found {self}"
            )
        if not self.epochs and not self.tau:
            raise UsageError(f"stage {self.manifest}:0 does nothing: give it epochs, or tau=0.5 to rescale the head")

    @property
    def uses_head(self) -> bool:
        """Whether it needs to know which part of the network the head is."""
        return self.freeze or self.reset or self.tau > 0

    def __str__(self) -> str:
        default = {field.name: field.default for field in fields(self)}
        given = {name: value for name, value in asdict(self).items() if value != default[name]}
        options = (f":{name}" if given[name] is True else f":{name}={given[name]}" for name in list(given)[2:])
        return f"{self.manifest}:{self.epochs}{''.join(options)}"


def _yes(text: str) -> bool:
    known = {"": True, "yes": True, "true": True, "no": False, "false": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def _positive(text: str) -> float:
    if not (math.isfinite(value := float(text)) and value > 0):
        raise ValueError(text)
    return value


_OPTIONS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "loss": (check_loss, "a loss"),
    "lr": (_positive, "a number above 0"),
    "freeze": (_yes, "nothing, yes or no"),
    "reset": (_yes, "nothing, yes or no"),
    "crt": (_yes, "nothing, yes or no"),
    "tau": (_positive, "a number above 0, at most 1"),
}


def parse_stages(texts: Sequence[str]) -> tuple[Stage, ...]:
    """Stages in their order; one text may hold several, as ``evenshard schedule`` prints them: ``a:20 -> b:5``."""
    stages = tuple(_parse(part.strip()) for text in texts for part in text.split("->"))
    if not stages:
        raise UsageError("a training needs a stage: MANIFEST:EPOCHS, for example natural:20")
    return stages


def _parse(text: str) -> Stage:
    manifest, _, rest = text.partition(":")
    epochs, *options = rest.split(":")
    if not epochs.isascii() or not epochs.isdigit():
        raise UsageError(
            f"stage {text!r}: expected MANIFEST:EPOCHS[:option=value...], for example natural:20 or "
            "balanced:5:freeze:lr=0.01"
        )
    values: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in _OPTIONS:
            raise UsageError(
                f"stage {text!r} has no option {name!r}{nearest(name, _OPTIONS)}; options: {', '.join(_OPTIONS)}"
            )
        read, expected = _OPTIONS[name]
        try:
            values[name] = read(value)
        except UsageError:
            raise
        except ValueError:
            raise UsageError(f"stage {text!r}: {name} takes {expected}, not {value!r}") from None
    if values.pop("crt", False):
        values |= {"freeze": True, "reset": True}
    return Stage(manifest=manifest, epochs=int(epochs), **values)


# -- a training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training. The number of ranks is no part of it: ``batch_size`` counts all of them together."""

    root: str
    out: str
    stages: tuple[Stage, ...]
    at: int | None = None
    loss: str = "cross-entropy"
    model: str = "resnet18"
    weights: str | None = None  # a local file
    norm: Norm = "batch"
    side: int = 224  # pixels of the images that the model sees
    augment: Augment = "crop"
    batch_size: int = 64
    lr: float = 0.1  # SGD's, at its peak
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    split: str | None = None  # evaluated on: val where it has images, else test
    precision: Precision = "auto"  # bf16 on GPUs, fp32 elsewhere
    device: Device = "auto"
    workers: int = 2
    save_every: int = 500  # steps
    resume: bool = False
    tensorboard: bool = False
    predictions: bool = False  # at the end, of val and test

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if not self.stages:
            raise UsageError("a training needs a stage: MANIFEST:EPOCHS, for example natural:20")
        _check_place_and_seed(self.out, self.seed)
        for name in ("side", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.workers < 0:
            raise UsageError(f"workers must be 0 or more, not {self.workers}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"lr must be above 0, not {self.lr}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum must be from 0 to below 1, not {self.momentum}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"weight_decay must be 0 or more, not {self.weight_decay}")
        for name, kind in (("precision", Precision), ("device", Device), ("norm", Norm), ("augment", Augment)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")

    def fixed(self) -> dict[str, Any]:
        """What a resumed training must agree on, as JSON. Batch size, ranks, precision and device may change."""
        names = ("loss", "model", "norm", "side", "augment", "lr", "momentum", "weight_decay", "seed")
        return {"stages": [str(stage) for stage in self.stages], **{name: getattr(self, name) for name in names}}


def _check_place_and_seed(out: str, seed: int) -> None:
    if "://" in out:
        raise UsageError(f"out must be a folder of this machine, not {out!r}: copy it there afterwards")
    if not -(2**63) <= seed < 2**63:
        raise UsageError(f"seed must be a number of 64 bits, not {seed}")
