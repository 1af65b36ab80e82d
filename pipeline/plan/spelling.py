"""How a policy is spelled: text, a mapping or a file in, one canonical ``Policy`` out.

Comes in: ``power:alpha=0.5,epoch_size=100000``, ``{"policy": "balanced", "per_class": 10}``, or a name of ``PRESETS``.
Goes out: a ``Policy`` whose parameters are canonical. Guarantees: what ``to_json`` and ``str`` give is read back as the
same policy; an unknown name or key is refused with the nearest one that exists; no float is ever kept.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, cast

from pipeline.errors import PolicyError
from pipeline.plan import parameters as of
from pipeline.plan.parameters import Parameter, Value


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A rule from counts to targets. ``parameters`` are canonical, complete with defaults, and sorted by name."""

    name: str
    parameters: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", _canonical(self.name, self.parameters))

    def get(self, key: str) -> Value | None:
        return dict(self.parameters).get(key)

    def having(self, **changes: Value | None) -> Policy:
        """The same policy with some parameters changed; ``None`` takes one away."""
        return Policy(name=self.name, parameters=tuple({**dict(self.parameters), **changes}.items()))

    def integer(self, key: str) -> int | None:
        value = self.get(key)
        return value if isinstance(value, int) else None

    def number(self, key: str) -> Fraction:
        return Fraction(str(self.get(key)))

    def __str__(self) -> str:
        """The text that ``parse`` reads; an ``explicit`` table is only counted."""
        shown = ((k, f"<{len(v)} classes>" if isinstance(v, tuple) else v) for k, v in self.parameters)
        return ":".join(filter(None, (self.name, ",".join(f"{key}={value}" for key, value in shown))))


_ONLY = of.choice("all", "minority", "not-minority", "majority", "not-majority")

PARAMETERS: Mapping[str, Mapping[str, Parameter]] = {
    "natural": {},
    "oversample": {"floor": of.level("max"), "only": _ONLY},
    "undersample": {"ceiling": of.level("min"), "only": _ONLY, "frozen": of.flag()},
    "clip": {"floor": of.level(), "ceiling": of.level(), "frozen": of.flag()},
    "balanced": {"per_class": of.level("mean")},
    "power": {
        "alpha": of.number("from 0 to 1", lambda x: 0 <= x <= 1, "0.5"),
        "floor": of.level(),
        "ceiling": of.level(),
    },
    "ratio": {"max_ratio": of.number("of at least 1", lambda x: x >= 1, "10")},
    # 0.001 is the threshold of the LVIS reference configurations.
    "repeat_factor": {"threshold": of.number("above 0, at most 1", lambda x: 0 < x <= 1, "0.001")},
    "effective_number": {"beta": of.number("from 0 to below 1", lambda x: 0 <= x < 1, "0.999")},
    "progressive": {"stage": of.integer(0, required=True), "num_stages": of.integer(1, required=True)},
    "explicit": {"targets": of.table(), "others": of.choice("none", "natural")},
}
"""Every policy and what it takes, in the order of DESIGN.md; each also takes COMMON."""

COMMON: Mapping[str, Parameter] = {
    "max_repeat": of.number("of at least 1", lambda x: x >= 1),
    "epoch_size": of.integer(1),
    "singletons": of.choice("keep", "drop"),
    "pseudo_singletons": of.integer(1),
}

NAMES = tuple(PARAMETERS)

PRESETS: Mapping[str, str] = {
    "square_root": "power:alpha=0.5,max_repeat=10",
    "ten_to_one": "ratio:max_ratio=10,max_repeat=10",
    "oversampled": "oversample:floor=mean,max_repeat=10",
    "undersampled": "undersample:ceiling=10*mean",
    "both": "clip:floor=mean,ceiling=10*mean,max_repeat=10",
    "class_balanced": "power:alpha=0,max_repeat=10",
}
"""Compositions that have a name: each reads as the policy it stands for, and takes further parameters."""


def _known(name: str) -> dict[str, Parameter]:
    return {**PARAMETERS[name], **COMMON}


def _canonical(name: str, given: Sequence[tuple[str, object]]) -> tuple[tuple[str, Value], ...]:
    if name not in PARAMETERS:
        raise PolicyError(
            f"unknown policy {name!r}{nearest(name, (*PARAMETERS, *PRESETS))}; the policies are "
            f"{', '.join(PARAMETERS)}; compositions with a name: {', '.join(PRESETS)}"
        )
    known = _known(name)
    if len(dict(given)) < len(given):
        raise PolicyError(f"policy {name}: a parameter is given twice: {', '.join(key for key, _ in given)}")
    if unknown := [key for key, _ in given if key not in known]:
        raise PolicyError(
            f"policy {name}: unknown parameter {unknown[0]!r}{nearest(unknown[0], known)}; "
            f"the parameters are {', '.join(known)}"
        )
    values = {key: _read(name, key, dict(given).get(key), known[key]) for key in sorted(known)}
    return tuple((key, value) for key, value in values.items() if value is not None)


def _read(name: str, key: str, value: object, parameter: Parameter) -> Value | None:
    if value is None:
        if parameter.required:
            raise PolicyError(f"policy {name} needs {key}: {parameter.expects}")
        return parameter.default
    try:
        return parameter.read(value)
    except ValueError as error:
        raise PolicyError(f"policy {name}: {key} must be {parameter.expects}, not {value!r}") from error


def counted(count: int, one: str, many: str = "") -> str:
    """``1 class``, ``2,000 classes``: of ``one`` and ``many``, or ``one`` and an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'balanced'?)``, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def parse(spec: str | Mapping[str, object]) -> Policy:
    """Read ``balanced``, ``balanced:per_class=10``, ``undersample:frozen``, ``explicit:{"targets": {"cat": 10}}``, or a
    mapping such as ``{"policy": "balanced", "per_class": 10}``. Raises PolicyError."""
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        given = _read_json(spec, rest) if rest.lstrip().startswith("{") else _read_pairs(rest)
        return _compose(name.strip(), given)
    if not isinstance(spec.get("policy"), str):
        raise PolicyError(f"a policy needs the key 'policy' with one of {', '.join(PARAMETERS)}; found {dict(spec)!r}")
    given = tuple((str(key), value) for key, value in spec.items() if key != "policy")
    return _compose(str(spec["policy"]), given)


def _compose(name: str, given: Sequence[tuple[str, object]]) -> Policy:
    """A preset stands for its policy; what is given beside it wins over what it says."""
    if name not in PRESETS:
        return Policy(name=name, parameters=tuple(given))
    name, _, rest = PRESETS[name].partition(":")
    keys = {key for key, _ in given}
    return Policy(name=name, parameters=(*(pair for pair in _read_pairs(rest) if pair[0] not in keys), *given))


def _read_pairs(text: str) -> tuple[tuple[str, object], ...]:
    pairs = (part.partition("=") for part in text.split(",") if part.strip())
    return tuple((key.strip(), value.strip() if sign else "true") for key, sign, value in pairs)


def _read_json(spec: str, text: str) -> tuple[tuple[str, object], ...]:
    try:
        pairs = json.loads(text, object_pairs_hook=tuple, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise PolicyError(f"policy {spec!r}: the part after ':' is not JSON: {error}") from error
    return cast("tuple[tuple[str, object], ...]", pairs)


def to_json(policy: Policy) -> dict[str, Any]:
    """The mapping that ``parse`` reads back; only integers, strings (decimals too) and the table of ``explicit``."""
    values = {key: dict(value) if isinstance(value, tuple) else value for key, value in policy.parameters}
    return {"policy": policy.name, **values}
