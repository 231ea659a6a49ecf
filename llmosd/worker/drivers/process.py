"""An engine that is a process with an HTTP API: what llama.cpp's driver and that for any server command share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

from llmosd.health import until_hung
from llmosd.worker.config import HostConfig
from llmosd.worker.drivers import Call, EngineEnded, Finished, Item, Progress
from llmosd.worker.drivers.http import HttpEngine
from llmosd.worker.engine import EngineProcess
from llmosd.worker.log import WorkerLog


class ProcessEngine:
    """Launches, waits until the API answers, asks it, ends it."""

    def __init__(self, config: HostConfig, log: WorkerLog) -> None:
        self.config = config
        self._process = EngineProcess(config, log)
        self._http: HttpEngine | None = None
        self._ready_path = ""

    @property
    def engine_pid(self) -> int:
        return self._process.pid

    async def launch(
        self, argv: Sequence[str], env: Mapping[str, str], http: HttpEngine, ready_path: str, progress: Progress
    ) -> None:
        """Start the process and wait until `ready_path` answers. Raises EngineEnded if it ends before that."""
        self._http, self._ready_path = http, ready_path
        await self._process.start(argv, env)
        progress(-1.0, "")
        ready = asyncio.ensure_future(http.wait_ready(ready_path, progress))
        ended = asyncio.ensure_future(self._process.ended())
        try:
            await asyncio.wait([ready, ended], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise EngineEnded(ended.result())
        finally:
            ready.cancel()
            ended.cancel()

    async def ended(self) -> str:
        """Its process ends, or it hangs: then it is killed."""
        http, path, liveness = self._http, self._ready_path, self.config.liveness
        if http is None or not liveness.interval:
            return await self._process.ended()
        ended = asyncio.ensure_future(self._process.ended())
        hung = asyncio.ensure_future(until_hung(liveness, path, lambda: http.ask(path), lambda: http.heard_at))
        try:
            await asyncio.wait([ended, hung], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return ended.result()
            self._process.kill()
            return f"the engine hung: {hung.result()}"
        finally:
            ended.cancel()
            hung.cancel()

    def run(self, call: Call) -> AsyncIterator[Item | Finished]:
        assert self._http is not None, "requests come only after start"
        return self._http.run(call)

    async def stop(self) -> None:
        if self._http is not None:
            await self._http.close()
        await self._process.stop(self.config.stop_timeout)
