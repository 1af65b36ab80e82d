"""Units of work on processes of this machine: for what is done before Ray would have started.

Comes in: units (`ingest.crew`). Goes out: what they yield. Guarantees: those of `run_units`; each worker is a fresh
interpreter that runs no script of the caller's, ends with the block that started it, and ends when its driver is gone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from pipeline.ingest.crew import Ended, Event, Failed, Item, Lost, Task, UnitFunction, run_units, work
from pipeline.ingest.meters import Metric
from pipeline.store import spare_pandas

_MAIN = "import sys; sys.path[:] = {!r}; from pipeline.ingest.pool import serve; serve(int(sys.argv[1]))"


class Pool:
    """A `Crew` of processes; they are started one by one as there is work, and live to the end of a ``with`` block."""

    def __init__(self, *, workers: int | None = None) -> None:
        self._num_workers = workers or os.cpu_count() or 1
        self._numbers = itertools.count()
        self._waiting: deque[tuple[int, Task]] = deque()
        self._busy: dict[Connection, int] = {}  # which task it works at
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in list(self._processes):
            self._end(worker)

    def map(
        self, function: UnitFunction, units: Iterable[tuple[str, tuple[Any, ...]]], stage: str = "unit"
    ) -> Iterator[Any]:
        """`run_units` on these processes."""
        return run_units(self, function, units, stage)

    def note(self, metric: Metric, value: float, **labels: str) -> None:
        """Nobody collects metrics of one machine's processes: the command tells what it did."""

    def prepare(self) -> None:
        """Let all workers start, while their driver still has something to do."""
        while len(self._processes) < self._num_workers:
            self._begin()

    def capacity(self) -> int:
        """One more waits than can be worked at, so that no worker does."""
        return self._num_workers + 1

    def start(self, task: Task) -> int:
        """Start a task, or keep it until a worker is free."""
        number = next(self._numbers)
        self._waiting.append((number, task))
        self._hand_out()
        return number

    def events(self, wait_s: float) -> list[tuple[Any, Event]]:
        """What workers have told; one event of each at most."""
        events: list[tuple[Any, Event]] = []
        for worker in wait(list(self._busy), timeout=wait_s):
            assert isinstance(worker, Connection)
            try:
                event: Event = worker.recv()
            except (OSError, EOFError):
                event = Lost(self._end(worker))
            events.append((self._busy[worker], event))
            if not isinstance(event, Item):
                del self._busy[worker]
        self._hand_out()
        return events

    def cancel(self) -> None:
        """Forget every task, by ending those who work at one."""
        self._waiting.clear()
        for worker in list(self._busy):
            self._end(worker)
        self._busy.clear()

    def _hand_out(self) -> None:
        while self._waiting and len(self._busy) < self._num_workers:
            number, task = self._waiting.popleft()
            idle = next((worker for worker in self._processes if worker not in self._busy), None)
            worker = idle or self._begin()
            self._busy[worker] = number
            with contextlib.suppress(OSError):  # it has died meanwhile: its events will say so
                worker.send(task)

    def _begin(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _MAIN.format(sys.path), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # decoders say there what they think of damaged images
            )
        worker = Connection(ours.detach())
        self._processes[worker] = process
        return worker

    def _end(self, worker: Connection) -> str:
        """End a worker, if it has not ended; returns how it did."""
        process = self._processes.pop(worker)
        worker.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # of one that is just ending, the reason is worth knowing
            process.wait(0.0 if worker not in self._busy else 0.5)
        process.kill()
        code = process.wait()
        return f"its process ended by {_signal_name(-code)}" if code < 0 else f"its process ended with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def serve(descriptor: int) -> None:
    """What a worker does: run tasks until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    spare_pandas()
    driver = Connection(descriptor)
    threading.Thread(target=_outlive_nobody, args=(descriptor,), daemon=True).start()
    while True:
        try:
            task = driver.recv()
        except EOFError:
            return
        driver.send(_run(driver, task))


def _run(driver: Connection, task: Task) -> Event:
    try:
        for item in work(task):
            driver.send(Item(item))
    except Exception as error:  # whatever it is: the driver names the unit, and raises
        return Failed(error)
    return Ended()


def _outlive_nobody(descriptor: int) -> None:
    """End this process at once when its driver has ended, however that came."""
    poll = select.poll()
    poll.register(descriptor, 0)  # hang-ups are always told
    poll.poll()
    os._exit(1)
