"""OpenAI's bodies as the library needs them: written for a prompt, and read back into text. Pure.

An answer item is the JSON text of one server-sent event, an answer that was not streamed is one JSON object. Nothing
an engine sends may raise anything but EngineError here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from llmos.errors import EngineError, Invalid, engine_message
from llmos.types import Completion, Piece

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
EMBEDDINGS: Final = "/v1/embeddings"
TOKENIZE: Final = "/tokenize"


def request(
    model: str,
    prompt: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
    chat: bool,
    stream: bool,
    params: Mapping[str, Any],
) -> tuple[str, bytes]:
    """The path and the body that ask for a completion. Parameters that are None are left out."""
    body: dict[str, Any] = {"model": model}
    if messages is not None:
        if prompt is not None:
            raise Invalid("both a prompt and messages were given. Give one of them.")
        path, body["messages"] = CHAT, list(messages)
    elif prompt is None:
        raise Invalid("neither a prompt nor messages were given. Give one of them.")
    elif chat:
        path, body["messages"] = CHAT, [{"role": "user", "content": prompt}]
    else:
        path, body["prompt"] = COMPLETIONS, prompt
    body.update((name, value) for name, value in params.items() if value is not None)
    if stream:
        body["stream"] = True
        body.setdefault("stream_options", {"include_usage": True})
    return path, encode(body)


def encode(body: Any) -> bytes:
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise Invalid(f"the request cannot be written as JSON: {error}. Use plain values.") from None


def read_object(payload: bytes) -> dict[str, Any]:
    """An engine's answer as a JSON object."""
    try:
        data = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"the engine's answer is no JSON: {error}. It begins {payload[:80]!r}."
        raise EngineError(message, body=payload) from None
    if not isinstance(data, dict):
        raise EngineError(f"the engine's answer is no JSON object, but {type(data).__name__}.", body=payload)
    return data


def read_piece(item: bytes) -> Piece | None:
    """What an answer item adds to the text; None when it is only a sign, such as ``[DONE]`` or the usage."""
    if item.strip() == b"[DONE]":
        return None
    data = read_object(item)
    if "error" in data and "choices" not in data:
        raise EngineError(f"the engine stopped with an error: {engine_message(item)}", body=item)
    text, finish_reason = _choice(data, "delta")
    return Piece(text=text, finish_reason=finish_reason, data=data) if text or finish_reason else None


def read_completion(payload: bytes) -> Completion:
    """A whole answer, without its counts: the final has those."""
    data = read_object(payload)
    text, finish_reason = _choice(data, "message")
    return Completion(text=text, finish_reason=finish_reason, data=data)


def read_embeddings(payload: bytes) -> list[list[float]]:
    """The vectors of an answer of /v1/embeddings, in the order of the inputs."""
    try:
        entries = sorted(read_object(payload)["data"], key=lambda entry: entry.get("index", 0))
        return [list(map(float, entry["embedding"])) for entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"the engine's answer has no embeddings: {error!r}.", body=payload) from None


def read_tokens(payload: bytes) -> list[int]:
    """The token ids of an answer of /tokenize: numbers, or llama.cpp's objects with pieces."""
    try:
        tokens = read_object(payload)["tokens"]
        return [int(token["id"] if isinstance(token, dict) else token) for token in tokens]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the engine's answer has no tokens: {error!r}.", body=payload) from None


def _choice(data: dict[str, Any], chat_field: str) -> tuple[str, str]:
    """(text, finish reason) of the first choice, as far as there is one."""
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return "", ""
    inner = choice.get(chat_field)
    text = inner.get("content") if isinstance(inner, dict) else choice.get("text")
    reason = choice.get("finish_reason")
    return text if isinstance(text, str) else "", reason if isinstance(reason, str) else ""
