"""A simulated worker host: the real HostProtocol, and an engine whose words name the attempt that made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmos.protocol import frames as f
from llmos.protocol.host import HostProtocol, StartRun, StopRun
from llmosd.kernel.restart import ExitStatus
from tests.simulation.network import Connection, Frames

if TYPE_CHECKING:
    from tests.simulation.node import Group
    from tests.simulation.world import World


def word(rid: bytes, attempt: int, seq: int) -> bytes:
    """The answer item that this attempt makes at this place. A few answers have items that strain the byte window."""
    text = b"%s:%d:%d" % (rid.hex().encode(), attempt, seq)
    return text.ljust(400_000, b".") if rid[0] == 0 and seq % 2 else text


class Host:
    """One life of a host and its engine."""

    def __init__(self, world: World, group: Group, exits: Callable[[ExitStatus], None]) -> None:
        self._world = world
        self._clock = world.clock
        self._group = group
        self._exits = exits
        self._alive = True
        self._frozen = False
        #: What would have happened while it was frozen.
        self._held_up: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        #: Attempts that the engine works on.
        self.running: dict[bytes, int] = {}
        self.protocol = HostProtocol(group.peer, group.token, group.pid, group.limits.slots)
        self.connection = Connection(
            world.clock, world.faults, self._to_daemon, lambda frames: self._do(self._receive, frames),
            lambda: self._do(self._connected),
        )  # fmt: skip

    def _to_daemon(self, frames: Frames) -> None:
        self._world.hears_worker(self._group.peer, frames)

    def _do(self, what: Callable[..., object], *args: Any) -> None:
        """Run something in this process, unless it is dead; later, if it is frozen."""
        if self._frozen:
            self._held_up.append((what, args))
        elif self._alive:
            what(*args)
            self.protocol.flush(self._clock.now)
            for frames in self.protocol.outgoing:
                self.connection.to_daemon.send(frames)
            self.protocol.outgoing.clear()

    def _later(self, seconds: float, what: Callable[..., object], *args: Any) -> None:
        self._clock.after(seconds, self._do, what, *args)

    # -- its life -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        trouble, clock = self._world.trouble, self._clock
        if self._world.kernel is not None:
            self.connection.open()
        self._do(self._tick)
        if clock.happens(trouble * 0.05):
            self._later(clock.between(0.0, 0.5), self._exits, ExitStatus(code=clock.chance.choice([0, 1])))
        elif clock.happens(trouble * 0.05):
            self._later(clock.between(0.0, 0.5), self._engine_failed)
        elif not clock.happens(trouble * 0.02):  # else it hangs while it loads
            self._later(clock.between(0.05, 1.5), self.protocol.set_status, f.Phase.READY, 1.0)

    def _engine_failed(self) -> None:
        self.protocol.set_status(f.Phase.FAILED, -1.0, "the engine went away")
        for rid, attempt in list(self.running.items()):
            failed = f.Failed(attempt, 0, f.Code.ENGINE_ERROR, "the engine went away")
            self.protocol.failed(rid, attempt, failed, b"", self._clock.now)
        self.running.clear()
        self._later(self._clock.between(0.0, 3.0), self._exits, ExitStatus(code=1))

    def die(self) -> None:
        self._alive = False
        self._held_up.clear()
        self.connection.close()

    def freeze(self, frozen: bool) -> None:
        self._frozen = frozen
        if not frozen:
            held_up, self._held_up = self._held_up, []
            for what, args in held_up:
                self._do(what, *args)

    def _connected(self) -> None:
        self.protocol.connected()

    def _tick(self) -> None:
        self.protocol.tick(self._clock.now)
        self._later(0.5, self._tick)

    # -- its work -------------------------------------------------------------------------------------------

    def _receive(self, frames: Frames) -> None:
        for command in self.protocol.receive(frames):
            if isinstance(command, StartRun):
                self.running[command.rid] = command.run.attempt
                self._next(command.rid, command.run.attempt, command.run.stream, self._clock.chance.randrange(0, 30))
            elif isinstance(command, StopRun) and self.running.get(command.rid) == command.attempt:
                del self.running[command.rid]

    def _next(self, rid: bytes, attempt: int, stream: bool, left: int) -> None:
        pause = self._clock.between(0.001, 0.1)
        if self._clock.happens(self._world.trouble * 0.002):
            pause = 20.0
        self._later(pause, self._make, rid, attempt, stream, left)

    def _make(self, rid: bytes, attempt: int, stream: bool, left: int) -> None:
        if self.running.get(rid) != attempt:
            return
        if left == 0 or not stream:
            del self.running[rid]
            payload = b"" if stream else word(rid, attempt, -1)
            done = f.Done(attempt, 0, completion_tokens=self.protocol.next_seq(rid))
            self.protocol.done(rid, attempt, done, payload, self._clock.now)
        elif self._clock.happens(self._world.trouble * 0.002):
            del self.running[rid]
            failed = f.Failed(attempt, 0, f.Code.ENGINE_ERROR, "the engine did not like it")
            self.protocol.failed(rid, attempt, failed, b"", self._clock.now)
        else:
            self.protocol.item(rid, attempt, word(rid, attempt, self.protocol.next_seq(rid)))
            self._next(rid, attempt, stream, left - 1)
