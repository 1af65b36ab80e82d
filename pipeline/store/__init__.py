"""The only room that touches the storage of a ROOT: read, create-only write, hash, redact.

Comes in: the URL of a ROOT and paths below it. Goes out: bytes, Arrow tables, checked views of them.

Guarantees:
    a file appears under its final name whole and durable, or not at all; only runs/ and reports/ are ever overwritten;
    no path leaves ROOT; what is read through a ``FileRef`` or a checksum is what was written, or an IntegrityError;
    every failure is an error that names the path and says what to do, without credentials.

Inside, in this order:
    messages.py    errno -> advice; redaction
    backends.py    a directory; any other fsspec file system
    root.py        ``Store``: the one door to both
    checked.py     files by content: references, Arrow tables, block-checked columns
    shards.py      image bytes by offset
"""

from pipeline.store.checked import (
    CheckedTable,
    block_digests,
    ipc_to_table,
    make_ref,
    put_table,
    read_checked,
    sha256_file,
    table_to_ipc,
)
from pipeline.store.messages import redact
from pipeline.store.root import LAYOUT, Store
from pipeline.store.shards import ShardReader, check_image, read_image

__all__ = [
    "LAYOUT",
    "CheckedTable",
    "ShardReader",
    "Store",
    "block_digests",
    "check_image",
    "ipc_to_table",
    "make_ref",
    "put_table",
    "read_checked",
    "read_image",
    "redact",
    "sha256_file",
    "table_to_ipc",
]
