"""Work done ahead in threads, handed out in order.

Comes in: a function and the arguments to call it with. Goes out: its results, in the order of the arguments.
Guarantees: the same results for any number of threads; at most ``ahead`` calls started or done and not yet handed out;
an exception comes out at the place of its call; a call that takes longer than ``timeout_s`` is an error that names it,
whatever it waits for; dropping or closing the iterator ends its threads, without waiting for
them; a call that never returns does not keep the interpreter from ending; torch spreads none of the calls over further
threads.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, NoReturn, TypeVar

import torch

from pipeline.errors import StalledError, UsageError
from pipeline.stream.stalls import stage_of, within_a_moment

T = TypeVar("T")

PATIENCE_S = 2.0
"""How long the interpreter, when it ends, waits for calls that run: a thread that torch holds then may crash it."""


class Prefetch(Generic[T]):
    """``map(function, arguments)``, by ``threads`` threads; 0 threads means in the caller's, when asked.

    ``patience`` is for threads: nobody else could end a wait in the caller's own.
    """

    def __init__(
        self,
        function: Callable[[int], T],
        arguments: Iterable[int],
        *,
        threads: int,
        ahead: int,
        patience: Patience | None = None,
    ) -> None:
        self._function = function
        self._patience = patience
        self._arguments = iter(arguments)
        self._retry: int | None = None
        self._pending: deque[_Call[T]] = deque()
        self._pool = _Threads(threads) if threads else None
        if self._pool is not None:
            # Threads hold the function, never this object: so it can be collected, and then they stop.
            self._finalizer = weakref.finalize(self, self._pool.stop)
            for _ in range(ahead):
                self._submit(self._pool)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self._next_here() if self._pool is None else self._next_of(self._pool)

    def __reduce__(self) -> NoReturn:
        raise UsageError("an iterator over batches cannot be pickled, as its threads cannot: pickle the loader instead")

    def close(self) -> None:
        """Start nothing more; a call that runs now ends in the background."""
        self._arguments = iter(())
        self._retry = None
        self._pending.clear()
        if self._pool is not None:
            self._finalizer()

    def _next_here(self) -> T:
        argument = next(self._arguments) if self._retry is None else self._retry
        self._retry = argument  # stays where it is if this call fails or is interrupted
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            result = self._function(argument)
        finally:
            torch.set_num_threads(torch_threads)
        self._retry = None
        return result

    def _next_of(self, pool: _Threads) -> T:
        if not self._pending:
            raise StopIteration
        try:
            result = self._wait(self._pending[0])  # leaves the queue only once it is there: an interrupt loses nothing
        except StalledError:  # the call is still there, for whoever asks again
            raise
        except Exception:
            # The exception stays, for whoever asks again. It holds this frame, and so this object: end the threads now.
            self._finalizer()
            raise
        self._pending.popleft()
        self._submit(pool)
        return result

    def _wait(self, call: _Call[T]) -> T:
        if self._patience is None:
            return call.future.result()
        try:
            return call.future.result(self._patience.timeout_s)
        except TimeoutError:
            if call.future.done():  # its own, not ours
                raise
        raise StalledError(
            f"no batch came for {self._patience.timeout_s:g} s: {stage_of(call.thread_id)}; "
            f"{within_a_moment(partial(self._patience.describe, call.argument))}. Look at what hangs there, or give "
            "timeout_s more seconds (None waits for ever)"
        )

    def _submit(self, pool: _Threads) -> None:
        for argument in self._arguments:
            self._pending.append(pool.submit(self._function, argument))
            return


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait for one call, and what to say of its argument if it takes longer."""

    timeout_s: float
    describe: Callable[[int], str]


class _Call(Generic[T]):
    """One call, the thread that makes it, its result to come."""

    def __init__(self, function: Callable[[int], T], argument: int) -> None:
        self.function = function
        self.argument = argument
        self.future: Future[T] = Future()
        self.thread_id: int | None = None


class _Threads:
    """Daemon threads, unlike an executor's: the interpreter joins those when it ends, and one that hangs hangs it."""

    def __init__(self, threads: int) -> None:
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        torch_threads = torch.get_num_threads()
        self._threads = [
            threading.Thread(target=_work, args=(self._calls, torch_threads), name=f"evenshard_{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        _all_threads.add(self)

    def submit(self, function: Callable[[int], T], argument: int) -> _Call[T]:
        """The call, with its result to come."""
        call = _Call(function, argument)
        self._calls.put(call)
        return call

    def stop(self) -> None:
        """Drop the calls not begun, and end each thread after the one it runs."""
        try:
            while True:
                self._calls.get_nowait()
        except Empty:
            for _ in self._threads:
                self._calls.put(None)

    def join(self, deadline: float) -> None:
        """Wait for the threads, until ``time.monotonic()`` is ``deadline`` at most."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


_all_threads: weakref.WeakSet[_Threads] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    deadline = time.monotonic() + PATIENCE_S
    for threads in list(_all_threads):
        threads.stop()
    for threads in list(_all_threads):
        threads.join(deadline)


def _work(calls: SimpleQueue[_Call[Any] | None], torch_threads: int) -> None:
    _run_single(torch_threads)
    while (call := calls.get()) is not None:
        _answer(call)
        del call  # or the last batch would live until the next call comes


def _answer(call: _Call[Any]) -> None:
    call.thread_id = threading.get_ident()
    try:
        result = call.function(call.argument)
    except BaseException as error:
        call.future.set_exception(error)  # for the thread that asked; this one goes on
    else:
        call.future.set_result(result)


# One image is too little work to share: torch with two threads of its own took 5.5 ms of processor time for a crop and
# resize that takes one thread 0.4 ms, on busy cores. So ours run single, and only ours.
_starting = threading.Lock()


def _run_single(torch_threads: int) -> None:
    """Keep torch in this thread to one thread, and leave ``torch_threads`` to all others."""
    with _starting:
        torch.get_num_threads()  # so that torch does not set up this thread later, undoing the next line
        torch.set_num_threads(1)
        # That became the default of threads to come, too. Setting it back here would undo it here: another thread must.
        other = threading.Thread(target=torch.set_num_threads, args=(torch_threads,))
        other.start()
        other.join()
