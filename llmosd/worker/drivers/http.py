"""What all engines behind an HTTP API have in common: readiness, requests, server-sent events, errors, usage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from llmos.protocol import frames as f
from llmosd.worker.drivers import Call, CannotWork, EngineBrokeOff, Finished, Item, Progress, RequestFailed
from llmosd.worker.drivers.render import CHAT, COMPLETIONS, decode_body

#: An answer, or one line of a stream, that is larger is not read on.
ANSWER_MAX: Final = 64 << 20
_PROBE_S: Final = 0.05
_PROBE_MAX_S: Final = 1.0
#: A connection that an engine may have closed meanwhile is not used again after this long.
_KEEP_ALIVE_S: Final = 2.0


class HttpEngine:
    """An engine at a URL, or behind a unix socket. Never raises anything but RequestFailed for what an engine does."""

    def __init__(
        self, url: str, *, model: str, served_name: str = "", socket: str = "", headers: Mapping[str, str] = {}
    ) -> None:
        #: When something of an answer came from it, in monotonic seconds.
        self.heard_at = 0.0
        self._url = url.rstrip("/")
        self._model = model
        self._served_name = served_name or model
        self._session = _session(socket, headers, keepalive_timeout=_KEEP_ALIVE_S)
        #: No connection of these is kept: an engine with one thread would wait on it for more, and be deaf to others.
        self._health = _session(socket, headers, force_close=True)

    async def wait_ready(self, path: str, progress: Progress) -> None:
        """Ask until the engine answers 200. Whoever awaits this must watch the engine's process too."""
        pause = _PROBE_S
        while not await self.is_ready(path, progress):
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _PROBE_MAX_S)

    async def is_ready(self, path: str, progress: Progress) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=5)
            async with self._health.get(self._url + path, timeout=timeout) as answer:
                if answer.status == 200:
                    return True
                progress(-1.0, f"the engine answers {answer.status} on {path}")
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass  # not listening yet: whether it ever will is for the caller's deadline
        return False

    async def ask(self, path: str) -> str:
        """Why a GET is not answered with 2xx, or "". Waits for as long as it takes."""
        try:
            async with self._health.get(self._url + path, allow_redirects=False) as answer:
                return "" if 200 <= answer.status < 300 else f"it answers {answer.status} on {path}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return f"no answer on {path}: {error or type(error).__name__}"

    async def get_json(self, path: str) -> Any:
        """The decoded answer of a GET, or None."""
        try:
            async with self._session.get(self._url + path, timeout=aiohttp.ClientTimeout(total=5)) as answer:
                return msgspec.json.decode(await answer.read())
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
            return None

    async def close(self) -> None:
        await self._session.close()
        await self._health.close()

    async def run(self, call: Call) -> AsyncGenerator[Item | Finished, None]:
        body, wants_usage = self._rewritten(call)
        headers = {"content-type": "application/json"}
        try:
            async with self._session.post(self._url + call.path, data=body, headers=headers) as answer:
                self.heard_at = time.monotonic()
                if answer.status >= 400:
                    await self._fail(answer)
                if answer.content_type == "text/event-stream":
                    async for piece in self._events(call, answer, wants_usage):
                        yield piece
                else:
                    payload = await _read(answer)
                    yield self._whole(call, payload, answer)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            message = f"the engine broke off: {type(error).__name__}: {error}"
            raise EngineBrokeOff(f.Code.ENGINE_ERROR, message, status=502) from error

    def _rewritten(self, call: Call) -> tuple[bytes, bool]:
        """The body as this engine shall see it, and whether the client asked for usage itself."""
        body = decode_body(call)
        body["model"] = self._served_name
        if call.seed is not None:
            body.setdefault("seed", call.seed)
        if call.max_tokens:
            key = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
            asked = body.get(key)
            body[key] = min(asked, call.max_tokens) if isinstance(asked, int) else call.max_tokens
        options = body.get("stream_options")
        wants_usage = isinstance(options, dict) and options.get("include_usage") is True
        if call.stream:
            body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
        return msgspec.json.encode(body), wants_usage

    async def _fail(self, answer: aiohttp.ClientResponse) -> None:
        body = await _read(answer)
        code = f.Code.UNSUPPORTED if answer.status in (404, 405, 501) else f.Code.ENGINE_ERROR
        message = f"the engine answered {answer.status}: {body[:300].decode(errors='replace')}"
        raise RequestFailed(code, message, status=answer.status, body=body, content_type=answer.content_type)

    async def _events(
        self, call: Call, answer: aiohttp.ClientResponse, wants_usage: bool
    ) -> AsyncIterator[Item | Finished]:
        """Each event's data as an answer item, with our id, time and model name in it, so that a rerun looks alike."""
        prompt_tokens = completion_tokens = -1
        complete = call.path not in (CHAT, COMPLETIONS)
        async for data in _server_sent(answer):
            self.heard_at = time.monotonic()
            if data == b"[DONE]":
                complete = True
                break
            try:
                event = msgspec.json.decode(data)
            except msgspec.DecodeError:
                yield Item(data)
                continue
            if not isinstance(event, dict):
                yield Item(data)
                continue
            if "error" in event and "choices" not in event:
                raise RequestFailed(f.Code.ENGINE_ERROR, f"the engine failed: {str(event['error'])[:300]}", status=500)
            usage = event.get("usage")
            if isinstance(usage, dict):
                prompt_tokens = _count(usage.get("prompt_tokens"))
                completion_tokens = _count(usage.get("completion_tokens"))
                if not wants_usage:
                    del event["usage"]
                    if not event.get("choices"):
                        continue
            if call.response_id:
                event["id"], event["created"] = call.response_id, call.created
            event["model"] = self._model
            complete = complete or _says_finished(event)
            yield Item(msgspec.json.encode(event), tokens=1 if event.get("choices") else 0)
        if not complete:
            # Without a length and without chunks, an engine's death reads like the end of its answer.
            raise EngineBrokeOff(f.Code.ENGINE_ERROR, "the engine broke off in the middle of its stream", status=502)
        yield Finished(
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, content_type="text/event-stream"
        )

    def _whole(self, call: Call, payload: bytes, answer: aiohttp.ClientResponse) -> Finished:
        prompt_tokens = completion_tokens = -1
        if answer.content_type == "application/json":
            try:
                body = msgspec.json.decode(payload)
            except msgspec.DecodeError:
                body = None
            if isinstance(body, dict):
                usage = body.get("usage")
                if isinstance(usage, dict):
                    prompt_tokens = _count(usage.get("prompt_tokens"))
                    completion_tokens = _count(usage.get("completion_tokens", 0))
                if "model" in body:
                    body["model"] = self._model
                    if call.response_id and "id" in body:
                        body["id"], body["created"] = call.response_id, call.created
                    payload = msgspec.json.encode(body)
        return Finished(payload, answer.status, answer.content_type, prompt_tokens, completion_tokens)


def _session(socket: str, headers: Mapping[str, str], **connections: Any) -> aiohttp.ClientSession:
    connector: aiohttp.BaseConnector = (
        aiohttp.UnixConnector(socket, limit=0, **connections)
        if socket
        else aiohttp.TCPConnector(limit=0, **connections)
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    return aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=dict(headers), auto_decompress=True, trust_env=False
    )


def read_key(path: str) -> dict[str, str]:
    """The Authorization header for an API key kept in a file; nothing for no file. Raises CannotWork."""
    if not path:
        return {}
    try:
        return {"authorization": f"Bearer {Path(path).read_text().strip()}"}
    except OSError as error:
        raise CannotWork(f"cannot read api_key_file {path}: {error.strerror}") from error


def _says_finished(event: dict[str, Any]) -> bool:
    """Whether an event is the last of its answer, for engines that do not say [DONE]."""
    choices = event.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") for choice in choices
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 50 else -1


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    payload = bytearray()
    async for piece in answer.content.iter_any():
        payload += piece
        if len(payload) > ANSWER_MAX:
            raise RequestFailed(f.Code.TOO_LARGE, f"the engine's answer is larger than {ANSWER_MAX} bytes", status=502)
    return bytes(payload)


async def _server_sent(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each event (WHATWG HTML, 9.2.6); other fields mean nothing here."""
    rest = b""
    data: list[bytes] = []
    async for piece in answer.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > ANSWER_MAX:
            raise RequestFailed(
                f.Code.TOO_LARGE, f"a line of the engine's stream is over {ANSWER_MAX} bytes", status=502
            )
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
    if data:
        yield b"\n".join(data)
