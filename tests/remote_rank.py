"""What one rank reads: for tests in one process, and, being quick to import, for processes of their own."""

from __future__ import annotations

import numpy as np
import xxhash

from pipeline.schema import tar_path
from pipeline.snapshot import Snapshot, open_snapshot
from pipeline.store import ShardRange, ShardReader, Store
from pipeline.stream.cache import NodeCache
from pipeline.stream.remote import open_reader

Request = tuple[ShardRange, int]


def every_image(snapshot: Snapshot, split: str = "train") -> list[Request]:
    """Range and checksum of each image of a split."""
    samples, tars = snapshot.samples(split), snapshot.shards["tar_sha256"].to_pylist()
    columns = (samples.slice(name, 0, samples.num_rows).tolist() for name in ("shard", "offset", "size", "checksum"))
    return [
        ((tar_path(tars[shard]), offset, size), checksum)
        for shard, offset, size, checksum in zip(*columns, strict=True)
    ]


def epoch(requests: list[Request], num_draws: int, seed: int = 1) -> list[list[Request]]:
    """Batches of 16 random draws, with repeats."""
    drawn = np.random.default_rng(seed).integers(0, len(requests), num_draws).tolist()
    return [[requests[i] for i in drawn[begin : begin + 16]] for begin in range(0, num_draws, 16)]


def read(reader: ShardReader, batch: list[Request]) -> list[bytes]:
    return reader.read_many([request for request, _ in batch], [checksum for _, checksum in batch])


def read_all(url: str, directory: str, max_bytes: int) -> str:
    """A rank: 200 draws of the training split, and a digest of their bytes. For processes of their own."""
    snapshot = open_snapshot(url)
    reader = open_reader(Store.open(url), NodeCache(directory, max_bytes), snapshot.shards, "train")
    digest = xxhash.xxh3_128()
    for batch in epoch(every_image(snapshot), 200):
        for data in read(reader, batch):
            digest.update(data)
    return digest.hexdigest()
