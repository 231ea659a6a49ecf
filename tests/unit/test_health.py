"""Asking by HTTP whether something answers, on real sockets; and when it counts as hung."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from llmosd.health import get, target, until_hung
from llmosd.kernel.spec import Liveness
from llmosd.kernel.units import Seconds
from llmosd.worker.drivers import Call, Finished
from llmosd.worker.drivers.http import HttpEngine

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
DEADLINE_S = 20.0


@asynccontextmanager
async def server(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A server of a test's own; its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # whoever asked has gone
        finally:
            writer.close()

    listening = await asyncio.start_server(answer, host, 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


def saying(*pieces: bytes) -> Serve:
    """Answers every request with this, whatever it asks."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    return serve


async def asked(serve: Serve) -> str:
    """What `get` says of a server, with its port left out."""
    async with server(serve) as port, asyncio.timeout(DEADLINE_S):
        return (await get(target(f"http://127.0.0.1:{port}/health"))).replace(str(port), "PORT")


# -- what may be asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "addresses", "port"),
    [
        ("http://127.0.0.1:8080/health", ("127.0.0.1",), 8080),
        ("http://127.8.8.8", ("127.8.8.8",), 80),
        ("http://[::1]:81/x?y=z", ("::1",), 81),
        ("http://LOCALHOST:82/", ("127.0.0.1", "::1"), 82),
    ],
)
def test_what_is_on_this_machine_may_be_asked(url: str, addresses: tuple[str, ...], port: int) -> None:
    read = target(url)
    assert (read.addresses, read.port) == (addresses, port)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.org/health", "example.org is not this machine"),
        ("http://10.0.0.1/health", "10.0.0.1 is not this machine"),
        ("http://0.0.0.0:8080/", "0.0.0.0 is not this machine"),
        ("http://localhost.example.org/", "is not this machine"),
        ("http://user@127.0.0.1/", "expected a URL such as http://127.0.0.1:8080/health"),
        ("https://127.0.0.1/", "expected a URL"),
        ("127.0.0.1:8080/health", "expected a URL"),
        ("http://127.0.0.1:99999/", "Port out of range"),
        ("http://127.0.0.1:0/", "nobody is found on port 0"),
        ("http://127.0.0.1/a b", "expected a URL"),
        ("http://127.0.0.1/\r\nHost: elsewhere", "expected a URL"),
        ("http://127.0.0.1/\n", "expected a URL"),
        ("http://[::1/", "Invalid IPv6"),
    ],
)
def test_what_is_elsewhere_or_no_url_is_refused(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        target(url)


# -- an answer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], ""),
        ([b"HTTP/1.0 204 No Content\r\n\r\n"], ""),
        ([b"HT", b"TP/1.1 2", b"00 OK\r", b"\n\r\n"], ""),
        ([b"HTTP/1.1 302 Found\r\nlocation: http://example.org/\r\n\r\n"], "http://127.0.0.1:PORT/health answers 302"),
        ([b"HTTP/1.1 503 Later\r\n\r\n"], "http://127.0.0.1:PORT/health answers 503"),
        ([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 65536] * 100], ""),
        ([b"SSH-2.0-OpenSSH\r\n"], "what answers on http://127.0.0.1:PORT/health is not HTTP"),
        ([b"x" * 65536] * 10, "what answers on http://127.0.0.1:PORT/health is not HTTP"),
        ([], "what answers on http://127.0.0.1:PORT/health is not HTTP"),
    ],
)
def test_of_an_answer_its_status_counts_and_no_more_is_read(pieces: list[bytes], why: str) -> None:
    assert asyncio.run(asked(saying(*pieces))) == why


def test_a_server_that_keeps_the_connection_is_not_waited_for() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await saying(b"HTTP/1.1 200 OK\r\n\r\n")(reader, writer)
        await reader.read()

    assert asyncio.run(asked(serve)) == ""


def test_the_request_names_the_path_and_asks_to_be_the_last() -> None:
    heard = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    assert asyncio.run(asked(serve)) == ""
    assert heard[0].startswith("GET /health HTTP/1.1\r\nHost: 127.0.0.1:")
    assert "Connection: close\r\n" in heard[0]


def test_where_nobody_listens_there_is_no_answer() -> None:
    async def ask() -> str:
        async with server(saying()) as port:
            pass
        return (await get(target(f"http://localhost:{port}/"))).replace(str(port), "PORT")

    assert asyncio.run(ask()) == "no answer on http://localhost:PORT/: Connection refused"


def test_a_question_leaves_no_connection_behind_for_a_request() -> None:
    """The engine closes it after its answer: whoever found it in a pool would run into that."""
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        while head := await reader.readuntil(b"\r\n\r\n"):
            connections[-1] += 1
            if head.startswith(b"POST"):
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")

    async def run() -> None:
        async with server(serve) as port, asyncio.timeout(DEADLINE_S):
            engine = HttpEngine(f"http://127.0.0.1:{port}", model="m")
            assert await engine.is_ready("/health", lambda share, word: None)
            assert await engine.ask("/health") == ""
            call = Call("/v1/completions", b'{"prompt": "x"}', False, "", 0, None, 0)
            assert [piece async for piece in engine.run(call) if isinstance(piece, Finished)]
            await engine.close()

    asyncio.run(run())
    assert connections == [1, 1, 1]


# -- liveness ---------------------------------------------------------------------------------------------------------


class Engine:
    """One that is asked; `mute` since whenever the test says."""

    def __init__(self) -> None:
        self.asked_at: list[float] = []
        self.why: str | None = ""
        self.heard_at = 0.0

    async def ask(self) -> str:
        self.asked_at.append(time.monotonic())
        if self.why is None:
            await asyncio.Event().wait()
        assert self.why is not None
        return self.why


LIVENESS = Liveness(interval=Seconds(0.2), timeout=Seconds(0.1), failures=3)


def hung(engine: Engine, liveness: Liveness = LIVENESS) -> Awaitable[str]:
    return asyncio.wait_for(until_hung(liveness, "/health", engine.ask, lambda: engine.heard_at), DEADLINE_S)


def test_one_that_is_mute_is_hung_after_as_many_questions_and_never_sooner_than_it_says() -> None:
    engine = Engine()
    engine.why = None
    began = time.monotonic()
    assert asyncio.run(hung(engine)) == "no answer on /health in 100ms, 3 times in a row"  # type: ignore[arg-type]
    assert time.monotonic() - began >= 0.2 * 3 + 0.1
    assert len(engine.asked_at) == 3


def test_what_it_answered_last_is_the_reason_and_once_is_not_a_row() -> None:
    engine = Engine()
    engine.why = "it answers 500 on /health"
    once = msgspec.structs.replace(LIVENESS, failures=1)
    assert asyncio.run(hung(engine, once)) == "it answers 500 on /health"  # type: ignore[arg-type]


def test_a_single_answer_forgives_what_was_before() -> None:
    engine = Engine()

    async def run() -> str:
        engine.why = "no"
        task = asyncio.ensure_future(hung(engine))
        while len(engine.asked_at) < 2:
            await asyncio.sleep(0.01)
        engine.why = ""
        while len(engine.asked_at) < 3:
            await asyncio.sleep(0.01)
        engine.why = "no more"
        return await task

    assert asyncio.run(run()) == "no more, 3 times in a row"
    assert len(engine.asked_at) == 6


def test_one_from_whom_something_is_heard_is_not_asked() -> None:
    engine = Engine()
    engine.why = None

    async def run() -> None:
        task = asyncio.ensure_future(hung(engine))
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            engine.heard_at = time.monotonic()
            await asyncio.sleep(0.02)
        assert not task.done()
        # A machine under load may have kept this loop from hearing for an interval: that is one question, not a row.
        assert len(engine.asked_at) <= 2
        await task
        assert task.result() == "no answer on /health in 100ms, 3 times in a row"

    asyncio.run(run())


def test_time_in_which_the_asker_itself_was_stopped_is_held_against_nobody() -> None:
    """A worker that is frozen and thawed: its host finds hours gone, in the middle of a question or between two."""
    engine = Engine()

    async def run() -> None:
        engine.why = None
        task = asyncio.ensure_future(hung(engine))
        for asked in (2, 4):
            while len(engine.asked_at) < asked:
                await asyncio.sleep(0.005)
            time.sleep(1.5)  # noqa: ASYNC251  # as SIGSTOP does it
            await asyncio.sleep(0)
            assert not task.done()
        await task

    asyncio.run(run())
    assert len(engine.asked_at) > 4


def test_one_under_suspicion_is_asked_at_once_and_without_an_interval_only_then() -> None:
    engine = Engine()
    engine.why = "gone"

    async def run() -> str:
        suspect = asyncio.Event()
        never = msgspec.structs.replace(LIVENESS, interval=Seconds(0))
        task = asyncio.ensure_future(until_hung(never, "/health", engine.ask, sooner=suspect))
        for asked in range(3):
            await asyncio.sleep(0.1)
            assert len(engine.asked_at) == asked
            suspect.set()
        return await asyncio.wait_for(task, DEADLINE_S)

    assert asyncio.run(run()) == "gone, 3 times in a row"
