from __future__ import annotations

import subprocess
import sys

import pytest

SPARED = """
import sys
from pipeline.store import spare_pandas
spare_pandas()
import numpy as np, pyarrow as pa
pa.table({"a": pa.array(["x"]), "b": pa.array(np.arange(1))})
assert "pandas" not in sys.modules
import pandas
assert pandas.DataFrame({"a": [1]}).shape == (1, 1)
"""
NOT_SPARED = "import sys, pyarrow as pa; pa.array(['x']); assert 'pandas' in sys.modules"
IMPORTED_BEFORE = """
import pandas, pyarrow as pa
from pipeline.store import spare_pandas
spare_pandas()
assert pa.table({"a": [1]}).to_pandas().shape == (1, 1)
"""


@pytest.mark.parametrize("script", [SPARED, NOT_SPARED, IMPORTED_BEFORE], ids=["spared", "not spared", "before"])
def test_pandas_is_imported_only_where_it_is_wanted(script: str) -> None:
    """The second is what the others are about: once it fails, `spare_pandas` can go."""
    subprocess.run([sys.executable, "-c", script], check=True)
