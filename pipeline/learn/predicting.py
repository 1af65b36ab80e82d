"""The logits of a trained network as a file, and how `evenshard evaluate` is to be called with it.

Comes in: a network, a snapshot. Goes out: ``OUT/predictions.parquet``, a row for every image of val and test: ``key``,
and ``scores``, float32 logits in the order of class ids, as the network gives them. Guarantees: whole or not there;
each image once, in an order that no number of ranks changes; of all ranks together, one row group is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import nn

from pipeline.errors import NotFoundError
from pipeline.learn.checkpoints import write_whole
from pipeline.learn.objectives import training_of
from pipeline.learn.ranks import Ranks
from pipeline.learn.recipe import Recipe
from pipeline.learn.scoring import held_out, logits_on
from pipeline.snapshot import Snapshot
from pipeline.stream.loader import EvaluationLoader

PREDICTIONS = "predictions.parquet"

GROUP_BYTES = 2**24
"""Of the logits in one row group: 800 images of 5,000 classes."""

_SCHEMA = pa.schema([("key", pa.string()), ("scores", pa.list_(pa.float32()))])

Logits = NDArray[np.float32]
Rows = tuple[list[str], Logits]  # keys, and logits [N, K]


def splits_of(snapshot: Snapshot) -> list[str]:
    """What is predicted: val, from which thresholds are taken, and test."""
    if found := held_out(snapshot):
        return found
    raise NotFoundError(
        f"snapshot {snapshot.number} has no image outside train, so nothing could be predicted: build it with a test "
        "split, or leave out --predictions"
    )


def write_predictions(model: nn.Module, snapshot: Snapshot, recipe: Recipe, ranks: Ranks, out: Path) -> int:
    """Write the file into the folder ``out``, all ranks together; the number of its rows, 0 but on the first rank."""
    rows = (part for split in splits_of(snapshot) for part in _rows(model, snapshot, split, recipe, ranks))
    if not ranks.is_first:
        return sum(len(keys) for keys, _ in rows)  # takes part in each step
    counts: list[int] = []
    write_whole(out, lambda path: counts.append(_write(path, rows)), lambda _: PREDICTIONS)
    return counts[0]


def evaluate_options(snapshot: Snapshot, recipe: Recipe) -> list[str]:
    """Those of `evenshard evaluate` that tell it what the last stage left in the logits."""
    last = recipe.stages[-1]
    training = None if last.tau else training_of(last.loss or recipe.loss, last.manifest)
    options = ["--at", str(snapshot.number), "--scores", "logits", "--manifest", last.manifest]
    if "test" not in snapshot.record.samples:
        options += ["--split", "val" if "val" in snapshot.record.samples else "train"]
    if training is None:
        return [*options, "--prior", "none"]
    options += ["--weights", training.weights] if training.weights else []
    return [*options, "--tau", f"{training.tau:g}"] if training.tau else options


def _rows(model: nn.Module, snapshot: Snapshot, split: str, recipe: Recipe, ranks: Ranks) -> Iterator[Rows]:
    """Of all ranks, step by step, on the first rank; nothing on the others."""
    keys = EvaluationLoader(snapshot, split, rank=0, world_size=1).sample_keys() if ranks.is_first else []
    done = 0
    for logits, _, _ in logits_on(model, snapshot, split, recipe, ranks):
        found = ranks.to_first(logits).cpu().numpy()[: len(keys) - done]  # rows that only fill a step come last
        yield keys[done : done + len(found)], found
        done += len(found)


def _write(path: Path, rows: Iterator[Rows]) -> int:
    num_rows = 0
    # Logits hardly repeat: a dictionary or a compressor would cost time and save nothing.
    options: dict[str, Any] = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    with pq.ParquetWriter(path, _SCHEMA, **options) as writer:
        for keys, scores in _grouped(rows):
            offsets = np.arange(len(keys) + 1, dtype=np.int32) * np.int32(scores.shape[1])
            column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(scores.ravel()))
            writer.write_table(pa.Table.from_arrays([pa.array(keys, pa.string()), column], schema=_SCHEMA))
            num_rows += len(keys)
    return num_rows


def _grouped(rows: Iterator[Rows]) -> Iterator[Rows]:
    """Joined until they hold ``GROUP_BYTES``."""
    keys, parts = list[str](), list[Logits]()
    for more, scores in rows:
        keys += more
        parts.append(scores)
        if sum(part.nbytes for part in parts) >= GROUP_BYTES:
            yield keys, np.concatenate(parts)
            keys, parts = [], []
    if keys:
        yield keys, np.concatenate(parts)
