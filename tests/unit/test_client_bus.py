"""The bus for asyncio against a real ROUTER: delivery, back-pressure, cancellation, and a daemon that restarts."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

import llmos.bus
from llmos.bus import AsyncBus
from llmos.errors import DaemonUnreachable
from llmos.protocol import frames as f
from llmos.protocol.client import SILENCE_S
from tests.unit.fake_bus import WORDS, FakeBus, completion_item

Run = Callable[[Callable[[FakeBus, AsyncBus], Awaitable[None]]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Run a test's body with a daemon and a bus that is connected to it."""
    path = tmp_path / "front.sock"

    async def main(body: Callable[[FakeBus, AsyncBus], Awaitable[None]]) -> None:
        async with FakeBus(path) as daemon, AsyncBus(f"ipc://{path}") as bus, asyncio.timeout(20):
            await body(daemon, bus)

    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def runner(body: Callable[[FakeBus, AsyncBus], Awaitable[None]]) -> None:
        with asyncio.Runner(loop_factory=factory) as loop:
            loop.run(main(body))

    return runner


def test_a_stream_gives_its_items_in_order_and_then_its_final(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        stream = bus.submit("gemma3-270m", "/v1/completions", b"{}", stream=True)
        items = [item async for item in stream]
        assert items == [completion_item(word) for word in WORDS]
        assert isinstance(stream.final, f.Done)
        assert stream.final.completion_tokens == len(WORDS) == stream.tokens
        assert stream.accepted

    run(body)


def test_an_answer_that_is_not_streamed_is_the_finals_payload(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        stream = bus.submit("gemma3-270m", "/v1/completions", b"{}")
        final = await stream.result()
        assert isinstance(final, f.Done)
        assert stream.payload == b'{"choices":[{"text":" Paris, of course."}]}'

    run(body)


def test_a_failure_is_a_final_and_no_exception(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        final = await bus.submit("full", "/v1/completions", b"{}").result()
        assert isinstance(final, f.Failed)
        assert (final.code, final.retry_after_ms) == (f.Code.QUEUE_FULL, 1500)

    run(body)


def test_a_reader_that_stops_taking_holds_back_its_own_stream_only(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        slow = bus.submit("many", "/v1/completions", b"{}", stream=True)
        fast = bus.submit("many", "/v1/completions", b"{}", stream=True)
        assert len([item async for item in fast]) == 100
        assert daemon.requests[slow.rid].sent == daemon.window
        assert len([item async for item in slow]) == 100

    run(body)


def test_many_streams_at_once_each_get_all_of_their_own(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        streams = [bus.submit("many", "/v1/completions", b"{}", stream=True) for _ in range(200)]

        async def read(number: int) -> int:
            count = 0
            async for item in streams[number]:
                assert item == completion_item(f" {count}")
                count += 1
            return count

        assert await asyncio.gather(*map(read, range(200))) == [100] * 200
        assert bus.open_requests == 0

    run(body)


def test_a_cancelled_stream_ends_with_cancelled(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        stream = bus.submit("endless", "/v1/completions", b"{}", stream=True)
        await anext(stream)
        stream.cancel("enough")
        final = await stream.result()
        assert isinstance(final, f.Failed)
        assert final.code == f.Code.CANCELLED

    run(body)


def test_a_stream_that_nobody_reads_any_more_is_cancelled(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        async for _ in bus.submit("endless", "/v1/completions", b"{}", stream=True):
            break
        gc.collect()
        await daemon.wait_for_kind(f.Kind.CANCEL)
        assert bus.open_requests == 0

    run(body)


def test_a_stream_that_is_closed_ends_at_once_even_if_the_daemon_says_nothing(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        async with bus.submit("silent", "/v1/completions", b"{}", stream=True) as stream:
            await daemon.wait_for_kind(f.Kind.SUBMIT)
        assert isinstance(await stream.result(), f.Failed)
        await daemon.wait_for_kind(f.Kind.CANCEL)

    run(body)


def test_closing_the_bus_ends_open_streams_and_says_so_to_the_daemon(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        stream = bus.submit("silent", "/v1/completions", b"{}", stream=True)
        await bus.close()
        final = await stream.result()
        assert isinstance(final, f.Failed)
        assert final.code == f.Code.CANCELLED
        await daemon.wait_for_kind(f.Kind.CANCEL)

    run(body)


def test_a_body_over_the_daemons_bound_is_refused_here_and_the_connection_lives(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        final = await bus.submit("gemma3-270m", "/v1/completions", b" " * (daemon.body_max + 1)).result()
        assert isinstance(final, f.Failed)
        assert final.code == f.Code.TOO_LARGE
        assert isinstance(await bus.submit("gemma3-270m", "/v1/completions", b"{}").result(), f.Done)

    run(body)


def test_a_request_past_its_deadline_ends_even_if_the_daemon_says_nothing(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        final = await bus.submit("silent", "/v1/completions", b"{}", timeout=0.05).result()
        assert isinstance(final, f.Failed)
        assert final.code == f.Code.DEADLINE_EXCEEDED

    run(body)


def test_open_streams_go_on_where_they_were_when_the_daemon_restarts(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        stream = bus.submit("many", "/v1/completions", b"{}", stream=True)
        items = [await anext(stream) for _ in range(3)]
        await daemon.stop()
        # Acknowledgements of these go nowhere: nobody is there.
        items += [await anext(stream) for _ in range(5)]
        submitted_meanwhile = bus.submit("gemma3-270m", "/v1/completions", b"{}")
        await daemon.start()
        items += [item async for item in stream]
        assert items == [completion_item(f" {number}") for number in range(100)]
        assert isinstance(await submitted_meanwhile.result(), f.Done)
        assert bus.welcome is not None
        assert bus.welcome.epoch == 2

    run(body)


def test_a_cancellation_that_a_restart_swallowed_is_said_again(run: Run) -> None:
    async def body(daemon: FakeBus, bus: AsyncBus) -> None:
        stream = bus.submit("endless", "/v1/completions", b"{}", stream=True)
        await anext(stream)
        await daemon.stop()
        stream.cancel()
        await daemon.start()
        # By the handshake, long before the silence is noticed.
        async with asyncio.timeout(SILENCE_S - 1):
            final = await stream.result()
        assert isinstance(final, f.Failed)
        assert final.code == f.Code.CANCELLED

    run(body)


def test_a_handshake_is_heard_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmos.bus, "HELLO_AGAIN_S", 60)

    async def main() -> None:
        path = tmp_path / "front.sock"
        async with FakeBus(path):
            bus = AsyncBus(f"ipc://{path}")
            await bus.open(timeout=10)
            await bus.close()

    asyncio.run(main())


def test_nobody_at_the_address_is_an_error_that_names_it_and_comes_in_time(tmp_path: Path) -> None:
    bus = AsyncBus(f"ipc://{tmp_path}/front.sock")
    started = time.monotonic()
    with pytest.raises(DaemonUnreachable, match=r"front\.sock"):
        asyncio.run(bus.open(timeout=0.2))
    assert time.monotonic() - started < 5


def test_an_impossible_address_is_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="cannot connect"):
        asyncio.run(AsyncBus(f"ipc://{tmp_path}/{'x' * 200}").open())


def test_a_bus_may_be_opened_before_its_daemon(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "front.sock"
        bus = AsyncBus(f"ipc://{path}")
        opening = asyncio.create_task(bus.open(timeout=10))
        await asyncio.sleep(0)
        async with FakeBus(path):
            await opening
            assert isinstance(await bus.submit("gemma3-270m", "/v1/completions", b"{}").result(), f.Done)
            await bus.close()

    asyncio.run(main())


def test_importing_the_bus_does_not_load_grpc() -> None:
    code = "import sys, llmos.bus; sys.exit(any(name.startswith(('grpc', 'google')) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
