"""The kernel by hand: situations out of which it once did not come by itself, or told the wrong cause."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.cpus import Claim, Cpu, Topology, place
from llmosd.kernel.ledger import Grant
from llmosd.kernel.lifecycle import State
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import Command, ModelSpec, Ready, Resources, Restart, Scale
from llmosd.kernel.units import Bytes, Seconds
from tests.unit.shell import GIB, TOKEN, Shell, peer_of, rid_of, spec

CLEAN = ExitStatus(code=0)


def sized(model: str, gib: int, *requires: str) -> ModelSpec:
    resources = Resources(memory=Bytes(gib * GIB))
    return msgspec.structs.replace(spec(model, idle=0), resources=resources, requires=requires)


def settle(shell: Shell, seconds: float = 60) -> int:
    """Play the node and the hosts until nothing happens any more; returns how many workers were spawned."""
    spawned = 0
    pending = list(shell.effects)
    for _ in range(2000):
        if not pending:
            pending = shell.wait(seconds)
            if not any(isinstance(effect, do.Spawn | do.Signal | do.KillGroup) for effect in pending):
                return spawned
        effect = pending.pop(0)
        if isinstance(effect, do.Spawn):
            spawned += 1
            pending += shell.spawned(effect)
            pending += shell.hello(effect.worker)
        elif isinstance(effect, do.Signal | do.KillGroup):
            pending += shell.tell(on.Exited(effect.worker, effect.incarnation, CLEAN))
            pending += shell.tell(on.Emptied(effect.worker, effect.incarnation))
    raise AssertionError(f"it never comes to rest: {spawned} workers were spawned")


@pytest.mark.parametrize("gib", [3, 4])
def test_two_models_that_do_not_fit_beside_each_other_do_not_take_turns_in_ending_what_the_other_requires(
    gib: int,
) -> None:
    shell = Shell(sized("r1", gib), sized("r2", gib), sized("u1", gib, "r1"), sized("u2", gib, "r2"))
    for model in ("r1", "r2"):
        shell.command(on.Start, model)
        settle(shell)
    shell.submit(rid_of(1), "u1")
    first = list(shell.effects)
    shell.submit(rid_of(2), "u2")
    shell.effects = first + shell.effects
    assert settle(shell) <= 4
    up = {view.model for view in shell.kernel.workers() if view.state == State.READY}
    assert up & {"u1", "u2"}, "one of them wins"


def test_cpus_for_one_worker_are_refused_in_no_time_however_many_others_must_be_left_one() -> None:
    topology = Topology(tuple(Cpu(number, 0, number, 0) for number in range(64)))
    groups = {f"w@{n}": Claim(frozenset(), frozenset(range(4 * n, 4 * n + 4))) for n in range(16)}
    assert isinstance(place(topology, 49, None, groups), str)
    assert not isinstance(place(topology, 48, None, groups), str)
    # Overlapping ones too, of which no such count can be made.
    pairs = {
        f"w@{n}": Claim(frozenset(), frozenset(pair)) for n, pair in enumerate(itertools.combinations(range(20), 2))
    }
    assert isinstance(place(topology, 60, None, pairs), str)


@pytest.mark.parametrize(
    ("policy", "state"), [("on-failure", State.STOPPED), ("on-success", State.BACKOFF), ("no", State.STOPPED)]
)
def test_a_command_that_was_ready_and_ended_without_a_daemon_is_judged_as_with_one(policy: str, state: State) -> None:
    plain = ModelSpec(
        model="m", kind="service", engine=Command(command=("m",)), ready=Ready(log="up"),
        restart=Restart(policy=policy),  # type: ignore[arg-type]
    )  # fmt: skip
    shell = Shell(plain, counted=False)
    shell.tell(
        on.Adopted(
            worker="m@1", incarnation=7, pid=42, peer=peer_of("m@1"), token=TOKEN, spec=plain, grant=Grant(),
            limits=plain.limits, started_at=50.0, ready=True, ended=CLEAN,
        )
    )  # fmt: skip
    shell.tell(on.Emptied("m@1", 7))
    shell.count()
    assert shell.state("m@1") == state
    assert "before it was ready" not in shell.kernel.workers()[0].why


def test_a_start_that_was_taken_on_is_carried_out_once_there_is_room() -> None:
    shell = Shell(sized("r", 2), sized("v", 4), sized("u", 3, "r"))
    assert shell.command(on.Start, "u").refusal == ""
    required = shell.only(do.Spawn)
    assert shell.command(on.Start, "v").refusal == ""
    other = shell.only(do.Spawn)
    shell.ready(other)
    shell.ready(required)
    assert shell.state("u@1") == State.STOPPED
    assert "waits for resources" in next(view.why for view in shell.kernel.workers() if view.name == "u@1")
    shell.command(on.Stop, "v")
    shell.ends(other, CLEAN)
    assert shell.only(do.Spawn).worker == "u@1"


def test_what_ended_by_itself_too_often_may_be_required_again_when_the_time_is_over() -> None:
    """Without anybody asking for it by name."""
    restart = Restart(policy="on-failure", burst=2, interval=Seconds(60))
    required = ModelSpec(model="r", kind="service", engine=Command(command=("r",)), restart=restart)
    user = msgspec.structs.replace(spec("u"), requires=("r",))
    shell = Shell(required, user)
    shell.submit(rid_of(1), "u")
    for _ in range(2):
        spawn = life(shell, "r@1")
        shell.spawned(spawn)
        user_spawn = life(shell, "u@1")
        shell.tell(on.SpawnFailed("u@1", user_spawn.incarnation, "exec", "not now"))
        shell.ends(spawn, CLEAN)
        shell.wait(5)
    shell.submit(rid_of(2), "u")
    assert "requires r, which ended by itself" in shell.failure().message
    shell.wait(4000)
    shell.submit(rid_of(3), "u")
    assert shell.only(do.Spawn).worker == "r@1"


def test_a_refused_start_does_not_take_away_why_a_worker_has_failed() -> None:
    failing = msgspec.structs.replace(sized("m", 5), restart=Restart(policy="no"))
    shell = Shell(failing, sized("big", 6))
    shell.command(on.Start, "m")
    shell.ends(shell.only(do.Spawn) if shell.all(do.Spawn) else life(shell, "m@1"), ExitStatus(code=1))
    assert shell.state("m@1") == State.FAILED
    shell.command(on.Start, "big")
    shell.ready(life(shell, "big@1"))
    shell.submit(rid_of(1), "big")
    assert shell.command(on.Start, "m").refusal == "refused"
    assert "exit code 1" in next(view.why for view in shell.kernel.workers() if view.name == "m@1")


def life(shell: Shell, name: str) -> do.Spawn:
    return next(e for e in reversed(shell.everything) if isinstance(e, do.Spawn) and e.worker == name)


def test_a_worker_that_is_stopped_before_it_was_spawned_is_not_called_stuck() -> None:
    shell = Shell(spec())
    shell.command(on.Start, "m")
    spawn = shell.only(do.Spawn)
    shell.command(on.Stop, "m")
    shell.wait(60)
    assert shell.state("m@1") == State.STOPPING
    shell.spawned(spawn)
    shell.ends(spawn, CLEAN)
    assert shell.state("m@1") == State.STOPPED


def test_a_held_worker_of_a_time_with_more_workers_takes_nobodys_place() -> None:
    shell = Shell(counted=False)
    shell.tell(on.Held((), ("m@2",)))
    shell.apply(msgspec.structs.replace(spec("m"), scale=Scale(min=1, max=1)))
    shell.count()
    assert shell.only(do.Spawn).worker == "m@1"
    assert next(view.why for view in shell.kernel.workers() if view.name == "m@2") == "stopped by an operator"
