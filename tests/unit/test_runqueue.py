"""The run queue and the timers, each against a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.protocol import frames as f
from llmosd.kernel.requests import Request
from llmosd.kernel.runqueue import RunQueue
from llmosd.kernel.timers import Timers

small = st.integers(0, 9)


def request(number: int, order: int) -> Request:
    made = Request(bytes([number]), f.Submit("m", ""), b"", "m", 0.0)
    made.order = order
    return made


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove"]), small, small), max_size=200))
def test_a_queue_gives_the_smallest_order_first_whatever_was_removed(commands: list[tuple[str, int, int]]) -> None:
    queue, waiting = RunQueue(), dict[bytes, Request]()
    for what, number, order in commands:
        if what == "push" and bytes([number]) not in waiting:
            made = waiting[bytes([number])] = request(number, order)
            queue.push(made)
        elif what == "remove":
            queue.remove(bytes([number]))
            waiting.pop(bytes([number]), None)
        elif what == "pop":
            popped = queue.pop()
            assert popped is min(waiting.values(), key=lambda one: (one.order, one.rid), default=None)
            if popped is not None:
                del waiting[popped.rid]
        assert len(queue) == len(waiting)
        assert {waiting_request.rid for waiting_request in queue} == set(waiting)


def test_who_comes_back_takes_its_old_place() -> None:
    queue = RunQueue()
    first, second = request(1, 10), request(2, 20)
    queue.push(first)
    queue.push(second)
    assert queue.pop() is first
    queue.push(first)
    assert [queue.pop(), queue.pop(), queue.pop()] == [first, second, None]


def test_a_queue_that_many_left_keeps_no_trace_of_them() -> None:
    queue = RunQueue()
    for number in range(10_000):
        made = Request(number.to_bytes(4, "big"), f.Submit("m", ""), b"", "m", 0.0)
        queue.push(made)
        queue.remove(made.rid)
    assert len(queue._heap) < 200


@given(st.lists(st.tuples(st.sampled_from(["set", "arm", "cancel", "pass"]), small, st.integers(0, 50)), max_size=200))
def test_timers_ring_once_in_order_and_never_early(commands: list[tuple[str, int, int]]) -> None:
    timers, due, now = Timers(), dict[int, float](), 0.0
    for what, key, span in commands:
        if what == "set":
            timers.set(key, now + span)
            due[key] = now + span
        elif what == "arm":
            timers.arm(key, now + span)
            due.setdefault(key, now + span)
        elif what == "cancel":
            timers.cancel(key)
            due.pop(key, None)
        else:
            now += span
            last = 0.0
            while (rung := timers.pop_due(now)) is not None:
                at = due.pop(rung)  # type: ignore[call-overload]
                assert last <= at <= now
                last = at
            assert all(at > now for at in due.values())
        assert timers.earliest() == min(due.values(), default=None)
        assert all(key in timers for key in due)


def test_timers_that_are_set_again_and_again_keep_no_trace() -> None:
    timers = Timers()
    for number in range(10_000):
        timers.set("one", 1000.0 + number)
        timers.earliest()
    assert len(timers._heap) < 200
