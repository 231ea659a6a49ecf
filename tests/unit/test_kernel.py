"""The kernel by hand: a few workers and requests, step by step. What happens at random is the simulation's."""

from __future__ import annotations

import itertools
from typing import TypeVar

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.kernel import Kernel
from llmosd.kernel.ledger import Capacity
from llmosd.kernel.lifecycle import State
from llmosd.kernel.params import Params
from llmosd.kernel.spec import Limits, ModelSpec, Resources, Scale, Simulated

CLIENT = b"c" * 16
TOKEN = b"t" * 16
GIB = 1 << 30
E = TypeVar("E", bound=do.Effect)


def spec(model: str = "m", *, minimum: int = 0, maximum: int = 1, slots: int = 2, cpus: float = 1.0) -> ModelSpec:
    return ModelSpec(
        model=model,
        engine=Simulated(),
        resources=Resources(cpus=cpus),
        limits=Limits(slots=slots),
        scale=Scale(min=minimum, max=maximum),
    )


class Shell:
    """A kernel with a clock that only the test moves, and what it asked for last."""

    def __init__(self, *specs: ModelSpec) -> None:
        self.kernel = Kernel(Params(epoch=1000, seed=1, ticket_key=b"key"))
        self.now = 100.0
        self.effects: list[do.Effect] = []
        self.calls = itertools.count(1)
        for one in specs:
            self.tell(on.Apply(next(self.calls), one))
        self.tell(on.Counted(Capacity(4000, 8 * GIB)))

    def tell(self, event: on.Event, after: float = 0.0) -> list[do.Effect]:
        self.now += after
        self.effects = self.kernel.handle(event, self.now)
        return self.effects

    def wait(self, seconds: float) -> list[do.Effect]:
        return self.tell(on.Tick(), seconds)

    def only(self, kind: type[E]) -> E:
        found = [effect for effect in self.effects if isinstance(effect, kind)]
        assert len(found) == 1, f"expected one {kind.__name__} in {self.effects}"
        return found[0]

    def none(self, kind: type[do.Effect]) -> bool:
        return not any(isinstance(effect, kind) for effect in self.effects)

    # -- what others say

    def submit(self, rid: bytes, model: str = "m", peer: bytes = CLIENT, **fields: object) -> list[do.Effect]:
        header = f.Submit(model, "/v1/completions", **fields)  # type: ignore[arg-type]
        return self.client(f.Kind.SUBMIT, rid, header, b"{}", peer=peer)

    def client(
        self, kind: f.Kind, rid: bytes, header: f.Header, *payload: bytes, peer: bytes = CLIENT
    ) -> list[do.Effect]:
        message = f.decode(f.CLIENT_TO_DAEMON, f.encode(kind, rid, header, *payload))
        return self.tell(on.ClientSaid(peer, message))

    def worker(self, name: str, kind: f.Kind, rid: bytes, header: f.Header, *payload: bytes) -> list[do.Effect]:
        message = f.decode(f.WORKER_TO_DAEMON, f.encode(kind, rid, header, *payload))
        return self.tell(on.WorkerSaid(peer_of(name), message))

    def ready(self, spawn: do.Spawn) -> list[do.Effect]:
        """Bring a spawned worker up."""
        name = spawn.worker
        self.tell(on.Spawned(name, spawn.incarnation, 4242, peer_of(name), TOKEN), 0.01)
        hello = f.WorkerHello(b"i" * 16, TOKEN, 4242, f.Phase.LOADING, spawn.limits.slots)
        self.worker(name, f.Kind.HELLO, b"", hello)
        assert isinstance(self.only(do.ToWorker).header, f.Welcome)
        return self.worker(name, f.Kind.STATUS, b"", f.Status(f.Phase.READY))

    def state(self, name: str) -> str:
        return next(view.state for view in self.kernel.workers() if view.name == name)


def peer_of(name: str) -> bytes:
    return name.encode().ljust(16, b".")


def rid_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_a_request_starts_a_worker_and_is_answered_once() -> None:
    shell = Shell(spec())
    rid = rid_of(1)
    shell.submit(rid)
    spawn = shell.only(do.Spawn)
    assert (spawn.worker, spawn.grant.millicpus) == ("m.1", 1000)
    assert isinstance(shell.only(do.ToClient).header, f.Accepted)
    assert shell.kernel.requests()[0].state == "blocked"

    shell.ready(spawn)
    run = shell.only(do.ToWorker)
    assert isinstance(run.header, f.Run)
    assert run.payload == (b"{}",)
    attempt = run.header.attempt

    shell.worker("m.1", f.Kind.CHUNK, rid, f.Chunk(attempt, 0, 1, (), 1), b"one")
    assert shell.only(do.ToClient).payload == [b"one"]
    shell.worker("m.1", f.Kind.DONE, rid, f.Done(attempt, 1, completion_tokens=1))
    assert shell.only(do.ToClient).kind is f.Kind.DONE
    shell.client(f.Kind.ACK, rid, f.Ack(2))
    assert shell.only(do.ToWorker).kind is f.Kind.ACK
    assert shell.kernel.requests() == []
    assert shell.state("m.1") == State.READY
    assert shell.kernel.counters()["done"] == 1
