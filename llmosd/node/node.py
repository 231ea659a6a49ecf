"""The node: carries out the kernel's effects on this machine's processes, and tells what happened as events.

One `Life` a worker's life; here are the lives that are, those of an earlier daemon, and the regular look at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec

from llmosd.failpoint import failpoint
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.spec import Limits
from llmosd.launch.reap import adopt_orphans, children, reap_orphans
from llmosd.node import records
from llmosd.node.confine import Confinement
from llmosd.node.groups import Groups, signal_process
from llmosd.node.life import Birth, Life, Program
from llmosd.node.records import Record
from llmosd.node.strays import Strays
from llmosd.node.usage import CpuMeter, Usage, sample

#: Seconds between two looks at what the workers use.
SAMPLE_S: Final = 2.0
#: Workers that one hand-over to a thread looks at; between two the loop has its turn.
_LOOKED_AT_ONCE: Final = 32
#: What a stray has forked becomes our child, and is killed, in the round after it.
_STRAY_ROUNDS: Final = 100
#: Seconds in which the loop has noted the number of a child that it has just spawned.
_KNOWN_WITHIN_S: Final = 0.02
T = TypeVar("T")
_IDENTITY_BYTES: Final = 16
_TOKEN_BYTES: Final = 32


class Measured(msgspec.Struct, frozen=True):
    """What a worker used when it was last looked at."""

    usage: Usage = Usage()
    #: Percent of one CPU since the look before.
    cpu_percent: float = 0.0


class Look(NamedTuple):
    """What a look at one worker showed."""

    life: Life
    usage: Usage
    #: The limit that it passes, as a sentence; empty: none.
    over: str


class Node:
    """See the module. `emit` tells the kernel; `warn` tells people: (worker, sentence)."""

    def __init__(
        self,
        runtime: Path,
        logs: Path,
        log_max_bytes: int,
        confinement: Confinement,
        emit: Callable[[on.Event], None],
        warn: Callable[[str, str], None],
        program: Callable[[do.Spawn, Birth, Confinement], Program],
    ) -> None:
        self.confinement = confinement
        self.groups = Groups(f"llmosd-{hashlib.sha256(str(runtime).encode()).hexdigest()[:12]}")
        self.measured: dict[str, Measured] = {}
        self._records = runtime / "workers"
        self._scratch = runtime / "scratch"
        self._logs = logs
        self._log_max_bytes = log_max_bytes
        self._emit = emit
        self._warn = warn
        self._program = program
        self._lives: dict[str, Life] = {}
        self._strays = Strays(self.groups, warn, self._in_thread)
        self._limits: dict[str, Limits] = {}
        self._meters: dict[str, CpuMeter] = {}
        self._executor = ThreadPoolExecutor(max_workers=16, thread_name_prefix="node")
        self._tasks: set[asyncio.Task[None]] = set()
        adopt_orphans()

    def open(self) -> None:
        """Make the directories and begin to look at the workers."""
        self._records.mkdir(mode=0o700, exist_ok=True)
        self._scratch.mkdir(mode=0o700, exist_ok=True)
        self.groups.sweep()
        self._spawn_task(self._watch())

    async def close(self) -> None:
        """Let go of everything; the workers live on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.groups.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def log_file(self, worker: str) -> Path:
        return self._logs / f"{worker}.log"

    # -- effects --------------------------------------------------------------------------------------------

    def spawn(self, effect: do.Spawn) -> None:
        # The first byte of a ZeroMQ identity must not be 0: those are libzmq's own.
        identity = b"\x01" + os.urandom(_IDENTITY_BYTES - 1)
        scratch = self._scratch / effect.worker
        mark = self.groups.mark(effect.worker, effect.incarnation)
        birth = Birth(identity, os.urandom(_TOKEN_BYTES), mark, scratch, self.log_file(effect.worker))
        life = self._life(effect.worker, effect.incarnation, birth)
        self._limits[effect.worker] = effect.limits
        try:
            program = self._program(effect, birth, self.confinement)
        except (OSError, ValueError) as error:
            self._gone(life)
            self._emit(on.SpawnFailed(effect.worker, effect.incarnation, "prepare", str(error), permanent=True))
            return
        self._spawn_task(self._begin(life, effect, program))

    async def _begin(self, life: Life, effect: do.Spawn, program: Program) -> None:
        await self._strays.gone(effect.worker)
        await life.begin(effect, program)
        limits = self._limits.get(effect.worker, effect.limits)
        if limits != effect.limits and self._current(effect.worker, effect.incarnation) is life:
            # Changed while it was being started: it began with the old ones, on record too.
            life.note_limits(limits)
            await self._confine(life, limits, effect.limits)

    def signal(self, effect: do.Signal) -> None:
        if (life := self._current(effect.worker, effect.incarnation)) is not None:
            life.signal(effect.signal, stops=effect.stops)

    def kill_group(self, effect: do.KillGroup) -> None:
        if (life := self._current(effect.worker, effect.incarnation)) is not None:
            life.kill()

    def note_draining(self, effect: do.NoteDraining) -> None:
        if (life := self._current(effect.worker, effect.incarnation)) is not None:
            life.note_draining()

    def freeze(self, effect: do.Freeze) -> None:
        if (life := self._current(effect.worker, effect.incarnation)) is not None:
            self._spawn_task(self._freeze(life, effect.frozen))

    async def _freeze(self, life: Life, frozen: bool) -> None:
        try:
            await self._in_thread(lambda: life.group.freeze(frozen))
        except OSError as error:
            self._warn(life.worker, f"cannot {'freeze' if frozen else 'thaw'} its processes: {error}")

    def confine(self, effect: do.Confine) -> None:
        life = self._current(effect.worker, effect.incarnation)
        if life is not None:
            before, self._limits[effect.worker] = self._limits.get(effect.worker), effect.limits
            life.note_limits(effect.limits)
            if life.pid:
                self._spawn_task(self._confine(life, effect.limits, before))

    async def _confine(self, life: Life, limits: Limits, before: Limits | None) -> None:
        def apply() -> list[str]:
            pids = [life.pid, *(pid for pid in life.group.members() if pid != life.pid)]
            return self.confinement.apply(pids, limits, before)

        for sentence in await self._in_thread(apply):
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
                known.add(self.groups.mark(record.worker, record.incarnation))
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
        mark = self.groups.mark(record.worker, record.incarnation)
        birth = Birth(record.identity, record.token, mark, self._scratch / record.worker, self.log_file(record.worker))
        if record.boot_id != records.boot_id():
            records.remove(self._records, record.worker)
            return None
        failpoint("adopt.read")
        group = self.groups.known(record)
        life = Life(record.worker, record.incarnation, group, self._records, birth, self._emit, self._executor)
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
            draining=record.draining,
            ended=ended,
            detail=detail,
        )

    # -- looking --------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            await self._in_thread(lambda: reap_orphans(self._is_leader))
            if self.groups.cgroup_base is None:
                await self._in_thread(self._kill_strays)
            lives = [life for life in self._lives.values() if life.pid]
            for start in range(0, len(lives), _LOOKED_AT_ONCE):
                for look in await self._in_thread(partial(self._look_at, lives[start : start + _LOOKED_AT_ONCE])):
                    self._note(look)

    def _kill_strays(self) -> None:
        """Whoever became our child outlived its leader, and has shed everything by which its group could find it."""
        for _ in range(_STRAY_ROUNDS):
            seen = [pid for pid in children() if not self._is_leader(pid)]
            if not seen:
                return
            time.sleep(_KNOWN_WITHIN_S)
            for pid in seen:
                if not self._is_leader(pid):
                    signal_process(pid, signal.SIGKILL)
            reap_orphans(self._is_leader)

    def _is_leader(self, pid: int) -> bool:
        return any(life.pid == pid for life in list(self._lives.values()))

    def _look_at(self, lives: list[Life]) -> list[Look]:
        """One thread's work for several workers: handing it over costs more than looking at one that is idle."""
        looks = []
        for life in lives:
            usage = sample(life.group.members())
            limits = self._limits[life.worker]
            over = self.confinement.over_limit(limits, usage)
            if over:
                # Cheap figures may count shared pages twice: look closely before anything is killed.
                over = self.confinement.over_limit(limits, sample(life.group.members(), exact=True))
            _cap(life.birth.log_file, self._log_max_bytes)
            looks.append(Look(life, usage, over))
        return looks

    def _note(self, look: Look) -> None:
        life = look.life
        if self._lives.get(life.worker) is not life:
            return  # it ended meanwhile
        meter = self._meters.setdefault(life.worker, CpuMeter())
        self.measured[life.worker] = Measured(look.usage, meter.update(look.usage, time.monotonic()))
        if look.over:
            self._emit(on.OverLimit(life.worker, life.incarnation, look.over))

    # -- lives ----------------------------------------------------------------------------------------------

    def _life(self, worker: str, incarnation: int, birth: Birth) -> Life:
        group = self.groups.new(worker, incarnation)
        return self._keep(Life(worker, incarnation, group, self._records, birth, self._emit, self._executor))

    def _keep(self, life: Life) -> Life:
        self._lives[life.worker] = life
        if self.groups.cgroup_base is None:
            life.end_orphans = self._kill_strays
        life.on_empty = lambda: self._gone(life)
        return life

    def _gone(self, life: Life) -> None:
        # A command without a host that printed much and ended was perhaps never looked at.
        self._spawn_task(self._in_thread(lambda: _cap(life.birth.log_file, self._log_max_bytes)))
        if self._lives.get(life.worker) is life:
            del self._lives[life.worker]
            self.measured.pop(life.worker, None)
            self._meters.pop(life.worker, None)

    def _current(self, worker: str, incarnation: int) -> Life | None:
        life = self._lives.get(worker)
        return life if life is not None and life.incarnation == incarnation else None

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def _spawn_task(self, coroutine: Coroutine[None, None, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cap(log: Path, max_bytes: int) -> None:
    """Keep a log in bounds whose writer does not do it itself: a command without a host writes straight to it.

    The file is cut in place, since its writer holds it open for appending; its last part becomes the older file.
    """
    try:
        size = log.stat().st_size
        if size <= max_bytes:
            return
        with log.open("r+b") as file:
            file.seek(size - max_bytes // 4)
            log.with_name(log.name + ".1").write_bytes(file.read(max_bytes // 4))
            file.truncate(0)
    except OSError:
        return  # the next look tries again
