"""Calls of the control plane that outlast a daemon's restart. For `llmos.aio`; the only module that loads gRPC.

A call waits until the daemon can be spoken to, a bounded time, and is made again when the connection broke in between,
if that can do no harm. A stream that follows is opened again. Statuses become `llmos.errors`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import grpc
import grpc.aio

from llmos.address import Address
from llmos.errors import DaemonUnreachable, LlmosError, from_status
from llmos.v1 import control_pb2_grpc

#: Seconds that a call waits for a daemon that does not answer: longer than a restart takes.
PATIENCE_S: Final = 5.0
#: Seconds that a stream which was cut waits for the daemon to come back.
STREAM_PATIENCE_S: Final = 60.0
#: Seconds that a unary call may take.
CALL_S: Final = 15.0
#: Seconds between attempts.
PAUSE_S: Final = 0.1

_OPTIONS: Final = (
    # The default authority of a unix address is its escaped path, which some servers refuse.
    ("grpc.default_authority", "localhost"),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
)

#: The daemon has gone away in the middle: a server that shuts down cancels its calls.
_CUT: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})

Message = Any  # protobuf messages: each method of AsyncClient knows which


class Control:
    """The control plane of one daemon. Made and used inside a running event loop."""

    def __init__(self, address: Address, patience: float = PATIENCE_S) -> None:
        self._address = address
        self._patience = patience
        self._channel = grpc.aio.insecure_channel(address.control, options=_OPTIONS)
        make_stub: Any = control_pb2_grpc.ControlStub  # generated, and not typed
        self._stub = make_stub(self._channel)

    async def close(self) -> None:
        await self._channel.close(None)

    async def call(self, method: str, request: Message, *, repeatable: bool = True, timeout: float = CALL_S) -> Message:
        """One answer. `repeatable`: it may be asked again when nobody knows whether it was done."""
        give_up_at = time.monotonic() + timeout
        while True:
            await self._connect(self._patience)
            left = max(PAUSE_S, give_up_at - time.monotonic())
            try:
                return await getattr(self._stub, method)(request, timeout=left, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                cut = error.code() in _CUT
                if not (cut and repeatable and left > PAUSE_S):
                    raise self._explained(error, method, repeatable) from error
            await asyncio.sleep(PAUSE_S)

    async def stream(self, method: str, request: Callable[[], Message], *, again: bool) -> AsyncGenerator[Message]:
        """Answers as they come. `again`: after a cut, or an end, go on with what `request` then asks for."""
        patience = self._patience
        while True:
            await self._connect(patience)
            call = getattr(self._stub, method)(request(), wait_for_ready=True)
            try:
                async for message in call:
                    patience = STREAM_PATIENCE_S
                    yield message
                if not again:
                    return
            except grpc.aio.AioRpcError as error:
                if not (error.code() in _CUT and again):
                    raise self._explained(error, method, repeatable=True) from error
            finally:
                call.cancel()
            await asyncio.sleep(PAUSE_S)

    async def _connect(self, patience: float) -> None:
        if self._channel.get_state() is grpc.ChannelConnectivity.READY:
            return
        try:
            async with asyncio.timeout(patience):
                await self._channel.channel_ready()
        except TimeoutError:
            reason = await asyncio.to_thread(self._address.why_silent)
            raise DaemonUnreachable(f"no daemon answered within {patience:g} s: {reason}") from None

    def _explained(self, error: grpc.aio.AioRpcError, method: str, repeatable: bool) -> LlmosError:
        status, details = error.code(), error.details() or ""
        if status in _CUT and not repeatable:
            return DaemonUnreachable(
                f"the daemon went away during {method}, and nobody knows whether it was done. "
                f"Look with `llmos ps`, and ask again if it was not."
            )
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            details = f"the daemon did not answer {method} in time. Its log may say what it does instead."
        if status is grpc.StatusCode.UNIMPLEMENTED:
            details = f"this daemon knows no {method}: it is of another version. {details}"
        return from_status(status.name, details)
