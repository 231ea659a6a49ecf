"""Asks commands whether they are ready and whether they live, as the kernel says. For the node.

One task a command that is asked, and none for the others. What is asked is on this machine, and what is printed is
read with bounds: no command can keep the daemon from its work by how it answers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from llmosd.failpoint import failpoint
from llmosd.health import CannotAsk, Target, get, target, until_hung
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.spec import Liveness, Ready
from llmosd.node.life import Life
from llmosd.node.printed import Expression, Printed, TooSlow

#: Seconds between two looks at a command that is not ready: a tenth of the time it was waited for, within these.
_LOOK_S: Final = 0.05
_LOOK_MAX_S: Final = 1.0
#: Seconds that a command has for an answer on ready.http before it is asked again.
_ANSWER_S: Final = 5.0


class Probes:
    """See the module. `emit` tells the kernel."""

    def __init__(self, emit: Callable[[on.Event], None], executor: Executor) -> None:
        self._emit = emit
        self._executor = executor
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, effect: do.Probe, life: Life) -> None:
        """Ask what the effect says from now on, and nothing else."""
        self.end(life.worker)
        if effect.ready is not None:
            coroutine = self._until_ready(life, effect.ready)
        elif effect.liveness is not None:
            coroutine = self._until_hung(life, effect.liveness)
        else:
            return
        self._tasks[life.worker] = asyncio.create_task(coroutine)

    def end(self, worker: str) -> None:
        """Ask the worker nothing any more."""
        if (task := self._tasks.pop(worker, None)) is not None:
            task.cancel()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for worker in list(self._tasks):
            self.end(worker)
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- readiness ------------------------------------------------------------------------------------------

    async def _until_ready(self, life: Life, ready: Ready) -> None:
        printed = Printed(life.birth.output.path, life.birth.log_start)
        question = _Question(target(ready.http) if ready.http else None)
        try:
            await self._watch(life, ready, printed, question)
        except TooSlow:
            reason = "ready.log takes too long to be found or not: it backtracks without end; make it simpler"
            self._emit(on.Unhealthy(life.worker, life.incarnation, reason))
            return
        finally:
            question.drop()
            printed.close()
        # On record first: the next daemon could not find a line that was cut away meanwhile.
        await self._note(life, ready=True)
        failpoint("ready.recorded")
        self._emit(on.Ready(life.worker, life.incarnation))

    async def _watch(self, life: Life, ready: Ready, printed: Printed, question: _Question) -> None:
        """Look and ask until it is ready, and tell what it lacks and whether it gets on. Raises TooSlow."""
        began, told = time.monotonic(), ""
        wanted = Expression(ready.log) if ready.log else None
        why = f"waits for a line with {ready.log}" if wanted else f"waits for {ready.http}"
        while True:
            progressed, lines = await asyncio.get_running_loop().run_in_executor(self._executor, printed.read)
            if wanted is not None and wanted.found_in(lines):
                wanted, why = None, f"waits for {ready.http}"
            pause_s = min(_LOOK_MAX_S, max(_LOOK_S, (time.monotonic() - began) / 10))
            if wanted is None:
                if (answer := await question.answer(pause_s)) == "":
                    return
                why = answer or why
            else:
                await asyncio.sleep(pause_s)
            if progressed or why != told:
                told = why
                self._emit(on.NotReady(life.worker, life.incarnation, why, progressed))

    async def _note(self, life: Life, **changes: object) -> None:
        try:
            await life.note(**changes)
        except OSError:
            pass  # there is no room for it, say: then the next daemon asks again

    # -- liveness -------------------------------------------------------------------------------------------

    async def _until_hung(self, life: Life, liveness: Liveness) -> None:
        asked = target(liveness.http)
        # A thousand that a new daemon takes over at once are not to be asked at once, again and again.
        later_s = random.random() * liveness.interval

        async def ask() -> str:
            try:
                return await get(asked)
            except CannotAsk:
                return ""  # nothing is known, and nothing is held against it

        why = await until_hung(liveness, liveness.http, ask, later_s=later_s)
        self._emit(on.Unhealthy(life.worker, life.incarnation, f"hung: {why}"))


class _Question:
    """ready.http, asked once at a time. Without one the answer is there at once."""

    def __init__(self, asked: Target | None) -> None:
        self._asked = asked
        self._asking: asyncio.Task[str] | None = None

    async def answer(self, pause_s: float) -> str | None:
        """Why it is not answered, "" when it is, None when that is not known after `pause_s`. A refusal takes as long,
        so that nobody asks too often."""
        if self._asked is None:
            return ""
        began = time.monotonic()
        asking = self._asking = self._asking or asyncio.create_task(self._ask(self._asked))
        await asyncio.wait([asking], timeout=pause_s)
        if not asking.done():
            return None
        self._asking = None
        if why := asking.result():
            await asyncio.sleep(began + pause_s - time.monotonic())
        return why

    async def _ask(self, asked: Target) -> str:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await get(asked)
        except TimeoutError:
            return f"no answer on {asked.url} in {_ANSWER_S:g}s"
        except CannotAsk as error:
            return f"cannot be asked: {error.strerror}"

    def drop(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
