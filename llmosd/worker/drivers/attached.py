"""An engine that somebody else runs, at a URL: routed to through this host, and not supervised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Final

from llmosd.kernel.spec import Attached
from llmosd.worker.config import HostConfig
from llmosd.worker.drivers import Call, EngineBrokeOff, Finished, Item, Progress
from llmosd.worker.drivers.http import HttpEngine, read_key

_CHECK_S: Final = 2.0
#: The same after a check that failed, or a request whose connection was lost.
_CHECK_AGAIN_S: Final = 0.3
#: Checks that must fail in a row before the engine counts as gone.
_MISSES: Final = 3


class AttachedEngine:
    """See the module."""

    engine_pid = 0

    def __init__(self, engine: Attached, config: HostConfig) -> None:
        self._engine = engine
        self._model = config.model
        self._http: HttpEngine | None = None
        self._suspect = asyncio.Event()

    async def start(self, progress: Progress) -> None:
        engine = self._engine
        headers = {**engine.headers, **read_key(engine.api_key_file)}
        http = HttpEngine(engine.url, model=self._model, served_name=engine.served_name, headers=headers)
        self._http = http
        progress(-1.0, f"waits for {engine.url}{engine.ready_path}")
        await http.wait_ready(engine.ready_path, progress)

    async def ended(self) -> str:
        assert self._http is not None, "it is watched only after start"
        misses = 0
        while misses < _MISSES:
            try:
                await asyncio.wait_for(self._suspect.wait(), _CHECK_AGAIN_S if misses else _CHECK_S)
            except TimeoutError:
                pass  # time for the regular check
            self._suspect.clear()
            ready = await self._http.is_ready(self._engine.ready_path, lambda share, word: None)
            misses = 0 if ready else misses + 1
        return f"{self._engine.url}{self._engine.ready_path} does not answer any more"

    async def run(self, call: Call) -> AsyncIterator[Item | Finished]:
        assert self._http is not None, "requests come only after start"
        try:
            async with aclosing(self._http.run(call)) as answer:
                async for piece in answer:
                    yield piece
        except EngineBrokeOff:
            self._suspect.set()
            raise

    async def stop(self) -> None:
        if self._http is not None:
            await self._http.close()
