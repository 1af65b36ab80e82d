"""Text of the page: what a source calls things, spelled out so that it reads as it is; counts and sizes for people.

Comes in: anything a source can hold. Goes out: text of bounded length, no character of which hides or reorders others.
"""

from __future__ import annotations

import unicodedata

MAX_SHOWN = 240
"""Characters of a name, path or message; a table may hold a label of a million."""

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # part of the spelling in many scripts, and of emoji


def visible(text: object, limit: int = MAX_SHOWN) -> str:
    """``text`` with every control, bidirectional or unassigned character spelled out, cut beyond ``limit``."""
    whole = str(text)
    shown = "".join(
        c if unicodedata.category(c) not in _HIDDEN or c in _JOINERS else ascii(c)[1:-1] for c in whole[:limit]
    )
    left = len(whole) - limit
    return f"{shown}\u2026 and {left:,} more characters" if left > 0 else shown


def num_bytes(count: int) -> str:
    """``count`` bytes in the unit a person would choose."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:,.0f} bytes" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"


def counted(count: int, one: str, many: str = "") -> str:
    """``1 class``, ``2,000 classes``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def percent(part: float, whole: float) -> str:
    """A share; as many digits as it takes to tell some from none and from all."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1 or 99.9 < share < 100:
        return "under 0.1\u202f%" if share < 50 else "over 99.9\u202f%"
    return f"{share:.1f}\u202f%" if 0 < share < 10 or 90 < share < 100 else f"{share:.0f}\u202f%"


def times(factor: float) -> str:
    """A repeat factor: ``33×``, ``1.7×``, ``every 12 epochs``."""
    if factor <= 0:
        return "never"
    if factor < 0.75:
        return f"every {1 / factor:,.0f} epochs"
    return f"{factor:,.0f}×" if factor >= 9.95 or factor == round(factor) else f"{factor:.1f}×"
