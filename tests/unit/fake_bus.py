"""A small honest daemon's end of the bus, for the tests of what speaks to it: one ROUTER, and answers by model name.

It keeps the window, knows requests only for one life, and can be stopped and started again, as the daemon can.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import zmq
import zmq.asyncio

from llmos.protocol import frames as f

WORDS = (" Paris", ",", " of", " course", ".")


def completion_item(text: str) -> bytes:
    return msgspec.json.encode({"object": "text_completion", "choices": [{"index": 0, "text": text}]})


def chat_item(text: str) -> bytes:
    delta = {"role": "assistant", "content": text}
    return msgspec.json.encode({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]})


class _Request:
    def __init__(self, submit: f.Submit, body: bytes) -> None:
        self.submit = submit
        self.body = body
        self.items: list[bytes] = []
        self.final: tuple[f.Kind, f.Header, bytes] | None = None
        self.sent = self.acked = submit.have_seq


class FakeBus:
    """Binds `path` while started. `seen` has every message that arrived, in order."""

    def __init__(self, path: Path, window: int = 8, body_max: int = 1 << 20) -> None:
        self.path = path
        self.window = window
        self.body_max = body_max
        self.epoch = 0
        self.seen: list[f.Message] = []
        self.requests: dict[bytes, _Request] = {}
        self._news = asyncio.Event()

    async def start(self) -> None:
        self.epoch += 1
        self.requests = {}
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.bind(f"ipc://{self.path}")
        self._task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self._context.destroy(linger=0)
        self.path.unlink(missing_ok=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def wait_for(self, condition: Callable[[list[f.Message]], bool], timeout: float = 10) -> None:
        """Until `condition` is true of all that was seen."""
        async with asyncio.timeout(timeout):
            while not condition(self.seen):
                self._news.clear()
                await self._news.wait()

    async def wait_for_kind(self, kind: f.Kind, count: int = 1) -> None:
        await self.wait_for(lambda seen: sum(message.kind is kind for message in seen) >= count)

    async def _serve(self) -> None:
        while True:
            peer, *parts = await self._router.recv_multipart()
            message = f.decode(f.CLIENT_TO_DAEMON, parts)
            self.seen.append(message)
            self._news.set()
            for reply in self._answer(message):
                await self._router.send_multipart([peer, *reply])

    def _answer(self, message: f.Message) -> list[list[bytes]]:
        header, rid = message.header, message.rid
        if isinstance(header, f.ClientHello):
            unknown = tuple(entry.rid for entry in header.open if entry.rid not in self.requests)
            return [f.encode(f.Kind.WELCOME, b"", f.Welcome(self.epoch, self.body_max, self.window, 1 << 20, unknown))]
        if isinstance(header, f.Submit):
            request = self.requests[rid] = _Request(header, message.payload[0])
            self._compute(request)
            accepted = f.encode(f.Kind.ACCEPTED, rid, f.Accepted(b"ticket", len(self.requests) - 1))
            return [accepted, *self._send(rid, request)]
        if rid not in self.requests:
            return []
        request = self.requests[rid]
        if isinstance(header, f.Cancel) and request.final is None:
            request.final = (f.Kind.FAILED, f.Failed(1, request.sent, f.Code.CANCELLED, "cancelled by its client"), b"")
            del request.items[request.sent :]
        if isinstance(header, f.Ack):
            request.acked = header.seq
        return self._send(rid, request)

    def _send(self, rid: bytes, request: _Request) -> list[list[bytes]]:
        """What the window lets through."""
        messages = []
        batch = request.items[request.sent : request.acked + self.window]
        if batch:
            sizes = tuple(map(len, batch)) if len(batch) > 1 else ()
            chunk = f.Chunk(1, request.sent, len(batch), sizes, len(batch))
            messages.append(f.encode(f.Kind.CHUNK, rid, chunk, b"".join(batch)))
            request.sent += len(batch)
        if request.final is not None and request.acked <= len(request.items):
            kind, header, payload = request.final
            messages.append(f.encode(kind, rid, header, payload))
        return messages

    def _compute(self, request: _Request) -> None:
        """The engine: models differ in how they answer."""
        submit = request.submit
        chat = submit.path == "/v1/chat/completions"
        words: tuple[str, ...] = WORDS
        match submit.model:
            case "gemma3-270m":
                pass
            case "many":
                words = tuple(f" {number}" for number in range(100))
            case "lost":
                words = WORDS[:2]
                request.final = (f.Kind.FAILED, f.Failed(1, 2, f.Code.WORKER_LOST, "the worker lost-1 died"), b"")
            case "endless":
                request.items = [completion_item("again ")] * 10_000
                return
            case "silent":
                return
            case "full":
                failed = f.Failed(0, 0, f.Code.QUEUE_FULL, "the queue of full is full", retry_after_ms=1500)
                request.final = (f.Kind.FAILED, failed, b"")
                return
            case "broken":
                failed = f.Failed(1, 0, f.Code.ENGINE_ERROR, "the engine answered 400", status=400)
                request.final = (f.Kind.FAILED, failed, b'{"error":{"message":"no chat template"}}')
                return
            case _:
                failed = f.Failed(0, 0, f.Code.NOT_FOUND, f"no model {submit.model!r}. See `llmos models`.")
                request.final = (f.Kind.FAILED, failed, b"")
                return
        if submit.path == "/v1/embeddings":
            payload = msgspec.json.encode({"data": [{"index": 0, "embedding": [0.5, -0.5]}]})
        elif submit.path == "/tokenize":
            payload = b'{"tokens":[2,818,5279]}'
        elif chat:
            payload = msgspec.json.encode({"choices": [{"message": {"content": "".join(words)}}]})
        else:
            payload = msgspec.json.encode({"choices": [{"text": "".join(words)}]})
        if submit.stream:
            request.items = [chat_item(word) if chat else completion_item(word) for word in words]
            payload = b""
        if request.final is None:
            done = f.Done(1, len(request.items), prompt_tokens=6, completion_tokens=len(words), tokens_exact=True)
            request.final = (f.Kind.DONE, done, payload)
