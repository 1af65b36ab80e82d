"""moto's S3 on loopback, with conditional writes that are atomic, as S3's are.

    python tests/s3_server.py PORT

moto looks whether the name is taken, and stores later; its server answers each request in a thread of its own, so that
of four writers of one new name two may both be told that they were first (in one of 1,500 rounds here). Here one
conditional write is answered after the other.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

_one_at_a_time = threading.Lock()


def serialised(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The same WSGI application, one conditional write at a time."""

    def answer(environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environment or environment["REQUEST_METHOD"] not in ("PUT", "POST"):
            return application(environment, start_response)
        with _one_at_a_time:
            return list(application(environment, start_response))

    return answer


if __name__ == "__main__":
    run_simple(
        "127.0.0.1", int(sys.argv[1]), serialised(DomainDispatcherApplication(create_backend_app)), threaded=True
    )
