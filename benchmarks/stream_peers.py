"""What each loader of ``stream.py`` reads, and how: ``PEERS[name](case)`` gives endless batches as its users would.

Every peer reads the same images in its own format, made once by ``prepare``. Raw batches are lists of bytes. Decoded
ones went through RandomResizedCrop(224) and a random flip; the row's name says whether as floats (ToTensor, Normalize)
or as uint8. One that cannot do what is asked raises ``CannotError``, and its row says why.
"""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CannotError(Exception):
    """The peer has no way to do this; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked of a loader."""

    data: str
    size: int
    decoded: bool
    balanced: bool
    workers: int

    def at(self, kind: str) -> Path:
        return Path(self.data) / f"{kind}-{self.size}"


# ---- what all but ours share


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def torch_batches(dataset: Any, case: Case, **options: Any) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    collate = None if case.decoded else list
    return endless(
        DataLoader(dataset, batch_size=BATCH, num_workers=case.workers, collate_fn=collate, drop_last=True, **options)
    )


def float_transform() -> Callable[[Any], Any]:
    from torchvision import transforms as v1

    steps = [v1.RandomResizedCrop(224), v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(MEAN, STD)]
    return v1.Compose(steps)


def uint8_transform() -> Callable[[Any], Any]:
    from torchvision.transforms import v2

    return v2.Compose([v2.ToImage(), v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()])


def pillow_rgb(data: bytes) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class Decode:
    """Bytes to the tensor of the float pipeline; a class, so that workers and formats may pickle it."""

    def __init__(self) -> None:
        self._transform = float_transform()

    def __call__(self, data: bytes) -> Any:
        return self._transform(pillow_rgb(data))


# ---- the loaders


def evenshard(case: Case) -> Iterator[Any]:
    from pipeline import Loader, open_snapshot

    manifest = open_snapshot(case.at("root")).manifest("even" if case.balanced else "natural")
    return endless(Loader(manifest, BATCH, workers=case.workers, decode=case.decoded))


def evenshard_repeats(case: Case) -> Iterator[Any]:
    """With 512 MB of decoded images kept, after a first epoch."""
    return endless(_warm_loader(str(case.at("root")), "even" if case.balanced else "natural", case.workers))


@functools.cache
def _warm_loader(root: str, name: str, workers: int) -> Any:
    from pipeline import Loader, open_snapshot

    loader = Loader(open_snapshot(root).manifest(name), BATCH, workers=workers, repeat_bytes=512 << 20)
    for _ in loader:
        pass
    return loader


def evenshard_exact(case: Case) -> Iterator[Any]:
    """Pixels as torchvision's, antialiased."""
    from pipeline import Loader, open_snapshot
    from pipeline.stream.transforms import RandomResizedCropFlip

    manifest = open_snapshot(case.at("root")).manifest("even" if case.balanced else "natural")
    transform = RandomResizedCropFlip(224, quality="exact")
    return endless(Loader(manifest, BATCH, workers=case.workers, transform=transform))


def image_folder(case: Case, transform: Callable[[], Any]) -> Iterator[Any]:
    import torch
    from torch.utils.data import WeightedRandomSampler
    from torchvision.datasets import ImageFolder

    if case.decoded:
        dataset = ImageFolder(case.at("photos"), transform=transform())
    else:
        dataset = ImageFolder(case.at("photos"), loader=read_bytes)
    if not case.balanced:
        return torch_batches(dataset, case, shuffle=True)
    targets = torch.tensor(dataset.targets)
    sampler = WeightedRandomSampler((1 / torch.bincount(targets).double())[targets].tolist(), len(dataset))
    return torch_batches(dataset, case, sampler=sampler)


def image_folder_float(case: Case) -> Iterator[Any]:
    return image_folder(case, float_transform)


def image_folder_uint8(case: Case) -> Iterator[Any]:
    return image_folder(case, uint8_transform)


def webdataset(case: Case) -> Iterator[Any]:
    """Balanced: RandomMix over one repeated dataset a class, as its documentation has it."""
    import webdataset as wds

    decode = float_transform() if case.decoded else None

    def finish(dataset: Any) -> Any:
        if decode is None:
            return dataset.to_tuple("jpg", "cls")
        return dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(decode, lambda label: label)

    if not case.balanced:
        tars = sorted(map(str, case.at("wds").glob("mixed-*.tar")))
        dataset = finish(wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(1000))
        return torch_batches(dataset, case)
    if case.workers:
        raise CannotError("one tar a class cannot be split over workers")
    tars = sorted(map(str, case.at("wds").glob("class-*.tar")))
    parts = [finish(wds.WebDataset(tar, shardshuffle=False, empty_check=False).repeat().shuffle(10)) for tar in tars]
    return torch_batches(wds.RandomMix(parts, [1.0] * len(parts)), case)


class _Mds:
    """A view of a Mosaic dataset that decodes; made after it, because its class must be subclassed lazily."""

    @staticmethod
    @functools.cache
    def dataset_type() -> Any:
        from streaming import StreamingDataset

        class Photos(StreamingDataset):
            decode: Any = None

            def __getitem__(self, at: Any) -> Any:
                sample = super().__getitem__(at)
                data = sample["jpg"]
                return (data if self.decode is None else self.decode(data)), sample["cls"]

        return Photos


def mosaic(case: Case) -> Iterator[Any]:
    """Balanced: one stream a class, each with the same ``choose``."""
    from streaming import Stream
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    options: dict[str, Any] = {"shuffle": True, "batch_size": BATCH, "shuffle_algo": "py1e"}
    if case.balanced:
        folders = sorted(case.at("mds-classes").iterdir())
        each = -(-count_photos(case) // len(folders))
        streams = [Stream(local=str(folder), choose=each) for folder in folders]
        dataset = _Mds.dataset_type()(streams=streams, **options)
    else:
        dataset = _Mds.dataset_type()(local=str(case.at("mds")), **options)
    dataset.decode = Decode() if case.decoded else None
    return torch_batches(dataset, case)


class _Lit:
    """A litData dataset that decodes; at the top of this module, as its workers are sent it by name."""

    @staticmethod
    @functools.cache
    def dataset_type() -> Any:
        from litdata import StreamingDataset

        class LitPhotos(StreamingDataset):
            decode: Any = None

            def __getitem__(self, at: Any) -> Any:
                data, label = super().__getitem__(at)
                return (bytes(data) if self.decode is None else self.decode(data)), label  # workers send no views

        LitPhotos.__qualname__ = "LitPhotos"
        return LitPhotos


def __getattr__(name: str) -> Any:
    """Where pickle, in a worker that was spawned, looks for the class."""
    if name == "LitPhotos":
        return _Lit.dataset_type()
    raise AttributeError(name)


def litdata(case: Case) -> Iterator[Any]:
    import litdata as lit

    if case.balanced:
        raise CannotError("its CombinedStreamingDataset ends with the first class that runs out")
    dataset = _Lit.dataset_type()(str(case.at("lit")), shuffle=True, drop_last=False)
    dataset.decode = Decode() if case.decoded else None
    options: dict[str, Any] = {"multiprocessing_context": "spawn"} if case.workers else {}  # a fork hangs
    if not case.decoded:
        options["collate_fn"] = list
    return endless(
        lit.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=case.workers, shuffle=True, **options)
    )


PEERS: dict[str, Callable[[Case], Iterator[Any]]] = {
    "evenshard": evenshard,
    "evenshard, exact": evenshard_exact,
    "evenshard, repeats kept": evenshard_repeats,
    "ImageFolder, float": image_folder_float,
    "ImageFolder, v2 uint8": image_folder_uint8,
    "webdataset": webdataset,
    "MosaicML Streaming": mosaic,
    "litData": litdata,
}
RAW_NAMES = {"ImageFolder, float": "ImageFolder"}
RAW_SKIPS = {"evenshard, exact", "evenshard, repeats kept", "ImageFolder, v2 uint8"}


def batch_size(batch: Any) -> int:
    """Images in a batch: ``(images, labels)``, or a list of ``(image, label)``."""
    first = batch[0] if isinstance(batch, list | tuple) else batch
    return len(batch) if isinstance(first, tuple) else len(first)


# ---- their formats


def photos(case: Case) -> list[tuple[str, int]]:
    """Every file with its class, in class order."""
    folders = sorted(path for path in case.at("photos").iterdir() if path.is_dir())
    return [(str(file), label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]


def count_photos(case: Case) -> int:
    return len(photos(case))


def prepare_evenshard(case: Case) -> None:
    import pipeline

    num_classes = photos(case)[-1][1] + 1
    even = f"balanced:per_class={-(-count_photos(case) // num_classes)}"
    pipeline.build(case.at("photos"), case.at("root"), manifests={"even": even}, check="header", workers=2)


def prepare_webdataset(case: Case) -> None:
    import webdataset as wds

    folder = case.at("wds")
    folder.mkdir()
    files = photos(case)
    with wds.ShardWriter(f"{folder}/mixed-%05d.tar", maxcount=2000, verbose=0) as writer:
        for number in random.Random(0).sample(range(len(files)), len(files)):
            path, label = files[number]
            writer.write({"__key__": f"{number:08d}", "jpg": read_bytes(path), "cls": str(label).encode()})
    for label in range(files[-1][1] + 1):
        with wds.TarWriter(f"{folder}/class-{label:05d}.tar") as writer:
            for number, (path, of) in enumerate(files):
                if of == label:
                    writer.write({"__key__": f"{number:08d}", "jpg": read_bytes(path), "cls": str(label).encode()})


def prepare_mosaic(case: Case) -> None:
    from streaming import MDSWriter

    files = photos(case)
    columns = {"jpg": "bytes", "cls": "int"}
    with MDSWriter(out=str(case.at("mds")), columns=columns) as writer:
        for path, label in random.Random(0).sample(files, len(files)):
            writer.write({"jpg": read_bytes(path), "cls": label})
    for label in range(files[-1][1] + 1):
        with MDSWriter(out=str(case.at("mds-classes") / f"{label:05d}"), columns=columns) as writer:
            for path, of in files:
                if of == label:
                    writer.write({"jpg": read_bytes(path), "cls": of})


def _as_sample(file: tuple[str, int]) -> tuple[bytes, int]:
    return read_bytes(file[0]), file[1]


def prepare_litdata(case: Case) -> None:
    import litdata as lit

    files = photos(case)
    mixed = random.Random(0).sample(files, len(files))
    lit.optimize(fn=_as_sample, inputs=mixed, output_dir=str(case.at("lit")), chunk_bytes="16MB", num_workers=2)


PREPARE: dict[str, tuple[Callable[[Case], None], tuple[str, ...]]] = {
    "evenshard": (prepare_evenshard, ("root",)),
    "webdataset": (prepare_webdataset, ("wds",)),
    "MosaicML Streaming": (prepare_mosaic, ("mds", "mds-classes")),
    "litData": (prepare_litdata, ("lit",)),
}


def prepare(name: str, case: Case) -> None:
    """This peer's copy of the images, once: a half-made one is made again."""
    if name not in PREPARE:
        return
    make, kinds = PREPARE[name]
    done = case.at(kinds[0]).with_suffix(".done")
    if not done.exists():
        for kind in kinds:
            shutil.rmtree(case.at(kind), ignore_errors=True)
        make(case)
        done.touch()
