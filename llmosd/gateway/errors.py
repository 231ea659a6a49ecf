"""Failures in OpenAI's shape: an HTTP status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from typing import Final

import msgspec
from aiohttp import web

from llmos.errors import explained
from llmos.protocol import frames as f

#: HTTP status and OpenAI's error type for each of the bus's codes.
_STATUS: Final[dict[str, tuple[int, str]]] = {
    f.Code.NOT_FOUND: (404, "invalid_request_error"),
    f.Code.INVALID: (400, "invalid_request_error"),
    f.Code.TOO_LARGE: (413, "invalid_request_error"),
    f.Code.QUEUE_FULL: (429, "rate_limit_error"),
    f.Code.DEADLINE_EXCEEDED: (504, "timeout_error"),
    f.Code.CANCELLED: (499, "cancelled_error"),
    f.Code.UNAVAILABLE: (503, "service_unavailable_error"),
    f.Code.WORKER_LOST: (502, "server_error"),
    f.Code.ENGINE_ERROR: (502, "server_error"),
    f.Code.UNSUPPORTED: (404, "invalid_request_error"),
    f.Code.INTERNAL: (500, "server_error"),
}
#: OpenAI's own code where a client looks for it.
_CODES: Final[dict[str, str]] = {f.Code.NOT_FOUND: "model_not_found", f.Code.QUEUE_FULL: "rate_limit_exceeded"}


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    allow: str = "",
) -> web.Response:
    """`allow`: the methods that are taken, for 405."""
    headers = {"Content-Type": "application/json"} | ({"Allow": allow} if allow else {})
    return web.Response(status=status, body=error_body(message, kind, code, param), headers=headers)


def failed(final: f.Failed, payload: bytes) -> web.Response:
    """The answer to a request that failed before anything of it was sent."""
    status, kind = _STATUS.get(final.code, (500, "server_error"))
    if 400 <= final.status <= 599:
        status = final.status
    if payload and final.content_type == "application/json" and _is_openai_error(payload):
        return web.Response(status=status, body=payload, content_type="application/json")
    code = _CODES.get(final.code, final.code)
    response = error(status, explained(final), kind=kind, code=code)
    if final.code == f.Code.DEADLINE_EXCEEDED:
        # OpenAI's client would ask again otherwise, and wait as long again.
        response.headers["X-Should-Retry"] = "false"
    if final.retry_after_ms:
        response.headers["Retry-After"] = str(math.ceil(final.retry_after_ms / 1000))
    return response


def failed_event(final: f.Failed) -> bytes:
    """The last event of a stream that fails after it has begun."""
    _, kind = _STATUS.get(final.code, (500, "server_error"))
    return error_body(explained(final), kind, _CODES.get(final.code, final.code))


def _is_openai_error(payload: bytes) -> bool:
    try:
        body = msgspec.json.decode(payload)
    except msgspec.DecodeError:
        return False
    return isinstance(body, dict) and isinstance(body.get("error"), dict) and "message" in body["error"]
