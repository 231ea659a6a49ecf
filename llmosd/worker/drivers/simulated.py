"""An engine that only takes time, at the rates its model file declares, and says in every answer that it is simulated.

For tests, benchmarks and trying policies out. It has no private path: the same host, bus, kernel and gateway carry it.
The text depends on nothing but the prompt, so that two runs can be compared byte for byte.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import AsyncIterator
from typing import Final

from llmos.protocol import frames as f
from llmosd.kernel.spec import Simulated
from llmosd.worker.config import HostConfig
from llmosd.worker.drivers import Call, Finished, Item, Progress, RequestFailed
from llmosd.worker.drivers.render import CHAT, COMPLETIONS, Renderer, decode_body, prompt_of, tokens_wanted

FINGERPRINT: Final = "simulated"
TOKENS_DEFAULT: Final = 16
_WORDS: Final = ("a", "bank", "can", "deliver", "every", "free", "goal", "half", "it", "just", "keep", "little", "move")
#: Progress reports while it "loads".
_LOAD_STEPS: Final = 5


class SimulatedEngine:
    """See the module."""

    def __init__(self, engine: Simulated, config: HostConfig) -> None:
        self.engine_pid = os.getpid()
        self._engine = engine
        self._model = config.model
        self._never: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, progress: Progress) -> None:
        for done in range(_LOAD_STEPS):
            progress(done / _LOAD_STEPS, "simulates loading")
            await asyncio.sleep(self._engine.load_time / _LOAD_STEPS)

    async def ended(self) -> str:
        return await self._never

    async def stop(self) -> None:
        """There is nothing to stop."""

    async def run(self, call: Call) -> AsyncIterator[Item | Finished]:
        if call.path not in (CHAT, COMPLETIONS):
            message = f"a simulated engine serves {CHAT} and {COMPLETIONS}, not {call.path}"
            raise RequestFailed(f.Code.UNSUPPORTED, message, status=404)
        body = decode_body(call)
        prompt = prompt_of(body, call.path)
        wanted = tokens_wanted(body, TOKENS_DEFAULT, call.max_tokens)
        prompt_tokens = len(prompt.split())
        render = Renderer(call, self._model, FINGERPRINT)
        clock = asyncio.get_running_loop().time
        start = clock() + prompt_tokens / self._engine.prefill_rate
        if not call.stream:
            await asyncio.sleep(start + wanted / self._engine.decode_rate - clock())
            payload = render.whole(text_of(prompt, wanted), "length", prompt_tokens, wanted)
            yield Finished(payload, prompt_tokens=prompt_tokens, completion_tokens=wanted)
            return
        for index in range(wanted):
            await asyncio.sleep(start + (index + 1) / self._engine.decode_rate - clock())
            yield Item(render.piece(_word(prompt, index), "length" if index + 1 == wanted else None))
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            yield Item(render.counts(prompt_tokens, wanted), tokens=0)
        yield Finished(prompt_tokens=prompt_tokens, completion_tokens=wanted, content_type="text/event-stream")


def text_of(prompt: str, tokens: int) -> str:
    """What it answers, whatever the machine does meanwhile."""
    return "".join(_word(prompt, index) for index in range(tokens))


def _word(prompt: str, index: int) -> str:
    return " " + _WORDS[zlib.crc32(f"{index}/{prompt}".encode()) % len(_WORDS)]
