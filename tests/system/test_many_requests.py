"""Many requests at once: each is answered exactly once, queues keep their bounds, floods do no harm."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_models import gemma, simulated
from machine import Machine, machine, wait_for

import llmos
from llmos.bus import AsyncBus
from llmos.protocol import frames as f

PATH = "/v1/completions"
QUEUE_MAX = 500


@pytest.fixture(scope="module")
def shared(gemma_weights: Path) -> Iterator[Machine]:
    with machine() as made:
        made.model(simulated("sim", limits="queue_max = 2000", rest="[scale]\nmin = 4\nmax = 4\n"))
        made.model(gemma(gemma_weights, slots=4))
        made.model(simulated("slow", slots=1, decode_rate=1, limits=f"queue_max = {QUEUE_MAX}"))
        made.start()
        yield made


@pytest.mark.model
def test_two_hundred_requests_over_five_workers_are_each_answered_exactly_once(shared: Machine) -> None:
    client = shared.client
    client.wait([f"sim@{n}" for n in range(1, 5)])
    client.wait(client.start("gemma").workers)
    before = client.status().counters

    async def ask() -> list[tuple[str, str]]:
        async with llmos.AsyncClient(str(shared.runtime)) as aio:

            async def one(number: int) -> tuple[str, str]:
                model = "gemma" if number % 5 == 0 else "sim"
                # Pairs with the same prompt, one of them streamed: their answers can be compared.
                prompt, stream = f"count from {number // 10}", number % 10 < 5
                if not stream:
                    done = await aio.run(model, prompt, max_tokens=8, temperature=0)
                    return f"{model} {prompt}", done.text
                pieces = [
                    piece.text async for piece in aio.run(model, prompt, stream=True, max_tokens=8, temperature=0)
                ]
                return f"{model} {prompt}", "".join(pieces)

            return await asyncio.gather(*(one(number) for number in range(200)))

    answers = asyncio.run(ask())
    assert len(answers) == 200 and all(text for _, text in answers)
    simulated_answers = {answer for answer in answers if answer[0].startswith("sim")}
    assert len(simulated_answers) == 20  # one text for each of the 20 prompts, however it was asked for
    after = client.status()
    delta = {name: after.counters[name] - before.get(name, 0) for name in after.counters}
    assert (delta["accepted"], delta["done"]) == (200, 200)
    assert (after.requests_running, after.requests_waiting) == (0, 0)
    # What was answered is forgotten everywhere once its client has acknowledged it.
    wait_for("end of all requests", lambda: not client.requests())
    shared.check_processes()


def test_ten_thousand_requests_fill_the_queue_to_its_bound_and_the_rest_is_told_when_to_come_again(
    shared: Machine,
) -> None:
    count = 10_000
    client = shared.client
    client.wait(client.start("slow").workers)
    daemon = psutil.Process(client.status().pid)
    memory_before = daemon.memory_info().rss

    async def flood() -> Counter[str]:
        async with AsyncBus(f"ipc://{shared.runtime}/front.sock") as bus:
            body = b'{"prompt": "a b c", "max_tokens": 60}'
            streams = [bus.submit("slow", PATH, body) for _ in range(count)]

            async def end(stream: object) -> f.Done | f.Failed:
                return await stream.result()  # type: ignore[attr-defined]

            endings = [asyncio.ensure_future(end(stream)) for stream in streams]
            for refusal in itertools.islice(asyncio.as_completed(endings), count - QUEUE_MAX - 1):
                await refusal
            # The daemon has time for others meanwhile.
            began = time.monotonic()
            status = await asyncio.to_thread(client.status)
            assert time.monotonic() - began < 1.0
            assert (status.requests_running, status.requests_waiting) == (1, QUEUE_MAX)
            for stream in streams:
                stream.cancel()
            finals = await asyncio.gather(*endings)
            refused = [final for final in finals if isinstance(final, f.Failed) and final.code == f.Code.QUEUE_FULL]
            assert all(final.retry_after_ms > 0 and "queue_max is 500" in final.message for final in refused)
            return Counter(final.code if isinstance(final, f.Failed) else "done" for final in finals)

    codes = asyncio.run(flood())
    assert codes == {f.Code.QUEUE_FULL: count - QUEUE_MAX - 1, f.Code.CANCELLED: QUEUE_MAX + 1}
    assert client.status().counters["rejected_queue_full"] >= count - QUEUE_MAX - 1
    assert daemon.memory_info().rss - memory_before < 64 << 20
    # The slot is free again, and the engine has nothing to do.
    wait_for("free slot", lambda: shared.worker("slow@1").slots_used == 0)
    assert client.run("slow", "still there", max_tokens=1).completion_tokens == 1
