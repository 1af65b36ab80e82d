"""What makes two builds the same: digests of what they were asked, shown, and told to do.

Comes in: a configuration, a listing, a record. Goes out: settings, SHA-256 digests. Guarantees: nothing in them depends
on a machine, a clock, or how often a build was started; no copy is made of a column with a value for every image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib.metadata import version
from typing import Any

from pipeline.config import BuildConfig
from pipeline.ingest.containers import token
from pipeline.ingest.source import Listing
from pipeline.schema import SnapshotRecord
from pipeline.snapshot import encode_record
from pipeline.store import HashedSink, redact, write_ipc


def reading_settings(config: BuildConfig, listing: Listing) -> dict[str, Any]:
    """What decides how the bytes of one file are judged, and which files those are."""
    # Two sources may hold files of the same names, sizes and times: finished work belongs to one of them.
    place = listing.reader.place
    return {
        "source": f"{place.protocol}:{redact(place.path)}",
        "check": config.check,
        **dataclasses.asdict(config.inspection.limits),
        "pillow": version("pillow"),
        "evenshard": version("evenshard"),
        **({"hashed": True} if config.inspection.hashed else {}),
        **_opening_settings(config, listing),
    }


def _opening_settings(config: BuildConfig, listing: Listing) -> dict[str, Any]:
    """What decides which samples a container holds."""
    reader = listing.container_reader
    if reader is None:
        return {}
    fields, columns = dataclasses.asdict(reader.fields), dataclasses.asdict(reader.columns)
    meaning = config.meaning()
    named = {name: meaning[name] for name in ("classes", "label_map") if name in meaning}
    return {"fields": fields, "columns": columns, "split_from": config.split_from, **named}


def listing_digest(config: BuildConfig, listing: Listing) -> str:
    """SHA-256 over all that the source showed and was asked, fingerprints included."""
    meaning = {name: value for name, value in config.meaning().items() if name != "manifests"}
    sink = HashedSink()
    sink.write(json.dumps([meaning, listing.class_names], sort_keys=True).encode())
    for table in (listing.rejects, listing.references):
        write_ipc(table, sink)
    sink.write(json.dumps([(token(item), item.split) for item in listing.containers]).encode())
    return sink.hash.hexdigest()


def build_id(config: BuildConfig, listing: Listing) -> str:
    """SHA-256 over what this build was asked to do. No fingerprints: copies with other mtimes are the same build."""
    digest = hashlib.sha256(json.dumps(config.meaning(), sort_keys=True).encode())
    for name in ("key", "class_id", "split", "group", "size"):
        digest.update(listing.references[name].to_numpy())
    digest.update(json.dumps(listing.class_names).encode())
    return digest.hexdigest()


def content_bytes(record: SnapshotRecord) -> bytes:
    """The record without what tells one build from another of the same content."""
    return encode_record(dataclasses.replace(record, number=1, parent="", build_id="", config={}, created_by=""))
