"""The kernel by hand: what becomes of workers, on demand, by command, by clock and by accident."""

from __future__ import annotations

import msgspec
import pytest

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.lifecycle import State
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import ModelSpec, Restart, Simulated
from tests.unit.shell import TOKEN, Shell, rid_of, spec

ONE, TWO = rid_of(1), rid_of(2)


def up(*specs: ModelSpec) -> tuple[Shell, do.Spawn]:
    """A shell with the first model's worker ready and nothing to do."""
    shell = Shell(*(specs or (spec(),)))
    shell.command(on.Start, (specs or (spec(),))[0].model)
    spawn = shell.only(do.Spawn)
    shell.ready(spawn)
    return shell, spawn


def signals(shell: Shell) -> list[tuple[int, bool]]:
    return [(effect.signal, effect.stops) for effect in shell.all(do.Signal)]


# -- demand and resources -----------------------------------------------------------------------------------------


def test_workers_are_started_for_the_requests_there_are_and_within_bounds() -> None:
    shell = Shell(spec(maximum=2, slots=1))
    spawns = []
    for number in range(5):
        shell.submit(rid_of(number))
        spawns += shell.all(do.Spawn)
    assert [spawn.worker for spawn in spawns] == ["m@1", "m@2"]


def test_the_time_to_start_begins_when_the_process_is_there() -> None:
    """Of a thousand that are started at once, the last ones wait for the machine and not for themselves."""
    shell = Shell(spec(minimum=1))
    spawn = shell.only(do.Spawn)
    shell.wait(60)
    assert shell.state("m@1") == State.STARTING
    shell.tell(on.Spawned("m@1", spawn.incarnation, 42, b"p" * 16, TOKEN))
    shell.wait(29)
    assert shell.state("m@1") == State.STARTING
    shell.wait(2)
    assert shell.state("m@1") == State.STOPPING
    assert "no progress in 30s while starting" in shell.kernel.workers()[0].why


def test_what_is_never_spawned_is_given_up_in_the_end() -> None:
    shell = Shell(spec(minimum=1))
    shell.wait(301)
    assert shell.state("m@1") == State.STOPPING


def test_a_model_with_a_minimum_is_started_unasked_once_the_devices_are_counted() -> None:
    shell = Shell(spec(minimum=2, maximum=3), counted=False)
    assert shell.none(do.Spawn)
    shell.count()
    assert [spawn.worker for spawn in shell.all(do.Spawn)] == ["m@1", "m@2"]


def test_an_idle_worker_is_stopped_after_its_time_and_never_one_of_the_minimum() -> None:
    shell, _ = up()
    shell.wait(59)
    assert shell.state("m@1") == State.READY
    shell.wait(2)
    assert signals(shell) == [(15, True)]
    kept = Shell(spec(minimum=1))
    kept.ready(kept.only(do.Spawn))
    kept.wait(1000)
    assert kept.state("m@1") == State.READY


def test_an_idle_worker_makes_room_and_only_as_many_as_are_needed_however_often_it_is_asked() -> None:
    shell = Shell(spec("a", cpus=2, idle=0), spec("b", cpus=2, idle=0), spec("c", cpus=2))
    for model in ("a", "b"):
        shell.command(on.Start, model)
        shell.ready(shell.only(do.Spawn))
        shell.wait(1)
    shell.submit(ONE, "c")
    stopped = [effect.worker for effect in shell.all(do.Signal)]
    shell.submit(TWO, "c")
    stopped += [effect.worker for effect in shell.all(do.Signal)]
    assert stopped == ["a@1"]
    assert shell.kernel.models()[2].why == "needs 2 CPUs; 0 of 4 are free"
    shell.tell(on.Exited("a@1", 1001, ExitStatus(code=0)))
    assert shell.none(do.Spawn), "its group may still be there"
    shell.tell(on.Emptied("a@1", 1001))
    assert shell.only(do.Spawn).worker == "c@1"


def test_a_worker_that_becomes_idle_makes_room_for_who_waited_for_it() -> None:
    shell, _ = up(spec("a", cpus=4, idle=0), spec("b", cpus=4))
    shell.submit(ONE, "a")
    run = shell.run()
    shell.submit(TWO, "b")
    assert shell.none(do.Signal), "a busy worker is not evicted for an equal"
    shell.done(run)
    assert [effect.worker for effect in shell.all(do.Signal)] == ["a@1"] or shell.state("a@1") == State.DRAINING
    shell.client(f.Kind.ACK, ONE, f.Ack(1))
    assert shell.state("a@1") == State.STOPPING


def test_what_can_never_fit_fails_its_requests_at_once_with_the_reason() -> None:
    shell = Shell(spec(cpus=64))
    shell.submit(ONE)
    assert shell.failure().message == "m cannot be started on this machine: needs 64 CPUs; 4 of 4 are free"


# -- ends and restarts --------------------------------------------------------------------------------------------


def test_a_worker_that_dies_comes_back_after_its_back_off() -> None:
    shell, spawn = up()
    shell.ends(spawn)
    assert shell.state("m@1") == State.BACKOFF
    shell.wait(0.25)
    again = shell.only(do.Spawn)
    assert again.incarnation == spawn.incarnation + 1


def test_an_engine_that_never_becomes_ready_fails_in_the_end_and_a_new_file_gives_it_another_chance() -> None:
    burst = Restart(burst=3)
    shell = Shell(msgspec.structs.replace(spec(), restart=burst))
    shell.submit(ONE)
    for _ in range(3):
        shell.wait(10)
        spawn = next(e for e in reversed(shell.everything) if isinstance(e, do.Spawn))
        shell.spawned(spawn)
        shell.ends(spawn, ExitStatus(code=0))
    assert shell.state("m@1") == State.FAILED
    assert "3 starts within 5m: exit code 0 before it was ready" in shell.failure().message
    assert shell.submit(TWO) and shell.failure().code == f.Code.UNAVAILABLE
    shell.apply(msgspec.structs.replace(spec(minimum=1), restart=burst, engine=Simulated(args=("--fixed",))))
    assert shell.only(do.Spawn).spec.engine.args == ("--fixed",)


def test_a_command_that_does_not_exist_has_failed_at_once() -> None:
    shell = Shell(spec())
    shell.submit(ONE)
    spawn = shell.only(do.Spawn)
    shell.tell(on.SpawnFailed("m@1", spawn.incarnation, "exec", "no such file", permanent=True))
    assert shell.state("m@1") == State.FAILED
    assert "exec: no such file; `llmos reset m` clears it" in shell.failure().message
    shell.command(on.Reset, "m")
    shell.submit(TWO)
    assert shell.only(do.Spawn)


def test_a_stop_before_the_spawn_is_done_is_carried_out_when_it_is() -> None:
    for fails in (False, True):
        shell = Shell(spec())
        shell.submit(ONE)
        spawn = shell.only(do.Spawn)
        shell.command(on.Stop, "m", False)
        if fails:
            shell.tell(on.SpawnFailed("m@1", spawn.incarnation, "cgroup", "it is busy"))
            assert shell.state("m@1") == State.STOPPED
            shell.wait(100)
            assert shell.none(do.Spawn)
        else:
            shell.spawned(spawn)
            assert signals(shell) == [(15, True)]
            shell.wait(10)
            assert shell.only(do.KillGroup)


def test_an_operators_stop_beats_every_timer() -> None:
    shell, spawn = up()
    shell.ends(spawn)
    shell.command(on.Stop, "m", False)
    shell.wait(1000)
    assert shell.none(do.Spawn)
    shell.submit(ONE)
    assert "was stopped by an operator" in shell.failure().message


def test_a_start_while_it_stops_begins_another_life() -> None:
    shell, spawn = up()
    shell.command(on.Stop, "m", False)
    shell.command(on.Start, "m")
    shell.ends(spawn, ExitStatus(code=0))
    assert shell.only(do.Spawn).worker == "m@1"


def test_a_group_that_no_kill_ends_is_unkillable_keeps_its_resources_and_loses_its_requests() -> None:
    shell, _ = up(spec(cpus=4, maximum=2))
    shell.submit(ONE)
    shell.command(on.Stop, "m@1", True)
    assert signals(shell) == [(15, True)]
    shell.wait(10)
    assert shell.only(do.KillGroup)
    shell.wait(10)
    assert shell.state("m@1") == State.UNKILLABLE
    assert shell.kernel.ledger().free.millicpus == 0
    assert shell.kernel.requests()[0].worker == ""
    shell.wait(30)
    assert shell.only(do.KillGroup)
    shell.tell(on.Exited("m@1", 1001, ExitStatus(signal=9)))
    shell.tell(on.Emptied("m@1", 1001))
    assert shell.only(do.Spawn).worker == "m@2"


def test_a_silent_worker_at_work_is_probed_then_killed_and_an_idle_one_is_left_alone() -> None:
    shell, _ = up(spec(idle=0))
    shell.wait(1000)
    assert shell.none(do.KillGroup)
    shell.submit(ONE)
    shell.wait(31)
    probes = [effect for effect in shell.all(do.ToWorker) if effect.kind is f.Kind.HELLO]
    assert len(probes) > 5
    assert shell.only(do.KillGroup)


def test_a_frozen_worker_is_not_hung_and_is_listened_to_again_once_it_thaws() -> None:
    shell, _ = up()
    shell.submit(ONE)
    assert shell.command(on.Kill, "m@1", 19).workers == ("m@1",)
    shell.wait(500)
    assert shell.none(do.KillGroup)
    shell.command(on.Kill, "m@1", 18)
    shell.wait(31)
    assert shell.only(do.KillGroup)


def test_a_load_may_take_long_while_it_makes_progress() -> None:
    shell = Shell(spec(minimum=1))
    spawn = shell.only(do.Spawn)
    shell.spawned(spawn)
    for share in (0.1, 0.2, 0.3):
        shell.worker("m@1", f.Kind.STATUS, b"", f.Status(f.Phase.LOADING, share))
        shell.wait(500)
        assert shell.state("m@1") == State.LOADING
    shell.wait(101)
    assert shell.state("m@1") == State.STOPPING


def test_a_worker_whose_engine_has_failed_takes_no_more_and_comes_back_however_clean_its_exit() -> None:
    shell, spawn = up()
    shell.worker("m@1", f.Kind.STATUS, b"", f.Status(f.Phase.FAILED, detail="the engine went away"))
    assert shell.state("m@1") == State.STOPPING
    shell.ends(spawn, ExitStatus(code=0))
    assert shell.state("m@1") == State.BACKOFF


# -- commands -----------------------------------------------------------------------------------------------------


def test_a_changed_file_restarts_only_what_it_must() -> None:
    shell, _ = up()
    live = msgspec.structs.replace(spec(), limits=msgspec.structs.replace(spec().limits, slots=7, cpu_weight=50))
    shell.apply(live)
    assert shell.only(do.Confine).limits.cpu_weight == 50
    assert shell.none(do.Signal)
    shell.apply(msgspec.structs.replace(live, engine=Simulated(args=("-x",))))
    assert signals(shell) == [(15, True)]
    shell.ends(do.Spawn("m@1", 1001, live, live.limits, shell.kernel.workers()[0].grant), ExitStatus(code=0))
    assert shell.only(do.Spawn).spec.engine.args == ("-x",)


def test_a_smaller_maximum_ends_the_surplus() -> None:
    shell = Shell(spec(minimum=3, maximum=3))
    for spawn in shell.all(do.Spawn):
        shell.ready(spawn)
    shell.apply(spec(minimum=1, maximum=1))
    assert len(signals(shell)) == 2


def test_a_removed_model_is_forgotten_when_its_last_worker_is_gone() -> None:
    shell, spawn = up()
    shell.submit(ONE)
    run = shell.run()
    shell.command(on.Remove, "m")
    shell.submit(TWO)
    assert "m was removed" in shell.failure().message
    shell.done(run)
    shell.client(f.Kind.ACK, ONE, f.Ack(1))
    shell.ends(spawn, ExitStatus(code=0))
    assert shell.kernel.models() == []
    assert shell.kernel.workers() == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"slots": 0}, ">= 1"),
        ({"slot": 4}, "unknown field"),
        ({"memory_max": "lots"}, "expected a size"),
        ({"cpu_weight": 1.5}, "int"),
    ],
)
def test_limits_that_cannot_be_are_refused_as_a_whole(changes: dict[str, object], why: str) -> None:
    shell, _ = up()
    reply = shell.command(on.SetLimits, "m", {"nice": 5, **changes})
    assert reply.refusal == "invalid"
    assert why in reply.message
    assert shell.kernel.workers()[0].limits.nice is None


def test_limits_change_at_once_and_none_gives_the_default_again() -> None:
    shell, _ = up()
    shell.command(on.SetLimits, "m", {"memory_max": "1G", "allowed_cpus": "0-1"})
    assert str(shell.only(do.Confine).limits.memory_max) == "1G"
    shell.command(on.SetLimits, "m@1", {"memory_max": None})
    limits = shell.only(do.Confine).limits
    assert (limits.memory_max, str(limits.allowed_cpus)) == (None, "0-1")


@pytest.mark.parametrize(
    ("kind", "details", "code"),
    [
        (on.Start, ("nothing",), "not_found"),
        (on.Remove, ("m@1",), "invalid"),
        (on.Kill, ("m@1", 99), "invalid"),
        (on.Kill, ("m@1", 18), "refused"),
        (on.Apply, (spec("other"),), "refused"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(kind: type[on.Event], details: tuple[object, ...], code: str) -> None:
    shell, _ = up(msgspec.structs.replace(spec(), aliases=("other",)))
    reply = shell.command(kind, *details)
    assert reply.refusal == code
    assert reply.message


def test_a_shut_down_ends_all_in_order_and_starts_nothing_more() -> None:
    shell, spawn = up()
    shell.submit(ONE)
    run = shell.run()
    shell.tell(on.ShutDown())
    assert shell.none(do.AllDown)
    shell.submit(TWO)
    assert shell.failure().message == "llmosd is shutting down"
    assert shell.command(on.Start, "m").refusal == "refused"
    shell.done(run)
    shell.client(f.Kind.ACK, ONE, f.Ack(1))
    shell.ends(spawn, ExitStatus(code=0))
    assert shell.only(do.AllDown)
    assert Shell().tell(on.ShutDown()) == [do.AllDown()]
