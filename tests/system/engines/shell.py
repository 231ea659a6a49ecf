"""An engine for tests of isolation: answers with what a shell makes of the prompt, inside the worker."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any


async def answer(request: dict[str, Any], *, path: str) -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", request["prompt"], stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    yield output.decode()
