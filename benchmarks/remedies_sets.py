"""The sets of `remedies.py`: drawn glyphs, or Grocery photos made long-tailed; built by evenshard, held in memory.

A drawn class is glyph x texture. Ink, backdrop, pose, light, noise and a bar across the picture follow the seed and the
number of the image alone, so that none of them tells the class; which combination is frequent is drawn anew for every
seed. Counts fall from 300 by one factor a class, and the last three classes have one image.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline import Manifest, Snapshot, build, open_snapshot
from pipeline.keyed import derive, seed_key, text_key

Pixels = NDArray[np.uint8]

MANIFESTS = {
    "square-root": "power:alpha=0.5",
    "undersampled-20": "undersample:ceiling=20",
    "undersampled-20-frozen": "undersample:ceiling=20,frozen=true",
}
"""Beside the four of every build. The ceiling that a build has by default, 10 N/K, is above the largest class here."""

NUM_CLASSES = 30
NUM_ONE_SHOT = 3
SIDE = 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """One built set in memory. Images are uint8 [N, H, W, 3], those of train in the order of the sample table."""

    snapshot: Snapshot
    manifests: Mapping[str, Manifest]
    class_starts: NDArray[np.int64]
    train: torch.Tensor
    test: torch.Tensor
    test_labels: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64 [K]: training images."""
        return self.manifests["natural"].available

    @property
    def side(self) -> int:
        return int(self.train.shape[1])


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Keyed by what it is for."""
    words = [text_key(word) if isinstance(word, str) else word for word in purpose]
    return np.random.Generator(np.random.PCG64(derive(seed_key(seed), text_key("remedies"), *words)))


# -- drawn -------------------------------------------------------------------------------------------------------------


def long_tail(largest: int, smallest: float, num_classes: int) -> NDArray[np.int64]:
    """Counts that fall by one factor from class to class, at least 1."""
    falling = largest * (smallest / largest) ** (np.arange(num_classes) / (num_classes - 1))
    return np.maximum(1, np.round(falling)).astype(np.int64)


def drawn(seed: int, place: Path, *, num_test: int = 50) -> Held:
    """30 classes of glyph x texture, drawn into ``place``, built and read back."""
    counts = long_tail(300, 3, NUM_CLASSES)
    counts[-NUM_ONE_SHOT:] = 1
    kinds = generator(seed, "classes").permutation(len(GLYPHS) * len(TEXTURES))[:NUM_CLASSES]
    for split, sizes in (("train", counts), ("test", np.full(NUM_CLASSES, num_test))):
        kind = np.repeat(kinds, sizes)
        images = _draw(kind, generator(seed, split))
        rank = np.repeat(np.arange(NUM_CLASSES), sizes)
        for number, (image, class_rank) in enumerate(zip(images, rank, strict=True)):
            _save(image, place / "photos" / split / f"{class_rank:02d}" / f"{number:05d}.png")
    return _build(place / "photos", place / "root", split_from="top")


def _draw(kind: NDArray[np.int64], rng: np.random.Generator) -> Pixels:
    """uint8 [N, SIDE, SIDE, 3], from twice the side: that smooths the edges."""
    n, big = len(kind), 2 * SIDE
    y, x = np.mgrid[0:big, 0:big].astype(np.float32) / (big / 2) - 1 + 1 / big
    angle, scale = rng.normal(0, 0.25, (n, 1, 1)), rng.uniform(0.55, 0.85, (n, 1, 1))
    x, y = x - rng.uniform(-0.25, 0.25, (n, 1, 1)), y - rng.uniform(-0.25, 0.25, (n, 1, 1))
    u = (x * np.cos(angle) + y * np.sin(angle)) / scale
    v = (y * np.cos(angle) - x * np.sin(angle)) / scale * rng.uniform(0.85, 1.15, (n, 1, 1))
    shape, texture = np.empty(u.shape, bool), np.empty(u.shape, bool)
    phase = rng.uniform(0, 2 * np.pi, (2, n, 1, 1))
    for glyph in range(len(GLYPHS)):
        mine = kind // len(TEXTURES) == glyph
        shape[mine] = GLYPHS[glyph](u[mine], v[mine])
    for number in range(len(TEXTURES)):
        mine = kind % len(TEXTURES) == number
        texture[mine] = TEXTURES[number](u[mine] * 8 + phase[0, mine], v[mine] * 8 + phase[1, mine])
    first, second = _inks(rng, n)
    picture = _backdrop(rng, n, big)
    picture = np.where(shape[..., None], np.where(texture[..., None], first, second), picture)
    picture = _bar(rng, picture)
    small = picture.reshape(n, SIDE, 2, SIDE, 2, 3).mean((2, 4))
    small = (small - 128) * rng.uniform(0.6, 1.1, (n, 1, 1, 1)) + 128 + rng.normal(0, 20, (n, 1, 1, 1))
    return (small + rng.normal(0, NOISE, small.shape)).clip(0, 255).astype(np.uint8)


NOISE = 16.0

GLYPHS = (
    lambda u, v: u**2 + v**2 < 0.8,  # disc
    lambda u, v: np.maximum(abs(u), abs(v)) < 0.75,  # square
    lambda u, v: (v < 0.7) & (v > 1.9 * abs(u) - 0.95),  # triangle
    lambda u, v: (u**2 + v**2 < 0.95) & (u**2 + v**2 > 0.22),  # ring
    lambda u, v: (np.minimum(abs(u), abs(v)) < 0.32) & (np.maximum(abs(u), abs(v)) < 0.95),  # cross
    lambda u, v: abs(u) + abs(v) < 1.0,  # diamond
    lambda u, v: (u**2 + v**2 < 0.95) & ((u - 0.45) ** 2 + v**2 > 0.45),  # crescent
    lambda u, v: (abs(v) < 0.95) & (abs(u) < 0.3 + 0.55 * abs(v)),  # hourglass
)
TEXTURES = (
    lambda s, t: np.sin(s) > -2,  # plain
    lambda s, t: np.sin(s) > 0,  # stripes
    lambda s, t: np.sin(t) > 0,  # stripes across
    lambda s, t: np.sin(s) * np.sin(t) > 0,  # checks
    lambda s, t: np.sin(s) + np.sin(t) > 0.9,  # dots
)


def _inks(rng: np.random.Generator, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two colours of any hue, one brighter than the other by 60 to 140, either way."""
    first, second = rng.uniform(-50, 50, (2, n, 1, 1, 3))
    step = rng.uniform(30, 70, (n, 1, 1, 1)) * rng.choice([-1, 1], (n, 1, 1, 1))
    middle = rng.uniform(90, 165, (n, 1, 1, 1))
    return middle + step + first, middle - step + second


def _backdrop(rng: np.random.Generator, n: int, big: int) -> NDArray[np.float64]:
    """A colour, and blocks of two sizes that differ from it."""
    picture = np.broadcast_to(rng.uniform(40, 215, (n, 1, 1, 3)), (n, big, big, 3))
    for cells, depth in ((4, 28.0), (12, 22.0)):
        blocks = rng.normal(0, depth, (n, cells, cells, 3))
        picture = picture + blocks.repeat(big // cells, 1).repeat(big // cells, 2)
    return picture


def _bar(rng: np.random.Generator, picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """Across four pictures of ten, anywhere, in any direction."""
    n, big = picture.shape[:2]
    y, x = np.mgrid[0:big, 0:big] / (big / 2) - 1
    angle, where = rng.uniform(0, np.pi, (n, 1, 1)), rng.uniform(-0.7, 0.7, (n, 1, 1))
    covered = abs(x * np.cos(angle) + y * np.sin(angle) - where) < 0.12
    covered &= rng.random((n, 1, 1)) < 0.4
    return np.where(covered[..., None], rng.uniform(20, 235, (n, 1, 1, 3)), picture)


def _save(image: Pixels, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


# -- Grocery -----------------------------------------------------------------------------------------------------------

GROCERY_SIDE = 40
GROCERY_LARGEST, GROCERY_SMALLEST = 60, 1.0


def shrink_grocery(photos: Path, place: Path) -> None:
    """Once for all seeds: the central square of each photo of ``train.txt`` and ``test.txt``, 40 pixels wide."""
    for split in ("train", "test"):
        for path, _ in _grocery(photos, split):
            with Image.open(photos / path) as image:
                image.draft("RGB", (4 * GROCERY_SIDE, 4 * GROCERY_SIDE))
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                square = image.convert("RGB").resize(
                    (GROCERY_SIDE, GROCERY_SIDE), Image.Resampling.BOX, (left, top, left + side, top + side)
                )
            _save(np.asarray(square), place / f"{path}.png")


def grocery(seed: int, photos: Path, small: Path, place: Path) -> Held:
    """Each class keeps as many of its train photos as its rank allows, 60 falling to 1; the seed chooses."""
    by_class: dict[str, list[str]] = {}
    for path, label in _grocery(photos, "train"):
        by_class.setdefault(label, []).append(path)
    allowed = long_tail(GROCERY_LARGEST, GROCERY_SMALLEST, len(by_class))
    ranks = generator(seed, "ranks").permutation(len(by_class))
    rows = [(f"{path}.png", label, "test") for path, label in _grocery(photos, "test")]
    for label, rank in zip(sorted(by_class), ranks, strict=True):
        order = generator(seed, "photos", label).permutation(len(by_class[label]))[: allowed[rank]]
        rows += [(f"{by_class[label][i]}.png", label, "train") for i in sorted(order)]
    place.mkdir(parents=True)
    with open(place / "photos.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return _build(place / "photos.csv", place / "root", images=str(small))


def _grocery(photos: Path, split: str) -> Iterator[tuple[str, str]]:
    """Path and class of each photo that the list of a split names."""
    for line in (photos / f"{split}.txt").read_text().splitlines():
        path, label, _ = line.split(",")
        yield path, f"{int(label):02d}"


# -- both --------------------------------------------------------------------------------------------------------------


def _build(source: Path, root: Path, **options: object) -> Held:
    build(source, root, manifests=MANIFESTS, workers=1, **options)
    snapshot = open_snapshot(root)
    names = ("natural", "balanced", *MANIFESTS)
    return Held(
        snapshot=snapshot,
        manifests={name: snapshot.manifest(name) for name in names},
        class_starts=snapshot.class_starts("train"),
        train=_read(snapshot, "train"),
        test=_read(snapshot, "test"),
        test_labels=np.repeat(np.arange(snapshot.record.num_classes), np.diff(snapshot.class_starts("test"))),
    )


def _read(snapshot: Snapshot, split: str) -> torch.Tensor:
    files = (snapshot.read_image(split, row) for row in range(snapshot.samples(split).num_rows))
    return torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in files]))
