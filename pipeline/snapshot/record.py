"""The commit record as canonical JSON: one record has one spelling, and its id is the hash of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn, cast

from pipeline.errors import IntegrityError, UsageError
from pipeline.schema import HASHED_FORMAT_VERSION, SPLITS, FileRef, SnapshotRecord


def encode_record(record: SnapshotRecord) -> bytes:
    """Canonical JSON with an ``id``: the SHA-256 of the same without it."""
    values = _to_json(record)
    return _canonical(values | {"id": _id(values)})


def record_id(record: SnapshotRecord) -> str:
    """What ``parent`` of the next record holds."""
    return _id(_to_json(record))


def decode_record(data: bytes, where: str) -> SnapshotRecord:
    """The record in ``data``, read from ``where``; IntegrityError unless it is unchanged and of a known version."""
    values = _load(data, where)
    _check_version(values, where)
    found = values.pop("id", None)
    if found != (expected := _id(values)):
        raise IntegrityError(f"{where} is damaged: its id is {found!r}, its content has {expected!r}")
    try:
        return _from_json(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{where}: not a commit record of evenshard: {type(error).__name__}: {error}") from error


def _to_json(record: SnapshotRecord) -> dict[str, Any]:
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}
    for name in ("classes", "shards", "rejects"):
        values[name] = values[name].to_json()
    for name in ("samples", "manifests"):
        values[name] = {key: ref.to_json() for key, ref in values[name].items()}
    departed = values.pop("departed")
    if record.format_version > 1:  # version 1 knew no such key, and its id is over its own spelling
        values["departed"] = departed.to_json() if departed else None
    near = values.pop("near_duplicates")
    if record.format_version >= HASHED_FORMAT_VERSION:
        values["near_duplicates"] = near
    _refuse_floats(values, "record")
    return values


def _from_json(values: Mapping[str, Any]) -> SnapshotRecord:
    known, found = {field.name for field in fields(SnapshotRecord)}, set(values)
    if values["format_version"] == 1:
        known.discard("departed")
    if values["format_version"] < HASHED_FORMAT_VERSION:
        known.discard("near_duplicates")
    _expect(found == known, f"missing keys {sorted(known - found)}, unknown keys {sorted(found - known)}")
    made = dict(values)
    for name in ("number", "seed", "num_images", "num_classes", "num_rejects"):
        _expect(type(made[name]) is int, f"{name} must be a whole number, found {made[name]!r}")
    for name in ("parent", "build_id", "created_by"):
        _expect(type(made[name]) is str, f"{name} must be a string, found {made[name]!r}")
    for name in ("classes", "shards", "rejects"):
        made[name] = _ref(made[name], name)
    for name in ("samples", "manifests"):
        made[name] = {key: _ref(value, f"{name}.{key}") for key, value in made[name].items()}
    if made.get("departed") is not None:
        made["departed"] = _ref(made["departed"], "departed")
    if made["format_version"] >= HASHED_FORMAT_VERSION:
        near = made["near_duplicates"]
        sound = near is None or (set(near) == {"num_groups", "num_images"} and all(map(_is_count, near.values())))
        _expect(sound, f"near_duplicates must count groups and images, found {near!r}")
    _expect(made["samples"].keys() <= set(SPLITS), f"splits must be among {SPLITS}, found {list(made['samples'])}")
    _expect(type(made["config"]) is dict, f"config must be an object, found {made['config']!r}")
    return SnapshotRecord(**made)


def _ref(value: Any, name: str) -> FileRef:
    _expect(set(value) == {"sha256", "size", "num_rows", "blocks"}, f"{name} is no reference to a file: {value!r}")
    for key, pattern in (("sha256", "[0-9a-f]{64}"), ("blocks", "([0-9a-f]{16})*")):
        _expect(re.fullmatch(pattern, value[key]) is not None, f"{name}.{key} must be hex digits, found {value[key]!r}")
    for key in ("size", "num_rows"):
        _expect(_is_count(value[key]), f"{name}.{key} must be a whole number from 0, found {value[key]!r}")
    return FileRef.from_json(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _canonical(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, sort_keys=True, indent=1, ensure_ascii=True) + "\n").encode("ascii")


def _id(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(values)).hexdigest()


def _refuse_floats(value: Any, where: str) -> None:
    """Floats have many spellings, and the id is over the spelling."""
    if isinstance(value, float):
        raise UsageError(f"{where} is {value!r}: a record holds whole numbers and strings only; write it as a string")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in cast("Any", items):
        _refuse_floats(part, f"{where}.{key}")


def _load(data: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("ascii"), object_pairs_hook=_unique, parse_float=_no, parse_constant=_no)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where} is damaged: not a commit record of evenshard: {error}") from error
    if not isinstance(values, dict):
        raise IntegrityError(f"{where} is damaged: expected a JSON object, found {type(values).__name__}")
    return cast("dict[str, Any]", values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    _expect(len(values) == len(pairs), f"a key stands twice among {[key for key, _ in pairs]}")
    return values


def _no(text: str) -> NoReturn:
    raise ValueError(f"a record holds whole numbers and strings only, found {text}")


def _check_version(values: Mapping[str, Any], where: str) -> None:
    version = values.get("format_version")
    if type(version) is not int or version < 1:
        raise IntegrityError(f"{where}: format_version must be a whole number from 1, found {version!r}")
    if version > HASHED_FORMAT_VERSION:
        raise IntegrityError(
            f"{where}: format_version {version} is newer than {HASHED_FORMAT_VERSION}, the newest that this version "
            f"of evenshard reads; upgrade evenshard"
        )
