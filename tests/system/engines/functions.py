"""Engines for tests of the `python` driver: async generators."""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator
from typing import Any

closed: list[str] = []


async def words(request: dict[str, Any], *, path: str) -> AsyncIterator[str]:
    for index in range(int(request.get("max_tokens", 4))):
        yield f" {path.rpartition('/')[2]}{index}"
        await asyncio.sleep(0)


async def as_dict(request: dict[str, Any], *, path: str) -> AsyncIterator[dict[str, Any]]:
    yield {"object": "list", "data": [{"index": 0, "embedding": [1.0, 2.0]}]}


async def raises(request: dict[str, Any], *, path: str) -> AsyncIterator[str]:
    yield " one"
    raise ValueError("no more words")


async def endless(request: dict[str, Any], *, path: str) -> AsyncIterator[str]:
    """Tells, when asked, how many of its answers were closed before their end."""
    if request.get("prompt") == "closed":
        yield f"{len(closed)}"
        return
    try:
        while True:
            yield " more"
            await asyncio.sleep(0.01)
    finally:
        closed.append(path)


async def subprocess_status(request: dict[str, Any], *, path: str) -> AsyncIterator[str]:
    """The exit status of a child that ended while nobody looked."""

    def run() -> int:
        child = subprocess.Popen(["sh", "-c", "exit 7"])
        time.sleep(1)
        return child.wait()

    yield str(await asyncio.to_thread(run))
