"""Many-shot, medium-shot, few-shot, one: the groups of classes that every figure of a long tail is told by.

Comes in: ``int64[K]`` training images per class. Goes out: masks and positions. Guarantees: each class with an image is
in exactly one of GROUPS.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MANY_ABOVE, FEW_BELOW = 100, 20
"""Many-shot above 100 training images, few-shot below 20: Liu et al., CVPR 2019, and the long-tail papers since."""

GROUPS = ("many", "medium", "few", "one")
"""``few`` has 2 to 19 images here; ``one``, which the papers count among them, has a single one."""

RANGES = {"many": f">{MANY_ABOVE}", "medium": f"{FEW_BELOW}-{MANY_ABOVE}", "few": f"2-{FEW_BELOW - 1}", "one": "1"}
"""Images per class, for people."""

NO_GROUP = -1


def group_of(counts: NDArray[np.integer]) -> NDArray[np.int8]:
    """int8 [K]: the position in GROUPS of each class, ``NO_GROUP`` where it has no image."""
    conditions = [counts > MANY_ABOVE, counts >= FEW_BELOW, counts > 1, counts == 1]
    return np.select(conditions, [np.int8(place) for place in range(len(GROUPS))], np.int8(NO_GROUP))
