"""Everything evenshard raises on purpose; each message says what was expected, what was found, where, and what to do.

EvenshardError                 exit code 1: the call was well formed, and could not be done
|-- UsageError                 exit code 2: the call is wrong by itself, whatever lies where (also a ValueError)
|   |-- ConfigError            a build file: unknown key, bad value
|   |-- PolicyError            a policy that does not exist, or has no such parameter
|   |   `-- UnfitPolicyError   exit code 1: well spelled, and these counts cannot give it
|   `-- StateError             a loader state from another manifest, seed or rule
|-- SourceError                the source is missing, empty, or ambiguous
|-- StoreError                 storage refused: not writable, no space, not found
|   |-- NotFoundError          nothing of that name: a ROOT, snapshot, manifest, class, pin or file
|   `-- AlreadyExistsError     the name or place is taken; nothing is overwritten
|-- IntegrityError             bytes differ from their recorded checksum
|-- CommitError                a snapshot was not published
|   `-- LostRaceError          another build published this number first
|-- StalledError               a batch did not come in time
|-- EngineError                Ray could not finish a unit
`-- MissingExtraError          an optional dependency is not installed
"""

from __future__ import annotations


class EvenshardError(Exception):
    """Base of every deliberate error. ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(EvenshardError, ValueError):
    """The call is wrong; nothing was tried."""

    exit_code = 2


class ConfigError(UsageError):
    """A build file or option is invalid."""


class PolicyError(UsageError):
    """A policy is none, or has no such parameter or value."""


class UnfitPolicyError(PolicyError):
    """A policy is well spelled, and cannot be applied to these class counts."""

    exit_code = 1


class StateError(UsageError):
    """A loader state does not belong to this manifest, seed or epoch rule."""


class SourceError(EvenshardError):
    """The source cannot be listed, or its labels are ambiguous."""


class StoreError(EvenshardError):
    """Storage refused an operation."""


class NotFoundError(StoreError):
    """What was named is not there: a ROOT, a snapshot, a manifest, a class, a pin, or a file."""


class AlreadyExistsError(StoreError):
    """A name or a place is taken; a create-only write met an existing file."""


class IntegrityError(EvenshardError):
    """Bytes do not match the checksum recorded for them."""


class CommitError(EvenshardError):
    """A build was not published."""


class LostRaceError(CommitError):
    """Another build published this snapshot number first."""


class StalledError(EvenshardError):
    """A batch did not come in time: storage, a decoder or a transform hangs."""


class EngineError(EvenshardError):
    """A unit of work failed for good."""


class MissingExtraError(EvenshardError):
    """An optional dependency is needed; the message names the extra to install."""
