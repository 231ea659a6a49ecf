"""A small honest daemon, for the tests of the library and the command: real gRPC and a real ROUTER on real sockets.

Its workers have states that move as a real one's do, a step for each list that a watcher gets. It computes nothing.
"""

# ruff: noqa: N802 - methods are named as the service names them.

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc

from llmos.protocol import frames as f
from llmos.v1 import control_pb2 as pb
from llmos.v1 import control_pb2_grpc as rpc
from tests.unit.fake_bus import FakeBus

REQUEST_ID = "00112233445566778899aabbccddeeff"
#: What a state becomes by itself. A worker of the model `bad` never loads.
NEXT_STATE = {"starting": "loading", "loading": "ready", "draining": "stopping", "stopping": "stopped"}
DOWN = ("stopped", "waiting", "failed", "backoff")


def _worker(name: str, model: str, state: str, **fields: Any) -> pb.Worker:
    return pb.Worker(
        name=name, model=model, kind="model", driver="llamacpp", state=state, slots=4, progress=-1, cpus=1, **fields
    )


class FakeControl(rpc.ControlServicer):
    """The control plane's answers. `calls` has the methods that were called; those in `failing` fail once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: dict[str, grpc.StatusCode] = {}
        self.changed = threading.Condition()
        self.limits = {"memory_max": "1G", "cpu_weight": ""}
        self.workers = {
            worker.name: worker
            for worker in (
                _worker("gemma3-270m@1", "gemma3-270m", "ready", pid=4711, engine_pid=4712, slots_used=2, queue=1,
                        memory_bytes=536870912, memory_resident_bytes=600000000, cpu_percent=93.25, uptime=134.5,
                        restarts=1, last_exit="killed by KILL", processes=2, threads=9, cpu_set="0-1"),
                _worker("bad@1", "bad", "failed", why="the engine ended with status 1\x1b[31m before it was ready"),
                _worker("sim@1", "sim", "stopped", simulated=True),
            )
        }  # fmt: skip
        self.models = {
            "gemma3-270m": pb.Model(
                name="gemma3-270m", aliases=["small"], kind="model", driver="llamacpp", routed=True, state="ready",
                workers_ready=1, workers_running=1, workers_max=2, queue=1, requests_running=2, slots=4, cpus=1,
                memory_bytes=734003200, file="/models.d/gemma3-270m.toml",
            ),
            "bad": pb.Model(name="bad", kind="model", driver="openai", state="failed", why="its worker has failed"),
            "sim": pb.Model(name="sim", kind="model", driver="simulated", state="stopped", simulated=True),
        }  # fmt: skip
        self.events = [
            pb.Event(cursor=1, time=1_700_000_000.5, kind="starting", subject="gemma3-270m@1", message="on its way"),
            pb.Event(cursor=2, time=1_700_000_001.5, kind="ready", subject="gemma3-270m@1"),
        ]
        self.log = [f"line {number}" for number in range(1, 151)] + ["\x1b[2Jwiped", "last\twords"]

    # -- inside ---------------------------------------------------------------------------------------------

    def _called(self, context: grpc.ServicerContext, method: str) -> None:
        with self.changed:
            self.calls.append(method)
            self.changed.notify_all()
        if method in self.failing:
            context.abort(self.failing.pop(method), f"{method} was made to fail")

    def _missing(self, context: grpc.ServicerContext, name: str) -> NoReturn:
        context.abort(grpc.StatusCode.NOT_FOUND, f"no model or worker {name!r}. See `llmos models`.")
        raise AssertionError("abort raises")

    def _named(self, context: grpc.ServicerContext, name: str) -> list[pb.Worker]:
        name = "gemma3-270m" if name == "small" else name
        found = [worker for worker in self.workers.values() if name in ("", worker.name, worker.model)]
        return found or self._missing(context, name)

    def _command(self, context: grpc.ServicerContext, method: str, name: str, state: str) -> pb.CommandResponse:
        self._called(context, method)
        workers = self._named(context, name)
        for worker in workers:
            self.move(worker, state)
        return pb.CommandResponse(workers=[worker.name for worker in workers])

    def move(self, worker: pb.Worker, state: str) -> None:
        with self.changed:
            worker.state = state
            worker.why = "" if state != "failed" else "the engine ended with status 1"
            worker.pid = 0 if state in DOWN else 5000
            self.changed.notify_all()

    def _step(self) -> bool:
        moving = [worker for worker in self.workers.values() if worker.state in NEXT_STATE]
        for worker in moving:
            broken = worker.model == "bad" and worker.state == "loading"
            self.move(worker, "failed" if broken else NEXT_STATE[worker.state])
        return bool(moving)

    def _follow(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Once now, and again after each change, while somebody listens."""
        context.add_callback(self.wake)
        while context.is_active():
            yield
            with self.changed:
                self.changed.wait_for(lambda: self._news or not context.is_active())
                self._news = False

    _news = False

    def wake(self) -> None:
        with self.changed:
            self._news = True
            self.changed.notify_all()

    # -- the service ----------------------------------------------------------------------------------------

    def GetStatus(self, request: Any, context: Any) -> pb.Status:
        self._called(context, "GetStatus")
        return pb.Status(
            version="0.1.0", pid=4242, uptime=3725, state="running", user="llmos", confinement="process", models=3,
            workers=1, requests_running=2, requests_waiting=1, counters={"accepted": 12, "bad_frames": 0},
            cpu_seconds=1.25, memory_bytes=41943040, gateway_url="http://127.0.0.1:8484",
        )  # fmt: skip

    def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
        self._called(context, "ListModels")
        return pb.ListModelsResponse(models=self.models.values())

    def GetModel(self, request: Any, context: Any) -> pb.Model:
        self._called(context, "GetModel")
        return self.models.get(request.name) or self._missing(context, request.name)

    def ApplyModel(self, request: Any, context: Any) -> pb.CommandResponse:
        self._called(context, "ApplyModel")
        if "modle" in request.toml:
            message = f"{request.file_name}: unknown key 'modle', perhaps 'model' is meant"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        return pb.CommandResponse(message=f"{request.file_name}: applied {len(request.toml)} characters")

    def DeleteModel(self, request: Any, context: Any) -> pb.CommandResponse:
        self._called(context, "DeleteModel")
        if request.name not in self.models:
            self._missing(context, request.name)
        del self.models[request.name]
        return pb.CommandResponse(message=f"model {request.name} is removed")

    def Reload(self, request: Any, context: Any) -> pb.ReloadResponse:
        self._called(context, "Reload")
        return pb.ReloadResponse(applied=["sim"], refused=["x.toml: no engine"])

    def ListWorkers(self, request: Any, context: Any) -> pb.ListWorkersResponse:
        self._called(context, "ListWorkers")
        return self._list(request, context)

    def _list(self, request: Any, context: Any) -> pb.ListWorkersResponse:
        with self.changed:
            found = [w for w in self._named(context, request.name) if request.all or w.state != "stopped"]
            return pb.ListWorkersResponse(workers=found)

    def GetWorker(self, request: Any, context: Any) -> pb.Worker:
        self._called(context, "GetWorker")
        return self.workers.get(request.name) or self._missing(context, request.name)

    def WatchWorkers(self, request: Any, context: Any) -> Iterator[pb.ListWorkersResponse]:
        self._called(context, "WatchWorkers")
        for _ in self._follow(context):
            yield self._list(request, context)
            if self._step():
                self.wake()

    def StartWorkers(self, request: Any, context: Any) -> pb.CommandResponse:
        if request.name == "sim@1":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "sim@1 needs 4 CPUs, 1 is free. Stop another.")
        return self._command(context, "StartWorkers", request.name, "starting")

    def StopWorkers(self, request: Any, context: Any) -> pb.CommandResponse:
        return self._command(context, "StopWorkers", request.name, "stopping" if request.now else "draining")

    def RestartWorkers(self, request: Any, context: Any) -> pb.CommandResponse:
        return self._command(context, "RestartWorkers", request.name, "starting")

    def ResetWorkers(self, request: Any, context: Any) -> pb.CommandResponse:
        return self._command(context, "ResetWorkers", request.name, "stopped")

    def KillWorkers(self, request: Any, context: Any) -> pb.CommandResponse:
        self._called(context, f"KillWorkers {request.signal}")
        if len(request.name) >= 6 and REQUEST_ID.startswith(request.name):
            return pb.CommandResponse()
        return pb.CommandResponse(workers=[worker.name for worker in self._named(context, request.name)])

    def GetLimits(self, request: Any, context: Any) -> pb.GetLimitsResponse:
        self._called(context, "GetLimits")
        limits = [
            pb.Limit(
                name=name,
                configured=value,
                in_force=value,
                enforced_by="process" if value else "",
                used="512M",
                peak="700M",
            )
            for name, value in self.limits.items()
        ]
        workers = self._named(context, request.name)
        return pb.GetLimitsResponse(
            limits=[pb.WorkerLimits(worker=worker.name, model=worker.model, limits=limits) for worker in workers]
        )

    def SetLimits(self, request: Any, context: Any) -> pb.GetLimitsResponse:
        for name in request.limits:
            if name not in self.limits:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"unknown limit {name!r}. See `llmos limits`.")
        self.limits.update(request.limits)
        return self.GetLimits(request, context)

    def ListRequests(self, request: Any, context: Any) -> pb.ListRequestsResponse:
        self._called(context, "ListRequests")
        running = pb.Request(
            id=REQUEST_ID, model="gemma3-270m", worker="gemma3-270m@1", tenant="uid:1000", state="running", attempt=1,
            tokens=12, prompt_tokens=6, age=1.5, waited=0.02, first_item=0.11, stream=True, path="/v1/completions",
            connected=True,
        )  # fmt: skip
        waiting = pb.Request(id="ff" * 16, model="gemma3-270m", tenant="uid:1000", state="ready", age=0.4, waited=0.4)
        return pb.ListRequestsResponse(requests=[running, waiting])

    def ListDevices(self, request: Any, context: Any) -> pb.ListDevicesResponse:
        self._called(context, "ListDevices")
        cpus = pb.Device(kind="cpu", id="cpus", name="a CPU", total=8, reserved=1, properties={"cores": "4"})
        memory = pb.Device(kind="memory", id="node0", total=16 << 30, reserved=700 << 20, workers=["gemma3-270m@1"])
        return pb.ListDevicesResponse(node="local", devices=[cpus, memory], notes=["no NVIDIA driver"])

    def Diagnose(self, request: Any, context: Any) -> pb.DiagnoseResponse:
        self._called(context, "Diagnose")
        ok = pb.Check(name="pidfd", result="ok", message="Linux 6.1 has it")
        missing = pb.Check(name="cgroup v2", result="missing", message="not writable", advice="run llmosd as root")
        return pb.DiagnoseResponse(checks=[ok, missing])

    def ReadLogs(self, request: Any, context: Any) -> Iterator[pb.LogLines]:
        self._called(context, "ReadLogs")
        if request.worker not in self.workers:
            self._missing(context, request.worker)
        sent = 0 if request.lines < 0 else max(0, len(self.log) - (request.lines or 100))
        if request.HasField("after"):
            sent = request.after
        for _ in self._follow(context) if request.follow else [None]:
            if self.log[sent:]:
                yield pb.LogLines(lines=self.log[sent:], position=len(self.log))
                sent = len(self.log)

    def WatchEvents(self, request: Any, context: Any) -> Iterator[pb.Event]:
        self._called(context, "WatchEvents")
        cursor = request.after
        for _ in self._follow(context) if request.follow else [None]:
            for event in self.events:
                if event.cursor > cursor:
                    cursor = event.cursor
                    yield event


class FakeDaemon:
    """Both sockets in `directory`, while it is started. It may be stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.control = FakeControl()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.bus = FakeBus(directory / "front.sock")

    def start(self) -> None:
        self._pool = ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool)
        add_servicer: Any = rpc.add_ControlServicer_to_server  # generated, and not typed
        add_servicer(self.control, self._server)
        self._server.add_insecure_port(f"unix:{self.directory / 'control.sock'}")
        self._server.start()
        asyncio.run_coroutine_threadsafe(self.bus.start(), self._loop).result(10)

    def stop(self) -> None:
        self._server.stop(0).wait(10)
        self.control.wake()
        self._pool.shutdown()
        asyncio.run_coroutine_threadsafe(self.bus.stop(), self._loop).result(10)

    def wait_for_call(self, method: str, timeout: float = 20) -> None:
        with self.control.changed:
            called = self.control.changed.wait_for(lambda: method in self.control.calls, timeout)
        assert called, f"{method} was not called: {self.control.calls}"

    def wait_for_cancel(self) -> None:
        """Until a client has cancelled a request."""
        asyncio.run_coroutine_threadsafe(self.bus.wait_for_kind(f.Kind.CANCEL), self._loop).result(20)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
