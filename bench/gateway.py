"""What the way through llmosd costs: HTTP through gateway, daemon and host to an engine, against a call to that engine.

Three arms to one stub engine (`bench/engine.py`, aiohttp, answers at once): HTTP straight to it; the bus, that is the
library to the daemon to a worker host to it; and HTTP through the gateway and all of that. The engine costs nothing but
its HTTP, so the ratios of throughput are the worst there can be: a real engine takes seconds where this one takes none.
The client is one process in all arms, by hand over HTTP, by the library over the bus.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from bench import engine, load, measure
from bench.machine import Machine, free_port, machine, wait_for
from llmos.bus import AsyncBus

IN_FLIGHT: Final = 32
MODEL: Final = "stub"
ARMS: Final = ("direct", "bus", "gateway")


class Load(msgspec.Struct, frozen=True):
    name: str
    clients: int
    stream: bool


ONE: Final = Load("one client", 1, False)
MANY: Final = Load(f"{IN_FLIGHT} clients", IN_FLIGHT, False)
ONE_STREAM: Final = Load("one stream", 1, True)
MANY_STREAMS: Final = Load(f"{IN_FLIGHT} streams", IN_FLIGHT, True)
LOADS: Final = (ONE, MANY, ONE_STREAM, MANY_STREAMS)


class Run(msgspec.Struct, frozen=True):
    """What was counted, and CPU seconds by process."""

    seconds: float
    done: list[load.Exchange]
    cpu: dict[str, float]

    @property
    def requests_per_second(self) -> float:
        return len(self.done) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return sum(one.events for one in self.done) / self.seconds

    @property
    def latency_us(self) -> float:
        return measure.spread([one.whole_s for one in self.done]).median * 1e6

    @property
    def first_us(self) -> float:
        return measure.spread([one.first_s for one in self.done]).median * 1e6

    def cpu_us(self, process: str) -> float:
        return self.cpu[process] / len(self.done) * 1e6


class Bench:
    """The machine with its engine, and the three ways to it."""

    def __init__(self, made: Machine, engine_url: str, pids: dict[str, int]) -> None:
        self._machine = made
        self._engine_url = engine_url
        self._pids = pids

    def run(self, arm: str, a_load: Load, seconds: float) -> Run:
        return uvloop.run(self._run(arm, a_load, seconds))

    async def _run(self, arm: str, a_load: Load, seconds: float) -> Run:
        body = msgspec.json.encode(
            {"model": MODEL, "prompt": "p" * 200, "max_tokens": engine.TOKENS, "stream": a_load.stream}
        )
        before: dict[str, dict[int, float]] = {}

        def begin() -> None:
            before.update({name: measure.cpu_of(pid) for name, pid in self._pids.items()})

        async with self._callers(arm, a_load) as callers:
            took, done = await load.keep_busy(callers, body, seconds, begin)
        used = {name: measure.cpu_between(before[name], measure.cpu_of(pid)).total for name, pid in self._pids.items()}
        return Run(took, done, used)

    @contextlib.asynccontextmanager
    async def _callers(self, arm: str, a_load: Load) -> AsyncIterator[list[load.Caller]]:
        if arm == "bus":
            async with AsyncBus(self._machine.front) as bus:
                yield [load.BusCaller(bus, MODEL, a_load.stream)] * a_load.clients
            return
        url = self._engine_url if arm == "direct" else self._machine.url
        callers: list[load.Caller] = [await load.HttpCaller.connect(url) for _ in range(a_load.clients)]
        try:
            yield callers
        finally:
            for caller in callers:
                caller.close()


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    stub = subprocess.Popen([sys.executable, str(Path(engine.__file__).resolve()), str(port)])
    try:
        with machine() as made:
            made.model(
                MODEL,
                f'[engine]\ndriver = "attached"\nurl = "{url}"\n[limits]\nslots = 64\n[scale]\nmin = 1\n',
            )
            made.start(gateway=True)
            made.wait_ready(MODEL)
            made.wait_ready("gateway")
            with made.client() as client:
                workers = {worker.model: worker.pid for worker in client.ps()}
            pids = {"gateway": workers["gateway"], "daemon": made.pid, "host": workers[MODEL], "engine": stub.pid}
            yield Bench(made, url, pids)
    finally:
        stub.kill()
        stub.wait()


def main(quick: bool) -> None:
    rounds, seconds = (2, 0.5) if quick else (4, 0.9)
    with bench() as made:
        arms = {(a_load.name, arm): partial(made.run, arm, a_load, seconds) for a_load in LOADS for arm in ARMS}
        wait_for("gateway that answers", lambda: _answers(made))
        runs = measure.take_turns(arms, rounds)

    def values(a_load: Load, field: str) -> list[list[float]]:
        return [[getattr(run, field) for run in runs[a_load.name, arm]] for arm in ARMS]

    rows = []
    for what, a_load, field in (
        ("requests/s, 32 clients", MANY, "requests_per_second"),
        ("tokens/s, 32 streams", MANY_STREAMS, "tokens_per_second"),
        ("latency, one client, µs", ONE, "latency_us"),
        ("time to first token, one stream, µs", ONE_STREAM, "first_us"),
        ("time to first token, 32 streams, µs", MANY_STREAMS, "first_us"),
    ):
        direct, bus, gateway = values(a_load, field)
        rows.append([what, *(measure.spread(each).show() for each in (direct, bus, gateway)),
                     measure.ratio(gateway, direct).show(2, "x")])  # fmt: skip
    measure.table("Gateway: a call to the engine, and the same through llmosd", ("", *ARMS, "gateway / direct"), rows)

    rows = []
    for what, a_load, field in (("answer", ONE, "latency_us"), ("first token", ONE_STREAM, "first_us")):
        direct, bus, gateway = values(a_load, field)
        through = [b - a for a, b in zip(direct, bus, strict=True)]
        http = [c - b for b, c in zip(bus, gateway, strict=True)]
        added = [c - a for a, c in zip(direct, gateway, strict=True)]
        goal = "≤ 600" if a_load is ONE else ""
        rows.append([what, *(measure.spread(each).show() for each in (direct, through, http, added)), goal])
    head = ("until", "the engine itself", "+ daemon and host", "+ gateway", "added in all", "goal")
    measure.table("Gateway: what each hop adds to the latency of one client, µs", head, rows)

    rows = [
        [a_load.name, *(measure.spread([run.cpu_us(process) for run in runs[a_load.name, "gateway"]]).show()
                        for process in ("gateway", "daemon", "host", "engine"))]
        for a_load in LOADS
    ]  # fmt: skip
    measure.table(
        f"Gateway: CPU time of each process for a request (a stream: {engine.TOKENS} tokens), µs",
        ("", "gateway", "daemon", "host", "engine"),
        rows,
    )


def _answers(made: Bench) -> bool:
    """Both ends are up: the gateway may still be connecting when its process already counts as ready."""
    try:
        made.run("gateway", ONE, 0.1)
    except OSError:
        return False
    return True
