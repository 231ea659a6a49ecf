"""An engine that is a process: started at the gate, its output drained to its end, its exit recorded.

The host is its parent and a subreaper, so whatever the engine forks away comes back here.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from llmosd.launch.cgroup import cgroup_of, oom_kills
from llmosd.launch.gate import HOPELESS, Gate, Order, SetUpError, inherited_environment
from llmosd.launch.reap import reap
from llmosd.worker.config import HostConfig
from llmosd.worker.drivers import CannotWork, EngineEnded
from llmosd.worker.log import WorkerLog

_READ_BYTES: Final = 1 << 16
#: Reads of an ended engine's last output: a pipe holds 1 MiB at most. Whoever goes on then is not the engine.
_LAST_READS: Final = 64


class EngineProcess:
    """One engine process and its output."""

    def __init__(self, config: HostConfig, log: WorkerLog) -> None:
        self._config = config
        self._log = log
        self._pidfd = -1
        self.pid = 0
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = loop.create_future()
        self._pipe = -1
        self._cgroup = cgroup_of("self")
        self._oom_kills = oom_kills(self._cgroup)

    async def start(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Run the engine's program. Raises EngineEnded with the reason."""
        loop = asyncio.get_running_loop()
        self._pipe, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write_end, True)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            gate = Gate.spawn(stdin=null, stdout=write_end, stderr=write_end)
        except OSError as error:
            raise EngineEnded(f"cannot start {argv[0]}: {error}") from error
        finally:
            os.close(null)
            os.close(write_end)
        self.pid, self._pidfd = gate.pid, gate.pidfd
        loop.add_reader(self._pidfd, self._on_exit)
        loop.add_reader(self._pipe, self._on_output)
        order: Order = msgspec.structs.replace(
            self._config.engine_order,
            argv=tuple(argv),
            env=inherited_environment(env) | self._config.engine_order.env,
            parent_death_signal=int(signal.SIGKILL),
        )
        self._log.say(f"starts {' '.join(argv)}")
        try:
            await gate.go(order)
        except SetUpError as error:
            if error.step == "exec":
                kind = CannotWork if error.errno in HOPELESS else EngineEnded
                raise kind(f"cannot run {argv[0]}: {os.strerror(error.errno)}") from error
            raise EngineEnded(f"cannot set up {argv[0]}: {error.step}: {error}") from error

    async def ended(self) -> str:
        """Wait for the engine's end; returns how it ended, with its last lines."""
        return await asyncio.shield(self._ended)

    async def stop(self, timeout: float) -> None:
        """SIGTERM to the engine, then SIGKILL after `timeout` seconds. Its descendants are the host's to end."""
        if self._pidfd < 0 or self._ended.done():
            return
        self._signal(signal.SIGTERM)
        done, _ = await asyncio.wait([self._ended], timeout=timeout)
        if not done:
            self._log.say(f"the engine did not end within {timeout:g} s of SIGTERM: SIGKILL")
            self._signal(signal.SIGKILL)
            await asyncio.wait([self._ended], timeout=timeout)

    def kill(self) -> None:
        """SIGKILL, for an engine that hangs: it would not hear anything else."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            pass  # it has just ended by itself

    def _on_output(self) -> None:
        """Once an iteration of the loop, so that an engine that prints without end leaves requests their turn."""
        self._read_output()
        if self._pipe >= 0 and self._log.is_full:
            asyncio.get_running_loop().remove_reader(self._pipe)
            self._log.when_room(self._on_room)

    def _on_room(self) -> None:
        if self._pipe >= 0:
            asyncio.get_running_loop().add_reader(self._pipe, self._on_output)

    def _read_output(self) -> bool:
        """Log what is there; False when there is nothing."""
        if self._pipe < 0:
            return False
        try:
            data = os.read(self._pipe, _READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._log.write(data)
            return True
        asyncio.get_running_loop().remove_reader(self._pipe)
        os.close(self._pipe)
        self._pipe = -1
        return False

    def _on_exit(self) -> None:
        status = reap(self._pidfd)
        if status is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        code, number = status
        how = f"was killed by {signal.Signals(number).name}" if number else f"exited with code {code}"
        if number == signal.SIGKILL and oom_kills(self._cgroup) > self._oom_kills:
            how = "was killed by the OOM killer: it ran out of memory"
        self._read_last(f"the engine {how}", _LAST_READS)

    def _read_last(self, how: str, reads: int) -> None:
        """What it printed until its end; then it has ended."""
        while reads > 0 and not self._log.is_full and self._read_output():
            reads -= 1
        if self._log.is_full:
            if self._pipe >= 0:
                asyncio.get_running_loop().remove_reader(self._pipe)
            self._log.when_room(lambda: self._read_last(how, reads))
            return
        self._on_room()
        if not self._ended.done():
            self._ended.set_result(how + self._last_words())

    def _last_words(self) -> str:
        lines = [line for line in self._log.tail if not line.startswith("llmosd: ")]
        return f"; its last line: {lines[-1][:200]}" if lines else ""
