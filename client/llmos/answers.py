"""A model's answer as users of the library take it: whole, or piece by piece while it is made. For `llmos.aio`.

It turns the bus's raw items and finals into text, counts and exceptions, and never touches a socket.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self

import msgspec

from llmos import completions
from llmos.bus import Stream
from llmos.errors import from_failed
from llmos.protocol import frames as f
from llmos.types import Completion, Piece

Submit = Callable[[], Awaitable[Stream]]


async def whole(submit: Submit) -> tuple[f.Done, bytes]:
    """The final and payload of a request that was not streamed. Raises what the failure means."""
    async with await submit() as stream:
        final = await stream.result()
    if isinstance(final, f.Failed):
        raise from_failed(final, stream.payload)
    return final, stream.payload


async def completion(submit: Submit) -> Completion:
    done, payload = await whole(submit)
    return _counted(completions.read_completion(payload), done)


class Pieces:
    """A streamed answer: an async iterator over its pieces. It is asked for at the first; closing it cancels it."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._stream: Stream | None = None
        self._texts: list[str] = []
        self._finish_reason = ""
        #: The whole text and the counts, once the last piece has been taken.
        self.completion: Completion | None = None

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._stream is None:
            self._stream = await self._submit()
        async for item in self._stream:
            piece = completions.read_piece(item)
            if piece is not None:
                self._texts.append(piece.text)
                self._finish_reason = piece.finish_reason or self._finish_reason
                return piece
        final = self._stream.final
        if isinstance(final, f.Failed):
            raise from_failed(final, self._stream.payload)
        if isinstance(final, f.Done) and self.completion is None:
            text = Completion(text="".join(self._texts), finish_reason=self._finish_reason)
            self.completion = _counted(text, final)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """No more of it is wanted."""
        if self._stream is not None:
            self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _counted(answer: Completion, done: f.Done) -> Completion:
    return msgspec.structs.replace(
        answer,
        prompt_tokens=done.prompt_tokens,
        completion_tokens=done.completion_tokens,
        tokens_exact=done.tokens_exact,
    )
