"""What must hold after every step of the kernel, whatever happened; and what must hold once the world is quiet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel.dependencies import ready
from llmosd.kernel.kernel import Kernel
from llmosd.kernel.ledger import Grant
from llmosd.kernel.lifecycle import ALIVE, State
from llmosd.kernel.requests import OPEN, RequestState
from llmosd.kernel.worker import Worker

if TYPE_CHECKING:
    from tests.simulation.node import Group
    from tests.simulation.world import World

#: States that only something from outside or another worker's end leads out of.
_CHUNK, _DONE, _FAILED = map(msgspec.msgpack.Decoder, (f.Chunk, f.Done, f.Failed))
PATIENT = frozenset({State.STOPPED, State.FAILED, State.READY, State.FROZEN, State.ASLEEP, State.WAITING})


def check(world: World, kernel: Kernel) -> None:
    check_ledger(kernel)
    check_cpus(world, kernel)
    check_workers(kernel)
    check_dependencies(world, kernel)
    check_requests(kernel)
    check_dispatch(kernel)
    check_processes(world, kernel)


def check_ledger(kernel: Kernel) -> None:
    """Nothing is given away twice, and whoever lives holds what it was given."""
    if not kernel.fleet.counted:
        return  # it does not know yet what there is
    ledger = kernel.ledger()
    assert ledger.free.millicpus >= 0, "CPUs are over-committed"
    assert ledger.free.memory_bytes >= 0, "memory is over-committed"
    assert all(gpu.memory_bytes >= 0 for gpu in ledger.free.gpus), "a GPU is over-committed"
    for worker in kernel.fleet.workers.values():
        held = kernel.fleet.ledger.grant_of(worker.name) is not None
        assert held == (worker.state in ALIVE), f"{worker.name} is {worker.state} and its grant is {held}"


def check_workers(kernel: Kernel) -> None:
    timers = kernel._timers
    for name, worker in kernel.fleet.workers.items():
        model = kernel.fleet.models[worker.model]
        assert model.workers[name] is worker
        if worker.state not in PATIENT:
            assert ("state", name) in timers, f"{name} is {worker.state} and nothing will ever end that"
        if worker.state not in ALIVE:
            assert not worker.requests, f"{name} is {worker.state} and has requests"
            assert worker.peer not in kernel.fleet.by_peer or kernel.fleet.by_peer[worker.peer] is not worker
        if worker.unheard:
            assert worker.state in ALIVE
        if worker.running and worker.state in (State.READY, State.DRAINING):
            assert ("silence", name) in timers, f"{name} works and nobody listens"
        unfinished = sum(request.final_seq < 0 for request in worker.requests.values())
        assert worker.running == unfinished, f"{name} counts {worker.running} requests and has {unfinished}"


def check_dependencies(world: World, kernel: Kernel) -> None:
    """Who waits has reason to, and what was said of hopeless models is still true."""
    fleet = kernel.fleet
    for name, worker in fleet.workers.items():
        model = fleet.models[worker.model]
        lack = fleet.dependencies.lack(model)
        if worker.state is State.WAITING:
            assert lack is not None and not lack.hopeless, f"{name} waits, and {lack}"
        if worker.ending:
            assert ("order", name) in kernel._timers, f"{name} is never ended if those that require it stay"
            assert not fleet.counted or fleet.dependencies.in_use(model), f"{name} waits for nobody's end"
    if not fleet.counted or fleet.shutting_down:
        return
    for name, model in fleet.models.items():
        assert not fleet.dependencies.cycle(model.spec) or model.removed, f"{name} requires itself"
        if not any(worker.rested for worker in model.workers.values()):  # that looks at the time
            hopeless = fleet.dependencies.hopeless(model, world.clock.now)
            was, is_now = (one and one.what for one in (model.hopeless, hopeless))
            assert was == is_now, f"{name} was told to be {model.hopeless} and is {hopeless}"


#: How the reason of an end begins that waits for those that require it; and of one that is not, while they are there.
_IN_ORDER = (
    "stopped by an operator",
    "restarted by",
    "its model was removed",
    "its model file",
    "llmosd is",
    "requires ",
)
_UNNEEDED = ("idle for", "makes room for")


def check_end(world: World, happened: do.Happened) -> None:
    """What is required is stopped after those that require it, and not for being idle while they are there."""
    assert world.kernel is not None
    fleet = world.kernel.fleet
    model = fleet.models.get(happened.model)
    begins = happened.kind in (State.DRAINING, State.STOPPING) and happened.subject not in world.ending
    (world.ending.add if happened.kind is State.DRAINING else world.ending.discard)(happened.subject)
    if not begins or model is None or ready(model):
        return
    if happened.message.startswith(_IN_ORDER):
        users = [worker.name for worker in fleet.dependencies.in_use(model)]
        assert not users, f"{happened.subject} ends before {users}: {happened.message}"
    if happened.message.startswith(_UNNEEDED):
        users = [worker.name for worker in fleet.dependencies.in_use(model)]
        assert not users, f"{happened.subject} ends, and is required by {users}: {happened.message}"


def check_spawn(world: World, spawn: do.Spawn) -> None:
    """Nothing is started before what it requires, nor what an operator has stopped, in this life of the daemon or an
    earlier one."""
    assert world.kernel is not None
    fleet = world.kernel.fleet
    model = fleet.models[spawn.spec.model]
    for name in model.spec.requires:
        other = fleet.dependencies.find(name)
        assert other is not None, f"{spawn.worker} is started without {name}"
        states = [worker.state for worker in other.workers.values()]
        assert State.READY in states, f"{spawn.worker} is started and {name} is {states}"
    assert spawn.worker not in world.stopped, f"{spawn.worker} is started, and an operator has stopped it"
    if spawn.worker not in world.exempt:
        assert model.spec.model not in world.stopped, (
            f"{spawn.worker} is started, and an operator has stopped its model"
        )


def check_requests(kernel: Kernel) -> None:
    """Each request is in exactly one place, and none is forgotten by time."""
    table, fleet = kernel.table, kernel.fleet
    still_open = 0
    for rid, request in table.requests.items():
        still_open += request.state in OPEN
        model = fleet.models.get(request.model)
        queued = model is not None and any(waiting is request for waiting in model.queue)
        parked = model is not None and request.rid in model.parked
        if request.state is RequestState.RUNNING:
            assert request.worker is not None
            assert fleet.workers[request.worker].requests[rid] is request
            assert request.final_seq < 0
            assert not queued
            assert not parked
        elif request.state in OPEN:
            assert queued != parked, f"{request.key} waits in {queued + parked} places"
            assert request.worker is None
        else:
            assert not queued
            assert not parked
            assert request.final_seq >= 0
            assert request.final is not None or request.worker is not None, f"{request.key} lost its final"
            assert rid in kernel._timers, f"{request.key} has ended and would be kept for ever"
        if request.worker is not None:
            assert rid in fleet.workers[request.worker].requests
        if request.peer is None:
            assert ("away", rid) in kernel._timers, f"{request.key} waits for ever for its client"
        else:
            assert table.by_peer[request.peer][rid] is request
    assert table.open == still_open
    assert sum(map(len, table.by_peer.values())) == sum(r.peer is not None for r in table.requests.values())
    assert sum(len(w.requests) for w in fleet.workers.values()) == sum(
        request.worker is not None for request in table.requests.values()
    )


def check_dispatch(kernel: Kernel) -> None:
    """No request waits while a slot that could serve it is idle; a queue keeps its bound."""
    for model in kernel.fleet.models.values():
        fresh = sum(not (request.losses or request.submit.ticket) for request in model.queue)
        assert fresh <= model.spec.limits.queue_max, f"{fresh} requests wait for {model.spec.model}"
        if model.parked:
            assert any(worker.unheard for worker in model.workers.values()), "parked for nothing"
        if len(model.queue):
            for worker in model.workers.values():
                idle = worker.state is State.READY and worker.running < worker.slots
                assert not idle, f"{worker.name} has a free slot and {len(model.queue)} requests wait"
    assert not kernel.fleet.changed


def check_processes(world: World, kernel: Kernel) -> None:
    """Every process has a worker, every live worker a process; what a process uses stays reserved until it is gone."""
    if not kernel.fleet.counted:
        return  # it is still being told what lives
    groups = world.node.groups
    alive = {(w.name, w.incarnation) for w in kernel.fleet.workers.values() if w.state in ALIVE}
    assert alive == set(groups), f"workers {sorted(alive)}, processes {sorted(groups)}"
    for group in groups.values():
        worker = kernel.fleet.workers[group.worker]
        if worker.pid:  # else it is told once it is there
            assert kernel.fleet.ledger.grant_of(group.worker) == group.grant
            assert worker.in_force.allowed_cpus == group.limits.allowed_cpus
        check_probe(group, worker)


def check_cpus(world: World, kernel: Kernel) -> None:
    """No CPU is two workers' own, nobody runs on another's, and one is always shared."""
    if not kernel.fleet.counted:
        return
    ledger, owner_of = kernel.fleet.ledger, dict[int, str]()
    for worker in kernel.fleet.workers.values():
        for cpu in (ledger.grant_of(worker.name) or Grant()).cpus:
            assert owner_of.setdefault(cpu, worker.name) == worker.name, f"CPU {cpu} is two workers' own"
    everywhere = {cpu.number for cpu in ledger.capacity.cpus}
    assert everywhere - set(owner_of), "no CPU is shared"
    for group in world.node.groups.values():
        worker = kernel.fleet.workers[group.worker]
        # One that is not spawned yet waits at its gate.
        cpus = everywhere if group.limits.allowed_cpus is None else set(group.limits.allowed_cpus)
        strangers = {owner_of[cpu] for cpu in cpus if cpu in owner_of} - {worker.name}
        assert not (worker.pid and strangers), f"{worker.name} runs on the CPUs of {strangers}"
        assert cpus, f"{worker.name} may run nowhere"
    moved = [name for name, worker in kernel.fleet.workers.items() if worker.pid and worker.state is State.READY]
    assert not ledger.copy().repack(moved), "somebody could sit better"


def check_probe(group: Group, worker: Worker) -> None:
    """A command is ready only once it was found to be; it is asked what its state wants to know, and nothing else."""
    if worker.spec.ready.http:
        asked = (group.probe is not None and group.probe.ready, group.probe is not None and group.probe.liveness)
        if worker.state is State.READY:
            assert group.ready, f"{worker.name} is ready, and nobody found it to be"
            assert asked == (None, worker.spec.liveness), f"nobody looks whether {worker.name} lives"
        elif worker.state is State.LOADING:
            assert asked == (worker.spec.ready, None), f"nobody looks whether {worker.name} is ready"
        elif worker.state is State.FROZEN:
            assert asked == (None, None), f"{worker.name} is frozen, and is asked"


def check_to_client(world: World, effect: do.ToClient) -> None:
    """What a stale attempt made never goes to a client."""
    if isinstance(effect.header, bytes):
        assert world.kernel is not None
        decoder = {f.Kind.CHUNK: _CHUNK, f.Kind.DONE: _DONE, f.Kind.FAILED: _FAILED}[effect.kind]
        attempt = decoder.decode(effect.header).attempt
        assert attempt == world.kernel.table.requests[effect.rid].attempt, "a stale attempt's words are passed on"


def check_to_worker(world: World, effect: do.ToWorker) -> None:
    """No two workers are at work on one request. One that was told to stop may not have heard it."""
    if effect.kind is f.Kind.RELEASE:
        world.released.add((effect.peer, effect.rid))
    if effect.kind is not f.Kind.RUN or not effect.payload:
        return
    assert world.kernel is not None
    request = world.kernel.table.requests.get(effect.rid)
    if request is None:
        return  # in the same step it was given a slot that became free, and abandoned with its client
    for group in world.node.groups.values():
        if group.host is None or group.status is not None or group.peer == effect.peer or group.killed:
            continue
        at_work = effect.rid in group.host.running and (group.peer, effect.rid) not in world.released
        # A request whose ACCEPTED was lost has no ticket, and so nothing says that it may run already.
        assert not at_work or (world.life > 1 and not request.submit.ticket), f"two work on {request.key}"


def check_settled(world: World) -> None:
    """Whatever was asked for has ended, and nothing is left over."""
    for client in world.clients:
        waiting = {rid.hex(): (client.protocol._open[rid].have_seq) for rid in client.protocol._open}
        assert not waiting, f"requests wait for ever: {waiting}"
        assert not client.requests
    kernel = world.kernel
    assert kernel is not None
    left = [(request.key, request.state, request.worker) for request in kernel.table.requests.values()]
    assert not left, f"the kernel keeps {left}"
    for group in world.node.groups.values():
        if group.host is not None:
            assert not group.host.running, f"the engine of {group.worker} works on what nobody wants"
            assert not group.host.protocol.kept, f"{group.worker} keeps {group.host.protocol.kept} answers for nobody"
