"""The Control service of `proto/llmos/v1/control.proto`: turns calls into kernel commands and reads."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator
from typing import Any, Final, NoReturn

import grpc
import psutil

from llmos.v1 import control_pb2 as pb
from llmos.v1 import control_pb2_grpc as pb_grpc
from llmosd.control import render
from llmosd.control.logs import follow_log
from llmosd.control.machine import Machine, Refused
from llmosd.declared import DeclarationError
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.spec import Limits
from llmosd.kernel.views import WorkerView
from llmosd.modelfile import parse_limits

#: Seconds between two looks at figures, for those who watch.
WATCH_S: Final = 1.0
_SIGNALS: Final = range(1, 65)
_CODES: Final = {
    "not_found": grpc.StatusCode.NOT_FOUND,
    "refused": grpc.StatusCode.FAILED_PRECONDITION,
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
}


class ControlService(pb_grpc.ControlServicer):
    """See the module. One instance serves all calls, on the daemon's loop."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    # -- the daemon -----------------------------------------------------------------------------------------

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.Status:  # noqa: N802
        machine = self._machine
        about, requests = machine.about, machine.kernel.requests()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return pb.Status(
            version=about.version,
            pid=os.getpid(),
            uptime=machine.uptime(),
            state="stopping" if machine.stopping() else "running",
            user=about.user,
            confinement=about.confinement,
            models_directory=str(about.models_directory),
            runtime_directory=str(about.runtime_directory),
            log_directory=str(about.log_directory),
            bus_address=about.bus_address,
            gateway_url=about.gateway_url,
            models=sum(view.spec.kind == "model" for view in machine.kernel.models()),
            workers=sum(view.pid > 0 for view in machine.kernel.workers()),
            requests_running=sum(view.state == "running" for view in requests),
            requests_waiting=sum(view.state in ("ready", "blocked") for view in requests),
            counters=machine.counters(),
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            memory_bytes=psutil.Process().memory_info().rss,
        )

    async def ListDevices(self, request: pb.ListDevicesRequest, context: Any) -> pb.ListDevicesResponse:  # noqa: N802
        rows, notes = await self._machine.devices()
        devices = [
            pb.Device(
                kind=row.kind, id=row.id, name=row.name, total=row.total, reserved=row.reserved, used=row.used,
                workers=row.workers, properties=row.properties,
            )
            for row in rows
        ]  # fmt: skip
        return pb.ListDevicesResponse(node="local", devices=devices, notes=notes)

    async def Diagnose(self, request: pb.DiagnoseRequest, context: Any) -> pb.DiagnoseResponse:  # noqa: N802
        rows = await self._machine.diagnose()
        checks = [pb.Check(name=r.name, result=r.result, message=r.message, advice=r.advice) for r in rows]
        return pb.DiagnoseResponse(checks=checks)

    # -- models ---------------------------------------------------------------------------------------------

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        names = sorted(view.spec.model for view in self._machine.kernel.models())
        return pb.ListModelsResponse(models=[self._model(name, with_toml=False) for name in names])

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:  # noqa: N802
        name = self._machine.kernel.fleet.names.get(request.name)
        if name is None:
            await self._no_such(context, request.name)
        return self._model(name, with_toml=True)

    def _model(self, name: str, *, with_toml: bool) -> pb.Model:
        kernel = self._machine.kernel
        view = next(view for view in kernel.models() if view.spec.model == name)
        states = [worker.state for worker in kernel.workers() if worker.model == name]
        return render.model(view, self._machine, states, with_toml=with_toml)

    async def ApplyModel(self, request: pb.ApplyModelRequest, context: Any) -> pb.CommandResponse:  # noqa: N802
        try:
            replied = await self._machine.apply(request.toml, request.file_name or "model file")
        except Refused as refused:
            await _abort(context, refused)
        return pb.CommandResponse(workers=replied.workers, message=replied.message)

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Any) -> pb.CommandResponse:  # noqa: N802
        try:
            replied = await self._machine.remove(request.name)
        except Refused as refused:
            await _abort(context, refused)
        return pb.CommandResponse(workers=replied.workers, message=replied.message)

    async def Reload(self, request: pb.ReloadRequest, context: Any) -> pb.ReloadResponse:  # noqa: N802
        applied, removed, refused = await self._machine.reload()
        return pb.ReloadResponse(applied=applied, removed=removed, refused=refused)

    async def Upgrade(self, request: pb.UpgradeRequest, context: Any) -> pb.UpgradeResponse:  # noqa: N802
        try:
            return pb.UpgradeResponse(version=await self._machine.upgrade())
        except Refused as refused:
            return await _abort(context, refused)

    # -- workers --------------------------------------------------------------------------------------------

    def _workers(self, name: str, *, every: bool) -> list[WorkerView]:
        kernel = self._machine.kernel
        model = kernel.fleet.names.get(name, name)
        views = [view for view in kernel.workers() if not name or name == view.name or model == view.model]
        return sorted((view for view in views if every or view.state != "stopped"), key=lambda view: view.name)

    async def _check_name(self, context: Any, name: str, *, required: bool = False) -> None:
        fleet = self._machine.kernel.fleet
        if (name or required) and name not in fleet.workers and fleet.names.get(name, name) not in fleet.models:
            await self._no_such(context, name)

    async def _no_such(self, context: Any, name: str) -> NoReturn:
        known = ", ".join(sorted(self._machine.kernel.fleet.models)) or "none"
        await context.abort(grpc.StatusCode.NOT_FOUND, f"no model or worker {name!r}; models: {known}")
        raise AssertionError("abort raises")

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Any) -> pb.ListWorkersResponse:  # noqa: N802
        await self._check_name(context, request.name)
        views = self._workers(request.name, every=request.all)
        return pb.ListWorkersResponse(workers=[render.worker(view, self._machine) for view in views])

    async def GetWorker(self, request: pb.GetWorkerRequest, context: Any) -> pb.Worker:  # noqa: N802
        views = [view for view in self._machine.kernel.workers() if view.name == request.name]
        if not views:
            await self._no_such(context, request.name)
        return render.worker(views[0], self._machine)

    async def WatchWorkers(  # noqa: N802
        self, request: pb.ListWorkersRequest, context: Any
    ) -> AsyncIterator[pb.ListWorkersResponse]:
        while True:
            changed = asyncio.ensure_future(self._machine.events.changed())
            try:
                yield await self.ListWorkers(request, context)
                await asyncio.wait([changed], timeout=WATCH_S)
            finally:
                changed.cancel()

    async def StartWorkers(self, request: pb.NameRequest, context: Any) -> pb.CommandResponse:  # noqa: N802
        return await self._command(context, lambda call: on.Start(call, request.name))

    async def StopWorkers(self, request: pb.StopRequest, context: Any) -> pb.CommandResponse:  # noqa: N802
        return await self._command(context, lambda call: on.Stop(call, request.name, request.now))

    async def RestartWorkers(self, request: pb.NameRequest, context: Any) -> pb.CommandResponse:  # noqa: N802
        return await self._command(context, lambda call: on.Restarted(call, request.name))

    async def ResetWorkers(self, request: pb.NameRequest, context: Any) -> pb.CommandResponse:  # noqa: N802
        return await self._command(context, lambda call: on.Reset(call, request.name))

    async def KillWorkers(self, request: pb.KillRequest, context: Any) -> pb.CommandResponse:  # noqa: N802
        number = request.signal or 15
        if number not in _SIGNALS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{number} is not a signal: they are 1 to 64")
        return await self._command(context, lambda call: on.Kill(call, request.name, number))

    async def _command(self, context: Any, make: Any) -> pb.CommandResponse:
        try:
            replied: do.Replied = await self._machine.command(make)
        except Refused as refused:
            await _abort(context, refused)
        return pb.CommandResponse(workers=replied.workers, message=replied.message)

    # -- limits ---------------------------------------------------------------------------------------------

    async def GetLimits(self, request: pb.NameRequest, context: Any) -> pb.GetLimitsResponse:  # noqa: N802
        await self._check_name(context, request.name, required=True)
        machine = self._machine
        fleet = machine.kernel.fleet
        views = [view for view in self._workers(request.name, every=True) if view.pid]
        if views:
            rows = [
                pb.WorkerLimits(
                    worker=view.name,
                    model=view.model,
                    limits=render.limits(
                        fleet.workers[view.name].limits, machine, view, await machine.gauges(view.name)
                    ),
                )
                for view in views
            ]
        else:
            worker = fleet.workers.get(request.name)
            model = fleet.models[worker.model if worker else fleet.names.get(request.name, request.name)]
            limits = render.limits(model.spec.limits, machine, None)
            rows = [pb.WorkerLimits(model=model.spec.model, limits=limits)]
        return pb.GetLimitsResponse(limits=rows)

    async def SetLimits(self, request: pb.SetLimitsRequest, context: Any) -> pb.GetLimitsResponse:  # noqa: N802
        await self._check_name(context, request.name, required=True)
        machine = self._machine
        try:
            changes = parse_limits(dict(request.limits))
            asked = {name: value for name, value in changes.items() if value is not None}
            machine.check_limits(Limits(**asked))  # type: ignore[arg-type]  # parse_limits checked the types
            await machine.command(lambda call: on.SetLimits(call, request.name, changes))
            fleet = machine.kernel.fleet
            if request.name not in fleet.workers:
                machine.keep_limits(fleet.names.get(request.name, request.name), changes)
        except DeclarationError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Refused as refused:
            await _abort(context, refused)
        return await self.GetLimits(pb.NameRequest(name=request.name), context)

    # -- requests, logs, events -----------------------------------------------------------------------------

    async def ListRequests(self, request: pb.ListRequestsRequest, context: Any) -> pb.ListRequestsResponse:  # noqa: N802
        await self._check_name(context, request.name)
        kernel, name = self._machine.kernel, request.name
        model = kernel.fleet.names.get(name, name)
        views = [view for view in kernel.requests() if not name or name == view.worker or model == view.model]
        views.sort(key=lambda view: view.accepted_at)
        now = self._machine.now()
        return pb.ListRequestsResponse(requests=[render.request(view, now) for view in views])

    async def ReadLogs(self, request: pb.ReadLogsRequest, context: Any) -> AsyncIterator[pb.LogLines]:  # noqa: N802
        fleet = self._machine.kernel.fleet
        name = request.worker
        if name not in fleet.workers:
            # Its log stays when a worker is forgotten: with an earlier daemon, or with its model.
            logged = self._machine.logged_workers(fleet.names.get(name, name))
            if not logged:
                await self._check_name(context, name, required=True)
                logged = sorted(fleet.models[fleet.names.get(name, name)].workers)
            if not logged:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"no worker of {name} has run yet")
            name = logged[0]
        after = request.after if request.HasField("after") else None
        path = self._machine.log_file(name)
        async for message in follow_log(path, request.lines or 100, follow=request.follow, after=after):
            yield pb.LogLines(lines=message.lines, position=message.position)

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Any) -> AsyncIterator[pb.Event]:  # noqa: N802
        log, cursor = self._machine.events, request.after
        while True:
            changed = asyncio.ensure_future(log.changed())
            try:
                for event in log.after(cursor):
                    cursor, what = event.cursor, event.what
                    yield pb.Event(
                        cursor=cursor, time=event.time, kind=what.kind, subject=what.subject, model=what.model,
                        message=what.message,
                    )  # fmt: skip
                if not request.follow:
                    return
                await changed
            finally:
                changed.cancel()


async def _abort(context: Any, refused: Refused) -> NoReturn:
    await context.abort(_CODES.get(refused.code, grpc.StatusCode.INTERNAL), str(refused))
    raise AssertionError("abort raises")
