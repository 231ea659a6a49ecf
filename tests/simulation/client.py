"""A simulated client process: the real ClientProtocol, and a reader that checks every item it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmos.protocol import frames as f
from llmos.protocol.client import Accepted, ClientProtocol, Ended, Event, Items
from tests.simulation.host import word
from tests.simulation.network import Connection, Frames

if TYPE_CHECKING:
    from tests.simulation.world import World


class Waiting:
    """What a reader knows of its request."""

    def __init__(self, slow: bool, stream: bool) -> None:
        self.slow = slow
        self.stream = stream
        self.items = 0
        self.attempt = 0


class Client:
    """One life of a client process."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._clock = world.clock
        self.peer = world.clock.chance.randbytes(16)
        self.alive = True
        self.protocol = ClientProtocol(self.peer, lambda: world.clock.chance.randbytes(16))
        self.requests: dict[bytes, Waiting] = {}
        self._tick_at = float("inf")
        self.connection = Connection(
            world.clock, world.faults, lambda frames: world.hears_client(self.peer, frames), self._receive,
            self._connected,
        )  # fmt: skip

    # -- what it does ---------------------------------------------------------------------------------------

    def submit(self, model: str) -> None:
        clock = self._clock
        stream = clock.happens(0.7)
        header = f.Submit(model, "/v1/completions", stream)
        trouble = self._world.trouble
        deadline = clock.now + clock.between(0.5, 30) if trouble and clock.happens(0.15) else None
        rid = self.protocol.submit(header, b"body", clock.now, deadline)
        self.requests[rid] = Waiting(clock.happens(0.1), stream)
        if trouble and clock.happens(0.1):
            clock.after(clock.between(0, 3), self._cancel, rid)
        self._world.submitted += 1
        self._flush()

    def _cancel(self, rid: bytes) -> None:
        self.protocol.cancel(rid, "not wanted")
        self._flush()

    def die(self) -> None:
        self.alive = False
        self.connection.close()

    # -- what happens to it ---------------------------------------------------------------------------------

    def _connected(self) -> None:
        if self.alive:
            self._world.identify(self)
            self.protocol.connected(self._clock.now)
            self._flush()

    def _receive(self, frames: Frames) -> None:
        if self.alive:
            self._take(self.protocol.receive(frames, self._clock.now))

    def _tick(self, at: float) -> None:
        if self.alive and at == self._tick_at:
            self._tick_at = float("inf")
            self._take(self.protocol.tick(self._clock.now))

    def _take(self, events: list[Event]) -> None:
        for event in events:
            self._check(event)
        self._flush()

    def _flush(self) -> None:
        for frames in self.protocol.outgoing:
            self.connection.to_daemon.send(frames)
        self.protocol.outgoing.clear()
        due = self.protocol.deadline()
        if due is not None and due < self._tick_at and self.alive:
            self._tick_at = due
            self._clock.after(due - self._clock.now, self._tick, due)

    # -- what it insists on ---------------------------------------------------------------------------------

    def _check(self, event: Event) -> None:
        assert event.rid in self.requests, f"{event} of a request that has ended"
        waiting = self.requests[event.rid]
        if isinstance(event, Accepted):
            return
        if isinstance(event, Items):
            assert waiting.stream
            for item in event.items:
                attempt = int(item.split(b":")[1])
                waiting.attempt = waiting.attempt or attempt
                assert item == word(event.rid, waiting.attempt, waiting.items), f"{item!r} is not item {waiting.items}"
                waiting.items += 1
            self._read(event.rid, waiting, len(event.items))
        else:
            assert isinstance(event, Ended)
            self._check_final(event, waiting)

    def _check_final(self, event: Ended, waiting: Waiting) -> None:
        final = event.final
        code = final.code if isinstance(final, f.Failed) else "done"
        self._world.ends[code] += 1
        if final.attempt:
            assert final.attempt == waiting.attempt or not waiting.items, "the final is another attempt's"
            assert final.seq == waiting.items, f"the final is number {final.seq} after {waiting.items} items"
        if isinstance(final, f.Done) and not waiting.stream:
            assert event.payload == word(event.rid, final.attempt, -1)
        del self.requests[event.rid]

    def _read(self, rid: bytes, waiting: Waiting, count: int) -> None:
        if waiting.slow and self._world.trouble:
            for number in range(count):
                self._clock.after(number * 0.7 + self._clock.between(0, 2), self._consume, rid)
        else:
            self.protocol.consumed(rid, count)

    def _consume(self, rid: bytes) -> None:
        self.protocol.consumed(rid, 1)
        self._flush()
