"""Photo-like JPEGs in class folders with a long tail, the same on every machine: noise of five sizes, and ellipses."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
from ingest import class_counts
from PIL import Image, ImageDraw

OCTAVES = 4, 8, 16, 32, 64


def generate(folder: Path, *, num_images: int, num_classes: int, size: int) -> None:
    """Once: ``folder`` is left alone where an earlier call with these arguments came to its end."""
    wanted = {"num_images": num_images, "num_classes": num_classes, "size": size}
    done = folder.with_suffix(".json")
    if done.exists() and json.loads(done.read_text()) == wanted:
        return
    counts = class_counts(num_images, num_classes)
    jobs = [(str(folder / f"class-{c:05d}"), c, int(n), size) for c, n in enumerate(counts)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        for _ in pool.imap_unordered(_draw_class, jobs):
            pass
    done.write_text(json.dumps(wanted))


def _draw_class(job: tuple[str, int, int, int]) -> None:
    folder, class_id, count, size = job
    os.makedirs(folder, exist_ok=True)
    for number in range(count):
        _photo(np.random.default_rng((size, class_id, number)), size).save(f"{folder}/{number:06d}.jpg", quality=82)


def _photo(rng: np.random.Generator, size: int) -> Image.Image:
    """Sides vary by an eighth; each octave of noise has 0.55 of the contrast of the one before, as in photographs."""
    width, height = (size + rng.integers(-size // 8, size // 8 + 1, 2)).tolist()
    pixels = np.full((height, width, 3), 128.0, np.float32)
    for i, cells in enumerate(OCTAVES):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layer = np.asarray(noise.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        pixels += (layer - 128) * 0.55**i
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        left, top, right, bottom = (rng.random(4) * size).tolist()
        box = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
        draw.ellipse(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image
