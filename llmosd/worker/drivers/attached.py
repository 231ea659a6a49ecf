"""An engine that somebody else runs, at a URL: routed to through this host, and not supervised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from llmosd.kernel.spec import Attached
from llmosd.worker.config import HostConfig
from llmosd.worker.drivers import Call, Finished, Item, Progress
from llmosd.worker.drivers.http import HttpEngine, read_key

_CHECK_S: Final = 5.0
#: Checks that must fail in a row before the engine counts as gone.
_MISSES: Final = 3


class AttachedEngine:
    """See the module."""

    engine_pid = 0

    def __init__(self, engine: Attached, config: HostConfig) -> None:
        self._engine = engine
        headers = {**engine.headers, **read_key(engine.api_key_file)}
        self._http = HttpEngine(engine.url, model=config.model, served_name=engine.served_name, headers=headers)

    async def start(self, progress: Progress) -> None:
        progress(-1.0, f"waits for {self._engine.url}{self._engine.ready_path}")
        await self._http.wait_ready(self._engine.ready_path, progress)

    async def ended(self) -> str:
        misses = 0
        while misses < _MISSES:
            await asyncio.sleep(_CHECK_S)
            ready = await self._http.is_ready(self._engine.ready_path, lambda share, word: None)
            misses = 0 if ready else misses + 1
        return f"{self._engine.url}{self._engine.ready_path} does not answer any more"

    def run(self, call: Call) -> AsyncIterator[Item | Finished]:
        return self._http.run(call)

    async def stop(self) -> None:
        await self._http.close()
