"""Clients that load an address and cost little themselves: HTTP by hand, and the bus by the library."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, cast
from urllib.parse import urlsplit

import msgspec

from bench.machine import NotMeasured
from llmos.bus import AsyncBus
from llmos.protocol import frames as f

PATH: Final = "/v1/completions"
#: Seconds before anything is counted.
WARM_S: Final = 0.2


class Exchange(msgspec.Struct, frozen=True):
    """One request: seconds to the first token, or to the answer, and to the end; and how many events came."""

    first_s: float
    whole_s: float
    events: int


class Caller:
    """One connection over which one request at a time is made."""

    async def call(self, body: bytes) -> Exchange:
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the connection."""


class HttpCaller(Caller, asyncio.Protocol):
    """HTTP/1.1, kept alive, as much of it as these servers speak."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc
        self._received = bytearray()
        self._first_at = 0.0
        self._finished: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, url: str) -> HttpCaller:
        parts = urlsplit(url)
        loop = asyncio.get_running_loop()
        assert parts.hostname is not None and parts.port is not None
        _, caller = await loop.create_connection(lambda: cls(url), parts.hostname, parts.port)
        return caller

    async def call(self, body: bytes) -> Exchange:
        assert self._transport is not None
        head = f"POST {PATH} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._received.clear()
        self._first_at = 0.0
        self._finished = asyncio.get_running_loop().create_future()
        start = time.perf_counter()
        self._transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await self._finished
        whole = time.perf_counter() - start
        return Exchange((self._first_at or start + whole) - start, whole, self._received.count(b"data: {"))

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance: uvloop's transports are asyncio's by behaviour only.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if self._first_at == 0.0 and b"data: " in received:
            self._first_at = time.perf_counter()
        if self._is_whole() and self._finished is not None and not self._finished.done():
            if received.startswith(b"HTTP/1.1 200"):
                self._finished.set_result(None)
            else:
                self._finished.set_exception(NotMeasured(f"{self._host} answered {bytes(received[:600])!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(NotMeasured(f"{self._host} closed the connection"))

    def _is_whole(self) -> bool:
        received = self._received
        end = received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(received[:end]).lower()
        at = head.find(b"content-length: ")
        if at < 0:
            return received.endswith(b"0\r\n\r\n")
        return len(received) >= end + 4 + int(head[at + 16 :].split(b"\r\n", 1)[0])


class BusCaller(Caller):
    """The bus, through the library, as the gateway uses it."""

    def __init__(self, bus: AsyncBus, model: str, stream: bool) -> None:
        self._bus = bus
        self._model = model
        self._stream = stream

    async def call(self, body: bytes) -> Exchange:
        start = time.perf_counter()
        answer = self._bus.submit(self._model, PATH, body, stream=self._stream)
        events = 0
        first_at = 0.0
        while items := await answer.take():
            first_at = first_at or time.perf_counter()
            events += len(items)
        whole = time.perf_counter() - start
        if not isinstance(answer.final, f.Done):
            raise NotMeasured(f"a request over the bus failed: {answer.final}")
        return Exchange((first_at or start + whole) - start, whole, events)


async def keep_busy(
    callers: list[Caller], body: bytes, seconds: float, on_begin: Callable[[], None]
) -> tuple[float, list[Exchange]]:
    """Have each caller make one request after the other; returns the seconds that count, and what ended in them."""
    done: list[Exchange] = []
    end = time.perf_counter() + WARM_S + seconds

    async def calls(caller: Caller) -> None:
        while time.perf_counter() < end:
            done.append(await caller.call(body))

    calling = [asyncio.ensure_future(calls(caller)) for caller in callers]
    await asyncio.sleep(WARM_S)
    done.clear()
    on_begin()
    began = time.perf_counter()
    await asyncio.gather(*calling)
    return time.perf_counter() - began, done
