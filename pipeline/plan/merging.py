"""Classes with one image under the label of a parent: for whom a class of one is not worth a class.

Comes in: names that are paths (``--label-from path``: ``fruit/apple/gala``) and images per class. Goes out: which class
id stands for each class, ``int64[K]``: ``labels = parents[labels]`` in training and evaluation alike. Guarantees: only
classes with one image move; what stands for others stands for itself; nothing is lost from any sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError

IntArray = NDArray[np.int64]


def merge_singletons(names: Sequence[str], counts: IntArray, below: int = 2) -> IntArray:
    """int64 [K]: for a class with one image the nearest class above it in its path that has an image; where there is
    none, the first of the singletons beside it; itself, if it is alone. For every other class, itself.

    ``below``: the same for classes of fewer images than that.
    """
    if len(names) != len(counts):
        raise UsageError(f"{len(names)} class names for counts of {len(counts)} classes; they must be equally many")
    ids = {name: class_id for class_id, name in enumerate(names) if counts[class_id]}
    parents, first = np.arange(len(names)), dict[str, int]()
    singles = [class_id for class_id in range(len(names)) if 0 < counts[class_id] < below]
    for class_id in sorted(singles, key=lambda i: (names[i].count("/"), i)):  # ancestors have found their place
        above = _ancestors(names[class_id])
        found = next((ids[name] for name in above if name in ids), None)
        if found is not None:
            parents[class_id] = parents[found]
        elif above:
            parents[class_id] = first.setdefault(above[0], class_id)
    return parents


def _ancestors(name: str) -> list[str]:
    """``a/b``, ``a`` of ``a/b/c``."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]


def merge_into(names: Sequence[str], counts: IntArray, other: str, below: int = 2) -> dict[str, str]:
    """The classes of 1 to ``below`` - 1 images, all under the one name ``other``."""
    return {
        name: other for name, count in zip(names, counts.tolist(), strict=True) if 0 < count < below and name != other
    }


def merged(values: IntArray, parents: IntArray) -> IntArray:
    """Counts or targets [K] summed under the class that stands for each: what ``log_prior`` and ``log_q`` are of."""
    result = np.zeros_like(values)
    np.add.at(result, parents, values)
    return result
