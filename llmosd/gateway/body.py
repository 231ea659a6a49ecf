"""What of a request's body decides where it goes. The rest of it is its engine's business and passes through unread."""

from __future__ import annotations

from typing import Any

import aiohttp.web
import msgspec


class Routed(msgspec.Struct):
    """The fields that routing needs."""

    model: str
    stream: bool | None = False


class BadBody(Exception):  # noqa: N818  # an answer, not a fault
    """A body that is not taken: the HTTP status and the words for it. `param`: the field that is wrong."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


_decode = msgspec.json.Decoder(Routed).decode


async def read(request: aiohttp.web.BaseRequest, body_max: int) -> bytes:
    """The whole body. Raises BadBody."""
    too_large = BadBody(413, f"the body is larger than {body_max} bytes", code="too_large")
    if (request.content_length or 0) > body_max:
        raise too_large
    if request.content_type.startswith("multipart/"):
        raise BadBody(415, "only JSON bodies are taken, no multipart ones", code="unsupported_media_type")
    if request.headers.get("Expect", "").lower() == "100-continue":
        # curl asks before it sends more than a megabyte, and waits a second for the answer.
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    pieces = []
    size = 0
    try:
        async for piece in request.content.iter_any():
            size += len(piece)
            if size > body_max:
                raise too_large
            pieces.append(piece)
    except aiohttp.web.RequestPayloadError as error:
        raise BadBody(400, f"the body cannot be read: {error}", code="invalid_body") from None
    return b"".join(pieces)


def decode(body: bytes) -> Routed:
    """Raises BadBody with what is wrong, in the words of OpenAI's API."""
    try:
        try:
            return _decode(body)
        except msgspec.ValidationError:
            field, message = _wrong(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        why = str(problem) if body.strip() else "it is empty"
        message = f"the body is not JSON: {why}; expected an object with a 'model'"
        raise BadBody(400, message, code="invalid_json") from None
    raise BadBody(400, message, code="invalid_value", param=field)


def _wrong(body: Any) -> tuple[str | None, str]:
    if not isinstance(body, dict):
        return None, "the body is JSON, but not an object; expected an object with a 'model'"
    if "model" not in body:
        return "model", 'the body names no model: add "model", one of those that GET /v1/models lists'
    if not isinstance(body["model"], str):
        return "model", "'model' must be text: the name of a model"
    return "stream", "'stream' must be true or false"
