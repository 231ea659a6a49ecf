"""Both ends of the router's benchmark, and the proxy it is compared with: each a process of its own, as lean as can be.

The same client and the same stub worker run in both arms. They speak the bus's frames by hand over blocking sockets,
without the library's state machines or a loop, so that what is measured is the router between them. Run as a file, for
a worker has no working directory to import from:

    peers.py proxy FRONT BACK            libzmq's own proxy: a ROUTER, a DEALER, and C between them
    peers.py worker BACK                 behind that proxy
    peers.py worker BACK --record FILE   as the worker whose adoption record FILE is
    peers.py client FRONT ...            keeps requests in flight, prints `begin`, then one JSON object
"""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Final

import msgspec
import zmq

from llmos.protocol import frames as f

MODEL: Final = "stub"
PATH: Final = "/v1/completions"
#: What a small completion's JSON looks like in size.
ANSWER: Final = b"a" * 400
#: One rendered event of a stream.
ITEM: Final = b"i" * 160
PROMPT_BYTES: Final = 300
#: Answer items of a stream under way unacknowledged: the daemon's default.
WINDOW: Final = 256
#: The library acknowledges once half a window was taken.
ACK_EVERY: Final = WINDOW // 2
#: Seconds before anything is counted.
WARM_S: Final = 0.3
#: Seconds without any message after which a client gives up.
STALL_S: Final = 10.0

DONE: Final = f.FIRST_FRAME[f.Kind.DONE]
CHUNK: Final = f.FIRST_FRAME[f.Kind.CHUNK]
ACK: Final = f.FIRST_FRAME[f.Kind.ACK]
RUN: Final = f.FIRST_FRAME[f.Kind.RUN]
SUBMIT: Final = f.FIRST_FRAME[f.Kind.SUBMIT]
FAILED: Final = f.FIRST_FRAME[f.Kind.FAILED]


class Result(msgspec.Struct, frozen=True):
    """What a client counted: requests and answer items, and the seconds from a request to its final."""

    seconds: float
    requests: int
    tokens: int
    median_s: float
    p99_s: float


def dealer(address: str, identity: bytes) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.DEALER)
    for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
        socket.setsockopt(option, 0)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.connect(address)
    return socket


def proxy(front_address: str, back_address: str) -> None:
    """Carry messages both ways, for ever, in libzmq's C."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for socket, address in ((front, front_address), (back, back_address)):
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind(address)
    zmq.proxy(front, back)


# -- the worker -------------------------------------------------------------------------------------------------


class Answer:
    """A streamed answer: so many chunks, as fast as the window lets them go."""

    __slots__ = ("acked", "attempt", "chunk", "envelope", "rid", "sent", "tokens")

    def __init__(self, envelope: list[bytes], rid: bytes, attempt: int, tokens: int, chunk: int) -> None:
        self.envelope = envelope
        self.rid = rid
        self.attempt = attempt
        self.tokens = tokens
        self.chunk = chunk
        self.sent = 0
        self.acked = 0

    def pump(self, socket: zmq.Socket[bytes]) -> None:
        chunk = self.chunk
        sizes = (len(ITEM),) * chunk if chunk > 1 else ()
        payload = ITEM * chunk
        while self.sent < self.tokens and self.sent + chunk - self.acked <= WINDOW:
            header = f.encode_header(f.Chunk(self.attempt, self.sent, chunk, sizes, chunk))
            socket.send_multipart([*self.envelope, CHUNK, self.rid, header, payload])
            self.sent += chunk
            if self.sent >= self.tokens:
                done = f.encode_header(f.Done(self.attempt, self.sent, completion_tokens=self.sent))
                socket.send_multipart([*self.envelope, DONE, self.rid, done, b""])


def worker(address: str, record: Path | None) -> None:
    """Answer at once whatever is asked. With a record: as that worker of the daemon's; without: behind the proxy."""
    identity, token = b"\x01" + os.urandom(15), b""
    if record is not None:
        from llmosd.node import records

        born = records.read(record)
        identity, token = born.identity, born.token
    socket = dealer(address, identity)
    if record is not None:
        hello = f.WorkerHello(identity, token, os.getpid(), f.Phase.READY, 4096)
        socket.send_multipart(f.encode(f.Kind.HELLO, b"", hello))
        socket.send_multipart(f.encode(f.Kind.STATUS, b"", f.Status(f.Phase.READY)))
    # The proxy's messages begin with whom to answer, the daemon's do not: it knows.
    at = 1 if record is None else 0
    tables = f.CLIENT_TO_DAEMON if record is None else f.DAEMON_TO_WORKER
    ask = tables[SUBMIT if record is None else RUN][1]
    acknowledgement = tables[ACK][1]
    answers: dict[bytes, Answer] = {}
    while True:
        parts = socket.recv_multipart()
        first, rid = parts[at], parts[at + 1]
        if first in (RUN, SUBMIT):
            header = ask.decode(parts[at + 2])
            attempt = header.attempt if isinstance(header, f.Run) else 1
            assert isinstance(header, f.Run | f.Submit)
            if header.stream:
                tokens, chunk = map(int, parts[at + 3].split()[:2])
                answer = answers[rid] = Answer(parts[:at], rid, attempt, tokens, chunk)
                answer.pump(socket)
            else:
                done = f.encode_header(f.Done(attempt, 0, completion_tokens=16))
                socket.send_multipart([*parts[:at], DONE, rid, done, ANSWER])
        elif first == ACK and (acked := answers.get(rid)) is not None:
            ack = acknowledgement.decode(parts[at + 2])
            assert isinstance(ack, f.Ack)
            if ack.seq > acked.tokens:
                del answers[rid]
            else:
                acked.acked = ack.seq
                acked.pump(socket)


# -- the client -------------------------------------------------------------------------------------------------


def client(options: Namespace) -> None:
    """Keep `in_flight` requests going for `seconds`, and print what came of it."""
    socket = dealer(options.address, b"\x01" + os.urandom(15))
    socket.setsockopt(zmq.RCVTIMEO, int(STALL_S * 1000))
    header = f.encode_header(f.Submit(MODEL, PATH, options.stream))
    body = b"%d %d " % (options.tokens, options.chunk)
    body += b"p" * (PROMPT_BYTES - len(body))
    chunk_decoder, done_decoder = f.DAEMON_TO_CLIENT[CHUNK][1], f.DAEMON_TO_CLIENT[DONE][1]
    clock = time.perf_counter
    asked: dict[bytes, float] = {}
    times: list[float] = []
    tokens = 0

    def ask() -> None:
        rid = os.urandom(16)
        asked[rid] = clock()
        socket.send_multipart([SUBMIT, rid, header, body])

    def acknowledge(rid: bytes, seq: int) -> None:
        socket.send_multipart([ACK, rid, f.encode_header(f.Ack(seq))])

    for _ in range(options.in_flight):
        ask()
    begin = clock() + WARM_S
    end = begin + options.seconds
    counting = False
    while asked:
        first, rid, raw, *payload = socket.recv_multipart()
        now = clock()
        if not counting and begin <= now < end:
            # Whoever started this reads the router's CPU time at this line and at the next.
            print("begin", flush=True)
            counting, begin, tokens = True, now, 0
            times.clear()
        elif counting and now >= end:
            result = Result(now - begin, len(times), tokens, _quantile(times, 0.5), _quantile(times, 0.99))
            print(msgspec.json.encode(result).decode(), flush=True)
            counting = False
        if first == CHUNK:
            chunk = chunk_decoder.decode(raw)
            assert isinstance(chunk, f.Chunk)
            tokens += chunk.count
            have = chunk.first_seq + chunk.count
            if have % ACK_EVERY < chunk.count:
                acknowledge(rid, have)
        elif first == DONE:
            done = done_decoder.decode(raw)
            assert isinstance(done, f.Done)
            acknowledge(rid, done.seq + 1)
            times.append(now - asked.pop(rid))
            if now < end:
                ask()
        elif first == FAILED:
            raise SystemExit(f"a request failed: {raw!r} {payload!r}")


def _quantile(times: list[float], share: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def main() -> None:
    parser = ArgumentParser()
    role = parser.add_subparsers(dest="role", required=True)
    a_proxy = role.add_parser("proxy")
    a_proxy.add_argument("front")
    a_proxy.add_argument("back")
    a_worker = role.add_parser("worker")
    a_worker.add_argument("address")
    a_worker.add_argument("--record", type=Path)
    a_client = role.add_parser("client")
    a_client.add_argument("address")
    a_client.add_argument("--in-flight", type=int, required=True)
    a_client.add_argument("--seconds", type=float, required=True)
    a_client.add_argument("--stream", action="store_true")
    a_client.add_argument("--tokens", type=int, default=16)
    a_client.add_argument("--chunk", type=int, default=1)
    options = parser.parse_args()
    if options.role == "proxy":
        proxy(options.front, options.back)
    elif options.role == "worker":
        worker(options.address, options.record)
    else:
        client(options)


if __name__ == "__main__":
    main()
