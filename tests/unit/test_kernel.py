"""The kernel by hand: what becomes of requests, step by step. What happens at random is the simulation's."""

from __future__ import annotations

import pytest

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.lifecycle import State
from llmosd.kernel.restart import ExitStatus
from tests.unit.shell import CLIENT, Shell, rid_of, spec

ONE, TWO, THREE = rid_of(1), rid_of(2), rid_of(3)


def running(**options: int) -> tuple[Shell, do.Spawn, do.ToWorker]:
    """A shell with request ONE on worker m@1."""
    shell = Shell(spec(**options))  # type: ignore[arg-type]  # options of whole numbers only
    shell.submit(ONE)
    spawn = shell.only(do.Spawn)
    shell.ready(spawn)
    return shell, spawn, shell.run()


def attempt_of(run: do.ToWorker) -> int:
    assert isinstance(run.header, f.Run)
    return run.header.attempt


def test_a_request_starts_a_worker_and_is_answered_once() -> None:
    shell = Shell(spec())
    shell.submit(ONE)
    spawn = shell.only(do.Spawn)
    assert (spawn.worker, spawn.grant.millicpus) == ("m@1", 1000)
    assert isinstance(shell.only(do.ToClient).header, f.Accepted)
    assert shell.kernel.requests()[0].state == "blocked"

    shell.ready(spawn)
    run = shell.run()
    assert run.payload == (b"{}",)
    attempt = attempt_of(run)

    shell.worker("m@1", f.Kind.CHUNK, ONE, f.Chunk(attempt, 0, 1, (), 1), b"one")
    assert shell.only(do.ToClient).payload == [b"one"]
    shell.worker("m@1", f.Kind.DONE, ONE, f.Done(attempt, 1, completion_tokens=1))
    assert shell.only(do.ToClient).kind is f.Kind.DONE
    shell.client(f.Kind.ACK, ONE, f.Ack(2))
    assert shell.only(do.ToWorker).kind is f.Kind.ACK
    assert shell.kernel.requests() == []
    assert shell.state("m@1") == State.READY
    assert shell.kernel.counters()["done"] == 1


def test_tokens_are_counted_whether_an_answer_is_streamed_or_not() -> None:
    shell, _, run = running()
    attempt = attempt_of(run)
    shell.worker("m@1", f.Kind.DONE, ONE, f.Done(attempt, 0, completion_tokens=5))
    shell.submit(TWO)
    attempt = attempt_of(shell.run())
    shell.worker("m@1", f.Kind.CHUNK, TWO, f.Chunk(attempt, 0, 1, (), 3), b"three")
    shell.worker("m@1", f.Kind.DONE, TWO, f.Done(attempt, 1, completion_tokens=4))
    assert shell.kernel.counters()["tokens"] == 9


def test_a_slot_that_is_free_takes_the_next_at_once_and_in_order() -> None:
    shell, _, run = running(slots=1)
    shell.submit(THREE)
    shell.submit(TWO)
    assert shell.runs() == []
    shell.done(run)
    assert shell.runs() == [THREE]


def test_a_full_queue_refuses_with_a_time_to_come_back_and_a_free_slot_needs_no_queue() -> None:
    shell, _, _ = running(slots=2, queue_max=0)
    shell.submit(TWO)
    assert shell.runs() == [TWO]
    shell.submit(THREE)
    assert shell.failure().code == f.Code.QUEUE_FULL
    assert shell.failure().retry_after_ms >= 100
    assert len(shell.kernel.requests()) == 2


def test_an_unknown_model_is_refused_with_the_names_of_those_there_are() -> None:
    shell = Shell(spec("a"), spec("b"))
    shell.submit(ONE, "c")
    assert shell.failure().message == "no model 'c'; there are: a, b"


@pytest.mark.parametrize(
    "header",
    [f.Submit("m", "/", have_seq=-1), f.Submit("m", "/", have_seq=1 << 60), f.Submit("m", "/", remaining_ms=-5)],
)
def test_a_submit_with_numbers_that_cannot_be_is_refused(header: f.Submit) -> None:
    shell = Shell(spec())
    shell.client(f.Kind.SUBMIT, ONE, header, b"{}")
    assert shell.failure().code == f.Code.INVALID


def test_a_request_whose_worker_dies_before_a_word_runs_elsewhere_once_nothing_is_left_of_it() -> None:
    shell, spawn, first = running()
    shell.tell(on.Exited("m@1", spawn.incarnation, ExitStatus(signal=9)))
    assert shell.only(do.KillGroup).worker == "m@1"
    assert shell.kernel.requests()[0].worker == "m@1", "its group may still be at work"
    shell.tell(on.Emptied("m@1", spawn.incarnation))
    assert shell.state("m@1") == State.BACKOFF
    shell.wait(1)
    shell.ready(shell.only(do.Spawn))
    assert attempt_of(shell.run()) > attempt_of(first)


def test_a_request_whose_worker_dies_after_a_word_fails_and_says_so_until_it_is_acknowledged() -> None:
    shell, spawn, run = running()
    shell.worker("m@1", f.Kind.CHUNK, ONE, f.Chunk(attempt_of(run), 0, 1), b"one")
    shell.ends(spawn)
    assert shell.failure() == f.Failed(
        0, 1, f.Code.WORKER_LOST, "worker m@1 was lost after 1 answer items: killed by signal 9"
    )
    shell.wait(31)
    assert shell.failure().code == f.Code.WORKER_LOST
    shell.client(f.Kind.ACK, ONE, f.Ack(2))
    assert shell.kernel.requests() == []


def test_a_request_that_keeps_losing_its_workers_is_given_up() -> None:
    shell, spawn, _ = running()
    for _ in range(2):
        shell.ends(spawn)
        shell.wait(5)
        spawn = shell.only(do.Spawn)
        shell.ready(spawn)
    shell.ends(spawn)
    assert "as 2 others before it" in shell.failure().message


def test_a_cancelled_request_ends_by_its_workers_word_or_by_its_workers_death() -> None:
    for dies in (False, True):
        shell, spawn, run = running()
        shell.client(f.Kind.CANCEL, ONE, f.Cancel())
        assert shell.only(do.ToWorker).kind is f.Kind.CANCEL
        if dies:
            shell.ends(spawn)
            assert shell.failure().code == f.Code.CANCELLED
        else:
            shell.worker("m@1", f.Kind.FAILED, ONE, f.Failed(attempt_of(run), 0, f.Code.CANCELLED, "cancelled"))
            assert len(shell.to_client(f.Kind.FAILED)) == 1
        assert shell.kernel.counters()["cancelled"] == 1


def test_only_its_own_client_cancels_a_request_over_the_bus() -> None:
    shell, _, _ = running()
    shell.client(f.Kind.CANCEL, ONE, f.Cancel(), peer=b"another")
    assert shell.effects == []


def test_a_deadline_ends_what_waits_and_takes_what_runs_from_its_engine() -> None:
    shell, _, _ = running(slots=2)
    shell.submit(TWO, remaining_ms=1500)
    shell.submit(THREE, remaining_ms=1500)
    shell.wait(2)
    assert shell.failure().code == f.Code.DEADLINE_EXCEEDED, "of the third, which has no slot"
    cancels = [effect for effect in shell.all(do.ToWorker) if effect.kind is f.Kind.CANCEL]
    assert [(cancel.rid, cancel.header) for cancel in cancels] == [(TWO, f.Cancel("deadline_exceeded"))]


def test_a_time_beyond_all_reason_is_cut() -> None:
    shell = Shell(spec())
    shell.submit(ONE, remaining_ms=(1 << 63) - 1)
    due = shell.kernel.deadline()
    assert due is not None
    assert shell.kernel.requests()[0].expires_at <= shell.now + 600


def test_a_lost_run_is_sent_again_and_an_answered_one_without_its_body() -> None:
    shell, _, run = running()
    shell.wait(3)
    assert f.Kind.HELLO in [effect.kind for effect in shell.all(do.ToWorker)], "a silent worker is asked"
    shell.hello("m@1")
    assert shell.run().payload == (b"{}",)
    shell.hello("m@1", f.Phase.READY, f.HeldRequest(ONE, attempt_of(run), 0, 3, True))
    assert shell.run().payload == ()


def test_a_stale_attempt_never_reaches_a_client() -> None:
    shell, _, run = running()
    shell.worker("m@1", f.Kind.CHUNK, ONE, f.Chunk(attempt_of(run) - 1, 0, 1), b"old")
    shell.worker("m@1", f.Kind.DONE, ONE, f.Done(attempt_of(run) + 1, 0))
    assert shell.kernel.counters()["stale"] == 2
    assert shell.kernel.requests()[0].state == "running"


def test_a_client_that_comes_back_is_told_what_it_misses_and_what_is_not_known() -> None:
    shell, _, run = running()
    shell.worker("m@1", f.Kind.CHUNK, ONE, f.Chunk(attempt_of(run), 0, 4, (1, 1, 1, 1)), b"abcd")
    shell.tell(on.ClientUnreachable(CLIENT))
    hello = f.ClientHello(b"i" * 16, (f.OpenRequest(ONE, 2), f.OpenRequest(TWO, 0)))
    shell.client(f.Kind.HELLO, b"", hello, peer=b"new")
    (welcome,) = shell.all(do.ToClient)
    assert isinstance(welcome.header, f.Welcome)
    assert welcome.header.unknown == (TWO,)
    again = shell.run().header
    assert isinstance(again, f.Run)
    assert (again.attempt, again.first_seq) == (attempt_of(run), 2)


def test_a_client_that_stays_away_is_given_up_and_one_that_died_at_once() -> None:
    shell, _, _ = running()
    shell.tell(on.ClientUnreachable(CLIENT))
    shell.wait(29)
    assert len(shell.kernel.requests()) == 1
    shell.wait(2)
    assert [effect.kind for effect in shell.all(do.ToWorker)][-1] is f.Kind.RELEASE
    assert shell.kernel.requests() == []
    shell.tell(on.ClientIdentified(CLIENT, 1000, 4242))
    assert shell.only(do.WatchClient).pid == 4242
    shell.submit(TWO)
    assert shell.kernel.requests()[0].tenant == "uid:1000"
    shell.tell(on.ClientLost(CLIENT, "client_gone"))
    assert shell.only(do.ToWorker).kind is f.Kind.RELEASE
    assert shell.only(do.UnwatchClient).peer == CLIENT


def test_a_slow_reader_keeps_its_answer_for_as_long_as_it_reads() -> None:
    shell, _, run = running()
    shell.worker("m@1", f.Kind.CHUNK, ONE, f.Chunk(attempt_of(run), 0, 1), b"a")
    shell.done(run, items=400)
    for seq in range(40):
        shell.wait(25)
        shell.client(f.Kind.ACK, ONE, f.Ack(seq))
    assert len(shell.kernel.requests()) == 1
    shell.wait(700)
    assert shell.kernel.requests() == [], "nobody has said anything of it for ten minutes"


@pytest.mark.parametrize("seq", [-1, 1 << 63])
def test_a_final_that_makes_no_sense_fails_its_request_and_frees_its_slot(seq: int) -> None:
    shell, _, run = running(slots=1)
    shell.submit(TWO)
    shell.worker("m@1", f.Kind.DONE, ONE, f.Done(attempt_of(run), seq))
    assert shell.failure().code == f.Code.INTERNAL
    shell.wait(0)
    assert [view.rid for view in shell.kernel.requests() if view.state == "running"] == [TWO]


def test_a_worker_that_nobody_knows_or_whose_token_is_wrong_is_counted_and_not_heard() -> None:
    shell, _, _ = running()
    hello = f.WorkerHello(b"i" * 16, b"wrong", 1, f.Phase.READY, 2, (f.HeldRequest(TWO, 1, 0, 0, False),))
    shell.worker("m@1", f.Kind.HELLO, b"", hello)
    shell.worker("nobody", f.Kind.STATUS, b"", f.Status(f.Phase.READY))
    assert shell.effects == []
    assert shell.kernel.counters()["unknown_worker"] == 2
