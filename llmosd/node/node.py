"""The node: carries out the kernel's effects on this machine's processes, and tells what happened as events.

One `Life` a worker's life; here are the lives that are, and those of an earlier daemon.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from llmosd.failpoint import failpoint
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.spec import Limits
from llmosd.launch.reap import adopt_orphans
from llmosd.node import records
from llmosd.node.confine import Confinement
from llmosd.node.confine.choice import Maker
from llmosd.node.counters import Counters
from llmosd.node.groups import Group, mark_of
from llmosd.node.life import Birth, Life, Program
from llmosd.node.logwriter import LogWriter
from llmosd.node.oomlog import OomLog
from llmosd.node.printed import size_of
from llmosd.node.probes import Probes
from llmosd.node.records import Record
from llmosd.node.strays import Strays
from llmosd.node.watch import Watch

T = TypeVar("T")
_IDENTITY_BYTES: Final = 16
_TOKEN_BYTES: Final = 32


class Node:
    """See the module. `emit` tells the kernel; `warn` tells people: (worker, sentence)."""

    def __init__(
        self,
        name: str,
        maker: Maker,
        runtime: Path,
        logs: LogWriter,
        emit: Callable[[on.Event], None],
        warn: Callable[[str, str], None],
        program: Callable[[do.Spawn, Birth, Confinement], Program],
    ) -> None:
        """`name`: of this daemon on this machine."""
        self.confinement, self.groups = maker
        self._name = name
        #: Children of this process that are nobody's worker, and their starter's to wait for.
        self.helpers: set[int] = set()
        self._records = runtime / "workers"
        self._scratch = runtime / "scratch"
        self.logs = logs
        logs.set_apart = lambda pid: self.groups.set_apart("log-writer", pid)
        self._emit = emit
        self._warn = warn
        self._program = program
        self._lives: dict[str, Life] = {}
        self._strays = Strays(self.groups, warn, self._in_thread)
        self._limits: dict[str, Limits] = {}
        self._oom = OomLog()
        self._executor = ThreadPoolExecutor(max_workers=16, thread_name_prefix="node")
        #: For what may wait for systemd, or for processes to go: no kill is to stand behind it.
        self._patient = ThreadPoolExecutor(max_workers=16, thread_name_prefix="node-waits")
        self._tasks: set[asyncio.Task[None]] = set()
        self._probes = Probes(emit, self._executor)
        #: The regular look at what they use.
        self.watch = Watch(self._lives, self._limits, maker, self._leaders, emit, self._in_thread)
        adopt_orphans()

    def open(self) -> None:
        """Make the directories and begin to look at the workers."""
        self._records.mkdir(mode=0o700, exist_ok=True)
        self._scratch.mkdir(mode=0o700, exist_ok=True)
        self.groups.sweep()
        self._spawn_task(self.watch.run())

    async def close(self) -> None:
        """Let go of everything; the workers live on."""
        for task in self._tasks:
            task.cancel()
        await self._probes.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.logs.close()
        self.groups.close()
        self._oom.close()
        for executor in (self._executor, self._patient):
            executor.shutdown(wait=False, cancel_futures=True)

    # -- effects --------------------------------------------------------------------------------------------

    def spawn(self, effect: do.Spawn) -> None:
        # The first byte of a ZeroMQ identity must not be 0: those are libzmq's own.
        identity = b"\x01" + os.urandom(_IDENTITY_BYTES - 1)
        scratch = self._scratch / effect.worker
        mark = self._mark(effect.worker, effect.incarnation)
        output = self.logs.output(effect.worker, effect.spec.model)
        birth = Birth(identity, os.urandom(_TOKEN_BYTES), mark, scratch, output, size_of(output.path))
        life = self._life(effect, birth)
        self._limits[effect.worker] = effect.limits
        self._spawn_task(self._begin(life, effect))

    async def _begin(self, life: Life, effect: do.Spawn) -> None:
        await self._strays.gone(effect.worker)
        try:
            # In a thread: a user's account, or a path that it names, may be a server's to tell.
            program = await self._in_thread(lambda: self._program(effect, life.birth, self.confinement))
        except (OSError, ValueError) as error:
            life.refuse(on.SpawnFailed(effect.worker, effect.incarnation, "prepare", str(error), permanent=True))
            return
        await life.begin(effect, program)

    def signal(self, effect: do.Signal) -> None:
        if (life := self._current(effect.worker, effect.incarnation)) is not None:
            life.signal(effect.signal, stops=effect.stops)

    def kill_group(self, effect: do.KillGroup) -> None:
        if (life := self._current(effect.worker, effect.incarnation)) is not None:
            life.kill()

    def probe(self, effect: do.Probe) -> None:
        if (life := self._current(effect.worker, effect.incarnation)) is not None:
            self._probes.begin(effect, life)

    def note_draining(self, effect: do.NoteDraining) -> None:
        if (life := self._current(effect.worker, effect.incarnation)) is not None:
            self._spawn_task(life.note(draining=True))

    def freeze(self, effect: do.Freeze) -> None:
        if (life := self._current(effect.worker, effect.incarnation)) is not None:
            self._spawn_task(self._freeze(life, effect.frozen))

    def confinement_of(self, worker: str) -> Confinement:
        """Who sees to a worker's limits, or to those of one to come."""
        life = self._lives.get(worker)
        return self.confinement if life is None else self.confinement.beside(life.group.held)

    async def counters(self, worker: str) -> Counters:
        """What the kernel of the machine counts of a worker's group now."""
        life = self._lives.get(worker)
        return Counters() if life is None else await self._in_thread(life.group.counters)

    async def _freeze(self, life: Life, frozen: bool) -> None:
        try:
            await self._in_thread(lambda: life.group.freeze(frozen))
        except OSError as error:
            self._warn(life.worker, f"cannot {'freeze' if frozen else 'thaw'} its processes: {error}")

    def confine(self, effect: do.Confine) -> None:
        if (life := self._current(effect.worker, effect.incarnation)) is not None:
            before, self._limits[effect.worker] = self._limits.get(effect.worker), effect.limits
            self._spawn_task(self._confine(life, effect, before))

    async def _confine(self, life: Life, effect: do.Confine, before: Limits | None) -> None:
        limits = effect.limits

        def apply() -> list[str]:
            pids = [life.pid, *(pid for pid in life.group.members() if pid != life.pid)]
            rest = self.confinement.beside(life.group.held)
            return life.group.limit(limits, before) + rest.apply(pids, limits, before)

        async with life.confining:
            await life.note(limits=limits, grant=effect.grant)
            for sentence in await asyncio.get_running_loop().run_in_executor(self._patient, apply):
                self._warn(life.worker, sentence)

    # -- adoption -------------------------------------------------------------------------------------------

    async def find_survivors(self) -> list[on.Adopted]:
        """Take over the workers of the daemon's earlier life, those among them that have died meanwhile, and end
        what is ours and on no record.

        A process that cannot be verified is left alone and warned of: "cannot verify" is not "gone". Its host ends by
        itself: no daemon answers it.
        """
        adopted = []
        known: set[str] = set()
        for path in sorted(self._records.glob("*.json")):
            try:
                record = records.read(path)
                known.add(self._mark(record.worker, record.incarnation))
                event = self._take_over(record)
            except records.RecordError as error:
                path.replace(path.with_suffix(".damaged"))
                self._warn(path.stem, f"its record cannot be read and was set aside: {error}")
                continue
            except PermissionError as error:
                self._warn(path.stem, f"its process cannot be verified, and is left alone: {error}")
                continue
            if event is not None:
                adopted.append(event)
        await self._strays.end(known)
        return adopted

    def _take_over(self, record: Record) -> on.Adopted | None:
        mark = self._mark(record.worker, record.incarnation)
        output, scratch = self.logs.output(record.worker, record.spec.model), self._scratch / record.worker
        birth = Birth(record.identity, record.token, mark, scratch, output, record.log_start)
        if record.boot_id != records.boot_id():
            records.remove(self._records, record.worker)
            return None
        failpoint("adopt.read")
        group = self.groups.known(record, mark)
        life = self._new_life(record.worker, record.incarnation, group, birth)
        pidfd = records.open_process(record.pid, record.start_ticks)
        self._keep(life)
        self._limits[record.worker] = record.limits
        ended, detail = None, ""
        if pidfd is None:
            ended, detail = life.take_over_remains(record)
        else:
            life.take_over(record, pidfd)
        failpoint("adopt.taken")
        return on.Adopted(
            worker=record.worker,
            incarnation=record.incarnation,
            pid=record.pid,
            peer=record.identity,
            token=record.token,
            spec=record.spec,
            grant=record.grant,
            limits=record.limits,
            started_at=record.started_at,
            stopping=record.stopping,
            frozen=ended is None and group.is_frozen(),
            ready=record.ready,
            draining=record.draining,
            ended=ended,
            detail=detail,
        )

    # -- lives ----------------------------------------------------------------------------------------------

    def _mark(self, worker: str, incarnation: int) -> str:
        return mark_of(self._name, worker, incarnation)

    def _life(self, effect: do.Spawn, birth: Birth) -> Life:
        worker, incarnation = effect.worker, effect.incarnation
        group = self.groups.new(worker, incarnation, birth.mark, effect.limits)
        return self._keep(self._new_life(worker, incarnation, group, birth))

    def _new_life(self, worker: str, incarnation: int, group: Group, birth: Birth) -> Life:
        return Life(
            worker, incarnation, group, self._records, birth, self._emit, self._executor, self._patient, self._oom
        )  # fmt: skip

    def _keep(self, life: Life) -> Life:
        self._lives[life.worker] = life
        if not life.group.exact:
            life.end_orphans = self.watch.kill_strays
        life.on_empty = lambda: self._gone(life)
        life.warn = self._warn
        return life

    def _gone(self, life: Life) -> None:
        self._probes.end(life.worker)
        if self._lives.get(life.worker) is life:
            del self._lives[life.worker]
            self.watch.forget(life.worker)

    def _leaders(self) -> set[int]:
        """The children of this process that somebody waits for."""
        return self.helpers | {self.logs.pid} | {life.pid for life in list(self._lives.values())}

    def _current(self, worker: str, incarnation: int) -> Life | None:
        life = self._lives.get(worker)
        return life if life is not None and life.incarnation == incarnation else None

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def _spawn_task(self, coroutine: Coroutine[None, None, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
