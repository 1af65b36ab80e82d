"""The loaders: which positions make the next batch, where training stands, and how to go on from there.

Comes in: a manifest and a batch size per rank. Goes out: batches, and a state of five small values. docs/TRAINING.md
shows both loaders in PyTorch, Lightning, Accelerate, Hugging Face Trainer and fastai.

Global step s takes G = batch size x ranks positions of the manifest's endless sequence; rank r takes its slice of them.

    positions   0 . . . . . . S1 . . . . . . . S2        S = where an epoch starts, G = 4, two ranks of 2
    steps       [r0 r1][r0 r1][r0 r1][r0 r1]...          a step belongs to the epoch of its first position

Guarantees: nothing is dropped, padded or drawn twice; every rank does equally many steps, known before anything is
read; the sequence of draws is the manifest's and the seed's alone (E5); restoring a state goes on with exactly the
batches that were not handed out yet, or, with another global batch, with exactly the samples (E6).
"""

from __future__ import annotations

import operator
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from pipeline.errors import StateError, UsageError
from pipeline.keyed import derive, keyed_hash, permute, seed_key
from pipeline.plan.epoch import EPOCH_RULE, EpochFunction
from pipeline.snapshot import Manifest, Snapshot
from pipeline.stream.batches import BatchReader, Rows
from pipeline.stream.cache import NodeCache, default_cache
from pipeline.stream.damage import Replacement
from pipeline.stream.drawn import Batch, Built, DrawnBatches, Recipe, pinned
from pipeline.stream.indexing import IteratedOnly
from pipeline.stream.prefetch import Patience, Prefetch
from pipeline.stream.repeats import RepeatCache
from pipeline.stream.transforms import RandomResizedCropFlip, ResizeCenterCrop, Transform

STATE_FORMAT_VERSION = 1

TIMEOUT_S = 300.0
"""Twice what reads of remote storage take to give up by themselves, and half of what NCCL waits for a rank."""

_NAMED_SHARDS = 4
_AUGMENT = 4  # purposes of keys: 1 to 3 are the epoch function's when, which and turn
_EVALUATION_ORDER = 5

OnDamage = Literal["raise", "replace"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Which part of a global batch is ours."""

    rank: int
    world_size: int

    @classmethod
    def resolve(cls, rank: int | None, world_size: int | None) -> Topology:
        """From arguments, else from ``torch.distributed``, else one rank."""
        if rank is None and world_size is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            if not distributed:
                return cls(rank=0, world_size=1)
            return cls(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())
        if rank is None or world_size is None:
            raise UsageError(f"give rank and world_size together or neither, got rank={rank}, world_size={world_size}")
        if not 0 <= _whole("rank", rank, at_least=0) < _whole("world_size", world_size, at_least=1):
            raise UsageError(f"rank must be below world_size, got rank={rank}, world_size={world_size}")
        return cls(rank=operator.index(rank), world_size=operator.index(world_size))


class Loader(IteratedOnly):
    """Batches of a manifest; each ``iter()`` yields (the rest of) one epoch, and the next ``iter()`` the next epoch.

    All batches are full: the one at a seam holds draws of both epochs, and belongs to the one it starts in. So class
    counts are exact over the draws, and ``len(loader)`` may differ by one between epochs.

    Leaving the loop early and calling ``iter()`` again starts the next epoch too; to go on within the epoch, restore
    the state. ``set_epoch(e)`` chooses the epoch of the next ``iter()``, and changes nothing if that already lies in
    epoch e, so ``for e in range(loader.epoch, num_epochs): loader.set_epoch(e)`` also resumes in the middle of an
    epoch. One iterator lives at a time: ``iter``, ``set_epoch`` and ``load_state_dict`` end the one before.
    """

    def __init__(
        self,
        manifest: Manifest,
        batch_size: int,
        *,
        transform: Transform | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        workers: int = 0,
        decode: bool = True,
        details: bool = False,
        prefetch: int | None = None,
        pin_memory: bool = False,
        on_damage: OnDamage = "raise",
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        repeat_bytes: int = 0,
        timeout_s: float | None = TIMEOUT_S,
    ) -> None:
        """``batch_size`` is per rank, ``workers`` counts threads, ``prefetch`` batches made ahead by each of them (2).

        ``transform(image)`` or ``transform(image, draw)`` makes tensors of equal shape from uint8 ``[C, H, W]``; the
        default is a random 224 x 224 crop, perhaps mirrored. ``decode=False`` yields the images' bytes as they lie in
        the shards. ``pin_memory`` puts images and labels into page-locked memory, where CUDA is available; elsewhere it
        does nothing, so one script runs on both.

        ``on_damage="replace"`` gives the place of an image that cannot be read or decoded to the next other image of
        its class, by the order of draws: the label, and all other rows, stay. ``num_replaced`` counts such rows, and a
        warning names each damaged image once. A file that is missing, and a damaged table, still raise.

        Remote roots are read through a cache that all ranks of a node share, of at most ``cache_bytes`` (64 GiB, or
        half of what the disk has left) in ``cache_dir`` ($EVENSHARD_CACHE, or ~/.cache/evenshard).

        ``repeat_bytes`` of memory, of this process, keep decoded images, those drawn most often: pixels stay the same,
        and a balanced epoch of a long tail needs up to half as much processor time (docs/TRAINING.md).

        A batch that threads do not bring within ``timeout_s`` is a StalledError, which names rank, stage and shards: a
        rank that hangs ends instead of holding up all others until their collective gives up. With ``workers=0``
        batches are made in the caller's thread, where nothing can end them.

        A Loader can be pickled if its transform can. The copy goes on where this one stands, as the same rank, with
        threads of its own; it reads on its own account, so this one should stop.
        """
        self._made_with: dict[str, Any] = {
            "transform": transform, "seed": seed, "workers": workers, "decode": decode, "details": details,
            "prefetch": prefetch, "pin_memory": pin_memory, "on_damage": on_damage, "cache_dir": cache_dir,
            "cache_bytes": cache_bytes, "repeat_bytes": repeat_bytes, "timeout_s": timeout_s,
        }  # fmt: skip
        self._topology = Topology.resolve(rank, world_size)
        self._timeout_s = _seconds(timeout_s)
        self._batch_size = _whole("batch_size", batch_size, at_least=1)
        self._global_batch = self._batch_size * self._topology.world_size
        self._seed = _whole("seed", seed)
        self._threads, self._ahead = _concurrency(workers, prefetch)
        self.manifest = manifest
        self._plan = EpochFunction(manifest.pool, manifest.targets, self._seed)
        self._refuse_small_epoch()
        cache = _cache(manifest.snapshot, cache_dir, cache_bytes)
        repeats = _repeats(manifest, repeat_bytes)
        chosen = _transform(transform, decode, RandomResizedCropFlip(224))
        reader = BatchReader(manifest.snapshot, manifest.split, chosen, cache, repeats)
        class_starts = manifest.snapshot.class_starts(manifest.split)
        samples = manifest.snapshot.samples(manifest.split)
        self._reader = reader
        self._replacement = Replacement(reader, samples, self._plan, class_starts) if _replaces(on_damage) else None
        self._recipe = Recipe(
            plan=self._plan,
            class_starts=class_starts,
            augment=derive(seed_key(self._seed), _AUGMENT),
            first=self._topology.rank * self._batch_size,
            batch_size=self._batch_size,
            details=details,
            pin_memory=pin_memory,
        )
        self.num_replaced = 0
        """Rows handed out that stand in for damaged images, since this loader was made."""
        self._warned_of: set[int] = set()
        # The state: samples consumed over all ranks, and whether that place is where the next iter() starts (True) or
        # lies inside an epoch that an iterator has begun (False).
        self._consumed = 0
        self._at_start = True
        self._current: weakref.ref[_Steps] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        options = {**self._made_with, "rank": self._topology.rank, "world_size": self._topology.world_size}
        return _loader_again, (type(self), self.manifest, self._batch_size, options), self._progress()

    def __setstate__(self, progress: dict[str, Any]) -> None:
        self.load_state_dict(progress["state"])
        self.num_replaced, self._warned_of = progress["num_replaced"], set(progress["warned_of"])

    def _progress(self) -> dict[str, Any]:
        return {"state": self.state_dict(), "num_replaced": self.num_replaced, "warned_of": sorted(self._warned_of)}

    @property
    def epoch(self) -> int:
        """The epoch being iterated, else the one that the next ``iter()`` yields."""
        current = self._live()
        return current.epoch if current else self._plan.epoch_of(self._next_start())

    @property
    def step(self) -> int:
        """How many steps of ``epoch`` lie before the next batch: 0 at its start, more after a resume in its middle."""
        return (self._place() - self._plan.epoch_start(self.epoch)) // self._global_batch

    @property
    def num_steps(self) -> int:
        """Steps of the whole ``epoch``, from its start, wherever training stands in it."""
        start = self._plan.epoch_start(self.epoch)
        return len(self._steps_from(start + (self._place() - start) % self._global_batch))

    def __len__(self) -> int:
        """Steps of the iterator being advanced, from where it started; else of the next one."""
        current = self._live()
        return len(self._steps_from(self._next_start())) if current is None else current.num_steps

    def __iter__(self) -> Iterator[Batch]:
        self._move_to(self._next_start())
        starts = self._steps_from(self._consumed)
        drawn = DrawnBatches(self._recipe, self._reader, self._replacement, starts)
        patience = _patience(self._timeout_s, self._describe)
        batches = Prefetch(drawn.batch, starts, threads=self._threads, ahead=self._ahead, patience=patience)
        steps = _Steps(self, batches, epoch=self._plan.epoch_of(self._consumed), num_steps=len(starts))
        self._current = weakref.ref(steps)
        return steps

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` yield this epoch: from its start, or from where a restored state stands in it."""
        start = self._next_start()
        if self._plan.epoch_of(start) != _whole("epoch", epoch, at_least=0):
            start = -(-self._plan.epoch_start(epoch) // self._global_batch) * self._global_batch
        self._move_to(start)

    def state_dict(self) -> dict[str, int | str]:
        """Where training stands, as plain JSON, the same on every rank: ``consumed`` counts samples of all ranks."""
        return {**self._identity(), "consumed": self._consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state`` at the next ``iter()``, under any number of ranks and any batch size."""
        wrong = [
            f"{name}: the state has {state.get(name)!r}, this loader {expected!r}"
            for name, expected in self._identity().items()
            if state.get(name) != expected
        ]
        if wrong:
            raise StateError(
                "the state belongs to another sequence of draws; " + "; ".join(wrong) + ". Open the manifest and "
                "give the seed it was saved with, or start over without it"
            )
        consumed = state.get("consumed")
        if not isinstance(consumed, int) or isinstance(consumed, bool) or consumed < 0:
            raise StateError(f"consumed: expected a whole number of samples, got {consumed!r}; the state is damaged")
        self._move_to(consumed)

    def _identity(self) -> dict[str, int | str]:
        return {
            "format_version": STATE_FORMAT_VERSION,
            "epoch_rule": EPOCH_RULE,
            "manifest": self.manifest.digest,
            "seed": self._seed,
        }

    def _place(self) -> int:
        """The position of the next batch, or where the iterator being advanced has ended."""
        return self._consumed if self._live() else self._next_start()

    def _next_start(self) -> int:
        """The position of the first step of the next ``iter()``: the end of an epoch that was begun, on its lattice."""
        if self._at_start:
            return self._consumed
        return self._steps_from(self._consumed).stop

    def _steps_from(self, start: int) -> range:
        """First positions of the steps left in the epoch of ``start``; ``.stop`` is the first step after them."""
        end = self._plan.epoch_start(self._plan.epoch_of(start) + 1)
        num_steps = -(-(end - start) // self._global_batch)
        return range(start, start + num_steps * self._global_batch, self._global_batch)

    def _move_to(self, start: int) -> None:
        current, self._current = self._live(), None
        if current is not None:
            current.close()
        self._consumed, self._at_start = start, True

    def _live(self) -> _Steps | None:
        return self._current() if self._current else None

    def _handed_out(self, steps: _Steps, built: Built) -> None:
        self._consumed += self._global_batch
        self._at_start = steps.num_left == 0
        self.num_replaced += built.num_replaced
        for row in built.damage.keys() - self._warned_of:
            self._warned_of.add(row)
            warnings.warn(f"replaced by another image of its class: {built.damage[row]}", stacklevel=3)

    def _ended(self, steps: _Steps) -> None:
        if self._live() is steps:
            self._current = None

    def _describe(self, start: int) -> str:
        """The batch of this rank in the step that begins at ``start``, for an error."""
        begin = start + self._recipe.first
        drawn = self._plan.draws(begin, begin + self._batch_size)
        ordinal, _ = self._plan.images(drawn.class_id, drawn.draw)
        return _needs(self._topology, self._reader, begin, self._recipe.class_starts[drawn.class_id] + ordinal)

    def _refuse_small_epoch(self) -> None:
        num_draws = self._plan.num_draws(0)
        if num_draws < self._global_batch:
            raise UsageError(
                f"manifest {self.manifest.name!r} draws {num_draws} images an epoch, fewer than one global batch of "
                f"{self._global_batch} (batch_size {self._batch_size} x world_size {self._topology.world_size}): "
                "lower batch_size, or use a manifest with higher targets"
            )


class _Steps(Iterator[Batch]):
    """What ``iter()`` returns. It holds its loader, the loader holds it weakly: so leaving a loop ends its threads."""

    def __init__(self, loader: Loader, batches: Prefetch[Built], *, epoch: int, num_steps: int) -> None:
        self.epoch = epoch
        self.num_steps = num_steps
        self.num_left = num_steps
        self._loader = loader
        self._batches = batches
        self._superseded = False
        self._turn = threading.Lock()

    def __next__(self) -> Batch:
        if self._superseded:
            raise UsageError(
                f"this iterator of epoch {self.epoch} was ended by a later iter(), set_epoch() or load_state_dict() of "
                "its loader; a Loader has one live iterator: make a second Loader to read two sequences at once"
            )
        if not self.num_left:
            self._loader._ended(self)  # pyright: ignore[reportPrivateUsage]
            raise StopIteration
        # Threads that share this iterator take turns: otherwise draws would be lost or handed out twice.
        with self._turn:
            if not self.num_left:
                raise StopIteration
            built = next(self._batches)
            self.num_left -= 1
            self._loader._handed_out(self, built)  # pyright: ignore[reportPrivateUsage]
            return built.batch

    def __reduce__(self) -> NoReturn:
        raise UsageError("an iterator of a Loader cannot be pickled, as its threads cannot: pickle the Loader instead")

    def close(self) -> None:
        """End the threads; advancing again is an error, except after the last batch."""
        self._batches.close()
        self._superseded = self.num_left > 0


class EvaluationLoader(IteratedOnly):
    """Every sample of a split once, in an order that mixes classes and never changes: ``(images, labels, mask)``.

    Every rank does equally many steps. Where the samples do not fill the last ones, rows repeat samples and their
    ``mask`` (bool ``[B]``) is False: count only rows whose mask is True. Each ``iter()`` starts again from the first
    sample.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        split: str = "test",
        batch_size: int = 64,
        *,
        transform: Transform | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        workers: int = 0,
        prefetch: int | None = None,
        pin_memory: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        timeout_s: float | None = TIMEOUT_S,
    ) -> None:
        """As for ``Loader``; the default transform is the central 224 x 224 of the image scaled to 256.

        A damaged image always raises: a score over other images than the split's would be no score of the split.
        """
        self._made_with: dict[str, Any] = {
            "transform": transform, "workers": workers, "prefetch": prefetch, "pin_memory": pin_memory,
            "cache_dir": cache_dir, "cache_bytes": cache_bytes, "timeout_s": timeout_s,
        }  # fmt: skip
        self._snapshot, self._split = snapshot, split
        self._topology = Topology.resolve(rank, world_size)
        self._timeout_s = _seconds(timeout_s)
        self._batch_size = _whole("batch_size", batch_size, at_least=1)
        self._threads, self._ahead = _concurrency(workers, prefetch)
        self._pin_memory = pin_memory
        self._class_starts = snapshot.class_starts(split)
        self._num_samples = int(self._class_starts[-1])
        if not self._num_samples:
            raise UsageError(f"split {split!r} of {snapshot.store.url} holds no samples; there is nothing to evaluate")
        cache = _cache(snapshot, cache_dir, cache_bytes)
        self._reader = BatchReader(snapshot, split, _transform(transform, True, ResizeCenterCrop(224)), cache)

    def __len__(self) -> int:
        """Steps of every rank."""
        return -(-self._num_samples // (self._batch_size * self._topology.world_size))

    def __iter__(self) -> Iterator[Batch]:
        global_batch = self._batch_size * self._topology.world_size
        starts = range(0, len(self) * global_batch, global_batch)
        patience = _patience(self._timeout_s, self._describe)
        return Prefetch(self._batch, starts, threads=self._threads, ahead=self._ahead, patience=patience)

    def sample_keys(self) -> list[str]:
        """The key (16 hex digits) of every row of this rank whose mask is True, in its order."""
        position = self._positions(0) + np.arange(len(self))[:, None] * self._batch_size * self._topology.world_size
        return self._reader.keys(self._rows(position[position < self._num_samples]).row)

    def __reduce__(self) -> tuple[Any, ...]:
        options = {**self._made_with, "rank": self._topology.rank, "world_size": self._topology.world_size}
        return _loader_again, (type(self), self._snapshot, self._split, self._batch_size, options)

    def _describe(self, start: int) -> str:
        position = self._positions(start)
        return _needs(self._topology, self._reader, int(position[0]), self._rows(position).row)

    def _positions(self, start: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return start + self._topology.rank * self._batch_size + np.arange(self._batch_size)

    def _batch(self, start: int) -> Batch:
        position = self._positions(start)
        rows = self._rows(position)
        mask = torch.from_numpy(position < self._num_samples)
        batch = self._reader.images(rows), torch.from_numpy(rows.class_id.astype(np.int64)), mask
        return pinned(*batch) if self._pin_memory else batch

    def _rows(self, position: np.ndarray[Any, np.dtype[np.int64]]) -> Rows:
        key, size = derive(seed_key(0), _EVALUATION_ORDER), np.full_like(position, self._num_samples)
        row = permute(np.full(position.shape, key, np.uint64), position % self._num_samples, size)
        class_id = np.searchsorted(self._class_starts, row, side="right") - 1
        return Rows(row=row, class_id=class_id, position=position, repeat=np.zeros_like(row), key=keyed_hash(key, row))


def _transform(transform: Transform | None, decode: bool, default: Transform) -> Transform | None:
    if not decode and transform is not None:
        raise UsageError("decode=False hands out bytes, so transform is never called: drop one of the two")
    return (transform or default) if decode else None


def _repeats(manifest: Manifest, max_bytes: int) -> RepeatCache | None:
    if not _whole("repeat_bytes", max_bytes, at_least=0):
        return None
    return RepeatCache(max_bytes, manifest.targets / np.maximum(manifest.pool, 1))


def _loader_again(kind: Any, *arguments: Any) -> Any:
    """What pickling makes of a loader: the call that made it."""
    *positional, options = arguments
    return kind(*positional, **options)


def _patience(timeout_s: float | None, describe: Callable[[int], str]) -> Patience | None:
    return None if timeout_s is None else Patience(timeout_s=timeout_s, describe=describe)


def _needs(topology: Topology, reader: BatchReader, begin: int, row: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    """What this rank's batch from position ``begin`` is made of."""
    tars = sorted({tar for tar, _, _ in reader.locate(row).ranges})
    more = f" and {len(tars) - _NAMED_SHARDS} more" if len(tars) > _NAMED_SHARDS else ""
    return (
        f"rank {topology.rank} of {topology.world_size} needs positions {begin} to {begin + len(row) - 1}, from "
        f"{', '.join(tars[:_NAMED_SHARDS])}{more}"
    )


def _seconds(timeout_s: float | None) -> float | None:
    if timeout_s is not None and not timeout_s > 0:
        raise UsageError(f"timeout_s must be a number of seconds above 0, or None to wait for ever, got {timeout_s!r}")
    return timeout_s


def _cache(snapshot: Snapshot, directory: str | os.PathLike[str] | None, max_bytes: int | None) -> NodeCache | None:
    return None if snapshot.store.is_local else default_cache(directory, max_bytes)


def _replaces(on_damage: Any) -> bool:
    if on_damage not in ("raise", "replace"):
        raise UsageError(f"on_damage must be 'raise' or 'replace', got {on_damage!r}")
    return on_damage == "replace"


def _concurrency(workers: int, prefetch: int | None) -> tuple[int, int]:
    """Threads, and batches ahead in total: by default two a thread, one in the making and one ready."""
    threads = _whole("workers", workers, at_least=0)
    if prefetch is not None and not threads:
        raise UsageError(f"prefetch={prefetch} needs threads to do it: set workers to 1 or more")
    return threads, threads * (2 if prefetch is None else _whole("prefetch", prefetch, at_least=1))


def _whole(name: str, value: Any, at_least: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or (at_least is not None and number < at_least):
        bound = "" if at_least is None else f" of {at_least} or more"
        raise UsageError(f"{name} must be a whole number{bound}, got {value!r}")
    return number
