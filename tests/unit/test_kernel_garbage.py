"""The kernel against well-formed messages and events that make no sense: it never raises, and its books stay right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.kernel import Kernel
from llmosd.kernel.ledger import Capacity, Grant
from llmosd.kernel.params import Params
from llmosd.kernel.requests import sign_ticket
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import Command, Liveness, ModelSpec, Ready, Scale
from tests.simulation import invariants
from tests.unit.shell import TOKEN, peer_of, rid_of, spec

KEY = b"key"
URL = "http://127.0.0.1:80/"
PLAIN = ModelSpec(
    model="p", engine=Command(command=("p",)), scale=Scale(min=1), ready=Ready(http=URL), liveness=Liveness(http=URL)
)
SPECS = [
    msgspec.structs.replace(spec("a", maximum=2), requires=("b",)),
    spec("b", minimum=1, slots=1, queue_max=2),
    spec("c", cpus=64),
    PLAIN,
]

numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 12) | st.sampled_from([1001, 1002, 1 << 40, 1 << 62])
sizes = st.lists(numbers, max_size=3).map(tuple)
rids = st.integers(1, 4).map(rid_of)
peers = st.sampled_from([b"", b"c" * 16, b"d" * 16])
names = st.sampled_from(["a", "b", "c", "p", "a@1", "b@1", "a@2", "p@1", "", "nobody"])
workers = st.sampled_from(["a@1", "a@2", "b@1", "p@1", "nobody"])
lives = st.sampled_from([0, 1001, 1002, 1003, 500])
phases = st.sampled_from([*f.Phase, "nonsense"])
texts = st.sampled_from(["", "deadline_exceeded", "why"])
tickets = st.sampled_from([b"", b"?", *(sign_ticket(KEY, rid_of(n), n, n) for n in range(1, 5))])
bodies = st.lists(st.sampled_from([b"", b"{}", b"x" * 5000]), max_size=2)
held = st.builds(f.HeldRequest, rids | st.just(b"?"), numbers, numbers, numbers, st.booleans())
waiting = st.builds(f.OpenRequest, rids | st.just(b"?"), numbers, tickets)
CLIENT_HEADERS: dict[f.Kind, st.SearchStrategy[f.Header]] = {
    f.Kind.HELLO: st.builds(f.ClientHello, st.just(b""), st.lists(waiting, max_size=3).map(tuple)),
    f.Kind.SUBMIT: st.builds(
        f.Submit, names, st.just("/"), st.booleans(), remaining_ms=numbers, have_seq=numbers, ticket=tickets,
        priority=numbers, prefix_sizes=sizes,
    ),
    f.Kind.CANCEL: st.builds(f.Cancel, texts),
    f.Kind.ACK: st.builds(f.Ack, numbers),
}  # fmt: skip
WORKER_HEADERS: dict[f.Kind, st.SearchStrategy[f.Header]] = {
    f.Kind.HELLO: st.builds(
        f.WorkerHello, st.just(b""), st.sampled_from([TOKEN, TOKEN, b""]), numbers, phases, numbers,
        st.lists(held, max_size=3).map(tuple),
    ),
    f.Kind.STATUS: st.builds(f.Status, phases, st.floats(), numbers, texts, numbers),
    f.Kind.CHUNK: st.builds(f.Chunk, numbers, numbers, numbers, sizes, numbers, sizes),
    f.Kind.YIELD: st.builds(f.Yield, numbers, numbers),
    f.Kind.DONE: st.builds(f.Done, numbers, numbers, numbers, texts, numbers, numbers),
    f.Kind.FAILED: st.builds(f.Failed, numbers, numbers, texts, texts, numbers, numbers),
}  # fmt: skip


def message(headers: dict[f.Kind, st.SearchStrategy[f.Header]]) -> st.SearchStrategy[f.Message]:
    def of(kind: f.Kind) -> st.SearchStrategy[f.Message]:
        rid = rids if kind in f.ABOUT_A_REQUEST else st.just(b"")
        return st.builds(f.Message, st.just(kind), rid, headers[kind], bodies, st.just(b""))

    return st.sampled_from(sorted(headers)).flatmap(of)


def commands(kind: Callable[..., on.Event], *details: st.SearchStrategy[Any]) -> st.SearchStrategy[on.Event]:
    return st.builds(kind, st.integers(0, 99), *details)


statuses = st.builds(ExitStatus, st.none() | st.integers(0, 255), st.none() | st.integers(1, 64))
specs: st.SearchStrategy[ModelSpec] = st.sampled_from(
    [*SPECS, spec("a", slots=1), msgspec.structs.replace(spec("new", minimum=1), requires=("a", "c"))]
)
limits = st.sampled_from(["slots", "nice", "memory_max", "?"])
changes = st.dictionaries(limits, numbers | texts | st.none(), max_size=2)
worker_peers = workers.map(peer_of)
EVENTS: list[st.SearchStrategy[on.Event]] = [
    st.just(on.Tick()),
    st.builds(on.ClientSaid, peers, message(CLIENT_HEADERS)),
    st.builds(on.ClientSaid, peers, message(CLIENT_HEADERS)),
    st.builds(on.WorkerSaid, worker_peers, message(WORKER_HEADERS)),
    st.builds(on.WorkerSaid, worker_peers, message(WORKER_HEADERS)),
    st.builds(on.ClientLost, peers, texts),
    st.builds(on.ClientUnreachable, peers),
    st.builds(on.ClientIdentified, peers, numbers, numbers),
    st.builds(on.Spawned, workers, lives, numbers, worker_peers, st.just(TOKEN)),
    st.builds(on.SpawnFailed, workers, lives, texts, texts, st.booleans()),
    st.builds(
        on.Adopted, workers, lives, numbers, worker_peers, st.just(TOKEN), specs, st.just(Grant()),
        st.just(spec().limits), st.floats(allow_nan=False), st.booleans(), st.booleans(), st.booleans(),
    ),
    st.builds(on.Exited, workers, lives, statuses, texts),
    st.builds(on.Emptied, workers, lives),
    st.builds(on.OverLimit, workers, lives, texts),
    st.builds(on.Ready, workers, lives),
    st.builds(on.NotReady, workers, lives, texts, st.booleans()),
    st.builds(on.Unhealthy, workers, lives, texts),
    st.just(on.Counted(Capacity(4000, 8 << 30))),
    commands(on.Apply, specs),
    commands(on.Remove, names),
    commands(on.Start, names),
    commands(on.Stop, names, st.booleans()),
    commands(on.Restarted, names),
    commands(on.Reset, names),
    commands(on.Kill, names | rids.map(bytes.hex), numbers),
    commands(on.SetLimits, names, changes),
    st.just(on.ShutDown()),
    st.builds(on.ShutDown, st.sampled_from([0.0, 5.0])),
    st.builds(on.Held, st.lists(names, max_size=2).map(tuple), st.lists(workers, max_size=2).map(tuple)),
]  # fmt: skip


class Driver:
    """A kernel whose spawns are answered as they should be, now and then: so garbage meets every state."""

    def __init__(self) -> None:
        self.kernel = Kernel(Params(epoch=1000, seed=1, ticket_key=KEY, body_max=4096))
        self.now = 100.0
        for number, one in enumerate(SPECS):
            self.tell(on.Apply(number, one))
        self.tell(on.Counted(Capacity(4000, 8 << 30)))

    def tell(self, event: on.Event, answer: bool = True) -> None:
        effects = self.kernel.handle(event, self.now)
        self.check()
        for effect in effects:
            if isinstance(effect, do.ToClient | do.ToWorker) and not isinstance(effect.header, bytes):
                f.encode(effect.kind, effect.rid, effect.header, *effect.payload)  # the wire can carry it
            elif answer and isinstance(effect, do.Spawn):
                peer = peer_of(effect.worker)
                self.tell(on.Spawned(effect.worker, effect.incarnation, 7, peer, TOKEN))
                hello = f.WorkerHello(b"", TOKEN, 7, f.Phase.READY, 2)
                self.tell(on.WorkerSaid(peer, f.Message(f.Kind.HELLO, b"", hello, [], b"")))

    def check(self) -> None:
        kernel = self.kernel
        due = kernel.deadline()
        assert due is None or self.now < due < self.now + 1e8
        invariants.check_ledger(kernel)
        invariants.check_workers(kernel)
        invariants.check_requests(kernel)
        invariants.check_dispatch(kernel)
        kernel.workers(), kernel.models(), kernel.requests(), kernel.ledger(), kernel.counters()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.one_of(EVENTS), st.sampled_from([0.0, 0.0, 0.3, 12.0, 100.0]), st.booleans()), max_size=60)
)
def test_garbage_never_raises_and_never_spoils_the_books(events: list[tuple[on.Event, float, bool]]) -> None:
    driver = Driver()
    for event, span, answer in events:
        driver.now += span
        driver.tell(event, answer)


def attempts_of(driver: Driver) -> list[tuple[str, bytes, int]]:
    return [
        (request.worker, request.rid, request.attempt)
        for request in driver.kernel.table.requests.values()
        if request.worker is not None
    ]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_worker_that_knows_its_attempt_and_nothing_else_is_borne(data: st.DataObject) -> None:
    driver = Driver()
    for number in range(1, 5):
        submit = f.Submit("ab"[number % 2], "/", True)
        driver.tell(on.ClientSaid(b"c" * 16, f.Message(f.Kind.SUBMIT, rid_of(number), submit, [b"{}"], b"")))
    for _ in range(30):
        driver.now += data.draw(st.sampled_from([0.0, 0.7, 20.0]))
        running = attempts_of(driver)
        if not running or data.draw(st.integers(0, 5)) == 0:
            driver.tell(data.draw(st.builds(on.ClientSaid, peers, message(CLIENT_HEADERS))))
            continue
        worker, rid, attempt = data.draw(st.sampled_from(running))
        n = numbers
        header: f.Header = data.draw(
            st.builds(f.Chunk, st.just(attempt), n, n, sizes, n)
            | st.builds(f.Done, st.just(attempt), n, n, texts, n, n)
            | st.builds(f.Failed, st.just(attempt), n, texts, texts)
        )
        kind = {f.Chunk: f.Kind.CHUNK, f.Done: f.Kind.DONE}.get(type(header), f.Kind.FAILED)
        driver.tell(on.WorkerSaid(peer_of(worker), f.Message(kind, rid, header, [b"x"], b"")))
