"""Losses and scores as they come: ``OUT/log.jsonl``, and TensorBoard's files where they were asked for.

Comes in: names and numbers of a step. Goes out: a line of JSON each. Guarantees: after a resume, lines of steps that
the checkpoint does not hold are gone; TensorBoard is no dependency, and its absence is told before training starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import MissingExtraError

LOG = "log.jsonl"


def need_tensorboard() -> None:
    """Refuse in words where it is not installed."""
    if find_spec("tensorboard") is None:
        raise MissingExtraError(
            "--tensorboard needs the package tensorboard, which evenshard does not install: pip install tensorboard. "
            f"Without it, the same numbers are in DIR/{LOG}"
        )


class Ledger:
    """Where one training writes its numbers. On ranks that do not speak, ``folder`` is None, and nothing is written."""

    def __init__(self, folder: Path | None, *, tensorboard: bool, since_step: int) -> None:
        self._path = None if folder is None else folder / LOG
        self._board: Any = None
        if folder is None:
            return
        if self._path is not None and self._path.exists():
            lines = [line for line in self._path.read_text("utf-8").splitlines() if _step(line) <= since_step]
            self._path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=since_step + 1)

    def write(self, step: int, stage: str, numbers: Mapping[str, float | None]) -> None:
        """Numbers of this step; None is what was not measured."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "stage": stage, **numbers}) + "\n")
        for name, value in numbers.items():
            if self._board is not None and value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """All is on disk."""
        if self._board is not None:
            self._board.close()


def _step(line: str) -> int:
    """Beyond every step, where a kill tore the line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62
