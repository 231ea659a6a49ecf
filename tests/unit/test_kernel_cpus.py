"""The kernel by hand: CPUs of a worker's own, and who runs where when such a worker comes, moves and goes."""

from __future__ import annotations

import msgspec

from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.cpus import Cpu
from llmosd.kernel.ledger import Grant
from llmosd.kernel.lifecycle import State
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import ModelSpec, Resources
from llmosd.kernel.units import CpuSet
from tests.unit.shell import TOKEN, Shell, peer_of, rid_of, spec

ONE = rid_of(1)
#: 0 1 | 2 3
TWO_NODES = [Cpu(0, 0, 0, 0), Cpu(1, 0, 1, 0), Cpu(2, 1, 0, 1), Cpu(3, 1, 1, 1)]


def owner(model: str, cpus: int, allowed: str = "", **fields: int) -> ModelSpec:
    """A model whose workers have CPUs of their own."""
    return sharer(model, allowed, Resources(cpus=cpus, cpu_placement="exclusive"), **fields)


def sharer(model: str, allowed: str = "", resources: Resources | None = None, **fields: int) -> ModelSpec:
    one = spec(model, idle=0, **fields)  # type: ignore[arg-type]
    limits = msgspec.structs.replace(one.limits, allowed_cpus=CpuSet.parse(allowed) if allowed else None)
    return msgspec.structs.replace(one, limits=limits, resources=resources or Resources())


def start(shell: Shell, model: str) -> do.Spawn:
    """Bring a worker of a model up; the effects of its start stay in `shell.effects`."""
    shell.command(on.Start, model)
    effects, spawn = shell.effects, shell.only(do.Spawn)
    shell.ready(spawn)
    shell.effects = effects
    return spawn


def stop(shell: Shell, spawn: do.Spawn) -> None:
    shell.command(on.Stop, spawn.worker, True)
    shell.tell(on.Exited(spawn.worker, spawn.incarnation, ExitStatus(code=0)))
    shell.tell(on.Emptied(spawn.worker, spawn.incarnation))


def confined(shell: Shell) -> dict[str, str]:
    """The CPUs that running workers were given by the last event."""
    return {effect.worker: str(effect.limits.allowed_cpus or "all") for effect in shell.all(do.Confine)}


def test_nobody_is_pinned_while_nobody_has_cpus_of_its_own() -> None:
    shell = Shell(sharer("a"), sharer("b", "1"), cpus=TWO_NODES)
    assert start(shell, "a").limits.allowed_cpus is None
    assert start(shell, "b").limits.allowed_cpus == (1,)
    assert not [effect for effect in shell.everything if isinstance(effect, do.Confine)]


def test_the_others_leave_the_cpus_of_who_comes_and_get_them_back_when_it_goes() -> None:
    shell = Shell(sharer("a"), sharer("b", "0-2"), owner("own", 2), sharer("late"), cpus=TWO_NODES)
    start(shell, "a")
    start(shell, "b")
    own = start(shell, "own")
    assert own.grant == Grant(2000, cpus=(0, 1), memory_node=0)
    assert own.limits.allowed_cpus == (0, 1)
    assert confined(shell) == {"a@1": "2-3", "b@1": "2"}
    late = start(shell, "late")
    assert late.limits.allowed_cpus == (2, 3)
    assert {view.name: str(view.limits.allowed_cpus) for view in shell.kernel.workers()} == {
        "a@1": "2-3", "b@1": "2", "own@1": "0-1", "late@1": "2-3"
    }  # fmt: skip
    shell.command(on.Stop, "own", True)
    assert shell.none(do.Confine), "its processes may still be there"
    shell.tell(on.Emptied("own@1", own.incarnation))
    assert confined(shell) == {"a@1": "all", "b@1": "0-2", "late@1": "all"}


def test_a_worker_that_is_on_its_way_hears_of_other_cpus_once_it_is_there() -> None:
    shell = Shell(sharer("a"), owner("own", 1), cpus=TWO_NODES)
    shell.command(on.Start, "a")
    spawn = shell.only(do.Spawn)
    start(shell, "own")
    assert shell.none(do.Confine)
    shell.spawned(spawn)
    assert confined(shell) == {"a@1": "1-3"}
    shell.hello("a@1")
    assert shell.none(do.Confine)


def test_the_last_shared_cpu_is_nobodys_own() -> None:
    shell = Shell(owner("all", 4), owner("most", 3), owner("one", 1), cpus=TWO_NODES)
    refusal = "needs 4 CPUs of its own; CPUs 0-3 are free, and one CPU always stays shared"
    shell.submit(ONE, "all")
    assert shell.failure().message == f"all cannot be started on this machine: {refusal}"
    assert start(shell, "most").grant.cpus == (0, 1, 2)
    assert shell.command(on.Start, "one").message == (
        "one@1 is not started: needs 1 CPU of its own; CPU 3 is free, and one CPU always stays shared"
    )


def test_what_is_reserved_of_the_shared_cpus_is_nobodys_own() -> None:
    shell = Shell(sharer("a", "", Resources(cpus=2.5)), owner("own", 2), cpus=TWO_NODES)
    start(shell, "a")
    assert shell.command(on.Start, "own").message == "own@1 is not started: needs 2 CPUs; 1.5 of 4 are free"


def test_who_shares_keeps_one_of_its_allowed_cpus() -> None:
    shell = Shell(sharer("a", "1"), owner("own", 1, "1"), owner("two", 2), cpus=TWO_NODES)
    start(shell, "a")
    assert shell.command(on.Start, "own").message == (
        "own@1 is not started: needs 1 CPU of its own; then a@1 would have none left of its allowed_cpus, 1"
    )
    assert start(shell, "two").grant.cpus == (2, 3)


def test_who_is_allowed_only_what_is_anothers_waits_for_it_and_an_idle_owner_makes_room() -> None:
    shell = Shell(sharer("a", "0-1"), owner("own", 2), cpus=TWO_NODES)
    own = start(shell, "own")
    shell.submit(ONE, "a")
    assert shell.kernel.models()[0].why == "its allowed_cpus, 0-1, belong to own@1 alone"
    assert shell.state("own@1") == State.STOPPING
    shell.tell(on.Exited("own@1", own.incarnation, ExitStatus(code=0)))
    shell.tell(on.Emptied("own@1", own.incarnation))
    assert shell.only(do.Spawn).worker == "a@1"


def test_when_one_leaves_who_was_split_over_nodes_moves_together_and_the_record_says_so() -> None:
    more = [*TWO_NODES, Cpu(4, 2, 0, 2)]
    shell = Shell(owner("a", 1, "0"), owner("b", 2, "1-4"), sharer("c"), owner("d", 1, "2"), cpus=more)
    start(shell, "c")
    first, second = start(shell, "a"), start(shell, "d")
    split = start(shell, "b")
    assert split.grant == Grant(2000, cpus=(1, 3), allowed_cpus=CpuSet((1, 2, 3, 4)))
    stop(shell, first)
    assert confined(shell) == {"c@1": "0,4"}, "there is nothing better for b"
    stop(shell, second)
    assert [(e.kind, e.subject, e.message) for e in shell.all(do.Happened) if e.kind == "repacked"] == [
        ("repacked", "b@1", "CPUs 2-3 instead of 1,3")
    ]
    assert confined(shell) == {"b@1": "2-3", "c@1": "0-1,4"}
    moved = next(effect for effect in shell.all(do.Confine) if effect.worker == "b@1")
    assert moved.grant == Grant(2000, cpus=(2, 3), allowed_cpus=CpuSet((1, 2, 3, 4)))
    assert shell.kernel.fleet.ledger.grant_of("b@1") == moved.grant
    assert next(view.limits.allowed_cpus for view in shell.kernel.workers() if view.name == "b@1") == (2, 3)


def test_a_worker_that_ends_is_not_moved_any_more() -> None:
    shell = Shell(owner("a", 1, "0"), owner("b", 2, "1-2"), cpus=TWO_NODES)
    first = start(shell, "a")
    start(shell, "b")
    shell.command(on.SetLimits, "b@1", {"allowed_cpus": None})
    assert confined(shell) == {"b@1": "2-3"}
    shell.command(on.Stop, "b", True)
    stop(shell, first)
    assert shell.none(do.Confine)


def test_limits_changed_live_move_an_owner_or_are_refused_with_the_reason() -> None:
    shell = Shell(owner("own", 2), sharer("a"), cpus=TWO_NODES)
    start(shell, "own")
    start(shell, "a")
    shell.command(on.SetLimits, "own", {"allowed_cpus": CpuSet((1, 2, 3))})
    assert confined(shell) == {"own@1": "2-3", "a@1": "0-1"}
    reply = shell.command(on.SetLimits, "own", {"allowed_cpus": CpuSet((3,))})
    assert (reply.refusal, reply.message) == (
        "refused",
        "own@1 cannot be kept on these CPUs: needs 2 CPUs of its own out of its allowed_cpus, 3; CPU 3 is free",
    )
    reply = shell.command(on.SetLimits, "a", {"allowed_cpus": CpuSet((2,))})
    assert reply.message == "a@1 cannot be kept on these CPUs: its allowed_cpus, 2, belong to own@1 alone"
    shell.command(on.SetLimits, "a", {"allowed_cpus": CpuSet((1, 2))})
    assert confined(shell) == {"a@1": "1"}
    assert str(shell.kernel.fleet.workers["a@1"].limits.allowed_cpus) == "1-2", "what is asked for stays"


def test_a_changed_file_that_asks_for_anothers_cpus_leaves_them_to_it() -> None:
    shell = Shell(owner("own", 2), sharer("a"), cpus=TWO_NODES)
    own = start(shell, "own")
    start(shell, "a")
    shell.apply(sharer("a", "0-1"))
    assert str(shell.kernel.workers()[1].limits.allowed_cpus) == "2-3"
    warning = next(effect for effect in shell.all(do.Happened) if effect.kind == "warning")
    assert warning.message == "its allowed_cpus, 0-1, belong to own@1 alone; until they are free it runs on 2-3"
    stop(shell, own)
    assert confined(shell) == {"a@1": "0-1"}


def test_a_record_is_kept_of_what_is_allowed_though_nothing_changes_on_the_process() -> None:
    shell = Shell(owner("own", 1), cpus=TWO_NODES)
    start(shell, "own")
    shell.command(on.SetLimits, "own@1", {"allowed_cpus": CpuSet((0, 1))})
    assert shell.only(do.Confine).grant == Grant(1000, cpus=(0,), allowed_cpus=CpuSet((0, 1)), memory_node=0)


# -- a new daemon ---------------------------------------------------------------------------------------------------


def successor(*specs: ModelSpec) -> Shell:
    return Shell(*specs, epoch=9000, counted=False, now=200.0, cpus=TWO_NODES)


def adopt(shell: Shell, one: ModelSpec, grant: Grant, in_force: str) -> None:
    limits = msgspec.structs.replace(one.limits, allowed_cpus=CpuSet.parse(in_force) if in_force else None)
    name = f"{one.model}@1"
    shell.tell(on.Adopted(name, 1005, 4242, peer_of(name), TOKEN, one, grant, limits, 100.0))


def test_who_is_adopted_keeps_its_cpus_and_nobody_is_told_anything() -> None:
    own, shares, bound = owner("own", 2), sharer("a"), sharer("b", "1-2")
    shell = successor(own, shares, bound)
    adopt(shell, own, Grant(2000, cpus=(2, 3), memory_node=1), "2-3")
    adopt(shell, shares, Grant(), "0-1")
    adopt(shell, bound, Grant(allowed_cpus=CpuSet((1, 2))), "1")
    shell.count()
    assert not [effect for effect in shell.everything if isinstance(effect, do.Confine)]
    assert str(shell.kernel.fleet.workers["b@1"].limits.allowed_cpus) == "1-2"
    shell.tell(on.Exited("own@1", 1005, ExitStatus()))
    shell.tell(on.Emptied("own@1", 1005))
    assert confined(shell) == {"a@1": "all", "b@1": "1-2"}


def test_cpus_of_who_died_with_the_daemon_are_shared_again() -> None:
    shares = sharer("a")
    shell = successor(shares)
    adopt(shell, shares, Grant(), "0-1")
    assert shell.none(do.Confine)
    shell.count()
    assert confined(shell) == {"a@1": "all"}


def test_a_move_that_the_record_missed_is_made_good() -> None:
    first, second = owner("a", 2), owner("b", 1)
    shell = successor(first, second)
    # The daemon moved a from 1,3 and gave 3 away, and died before it had written a's record.
    adopt(shell, first, Grant(2000, cpus=(1, 3)), "1,3")
    adopt(shell, second, Grant(1000, cpus=(3,)), "3")
    shell.count()
    assert confined(shell) == {"a@1": "0-1"}
