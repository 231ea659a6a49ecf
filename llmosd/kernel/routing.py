"""Requests: admitted, queued, dispatched, passed on, ended exactly once. For the kernel.

The client is the log and the worker keeps its answer (`proto/bus.md`), so what is known here is soft: a restarted
kernel rebuilds it from HELLOs. A final comes from the worker that ran the request wherever one did; only where none
can, the kernel makes it itself (attempt 0) and keeps it until it is acknowledged.
"""

from __future__ import annotations

from collections import Counter

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel.dispatch import choose
from llmosd.kernel.fleet import Fleet
from llmosd.kernel.lifecycle import State
from llmosd.kernel.params import Params
from llmosd.kernel.requests import ENDED_AS, OPEN, Request, RequestState, read_ticket, sign_ticket
from llmosd.kernel.timers import Timers
from llmosd.kernel.worker import Model, Worker


class Routing:
    """The request table of one kernel."""

    def __init__(self, params: Params, fleet: Fleet, out: list[do.Effect], timers: Timers) -> None:
        self.requests: dict[bytes, Request] = {}
        #: Requests by the connection that waits for them.
        self.by_peer: dict[bytes, set[bytes]] = {}
        self.owners: dict[bytes, int] = {}
        self.counts: Counter[str] = Counter()
        self._params = params
        self._fleet = fleet
        self._out = out
        self._timers = timers
        self._order = 0
        self._open = 0

    # -- what clients say -----------------------------------------------------------------------------------

    def hello(self, peer: bytes, header: f.ClientHello, now: float) -> None:
        """A client lists what it waits for: bind it here, repeat what it misses, name what is not known."""
        unknown = []
        for open_request in header.open:
            request = self.requests.get(open_request.rid)
            if request is None:
                unknown.append(open_request.rid)
            else:
                self._bind(request, peer)
                self._repeat(request, open_request.have_seq)
        p = self._params
        welcome = f.Welcome(p.epoch, p.body_max, p.window, p.answer_max, tuple(unknown))
        self._out.append(do.ToClient(peer, f.Kind.WELCOME, b"", welcome))

    def submit(self, peer: bytes, rid: bytes, header: f.Submit, payload: list[bytes], now: float) -> None:
        request = self.requests.get(rid)
        if request is not None:
            if not request.body and payload:  # until now known from a worker's HELLO only
                request.submit, request.body = header, payload[0]
            self._bind(request, peer)
            self._repeat(request, header.have_seq)
            if request.state in OPEN:
                self._accept(request)
            return
        self._admit(peer, rid, header, payload, now)

    def cancel(self, rid: bytes, reason: str, now: float) -> None:
        request = self.requests.get(rid)
        if request is None or request.state not in OPEN:
            return
        if request.state is RequestState.RUNNING:
            self._cancel_running(request, reason)
        else:
            self._unqueue(request)
            code = f.Code.DEADLINE_EXCEEDED if reason == f.Code.DEADLINE_EXCEEDED else f.Code.CANCELLED
            self._fail(request, code, reason or "cancelled", now)

    def ack(self, rid: bytes, seq: int, now: float) -> None:
        request = self.requests.get(rid)
        if request is None:
            return
        request.client_acked = max(request.client_acked, seq)
        worker = self._fleet.workers.get(request.worker) if request.worker else None
        if worker is not None and worker.peer:
            self._out.append(do.ToWorker(worker.peer, f.Kind.ACK, rid, f.Ack(seq)))
        if request.final_seq >= 0 and seq > request.final_seq:
            self._drop(request, now, release=False)

    def client_lost(self, peer: bytes, why: str, now: float) -> None:
        """Nobody waits for these answers any more."""
        for rid in list(self.by_peer.pop(peer, ())):
            if (request := self.requests.get(rid)) is not None:
                self.abandon(request, why, now)
        self.owners.pop(peer, None)

    def client_unreachable(self, peer: bytes, now: float) -> None:
        """Its requests go on without it for a while."""
        for rid in self.by_peer.pop(peer, set()):
            if (request := self.requests.get(rid)) is not None:
                self._detach(request, now)

    def abandon(self, request: Request, why: str, now: float) -> None:
        """End a request without telling anybody: take it from its engine, and forget it."""
        if request.state in OPEN:
            self._unqueue(request)
            self._count_end(request, RequestState.CANCELLED, now)
            self.counts[why] += 1
        self._drop(request, now, release=True)
        if (model := self._fleet.models.get(request.model)) is not None:
            self.dispatch(model, now)

    # -- admission ------------------------------------------------------------------------------------------

    def _admit(self, peer: bytes, rid: bytes, header: f.Submit, payload: list[bytes], now: float) -> None:
        fleet, params = self._fleet, self._params
        model = fleet.models.get(fleet.names.get(header.model, ""))
        if model is None or not model.spec.routed:
            known = ", ".join(sorted(m.spec.model for m in fleet.models.values() if m.spec.routed)) or "none"
            return self._reject(peer, rid, f.Code.NOT_FOUND, f"no model {header.model[:80]!r}; there are: {known}")
        if not payload or len(payload[0]) > params.body_max:
            size = len(payload[0]) if payload else 0
            code = f.Code.TOO_LARGE if payload else f.Code.INVALID
            return self._reject(peer, rid, code, f"a body of {size} bytes; at most {params.body_max} are taken")
        limits = model.spec.limits
        place = read_ticket(params.ticket_key, rid, header.ticket) if header.ticket else None
        if place is None and (len(model.queue) >= limits.queue_max or self._open >= params.requests_max):
            message = (
                f"{len(model.queue)} requests already wait for {model.spec.model}; its queue_max is {limits.queue_max}"
            )
            return self._reject(peer, rid, f.Code.QUEUE_FULL, message, self._retry_after_ms(model, now))
        tenant = header.tenant or (f"uid:{self.owners[peer]}" if peer in self.owners else "")
        request = Request(rid, None, header, payload[0], model.spec.model, tenant, now)
        self._order = max(self._order + 1, int(now * 1e6))
        request.order, request.attempt = place or (self._order, params.epoch)
        request.resumed = place is not None
        request.ticket = sign_ticket(params.ticket_key, rid, request.order, request.attempt)
        spans = [span for span in (header.remaining_ms / 1000, float(limits.request_timeout)) if span > 0]
        if spans:
            request.expires_at = now + min(spans)
            self._timers.set(("expire", rid), request.expires_at)
        self.requests[rid] = request
        self._open += 1
        self.counts["accepted"] += 1
        self._bind(request, peer)
        model.queue.push(request)
        self._accept(request, len(model.queue) - 1)
        self.dispatch(model, now)
        return None

    def _reject(self, peer: bytes, rid: bytes, code: f.Code, message: str, retry_after_ms: int = 0) -> None:
        """Never accepted, so nothing is kept: a client that asks again is judged again."""
        self.counts[f"rejected_{code}"] += 1
        failed = f.Failed(0, 0, code, message, retry_after_ms=retry_after_ms)
        self._out.append(do.ToClient(peer, f.Kind.FAILED, rid, failed))

    def _retry_after_ms(self, model: Model, now: float) -> int:
        """When a slot's worth of the queue will have been served, at the rate at which the running ones go on."""
        running = [r for w in model.workers.values() for r in w.requests.values() if r.state is RequestState.RUNNING]
        if not running:
            return 1000
        mean_age = sum(now - request.dispatched_at for request in running) / len(running)
        return max(100, min(60_000, int(1000 * mean_age * len(model.queue) / len(running))))

    def _accept(self, request: Request, position: int = 0) -> None:
        if request.peer is not None:
            accepted = f.Accepted(request.ticket, position)
            self._out.append(do.ToClient(request.peer, f.Kind.ACCEPTED, request.rid, accepted))

    # -- dispatch -------------------------------------------------------------------------------------------

    def dispatch(self, model: Model, now: float) -> None:
        """Give waiting requests to free slots; have workers started; end what would wait for ever."""
        queue = model.queue
        held: list[Request] = []
        while len(queue) and (worker := choose(model.workers.values())) is not None:
            request = queue.pop()
            assert request is not None
            if request.resumed and any(w.state is State.ADOPTED for w in model.workers.values()):
                held.append(request)  # it may run on a worker that has not said HELLO
                continue
            if request.next_seq > 0:
                self._fail(request, f.Code.WORKER_LOST, "the worker that had begun to answer is gone", now)
                continue
            self._run(request, worker, now)
        for request in held:
            queue.push(request)
        running = sum(worker.running for worker in model.workers.values())
        hopeless = self._fleet.balance(model, len(queue) + running, now)
        if hopeless:
            while (request := queue.pop()) is not None:
                self._fail(request, f.Code.UNAVAILABLE, hopeless, now)

    def _run(self, request: Request, worker: Worker, now: float) -> None:
        request.state, request.worker = RequestState.RUNNING, worker.name
        request.attempt += 1
        request.dispatched_at = now
        request.resumed = False
        worker.requests[request.rid] = request
        worker.running += 1
        self._fleet.note_busy(worker, now)
        self._send_run(request, worker, request.next_seq)

    def _send_run(self, request: Request, worker: Worker, first_seq: int) -> None:
        s, limits = request.submit, worker.limits
        run = f.Run(
            request.attempt, first_seq, s.path, s.stream, s.seed, s.response_id, s.created,
            max_tokens=limits.max_tokens,
        )  # fmt: skip
        self._out.append(do.ToWorker(worker.peer, f.Kind.RUN, request.rid, run, (request.body,)))

    def _repeat(self, request: Request, have_seq: int) -> None:
        """The client holds less than was passed on: have it sent again by whoever keeps it."""
        if request.final is not None and request.peer is not None:
            self._out.append(do.ToClient(request.peer, f.Kind.FAILED, request.rid, request.final))
        elif request.worker is not None and (have_seq < request.next_seq or request.final_seq >= 0):
            worker = self._fleet.workers[request.worker]
            self._send_run(request, worker, have_seq)

    # -- what workers say -----------------------------------------------------------------------------------

    def worker_said(self, worker: Worker, message: f.Message, now: float) -> None:
        """CHUNK, YIELD, DONE or FAILED of a request."""
        header, rid = message.header, message.rid
        request = self.requests.get(rid)
        attempt: int = header.attempt  # type: ignore[attr-defined]  # each of these kinds has one
        if request is None or request.worker != worker.name or request.attempt != attempt:
            self.counts["stale"] += 1
            if request is None and not isinstance(header, f.Chunk):
                self._out.append(do.ToWorker(worker.peer, f.Kind.RELEASE, rid, f.Empty()))
            return
        if isinstance(header, f.Chunk):
            end = header.first_seq + header.count
            if end > request.next_seq:
                if request.first_item_at == 0.0:
                    request.first_item_at = now
                request.next_seq = end
                request.tokens += header.tokens
                self.counts["tokens"] += header.tokens
        elif isinstance(header, f.Done | f.Failed):
            if request.final_seq < 0:
                request.final_seq = header.seq
                self._engine_finished(request, worker, header, now)
        else:
            return
        if request.peer is not None:
            self._out.append(do.ToClient(request.peer, message.kind, rid, message.raw_header, message.payload))

    def _engine_finished(self, request: Request, worker: Worker, header: f.Done | f.Failed, now: float) -> None:
        if isinstance(header, f.Done):
            request.prompt_tokens = header.prompt_tokens
            request.tokens = header.completion_tokens or request.tokens
            state = RequestState.DONE
        else:
            state = ENDED_AS.get(header.code, RequestState.FAILED)
        self._count_end(request, state, now)
        self._timers.set(("linger", request.rid), now + self._params.resume_timeout)
        worker.running -= 1
        self._fleet.note_idle(worker, now)
        self.dispatch(self._fleet.models[worker.model], now)

    def reconcile(self, worker: Worker, header: f.WorkerHello, now: float) -> None:
        """A host lists what it holds. Agree on it: ask for what is missing here, release what is not wanted."""
        held = {h.rid: h for h in header.requests}
        for rid, request in list(worker.requests.items()):
            h = held.get(rid)
            if h is None or h.attempt != request.attempt:
                if request.final_seq >= 0:
                    self._drop(request, now, release=False)
                elif now > request.dispatched_at + 0.5 or h is None:
                    self._send_run(request, worker, request.next_seq)
            elif h.final and request.final_seq < 0:
                self._send_run(request, worker, request.next_seq)
        for h in header.requests:
            if h.rid not in worker.requests:
                self._claim(worker, h, now)

    def _claim(self, worker: Worker, h: f.HeldRequest, now: float) -> None:
        """A host holds a request that this kernel did not give it: in an earlier life, if at all."""
        request = self.requests.get(h.rid)
        waiting = request is not None and request.state in OPEN and request.state is not RequestState.RUNNING
        if (request is None and worker.state is not State.ADOPTED) or (request is not None and not waiting):
            self._out.append(do.ToWorker(worker.peer, f.Kind.RELEASE, h.rid, f.Empty()))
            return
        if request is None:
            request = Request(h.rid, None, f.Submit(worker.model, ""), b"", worker.model, "", now)
            self.requests[h.rid] = request
            self._open += 1
            self._detach(request, now)
        else:
            self._unqueue(request)
        request.state, request.worker, request.attempt = RequestState.RUNNING, worker.name, h.attempt
        request.dispatched_at = now
        request.resumed = False
        have_seq = request.next_seq
        request.next_seq = max(have_seq, h.kept_from)
        worker.requests[h.rid] = request
        worker.running += 1
        self._fleet.note_busy(worker, now)
        if request.peer is not None or h.final:
            self._send_run(request, worker, have_seq)

    def lose(self, worker: Worker, now: float) -> None:
        """The worker is gone: what it had not begun to answer runs elsewhere, the rest fails with the reason."""
        requests = list(worker.requests.values())
        worker.requests.clear()
        worker.running = 0
        model = self._fleet.models[worker.model]
        for request in requests:
            request.worker = None
            if request.final_seq >= 0 and request.state not in OPEN:
                # Its answer was complete, and what the client has not got of it died with the worker.
                if request.peer is None or request.client_acked >= request.final_seq:
                    self._drop(request, now, release=False)
                    continue
                self._lost(request, worker, now)
            elif request.cancel_reason:
                self._end_cancelled(request, now)
            elif request.next_seq > 0:
                self._lost(request, worker, now)
            elif request.losses + 1 >= self._params.losses_max:
                self._lost(request, worker, now, f" for the {request.losses + 1}th time; it may be what kills them")
            elif not request.body and request.peer is None:
                self._drop(request, now, release=False)  # known from a HELLO only: its client will submit it again
            else:
                request.losses += 1
                request.state = RequestState.READY
                request.prompt_tokens = request.tokens = 0
                model.queue.push(request)
        if requests:
            self.dispatch(model, now)

    def _lost(self, request: Request, worker: Worker, now: float, more: str = "") -> None:
        why = worker.failure_reason or worker.why or "it ended"
        message = f"worker {worker.name} was lost after {request.next_seq} answer items{more}: {why}"
        self._fail(request, f.Code.WORKER_LOST, message, now)

    # -- ends -----------------------------------------------------------------------------------------------

    def expired(self, rid: bytes, now: float) -> None:
        self.cancel(rid, f.Code.DEADLINE_EXCEEDED, now)

    def lingered(self, rid: bytes, now: float) -> None:
        """Its client has not come back, or never acknowledged."""
        if (request := self.requests.get(rid)) is not None:
            self.abandon(request, "abandoned", now)

    def _cancel_running(self, request: Request, reason: str) -> None:
        request.cancel_reason = reason or f.Code.CANCELLED
        assert request.worker is not None
        worker = self._fleet.workers[request.worker]
        self._out.append(do.ToWorker(worker.peer, f.Kind.CANCEL, request.rid, f.Cancel(request.cancel_reason)))

    def _end_cancelled(self, request: Request, now: float) -> None:
        expired = request.cancel_reason == f.Code.DEADLINE_EXCEEDED
        code = f.Code.DEADLINE_EXCEEDED if expired else f.Code.CANCELLED
        self._fail(request, code, request.cancel_reason, now)

    def _fail(self, request: Request, code: f.Code, message: str, now: float) -> None:
        """End an accepted request from here: no worker keeps its final, so this does."""
        if request.state in OPEN:
            self._count_end(request, ENDED_AS.get(code, RequestState.FAILED), now)
        request.final_seq = request.next_seq
        request.final = f.Failed(0, request.final_seq, code, message)
        self._timers.set(("linger", request.rid), now + self._params.resume_timeout)
        if request.peer is not None:
            self._out.append(do.ToClient(request.peer, f.Kind.FAILED, request.rid, request.final))

    def _count_end(self, request: Request, state: RequestState, now: float) -> None:
        request.state = state
        request.ended_at = now
        self._open -= 1
        self.counts[state] += 1
        self._timers.cancel(("expire", request.rid))

    def _unqueue(self, request: Request) -> None:
        if (model := self._fleet.models.get(request.model)) is not None:
            model.queue.remove(request.rid)

    def _drop(self, request: Request, now: float, *, release: bool) -> None:
        """Forget a request. `release`: its worker is told to forget it too."""
        rid = request.rid
        worker = self._fleet.workers.get(request.worker) if request.worker else None
        if worker is not None and worker.requests.pop(rid, None) is not None:
            if release and worker.peer:
                self._out.append(do.ToWorker(worker.peer, f.Kind.RELEASE, rid, f.Empty()))
            if request.final_seq < 0:
                worker.running -= 1
        del self.requests[rid]
        self._timers.cancel(("linger", rid))
        self._timers.cancel(("expire", rid))
        self._unbind(request)
        if worker is not None:
            self._fleet.note_idle(worker, now)

    def _bind(self, request: Request, peer: bytes) -> None:
        if request.peer == peer:
            return
        self._unbind(request)
        request.peer = peer
        self.by_peer.setdefault(peer, set()).add(request.rid)
        if request.final_seq < 0:
            self._timers.cancel(("linger", request.rid))

    def _unbind(self, request: Request) -> None:
        if request.peer is not None and (rids := self.by_peer.get(request.peer)) is not None:
            rids.discard(request.rid)
            if not rids:
                del self.by_peer[request.peer]

    def _detach(self, request: Request, now: float) -> None:
        request.peer = None
        self._timers.set(("linger", request.rid), now + self._params.resume_timeout)
