"""The gateway with curl and bare sockets: streams, health, metrics, pass-through, clients that go away or are slow."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import SIMULATED, Machine, machine, wait_for
from prometheus_client.parser import text_string_to_metric_families
from web import asking, curl, post, wait_for_requests

SLOW = """
model = "slow"
[engine]
driver = "simulated"
load_time = 0
decode_rate = 10
[limits]
slots = 1
"""
FAST = """
model = "fast"
[engine]
driver = "simulated"
load_time = 0
decode_rate = 20000
"""
RERANKER = """
async def generate(request, *, path):
    assert path == "/rerank", path
    scores = [len(text) for text in request["documents"]]
    yield {"model": request["model"], "results": [{"index": i, "relevance_score": s} for i, s in enumerate(scores)]}
"""


@pytest.fixture(scope="module")
def served() -> Iterator[Machine]:
    with machine() as made:
        made.configure(gateway=True)
        for text in (SIMULATED, SLOW, FAST):
            made.model(text)
        engine = made.root / "reranker.py"
        engine.write_text(RERANKER)
        made.model(f'model = "ranker"\n[engine]\ndriver = "python"\nfunction = "{engine}:generate"\n')
        made.start()
        yield made


def events(text: str) -> list[str]:
    """The data of server-sent events."""
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


def test_curl_reads_a_stream_of_events_that_ends_with_done(served: Machine) -> None:
    answer = post(served, "/v1/completions", {"model": "sim", "prompt": "x", "max_tokens": 4, "stream": True}, "-N")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    *items, done = events(answer.body)
    assert done == "[DONE]"
    assert [json.loads(item)["object"] for item in items] == ["text_completion"] * 4


def test_the_first_event_comes_while_the_rest_is_still_made(served: Machine) -> None:
    with asking(served, "slow", tokens=1000) as process:
        assert process.stdout.readline().startswith(b"data: ")
        (running,) = wait_for_requests(served, "slow", 1)
        assert running.state == "running"
        assert running.tokens < 1000
    wait_for_requests(served, "slow", 0)


def test_health_and_the_list_of_models_answer_get_and_head(served: Machine) -> None:
    assert curl(served, "/health").json == {"status": "ok"}
    whole, head = curl(served, "/v1/models"), curl(served, "/v1/models", "-I")
    assert (head.status, head.body) == (200, "")
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert {model["id"] for model in whole.json["data"]} == {"sim", "slow", "fast", "ranker"}


def test_metrics_are_what_prometheus_reads(served: Machine) -> None:
    post(served, "/v1/completions", {"model": "sim", "prompt": "x", "max_tokens": 1})
    answer = curl(served, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.body)
        for sample in family.samples
    }
    assert samples[("llmos_worker_up", ("model", "sim"), ("worker", "sim@1"))] == 1
    assert samples[("llmos_events_total", ("event", "done"))] >= 1
    assert samples[("llmos_http_answers_total", ("status", "200"))] >= 1
    assert samples[("llmos_uptime_seconds",)] > 0


def test_rerank_passes_through_to_an_engine_that_has_it(served: Machine) -> None:
    answer = post(served, "/rerank", {"model": "ranker", "query": "q", "documents": ["a", "bcd"]})
    assert answer.status == 200, answer.body
    assert [result["relevance_score"] for result in answer.json["results"]] == [1, 3]


def test_a_client_that_disconnects_in_a_stream_cancels_its_request(served: Machine) -> None:
    with asking(served, "slow") as process:
        process.stdout.readline()
        wait_for_requests(served, "slow", 1, "running")
    wait_for_requests(served, "slow", 0)
    assert served.worker("slow@1").slots_used == 0


def test_a_client_that_disconnects_before_its_whole_answer_cancels_its_request(served: Machine) -> None:
    with socket.create_connection(("127.0.0.1", served.http_port)) as client:
        body = b'{"model": "slow", "prompt": "x", "max_tokens": 1000}'
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        wait_for_requests(served, "slow", 1, "running")
    wait_for_requests(served, "slow", 0)
    # The slot is free: the engine was told.
    answer = post(served, "/v1/completions", {"model": "slow", "prompt": "x", "max_tokens": 1})
    assert answer.status == 200


def test_a_client_that_disconnects_while_queued_is_never_run(served: Machine) -> None:
    with asking(served, "slow"):
        wait_for_requests(served, "slow", 1, "running")
        with asking(served, "slow"):
            wait_for_requests(served, "slow", 1, "ready")
        wait_for_requests(served, "slow", 1)
    wait_for_requests(served, "slow", 0)


def test_a_client_that_reads_nothing_slows_nobody_else(served: Machine) -> None:
    body = json.dumps({"model": "fast", "prompt": "x", "max_tokens": 200_000, "stream": True}).encode()
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", served.http_port))
        lazy.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        assert lazy.recv(12) == b"HTTP/1.1 200"
        gateway = served.worker("gateway@1").pid
        before = memory_bytes(gateway)
        for _ in range(5):
            begun = time.monotonic()
            answer = post(served, "/v1/completions", {"model": "fast", "prompt": "y", "max_tokens": 50})
            assert answer.status == 200
            assert time.monotonic() - begun < 5
        assert memory_bytes(gateway) - before < 64 << 20
    wait_for_requests(served, "fast", 0)


def memory_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_killed_gateway_comes_back_on_the_same_port_and_its_requests_end(served: Machine) -> None:
    old = served.wait_worker("gateway@1", "ready")
    with asking(served, "slow") as process:
        process.stdout.readline()
        os.kill(old.pid, signal.SIGKILL)
        # The socket is the daemon's: who connects meanwhile waits, and is not refused.
        assert curl(served, "/health").json == {"status": "ok"}
        assert process.wait(10) != 0
    served.wait_worker("gateway@1", "ready", not_pid=old.pid)
    wait_for_requests(served, "slow", 0)
    assert post(served, "/v1/completions", {"model": "sim", "prompt": "x", "max_tokens": 1}).status == 200


def test_a_gateway_outlives_a_killed_daemon_and_serves_the_next_one(a_machine: Machine) -> None:
    a_machine.configure(gateway=True)
    a_machine.model(SIMULATED)
    a_machine.start()
    assert curl(a_machine, "/health").status == 200
    old = a_machine.wait_worker("gateway@1", "ready").pid
    a_machine.kill()
    a_machine.start()
    assert a_machine.client.status().gateway_url == a_machine.url
    assert post(a_machine, "/v1/completions", {"model": "sim", "prompt": "x", "max_tokens": 1}).status == 200
    assert a_machine.worker("gateway@1").pid == old
    # Only now does this daemon open a socket of its own.
    os.kill(old, signal.SIGKILL)
    a_machine.wait_worker("gateway@1", "ready", not_pid=old)
    assert post(a_machine, "/v1/completions", {"model": "sim", "prompt": "x", "max_tokens": 1}).status == 200


def test_a_gateway_of_other_settings_does_not_go_on_at_the_next_daemon(a_machine: Machine) -> None:
    a_machine.configure(gateway=True)
    a_machine.start()
    old = a_machine.wait_worker("gateway@1", "ready").pid
    a_machine.kill()
    a_machine.configure('[scheduler]\nbody_max = "1K"', gateway=True)
    a_machine.start()
    a_machine.wait_worker("gateway@1", "ready", not_pid=old)
    assert post(a_machine, "/v1/completions", {"model": "x" * 2000}).status == 413


def test_a_gateway_without_a_daemon_ends_in_the_end(a_machine: Machine) -> None:
    a_machine.configure('[node]\norphan_timeout = "1s"', gateway=True)
    a_machine.start()
    a_machine.wait_worker("gateway@1", "ready")
    wait_for("answer", lambda: curl(a_machine, "/health").status == 200)
    a_machine.kill()
    wait_for("end of the gateway", lambda: not a_machine.processes())


def test_a_port_that_is_taken_is_said_and_nothing_is_started(a_machine: Machine) -> None:
    a_machine.configure(gateway=True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", a_machine.http_port))
        other.listen()
        a_machine.start(expect_failure=True)
        assert a_machine.daemon is not None
        assert a_machine.daemon.wait(20) == 1
    a_machine.daemon = None
    assert (
        f"gateway.listen: cannot listen on 127.0.0.1:{a_machine.http_port}: Address already in use" in a_machine.log()
    )
    assert a_machine.processes() == []
