"""The composition root: builds the parts, and runs the loop around the kernel.

Whatever happens becomes an event; the kernel answers with effects; they are carried out here, each by the part whose
work it is. Nothing blocks on this loop, and no part knows another.
"""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import zmq

from llmos.protocol import frames as f
from llmosd import __version__, notify
from llmosd.bus.clients import ClientProcesses
from llmosd.bus.router import Router
from llmosd.control.eventlog import EventLog
from llmosd.control.machine import About
from llmosd.control.server import ControlServer
from llmosd.declared import DeclarationError
from llmosd.held import HeldFile
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.kernel import Kernel
from llmosd.kernel.params import Params
from llmosd.listen import HttpSocket
from llmosd.machine import LocalMachine
from llmosd.modelfile import ModelDirectory
from llmosd.node.confine.process import ProcessConfinement
from llmosd.node.devices import take_inventory
from llmosd.node.node import Node
from llmosd.programs import GATEWAY, Programs, gateway_spec
from llmosd.runtime import hold, ticket_key
from llmosd.settings import Directories, Settings

log = logging.getLogger("llmosd")

#: Seconds that control calls under way have at the end.
_CONTROL_GRACE_S: Final = 1.0
#: The call number of commands whose answer nobody waits for.
_NO_CALL: Final = 0


class Daemon:
    """One daemon. `start`, then `run` until it is told to stop, then `close`."""

    def __init__(self, directories: Directories, settings: Settings) -> None:
        self._directories = directories
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[on.Event] = deque()
        self._handling = False
        self._resuming = False
        self._faults = 0
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._down = asyncio.Event()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = hold(directories.runtime)
        self._held = HeldFile(directories.runtime / "held.json")
        now = time.monotonic()
        s = settings.scheduler
        self.kernel = Kernel(
            Params(
                epoch=int(now * 1000),
                seed=int.from_bytes(os.urandom(8), "big"),
                ticket_key=ticket_key(directories.runtime),
                placement=s.placement,
                body_max=int(s.body_max),
                window=s.window,
                answer_max=int(s.answer_max),
                resume_timeout=float(s.resume_timeout),
                requests_max=s.requests_max,
            )
        )
        sockets = self._passed = notify.passed_sockets()
        self._http = HttpSocket(settings.gateway.listen, sockets.get("http", -1)) if settings.gateway.enabled else None
        self.events = EventLog(first=int(time.time() * 1000))
        programs = Programs(directories, settings, self._http)
        self.node = Node(
            directories.runtime, directories.logs, settings.logs.max_size, ProcessConfinement(),
            self.feed, self._warn, programs.program,
        )  # fmt: skip
        self._clients = ClientProcesses(lambda peer, why: self.feed(on.ClientLost(peer, why)))
        self._context = zmq.Context()
        self._front = Router(
            self._context, directories.front, f.CLIENT_TO_DAEMON, s.body_max,
            lambda peer, message: self.feed(on.ClientSaid(peer, message)),
            on_unreachable=lambda peer: self.feed(on.ClientUnreachable(peer)),
            on_new_peer=lambda peer, uid, pid: self.feed(on.ClientIdentified(peer, uid, pid)),
            fd=sockets.get("front", -1),
        )  # fmt: skip
        self._back = Router(
            self._context, directories.back, f.WORKER_TO_DAEMON, s.answer_max,
            lambda peer, message: self.feed(on.WorkerSaid(peer, message)),
            on_unreachable=lambda peer: None,  # its pidfd tells when it is gone; its HELLO when it is back
            fd=sockets.get("back", -1),
        )  # fmt: skip
        for name in {"front", "back"} - set(sockets):
            (directories.runtime / f"{name}.sock").chmod(0o660)
        self.machine = LocalMachine(
            self.kernel, self.node, self.feed, self.events, self._about(), ModelDirectory(directories.models),
            directories.state / "limits",
        )  # fmt: skip
        self.machine.counts += [
            lambda: dict(self._front.counts + self._back.counts),
            lambda: {"faults": self._faults},
        ]
        self._control = ControlServer(self.machine, directories.control)
        self._carry = self._carriers()

    # -- life -----------------------------------------------------------------------------------------------

    async def start(self) -> list[str]:
        """Adopt who lives, read the model files, and serve. Returns what is wrong with which file.

        Raises DeclarationError when there is no listening on gateway.listen.
        """
        self.node.open()
        # First: what is held must not be started by a model file, and is ended where it lives.
        self.feed(self._held.read())
        survivors = await self.node.find_survivors()
        if self._http is not None:
            if not any(event.spec.model == GATEWAY for event in survivors):
                self._open_http(self._http)
            self.feed(on.Apply(_NO_CALL, self.machine.overridden(gateway_spec(self._settings))))
        _, _, refused = await self.machine.reload()
        for event in survivors:
            self.feed(event)
        inventory = await asyncio.to_thread(take_inventory)
        self.feed(on.Counted(inventory.capacity(int(self._settings.node.reserve_memory))))
        # Not before: a client that comes back would be told that its model does not exist.
        self._back.serve()
        self._front.serve()
        await self._control.start()
        for number, what in ((signal.SIGTERM, self.stop), (signal.SIGINT, self.stop), (signal.SIGHUP, self._reload)):
            self._loop.add_signal_handler(number, what)
        notify.notify(f"READY=1\nSTATUS=serving {len(self.kernel.models())} models")
        if (every := notify.watchdog_s()) is not None:
            self._spawn_task(self._sign_of_life(every))
        return refused

    async def run(self) -> None:
        """Serve until `stop`, then end every worker in order, within the time that the settings allow."""
        await self._stop.wait()
        notify.notify("STOPPING=1")
        log.info("stopping: ending all workers")
        self.feed(on.ShutDown(float(self._settings.node.stop_timeout)))
        try:
            await asyncio.wait_for(self._down.wait(), self._settings.node.stop_timeout)
        except TimeoutError:
            left = [view.name for view in self.kernel.workers() if view.pid]
            log.error("these workers did not end in time and live on: %s", ", ".join(left))

    def stop(self) -> None:
        self._stop.set()

    async def close(self) -> None:
        """Let go of everything that is open."""
        await self._control.stop(_CONTROL_GRACE_S)
        for task in self._tasks:
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        await self.node.close()
        self._clients.close()
        self._front.close()
        self._back.close()
        self._context.term()
        if self._http is not None:
            self._http.close()
        for name in {"front", "back"} - set(self._passed):
            (self._directories.runtime / f"{name}.sock").unlink(missing_ok=True)
        os.close(self._lock)

    # -- the loop around the kernel -------------------------------------------------------------------------

    def feed(self, event: on.Event) -> None:
        """Give the kernel an event and carry out what it answers. What that causes waits its turn: one at a time."""
        self._inbox.append(event)
        if self._handling:
            return
        self._handling = True
        while self._inbox:
            one = self._inbox.popleft()
            try:
                effects = self.kernel.handle(one, time.monotonic())
            except Exception:  # a fault of ours costs this event, not the workers and everybody's requests
                log.exception("the kernel failed on %s", type(one).__name__)
                self._faults += 1
                continue
            for effect in effects:
                try:
                    self._carry[type(effect)](effect)
                except Exception:  # likewise this effect, not those after it
                    log.exception("%s could not be carried out", type(effect).__name__)
                    self._faults += 1
        self._handling = False
        self._arm()

    def _arm(self) -> None:
        due = self.kernel.deadline()
        if due is None:
            return
        # An early tick is harmless and cheaper than a new timer for each event.
        when = self._loop.time() + max(0.0, due - time.monotonic())
        if self._timer is not None:
            # Not the handle's own `when`: uvloop's for a moment that is now has none.
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.feed(on.Tick())

    def _carriers(self) -> dict[type[do.Effect], Callable[[Any], None]]:
        return {
            do.ToClient: self._to_client,
            do.ToWorker: self._to_worker,
            do.Spawn: self.node.spawn,
            do.Signal: self.node.signal,
            do.KillGroup: self.node.kill_group,
            do.Freeze: self.node.freeze,
            do.Confine: self.node.confine,
            do.WatchClient: lambda effect: self._clients.watch(effect.peer, effect.pid),
            do.UnwatchClient: lambda effect: self._front.forget(effect.peer),
            do.KeepHeld: self._keep_held,
            do.Replied: self.machine.replied,
            do.Happened: self._happened,
            do.AllDown: lambda effect: self._down.set(),
        }

    def _to_client(self, effect: do.ToClient) -> None:
        self._front.send(effect)
        self._resume_soon()

    def _to_worker(self, effect: do.ToWorker) -> None:
        self._back.send(effect)
        self._resume_soon()

    def _resume_soon(self) -> None:
        """Look for messages whose wake-up a send has eaten: once for all that this iteration of the loop sends."""
        if not self._resuming:
            self._resuming = True
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._resuming = False
        self._front.resume()
        self._back.resume()

    def _keep_held(self, effect: do.KeepHeld) -> None:
        try:
            self._held.keep(effect)
        except OSError as error:
            held = ", ".join((*effect.models, *effect.workers)) or "nothing"
            self._warn("llmosd", f"cannot keep in {self._held.path} that {held} is stopped by operators: {error}")

    def _happened(self, effect: do.Happened) -> None:
        self.events.append(effect, time.time())
        log.info("%s %s%s", effect.subject, effect.kind, f": {effect.message}" if effect.message else "")

    def _warn(self, worker: str, sentence: str) -> None:
        log.warning("%s: %s", worker, sentence)
        self.events.append(do.Happened("warning", worker, sentence), time.time())

    # -- odds and ends --------------------------------------------------------------------------------------

    def _reload(self) -> None:
        async def reload() -> None:
            notify.notify(f"RELOADING=1\nMONOTONIC_USEC={int(time.monotonic() * 1e6)}")
            applied, removed, refused = await self.machine.reload()
            log.info("reloaded: %d models, %d removed", len(applied), len(removed))
            for line in refused:
                log.error("refused: %s", line)
            notify.notify("READY=1")

        self._spawn_task(reload())

    async def _sign_of_life(self, every_s: float) -> None:
        while True:
            notify.notify("WATCHDOG=1")
            await asyncio.sleep(every_s)

    def _open_http(self, http: HttpSocket) -> None:
        try:
            http.fileno()
        except OSError as error:
            raise DeclarationError(str(error)) from None

    def _about(self) -> About:
        directories = self._directories
        return About(
            version=__version__,
            user=getpass.getuser(),
            confinement=self.node.confinement.name,
            models_directory=directories.models,
            runtime_directory=directories.runtime,
            log_directory=directories.logs,
            bus_address=directories.front,
            gateway_url=self._http.url if self._http is not None else "",
        )

    def _spawn_task(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
