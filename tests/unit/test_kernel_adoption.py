"""The kernel by hand: a new daemon takes over what an earlier one left."""

from __future__ import annotations

import msgspec
import pytest

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.ledger import Grant
from llmosd.kernel.lifecycle import State
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import ModelSpec, Simulated
from tests.unit.shell import TOKEN, Shell, peer_of, rid_of, spec

ONE = rid_of(1)
OLD = 1005


def successor(*specs: ModelSpec, epoch: int = 9000) -> Shell:
    """A new daemon that has read its model files and has not looked at the machine yet."""
    return Shell(*(specs or (spec(minimum=1),)), epoch=epoch, counted=False, now=200.0)


def adopt(shell: Shell, one: ModelSpec, name: str = "m@1", *, stopping: bool = False) -> list[do.Effect]:
    return shell.tell(on.Adopted(name, OLD, 4242, peer_of(name), TOKEN, one, Grant(1000), one.limits, 100.0, stopping))


def ticket() -> bytes:
    """Of request ONE, signed by the earlier daemon."""
    shell = Shell(spec())
    shell.submit(ONE)
    header = shell.to_client(f.Kind.ACCEPTED)[0].header
    assert isinstance(header, f.Accepted)
    return header.ticket


def taken_over() -> Shell:
    """A new daemon whose one worker is adopted and has not said HELLO."""
    shell = successor()
    adopt(shell, spec(minimum=1))
    shell.count()
    return shell


def test_what_lives_is_adopted_and_not_started_again() -> None:
    shell = taken_over()
    assert shell.none(do.Spawn)
    assert shell.state("m@1") == State.ADOPTED
    assert shell.kernel.ledger().free.millicpus == 3000
    shell.hello("m@1")
    assert shell.state("m@1") == State.READY


def test_a_worker_that_was_frozen_stays_frozen_until_an_operator_thaws_it() -> None:
    shell = successor()
    one = spec(minimum=1)
    shell.tell(on.Adopted("m@1", OLD, 4242, peer_of("m@1"), TOKEN, one, Grant(1000), one.limits, 100.0, frozen=True))
    shell.count()
    assert shell.state("m@1") == State.FROZEN
    shell.wait(3600)
    assert shell.state("m@1") == State.FROZEN
    shell.command(on.Kill, "m@1", 18)
    assert shell.state("m@1") == State.READY


def test_a_frozen_worker_that_is_to_end_is_thawed_so_that_it_can() -> None:
    shell = successor()
    one = spec(minimum=1)
    shell.tell(
        on.Adopted("m@1", OLD, 4242, peer_of("m@1"), TOKEN, one, Grant(1000), one.limits, 100.0, True, frozen=True)
    )
    assert shell.state("m@1") == State.STOPPING
    assert [effect.frozen for effect in shell.all(do.Freeze)] == [False]


def test_a_worker_that_was_draining_goes_on_draining_and_ends() -> None:
    shell = taken_over()
    held = f.HeldRequest(ONE, 7, 0, 1, False)
    shell.hello("m@1", f.Phase.DRAINING, held)
    assert shell.state("m@1") == State.DRAINING
    shell.worker("m@1", f.Kind.DONE, ONE, f.Done(7, 1))
    shell.client(f.Kind.ACK, ONE, f.Ack(2))
    assert shell.state("m@1") == State.STOPPING


def test_a_request_with_a_ticket_waits_until_every_adopted_worker_was_heard() -> None:
    shell = taken_over()
    shell.submit(ONE, ticket=ticket())
    assert shell.runs() == []
    shell.hello("m@1")
    assert shell.runs() == [ONE]


def test_a_request_with_a_ticket_goes_on_where_it_runs() -> None:
    shell = taken_over()
    shell.submit(ONE, ticket=ticket(), have_seq=3)
    shell.hello("m@1", f.Phase.READY, f.HeldRequest(ONE, 1001, 2, 7, False))
    header, payload = shell.run().header, shell.run().payload
    assert isinstance(header, f.Run)
    assert (header.attempt, header.first_seq, payload) == (1001, 3, ())
    shell.worker("m@1", f.Kind.CHUNK, ONE, f.Chunk(1001, 3, 1), b"d")
    assert len(shell.to_client(f.Kind.CHUNK)) == 1


def test_a_request_with_a_ticket_runs_again_once_an_adopted_worker_is_gone_and_not_before() -> None:
    shell = taken_over()
    shell.submit(ONE, ticket=ticket())
    shell.wait(31)
    assert shell.only(do.KillGroup), "it never said HELLO"
    assert shell.none(do.Spawn)
    shell.tell(on.Exited("m@1", OLD, ExitStatus()))
    shell.tell(on.Emptied("m@1", OLD))
    shell.wait(1)
    shell.ready(shell.only(do.Spawn))
    header = shell.run().header
    assert isinstance(header, f.Run)
    assert header.attempt > 9000, "above all attempts of the daemon before"


def test_a_forged_ticket_is_no_ticket() -> None:
    shell = taken_over()
    shell.submit(ONE, ticket=b"x" * 24)
    assert len(shell.kernel.fleet.models["m"].queue) == 1


def test_a_request_known_from_its_worker_alone_waits_for_its_client_and_has_it_submit_again() -> None:
    shell = taken_over()
    shell.hello("m@1", f.Phase.READY, f.HeldRequest(ONE, 1001, 0, 5, False))
    shell.client(f.Kind.HELLO, b"", f.ClientHello(b"i" * 16, (f.OpenRequest(ONE, 2, ticket()),)))
    (welcome,) = shell.to_client(f.Kind.WELCOME)
    assert isinstance(welcome.header, f.Welcome)
    assert welcome.header.unknown == (ONE,), "the body is its client's to keep"
    assert shell.runs() == [ONE], "and what it misses comes at once"
    shell.submit(ONE, ticket=ticket(), have_seq=2, remaining_ms=5000)
    assert len(shell.to_client(f.Kind.ACCEPTED)) == 1
    shell.wait(6)
    assert f.Kind.CANCEL in [effect.kind for effect in shell.all(do.ToWorker)], "its deadline holds here too"


def test_a_request_known_from_its_worker_alone_is_asked_of_its_client_when_that_worker_dies() -> None:
    shell = taken_over()
    shell.hello("m@1", f.Phase.READY, f.HeldRequest(ONE, 1001, 0, 0, False))
    shell.client(f.Kind.HELLO, b"", f.ClientHello(b"i" * 16, (f.OpenRequest(ONE, 0),)))
    shell.tell(on.Exited("m@1", OLD, ExitStatus(signal=9)))
    shell.tell(on.Emptied("m@1", OLD))
    (welcome,) = shell.to_client(f.Kind.WELCOME)
    assert isinstance(welcome.header, f.Welcome)
    assert welcome.header.unknown == (ONE,)
    assert shell.kernel.requests() == []


def test_a_request_whose_client_never_comes_is_released() -> None:
    shell = taken_over()
    shell.hello("m@1", f.Phase.READY, f.HeldRequest(ONE, 1001, 0, 5, True))
    shell.wait(31)
    assert f.Kind.RELEASE in [effect.kind for effect in shell.all(do.ToWorker)]
    assert shell.kernel.requests() == []


def test_what_a_host_holds_and_nobody_gave_it_is_released() -> None:
    shell = taken_over()
    shell.hello("m@1")
    shell.hello("m@1", f.Phase.READY, f.HeldRequest(ONE, 1001, 0, 5, True))
    assert [effect.kind for effect in shell.all(do.ToWorker)] == [f.Kind.WELCOME, f.Kind.RELEASE]


def test_an_adopted_worker_of_a_changed_file_finishes_what_it_has_and_is_replaced() -> None:
    shell = successor(msgspec.structs.replace(spec(minimum=1), engine=Simulated(args=("-new",))))
    adopt(shell, spec(minimum=1))
    shell.count()
    assert shell.state("m@1") == State.DRAINING
    shell.hello("m@1", f.Phase.READY, f.HeldRequest(ONE, 1001, 0, 5, False))
    assert shell.none(do.Signal)
    shell.client(f.Kind.HELLO, b"", f.ClientHello(b"i" * 16, (f.OpenRequest(ONE, 0),)))
    shell.worker("m@1", f.Kind.DONE, ONE, f.Done(1001, 5))
    shell.client(f.Kind.ACK, ONE, f.Ack(6))
    assert shell.only(do.Signal).stops


def test_limits_set_by_hand_outlive_the_daemon_and_those_of_a_changed_file_come_into_force() -> None:
    by_hand = msgspec.structs.replace(spec().limits, nice=7)
    shell = successor(spec())
    shell.tell(on.Adopted("m@1", OLD, 1, peer_of("m@1"), TOKEN, spec(), Grant(), by_hand, 100.0))
    assert shell.none(do.Confine)
    changed = msgspec.structs.replace(spec(), limits=msgspec.structs.replace(spec().limits, nice=3))
    shell = successor(changed)
    shell.tell(on.Adopted("m@1", OLD, 1, peer_of("m@1"), TOKEN, spec(), Grant(), spec().limits, 100.0))
    assert shell.only(do.Confine).limits.nice == 3


def test_a_worker_that_was_being_stopped_is_stopped_still() -> None:
    shell = successor()
    adopt(shell, spec(minimum=1), stopping=True)
    assert shell.state("m@1") == State.STOPPING
    assert shell.only(do.Signal).stops


def test_a_worker_whose_file_is_gone_is_ended_and_forgotten() -> None:
    shell = successor(spec("other"))
    adopt(shell, spec())
    shell.count()
    assert shell.state("m@1") == State.DRAINING
    shell.hello("m@1")
    assert shell.state("m@1") == State.STOPPING
    shell.tell(on.Exited("m@1", OLD, ExitStatus()))
    shell.tell(on.Emptied("m@1", OLD))
    assert [view.spec.model for view in shell.kernel.models()] == ["other"]


def test_of_two_processes_of_one_name_the_one_that_came_late_is_ended() -> None:
    shell = Shell(spec(minimum=1))
    assert shell.only(do.Spawn).worker == "m@1"
    adopt(shell, spec(minimum=1))
    assert shell.only(do.KillGroup).incarnation == OLD


def died(shell: Shell, one: ModelSpec, **fields: object) -> list[do.Effect]:
    """The new daemon finds on record a worker that is no more."""
    ended = ExitStatus()
    event = on.Adopted(
        "m@1", OLD, 4242, peer_of("m@1"), TOKEN, one, Grant(1000), one.limits, 100.0, ended=ended, **fields  # type: ignore[arg-type]
    )  # fmt: skip
    return shell.tell(event)


def test_a_worker_that_died_without_a_daemon_is_restarted_as_after_any_failure_once_its_group_is_empty() -> None:
    shell = successor(spec())
    died(shell, spec(), detail="the engine exited with code 3")
    assert shell.only(do.KillGroup).worker == "m@1"
    assert shell.state("m@1") == State.STOPPING
    assert shell.kernel.ledger().free.millicpus == -1000, "held until the group is empty"
    shell.count()
    assert shell.none(do.Spawn)
    shell.tell(on.Emptied("m@1", OLD))
    assert shell.state("m@1") == State.BACKOFF
    (view,) = shell.kernel.workers()
    assert (view.last_exit, view.why) == (
        "exit status unknown: the engine exited with code 3",
        "the engine exited with code 3",
    )
    assert shell.wait(1) and shell.state("m@1") == State.STARTING


def test_a_restart_waits_until_the_devices_are_counted() -> None:
    shell = successor(spec())
    died(shell, spec())
    shell.tell(on.Emptied("m@1", OLD))
    shell.wait(5)
    assert shell.state("m@1") == State.BACKOFF
    shell.count()
    shell.wait(1)
    assert shell.state("m@1") == State.STARTING


@pytest.mark.parametrize("intent", ["stopping", "draining"])
def test_a_worker_that_was_to_end_and_died_without_a_daemon_stays_down(intent: str) -> None:
    shell = successor(spec())
    died(shell, spec(), **{intent: True})
    shell.count()
    shell.tell(on.Emptied("m@1", OLD))
    shell.wait(60)
    assert shell.state("m@1") == State.STOPPED


def test_that_a_worker_drains_is_put_on_record() -> None:
    shell = taken_over()
    shell.hello("m@1")
    shell.command(on.Stop, "m@1")
    assert shell.only(do.NoteDraining) == do.NoteDraining("m@1", OLD)
