"""Folders of images repacked as tars and as Parquet files, for tests of these sources."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Sample = tuple[str, str, bytes]
"""Name without extension, label, image bytes."""


def samples_of(folder: Path) -> list[Sample]:
    """Every image below a folder of class folders."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(f"{path.parent.name}/{path.stem}{path.suffix}", path.parent.name, path.read_bytes()) for path in found]


def tar_of(samples: Sequence[Sample], **more: bytes) -> bytes:
    """A WebDataset tar: image, label, and further members of every sample."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, label, data in samples:
            stem, _, extension = name.rpartition(".")
            for suffix, content in {extension: data, "cls": label.encode(), **more}.items():
                entry = tarfile.TarInfo(f"{stem}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def parquet_of(samples: Sequence[Sample], names: Sequence[str] = (), row_group_size: int = 8) -> bytes:
    """Parquet as `datasets` writes it; labels are numbers that the metadata names, where ``names`` are given."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    label = {"names": list(names), "_type": "ClassLabel"} if names else {"dtype": "string", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "label": label}
    labels = [names.index(text) if names else text for _, text, _ in samples]
    rows = pa.table(
        {"image": pa.array([{"bytes": data, "path": name} for name, _, data in samples], image), "label": labels},
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    stream = io.BytesIO()
    pq.write_table(rows, stream, row_group_size=row_group_size, write_page_checksum=True)
    return stream.getvalue()


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files below ``folder``; each replaces one of its name as a new file."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    return folder
