"""What goes wrong, and what people do: each at random moments, all from the world's one seed."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import msgspec

from llmosd.kernel import events as on
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import ModelSpec
from llmosd.kernel.units import CpuSet
from tests.simulation.models import MODELS

if TYPE_CHECKING:
    from tests.simulation.world import World


def begin(world: World) -> None:
    for _ in range(2):
        _submit(world)
    _fault(world)
    _operate(world)


def _submit(world: World) -> None:
    """Requests come in bursts."""
    clock = world.clock
    if not world.trouble:
        return
    models = [*(name for name, spec in MODELS.items() if spec.routed), "small", "kept-alias", "nothing"]
    model = clock.chance.choice(models)
    for _ in range(clock.chance.choice([1, 1, 1, 2, 4, 20 if clock.happens(0.1) else 1])):
        clock.chance.choice(world.clients).submit(model)
    clock.after(clock.chance.expovariate(3.0), _submit, world)


def _fault(world: World) -> None:
    clock, chance = world.clock, world.clock.chance
    if not world.trouble:
        return
    clock.after(chance.expovariate(0.6 * world.trouble), _fault, world)
    groups = [group for group in world.node.groups.values() if group.running and group.status is None]
    what = chance.random()
    if what < 0.35 and groups:
        group = chance.choice(groups)
        if clock.happens(0.2):
            group.stuck_until = clock.now + clock.between(0, 15)
        world.node.exit(group, chance.choice([ExitStatus(signal=9), ExitStatus(code=1), ExitStatus(code=0)]))
    elif what < 0.5 and groups:
        group = chance.choice(groups)
        if group.host is not None and group.host.connection.is_open:
            group.host.connection.close()
            clock.after(clock.between(0.01, 2.0), _reopen, world, group.host)
    elif what < 0.7:
        client = chance.choice(world.clients)
        if client.connection.is_open:
            client.connection.close()
            clock.after(clock.between(0.01, 15.0 if clock.happens(0.2) else 1.0), _reopen, world, client)
    elif what < 0.8:
        world.kill_client(chance.choice(world.clients))
        world.add_client()
    elif what < 0.92 and world.kernel is not None:
        kill_daemon(world)
    elif what < 0.95 and groups:
        group = chance.choice(groups)
        if group.host is not None:
            group.host.freeze(True)  # it hangs, and nobody asked for that
    elif groups and world.kernel is not None:
        group = chance.choice(groups)
        world.tell(on.OverLimit(group.worker, group.incarnation, "too much memory"))


def _reopen(world: World, end: object) -> None:
    if world.kernel is not None and getattr(end, "alive", True):
        end.connection.open()  # type: ignore[attr-defined]  # a client or a host


def _operate(world: World) -> None:
    clock, chance = world.clock, world.clock.chance
    if not world.trouble:
        return
    clock.after(chance.expovariate(0.5), _operate, world)
    if world.kernel is None:
        return
    names = [*world.files, *world.kernel.fleet.workers]
    name = chance.choice(names)
    match chance.randrange(11):
        case 0:
            world.command(on.Stop, name, clock.happens(0.5))
            if clock.happens(0.2):
                clock.after(clock.between(0, 3), _die, world)
            clock.after(clock.between(0.1, 20 if clock.happens(0.3) else 5), _again, world, on.Start, name)
        case 1:
            world.command(on.Start, name)
        case 2:
            world.command(on.Restarted, name)
        case 3 | 4:
            world.command(on.Reset, name)
        case 5:
            world.command(on.Kill, name, chance.choice([9, 15, 10]))
        case 6:
            if not world.command(on.Kill, name, int(signal.SIGSTOP)).refusal:
                clock.after(clock.between(0.1, 12), _again, world, on.Kill, name, int(signal.SIGCONT))
        case 7:
            changes = chance.choice(
                [{"slots": 1}, {"slots": 3}, {"cpu_weight": 50}, {"slots": None}, {"slots": -1}, {"allowed_cpus": None}]
            )
            if clock.happens(0.5):
                changes = {"allowed_cpus": CpuSet(chance.sample(range(6), chance.randint(1, 4)))}
            world.command(on.SetLimits, name, changes)
        case 8:
            _edit(world)
        case 9:
            if clock.happens(0.3):
                _remove(world)
        case 10:
            if requests := list(world.kernel.table.requests):
                world.command(on.Kill, chance.choice(requests).hex(), 15)


def _again(world: World, kind: type[on.Event], *details: object) -> None:
    if world.kernel is not None:
        world.command(kind, *details)


def _die(world: World) -> None:
    if world.kernel is not None:
        kill_daemon(world)


def kill_daemon(world: World) -> None:
    """The daemon dies; while it is away, model files change too."""
    world.kill_daemon()
    if world.clock.happens(0.2):
        _edit(world)
    if world.clock.happens(0.1):
        _remove(world)


def _edit(world: World) -> None:
    """A model file is edited."""
    chance = world.clock.chance
    spec = chance.choice(list(world.files.values()))
    change = chance.randrange(4)
    if change == 0 and spec.routed:
        env = {"EDITED": str(chance.randrange(3))}
        spec = msgspec.structs.replace(spec, engine=msgspec.structs.replace(spec.engine, env=env))
    elif change == 1:
        slots, cpus = chance.choice([1, 2, 4]), chance.choice([None, CpuSet((1, 2)), CpuSet((0, 3, 4))])
        limits = msgspec.structs.replace(spec.limits, slots=slots, allowed_cpus=cpus)
        spec = msgspec.structs.replace(spec, limits=limits)
    elif change == 2:
        names = [*MODELS, "small-alias", "nothing"]
        requires = tuple(chance.sample(names, chance.choice([0, 1, 1, 2])))
        spec = msgspec.structs.replace(spec, requires=requires)  # it may be refused, for a circle
    else:
        scale = msgspec.structs.replace(spec.scale, max=chance.choice([1, 2, 3]))
        spec = msgspec.structs.replace(spec, scale=scale)
    _write(world, spec)


def _remove(world: World) -> None:
    """A model file is deleted, and comes back later."""
    spec = world.files.pop(world.clock.chance.choice(list(world.files)))
    _again(world, on.Remove, spec.model)
    world.clock.after(world.clock.between(0.1, 6), _write, world, spec)


def _write(world: World, spec: ModelSpec) -> None:
    world.files[spec.model] = spec
    _again(world, on.Apply, spec)


def repair(world: World) -> None:
    """What an operator does once the trouble is over."""
    if world.kernel is None:
        world.clock.after(1.0, repair, world)
        return
    for client in world.clients:
        client.connection.open()
    for group in list(world.node.groups.values()):
        if group.host is not None and group.status is None:
            group.host.connection.open()
    for name in list(world.kernel.fleet.workers):
        if name in world.kernel.fleet.workers and world.kernel.fleet.workers[name].state == "frozen":
            world.command(on.Kill, name, int(signal.SIGCONT))
    for group in world.node.groups.values():
        if group.host is not None:
            group.host.freeze(False)
    world.files |= MODELS
    # Twice: one may be refused only for what another required until now.
    for spec in [*MODELS.values(), *MODELS.values()]:
        world.command(on.Apply, spec)
    for name in MODELS:
        world.command(on.Reset, name)
    for name in MODELS:
        world.command(on.Start, name)
