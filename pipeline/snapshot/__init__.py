"""Open a snapshot and what it names: the door for readers.

Comes in: a ROOT. Goes out: the commit record; tables of classes, shards and rejects; sample tables, indexes, manifests,
images.

Guarantees: a snapshot is seen whole or not at all; whatever is returned was compared with the checksum that the record
holds for it; files are read when they are first asked for; nothing is written.

Inside, in this order:
    record.py      the commit record: bytes and back
    numbers.py     which snapshots there are, and what to do where there is none
    reader.py      ``open_snapshot``, ``Snapshot``, ``Manifest``
"""

from pipeline.snapshot.numbers import is_collected, newest_number, no_snapshot, refuse_collected, snapshot_exists
from pipeline.snapshot.reader import Manifest, Snapshot, open_snapshot, read_record
from pipeline.snapshot.record import decode_record, encode_record, record_id

__all__ = [
    "Manifest",
    "Snapshot",
    "decode_record",
    "encode_record",
    "is_collected",
    "newest_number",
    "no_snapshot",
    "open_snapshot",
    "read_record",
    "record_id",
    "refuse_collected",
    "snapshot_exists",
]
