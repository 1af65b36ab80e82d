"""The build file: what a build is asked to do.

Comes in: YAML and flags, in many spellings. Goes out: one frozen `BuildConfig`. Guarantees: an unknown key, a doubled
key or a value out of range is a `ConfigError` that names file, key and what would be right; nothing of the file is
executed; `meaning()` is the part that decides bytes, with neither a place, a clock nor a float in it.

Relative paths are relative to the working directory, in a file as in a flag.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.errors import ConfigError, NotFoundError
from pipeline.images import HARD_MAX_PIXELS, Inspection, Limits
from pipeline.labels import LabelMap, read_label_map
from pipeline.store.messages import redact

MAX_FILE_BYTES = 1 << 20

GUARDRAILS = ("class-map", "class-vanished", "open-cluster", "rejects", "shrink")
"""What `allow` may waive: refusals of a commit (DESIGN.md, section 6), and of a cluster that asks for no token."""

_BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def _to_bytes(value: object) -> object:
    """'128 MiB' -> 134217728; what is no text is left to the validator."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].lower() not in _BYTE_UNITS:
        raise ValueError("give a number of bytes (134217728), or one with a unit ('128MiB', '1GB')")
    return int(match[1]) * _BYTE_UNITS[match[2].lower()]


_BUDGET = "give a count (20), a rate from 0.0 to 1.0 (0.01) or a percentage ('1%')"


def _to_budget(value: object) -> object:
    """'5' -> 5 images; '1%' or '0.01' -> a share of all images; what is no text is left to the validator."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.fullmatch(r"\d+", text):
        return int(text)
    if re.fullmatch(r"\d*\.?\d+%", text):
        return float(text[:-1]) / 100
    if re.fullmatch(r"\d*\.\d+", text):
        return float(text)
    raise ValueError(_BUDGET)


def _to_path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _to_label_map(value: object) -> object:
    """A CSV or Parquet file; what is no path is left to the validator."""
    return read_label_map(value) if isinstance(value, str | os.PathLike) else value


def _to_names(value: object) -> object:
    """A file of names, one on each line, or the names themselves."""
    if isinstance(value, list):
        return tuple(cast("list[object]", value))
    if not isinstance(value, str | os.PathLike):
        return value
    try:
        with open(value, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise NotFoundError(
            f"classes = {os.fspath(value)!r}: give names, or a file of them, one on each line; this one cannot "
            f"be read: {error.strerror}"
        ) from None
    except UnicodeDecodeError:
        raise ValueError("give names, or a file of them, one on each line, in UTF-8") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"a file of more than {MAX_FILE_BYTES} bytes is no list of class names")
    while lines and not lines[-1].strip():
        lines.pop()
    return tuple(line.strip() for line in lines)


Bytes = Annotated[int, BeforeValidator(_to_bytes), Field(ge=1)]
Budget = Annotated[int | float | None, BeforeValidator(_to_budget)]
Place = Annotated[str, BeforeValidator(_to_path), Field(min_length=1)]
Column = Annotated[str, Field(min_length=1)]


class BuildConfig(BaseModel):
    """One build, validated. Every field is a key of the build file and, spelled with dashes, a flag."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: Place
    root: Place
    source_kind: Literal["folder", "table", "tar", "parquet"] | None = None  # None: told by what is there
    label_from: Literal["parent", "top", "path"] = "parent"
    split_from: Literal["none", "top", "name"] | None = (
        None  # None: not chosen, so a source with split folders stops with advice
    )
    path_column: Column | None = None
    image_column: Column | None = None
    label_column: Column | None = None
    split_column: Column | None = None
    group_column: Column | None = None
    classes: Annotated[tuple[str, ...] | None, BeforeValidator(_to_names)] = None  # what labels 0, 1, 2... are called
    label_map: Annotated[InstanceOf[LabelMap] | None, BeforeValidator(_to_label_map)] = None
    images: Place | None = None
    check: Literal["decode", "header"] = "decode"
    near_duplicates: int | None = Field(default=None, ge=1, le=8)  # bits of 64 in which look-alikes may differ
    shard_samples: int = Field(default=2000, ge=1)
    shard_bytes: Bytes = 128 << 20
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    manifests: dict[str, str | dict[str, Any]] = Field(default_factory=dict)
    max_rejects: Budget = None
    max_shrink: Budget = 0.1
    max_pixels: int = Field(default=Limits.max_pixels, ge=1, le=HARD_MAX_PIXELS)
    max_image_bytes: Bytes = Limits.max_bytes
    max_decode_s: int = Field(default=Limits.max_cpu_s, ge=1)  # of processor time, for one image
    workers: int | None = Field(default=None, ge=1)
    address: str | None = None
    allow: Annotated[tuple[str, ...], BeforeValidator(_to_tuple)] = ()

    @field_validator("manifests")
    @classmethod
    def _named_plainly(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
                raise ValueError(f"{name!r} is no manifest name: use letters, digits, '-', '_' and '.', at most 64")
        return dict(sorted(value.items()))

    @field_validator("max_rejects", "max_shrink")
    @classmethod
    def _count_or_rate(cls, value: float | None) -> float | None:
        if value is not None and not (0 <= value <= 1 if isinstance(value, float) else value >= 0):
            raise ValueError(_BUDGET)
        return value

    @field_validator("classes")
    @classmethod
    def _names_each_class_once(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is None:
            return None
        if not value:
            raise ValueError("expected at least one class name, found none")
        bad = [number for number, name in enumerate(value) if not re.fullmatch(r"\S(.{0,498}\S)?", name)]
        if bad:
            name = value[bad[0]]
            raise ValueError(
                f"name {bad[0]}, {name[:50]!r}: expected one line of 1 to 500 characters, no blanks around it"
            )
        twice = sorted(name for name, count in Counter(value).items() if count > 1)
        if twice:
            places = [number for number, name in enumerate(value) if name == twice[0]]
            raise ValueError(f"expected every name once, but {twice[0]!r} is the name of {places}")
        return value

    @field_validator("allow")
    @classmethod
    def _known_guardrails(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in GUARDRAILS:
                raise ValueError(f"{name!r} is no guardrail{_nearest(name, GUARDRAILS)}")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _one_giver_of_splits(self) -> BuildConfig:
        if self.split_from in ("top", "name") and self.split_column is not None:
            raise ValueError(f"split_from {self.split_from} and split_column {self.split_column!r}: choose one")
        return self

    @model_validator(mode="after")
    def _one_giver_of_class_names(self) -> BuildConfig:
        if self.classes is not None and self.label_map is not None:
            raise ValueError("classes and label_map both say what labels are called: choose one")
        return self

    @property
    def inspection(self) -> Inspection:
        """What is asked of every image."""
        limits = Limits(max_pixels=self.max_pixels, max_bytes=self.max_image_bytes, max_cpu_s=self.max_decode_s)
        return Inspection(check=self.check, limits=limits, hashed=self.near_duplicates is not None)

    def meaning(self) -> dict[str, Any]:
        """The fields that decide bytes, for records and their digests: strings, integers and null only."""
        decisive = self.model_dump(
            exclude={
                "source",
                "root",
                "images",
                "workers",
                "address",
                "allow",
                "max_rejects",
                "max_shrink",
                "label_map",
            }
        )
        if self.label_map is not None:
            decisive["label_map"] = self.label_map.digest
        if self.classes is not None:  # there may be thousands, and the class table has them
            decisive["classes"] = _digest(self.classes)
        for name in _LATER_KEYS:  # a build that does not use them is the build that it was before they existed
            if decisive.get(name, "") is None:
                del decisive[name]
        return {name: _without_floats(value) for name, value in decisive.items()}


KEYS = tuple(BuildConfig.model_fields)

_LATER_KEYS = ("classes", "near_duplicates")


def _digest(names: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a build file, checked one by one, not yet complete."""
    where = os.fspath(path)
    try:
        with open(where, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"build file {where!r} cannot be read: {error.strerror}; name another") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"build file {where!r} is larger than {MAX_FILE_BYTES} bytes; is it a build file?")
    values = _parse(data, where)
    _check_keys(values, where)
    _validated({"source": "unset", "root": "unset", **values}, where)
    return values


def make_config(file_values: Mapping[str, Any] | None = None, **flags: Any) -> BuildConfig:
    """One config of a build file's values and flags. A flag that is None or () was not given; others override.

    ``manifests`` and ``allow`` add to those of the file.
    """
    values = dict(file_values or {})
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    _check_keys(values, "the build file")
    _check_keys(given, "the flags")
    if "manifests" in given:
        given["manifests"] = {**(values.get("manifests") or {}), **given["manifests"]}
    if "allow" in given:
        given["allow"] = (*(values.get("allow") or ()), *given["allow"])
    values.update(given)
    for name in ("source", "root"):
        if values.get(name) is None:
            raise ConfigError(f"{name} is missing: evenshard build SOURCE ROOT, or `{name}:` in the build file")
    return _validated(values, "the build options")


class _Loader(yaml.SafeLoader):
    """Plain data only, each key once, no aliases: 324 bytes of aliases can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: aliases (*name) are not supported, write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key_node.value!r} stands here twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        values: object = _Loader(data.decode("utf-8-sig")).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"build file {where!r} is not plain YAML: {_yaml_problem(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"build file {where!r} must hold `key: value` lines, for example `source: photos/`")
    return dict(values)


def _yaml_problem(error: Exception) -> str:
    """What and where, without the excerpt that YAML shows: it may be the half of a URL that holds a signature."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {redact(error.problem or error.context or '')}"
    return redact(" ".join(str(error).split()))


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    unknown = [f"{name!r}{_nearest(name, KEYS)}" for name in values if name not in KEYS]
    if unknown:
        raise ConfigError(f"{where}: unknown key {redact('; '.join(unknown))}. Valid keys: {', '.join(KEYS)}")


def _nearest(name: str, valid: Iterable[str]) -> str:
    options = tuple(valid)
    close = difflib.get_close_matches(name.replace("-", "_"), options, n=1) or difflib.get_close_matches(
        name, options, 1
    )
    return f" (did you mean {close[0]!r}?)" if close else f" (one of: {', '.join(options)})"


def _validated(values: Mapping[str, Any], where: str) -> BuildConfig:
    try:
        return BuildConfig(**values)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_problem(item) for item in error.errors())) from None


def _problem(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:  # two fields that contradict each other
        return message
    found = redact(repr(item["input"]))
    return f"{item['loc'][0]} = {found if len(found) <= 200 else found[:200] + '...'}: {message}"


def _without_floats(value: Any) -> Any:
    """Floats as their shortest decimal text: records and manifests hold integers and strings only."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {str(name): _without_floats(item) for name, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, list | tuple):
        return [_without_floats(item) for item in value]
    return value
