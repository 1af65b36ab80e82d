"""Who runs this: host, process, and the Ray job that it belongs to.

Comes in: this process. Goes out: three facts for files in runs/. Guarantees: of the job's own description only its
name is taken; the environment that stands beside it may hold credentials.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A process, as people find it again. ``job``: the submission id of its Ray job, '' outside of one."""

    host: str
    process: int
    job: str = ""

    def __str__(self) -> str:
        job = f" (Ray job {self.job})" if self.job else ""
        return f"process {self.process} on {self.host}{job}"

    @classmethod
    def from_json(cls, body: Any) -> Worker:
        """Whatever a file says; a field that is missing or of another kind is empty."""
        found: dict[Any, Any] = body if isinstance(body, dict) else {}
        process = found.get("process")
        return cls(
            host=str(found.get("host", "?")),
            process=process if isinstance(process, int) else 0,
            job=str(found.get("job", "")),
        )


def whoami() -> Worker:
    """This process."""
    return Worker(host=platform.node(), process=os.getpid(), job=ray_job())


def ray_job() -> str:
    """The submission id of the Ray job whose entry point this process is; '' elsewhere."""
    try:
        found: Any = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "null"))
        return str(found["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""
