"""Sample rows to one batch: read, check, decode, transform, assemble.

Comes in: rows of a split's sample table, and the draw that asked for each. Goes out: one tensor ``[B, C, H, W]``, or
the images' bytes. Guarantees: no byte is decoded or handed out before its checksum was verified; a failure names the
shard, the key and the offset; the result depends on the rows alone, not on the thread that asks nor on what was asked
before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from pipeline.errors import IntegrityError, UsageError
from pipeline.images import ImageRejected, decode_crop, decode_kept, decode_rgb
from pipeline.schema import tar_path
from pipeline.snapshot import Snapshot
from pipeline.store import ShardRange, check_image
from pipeline.stream.cache import NodeCache
from pipeline.stream.remote import open_reader
from pipeline.stream.repeats import RepeatCache, RepeatsOf
from pipeline.stream.transforms import Draw, Planned, Transform, adapt, planned, uniforms


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What a batch is made of: equally long arrays, one entry per image, in batch order."""

    row: NDArray[np.int64]  # of the split's sample table
    class_id: NDArray[np.integer]
    position: NDArray[np.int64]
    repeat: NDArray[np.int64]
    key: NDArray[np.uint64]  # randomness of the draw

    def part(self, begin: int, end: int) -> Rows:
        """Entries [begin, end), without a copy."""
        cut = slice(begin, end)
        return Rows(
            row=self.row[cut],
            class_id=self.class_id[cut],
            position=self.position[cut],
            repeat=self.repeat[cut],
            key=self.key[cut],
        )

    def draws(self) -> Iterable[Draw]:
        """The same, one by one, as transforms take them."""
        columns = (self.position, self.class_id, self.repeat, self.key)
        for position, class_id, repeat, key in zip(*(column.tolist() for column in columns), strict=True):
            yield Draw(position=position, class_id=class_id, repeat=repeat, key=key)


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Where the bytes of some rows lie, and their XXH3-64: lists, as reading takes them one by one."""

    ranges: list[ShardRange]
    checksums: list[int]

    def part(self, begin: int, end: int) -> Places:
        """Entries [begin, end)."""
        return Places(ranges=self.ranges[begin:end], checksums=self.checksums[begin:end])


class BatchReader:
    """Images of one split; thread-safe. Without a transform they stay bytes."""

    def __init__(
        self,
        snapshot: Snapshot,
        split: str,
        transform: Transform | None,
        cache: NodeCache | None = None,
        repeats: RepeatCache | None = None,
    ) -> None:
        """``cache`` is for remote roots; ``repeats`` keeps what was decoded."""
        self._repeats = repeats
        self._snapshot = snapshot
        self._keys: dict[int, NDArray[np.uint64]] = {}  # of shards asked about: 8 bytes a sample
        self._samples = snapshot.samples(split)
        self._shards = open_reader(snapshot.store, cache, snapshot.shards, split)
        self._tars = [tar_path(sha256) for sha256 in snapshot.shards["tar_sha256"].to_pylist()]
        self._transform = None if transform is None else adapt(transform)
        self._planned = None if transform is None else planned(transform)

    def locate(self, row: NDArray[np.int64]) -> Places:
        """Where these rows lie. Looking up many at once costs a tenth of looking up a batch at a time."""
        shard, offset, size, checksum = (
            self._samples.take(name, row).tolist() for name in ("shard", "offset", "size", "checksum")
        )
        tars = self._tars
        return Places(
            ranges=list(zip([tars[number] for number in shard], offset, size, strict=True)), checksums=checksum
        )

    def images(self, rows: Rows, places: Places | None = None) -> torch.Tensor | list[bytes]:
        """The batch, in the order of ``rows``; ``places`` is ``locate(rows.row)`` where the caller knows it already."""
        data = self._read(rows.row, places or self.locate(rows.row))
        if self._transform is None:
            return data
        return self._crops(self._planned, rows, data) if self._planned else self._stack(rows, data)

    def keys(self, row: NDArray[np.int64]) -> list[str]:
        """The key of each sample: 16 hex digits, its name in the shard."""
        shards, places = self._samples.take("shard", row), self._samples.take("row", row)
        found = np.empty(len(row), dtype=np.uint64)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            found[mine] = self._keys_of(shard)[places[mine]]
        return [f"{key:016x}" for key in found.tolist()]

    def _keys_of(self, shard: int) -> NDArray[np.uint64]:
        if shard not in self._keys:
            names = self._snapshot.index(shard)["key"].to_pylist()
            self._keys[shard] = np.array([int(name, 16) for name in names], dtype=np.uint64)
        return self._keys[shard]

    def _read(self, row: NDArray[np.int64], places: Places) -> list[bytes]:
        images = self._shards.read_many(places.ranges, places.checksums)
        # One comparison of lists for the batch: 100,000 times a second, there is no statement to spare for each image.
        if list(map(xxhash.xxh3_64_intdigest, images)) != places.checksums:
            for i, (tar, offset, _) in enumerate(places.ranges):
                check_image(images[i], places.checksums[i], tar, offset, partial(self._name, row[i]))
        return images

    def _crops(self, transform: Planned, rows: Rows, data: list[bytes]) -> torch.Tensor:
        """Every crop decoded straight into its place of one uint8 batch, channels last in memory."""
        batch = np.empty((len(data), transform.size, transform.size, 3), dtype=np.uint8)
        uniform = uniforms(rows.key, transform.num_uniform)
        for i, image in enumerate(data):
            try:
                decode_crop(image, partial(transform.plan, uniform=uniform[i]), batch[i], self._kept(rows, i))
            except ImageRejected as rejected:
                raise IntegrityError(self._undecodable(rows.row[i], rejected)) from rejected
        return torch.from_numpy(batch).permute(0, 3, 1, 2)

    def _stack(self, rows: Rows, data: list[bytes]) -> torch.Tensor:
        """Every image straight into its place of one tensor; the first decides shape, type and memory layout."""
        batch: torch.Tensor | None = None
        for i, draw in enumerate(rows.draws()):
            image = self._pixels(rows.row[i], data[i], draw, self._kept(rows, i))
            if batch is None:
                batch = _empty_like(image, len(data))
            elif image.shape != batch.shape[1:] or image.dtype != batch.dtype:
                raise UsageError(
                    f"the transform must give every image one shape and type: image {self._name(rows.row[0])} became "
                    f"{list(batch.shape[1:])} {batch.dtype}, image {self._name(rows.row[i])} became "
                    f"{list(image.shape)} {image.dtype}; let it end with a resize or a crop"
                )
            batch[i] = image
        assert batch is not None
        return batch

    def _kept(self, rows: Rows, i: int) -> RepeatsOf | None:
        return self._repeats.of(int(rows.row[i]), int(rows.class_id[i])) if self._repeats else None

    def _pixels(self, row: np.int64, data: bytes, draw: Draw, kept: RepeatsOf | None) -> torch.Tensor:
        assert self._transform is not None
        try:
            pixels = decode_rgb(data) if kept is None else decode_kept(data, kept)
        except ImageRejected as rejected:
            raise IntegrityError(self._undecodable(row, rejected)) from rejected
        try:
            image = self._transform(torch.from_numpy(pixels).permute(2, 0, 1), draw)
        except Exception as error:
            error.add_note(f"in the transform of image {self._name(row)}, {draw}")
            raise
        if not isinstance(image, torch.Tensor) or image.ndim != 3:  # pyright: ignore[reportUnnecessaryIsInstance]
            found = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__  # pyright: ignore
            raise UsageError(
                f"the transform must return a tensor [C, H, W]; for image {self._name(row)} it gave {found}"
            )
        return image

    def _undecodable(self, row: np.int64, rejected: ImageRejected) -> str:
        shard, offset = (int(self._samples.take(name, [row])[0]) for name in ("shard", "offset"))
        return (
            f"image {self._name(row)} in {self._tars[shard]} at offset {offset} is as it was stored, but cannot be "
            f"decoded: {rejected}; build again with --check decode, which keeps such images out"
        )

    def _name(self, row: np.int64) -> str:
        """Key and source path, for messages."""
        shard, place = (int(self._samples.take(name, [row])[0]) for name in ("shard", "row"))
        return self._snapshot.describe(shard, place)


def _empty_like(image: torch.Tensor, batch_size: int) -> torch.Tensor:
    # Decoders write channels last; keeping that makes the copy a plain one, and GPUs prefer it.
    last = image.shape[0] > 1 and image.stride(0) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((batch_size, *image.shape), dtype=image.dtype, device=image.device, memory_format=layout)
