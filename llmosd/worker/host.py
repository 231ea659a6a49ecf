"""The worker host: a small process that speaks the bus for one engine, and is its parent.

A shell around `llmos.protocol.host`, which decides what to send, and a driver, which speaks to the engine. It must
never lose an answer that the client does not have, and never outlive its engine with nothing to deliver.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, cast

import uvloop

from llmos.dealer import Dealer
from llmos.protocol import frames as f
from llmos.protocol.host import HostProtocol, StartRun, StopRun, Told
from llmosd.kernel.spec import EXIT_CANNOT_WORK
from llmosd.launch.reap import adopt_orphans, kill_descendants, reap_orphans
from llmosd.worker.config import HostConfig, read
from llmosd.worker.drivers import Call, CannotWork, Driver, EngineBrokeOff, EngineEnded, Finished, Item, RequestFailed
from llmosd.worker.drivers.choice import driver_for
from llmosd.worker.log import WorkerLog

_TICK_S: Final = 0.25
#: Seconds that answers which are finished wait for their clients once the engine is gone.
LAST_ANSWERS_S: Final = 5.0
#: Seconds in which an engine that broke a connection off may turn out to be dead.
DEATH_S: Final = 1.0
#: Seconds in which what the engine forked away must go once the engine has ended.
DESCENDANTS_S: Final = 2.0
EXIT_ENGINE: Final = 69
EXIT_ORPHANED: Final = 75


class Host:
    """One engine's host. `run` is its life; the exit status says how it ended."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._log = WorkerLog()
        self._protocol = HostProtocol(config.identity, config.token, os.getpid(), config.slots)
        self._driver: Driver = driver_for(config, self._log)
        self._running: dict[bytes, asyncio.Task[None]] = {}
        self._flush_soon = False
        self._stopping = asyncio.Event()
        self._engine: asyncio.Task[str] | None = None
        self._engine_exit = EXIT_ENGINE
        self._loop = asyncio.get_running_loop()
        #: A daemon that knows this worker answers. One that does not is no daemon for it.
        self._answered = False
        self._dealer = Dealer(config.back_address, config.identity, self._on_messages, self._on_connected)

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        ticker = asyncio.ensure_future(self._tick())
        stopping = asyncio.ensure_future(self._stopping.wait())
        engine = self._engine = asyncio.ensure_future(self._engine_life())
        try:
            await asyncio.wait([stopping, engine, ticker], return_when=asyncio.FIRST_COMPLETED)
            status = 0
            if ticker.done():
                self._note_end(f"ended by itself: there was no daemon for {self._config.orphan_timeout:g} s")
                status = EXIT_ORPHANED
            elif engine.done() and not stopping.done():
                await self._report_end(engine.result())
                status = self._engine_exit
            return status
        finally:
            for task in (engine, stopping, ticker, *self._running.values()):
                task.cancel()
            await self._driver.stop()
            self._flush()
            self._dealer.close()
            # The daemon sees to it too, where there is one.
            if not await asyncio.to_thread(kill_descendants, DESCENDANTS_S):
                self._log.say("what the engine forked away was killed and does not go")

    async def _engine_life(self) -> str:
        """Bring the engine up and watch it; returns why it is no more."""
        try:
            await self._driver.start(self._on_progress)
        except CannotWork as end:
            self._engine_exit = EXIT_CANNOT_WORK
            return str(end)
        except EngineEnded as end:
            return str(end)
        except Exception as error:  # noqa: BLE001  # whatever the driver ran into is the reason that there is no engine
            return f"cannot start the engine: {type(error).__name__}: {error}"
        self._log.say("the engine is ready")
        self._protocol.set_status(f.Phase.READY, 1.0, "", self._driver.engine_pid)
        self._send()
        return await self._driver.ended()

    async def _report_end(self, reason: str) -> None:
        """The engine is gone: fail nothing that another worker can run, deliver what is finished, say why."""
        self._note_end(reason)
        self._protocol.set_status(f.Phase.FAILED, -1.0, reason)
        for task in self._running.values():
            task.cancel()
        self._send()
        deadline = time.monotonic() + LAST_ANSWERS_S
        while self._protocol.kept > self._protocol.unfinished and time.monotonic() < deadline:
            try:
                await asyncio.wait_for(self._stopping.wait(), _TICK_S)
            except TimeoutError:
                continue
            break

    def _note_end(self, reason: str) -> None:
        """Why it ends, for people and for a daemon that may not be there to see it."""
        self._log.say(reason)
        try:
            self._config.engine_exit_file.write_text(reason)
        except OSError as error:
            self._log.say(f"cannot record it for the daemon: {error}")

    # -- the bus --------------------------------------------------------------------------------------------

    def _on_connected(self) -> None:
        self._answered = False
        self._protocol.connected()
        self._send()

    def _on_messages(self, messages: list[list[bytes]]) -> None:
        self._answered = True
        for parts in messages:
            for command in self._protocol.receive(parts):
                if isinstance(command, StartRun):
                    if self._engine is None or self._engine.done():
                        continue  # stays unfinished: the daemon gives it to another worker when this one has ended
                    task = asyncio.ensure_future(self._answer(command))
                    self._running[command.rid] = task
                elif isinstance(command, StopRun):
                    self._stop_run(command)
                else:
                    self._told(command)
        self._send()

    def _stop_run(self, command: StopRun) -> None:
        task = self._running.pop(command.rid, None)
        if task is not None:
            task.cancel()
        expired = command.reason == f.Code.DEADLINE_EXCEEDED
        code = f.Code.DEADLINE_EXCEEDED if expired else f.Code.CANCELLED
        failed = f.Failed(command.attempt, 0, code, "the time ran out" if expired else command.reason)
        self._protocol.failed(command.rid, command.attempt, failed, b"", time.monotonic())

    def _told(self, command: Told) -> None:
        if command.kind is f.Kind.DRAIN and self._protocol.status.phase == f.Phase.READY:
            self._protocol.set_status(f.Phase.DRAINING, 1.0, "", self._driver.engine_pid)

    def _on_progress(self, share: float, word: str) -> None:
        self._protocol.set_status(f.Phase.LOADING, share, word, self._driver.engine_pid)
        self._send()

    def _send(self) -> None:
        """Once an iteration of the loop, so that what is made meanwhile travels together."""
        if not self._flush_soon:
            self._flush_soon = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_soon = False
        self._protocol.flush(time.monotonic())
        self._dealer.send(self._protocol.outgoing)

    # -- requests -------------------------------------------------------------------------------------------

    async def _answer(self, start: StartRun) -> None:
        """Give one request to the engine and its answer to the protocol."""
        rid, run = start.rid, start.run
        protocol = self._protocol
        call = Call(run.path, start.body, run.stream, run.response_id, run.created, run.seed, run.max_tokens)
        made = 0
        try:
            # A driver's run is an async generator: closing it is what takes the request from the engine.
            async with aclosing(cast("AsyncGenerator[Item | Finished, None]", self._driver.run(call))) as answer:
                async for piece in answer:
                    if isinstance(piece, Finished):
                        protocol.done(rid, run.attempt, _done(run, piece, made), piece.payload, time.monotonic())
                        break
                    made += piece.tokens
                    if not protocol.item(rid, run.attempt, piece.payload, piece.tokens):
                        break
                    self._send()
        except EngineBrokeOff as failure:
            if not await self._engine_dies():
                failed = f.Failed(run.attempt, 0, failure.code, str(failure), failure.status)
                protocol.failed(rid, run.attempt, failed, b"", time.monotonic())
        except RequestFailed as failure:
            failed = f.Failed(run.attempt, 0, failure.code, str(failure), failure.status, 0, failure.content_type)
            protocol.failed(rid, run.attempt, failed, failure.body, time.monotonic())
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a driver's fault fails its request; the worker and the rest go on
            self._log.say(f"request {rid.hex()}: {type(error).__name__}: {error}")
            failed = f.Failed(run.attempt, 0, f.Code.INTERNAL, f"the driver failed: {type(error).__name__}: {error}")
            protocol.failed(rid, run.attempt, failed, b"", time.monotonic())
        finally:
            if self._running.get(rid) is asyncio.current_task():
                del self._running[rid]
            self._send()

    async def _engine_dies(self) -> bool:
        """Whether a lost connection is the engine's end, and not that of one request."""
        assert self._engine is not None
        await asyncio.wait([self._engine], timeout=DEATH_S)
        return self._engine.done()

    # -- time and children ----------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Signs of life, until the daemon has been away for too long."""
        connected_at = time.monotonic()
        while time.monotonic() < connected_at + self._config.orphan_timeout:
            await asyncio.sleep(_TICK_S)
            if self._dealer.connected and self._answered:
                connected_at = time.monotonic()
            self._protocol.tick(time.monotonic())
            self._send()
            # Not by SIGCHLD: uvloop keeps that for itself. Children of an engine that lives in this process are its
            # own to wait for.
            if self._driver.engine_pid != os.getpid():
                reap_orphans(lambda: (self._driver.engine_pid,))


def _done(run: f.Run, end: Finished, made: int) -> f.Done:
    exact = end.completion_tokens >= 0
    completion_tokens = end.completion_tokens if exact else made
    return f.Done(run.attempt, 0, end.status, end.content_type, max(0, end.prompt_tokens), completion_tokens, exact)


async def _main() -> int:
    adopt_orphans()
    return await Host(read()).run()


def main() -> int:
    return uvloop.run(_main())
