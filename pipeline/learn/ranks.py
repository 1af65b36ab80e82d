"""Which rank this process is, and what ranks tell each other: sums, and arrays put one after the other.

Comes in: the environment of torchrun, or nothing. Goes out: ``Ranks``. Guarantees: without torchrun there is one rank
and no process group; a group that the caller made is used and left as it is; every rank gets the same answer.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import EvenshardError, UsageError
from pipeline.learn.recipe import Device

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """The one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def concatenated(self, values: Ints) -> Ints:
        """int64 ``[sum of N, ...]``: the arrays of all ranks, in the order of the ranks."""
        if self.world_size == 1:
            return values
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, values)
        return np.concatenate(parts)

    def to_first(self, values: Tensor) -> Tensor:
        """``[ranks * B, ...]`` on the first rank: those of all ranks, ``[B, ...]`` each, in order; elsewhere none."""
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)] if self.is_first else None
        dist.gather(values.contiguous(), parts)
        return values[:0] if parts is None else torch.cat(parts)

    def told(self, value: Any) -> Any:
        """What the first rank has: only its disk is asked, as others may be on other nodes."""
        if self.world_size == 1:
            return value
        given = [value]
        dist.broadcast_object_list(given, src=0)
        return given[0]

    def as_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` by those of the first rank."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def joined(device: Device = "auto") -> Generator[Ranks]:
    """The ranks of this run: gloo on CPUs, nccl on GPUs, one GPU a rank."""
    place = _place(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    ours = not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if ours:
        _meet("nccl" if place.type == "cuda" else "gloo")
    if dist.is_initialized():
        with _telling_of_lost_ranks(dist.get_rank()):
            yield Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=place)
    else:
        yield Ranks(rank=0, world_size=1, device=place)
    if ours:  # not after an error: another rank may still wait in a collective, and leaving would wait for it
        dist.destroy_process_group()


def _meet(backend: str) -> None:
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:  # ValueError: torchrun's variables are there in part
        raise EvenshardError(
            f"the ranks of this run did not meet: {str(error).splitlines()[0]}; start all of them, where they reach "
            "each other (torchrun --max-restarts tries again)"
        ) from error


@contextmanager
def _telling_of_lost_ranks(rank: int) -> Generator[None]:
    """Of ranks that end because another one did, the one that failed has the message worth reading."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or ("gloo" in str(error) and "peer" in str(error))
        if not lost:
            raise
        raise EvenshardError(
            f"rank {rank} ends, as another rank is gone: its message says why, or, where it was killed, the system's "
            f"log; --resume goes on from the newest checkpoint ({str(error).splitlines()[0]})"
        ) from error


def _place(device: Device) -> torch.device:
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UsageError("device cuda was asked for, and torch finds none here: use --device cpu, or a node with a GPU")
    if device == "cpu" or not there:
        return torch.device("cpu")
    local, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= num_gpus:
        raise UsageError(f"local rank {local} has no GPU: this node has {num_gpus}; lower --nproc-per-node")
    return torch.device("cuda", local)
