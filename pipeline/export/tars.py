"""Physical resampled tars: ``key.jpg`` and ``key.cls`` per draw, ``key-r3`` for the third repeat of an image."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import AlreadyExistsError, UsageError
from pipeline.ingest.engines import open_engine
from pipeline.ingest.shards import TarWriter
from pipeline.plan.epoch import EpochFunction
from pipeline.schema import tar_path
from pipeline.snapshot import Manifest, open_snapshot
from pipeline.store import ShardReader, Store, read_image

EXPORT_FORMAT_VERSION = 1
_CHUNK_DRAWS = 65_536
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What will be written: one epoch of one manifest, cut into ``num_shards`` nearly equal runs of positions."""

    root: str
    snapshot: int
    manifest: str
    digest: str  # of the manifest
    seed: int
    epoch: int
    num_draws: int
    num_shards: int

    def bounds(self, shard: int) -> tuple[int, int]:
        """First and one past the last draw of a shard, counted from the start of the epoch."""
        return shard * self.num_draws // self.num_shards, (shard + 1) * self.num_draws // self.num_shards

    def shard_name(self, shard: int) -> str:
        """File name of a shard below DEST."""
        return f"{self.manifest}-{shard:06d}.tar"


@dataclass(frozen=True, kw_only=True)
class ExportCost:
    """Disk that an export needs, exactly, beside what the snapshot holds of the same images."""

    tar_bytes: int
    num_distinct: int
    distinct_bytes: int  # of the distinct images alone


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export wrote. ``num_reused`` shards were there from an earlier, cut-off run."""

    dest: str
    num_draws: int
    num_shards: int
    num_reused: int
    tar_bytes: int
    pattern: str  # brace pattern of the shards, as webdataset takes it


def plan_export(manifest: Manifest, *, seed: int = 0, epoch: int = 0, shard_samples: int = 2000) -> ExportPlan:
    """Cut epoch ``epoch`` of ``manifest`` into shards of at most ``shard_samples`` draws."""
    if shard_samples < 1 or epoch < 0:
        raise UsageError(f"shard_samples must be at least 1 and epoch at least 0, not {shard_samples} and {epoch}")
    return ExportPlan(
        root=manifest.snapshot.root,
        snapshot=manifest.snapshot.number,
        manifest=manifest.name,
        digest=manifest.digest,
        seed=seed,
        epoch=epoch,
        num_draws=manifest.num_draws,
        num_shards=max(1, -(-manifest.num_draws // shard_samples)),
    )


def export_cost(manifest: Manifest, plan: ExportPlan) -> ExportCost:
    """Walk the epoch once, without reading an image; O(M) time, a window of draws in memory."""
    sizes = manifest.snapshot.samples(manifest.split)
    seen = np.zeros(sizes.num_rows, dtype=bool)
    total = plan.num_shards * 2 * _BLOCK
    for rows, _, _ in _walk(manifest, plan, 0, plan.num_draws):
        size = sizes.take("size", rows).astype(np.int64)
        total += int((_BLOCK * 3 + (size + _BLOCK - 1) // _BLOCK * _BLOCK).sum())
        seen[rows] = True
    distinct = np.flatnonzero(seen)
    return ExportCost(
        tar_bytes=total,
        num_distinct=len(distinct),
        distinct_bytes=int(sizes.take("size", distinct).astype(np.int64).sum()),
    )


def export_tars(
    manifest: Manifest,
    dest: str | os.PathLike[str],
    plan: ExportPlan,
    *,
    workers: int | None = None,
    address: str | None = None,
    allow_open: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExportSummary:
    """Write ``plan`` below ``dest`` one unit of work per shard.

    Errors: ``AlreadyExistsError`` when ``dest`` holds something else; ``IntegrityError`` for a damaged image.
    """
    notify = progress or (lambda stage, done, total: None)
    store = _open_dest(str(dest), plan)
    names = [plan.shard_name(shard) for shard in range(plan.num_shards)]
    missing = [shard for shard, name in enumerate(names) if not store.exists(name)]
    done = plan.num_draws - sum(stop - start for start, stop in map(plan.bounds, missing))
    if missing:
        units = ((names[shard], (plan, shard, store.root)) for shard in missing)
        with open_engine(address=address, workers=workers, allow_open=allow_open) as engine:
            for count in engine.map(write_shard, units, "export"):
                done += count
                notify("export", done, plan.num_draws)
    _describe(store, manifest, plan, names)
    last = plan.num_shards - 1
    span = f"{{000000..{last:06d}}}" if last else "000000"
    return ExportSummary(
        dest=store.url,
        num_draws=plan.num_draws,
        num_shards=plan.num_shards,
        num_reused=plan.num_shards - len(missing),
        tar_bytes=sum(store.size(name) for name in names),
        pattern=f"{plan.manifest}-{span}.tar",
    )


def write_shard(plan: ExportPlan, shard: int, dest: str, *, attempt: int) -> Iterator[int]:
    """Write one shard; yields its number of draws. Runs inside a worker."""
    del attempt  # nothing is decoded
    manifest = open_snapshot(plan.root, at=plan.snapshot).manifest(plan.manifest)
    store = Store.open(dest)
    folder = store.staging_dir()
    path = os.path.join(folder, "shard.tar")
    try:
        with open(path, "xb", buffering=1 << 20) as stream:
            tar = TarWriter(stream)
            for name, label, extension, data in _members(manifest, plan, *plan.bounds(shard)):
                tar.add(f"{name}.cls", b"%d" % label)
                tar.add(f"{name}.{extension}", data)
            tar.close()
        store.put_file(plan.shard_name(shard), path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    start, stop = plan.bounds(shard)
    yield stop - start


def _walk(
    manifest: Manifest, plan: ExportPlan, start: int, stop: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Sample rows, class ids and repeat numbers of draws ``[start, stop)`` of the epoch, chunk by chunk."""
    function = EpochFunction(manifest.pool, manifest.targets, plan.seed)
    first = function.epoch_start(plan.epoch)
    starts = manifest.snapshot.class_starts(manifest.split)
    for begin in range(start, stop, _CHUNK_DRAWS):
        drawn = function.draws(first + begin, first + min(begin + _CHUNK_DRAWS, stop))
        ordinal, repeat = function.images(drawn.class_id, drawn.draw)
        yield starts[drawn.class_id] + ordinal, drawn.class_id.astype(np.int64), repeat


def _members(manifest: Manifest, plan: ExportPlan, start: int, stop: int) -> Iterator[tuple[str, int, str, bytes]]:
    snapshot = manifest.snapshot
    samples, shards = snapshot.samples(manifest.split), snapshot.shards["tar_sha256"]
    reader = ShardReader(snapshot.store)
    for rows, labels, repeats in _walk(manifest, plan, start, stop):
        columns = [samples.take(name, rows).tolist() for name in ("shard", "row", "offset", "size", "checksum")]
        for shard, row, offset, size, checksum, label, repeat in zip(
            *columns, labels.tolist(), repeats.tolist(), strict=True
        ):
            index = snapshot.index(shard)
            key, extension = index["key"][row].as_py(), index["format"][row].as_py()
            data = read_image(reader, tar_path(shards[shard].as_py()), offset, size, checksum, key)
            yield key if repeat == 0 else f"{key}-r{repeat}", label, extension, data


def _open_dest(dest: str, plan: ExportPlan) -> Store:
    """DEST must be empty, or hold the same export, finished or cut off."""
    store = Store.open(dest, create=True)
    body = {name: getattr(plan, name) for name in ("digest", "seed", "epoch", "num_draws", "num_shards")}
    body |= {"format": "evenshard-export-plan", "format_version": EXPORT_FORMAT_VERSION, "manifest": plan.manifest}
    wanted = json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"
    present = store.list("")
    if "plan.json" in present:
        if store.read("plan.json") != wanted:
            raise AlreadyExistsError(f"{store.url} holds another export (see plan.json there); choose an empty DEST")
    elif present:
        raise AlreadyExistsError(
            f"{store.url} is not empty ({present[0]}, ...) and holds no export; choose an empty DEST"
        )
    else:
        try:
            store.create("plan.json", wanted)
        except AlreadyExistsError:  # another export began in the meantime: judge it by the same rule
            return _open_dest(dest, plan)
    return store


def _describe(store: Store, manifest: Manifest, plan: ExportPlan, names: list[str]) -> None:
    """``export.json``: class names and counts, and the shards with sizes, for whoever reads the tars."""
    bounds = [plan.bounds(shard) for shard in range(plan.num_shards)]
    shards: list[dict[str, Any]] = [
        {"url": name, "nsamples": stop - start, "filesize": store.size(name)}
        for name, (start, stop) in zip(names, bounds, strict=True)
    ]
    body = {
        "format": "evenshard-export",
        "format_version": EXPORT_FORMAT_VERSION,
        "manifest": {"name": plan.manifest, "sha256": plan.digest, "seed": plan.seed, "epoch": plan.epoch},
        "num_draws": plan.num_draws,
        "classes": manifest.snapshot.classes["name"].to_pylist(),
        "targets": manifest.targets.tolist(),
        "shardlist": shards,
    }
    data = json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    if not store.exists("export.json"):
        store.create("export.json", data)
