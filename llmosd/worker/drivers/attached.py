"""An engine that somebody else runs, at a URL: routed to through this host, and not supervised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Final

from llmosd.health import until_hung
from llmosd.kernel.spec import Attached
from llmosd.worker.config import HostConfig
from llmosd.worker.drivers import Call, EngineBrokeOff, Finished, Item, Progress
from llmosd.worker.drivers.http import HttpEngine, read_key

#: Seconds after which one who refused to answer is asked again, instead of `liveness.interval`.
_AGAIN_S: Final = 0.3


class AttachedEngine:
    """See the module."""

    engine_pid = 0

    def __init__(self, engine: Attached, config: HostConfig) -> None:
        self._engine = engine
        self._model = config.model
        self._liveness = config.liveness
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
        http, path = self._http, self._engine.ready_path
        why = await until_hung(self._liveness, path, self._ask, lambda: http.heard_at, self._suspect)
        return f"{self._engine.url}{path} does not answer any more: {why}"

    async def _ask(self) -> str:
        assert self._http is not None
        why = await self._http.ask(self._engine.ready_path)
        if why:
            asyncio.get_running_loop().call_later(_AGAIN_S, self._suspect.set)
        return why

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
