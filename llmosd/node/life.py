"""One life of one worker: from the gate to an empty group. For the node.

Every step that may block runs in a thread; what was asked for before the birth is over waits for it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from llmosd.failpoint import failpoint
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.restart import ExitStatus
from llmosd.launch.gate import FIRST_GRANT, FORBIDDEN, HOPELESS, ISOLATION, Gate, Order, SetUpError, User
from llmosd.launch.reap import ended, reap
from llmosd.node import records
from llmosd.node.groups import Group
from llmosd.node.oomlog import OomLog
from llmosd.node.output import Output
from llmosd.node.records import Record
from llmosd.node.strain import Strain, out_of_memory

log = logging.getLogger("llmosd")
T = TypeVar("T")

#: Seconds that somebody else's reaping of an adopted worker is waited for, to learn its exit status.
REAPED_WITHIN_S: Final = 2.0
CLEAN: Final = ExitStatus(code=0)
#: Characters of a worker's last line that are told as the reason of its end.
LAST_LINE_MAX: Final = 200
#: Seconds between two SIGKILLs to a group that does not go.
KILL_AGAIN_S: Final = 2.0
_LAST_WORDS_BYTES: Final = 1000


class Birth(msgspec.Struct, frozen=True):
    """What a worker is born with."""

    identity: bytes
    token: bytes
    #: Its processes have this in their environment, as groups.MARK.
    mark: str
    #: A directory of its own that ends with it.
    scratch: Path
    output: Output
    #: The size of the log file when it was born.
    log_start: int = 0


class Program(msgspec.Struct, frozen=True):
    """What a worker runs."""

    order: Order
    #: Given to it through descriptor FIRST_GRANT.
    config: bytes = b""
    #: Descriptors of ours for its FIRST_GRANT + 1, + 2, …
    grants: tuple[int, ...] = ()


class Life:
    """See the module. `emit` tells the kernel; `directory` holds the records."""

    def __init__(
        self, worker: str, incarnation: int, group: Group, directory: Path, birth: Birth,
        emit: Callable[[on.Event], None], executor: Executor, patient: Executor, oom: OomLog,
    ) -> None:  # fmt: skip
        self.worker = worker
        self.incarnation = incarnation
        self.group = group
        self.birth = birth
        self.pid = 0
        #: What holds it back, by the node's last look.
        self.strain = Strain()
        #: Tells people: (worker, sentence).
        self.warn: Callable[[str, str], None] = lambda worker, sentence: None
        #: Called once the group is empty.
        self.on_empty: Callable[[], None] = lambda: None
        #: Ends what it left to us as its parent's parent; where no group could hold that. May block.
        self.end_orphans: Callable[[], None] = lambda: None
        #: Its group is empty, and nothing of it is on record any more.
        self.emptied = asyncio.Event()
        self._directory = directory
        self._emit = emit
        self._executor = executor
        self._patient = patient
        self._oom = oom
        self._loop = asyncio.get_running_loop()
        self._pidfd = -1
        self._record: Record | None = None
        self._record_lock = threading.Lock()
        #: Changes of its limits take their turns: the last one that was asked for is the last one made.
        self.confining = asyncio.Lock()
        self._settled = asyncio.Event()
        self._exited = asyncio.Event()
        self._killer: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- birth ----------------------------------------------------------------------------------------------

    async def begin(self, effect: do.Spawn, program: Program) -> None:
        """Spawn, hold at the gate, put into the group and on record, let go. Ends with Spawned or SpawnFailed."""
        try:
            await self._in_thread(lambda: self._prepare(program.order.user))
            output = await self.birth.output.open()
            try:
                gate = self._open_gate(program, output)
            finally:
                os.close(output)
        except OSError as error:
            self._fail(on.SpawnFailed(self.worker, self.incarnation, "spawn", str(error)))
            return
        self.pid, self._pidfd = gate.pid, gate.pidfd
        try:
            failpoint("spawn.gated")
            await self._in_thread(lambda: self._register(effect), self._patient)
            await self.birth.output.say(f"started, pid {self.pid}")
            await gate.go(program.order)
        except (OSError, SetUpError) as error:
            gate.shut()
            await self._readable(self._pidfd)
            reap(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
            await self._in_thread(self.group.release)
            self._fail(self._why(program, error))
            return
        failpoint("spawn.gone")
        self._settled.set()
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._emit(on.Spawned(self.worker, self.incarnation, self.pid, self.birth.identity, self.birth.token))

    @property
    def is_settled(self) -> bool:
        """It runs its program, in its group."""
        return self.pid > 0 and self._settled.is_set()

    def refuse(self, event: on.SpawnFailed) -> None:
        """There is nothing to begin with."""
        self._fail(event)

    def _prepare(self, user: User | None) -> None:
        shutil.rmtree(self.birth.scratch, ignore_errors=True)
        self.birth.scratch.mkdir(mode=0o700, parents=True)
        if user is not None:
            os.chown(self.birth.scratch, user.uid, user.gid)

    def _open_gate(self, program: Program, output: int) -> Gate:
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        config = os.memfd_create("llmosd-config", os.MFD_CLOEXEC)
        try:
            os.write(config, program.config)
            os.lseek(config, 0, os.SEEK_SET)
            sources = (config, *program.grants)
            return Gate.spawn(stdin=null, stdout=output, stderr=output, grants=dict(enumerate(sources, FIRST_GRANT)))
        finally:
            for fd in (null, config):
                os.close(fd)

    def _register(self, effect: do.Spawn) -> None:
        """Into its group, and on record: from here on the next daemon would find it."""
        self.group.enter(self.pid)
        failpoint("spawn.grouped")
        ticks = records.start_ticks(self.pid)
        if ticks is None:
            raise ProcessLookupError(errno.ESRCH, "it was killed while it waited at the gate")
        self._record = Record(
            worker=self.worker,
            incarnation=self.incarnation,
            boot_id=records.boot_id(),
            pid=self.pid,
            start_ticks=ticks,
            started_at=time.monotonic(),
            identity=self.birth.identity,
            token=self.birth.token,
            spec=effect.spec,
            limits=effect.limits,
            grant=effect.grant,
            cgroup=self.group.cgroup,
            log_start=self.birth.log_start,
            output_inode=self.birth.output.inode,
        )
        records.write(self._directory, self._record)
        failpoint("spawn.recorded")

    def _why(self, program: Program, error: OSError | SetUpError) -> on.SpawnFailed:
        if not isinstance(error, SetUpError):
            return on.SpawnFailed(self.worker, self.incarnation, "register", str(error))
        if error.step == "exec":
            why = f"cannot run {program.order.argv[0]}: {os.strerror(error.errno)}"
            return on.SpawnFailed(self.worker, self.incarnation, "exec", why, error.errno in HOPELESS)
        for_good = error.step in ISOLATION and error.errno in FORBIDDEN
        return on.SpawnFailed(self.worker, self.incarnation, error.step, str(error), for_good)

    def _fail(self, event: on.SpawnFailed) -> None:
        self._spawn_task(self._told_end(f"could not be started: {event.reason}"))
        self._forget()
        self._settled.set()
        self._exited.set()
        self._emit(event)
        self._end_of_life()

    # -- adoption -------------------------------------------------------------------------------------------

    def take_over(self, record: Record, pidfd: int) -> None:
        """Go on with a worker of the daemon's earlier life, whose identity was checked."""
        self.pid, self._pidfd, self._record = record.pid, pidfd, record
        self._settled.set()
        self._loop.add_reader(pidfd, self._on_exit)
        self._spawn_task(self._take_up_output(record))

    async def _take_up_output(self, record: Record) -> None:
        wrong = await self.birth.output.take_up(
            record.output_inode, lambda: [record.pid, *self.group.members()]
        )  # fmt: skip
        if wrong:
            self.warn(self.worker, wrong)

    def take_over_remains(self, record: Record) -> tuple[ExitStatus, str]:
        """Its leader is gone, and what is left of its group waits for `kill`. Returns how it ended, as in Exited."""
        self._record = record
        self._settled.set()
        self._exited.set()
        self._spawn_task(self._told_end("ended while there was no daemon"))
        status = record.ended or records.end_of(record.pid, record.start_ticks)
        return status, self._last_words(status, "") if status != CLEAN else ""

    # -- what is asked of it --------------------------------------------------------------------------------

    def signal(self, number: int, *, stops: bool) -> None:
        self._spawn_task(self._signal(number, stops))

    async def _signal(self, number: int, stops: bool) -> None:
        await self._settled.wait()
        if self._exited.is_set():
            return
        if stops:
            await self._in_thread(lambda: self._write(stopping=True))
            failpoint("stop.recorded")
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass  # it has just ended by itself
        if stops:
            failpoint("stop.signalled")

    def kill(self) -> None:
        """SIGKILL to the whole group, until it is empty; then Emptied."""
        if self._killer is None:
            self._killer = self._spawn_task(self._kill())

    async def _kill(self) -> None:
        if self._pidfd >= 0 and not self._settled.is_set():
            # On its way to its program, perhaps in a file system that does not answer: its birth fails then.
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has just ended
        await self._settled.wait()
        if self.emptied.is_set():
            return  # the birth had failed
        failpoint("kill.before")
        await self._in_thread(self.group.kill)
        failpoint("kill.sent")
        await self._exited.wait()
        while not await self._in_thread(lambda: self.group.wait_empty(KILL_AGAIN_S), self._patient):
            await self._in_thread(self.group.kill)
        await self._in_thread(self.end_orphans)
        await self._in_thread(self.group.release)
        failpoint("empty.seen")
        await self._in_thread(self._forget)
        failpoint("empty.forgotten")
        self._emit(on.Emptied(self.worker, self.incarnation))
        self._end_of_life()

    def _end_of_life(self) -> None:
        self.emptied.set()
        self.on_empty()

    async def note(self, **changes: object) -> None:
        """What the next daemon must know of it."""
        await self._in_thread(lambda: self._write(**changes))

    def _write(self, **changes: object) -> None:
        with self._record_lock:
            if self._record is not None:
                self._record = msgspec.structs.replace(self._record, **changes)
                try:
                    records.write(self._directory, self._record)
                except OSError as error:
                    # A full disk keeps no worker from being stopped, nor its end from being told.
                    log.error("%s: its record cannot be brought up to date: %s", self.worker, error)

    # -- its end --------------------------------------------------------------------------------------------

    def _on_exit(self) -> None:
        # A dead pidfd stays readable: off the loop first.
        self._loop.remove_reader(self._pidfd)
        self._spawn_task(self._end())

    async def _end(self) -> None:
        status = reap(self._pidfd)
        if status is None:
            status = await self._in_thread(lambda: ended(self._pidfd, self.pid, REAPED_WITHIN_S))
        os.close(self._pidfd)
        self._pidfd = -1
        how = ExitStatus(*status)
        # Now that it is reaped, nobody else can tell how it ended.
        await self._in_thread(lambda: self._write(ended=how))
        failpoint("exit.seen")
        last_line = await self.birth.output.end(f"ended: {how}")
        detail = await self._in_thread(lambda: self._last_words(how, last_line)) if how != CLEAN else ""
        self._emit(on.Exited(self.worker, self.incarnation, how, detail))
        self._exited.set()

    def _last_words(self, status: ExitStatus, last_line: str) -> str:
        """What is known of its end: the host's record of how its engine ended; that the OOM killer took it; or the end
        of what it printed."""
        try:
            # The directory may be another user's: nothing that he put there leads to what is not his.
            harmless = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(self.birth.scratch / "engine-exit", harmless)
            with os.fdopen(fd, "rb") as file:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                    return ""
                return file.read(_LAST_WORDS_BYTES).decode(errors="replace")
        except OSError:
            pass  # it wrote none
        if status.signal == signal.SIGKILL and self._record is not None:
            counted = self.group.counters().oom_kills > self.strain.oom_kills
            if self._oom.took(self.pid) or counted:
                return out_of_memory(1, self._record.limits)
        # One that was asked to end has no reason but that.
        return f"{status}; its last line: {last_line[:LAST_LINE_MAX]}" if last_line and not status.clean else ""

    async def _told_end(self, text: str) -> None:
        await self.birth.output.end(text)

    def _forget(self) -> None:
        with self._record_lock:
            self._record = None
            records.remove(self._directory, self.worker)
        shutil.rmtree(self.birth.scratch, ignore_errors=True)

    # -- helpers of the loop --------------------------------------------------------------------------------

    async def _readable(self, fd: int) -> None:
        ready = asyncio.Event()
        self._loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(fd)

    async def _in_thread(self, call: Callable[[], T], executor: Executor | None = None) -> T:
        return await self._loop.run_in_executor(executor or self._executor, call)

    def _spawn_task(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
