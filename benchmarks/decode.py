"""Decoders, and the ways to run them: `python benchmarks/decode.py [--images 400] [--photos DIR] > table.md`.

All decode the same JPEGs to RGB arrays, in turn, image sets of a thousand pixels apart in nothing but size; then make
the same 224-pixel crops of them. Each figure is the median of three rounds, in which all take turns, so that a busy
moment hits all alike; ratios are to Pillow, or to one thread, of the same round. `--torchcodec DIR` is where
`pip install --no-deps --target DIR torchcodec` put it, if it does not lie in this environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import simplejpeg
import torch
from photos import generate
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from pipeline.images import Crop, decode_crop
from pipeline.stream.transforms import Draw, RandomResizedCropFlip, uniforms

ROUNDS = 3
SIZE = 224

Decoder = Callable[[bytes], Any]


def pillow(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def torchvision_io(data: bytes) -> Any:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def simplejpeg_exact(data: bytes) -> Any:
    return simplejpeg.decode_jpeg(data, "RGB")


def simplejpeg_upsample(data: bytes) -> Any:
    return simplejpeg.decode_jpeg(data, "RGB", fastupsample=True)


def simplejpeg_fastest(data: bytes) -> Any:
    return simplejpeg.decode_jpeg(data, "RGB", fastupsample=True, fastdct=True)


def opencv(data: bytes) -> Any:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def torchcodec_decoder() -> Decoder | str:
    """What decodes an image by torchcodec, or why nothing does."""
    try:
        import torchcodec
        from torchcodec import decoders

        for name in ("decode_jpeg", "decode_image"):
            if hasattr(decoders, name):
                decode = getattr(decoders, name)
                return lambda data: decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        from torchcodec.decoders import VideoDecoder
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    del torchcodec
    return lambda data: VideoDecoder(data)[0]


DECODERS: dict[str, Decoder] = {
    "Pillow": pillow,
    "torchvision.io": torchvision_io,
    "simplejpeg": simplejpeg_exact,
    "simplejpeg, fast upsampling (ours)": simplejpeg_upsample,
    "simplejpeg, fast upsampling and DCT": simplejpeg_fastest,
    "OpenCV": opencv,
}


def crop_pillow(data: bytes, key: int) -> Any:
    """The usual: torchvision's resized crop of Pillow's pixels."""
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    return RandomResizedCropFlip(SIZE)(pixels, Draw(position=0, class_id=0, repeat=0, key=key))


def crop_torchvision(data: bytes, key: int) -> Any:
    pixels = torchvision_io(data)
    return RandomResizedCropFlip(SIZE)(pixels, Draw(position=0, class_id=0, repeat=0, key=key))


def crop_ours(data: bytes, key: int) -> Any:
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    transform = RandomResizedCropFlip(SIZE)
    uniform = uniforms(np.array([key], np.uint64), transform.num_uniform)[0]
    decode_crop(data, partial(transform.plan, uniform=uniform), out)
    return out


CROPS: dict[str, Callable[[bytes, int], Any]] = {
    "Pillow, torchvision's crop": crop_pillow,
    "torchvision.io, torchvision's crop": crop_torchvision,
    "decode_crop (ours)": crop_ours,
}


def work(crop: Callable[[bytes, int], Any], images: list[bytes]) -> np.ndarray:
    """A batch of crops, as a worker of a loader makes it: in a process it travels back."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    return np.stack([np.asarray(crop(data, key)).reshape(-1) for key, data in enumerate(images)])


def ways() -> dict[str, Callable[[], Any]]:
    spawn = get_context("spawn")
    found: dict[str, Callable[[], Any]] = {"in the caller": nullcontext}
    for number in (1, 2, 3, 4):
        found[f"{number} threads"] = partial(ThreadPoolExecutor, number)
    for number in (1, 2):
        found[f"{number} processes"] = partial(ProcessPoolExecutor, number, mp_context=spawn)
    return found


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU of this process) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def median(rounds: list[float]) -> float:
    return statistics.median(rounds)


def measure(calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """(wall, CPU) of each round, of each call; one untimed call each before."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            wall, cpu = timed(call)
            found[name][0].append(wall)
            found[name][1].append(cpu)
    return found


def decode_table(images: list[bytes], decoders: dict[str, Decoder]) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    calls = {name: partial(lambda decode: [decode(data) for data in images], d) for name, d in decoders.items()}
    found = measure(calls)
    print("| decoder | images a CPU second | to Pillow's | mean difference from Pillow, of 255 |\n|---|--:|--:|--:|")
    for name, (_, cpu) in found.items():
        ratio = median([a / b for a, b in zip(found["Pillow"][1], cpu, strict=True)])
        print(f"| {name} | {len(images) / median(cpu):,.0f} | {ratio:.2f} | {difference(decoders[name], images):.2f} |")
    print(flush=True)


def difference(decode: Decoder, images: list[bytes]) -> float:
    errors: list[float] = []
    for data in images[:40]:
        found = np.asarray(decode(data))
        found = found.transpose(1, 2, 0) if found.shape[0] == 3 else found
        errors.append(float(np.abs(found.astype(int) - pillow(data)).mean()))
    return statistics.mean(errors)


def ways_table(images: list[bytes]) -> None:
    parts = [images[i : i + 16] for i in range(0, len(images), 16)]
    for name, crop in CROPS.items():
        pools: dict[str, Any] = {way: make() for way, make in ways().items()}

        def run(pool: Executor | None, crop: Callable[[bytes, int], Any] = crop) -> None:
            made = map(partial(work, crop), parts) if pool is None else pool.map(partial(work, crop), parts)
            assert sum(len(batch) for batch in made) == len(images)

        opened = {way: None if isinstance(pool, nullcontext) else pool for way, pool in pools.items()}
        found = measure({way: partial(run, pool) for way, pool in opened.items()})
        for way, (wall, _) in found.items():
            ratio = median([a / b for a, b in zip(found["in the caller"][0], wall, strict=True)])
            print(f"| {name} | {way} | {len(images) / median(wall):,.0f} | {ratio:.2f} |", flush=True)
        for pool in opened.values():
            if pool is not None:
                pool.shutdown()


def error_table(photos: list[bytes]) -> None:
    """From torchvision's antialiased result on Pillow's pixels, for the default transforms."""
    print("| transform | output | mean | 99.9 % are below | largest | shift in brightness |\n|---|--:|--:|--:|--:|--:|")
    for size in (224, 112, 64):
        for name in ("train", "eval"):
            errors = [_errors(data, key, name, size) for key, data in enumerate(photos)]
            flat = np.concatenate([np.abs(e).ravel() for e in errors])
            most = np.quantile(flat, 0.999)
            shift = statistics.mean(float(e.mean()) for e in errors)
            print(f"| {name} | {size} | {flat.mean():.2f} | {most:.0f} | {flat.max()} | {shift:+.2f} |")


def _errors(data: bytes, key: int, name: str, size: int) -> np.ndarray:
    pixels = torch.from_numpy(pillow(data).copy()).permute(2, 0, 1)
    out = np.empty((size, size, 3), np.uint8)
    if name == "train":
        transform = RandomResizedCropFlip(size)
        exact = transform(pixels, Draw(position=0, class_id=0, repeat=0, key=key))
        uniform = uniforms(np.array([key], np.uint64), transform.num_uniform)[0]
        decode_crop(data, partial(transform.plan, uniform=uniform), out)
    else:
        resize = size * 8 // 7
        exact = functional.center_crop(functional.resize(pixels, [resize], antialias=True), [size, size])

        def plan(height: int, width: int) -> Crop:
            short, long = sorted((height, width))
            scaled = (resize, int(resize * long / short))
            scaled = scaled if height <= width else scaled[::-1]
            return Crop(top=0, left=0, rows=height, columns=width, height=scaled[0], width=scaled[1])

        decode_crop(data, plan, out)
    return out.astype(int) - exact.permute(1, 2, 0).numpy().astype(int)


def versions() -> str:
    names = ("torch", "torchvision", "pillow", "simplejpeg", "opencv-python-headless", "numpy")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{os.cpu_count()} cores, Python {platform.python_version()}; {found}. Load average now: {load}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--photos", help="a folder of JPEGs for the pixel errors; by default the images themselves")
    parser.add_argument("--torchcodec", help="where it was installed")
    arguments = parser.parse_args()
    if arguments.torchcodec:
        sys.path.append(arguments.torchcodec)
    decoders, codec = dict(DECODERS), torchcodec_decoder()
    if not isinstance(codec, str):
        decoders["torchcodec"] = codec
    print(f"# Decoders and the ways to run them\n\n{versions()}\n")
    if isinstance(codec, str):
        print(f"torchcodec does not load here: {codec}\n")
    sets: dict[int, list[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (224, 440):
            generate(Path(folder, str(size)), num_images=arguments.images, num_classes=10, size=size)
            sets[size] = [path.read_bytes() for path in sorted(Path(folder, str(size)).rglob("*.jpg"))]
    for size, images in sets.items():
        print(f"## Decoding {len(images)} JPEGs of {size} pixels\n")
        decode_table(images, decoders)
    for size, images in sets.items():
        print(f"## {len(images)} training crops of JPEGs of {size} pixels, and ways to run them\n")
        print("| crop | run | images a second | to the caller's |\n|---|---|--:|--:|")
        ways_table(images)
        print()
    photos = sets[440]
    if arguments.photos:
        photos = [path.read_bytes() for path in sorted(Path(arguments.photos).rglob("*.jpg"))[::27][:96]]
    print(f"## Error of the fast crops on {len(photos)} photographs, of 255\n")
    error_table(photos)


if __name__ == "__main__":
    main()
