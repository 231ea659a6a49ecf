"""One machine in virtual time: the real kernel between simulated clients, hosts, processes and networks.

Everything that happens follows from the seed. `run` makes trouble; `settle` stops it and lets all that waits come to
its end.
"""

from __future__ import annotations

from collections import Counter

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.cpus import Cpu
from llmosd.kernel.kernel import Kernel
from llmosd.kernel.ledger import Capacity
from llmosd.kernel.params import Params
from llmosd.kernel.placement import Gpu
from llmosd.kernel.spec import ModelSpec
from tests.simulation import chaos, invariants
from tests.simulation.client import Client
from tests.simulation.clock import Clock
from tests.simulation.models import MODELS
from tests.simulation.network import Connection, Faults, Frames
from tests.simulation.node import Node

GIB = 1 << 30
#: Two NUMA nodes, each of a core with two hardware threads and one with one: 0,4 1 | 2,5 3.
CPUS = (Cpu(0, 0, 0, 0), Cpu(1, 0, 1, 0), Cpu(2, 1, 0, 1), Cpu(3, 1, 1, 1), Cpu(4, 0, 0, 0), Cpu(5, 1, 0, 1))
CAPACITY = Capacity(6000, 8 * GIB, (Gpu("GPU-0", 8 * GIB), Gpu("GPU-1", 8 * GIB)), CPUS)

#: Commands over which the daemon dies now and then.
OPERATED = (on.Start, on.Stop, on.Restarted, on.Remove)


class World:
    """The machine."""

    def __init__(self, seed: int, clients: int = 4) -> None:
        self.clock = Clock(seed)
        chance = self.clock.chance
        #: How likely it is that something goes wrong: 0 to 1, different for each seed.
        self.trouble = chance.choice([0.2, 0.5, 1.0])
        self.faults = Faults(loss=chance.choice([0, 0.01, 0.05]), repeat=0.02, stall=chance.choice([0, 0.01]))
        self.files: dict[str, ModelSpec] = dict(MODELS)
        self.kernel: Kernel | None = None
        #: Counts the lives of the daemon.
        self.life = 0
        self.steps = 0
        self.calls = 0
        self.submitted = 0
        self.all_down = False
        self.ends: Counter[str] = Counter()
        #: What operators have stopped: as the daemon keeps it, and as they were told that it is.
        self.kept = on.Held((), ())
        self.stopped: set[str] = set()
        #: Workers that operators started though their model was stopped.
        self.exempt: set[str] = set()
        #: Workers whose end has begun.
        self.ending: set[str] = set()
        #: What the kernel told which peer to forget.
        self.released: set[tuple[bytes, bytes]] = set()
        self.node = Node(self)
        self._tick_at = float("inf")
        self.clients: list[Client] = []
        self.start_daemon()
        for _ in range(clients):
            self.add_client()
        chaos.begin(self)

    # -- running --------------------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        while self.steps < steps:
            self.clock.advance()

    def settle(self) -> None:
        """Nothing goes wrong any more: whatever was asked for must end, and what is asked for now must be answered."""
        self.trouble = 0.0
        self.faults.stop()
        self.clock.after(3.0, chaos.repair, self)
        self.clock.after(30.0, chaos.repair, self)
        self._wait(300.0)
        invariants.check_settled(self)
        before, asked = self.ends["done"], 0
        for model in [*MODELS, *MODELS]:
            if MODELS[model].routed:
                asked += 1
                self.clock.chance.choice(self.clients).submit(model)
        self._wait(200.0)
        invariants.check_settled(self)
        assert self.ends["done"] == before + asked, f"of {asked} requests, {self.ends['done'] - before} were answered"
        self.shut_down()

    def _wait(self, seconds: float) -> None:
        end = self.clock.now + seconds
        self.clock.after(seconds, lambda: None)
        while self.clock.now < end:
            self.clock.advance()

    def shut_down(self) -> None:
        """An orderly end: no process is left once AllDown is said."""
        assert self.kernel is not None
        self.all_down = any(isinstance(effect, do.AllDown) for effect in self.tell(on.ShutDown()))
        end = self.clock.now + 60.0
        self.clock.after(60.0, lambda: None)
        while self.clock.now < end and not self.all_down:
            self.clock.advance()
        assert self.all_down, "AllDown was never said"
        assert not self.node.groups

    # -- the daemon -----------------------------------------------------------------------------------------

    def start_daemon(self) -> None:
        self.life += 1
        epoch = int(self.clock.now * 1000)
        self.kernel = Kernel(
            Params(
                epoch=epoch, seed=epoch, ticket_key=b"the machine's own", window=8, resume_timeout=10.0, linger=60.0,
                kill_timeout=3.0, unkillable_retry=5.0,
            )
        )  # fmt: skip
        self._tick_at = float("inf")
        self.tell(self.kept)
        for spec in self.files.values():
            self.command(on.Apply, spec)
        self.node.adopt()
        self.tell(on.Counted(CAPACITY))
        for client in self.clients:
            self.clock.after(self.clock.between(0.01, 0.3), client.connection.open)
        for group in self.node.groups.values():
            if group.host is not None and group.status is None:
                self.clock.after(self.clock.between(0.01, 1.0), self._connect, group.host.connection)

    def _connect(self, connection: Connection) -> None:
        if self.kernel is not None:
            connection.open()

    def kill_daemon(self) -> None:
        self.kernel = None
        for client in self.clients:
            client.connection.close()
        for group in self.node.groups.values():
            if group.host is not None:
                group.host.connection.close()
        self.clock.after(self.clock.between(0.1, 3.0), self.start_daemon)

    def tell(self, event: on.Event) -> list[do.Effect]:
        """One step of the kernel."""
        kernel = self.kernel
        assert kernel is not None
        self.steps += 1
        self._note_start(event)
        effects = kernel.handle(event, self.clock.now)
        if isinstance(event, OPERATED) and self.clock.happens(self.trouble * 0.05):
            return self._die_amidst(effects)
        for effect in effects:
            self._carry_out(effect)
        self._note_stop(event, effects)
        invariants.check(self, kernel)
        due = kernel.deadline()
        if due is not None and due < self._tick_at:
            self._tick_at = due
            self.clock.after(due - self.clock.now, self._tick, due, self.life)
        return effects

    def _die_amidst(self, effects: list[do.Effect]) -> list[do.Effect]:
        """The daemon dies before it has carried out all that a command led to: nobody was told that it is done."""
        done = effects[: self.clock.chance.randrange(len(effects) + 1)]
        for effect in done:
            self._carry_out(effect)
        self.stopped = {*self.kept.models, *self.kept.workers}
        self.kill_daemon()
        return done

    def _note_start(self, event: on.Event) -> None:
        """Whom an operator lets go, if only by asking."""
        kernel = self.kernel
        assert kernel is not None
        if not isinstance(event, on.Start | on.Restarted | on.Remove):
            return
        name = event.model if isinstance(event, on.Remove) else event.name
        worker = kernel.fleet.workers.get(name)
        if worker is not None:
            self.stopped.discard(name)
            self.exempt.add(name)
            if isinstance(event, on.Restarted):
                self.stopped.discard(worker.model)
        elif (model := kernel.fleet.dependencies.find(name)) is not None:
            self.stopped -= {model.spec.model, *model.workers}

    def _note_stop(self, event: on.Event, effects: list[do.Effect]) -> None:
        """Whom an operator was told that it stays down."""
        kernel = self.kernel
        assert kernel is not None
        if not isinstance(event, on.Stop) or any(isinstance(e, do.Replied) and e.refusal for e in effects):
            return
        if event.name in kernel.fleet.workers:
            names = {event.name}
        else:
            model = kernel.fleet.dependencies.find(event.name)
            assert model is not None
            names = {model.spec.model, *model.workers}
        self.stopped |= names
        self.exempt -= names

    def _tick(self, due: float, life: int) -> None:
        if life == self.life and due == self._tick_at:
            self._tick_at = float("inf")
            if self.kernel is not None:
                self.tell(on.Tick())

    def command(self, kind: type[on.Event], *details: object) -> do.Replied:
        """An operator's command; it is answered once and at once, unless the daemon dies over it."""
        self.calls += 1
        effects = self.tell(kind(self.calls, *details))
        if self.kernel is None:
            return do.Replied(self.calls, "unavailable")
        replies = [effect for effect in effects if isinstance(effect, do.Replied)]
        assert [reply.call for reply in replies] == [self.calls]
        return replies[0]

    def _carry_out(self, effect: do.Effect) -> None:
        if isinstance(effect, do.ToClient):
            self._to_client(effect)
        elif isinstance(effect, do.ToWorker):
            self._to_worker(effect)
        elif isinstance(effect, do.AllDown):
            self.all_down = True
        elif isinstance(effect, do.KeepHeld):
            self.kept = on.Held(effect.models, effect.workers)
        elif isinstance(effect, do.Spawn):
            invariants.check_spawn(self, effect)
            self.node.carry_out(effect)
        elif isinstance(effect, do.Happened):
            invariants.check_end(self, effect)
        else:
            self.node.carry_out(effect)

    # -- the sockets ----------------------------------------------------------------------------------------

    def _to_client(self, effect: do.ToClient) -> None:
        invariants.check_to_client(self, effect)
        for client in self.clients:
            if client.peer == effect.peer:
                if not client.connection.to_peer.send(_frames(effect)):
                    self.clock.after(0.0, self._unreachable, effect.peer, self.life)
                return

    def _unreachable(self, peer: bytes, life: int) -> None:
        if life == self.life and self.kernel is not None:
            self.tell(on.ClientUnreachable(peer))

    def _to_worker(self, effect: do.ToWorker) -> None:
        invariants.check_to_worker(self, effect)
        for group in self.node.groups.values():
            if group.peer == effect.peer and group.host is not None:
                group.host.connection.to_peer.send(_frames(effect))

    def hears_client(self, peer: bytes, frames: Frames) -> None:
        if self.kernel is not None:
            self.tell(on.ClientSaid(peer, f.decode(f.CLIENT_TO_DAEMON, frames)))

    def hears_worker(self, peer: bytes, frames: Frames) -> None:
        if self.kernel is not None:
            self.tell(on.WorkerSaid(peer, f.decode(f.WORKER_TO_DAEMON, frames)))

    # -- clients --------------------------------------------------------------------------------------------

    def add_client(self) -> None:
        client = Client(self)
        self.clients.append(client)
        if self.kernel is not None:
            client.connection.open()

    def identify(self, client: Client) -> None:
        if self.kernel is not None:
            self.tell(on.ClientIdentified(client.peer, 1000, 4242))

    def kill_client(self, client: Client) -> None:
        self.clients.remove(client)
        client.die()
        self.clock.after(0.001, self._lost, client.peer, self.life)

    def _lost(self, peer: bytes, life: int) -> None:
        if life == self.life and self.kernel is not None:
            self.tell(on.ClientLost(peer, "client_gone"))


def _frames(effect: do.ToClient | do.ToWorker) -> Frames:
    if isinstance(effect.header, bytes):
        return [bytes((f.VERSION, effect.kind)), effect.rid, effect.header, *effect.payload]
    return f.encode(effect.kind, effect.rid, effect.header, *effect.payload)
