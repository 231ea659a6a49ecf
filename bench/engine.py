"""A stub engine with OpenAI's HTTP API that answers at once: `engine.py PORT`, a process of its own.

It is what the gateway's benchmark calls directly in one arm and through llmosd in the other. A stream's tokens are
written one by one, each in an iteration of the loop of its own, as an engine's that computes them are.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final

import msgspec
import uvloop
from aiohttp import web

TOKENS: Final = 64
_ANSWER: Final = msgspec.json.encode(
    {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 1,
        "model": "stub",
        "choices": [{"index": 0, "text": "word " * TOKENS, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 8, "completion_tokens": TOKENS, "total_tokens": TOKENS + 8},
    }
)
_EVENT: Final = b"data: %b\n\n" % msgspec.json.encode(
    {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 1,
        "model": "stub",
        "choices": [{"index": 0, "text": "word ", "logprobs": None, "finish_reason": None}],
    }
)


class _Body(msgspec.Struct):
    stream: bool = False


async def _handle(request: web.BaseRequest) -> web.StreamResponse:
    if request.path == "/health":
        return web.Response(text="ok")
    body = msgspec.json.decode(await request.read(), type=_Body)
    if not body.stream:
        return web.Response(body=_ANSWER, content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(TOKENS):
        await response.write(_EVENT)
        await asyncio.sleep(0)
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _serve(port: int) -> None:
    runner = web.ServerRunner(web.Server(_handle, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
