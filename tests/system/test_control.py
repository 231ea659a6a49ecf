"""The control plane, spoken to as grpcurl does: with nothing but server reflection. And what bad callers get."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from machine import DEADLINE_S, SIMULATED, Machine, machine, wait_for

import llmos

CONTROL = "llmos.v1.Control"
HEALTH = "grpc.health.v1.Health"


class Reflected:
    """A generic client, as grpcurl is one: it knows what the server tells of itself."""

    def __init__(self, machine: Machine) -> None:
        self.channel = grpc.insecure_channel(f"unix:{machine.runtime}/control.sock")
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = DescriptorPool(self.database)

    def methods(self, service: str) -> dict[str, Any]:
        return dict(self.pool.FindServiceByName(service).methods_by_name)

    def call(self, method: str, **fields: Any) -> Any:
        """The answer as JSON; of a stream, an iterator over such."""
        service, _, name = method.rpartition("/")
        found = self.methods(service)[name]
        ask, answer = map(message_factory.GetMessageClass, (found.input_type, found.output_type))
        kind = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        stub = kind(f"/{method}", request_serializer=ask.SerializeToString, response_deserializer=answer.FromString)
        called = stub(ask(**fields), timeout=DEADLINE_S)
        return map(_as_json, called) if found.server_streaming else _as_json(called)


def _as_json(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    with machine() as made:
        made.model(SIMULATED)
        made.start()
        made.client.run("sim", "x", max_tokens=1)
        yield made


@pytest.fixture(scope="module")
def server(running: Machine) -> Iterator[Reflected]:
    reflected = Reflected(running)
    yield reflected
    reflected.channel.close()


def refused(server: Reflected, method: str, **fields: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        server.call(f"{CONTROL}/{method}", **fields)
    return caught.value.code(), caught.value.details()


# -- reflection and health --------------------------------------------------------------------------------------------


def test_reflection_lists_the_services(server: Reflected) -> None:
    assert set(server.database.get_services()) == {CONTROL, HEALTH, "grpc.reflection.v1alpha.ServerReflection"}


def test_reflection_describes_every_method_with_its_types(server: Reflected) -> None:
    methods = server.methods(CONTROL)
    assert {"GetStatus", "ListModels", "ApplyModel", "ListWorkers", "KillWorkers", "SetLimits", "ReadLogs"} <= set(
        methods
    )
    assert methods["WatchEvents"].server_streaming
    assert methods["GetWorker"].output_type.fields_by_name["engine_pid"].number == 6


def test_a_generic_client_gets_status_and_workers(server: Reflected, running: Machine) -> None:
    status = server.call(f"{CONTROL}/GetStatus")
    assert running.daemon is not None
    assert (status["state"], status["pid"], status["models"]) == ("running", running.daemon.pid, 1)
    (worker,) = server.call(f"{CONTROL}/ListWorkers")["workers"]
    assert (worker["name"], worker["state"], worker["simulated"]) == ("sim@1", "ready", True)
    assert os.path.exists(f"/proc/{worker['pid']}")  # noqa: PTH110


def test_the_standard_health_service_answers_and_is_watched(server: Reflected) -> None:
    for service in ("", CONTROL):
        assert server.call(f"{HEALTH}/Check", service=service) == {"status": "SERVING"}
    assert next(server.call(f"{HEALTH}/Watch", service=CONTROL)) == {"status": "SERVING"}
    with pytest.raises(grpc.RpcError) as caught:
        server.call(f"{HEALTH}/Check", service="no.such.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_who_watches_health_hears_of_the_end(a_machine: Machine) -> None:
    a_machine.start()
    server = Reflected(a_machine)
    states = server.call(f"{HEALTH}/Watch", service=CONTROL)
    assert next(states) == {"status": "SERVING"}
    heard: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: heard.append(next(states)))
    thread.start()
    assert a_machine.stop() == 0
    thread.join(DEADLINE_S)
    server.channel.close()
    assert heard == [{"status": "NOT_SERVING"}]


# -- what bad callers get ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["GetModel", "GetWorker", "ListWorkers", "StartWorkers", "StopWorkers", "RestartWorkers", "ResetWorkers",
     "KillWorkers", "GetLimits", "SetLimits", "ListRequests", "DeleteModel"],
)  # fmt: skip
def test_an_unknown_name_is_not_found_and_the_known_ones_are_told(server: Reflected, method: str) -> None:
    code, details = refused(server, method, name="smi")
    assert code is grpc.StatusCode.NOT_FOUND
    assert details == "no model or worker 'smi'; models: sim"


@pytest.mark.parametrize("method", ["GetModel", "GetWorker", "StartWorkers", "KillWorkers", "GetLimits", "SetLimits"])
def test_no_name_at_all_is_not_found_too(server: Reflected, method: str) -> None:
    assert refused(server, method)[0] is grpc.StatusCode.NOT_FOUND


def test_logs_of_an_unknown_worker_are_not_found(server: Reflected) -> None:
    for worker in ("smi", "", "../../daemon"):
        with pytest.raises(grpc.RpcError) as caught:
            list(server.call(f"{CONTROL}/ReadLogs", worker=worker))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            'model = "x"\n[engine]\ndriver = "simulatd"',
            "file: engine.driver: expected one of .*; did you mean 'simulated'",
        ),
        ('modle = "x"', "file: unknown key 'modle'; did you mean 'model'?"),
        ("x y", "file: not valid TOML: .*line 1"),
        ("#" * 300_000, "file: has 300000 characters; at most 262144 are read"),
    ],
)
def test_a_wrong_model_file_is_an_invalid_argument_and_changes_nothing(
    server: Reflected, toml: str, message: str
) -> None:
    code, details = refused(server, "ApplyModel", toml=toml, file_name="file")
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert re.match(message, details), details
    assert len(server.call(f"{CONTROL}/ListModels")["models"]) == 1


def test_wrong_limits_and_signals_are_invalid_arguments(server: Reflected) -> None:
    code, details = refused(server, "SetLimits", name="sim", limits={"nise": "5"})
    assert (code, details) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "limits: unknown key 'nise'; did you mean 'nice'?",
    )
    assert refused(server, "SetLimits", name="sim", limits={"nice": "--5"})[0] is grpc.StatusCode.INVALID_ARGUMENT
    for signal in (-1, 65, 1000):
        code, details = refused(server, "KillWorkers", name="sim", signal=signal)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "is not a signal" in details


def test_an_oversized_message_is_refused_and_the_daemon_goes_on(server: Reflected) -> None:
    code, _ = refused(server, "ApplyModel", toml="#" * (5 << 20))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.call(f"{CONTROL}/GetStatus")["state"] == "running"


#: The preface of HTTP/2 and an empty SETTINGS frame (RFC 9113, 3.4 and 6.5).
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4096),
        PREFACE[:10],
        PREFACE,
        # HEADERS of 64 bytes announced, of which 5 come.
        PREFACE + b"\0\0\x40\1\4\0\0\0\1" + b"half!",
        PREFACE + b"\xff\xff\xff\0\0\0\0\0\1" + os.urandom(512),
    ],
)
def test_garbage_on_the_control_socket_hurts_nobody(running: Machine, server: Reflected, data: bytes) -> None:
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as bad:
            bad.connect(str(running.runtime / "control.sock"))
            bad.sendall(data)
    assert server.call(f"{CONTROL}/GetStatus")["state"] == "running"


def test_half_a_message_of_a_call_hurts_nobody(running: Machine, server: Reflected) -> None:
    # A length-prefixed gRPC message that says 100 bytes and has 3, and one that is not protobuf.
    for data in (b"\x0a\x64abc", b"\xff\xff\xff\xff"):
        call = server.channel.unary_unary(f"/{CONTROL}/GetModel", request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.RpcError) as caught:
            call(data, timeout=DEADLINE_S)
        assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert server.call(f"{CONTROL}/GetStatus")["state"] == "running"
    assert "control plane: Error parsing message" in running.log()


# -- streams ----------------------------------------------------------------------------------------------------------


def test_workers_are_watched_as_they_change(server: Reflected, running: Machine) -> None:
    lists = server.call(f"{CONTROL}/WatchWorkers", name="sim", all=True)
    assert next(lists)["workers"][0]["state"] == "ready"
    running.client.restart("sim")
    seen = [wait_for("another state", lambda: next(lists)["workers"][0]["state"])]
    while seen[-1] != "ready" or "loading" not in seen:
        seen.append(next(lists)["workers"][0]["state"])
    assert "stopping" in seen


def test_events_go_on_from_a_cursor_without_a_gap_or_a_repeat(server: Reflected, running: Machine) -> None:
    running.client.restart("sim")
    running.wait_worker("sim@1", "ready")
    whole = list(server.call(f"{CONTROL}/WatchEvents"))
    assert [event["kind"] for event in whole][:1] == ["applied"]
    cursors = [int(event["cursor"]) for event in whole]
    assert cursors == list(range(cursors[0], cursors[0] + len(cursors)))
    middle = cursors[len(cursors) // 2]
    rest = [event for event in whole if int(event["cursor"]) > middle]
    assert list(server.call(f"{CONTROL}/WatchEvents", after=middle))[: len(rest)] == rest
    # One that is older than what is kept starts at the oldest.
    assert next(server.call(f"{CONTROL}/WatchEvents", after=1)) == whole[0]
    followed = server.call(f"{CONTROL}/WatchEvents", after=cursors[-1], follow=True)
    running.client.stop("sim")
    assert next(followed)["message"] == "stopped by an operator"
    running.wait_worker("sim@1", "stopped")
    running.client.start("sim")
    running.wait_worker("sim@1", "ready")


def test_the_librarys_events_go_on_over_a_restart_of_the_daemon(a_machine: Machine) -> None:
    a_machine.model(SIMULATED)
    a_machine.start()
    a_machine.client.run("sim", "x", max_tokens=1)
    cursors: list[int] = []
    done = threading.Event()

    def follow() -> None:
        with llmos.Client(str(a_machine.runtime)) as client:
            for event in client.events(follow=True):
                cursors.append(event.cursor)
                if event.kind == "stopped" and event.subject == "sim@1":
                    break
        done.set()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    wait_for("events", lambda: len(cursors) > 3)
    before = len(cursors)
    a_machine.kill()
    a_machine.start()
    a_machine.client.stop("sim")
    assert done.wait(DEADLINE_S)
    assert len(cursors) > before
    assert cursors == sorted(set(cursors))
