"""OpenAI's response objects, for engines that make text and nothing else. Every object says which engine made it."""

from __future__ import annotations

from typing import Any

import msgspec

from llmos.protocol import frames as f
from llmosd.worker.drivers import Call, RequestFailed

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_encode = msgspec.json.Encoder().encode


def decode_body(call: Call) -> dict[str, Any]:
    """The request's JSON object. Raises RequestFailed for anything else."""
    try:
        body = msgspec.json.decode(call.body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestFailed(f.Code.INVALID, f"the body is not JSON: {error}", status=400) from None
    if not isinstance(body, dict):
        raise RequestFailed(f.Code.INVALID, "the body is not a JSON object", status=400)
    return body


def prompt_of(body: dict[str, Any], path: str) -> str:
    """The prompt's text. Raises RequestFailed when there is none."""
    if path == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise RequestFailed(f.Code.INVALID, "'messages' must be a list of objects", status=400)
        return "\n".join(str(message.get("content") or "") for message in messages)
    prompt = body.get("prompt", "")
    if isinstance(prompt, list):
        prompt = " ".join(map(str, prompt))
    if not isinstance(prompt, str):
        raise RequestFailed(f.Code.INVALID, "'prompt' must be text", status=400)
    return prompt


def tokens_wanted(body: dict[str, Any], default: int, bound: int) -> int:
    """How many tokens to generate at most. Raises RequestFailed for a number that is none."""
    value = body.get("max_completion_tokens", body.get("max_tokens"))
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 10_000_000:
        raise RequestFailed(f.Code.INVALID, f"'max_tokens' must be a number from 0 up, not {value!r}"[:200], status=400)
    return min(value, bound) if bound else value


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Renderer:
    """Renders the pieces of one answer."""

    def __init__(self, call: Call, model: str, fingerprint: str) -> None:
        self._chat = call.path == CHAT
        kind = "chat.completion" if self._chat else "text_completion"
        self._base: dict[str, Any] = {
            "id": call.response_id,
            "object": f"{kind}.chunk" if self._chat and call.stream else kind,
            "created": call.created,
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def piece(self, text: str, finish_reason: str | None = None) -> bytes:
        """One chunk of a stream."""
        return _encode(self._base | {"choices": [self._choice("delta", text, finish_reason)]})

    def counts(self, prompt_tokens: int, completion_tokens: int) -> bytes:
        """The last chunk of a stream whose client asked for usage."""
        return _encode(self._base | {"choices": [], "usage": usage(prompt_tokens, completion_tokens)})

    def whole(self, text: str, finish_reason: str, prompt_tokens: int, completion_tokens: int) -> bytes:
        """The answer of a request that is not streamed."""
        choice = self._choice("message", text, finish_reason)
        return _encode(self._base | {"choices": [choice], "usage": usage(prompt_tokens, completion_tokens)})

    def _choice(self, message: str, text: str, finish_reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        if self._chat:
            choice[message] = {"role": "assistant", "content": text} if text or message == "message" else {}
        else:
            choice["text"] = text
        return choice
