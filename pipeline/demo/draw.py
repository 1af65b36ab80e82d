"""A product-like photo set, drawn: what comes in is a seed, what comes out is a folder tree with a long tail.

A class is shape x colour x label pattern ("red-striped-can"). Rare classes are new combinations of parts that frequent
classes show, as in a real shop: their photos can be recognised, but a network trained on natural draws is not led to.

Guarantees: every photo is a function of (seed, class, split, number) alone; the class counts of ``plan_photos`` are
those of readable, distinct photos; a file has its final name only when it is whole, so a rerun draws what is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.demo.product import COLOURS, PATTERNS, SHAPES, Product, Rng, draw_product, encode
from pipeline.errors import StoreError
from pipeline.keyed import derive, seed_key, text_key

DRAWING_VERSION = 1
"""Goes up when the same seed would draw other bytes."""

TAIL = (
    *(450, 380, 322, 274, 233, 200, 174, 153, 137, 124, 113, 104),  # 12 many-shot classes (> 100)
    *(92, 84, 77, 70, 64, 58, 53, 48, 44, 40, 36, 33, 30, 27, 24, 21),  # 16 medium-shot (20 to 100)
    *(19, 17, 15, 13, 12, 11, 10, 9, 8, 7, 6, 6),  # 12 few-shot, and 40 more with at most five
    *((5,) * 6 + (4,) * 6 + (3,) * 8 + (2,) * 10 + (1,) * 10),
)
"""Training photos of each class."""

NUM_TEST = 10
"""Of every class, also of those with one training photo: only then can their accuracy be measured."""

QUICK_LARGEST = 120  # keeps many-shot classes many-shot
QUICK_NUM_TEST = 3

SHELVES = {
    "can": "drinks/cans/",
    "bottle": "drinks/",
    "carton": "fridge/dairy/cartons/",
    "jar": "pantry/jars/",
    "box": "pantry/breakfast/cereals/",
    "bag": "",
}
"""Where the class folders of each shape lie: uneven on purpose, as in real archives."""


@dataclass(frozen=True, kw_only=True)
class ProductClass:
    """One class of the set."""

    product: Product
    num_train: int
    num_test: int

    @property
    def name(self) -> str:
        return self.product.name

    def folder(self, split: str) -> str:
        return f"{split}/{SHELVES[self.product.shape]}{self.name}"


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One file: its path below the photo folder, and what makes its bytes."""

    path: str
    make: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class PhotoPlan:
    """What a seed draws: ``photos`` are readable and distinct, ``damaged`` are what a build must turn away."""

    seed: int
    quick: bool
    classes: tuple[ProductClass, ...]  # largest first
    photos: tuple[Photo, ...]
    damaged: tuple[Photo, ...]

    @property
    def num_train(self) -> int:
        return sum(known.num_train for known in self.classes)

    @property
    def num_test(self) -> int:
        return sum(known.num_test for known in self.classes)


def plan_photos(seed: int = 0, *, quick: bool = False) -> PhotoPlan:
    """The classes, photos and damaged files of one seed; ``quick`` takes every other class and thins the largest."""
    classes = _plan_classes(seed, quick)
    photos = tuple(photo for known in classes for photo in _plan_class(seed, known))
    return PhotoPlan(seed=seed, quick=quick, classes=classes, photos=photos, damaged=tuple(_plan_damage(seed, classes)))


def draw_photos(plan: PhotoPlan, directory: Path, on_progress: Callable[[int, int], None] | None = None) -> int:
    """Write those files of ``plan`` that are not yet below ``directory``; returns how many that were.

    ``directory`` must be new, or hold drawings of the same plan: ``<directory>.json`` beside it says which.
    """
    _claim(directory, plan)
    missing = [photo for photo in plan.photos + plan.damaged if not (directory / photo.path).exists()]
    for done, photo in enumerate(missing, start=1):
        _write_whole(directory, photo)
        if on_progress is not None:
            on_progress(done, len(missing))
    return len(missing)


def _claim(directory: Path, plan: PhotoPlan) -> None:
    note = directory.with_name(f"{directory.name}.json")
    asked = json.dumps({"drawing": DRAWING_VERSION, "seed": plan.seed, "quick": plan.quick})
    found = note.read_text("utf-8") if note.exists() else None
    if found is None and directory.exists() and any(directory.iterdir()):
        raise StoreError(
            f"{directory} holds files but {note} does not exist, so they may be yours: give the demo another directory"
        )
    if found not in (None, asked):
        raise StoreError(
            f"{note} says that {directory} holds {found}, asked for {asked}: give the demo another directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    if found is None:
        note.write_text(asked, "utf-8")


def _write_whole(directory: Path, photo: Photo) -> None:
    """By way of a name outside the photo folder: an interrupted run leaves no half photo in the source."""
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    unfinished.write_bytes(photo.make())
    target = directory / photo.path
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, target)


def _plan_classes(seed: int, quick: bool) -> tuple[ProductClass, ...]:
    """Combinations of parts, in keyed order, get the counts of the tail."""
    every = [Product(shape=s, colour=c, pattern=p) for s in SHAPES for c in COLOURS for p in PATTERNS]
    chosen = (every[i] for i in _rng(seed, "classes").permutation(len(every)))
    counts = [min(count, QUICK_LARGEST) for count in TAIL[::2]] if quick else TAIL
    num_test = QUICK_NUM_TEST if quick else NUM_TEST
    return tuple(
        ProductClass(product=product, num_train=count, num_test=num_test)
        for product, count in zip(chosen, counts, strict=False)
    )


def _plan_class(seed: int, known: ProductClass) -> Iterator[Photo]:
    for split, count in (("train", known.num_train), ("test", known.num_test)):
        for number in range(count):
            kind, name = _kind_and_name(number if split == "train" and known.num_train > 20 else 0, number)
            make = _Drawing(seed=seed, product=known.product, purpose=split, number=number, kind=kind)
            yield Photo(path=f"{known.folder(split)}/{name}", make=make)


_ODD = {
    7: ("jpeg", "{}.JPG"),
    11: ("png", "{}.png"),
    13: ("webp", "{}.webp"),
    17: ("jpeg", "{}.v2.jpg"),
    19: ("jpeg", "{} (new) é.jpg"),
    23: ("cmyk", "{}.jpg"),
    29: ("grey", "{}.jpg"),
    31: ("sideways", "{}.jpg"),
    37: ("sideways", "{}.jpeg"),
}
"""Formats and names that large folders hold; of every hundred photos of a class, the ones with these numbers."""


def _kind_and_name(odd: int, number: int) -> tuple[str, str]:
    kind, pattern = _ODD.get(odd % 100, ("jpeg", "{}.jpg"))
    return kind, pattern.format(f"IMG_{number:04d}")


def _plan_damage(seed: int, classes: tuple[ProductClass, ...]) -> Iterator[Photo]:
    """Nine files to be turned away: four broken uploads, nothing, a text, a copy, and one photo under two labels."""
    first, second, third = (known.folder("train") for known in classes[:3])
    for number, known in enumerate(classes[:4]):
        whole = _Drawing(seed=seed, product=known.product, purpose="upload", number=number)
        yield Photo(path=f"{known.folder('train')}/upload_{number}.jpg", make=_Truncated(whole))
    yield Photo(path=f"{first}/empty.jpg", make=bytes)
    yield Photo(path=f"{second}/notes.jpg", make=b"The photos of week 12 are on the other drive.\n".strip)
    copied = _Drawing(seed=seed, product=classes[2].product, purpose="train", number=0)
    yield Photo(path=f"{third}/IMG_0000 copy.jpg", make=copied)
    disputed = _Drawing(seed=seed, product=classes[0].product, purpose="disputed", number=0)
    yield Photo(path=f"{first}/which one.jpg", make=disputed)
    yield Photo(path=f"{second}/which one.jpg", make=disputed)


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """The bytes of one photo, made when called."""

    seed: int
    product: Product
    purpose: str
    number: int
    kind: str = "jpeg"

    def __call__(self) -> bytes:
        rng = _rng(self.seed, self.purpose, self.product.name, self.number)
        return encode(draw_product(self.product, rng), self.kind, quality=int(rng.integers(72, 94)))


@dataclass(frozen=True)
class _Truncated:
    """An upload that broke off."""

    whole: _Drawing

    def __call__(self) -> bytes:
        data = self.whole()
        return data[: len(data) * 6 // 10]


def _rng(seed: int, *parts: str | int) -> Rng:
    """A generator keyed by what it is for."""
    numbers = [text_key(part) if isinstance(part, str) else part for part in parts]
    return np.random.Generator(np.random.PCG64(derive(seed_key(seed), text_key("demo"), *numbers)))
