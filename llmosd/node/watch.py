"""The regular look at all workers: what they use, what holds them back, what passes a watched limit; and at orphans.

For the node. It must never end while the daemon runs, whatever a look meets.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec

from llmosd.kernel import events as on
from llmosd.kernel.spec import Limits
from llmosd.launch.reap import children, reap_orphans
from llmosd.node.confine.choice import Maker
from llmosd.node.groups import signal_process
from llmosd.node.life import Life
from llmosd.node.looks import Due, Looks
from llmosd.node.strain import may_strain
from llmosd.node.usage import CpuMeter, Usage, sample

log = logging.getLogger("llmosd")

#: Seconds between two looks.
SAMPLE_S: Final = 2.0
#: Workers that one hand-over to a thread looks at; between two the loop has its turn.
_LOOKED_AT_ONCE: Final = 32
#: What a stray has forked becomes our child, and is killed, in the round after it.
_STRAY_ROUNDS: Final = 100
#: Seconds in which the loop has noted the number of a child that it has just spawned.
_KNOWN_WITHIN_S: Final = 0.02


class Measured(msgspec.Struct, frozen=True):
    """What a worker used when it was last looked at."""

    usage: Usage = Usage()
    #: Percent of one CPU since the look before.
    cpu_percent: float = 0.0
    #: The most that any look at this life has shown.
    peak_memory_bytes: int = 0
    peak_threads: int = 0
    peak_cpu_percent: float = 0.0


class Look(NamedTuple):
    """What a look at one worker showed."""

    life: Life
    usage: Usage
    #: The limit that it passes, as a sentence; empty: none.
    over: str
    #: What holds it back has changed.
    strained: bool


class Watch:
    """See the module. `lives` and `limits` are the node's own, by worker; `leaders` the children that are known."""

    def __init__(
        self, lives: Mapping[str, Life], limits: Mapping[str, Limits], maker: Maker, leaders: Callable[[], set[int]],
        emit: Callable[[on.Event], None], in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:  # fmt: skip
        self.measured: dict[str, Measured] = {}
        self._lives = lives
        self._limits = limits
        self._confinement, self._groups = maker
        self._leaders = leaders
        self._emit = emit
        self._in_thread = in_thread
        self._meters: dict[str, CpuMeter] = {}
        self._looks = Looks()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            try:
                await self._look()
            except Exception:  # a fault of ours, or a file of /proc that nobody foresaw: the next look may go well
                log.exception("a look at the workers failed")

    def forget(self, worker: str) -> None:
        """A life has ended."""
        self.measured.pop(worker, None)
        self._meters.pop(worker, None)

    def kill_strays(self) -> None:
        """Whoever became our child outlived its leader, and has shed everything by which its group could find it."""
        for _ in range(_STRAY_ROUNDS):
            suspects = set(children()) - self._leaders()
            if not suspects:
                return
            time.sleep(_KNOWN_WITHIN_S)
            for pid in suspects - self._leaders():
                signal_process(pid, signal.SIGKILL)
            reap_orphans(self._leaders)

    async def _look(self) -> None:
        await self._in_thread(lambda: reap_orphans(self._leaders))
        if not self._groups.exact:
            await self._in_thread(self.kill_strays)
        lives = [life for life in self._lives.values() if life.is_settled]
        due = await self._in_thread(partial(self._looks.due, lives, self._limits))
        for start in range(0, len(due), _LOOKED_AT_ONCE):
            for look in await self._in_thread(partial(self._look_at, due[start : start + _LOOKED_AT_ONCE])):
                self._note(look)

    def _look_at(self, due: list[Due]) -> list[Look]:
        """One thread's work for several workers: handing it over costs more than looking at one that is idle."""
        looks = []
        for life, members in due:
            usage = sample(life.group.members() if members is None else members)
            limits, confinement = self._limits[life.worker], self._confinement.beside(life.group.held)
            over = confinement.over_limit(limits, usage)
            if over:
                # Cheap figures may count shared pages twice: look closely before anything is killed.
                over = confinement.over_limit(limits, sample(life.group.members(), exact=True))
            looks_on = may_strain(limits) or bool(life.strain.why)
            strained = looks_on and life.strain.update(life.group.counters(), limits, time.monotonic())
            looks.append(Look(life, usage, over, strained))
        return looks

    def _note(self, look: Look) -> None:
        life = look.life
        if self._lives.get(life.worker) is not life:
            return  # it ended meanwhile
        meter, before = self._meters.setdefault(life.worker, CpuMeter()), self.measured.get(life.worker, Measured())
        cpu_percent = meter.update(look.usage, time.monotonic())
        self.measured[life.worker] = Measured(
            look.usage,
            cpu_percent,
            max(before.peak_memory_bytes, look.usage.memory_bytes),
            max(before.peak_threads, look.usage.threads),
            max(before.peak_cpu_percent, cpu_percent),
        )
        if look.strained:
            self._emit(on.Strained(life.worker, life.incarnation, life.strain.why))
        if look.over:
            self._emit(on.OverLimit(life.worker, life.incarnation, look.over))
