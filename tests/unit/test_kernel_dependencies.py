"""The kernel by hand: models that require others. Who starts first, who is kept, who ends first, what can never be."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.ledger import Grant
from llmosd.kernel.lifecycle import State
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import Command, ModelSpec, Restart, Scale
from tests.unit.shell import TOKEN, Shell, peer_of, rid_of, spec

ONE, TWO = rid_of(1), rid_of(2)
CLEAN = ExitStatus(code=0)


def requiring(model: str, *others: str, aliases: tuple[str, ...] = (), **fields: object) -> ModelSpec:
    return msgspec.structs.replace(spec(model, **fields), requires=others, aliases=aliases)  # type: ignore[arg-type]


def service(model: str, *others: str, minimum: int = 0) -> ModelSpec:
    engine = Command(command=("serve",))
    return ModelSpec(model=model, kind="service", engine=engine, requires=others, scale=Scale(min=minimum))


def why(shell: Shell, model: str) -> str:
    return next(view.why for view in shell.kernel.models() if view.spec.model == model)


def life(shell: Shell, name: str) -> do.Spawn:
    """The last spawn of a worker."""
    return next(e for e in reversed(shell.everything) if isinstance(e, do.Spawn) and e.worker == name)


def chain_up() -> Shell:
    """c requires b requires a: all with a ready worker."""
    shell = Shell(spec("a"), requiring("b", "a"), requiring("c", "b"))
    shell.command(on.Start, "c")
    for model in "abc":
        shell.ready(life(shell, f"{model}@1"))
    return shell


def signalled(shell: Shell) -> list[str]:
    return [effect.worker for effect in shell.all(do.Signal)]


# -- starting -----------------------------------------------------------------------------------------------------


def test_what_is_required_is_started_and_ready_before_who_requires_it() -> None:
    shell = Shell(requiring("c", "b"), spec("a"), requiring("b", "a"))
    reply = shell.command(on.Start, "c")
    assert (reply.refusal, reply.workers) == ("", ("c@1",))
    assert reply.message == "c@1 waits for b: it is to be started"
    assert [spawn.worker for spawn in shell.all(do.Spawn)] == ["a@1"]
    assert shell.state("b@1") == shell.state("c@1") == State.WAITING
    assert why(shell, "c") == "waits for b: it waits for a: it is starting"
    shell.ready(life(shell, "a@1"))
    assert [spawn.worker for spawn in shell.all(do.Spawn)] == ["b@1"]
    shell.spawned(life(shell, "b@1"))
    shell.hello("b@1", f.Phase.LOADING)
    assert why(shell, "c") == "waits for b: it is loading"
    shell.worker("b@1", f.Kind.STATUS, b"", f.Status(f.Phase.READY))
    assert [spawn.worker for spawn in shell.all(do.Spawn)] == ["c@1"]


def test_a_minimum_and_a_request_want_what_is_required_too_and_the_request_waits() -> None:
    shell = Shell(requiring("b", "other-name", minimum=1), spec("a"), counted=False)
    shell.apply(requiring("a", aliases=("other-name",)))
    shell.count()
    assert shell.only(do.Spawn).worker == "a@1"
    shell.submit(ONE, "b")
    assert shell.to_client(f.Kind.FAILED) == []
    shell.ready(shell.only(do.Spawn) if shell.all(do.Spawn) else life(shell, "a@1"))
    shell.ready(life(shell, "b@1"))
    assert shell.runs() == [ONE]


def test_a_service_is_ready_when_it_runs_and_the_gateway_is_a_name_like_any_other() -> None:
    shell = Shell(service("gateway"), requiring("m", "gateway"))
    shell.submit(ONE)
    shell.spawned(shell.only(do.Spawn))
    assert shell.only(do.Spawn).worker == "m@1"


def test_a_worker_that_comes_back_waits_for_what_is_required_too() -> None:
    shell = chain_up()
    shell.ends(life(shell, "b@1"))
    shell.ends(life(shell, "c@1"))
    assert shell.state("c@1") == State.BACKOFF
    shell.wait(1)
    assert shell.state("b@1") == State.STARTING
    assert shell.state("c@1") == State.WAITING
    shell.ready(life(shell, "b@1"))
    assert shell.only(do.Spawn).worker == "c@1"


def test_who_waits_is_stopped_like_any_other() -> None:
    shell = Shell(spec("a"), requiring("b", "a"))
    shell.command(on.Start, "b")
    shell.command(on.Stop, "b", False)
    assert shell.state("b@1") == State.STOPPED
    shell.ready(life(shell, "a@1"))
    assert shell.none(do.Spawn)


# -- what can never be --------------------------------------------------------------------------------------------


def test_a_dependency_that_has_failed_is_named_down_to_the_cause_and_a_reset_brings_all_up() -> None:
    shell = Shell(spec("a"), requiring("b", "a"), requiring("c", "b", minimum=1))
    spawn = life(shell, "a@1")
    shell.submit(ONE, "c")
    shell.tell(on.SpawnFailed("a@1", spawn.incarnation, "exec", "no such file", permanent=True))
    cause = "requires a, which has failed: exec: no such file; `llmos reset a` clears it"
    assert why(shell, "b") == cause
    assert why(shell, "c") == f"requires b, which {cause}"
    assert shell.failure().message == f"c requires b, which {cause}"
    assert shell.state("c@1") == State.STOPPED
    reply = shell.command(on.Start, "c")
    assert (reply.refusal, reply.message) == ("refused", f"c is not started: requires b, which {cause}")
    shell.command(on.Reset, "a")
    assert shell.only(do.Spawn).worker == "a@1"
    for model in "abc":
        shell.ready(life(shell, f"{model}@1"))
    assert shell.state("c@1") == State.READY


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ((on.Stop, "a", False), "requires a, which was stopped by an operator; `llmos start a` starts it"),
        ((on.Remove, "a"), "requires a, which there is not"),
        ((on.Apply, spec("a", cpus=64)), "requires a, which cannot be started on this machine: needs 64 CPUs"),
        ((on.Apply, spec("a", cpus=3)), "cannot be started on this machine beside a, which it requires: needs 2 CPUs"),
    ],
)  # fmt: skip
def test_requests_fail_at_once_with_the_reason_why_a_dependency_never_comes(
    command: tuple[type[on.Event], object], reason: str
) -> None:
    shell = Shell(spec("a"), requiring("b", "a", cpus=2))
    assert shell.command(command[0], *command[1:]).refusal == ""
    shell.submit(ONE, "b")
    assert shell.failure().code == f.Code.UNAVAILABLE
    assert shell.failure().message.startswith(f"b {reason}")
    assert shell.none(do.Spawn)


def test_what_is_required_may_be_applied_later() -> None:
    shell = Shell(requiring("b", "a", minimum=1))
    assert why(shell, "b") == "requires a, which there is not"
    shell.apply(spec("a"))
    assert shell.only(do.Spawn).worker == "a@1"


def test_what_ends_by_itself_again_and_again_is_not_started_for_ever_for_who_waits() -> None:
    once = msgspec.structs.replace(service("a"), restart=Restart(burst=3))
    shell = Shell(once, spec("slow"), requiring("b", "slow", "a", minimum=1))
    for _ in range(3):
        spawn = life(shell, "a@1")
        shell.spawned(spawn)
        shell.ends(spawn, CLEAN)
    assert shell.state("a@1") == State.STOPPED
    assert why(shell, "b") == "requires a, which ended by itself: exit code 0; `llmos start a` starts it"
    assert shell.command(on.Start, "b").refusal == "refused"
    assert shell.command(on.Start, "a").refusal == ""
    assert shell.only(do.Spawn).worker == "a@1"


# -- who is kept --------------------------------------------------------------------------------------------------


def test_what_is_required_is_neither_idle_stopped_nor_evicted_while_it_is_used() -> None:
    shell = Shell(spec("a", idle=10), requiring("b", "a", idle=0), spec("large", cpus=4))
    shell.command(on.Start, "b")
    shell.ready(life(shell, "a@1"))
    shell.ready(life(shell, "b@1"))
    shell.submit(ONE, "b")
    shell.wait(25)
    assert shell.state("a@1") == State.READY
    shell.submit(TWO, "large")
    assert shell.none(do.Signal)
    shell.command(on.Stop, "b", True)
    shell.ends(life(shell, "b@1"), CLEAN)
    assert shell.only(do.Signal).worker == "a@1", "nobody uses it any more, and large needs its room"


def test_what_is_required_is_idle_stopped_once_nobody_uses_it() -> None:
    shell = Shell(spec("a", idle=10), requiring("b", "a", idle=20))
    shell.command(on.Start, "b")
    shell.ready(life(shell, "a@1"))
    shell.ready(life(shell, "b@1"))
    shell.wait(21)
    assert signalled(shell) == ["b@1"]
    shell.ends(life(shell, "b@1"), CLEAN)
    shell.wait(11)
    assert signalled(shell) == ["a@1"]


def test_what_is_required_is_not_started_where_there_is_no_room_for_who_requires_it() -> None:
    shell = Shell(spec("a", cpus=2), requiring("b", "a", cpus=2), spec("d", cpus=1))
    shell.submit(ONE, "d")
    shell.ready(shell.only(do.Spawn))
    shell.submit(TWO, "b")
    assert shell.none(do.Spawn), "a would fit, and serve nobody"
    assert why(shell, "b") == "needs 2 CPUs; 1 of 4 are free"


def test_an_idle_model_gives_no_more_workers_than_it_can_spare() -> None:
    shell = Shell(spec("a", minimum=1, maximum=2, slots=1, idle=0), spec("b", cpus=4))
    shell.ready(life(shell, "a@1"))
    for rid in (ONE, TWO):
        shell.submit(rid, "a")
    shell.ready(life(shell, "a@2"))
    for rid, name in ((ONE, "a@1"), (TWO, "a@2")):
        shell.worker(name, f.Kind.DONE, rid, f.Done(shell.kernel.table.requests[rid].attempt, 0))
        shell.client(f.Kind.ACK, rid, f.Ack(1))
    shell.submit(rid_of(3), "b")
    assert len(shell.kernel.fleet.workers) == 3
    assert sum(shell.state(name) == State.READY for name in ("a@1", "a@2")) >= 1


# -- stopping -----------------------------------------------------------------------------------------------------


def test_a_stop_is_passed_on_and_ends_who_requires_first_and_the_start_of_one_is_not() -> None:
    shell = chain_up()
    shell.command(on.Stop, "a", False)
    assert signalled(shell) == ["c@1"]
    assert shell.state("a@1") == shell.state("b@1") == State.READY
    views = {view.name: view.why for view in shell.kernel.workers()}
    assert views["a@1"] == "stopped by an operator; waits for the end of b@1"
    assert views["c@1"] == "requires b, which is ended: requires a, which is ended: stopped by an operator"
    shell.ends(life(shell, "c@1"), CLEAN)
    assert signalled(shell) == ["b@1"]
    shell.ends(life(shell, "b@1"), CLEAN)
    assert signalled(shell) == ["a@1"]
    shell.ends(life(shell, "a@1"), CLEAN)
    assert [view.held for view in shell.kernel.models()] == [True, False, False]
    assert why(shell, "c").startswith("requires b, which requires a, which was stopped by an operator")
    shell.submit(ONE, "c")
    assert shell.none(do.Spawn)
    shell.command(on.Start, "a")
    assert [spawn.worker for spawn in shell.all(do.Spawn)] == ["a@1"]


def test_a_stop_at_once_does_not_wait_for_requests_of_those_that_require_it_either() -> None:
    shell = Shell(spec("a"), requiring("b", "a"))
    shell.submit(ONE, "b")
    shell.ready(life(shell, "a@1"))
    shell.ready(life(shell, "b@1"))
    shell.command(on.Stop, "a", False)
    assert shell.state("b@1") == State.DRAINING
    shell.command(on.Stop, "a", True)
    assert signalled(shell) == ["b@1"]
    shell.ends(life(shell, "b@1"), CLEAN)
    assert signalled(shell) == ["a@1"]


def test_a_restart_is_passed_on_as_systemd_does() -> None:
    shell = chain_up()
    shell.command(on.Restarted, "b")
    assert signalled(shell) == ["c@1"]
    shell.ends(life(shell, "c@1"), CLEAN)
    assert shell.state("c@1") == State.WAITING
    assert signalled(shell) == ["b@1"]
    shell.ends(life(shell, "b@1"), CLEAN)
    assert shell.only(do.Spawn).worker == "b@1"
    shell.ready(life(shell, "b@1"))
    assert shell.only(do.Spawn).worker == "c@1"
    assert shell.state("a@1") == State.READY


def test_a_crash_is_not_passed_on() -> None:
    shell = chain_up()
    shell.ends(life(shell, "a@1"))
    assert shell.state("b@1") == shell.state("c@1") == State.READY
    shell.wait(1)
    assert life(shell, "a@1").incarnation == 1002


def test_one_of_several_workers_that_ends_takes_nobody_with_it() -> None:
    shell = Shell(spec("a", minimum=2, maximum=2), requiring("b", "a", minimum=1))
    for spawn in shell.all(do.Spawn):
        shell.ready(spawn)
    shell.ready(life(shell, "b@1"))
    shell.command(on.Restarted, "a@1")
    assert signalled(shell) == ["a@1"]
    assert shell.state("b@1") == State.READY


def test_who_requires_and_does_not_end_is_not_waited_for_for_ever() -> None:
    shell = Shell(spec("a"), requiring("b", "a"))
    shell.command(on.Start, "b")
    shell.ready(life(shell, "a@1"))
    shell.ready(life(shell, "b@1"))
    shell.command(on.Stop, "a", True)
    shell.wait(21)
    assert shell.state("b@1") == State.UNKILLABLE
    assert shell.state("a@1") == State.STOPPING


def test_a_shut_down_ends_in_reverse_order_those_without_relation_at_once_and_all_in_time() -> None:
    shell = Shell(spec("a"), requiring("b", "a"), requiring("c", "b"), spec("d", minimum=1))
    shell.command(on.Start, "c")
    for name in ("a@1", "b@1", "c@1", "d@1"):
        shell.ready(life(shell, name))
    shell.tell(on.ShutDown(12.0))
    assert sorted(signalled(shell)) == ["c@1", "d@1"]
    shell.ends(life(shell, "c@1"), CLEAN)
    assert signalled(shell) == ["b@1"]
    shell.wait(7.5)
    assert shell.state("a@1") == State.READY
    shell.wait(1)
    assert signalled(shell) == ["a@1"], "its share of the time begins, though b is there"


def test_a_removed_dependency_ends_in_order_and_is_missing_from_then_on() -> None:
    shell = chain_up()
    shell.command(on.Remove, "b")
    assert signalled(shell) == ["c@1"]
    shell.ends(life(shell, "c@1"), CLEAN)
    shell.ends(life(shell, "b@1"), CLEAN)
    assert [view.spec.model for view in shell.kernel.models()] == ["a", "c"]
    assert why(shell, "c") == "requires b, which there is not"
    shell.apply(requiring("b", "a"))
    shell.command(on.Start, "c")
    assert shell.only(do.Spawn).worker == "b@1"


def test_adopted_workers_end_in_order_whichever_was_found_first() -> None:
    one, two = spec("a"), requiring("b", "a")
    shell = Shell(epoch=9000, counted=False, now=200.0)
    for name, its in (("a@1", one), ("b@1", two)):
        shell.tell(on.Adopted(name, 1005, 4242, peer_of(name), TOKEN, its, Grant(1000), its.limits, 100.0))
    assert shell.none(do.Signal)
    shell.count()
    assert (shell.state("a@1"), shell.state("b@1")) == (State.ADOPTED, State.DRAINING)
    shell.tell(on.Exited("b@1", 1005, ExitStatus()))
    shell.tell(on.Emptied("b@1", 1005))
    assert shell.state("a@1") == State.DRAINING


# -- circles ------------------------------------------------------------------------------------------------------


def test_an_apply_that_would_close_a_circle_is_refused_with_the_circle_written_out() -> None:
    shell = Shell(requiring("a", "b"), requiring("b", "see"))
    reply = shell.apply(requiring("c", "a", aliases=("see",)))
    assert (reply.refusal, reply.message) == (
        "refused", "model c would wait for itself: c requires a requires b requires c",
    )  # fmt: skip
    assert shell.apply(requiring("d", "d")).message == "model d would wait for itself: d requires d"
    assert shell.apply(requiring("c", aliases=("see",))).refusal == ""
    assert shell.apply(requiring("c", "a", aliases=("see",))).refusal == "refused"
    assert shell.apply(requiring("c", "a")).refusal == "", "see is no name of it any longer"


def test_a_circle_can_be_turned_round_by_way_of_a_model_without_it() -> None:
    shell = Shell(spec("a"), requiring("b", "a"))
    assert shell.apply(requiring("a", "b")).refusal == "refused"
    shell.apply(spec("b"))
    assert shell.apply(requiring("a", "b")).refusal == ""


NAMES = ["a", "b", "c", "d", "e"]
edges = st.lists(st.sampled_from([*NAMES, *(name + "2" for name in NAMES), "nobody"]), max_size=3, unique=True)
specs = st.builds(
    lambda name, others, alias: requiring(name, *others, aliases=(name + "2",) if alias else ()),
    st.sampled_from(NAMES), edges, st.booleans(),
)  # fmt: skip
steps = st.lists(st.tuples(specs, st.booleans()), max_size=25)


@given(steps)
def test_whatever_is_applied_and_removed_no_model_ever_requires_itself(history: list[tuple[ModelSpec, bool]]) -> None:
    shell = Shell()
    for one, removed in history:
        if removed and one.model in shell.kernel.fleet.models:
            shell.command(on.Remove, one.model)
            continue
        before = _graph(shell)
        reply = shell.apply(one)
        if reply.refusal:
            assert one.model in reply.message.rpartition(":")[2].split()
            assert _graph(shell) == before
        assert not _circle(_graph(shell))


def _graph(shell: Shell) -> dict[str, set[str]]:
    fleet = shell.kernel.fleet
    return {
        name: {other.spec.model for other in fleet.dependencies.required(model)} for name, model in fleet.models.items()
    }


def _circle(graph: dict[str, set[str]]) -> bool:
    """Whether anybody is left when those that require nobody who is left are taken away, again and again."""
    while free := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in free:
            del graph[name]
    return bool(graph)
