"""What a build asks of every image, and the process that asks it.

A decoder is C code on bytes that nobody vouches for: it may crash, never return, or ask for all memory. The first
attempt at a unit decodes inside the worker, at no extra cost, under limits that end the worker when one image breaks
them. A later attempt, after a worker was lost for whatever reason, decodes in a child process instead (`isolated`).
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from types import TracebackType

from pipeline.images.facts import Check, Facts, Limits
from pipeline.images.headers import glance
from pipeline.images.isolated import Isolated
from pipeline.images.pillow import decode_facts
from pipeline.images.watch import limit_memory, unwatch, watch


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is asked of every image; travels to workers and to the children that decode for them.

    ``decode`` decodes every pixel of the first frame. ``header`` trusts the pixels of an image that looks whole: plain
    JPEG and PNG are read by our own parser, others opened by Pillow; what does not look whole is decoded all the same.
    """

    check: Check
    limits: Limits
    hashed: bool = False
    """Whether facts are to carry a perceptual hash, for which every image is decoded."""

    def open(self, *, attempt: int) -> Inspector:
        """What inspects the images of one unit; ``attempt`` counts from 1, and further ones followed a lost worker."""
        return Inspector(self, isolated=attempt > 1)

    def glance(self, data: bytes) -> Facts | None:
        """The facts where no decoder is needed, None where it is; ImageRejected where none shall be asked."""
        facts = glance(data, limits=self.limits)
        return facts if self.check == "header" and not self.hashed else None

    def decode(self, data: bytes) -> Facts:
        """The decoder's word: facts, or ImageRejected. May also crash, hang or raise MemoryError."""
        return decode_facts(data, limits=self.limits, check=self.check, hashed=self.hashed)


def inspect(data: bytes, *, check: Check, limits: Limits) -> Facts:
    """Facts of an image that `decode_rgb` can decode, else ImageRejected. In this process, whatever a decoder does."""
    inspection = Inspection(check=check, limits=limits)
    return inspection.glance(data) or inspection.decode(data)


class Inspector:
    """Inspects images one after another within a ``with`` block, in one thread.

    A decoder that breaks a limit, or crashes, ends this process, unless ``isolated``: then its child ends, and what
    ended it three times is `ImageRejected` as a decoder crash. So `isolated` must be tried before giving up.
    """

    def __init__(self, inspection: Inspection, *, isolated: bool) -> None:
        self._inspection = inspection
        self._isolated = isolated
        self._child = Isolated(inspection.decode, inspection.limits)
        self._memory: tuple[int, int] | None = None

    def __enter__(self) -> Inspector:
        if not self._isolated:
            self._memory = limit_memory(self._inspection.limits)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.close()
        if self._memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, self._memory)

    @property
    def hashed(self) -> bool:
        """Whether facts carry a perceptual hash."""
        return self._inspection.hashed

    def inspect(self, data: bytes, name: str) -> Facts:
        """Facts of the image, or ImageRejected. ``name`` is for messages only.

        EngineError where its decoder was killed again and again from outside, or waits without using the processor.
        """
        facts = self._inspection.glance(data)
        if facts is not None:
            return facts
        if self._isolated:
            return self._child.decode(data, name)
        try:
            watch(self._inspection.limits)
            try:
                return self._inspection.decode(data)
            finally:
                unwatch()
        except MemoryError:  # the limit, or a machine without memory: a fresh process tells which
            return self._child.decode(data, name)
