"""The table of accepted requests: who waits for which, which worker holds it, and how each ends, once. For the kernel.

An end that a worker reported stays with that worker until the client has it; one that the kernel makes itself
(attempt 0) is kept here. What to do with a request is `routing.py`'s to say, and after a loss `recovery.py`'s.
"""

from __future__ import annotations

from collections import Counter

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel.fleet import Fleet
from llmosd.kernel.params import Params
from llmosd.kernel.requests import ENDED_AS, OPEN, Request, RequestState
from llmosd.kernel.timers import Timers
from llmosd.kernel.worker import Worker


class Table:
    """The requests of one kernel."""

    def __init__(self, params: Params, fleet: Fleet, out: list[do.Effect], timers: Timers) -> None:
        self.requests: dict[bytes, Request] = {}
        #: Requests by the connection that waits for them.
        self.by_peer: dict[bytes, dict[bytes, Request]] = {}
        #: And by the connection that they were lost with.
        self.by_lost_peer: dict[bytes, dict[bytes, Request]] = {}
        #: How many have not ended.
        self.open = 0
        self.counts: Counter[str] = Counter()
        self._params = params
        self._fleet = fleet
        self._out = out
        self._timers = timers

    def add(self, request: Request) -> None:
        self.requests[request.rid] = request
        self.open += 1

    # -- who waits ------------------------------------------------------------------------------------------

    def bind(self, request: Request, peer: bytes, now: float) -> None:
        """This connection waits for the request's answer."""
        request.client_at = now
        if request.peer == peer:
            return
        self._unbind(request)
        self._timers.cancel(("away", request.rid))
        request.peer = peer
        self.by_peer.setdefault(peer, {})[request.rid] = request

    def detach(self, request: Request, now: float) -> None:
        """Nobody can be told of the request; its client may come back for it."""
        peer = request.peer
        self._unbind(request)
        if peer is not None:
            request.lost_peer = peer
            self.by_lost_peer.setdefault(peer, {})[request.rid] = request
        self._timers.set(("away", request.rid), now + self._params.resume_timeout)

    def waiting_on(self, peer: bytes) -> list[Request]:
        """The requests of a connection, also of one that was lost."""
        return [*self.by_peer.get(peer, {}).values(), *self.by_lost_peer.get(peer, {}).values()]

    def _unbind(self, request: Request) -> None:
        for peers, peer in ((self.by_peer, request.peer), (self.by_lost_peer, request.lost_peer)):
            if peer is not None and (waiting := peers.get(peer)) is not None:
                waiting.pop(request.rid, None)
                if not waiting:
                    del peers[peer]
        request.peer = request.lost_peer = None

    def tell(self, request: Request, kind: f.Kind, header: f.Header) -> None:
        """A message to the request's client, if it is there."""
        if request.peer is not None:
            self._out.append(do.ToClient(request.peer, kind, request.rid, header))

    # -- who holds it ---------------------------------------------------------------------------------------

    def give(self, request: Request, worker: Worker, attempt: int, now: float) -> None:
        """The worker has the request from now on."""
        request.state, request.worker, request.attempt = RequestState.RUNNING, worker.name, attempt
        request.dispatched_at = now
        request.confirmed = False
        worker.requests[request.rid] = request
        worker.running += 1
        self._fleet.note_busy(worker, now)

    def take(self, request: Request, now: float, *, release: bool) -> None:
        """The worker, if any, has nothing to do with the request any more. `release`: and is told so."""
        worker = self._fleet.workers.get(request.worker) if request.worker else None
        request.worker = None
        if worker is None or worker.requests.pop(request.rid, None) is None:
            return
        if release:
            self._out.append(do.ToWorker(worker.peer, f.Kind.RELEASE, request.rid, f.Empty()))
        if request.final_seq < 0:
            worker.running -= 1
            self._fleet.touch(self._fleet.models[worker.model])
        self._fleet.note_idle(worker, now)

    def send_run(self, request: Request, first_seq: int) -> None:
        """Have the request's worker run it, or send it again where it is known to have it: then without the body."""
        if request.worker is None:
            return
        worker, s = self._fleet.workers[request.worker], request.submit
        run = f.Run(
            request.attempt, first_seq if request.confirmed else 0, s.path, s.stream, s.seed, s.response_id, s.created,
            max_tokens=worker.limits.max_tokens,
        )  # fmt: skip
        payload = () if request.confirmed or request.body is None else (request.body,)
        self._out.append(do.ToWorker(worker.peer, f.Kind.RUN, request.rid, run, payload))

    # -- ends -----------------------------------------------------------------------------------------------

    def unqueue(self, request: Request) -> None:
        if (model := self._fleet.models.get(request.model)) is not None:
            model.queue.remove(request.rid)
            model.parked.pop(request.rid, None)

    def ended(self, request: Request, state: RequestState, now: float) -> None:
        """Count an end. Whatever is still to be sent of the answer, nothing is to be made any more."""
        request.state = state
        self.open -= 1
        self.counts[state] += 1
        self._timers.set(request.rid, now + max(1.0, self._params.resume_timeout))

    def fail(self, request: Request, code: str, message: str, now: float) -> None:
        """End a request from here: no worker keeps its final, so this does."""
        if request.state in OPEN:
            self.unqueue(request)
            self.ended(request, ENDED_AS.get(code, RequestState.FAILED), now)
        self.take(request, now, release=True)
        request.final_seq = request.next_seq
        request.final = f.Failed(0, request.final_seq, code, message)
        self.tell(request, f.Kind.FAILED, request.final)

    def drop(self, request: Request, now: float, *, release: bool) -> None:
        """Forget a request that has ended, or that nobody waits for."""
        rid = request.rid
        if request.state in OPEN:
            self.unqueue(request)
            self.ended(request, RequestState.CANCELLED, now)
        self.take(request, now, release=release)
        self._unbind(request)
        del self.requests[rid]
        self._timers.cancel(rid)
        self._timers.cancel(("away", rid))
