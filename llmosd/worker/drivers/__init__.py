"""Engine families, one a file. A driver starts its engine, says when it is ready, and turns requests into answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from llmos.protocol import frames as f


class Call(msgspec.Struct, frozen=True):
    """A request as a driver sees it."""

    path: str
    body: bytes
    stream: bool
    response_id: str
    created: int
    seed: int | None
    #: Most tokens to generate; 0: no bound.
    max_tokens: int


class Item(msgspec.Struct, frozen=True):
    """One answer item: the JSON text of one server-sent event."""

    payload: bytes
    tokens: int = 1


class Finished(msgspec.Struct, frozen=True):
    """The end of an answer: the last thing a driver yields. Counts of -1: not known."""

    payload: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    prompt_tokens: int = -1
    completion_tokens: int = -1


class RequestFailed(Exception):  # noqa: N818  # it is what became of a request, not a fault of this program
    """The engine, or its driver, does not answer this request. The engine's own error body may come along."""

    def __init__(
        self, code: f.Code, message: str, *, status: int = 0, body: bytes = b"", content_type: str = ""
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.body = body
        self.content_type = content_type


class EngineBrokeOff(RequestFailed):
    """The connection to the engine was lost: it may be about to die, and then the request may run elsewhere."""


class EngineEnded(Exception):  # noqa: N818
    """The engine is gone, or never came: the message is the reason, for `llmos ps`."""


#: (share of the load done or -1, a word on it)
Progress = Callable[[float, str], None]


class CannotWork(EngineEnded):
    """There is no engine until somebody mends something: trying again cannot help."""


class Driver(Protocol):
    """An engine family. Cancelling the iteration of `run` takes the request from the engine."""

    @property
    def engine_pid(self) -> int:
        """Process id of the engine, 0 where it has none of its own."""

    async def start(self, progress: Progress) -> None:
        """Bring the engine up; returns once it takes requests. Raises EngineEnded."""

    async def ended(self) -> str:
        """Wait until the engine ends by itself; returns the reason."""

    def run(self, call: Call) -> AsyncIterator[Item | Finished]:
        """Answer a request. Raises RequestFailed."""

    async def stop(self) -> None:
        """End the engine, whatever it does; returns when it is gone."""
