"""Clients that go away, for the kernel by hand: out of reach for a while is one thing, an ended process another."""

from __future__ import annotations

import pytest

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from tests.unit.shell import CLIENT, Shell, rid_of, spec

ONE = rid_of(1)


def running() -> Shell:
    shell = Shell(spec())
    shell.submit(ONE)
    shell.ready(shell.only(do.Spawn))
    shell.run()
    return shell


def test_a_client_out_of_reach_may_come_back_for_its_answer() -> None:
    shell = running()
    shell.tell(on.ClientUnreachable(CLIENT))
    (request,) = shell.kernel.requests()
    assert (request.state, request.connected) == ("running", False)
    shell.client(f.Kind.HELLO, b"", f.ClientHello(b"c", (f.OpenRequest(ONE, 0),)))
    assert shell.kernel.requests()[0].connected


@pytest.mark.parametrize("out_of_reach_first", [False, True])
def test_the_end_of_a_clients_process_ends_its_requests_whatever_was_heard_first(out_of_reach_first: bool) -> None:
    shell = running()
    if out_of_reach_first:
        shell.tell(on.ClientUnreachable(CLIENT))
    shell.tell(on.ClientLost(CLIENT, "its process ended"))
    assert shell.kernel.requests() == []
    assert shell.only(do.ToWorker).kind is f.Kind.RELEASE


def test_who_came_back_on_another_connection_keeps_its_request_when_the_first_ends() -> None:
    shell = running()
    shell.tell(on.ClientUnreachable(CLIENT))
    other = b"\x02" * 16
    shell.tell(on.ClientIdentified(other, 1000, 99))
    hello = f.ClientHello(b"c", (f.OpenRequest(ONE, 0),))
    shell.client(f.Kind.HELLO, b"", hello, peer=other)
    shell.tell(on.ClientLost(CLIENT, "its process ended"))
    assert len(shell.kernel.requests()) == 1
