"""Kernel.handle() in process, without sockets: how many events a second it decides, beside the frames around it.

A CHUNK is one event with one effect; a unary request is three events (SUBMIT, DONE, ACK) with four effects (ACCEPTED,
RUN, DONE, ACK). Messages are decoded beforehand. What decoding a frame costs by itself is the arm to compare with: the
kernel should not cost much more than reading what it is told.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Final

from bench import measure
from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.kernel import Kernel
from llmosd.kernel.ledger import Capacity
from llmosd.kernel.params import Params
from llmosd.kernel.spec import Limits, ModelSpec, Scale, Simulated

IN_FLIGHT: Final = 64
#: Requests that others have open meanwhile: what costs more the more there are shows here.
CROWD: Final = 4_000
CLIENT: Final = b"c" * 16
WORKER: Final = b"w" * 16
TOKEN: Final = b"t" * 16
EPOCH: Final = 1000
ATTEMPT: Final = EPOCH + 1


class Driven:
    """A kernel with one ready worker."""

    def __init__(self) -> None:
        self.kernel = Kernel(Params(epoch=EPOCH, seed=1, ticket_key=b"key"))
        self.now = 100.0
        self.submitted = 0
        spec = ModelSpec(
            model="m", engine=Simulated(), limits=Limits(slots=4096, queue_max=2 * CROWD), scale=Scale(min=1)
        )
        self.kernel.handle(on.Apply(1, spec), self.now)
        spawn = next(
            effect
            for effect in self.kernel.handle(on.Counted(Capacity(4000, 8 << 30)), self.now)
            if isinstance(effect, do.Spawn)
        )
        self.kernel.handle(on.Spawned(spawn.worker, spawn.incarnation, 4242, WORKER, TOKEN), self.now)
        hello = f.WorkerHello(b"i" * 16, TOKEN, 4242, f.Phase.READY, 4096)
        self.kernel.handle(worker_said(f.Kind.HELLO, b"", hello), self.now)

    def submit(self, count: int) -> list[bytes]:
        rids = [(self.submitted + i).to_bytes(16, "big") for i in range(count)]
        self.submitted += count
        self.handle([client_said(f.Kind.SUBMIT, rid, f.Submit("m", "/v1/completions"), b"{}") for rid in rids])
        return rids

    def handle(self, events: list[on.Event]) -> float:
        """Seconds that these took. The clock goes on by ten microseconds an event."""
        handle, deadline, now = self.kernel.handle, self.kernel.deadline, self.now
        start = time.perf_counter()
        for event in events:
            now += 1e-5
            handle(event, now)
            deadline()
        took = time.perf_counter() - start
        self.now = now
        return took


def client_said(kind: f.Kind, rid: bytes, header: f.Header, *payload: bytes) -> on.Event:
    return on.ClientSaid(CLIENT, f.decode(f.CLIENT_TO_DAEMON, f.encode(kind, rid, header, *payload)))


def worker_said(kind: f.Kind, rid: bytes, header: f.Header, *payload: bytes) -> on.Event:
    return on.WorkerSaid(WORKER, f.decode(f.WORKER_TO_DAEMON, f.encode(kind, rid, header, *payload)))


def chunks(count: int, crowd: int = 0) -> float:
    """CHUNKs a second, over 64 streams."""
    driven = Driven()
    rids = driven.submit(IN_FLIGHT)
    driven.submit(crowd)
    events = [
        worker_said(f.Kind.CHUNK, rid, f.Chunk(ATTEMPT, seq, 1, (), 1), b"i" * 160)
        for seq in range(count // IN_FLIGHT)
        for rid in rids
    ]
    return len(events) / driven.handle(events)


def requests(count: int, crowd: int = 0) -> float:
    """Unary requests a second, 64 in flight."""
    driven = Driven()
    driven.submit(crowd)
    took = 0.0
    for _ in range(count // IN_FLIGHT):
        rids = [(driven.submitted + i).to_bytes(16, "big") for i in range(IN_FLIGHT)]
        driven.submitted += IN_FLIGHT
        submit, done, ack = f.Submit("m", "/v1/completions"), f.Done(ATTEMPT, 0, completion_tokens=16), f.Ack(1)
        took += driven.handle(
            [
                *(client_said(f.Kind.SUBMIT, rid, submit, b"{}") for rid in rids),
                *(worker_said(f.Kind.DONE, rid, done, b"{}") for rid in rids),
                *(client_said(f.Kind.ACK, rid, ack) for rid in rids),
            ]
        )
    assert driven.kernel.counters()["done"] == count // IN_FLIGHT * IN_FLIGHT
    return count // IN_FLIGHT * IN_FLIGHT / took


def decodes(count: int) -> float:
    """CHUNK frames decoded a second."""
    frames = f.encode(f.Kind.CHUNK, b"r" * 16, f.Chunk(ATTEMPT, 1000, 1, (), 1), b"i" * 160)
    decode, table = f.decode, f.WORKER_TO_DAEMON
    start = time.perf_counter()
    for _ in range(count):
        decode(table, frames)
    return count / (time.perf_counter() - start)


def main(quick: bool) -> None:
    count, rounds = (6_400, 3) if quick else (19_200, 7)
    runs = measure.take_turns(
        {
            "chunks": partial(chunks, count),
            "requests": partial(requests, count),
            "decodes": partial(decodes, count),
            "chunks in a crowd": partial(chunks, count, CROWD),
            "requests in a crowd": partial(requests, count // 4, CROWD),
        },
        rounds,
    )

    def row(what: str, arm: str) -> list[str]:
        cost = [1e6 / rate for rate in runs[arm]]
        than = measure.ratio(cost, [1e6 / rate for rate in runs["decodes"]])
        return [what, measure.spread(runs[arm]).show(), measure.spread(cost).show(2), than.show(1, "x")]

    rows = [
        row("decoding a CHUNK's frames", "decodes"),
        row("CHUNK", "chunks"),
        row(f"CHUNK, {CROWD:,} other requests open", "chunks in a crowd"),
        row("unary request (3 events)", "requests"),
        row(f"unary request, {CROWD:,} others open", "requests in a crowd"),
    ]
    measure.table("Kernel: handle() and deadline(), in process", ("", "a second", "µs", "cost / decoding"), rows)
