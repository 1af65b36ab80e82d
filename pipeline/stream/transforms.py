"""Pixels of one image to pixels of one batch row, with randomness that belongs to the draw and to nothing else.

Comes in: a decoded image (uint8 tensor ``[C, H, W]``) and its ``Draw``. Goes out: a tensor ``[C, H, W]``. Guarantees:
the result depends on (image, draw) alone, so it is the same in any thread, on any rank, and after any resume.

The two transforms here know their crop before anything is decoded (`plan`). With ``quality="fast"``, the default, the
loader decodes and scales that crop alone, straight into its batch. ``quality="exact"`` is torchvision's antialiased
arithmetic on Pillow's pixels, at about a third of the speed. Both show the same crops; the pixels of photographs differ
by 1 of 255 on average at 224 pixels, by more where they shrink further (`decode_crop`). Called with pixels, both are
exact, as nothing is left to decode; so is the loader where simplejpeg and OpenCV (of the train extra) are missing.

A transform is any callable of one of two shapes, told apart once, when the loader is made:

    transform(image, draw)   takes its randomness from ``draw.key``; the fast way
    transform(image)         such as torchvision.transforms.v2. While it runs, torch's random functions are handed a
                             private generator seeded by the draw: the global one is neither read nor moved, so
                             training code that draws from it at the same moment disturbs nothing and is not disturbed.
                             Costs about 0.2 ms an image. Python's ``random`` and numpy's global generator are beyond
                             its reach: a transform that uses those should take ``draw`` and seed its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2 import functional

from pipeline.errors import UsageError
from pipeline.images import Crop, can_decode_crops
from pipeline.keyed import keyed_hash

Transform = Callable[..., torch.Tensor]
"""``transform(image)`` or ``transform(image, draw)``."""

KeyedTransform = Callable[[torch.Tensor, "Draw"], torch.Tensor]

Quality = Literal["fast", "exact"]

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop: then the largest central crop within the ratio bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One emission of a sample, as a transform sees it."""

    position: int  # place in the endless sequence
    class_id: int
    repeat: int  # how often this image was drawn before: augment repeats harder
    key: int  # 64 random bits, keyed by (seed, class, draw)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """``count`` numbers in [0, 1), fixed by the key; 53 bits each."""
        return uniforms(np.array([self.key], dtype=np.uint64), count)[0]


def uniforms(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """float64 [n, count]: ``Draw.uniform(count)`` of the draws with these keys, at the cost of one."""
    bits = keyed_hash(keys[:, None], np.arange(count, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Planned(Protocol):
    """A transform that is one crop, known from the image's size and ``num_uniform`` random numbers."""

    @property
    def size(self) -> int:
        """Height and width of what it makes."""
        ...

    @property
    def num_uniform(self) -> int:
        """How many numbers in [0, 1) its plan takes."""
        ...

    def plan(self, height: int, width: int, uniform: NDArray[np.float64]) -> Crop:
        """The crop of an upright image; ``uniform`` is ``Draw.uniform(num_uniform)``."""
        ...


@dataclass(frozen=True)
class RandomResizedCropFlip:
    """The usual training transform: a random part of the image, at a random aspect, as a square, perhaps mirrored."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5  # probability
    quality: Quality = "fast"

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    @property
    def num_uniform(self) -> int:
        """One for the flip, four for each attempt at a crop."""
        return 1 + 4 * _CROP_ATTEMPTS

    def plan(self, height: int, width: int, uniform: NDArray[np.float64]) -> Crop:
        """The crop that ``uniform`` chooses."""
        box = crop_box(height, width, scale=self.scale, ratio=self.ratio, uniform=uniform[1:])
        return _crop(box, self.size, self.size, flip=bool(uniform[0] < self.flip))

    def __call__(self, image: torch.Tensor, draw: Draw) -> torch.Tensor:
        crop = self.plan(image.shape[-2], image.shape[-1], draw.uniform(self.num_uniform))
        box = crop.top, crop.left, crop.rows, crop.columns
        resized = functional.resized_crop(image, *box, [self.size, self.size], antialias=True)
        return resized.flip(-1) if crop.flip else resized


@dataclass(frozen=True)
class ResizeCenterCrop:
    """The usual evaluation transform: the shorter side scaled to ``resize``, then the central square of ``size``."""

    size: int
    resize: int = 256
    quality: Quality = "fast"

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    @property
    def num_uniform(self) -> int:
        """Nothing here is random."""
        return 0

    def plan(self, height: int, width: int, uniform: NDArray[np.float64]) -> Crop:
        """The whole image at its new size, of which a batch shows the middle; rounded as torchvision does."""
        del uniform
        short, long = sorted((height, width))
        longer = int(self.resize * long / short)
        scaled = (self.resize, longer) if height <= width else (longer, self.resize)
        return _crop((0, 0, height, width), *scaled)

    def __call__(self, image: torch.Tensor, draw: Draw) -> torch.Tensor:
        del draw
        resized = functional.resize(image, [self.resize], antialias=True)
        return functional.center_crop(resized, [self.size, self.size])


def planned(transform: Transform) -> Planned | None:
    """``transform`` if the loader may decode its crop alone: by its ``quality``, and by what is installed."""
    if not isinstance(transform, RandomResizedCropFlip | ResizeCenterCrop) or transform.quality != "fast":
        return None
    if type(transform) not in (RandomResizedCropFlip, ResizeCenterCrop):
        return None  # a subclass may have changed what calling does
    if isinstance(transform, ResizeCenterCrop) and transform.resize < transform.size:
        return None  # torchvision pads here
    return transform if can_decode_crops() else None


def _check_quality(quality: str) -> None:
    if quality not in get_args(Quality):
        raise UsageError(f"quality must be one of {', '.join(get_args(Quality))}, not {quality!r}")


def _crop(box: tuple[int, int, int, int], height: int, width: int, *, flip: bool = False) -> Crop:
    top, left, rows, columns = box
    return Crop(top=top, left=left, rows=rows, columns=columns, height=height, width=width, flip=flip)


def crop_box(
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    uniform: NDArray[np.float64],
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop: area uniform in ``scale``, aspect log-uniform in ``ratio``.

    ``uniform`` holds four numbers in [0, 1) per attempt. Where no attempt fits, the largest central crop in ``ratio``.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_u, aspect_u, top_u, left_u in uniform.reshape(-1, 4).tolist():
        area = height * width * (scale[0] + area_u * (scale[1] - scale[0]))
        aspect = math.exp(log_low + aspect_u * (log_high - log_low))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            return int(top_u * (height - rows + 1)), int(left_u * (width - columns + 1)), rows, columns
    return _central_box(height, width, ratio)


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    columns = min(width, max(1, round(height * ratio[1])))
    rows = min(height, max(1, round(width / ratio[0])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def adapt(transform: Transform) -> KeyedTransform:
    """Any supported transform as ``f(image, draw)``; refuses what cannot be called with one or two arguments."""
    if not callable(transform):
        raise UsageError(f"transform must be callable as transform(image) or transform(image, draw), got {transform!r}")
    required, named_draw = _positional(transform)
    if required > 2:
        raise UsageError(f"transform {transform!r} needs {required} arguments; expected (image) or (image, draw)")
    return transform if named_draw or required == 2 else _seeded(transform)


def _positional(transform: Transform) -> tuple[int, bool]:
    """Number of positional parameters without a default, and whether the second parameter is called ``draw``."""
    # a module's __call__ takes anything; what counts is its forward
    target: Any = transform.forward if isinstance(transform, torch.nn.Module) else transform
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return 1, False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    return required, len(positional) > 1 and positional[1].name == "draw"


def _seeded(transform: Callable[[torch.Tensor], torch.Tensor]) -> KeyedTransform:
    def apply(image: torch.Tensor, draw: Draw) -> torch.Tensor:
        with _PrivateGenerator(torch.Generator().manual_seed(draw.key)):
            return transform(image)

    return apply


_TAKES_GENERATOR = frozenset(
    [torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial]
    + [torch.poisson, torch.binomial, torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.random_]
    + [torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.Tensor.multinomial, torch.Tensor.exponential_]
    + [torch.Tensor.log_normal_, torch.Tensor.cauchy_, torch.Tensor.geometric_]
    + [getattr(torch, name) for name in ("_sample_dirichlet", "_standard_gamma")]
    + [torch.rand_like, torch.randn_like, torch.randint_like]
)
# These draw inside torch, past any generator we could hand them.
_HIDES_ITS_DRAWS = frozenset(
    getattr(space, name)
    for space, names in (
        (torch, ("dropout", "dropout_", "alpha_dropout", "feature_dropout", "native_dropout", "rrelu")),
        (torch.nn.functional, ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")),
        (torch.nn.functional, ("feature_alpha_dropout", "rrelu", "gumbel_softmax")),
    )
    for name in names
)


class _PrivateGenerator(TorchFunctionMode):
    """While entered, and in this thread only, torch's random functions draw from ``generator``."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        if func in _TAKES_GENERATOR and keywords.get("generator") is None:
            keywords["generator"] = self._generator
        elif func in _HIDES_ITS_DRAWS:
            name = getattr(func, "__name__", repr(func))
            raise UsageError(
                f"a one-argument transform called torch's {name}, whose draws cannot be tied to the sample: "
                "write it as transform(image, draw) and draw from draw.key"
            )
        return func(*args, **keywords)
