"""A hash that pictures share if they look the same: re-encoded, rescaled, a little brighter.

Comes in: a decoded image. Goes out: 64 bits, or None for a picture without anything to see. Guarantees: whole
numbers only, so the same picture has the same hash on every machine. How far apart hashes may be: docs/LOG.md.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_FLAT = 8
"""Grey levels between the darkest and the brightest cell: below, noise decides, and blank pages would be alike."""


def difference_hash(upright: Image.Image) -> int | None:
    """dHash of an upright RGB or grey image: whether each of 9 x 8 cells is darker than the one on its right."""
    cells = np.asarray(upright.resize((9, 8), Image.Resampling.BOX).convert("L"), dtype=np.int16)
    if int(cells.max()) - int(cells.min()) < _FLAT:
        return None
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")
