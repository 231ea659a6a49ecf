"""The bus as a whole: the clients' socket, the workers' socket, and the processes behind the clients.

Turns what arrives into the kernel's events, and sends what the kernel wants sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

from llmos.protocol import frames as f
from llmosd.bus.clients import ClientProcesses
from llmosd.bus.router import Router
from llmosd.kernel import effects as do
from llmosd.kernel import events as on


class Bus:
    """Bound from the start; whoever connects waits until `serve`."""

    def __init__(
        self, front: str, back: str, front_fd: int, back_fd: int, body_max: int, answer_max: int,
        feed: Callable[[on.Event], None],
    ) -> None:  # fmt: skip
        """`front_fd`, `back_fd`: sockets that listen at these addresses, and are closed with the bus. `body_max`,
        `answer_max`: bytes of the largest message from a client and from a worker. Raises zmq.ZMQError."""
        self._loop = asyncio.get_running_loop()
        self._resuming = False
        self._clients = ClientProcesses(lambda peer, why: feed(on.ClientLost(peer, why)))
        self._context = zmq.Context()
        self._front = Router(
            self._context, front, f.CLIENT_TO_DAEMON, body_max,
            lambda peer, message: feed(on.ClientSaid(peer, message)),
            on_unreachable=lambda peer: feed(on.ClientUnreachable(peer)),
            on_new_peer=lambda peer, uid, pid: feed(on.ClientIdentified(peer, uid, pid)),
            fd=front_fd,
        )  # fmt: skip
        self._back = Router(
            self._context, back, f.WORKER_TO_DAEMON, answer_max,
            lambda peer, message: feed(on.WorkerSaid(peer, message)),
            on_unreachable=lambda peer: None,  # its pidfd tells when it is gone; its HELLO when it is back
            fd=back_fd,
        )  # fmt: skip

    def serve(self) -> None:
        """Workers first: what they hold is known when their clients ask for it."""
        self._back.serve()
        self._front.serve()

    def counts(self) -> dict[str, int]:
        return dict(self._front.counts + self._back.counts)

    def to_client(self, effect: do.ToClient) -> None:
        self._front.send(effect)
        self._resume_soon()

    def to_worker(self, effect: do.ToWorker) -> None:
        self._back.send(effect)
        self._resume_soon()

    def watch_client(self, effect: do.WatchClient) -> None:
        self._clients.watch(effect.peer, effect.pid)

    def unwatch_client(self, effect: do.UnwatchClient) -> None:
        self._front.forget(effect.peer)

    def close(self) -> None:
        self._clients.close()
        self._front.close()
        self._back.close()
        self._context.term()

    def _resume_soon(self) -> None:
        """Look for messages whose wake-up a send has eaten: once for all that this iteration of the loop sends."""
        if not self._resuming:
            self._resuming = True
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._resuming = False
        self._front.resume()
        self._back.resume()
