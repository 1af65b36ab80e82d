"""Whether a Ray cluster answers everybody: then everybody who reaches it runs code there, and sees what we send.

Comes in: the address of a cluster. Goes out: nothing, or an ``EngineError``. Guarantees: nothing but one question is
sent, and no credential with it; it is asked before anything is submitted; a cluster on loopback is its user's own.

How it is asked, seen in Ray 2.60 with and without RAY_AUTH_MODE=token: the GCS answers ``CheckAlive``, a client server
``ClusterInfo``, and a dashboard ``GET /api/jobs/``; without a token they say UNAUTHENTICATED or 401 where one is
wanted.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from urllib.parse import urlsplit

from pipeline.errors import EngineError, UsageError
from pipeline.store import redact

OPEN_CLUSTER = "open-cluster"
"""The name by which ``allow`` waives it."""

_WAIT_S = 10.0
_DASHBOARDS = ("http", "https")
_QUESTIONS = {"": "/ray.rpc.NodeInfoGcsService/CheckAlive", "ray": "/ray.rpc.RayletDriver/ClusterInfo"}


def refuse_open(address: str) -> None:
    """EngineError if what listens at ``address`` is not on this machine's loopback and answers without a token.

    ``address``: HOST:PORT of a GCS, ray://HOST:PORT of a client server, http(s)://HOST:PORT of a dashboard. What
    cannot be asked (nobody listens, TLS wants a certificate) is left to whoever connects.
    """
    scheme, host, port, path = _parts(address)
    if not host or not port or _is_loopback(host):
        return
    if scheme in _DASHBOARDS:
        is_open = _dashboard_answers(scheme, host, port, path)
    elif scheme in _QUESTIONS:
        is_open = _rpc_answers(host, port, _QUESTIONS[scheme])
    else:
        return
    if is_open:
        raise EngineError(
            f"the Ray cluster at {redact(address)} answers without a token: whoever reaches it can run code on it and "
            "read what this run sends. Start it with RAY_AUTH_MODE=token (https://docs.ray.io, token authentication); "
            f"or, where its network lets nobody else in, say so: --allow {OPEN_CLUSTER}"
        )


def refuse_dashboard(address: str) -> None:
    """UsageError for the address of a dashboard: jobs are submitted there, and do the connecting."""
    if _parts(address)[0] in _DASHBOARDS:
        raise UsageError(
            f"{redact(address)} is a dashboard, which takes jobs: `ray job submit --address {redact(address)} "
            "--working-dir . -- python -m jobs.nightly ...`; on a machine of the cluster, name HOST:6379"
        )


def _parts(address: str) -> tuple[str, str, int, str]:
    """Scheme ('' if there is none), host, port, path. The host is '' for 'auto' and whatever is not understood."""
    scheme, separator, _ = address.partition("://")
    try:
        found = urlsplit(address if separator else f"//{address}")
        port = found.port or {"http": 80, "https": 443, "ray": 10001}.get(found.scheme, 0)
    except ValueError:
        return "", "", 0, ""
    return scheme if separator else "", found.hostname or "", port, found.path.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        found = {str(answer[4][0]) for answer in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found)


def _dashboard_answers(scheme: str, host: str, port: int, path: str) -> bool:
    if scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing secret is sent
        asked: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, timeout=_WAIT_S, context=context)
    else:
        asked = http.client.HTTPConnection(host, port, timeout=_WAIT_S)
    try:
        asked.request("GET", f"{path}/api/jobs/")
        return 200 <= asked.getresponse().status < 300  # a redirection is to where one logs in
    except (OSError, http.client.HTTPException):
        return False
    finally:
        asked.close()


def _rpc_answers(host: str, port: int, question: str) -> bool:
    import grpc  # Ray depends on it

    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(where, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(question)(b"", timeout=_WAIT_S)
        except grpc.RpcError as error:
            silent = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
            code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNAVAILABLE
            return code not in (*silent, *refused)  # an answer about the question is an answer
        return True
