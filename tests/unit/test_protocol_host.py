"""The host's end of the bus by hand: what it keeps, sends again, and forgets."""

from __future__ import annotations

from llmos.protocol import frames as f
from llmos.protocol import host as h
from tests.unit.ends import RID, WELCOME, host, run, said, told


def test_a_window_holds_items_back_and_never_the_final() -> None:
    end = host()
    run(end)
    for _ in range(20):
        end.item(RID, 5, b"x")
    end.done(RID, 5, f.Done(5, 0), b"", 1.0)
    end.flush(1.0)
    chunk, done = said(end, f.WORKER_TO_DAEMON)
    assert isinstance(chunk.header, f.Chunk)
    assert (chunk.header.first_seq, chunk.header.count) == (0, 8)
    assert isinstance(done.header, f.Done)
    assert done.header.seq == 20
    told(end, f.Kind.ACK, f.Ack(6))
    end.flush(1.0)
    (chunk,) = said(end, f.WORKER_TO_DAEMON)
    assert isinstance(chunk.header, f.Chunk)
    assert (chunk.header.first_seq, chunk.header.count) == (8, 6)
    told(end, f.Kind.ACK, f.Ack(21))
    assert end.kept == 0


def test_a_run_of_the_same_attempt_means_send_again() -> None:
    end = host()
    run(end)
    end.item(RID, 5, b"a")
    end.item(RID, 5, b"b")
    end.done(RID, 5, f.Done(5, 0), b"", 1.0)
    end.flush(1.0)
    first = said(end, f.WORKER_TO_DAEMON)
    assert told(end, f.Kind.RUN, f.Run(5, 0, "/", True)) == []
    end.flush(1.0)
    assert said(end, f.WORKER_TO_DAEMON) == first


def test_a_later_attempt_replaces_the_one_that_runs_and_an_earlier_one_is_dropped() -> None:
    end = host()
    run(end, 5)
    commands = run(end, 6)
    assert [type(command) for command in commands] == [h.StopRun, h.StartRun]
    assert run(end, 5) == []
    assert not end.item(RID, 5, b"stale")
    assert end.item(RID, 6, b"fresh")


def test_a_run_without_a_body_of_what_is_not_kept_fails_and_starts_nothing() -> None:
    end = host()
    assert told(end, f.Kind.RUN, f.Run(5, 3, "/", True)) == []
    end.flush(1.0)
    (failed,) = said(end, f.WORKER_TO_DAEMON)
    assert isinstance(failed.header, f.Failed)
    assert (failed.header.attempt, failed.header.seq, failed.header.code) == (5, 3, f.Code.WORKER_LOST)


def test_a_cancelled_run_is_stopped_and_has_its_final_at_once() -> None:
    end = host()
    run(end)
    end.item(RID, 5, b"a")
    assert told(end, f.Kind.CANCEL, f.Cancel("deadline_exceeded")) == [h.StopRun(RID, 5, "deadline_exceeded")]
    assert not end.item(RID, 5, b"late")
    end.flush(1.0)
    assert said(end, f.WORKER_TO_DAEMON)[-1].header == f.Failed(5, 1, "deadline_exceeded", "deadline_exceeded")
    assert told(end, f.Kind.CANCEL, f.Cancel("")) == [], "it has ended"


def test_an_answer_above_its_bound_fails() -> None:
    end = host()
    run(end)
    assert not end.item(RID, 5, b"x" * (WELCOME.answer_max + 1))
    end.flush(1.0)
    (failed,) = said(end, f.WORKER_TO_DAEMON)
    assert isinstance(failed.header, f.Failed)
    assert failed.header.code == f.Code.TOO_LARGE


def test_an_answer_is_forgotten_when_nobody_came_for_it_and_not_while_somebody_reads() -> None:
    end = host()
    run(end)
    for _ in range(9):
        end.item(RID, 5, b"x")
    end.done(RID, 5, f.Done(5, 0), b"", 0.0)
    end.tick(h.LINGER_S - 1)
    told(end, f.Kind.ACK, f.Ack(2))
    end.tick(h.LINGER_S + 1)
    assert end.kept == 1
    end.tick(2 * h.LINGER_S)
    assert end.kept == 0


def test_a_host_gives_signs_of_life_only_while_it_holds_something() -> None:
    end = host()
    end.tick(10.0)
    assert said(end, f.WORKER_TO_DAEMON) == []
    run(end)
    end.tick(12.0)
    (hello,) = said(end, f.WORKER_TO_DAEMON)
    assert isinstance(hello.header, f.WorkerHello)
    assert hello.header.requests == (f.HeldRequest(RID, 5, 0, 0, False),)
