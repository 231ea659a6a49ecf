"""The library against a small daemon: typed results, failures by meaning, waiting, and a daemon that restarts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import pytest

import llmos
from llmos import errors, types
from llmos.v1 import control_pb2 as pb
from tests.unit.fake_bus import WORDS
from tests.unit.fake_daemon import REQUEST_ID, FakeDaemon

TEXT = "".join(WORDS)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[llmos.Client]:
    with llmos.Client(str(daemon.directory)) as connected:
        yield connected


def with_client(daemon: FakeDaemon, body: Callable[[llmos.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), llmos.AsyncClient(str(daemon.directory)) as client:
            await body(client)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (types.Status, pb.Status), (types.Model, pb.Model), (types.Worker, pb.Worker), (types.Request, pb.Request),
        (types.Limit, pb.Limit), (types.WorkerLimits, pb.WorkerLimits), (types.Device, pb.Device),
        (types.Devices, pb.ListDevicesResponse), (types.Check, pb.Check), (types.Event, pb.Event),
        (types.Command, pb.CommandResponse), (types.Reloaded, pb.ReloadResponse),
    ],
)  # fmt: skip
def test_a_result_has_every_field_of_its_message(result: type[types.Result], message: type) -> None:
    assert list(result.__struct_fields__) == [field.name for field in message.DESCRIPTOR.fields]  # type: ignore[attr-defined]
    result.of(message())


def test_results_are_typed_and_plain(client: llmos.Client) -> None:
    (worker, failed) = client.ps()
    assert (worker.name, worker.state, worker.memory_bytes) == ("gemma3-270m@1", "ready", 536870912)
    assert worker.gpus == ()
    assert failed.state == "failed"
    assert len(client.ps(include_stopped=True)) == 3
    assert client.status().counters == {"accepted": 12, "bad_frames": 0}
    assert client.model("gemma3-270m").aliases == ("small",)
    assert client.devices().devices[0].properties == {"cores": "4"}
    assert client.requests()[0].id == REQUEST_ID
    assert client.doctor()[1].advice == "run llmosd as root"
    assert client.worker("sim@1").simulated
    with pytest.raises(AttributeError):
        worker.pid = 1  # type: ignore[misc]


def test_a_model_file_is_applied_by_path_or_text(client: llmos.Client, tmp_path: Path) -> None:
    file = tmp_path / "sim.toml"
    file.write_text('model = "sim"\n')
    assert client.apply(file).message == f"{file}: applied 14 characters"
    assert client.apply('model = "sim"', file_name="text").message == "text: applied 13 characters"
    with pytest.raises(errors.Invalid, match="modle"):
        client.apply("modle = 1")
    with pytest.raises(errors.Invalid, match=r"nowhere\.toml"):
        client.apply(tmp_path / "nowhere.toml")


def test_limits_are_read_and_set(client: llmos.Client) -> None:
    (before,) = client.limits("gemma3-270m")
    assert {limit.name: limit.configured for limit in before.limits} == {"memory_max": "1G", "cpu_weight": ""}
    (after,) = client.set_limits("small", {"memory_max": "2G"})
    assert after.limits[0].in_force == "2G"
    with pytest.raises(errors.Invalid, match="unknown limit"):
        client.set_limits("gemma3-270m", {"memory_maximum": "2G"})


@pytest.mark.parametrize("signal", [9, "9", "KILL", "kill", "SIGKILL"])
def test_a_signal_is_a_name_or_a_number(client: llmos.Client, daemon: FakeDaemon, signal: int | str) -> None:
    assert client.kill("gemma3-270m", signal).workers == ("gemma3-270m@1",)
    assert daemon.control.calls[-1] == "KillWorkers 9"


def test_what_is_no_signal_is_refused_here(client: llmos.Client) -> None:
    with pytest.raises(errors.Invalid, match="no signal"):
        client.kill("gemma3-270m", "SIGNOTHING")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.Refused),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.Invalid),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.QueueFull),
        (grpc.StatusCode.INTERNAL, errors.InternalError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Unsupported),
    ],
)
def test_a_status_becomes_an_exception_by_its_meaning(
    client: llmos.Client, daemon: FakeDaemon, status: grpc.StatusCode, kind: type[errors.LlmosError]
) -> None:
    daemon.control.failing["GetStatus"] = status
    with pytest.raises(kind, match="was made to fail"):
        client.status()


# -- waiting and following ------------------------------------------------------------------------------------


def test_wait_comes_back_when_all_workers_are_there(client: llmos.Client) -> None:
    (worker,) = client.wait(client.restart("gemma3-270m").workers, timeout=20)
    assert worker.state == "ready"


def test_wait_ends_with_the_reason_when_a_worker_fails(client: llmos.Client) -> None:
    client.start("bad")
    with pytest.raises(errors.WorkerFailed, match="ended with status 1") as caught:
        client.wait("bad", timeout=20)
    assert (caught.value.worker, caught.value.state) == ("bad@1", "failed")


def test_wait_gives_up_in_time_and_says_how_far_it_came(client: llmos.Client) -> None:
    with pytest.raises(errors.DeadlineExceeded, match=r"sim@1 is stopped"):
        client.wait("sim", timeout=0.1)


def test_events_go_on_after_a_restart_without_a_gap_or_a_repeat(daemon: FakeDaemon) -> None:
    async def body(client: llmos.AsyncClient) -> None:
        events = client.events(follow=True)
        assert [(await anext(events)).cursor for _ in range(2)] == [1, 2]
        await asyncio.to_thread(daemon.stop)
        daemon.control.events.append(pb.Event(cursor=3, kind="stopped", subject="gemma3-270m@1"))
        await asyncio.to_thread(daemon.start)
        assert (await anext(events)).cursor == 3
        await events.aclose()

    with_client(daemon, body)


def test_a_followed_log_goes_on_after_a_restart_where_it_was(daemon: FakeDaemon) -> None:
    async def body(client: llmos.AsyncClient) -> None:
        lines = client.logs("gemma3-270m@1", lines=2, follow=True)
        assert [await anext(lines) for _ in range(2)] == ["\x1b[2Jwiped", "last\twords"]
        await asyncio.to_thread(daemon.stop)
        daemon.control.log.append("and one more")
        await asyncio.to_thread(daemon.start)
        assert await anext(lines) == "and one more"
        await lines.aclose()

    with_client(daemon, body)


def test_watching_goes_on_after_a_restart(daemon: FakeDaemon) -> None:
    async def body(client: llmos.AsyncClient) -> None:
        lists = client.watch()
        assert len(await anext(lists)) == 2
        await asyncio.to_thread(daemon.stop)
        await asyncio.to_thread(daemon.start)
        assert len(await anext(lists)) == 2
        await lists.aclose()

    with_client(daemon, body)


# -- a daemon that is away ------------------------------------------------------------------------------------


def test_a_call_waits_for_a_daemon_that_restarts(client: llmos.Client, daemon: FakeDaemon) -> None:
    client.status()
    daemon.stop()
    # The socket's file is gone with the server; a client that has its address waits all the same.
    again = threading.Thread(target=daemon.start)
    answers: list[types.Status] = []
    asking = threading.Thread(target=lambda: answers.append(client.status()))
    asking.start()
    again.start()
    again.join()
    asking.join()
    assert answers[0].version == "0.1.0"


def test_a_call_that_broke_off_is_made_again_if_that_does_no_harm(client: llmos.Client, daemon: FakeDaemon) -> None:
    daemon.control.failing["StopWorkers"] = grpc.StatusCode.UNAVAILABLE
    assert client.stop("gemma3-270m").workers == ("gemma3-270m@1",)
    daemon.control.failing["RestartWorkers"] = grpc.StatusCode.UNAVAILABLE
    with pytest.raises(errors.DaemonUnreachable, match="nobody knows"):
        client.restart("gemma3-270m")
    assert daemon.control.calls.count("RestartWorkers") == 1


def test_a_daemon_that_stays_away_is_an_error_that_says_why(daemon: FakeDaemon) -> None:
    with llmos.Client(str(daemon.directory), patience=0.2) as client:
        daemon.stop()
        with pytest.raises(errors.DaemonUnreachable, match=r"control\.sock"):
            client.status()
        with pytest.raises(errors.DaemonUnreachable, match=r"front\.sock"):
            client.run("gemma3-270m", "x")
        daemon.start()


# -- requests to models ---------------------------------------------------------------------------------------


def test_run_completes_a_prompt(client: llmos.Client, daemon: FakeDaemon) -> None:
    answer = client.run("gemma3-270m", "The capital of France is", max_tokens=5, temperature=None)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == (TEXT, 6, len(WORDS))
    (request,) = daemon.bus.requests.values()
    assert request.submit.path == "/v1/completions"
    assert request.body == b'{"model":"gemma3-270m","prompt":"The capital of France is","max_tokens":5}'


def test_run_streams_pieces_and_then_has_the_counts(client: llmos.Client) -> None:
    with client.run("gemma3-270m", "x", stream=True) as pieces:
        assert [piece.text for piece in pieces] == list(WORDS)
        assert pieces.completion is not None
        assert (pieces.completion.text, pieces.completion.completion_tokens) == (TEXT, len(WORDS))


def test_chat_and_messages_use_the_chat_endpoint(client: llmos.Client, daemon: FakeDaemon) -> None:
    assert client.run("gemma3-270m", "Hello", chat=True).text == TEXT
    messages = [{"role": "user", "content": "Hello"}]
    assert "".join(piece.text for piece in client.run("gemma3-270m", messages=messages, stream=True)) == TEXT
    assert [request.submit.path for request in daemon.bus.requests.values()] == ["/v1/chat/completions"] * 2


def test_both_a_prompt_and_messages_or_neither_is_refused(client: llmos.Client) -> None:
    with pytest.raises(errors.Invalid, match="neither"):
        client.run("gemma3-270m")
    with pytest.raises(errors.Invalid, match="both"):
        client.run("gemma3-270m", "x", messages=[])
    with pytest.raises(errors.Invalid, match="JSON"):
        client.run("gemma3-270m", "x", stop=object())


def test_the_asynchronous_client_streams_too(daemon: FakeDaemon) -> None:
    async def body(client: llmos.AsyncClient) -> None:
        texts = [piece.text async for piece in client.run("gemma3-270m", "x", stream=True)]
        assert texts == list(WORDS)
        assert (await client.run("gemma3-270m", "x")).text == TEXT
        both = await asyncio.gather(client.run("gemma3-270m", "x"), client.embed("gemma3-270m", ["x"]))
        assert both[1] == [[0.5, -0.5]]

    with_client(daemon, body)


def test_embeddings_and_tokens_come_as_numbers(client: llmos.Client) -> None:
    assert client.embed("gemma3-270m", "x") == [[0.5, -0.5]]
    assert client.tokenize("gemma3-270m", "The capital") == [2, 818, 5279]


def test_a_failed_request_is_an_exception_by_its_meaning(client: llmos.Client) -> None:
    with pytest.raises(errors.NotFound, match="nosuch"):
        client.run("nosuch", "x")
    with pytest.raises(errors.QueueFull) as full:
        client.run("full", "x")
    assert full.value.retry_after_s == 1.5
    with pytest.raises(errors.EngineError, match="no chat template") as broken:
        client.run("broken", "x")
    assert (broken.value.status, b"chat template" in broken.value.body) == (400, True)
    with pytest.raises(errors.DeadlineExceeded):
        client.run("silent", "x", timeout=0.05)


def test_a_stream_that_breaks_gives_what_there_was_and_then_the_failure(client: llmos.Client) -> None:
    texts = []
    with pytest.raises(errors.WorkerLost, match="lost-1"):
        for piece in client.run("lost", "x", stream=True):
            texts.append(piece.text)  # noqa: PERF401 - what came before the exception is the point
    assert texts == list(WORDS[:2])


def test_a_stream_that_is_left_is_cancelled(client: llmos.Client, daemon: FakeDaemon) -> None:
    with client.run("endless", "x", stream=True) as pieces:
        next(pieces)
    (request,) = daemon.bus.requests.values()
    client.run("gemma3-270m", "x")  # whatever was sent before this has arrived
    assert request.final is not None


def test_a_client_may_be_used_from_several_threads(client: llmos.Client) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(client.run("many", "x").text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert len(set(texts)) == 1


def test_a_closed_client_says_so(daemon: FakeDaemon) -> None:
    client = llmos.Client(str(daemon.directory))
    client.close()
    client.close()
    with pytest.raises(errors.LlmosError, match="closed"):
        client.status()


def test_importing_llmos_loads_neither_grpc_nor_protobuf() -> None:
    code = (
        "import sys, llmos; llmos.Client, llmos.AsyncClient; sys.exit('grpc' in sys.modules or 'google' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
