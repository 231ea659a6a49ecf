"""An engine of the user's own: an async generator, run inside the worker host.

``async def generate(request: dict, *, path: str) -> AsyncIterator[str | dict]``: each text it yields is one piece of
the answer, rendered as OpenAI's API has it. A dict is taken as the rest of the answer as it is: for embeddings, say.
`request` is the decoded JSON body. Cancelling a request closes the generator.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from llmos.protocol import frames as f
from llmosd.kernel.spec import PythonFunction
from llmosd.worker.config import HostConfig
from llmosd.worker.drivers import Call, EngineEnded, Finished, Item, Progress, RequestFailed
from llmosd.worker.drivers.render import Renderer, decode_body, tokens_wanted


class PythonEngine:
    """See the module."""

    def __init__(self, engine: PythonFunction, config: HostConfig) -> None:
        self.engine_pid = os.getpid()
        self._engine = engine
        self._model = config.model
        self._search = config.weights_path
        self._generate: Callable[..., Any] | None = None
        self._never: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, progress: Progress) -> None:
        progress(-1.0, f"imports {self._engine.function}")
        os.environ.update(self._engine.env)
        # In a thread: importing a model may take minutes, and the host must go on saying that it lives.
        self._generate = await asyncio.to_thread(self._load)

    def _load(self) -> Callable[..., Any]:
        place, _, name = self._engine.function.rpartition(":")
        try:
            module = _import_file(place, self._search) if place.endswith(".py") else importlib.import_module(place)
            return getattr(module, name)  # type: ignore[no-any-return]
        except (Exception, SystemExit) as error:  # whatever the user's module raises is the reason it cannot run
            raise EngineEnded(f"cannot load {self._engine.function}: {type(error).__name__}: {error}") from error

    async def ended(self) -> str:
        return await self._never

    async def stop(self) -> None:
        """It ends with the host."""

    async def run(self, call: Call) -> AsyncIterator[Item | Finished]:
        assert self._generate is not None
        body = decode_body(call)
        bound = tokens_wanted(body, 0, call.max_tokens)
        render = Renderer(call, self._model, f"python:{self._engine.function.rpartition(':')[2]}")
        pieces: list[str] = []
        count = 0
        try:
            async with aclosing(self._generate(body, path=call.path)) as answer:
                async for piece in answer:
                    if isinstance(piece, dict):
                        yield Finished(msgspec.json.encode(piece))
                        return
                    count += 1
                    if call.stream:
                        yield Item(render.piece(str(piece)))
                    else:
                        pieces.append(str(piece))
                    if bound and count >= bound:
                        break
        except (RequestFailed, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # the user's code failed: that request fails, the worker lives
            message = f"{self._engine.function} raised {type(error).__name__}: {error}"
            raise RequestFailed(f.Code.ENGINE_ERROR, message, status=500) from error
        if call.stream:
            yield Item(render.piece("", "stop"), tokens=0)
            yield Finished(completion_tokens=count, content_type="text/event-stream")
        else:
            yield Finished(render.whole("".join(pieces), "stop", 0, count), completion_tokens=count)


def _import_file(place: str, search: tuple[str, ...]) -> Any:
    paths = [Path(place)] if Path(place).is_absolute() else [Path(base) / place for base in search]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is no {' or '.join(map(str, paths))}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
