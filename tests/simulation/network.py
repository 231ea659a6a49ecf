"""Connections that lose, repeat and delay frames, and break. In order within a connection, as ZeroMQ keeps it."""

from __future__ import annotations

from collections.abc import Callable

from tests.simulation.clock import Clock

Frames = list[bytes]


class Faults:
    """How bad the world is; all zero: a perfect network."""

    def __init__(self, loss: float = 0.0, repeat: float = 0.0, stall: float = 0.0) -> None:
        self.loss = loss
        self.repeat = repeat
        self.stall = stall

    def stop(self) -> None:
        self.loss = self.repeat = self.stall = 0.0


class Pipe:
    """One direction of a connection."""

    def __init__(self, clock: Clock, faults: Faults, deliver: Callable[[Frames], None]) -> None:
        self._clock = clock
        self._faults = faults
        self._deliver = deliver
        self._open = False
        self._last_arrival = 0.0
        self._lost_before = 0
        self._sent = 0

    def send(self, frames: Frames) -> bool:
        """False: there is nobody at the other end."""
        if not self._open:
            return False
        clock, faults = self._clock, self._faults
        if clock.happens(faults.loss):
            return True
        for _ in range(2 if clock.happens(faults.repeat) else 1):
            delay = clock.between(0.5, 2.0) if clock.happens(faults.stall) else clock.between(0.0001, 0.004)
            self._last_arrival = max(self._last_arrival, clock.now + delay)
            self._sent += 1
            clock.after(self._last_arrival - clock.now, self._arrive, self._sent, frames)
        return True

    def _arrive(self, number: int, frames: Frames) -> None:
        if number > self._lost_before:
            self._deliver(frames)

    def open(self) -> None:
        self._open = True

    def close(self, *, losing: bool) -> None:
        """Break. `losing`: what is under way is gone; else it lies at the receiver and comes, perhaps very late."""
        self._open = False
        if losing:
            self._lost_before = self._sent
        self._last_arrival = 0.0


class Connection:
    """A peer's connection to the daemon, which breaks and comes back."""

    def __init__(
        self, clock: Clock, faults: Faults, to_daemon: Callable[[Frames], None], to_peer: Callable[[Frames], None],
        connected: Callable[[], None],
    ) -> None:  # fmt: skip
        self.to_daemon = Pipe(clock, faults, to_daemon)
        self.to_peer = Pipe(clock, faults, to_peer)
        self.is_open = False
        self._clock = clock
        self._connected = connected

    def open(self) -> None:
        if not self.is_open:
            self.is_open = True
            self.to_daemon.open()
            self.to_peer.open()
            self._connected()

    def close(self) -> None:
        self.is_open = False
        self.to_daemon.close(losing=True)
        self.to_peer.close(losing=self._clock.happens(0.5))
