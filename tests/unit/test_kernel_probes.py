"""The kernel by hand: commands that are asked whether they are ready and whether they live."""

from __future__ import annotations

import msgspec
import pytest

from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.ledger import Grant
from llmosd.kernel.lifecycle import State
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import Command, Liveness, ModelSpec, Ready, Restart, Timeouts
from llmosd.kernel.units import Seconds
from tests.unit.shell import TOKEN, Shell, peer_of, spec

URL = "http://127.0.0.1:8080/health"
READY = Ready(http=URL)
LIVENESS = Liveness(http=URL)
STOP, CONT = 19, 18
OLD = 1005


def plain(ready: Ready = READY, liveness: Liveness = LIVENESS) -> ModelSpec:
    return msgspec.structs.replace(
        spec(minimum=1), engine=Command(command=("serve",)), ready=ready, liveness=liveness, restart=Restart(burst=3),
        timeouts=Timeouts(load=Seconds(60)),
    )  # fmt: skip


def spawned(one: ModelSpec) -> tuple[Shell, do.Spawn]:
    """A shell whose command's process runs."""
    shell = Shell(one)
    spawn = shell.only(do.Spawn)
    shell.spawned(spawn)
    return shell, spawn


def up(one: ModelSpec | None = None) -> tuple[Shell, do.Spawn]:
    shell, spawn = spawned(one or plain())
    shell.tell(on.Ready("m@1", spawn.incarnation), 1.0)
    assert shell.state("m@1") == State.READY
    return shell, spawn


def adopt(shell: Shell, one: ModelSpec, *, ready: bool = False, frozen: bool = False) -> list[do.Effect]:
    return shell.tell(
        on.Adopted(
            "m@1", OLD, 4242, peer_of("m@1"), TOKEN, one, Grant(1000), one.limits, 100.0, frozen=frozen, ready=ready
        )
    )


def successor(one: ModelSpec) -> Shell:
    return Shell(one, epoch=9000, counted=False, now=200.0)


# -- readiness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("liveness", [LIVENESS, Liveness()])
def test_a_command_that_says_nothing_of_it_is_ready_when_its_process_runs(liveness: Liveness) -> None:
    shell, spawn = spawned(plain(Ready(), liveness))
    assert shell.state("m@1") == State.READY
    probes = [do.Probe("m@1", spawn.incarnation, liveness=LIVENESS)] if liveness.http else []
    assert shell.all(do.Probe) == probes


def test_a_command_with_a_check_loads_until_it_is_answered_and_is_then_asked_whether_it_lives() -> None:
    shell, spawn = spawned(plain())
    assert shell.state("m@1") == State.LOADING
    assert shell.only(do.Probe) == do.Probe("m@1", spawn.incarnation, ready=READY)
    shell.tell(on.Ready("m@1", spawn.incarnation - 1))
    assert shell.state("m@1") == State.LOADING, "that was another life"
    shell.tell(on.Ready("m@1", spawn.incarnation))
    assert shell.state("m@1") == State.READY
    assert shell.only(do.Probe) == do.Probe("m@1", spawn.incarnation, liveness=LIVENESS)


def test_a_command_may_take_long_while_it_prints_and_is_ended_when_it_falls_silent() -> None:
    shell, spawn = spawned(plain())
    for _ in range(5):
        shell.wait(59)
        shell.tell(on.NotReady("m@1", spawn.incarnation, "it answers 503", progressed=True))
        assert shell.kernel.workers()[0].why == "it answers 503"
    shell.wait(59)
    shell.tell(on.NotReady("m@1", spawn.incarnation, "it answers 500", progressed=False))
    shell.wait(2)
    assert shell.state("m@1") == State.STOPPING
    assert shell.only(do.Signal).stops
    assert shell.only(do.Probe) == do.Probe("m@1", spawn.incarnation)
    shell.ends(spawn, ExitStatus(code=0))
    assert shell.state("m@1") == State.BACKOFF
    assert shell.kernel.workers()[0].why == "no progress in 1m while loading: it answers 500"


def test_what_is_said_late_of_readiness_changes_nothing() -> None:
    shell, spawn = up()
    shell.tell(on.NotReady("m@1", spawn.incarnation, "it answers 503", progressed=True))
    assert shell.state("m@1") == State.READY
    shell.command(on.Stop, "m", True)
    shell.tell(on.Ready("m@1", spawn.incarnation))
    assert shell.state("m@1") == State.STOPPING


def test_a_command_that_ends_well_before_it_is_ready_has_failed() -> None:
    shell, spawn = spawned(plain())
    shell.ends(spawn, ExitStatus(code=0))
    assert shell.state("m@1") == State.BACKOFF
    assert shell.kernel.workers()[0].why == "exit code 0 before it was ready"
    shell, spawn = up()
    shell.ends(spawn, ExitStatus(code=0))
    assert shell.state("m@1") == State.STOPPED


def test_a_command_of_which_nobody_can_tell_whether_it_is_ready_is_ended_with_the_reason() -> None:
    shell, spawn = spawned(plain())
    shell.tell(on.Unhealthy("m@1", spawn.incarnation, "ready.log takes too long"))
    assert shell.state("m@1") == State.STOPPING
    shell.ends(spawn, ExitStatus(signal=15))
    assert (shell.state("m@1"), shell.kernel.workers()[0].why) == (State.BACKOFF, "ready.log takes too long")


def test_a_changed_check_starts_the_command_again() -> None:
    shell, _ = up()
    shell.apply(plain(liveness=Liveness(http=URL, failures=9)))
    assert shell.state("m@1") == State.STOPPING


# -- liveness ---------------------------------------------------------------------------------------------------------


def test_a_command_that_hangs_is_killed_and_comes_back_with_the_reason() -> None:
    shell, spawn = up()
    shell.tell(on.Unhealthy("m@1", spawn.incarnation, "hung: no answer"))
    assert shell.only(do.KillGroup)
    assert shell.only(do.Probe) == do.Probe("m@1", spawn.incarnation)
    shell.ends(spawn)
    assert (shell.state("m@1"), shell.kernel.workers()[0].why) == (State.BACKOFF, "hung: no answer")
    shell.wait(1)
    assert shell.only(do.Spawn).incarnation == spawn.incarnation + 1


def test_a_command_that_is_frozen_is_asked_nothing_and_what_was_said_of_it_before_is_forgotten() -> None:
    shell, spawn = up()
    shell.command(on.Kill, "m", STOP)
    assert shell.only(do.Probe) == do.Probe("m@1", spawn.incarnation)
    shell.tell(on.Unhealthy("m@1", spawn.incarnation, "hung: no answer"))
    assert shell.state("m@1") == State.FROZEN
    shell.command(on.Kill, "m", CONT)
    assert shell.state("m@1") == State.READY
    assert shell.only(do.Probe) == do.Probe("m@1", spawn.incarnation, liveness=LIVENESS)


def test_a_command_that_ends_already_is_not_ended_again_for_being_silent() -> None:
    shell, spawn = up()
    shell.command(on.Stop, "m", True)
    shell.tell(on.Unhealthy("m@1", spawn.incarnation, "hung: no answer"))
    assert shell.none(do.KillGroup)
    shell.ends(spawn)
    assert shell.kernel.workers()[0].why == "stopped by an operator"


def test_of_a_hosted_worker_its_host_tells_and_nobody_else() -> None:
    shell = Shell(spec(minimum=1))
    spawn = shell.only(do.Spawn)
    shell.spawned(spawn)
    shell.tell(on.Ready("m@1", spawn.incarnation))
    assert shell.state("m@1") == State.STARTING
    shell.ready(spawn)
    shell.tell(on.Unhealthy("m@1", spawn.incarnation, "hung: no answer"))
    assert shell.state("m@1") == State.READY
    assert not [effect for effect in shell.everything if isinstance(effect, do.Probe)]


# -- adoption ---------------------------------------------------------------------------------------------------------


def test_a_command_that_was_ready_is_so_at_once_under_a_new_daemon() -> None:
    shell = successor(plain())
    adopt(shell, plain(), ready=True)
    assert shell.state("m@1") == State.READY
    assert shell.only(do.Probe) == do.Probe("m@1", OLD, liveness=LIVENESS)


def test_a_command_that_was_not_ready_is_asked_again_by_a_new_daemon() -> None:
    shell = successor(plain())
    adopt(shell, plain())
    assert shell.state("m@1") == State.LOADING
    assert shell.only(do.Probe) == do.Probe("m@1", OLD, ready=READY)
    shell.tell(on.Ready("m@1", OLD))
    assert shell.state("m@1") == State.READY


def test_a_command_that_was_frozen_is_not_asked_by_a_new_daemon_until_it_thaws() -> None:
    shell = successor(plain())
    adopt(shell, plain(), ready=True, frozen=True)
    assert shell.state("m@1") == State.FROZEN
    assert shell.all(do.Probe)[-1] == do.Probe("m@1", OLD)
    shell.command(on.Kill, "m", CONT)
    assert shell.only(do.Probe).liveness == LIVENESS


def test_a_command_whose_file_changed_is_not_asked_but_ended() -> None:
    shell = successor(plain(liveness=Liveness()))
    adopt(shell, plain())
    shell.count()
    assert shell.state("m@1") == State.STOPPING
    assert shell.only(do.Probe) == do.Probe("m@1", OLD)
