"""The composition root: builds the parts, and runs the loop around the kernel.

Whatever happens becomes an event; the kernel answers with effects; they are carried out here, each by the part whose
work it is. Nothing blocks on this loop, and no part knows another.
"""

from __future__ import annotations

import asyncio
import enum
import getpass
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any, Final

from llmosd import __version__, notify, upgrade
from llmosd.bus.bus import Bus
from llmosd.control.eventlog import EventLog
from llmosd.control.machine import About
from llmosd.control.server import ControlServer
from llmosd.declared import DeclarationError
from llmosd.failpoint import failpoint
from llmosd.held import HeldFile
from llmosd.isolation import Isolator
from llmosd.isolationcheck import IsolationCheck
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.kernel import Kernel
from llmosd.kernel.params import Params
from llmosd.listen import BusSocket, HttpSocket, http_socket
from llmosd.loop import KernelLoop
from llmosd.machine import LocalMachine
from llmosd.modelfile import ModelDirectory
from llmosd.node.confine.choice import Maker
from llmosd.node.devices import take_inventory
from llmosd.node.logwriter import LogWriter
from llmosd.node.node import Node
from llmosd.programs import GATEWAY, Programs, gateway_spec
from llmosd.runtime import daemon_name, ticket_key
from llmosd.settings import Directories, Settings
from llmosd.upgrade import SIGNALS, Kept, hold_signals, let_signals_through

log = logging.getLogger("llmosd")

#: Seconds that control calls under way have at the end.
_CONTROL_GRACE_S: Final = 1.0
#: The call number of commands whose answer nobody waits for.
_NO_CALL: Final = 0


class End(enum.Enum):
    """Why a daemon ends, and so what becomes of the workers."""

    STOP = enum.auto()  # they end too, in order
    LEAVE = enum.auto()  # they live on, for the daemon that comes next
    UPGRADE = enum.auto()  # likewise, and that daemon is this process


class Daemon:
    """One daemon. `start`, then `run` until it is told to stop, then `close`."""

    def __init__(self, directories: Directories, settings: Settings, maker: Maker, kept: Kept | None) -> None:
        """`kept`: what this process's earlier program left open. Raises OSError where the bus cannot listen."""
        self._directories = directories
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._down = asyncio.Event()
        self._ending = asyncio.Event()
        self._how = End.STOP
        self._tasks: set[asyncio.Task[Any]] = set()
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
        self._kernel_loop = KernelLoop(self.kernel)
        self.feed = self._kernel_loop.feed
        passed = notify.passed_sockets()
        kept = kept or Kept(
            http=passed.get("http", -1), front=passed.get("front", -1), back=passed.get("back", -1),
            systemds="front" in passed, http_systemds="http" in passed,
        )  # fmt: skip
        self._kept = kept
        self._http = http_socket(settings.gateway.enabled, settings.gateway.listen, kept)
        runtime = directories.runtime
        self._front_socket = BusSocket(runtime / "front.sock", kept.front, systemds=kept.systemds)
        self._back_socket = BusSocket(runtime / "back.sock", kept.back, systemds=kept.systemds)
        self.events = EventLog(first=int(time.time() * 1000))
        self._isolator = Isolator(directories)
        programs = Programs(directories, settings, self._http, self._isolator)
        logs = LogWriter(
            directories.logs, directories.runtime / "logs.sock", int(settings.logs.max_size),
            to_journal=notify.to_journal(settings.logs.journal), warn=log.warning,
        )  # fmt: skip
        self.node = Node(
            daemon_name(directories.runtime), maker, directories.runtime, logs, self.feed, self._warn, programs.program,
        )  # fmt: skip
        self._isolation = IsolationCheck(directories, self._isolator, self.node.helpers)
        self._bus = Bus(
            directories.front, directories.back, self._front_socket.duplicate(), self._back_socket.duplicate(),
            settings.scheduler.body_max, settings.scheduler.answer_max, self.feed,
        )  # fmt: skip
        self.machine = LocalMachine(
            self.kernel, self.node, self.feed, self.events, self._about(), ModelDirectory(directories.models),
            directories.state / "limits", self._isolation, self.upgrade,
        )  # fmt: skip
        self.machine.counts += [
            self._bus.counts,
            lambda: {"faults": self._kernel_loop.faults},
            self.node.logs.counts,
        ]
        self._control = ControlServer(self.machine, directories.control)
        self._kernel_loop.carriers = self._carriers()

    # -- life -----------------------------------------------------------------------------------------------

    async def start(self) -> list[str]:
        """Adopt who lives, read the model files, and serve. Returns what is wrong with which file.

        Raises DeclarationError when there is no listening on gateway.listen.
        """
        self.node.open()
        # First: what is held must not be started by a model file, and is ended where it lives.
        self.feed(self._held.read())
        survivors = await self.node.find_survivors()
        for event in survivors:
            self._admit(event)
        if self._http is not None:
            if not any(event.spec.model == GATEWAY and event.ended is None for event in survivors):
                self._open_http(self._http)
            gateway = gateway_spec(self._settings, self._http.health_url)
            self.feed(on.Apply(_NO_CALL, self.machine.overridden(gateway)))
        _, _, refused = await self.machine.reload()
        for event in survivors:
            self.feed(event)
        inventory = await asyncio.to_thread(take_inventory)
        self.feed(on.Counted(inventory.capacity(int(self._settings.node.reserve_memory))))
        # Not before: a client that comes back would be told that its model does not exist.
        self._bus.serve()
        await self._control.start()
        self._loop.add_signal_handler(signal.SIGTERM, lambda: self._spawn_task(self._terminated()))
        self._loop.add_signal_handler(signal.SIGINT, self.end, End.STOP)
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        let_signals_through(self._kept)
        notify.notify(f"READY=1\nSTATUS=serving {len(self.kernel.models())} models")
        if (every := notify.watchdog_s()) is not None:
            self._spawn_task(self._sign_of_life(every))
        return refused

    async def run(self) -> End:
        """Serve until `end`. To stop is to end every worker in order, within the time that the settings allow."""
        await self._ending.wait()
        end = self._how
        if end is End.UPGRADE:
            notify.notify(_reloading() + "\nSTATUS=upgrading")
            log.info("upgrading: the program is replaced")
            return end
        notify.notify("STOPPING=1")
        if end is End.LEAVE:
            log.info("ends, and leaves the workers to the daemon that comes next")
            return end
        log.info("stopping: ending all workers")
        self.feed(on.ShutDown(float(self._settings.node.stop_timeout)))
        try:
            await asyncio.wait_for(self._down.wait(), self._settings.node.stop_timeout)
        except TimeoutError:
            left = [view.name for view in self.kernel.workers() if view.pid]
            log.error("these workers did not end in time and live on: %s", ", ".join(left))
        return end

    def end(self, how: End) -> None:
        if not self._ending.is_set() or self._how is End.UPGRADE:  # whoever wants it gone wants no new program
            self._how = how
            self._ending.set()

    async def _terminated(self) -> None:
        """SIGTERM. systemd sends it to stop the service for good, and also to start it anew, as an update of a library
        does; then the workers stay. Also where it does not say which: a worker that should go can still be ended."""
        job = await asyncio.to_thread(notify.job_under_way, self.node.helpers)
        self.end(End.STOP if job in (None, "stop") else End.LEAVE)

    async def upgrade(self) -> str:
        """Begin to replace this program by the one that is installed now; returns its version. Raises NotUpgraded."""
        version = await asyncio.to_thread(upgrade.check, self.node.helpers)
        failpoint("upgrade.checked")
        self._loop.call_soon(self.end, End.UPGRADE)  # the answer goes out first
        return version

    async def close(self, *, keep: bool = False) -> Kept:
        """Let go of everything that is open, but for what to `keep` for this process's next program."""
        if keep:
            for number in SIGNALS:
                self._loop.remove_signal_handler(number)
            hold_signals()
        await self._control.stop(_CONTROL_GRACE_S)
        for task in self._tasks:
            task.cancel()
        self._kernel_loop.close()
        await self.node.close()
        self._bus.close()
        if keep:
            http = self._http.fileno() if self._http is not None and self._http.is_open else -1
            front, back = self._front_socket.fileno(), self._back_socket.fileno()
            return Kept(
                http=http, front=front, back=back, systemds=not self._front_socket.is_ours,
                http_systemds=self._kept.http_systemds, listen=self._settings.gateway.listen,
            )  # fmt: skip
        for one in (self._http, self._front_socket, self._back_socket):
            if one is not None:
                one.close()
        return Kept()

    # -- effects --------------------------------------------------------------------------------------------

    def _carriers(self) -> dict[type[do.Effect], Callable[[Any], None]]:
        return {
            do.ToClient: self._bus.to_client,
            do.ToWorker: self._bus.to_worker,
            do.Spawn: self.node.spawn,
            do.Signal: self.node.signal,
            do.NoteDraining: self.node.note_draining,
            do.KillGroup: self.node.kill_group,
            do.Freeze: self.node.freeze,
            do.Probe: self.node.probe,
            do.Confine: self.node.confine,
            do.WatchClient: self._bus.watch_client,
            do.UnwatchClient: self._bus.unwatch_client,
            do.KeepHeld: self._keep_held,
            do.Replied: self.machine.replied,
            do.Happened: self._happened,
            do.AllDown: lambda effect: self._down.set(),
        }

    def _keep_held(self, effect: do.KeepHeld) -> None:
        try:
            self._held.keep(effect)
        except OSError as error:
            held = ", ".join((*effect.models, *effect.workers)) or "nothing"
            self._warn("llmosd", f"cannot keep in {self._held.path} that {held} is stopped by operators: {error}")

    def _happened(self, effect: do.Happened) -> None:
        self.events.append(effect, time.time())
        message = f": {effect.message}" if effect.message else ""
        log.info("%s %s%s", effect.subject, effect.kind, message, extra=notify.fields(effect.subject, effect.model))

    def _warn(self, worker: str, sentence: str) -> None:
        log.warning("%s: %s", worker, sentence, extra=notify.fields(worker))
        self.events.append(do.Happened("warning", worker, sentence), time.time())

    # -- odds and ends --------------------------------------------------------------------------------------

    def _reload(self) -> None:
        async def reload() -> None:
            notify.notify(_reloading())
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

    def _admit(self, survivor: on.Adopted) -> None:
        """The back socket is a new one: let a worker's own user in to it."""
        self._isolation.remember(survivor.spec)
        try:
            self._isolator.admit(survivor.spec.isolation)
        except (OSError, ValueError) as error:
            self._warn(survivor.worker, f"it cannot come back: {error}")

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


def _reloading() -> str:
    """systemd waits for the next READY=1 (sd_notify(3))."""
    return f"RELOADING=1\nMONOTONIC_USEC={int(time.monotonic() * 1e6)}"
