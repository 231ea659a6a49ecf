"""Requests: admitted, queued, dispatched, passed on. For the kernel.

The client is the log and the worker keeps its answer (`proto/bus.md`), so what is known here is soft: a restarted
kernel rebuilds it from HELLOs (`recovery.py`). How a request ends is in `table.py`.
"""

from __future__ import annotations

from typing import Final

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel.demand import Demand
from llmosd.kernel.dispatch import choose
from llmosd.kernel.fleet import Fleet
from llmosd.kernel.lifecycle import ALIVE
from llmosd.kernel.params import Params
from llmosd.kernel.recovery import Recovery
from llmosd.kernel.requests import ENDED_AS, MANY, OPEN, Request, RequestState, read_ticket, sign_ticket
from llmosd.kernel.table import Table
from llmosd.kernel.timers import Timers
from llmosd.kernel.worker import Model, Worker

#: Seconds that a request may ask for at most.
SPAN_MAX_S: Final = 30 * 86_400.0


class Routing:
    """What clients and workers say of requests, and what becomes of it."""

    def __init__(
        self, params: Params, fleet: Fleet, demand: Demand, table: Table, recovery: Recovery, out: list[do.Effect],
        timers: Timers,
    ) -> None:  # fmt: skip
        #: User ids by connection.
        self.owners: dict[bytes, int] = {}
        self._params = params
        self._fleet = fleet
        self._demand = demand
        self._table = table
        self._recovery = recovery
        self._out = out
        self._timers = timers
        self._order = 0

    # -- what clients say -----------------------------------------------------------------------------------

    def hello(self, peer: bytes, header: f.ClientHello, now: float) -> None:
        """A client lists what it waits for: bind it here, repeat what it misses, name what is not known."""
        unknown = []
        for waiting in header.open:
            request = self._table.requests.get(waiting.rid)
            if request is not None and 0 <= waiting.have_seq <= MANY:
                self._table.bind(request, peer, now)
                self._recovery.repeat(request, waiting.have_seq, now)
            if request is None or (request.body is None and request.state in OPEN):
                unknown.append(waiting.rid)
        p = self._params
        welcome = f.Welcome(p.epoch, p.body_max, p.window, p.answer_max, tuple(unknown))
        self._out.append(do.ToClient(peer, f.Kind.WELCOME, b"", welcome))

    def submit(self, peer: bytes, rid: bytes, header: f.Submit, payload: list[bytes], now: float) -> None:
        if not (payload and 0 <= header.have_seq <= MANY and header.remaining_ms >= 0):
            return self._reject(peer, rid, f.Code.INVALID, "a SUBMIT has a body, and numbers that are not negative")
        request = self._table.requests.get(rid)
        if request is None:
            return self._admit(peer, rid, header, payload[0], now)
        self._table.bind(request, peer, now)
        if request.state in OPEN:
            if request.body is None:
                self._describe(request, header, payload[0], now)
            self._table.tell(request, f.Kind.ACCEPTED, f.Accepted(request.ticket, 0))
        self._recovery.repeat(request, header.have_seq, now)
        return None

    def cancel(self, rid: bytes, reason: str, now: float) -> None:
        """Take a request from its engine; what it made so far, and a final, still go to its client."""
        request = self._table.requests.get(rid)
        if request is None or request.state not in OPEN:
            return
        reason = reason or f.Code.CANCELLED
        if request.state is RequestState.RUNNING:
            request.cancel_reason = reason
            self._recovery.send_cancel(request)
        else:
            code = f.Code.DEADLINE_EXCEEDED if reason == f.Code.DEADLINE_EXCEEDED else f.Code.CANCELLED
            self._table.fail(request, code, reason, now)

    def ack(self, rid: bytes, seq: int, now: float) -> None:
        request = self._table.requests.get(rid)
        if request is None or seq < 0:
            return
        request.client_at = now
        request.client_acked = max(request.client_acked, seq)
        if request.worker is not None:
            worker = self._fleet.workers[request.worker]
            self._out.append(do.ToWorker(worker.peer, f.Kind.ACK, rid, f.Ack(seq)))
        if 0 <= request.final_seq < seq:
            self._table.drop(request, now, release=False)

    def client_lost(self, peer: bytes, why: str, now: float) -> None:
        """Nobody waits for these answers any more."""
        if self.owners.pop(peer, None) is not None:
            self._out.append(do.UnwatchClient(peer))
        self._abandon(self._table.waiting_on(peer), why, now)

    def client_unreachable(self, peer: bytes, now: float) -> None:
        """Its requests go on without it for a while."""
        for request in list(self._table.by_peer.get(peer, {}).values()):
            self._table.detach(request, now)

    def _abandon(self, requests: list[Request], why: str, now: float) -> None:
        """End requests without telling anybody: take them from their engines, and forget them."""
        for request in requests:
            self._table.counts[why] += 1
            self._table.drop(request, now, release=True)

    # -- admission ------------------------------------------------------------------------------------------

    def _admit(self, peer: bytes, rid: bytes, header: f.Submit, body: bytes, now: float) -> None:
        fleet, params = self._fleet, self._params
        model = fleet.models.get(fleet.names.get(header.model, ""))
        if model is None or not model.spec.routed:
            known = ", ".join(sorted(m.spec.model for m in fleet.models.values() if m.spec.routed)) or "none"
            return self._reject(peer, rid, f.Code.NOT_FOUND, f"no model {header.model[:80]!r}; there are: {known}")
        if len(body) > params.body_max:
            message = f"a body of {len(body)} bytes; at most {params.body_max} are taken"
            return self._reject(peer, rid, f.Code.TOO_LARGE, message)
        known_place = header.ticket and read_ticket(params.ticket_key, rid, header.ticket)
        if not known_place and (full := self._full(model)):
            return self._reject(peer, rid, f.Code.QUEUE_FULL, full, self._retry_after_ms(model, now))
        request = Request(rid, header, body, model.spec.model, now)
        if not header.tenant and peer in self.owners:
            request.tenant = f"uid:{self.owners[peer]}"
        self._table.add(request)
        self._table.counts["accepted"] += 1
        self._describe(request, header, body, now)
        self._table.bind(request, peer, now)
        ahead = len(model.queue)
        if (known_place or header.have_seq) and any(worker.unheard for worker in model.workers.values()):
            model.parked[rid] = request
        else:
            model.queue.push(request)
        self._table.tell(request, f.Kind.ACCEPTED, f.Accepted(request.ticket, ahead))
        self._freed(model, now)
        return None

    def _describe(self, request: Request, header: f.Submit, body: bytes, now: float) -> None:
        """What the client's own words say of a request, when they come for the first time."""
        request.submit, request.body = header, body
        request.tenant = header.tenant or request.tenant
        self._order = max(self._order + 1, int(now * 1e6))
        place = read_ticket(self._params.ticket_key, request.rid, header.ticket) if header.ticket else None
        request.order, attempt = place or (self._order, 0)
        request.attempt = max(request.attempt, attempt)
        request.ticket = sign_ticket(self._params.ticket_key, request.rid, request.order, request.attempt)
        limit = float(self._fleet.models[request.model].spec.limits.request_timeout)
        spans = [span for span in (header.remaining_ms / 1000, limit) if span > 0]
        if spans:
            request.expires_at = now + min(SPAN_MAX_S, *spans)
            self._timers.set(request.rid, request.expires_at)

    def _full(self, model: Model) -> str:
        """Why a new request cannot be taken on, or ""."""
        if self._table.open >= self._params.requests_max:
            return f"{self._table.open} requests are open here; requests_max is {self._params.requests_max}"
        waiting, most = len(model.queue), model.spec.limits.queue_max
        if waiting < most:
            return ""
        if not waiting and (choose(model.workers.values()) or not any(w.running for w in model.workers.values())):
            return ""  # it is the next to run, on a free slot or on a worker that is started for it
        return f"{waiting} requests already wait for {model.spec.model}; its queue_max is {most}"

    def _reject(self, peer: bytes, rid: bytes, code: f.Code, message: str, retry_after_ms: int = 0) -> None:
        """Never accepted, so nothing is kept: a client that asks again is judged again."""
        self._table.counts[f"rejected_{code}"] += 1
        failed = f.Failed(0, 0, code, message, retry_after_ms=retry_after_ms)
        self._out.append(do.ToClient(peer, f.Kind.FAILED, rid, failed))

    def _retry_after_ms(self, model: Model, now: float) -> int:
        """When a slot's worth of the queue will have been served, at the rate at which the running ones go on."""
        running = [r for w in model.workers.values() for r in w.requests.values() if r.state is RequestState.RUNNING]
        if not running:
            return 1000
        mean_age = sum(now - request.dispatched_at for request in running) / len(running)
        return max(100, min(60_000, int(1000 * mean_age * len(model.queue) / len(running))))

    # -- dispatch -------------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Look again at every model that something changed for."""
        changed = self._fleet.changed
        while changed:
            model = changed.pop(next(iter(changed)))
            if self._fleet.models.get(model.spec.model) is not model:
                continue
            self._fleet.keep_order(model, now)
            self._fill_slots(model, now)
            running = sum(worker.running for worker in model.workers.values())
            hopeless = self._demand.balance(model, len(model.queue) + len(model.parked) + running, now)
            while hopeless and (request := model.queue.pop()) is not None:
                self._table.fail(request, f.Code.UNAVAILABLE, hopeless, now)
            if model.removed and not any(worker.state in ALIVE for worker in model.workers.values()):
                self._fleet.forget(model)

    def _freed(self, model: Model, now: float) -> None:
        """A slot may be free, or a request waits. Only what still waits then is a reason to think of more workers."""
        self._fill_slots(model, now)
        if len(model.queue):
            self._fleet.touch(model)

    def _fill_slots(self, model: Model, now: float) -> None:
        """Give waiting requests to free slots."""
        queue = model.queue
        while len(queue) and (worker := choose(model.workers.values())) is not None:
            request = queue.pop()
            assert request is not None
            if request.next_seq > 0:
                message = "the worker that had begun to answer is gone"
                self._table.fail(request, f.Code.WORKER_LOST, message, now)
                continue
            # Above all attempts of earlier lives of the daemon, which count from its smaller epochs.
            self._table.give(request, worker, max(request.attempt, self._params.epoch) + 1, now)
            self._table.send_run(request, 0)

    # -- what workers say -----------------------------------------------------------------------------------

    def worker_said(self, worker: Worker, message: f.Message, now: float) -> None:
        """CHUNK, YIELD, DONE or FAILED of a request."""
        kind, rid, header, payload, raw_header = message
        request = self._table.requests.get(rid)
        attempt: int = header.attempt  # type: ignore[attr-defined]  # each of these kinds has one
        if request is None or request.worker != worker.name or request.attempt != attempt:
            self._table.counts["stale"] += 1
            if request is None and kind is not f.Kind.CHUNK:
                self._out.append(do.ToWorker(worker.peer, f.Kind.RELEASE, rid, f.Empty()))
            return
        request.confirmed = True
        if isinstance(header, f.Chunk):
            count, end = header.count, header.first_seq + header.count
            if not (0 <= header.first_seq < end <= MANY and 0 <= header.tokens <= MANY) or (
                count > 1 and len(header.sizes) != count
            ):
                self._table.counts["senseless"] += 1
                return
            if end > request.next_seq:
                request.first_item_at = request.first_item_at or now
                request.next_seq = end
                request.tokens += header.tokens
                self._table.counts["tokens"] += header.tokens
        elif isinstance(header, f.Yield):
            return
        elif not _makes_sense(header):
            self._table.counts["senseless"] += 1
            self._table.fail(request, f.Code.INTERNAL, f"worker {worker.name} sent a senseless final", now)
            return
        if request.peer is not None:
            self._out.append(do.ToClient(request.peer, kind, rid, raw_header, payload))
        if kind is not f.Kind.CHUNK and request.final_seq < 0:
            self._engine_finished(request, worker, header, now)

    def _engine_finished(self, request: Request, worker: Worker, header: f.Header, now: float) -> None:
        state = RequestState.DONE
        if isinstance(header, f.Done):
            request.prompt_tokens = header.prompt_tokens
            made = max(header.completion_tokens, request.tokens)
            self._table.counts["tokens"] += made - request.tokens
            request.tokens = made
        elif isinstance(header, f.Failed):
            state = ENDED_AS.get(header.code, RequestState.FAILED)
        request.final_seq = header.seq  # type: ignore[attr-defined]  # both kinds have one
        self._table.ended(request, state, now)
        worker.running -= 1
        self._fleet.note_idle(worker, now)
        self._freed(self._fleet.models[worker.model], now)

    # -- time -----------------------------------------------------------------------------------------------

    def due(self, rid: bytes, now: float) -> None:
        """An open request's time is over; or an ended one's client has not said that it has all of it."""
        request = self._table.requests.get(rid)
        if request is None:
            return
        if request.state in OPEN:
            self.cancel(rid, f.Code.DEADLINE_EXCEEDED, now)
            return
        pause = max(1.0, self._params.resume_timeout)
        if now >= request.client_at + self._params.linger:
            self._abandon([request], "abandoned", now)
            return
        if request.peer is not None and now >= request.client_at + pause:
            self._recovery.repeat(request, request.client_acked, now)
        self._timers.set(rid, now + pause)

    def away(self, rid: bytes, now: float) -> None:
        """The client has not come back in time."""
        if (request := self._table.requests.get(rid)) is not None:
            self._abandon([request], "abandoned", now)


def _makes_sense(header: f.Header) -> bool:
    """Whether the numbers of a final can be."""
    if isinstance(header, f.Done):
        return 0 <= header.seq <= MANY and 0 <= header.prompt_tokens <= MANY and 0 <= header.completion_tokens <= MANY
    return isinstance(header, f.Failed) and 0 <= header.seq <= MANY
