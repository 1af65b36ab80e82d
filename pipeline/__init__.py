"""Class-balanced training epochs from one stored copy of the images: computed, never written down.

    photos --build--> ROOT: tars + Arrow indexes + one manifest per policy --Loader--> batches
             |                                            |
             |  ingest: read once, check, pack,           |  plan.epoch: position -> image, by arithmetic
             |  count, split, commit                      |  stream: bytes -> verified -> pixels -> batch
             '------ open_snapshot(ROOT).manifest("balanced") is the only bridge ------'

``build(source, root)`` writes a snapshot, ``open_snapshot(root)`` reads one, ``Loader(manifest, batch_size=...)``
yields one epoch for each ``iter()``. Each name is imported when it is first asked for, so that a node that only builds
needs no torch and a node that only trains needs no Ray.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from pipeline.errors import (
    AlreadyExistsError,
    CommitError,
    ConfigError,
    EngineError,
    EvenshardError,
    IntegrityError,
    LostRaceError,
    MissingExtraError,
    NotFoundError,
    PolicyError,
    SourceError,
    StalledError,
    StateError,
    StoreError,
    UnfitPolicyError,
    UsageError,
)

if TYPE_CHECKING:
    from pipeline.ingest.run import build
    from pipeline.plan.policy import Policy
    from pipeline.snapshot import Manifest, Snapshot, open_snapshot
    from pipeline.stream.loader import EvaluationLoader, Loader

    __version__: str

__all__ = [
    "AlreadyExistsError",
    "CommitError",
    "ConfigError",
    "EngineError",
    "EvaluationLoader",
    "EvenshardError",
    "IntegrityError",
    "Loader",
    "LostRaceError",
    "Manifest",
    "MissingExtraError",
    "NotFoundError",
    "Policy",
    "PolicyError",
    "Snapshot",
    "SourceError",
    "StalledError",
    "StateError",
    "StoreError",
    "UnfitPolicyError",
    "UsageError",
    "__version__",
    "build",
    "open_snapshot",
]

_ROOMS = {
    "EvaluationLoader": "pipeline.stream.loader",
    "Loader": "pipeline.stream.loader",
    "Manifest": "pipeline.snapshot",
    "Policy": "pipeline.plan.policy",
    "Snapshot": "pipeline.snapshot",
    "build": "pipeline.ingest.run",
    "open_snapshot": "pipeline.snapshot",
}
_EXTRAS = {"ray": "build", "torch": "train", "torchvision": "train", "webdataset": "train"}


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = version("evenshard")
    elif name in _ROOMS:
        value = _resolve(name)
    else:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def _resolve(name: str) -> object:
    try:
        return getattr(import_module(_ROOMS[name]), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise MissingExtraError(
            f"pipeline.{name} needs {package}, which is not installed: pip install 'evenshard[{_EXTRAS[package]}]'"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
