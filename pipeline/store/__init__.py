"""The only room that touches the storage of a ROOT: read, create-only write, hash, redact.

Comes in: the URL of a ROOT and paths below it. Goes out: bytes, Arrow tables, checked views of them.

Guarantees:
    a file appears under its final name whole and durable, or not at all; only runs/ and reports/ are ever overwritten;
    no path leaves ROOT; what is read through a ``FileRef`` or a checksum is what was written, or an IntegrityError;
    every failure is an error that names the path and says what to do, without credentials.

Inside, in this order:
    arrow.py       what pyarrow need not import
    messages.py    errno -> advice; redaction
    backends.py    what storage must do; a directory
    remote.py      any other fsspec file system: reads tried again, counted
    root.py        ``Store``: the one door to both
    checked.py     files by content: references, Arrow tables, block-checked columns
    shards.py      image bytes by offset
"""

from pipeline.store.arrow import spare_pandas
from pipeline.store.backends import Entry, read_fully
from pipeline.store.checked import (
    CheckedTable,
    HashedSink,
    block_digests,
    ipc_to_table,
    make_ref,
    put_table,
    read_checked,
    replace_by,
    sha256_file,
    table_to_ipc,
    write_ipc,
)
from pipeline.store.claims import temporary_dir
from pipeline.store.messages import redact
from pipeline.store.remote import Traffic
from pipeline.store.root import LAYOUT, Store
from pipeline.store.shards import OPEN_FILES, ShardRange, ShardReader, check_image, read_image, vanishing

__all__ = [
    "LAYOUT",
    "OPEN_FILES",
    "CheckedTable",
    "Entry",
    "HashedSink",
    "ShardRange",
    "ShardReader",
    "Store",
    "Traffic",
    "block_digests",
    "check_image",
    "ipc_to_table",
    "make_ref",
    "put_table",
    "read_checked",
    "read_fully",
    "read_image",
    "redact",
    "replace_by",
    "sha256_file",
    "spare_pandas",
    "table_to_ipc",
    "temporary_dir",
    "vanishing",
    "write_ipc",
]
