"""The manifest document, and what follows from its numbers: priors, weights, repeat factors (DESIGN.md, section 7).

Comes in: a policy's targets and the files they refer to. Goes out: canonical JSON that names them, and back; per class,
``float64[K]`` vectors computed on load. Guarantees: the file holds integers and strings only and one document has one
spelling; ``decode`` refuses anything malformed and names the file in every error. No storage is touched here.

One identity ties the vectors together: a network trained on draws ``q`` with loss weights ``w`` and a training-time
logit offset ``a`` carries the prior ``log q + log w - a``, up to a constant. Predictions for another prior are
corrected by the difference.

A class without images (or draws) has a log prior of ``-inf`` and a weight of 0. Added to its logit, ``-inf`` says what
is true: the class cannot be predicted. It is never smoothed in silence. Labels of such a class do not occur in the
draws, so a loss over the draws stays finite.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import IntegrityError, PolicyError, UsageError
from pipeline.plan.epoch import EPOCH_RULE
from pipeline.plan.policy import Policy, Targets, parse, to_json
from pipeline.plan.shots import GROUPS, group_of
from pipeline.schema import BLOCK_BYTES, MANIFEST_FORMAT_VERSION, SPLITS, TARGETS, FileRef

FORMAT = "evenshard.manifest"

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ManifestDocument:
    """How often each class of a split is drawn in one epoch: the policy, its targets, and the files they refer to."""

    name: str
    policy: Policy
    split: str
    num_classes: int
    num_draws: int
    targets: FileRef  # schema.TARGETS
    classes: FileRef
    shards: FileRef
    samples: FileRef  # of this split
    epoch_rule: int = EPOCH_RULE

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.split not in SPLITS:
            raise UsageError(f"manifest {self.name}: split must be one of {', '.join(SPLITS)}, not {self.split!r}")


def check_name(name: str) -> str:
    """Names stand in commands and in schedules such as ``natural:20 -> balanced:5``: no ``:`` and no space."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UsageError(
            f"a manifest name is 1 to 100 letters, digits, '_', '-' or '.', a letter or digit first; not {name!r}"
        )
    return name


# -- the file -----------------------------------------------------------------------------------------------------


def encode(document: ManifestDocument) -> bytes:
    """Canonical JSON: keys sorted, one space of indent, ASCII, a newline at the end."""
    values: dict[str, Any] = {key: getattr(document, key) for key in _FIELDS if key in document.__annotations__}
    values |= {key: cast(FileRef, values[key]).to_json() for key in _FILES}
    values |= {"policy": to_json(document.policy), "format": FORMAT, "format_version": MANIFEST_FORMAT_VERSION}
    return (json.dumps(values, sort_keys=True, indent=1, ensure_ascii=True) + "\n").encode("ascii")


def decode(data: bytes, where: str) -> ManifestDocument:
    """The document in ``data``, read from ``where``. Raises IntegrityError where it is not a whole, known manifest."""
    values = _load(data, where)
    _check_format(values, where)
    _check_fields(values, _FIELDS, where)
    if values["epoch_rule"] != EPOCH_RULE:
        raise IntegrityError(
            f"{where}: epoch_rule {values['epoch_rule']}, this version of evenshard draws by rule {EPOCH_RULE} only; "
            "install the version that wrote it, or write the manifest anew"
        )
    made = {key: _file_ref(values[key], f"{where}: {key}") for key in _FILES}
    rest = {key: values[key] for key in ("name", "split", "num_classes", "num_draws", "epoch_rule")}
    try:
        document = ManifestDocument(policy=parse(values["policy"]), **cast("dict[str, Any]", made | rest))
    except UsageError as error:
        raise IntegrityError(f"{where}: {error}") from error
    _check_numbers(document, where)
    return document


def _load(data: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(
            data.decode("ascii"), object_pairs_hook=_unique, parse_float=_refuse, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:  # bad encoding, bad JSON, or refused here
        raise IntegrityError(f"{where}: not a manifest of evenshard: {error}") from error
    if not isinstance(values, dict):
        raise IntegrityError(f"{where}: expected a JSON object, found {type(values).__name__}")
    return cast("dict[str, Any]", values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = Counter(key for key, _ in pairs)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(f"key {twice[0]!r} stands twice")
    for key, value in pairs:
        if isinstance(value, bool) or not isinstance(value, int | str | dict):
            _refuse(f"{json.dumps(value)} as {key!r}")
    return dict(pairs)


def _refuse(text: str) -> Any:
    raise ValueError(f"a manifest holds integers and strings only, found {text}")


def _check_format(values: Mapping[str, Any], where: str) -> None:
    """Before the keys: a newer version may have others."""
    if values.get("format") != FORMAT:
        raise IntegrityError(f"{where}: expected format {FORMAT!r}, found {values.get('format')!r}")
    version = values.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise IntegrityError(f"{where}: format_version must be an integer from 1, found {version!r}")
    if version > MANIFEST_FORMAT_VERSION:
        raise IntegrityError(
            f"{where}: format_version {version} is newer than {MANIFEST_FORMAT_VERSION}, the newest that this version "
            "of evenshard reads; upgrade evenshard"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


_FILES = ("targets", "classes", "shards", "samples")
_KINDS: Mapping[Callable[[object], bool], str] = {
    _is_count: "an integer from 0 to 2^63 - 1",
    _is_text: "a string",
    _is_object: "an object",
}
_FIELDS: Mapping[str, Callable[[object], bool]] = {
    "format": _is_text,
    "format_version": _is_count,
    "name": _is_text,
    "policy": _is_object,
    "split": _is_text,
    "epoch_rule": _is_count,
    "num_classes": _is_count,
    "num_draws": _is_count,
    **dict.fromkeys(_FILES, _is_object),
}
_FILE_FIELDS: Mapping[str, Callable[[object], bool]] = {
    "sha256": _is_text,
    "size": _is_count,
    "num_rows": _is_count,
    "blocks": _is_text,
}


def _check_fields(values: Mapping[str, Any], fields: Mapping[str, Callable[[object], bool]], where: str) -> None:
    missing, unknown = fields.keys() - values.keys(), values.keys() - fields.keys()
    if missing or unknown:
        raise IntegrityError(f"{where}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
    if wrong := [key for key, valid in fields.items() if not valid(values[key])]:
        found = "; ".join(f"{key} must be {_KINDS[fields[key]]}, found {values[key]!r}" for key in wrong)
        raise IntegrityError(f"{where}: {found}")


def _file_ref(values: Mapping[str, Any], where: str) -> FileRef:
    _check_fields(values, _FILE_FIELDS, where)
    if not re.fullmatch(r"[0-9a-f]{64}", values["sha256"]):
        raise IntegrityError(f"{where}: sha256 must be 64 lower-case hex digits, found {values['sha256']!r}")
    num_blocks = -(-values["size"] // BLOCK_BYTES)
    if not re.fullmatch(r"(?:[0-9a-f]{16})*", values["blocks"]) or len(values["blocks"]) not in (0, 16 * num_blocks):
        raise IntegrityError(f"{where}: blocks must be 16 hex digits for each of {num_blocks} blocks, or empty")
    return FileRef.from_json(values)


def _check_numbers(document: ManifestDocument, where: str) -> None:
    if document.num_draws == 0 or document.num_classes == 0:
        raise IntegrityError(f"{where}: a manifest has at least one class and one draw")
    rows = {"targets": document.targets.num_rows, "classes": document.classes.num_rows}
    if wrong := {key: found for key, found in rows.items() if found != document.num_classes}:
        raise IntegrityError(f"{where}: num_classes is {document.num_classes}, but num_rows of the tables is {wrong}")


# -- the table of targets -------------------------------------------------------------------------------------------


def targets_table(targets: Targets) -> pa.Table:
    """Targets as a table in ``schema.TARGETS``, one row per class."""
    columns = [pa.array(array) for array in (targets.available, targets.pool, targets.target)]
    return pa.Table.from_arrays(columns, schema=TARGETS)


# -- what follows per class, float64[K] -----------------------------------------------------------------------------


def log_prior(available: IntArray) -> FloatArray:
    """log(n_c / N): the prior of the source. ``-inf`` where there is no image."""
    return _log_share(available)


def log_q(target: IntArray) -> FloatArray:
    """log(T_c / M): the prior that a network trained on these draws carries. ``-inf`` where nothing is drawn."""
    return _log_share(target)


def _log_share(counts: IntArray) -> FloatArray:
    if (total := int(counts.sum())) <= 0:
        raise PolicyError(f"no prior: all {len(counts)} classes are empty")
    result = np.full(len(counts), -np.inf)
    np.log(counts / total, out=result, where=counts > 0)
    return result


def repeat_factor(available: IntArray, target: IntArray) -> FloatArray:
    """T_c / n_c, as in LVIS: how often an image appears in one epoch. 0 where there is no image."""
    return np.divide(target, available, out=np.zeros(len(available)), where=available > 0)


WEIGHTS = ("balanced", "effective_number", "square_root", "residual")
"""Kinds of class weights."""


def weights(kind: str, available: IntArray, target: IntArray, *, beta: float = 0.999) -> FloatArray:
    """Class weights for a loss over this manifest's draws, ``float64[K]``, with mean 1 over the draws: sum(q * w) = 1.

    balanced           1 / n_c. On natural draws N / (K * n_c), scikit-learn's ``balanced``
    effective_number   (1 - beta) / (1 - beta^n_c); Cui et al., CVPR 2019
    square_root        1 / sqrt(n_c)
    residual           1 / T_c: what these draws still lack to be balanced; all 1 on balanced draws

    The first three judge the source, whatever is drawn: on draws that are balanced already they correct a second time.
    A class without images, and for ``residual`` one without draws, weighs 0.

    Weights need not sum to 1. With hard labels ``CrossEntropyLoss(weight=w)`` divides by the sum of the weights it met,
    so any factor cancels. With soft labels (mixup, CutMix) it divides by the number of images, and the factor scales
    loss and learning rate; a mean of 1 over the draws keeps both as they were.
    """
    if kind not in WEIGHTS:
        raise UsageError(f"unknown class weights {kind!r}; expected one of {', '.join(WEIGHTS)}")
    if not 0 <= beta < 1:
        raise UsageError(f"beta must be from 0 to below 1, not {beta!r}")
    if not (target > 0).any():
        raise PolicyError(f"no class weights: none of the {len(target)} classes is drawn")
    counts = target if kind == "residual" else available
    raw = np.zeros(len(counts))
    raw[counts > 0] = _raw_weights(kind, counts[counts > 0].astype(np.float64), beta)
    mean = float((target * raw).sum() / target.sum())
    return raw / mean


def _raw_weights(kind: str, counts: FloatArray, beta: float) -> FloatArray:
    if kind == "square_root":
        return 1 / np.sqrt(counts)
    if kind == "effective_number" and beta > 0:
        return (1 - beta) / -np.expm1(counts * np.log(beta))
    return np.ones_like(counts) if kind == "effective_number" else 1 / counts


# -- all of it, in one table ------------------------------------------------------------------------------------------

PER_CLASS = pa.schema(
    [
        ("class_id", pa.int32()),
        ("name", pa.string()),
        ("group", pa.string()),  # of shots.GROUPS, by images in the split; "none" without one
        ("evaluable", pa.bool_()),
        *((name, pa.int64()) for name in ("available", "pool", "target", "withheld")),
        *((name, pa.float64()) for name in ("repeat_factor", "log_prior", "log_q")),
        *((f"weight_{kind}", pa.float64()) for kind in WEIGHTS),
    ]
)
"""Counts, repeats, priors and weights of each class of a manifest, computed on load."""


def per_class_table(
    names: Sequence[str], evaluable: NDArray[np.bool_], targets: pa.Table, withheld: IntArray
) -> pa.Table:
    """The table PER_CLASS, from ``targets`` (``schema.TARGETS``). ``-inf`` is the log of nothing, never smoothed."""
    available, pool, target = (targets.column(name).to_numpy() for name in TARGETS.names)
    groups = (*GROUPS, "none")  # NO_GROUP, -1, is the last
    columns: dict[str, Any] = {
        "class_id": np.arange(len(names), dtype=np.int32),
        "name": list(names),
        "group": [groups[place] for place in group_of(available).tolist()],
        "evaluable": evaluable,
        "available": available,
        "pool": pool,
        "target": target,
        "withheld": withheld,
        "repeat_factor": repeat_factor(available, target),
        "log_prior": log_prior(available),
        "log_q": log_q(target),
        **{f"weight_{kind}": weights(kind, available, target) for kind in WEIGHTS},
    }
    return pa.table(columns, schema=PER_CLASS)
