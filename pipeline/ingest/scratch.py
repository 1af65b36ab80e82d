"""Columns with a value for every image, in memory that is a file: what is not in use need not be resident.

Comes in: shapes, columns. Goes out: arrays like any other. Guarantees: nothing is left behind, whatever dies
(the files have no name); a full disk is a StoreError when a column is made, never a crash when it is filled; small
columns stay in ordinary memory, so that a usual build needs no space for this.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import SourceError, StoreError

MIN_BYTES = 8 << 20
"""Of a column: a million keys."""


class Scratch:
    """Makes columns, and lets go of their pages between the steps of a build."""

    def __init__(self, *, min_bytes: int = MIN_BYTES) -> None:
        self._min_bytes = min_bytes
        self._maps: list[weakref.ref[mmap.mmap]] = []

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Zeros. Of two dimensions each column lies by itself: who reads one touches no other."""
        kind = np.dtype(dtype)
        num_bytes = int(np.prod(shape)) * kind.itemsize
        if num_bytes < self._min_bytes or not num_bytes:
            return np.zeros(shape, kind, order="F")
        return np.ndarray(shape, kind, buffer=self._map(num_bytes), order="F")

    def keep(self, values: NDArray[Any]) -> NDArray[Any]:
        """A copy of ``values``."""
        kept = self.zeros(values.shape, values.dtype)
        kept[...] = values
        return kept

    def keep_array(self, array: pa.Array) -> pa.Array:
        """A copy of a column of numbers or texts; one with an offset or missing values stays where it is."""
        if array.offset or array.null_count or array.nbytes < self._min_bytes:
            return array
        buffers = [
            None if part is None else pa.py_buffer(self.keep(np.frombuffer(part, np.uint8))) for part in array.buffers()
        ]
        return pa.Array.from_buffers(array.type, len(array), buffers)

    def join_texts(self, chunks: list[pa.Array]) -> pa.Array:
        """These arrays of texts as one; they leave ``chunks`` one by one, so that they are never there twice.

        Errors: ``SourceError`` for more than 2 GiB of text, which one Arrow array of strings cannot hold.
        """
        length, num_bytes = sum(map(len, chunks)), sum(_num_text_bytes(chunk) for chunk in chunks)
        if num_bytes > _MAX_TEXT_BYTES:
            raise SourceError(
                f"the paths of {length} files take {num_bytes} bytes, and one build holds at most {_MAX_TEXT_BYTES}: "
                "build parts of the source into ROOTs of their own"
            )
        offsets, text = self.zeros(length + 1, np.int32), self.zeros(num_bytes, np.uint8)
        chunks.reverse()
        row = end = 0
        while chunks:
            chunk = chunks.pop()
            bounds = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            if not len(chunk):
                continue
            size = int(bounds[-1] - bounds[0])
            offsets[row + 1 : row + 1 + len(chunk)] = bounds[1:] - bounds[0] + end
            if size:
                text[end : end + size] = np.frombuffer(chunk.buffers()[2], np.uint8)[bounds[0] : bounds[-1]]
            row, end = row + len(chunk), end + size
        return pa.StringArray.from_buffers(length, pa.py_buffer(offsets), pa.py_buffer(text))

    def rest(self) -> None:
        """A step has ended: no page of any column is needed just now. They are read again when they are."""
        self._maps = [reference for reference in self._maps if reference() is not None]
        for reference in self._maps:
            if (mapped := reference()) is not None:
                mapped.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: the file keeps what was written
        pa.default_memory_pool().release_unused()

    @property
    def num_bytes(self) -> int:
        """In files, now."""
        return sum(len(mapped) for reference in self._maps if (mapped := reference()) is not None)

    def _map(self, num_bytes: int) -> mmap.mmap:
        with tempfile.TemporaryFile(prefix="evenshard-scratch-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)  # a hole that finds no space later would be a SIGBUS
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise StoreError(
                        f"{num_bytes >> 20} MiB of temporary space are needed in {tempfile.gettempdir()}: "
                        f"{os.strerror(error.errno or 0)}; set TMPDIR to another place"
                    ) from error
                file.truncate(num_bytes)
            mapped = mmap.mmap(file.fileno(), num_bytes)
        self._maps.append(weakref.ref(mapped))
        return mapped


_MAX_TEXT_BYTES = (1 << 31) - 1


def _num_text_bytes(chunk: pa.Array) -> int:
    if not len(chunk):
        return 0
    offsets = np.frombuffer(chunk.buffers()[1], np.int32)
    return int(offsets[chunk.offset + len(chunk)] - offsets[chunk.offset])
