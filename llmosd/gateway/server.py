"""The HTTP API: a thin translation between HTTP and the bus.

Bodies pass through: only the fields that routing needs are decoded, and an answer item is written as it was rendered
in the worker. It must never wait for one client at another's cost, and never keep what its client does not read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from typing import Final

import msgspec
from aiohttp import web

from llmos.aio import AsyncClient
from llmos.bus import AsyncBus, Stream
from llmos.errors import DaemonUnreachable, LlmosError
from llmos.protocol import frames as f
from llmosd.gateway import metrics
from llmosd.gateway.config import GatewayConfig
from llmosd.gateway.errors import error, failed, failed_event
from llmosd.gateway.keys import Keys

log = logging.getLogger("llmosd.gateway")

#: Paths outside of /v1 that are an engine's to answer.
_ENGINE_PATHS: Final = frozenset({"/tokenize", "/detokenize", "/rerank"})
_STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx passes events on as they come
}
_DONE: Final = b"data: [DONE]\n\n"
#: How long a gateway waits for a daemon that is just restarting.
_PATIENCE_S: Final = 60.0
_PREFIXES: Final = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}


class Routed(msgspec.Struct):
    """What of a body decides where it goes."""

    model: str
    stream: bool | None = False


_decode = msgspec.json.Decoder(Routed).decode


class Gateway:
    """One gateway process."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._keys = Keys(config.api_keys_file)
        self._bus = AsyncBus(config.front_address)
        self._client = AsyncClient(config.runtime_directory)

    async def run(self) -> None:
        """Serve until SIGTERM."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await self._bus.open(_PATIENCE_S)
        runner = web.ServerRunner(
            web.Server(self._handle, access_log=None),
            handler_cancellation=True,
            shutdown_timeout=2.0,
        )
        await runner.setup()
        listener = socket.socket(fileno=self._config.listen_fd)
        await web.SockSite(runner, listener, backlog=1024).start()
        try:
            await stop.wait()
        finally:
            await runner.cleanup()
            await self._client.close()
            await self._bus.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path == "/health":
            return web.json_response({"status": "ok"})
        tenant = ""
        if self._keys.required:
            found = self._keys.tenant(request.headers.get("Authorization", ""))
            if found is None:
                message = "an API key is needed: send it as `Authorization: Bearer KEY`"
                return error(401, message, kind="authentication_error", code="invalid_api_key")
            tenant = found
        try:
            if request.method == "POST" and (path.startswith("/v1/") or path in _ENGINE_PATHS):
                return await self._request(request, path, tenant)
            if request.method in ("GET", "HEAD"):
                return await self._read(path)
        except DaemonUnreachable as unreachable:
            return error(503, str(unreachable), kind="service_unavailable_error", code="unavailable")
        except LlmosError as failure:
            return error(500, str(failure), kind="server_error", code="internal")
        return error(404, f"there is no {request.method} {path}: see GET /v1/models, POST /v1/chat/completions")

    # -- reads ----------------------------------------------------------------------------------------------

    async def _read(self, path: str) -> web.StreamResponse:
        if path == "/v1/models" or path.startswith("/v1/models/"):
            return await self._models(path.removeprefix("/v1/models").removeprefix("/"))
        if path == "/metrics":
            status, workers = await asyncio.gather(self._client.status(), self._client.ps())
            return web.Response(
                body=metrics.render(status, workers), headers={"Content-Type": "text/plain; version=0.0.4"}
            )
        return error(404, f"there is no GET {path}: see /v1/models, /health, /metrics")

    async def _models(self, name: str) -> web.Response:
        models = [model for model in await self._client.models() if model.routed]
        listed = [
            {
                "id": called,
                "object": "model",
                "created": 0,
                "owned_by": "simulated" if model.simulated else "llmosd",
                "state": model.state,
            }
            for model in models
            for called in (model.name, *model.aliases)
        ]
        if not name:
            return web.json_response({"object": "list", "data": listed})
        for one in listed:
            if one["id"] == name:
                return web.json_response(one)
        return error(404, f"no model {name[:80]!r}: GET /v1/models lists them", code="model_not_found")

    # -- requests -------------------------------------------------------------------------------------------

    async def _request(self, request: web.BaseRequest, path: str, tenant: str) -> web.StreamResponse:
        body_max = self._config.body_max
        if (request.content_length or 0) > body_max:
            return error(413, f"the body is larger than {body_max} bytes", code="too_large")
        body = await _read_body(request, body_max)
        if body is None:
            return error(413, f"the body is larger than {body_max} bytes", code="too_large")
        try:
            routed = _decode(body)
        except (msgspec.DecodeError, RecursionError) as problem:
            return error(400, f"the body must be a JSON object with a 'model': {problem}", code="invalid_json")
        stream = self._bus.submit(
            routed.model[: f.NAME_CHARS_MAX],
            path,
            body,
            stream=bool(routed.stream),
            tenant=tenant,
            response_id=_PREFIXES.get(path, "req-") + os.urandom(12).hex(),
            created=int(time.time()),
        )
        # Leaving it early, by a disconnect too, cancels the request down to the engine.
        async with stream:
            items = await stream.take() if routed.stream else []
            if items:
                return await self._stream(request, stream, items)
            final = await stream.result()
            if isinstance(final, f.Failed):
                return failed(final, stream.payload)
            if routed.stream and not stream.payload:
                return await self._stream(request, stream, [])
            headers = {"Content-Type": final.content_type}
            return web.Response(status=final.status, body=stream.payload, headers=headers)

    async def _stream(self, request: web.BaseRequest, stream: Stream, items: list[bytes]) -> web.StreamResponse:
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        await response.prepare(request)
        while items:
            # Waits while the client does not read; until then nothing more is taken, and nothing acknowledged.
            await response.write(b"".join([b"data: %b\n\n" % item for item in items]))
            items = await stream.take()
        final = stream.final
        if isinstance(final, f.Failed):
            await response.write(b"data: %b\n\n" % failed_event(final))
        else:
            await response.write(_DONE)
        await response.write_eof()
        return response


async def _read_body(request: web.BaseRequest, body_max: int) -> bytes | None:
    """The body, or None if it is too large."""
    pieces = []
    size = 0
    async for piece in request.content.iter_any():
        size += len(piece)
        if size > body_max:
            return None
        pieces.append(piece)
    return b"".join(pieces)
