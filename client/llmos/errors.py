"""What can go wrong, by meaning. For users of the library, who catch these, and for the command, which prints them.

A message says what happened, why, and what to do. Most come from the daemon, which knows; this module only gives each
the right class. It must never load gRPC: status codes arrive here as their names.
"""

# ruff: noqa: N818 - they are named like gRPC's statuses and asyncio's exceptions, which they stand for.

from __future__ import annotations

from typing import Final

import msgspec

from llmos.protocol import frames as f

#: Of an engine's own error body, so much is shown in the message. The whole of it is in `EngineError.body`.
ENGINE_BODY_SHOWN_CHARS: Final = 300


class LlmosError(Exception):
    """Anything that llmosd, or the way to it, could not do. Also what fits no class below."""


class DaemonUnreachable(LlmosError):
    """No daemon answers: it does not run, runs elsewhere, or may not be spoken to by this user."""


class NotFound(LlmosError):
    """There is no model, worker or request of that name."""


class Refused(LlmosError):
    """It was understood, and the daemon will not do it in the present state, or not for this user."""


class Invalid(Refused):
    """It was not understood: a wrong model file, an unknown limit, a body that is no JSON."""


class TooLarge(Invalid):
    """The body or the answer is over the daemon's bound."""


class Unsupported(Refused):
    """This model's engine has no such function."""


class QueueFull(Refused):
    """The model's queue is at its bound."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        #: When a place is likely to be free; 0 when nobody can tell.
        self.retry_after_s = retry_after_s


class Unavailable(LlmosError):
    """The model cannot be started, or the daemon is just stopping. The message has the reason."""


class DeadlineExceeded(LlmosError):
    """The time that was given ran out first."""


class Cancelled(LlmosError):
    """Somebody cancelled the request: its client, or an operator with `llmos kill`."""


class WorkerLost(LlmosError):
    """The worker died after it had begun to answer, and the answer could not be continued elsewhere."""


class EngineError(LlmosError):
    """The engine itself answered with an error."""

    def __init__(self, message: str, status: int = 0, body: bytes = b"") -> None:
        super().__init__(message)
        #: The engine's HTTP status, or 0.
        self.status = status
        #: The engine's own words, as it sent them.
        self.body = body


class InternalError(LlmosError):
    """A fault of llmosd's own. The daemon's log has more."""


class WorkerFailed(LlmosError):
    """A worker that was waited for went to a state from which it will not come by itself."""

    def __init__(self, message: str, worker: str, state: str) -> None:
        super().__init__(message)
        self.worker = worker
        self.state = state


_BY_CODE: Final[dict[str, type[LlmosError]]] = {
    f.Code.NOT_FOUND: NotFound,
    f.Code.INVALID: Invalid,
    f.Code.TOO_LARGE: TooLarge,
    f.Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    f.Code.CANCELLED: Cancelled,
    f.Code.UNAVAILABLE: Unavailable,
    f.Code.WORKER_LOST: WorkerLost,
    f.Code.UNSUPPORTED: Unsupported,
    f.Code.INTERNAL: InternalError,
}

_WORDS: Final[dict[str, str]] = {
    f.Code.DEADLINE_EXCEEDED: "its time ran out before the answer was complete",
    f.Code.CANCELLED: "the request was cancelled",
}

#: gRPC's canonical status codes, by name.
_BY_STATUS: Final[dict[str, type[LlmosError]]] = {
    "NOT_FOUND": NotFound,
    "INVALID_ARGUMENT": Invalid,
    "OUT_OF_RANGE": Invalid,
    "FAILED_PRECONDITION": Refused,
    "ALREADY_EXISTS": Refused,
    "ABORTED": Refused,
    "PERMISSION_DENIED": Refused,
    "UNAUTHENTICATED": Refused,
    "RESOURCE_EXHAUSTED": QueueFull,
    "UNIMPLEMENTED": Unsupported,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "UNAVAILABLE": DaemonUnreachable,
    "INTERNAL": InternalError,
    "UNKNOWN": InternalError,
    "DATA_LOSS": InternalError,
}


def explained(failed: f.Failed) -> str:
    """What a FAILED says, in words where it has none of its own but its code."""
    if failed.message not in ("", failed.code):
        return failed.message
    return _WORDS.get(failed.code, f"the request failed: {failed.code}")


def from_failed(failed: f.Failed, payload: bytes = b"") -> LlmosError:
    """The exception for the FAILED with which a request ended on the bus."""
    message = explained(failed)
    if failed.code == f.Code.QUEUE_FULL:
        return QueueFull(message, failed.retry_after_ms / 1000)
    if failed.code == f.Code.ENGINE_ERROR:
        said = engine_message(payload)
        if said and said not in message:
            message = f"{message}: {said}"
        return EngineError(message, failed.status, payload)
    return _BY_CODE.get(failed.code, LlmosError)(message)


def from_status(status: str, details: str) -> LlmosError:
    """The exception for a call of the control plane that ended with this gRPC status, e.g. ``NOT_FOUND``."""
    return _BY_STATUS.get(status, LlmosError)(details or f"the daemon answered {status} and no reason")


def engine_message(body: bytes) -> str:
    """What an engine's error body says, for people: OpenAI's shape is known, anything else is shown as it is."""
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode("utf-8", "replace").strip()[:ENGINE_BODY_SHOWN_CHARS]
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        error = error["message"]
    return str(error)[:ENGINE_BODY_SHOWN_CHARS]
