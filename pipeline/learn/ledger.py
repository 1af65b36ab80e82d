"""Losses and scores as they come: ``OUT/log.jsonl``, and TensorBoard's files where they were asked for.

Comes in: names and numbers of a step. Goes out: a line of JSON each. Guarantees: after a resume, lines younger than the
checkpoint are gone, in both, so that none stands there twice; while a process has the log open, no other trains into
its folder; TensorBoard is no dependency, and its absence is told before training starts.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

from pipeline.errors import AlreadyExistsError, MissingExtraError
from pipeline.learn.checkpoints import writing_to

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

    def __init__(self, folder: Path | None, *, tensorboard: bool, since_step: int, num_lines: int) -> None:
        """``num_lines``: of the log, those that stay; AlreadyExistsError where another process writes there now."""
        self.num_lines = num_lines
        self._folder, self._board = folder, cast("Any", None)
        self._file: IO[str] | None = None
        if folder is None:
            return
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / LOG).open("a+", encoding="utf-8")
            kept = _claim(self._file, folder, num_lines)
        self.num_lines = len(kept)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # It hides what was written from a step on; of that step itself, what stays is written once more.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=since_step)
            for line in kept:
                told = json.loads(line)
                if told["step"] >= since_step:
                    self._show(told.pop("step"), {name: value for name, value in told.items() if name != "stage"})

    def write(self, step: int, stage: str, numbers: Mapping[str, float | None]) -> None:
        """Numbers of this step; None is what was not measured."""
        if self._folder is None or self._file is None:
            return
        with writing_to(self._folder):
            self._file.write(json.dumps({"step": step, "stage": stage, **numbers}) + "\n")
            self._file.flush()
        self.num_lines += 1
        self._show(step, numbers)

    def close(self) -> None:
        """All is on disk, and the folder is free for others."""
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            with suppress(OSError):  # of a full disk, which was told when it happened
                self._file.close()

    def _show(self, step: int, numbers: Mapping[str, float | None]) -> None:
        for name, value in numbers.items():
            if self._board is not None and value is not None:
                self._board.add_scalar(name, value, step)


def _claim(file: IO[str], folder: Path, num_lines: int) -> list[str]:
    """Hold the log for this process alone, as long as it lives; its first lines, which stay. The others go."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise AlreadyExistsError(
            f"{folder}: another process trains into it now, perhaps ranks that outlived their torchrun: wait for it, "
            "end it, or name another DIR"
        ) from None
    except OSError:  # a file system without locks
        pass
    file.seek(0)
    lines = file.readlines()[:num_lines]
    file.truncate(len("".join(lines).encode()))
    return lines
