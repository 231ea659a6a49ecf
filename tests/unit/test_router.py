"""The daemon's ROUTER with real peers on a real socket, and nothing behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import zmq

from llmos.protocol import frames as f
from llmosd.bus.router import Router
from llmosd.kernel import effects as do

PEER = b"\x01" + b"p" * 15
RID = b"r" * 16
REFUSAL = do.ToClient(PEER, f.Kind.FAILED, RID, f.Failed(0, 0, f.Code.NOT_FOUND, "no such model"))


async def eventually(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


def test_a_peer_that_floods_and_never_reads_costs_a_bounded_number_of_messages(tmp_path: Path) -> None:
    async def flood() -> tuple[int, list[bytes], int]:
        context = zmq.Context()
        said: list[f.Message] = []
        unreachable: list[bytes] = []
        router = Router(
            context, f"ipc://{tmp_path}/front.sock", f.CLIENT_TO_DAEMON, 1 << 20,
            lambda peer, message: said.append(message), on_unreachable=unreachable.append, unread_max=100,
        )  # fmt: skip
        router.serve()
        peer = context.socket(zmq.DEALER)
        peer.setsockopt(zmq.IDENTITY, PEER)
        peer.setsockopt(zmq.RCVHWM, 1)
        # The kernel's buffer of the socket takes some messages too.
        peer.setsockopt(zmq.RCVBUF, 4096)
        try:
            peer.connect(f"ipc://{tmp_path}/front.sock")
            peer.send_multipart(f.encode(f.Kind.HELLO, b"", f.ClientHello(PEER)))
            await eventually(lambda: bool(said))
            tries = 0
            while not unreachable and tries < 100_000:
                router.send(REFUSAL)
                tries += 1
            # It reads at last, and can be told again.
            received = 0
            while peer.poll(200):
                peer.recv_multipart()
                received += 1
            router.send(REFUSAL)
            await eventually(lambda: peer.poll(0) != 0)
            return tries, unreachable, received
        finally:
            router.close()
            peer.close(0)
            context.term()

    tries, unreachable, received = asyncio.run(flood())
    assert unreachable == [PEER]
    assert received == tries - 1 < 20_000
