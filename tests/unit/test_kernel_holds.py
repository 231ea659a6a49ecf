"""The kernel by hand: an operator's stop outlives the daemon, whenever it dies."""

from __future__ import annotations

import msgspec

from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.ledger import Grant
from llmosd.kernel.lifecycle import State
from llmosd.kernel.spec import ModelSpec
from tests.unit.shell import TOKEN, Shell, peer_of, rid_of, spec

OLD = 1005


def successor(held: on.Held, *specs: ModelSpec) -> Shell:
    """A new daemon that was told what is held, and has read its model files."""
    shell = Shell(epoch=9000, counted=False, now=200.0)
    shell.tell(held)
    for one in specs:
        shell.apply(one)
    return shell


def adopt(shell: Shell, one: ModelSpec, name: str = "m@1") -> None:
    shell.tell(on.Adopted(name, OLD, 4242, peer_of(name), TOKEN, one, Grant(1000), one.limits, 100.0))


def test_a_stop_is_kept_before_anything_is_done_about_it_and_before_it_is_answered() -> None:
    shell = Shell(spec(minimum=1))
    shell.ready(shell.only(do.Spawn))
    shell.command(on.Stop, "m", False)
    assert shell.effects[0] == do.KeepHeld(("m",), ("m@1",))
    shell.command(on.Stop, "m", True)
    assert shell.none(do.KeepHeld), "nothing has changed"
    shell.command(on.Start, "m")
    assert shell.effects[0] == do.KeepHeld((), ())


def test_a_stop_of_one_worker_and_a_restart_are_kept_too() -> None:
    shell = Shell(spec(minimum=2, maximum=2))
    for spawn in shell.all(do.Spawn):
        shell.ready(spawn)
    shell.command(on.Stop, "m@2", False)
    assert shell.only(do.KeepHeld) == do.KeepHeld((), ("m@2",))
    shell.command(on.Restarted, "m")
    assert shell.only(do.KeepHeld) == do.KeepHeld((), ())


def test_a_model_that_was_stopped_is_not_started_by_the_next_daemon_until_an_operator_does() -> None:
    shell = successor(on.Held(("m",), ("m@1",)), spec(minimum=1))
    shell.count()
    shell.submit(rid_of(1))
    assert "was stopped by an operator" in shell.failure().message
    shell.wait(1000)
    assert not [effect for effect in shell.everything if isinstance(effect, do.Spawn)]
    shell.command(on.Start, "m")
    assert shell.only(do.Spawn).worker == "m@1"
    assert shell.only(do.KeepHeld) == do.KeepHeld((), ())


def test_a_worker_that_was_stopped_stays_down_and_its_siblings_come() -> None:
    shell = successor(on.Held((), ("m@1",)), spec(minimum=2, maximum=2))
    shell.count()
    assert [spawn.worker for spawn in shell.all(do.Spawn)] == ["m@2"]


def test_a_worker_that_lived_on_though_it_was_stopped_is_ended_and_one_that_was_started_since_is_not() -> None:
    shell = successor(on.Held(("m",), ("m@1",)), spec(maximum=2))
    adopt(shell, spec(maximum=2))
    adopt(shell, spec(maximum=2), "m@2")
    shell.count()
    assert (shell.state("m@1"), shell.state("m@2")) == (State.DRAINING, State.ADOPTED)


def test_what_is_held_and_not_known_yet_is_kept_until_its_file_can_be_read_again() -> None:
    shell = successor(on.Held(("m", "other"), ("m@1",)), spec("other"))
    shell.count()
    shell.command(on.Start, "other")
    assert shell.only(do.KeepHeld) == do.KeepHeld(("m",), ("m@1",))
    shell.apply(spec(minimum=1))
    assert shell.none(do.Spawn)


def test_a_model_that_is_removed_is_held_no_more() -> None:
    shell = Shell(spec(minimum=1))
    shell.ready(shell.only(do.Spawn))
    shell.command(on.Stop, "m", False)
    shell.command(on.Remove, "m")
    assert shell.only(do.KeepHeld) == do.KeepHeld((), ())


def test_who_is_stopped_because_of_what_it_requires_is_not_held() -> None:
    shell = Shell(spec("a"), msgspec.structs.replace(spec("b", minimum=1), requires=("a",)))
    shell.ready(shell.only(do.Spawn))
    shell.ready(shell.only(do.Spawn))
    shell.command(on.Stop, "a", False)
    assert shell.only(do.KeepHeld) == do.KeepHeld(("a",), ("a@1",))
