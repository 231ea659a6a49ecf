"""An engine in a dozen lines, for the `python` driver: it says the prompt again, a word at a time.

`examples/models.d/echo.toml` names it. Whatever is slow (loading weights, say) belongs at module level: the worker is
`loading` until the import is done. A request that is cancelled closes the generator.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

#: Seconds a word takes. A real engine would compute meanwhile, in a thread or a process.
WORD_S = 0.05


async def generate(request: dict[str, Any], *, path: str) -> AsyncIterator[str | dict[str, Any]]:
    """`request` is the decoded body, `path` the API's. Each text is a piece of the answer; a dict is all of it."""
    if path == "/v1/embeddings":
        yield {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.0, 1.0]}]}
        return
    for word in prompt_of(request).split():
        await asyncio.sleep(WORD_S)
        yield f"{word} "


def prompt_of(request: dict[str, Any]) -> str:
    """The text to answer: a completion's prompt, or the last message of a chat."""
    if "messages" in request:
        return str(request["messages"][-1]["content"])
    return str(request.get("prompt", ""))
