"""Why a loader has no index: what wraps it in another loader is told to iterate it instead."""

from __future__ import annotations

from typing import NoReturn

from pipeline.errors import UsageError


class IteratedOnly:
    """Base of what yields whole batches in an order of its own. torch's ``DataLoader`` would ask it for item 0."""

    def __getitem__(self, index: object) -> NoReturn:
        """Raises ``UsageError``."""
        name = type(self).__name__
        raise UsageError(
            f"a {name} has no item {index!r}: it yields whole batches, with workers of its own. Iterate the "
            f"{name} itself, `for images, labels in loader`, instead of wrapping it in a DataLoader"
        )
