"""Decoding in a child process, which alone dies of what it decodes.

Comes in: bytes. Goes out: what the decoder says of them, or `ImageRejected` with reason decoder-crash. Guarantees: an
image is rejected only after it alone, in a fresh child, ended that child three times by a signal that only the child
itself can have caused (SEGV, BUS, ABRT, FPE, ILL), by exiting, or by our own limit on its processor time or memory. A
child killed from outside, or stuck without using the processor, is no evidence: it is tried again, and at last an
error. The child's answers are JSON: whatever takes it over cannot make this process run anything.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from pipeline.errors import EngineError
from pipeline.images.facts import Facts, ImageRejected, Limits
from pipeline.images.watch import limit_memory, unwatch, watch
from pipeline.schema import Reason

Decode = Callable[[bytes], Facts]

NUM_DEATHS = 3
NUM_LOSSES = 5
START_S = 300.0

# What this process can import, its child can: no other start-up file is run.
_MAIN = "import sys; sys.path[:] = {!r}; from pipeline.images.isolated import serve; serve(int(sys.argv[1]))"

_OWN_SIGNALS = frozenset((signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL))


class _DeathError(Exception):
    """The child ended without an answer. ``cause`` is None where something outside may have ended it."""

    def __init__(self, cause: str | None, told: str) -> None:
        super().__init__(told)
        self.cause = cause


class Isolated:
    """A decoder behind a process boundary. No process is started before the first image."""

    def __init__(self, decode: Decode, limits: Limits) -> None:
        self._decode = decode  # a function or bound method that can be pickled
        self._limits = limits
        self._child: _Child | None = None

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def decode(self, data: bytes, name: str) -> Facts:
        """What the decoder says of ``data``; see the module for what is rejected."""
        with contextlib.suppress(_DeathError):  # a suspicion: the child had decoded other images before
            return self._ask(data)
        causes: list[str] = []
        num_losses = 0
        while len(causes) < NUM_DEATHS:
            try:
                return self._ask(data)
            except _DeathError as death:
                if death.cause is not None:
                    causes.append(death.cause)
                    continue
                num_losses += 1
                if num_losses == NUM_LOSSES:
                    raise EngineError(
                        f"{name}: its decoder ended {num_losses} times, the last time {death}. That is no proof "
                        "against the image, so it was not rejected: run the same command again, or leave it out"
                    ) from None
        raise ImageRejected(Reason.DECODER_CRASH, " or ".join(sorted(set(causes))))

    def _ask(self, data: bytes) -> Facts:
        if self._child is None:
            self._child = _Child(self._decode, self._limits)
        try:
            return self._child.ask(data)
        except _DeathError:
            self.close()
            raise


class _Child:
    """One process that answers one question after another."""

    def __init__(self, decode: Decode, limits: Limits) -> None:
        self._limits = limits
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN.format(sys.path), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        try:
            self._connection.send((decode, limits))
            self._receive(START_S)
        except (OSError, EOFError) as error:
            self.close()
            raise EngineError(f"{sys.executable} could not start the child process that decodes images") from error

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def ask(self, data: bytes) -> Facts:
        try:
            self._connection.send_bytes(data)
            answer = self._receive(self._limits.wall_s + 30)  # it ends itself first, by its own timer
        except (OSError, EOFError):
            raise self._death() from None
        if "facts" in answer:
            width, height, found, mode, phash = answer["facts"]
            return Facts(int(width), int(height), str(found), str(mode), None if phash is None else int(phash))
        if "reason" in answer:
            raise ImageRejected(Reason(answer["reason"]), str(answer["detail"]))
        if "error" in answer:
            raise EngineError(
                f"the child process that decodes images failed, which is no image's fault: {answer['error']}"
            )
        limit = self._limits.memory_bytes >> 20
        raise _DeathError(f"its decoder wants more than {limit} MiB of memory", "out of memory")

    def _receive(self, wait_s: float) -> dict[str, Any]:
        if not self._connection.poll(wait_s):
            raise EOFError
        return json.loads(self._connection.recv_bytes(1 << 20))

    def _death(self) -> _DeathError:
        self._connection.close()
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return _DeathError(None, "because it neither answered nor ended")
        if code >= 0:
            return _DeathError(f"its decoder ended its process with exit code {code}", f"with exit code {code}")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        if -code == signal.SIGPROF:
            return _DeathError(f"its decoder took more than {self._limits.max_cpu_s} s of processor time", f"by {name}")
        if -code == signal.SIGALRM:
            return _DeathError(None, f"because it had waited {self._limits.wall_s:.0f} s without using the processor")
        return _DeathError(f"its decoder died by {name}" if -code in _OWN_SIGNALS else None, f"by {name}")


def serve(descriptor: int) -> None:
    """What the child does: answer until nobody asks."""
    connection = Connection(descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        decode, limits = connection.recv()  # from our own parent, over a socket that has no name
        connection.send_bytes(b"{}")
        limit_memory(limits)
        _serve(connection, decode, limits)
    except Exception as error:  # not the decoder's doing: its exceptions are answers
        connection.send_bytes(json.dumps({"error": repr(error)}).encode())


def _serve(connection: Connection, decode: Decode, limits: Limits) -> None:
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        watch(limits)
        answer = _answer(decode, data)
        unwatch()
        connection.send_bytes(json.dumps(answer).encode())
        if "memory" in answer:
            return  # whatever is left of it


def _answer(decode: Decode, data: bytes) -> dict[str, Any]:
    try:
        return {"facts": decode(data)}
    except ImageRejected as rejected:
        return {"reason": rejected.reason.value, "detail": rejected.detail}
    except MemoryError:
        return {"memory": True}
