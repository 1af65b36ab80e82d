"""What pyarrow does on its first array, undone for processes of our own.

pyarrow then looks whether pandas can be imported, by importing it: half a second of processor time, for nothing where
no table ever becomes a data frame.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pyarrow as pa


class _NoPandas(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is not looked for", name=fullname)
        return None


def spare_pandas() -> None:
    """Let pyarrow come to know that there is no pandas, which it asks once.

    Only for processes that are ours from the start, like a command or its workers: ``to_pandas`` fails in them, unless
    pandas was imported before. Others may import pandas as ever.
    """
    if "pandas" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)
