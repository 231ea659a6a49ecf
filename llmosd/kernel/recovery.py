"""What brings back what was lost: frames, a client's connection, a worker, the table of an earlier daemon.

For the kernel. Both ends list in their HELLOs what they hold; here the two lists are brought together. It must never
give a request to a second worker while a first may still be at work on it.
"""

from __future__ import annotations

from typing import Final

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel.fleet import Fleet
from llmosd.kernel.params import Params
from llmosd.kernel.requests import MANY, OPEN, Request, RequestState
from llmosd.kernel.table import Table
from llmosd.kernel.worker import Model, Worker

#: Seconds after a RUN in which a HELLO that lacks the request proves nothing: it may have been sent before.
CROSSING_S: Final = 0.5
#: A frame carries numbers up to 2**53.
ATTEMPT_MAX: Final = 1 << 52


class Recovery:
    """Brings the table of requests in line with what clients and workers say they hold."""

    def __init__(self, params: Params, fleet: Fleet, table: Table, out: list[do.Effect]) -> None:
        self._params = params
        self._fleet = fleet
        self._table = table
        self._out = out

    def repeat(self, request: Request, have_seq: int, now: float) -> None:
        """The client wants item `have_seq` next: have it sent again by whoever keeps it."""
        request.next_seq = max(request.next_seq, have_seq)
        if request.final is not None:
            self._table.tell(request, f.Kind.FAILED, request.final)
        elif request.confirmed or now > request.dispatched_at + CROSSING_S:
            self._table.send_run(request, have_seq)

    def send_cancel(self, request: Request) -> None:
        assert request.worker is not None
        worker = self._fleet.workers[request.worker]
        self._out.append(do.ToWorker(worker.peer, f.Kind.CANCEL, request.rid, f.Cancel(request.cancel_reason)))

    # -- a host lists what it holds -------------------------------------------------------------------------

    def reconcile(self, worker: Worker, header: f.WorkerHello, now: float) -> None:
        """Agree with a host on what it holds: ask for what is missing here, release what is not wanted."""
        held = {h.rid: h for h in header.requests}
        for rid, request in list(worker.requests.items()):
            self._compare(worker, request, held.get(rid), now)
        for rid, h in held.items():
            if rid not in worker.requests and not self._claim(worker, h, now):
                self._out.append(do.ToWorker(worker.peer, f.Kind.RELEASE, rid, f.Empty()))
        if worker.unheard:
            worker.unheard = False
            self._unpark(self._fleet.models[worker.model])
            self._fleet.note_drained(worker, now)

    def _compare(self, worker: Worker, request: Request, h: f.HeldRequest | None, now: float) -> None:
        if h is not None and h.attempt == request.attempt:
            request.confirmed = True
            if request.final_seq >= 0:
                return
            if h.final:
                self._table.send_run(request, request.next_seq)
            elif request.cancel_reason:
                self.send_cancel(request)
        elif now > request.dispatched_at + CROSSING_S:
            if h is not None and h.attempt > request.attempt:
                self._out.append(do.ToWorker(worker.peer, f.Kind.RELEASE, request.rid, f.Empty()))
            if request.final_seq >= 0 and request.peer is None:
                self._table.drop(request, now, release=False)
            else:
                self._table.send_run(request, request.next_seq)

    def _claim(self, worker: Worker, h: f.HeldRequest, now: float) -> bool:
        """A host holds a request that this kernel did not give it: an earlier one did, if at all. True: it goes on."""
        request = self._table.requests.get(h.rid)
        if not (0 < h.attempt < ATTEMPT_MAX and 0 <= h.kept_from <= MANY and len(h.rid) == f.REQUEST_ID_BYTES):
            return False
        if request is None:
            if not worker.unheard:
                return False
            request = Request(h.rid, f.Submit(worker.model, ""), None, worker.model, now)
            self._table.add(request)
            self._table.detach(request, now)
        elif request.state not in OPEN or h.kept_from > request.next_seq or request.model != worker.model:
            return False
        elif request.state is RequestState.RUNNING:
            # Two claim it, so it was given away twice over two restarts: the later attempt counts.
            if not worker.unheard or h.attempt <= request.attempt:
                return False
            self._table.take(request, now, release=True)
        self._table.unqueue(request)
        self._table.give(request, worker, h.attempt, now)
        request.confirmed = True
        if request.peer is not None or h.final:
            self._table.send_run(request, request.next_seq)
        request.next_seq = max(request.next_seq, h.kept_from)
        return True

    def _unpark(self, model: Model) -> None:
        """Once every adopted worker was heard, or is gone, what none of them runs may be run."""
        if any(worker.unheard for worker in model.workers.values()):
            return
        for request in model.parked.values():
            model.queue.push(request)
        model.parked.clear()
        self._fleet.touch(model)

    # -- a worker is gone -----------------------------------------------------------------------------------

    def lose(self, worker: Worker, now: float) -> None:
        """What the worker had not begun to answer runs elsewhere, the rest fails with the reason."""
        requests = list(worker.requests.values())
        worker.requests.clear()
        worker.running = 0
        worker.unheard = False
        model = self._fleet.models[worker.model]
        for request in requests:
            request.worker = None
            if request.state in OPEN:
                self._lose_open(request, worker, model, now)
            elif request.peer is None or request.client_acked >= request.final_seq:
                self._table.drop(request, now, release=False)
            else:  # its answer was complete, and what the client has not got of it died with the worker
                self._fail(request, worker, now)
        self._unpark(model)

    def _lose_open(self, request: Request, worker: Worker, model: Model, now: float) -> None:
        if request.cancel_reason:
            expired = request.cancel_reason == f.Code.DEADLINE_EXCEEDED
            code = f.Code.DEADLINE_EXCEEDED if expired else f.Code.CANCELLED
            self._table.fail(request, code, request.cancel_reason, now)
        elif request.body is None:
            # Known from the worker alone: its client has the body, and is asked for it where it is there.
            if request.peer is not None:
                p = self._params
                welcome = f.Welcome(p.epoch, p.body_max, p.window, p.answer_max, (request.rid,))
                self._out.append(do.ToClient(request.peer, f.Kind.WELCOME, b"", welcome))
            self._table.drop(request, now, release=False)
        elif request.next_seq > 0:
            self._fail(request, worker, now)
        elif request.losses + 1 >= self._params.losses_max:
            self._fail(request, worker, now, f", as {request.losses} others before it; it may be what kills them")
        else:
            request.losses += 1
            request.state = RequestState.READY
            request.prompt_tokens = request.tokens = 0
            model.queue.push(request)

    def _fail(self, request: Request, worker: Worker, now: float, more: str = "") -> None:
        why = worker.failure_reason or worker.why or "it ended"
        message = f"worker {worker.name} was lost after {request.next_seq} answer items{more}: {why}"
        self._table.fail(request, f.Code.WORKER_LOST, message, now)
