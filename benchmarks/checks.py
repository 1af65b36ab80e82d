"""What inspecting an image costs beyond its decoder, and beyond reading its header: CPU time, the same images, one run.

    python benchmarks/checks.py [--images 300] [--size 64 224] [--rounds 7]

Bare Pillow is `Image.open(BytesIO(data), formats=...).load()`, and `Image.open` alone for headers. Rounds take turns,
so that a busy machine slows all alike; the fastest round of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, TiffImagePlugin, WebPImagePlugin

from pipeline.images import Inspection, Limits

WRITERS = {
    "jpg": ("JPEG", {"quality": 90}),
    "progressive": ("JPEG", {"progressive": True, "quality": 90}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"quality": 80}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tif": ("TIFF", {"compression": "tiff_lzw"}),
}
PLUGINS = (TiffImagePlugin, WebPImagePlugin)


def draw(rng: np.random.Generator, size: int) -> Image.Image:
    """Noise of several octaves, as photographs have."""
    sizes = [max(2, size >> octave) for octave in range(6)]
    layers = [Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((size, size)) for n in sizes]
    weights = [0.03, 0.05, 0.1, 0.2, 0.3, 0.32]
    pixels = sum(np.asarray(layer, np.float32) * weight for layer, weight in zip(layers, weights, strict=True))
    return Image.fromarray(np.asarray(pixels).clip(0, 255).astype(np.uint8))


def load(data: bytes, pillow_format: str) -> None:
    Image.open(BytesIO(data), formats=(pillow_format,)).load()


def header(data: bytes, pillow_format: str) -> None:
    image = Image.open(BytesIO(data), formats=(pillow_format,))
    _ = image.size, image.mode


def cpu_us(work: Callable[[bytes], object], images: list[bytes]) -> float:
    start = time.process_time()
    for data in images:
        work(data)
    return (time.process_time() - start) / len(images) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--size", type=int, nargs="+", default=[64, 224])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"{'CPU us an image':24} {'Pillow load':>12} {'decode':>8} {'beyond':>8} {'Pillow open':>12} {'header':>8}")
    for size in args.size:
        rng = np.random.default_rng(size)
        pictures = [draw(rng, size) for _ in range(args.images)]
        for name, (pillow_format, options) in WRITERS.items():
            images: list[bytes] = []
            for picture in pictures:
                stream = BytesIO()
                picture.save(stream, pillow_format, **options)
                images.append(stream.getvalue())
            report(f"{name} {size} px", images, pillow_format, args.rounds)


def report(title: str, images: list[bytes], pillow_format: str, rounds: int) -> None:
    with (
        Inspection(check="decode", limits=Limits()).open(attempt=1) as decoding,
        Inspection(check="header", limits=Limits()).open(attempt=1) as reading,
    ):
        ways: tuple[Callable[[bytes], object], ...] = (
            lambda data: load(data, pillow_format),
            lambda data: decoding.inspect(data, ""),
            lambda data: header(data, pillow_format),
            lambda data: reading.inspect(data, ""),
        )
        best = [
            min(times) for times in zip(*([cpu_us(way, images) for way in ways] for _ in range(rounds)), strict=True)
        ]
    bare, decode, opened, head = best
    print(f"{title:24} {bare:12.1f} {decode:8.1f} {decode / bare - 1:8.1%} {opened:12.1f} {head:8.2f}", flush=True)


if __name__ == "__main__":
    main()
