"""The client's end of the bus by hand: what it delivers, asks for again, and gives up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.protocol import client as c
from llmos.protocol import frames as f
from tests.unit.ends import RID, WELCOME, client, hear, said


def test_a_submit_without_answer_is_sent_again_ever_more_slowly() -> None:
    end = client()
    end.submit(f.Submit("m", "/"), b"body", 0.0)
    times, now = [], 0.0
    while now < 30:
        now += 0.05
        end.tick(now)
        times += [
            round(now) for message in said(end, f.CLIENT_TO_DAEMON) if message.kind is f.Kind.SUBMIT and now > 0.1
        ]
    assert times == [1, 3, 7, 15, 23]


def test_items_are_delivered_once_and_in_order_whatever_comes_twice() -> None:
    end = client()
    end.submit(f.Submit("m", "/"), b"body", 0.0)
    assert hear(end, f.Kind.CHUNK, f.Chunk(5, 0, 2, (1, 1), 2), b"ab") == [c.Items(RID, [b"a", b"b"], 2)]
    assert hear(end, f.Kind.CHUNK, f.Chunk(5, 0, 1), b"a") == []
    assert hear(end, f.Kind.CHUNK, f.Chunk(5, 1, 2, (1, 1)), b"bc") == [c.Items(RID, [b"c"], 0)]
    assert hear(end, f.Kind.CHUNK, f.Chunk(5, 4, 1), b"e") == [], "a gap"
    assert end.duplicates == 2


def test_a_gap_asks_with_a_hello_at_once_and_not_again_for_a_moment() -> None:
    end = client()
    end.submit(f.Submit("m", "/"), b"body", 0.0)
    said(end, f.CLIENT_TO_DAEMON)
    for now in (1.0, 1.01, 1.02):
        hear(end, f.Kind.CHUNK, f.Chunk(5, 3, 1), b"d", now=now)
    (hello,) = said(end, f.CLIENT_TO_DAEMON)
    assert hello.header == f.ClientHello(b"i" * 16, (f.OpenRequest(RID, 0),))
    due = end.deadline()
    assert due is not None
    assert due <= 1.0 + c.GAP_S
    end.tick(1.0 + c.GAP_S)
    assert [message.kind for message in said(end, f.CLIENT_TO_DAEMON)] == [f.Kind.HELLO]


def test_a_final_ahead_of_its_items_waits_for_them() -> None:
    end = client()
    end.submit(f.Submit("m", "/"), b"body", 0.0)
    assert hear(end, f.Kind.DONE, f.Done(5, 1)) == []
    items, ended = hear(end, f.Kind.CHUNK, f.Chunk(5, 0, 1), b"a")
    assert isinstance(items, c.Items)
    assert isinstance(ended, c.Ended)
    assert said(end, f.CLIENT_TO_DAEMON)[-1].header == f.Ack(2)
    assert end.open_requests == 0


def test_a_final_that_comes_again_is_acknowledged_again() -> None:
    end = client()
    hear(end, f.Kind.DONE, f.Done(5, 3))
    assert said(end, f.CLIENT_TO_DAEMON)[0].header == f.Ack(4)


def test_the_daemons_own_final_ends_a_request_whatever_is_missing() -> None:
    end = client()
    end.submit(f.Submit("m", "/"), b"body", 0.0)
    (ended,) = hear(end, f.Kind.FAILED, f.Failed(0, 9, f.Code.WORKER_LOST, "gone"))
    assert isinstance(ended, c.Ended)


def test_an_older_attempt_is_old_news_and_a_newer_one_does_not_continue_its_words() -> None:
    end = client()
    end.submit(f.Submit("m", "/"), b"body", 0.0)
    hear(end, f.Kind.CHUNK, f.Chunk(5, 0, 1), b"a")
    assert hear(end, f.Kind.CHUNK, f.Chunk(4, 1, 1), b"x") == []
    assert hear(end, f.Kind.DONE, f.Done(4, 1)) == []
    (ended,) = hear(end, f.Kind.CHUNK, f.Chunk(6, 0, 2, (1, 1)), b"yz")
    assert isinstance(ended, c.Ended)
    assert isinstance(ended.final, f.Failed)
    assert ended.final.code == f.Code.WORKER_LOST


def test_a_newer_attempt_takes_over_where_nothing_was_delivered() -> None:
    end = client()
    end.submit(f.Submit("m", "/"), b"body", 0.0)
    assert hear(end, f.Kind.DONE, f.Done(5, 1)) == [], "its item was lost with the worker"
    assert hear(end, f.Kind.CHUNK, f.Chunk(6, 0, 1), b"a") == [c.Items(RID, [b"a"], 0)]


def test_a_hello_says_again_what_was_taken_and_a_cancellation_is_repeated() -> None:
    end = client()
    hear(end, f.Kind.WELCOME, WELCOME)
    end.submit(f.Submit("m", "/"), b"body", 0.0)
    hear(end, f.Kind.ACCEPTED, f.Accepted(b"ticket", 0))
    hear(end, f.Kind.CHUNK, f.Chunk(5, 0, 1), b"a")
    end.consumed(RID, 1)
    said(end, f.CLIENT_TO_DAEMON)
    end.connected(2.0)
    hello, ack = said(end, f.CLIENT_TO_DAEMON)
    assert hello.header == f.ClientHello(b"i" * 16, (f.OpenRequest(RID, 1, b"ticket"),))
    assert ack.header == f.Ack(1)
    end.cancel(RID, "enough")
    said(end, f.CLIENT_TO_DAEMON)
    for now in (7.0, 7.1, 8.5):
        end.tick(now)
    assert [message.kind for message in said(end, f.CLIENT_TO_DAEMON)].count(f.Kind.CANCEL) == 2


def test_an_unknown_request_is_submitted_again_with_all_that_is_known_of_it() -> None:
    end = client()
    end.submit(f.Submit("m", "/"), b"body", 0.0, deadline=10.0)
    hear(end, f.Kind.ACCEPTED, f.Accepted(b"ticket", 0))
    hear(end, f.Kind.CHUNK, f.Chunk(5, 0, 2, (1, 2)), b"abb")
    said(end, f.CLIENT_TO_DAEMON)
    hear(end, f.Kind.WELCOME, f.Welcome(8, 1, 8, 1, (RID,)), now=4.0)
    (again,) = said(end, f.CLIENT_TO_DAEMON)
    assert isinstance(again.header, f.Submit)
    submit = again.header
    assert (submit.have_seq, submit.ticket, submit.prefix_sizes, submit.remaining_ms) == (2, b"ticket", (1, 2), 6000)
    assert again.payload == [b"body", b"abb"]


def test_a_deadline_ends_a_request_that_the_daemon_says_nothing_of() -> None:
    end = client()
    end.submit(f.Submit("m", "/"), b"body", 0.0, deadline=2.0)
    (ended,) = end.tick(2.0 + c.DEADLINE_GRACE_S)
    assert isinstance(ended, c.Ended)
    assert isinstance(ended.final, f.Failed)
    assert ended.final.code == f.Code.DEADLINE_EXCEEDED


@given(st.sampled_from(sorted(f.TO_CLIENT)), st.lists(st.binary(max_size=30), max_size=3), st.data())
def test_a_client_never_raises_for_what_arrives(kind: f.Kind, payload: list[bytes], data: st.DataObject) -> None:
    end = client()
    end.submit(f.Submit("m", "/"), b"body", 0.0)
    number = st.integers(0, 2**53) | st.integers(0, 3)
    headers: dict[f.Kind, st.SearchStrategy[f.Header]] = {
        f.Kind.WELCOME: st.builds(f.Welcome, number, number, number, number, st.just((RID, b"?"))),
        f.Kind.ACCEPTED: st.builds(f.Accepted, st.binary(max_size=9), number),
        f.Kind.CHUNK: st.builds(f.Chunk, number, number, number, st.lists(number, max_size=3).map(tuple), number),
        f.Kind.DONE: st.builds(f.Done, number, number),
        f.Kind.FAILED: st.builds(f.Failed, number, number, st.just("?"), st.just("?")),
    }
    for now in range(3):
        header = data.draw(headers[kind])
        hear(end, kind, header, *payload, now=float(now))
        end.consumed(RID, 1)
        end.tick(now + 0.5)
