"""Randomness that belongs to the draw: the same in any thread, whatever the global generator is doing."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipeline.errors import UsageError
from pipeline.images import decode_crop, decode_rgb
from pipeline.stream import transforms
from pipeline.stream.transforms import (
    Draw,
    RandomResizedCropFlip,
    ResizeCenterCrop,
    adapt,
    crop_box,
    planned,
    uniforms,
)


def image(height: int = 40, width: int = 56, seed: int = 0) -> torch.Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def draw(key: int = 7, repeat: int = 0) -> Draw:
    return Draw(position=3, class_id=1, repeat=repeat, key=key)


def test_draw_gives_uniform_numbers_fixed_by_its_key() -> None:
    numbers = draw(key=2**64 - 1).uniform(20_000)
    assert np.array_equal(numbers, draw(key=2**64 - 1).uniform(20_000))
    assert not np.array_equal(numbers[:8], draw(key=2).uniform(8))
    assert 0 <= numbers.min() < 0.001 < 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01


# ---- The transforms of our own


@pytest.mark.parametrize("transform", [RandomResizedCropFlip(24), ResizeCenterCrop(24, resize=32)])
@pytest.mark.parametrize("shape", [(40, 56), (57, 31), (1, 1), (5, 200)])
def test_own_transforms_give_uint8_squares(transform: Any, shape: tuple[int, int]) -> None:
    result = transform(image(*shape), draw())
    assert result.shape == (3, 24, 24)
    assert result.dtype == torch.uint8


def test_random_crop_is_fixed_by_the_key_and_differs_between_keys() -> None:
    transform = RandomResizedCropFlip(24)
    results = [transform(image(), draw(key=key)) for key in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_random_crop_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    RandomResizedCropFlip(24)(image(), draw())
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_happens_as_often_as_asked() -> None:
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    square = image(32, 32)
    for flip, low, high in ((0.0, 0, 0), (0.25, 60, 140), (1.0, 400, 400)):
        transform = RandomResizedCropFlip(32, flip=flip, **whole)
        flipped = sum(torch.equal(transform(square, draw(key)), square.flip(-1)) for key in range(400))
        assert low <= flipped <= high


def test_the_area_of_boxes_is_uniform_and_every_row_is_a_first_one() -> None:
    options: Any = {"scale": (0.1, 0.5), "ratio": (1.0, 1.0)}
    boxes = [crop_box(100, 100, uniform=draw(key).uniform(40), **options) for key in range(2000)]
    shares = np.array([rows * columns / 10_000 for _, _, rows, columns in boxes])
    assert np.allclose(np.quantile(shares, [0.25, 0.5, 0.75]), [0.2, 0.3, 0.4], atol=0.02)
    large: Any = {"scale": (0.81, 0.81), "ratio": (1.0, 1.0)}
    places = {crop_box(10, 10, uniform=draw(key).uniform(40), **large)[:2] for key in range(200)}
    assert places == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_box_that_does_not_fit_is_drawn_again() -> None:
    transform = transforms.RandomResizedCropFlip(8)
    plans = [transform.plan(40, 160, draw(key).uniform(transform.num_uniform)) for key in range(300)]
    central = [plan for plan in plans if (plan.rows, plan.columns) == (40, 53)]
    assert len(central) < 60  # an eighth, where none of ten fits; of single attempts four in five do not


def test_crop_boxes_have_the_asked_area_and_aspect_and_reach_every_corner() -> None:
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = [crop_box(300, 400, scale=scale, ratio=ratio, uniform=draw(key).uniform(40)) for key in range(3000)]
    top, left, rows, columns = np.array(boxes).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + rows <= 300).all()
    assert (left + columns <= 400).all()
    area, aspect = rows * columns / (300 * 400), columns / rows
    assert 0.075 < area.min() < 0.1
    assert 0.95 < area.max() <= 1
    assert 0.73 < aspect.min() < 0.78
    assert 1.3 < aspect.max() < 1.36
    assert top.min() == 0
    assert (top + rows).max() == 300
    assert left.min() == 0
    assert (left + columns).max() == 400


@pytest.mark.parametrize(("shape", "box"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))])
def test_an_image_that_no_crop_fits_gets_the_largest_central_one(shape: tuple[int, int], box: tuple[int, ...]) -> None:
    uniform = np.zeros(4 * 10) + 0.999
    assert crop_box(*shape, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), uniform=uniform) == box


def test_center_crop_keeps_the_middle() -> None:
    pixels = torch.zeros(3, 64, 128, dtype=torch.uint8)
    pixels[:, 24:40, 56:72] = 200
    assert ResizeCenterCrop(16, resize=64)(pixels, draw()).min() == 200


# ---- Crops that are known before decoding


def photograph(height: int, width: int, pillow_format: str = "JPEG") -> bytes:
    """Blurred noise, as photographs are: smooth, nowhere flat, and brightness changing faster than colour."""
    rng, size = np.random.default_rng(height), (width, height)
    light, colours = (rng.integers(0, 256, (height // n + 2, width // n + 2, 3), dtype=np.uint8) for n in (8, 64))
    layers = Image.fromarray(light).convert("L").convert("RGB"), Image.fromarray(colours)
    out = BytesIO()
    Image.blend(*(layer.resize(size, Image.Resampling.BICUBIC) for layer in layers), 0.4).save(out, pillow_format)
    return out.getvalue()


def fast(transform: Any, data: bytes, key: int) -> np.ndarray:
    out = np.empty((transform.size, transform.size, 3), dtype=np.uint8)
    uniform = draw(key).uniform(transform.num_uniform)
    decode_crop(data, lambda height, width: transform.plan(height, width, uniform), out)
    return out


def exact(transform: Any, data: bytes, key: int) -> np.ndarray:
    return transform(torch.from_numpy(decode_rgb(data)).permute(2, 0, 1), draw(key)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("pillow_format", ["JPEG", "PNG"])
# scaled up, and down, and far down, where the decoder's own scaling is sharper than torchvision's
@pytest.mark.parametrize(("shape", "bound"), [((160, 200), 2), ((441, 333), 2), ((1000, 801), 3)])
@pytest.mark.parametrize("transform", [RandomResizedCropFlip(224), ResizeCenterCrop(224)])
def test_fast_crops_are_torchvision_s_within_the_stated_error(
    transform: Any, shape: tuple[int, int], bound: float, pillow_format: str
) -> None:
    data = photograph(*shape, pillow_format)
    for key in range(3):
        error = fast(transform, data, key).astype(int) - exact(transform, data, key)
        assert np.abs(error).mean() < bound
        assert abs(error.mean()) < 0.3
        assert np.percentile(np.abs(error), 99) < 12


def test_uniforms_of_many_draws_are_those_of_each() -> None:
    keys = np.array([0, 7, 2**64 - 1], dtype=np.uint64)
    assert np.array_equal(uniforms(keys, 9), [draw(int(key)).uniform(9) for key in keys])


class Changed(RandomResizedCropFlip):
    pass


def test_only_what_a_crop_can_express_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    own = RandomResizedCropFlip(24), ResizeCenterCrop(24)
    assert [planned(transform) for transform in own] == list(own)
    for other in (RandomResizedCropFlip(24, quality="exact"), ResizeCenterCrop(24, 16), Changed(24)):
        assert planned(other) is None
    monkeypatch.setattr(transforms, "can_decode_crops", lambda: False)
    assert planned(own[0]) is None


@pytest.mark.parametrize("transform", [RandomResizedCropFlip, ResizeCenterCrop])
def test_an_unknown_quality_is_refused(transform: Any) -> None:
    with pytest.raises(UsageError, match="fast, exact, not 'best'"):
        transform(24, quality="best")


# ---- Telling the two protocols apart


def two(image: torch.Tensor, other: Draw) -> torch.Tensor:
    return image + other.repeat


def named(image: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
    return image + draw.repeat if draw else image


def with_default(image: torch.Tensor, amount: int = 5) -> torch.Tensor:
    return image + amount


class Module(torch.nn.Module):
    def forward(self, image: torch.Tensor, draw: Draw) -> torch.Tensor:
        return image + draw.repeat


class OneArgumentModule(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + 5


@pytest.mark.parametrize(
    "transform",
    [
        two,
        named,
        with_default,
        Module(),
        OneArgumentModule(),
        functools.partial(with_default, amount=5),
        lambda image, draw: image + draw.repeat,
        lambda image: image + 5,
        v2.Compose([v2.Lambda(lambda image: image + 5)]),
    ],
)
def test_a_transform_is_called_as_it_is_written(transform: Any) -> None:
    zeros = torch.zeros(3, 2, 2, dtype=torch.uint8)
    assert torch.equal(adapt(transform)(zeros, draw(repeat=5)), zeros + 5)


@pytest.mark.parametrize("transform", ["resize", lambda a, b, c: a])
def test_what_cannot_be_a_transform_is_refused(transform: Any) -> None:
    with pytest.raises(UsageError, match=r"\(image\) or .*\(image, draw\)"):
        adapt(transform)


# ---- One-argument transforms and torch's generators

AUGMENTATIONS = [
    v2.RandomResizedCrop(16, antialias=True),
    v2.TrivialAugmentWide(),
    v2.AugMix(),
    v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    v2.RandomErasing(p=1.0, value="random"),
    v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise()]),
    v2.RandomChoice([v2.RandomRotation(40), v2.RandomAffine(40)]),
    lambda image: torch.empty(3, 2, 2).normal_(),
    lambda image: torch.randn(3, 2, 2) + torch.rand_like(torch.zeros(3, 2, 2)) + torch.randperm(2),
]


@pytest.mark.parametrize("transform", AUGMENTATIONS)
def test_one_argument_transforms_draw_from_the_draw_alone(transform: Any) -> None:
    apply = adapt(transform)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    results = [apply(image(), draw(key)) for key in (5, 5, *range(6, 12))]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1])
    assert not all(torch.equal(result, results[0]) for result in results)


def test_one_argument_transforms_hold_while_other_threads_draw() -> None:
    apply = adapt(v2.Compose([v2.RandomResizedCrop(8, antialias=True), v2.ColorJitter(0.4)]))
    expected = [apply(image(), draw(key)) for key in range(40)]
    stop = threading.Event()
    noise = threading.Thread(target=lambda: [torch.rand(100) for _ in iter(stop.is_set, True)])
    noise.start()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda key: apply(image(), draw(key)), range(40)))
    stop.set()
    noise.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_generator_of_the_transform_s_own_is_respected() -> None:
    def own(image: torch.Tensor) -> torch.Tensor:
        return torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(3))

    assert torch.equal(adapt(own)(image(), draw(1)), adapt(own)(image(), draw(2)))


@pytest.mark.parametrize("transform", [torch.nn.Dropout(), lambda image: torch.nn.functional.dropout(image, 0.5)])
def test_draws_that_cannot_be_tied_to_the_sample_are_refused(transform: Any) -> None:
    with pytest.raises(UsageError, match=r"dropout.*transform\(image, draw\)"):
        adapt(transform)(image().float(), draw())
