"""One rank of a training, for torchrun: what each step drew and lost, line by line, so that a kill loses none of it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.learn.models import make_model
from pipeline.learn.ranks import joined
from pipeline.learn.recipe import Recipe, parse_stages
from pipeline.learn.scoring import score
from pipeline.learn.trainer import Step, train
from pipeline.snapshot import open_snapshot


def recipe_of(options: dict[str, Any]) -> Recipe:
    return Recipe(**{**options, "stages": parse_stages(options["stages"])})


def rows(recipe: Recipe) -> list[list[int]]:
    """Labels and predictions of the test split by the model that the training left, by as many ranks as there are."""
    snapshot = open_snapshot(recipe.root)
    held = torch.load(Path(recipe.out) / "model.pt", weights_only=True)
    model = make_model(recipe.model, snapshot.record.num_classes, norm=recipe.norm)
    model.load_state_dict(held["state_dict"])
    with joined("cpu") as ranks:
        scored = score(model, snapshot, "test", None, recipe, ranks)
    return torch.stack([torch.from_numpy(v) for v in (scored.labels, scored.predicted)], 1).tolist()


def main(options: dict[str, Any], folder: Path, at_step: int, number: int) -> None:
    """The last rank gets signal ``number`` in step ``at_step``."""
    torch.set_num_threads(1)
    recipe = recipe_of(options)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def observe(step: Step) -> None:
        told = {"stage": step.stage, "step": step.number, "loss": step.loss, "positions": step.positions.tolist()}
        with (folder / f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps(told) + "\n")
        if step.number == at_step and rank == world_size - 1:
            os.kill(os.getpid(), number or signal.SIGKILL)

    with joined("cpu"):  # one group for both: torchrun's store is not made for a second one
        try:
            train(recipe, observe=observe)
        except KeyboardInterrupt:
            sys.exit(130)
        found = rows(recipe)
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
