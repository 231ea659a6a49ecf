"""The HTTP API: a thin translation between HTTP and the bus.

Bodies pass through: only the fields that routing needs are decoded, and an answer item is written as it was rendered
in the worker. It must never wait for one client at another's cost, and never keep what its client does not read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import time
from collections import Counter
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from llmos.aio import AsyncClient
from llmos.bus import AsyncBus, Stream
from llmos.errors import DaemonUnreachable, LlmosError
from llmos.protocol import frames as f
from llmosd.gateway import metrics
from llmosd.gateway.body import BadBody, decode, read
from llmosd.gateway.config import GatewayConfig
from llmosd.gateway.errors import error, failed, failed_event
from llmosd.gateway.keys import Keys

log = logging.getLogger("llmosd.gateway")

#: Paths outside of /v1 that are an engine's to answer.
_ENGINE_PATHS: Final = frozenset({"/tokenize", "/detokenize", "/rerank"})
#: Those below /v1. Nothing in it may have another meaning to the engine's HTTP server: no dots that climb, no query.
_ENGINE_PATH: Final = re.compile(r"/v1(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+", re.ASCII)
_PATH_CHARS_MAX: Final = 256
_MODELS: Final = "/v1/models"
_STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx passes events on as they come
}
_DONE: Final = b"data: [DONE]\n\n"
#: How long a gateway waits for a daemon that is just restarting.
_PATIENCE_S: Final = 60.0
#: A daemon that has been away for so long is not just restarting: requests are refused.
_AWAY_S: Final = 10.0
_LOOK_S: Final = 1.0
#: The name that `llmos ps -T` has for it. OpenAI's client shows it with errors.
_REQUEST_ID: Final = "X-Request-Id"
_PREFIXES: Final = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}


class Gateway:
    """One gateway process."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._keys = Keys(config.api_keys_file)
        self._bus = AsyncBus(config.front_address)
        self._client = AsyncClient(config.runtime_directory)
        self._answers: Counter[int] = Counter()
        self._seen_at = time.monotonic()

    async def run(self) -> None:
        """Serve until SIGTERM, or until there has been no daemon for too long."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await self._bus.open(_PATIENCE_S)
        logging.getLogger("aiohttp.server").addFilter(self._shorten)
        # Of the server, not of the runner, which takes it too and forgets it: a client that goes away cancels its call.
        server = web.Server(self._handle, access_log=None, handler_cancellation=True)
        runner = web.ServerRunner(server, shutdown_timeout=2.0)
        await runner.setup()
        listener = socket.socket(fileno=self._config.listen_fd)
        await web.SockSite(runner, listener, backlog=1024).start()
        try:
            await self._until(stop)
        finally:
            await runner.cleanup()
            await self._client.close()
            await self._bus.close()

    async def _until(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            if self._bus.connected:
                self._seen_at = time.monotonic()
            elif self._away_s() > self._config.orphan_timeout:
                log.error("no daemon for %g s: ends", self._config.orphan_timeout)
                return
            try:
                await asyncio.wait_for(stop.wait(), _LOOK_S)
            except TimeoutError:
                continue

    def _away_s(self) -> float:
        return 0.0 if self._bus.connected else time.monotonic() - self._seen_at

    def _shorten(self, record: logging.LogRecord) -> bool:
        """What is not HTTP has been answered, and is worth a line and a count, not a traceback."""
        problem = record.exc_info[1] if record.exc_info else None
        if isinstance(problem, BadHttpMessage | web.RequestPayloadError):
            self._answers[400] += 1
            record.msg, record.args, record.exc_info = f"not HTTP: {str(problem)[:200]!r}", (), None
        return True

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            response = await self._answer(request)
        except BadBody as bad:
            response = error(bad.status, str(bad), code=bad.code, param=bad.param)
        except DaemonUnreachable as unreachable:
            response = error(503, str(unreachable), kind="service_unavailable_error", code="unavailable")
        except LlmosError as failure:
            response = error(500, str(failure), kind="server_error", code="internal")
        except ConnectionError:
            raise  # the client has gone: nobody to answer
        except Exception:  # a fault here costs that request alone
            log.exception("%s %s", request.method, request.path[:_PATH_CHARS_MAX])
            response = error(
                500, "a fault of the gateway's own; its log has more", kind="server_error", code="internal"
            )
        self._answers[response.status] += 1
        return response

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path, method = request.path, request.method
        if path == "/health":
            away = self._away_s() > _AWAY_S
            return web.json_response({"status": "no daemon" if away else "ok"}, status=503 if away else 200)
        tenant = ""
        if self._keys.required:
            found = self._keys.tenant(request.headers.get("Authorization", ""))
            if found is None:
                message = "an API key is needed: send it as `Authorization: Bearer KEY`"
                return error(401, message, kind="authentication_error", code="invalid_api_key")
            tenant = found
        if path in (_MODELS, "/metrics") or path.startswith(f"{_MODELS}/"):
            if method not in ("GET", "HEAD"):
                return error(405, f"{method} is not taken on {path}, but GET is", allow="GET, HEAD")
            return await self._metrics() if path == "/metrics" else await self._models(path[len(_MODELS) + 1 :])
        if path not in _ENGINE_PATHS and not (_ENGINE_PATH.fullmatch(path) and len(path) <= _PATH_CHARS_MAX):
            known = f"GET {_MODELS}, POST /v1/chat/completions, POST /v1/completions, GET /health, GET /metrics"
            return error(404, f"there is no {path[:_PATH_CHARS_MAX]}: see {known}")
        if method != "POST":
            return error(405, f"{method} is not taken on {path}, but POST is", allow="POST")
        if self._away_s() > _AWAY_S:
            raise DaemonUnreachable(f"llmosd has not answered for {self._away_s():.0f} s; ask again once it runs")
        return await self._request(request, path, tenant)

    # -- reads ----------------------------------------------------------------------------------------------

    async def _metrics(self) -> web.Response:
        status, workers = await asyncio.gather(self._client.status(), self._client.ps())
        text = metrics.render(status, workers, self._answers)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})

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
        return error(404, f"no model {name[:80]!r}: GET /v1/models lists them", code="model_not_found", param="model")

    # -- requests -------------------------------------------------------------------------------------------

    async def _request(self, request: web.BaseRequest, path: str, tenant: str) -> web.StreamResponse:
        body = await read(request, self._config.body_max)
        routed = decode(body)
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
                response = failed(final, stream.payload)
                response.headers[_REQUEST_ID] = stream.rid.hex()
                return response
            if routed.stream and not stream.payload:
                return await self._stream(request, stream, [])
            headers = {"Content-Type": final.content_type, _REQUEST_ID: stream.rid.hex()}
            return web.Response(status=final.status, body=stream.payload, headers=headers)

    async def _stream(self, request: web.BaseRequest, stream: Stream, items: list[bytes]) -> web.StreamResponse:
        response = web.StreamResponse(headers={**_STREAM_HEADERS, _REQUEST_ID: stream.rid.hex()})
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
