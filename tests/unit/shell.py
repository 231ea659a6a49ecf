"""A kernel with a clock that only the test moves, and words for what others say to it. For the tests of the kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TypeVar

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.cpus import Cpu
from llmosd.kernel.kernel import Kernel
from llmosd.kernel.ledger import Capacity
from llmosd.kernel.params import Params
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import Limits, ModelSpec, Resources, Scale, Simulated
from llmosd.kernel.units import Seconds

CLIENT = b"c" * 16
TOKEN = b"t" * 16
GIB = 1 << 30
E = TypeVar("E", bound=do.Effect)


def spec(
    model: str = "m", *, minimum: int = 0, maximum: int = 1, slots: int = 2, cpus: float = 1.0, idle: float = 60.0,
    queue_max: int = 1024,
) -> ModelSpec:  # fmt: skip
    return ModelSpec(
        model=model,
        engine=Simulated(),
        resources=Resources(cpus=cpus),
        limits=Limits(slots=slots, queue_max=queue_max),
        scale=Scale(min=minimum, max=maximum, idle_timeout=Seconds(idle)),
    )


class Shell:
    """A kernel on a machine of 4 CPUs, or of those given, and the effects of the last event."""

    def __init__(
        self, *specs: ModelSpec, epoch: int = 1000, counted: bool = True, now: float = 100.0, cpus: Iterable[Cpu] = ()
    ) -> None:
        self.kernel = Kernel(Params(epoch=epoch, seed=1, ticket_key=b"key"))
        self.now = now
        self.cpus = tuple(cpus)
        self.effects: list[do.Effect] = []
        self.calls = itertools.count(1)
        self.everything: list[do.Effect] = []
        for one in specs:
            self.apply(one)
        if counted:
            self.count()

    def count(self) -> list[do.Effect]:
        return self.tell(on.Counted(Capacity(max(4, len(self.cpus)) * 1000, 8 * GIB, cpus=self.cpus)))

    def tell(self, event: on.Event, after: float = 0.0) -> list[do.Effect]:
        self.now += after
        self.effects = self.kernel.handle(event, self.now)
        self.everything += self.effects
        return self.effects

    def wait(self, seconds: float) -> list[do.Effect]:
        """Let time pass, with a Tick at each deadline as the daemon gives them."""
        end, effects = self.now + seconds, list[do.Effect]()
        while (due := self.kernel.deadline()) is not None and due <= end:
            effects += self.tell(on.Tick(), max(0.0, due - self.now))
        effects += self.tell(on.Tick(), end - self.now)
        self.effects = effects
        return effects

    def all(self, kind: type[E]) -> list[E]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def only(self, kind: type[E]) -> E:
        found = self.all(kind)
        assert len(found) == 1, f"expected one {kind.__name__} in {self.effects}"
        return found[0]

    def none(self, kind: type[do.Effect]) -> bool:
        return not self.all(kind)

    def command(self, kind: type[on.Event], *details: object) -> do.Replied:
        self.tell(kind(next(self.calls), *details))
        return self.only(do.Replied)

    def apply(self, one: ModelSpec) -> do.Replied:
        return self.command(on.Apply, one)

    # -- what others say

    def submit(self, rid: bytes, model: str = "m", peer: bytes = CLIENT, **fields: object) -> list[do.Effect]:
        header = f.Submit(model, "/v1/completions", **fields)  # type: ignore[arg-type]
        return self.client(f.Kind.SUBMIT, rid, header, b"{}", peer=peer)

    def client(
        self, kind: f.Kind, rid: bytes, header: f.Header, *payload: bytes, peer: bytes = CLIENT
    ) -> list[do.Effect]:
        return self.tell(on.ClientSaid(peer, message(kind, rid, header, payload)))

    def worker(self, name: str, kind: f.Kind, rid: bytes, header: f.Header, *payload: bytes) -> list[do.Effect]:
        return self.tell(on.WorkerSaid(peer_of(name), message(kind, rid, header, payload)))

    def spawned(self, spawn: do.Spawn) -> list[do.Effect]:
        return self.tell(on.Spawned(spawn.worker, spawn.incarnation, 4242, peer_of(spawn.worker), TOKEN), 0.01)

    def hello(self, name: str, phase: str = f.Phase.READY, *held: f.HeldRequest) -> list[do.Effect]:
        header = f.WorkerHello(b"i" * 16, TOKEN, 4242, phase, 2, held)
        return self.worker(name, f.Kind.HELLO, b"", header)

    def ready(self, spawn: do.Spawn) -> list[do.Effect]:
        """Bring a spawned worker up."""
        self.spawned(spawn)
        self.hello(spawn.worker, f.Phase.LOADING)
        assert isinstance(self.only(do.ToWorker).header, f.Welcome)
        return self.worker(spawn.worker, f.Kind.STATUS, b"", f.Status(f.Phase.READY))

    def ends(self, spawn: do.Spawn, status: ExitStatus | None = None) -> list[do.Effect]:
        """The worker's process exits and leaves nothing behind."""
        self.tell(on.Exited(spawn.worker, spawn.incarnation, status or ExitStatus(signal=9)), 0.01)
        return self.tell(on.Emptied(spawn.worker, spawn.incarnation), 0.01)

    def run(self) -> do.ToWorker:
        """The one RUN among the effects."""
        (run,) = [effect for effect in self.all(do.ToWorker) if effect.kind is f.Kind.RUN]
        return run

    def runs(self) -> list[bytes]:
        return [effect.rid for effect in self.all(do.ToWorker) if effect.kind is f.Kind.RUN]

    def to_client(self, kind: f.Kind) -> list[do.ToClient]:
        return [effect for effect in self.all(do.ToClient) if effect.kind is kind]

    def failure(self) -> f.Failed:
        """The one FAILED that a client is told."""
        (failed,) = self.to_client(f.Kind.FAILED)
        assert isinstance(failed.header, f.Failed)
        return failed.header

    def done(self, run: do.ToWorker, items: int = 0) -> list[do.Effect]:
        """The worker's final for a RUN."""
        assert isinstance(run.header, f.Run)
        name = run.peer.rstrip(b".").decode()
        return self.worker(name, f.Kind.DONE, run.rid, f.Done(run.header.attempt, items))

    def state(self, name: str) -> str:
        return next(view.state for view in self.kernel.workers() if view.name == name)


def message(kind: f.Kind, rid: bytes, header: f.Header, payload: tuple[bytes, ...]) -> f.Message:
    """As decoded, but for the checks: the kernel is to bear what they would refuse."""
    return f.Message(kind, rid, header, list(payload), f.encode(kind, rid, header)[2])


def peer_of(name: str) -> bytes:
    return name.encode().ljust(16, b".")


def rid_of(number: int) -> bytes:
    return number.to_bytes(16, "big")
