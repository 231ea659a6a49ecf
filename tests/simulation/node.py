"""A node whose processes take time to start, ignore signals, leave children behind, and get stuck in the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.ledger import Grant
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import Limits, ModelSpec
from tests.simulation.host import Host

if TYPE_CHECKING:
    from tests.simulation.world import World


class Group:
    """A worker's process group, with its record for adoption."""

    def __init__(self, world: World, spawn: do.Spawn, pid: int) -> None:
        self.worker = spawn.worker
        self.incarnation = spawn.incarnation
        self.spec: ModelSpec = spawn.spec
        self.limits: Limits = spawn.limits
        self.grant: Grant = spawn.grant
        self.pid = pid
        self.peer = world.clock.chance.randbytes(16)
        self.token = world.clock.chance.randbytes(16)
        self.started_at = 0.0
        #: It is past its gate, and on record.
        self.running = False
        self.stopping = False
        self.draining = False
        self.killed = False
        self.status: ExitStatus | None = None
        self.empty = False
        #: No signal reaches it before this time.
        self.stuck_until = 0.0
        self.host: Host | None = None
        #: What it is asked just now, and since when: what an earlier question led to comes too late.
        self.probe: do.Probe | None = None
        #: It was found to be ready, and that is on record.
        self.ready = False


class Node:
    """The processes of this machine; they live on when the daemon dies."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._clock = world.clock
        self.groups: dict[tuple[str, int], Group] = {}
        self._pids = 100

    # -- effects --------------------------------------------------------------------------------------------

    def carry_out(self, effect: do.Effect) -> None:
        if isinstance(effect, do.Spawn):
            self._spawn(effect)
        elif isinstance(effect, do.Signal | do.KillGroup | do.Freeze | do.Confine | do.Probe | do.NoteDraining):
            group = self.groups.get((effect.worker, effect.incarnation))
            if group is None or not group.running:
                return  # too early or too late, as for any process
            if isinstance(effect, do.Signal):
                group.stopping = group.stopping or effect.stops
                self._signal(group, effect.signal)
            elif isinstance(effect, do.NoteDraining):
                group.draining = True
            elif isinstance(effect, do.KillGroup):
                group.stopping = True
                self.kill(group)
            elif isinstance(effect, do.Probe):
                group.probe = effect
                self._ask(group, effect, self._world.life)
            elif isinstance(effect, do.Freeze):
                if group.host is not None:
                    group.host.freeze(effect.frozen)
            else:
                group.limits, group.grant = effect.limits, effect.grant

    def _spawn(self, effect: do.Spawn) -> None:
        self._pids += 1
        key = (effect.worker, effect.incarnation)
        assert key not in self.groups, f"{key} was started twice"
        group = self.groups[key] = Group(self._world, effect, self._pids)
        clock, life = self._clock, self._world.life
        delay = clock.between(5, 20) if clock.happens(self._world.trouble * 0.03) else clock.between(0.001, 0.05)
        if clock.happens(self._world.trouble * 0.05):
            clock.after(delay, self._spawn_failed, group, life)
        else:
            clock.after(delay, self._go, group, life)

    def _spawn_failed(self, group: Group, life: int) -> None:
        if life == self._world.life and self._world.kernel is not None:
            del self.groups[group.worker, group.incarnation]
            permanent = self._clock.happens(0.2)
            failed = on.SpawnFailed(group.worker, group.incarnation, "exec", "no such file", permanent)
            self._world.tell(failed)

    def _go(self, group: Group, life: int) -> None:
        if life != self._world.life or self._world.kernel is None:
            self.groups.pop((group.worker, group.incarnation), None)  # the gate reads EOF
            return
        group.running = True
        group.started_at = self._clock.now
        if group.spec.engine.hosted:
            group.host = Host(self._world, group, lambda status: self.exit(group, status))
        spawned = on.Spawned(group.worker, group.incarnation, group.pid, group.peer, group.token)
        self._later(spawned)
        if group.host is not None:
            self._clock.after(self._clock.between(0.005, 0.05), group.host.begin)

    # -- questions ------------------------------------------------------------------------------------------

    def _ask(self, group: Group, probe: do.Probe, life: int) -> None:
        """A command gets ready sooner or later or never, and may hang."""
        clock, trouble = self._clock, self._world.trouble
        if group.probe is not probe or group.status is not None or life != self._world.life:
            return
        if self._world.kernel is None:
            return
        if probe.ready is not None and clock.happens(0.3):
            group.ready = True
            self._later(on.Ready(group.worker, group.incarnation))
        elif probe.ready is not None:
            if clock.happens(trouble * 0.05):
                self._later(on.Unhealthy(group.worker, group.incarnation, "it cannot be told"))
            self._later(on.NotReady(group.worker, group.incarnation, "not yet", clock.happens(0.5)))
            clock.after(clock.between(0.05, 3.0), self._ask, group, probe, life)
        elif probe.liveness is not None and clock.happens(trouble * 0.05):
            self._later(on.Unhealthy(group.worker, group.incarnation, "hung"))
        elif probe.liveness is not None:
            clock.after(clock.between(0.5, 5.0), self._ask, group, probe, life)

    # -- ends -----------------------------------------------------------------------------------------------

    def _signal(self, group: Group, signal: int) -> None:
        clock = self._clock
        if group.status is None and not clock.happens(self._world.trouble * 0.2):  # else it ignores the signal
            clock.after(clock.between(0.001, 1.0), self.exit, group, ExitStatus(code=0))

    def exit(self, group: Group, status: ExitStatus) -> None:
        """The leader ends; a child may stay."""
        if group.status is not None or group.empty:
            return
        group.status = status
        if group.host is not None:
            group.host.die()
        self._later(on.Exited(group.worker, group.incarnation, status))
        if not self._clock.happens(0.3):
            self._clock.after(self._clock.between(0.0, 0.02), self._empty, group)

    def kill(self, group: Group) -> None:
        """SIGKILL to all of the group."""
        group.killed = True
        clock = self._clock
        if clock.now < group.stuck_until:
            if group.host is not None:
                group.host.die()
            clock.after(group.stuck_until - clock.now, self.kill, group)
            return
        self.exit(group, ExitStatus(signal=9))
        clock.after(clock.between(0.0, 0.02), self._empty, group)

    def _empty(self, group: Group) -> None:
        if not group.empty:
            group.empty = True
            self._later(on.Emptied(group.worker, group.incarnation))

    def _later(self, event: on.Event) -> None:
        """A pidfd or a cgroup event: in order, a moment later, and only to a daemon that watches."""
        self._clock.after(0.0005, self._report, event, self._world.life)

    def _report(self, event: on.Event, life: int) -> None:
        if life != self._world.life or self._world.kernel is None:
            return
        if isinstance(event, on.Emptied):
            self.groups.pop((event.worker, event.incarnation), None)
        self._world.tell(event)

    # -- a new daemon ---------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """What a new daemon finds on record. Who died meanwhile is there, until it was killed and seen empty."""
        for key, group in list(self.groups.items()):
            if not group.running:
                del self.groups[key]
                continue
            group.empty = False
            self._world.tell(
                on.Adopted(
                    group.worker, group.incarnation, group.pid, group.peer, group.token, group.spec, group.grant,
                    group.limits, group.started_at, group.stopping, ready=group.ready, draining=group.draining,
                    ended=None if group.status is None else ExitStatus(),
                )
            )  # fmt: skip
