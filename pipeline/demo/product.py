"""The pixels of one product photo.

Comes in: a kind of product and a keyed generator. Goes out: an image, and its file. Guarantees: the product decides
shape, colour and label pattern and nothing else; ink, pose, backdrop, clutter, light, blur and noise follow the
generator alone, so none of them tells the class.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

IMAGE_SIDE = 96
CANVAS = 128
"""Products are drawn upright on a canvas of this side, then scaled and turned into the photo, which smooths edges."""

COLOURS = {
    "red": (206, 38, 42),
    "blue": (38, 84, 196),
    "green": (40, 150, 62),
    "yellow": (238, 200, 30),
    "purple": (136, 52, 158),
    "orange": (240, 126, 24),
}

Rng = np.random.Generator
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom on the canvas."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """What a photo shows: a key of ``SHAPES``, of ``COLOURS`` and of ``PATTERNS``."""

    shape: str
    colour: str
    pattern: str

    @property
    def name(self) -> str:
        return f"{self.colour}-{self.pattern}-{self.shape}"


def draw_product(product: Product, rng: Rng) -> Image.Image:
    """One RGB photo of ``product``, ``IMAGE_SIDE`` square."""
    canvas, mask = _draw_upright(product, rng)
    angle = rng.normal(0.0, 12.0)
    scale = rng.uniform(0.62, 1.0)
    matrix = _pose(angle, scale, rng.uniform(-0.12, 0.12, 2), rng.uniform(0.85, 1.15))
    size = (IMAGE_SIDE, IMAGE_SIDE)
    placed = canvas.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    cover = mask.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    photo = _backdrop(rng)
    photo.paste(placed, (0, 0), cover)
    if rng.random() < 0.35:
        _occlude(photo, rng)
    return _light(photo, rng)


def _draw_upright(product: Product, rng: Rng) -> tuple[Image.Image, Image.Image]:
    """The product on a canvas, and its silhouette."""
    body = _shade_of(COLOURS[product.colour], rng)
    outline = Image.new("L", (CANVAS, CANVAS), 0)
    label_box = SHAPES[product.shape](ImageDraw.Draw(outline), rng)
    canvas = Image.new("RGB", (CANVAS, CANVAS), body)
    PATTERNS[product.pattern](ImageDraw.Draw(canvas), label_box, _ink(rng), rng)
    _finish(canvas, product.shape, label_box, body)
    return canvas, outline


def _shade_of(colour: Colour, rng: Rng) -> Colour:
    varied = np.clip(np.asarray(colour) + rng.normal(0, 14, 3), 0, 255)
    return _as_colour(varied)


def _ink(rng: Rng) -> Colour:
    """The label's own colour says nothing about the class."""
    return _as_colour(np.asarray([(246, 244, 236), (30, 30, 34), (210, 210, 214)])[rng.integers(3)])


def _as_colour(values: NDArray[Any]) -> Colour:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def _can(draw: ImageDraw.ImageDraw, rng: Rng) -> Box:
    half = rng.uniform(26, 31)
    left, right = 64 - half, 64 + half
    draw.rounded_rectangle((left, 22, right, 108), 9, fill=255)
    draw.ellipse((left + 3, 15, right - 3, 31), fill=255)
    return left, 36, right, 98


def _bottle(draw: ImageDraw.ImageDraw, rng: Rng) -> Box:
    half, neck = rng.uniform(19, 23), rng.uniform(6, 8)
    left, right = 64 - half, 64 + half
    draw.rounded_rectangle((left, 48, right, 120), 6, fill=255)
    draw.polygon([(left, 54), (64 - neck, 30), (64 + neck, 30), (right, 54)], fill=255)
    draw.rectangle((64 - neck, 8, 64 + neck, 34), fill=255)
    return left, 56, right, 112


def _carton(draw: ImageDraw.ImageDraw, rng: Rng) -> Box:
    half = rng.uniform(24, 29)
    left, right = 64 - half, 64 + half
    draw.rectangle((left, 38, right, 118), fill=255)
    draw.polygon([(left, 38), (64 - 14, 18), (64 + 14, 18), (right, 38)], fill=255)
    draw.rectangle((64 - 14, 9, 64 + 14, 20), fill=255)
    return left, 44, right, 114


def _jar(draw: ImageDraw.ImageDraw, rng: Rng) -> Box:
    half = rng.uniform(33, 39)
    left, right = 64 - half, 64 + half
    draw.rounded_rectangle((left, 40, right, 108), 20, fill=255)
    draw.rectangle((left + 8, 24, right - 8, 40), fill=255)
    return left, 50, right, 98


def _box(draw: ImageDraw.ImageDraw, rng: Rng) -> Box:
    width, depth = rng.uniform(58, 68), rng.uniform(9, 14)
    left = 64 - width / 2
    right = left + width
    front = [(left, 24), (right, 24), (right, 116), (left, 116)]
    draw.polygon(front, fill=255)
    draw.polygon([(left, 24), (left + depth, 24 - depth), (right + depth, 24 - depth), (right, 24)], fill=255)
    draw.polygon([(right, 24), (right + depth, 24 - depth), (right + depth, 116 - depth), (right, 116)], fill=255)
    return left, 30, right, 110


def _bag(draw: ImageDraw.ImageDraw, rng: Rng) -> Box:
    half, waist = rng.uniform(32, 38), rng.uniform(3, 7)
    left, right = 64 - half, 64 + half
    teeth = np.linspace(left, right, 11)
    top = [(x, 16.0 if i % 2 else 22.0) for i, x in enumerate(teeth)]
    bottom = [(x, 114.0 if i % 2 else 108.0) for i, x in enumerate(teeth[::-1])]
    sides = [(right - waist, 64.0)], [(left + waist, 64.0)]
    draw.polygon([*top, *sides[0], *bottom, *sides[1]], fill=255)
    return left, 32, right, 98


SHAPES = {"can": _can, "bottle": _bottle, "carton": _carton, "jar": _jar, "box": _box, "bag": _bag}


def _striped(draw: ImageDraw.ImageDraw, box: Box, ink: Colour, rng: Rng) -> None:
    left, top, right, bottom = box
    num_stripes = int(rng.integers(4, 7))
    step = (bottom - top) / num_stripes
    for y in top + step * (np.arange(num_stripes) + rng.uniform(0, 0.4)):
        draw.rectangle((left - 20, y, right + 20, y + step * 0.45), fill=ink)


def _dotted(draw: ImageDraw.ImageDraw, box: Box, ink: Colour, rng: Rng) -> None:
    left, top, right, bottom = box
    step, radius = rng.uniform(13, 16), rng.uniform(3.6, 4.8)
    shift = rng.uniform(0, step, 2)
    for row, y in enumerate(np.arange(top + shift[0], bottom, step)):
        for x in np.arange(left + shift[1] - step * (row % 2) / 2, right + step, step):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)


def _banded(draw: ImageDraw.ImageDraw, box: Box, ink: Colour, rng: Rng) -> None:
    left, top, right, bottom = box
    height = (bottom - top) * rng.uniform(0.42, 0.55)
    y = top + (bottom - top - height) * rng.uniform(0.3, 0.7)
    draw.rectangle((left - 20, y, right + 20, y + height), fill=ink)


def _badged(draw: ImageDraw.ImageDraw, box: Box, ink: Colour, rng: Rng) -> None:
    left, top, right, bottom = box
    radius = min(right - left, bottom - top) * rng.uniform(0.34, 0.42)
    x, y = (left + right) / 2, (top + bottom) / 2 + rng.uniform(-6, 6)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)


def _checked(draw: ImageDraw.ImageDraw, box: Box, ink: Colour, rng: Rng) -> None:
    left, top, right, bottom = box
    step = rng.uniform(11, 14)
    shift = rng.uniform(0, step, 2)
    for row, y in enumerate(np.arange(top - shift[0], bottom, step)):
        for x in np.arange(left - shift[1] + step * (row % 2), right + step, 2 * step):
            draw.rectangle((x, max(y, top), x + step, min(y + step, bottom)), fill=ink)


PATTERNS = {"striped": _striped, "dotted": _dotted, "banded": _banded, "badged": _badged, "checked": _checked}


def _finish(canvas: Image.Image, shape: str, box: Box, body: Colour) -> None:
    """Lids, caps and side faces go over the label."""
    draw = ImageDraw.Draw(canvas)
    left, top, right, _ = box
    metal, dark = (176, 178, 184), tuple(channel * 6 // 10 for channel in body)
    if shape == "can":
        draw.rectangle((0, 0, CANVAS, 27), fill=metal)
        draw.rectangle((0, 102, CANVAS, CANVAS), fill=metal)
    elif shape == "bottle":
        draw.rectangle((0, 0, CANVAS, 18), fill=dark)
    elif shape == "jar":
        draw.rectangle((0, 0, CANVAS, 39), fill=metal)
    elif shape == "carton":
        draw.line((left, 38, right, 38), fill=dark, width=2)
    elif shape == "box":
        draw.rectangle((right, 0, CANVAS, CANVAS), fill=dark)
        draw.rectangle((0, 0, CANVAS, 23), fill=tuple(min(255, channel + 30) for channel in body))
    else:
        draw.line((left, top - 4, right, top - 4), fill=dark, width=2)


def _pose(angle: float, scale: float, shift: NDArray[Any], stretch: float) -> tuple[float, ...]:
    """The affine map from photo pixels back to canvas pixels that PIL wants."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    zoom = CANVAS / IMAGE_SIDE / scale
    row_x, row_y = zoom * np.array([cos, sin]) / stretch, zoom * np.array([-sin, cos])
    centre = IMAGE_SIDE / 2 + np.asarray(shift) * IMAGE_SIDE
    return (
        *(float(v) for v in row_x), float(CANVAS / 2 - row_x @ centre),
        *(float(v) for v in row_y), float(CANVAS / 2 - row_y @ centre),
    )  # fmt: skip


def _backdrop(rng: Rng) -> Image.Image:
    """Blotchy surface, a shelf edge, and clutter in every colour a product may have."""
    coarse = int(rng.integers(3, 9))
    base = rng.uniform(60, 200) + rng.normal(0, 26, 3)
    blotches = np.clip(base + rng.normal(0, 26, (coarse, coarse, 3)), 0, 255).astype(np.uint8)
    photo = Image.fromarray(blotches).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(photo)
    if rng.random() < 0.5:
        y = int(rng.integers(60, 92))
        draw.rectangle((0, y, IMAGE_SIDE, y + int(rng.integers(2, 12))), fill=_as_colour(rng.integers(30, 220, 3)))
    for _ in range(int(rng.integers(0, 4))):
        _clutter(draw, rng)
    return photo


def _clutter(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    x, y = rng.uniform(-10, IMAGE_SIDE, 2)
    width, height = rng.uniform(8, 34, 2)
    fill = _shade_of(list(COLOURS.values())[int(rng.integers(len(COLOURS)))], rng)
    shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    shape((x, y, x + width, y + height), fill=fill)


def _occlude(photo: Image.Image, rng: Rng) -> None:
    """A price tag, a hand, a neighbour: something in front."""
    draw = ImageDraw.Draw(photo)
    edge = rng.uniform(6, 20)
    across = rng.uniform(0, IMAGE_SIDE - edge)
    fill = _as_colour(rng.integers(20, 240, 3))
    low = rng.uniform(0, IMAGE_SIDE * 0.6)
    high = low + rng.uniform(18, 50)
    draw.rectangle(
        (across, low, across + edge, high) if rng.random() < 0.5 else (low, across, high, across + edge), fill=fill
    )


def _light(photo: Image.Image, rng: Rng) -> Image.Image:
    """Brightness, a gradient across the photo, a tint, blur and sensor noise."""
    if rng.random() < 0.5:
        photo = photo.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.1))))
    ramp_x, ramp_y = rng.uniform(-0.3, 0.3, 2)
    grid_x, grid_y = _grid()
    gain = rng.uniform(0.6, 1.2) * (1 + ramp_x * grid_x + ramp_y * grid_y)
    tint = rng.normal(1.0, 0.06, 3)
    pixels = np.asarray(photo, dtype=np.float32) * (gain[..., None] * tint).astype(np.float32)
    noise = rng.integers(-8, 9, pixels.shape, dtype=np.int8)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


@lru_cache(maxsize=1)
def _grid() -> tuple[NDArray[Any], NDArray[Any]]:
    axis = np.linspace(-1, 1, IMAGE_SIDE)
    return np.broadcast_to(axis, (IMAGE_SIDE, IMAGE_SIDE)), np.broadcast_to(axis[:, None], (IMAGE_SIDE, IMAGE_SIDE))


def encode(image: Image.Image, kind: str, quality: int) -> bytes:
    """The file of ``image``: ``jpeg``, ``png``, ``webp``, or a JPEG that is ``cmyk``, ``grey`` or ``sideways``."""
    exif = Image.Exif()
    if kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "grey":
        image = image.convert("L")
    elif kind == "sideways":
        image, exif[_ORIENTATION] = image.transpose(Image.Transpose.ROTATE_90), _TURN_CLOCKWISE
    stream = io.BytesIO()
    if kind in ("png", "webp"):
        image.save(stream, kind)
    else:
        image.save(stream, "jpeg", quality=quality, exif=exif)
    return stream.getvalue()


_ORIENTATION, _TURN_CLOCKWISE = 0x0112, 6
"""The EXIF tag, and the value a phone writes when it was held upright."""
