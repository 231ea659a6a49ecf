"""What routing costs: the whole daemon against libzmq's own proxy, the same frames in the same run.

Two arms. In one, the real daemon (`python -m llmosd`, with its kernel, its gate, its records, its timers: nothing is
switched off but the gateway) stands between a client and a worker; in the other, `zmq.proxy`, libzmq's C loop between
a ROUTER and a DEALER, which knows nothing. The client and the stub worker are `bench/peers.py` in both. A request is
SUBMIT, its answer and ACK in both; in the daemon's arm ACCEPTED comes on top, for that is the daemon's own word.

How to read the figures. The client and the worker are Python, and on a machine with few cores they compete with the
router: they hold the proxy back more than they hold llmosd back, so the ratios of throughput flatter llmosd there. The
CPU time that the router's process uses for a request depends on them the least. `busiest thread` is what one core would
be the limit of, were there enough others for everyone else; the ratio of those is the strictest one here.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from bench import measure, peers
from bench.machine import Machine, NotMeasured, machine, wait_for

PEERS: Final = str(Path(peers.__file__).resolve())
#: Requests in flight where throughput is measured, and streams.
IN_FLIGHT: Final = 64
STREAM_TOKENS: Final = 256
CHUNK: Final = 8


class Load(msgspec.Struct, frozen=True):
    """One way to load a router."""

    name: str
    options: tuple[str, ...]


UNARY: Final = Load("unary", ("--in-flight", str(IN_FLIGHT)))
LATENCY: Final = Load("latency", ("--in-flight", "1"))
STREAMS: Final = Load(
    "streams",
    ("--in-flight", str(IN_FLIGHT), "--stream", "--tokens", str(STREAM_TOKENS), "--chunk", str(CHUNK)),
)
SINGLES: Final = Load(
    "streams, a token a chunk",
    ("--in-flight", str(IN_FLIGHT), "--stream", "--tokens", str(STREAM_TOKENS), "--chunk", "1"),
)
CORES: Final = ("router_cores", "worker_cores", "client_cores")
LOADS: Final = (UNARY, LATENCY, STREAMS, SINGLES)


class Run(msgspec.Struct, frozen=True):
    """What a client counted, and what the router's and the worker's process used meanwhile."""

    result: peers.Result
    router: measure.Cpu
    worker: measure.Cpu
    client: measure.Cpu

    @property
    def per_second(self) -> float:
        return (self.result.tokens or self.result.requests) / self.result.seconds

    @property
    def router_us(self) -> float:
        """CPU time of the router for one request, or one token."""
        return self.router.total / self._count * 1e6

    @property
    def busiest_us(self) -> float:
        return self.router.busiest / self._count * 1e6

    @property
    def median_us(self) -> float:
        return self.result.median_s * 1e6

    @property
    def p99_us(self) -> float:
        return self.result.p99_s * 1e6

    @property
    def router_cores(self) -> float:
        return self.router.total / self.result.seconds

    @property
    def worker_cores(self) -> float:
        return self.worker.total / self.result.seconds

    @property
    def client_cores(self) -> float:
        return self.client.total / self.result.seconds

    @property
    def _count(self) -> int:
        return self.result.tokens or self.result.requests


class Arm(msgspec.Struct, frozen=True):
    """A router with its stub worker: where clients connect, and the processes' ids."""

    address: str
    router: int
    worker: int

    def run(self, load: Load, seconds: float) -> Run:
        command = [sys.executable, PEERS, "client", self.address, "--seconds", str(seconds), *load.options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            pids = (self.router, self.worker, client.pid)
            begin = client.stdout.readline()
            before = [measure.cpu_of(pid) for pid in pids]
            line = client.stdout.readline()
            after = [measure.cpu_of(pid) for pid in pids]
        if begin != "begin\n" or not line or client.returncode:
            raise NotMeasured(f"the client of {load.name} failed with status {client.returncode}")
        result = msgspec.json.decode(line, type=peers.Result)
        used = [measure.cpu_between(b, a) for b, a in zip(before, after, strict=True)]
        return Run(result, *used)


@contextlib.contextmanager
def a_daemon() -> Iterator[Arm]:
    with machine() as made:
        made.model(peers.MODEL, _stub(made))
        made.start()
        made.wait_ready(peers.MODEL)
        yield Arm(made.front, made.pid, made.worker_pid(f"{peers.MODEL}@1"))


def _stub(made: Machine) -> str:
    function = Path(peers.__file__).resolve().with_name("takeover.py")
    return f"""
[engine]
driver = "python"
function = "{function}:generate"
env = {{ BENCH_BACK = "{made.back}", BENCH_RECORD = "{made.runtime}/workers/{peers.MODEL}@1.json" }}
[limits]
slots = 4096
[scale]
min = 1
"""


@contextlib.contextmanager
def a_proxy() -> Iterator[Arm]:
    directory = Path(tempfile.mkdtemp(prefix="llmosd-p-", dir="/tmp"))
    front, back = f"ipc://{directory}/front", f"ipc://{directory}/back"
    proxy = subprocess.Popen([sys.executable, PEERS, "proxy", front, back])
    worker = subprocess.Popen([sys.executable, PEERS, "worker", back])
    try:
        wait_for("proxy", (directory / "front").exists)
        yield Arm(front, proxy.pid, worker.pid)
    finally:
        for process in (worker, proxy):
            process.kill()
            process.wait()
        shutil.rmtree(directory)


def main(quick: bool) -> None:
    rounds, seconds = (2, 0.5) if quick else (5, 1.0)
    with a_daemon() as daemon, a_proxy() as proxy:
        arms = {
            (load.name, name): partial(arm.run, load, seconds)
            for load in LOADS
            for name, arm in (("llmosd", daemon), ("zmq.proxy", proxy))
        }
        runs = measure.take_turns(arms, rounds)

    def pair(load: Load) -> tuple[list[Run], list[Run]]:
        return runs[load.name, "llmosd"], runs[load.name, "zmq.proxy"]

    joined = pair(STREAMS)[0], pair(SINGLES)[1]
    rows = [
        [*_row(f"requests/s, {IN_FLIGHT} in flight", pair(UNARY), "per_second"), ">= 0.4x"],
        [*_row("latency at one in flight, median, µs", pair(LATENCY), "median_us"), "<= 1.8x"],
        [*_row("latency at one in flight, p99, µs", pair(LATENCY), "p99_us"), ""],
        [*_row(f"tokens/s, {IN_FLIGHT} streams, {CHUNK} tokens a chunk", pair(STREAMS), "per_second"), ""],
        [*_row(f"tokens/s, {IN_FLIGHT} streams, one token a chunk", pair(SINGLES), "per_second"), ""],
        [*_row(f"tokens/s, llmosd with {CHUNK} a chunk, the proxy with one", joined, "per_second"), ">= 1.0x"],
    ]
    measure.table("Router: what passes through", ("", "llmosd", "zmq.proxy", "ratio", "goal"), rows)
    rows = [
        _row(f"{what}: {threads}", pair(load), field, 1)
        for what, load in (
            ("a request", UNARY),
            ("a request, one in flight", LATENCY),
            (f"a token, {CHUNK} a chunk", STREAMS),
            ("a token, one a chunk", SINGLES),
        )
        for threads, field in (("all threads", "router_us"), ("busiest thread", "busiest_us"))
    ]
    measure.table("Router: CPU time of its process, µs", ("for", "llmosd", "zmq.proxy", "ratio"), rows)
    rows = [
        [", ".join(name), *(measure.spread([getattr(run, part) for run in each]).show(2) for part in CORES)]
        for name, each in runs.items()
    ]
    measure.table("Router: cores that each process used meanwhile", ("", "router", "worker", "client"), rows)


def _row(what: str, arms: tuple[list[Run], list[Run]], field: str, digits: int = 0) -> list[str]:
    ours, theirs = ([getattr(run, field) for run in each] for each in arms)
    shown = (measure.spread(each).show(digits) for each in (ours, theirs))
    return [what, *shown, measure.ratio(ours, theirs).show(2, "x")]
