"""Any server command with OpenAI's HTTP API, on a port of 127.0.0.1 that is chosen for it."""

from __future__ import annotations

import socket

from llmosd.kernel.spec import OpenAI
from llmosd.worker.config import HostConfig
from llmosd.worker.drivers import Progress
from llmosd.worker.drivers.http import HttpEngine, read_key
from llmosd.worker.drivers.process import ProcessEngine
from llmosd.worker.log import WorkerLog


class OpenAIEngine(ProcessEngine):
    """See the module."""

    def __init__(self, engine: OpenAI, config: HostConfig, log: WorkerLog) -> None:
        super().__init__(config, log)
        self._engine = engine

    async def start(self, progress: Progress) -> None:
        engine = self._engine
        port = free_port()
        names = {"{port}": str(port), "{model}": self.config.model, "{slots}": str(self.config.slots)}
        argv = [fill_in(word, names) for word in (*engine.command, *engine.args)]
        http = HttpEngine(
            f"http://127.0.0.1:{port}",
            model=self.config.model,
            served_name=engine.served_name,
            headers={**engine.headers, **read_key(engine.api_key_file)},
        )
        progress(-1.0, f"waits for {engine.ready_path} on port {port}")
        await self.launch(argv, {**engine.env, "PORT": str(port)}, http, engine.ready_path, progress)


def free_port() -> int:
    """A port nobody listens on. Somebody may take it before the engine does: then that start fails, and is retried."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fill_in(word: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        word = word.replace(name, value)
    return word
