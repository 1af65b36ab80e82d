"""A training killed at any moment, resumed on 1, 2, 3 ranks: `python tests/soak/train_kills.py --kills 30 --seed 0`.

Ranks are forked from this process, which has torch loaded, and ended as torchrun ends them: when one is gone, the
others get SIGTERM, and SIGKILL where they do not follow. One rank gets SIGKILL, SIGTERM or SIGINT: after a while drawn
at random, or in the midst of a step, a checkpoint, a write of the log, a score, a start. After each round of kills a
last run goes to the end. Checked of each training: every draw of every stage exactly once in the union, parameters
within 1e-4 of those of a training left alone (group normalisation), its log line by line, the files it leaves. Exit
status 1 if any of that was not so, or if ranks hung.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny_snapshot import write_snapshot

from pipeline.learn import checkpoints, ledger, ranks, recipe, scoring, stepping, trainer

STAGES = "natural:6 -> balanced:4:crt:loss=weighted:lr=0.01 -> balanced:0:tau=0.5 -> natural:2:lr=0.01:loss=auc"
NUM_DRAWS = {0: 6 * 93, 1: 4 * 115, 3: 2 * 93}
BATCH = 24
FOLLOW_S, HANG_S = 20.0, 120.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)

MOMENTS: dict[str, tuple[Any, str]] = {
    "step": (stepping.Stepper, "step"),
    "save": (torch, "save"),
    "rename": (os, "replace"),
    "sync": (checkpoints, "_sync_directory"),
    "log": (ledger.Ledger, "write"),
    "score": (scoring, "score"),
    "told": (ranks.Ranks, "told"),
    "wait": (ranks.Ranks, "wait"),
    "resume": (checkpoints, "load_newest"),
    "epoch": (trainer, "Loader"),
}
OF_THE_FIRST = ("save", "rename", "sync", "resume")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Who gets which signal, and when: at the ``nth`` call of ``moment``, or after ``after_s``."""

    rank: int
    number: int
    moment: str = ""
    nth: int = 0
    is_after: bool = False  # the call, else before it
    after_s: float = 0.0


def arm(kill: Kill) -> None:
    """In a forked rank: have it killed at its moment."""
    room, name = MOMENTS[kill.moment]
    real, seen = getattr(room, name), [0]

    def called(*args: Any, **options: Any) -> Any:
        seen[0] += 1
        now = seen[0] == kill.nth
        if now and not kill.is_after:
            os.kill(os.getpid(), kill.number)
        result = real(*args, **options)
        if now and kill.is_after:
            os.kill(os.getpid(), kill.number)
        return result

    setattr(room, name, called)


def be_rank(options: dict[str, Any], folder: Path, place: dict[str, str], kill: Kill | None) -> int:
    """A forked rank; its exit code is that of the command."""
    os.environ |= place
    rank = int(place.get("RANK", "0"))
    with (folder / f"{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if kill is not None and kill.moment and kill.rank == rank:
        arm(kill)

    def observe(step: trainer.Step) -> None:
        told = {"stage": step.stage, "step": step.number, "positions": step.positions.tolist()}
        with (folder / f"{rank}.jsonl").open("a") as told_to:
            told_to.write(json.dumps(told) + "\n")

    try:
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        made = recipe.Recipe(**{**options, "stages": recipe.parse_stages([options["stages"]])})
        trainer.train(made, observe=observe, echo=print)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(work: Callable[[], int]) -> int:
    """The child's id. Signals reach the child when it is where it can end: elsewhere it would unwind as its parent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return pid


def run(options: dict[str, Any], folder: Path, num_ranks: int, kill: Kill | None) -> list[int]:
    """Exit codes of the ranks, below 0 by a signal. AssertionError where they hang."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    living: dict[int, int] = {}
    for rank in range(num_ranks):
        mine = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
        living[fork(lambda mine=mine: be_rank(options, folder, mine, kill))] = rank
    return waited_for(living, kill if kill is not None and not kill.moment else None)


def waited_for(living: dict[int, int], kill: Kill | None) -> list[int]:
    """Exit codes of ``living``, process ids and their ranks, of which one is to be killed on the way."""
    codes, began_s, ended_s = [0] * len(living), time.monotonic(), 0.0
    while living:
        now_s = time.monotonic()
        if kill is not None and now_s - began_s >= kill.after_s:
            send(kill.number, [pid for pid, rank in living.items() if rank == kill.rank])
            kill = None
        for pid in list(living):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[living.pop(pid)] = os.waitstatus_to_exitcode(status)
        if not ended_s and any(codes):
            ended_s = now_s
            send(signal.SIGTERM, living)
        hangs = now_s - began_s > HANG_S
        if hangs or (ended_s and now_s - ended_s > FOLLOW_S):
            send(signal.SIGKILL, living)
            ended_s = now_s
        assert not hangs, f"ranks {sorted(living.values())} hung"
        time.sleep(0.005)
    return codes


def send(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        os.kill(pid, number)


# -- what is checked --------------------------------------------------------------------------------------------------


def steps_of(folder: Path, num_ranks: int) -> dict[int, tuple[int, list[int]]]:
    """Stage and positions of each step that all ranks finished."""
    found: dict[int, tuple[int, list[int]]] = {}
    parts: list[dict[int, dict[str, Any]]] = []
    for rank in range(num_ranks):
        path = folder / f"{rank}.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # a last line may be torn
        parts.append({line["step"]: line for line in map(json.loads, lines)})
    for number, line in parts[0].items():
        if all(number in part for part in parts):
            found[number] = line["stage"], [p for part in parts for p in part[number]["positions"]]
    return found


def standing(out: Path) -> int:
    """Steps that the newest checkpoint holds: what later runs go on from."""
    state = checkpoints.load_newest(out, print) if out.is_dir() else None
    return 0 if state is None else int(state["progress"]["num_steps"])


def weights(out: Path) -> torch.Tensor:
    held = torch.load(out / "model.pt", weights_only=True)["state_dict"]
    return torch.cat([tensor.flatten() for tensor in held.values()])


def log_of(out: Path) -> list[tuple[int, str, list[str], float]]:
    """Steps, stages, names and losses; rates are the machine's."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["stage"], sorted(line), round(line.get("loss", 0.0), 3)) for line in lines]


@dataclass
class Training:
    """One training, killed again and again."""

    out: Path
    options: dict[str, Any]
    runs: list[tuple[Path, int, int]] = field(default_factory=list[tuple[Path, int, int]])  # folder, ranks, from step

    def once(self, num_ranks: int, kill: Kill | None) -> list[int]:
        folder = self.out.with_name(f"{self.out.name}-run-{len(self.runs)}")
        self.runs.append((folder, num_ranks, standing(self.out)))
        return run({**self.options, "out": str(self.out), "resume": len(self.runs) > 1}, folder, num_ranks, kill)

    def problems(self, alone: Path) -> list[str]:
        taken: dict[int, tuple[int, list[int]]] = {}
        for folder, num_ranks, begun in self.runs:
            mine = steps_of(folder, num_ranks)
            taken = {n: step for n, step in taken.items() if n <= begun} | {n: s for n, s in mine.items() if n > begun}
        found: list[str] = []
        for stage, num_draws in NUM_DRAWS.items():
            drawn = [p for n in sorted(taken) if taken[n][0] == stage for p in taken[n][1]]
            if drawn != list(range(-(-num_draws // BATCH) * BATCH)):
                found.append(f"stage {stage}: {len(drawn)} draws, {len(set(drawn))} of them different")
        apart = float((weights(self.out) - weights(alone)).abs().max())
        if not apart < 1e-4:
            found.append(f"parameters are {apart} apart")
        if log_of(self.out) != log_of(alone):
            found.append(f"the log is another: {[line[:2] for line in log_of(self.out)]}")
        names = [path.name for path in self.out.iterdir() if not path.name.startswith("checkpoint-")]
        if sorted(names) != ["log.jsonl", "model.pt", "summary.json"]:
            found.append(f"files: {sorted(names)}")
        return found


# -- the soak ---------------------------------------------------------------------------------------------------------


def drawn_kill(rng: random.Random, num_ranks: int, whole_s: float) -> Kill:
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    rank = rng.randrange(num_ranks)
    if rng.random() < 0.4:
        return Kill(rank=rank, number=number, after_s=rng.uniform(0, whole_s))
    moment = rng.choice(list(MOMENTS))
    nth = rng.randint(1, {"step": 40, "told": 1, "resume": 1, "epoch": 3, "score": 4, "log": 8}.get(moment, 6))
    first = moment in OF_THE_FIRST
    return Kill(
        rank=0 if first else rank, number=number, moment=moment, nth=nth, is_after=rng.random() < 0.5
    )  # fmt: skip


def soak(scratch: Path, kills: int, seed: int) -> int:
    """Prints what was done and what was wrong; 1 if anything was."""
    rng, began_s = random.Random(seed), time.monotonic()
    wrong: list[str] = []
    ends: Counter[str] = Counter()
    snapshot = write_snapshot(scratch / "root")
    options: dict[str, Any] = {
        "root": snapshot.store.url, "stages": STAGES, "loss": "balanced-softmax", "model": "small_cnn",
        "norm": "group", "side": 16, "batch_size": BATCH, "lr": 0.02, "workers": 1, "save_every": 5,
    }  # fmt: skip
    alone = Training(scratch / "alone", options)
    assert alone.once(1, None) == [0], (scratch / "alone-run-0/0.txt").read_text()
    whole_s = time.monotonic() - began_s
    assert not alone.problems(alone.out), alone.problems(alone.out)
    killed = number = 0
    while killed < kills:
        training, number = Training(scratch / f"training-{number}", options), number + 1
        for _ in range(min(rng.randint(2, 6), kills - killed)):
            num_ranks = rng.randint(1, 3)
            kill = drawn_kill(rng, num_ranks, whole_s)
            codes = training.once(num_ranks, kill)
            how = f"{signal.Signals(kill.number).name} {kill.moment or 'at some time'}"
            ends[f"{how}: {'ended' if any(codes) else 'done all the same'}"] += 1
            killed += any(codes)
            if any(code not in (0, 1, 130, -9, -15, -2) for code in codes):
                wrong.append(f"{kill}: exit codes {codes}")
        codes = training.once(rng.randint(1, 3), None)
        for text in [f"the last run: {codes}"] if any(codes) else training.problems(alone.out):
            wrong.append(f"{training.out.name}: {text}")
            folder = training.runs[-1][0]
            print(wrong[-1], *(path.read_text()[-1500:] for path in folder.glob("*.txt")), sep="\n", flush=True)
        print(f"{killed} kills, {number} trainings, {len(wrong)} problems", file=sys.stderr, flush=True)
    for how, count in sorted(ends.items()):
        print(f"{count:4d}  {how}")
    print(*wrong, sep="\n")
    print(f"{killed} kills of {number} trainings, {len(wrong)} problems, {time.monotonic() - began_s:.0f} s")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mine, scratch = os.getpid(), Path(tempfile.mkdtemp(prefix="evenshard-train-kills-"))
    try:
        return soak(scratch, arguments.kills, arguments.seed)
    finally:
        if os.getpid() != mine:  # a fork that a second signal met on its way out
            os._exit(1)
        shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.exit(main())
